"""The services that tests here may ask for."""

from services import slurm, ssh_hosts

__all__ = ["slurm", "ssh_hosts"]
