"""Reading a config strictly and writing its record.

Overrides are dotted names with text values, as they come from the command line (``--optim.learning_rate 0.1``) or from
a hyperparameter (``optim__learning_rate``). Each mistake is one sentence that names the key and what would be right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dltrain.config.debugger import Collection
from dltrain.config.section import Section
from dltrain.config.tree import Config, Source
from dltrain.errors import UserError, nearest

C = TypeVar("C", bound=Config)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Divide a command line into its words and its dotted overrides.

    ``["digits", "--run.seed", "3"]`` becomes ``(["digits"], {"run.seed": "3"})``; ``--key=value`` is the same as
    ``--key value``. Options without a dot stay among the words.
    """
    words: list[str] = []
    overrides: dict[str, str] = {}
    rest = iter(arguments)
    for word in rest:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            words.append(word)
            continue
        if not equals:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise UserError(f"--{key} needs a value: --{key} VALUE")
            value = following
        if key in overrides:
            raise UserError(f"--{key} is given twice")
        overrides[key] = value
    return words, overrides


def check_keys(kind: type[Section], names: Sequence[str]) -> None:
    """Refuse the first dotted name that is no leaf of ``kind``, naming the nearest one."""
    known = leaves(kind)
    for name in names:
        if name in kind.model_fields and name not in known:
            raise UserError(f"{name!r} is a section, not a setting; give settings as {name}.NAME")
        if name not in known:
            section, _, _ = name.partition(".")
            candidates = [leaf for leaf in known if leaf.startswith(section + ".")]
            if "." not in name:
                raise UserError(f"there is no setting {name!r}; {nearest(name, known)}")
            if not candidates and not get_close_matches(name, known):
                raise UserError(f"there is no section {section!r} for {name!r}; {nearest(section, kind.model_fields)}")
            raise UserError(f"there is no setting {name!r}; {nearest(name, candidates or list(known))}")


def leaves(kind: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting below a section by its dotted name."""
    found: dict[str, FieldInfo] = {}
    for name, field in kind.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            found.update(leaves(annotation, f"{prefix}{name}."))
        else:
            found[prefix + name] = field
    return found


def load_overrides(config: C, overrides: Mapping[str, Any]) -> C:
    """A copy of ``config`` with dotted settings replaced and everything checked again. Raises :class:`UserError`."""
    names = {name.replace("__", "."): value for name, value in overrides.items()}
    kind = type(config)
    check_keys(kind, list(names))
    known = leaves(kind)
    changes: dict[str, Any] = {}
    for name, value in names.items():
        *path, last = name.split(".")
        inner = changes
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = _parse(name, value, known[name])
    changed = _validated(kind, _merged(_plain(config), changes), "")
    _refuse_unused(changed, list(names))
    return changed


def _refuse_unused(config: Config, names: Sequence[str]) -> None:
    """What is asked of an engine that is not chosen would be passed over in silence."""
    for name in names:
        if name.startswith("parallel.deepspeed.") and config.parallel.engine != "deepspeed":
            raise UserError(
                f"--{name} is given and parallel.engine is {config.parallel.engine!r}; add --parallel.engine deepspeed"
            )


def from_yaml(kind: type[C], text: str, source: str = "") -> C:
    """The config a YAML record describes. Raises :class:`UserError` naming the key at fault."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source or 'the config'} is not YAML: {error}".replace("\n", " ")) from None
    if not isinstance(tree, dict):
        raise UserError(f"{source or 'the config'} is not a mapping of sections")
    return from_tree(kind, tree, source)


def from_tree(kind: type[C], tree: Mapping[str, Any], source: str = "") -> C:
    """The config a nested mapping describes, as ``run.json`` holds it. Raises :class:`UserError`."""
    check_keys(kind, _dotted(tree, leaves(kind)))
    return _validated(kind, tree, source)


def to_yaml(config: Config) -> str:
    """The record of a config: every value, in the order of the tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _validated(kind: type[C], tree: Mapping[str, Any], source: str) -> C:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error) + (f" (in {source})" if source else "")) from None


def explain(error: ValidationError) -> str:
    """pydantic's first complaint as the end of a sentence that names the setting."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    for place, kind in (("sources", Source), ("collections", Collection)):
        if first["type"] == "extra_forbidden" and place in first["loc"]:
            return f"there is no setting {name!r}; {nearest(str(first['loc'][-1]), kind.model_fields)}"
    whole = first["type"] == "missing" or isinstance(first["input"], dict | Section)
    found = "" if not name else f"--{name}: " if whole else f"--{name} is {first['input']!r}: "
    return f"{found}{reason[0].lower()}{reason[1:]}"


def _plain(config: Section) -> dict[str, Any]:
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    return {name: _plain(value) if isinstance(value, Section) else value for name, value in fields.items()}


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a tree of mappings by dotted name; an empty mapping is a leaf."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _dotted(tree: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in tree.items():
        if isinstance(value, Mapping) and prefix + name not in known:
            names.extend(_dotted(value, known, f"{prefix}{name}."))
        else:
            names.append(f"{prefix}{name}")
    return names


def _parse(name: str, value: Any, field: FieldInfo) -> Any:
    """Text for a list or a mapping is read as YAML; all other text is left to the field's own type. Numbers become
    text where that is wanted: SageMaker cannot tell the name ``7`` from a number."""
    if field.annotation is str and isinstance(value, int | float):
        return json.dumps(value)
    if isinstance(value, str) and _is_collection(field.annotation):
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            if value.lstrip()[:1] in ("[", "{"):
                raise UserError(f"--{name} is {value!r}, which is no list; write [a, b] or a,b") from None
            parsed = value  # a pattern such as *.bias, which YAML takes for something else
        if isinstance(parsed, int | float):
            return [parsed]
        return [part.strip() for part in value.split(",")] if isinstance(parsed, str) else parsed
    return value


def _is_collection(annotation: Any) -> bool:
    origin = get_origin(annotation) or annotation
    if origin in (list, tuple, dict, set):
        return True
    return any(_is_collection(part) for part in get_args(annotation))
