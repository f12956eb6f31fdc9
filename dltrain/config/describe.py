"""The tree as text for ``--help``: each section with its documentation, its settings and their defaults."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any, Literal, get_args, get_origin

from dltrain.config.section import Section
from dltrain.config.tree import Config


def describe(config: Config) -> str:
    """Every section of ``config``, its documentation and the values it has."""
    parts = []
    for name in type(config).model_fields:
        section = getattr(config, name)
        if isinstance(section, Section) and type(section).model_fields:
            parts.append(_describe_section(name, section))
    return "\n\n".join(parts)


def _describe_section(name: str, section: Section) -> str:
    lines = [f"{name}: {(inspect.getdoc(type(section)) or '').splitlines()[0]}"]
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, Section):
            lines.append(_describe_section(f"{name}.{key}", value))
            continue
        shown = value if value not in ("", ()) else "''"
        lines.append(f"  --{name}.{key} {_kind(field.annotation)} [{shown}]")
        lines.extend(textwrap.wrap(field.description or "", 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "{" + ",".join(str(choice) for choice in get_args(annotation)) + "}"
    if get_origin(annotation) is not None:
        return str(annotation).replace("dltrain.config.length.", "").upper()
    return getattr(annotation, "__name__", str(annotation)).upper()
