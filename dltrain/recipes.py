"""Finding recipes and reading what they declare, without importing torch.

A recipe is one Python file: config sections, presets, a task. Its *declarations* (sections, presets and what they use)
are run by themselves, for none of them needs torch: so a misspelt setting is refused, and ``--help`` answers, at once.
"""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from dltrain.config import Config, from_tree, from_yaml
from dltrain.config.load import check_keys, explain, load_overrides
from dltrain.errors import UserError, nearest
from dltrain.run_folder import find_run


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

    def configure(self, preset: str, overrides: Mapping[str, Any], file: Path | None = None) -> Config:
        """The config of a preset (which may be empty), of a YAML file, or of the run that ``run.resume`` names, with
        overrides. Raises :class:`UserError`."""
        check_keys(self.config, [key.replace("__", ".") for key in overrides])
        preset = preset.replace("_", "-")
        if preset and preset not in self.presets:
            raise UserError(f"recipe {self.name} has no preset {preset!r}; {nearest(preset, self.presets)}")
        return load_overrides(self._base(preset, overrides, file), overrides)

    def _base(self, preset: str, overrides: Mapping[str, Any], file: Path | None) -> Config:
        if file is not None:
            if preset or not file.is_file():
                reason = "--preset and --config are both given" if preset else f"there is no config file {file}"
                raise UserError(f"{reason}; give one of them")
            return from_yaml(self.config, read_text(file), str(file))
        resumed = overrides.get("run.resume", "never")
        if resumed not in ("never", "auto"):
            run = find_run(resumed, overrides.get("run.folder", "runs"))
            return from_tree(self.config, run.read()["config"], str(run.record))
        try:
            return self.presets[preset]() if preset else self.config()
        except ValidationError as error:
            raise UserError(f"preset {preset!r} of {self.path}: {explain(error)}") from None
        except Exception as error:  # noqa: BLE001 - the user's own code may raise anything
            raise UserError(f"preset {preset!r} of {self.path} does not run: {error}; {_ALLOWED_IN_PRESETS}") from None


_ALLOWED_IN_PRESETS = "sections and presets may use what needs no torch: dltrain.config, pydantic, the standard library"


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


def recipe_name(name: str) -> str:
    """By what a run remembers its recipe: the name of a shipped one, the whole path of the user's own."""
    return str(Path(name).resolve()) if name.endswith(".py") else name


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
    source = read_text(path)
    try:
        tree = ast.parse(source, str(path))
    except SyntaxError as error:
        raise UserError(f"recipe {path} has a syntax error in line {error.lineno}: {error.msg}") from None
    if not any(isinstance(node, ast.Call) and _last_name(node.func) == "main" for node in ast.walk(tree)):
        raise UserError(f"recipe {path} never calls main(YourTask), so running it would do nothing; see docs/guide.md")
    module = ModuleType("dltrain_declarations")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where pydantic looks up annotations written as strings
    _execute(_declared_nodes(tree), module, path)
    return describe_module(module, name, path, ast.get_docstring(tree) or "")


def read_text(path: Path) -> str:
    """A text file of the user's. Raises :class:`UserError` when it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"cannot read {path} as text: {error}") from None


def describe_module(module: ModuleType, name: str, path: Path, doc: str) -> Declarations:
    """The config class and presets that a module (or its declarations) holds."""
    members = vars(module)
    presets = {key.replace("_", "-"): value for key, value in members.items() if getattr(value, "is_preset", False)}
    own = [
        value
        for value in members.values()
        if isinstance(value, type) and issubclass(value, Config) and value.__module__ == module.__name__
    ]
    return Declarations(name, path, own[-1] if own else Config, presets, doc)


def _declared_nodes(tree: ast.Module) -> list[ast.stmt]:
    """Sections and presets, and whatever else at the top of the file they use."""
    sections: set[str] = {"Config", "Section"}
    kept = [node for node in tree.body if _is_declaration(node, sections)]
    while True:
        used = {inner.id for node in kept for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        more = [node for node in tree.body if node not in kept and _defines(node) & used]
        if not more:
            return [node for node in tree.body if node in kept and not _is_unused_import(node, used)]
        kept += more


def _is_declaration(node: ast.stmt, sections: set[str]) -> bool:
    """A class derived from a section, or a function marked as a preset."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__"
    if isinstance(node, ast.ClassDef) and {_last_name(base) for base in node.bases} & sections:
        sections.add(node.name)
        return True
    if isinstance(node, ast.FunctionDef):
        return any(_last_name(decorator) == "preset" for decorator in node.decorator_list)
    return False


def _defines(node: ast.stmt) -> set[str]:
    """Names that a statement at the top of a file brings in."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}


def _is_unused_import(node: ast.stmt, used: set[str]) -> bool:
    """Drops the names nobody uses from an import (torch comes in by them); tells whether any is left."""
    if not isinstance(node, ast.Import | ast.ImportFrom) or getattr(node, "module", "") == "__future__":
        return False
    node.names = [alias for alias in node.names if (alias.asname or alias.name).partition(".")[0] in used]
    return not node.names


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _execute(nodes: list[ast.stmt], module: ModuleType, path: Path) -> None:
    code = compile(ast.Module(nodes, type_ignores=[]), str(path), "exec", dont_inherit=True)
    try:
        exec(code, vars(module))
    except UserError:
        raise
    except ValidationError as error:
        raise UserError(f"recipe {path}: {error.title} cannot be made without arguments: {explain(error)}") from None
    except Exception as error:  # noqa: BLE001 - the user's own code may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"recipe {path}: {reason}; {_ALLOWED_IN_PRESETS}") from None
