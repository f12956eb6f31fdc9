"""Proving that a model shared out over ranks computes what the whole model does, before its first step.

That shapes fit does not say that numbers do: heads that the forward counts, a fused layer cut at other places, a norm
between a column and its row, causal attention over parts of the tokens. So a few samples go forward and backward
through a copy of the whole model, then through the copy shared out, in evaluation mode and fp32: losses and gradients
must agree.

    prove(task, model, share, mesh, device, batch)  # share: splits layers and shares tokens out, in place
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dltrain.config import Precision
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.mesh import Mesh
from dltrain.parallel.forward import inputs_of, losses_of
from dltrain.parallel.gradients import add_up, whole
from dltrain.runtime.logs import say
from dltrain.task import Task

Share = Callable[[nn.Module], None]

_LOSS, _GRADIENT = 1e-3, 1e-2
"""Bounds, relative: rounding is below 1e-4, and what is computed otherwise far above."""

_LEAST = 1e-3
"""Of the largest gradient: parameters whose own is below are compared with that, for theirs may be rounding alone."""

_MEMORY = 0.25
"""Of a GPU's free memory that the copy and its gradients may take."""

_FP32 = Precision()


def prove(task: Task, model: nn.Module, share: Share, mesh: Mesh, device: torch.device, batch: Batch) -> None:
    """Raises :class:`UserError` on every rank where losses or gradients differ; ``model``, on the CPU, stays as it is.
    Collective.

    Says in one line why nothing is proved of a model that cannot be copied, or is too large for that.
    """
    twin = _copied(model, device)
    reason = _agreed(twin if isinstance(twin, str) else "", mesh)
    if reason:
        say(mesh.environment, f"{_shares(mesh)}, unproved, for {reason}; compare by dltrain verify")
        return
    assert isinstance(twin, nn.Module)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        fault = _agreed(_fault(task, twin.eval(), share, mesh, batch.to(device)), mesh)
    if fault:
        raise UserError(fault)


def _agreed(mine: str, mesh: Mesh) -> str:
    """The first of what ranks have to say; collective."""
    everyone: list[Any] = [None] * mesh.environment.world_size
    dist.all_gather_object(everyone, mine)
    return next(filter(None, everyone), "")


def _copied(model: nn.Module, device: torch.device) -> nn.Module | str:
    size = 2 * sum(value.nbytes for value in model.parameters())
    if device.type == "cuda" and size > _MEMORY * torch.cuda.mem_get_info(device)[0]:
        return "the model is large"
    try:
        return deepcopy(model).to(device)
    except Exception as error:  # noqa: BLE001 - a module may refuse to be copied in any way
        return f"a copy fails: {_line(error)}"


def _fault(task: Task, twin: nn.Module, share: Share, mesh: Mesh, batch: Batch) -> str:
    """What is wrong, as a sentence; empty where nothing is, and where the whole model differs from itself."""
    losses, gradients = _passed(task, twin, batch)
    with torch.no_grad():
        again = _losses(task, twin, batch)
    if not torch.equal(losses, again):
        return ""
    share(twin)
    advice = _advice(tokens=mesh.cp > 1 or task.config.parallel.sequence, layers=mesh.tp > 1)
    what = f"{_shares(mesh)}, and {type(twin).__name__} shared out as its plan says"
    inside = [type(twin).__name__]
    try:
        with _following(twin, inside), _quiet():
            found, shared = _passed(task, twin, batch, mesh)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the user's own forward raises
        return f"{what} fails in {inside[-1]} ({_line(error)}); {advice}"
    apart = float((found - losses).abs().max() / losses.abs().max().clamp(min=1e-12))
    if not apart <= _LOSS:
        return f"{what} gives losses that differ from the whole model's by {apart:.1g} of the largest; {advice}"
    floor = _LEAST * max((float(value.abs().max()) for value in gradients.values()), default=0.0)
    for name, gradient in gradients.items():
        apart = float((shared[name] - gradient).abs().max()) / max(float(gradient.abs().max()), floor, 1e-30)
        if not apart <= _GRADIENT:
            return f"{what} gives {name} a gradient that differs from the whole model's by {apart:.1g}; {advice}"
    return ""


_OF_LAYERS = (
    "between a column and its row each rank has a part of the outputs, which what lies there must take for what it is, "
    "such as some of the heads, and without parameters of its own"
)

_OF_TOKENS = (
    "each rank has a part of the tokens: modules that look at several want the role gather, attend (without a mask) or "
    "join, and with parallel.sequence other parameters the role each"
)


def _advice(tokens: bool, layers: bool) -> str:
    return "; ".join(text for text, fits in ((_OF_LAYERS, layers), (_OF_TOKENS, tokens)) if fits)


def _shares(mesh: Mesh) -> str:
    degrees = {"tp": mesh.tp, "cp": mesh.cp}
    return " and ".join(f"parallel.{name} is {degree}" for name, degree in degrees.items() if degree > 1)


def _losses(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    return losses_of(task, model(*inputs_of(task, batch, _FP32)), batch, _FP32)[1]


def _passed(task: Task, model: nn.Module, batch: Batch, mesh: Mesh | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses by sample, and whole gradients by name; of a model that ranks share, where there is a mesh."""
    model.zero_grad(set_to_none=True)
    losses = _losses(task, model, batch)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    if mesh is not None:
        add_up(model.parameters())
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = whole(parameter.grad).detach().clone()
            if mesh is not None and mesh.context is not None:  # averaged later, with those of other samples
                dist.all_reduce(gradient, group=mesh.context)
                gradient /= mesh.cp
            gradients[name] = gradient
    return losses.detach(), gradients


@contextmanager
def _following(model: nn.Module, inside: list[str]) -> Iterator[None]:
    """Within, the last of ``inside`` is the module at work; after an error, the one that it came from."""
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(_entered(inside, name), prepend=True))
            handles.append(module.register_forward_hook(_left(inside)))
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own words about shapes that do not fit: they are in the sentence."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _entered(inside: list[str], name: str) -> Callable[..., None]:
    return lambda *_: inside.append(name)


def _left(inside: list[str]) -> Callable[..., None]:
    def left(*_: Any) -> None:
        inside.pop()

    return left


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
