"""From positions to batches.

A loader knows its place by one integer. It asks :mod:`dltrain.data.order` which positions the next step takes and which
of them are this rank's, reads and decodes them (in worker processes if told so; workers take turns by batch), and hands
out batches in order. The cursor moves when a batch is handed out, never when one is prefetched.

    loader = Loader(dataset, order, task.sample, global_batch_size=64)
    batch = next(iter(loader))
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dltrain.data.batch import Batch
from dltrain.data.device import moved_ahead
from dltrain.data.encoded import lacks_decoder
from dltrain.data.fetch import Fetch, Fetched, Span, Transform
from dltrain.data.gauge import Gauge
from dltrain.data.order import SETTINGS, SampleOrder, step_span, steps_between
from dltrain.data.quarantine import Quarantine
from dltrain.data.reader import Dataset, Streamed
from dltrain.errors import UserError


class Loader:
    """An iterator over one rank's batches that can be put at any position.

    ``rank`` of ``ranks`` are data ranks. ``epochs=1`` ends after the epoch, padding its last step (evaluation);
    ``epochs=0`` never ends. A batch has as many samples as the largest share of any rank. ``node`` of ``nodes`` is
    where this rank runs, for data that are fetched ahead. With ``bad_samples`` up to so many are replaced, each told in
    a line of the file ``quarantine``. On a CUDA ``device`` the next batch is copied while the current one is used;
    with ``decode`` ``device`` it also decodes the images that tasks leave encoded, where torchvision offers that.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: SampleOrder,
        transform: Transform,
        *,
        global_batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        tail: str = "carry",
        epochs: int = 0,
        augment: bool = False,
        workers: int = 0,
        prefetch: int = 2,
        start_method: str = "forkserver",
        device: torch.device | None = None,
        node: int = 0,
        nodes: int = 1,
        bad_samples: int = 0,
        quarantine: Path | None = None,
        decode: str = "host",
    ) -> None:
        if global_batch_size < ranks:
            raise UserError(
                f"data.global_batch_size is {global_batch_size}, smaller than the {ranks} data ranks; "
                f"give at least {ranks}, or train on fewer ranks"
            )
        if tail not in order.tails:
            raise UserError(
                f"data.tail is {tail!r}, and the epochs of a mixture's sources do not end together; set data.tail carry"
            )
        if tail == "drop" and order.samples < global_batch_size:
            raise UserError(
                f"data.tail is 'drop' and the data set has {order.samples} samples, fewer than one batch of "
                f"{global_batch_size}: every sample would be dropped; take 'carry' or a smaller batch"
            )
        self.position = 0
        self.samples = order.samples
        self.global_batch_size = global_batch_size
        self._order, self._fingerprint = order, dataset.fingerprint
        self.tail, self._end = tail, epochs * order.samples
        self._workers, self._prefetch, self._start_method = workers, prefetch, start_method
        self._device = device if device is not None and device.type == "cuda" else None
        self._quarantine = Quarantine(bad_samples, quarantine)
        self.gauge = Gauge()
        self.first_batch_seconds = 0.0
        """From asking for the first batch, of a fresh or a resumed run, to having it."""
        self._depth: Callable[[], int] = lambda: 0
        size = -(-global_batch_size // ranks)
        encoded = decode == "device" and self._device is not None and not lacks_decoder(self._device)
        self._fetch = Fetch(dataset, order, transform, rank, ranks, size, augment, bad_samples > 0, encoded)
        if isinstance(dataset, Streamed):
            dataset.follow(order, node, nodes)

    def steps_to(self, end: int, start: int | None = None) -> int:
        """Steps from ``start`` (where it stands, by default) to position ``end``."""
        start = self.position if start is None else start
        return steps_between(start, end, self.samples, self.global_batch_size, self.tail)

    def seen(self) -> dict[str, float]:
        """What the data cost since this was asked last, by names that begin with ``data/``."""
        depth = {"data/queue_depth": float(self._depth())} if self._workers else {}
        return {**self.gauge.read(), **depth, "data/first_batch_seconds": self.first_batch_seconds}

    def __iter__(self) -> Generator[Batch, None, None]:
        began = time.perf_counter()
        spans = self._spans(self.position)
        fetched: Iterator[Fetched] = map(self._fetch.__getitem__, self._spans(self.position))
        if self._workers:
            fetched = self._fetched_by_workers()
        batches: Iterator[tuple[Span, Batch]] = zip(spans, map(self._accept, fetched), strict=False)
        if self._device is not None:
            batches = moved_ahead(batches, self._device)
        try:
            for span, batch in batches:
                self.first_batch_seconds = self.first_batch_seconds or time.perf_counter() - began
                self.position = span[1]
                yield batch
        finally:
            self._depth = lambda: 0
            _end_workers(fetched)
            self._fetch.rest()

    def _accept(self, fetched: Fetched) -> Batch:
        """A batch that may be handed out. Raises what was met on its way, or when too many samples are bad."""
        for bad in fetched.bad:
            self._quarantine.add(bad)
        if fetched.batch is None:
            raise UserError(fetched.error)
        self.gauge.add(fetched.counts, len(fetched.batch))
        return fetched.batch if self._workers or self._device is None else fetched.batch.pin_memory()

    def _fetched_by_workers(self) -> Iterator[Fetched]:
        with _children_deaf_to_sigterm():
            loader: Any = DataLoader(
                self._fetch,  # type: ignore[arg-type]
                sampler=_Endless(self._spans, self.position),
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=self._prefetch,
                multiprocessing_context=self._start_method,
                pin_memory=self._device is not None,
                worker_init_fn=partial(_prepare_worker, dict(os.environ)),
            )
            batches = iter(loader)
        self._depth = batches._data_queue.qsize  # torch offers no public count of what is ready
        return batches

    def peek(self) -> Batch:
        """The batch at the current position, without moving."""
        fetched = self._fetch[next(self._spans(self.position))]
        if self._workers:
            self._fetch.rest()  # workers fetch ahead themselves, and this process comes no further
        if fetched.batch is None:
            raise UserError(fetched.error)
        return fetched.batch

    def _spans(self, position: int) -> Iterator[Span]:
        while not self._end or position < self._end:
            start, stop = step_span(position, self.samples, self.global_batch_size, self.tail)
            if self._end and start >= self._end:
                return
            yield start, stop
            position = stop

    def state_dict(self) -> dict[str, Any]:
        """The cursor: some 200 bytes of JSON, equal on every rank."""
        return {"position": self.position, **self._order.state(), "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved cursor. Raises :class:`UserError` when the data or their order are others."""
        mine = self.state_dict()
        if state["fingerprint"] != mine["fingerprint"]:
            raise UserError(
                f"the data set has changed since the checkpoint: it has {mine['samples']} samples and fingerprint "
                f"{mine['fingerprint']}, the checkpoint's had {state['samples']} and {state['fingerprint']}; "
                "give data.train (or data.sources) the data it was trained on, or start a new run"
            )
        for name, setting in SETTINGS.items():
            if name in mine and state[name] != mine[name]:
                raise UserError(
                    f"{setting} is {mine[name]}, the checkpoint's was {state[name]}: the order of data would change; "
                    f"keep {setting} {state[name]}, or start a new run"
                )
        self.position = int(state["position"])


class _Endless:
    """A sampler of spans: torch's loader iterates it lazily, as far ahead as its workers prefetch."""

    def __init__(self, spans: Callable[[int], Iterator[Span]], position: int) -> None:
        self._spans, self._position = spans, position

    def __iter__(self) -> Iterator[Span]:
        return self._spans(self._position)


def _prepare_worker(environment: dict[str, str], worker: int) -> None:
    """Give a worker the rank's environment of now, which that of multiprocessing's server may be older than.

    Ctrl-C and a scheduler's SIGTERM reach every process; the rank goes on for some steps and needs its workers.
    """
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _children_deaf_to_sigterm() -> Iterator[None]:
    """What starts in here ignores SIGTERM: also multiprocessing's server, at whose death workers would end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_workers(batches: Any) -> None:
    """End torch's workers its own way, then by force those that hang: deaf to SIGTERM, they would be waited for."""
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()
    for worker in getattr(batches, "_workers", ()):
        if worker.is_alive():
            worker.kill()
