"""Weights, optimizer state and gradients of ZeRO's shards, by parameter name and whole.

ZeRO keeps flat pieces of many parameters. DeepSpeed's `safe_get_full_*` puts a parameter together from all ranks, exact
to the bit; setting is local, each rank taking its piece of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

Parameters = list[tuple[str, nn.Parameter]]


class ZeroState:
    """The state of ``model`` under ZeRO 1, 2 or 3; ``wrapped`` is DeepSpeed's engine, ``optimizer`` the one inside it.

    Every method but :meth:`load_state_dict` is collective.
    """

    def __init__(self, model: nn.Module, wrapped: Any, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._trained: Parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._keys = _state_keys(optimizer)
        zero = wrapped.optimizer
        whole = hasattr(zero, "single_partition_of_fp32_groups")  # stages 1 and 2 keep whole weights on every rank
        self._pieces: list[Tensor] = (
            zero.single_partition_of_fp32_groups if whole else zero.fp32_partitioned_groups_flat
        )
        self._start()
        if whole:
            zero._lazy_init_hp_params_optimizer_state()  # parameters are told where their state lies

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Whole gradients by name, float32, between the last backward pass and the step."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self._trained:
            yield name, safe_get_full_grad(parameter).detach().float()

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Whole weights, gradients, or states of the optimizer, by name and one after another."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind == "gradients":
            yield from self.gradients()
        for name, parameter in self._trained:
            if kind == "weights":
                yield name, safe_get_full_fp32_param(parameter)
            elif kind in self._keys:
                yield name, safe_get_full_optimizer_state(parameter, kind)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As the engine's: parameters and optimizer state in fp32, whole on every rank, on the device."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        names = {id(parameter): name for name, parameter in self._trained}
        values = {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in self._trained}
        model = {
            name: values[names[id(value)]] if id(value) in names else _frozen(value)
            for name, value in self._model.state_dict(keep_vars=True).items()
        }
        state = {
            name: {key: safe_get_full_optimizer_state(parameter, key).clone() for key in self._keys}
            for name, parameter in self._trained
        }
        if self._counts_steps:
            for entry in state.values():
                entry["step"] = self._optimizer.state[self._pieces[0]]["step"].clone()
        return {"model": model, "optimizer": {"state": state, "param_groups": []}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave. Where parameters had made different numbers of steps, for some had
        had no gradient, all go on from the largest: a piece of ZeRO counts once for all of its parameters."""
        trained = {id(parameter) for _, parameter in self._trained}
        for name, value in self._model.state_dict(keep_vars=True).items():
            if id(value) in trained:
                _set(value, state["model"][name])
            else:
                _set_frozen(value, state["model"][name])
        entries = state["optimizer"]["state"]
        for name, parameter in self._trained:
            for key in self._keys:
                _set_state(parameter, entries[name][key], key)
        if self._counts_steps:
            steps = torch.stack([entry["step"] for entry in entries.values()]).max()
            for piece in self._pieces:
                self._optimizer.state[piece]["step"].copy_(steps)

    @property
    def _counts_steps(self) -> bool:
        return isinstance(self._optimizer, AdamW)

    def _start(self) -> None:
        """The state that the first step would make: a state can be asked for, and loaded, before it."""
        self._optimizer.state.clear()  # what was made for the parameters that the pieces replace
        for piece in self._pieces:
            state: dict[str, Tensor] = {key: torch.zeros_like(piece, requires_grad=False) for key in self._keys}
            if self._counts_steps:
                state["step"] = torch.zeros((), dtype=torch.float32, device=piece.device)
            self._optimizer.state[piece] = state


def _state_keys(optimizer: Optimizer) -> tuple[str, ...]:
    """What the optimizer keeps in the shape of a parameter."""
    if isinstance(optimizer, AdamW):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()


def _frozen(value: Tensor) -> Tensor:
    """A buffer, or a parameter that is not trained; ZeRO 3 shards those too."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([value], enabled=hasattr(value, "ds_tensor")):
        return value.detach().clone()


def _set_frozen(value: Tensor, whole: Tensor) -> None:
    if hasattr(value, "ds_tensor"):
        _set_piece(value, whole)
    else:
        value.copy_(whole)


def _set(parameter: Any, whole: Tensor) -> None:
    """Both copies: the optimizer's and the one that the forward pass reads."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_tensor"):
        safe_set_local_fp32_param(parameter, _piece(parameter, whole))
        _set_piece(parameter, whole)
    else:
        safe_set_full_fp32_param(parameter, whole)
        parameter.data.copy_(whole)


def _set_state(parameter: Any, whole: Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if hasattr(parameter, "ds_tensor"):
        safe_set_local_optimizer_state(parameter, _piece(parameter, whole), key)
    else:
        safe_set_full_optimizer_state(parameter, whole, key)


def _set_piece(parameter: Any, whole: Tensor) -> None:
    parameter.ds_tensor.data.copy_(_piece(parameter, whole))
    if parameter.data.numel() == whole.numel():  # a small one, which ZeRO 3 keeps whole between uses
        parameter.data.copy_(whole)


def _piece(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's piece of ``whole``: flat, in equal pieces, the last padded. ``safe_set_full_*`` cannot pad."""
    size, flat = parameter.ds_tensor.numel(), whole.detach().flatten()
    start = torch.distributed.get_rank(parameter.ds_process_group) * size
    piece = torch.zeros(size, dtype=flat.dtype, device=flat.device)
    mine = flat[start : start + size]
    piece[: mine.numel()] = mine
    return piece
