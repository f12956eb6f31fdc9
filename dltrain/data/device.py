"""Copying the next batch to the device while the current one is worked on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from dltrain.data.batch import Batch

Label = TypeVar("Label")


def moved_ahead(batches: Iterable[tuple[Label, Batch]], device: torch.device) -> Iterator[tuple[Label, Batch]]:
    """The same batches on a CUDA device, each copied on a stream of its own one step before it is handed out."""
    copies: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: tuple[Label, Batch] | None = None
    for label, batch in batches:
        with torch.cuda.stream(copies):
            moved = batch.to(device)
        if waiting is not None:
            yield _ready(waiting, copies, device)
        waiting = label, moved
    if waiting is not None:
        yield _ready(waiting, copies, device)


def _ready(pair: tuple[Label, Batch], copies: torch.cuda.Stream, device: torch.device) -> tuple[Label, Batch]:
    """A batch the current stream may use: it waits for the copy, and keeps the memory until its work is done."""
    current = torch.cuda.current_stream(device)
    current.wait_stream(copies)
    for value in (*pair[1].fields.values(), pair[1].weight):
        value.record_stream(current)
    return pair
