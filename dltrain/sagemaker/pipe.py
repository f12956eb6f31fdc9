"""A channel in Pipe mode: samples in the order in which they arrive, once in an epoch.

For every epoch SageMaker offers a FIFO ``<channel>_<epoch>`` with the bytes of all objects, one after the other. They
are tars; or RecordIO, in which each record is an object that SageMaker wrapped (tars, and manifests and indexes beside
them are passed over) or, under the content type ``application/x-recordio-protobuf``, one sample. There is no going
back: no other order, no exact resume. Of a host's ranks the first reads, and hands every byte on to the others over
sockets; each takes its own samples of all that pass by.

    loader = Loader(PipeDataset(channel, environment), Arrival(), task.sample, global_batch_size=64)
"""

from __future__ import annotations

import gzip
import io
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from dltrain.data.formats import recordio, tar
from dltrain.data.formats.fields import as_fields
from dltrain.data.formats.tape import Tape
from dltrain.data.formats.tar import BLOCK, TarReader, grouped
from dltrain.data.order import Integers
from dltrain.data.sample import Sample
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.channels import Channel

ENDLESS = 1 << 62
"""Samples of an epoch whose length nobody has told: longer than any training."""

_CHUNK = 1 << 20
_PATIENCE = 600.0
"""Seconds for a FIFO, or the first rank, to appear."""

Keyed = tuple[str, dict[str, bytes]]


@dataclass(frozen=True)
class Arrival:
    """The order in which samples come: position p is the sample ``p // hosts`` of a host's stream.

    ``hosts`` is 1 where every host gets the same stream.
    """

    samples: int = ENDLESS
    hosts: int = 1
    seed: int = 0
    lanes: int = 1

    @property
    def tails(self) -> tuple[str, ...]:
        """``carry`` alone: where one epoch ends the next begins."""
        return ("carry",)

    def locate(self, positions: Integers) -> tuple[Integers, Integers]:
        """Shard 0, and place in this host's stream, of the samples at ``positions``, int64 [n]."""
        return positions * 0, positions // self.hosts

    def state(self) -> dict[str, Any]:
        """What a cursor must find unchanged; a resume is refused before it is read."""
        return {"seed": self.seed, "samples": self.samples}


class PipeDataset:
    """The samples of a host's stream, by their number in it; each call goes on where the last one ended.

    ``stride`` is how many samples of the stream all ranks together take in turn: ranks that share a stream read on
    until a turn is over, so that none waits for bytes behind those that another has left unread.
    """

    facts: dict[str, Any]

    def __init__(
        self,
        channel: Channel,
        environment: Environment,
        facts: dict[str, Any] | None = None,
        samples: int = ENDLESS,
        stride: int = 1,
    ) -> None:
        self.facts = facts or {}
        self.shard_sizes = (samples,)
        self._channel, self._environment = channel, environment
        self._stride = stride if environment.local_world_size > 1 else 1
        self._samples: Iterator[Keyed] | None = None
        self._passed = 0
        self._kept: dict[int, Sample] = {}

    @property
    def fingerprint(self) -> str:
        """The channel's name: what flows through it cannot be known before."""
        return f"pipe/{self._channel.name}"

    def read(self, shards: Integers, indices: Integers) -> list[Sample]:
        """The samples of these numbers: the ones that come next, or once more those of the call before."""
        wanted = indices.tolist()
        if min(wanted) >= self._passed:
            self._kept = self._read_on(set(wanted))
        return [self._kept[number] for number in wanted]

    def _read_on(self, wanted: set[int]) -> dict[int, Sample]:
        if self._samples is None:
            self._samples = read_samples(open_stream(self._channel, self._environment), self._channel)
        kept, stop = dict[int, Sample](), (max(wanted) // self._stride + 1) * self._stride
        while self._passed < stop:
            key, fields = next(self._samples)
            if self._passed in wanted:
                kept[self._passed] = Sample(key, dict(fields), f"channel {self._channel.name}")
            self._passed += 1
        return kept


def read_samples(stream: io.BufferedReader, channel: Channel) -> Iterator[Keyed]:
    """Key and fields of every sample of a stream that may be compressed by gzip. Raises :class:`UserError`."""
    file, where = cast(BinaryIO, stream), f"channel {channel.name!r}"
    if stream.peek(2)[:2] == b"\x1f\x8b":  # SageMaker unpacks what the channel calls Gzip, and only that
        file = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    if channel.record_wrapper == "RecordIO":
        return _wrapped(file, where)
    if "recordio" in channel.content_type.lower():
        return _records(file, where, channel.name)
    return _tars(file, where)


def _tars(file: BinaryIO, where: str) -> Iterator[Keyed]:
    """Tars one after the other, with any number of blocks of zeros between them."""
    number, source = 0, _Ahead(Tape(file, where))
    while block := source.peek():
        if block.strip(b"\0"):
            if block[257:262] != b"ustar":
                raise UserError(
                    f"{where} brings something else than tars behind {number} of them; name tars alone by a prefix or "
                    "a manifest file, or let SageMaker wrap each object (RecordWrapperType RecordIO)"
                )
            yield from grouped(_OneOfMany(cast(BinaryIO, source), f"tar {number} of {where}"))
            number += 1
        else:
            source.read(BLOCK)


class _OneOfMany(TarReader):
    """A tar that ends with its first block of zeros: behind it the next one may begin."""

    def _finish(self) -> None:
        return


class _Ahead:
    """A stream whose next block can be looked at."""

    def __init__(self, tape: Tape) -> None:
        self._tape, self._block = tape, b""

    def peek(self) -> bytes:
        """The next block, or nothing at the end."""
        self._block = self._block or self._tape.take_up_to(BLOCK)
        return self._block

    def read(self, size: int) -> bytes:
        if not self._block:
            return self._tape.take_up_to(size)
        head, self._block = self._block[:size], self._block[size:]
        return head if len(head) == size else head + self._tape.take_up_to(size - len(head))


def _wrapped(file: BinaryIO, where: str) -> Iterator[Keyed]:
    for number, (_, payload) in enumerate(recordio.frames(Tape(file, where))):
        if payload[257:262] == b"ustar":
            yield from tar.read_samples(io.BytesIO(payload), f"object {number} of {where}")
        elif payload[:1] != b"{":  # which manifests and indexes begin with
            raise UserError(f"object {number} of {where} is no tar; write the data as shards: dltrain shards convert")


def _records(file: BinaryIO, where: str, name: str) -> Iterator[Keyed]:
    for number, (_, payload) in enumerate(recordio.frames(Tape(file, where))):
        try:
            fields = as_fields(recordio.parse_record(payload))
        except ValueError as error:
            raise UserError(f"record {number} of {where} cannot be read: {error}") from None
        yield f"{name}/{number:08d}", fields


def open_stream(channel: Channel, environment: Environment) -> io.BufferedReader:
    """All epochs of a channel, one after the other, without an end; every rank of a host gets all bytes."""
    if environment.local_world_size == 1:
        return io.BufferedReader(Epochs(channel.folder), _CHUNK)
    # nothing of it is left on a disk, and the ranks of one launcher find one another
    address = f"\0dltrain-{os.getuid()}-{os.getppid()}-{channel.name}"
    if environment.local_rank:
        return io.BufferedReader(_Handed(_connected(address, channel), None), _CHUNK)
    listener, (mine, own) = socket.socket(socket.AF_UNIX), socket.socketpair()
    listener.bind(address)
    listener.listen(environment.local_world_size)
    fan = _Fan(Epochs(channel.folder), listener, own, environment.local_world_size - 1)
    fan.start()
    return io.BufferedReader(_Handed(mine, fan), _CHUNK)


class Epochs(io.RawIOBase):
    """The FIFOs ``<folder>_0``, ``<folder>_1`` and so on as one stream."""

    def __init__(self, folder: Path, patience: float = _PATIENCE) -> None:
        self._folder, self._patience = folder, patience
        self._epoch = self._got = 0
        self._file: io.FileIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes as they come. Raises :class:`UserError` for an epoch without any, or whose FIFO does not appear."""
        while True:
            if self._file is None:
                self._file, self._got = self._open(), 0
            got = self._file.readinto(buffer) or 0
            self._got += got
            if got:
                return got
            self._file.close()
            self._file = None
            if not self._got:
                raise UserError(f"{self._path} brought nothing; the channel's S3 prefix holds no data")
            self._epoch += 1

    @property
    def _path(self) -> Path:
        return self._folder.with_name(f"{self._folder.name}_{self._epoch}")

    def _open(self) -> io.FileIO:
        """SageMaker makes an epoch's FIFO when the one before has been read: it may not be there yet."""
        last = time.monotonic() + self._patience
        while not self._path.exists():
            if time.monotonic() > last:
                raise UserError(f"{self._path} has not appeared in {self._patience:.0f} s; is the channel a Pipe?")
            time.sleep(0.02)
        return io.FileIO(self._path)


class _Fan(threading.Thread):
    """Hands a stream on to all ranks of the host, as fast as the slowest takes it."""

    def __init__(self, source: Epochs, listener: socket.socket, own: socket.socket, others: int) -> None:
        super().__init__(name="dltrain-pipe", daemon=True)
        self.failure = ""
        self._source, self._listener, self._sockets, self._others = source, listener, [own], others

    def run(self) -> None:
        try:
            with self._listener:
                self._sockets += [self._listener.accept()[0] for _ in range(self._others)]
            buffer = memoryview(bytearray(_CHUNK))
            while True:
                got = self._source.readinto(buffer)
                for one in self._sockets:
                    one.sendall(buffer[:got])
        except UserError as error:
            self.failure = str(error)
        except OSError as error:  # a rank has ended: so will the others
            self.failure = f"a rank of this host no longer reads the channel ({error.strerror})"
        finally:
            for one in self._sockets:
                one.close()


class _Handed(io.RawIOBase):
    """The bytes that the first rank hands on."""

    def __init__(self, source: socket.socket, fan: _Fan | None) -> None:
        self._source, self._fan = source, fan

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = self._source.recv_into(buffer)
        if not got:
            failure = self._fan.failure if self._fan else "the first rank of this host no longer reads the channel"
            raise UserError(failure)
        return got


def _connected(address: str, channel: Channel) -> socket.socket:
    last = time.monotonic() + _PATIENCE
    while True:
        one = socket.socket(socket.AF_UNIX)
        try:
            one.connect(address)
            return one
        except ConnectionRefusedError:
            one.close()
            if time.monotonic() > last:
                raise UserError(f"the first rank of this host does not read channel {channel.name!r}") from None
            time.sleep(0.05)
