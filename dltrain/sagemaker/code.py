"""The user's code as a training job gets it: the files beside a recipe, without what is left out.

code = read_code("mine.py", source="", ignore=("*.ckpt", "notebooks"))
code.told()  # "12 files, 0.3 MB, of ."
list(code.upload("s3://bucket/job/code"))
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from dltrain import storage
from dltrain.errors import UserError

REQUIREMENTS = "requirements.txt"

LEFT_OUT = (".*", "__pycache__", "*.pyc", "*.egg-info", "runs", "sagemaker-local")
"""Files and folders that are never brought: hidden ones, and what Python and runs leave."""

MOST_BYTES, MOST_FILES = 200_000_000, 5_000
"""More than that beside a recipe is data, which are streamed and not brought as code."""


@dataclass(frozen=True)
class Code:
    """Files by their paths in ``folder``, the ``recipe`` among them; ``size`` is their bytes."""

    folder: Path
    recipe: str
    files: tuple[str, ...]
    size: int

    def told(self) -> str:
        """A line for the user."""
        return f"{len(self.files):,} file(s), {self.size / 1e6:.1f} MB, of {self.folder}"

    def upload(self, address: str) -> Iterator[str]:
        """Bring the files below an address; yields theirs."""
        for file in self.files:
            storage.upload(self.folder / file, f"{address}/{file}")
            yield f"{address}/{file}"

    def copy(self, folder: Path) -> None:
        """Bring the files to a local folder."""
        for file in self.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / file, folder / file)


def is_users(recipe: str) -> bool:
    """Whether a recipe is a file of the user's, which a container must be brought."""
    return recipe.endswith(".py")


def place_in(source: str, recipe: str) -> str:
    """The recipe's path in ``source``, or beside itself where that is empty: by it a container finds it.

    Raises :class:`UserError` where it lies elsewhere.
    """
    folder, file = _folder(source, recipe), Path(recipe)
    for whole in (Path(os.path.abspath(file)), file.parent.resolve() / file.name):  # a link in source is part of it
        for above in (Path(os.path.abspath(folder)), folder.resolve()):
            if whole.is_relative_to(above):
                return whole.relative_to(above).as_posix()
    raise UserError(f"the code of the job is {str(folder)!r}, and {recipe} is not in it; give --source")


def read_code(recipe: str, source: str = "", ignore: Sequence[str] = ()) -> Code:
    """What is in ``source``, or beside the recipe where that is empty. ``ignore`` are patterns of names and paths.

    Raises :class:`UserError` where the recipe is not among it, or it is too much to be code, or cannot be brought.
    """
    folder, place = _folder(source, recipe), place_in(source, recipe)
    files: list[str] = []
    sizes: Counter[str] = Counter()
    for file in _walk(folder, Path(), (*LEFT_OUT, *ignore), (folder.resolve(),)):
        files.append(file.as_posix())
        sizes[file.parts[0]] += (folder / file).stat().st_size
        if len(files) > MOST_FILES or sizes.total() > MOST_BYTES:
            raise UserError(_too_much(folder, len(files), sizes))
    if place not in files:
        raise UserError(f"the code of the job is {str(folder)!r}, and {place} is not in it: a pattern leaves it out")
    return Code(folder, place, tuple(sorted(files)), sizes.total())


def _folder(source: str, recipe: str) -> Path:
    return Path(source) if source else Path(recipe).parent


def _walk(root: Path, inside: Path, left_out: Sequence[str], above: Sequence[Path]) -> Iterator[Path]:
    """Files below ``root / inside``, through links as well; ``above`` are the folders on the way, without links."""
    here = root / inside
    skipped = (*left_out, *_FABRICATED) if is_fabricated(here) else left_out
    for name in _names(here):
        path, entry = inside / name, here / name
        if _is_any(path, skipped):
            continue
        if entry.is_dir():
            if entry.is_symlink() and any(each.is_relative_to(entry.resolve()) for each in above):
                raise UserError(f"{entry} is a link to a folder that it lies in; leave it out by --ignore {path}")
            yield from _walk(root, path, left_out, (*above, entry.resolve()))
        elif entry.is_file():
            yield path
        else:
            what = f"a link to {entry.readlink()}, which there is not" if entry.is_symlink() else "no plain file"
            raise UserError(f"{entry} is {what}; mend it, or leave it out by --ignore {path}")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}; mend it, or leave it out by --ignore") from None


_FABRICATED = ("algo-*", "s3")


def is_fabricated(folder: Path) -> bool:
    """Whether hosts of jobs were fabricated there: their folders come and go, and are no code."""
    return (folder / ".lock").is_file() and (folder / "algo-1" / "opt").is_dir()


def _is_any(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path.name, each) or fnmatch(path.as_posix(), each.rstrip("/")) for each in patterns)


def _too_much(folder: Path, files: int, sizes: Counter[str]) -> str:
    ((largest, size),) = sizes.most_common(1)
    return (
        f"more than {MOST_FILES:,} files or {MOST_BYTES / 1e6:g} MB lie in {folder}, too much to be brought as code "
        f"({largest}: {size / 1e6:,.1f} MB so far); put the recipe into a folder of its own, name it by --source, or "
        "leave things out by --ignore"
    )
