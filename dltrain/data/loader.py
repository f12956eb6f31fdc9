"""From positions to batches.

A loader knows its place by one integer. It asks :mod:`dltrain.data.order` which positions the next step takes and which
of them are this rank's, reads and decodes them (in worker processes if told so; workers take turns by batch), and hands
out batches in order. The cursor moves when a batch is handed out, never when one is prefetched.

    loader = Loader(dataset, order, task.sample, global_batch_size=64)
    batch = next(iter(loader))
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dltrain.data.batch import Batch
from dltrain.data.order import Order, sample_key, share, step_span, steps_between
from dltrain.data.reader import Dataset
from dltrain.data.sample import Sample
from dltrain.errors import UserError

Transform = Callable[[Sample, np.random.Generator | None], dict[str, np.ndarray[Any, Any]]]
Span = tuple[int, int]


@dataclass(frozen=True)
class _Failure:
    """A user's mistake met in a worker, carried to the loop without the worker's traceback."""

    message: str


@dataclass(frozen=True)
class _Fetch:
    """Makes one rank's batch of the positions ``[start, stop)``; picklable, for worker processes."""

    dataset: Dataset
    order: Order
    transform: Transform
    rank: int
    ranks: int
    size: int
    augment: bool

    def __getitem__(self, span: Span) -> Batch | _Failure:
        try:
            return self._batch(*span)
        except UserError as error:
            return _Failure(str(error))

    def _batch(self, start: int, stop: int) -> Batch:
        """Every rank gets ``size`` samples in every step: where its share is smaller, repeats of weight 0 fill it up,
        so that ranks stay in step and shapes stay the same."""
        positions = share(start, stop, self.rank, self.ranks)
        padded = np.full(self.size, positions[0] if len(positions) else start, dtype=np.int64)
        padded[: len(positions)] = positions
        samples = self.dataset.read(*self.order.locate(padded))
        arrays = [self._decode(sample, position) for sample, position in zip(samples, padded.tolist(), strict=True)]
        weight = np.zeros(self.size, dtype=np.float32)
        weight[: len(positions)] = 1.0
        padded[len(positions) :] = -1
        return Batch(
            fields={name: _stack(name, arrays, samples) for name in arrays[0]},
            weight=torch.from_numpy(weight),
            keys=tuple(sample.key for sample in samples),
            position=torch.from_numpy(padded),
        )

    def _decode(self, sample: Sample, position: int) -> dict[str, np.ndarray[Any, Any]]:
        if not self.augment:
            return self.transform(sample, None)
        key = sample_key(self.order.seed, position)
        return self.transform(sample, np.random.Generator(np.random.Philox(key=key)))


class Loader:
    """An iterator over one rank's batches that can be put at any position.

    ``rank`` of ``ranks`` are data ranks. ``epochs=1`` ends after the epoch, padding its last step (evaluation);
    ``epochs=0`` never ends. ``size`` samples per batch is the largest share of any rank.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
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
        pin_memory: bool = False,
    ) -> None:
        if global_batch_size < ranks:
            raise UserError(
                f"data.global_batch_size is {global_batch_size}, smaller than the {ranks} data ranks; "
                f"give at least {ranks}, or train on fewer ranks"
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
        self._pin_memory = pin_memory
        size = -(-global_batch_size // ranks)
        self._fetch = _Fetch(dataset, order, transform, rank, ranks, size, augment)

    def steps_to(self, end: int, start: int | None = None) -> int:
        """Steps from ``start`` (where it stands, by default) to position ``end``."""
        start = self.position if start is None else start
        return steps_between(start, end, self.samples, self.global_batch_size, self.tail)

    def __iter__(self) -> Generator[Batch, None, None]:
        spans = self._spans(self.position)
        batches: Iterator[Batch | _Failure] = map(self._fetch.__getitem__, self._spans(self.position))
        if self._workers:
            batches = self._batches_of_workers()
        try:
            for span, batch in zip(spans, batches, strict=False):
                if isinstance(batch, _Failure):
                    raise UserError(batch.message)
                self.position = span[1]
                yield batch.pin_memory() if self._pin_memory and not self._workers else batch
        finally:
            _end_workers(batches)

    def _batches_of_workers(self) -> Iterator[Batch | _Failure]:
        with _children_deaf_to_sigterm():
            loader: Any = DataLoader(
                self._fetch,  # type: ignore[arg-type]
                sampler=_Endless(self._spans, self.position),
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=self._prefetch,
                multiprocessing_context=self._start_method,
                pin_memory=self._pin_memory,
                worker_init_fn=_leave_signals_to_the_rank,
            )
            return iter(loader)

    def peek(self) -> Batch:
        """The batch at the current position, without moving."""
        batch = self._fetch[next(self._spans(self.position))]
        if isinstance(batch, _Failure):
            raise UserError(batch.message)
        return batch

    def _spans(self, position: int) -> Iterator[Span]:
        while not self._end or position < self._end:
            start, stop = step_span(position, self.samples, self.global_batch_size, self.tail)
            if self._end and start >= self._end:
                return
            yield start, stop
            position = stop

    def state_dict(self) -> dict[str, Any]:
        """The cursor: some 200 bytes of JSON, equal on every rank."""
        order = self._order
        return {
            "position": self.position,
            "samples": order.samples,
            "seed": order.seed,
            "lanes": order.lanes,
            "window": order.window,
            "shuffle": order.shuffle,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved cursor. Raises :class:`UserError` when the data or their order are others."""
        mine = self.state_dict()
        names = {"seed": "run.seed", "lanes": "data.lanes", "window": "data.window", "shuffle": "shuffle"}
        if state["fingerprint"] != mine["fingerprint"]:
            raise UserError(
                f"the data set has changed since the checkpoint: it has {mine['samples']} samples and fingerprint "
                f"{mine['fingerprint']}, the checkpoint's had {state['samples']} and {state['fingerprint']}; "
                "give data.train the data set it was trained on, or start a new run"
            )
        for name, setting in names.items():
            if state[name] != mine[name]:
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


def _leave_signals_to_the_rank(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process; the rank goes on for some steps and needs its workers."""
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


def _stack(name: str, arrays: list[dict[str, np.ndarray[Any, Any]]], samples: list[Sample]) -> torch.Tensor:
    values = [np.asarray(array[name]) for array in arrays]
    for value, sample in zip(values, samples, strict=True):
        if value.shape != values[0].shape or value.dtype != values[0].dtype:
            raise UserError(
                f"field {name!r} of {sample.where} has shape {value.shape} and type {value.dtype}, "
                f"{samples[0].where} has {values[0].shape} and {values[0].dtype}; "
                "make them equal in the task's sample()"
            )
    return torch.from_numpy(np.stack(values))
