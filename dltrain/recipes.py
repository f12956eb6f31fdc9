"""Finding recipes and reading what they declare, without importing torch.

A recipe is one Python file: config sections, presets, a task. Its *declarations* (imports, sections, presets) can be
run by themselves, since none of them needs torch: so a misspelt setting is refused, and ``--help`` answers, at once.
"""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dltrain.config import Config, from_yaml
from dltrain.config.load import check_keys, load_overrides
from dltrain.errors import UserError, nearest

_LIGHT = ("dltrain.config", "pydantic", "typing", "dataclasses", "fractions", "math", "enum", "__future__")


@dataclass(frozen=True)
class Declarations:
    """What a recipe says of itself: its config class, its presets by name, and the text at its head."""

    name: str
    path: Path
    config: type[Config]
    presets: dict[str, Callable[[], Config]]
    doc: str

    @property
    def summary(self) -> str:
        return self.doc.strip().splitlines()[0] if self.doc.strip() else ""

    def configure(self, preset: str, overrides: dict[str, Any], file: Path | None = None) -> Config:
        """The config of a preset (which may be empty) or of a YAML file, with overrides. Raises :class:`UserError`."""
        check_keys(self.config, [key.replace("__", ".") for key in overrides])
        if preset and preset not in self.presets:
            raise UserError(f"recipe {self.name} has no preset {preset!r}; {nearest(preset, self.presets)}")
        if file is not None:
            if preset or not file.is_file():
                reason = "both --preset and --config are given" if preset else f"there is no config file {file}"
                raise UserError(f"{reason}; give one of them")
            return load_overrides(from_yaml(self.config, file.read_text(), str(file)), overrides)
        config = self.presets[preset]() if preset else self.config()
        return load_overrides(config, overrides)


def shipped_folder() -> Path:
    """The recipes that come with dltrain: inside the package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped() -> list[str]:
    """Names of the recipes that come with dltrain, such as ``image/classify``."""
    folder = shipped_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.glob("*/*.py"))


def find(name: str) -> Path:
    """The file of a recipe: one that comes with dltrain, or the user's own by its path ending in ``.py``."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"there is no recipe file {name}")
        return path
    if name not in shipped():
        raise UserError(f"there is no recipe {name!r}; {nearest(name, shipped())} (a file of yours ends in .py)")
    return shipped_folder() / f"{name}.py"


def copy(name: str, target: Path) -> Path:
    """Copy a recipe for the user to own. Raises :class:`UserError` when there is such a file already."""
    if target.is_dir():
        target = target / find(name).name
    if target.exists():
        raise UserError(f"{target} exists; name another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(find(name), target)
    return target


def declarations(name: str) -> Declarations:
    """Run a recipe's declarations alone."""
    path = find(name)
    source = path.read_text()
    try:
        tree = ast.parse(source, str(path))
    except SyntaxError as error:
        raise UserError(f"recipe {path} has a syntax error in line {error.lineno}: {error.msg}") from None
    module = ModuleType("dltrain_declarations")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where pydantic looks up annotations written as strings
    sections: set[str] = {"Config", "Section"}
    kept = [node for node in tree.body if _is_declaration(node, sections)]
    _execute(kept, module, path)
    return describe_module(module, name, path, ast.get_docstring(tree) or "")


def describe_module(module: ModuleType, name: str, path: Path, doc: str) -> Declarations:
    """The config class and presets that a module (or its declarations) holds."""
    members = vars(module)
    presets = {key: value for key, value in members.items() if getattr(value, "is_preset", False)}
    own = [
        value
        for value in members.values()
        if isinstance(value, type) and issubclass(value, Config) and value.__module__ == module.__name__
    ]
    return Declarations(name, path, own[-1] if own else Config, presets, doc)


def _is_declaration(node: ast.stmt, sections: set[str]) -> bool:
    """Light imports, classes derived from a section, and functions marked as presets."""
    if isinstance(node, ast.ImportFrom):
        return node.module is not None and (node.module == "dltrain" or node.module.startswith(_LIGHT))
    if isinstance(node, ast.Import):
        return all(alias.name.startswith(_LIGHT) for alias in node.names)
    if isinstance(node, ast.ClassDef) and {_last_name(base) for base in node.bases} & sections:
        sections.add(node.name)
        return True
    if isinstance(node, ast.FunctionDef):
        return any(_last_name(decorator) == "preset" for decorator in node.decorator_list)
    return False


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _execute(nodes: list[ast.stmt], module: ModuleType, path: Path) -> None:
    """Run the nodes in ``module``. From ``dltrain`` itself only what the declarations use is imported."""
    used = {node.id for top in nodes for node in ast.walk(top) if isinstance(node, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "dltrain":
            node.names = [alias for alias in node.names if (alias.asname or alias.name) in used] or node.names[:0]
    body = [node for node in nodes if not isinstance(node, ast.ImportFrom) or node.names]
    code = compile(ast.Module(body, type_ignores=[]), str(path), "exec", dont_inherit=True)
    try:
        exec(code, vars(module))
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the user's own code may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the sections and presets of recipe {path} do not run by themselves: {reason}; they may use "
            "dltrain.config, pydantic and the standard library's typing, math and enum alone"
        ) from None
