"""Encryption between the parts of a pool, wherever anything leaves this machine."""

from __future__ import annotations

import ipaddress
import logging
from pathlib import Path
from typing import Any

from distributed.security import Security

from flame_dask.options import PoolOptions

#: Which environment variables give a worker or scheduler of Dask its certificates.
_VARIABLE = "DASK_DISTRIBUTED__COMM__"


def is_loopback(host: str | None) -> bool:
    """Tell whether an address can be reached from this machine only; ``None`` is the default."""
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # a name, or an interface: what it stands for is not for us to say
        return False


def security_of(options: PoolOptions, *hosts: str | None) -> Security | None:
    """Return what connections of a pool are secured with; ``None`` on loopback alone.

    Parameters
    ----------
    options
        The pool's options. Certificates of the user's own are taken from there.
    hosts
        Where the parts of the pool are.
    """
    if options.security is None and not all(map(is_loopback, hosts)):
        made: Security = Security.temporary()
        return made
    given: Security | None = options.security
    return given


def environment(security: Security | None, role: str) -> dict[str, str]:
    """Return the variables by which a Dask process elsewhere gets its certificates.

    Never by its arguments: those are for all of its machine to see.

    Parameters
    ----------
    security
        What ``security_of`` gave.
    role
        ``worker`` or ``scheduler``.
    """
    if security is None:
        return {}
    parts = security.get_tls_config_for_role(role)
    names = {
        "ca_file": "TLS__CA_FILE",
        "cert": f"TLS__{role.upper()}__CERT",
        "key": f"TLS__{role.upper()}__KEY",
        "ciphers": "TLS__CIPHERS",
    }
    found = {names[name]: _text(value) for name, value in parts.items() if name in names and value}
    found["REQUIRE_ENCRYPTION"] = "True"
    return {_VARIABLE + name: text for name, text in found.items()}


def _text(value: Any) -> str:
    """Return a certificate itself: a path means nothing on another machine."""
    text = str(value)
    return text if "\n" in text or not Path(text).exists() else Path(text).read_text()


class _WithoutEnvironments(logging.Filter):
    """Empties records that show the environment of a task of ECS, and with it its certificates."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "containerOverrides" in record.getMessage():
            record.msg, record.args = "<hidden: it has the environment of a task>", ()
        return True


_WITHOUT_ENVIRONMENTS = _WithoutEnvironments()


def keep_out_of_vendors_logs() -> None:
    """Have Amazon's library log no environments: at its lowest level it shows all requests."""
    for name in ("botocore.endpoint", "botocore.parsers", "aiobotocore.endpoint"):
        logging.getLogger(name).addFilter(_WITHOUT_ENVIRONMENTS)  # once: it is the same one
