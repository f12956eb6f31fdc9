"""What selective activation checkpointing keeps of a unit's forward pass: the results of matrix products, convolutions,
attention and collectives, as torchtitan's "selective op" does. The rest is computed again in the backward pass.

Results are kept as they were made. Where something writes into one afterwards (an activation in place, or the bias that
DeepSpeed adds), it is copied before: torch's own contexts refuse that or, behind an ``_unsafe_view``, do not notice and
give the repetition a result that was written into already.

    checkpoint(forward, *values, use_reentrant=False, context_fn=selectively)
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dltrain.errors import UserError

_ATEN, _COLLECTIVES = torch.ops.aten, torch.ops._c10d_functional
_KEPT = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.linear.default,
    _ATEN._scaled_mm.default,  # of float8
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _COLLECTIVES.all_reduce.default,
    _COLLECTIVES.all_gather_into_tensor.default,
    _COLLECTIVES.reduce_scatter_tensor.default,
}


def selectively() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """What surrounds a forward pass, and its repetition."""
    kept = _Kept()
    return _Keeping(kept), _Returning(kept)


def selectively_compiled() -> tuple[Any, Any]:
    """The same as torch has it, which alone the compiler knows; it makes of every write a result of its own."""
    contexts: Any = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return contexts[0], contexts[1]


def _policy(context: Any, operation: Any, *values: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class _Kept:
    """Results by operation, in the order in which they were made."""

    def __init__(self) -> None:
        self._results: dict[Any, deque[list[Any]]] = {}
        self._homes: dict[int, list[tuple[list[Any], int]]] = {}

    def add(self, operation: Any, returned: Any) -> None:
        values = tree_leaves(returned)
        kept = [_alias(value) for value in values]
        self._results.setdefault(operation, deque()).append(kept)
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                self._homes.setdefault(_home(value), []).append((kept, place))

    def save_from(self, operation: Any, values: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Copy what the operation is about to write into."""
        for place, argument in enumerate(operation._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = values[place] if place < len(values) else named.get(argument.name)
            for tensor in [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]:
                for kept, which in self._homes.pop(_home(tensor), []):
                    kept[which] = _Versioned(kept[which].value.clone())

    def take(self, operation: Any) -> list[Any]:
        """The next result of the operation, leaf by leaf."""
        self._homes.clear()  # of use in the forward pass alone; by and by results have the repetition's graph
        results = self._results.get(operation)
        if not results:
            raise RuntimeError(
                f"a unit under activation checkpointing called {operation} more often in its repetition than in its "
                "forward pass, or went backward twice"
            )
        return [each.unchanged() if isinstance(each, _Versioned) else each for each in results.popleft()]


class _Versioned:
    """A tensor, and how often it had been written into."""

    def __init__(self, value: Tensor) -> None:
        self.value, self._version = value, value._version

    def unchanged(self) -> Tensor:
        if self.value._version != self._version:
            raise UserError(
                "what a unit under selective activation checkpointing returned was written into outside of it; let the "
                "plan's unit take in the module that does, or checkpoint in full"
            )
        return self.value


class _Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In the forward pass."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(getattr(func, "_schema", None), "is_mutable", False):  # operations of higher order have none
            self._kept.save_from(func, args, named)
        returned = func(*args, **named)
        if func in _KEPT:
            self._kept.add(func, returned)
        return returned


class _Returning(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In its repetition."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _KEPT:
            return func(*args, **(kwargs or {}))
        values = self._kept.take(func)
        return values[0] if len(func._schema.returns) == 1 else tuple(values)


def _alias(value: Any) -> Any:
    """The same memory without the graph, which would hold it in a circle; writes into one are seen of the other."""
    if not isinstance(value, Tensor):
        return value
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return _Versioned(value.detach())


def _home(value: Tensor) -> int:
    local = value._local_tensor if isinstance(value, DTensor) else value
    return local.untyped_storage()._cdata
