"""The batch in which something was found, on disk: rank 0's samples, as they went into the step, with their keys.

A finding comes some steps after its batch, so the last ones are kept at hand.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

from safetensors.torch import save

from dltrain import storage
from dltrain.data.batch import Batch

STEPS_BACK = 4
"""A finding comes at most so many steps after its batch."""


class Captured:
    """Batches of the last steps, where ``wanted``."""

    def __init__(self, wanted: bool, folder: Path) -> None:
        self.wanted, self._folder = wanted, folder / "batches"
        self._kept: deque[tuple[int, Batch]] = deque(maxlen=STEPS_BACK)

    def keep(self, step: int, batch: Batch) -> None:
        if self.wanted:
            self._kept.append((step, batch.host or batch))

    def write(self, step: int) -> Path | None:
        """``batches/step-00000050.safetensors`` with the keys as metadata; nothing if the batch is gone."""
        for found, batch in self._kept:
            if found == step:
                target = self._folder / f"step-{step:08d}.safetensors"
                tensors = {name: value.cpu().contiguous() for name, value in batch.fields.items()}
                data = save({**tensors, "weight": batch.weight.cpu()}, {"keys": json.dumps(batch.keys)})
                storage.write(str(target), data)
                return target
        return None
