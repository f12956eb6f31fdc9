"""A parallelised model behind one small protocol.

The engine owns what differs between layouts: forward and backward over micro-batches, clipping, the optimizer step,
and the state of model and optimizer. It never looks at a value on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dltrain.data.batch import Batch
from dltrain.mesh import Mesh
from dltrain.parallel.pieces import Piece
from dltrain.parallel.sample_losses import SampleLosses
from dltrain.task import Loss


class Engine(Protocol):
    """What the loop asks of a layout."""

    device: torch.device
    mesh: Mesh

    micro_batch: int
    """Most samples in one forward pass; 0 takes all, and ``AUTO`` is settled by :meth:`settle`."""

    counts: bool
    """Whether this rank stands for those that see the same samples, in sums over all ranks: it has their losses."""

    bubble: float | None
    """Share of a pipeline's passes in which its ranks wait for each other by the schedule; ``None`` without one."""

    sample_losses: SampleLosses
    """Losses of single samples, where somebody switches them on."""

    @property
    def loss_scale(self) -> Tensor | None:
        """By which fp16 multiplies the next step's losses before their backward pass, float32 scalar; else ``None``."""
        ...

    def forward_backward(self, batch: Batch, count: Tensor) -> Loss:
        """Gradients of ``sum of weighted losses / count`` over all data ranks; ``count`` is the global count, a float
        scalar on the device. Returns this rank's loss sum, detached, and its count."""
        ...

    def step(self, learning_rate: float, max_norm: float) -> Tensor:
        """Clip (unless ``max_norm`` is 0), update and clear gradients. Returns the global norm before clipping, float32
        scalar; an update whose norm is not finite changes no weight."""
        ...

    def evaluate(self, batch: Batch) -> tuple[Any, Tensor]:
        """The task's predictions and its losses per sample [n], in evaluation mode and without gradients; collective.

        Empty on a rank that does not count and has none of them."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the weights are their average over the steps, where one is kept (``optim.ema``)."""
        ...

    def settle(self, peek: Callable[[], Batch]) -> None:
        """Whatever the first steps would do differently from all later ones, done now without a trace.

        ``peek`` gives the batch to do it on."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that this rank has, whole or in part, by the names they have in the model alone."""
        ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Those that belong to the model's state, such as running means."""
        ...

    def pieces(self, kind: str) -> Iterator[Piece]:
        """This rank's parts of "weights", "gradients", or a state of the optimizer such as "exp_avg", without a copy.

        Gradients are there between :meth:`forward_backward` and :meth:`step`, reduced and not yet clipped."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Gradients by parameter, float32, whole: of the parameters that this rank has, whole or in part; collective.

        Between :meth:`forward_backward` and :meth:`step`."""
        ...

    def fault(self) -> str:
        """What ranks that should hold the same between steps do not; empty where all is well. Collective; it waits for
        the device."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """``{"model": ..., "optimizer": ...}``, tensors by parameter name, sharded as they are.

        With ``"ema"``, ``{"weights": ..., "updates": ...}``, where an average is kept, and ``"loss_scale"`` in fp16."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, under any layout; without ``"ema"`` an average begins anew."""
        ...
