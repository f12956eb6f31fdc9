"""A local S3 endpoint: moto's server on the loopback address, spoken to over HTTP by a real client.

with S3Server("digits") as server:
    subprocess.run(command, env={**os.environ, **server.variables})
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self

from dltrain.errors import UserError


class S3Server:
    """Runs while the ``with`` block does, with the given buckets; this process talks to it too."""

    def __init__(self, *buckets: str) -> None:
        self._buckets = buckets
        self._server: Any = None
        self._before: dict[str, str | None] = {}

    @property
    def url(self) -> str:
        host, port = self._server.get_host_and_port()
        return f"http://{host}:{port}"

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs in its environment to speak to this endpoint."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def __enter__(self) -> Self:
        try:
            from moto.server import ThreadedMotoServer
        except ImportError:
            raise UserError("the local S3 endpoint needs moto: pip install 'dltrain[examples]'") from None
        import logging

        import boto3

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self._before = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)
        forget_client()
        client = boto3.session.Session().client("s3")
        for bucket in self._buckets:
            client.create_bucket(Bucket=bucket)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        forget_client()
        self._server.stop()


def forget_client() -> None:
    """Make the next S3 call read endpoint and credentials anew."""
    from dltrain.storage.s3 import _client_of

    _client_of.cache_clear()
