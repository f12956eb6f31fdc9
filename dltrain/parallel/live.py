"""Watching tensors that compute nothing: which bytes are alive, moved and sent, from mark to mark; and the kernels that
a GPU would choose in the place of those of the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Mark:
    """A moment, and what was seen since the one before.

    ``kind`` is begin, inputs, enter and leave (a module's forward), loss, back and done (its backward), gradient (of a
    parameter), end. Bytes: ``peak`` at most and ``live`` at the end of it, ``moved`` to and from memory, ``tensor`` and
    ``context`` sent to ranks that share layers and tokens, ``outputs`` of layers with weights; ``given``, of a module's
    arguments. ``kernels`` is how many were started.
    """

    kind: str
    name: str
    peak: float
    live: float
    moved: float
    kernels: float
    tensor: float
    context: float
    outputs: float = 0.0
    given: float = 0.0


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that are alive, among those that operations returned; ``moved`` to and from memory."""

    def __init__(self, aside: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.moved = self.kernels = 0.0
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in aside}

    def take(self) -> tuple[float, float, float, float]:
        """The peak since last time, what is alive; what was moved, and how many kernels were started, since."""
        taken = (self.peak, self.live, self.moved, self.kernels)
        self.peak, self.moved, self.kernels = self.live, 0.0, 0.0
        return taken

    def note(self, tensor: Tensor) -> bool:
        """Count the storage of ``tensor``; returns whether it is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return False
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        return True

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        outputs = [value for value in tree_leaves(returned) if isinstance(value, Tensor)]
        new = [self.note(value) for value in outputs]
        if any(new) or func._schema.is_mutable:
            inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            self.kernels += 1
            self.moved += sum(value.numel() * value.element_size() for value in (*inputs, *outputs))
        return returned


@dataclass
class Log:
    """The marks of the pass that is going on, and what was sent since the last one."""

    live: Live = field(default_factory=Live)
    marks: list[Mark] = field(default_factory=list)
    sent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("tensor", "context", "outputs"), 0.0))
    sums: int = 0

    def mark(self, kind: str, name: str = "", given: float = 0.0) -> None:
        self.marks.append(Mark(kind, name, *self.live.take(), **self.sent, given=given))
        self.sent = dict.fromkeys(self.sent, 0.0)

    def send(self, axis: str, number: float) -> None:
        self.sent[axis] += number
        self.sums += 1


_IN_BF16 = {F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, torch.bmm, torch.addmm, torch.mm}
_IN_BF16 |= {Tensor.matmul, Tensor.__matmul__, F.scaled_dot_product_attention}
_IN_FP32 = {F.layer_norm, F.group_norm, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax}


class Kernels(TorchFunctionMode):
    """What a GPU would choose: attention that keeps no scores, and, where ``low``, autocast's number formats."""

    def __init__(self, low: bool) -> None:
        super().__init__()
        self._low, self._cast = low, dict[int, tuple[Tensor, Tensor]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._low and func in _IN_BF16:
            args, kwargs = tree_map(self._lowered, (args, kwargs))
        if self._low and func in _IN_FP32:
            args, kwargs = tree_map(_raised, (args, kwargs))
        if func is F.scaled_dot_product_attention and len(args) == 3 and kwargs.get("attn_mask") is None:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention
            return kernel(*args, 0.0, kwargs.get("is_causal", False), scale=kwargs.get("scale"))[0]
        if func is F.dropout and len(args) == 3 and args[1] and args[2]:
            return torch.native_dropout(*args)[0]
        return func(*args, **kwargs)

    def _lowered(self, value: Any) -> Any:
        """In bf16; a weight is cast once."""
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.bfloat16()
        if id(value) not in self._cast:
            self._cast[id(value)] = (value, value.bfloat16())
        return self._cast[id(value)][1]


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
