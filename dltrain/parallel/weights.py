"""Starting from weights that were trained before: whose tensor belongs to which name of the model.

The whole model is filled on the CPU, before anything is cut, split or sharded, so that every layout starts alike. Where
the tensors come from is somebody else's (:mod:`dltrain.checkpoint.weights` opens files and checkpoints).

    weights = Weights(tensors, skip=("head.*",))
    report = weights.fill(model)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dltrain.errors import UserError

_WRAPPINGS = re.compile(r"^(?:module\.|model\.|backbone\.)+")
_COMPILED = "_orig_mod."


class Tensors(Protocol):
    """Named tensors, read one at a time; ``origin`` is what messages call them."""

    origin: str

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> Tensor:
        """One of ``shapes``, on the CPU."""
        ...


@dataclass(frozen=True)
class Match:
    """``pairs`` are names in the model and those of their tensors; the rest are names of either side without one.

    ``skipped`` are names in the model that keep their initial values because the user said so.
    """

    origin: str
    pairs: Mapping[str, str]
    missing: Sequence[str]
    left_over: Sequence[str]
    skipped: Sequence[str]
    reshaped: Sequence[str]
    """Those of ``skipped`` that have a tensor of another shape, with both shapes."""

    def __str__(self) -> str:
        parts = [f"{len(self.pairs)} matched"]
        named = (("missing", self.missing), ("left over", self.left_over), ("skipped", self.skipped))
        parts += [f"{len(names)} {what}{_few(names)}" for what, names in named]
        return f"weights of {self.origin}: {', '.join(parts)}"

    def record(self) -> dict[str, Any]:
        """The whole of it, as JSON."""
        lists = {name: list(getattr(self, name)) for name in ("missing", "left_over", "skipped", "reshaped")}
        return {"origin": self.origin, "matched": len(self.pairs), **lists}


class Weights:
    """``tensors`` for a model, but for names that match a pattern of ``skip``."""

    def __init__(self, tensors: Tensors, skip: Iterable[str] = ()) -> None:
        self._tensors, self._skip = tensors, tuple(skip)
        self.match: Match | None = None
        """What :meth:`fill` or :meth:`find` has found."""

    def find(self, model: nn.Module) -> Match:
        """Which tensor is whose; reads none, and the model may be on the meta device.

        Raises :class:`UserError` when nothing matches, a pattern skips nothing, two tensors claim one name, or a shape
        differs.
        """
        ours = _tensors_of(model)
        self._check_skip(ours)
        pairs = _pairs(ours, self._tensors)
        skipped = [name for name in ours if self._skips(name)]
        differing = [name for name, theirs in pairs.items() if self._tensors.shapes[theirs] != tuple(ours[name].shape)]
        self._refuse_shapes(model, [name for name in differing if not self._skips(name)], pairs, ours)
        kept = {name: theirs for name, theirs in pairs.items() if not self._skips(name)}
        if not kept:
            raise UserError(
                f"nothing in {self._tensors.origin} has a name of {type(model).__name__}: it has "
                f"{_first(self._tensors.shapes)}, the model {_first(ours)}; give model.weights another file"
            )
        there = {id(ours[name]) for name in (*kept, *skipped)}  # of tied names, one is enough
        self.match = Match(
            self._tensors.origin,
            kept,
            missing=[name for name, tensor in ours.items() if id(tensor) not in there],
            left_over=[name for name in self._tensors.shapes if name not in set(pairs.values())],
            skipped=skipped,
            reshaped=[self._shapes(name, pairs, ours) for name in differing],
        )
        return self.match

    def read(self, name: str) -> Tensor | None:
        """The tensor for a name in the model that :meth:`find` has looked at; ``None`` where it keeps its own."""
        if self.match is None:
            raise AssertionError("find() comes before read()")
        theirs = self.match.pairs.get(name)
        return None if theirs is None else self._tensors.read(theirs)

    @torch.no_grad()
    def fill(self, model: nn.Module) -> Match:
        """Copy every tensor that :meth:`find` finds into the model, in the model's types."""
        match, ours = self.find(model), _tensors_of(model)
        for name, theirs in match.pairs.items():
            ours[name].copy_(self._tensors.read(theirs))
        return match

    def _skips(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._skip)

    def _check_skip(self, ours: Mapping[str, Tensor]) -> None:
        for pattern in self._skip:
            if not any(fnmatchcase(name, pattern) for name in ours):
                raise UserError(f"model.weights_skip has {pattern!r}, which matches no name, such as {_first(ours)}")

    def _shapes(self, name: str, pairs: Mapping[str, str], ours: Mapping[str, Tensor]) -> str:
        theirs = self._tensors.shapes[pairs[name]]
        return f"{name} has shape {theirs} in {self._tensors.origin} and {tuple(ours[name].shape)} in the model"

    def _refuse_shapes(
        self, model: nn.Module, names: Sequence[str], pairs: Mapping[str, str], ours: Mapping[str, Tensor]
    ) -> None:
        if not names:
            return
        patterns = ",".join(dict.fromkeys([*self._skip, *map(_pattern_of, names)]))
        raise UserError(
            f"{self._shapes(names[0], pairs, ours)}, a {type(model).__name__}; to leave what differs at its initial "
            f"values give --model.weights_skip '{patterns}'"
        )


def _pairs(ours: Mapping[str, Tensor], tensors: Tensors) -> dict[str, str]:
    """Names in the model with their tensors': equal names first, then those equal without what wrappers put before."""
    pairs = {name: name for name in tensors.shapes if name in ours}
    bare: dict[str, list[str]] = {}
    for name in ours:
        if name not in pairs:
            bare.setdefault(_bare(name), []).append(name)
    for theirs in tensors.shapes:
        found = bare.get(_bare(theirs), []) if theirs not in pairs else []
        if len(found) != 1:
            continue  # nobody's, or one of several that nothing tells apart
        if found[0] in pairs:
            raise UserError(
                f"{tensors.origin} has two tensors for {found[0]}: {pairs[found[0]]} and {theirs}; leave one of them"
            )
        pairs[found[0]] = theirs
    return {name: pairs[name] for name in ours if name in pairs}


def _bare(name: str) -> str:
    """Without the prefixes of DDP, torch.compile and common wrappers."""
    return _WRAPPINGS.sub("", name.replace(_COMPILED, ""))


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, the model's own."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _pattern_of(name: str) -> str:
    """All of the module whose tensor it is."""
    module, dot, _ = name.rpartition(".")
    return f"{module}.*" if dot else name


def _first(names: Iterable[str]) -> str:
    return repr(next(iter(names), "none"))


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f" ({shown})" if names else ""
