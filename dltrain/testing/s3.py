"""A local S3 endpoint: moto's server on the loopback address, spoken to over HTTP by a real client.

It knows much of S3's interface and has no faults; :mod:`dltrain.testing.faulty_s3` is fast, and has all of them.

    with S3Server("digits") as server:
        subprocess.run(command, env={**os.environ, **server.variables})
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self

from dltrain.errors import UserError


class S3Server:
    """Runs while the ``with`` block does, with the given buckets; this process talks to it too."""

    def __init__(self, *buckets: str) -> None:
        self._buckets = buckets
        self._server: Any = None
        self._open = ExitStack()

    @property
    def url(self) -> str:
        host, port = self._server.get_host_and_port()
        return f"http://{host}:{port}"

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs in its environment to speak to this endpoint."""
        return variables(self.url)

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
        self._open.callback(self._server.stop)
        self._open.enter_context(speaking_to(self.variables))
        client = boto3.session.Session().client("s3")
        for bucket in self._buckets:
            client.create_bucket(Bucket=bucket)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def variables(url: str) -> dict[str, str]:
    """What a process needs in its environment to speak to a local endpoint."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": "local",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextmanager
def speaking_to(variables: Mapping[str, str]) -> Iterator[None]:
    """The variables set in this process, and put back; clients made before are not used any more."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    forget_client()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        forget_client()


def forget_client() -> None:
    """Make the next S3 call read endpoint and credentials anew."""
    from dltrain.storage import s3_client

    s3_client.forget()
