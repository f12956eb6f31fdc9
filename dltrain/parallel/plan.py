"""How one model family is spread over ranks: names, no communication.

A plan stands beside its model. For now it names the units that are sharded, gathered and compiled as one.

    plan = Plan(units=("blocks.*",))
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from dltrain.errors import UserError


@dataclass(frozen=True)
class Plan:
    """``units`` are patterns of module names (``*`` stays within a dot); each matching module is one unit, the rest
    belong to the root."""

    units: tuple[str, ...] = ()

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
        found: dict[str, nn.Module] = {}
        names = dict(model.named_modules())
        for pattern in self.units:
            matched = {
                name: module
                for name, module in names.items()
                if name.count(".") == pattern.count(".") and fnmatchcase(name, pattern) and _has_parameters(module)
            }
            if not matched:
                raise UserError(f"the plan's pattern {pattern!r} matches no module of {type(model).__name__}")
            found.update(matched)
        return [found[name] for name in sorted(found, key=lambda name: -name.count("."))]


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
