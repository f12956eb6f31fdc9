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
    waiting: tuple[Label, Batch, torch.cuda.Event] | None = None
    for label, batch in batches:
        copied: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(copies):
            moved = batch.to(device)
            copied.record(copies)
        if waiting is not None:
            yield _ready(*waiting, device)
        waiting = label, moved, copied
    if waiting is not None:
        yield _ready(*waiting, device)


def _ready(label: Label, batch: Batch, copied: torch.cuda.Event, device: torch.device) -> tuple[Label, Batch]:
    """A batch the current stream may use: it waits for this copy alone, and keeps the memory until its work is done."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for value in (*batch.fields.values(), batch.weight):
        value.record_stream(current)
    return label, batch
