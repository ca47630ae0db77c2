"""Amazon's API on this machine, by moto; what is started through it is another's to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distributed import Security
from moto.server import ThreadedMotoServer

ACCOUNT = "123456789012"
REGION = "us-east-1"


class Moto:
    """A server.

    Parameters
    ----------
    folder
        Where it may leave a file.

    Attributes
    ----------
    environment
        Variables by which Amazon's own client finds it.
    """

    def __init__(self, folder: Path) -> None:
        authorities = folder / "authorities.pem"
        authorities.write_text(Security.temporary().tls_ca_file)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            # Each client reads them all though it needs none here; usually there are 150.
            "AWS_CA_BUNDLE": str(authorities),
            "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
        }

    def client(self, service: str) -> Any:
        """Return a client of Amazon's for one of the services."""
        import boto3

        return boto3.client(
            service,
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name=REGION,
        )

    def close(self) -> None:
        """Stop serving."""
        self._server.stop()
