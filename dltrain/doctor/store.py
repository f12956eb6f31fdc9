"""Checks of a place on S3, with the credentials that a run would use: rights, speed, and the clock."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from dltrain import storage
from dltrain.doctor.checked import Checked
from dltrain.errors import UserError

SIZE = 16 << 20

SKEW = 60.0
"""Seconds by which a clock may be wrong; AWS refuses signatures that are off by 15 minutes."""


def place(url: str) -> Iterator[Checked]:
    """Write, read and delete an object of 16 MiB below ``url``."""
    if not url.startswith("s3://"):
        raise UserError(f"--s3 is {url!r}; give an address such as s3://bucket/prefix")
    target = storage.join(url, f"dltrain-doctor-{uuid.uuid4().hex}")
    data = bytes(SIZE)
    started = time.monotonic()
    storage.write(target, data)
    written = time.monotonic()
    try:
        whole = bytes(storage.read(target)) == data
        read = time.monotonic()
    finally:
        storage.delete(target)
    speeds = f"{SIZE / 2**20 / (written - started):.0f} MiB/s to write, {SIZE / 2**20 / (read - written):.0f} to read"
    more = "" if whole else "; what was read is not what was written"
    yield Checked("s3", "good" if whole else "bad", f"{url}: {speeds} (one object of 16 MiB){more}")


def clock(url: str) -> Iterator[Checked]:
    """The machine's beside that of S3."""
    import boto3  # slow to import
    from botocore.exceptions import ClientError

    bucket = url.removeprefix("s3://").partition("/")[0]
    try:
        answer = boto3.client("s3").head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response  # refused or not, it says what time it is
    said = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    if said is None:
        yield Checked("clock", "doubtful", "S3 did not say what time it is")
        return
    skew = time.time() - parsedate_to_datetime(said).timestamp()
    good = abs(skew) < SKEW
    more = "" if good else "; set it (NTP): AWS refuses requests of a wrong time"
    yield Checked("clock", "good" if good else "bad", f"{abs(skew):.0f} s from that of S3{more}")
