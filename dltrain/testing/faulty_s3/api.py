"""The operations of S3 that data loading and checkpoints use, on folders and files.

Objects: get, head, put, delete, multipart uploads. Buckets: create, head, list (both versions). What else S3 can do is
answered 501 NotImplemented.

    answer = Api(objects, Uploads(objects)).answer(request, received)
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import formatdate
from urllib.parse import quote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from dltrain.testing.faulty_s3.listing import Entry, Page
from dltrain.testing.faulty_s3.objects import Objects, Received, Stored, Uploads
from dltrain.testing.faulty_s3.wire import Answer, Request, S3Error, Span, xml

_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_ENCRYPTION = "x-amz-server-side-encryption"
_CUSTOMER_KEY = f"{_ENCRYPTION}-customer-key-md5"
_ENCRYPTION_HEADERS = {
    *(_ENCRYPTION, f"{_ENCRYPTION}-aws-kms-key-id", f"{_ENCRYPTION}-bucket-key-enabled"),
    *(f"{_ENCRYPTION}-customer-algorithm", _CUSTOMER_KEY),
}
_SUBRESOURCES = {
    *("accelerate", "acl", "attributes", "cors", "delete", "encryption", "legal-hold", "lifecycle", "location"),
    *("logging", "notification", "object-lock", "policy", "replication", "restore", "retention", "select", "tagging"),
    *("torrent", "versioning", "versions", "website"),
}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Api:
    """Answers requests; refusals are ``S3Error``."""

    def __init__(self, objects: Objects, uploads: Uploads) -> None:
        self._objects, self._uploads = objects, uploads

    def answer(self, request: Request, received: Received) -> Answer:
        """Do what is asked for. Raises ``S3Error``."""
        if _SUBRESOURCES & request.query.keys() or "x-amz-copy-source" in request.headers:
            raise _not_implemented()
        _check_sums(request, received)
        if request.key and ("uploads" in request.query or "uploadId" in request.query):
            return self._multipart(request, received)
        return self._object(request, received) if request.key else self._bucket(request)

    def _object(self, request: Request, received: Received) -> Answer:
        match request.method:
            case "GET":
                return self._get(request)
            case "HEAD":
                stored = self._objects.stat(request.bucket, request.key)
                _check(request, stored)
                return Answer(200, {**_headers(stored), "Content-Length": str(stored.size)})
            case "PUT":
                new = request.headers.get("if-none-match") == "*"
                stored = self._objects.put(request.bucket, request.key, received, _kept(request), new)
                return Answer(200, {"ETag": stored.etag, **_encryption(stored.headers)})
            case "DELETE":
                self._objects.delete(request.bucket, request.key)
                return Answer(204)
        raise _not_implemented()

    def _get(self, request: Request) -> Answer:
        stored, file = self._objects.open(request.bucket, request.key)
        try:
            _check(request, stored)
            part = _range(request.headers.get("range", ""), stored.size)
        except S3Error:
            file.close()
            raise
        if part is None:
            return Answer(200, _headers(stored), Span(file, 0, stored.size))
        start, stop = part
        headers = {**_headers(stored), "Content-Range": f"bytes {start}-{stop - 1}/{stored.size}"}
        return Answer(206, headers, Span(file, start, stop - start))

    def _multipart(self, request: Request, received: Received) -> Answer:
        name = request.query.get("uploadId", "")
        names = _tags(("Bucket", request.bucket), ("Key", request.key))
        match request.method:
            case "POST" if not name:
                name = self._uploads.create(request.bucket, request.key, _kept(request))
                return _result("InitiateMultipartUploadResult", names + _tags(("UploadId", name)))
            case "PUT":
                return Answer(200, {"ETag": self._uploads.part(name, _number(request, "partNumber"), received)})
            case "POST":
                stored = self._uploads.complete(name, _parts(received))
                return _result("CompleteMultipartUploadResult", names + _tags(("ETag", stored.etag)))
            case "DELETE":
                self._uploads.abort(name)
                return Answer(204)
        raise _not_implemented()

    def _bucket(self, request: Request) -> Answer:
        match request.method:
            case "PUT":
                self._objects.create_bucket(request.bucket)
                return Answer(200, {"Location": f"/{request.bucket}"})
            case "HEAD":
                self._objects.check_bucket(request.bucket)
                return Answer(200)
            case "GET" if request.bucket:
                return self._list(request)
        raise _not_implemented()

    def _list(self, request: Request) -> Answer:
        query = request.query
        page = Page.of(self._objects.keys(request.bucket, query.get("prefix", "")), query)
        encoded = query.get("encoding-type") == "url"
        facts = _tags(
            ("Name", request.bucket),
            ("MaxKeys", page.limit),
            ("KeyCount", len(page.entries)),
            ("IsTruncated", "true" if page.token else "false"),
            *([("EncodingType", "url")] if encoded else []),
            *((tag, _written(query.get(tag.lower(), ""), encoded)) for tag in ("Prefix", "Delimiter")),
        )
        if page.token:
            last = _written(page.entries[-1].text, encoded)
            facts += _tags(("NextContinuationToken", page.token), ("NextMarker", last))
        return _result(
            "ListBucketResult", facts + "".join(self._entry(request.bucket, e, encoded) for e in page.entries)
        )

    def _entry(self, bucket: str, entry: Entry, encoded: bool) -> str:
        written = _written(entry.text, encoded)
        if entry.is_prefix:
            return f"<CommonPrefixes>{_tags(('Prefix', written))}</CommonPrefixes>"
        try:
            stored = self._objects.stat(bucket, entry.text)
        except S3Error:  # deleted since
            return ""
        modified = datetime.fromtimestamp(stored.modified, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        facts = (("Key", written), ("LastModified", modified), ("ETag", stored.etag), ("Size", stored.size))
        return f"<Contents>{_tags(*facts, ('StorageClass', 'STANDARD'))}</Contents>"


def _check(request: Request, stored: Stored) -> None:
    """Raise ``S3Error`` unless the request may have this object, by its key and its ETag."""
    if stored.headers.get(_CUSTOMER_KEY) != request.headers.get(_CUSTOMER_KEY):
        text = "The object was stored using a form of Server Side Encryption. The correct parameters must be provided."
        raise S3Error(400, "InvalidRequest", text)
    wanted = request.headers.get("if-match", "*")
    if wanted != "*" and stored.etag.strip('"') not in (tag.strip(' "') for tag in wanted.split(",")):
        raise S3Error(412, "PreconditionFailed", "At least one of the pre-conditions did not hold")


def _check_sums(request: Request, received: Received) -> None:
    """Raise ``S3Error`` unless the body is what its sums say, whether sent before it or behind it."""
    given = {**request.headers, **request.trailers}
    sums = {"content-md5": bytes.fromhex(received.md5), "x-amz-checksum-crc32": received.crc32.to_bytes(4, "big")}
    for name, digest in sums.items():
        if given.get(name) not in (None, b64encode(digest).decode()):
            raise S3Error(400, "BadDigest", f"The {name} you specified did not match what we received.")


def _range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and the one behind the last, None for the whole. Raises ``S3Error`` where the object has none."""
    found = _RANGE.fullmatch(header)
    if not found or not any(found.groups()):
        return None
    first, last = found.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if first and last and int(last) < start:
        return None
    if start >= size:
        unit = {"Content-Range": f"bytes */{size}"}
        raise S3Error(416, "InvalidRange", "The requested range is not satisfiable", **unit)
    return start, stop


def _headers(stored: Stored) -> dict[str, str]:
    return {
        "ETag": stored.etag,
        "Last-Modified": formatdate(stored.modified, usegmt=True),
        "Accept-Ranges": "bytes",
        "Content-Type": "binary/octet-stream",
        **stored.headers,
    }


def _kept(request: Request) -> dict[str, str]:
    """Headers of a PUT that come back with every GET."""
    kept = {n: v for n, v in request.headers.items() if n.startswith("x-amz-meta-") or n in _ENCRYPTION_HEADERS}
    content = request.headers.get("content-type")
    return {**kept, "Content-Type": content} if content else kept


def _encryption(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name in _ENCRYPTION_HEADERS}


def _parts(received: Received) -> Sequence[tuple[int, str]]:
    """Numbers and ETags from the request that completes an upload. Raises ``S3Error``."""
    try:
        root = ElementTree.parse(received.path).getroot()
        parts = root.iterfind("{*}Part")
        return [(int(part.findtext("{*}PartNumber", "")), part.findtext("{*}ETag", "")) for part in parts]
    except (ElementTree.ParseError, ValueError):
        raise S3Error(400, "MalformedXML", "The XML you provided was not well-formed") from None


def _number(request: Request, name: str) -> int:
    text = request.query.get(name, "")
    if not text.isdecimal():
        raise S3Error(400, "InvalidArgument", f"{name} is not an integer")
    return int(text)


def _written(text: str, encoded: bool) -> str:
    return quote(text) if encoded else text


def _tags(*pairs: tuple[str, object]) -> str:
    return "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in pairs)


def _result(name: str, text: str) -> Answer:
    return xml(f'<{name} xmlns="{_NAMESPACE}">{text}</{name}>')


def _not_implemented() -> S3Error:
    return S3Error(501, "NotImplemented", "This server does not do what the request asks for.")
