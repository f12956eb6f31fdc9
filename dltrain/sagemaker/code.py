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
    """Files by their paths in ``folder``; ``size`` is their bytes."""

    folder: Path
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


def read_code(recipe: str, source: str = "", ignore: Sequence[str] = ()) -> Code:
    """What is in ``source``, or beside the recipe where that is empty. ``ignore`` are patterns of names and paths.

    Raises :class:`UserError` where the recipe is not among it, or it is too much to be code.
    """
    folder = Path(source) if source else Path(recipe).parent
    files: list[str] = []
    sizes: Counter[str] = Counter()
    for file in _walk(folder, (*LEFT_OUT, *ignore)):
        files.append(file.as_posix())
        sizes[file.parts[0]] += (folder / file).stat().st_size
        if len(files) > MOST_FILES or sizes.total() > MOST_BYTES:
            raise UserError(_too_much(folder, len(files), sizes))
    if Path(recipe).name not in files:
        raise UserError(f"the code of the job is {str(folder)!r}, and {Path(recipe).name} is not in it; give --source")
    return Code(folder, tuple(sorted(files)), sizes.total())


def _walk(folder: Path, left_out: Sequence[str]) -> Iterator[Path]:
    for at, folders, files in os.walk(folder):
        inside = Path(at).relative_to(folder)
        folders[:] = [name for name in sorted(folders) if not _is_any(inside / name, left_out)]
        yield from (inside / name for name in files if not _is_any(inside / name, left_out))


def _is_any(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path.name, each) or fnmatch(path.as_posix(), each.rstrip("/")) for each in patterns)


def _too_much(folder: Path, files: int, sizes: Counter[str]) -> str:
    ((largest, size),) = sizes.most_common(1)
    return (
        f"more than {MOST_FILES:,} files or {MOST_BYTES / 1e6:g} MB lie in {folder}, too much to be brought as code "
        f"({largest}: {size / 1e6:,.1f} MB so far); put the recipe into a folder of its own, name it by --source, or "
        "leave things out by --ignore"
    )
