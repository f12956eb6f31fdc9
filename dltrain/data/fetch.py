"""One rank's batch of a step: located, read, decoded and stacked, in the training process or in a worker of it.

A sample that cannot be read or decoded ends the run, or is replaced: by one that stands a few places further in the
same lane, the same on any number of ranks, so that all stay in step. What was replaced, and what reading cost, travels
with the batch to the process that trains.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dltrain.data.batch import Batch
from dltrain.data.decode import EncodedCrop
from dltrain.data.encoded import EncodedCrops
from dltrain.data.order import Integers, SampleOrder, sample_key, share
from dltrain.data.quarantine import Bad
from dltrain.data.reader import Dataset, Streamed
from dltrain.data.sample import BadSample, Sample
from dltrain.data.stream import Places
from dltrain.errors import UserError
from dltrain.storage.counters import Counts, count, snapshot

Arrays = dict[str, Any]
"""Arrays of one sample by field, or :class:`EncodedCrop`."""

Transform = Callable[[Sample, np.random.Generator | None], Mapping[str, Any]]
Span = tuple[int, int]

WEIGHT = "weight"
"""Key under which a transform may return a sample's weight in the loss: a number, 0 or more; 1 where it is absent."""

_REPLACEMENTS = 16
"""Bad samples in a row of one lane before it is called a bad data set."""


@dataclass(frozen=True)
class Fetched:
    """A batch, or the user's mistake met on the way (without a worker's traceback), and what it took."""

    batch: Batch | None
    error: str = ""
    bad: tuple[Bad, ...] = ()
    counts: Counts = field(default_factory=Counts)

    def pin_memory(self) -> Fetched:
        """The same with its batch in page-locked memory (torch's loader calls this)."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


@dataclass
class Fetch:
    """Makes one rank's batches of ``size`` samples, by spans of positions; picklable, for worker processes."""

    dataset: Dataset
    order: SampleOrder
    transform: Transform
    rank: int
    ranks: int
    size: int
    augment: bool
    replace: bool = False
    """Replace bad samples instead of refusing them."""
    encoded: bool = False
    """Leave pieces of images encoded: the batch's device decodes them."""
    _before: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._places = Places(self.order)

    def __getitem__(self, span: Span) -> Fetched:
        bad: list[Bad] = []
        try:
            batch, error = self._batch(*span, bad), ""
        except UserError as failure:
            batch, error = None, str(failure)
        now = snapshot()
        before, self._before = self._before, now
        return Fetched(batch, error, tuple(bad), now - before)

    def rest(self) -> None:
        """No one reads for now."""
        if isinstance(self.dataset, Streamed):
            self.dataset.rest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_before": Counts(), "_places": Places(self.order)}  # another process has its own

    def _batch(self, start: int, stop: int, bad: list[Bad]) -> Batch:
        """Every rank gets ``size`` samples in every step: where its share is smaller, repeats of weight 0 fill it up,
        so that ranks stay in step and shapes stay the same."""
        positions = share(start, stop, self.rank, self.ranks)
        padded = np.full(self.size, positions[0] if len(positions) else start, dtype=np.int64)
        padded[: len(positions)] = positions
        if isinstance(self.dataset, Streamed):
            self.dataset.advance(start)
        samples, arrays = self._load(padded, bad)
        weight = np.zeros(self.size, dtype=np.float32)
        weights = [_weight(array, sample) for array, sample in zip(arrays, samples, strict=True)]
        weight[: len(positions)] = weights[: len(positions)]
        padded[len(positions) :] = -1
        later = [name for name, value in arrays[0].items() if isinstance(value, EncodedCrop)]
        return Batch(
            fields={name: _stack(name, arrays, samples) for name in arrays[0] if name not in (WEIGHT, *later)},
            weight=torch.from_numpy(weight),
            keys=tuple(sample.key for sample in samples),
            position=torch.from_numpy(padded),
            encoded={name: EncodedCrops.pack(_column(name, arrays, samples)) for name in later},
        )

    def _load(self, positions: Integers, bad: list[Bad]) -> tuple[list[Sample], list[Arrays]]:
        try:
            samples = self.dataset.read(*self._places.locate(positions))
            began = time.perf_counter()
            arrays = [self._decode(sample, place) for sample, place in zip(samples, positions.tolist(), strict=True)]
            count(decode_seconds=time.perf_counter() - began)
            return samples, arrays
        except BadSample:
            if not self.replace:
                raise
        pairs = [self._load_one(position, bad) for position in positions.tolist()]
        return [sample for sample, _ in pairs], [arrays for _, arrays in pairs]

    def _load_one(self, position: int, bad: list[Bad]) -> tuple[Sample, Arrays]:
        """The sample at a position, or the first good one behind it in its lane."""
        reasons: list[str] = []
        for attempt in range(_REPLACEMENTS):
            place = position + attempt * self.order.lanes
            try:
                sample = self.dataset.read(*self.order.locate(np.array([place])))[0]
                arrays = self._decode(sample, place)
            except BadSample as error:
                reasons.append(str(error))
                continue
            if reasons:
                count(quarantined=1)
                shards, indices = self.order.locate(np.array([position]))
                bad.append(Bad(position, place, int(shards[0]), int(indices[0]), reasons[0]))
            return sample, arrays
        raise UserError(
            f"{_REPLACEMENTS} samples in a row are bad, from position {position} on; the first: {reasons[0]}"
        )

    def _decode(self, sample: Sample, position: int) -> Arrays:
        key = sample_key(self.order.seed, position) if self.augment else None
        made = self.transform(sample, None if key is None else np.random.Generator(np.random.Philox(key=key)))
        if self.encoded:
            return dict(made)
        return {name: value.decode() if isinstance(value, EncodedCrop) else value for name, value in made.items()}


def _weight(fields: Arrays, sample: Sample) -> float:
    if WEIGHT not in fields:
        return 1.0
    value = np.asarray(fields[WEIGHT])
    if value.shape or value.dtype.kind not in "biuf" or not 0 <= value <= np.finfo(np.float32).max:
        raise UserError(
            f"the weight of {sample.where} is {value}; return one finite number, 0 or more, from the task's sample()"
        )
    return float(value)


def _column(name: str, arrays: list[Arrays], samples: list[Sample]) -> list[Any]:
    """One field of all samples."""
    lacking = next((place for place, array in enumerate(arrays) if name not in array), None)
    if lacking is not None:
        raise UserError(
            f"{samples[lacking].where} has no field {name!r}, which {samples[0].where} has; "
            "return the same fields from the task's sample()"
        )
    column = [array[name] for array in arrays]
    later = [isinstance(value, EncodedCrop) for value in column]
    if any(later) != all(later):
        raise UserError(
            f"field {name!r} is still encoded in {samples[later.index(True)].where} and decoded in "
            f"{samples[later.index(False)].where}; make them equal in the task's sample()"
        )
    return column


def _stack(name: str, arrays: list[Arrays], samples: list[Sample]) -> torch.Tensor:
    values = [np.asarray(value) for value in _column(name, arrays, samples)]
    for value, sample in zip(values, samples, strict=True):
        if value.shape != values[0].shape or value.dtype != values[0].dtype:
            raise UserError(
                f"field {name!r} of {sample.where} has shape {value.shape} and type {value.dtype}, "
                f"{samples[0].where} has {values[0].shape} and {values[0].dtype}; "
                "make them equal in the task's sample()"
            )
    return torch.from_numpy(np.stack(values))
