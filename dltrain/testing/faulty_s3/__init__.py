"""An S3 endpoint that fails on demand: slow, throttled, cut, truncated, damaged, denied.

It runs in a process of its own on the loopback address, so that it takes nothing from the client it is to try, and
sends files at the speed of the machine. For S3's finer points there is moto (``dltrain.testing.s3``); the same server
from a shell is ``python -m dltrain.testing.faulty_s3 --help``.

    with FaultyS3() as server:
        boto3.client("s3").put_object(Bucket="data", Key="a.tar", Body=b"...")
        server.set(Faults(latency=0.03, slow_down=2))
        ...
        assert server.counts()["GET"] == 3
"""

from dltrain.testing.faulty_s3.endpoint import FaultyS3
from dltrain.testing.faulty_s3.faults import Faults
from dltrain.testing.faulty_s3.records import Record

__all__ = ["Faults", "FaultyS3", "Record"]
