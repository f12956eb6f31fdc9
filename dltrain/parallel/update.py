"""What engines share whose optimizer is torch's: clipping, the update, and the state by parameter name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from dltrain.config import Config
from dltrain.mesh import Mesh
from dltrain.optim.optimizer import set_learning_rate, skip_if_nonfinite, skips_by_itself
from dltrain.parallel.data import BufferSync
from dltrain.parallel.gradients import Norm, clip, gradients_of, whole


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
        self.model, self.optimizer, self.device = model, optimizer, device
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        places = {name: place for place, name in enumerate(names)}
        home = torch.device("cpu") if config.parallel.offload else device  # of gradients and optimizer
        self._norm = Norm([places[name] for name in trained(model)], len(names), home, mesh.pipeline_group())
        self._sync_buffers = BufferSync(model, mesh.stage_group(), undo=config.run.nonfinite == "skip")
        self._skips_by_itself = skips_by_itself(optimizer)

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
        return norm

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                yield name, whole(parameter.grad).float()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def _update(self, norm: Tensor) -> None:
        """The optimizer's step, unless the norm is not finite."""
        # on a CPU the value is at hand, and asking the optimizer to look would take 20 microseconds
        if norm.device.type == "cpu" or not self._skips_by_itself:
            if math.isfinite(norm.item()):
                self.optimizer.step()
            return
        skip_if_nonfinite(self.optimizer, (norm - norm).ne_(0.0))  # NaN - NaN and inf - inf are not 0
        self.optimizer.step()


def trained(model: nn.Module) -> list[str]:
    """Names of the parameters that are not frozen."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
