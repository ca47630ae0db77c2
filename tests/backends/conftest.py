"""The services that tests here may ask for."""

from services import ssh_hosts

__all__ = ["ssh_hosts"]
