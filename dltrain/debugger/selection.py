"""Which tensors are looked at, when, and in which forms, of those that there are: the config's collections.

choice = Selection(config).choose(names)  # names of all ranks
choice.names  # which of them are looked at on some step
choice.due(50)  # and on this one
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from dltrain.config import Config, Debugger
from dltrain.debugger.needs import Needs
from dltrain.debugger.policy import Policy, first_due
from dltrain.debugger.seen import kind_of
from dltrain.errors import UserError, nearest
from dltrain.runtime.step_clock import NEVER

STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""Tensors of optimizers by their names."""

OF_MODULES = ("activations", "active", "unsaturated", "inputs", "channels", "images", "tokens", "labels")
"""Kinds of tensors that are noted while the model runs."""

NOTHING: frozenset[str] = frozenset()

Belongs = Callable[[str], bool]


@dataclass(frozen=True)
class _Group:
    """Tensors with one policy and the same forms."""

    title: str
    belongs: Belongs
    policy: Policy
    histograms: bool
    raw: bool
    pattern: bool = False


class Choice:
    """The tensors that are looked at, in one order on all ranks."""

    def __init__(self, names: Sequence[str], groups: Sequence[_Group], raw: Collection[str], needs: Needs) -> None:
        self._policies = [group.policy for group in groups]
        self._members = [frozenset(filter(group.belongs, names)) for group in groups]
        self.unmatched = [g.title for g, some in zip(groups, self._members, strict=True) if g.pattern and not some]
        everything = frozenset[str]().union(*self._members)
        self.names = [name for name in names if name in everything]
        counted = [some for group, some in zip(groups, self._members, strict=True) if group.histograms]
        kept = [some for group, some in zip(groups, self._members, strict=True) if group.raw]
        self.counted = frozenset[str]().union(*counted) | {n for n in self.names if kind_of(n) in needs.histograms}
        self.counted -= {name for name in self.counted if kind_of(name) in OF_MODULES[1:]}
        self.raw = frozenset[str]().union(*kept) | {n for n in self.names if any(re.search(each, n) for each in raw)}
        self.next = NEVER if not groups else 0
        """The first step that may be due."""
        self._found: dict[tuple[bool, ...], frozenset[str]] = {}

    def due(self, step: int) -> frozenset[str]:
        """The names of the tensors that are due on this step; asked of ever later steps."""
        if step < self.next:
            return NOTHING
        which = tuple(policy.due(step) for policy in self._policies)
        self.next = first_due(self._policies, step + 1)
        if which not in self._found:
            some = [members for members, is_due in zip(self._members, which, strict=True) if is_due]
            self._found[which] = frozenset[str]().union(*some)
        return self._found[which]


class Selection:
    """What a config asks for. Raises :class:`UserError` for kinds and collections that there are not."""

    def __init__(self, config: Config, needs: Needs = Needs()) -> None:  # noqa: B008 - which is frozen
        self._settings = settings = config.debugger
        self._states, self.needs = STATES[config.optim.name], needs
        self.kinds = _expanded(config, self._states)
        self._groups = [*_of_kinds(settings, self.kinds), *_of_patterns(settings, self._states)]
        self.raw = settings.raw
        self.patterns = [pattern for each in settings.collections.values() for pattern in each.include]
        self.patterns += settings.raw

    @property
    def candidates(self) -> tuple[str, ...]:
        """Kinds of tensors of parameters that may be looked at."""
        every = ("weights", "gradients", "updates", *self._states)
        if self.patterns:
            return every
        wanted = {"weights" if kind == "biases" else kind for kind in self.kinds} | self.needs.histograms
        return tuple(kind for kind in every if kind in wanted)

    def choose(self, names: Sequence[str]) -> Choice:
        """Of these tensors, in this order."""
        return Choice(names, [*self._groups, *self._of_needs()], self.raw, self.needs)

    def _of_needs(self) -> list[_Group]:
        """What rules alone want of modules, and kinds whose histograms they want."""
        kinds = set(self.needs.histograms)
        kinds |= {"inputs"} if self.needs.activation_inputs else set()
        kinds |= {"channels", "images"} if self.needs.first_input else set()
        kinds |= {"tokens"} if self.needs.tokens else set()
        kinds |= {"labels"} if self.needs.labels else set()
        policy = Policy.of(self._settings)
        return [_Group(kind, _of_kind(kind), policy, False, False) for kind in sorted(kinds)]


def _expanded(config: Config, states: Sequence[str]) -> tuple[str, ...]:
    whole = ("weights", "gradients", "updates", "activations", *states)
    shorthands = {"all": whole, "optimizer_state": tuple(states), "losses": ()}
    known = ("biases", *whole, *shorthands)
    found: list[str] = []
    for kind in config.debugger.collect:
        if kind not in known:
            raise UserError(f"debugger.collect names {kind!r}, which there is not; {nearest(kind, known)}")
        found += shorthands.get(kind, (kind,))
    found += [kind for kind in config.debugger.collections if kind in (*whole, "biases")]
    sharded = config.parallel.engine == "deepspeed" and config.parallel.deepspeed.stage
    if sharded and "updates" in config.debugger.collect and config.debugger.collect != Debugger().collect:
        raise UserError(
            "debugger.collect names updates, and DeepSpeed's ZeRO has no weights before a step; leave it out"
        )
    return tuple(dict.fromkeys(kind for kind in found if not (sharded and kind == "updates")))


def _of_kinds(settings: Debugger, kinds: Iterable[str]) -> list[_Group]:
    found = []
    for kind in kinds:
        own = settings.collections.get(kind)
        own = None if own is not None and own.include else own
        histograms, raw = settings.histograms or bool(own and own.histograms), bool(own and own.raw)
        found.append(_Group(kind, _of_kind(kind), Policy.of(settings, own), histograms, raw))
    return found


def _of_kind(kind: str) -> Belongs:
    if kind == "biases":
        return lambda name: kind_of(name) == "weights" and name.endswith("bias")
    if kind == "activations":
        return lambda name: kind_of(name) in OF_MODULES
    return lambda name: kind_of(name) == kind


def _of_patterns(settings: Debugger, states: Sequence[str]) -> list[_Group]:
    found = []
    for title, own in settings.collections.items():
        if own.include:
            belongs = _matching(own.include)
            histograms = own.histograms or settings.histograms
            found.append(_Group(title, belongs, Policy.of(settings, own), histograms, own.raw, True))
        elif title not in (kinds := ("weights", "biases", "gradients", "updates", "activations", *states)):
            raise UserError(
                f"debugger.collections.{title} includes nothing; give it an include, or the name of a kind: "
                f"{nearest(title, kinds)}"
            )
    return found


def _matching(patterns: Iterable[str]) -> Belongs:
    expressions = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(expression.search(name) for expression in expressions)
