"""What engines share whose optimizer is torch's: clipping, the update, and the state by parameter name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from dltrain.config import Config
from dltrain.mesh import Mesh
from dltrain.optim.ema import Average
from dltrain.optim.optimizer import set_learning_rate, skip_if_nonfinite, skips_by_itself
from dltrain.parallel.agreement import Agreement
from dltrain.parallel.data import BufferSync
from dltrain.parallel.forward import LEAST_COUNT
from dltrain.parallel.gradients import Norm, add_up, clip, gradients_of, whole
from dltrain.parallel.pieces import Piece, counted, local_of
from dltrain.parallel.sample_losses import SampleLosses
from dltrain.parallel.scaling import LossScale


class Updating:
    """A model and its optimizer, and how a step changes them.

    ``names`` are those of all parameters that are trained, on any rank.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        names: Sequence[str],
    ) -> None:
        self.model, self.optimizer, self.mesh, self.device = model, optimizer, mesh, device
        self.bubble: float | None = None
        self.sample_losses = SampleLosses()
        self._agreement, self._data_ranks = Agreement(model, optimizer, mesh), mesh.data_ranks
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._holds_any = bool(model.state_dict())
        self._sums_are_partial = config.parallel.sequence and mesh.tp > 1
        places = {name: place for place, name in enumerate(names)}
        home = torch.device("cpu") if config.parallel.offload else device  # of gradients and optimizer
        self._norm = Norm([places[name] for name in trained(model)], len(names), home, mesh.pipeline_group())
        self._scale = LossScale(device) if config.precision.compute == "fp16" else None
        may_overflow = config.run.nonfinite == "skip" or self._scale is not None
        self._sync_buffers = BufferSync(model, mesh.stage_group(), undo=may_overflow)
        self._skips_by_itself = skips_by_itself(optimizer)
        ema = config.optim
        self._average = Average(model, ema.ema, ema.ema_warmup, device) if ema.ema else None

    def step(self, learning_rate: float, max_norm: float) -> Tensor:
        gradients = gradients_of(self._parameters)
        norm = self._norm(self._parameters)
        if max_norm:
            clip(gradients, norm, max_norm)
        set_learning_rate(self.optimizer, learning_rate)
        self._update(norm)
        norm = norm.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self._sync_buffers(norm)
        for follower in (self._average, self._scale):
            if follower is not None:
                follower.update(_nonfinite(norm))
        return norm

    @property
    def loss_scale(self) -> Tensor | None:
        return None if self._scale is None else self._scale.value.clone()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        kept = self.model.state_dict().keys()
        return ((name, buffer) for name, buffer in self.model.named_buffers() if name in kept)

    def fault(self) -> str:
        return self._agreement.fault()

    def pieces(self, kind: str) -> Iterator[Piece]:
        for name, parameter in self.model.named_parameters():
            tensor = self._tensor_of(kind, parameter)
            if tensor is not None and tensor.dim() >= parameter.dim():  # the optimizer also has counts of steps
                yield Piece(name, local_of(tensor), self._counted[name], tensor)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                yield name, whole(parameter.grad).float()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer) if self._holds_any else _nothing()
        average = {} if self._average is None else {"ema": self._average.state_dict()}
        scale = {} if self._scale is None else {"loss_scale": self._scale.state_dict()}
        return {"model": model, "optimizer": optimizer, **average, **scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._holds_any:
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        if self._average is not None and "ema" in state:
            self._average.load_state_dict(state["ema"])
        elif self._average is not None:
            self._average.restart()
        if self._scale is not None and "loss_scale" in state:
            self._scale.load_state_dict(state["loss_scale"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if self._average is None:
            yield
            return
        self._reshard()
        with self._average.exchanged():
            try:
                yield
            finally:
                self._reshard()

    @cached_property
    def _counted(self) -> dict[str, bool]:
        return counted(dict(self.model.named_parameters()), self.mesh)

    def _tensor_of(self, kind: str, parameter: nn.Parameter) -> Tensor | None:
        if kind == "weights":
            return parameter
        if kind == "gradients":
            return parameter.grad
        value = self.optimizer.state.get(parameter, {}).get(kind)
        return value if isinstance(value, Tensor) else None

    def _seed(self, count: Tensor) -> Tensor:
        """What a loss's backward pass begins with, where gradients are averaged over data ranks and a sum is wanted.

        In fp16 times the loss scale; the data ranks come in when that goes out, so that half-precision gradients are no
        larger for being made on many ranks.
        """
        count = count.clamp(min=LEAST_COUNT)
        return self._data_ranks / count if self._scale is None else self._scale.value / count

    def _complete_gradients(self) -> None:
        """Gradients whole, and as they are without a loss scale: what hooks, the norm and clipping see; collective."""
        if self._sums_are_partial:
            add_up(self._parameters)
        if self._scale is not None:
            self._scale.unscale(gradients_of(self._parameters), self._data_ranks)

    def _reshard(self) -> None:
        """FSDP2 keeps gathered weights after a forward pass that no backward pass followed; others are to take their
        place."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _update(self, norm: Tensor) -> None:
        """The optimizer's step, unless the norm is not finite."""
        # on a CPU the value is at hand, and asking the optimizer to look would take 20 microseconds
        if norm.device.type == "cpu" or not self._skips_by_itself:
            if math.isfinite(norm.item()):
                self.optimizer.step()
            return
        skip_if_nonfinite(self.optimizer, _nonfinite(norm))
        self.optimizer.step()


def _nothing() -> tuple[dict[str, Any], dict[str, Any]]:
    """State of a stage without parameters, such as one that only scales; torch's own function refuses to tell it."""
    return {}, {"state": {}, "param_groups": []}


def _nonfinite(norm: Tensor) -> Tensor:
    """1 where the norm is not finite, else 0: a float scalar on its device."""
    return (norm - norm).ne_(0.0)  # NaN - NaN and inf - inf are not 0


def trained(model: nn.Module) -> list[str]:
    """Names of the parameters that are not frozen."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
