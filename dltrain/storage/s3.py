"""Objects of S3 and of servers that speak its protocol, as ``bucket/key``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from boto3.exceptions import Boto3Error, S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
)

from dltrain.errors import UserError
from dltrain.storage import s3_client
from dltrain.storage.base import Interrupted, ObjectChanged, ObjectInfo, ObjectNotFound, PastTheEnd
from dltrain.storage.body import HTTPBody, whole_size
from dltrain.storage.remote import RangedReads

T = TypeVar("T")

_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthFailure", "InvalidToken"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
_FORBIDDEN = {"403", "AccessDenied", "Forbidden"}
_MISSING = {"404", "NoSuchKey", "NotFound"}
_CHANGED = {"412", "PreconditionFailed"}
_PAST_THE_END = {"416", "InvalidRange"}
_THROTTLED = {"503", "429", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}
_MENDABLE = {"500", "502", "504", "InternalError", "RequestTimeout", "ServiceUnavailable", "OperationAborted"}


class S3Store(RangedReads):
    """Objects as ``bucket/key``."""

    def stat(self, path: str) -> ObjectInfo:
        bucket, key = _split(path)
        if not key:
            raise ObjectNotFound(f"s3://{path} is a bucket and no object; write s3://BUCKET/KEY")
        answer = _call(path, lambda: _patient().head_object(Bucket=bucket, Key=key, **s3_client.read_extras()))
        return ObjectInfo(int(answer["ContentLength"]), answer.get("ETag", ""))

    def open(self, path: str, start: int, stop: int | None, etag: str) -> HTTPBody:
        bucket, key = _split(path)
        extras = {**s3_client.read_extras(), "Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        if etag:
            extras["IfMatch"] = etag
        try:
            answer = s3_client.client().get_object(Bucket=bucket, Key=key, **extras)
        except ClientError as error:
            raise _mendable(error) or _refusal(path, error) from None
        except (ConnectionError, HTTPClientError) as error:
            raise Interrupted(type(error).__name__) from None
        except (CredentialRetrievalError, MetadataRetrievalError) as error:
            raise Interrupted(type(error).__name__) from None  # the chain's own servers have bad moments too
        except BotoCoreError as error:
            raise _unasked(path, error) from None
        size = whole_size(answer.get("ContentRange", ""), answer.get("ContentLength", -1))
        if size is None:
            raise UserError(
                f"the endpoint {_endpoint()} does not tell the size of s3://{path}; it speaks another protocol"
            )
        return HTTPBody(answer["Body"]._raw_stream, ObjectInfo(size, answer.get("ETag", "")))

    def url(self, path: str) -> str:
        return f"s3://{path}"

    def unreachable(self, path: str, reason: str) -> UserError:
        return UserError(
            f"cannot reach the S3 endpoint {_endpoint()} for s3://{path} ({reason}); "
            "check AWS_ENDPOINT_URL, AWS_REGION and the network"
        )

    def write(self, path: str, data: bytes) -> None:
        bucket, key = _split(path)
        extras = s3_client.write_extras()
        _call(path, lambda: _patient().put_object(Bucket=bucket, Key=key, Body=data, **extras))

    def upload(self, file: Path, path: str) -> None:
        bucket, key = _split(path)
        parts = TransferConfig(multipart_threshold=64 << 20, multipart_chunksize=16 << 20)
        extras = s3_client.write_extras()
        _call(path, lambda: _patient().upload_file(str(file), bucket, key, ExtraArgs=extras, Config=parts))

    def delete(self, path: str) -> None:
        bucket, key = _split(path)
        _call(path, lambda: _patient().delete_object(Bucket=bucket, Key=key))

    def listing(self, path: str) -> list[str]:
        bucket, prefix = _split(path)
        prefix = prefix.rstrip("/") + "/" if prefix else ""
        payer = {name: value for name, value in s3_client.read_extras().items() if name == "RequestPayer"}
        pages = _patient().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **payer)
        contents = _call(path, lambda: [item for page in pages for item in page.get("Contents", ())])
        return sorted(f"{bucket}/{item['Key']}" for item in contents)


def _patient() -> Any:
    return s3_client.client(patient=True)


def _endpoint() -> str:
    return str(s3_client.client().meta.endpoint_url)


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    if not bucket:
        raise UserError(f"s3://{path} names no bucket; write s3://BUCKET/KEY")
    return bucket, key


def _call(path: str, request: Callable[[], T]) -> T:
    """Run a request; botocore's errors become one sentence."""
    try:
        return request()
    except ClientError as error:
        raise _refusal(path, error) from None
    except (ConnectionError, HTTPClientError) as error:
        raise UserError(
            f"cannot reach the S3 endpoint {_endpoint()} for s3://{path} ({type(error).__name__}); "
            "check AWS_ENDPOINT_URL, AWS_REGION and the network"
        ) from None
    except BotoCoreError as error:
        raise _unasked(path, error) from None
    except (S3UploadFailedError, Boto3Error) as error:
        raise UserError(f"cannot write s3://{path}: {error}") from None


def _unasked(path: str, error: BotoCoreError) -> UserError:
    """A request that was never sent."""
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return UserError(
            f"no complete AWS credentials for s3://{path} ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or a role; a public bucket takes --storage.anonymous true"
        )
    return UserError(f"cannot ask S3 for s3://{path}: {error}")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _mendable(error: ClientError) -> Interrupted | None:
    """The failure as one that another try may mend, or None."""
    code = _code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _EXPIRED:
        s3_client.forget()  # the chain may have newer ones by now
        return Interrupted(code)
    if code in _THROTTLED or status in (429, 503):
        return Interrupted(code, throttled=True)
    return Interrupted(code) if code in _MENDABLE or status >= 500 else None


def _refusal(path: str, error: ClientError) -> Exception:
    code, (bucket, _) = _code(error), _split(path)
    if code == "NoSuchBucket":
        return UserError(f"there is no bucket {bucket!r} (s3://{path}) at {_endpoint()}")
    if code in _MISSING:
        return ObjectNotFound(f"there is no object s3://{path}")
    if code in _CREDENTIALS | _EXPIRED:
        return UserError(f"S3 refused the credentials for s3://{path} ({code}); check AWS_ACCESS_KEY_ID or AWS_PROFILE")
    if code in _FORBIDDEN:
        return UserError(
            f"S3 denies access to s3://{path} ({code}); check the credentials: the role needs s3:GetObject and "
            "s3:ListBucket, and a bucket whose readers pay takes --storage.requester_pays true"
        )
    if code in _PAST_THE_END:
        return PastTheEnd()
    if code in _CHANGED:
        return ObjectChanged(
            f"s3://{path} was overwritten while it was being read; shards must not change: "
            "write a new data set beside the old one, and index it anew"
        )
    return UserError(f"S3 failed on s3://{path} ({code}): {error.response.get('Error', {}).get('Message', error)}")
