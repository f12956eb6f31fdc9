"""What can go wrong between a client and S3, and which requests it strikes.

``Faults`` is what a test asks for; ``FaultState`` counts requests and decides, one request at a time.

    Faults(latency=0.03, bandwidth=60e6, slow_down=3, keys="*.tar")
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from dltrain.errors import UserError
from dltrain.testing.faulty_s3.wire import Request, S3Error

_KINDS: dict[str, Any] = {
    "float": int | float,
    "int": int,
    "int | None": int | None,
    "str": str,
    "bool": bool,
    "tuple[str, ...]": tuple,
}
"""What a field may hold, by its annotation."""


@dataclass(frozen=True)
class Faults:
    """The default is a server without faults. "The next n GETs" are counted from the moment these faults are set.

    A GET is one of an object: listings are not meant. Raises ``UserError`` for values that mean nothing.
    """

    keys: str = "*"
    """Glob on the object's key: the requests that all other faults apply to. A listing has the key ''."""
    seed: int = 0
    """Draws the requests that the two shares strike."""

    latency: float = 0.0
    """Seconds before the first byte of every answer."""
    bandwidth: float = 0.0
    """Bytes a second of each body, in either direction; 0: unlimited."""
    total_bandwidth: float = 0.0
    """The same for all bodies together."""

    slow_down: int = 0
    """The next so many GETs are answered 503 SlowDown."""
    slow_down_share: float = 0.0
    """Fraction of all requests answered 503 SlowDown."""
    throttle_above: int = 0
    """503 SlowDown for a GET that arrives while so many are being answered; 0: never."""
    timeout_share: float = 0.0
    """Fraction of all requests that are never answered."""

    cut_after: int | None = None
    """The connection is closed after so many bytes of a GET's body, if it is longer than that."""
    cut_next: int | None = None
    """Only the next so many GETs are cut; None: all."""
    truncate: int = 0
    """The next so many GETs have half the body that was asked for, and a Content-Length to match."""
    flip_bit: str = ""
    """Glob on the object's key: one bit is flipped in the middle of the body of a GET."""
    flip_next: int | None = None
    """Only the next so many GETs have a bit flipped; None: all."""
    change_etag_after: int = 0
    """An object is replaced, by its bytes inverted, once so many GETs of it were answered; 0: never."""

    access_keys: tuple[str, ...] = ()
    """Access key ids that exist; others get 403 InvalidAccessKeyId. Empty: all do."""
    expire_after: int | None = None
    """After so many requests, those signed with a key id in ``expired`` get 400 ExpiredToken."""
    expired: tuple[str, ...] = ("local",)
    """Access key ids that expire."""
    deny_unsigned: bool = False
    """403 AccessDenied for requests without a signature."""
    require_request_payer: bool = False
    """403 AccessDenied without the header ``x-amz-request-payer: requester``."""

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if not isinstance(value, _KINDS[str(field.type)]):
                raise UserError(f"{name} is {value!r}; it takes {field.type}")
            if name.endswith("_share") and not 0 <= value <= 1:
                raise UserError(f"{name} is {value}; a share lies between 0 and 1")
            if name != "seed" and isinstance(value, int | float) and not 0 <= value < math.inf:
                raise UserError(f"{name} is {value}; it must be a number from 0 up")


class Clock:
    """Bytes at so many a second: each reservation moves the time at which the next may pass."""

    SLACK = 0.05
    """Seconds by which late callers may catch up; what nobody used before is lost."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._lock = threading.Lock()
        self._at = time.monotonic()

    def reserve(self, count: int) -> float:
        """The monotonic time at which ``count`` more bytes have passed."""
        with self._lock:
            self._at = max(self._at, time.monotonic() - self.SLACK) + count / self.rate
            return self._at


class Throttle:
    """Holds back one body, by its connection's rate and by the rate that all share."""

    UNLIMITED_PIECE = 64 << 20

    def __init__(self, *clocks: Clock) -> None:
        self._clocks = [clock for clock in clocks if clock.rate]
        rate = min((clock.rate for clock in self._clocks), default=math.inf)
        self.piece = self.UNLIMITED_PIECE if rate == math.inf else int(min(max(rate / 100, 256), 1 << 20))
        """Bytes to pass at once: a hundredth of a second's worth."""

    def wait(self, count: int) -> None:
        """Sleep until ``count`` more bytes may have passed."""
        if self._clocks:
            pause = max(clock.reserve(count) for clock in self._clocks) - time.monotonic()
            if pause > 0:
                time.sleep(pause)


@dataclass(frozen=True)
class Fate:
    """What one request meets, decided when it arrives."""

    faults: Faults
    refusal: S3Error | None = None
    hangs: bool = False
    in_flight: bool = False
    """Whether it counts among the GETs being answered."""


@dataclass(frozen=True)
class BodyFate:
    """What the body of one GET meets."""

    length: int
    """Bytes announced."""
    cut: int | None
    """Bytes after which the connection is closed."""
    flip: bool
    replaced: bool
    """Whether the object is to be replaced behind this answer."""


class FaultState:
    """The faults set last, and how far they are used up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self.set(Faults())

    def set(self, faults: Faults) -> None:
        """From now on these faults, counted from zero."""
        with self._lock:
            self._faults = faults
            self._seen = 0
            self._gets: Counter[tuple[str, str]] = Counter()
            self._total = Clock(faults.total_bandwidth)
            self._left = {
                "slow_down": faults.slow_down,
                "cut": faults.cut_next,
                "truncate": faults.truncate,
                "flip": faults.flip_next,
            }

    def throttle(self, key: str) -> Throttle:
        """For one body of the object."""
        with self._lock:
            faults = self._faults
            return Throttle(Clock(faults.bandwidth), self._total) if fnmatchcase(key, faults.keys) else Throttle()

    def arrive(self, request: Request) -> Fate:
        """Decide on a request; ``leave`` is due when it has been answered."""
        with self._lock:
            faults = self._faults
            if not fnmatchcase(request.key, faults.keys):
                return Fate(Faults())
            self._seen += 1
            refusal = _denial(request, faults, self._seen) or self._slow_down(request, faults)
            hangs = refusal is None and _drawn(faults.timeout_share, f"timeout/{faults.seed}/{self._seen}")
            in_flight = request.reads_object and refusal is None
            self._in_flight += in_flight
            return Fate(faults, refusal, hangs, in_flight)

    def leave(self, fate: Fate) -> None:
        """The request has been answered."""
        with self._lock:
            self._in_flight -= fate.in_flight

    def body(self, fate: Fate, request: Request, length: int) -> BodyFate:
        """Decide on the body, ``length`` bytes, of a GET."""
        faults = fate.faults
        with self._lock:
            self._gets[request.bucket, request.key] += 1
            replaced = self._gets[request.bucket, request.key] == faults.change_etag_after
            length = length // 2 if length and self._take("truncate", faults.truncate > 0) else length
            cuts = faults.cut_after is not None and faults.cut_after < length
            cut = faults.cut_after if self._take("cut", cuts) else None
            flips = bool(faults.flip_bit and length) and fnmatchcase(request.key, faults.flip_bit)
            return BodyFate(length, cut, self._take("flip", flips), replaced)

    def _slow_down(self, request: Request, faults: Faults) -> S3Error | None:
        strikes = (
            self._take("slow_down", request.reads_object and faults.slow_down > 0)
            or _drawn(faults.slow_down_share, f"slow/{faults.seed}/{self._seen}")
            or (request.reads_object and 0 < faults.throttle_above <= self._in_flight)
        )
        return S3Error(503, "SlowDown", "Please reduce your request rate.") if strikes else None

    def _take(self, name: str, wanted: bool) -> bool:
        """Use up one of a counted fault; whether there was one."""
        left = self._left[name]
        if not wanted or left == 0:
            return False
        self._left[name] = None if left is None else left - 1
        return True


def _drawn(share: float, text: str) -> bool:
    """True for ``share`` of all texts, always for the same."""
    return share > 0 and int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < share * 2**64


def _denial(request: Request, faults: Faults, seen: int) -> S3Error | None:
    """What S3 answers to who asks, whatever is asked for; ``seen`` requests came, this one included."""
    signer = request.access_key
    if faults.deny_unsigned and not signer:
        return S3Error(403, "AccessDenied", "Access Denied")
    if signer and faults.access_keys and signer not in faults.access_keys:
        return S3Error(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.")
    if faults.expire_after is not None and seen > faults.expire_after and signer in faults.expired:
        return S3Error(400, "ExpiredToken", "The provided token has expired.")
    if faults.require_request_payer and request.headers.get("x-amz-request-payer") != "requester":
        return S3Error(403, "AccessDenied", "Access Denied")
    return None
