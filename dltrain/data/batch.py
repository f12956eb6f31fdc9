"""Samples of one rank in one step, as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dltrain.data.encoded import EncodedCrops
from dltrain.errors import UserError


class Fields(dict[str, Tensor]):
    """Tensors by name; asked for one that is not there, it says which are."""

    def __missing__(self, name: str) -> Tensor:
        raise UserError(f"the batch has no field {name!r}; Task.sample returned {', '.join(map(repr, self))}")


@dataclass(frozen=True)
class Batch:
    """Samples of one rank in one step.

    ``fields`` are tensors with samples first; ``weight`` is float32 [n], 0 for padding and 1 otherwise unless the data
    says differently; ``position`` is int64 [n], -1 for padding; ``keys`` name the samples. A batch on a device keeps
    the one it was copied from as ``host``, so that what the host wants to know costs no synchronisation. ``encoded``
    become fields, uint8 [n, size, size, 3], when the batch is copied to the device that decodes them.
    """

    fields: Mapping[str, Tensor]
    weight: Tensor
    keys: tuple[str, ...]
    position: Tensor
    host: Batch | None = None
    encoded: Mapping[str, EncodedCrops] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.fields, Fields):
            object.__setattr__(self, "fields", Fields(self.fields))

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; copies from pinned memory do not wait."""
        if self.weight.device == device:
            return self
        moved = {name: value.to(device, non_blocking=True) for name, value in self.fields.items()}
        decoded = {name: crops.to(device) for name, crops in self.encoded.items()}
        host = self.host or (replace(self, fields={**self.fields, **decoded}, encoded={}) if decoded else self)
        weight = self.weight.to(device, non_blocking=True)
        return replace(self, fields={**moved, **decoded}, weight=weight, host=host, encoded={})

    def split(self, micro_batch: int) -> Iterator[Batch]:
        """Pieces of at most ``micro_batch`` samples; 0 keeps the batch whole."""
        if not micro_batch or micro_batch >= len(self):
            yield self
            return
        for start in range(0, len(self), micro_batch):
            part = slice(start, start + micro_batch)
            fields = {name: value[part] for name, value in self.fields.items()}
            encoded = {name: crops[part] for name, crops in self.encoded.items()}
            yield Batch(fields, self.weight[part], self.keys[part], self.position[part], encoded=encoded)

    def padded(self, samples: int) -> Batch:
        """The same batch with its first sample added, at weight 0, until there are so many; images are decoded."""
        missing = samples - len(self)
        if not missing:
            return self
        fields = {name: _filled(value, missing) for name, value in self.fields.items()}
        weight = torch.cat([self.weight, self.weight.new_zeros(missing)])
        position = torch.cat([self.position, self.position.new_full((missing,), -1)])
        return Batch(fields, weight, (*self.keys, *self.keys[:1] * missing), position)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (torch's loader calls this)."""
        return replace(
            self, fields={k: v.pin_memory() for k, v in self.fields.items()}, weight=self.weight.pin_memory()
        )


def _filled(value: Tensor, missing: int) -> Tensor:
    return torch.cat([value, value[:1].expand(missing, *value.shape[1:])])
