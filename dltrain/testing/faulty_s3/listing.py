"""ListObjects: keys in order, those below a delimiter rolled up, a page at a time.

Page.of(["a", "b/1", "b/2", "c"], {"delimiter": "/", "max-keys": "2"}).entries  # a, and the prefix b/
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from dltrain.testing.faulty_s3.wire import S3Error

_MOST = 1000


class Entry(NamedTuple):
    """A key, or the prefix that several keys have in common."""

    text: str
    is_prefix: bool


@dataclass(frozen=True)
class Page:
    """Some entries of a listing; ``token`` asks for those that follow, '' at the end."""

    entries: Sequence[Entry]
    limit: int
    token: str

    @classmethod
    def of(cls, keys: Iterable[str], query: Mapping[str, str]) -> Self:
        """``keys``, sorted, begin with the query's prefix. Raises ``S3Error`` for a query that cannot be read."""
        start = query.get("start-after", "")
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        last = _last(query)
        found = [entry for entry in _rolled(keys, start, prefix, delimiter) if entry.text > last]
        try:
            limit = min(int(query.get("max-keys", _MOST)), _MOST)
        except ValueError:
            raise S3Error(400, "InvalidArgument", "max-keys is not an integer") from None
        more = 0 < limit < len(found)
        return cls(found[:limit], limit, urlsafe_b64encode(found[limit - 1].text.encode()).decode() if more else "")


def _rolled(keys: Iterable[str], start: str, prefix: str, delimiter: str) -> Iterable[Entry]:
    """Keys behind ``start``, those that share the next piece up to ``delimiter`` as one entry."""
    before = None
    for key in keys:
        if key <= start:
            continue
        piece, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        entry = Entry(prefix + piece + found, True) if found else Entry(key, False)
        if entry != before:
            yield entry
        before = entry


def _last(query: Mapping[str, str]) -> str:
    """The entry after which the page begins: a token's of version 2, named outright in version 1."""
    try:
        return urlsafe_b64decode(query["continuation-token"]).decode()
    except KeyError:
        return query.get("marker", "")
    except (Base64Error, UnicodeDecodeError):
        raise S3Error(400, "InvalidArgument", "The continuation token provided is incorrect") from None
