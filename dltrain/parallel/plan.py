"""How one model family is spread over ranks: names, no communication.

A plan stands beside its model. It names the units that are sharded, gathered and compiled as one, and the layers that
tensor parallelism splits.

    plan = Plan(units=("blocks.*",), tensor={"blocks.*.mlp.up": "column", "blocks.*.mlp.down": "row"})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from dltrain.errors import UserError, nearest


@dataclass(frozen=True)
class Plan:
    """Patterns of module names, in which ``*`` stays within a dot.

    Each module of ``units`` is one unit, the rest belong to the root. ``tensor`` splits linear layers: ``column`` by
    outputs, which leaves each rank its part of the activations, and ``row`` by inputs, which adds the parts up again.
    A column comes before a row, and what lies between works on any part, such as whole attention heads.

    ``tokens`` says what modules of a transformer do with tokens [n, tokens, width], for ranks that keep a part of them
    each (sequence and context parallelism): return all of them, to be dealt out (``deal``); take each by itself, as
    norms do (``each``); hand them to split layers inside (``gather``); let each look at all (``attend``), from queries,
    keys and values [n, heads, tokens, width], or do so by scaled dot products without mask (``dot_product``), whose
    keys and values may go round a ring of ranks; want all of them (``join``).

    ``chain`` is the model's forward as modules called one after another, each on what the one before returned (a tensor
    or a tuple of them), the first on the model's inputs. A pipeline may be cut between any two. Those that are in
    ``with_inputs``, too, are given the model's inputs as well, after what comes before them.
    """

    units: tuple[str, ...] = ()
    tensor: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)
    chain: tuple[str, ...] = ()
    with_inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("units", "chain", "with_inputs"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"Plan({name}={getattr(self, name)!r}) is one string; give a tuple of patterns")

    @classmethod
    def auto(cls, model: nn.Module) -> Plan:
        """Units by structure: the parametrised children of every ``Sequential`` and ``ModuleList`` that is not itself
        inside such a child."""
        units: list[str] = []
        for name, module in model.named_modules():
            inside = any(name == unit or name.startswith(unit + ".") for unit in units)
            if inside or not isinstance(module, (nn.Sequential, nn.ModuleList)):
                continue
            prefix = f"{name}." if name else ""
            units += [prefix + child for child, part in module.named_children() if _has_parameters(part)]
        return cls(tuple(units))

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The units of ``model``, innermost first. Raises :class:`UserError` for a pattern that matches nothing."""
        found = self.found(model)
        return [found[name] for name in sorted(found, key=lambda name: -name.count("."))]

    def found(self, model: nn.Module) -> dict[str, nn.Module]:
        """The units of ``model`` by name. Raises :class:`UserError` for a pattern that matches nothing."""
        found: dict[str, nn.Module] = {}
        for pattern in self.units:
            found.update(matching(model, pattern))
        return found


def matching(model: nn.Module, pattern: str, bare: bool = False) -> dict[str, nn.Module]:
    """Modules with parameters, or with ``bare`` any modules, whose names match, in the order of the model.

    Raises :class:`UserError` where there is none.
    """
    matched = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name
        and name.count(".") == pattern.count(".")
        and fnmatchcase(name, pattern)
        and (bare or _has_parameters(module))
    }
    if not matched:
        names = [name for name, _ in model.named_modules() if name]
        near = nearest(pattern.replace("*", "0"), names)
        close = f"; {near}" if near.startswith("did you mean") else ""  # not hundreds of names
        raise UserError(f"the plan's pattern {pattern!r} matches no module of {type(model).__name__}{close}")
    return matched


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
