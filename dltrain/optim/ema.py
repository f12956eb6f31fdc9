"""The average of the weights over the steps (Polyak and Juditsky, 1992), exponentially weighted.

    average <- decay x average + (1 - decay) x weights    after every step that changed them

The average is cut as the weights are: every rank averages its own shards, nothing is sent, and nothing is read on the
host. Floating-point buffers that are saved (running statistics) are averaged as well: statistics belong to the weights
that made them, and those of the last weights alone would not fit their average. Frozen parameters are left out: they
are their own average. Evaluation sees the average by :meth:`Average.exchanged`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

WARMUP_POWER = 2 / 3
"""By which the warm-up nears 1, as in timm's ``ModelEmaV3``."""


class Average:
    """Of the trained parameters and running statistics of ``model``, which begins as they are.

    With ``warmup`` the decay of the n-th update, from 1, is at most ``1 - n ** -WARMUP_POWER``: the first takes over
    the weights as they are, and the initial ones, which nothing has trained, are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool, device: torch.device) -> None:
        self._warmup = warmup
        self._source = averaged_of(model)
        self._average = {name: torch.zeros_like(value) for name, value in self._source.items()}
        self._updates = torch.zeros((), dtype=torch.float64, device=device)
        self._least = torch.tensor(1 - decay, device=device)  # weight of the newest; float32, as the kernel wants it
        self._pairs = _by_dtype(self._average, self._source)
        self.restart()

    @torch.no_grad()
    def update(self, nonfinite: Tensor) -> None:
        """After an optimizer step; it did nothing where ``nonfinite`` (float32 scalar on the device) is 1."""
        self._updates += 1 - nonfinite
        for averages, sources in self._pairs:
            _lerp(averages, sources, self._weight(), nonfinite)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within, the model has the averages for its weights, and they are kept here; undone after an error, too."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew with the weights as they are."""
        self._updates.zero_()
        for averages, sources in self._pairs:
            torch._foreach_copy_(averages, sources)

    def state_dict(self) -> dict[str, Any]:
        """``weights``, tensors by parameter name, sharded as those are, and ``updates``, a float64 scalar."""
        return {"weights": dict(self._average), "updates": self._updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._updates.copy_(state["updates"])
        for name, average in self._average.items():
            _local(average).copy_(_local(state["weights"][name]))

    def _weight(self) -> Tensor:
        """Of the newest weights in the average."""
        if not self._warmup:
            return self._least
        return torch.maximum(self._updates.clamp(min=1).pow(-WARMUP_POWER).float(), self._least)

    @torch.no_grad()
    def _exchange(self) -> None:
        """By value, for FSDP2 gathers weights from where they lie; a tensor at a time, for memory's sake."""
        for averages, sources in self._pairs:
            for average, source in zip(averages, sources, strict=True):
                before = source.clone()
                source.copy_(average)
                average.copy_(before)


def averaged_of(model: nn.Module) -> dict[str, Tensor]:
    """What is averaged, by name: trained parameters, and floating-point buffers that are saved."""
    saved = model.state_dict().keys()
    values: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if value.requires_grad}
    values |= {name: value for name, value in model.named_buffers() if name in saved and value.is_floating_point()}
    return {name: value.detach() for name, value in values.items()}


def _lerp(averages: list[Tensor], sources: list[Tensor], weight: Tensor, skip: Tensor) -> None:
    """``average <- average + weight x (source - average)``, unless ``skip`` is 1, which is read on the device.

    ``torch._foreach_lerp_`` cannot skip. A step of fused SGD is the same in one kernel: with ``source`` for a gradient,
    a decay of -1 and a rate of ``-weight``. (With ``maximize`` in place of the signs kernels differ between devices.)
    """
    torch._fused_sgd_(
        averages,
        sources,
        [],
        weight_decay=-1.0,
        momentum=0.0,
        lr=-weight,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=None,
        found_inf=skip,
    )


def _by_dtype(averages: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """This rank's part of each pair, apart by dtype: a fused kernel takes one at a time. Empty shards are left out."""
    kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for name, average in averages.items():
        if _local(average).numel():
            mine = kinds.setdefault(average.dtype, ([], []))
            mine[0].append(_local(average))
            mine[1].append(_local(sources[name]))
    return list(kinds.values())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
