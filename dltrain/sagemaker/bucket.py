"""The place of S3 on this machine: what hosts have changed comes there, as SageMaker brings it while a job runs.

    given = stamps(host)  # as soon as the host has its files
    bring({host: given}, bucket / "checkpoints")

What a host was given and has left alone is not brought: it may be older than what another host has made of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

Stamps = Mapping[str, list[int]]
"""Size in bytes and time of the last change in nanoseconds, by a file's path in its folder."""


def stamps(folder: Path) -> dict[str, list[int]]:
    """Of all files there are; a link to nowhere is none."""
    files = [Path(at, name) for at, _, names in os.walk(folder) for name in names]
    found = {file.relative_to(folder).as_posix(): file.stat() for file in files if file.is_file()}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in found.items()}


def bring(hosts: Mapping[Path, Stamps], whole: Path) -> None:
    """What differs on hosts from what each was given, to ``whole``; what they have deleted is deleted there.

    Of two hosts that have changed the same file the newer one has its way. ``whole`` stays as it is until all is there.
    """
    files, deleted = changes(hosts)
    if files or deleted:
        stay = {path: whole / path for path in stamps(whole) if path not in deleted}
        put({**stay, **files}, whole)


def changes(hosts: Mapping[Path, Stamps]) -> tuple[dict[str, Path], set[str]]:
    """New and changed files by their paths, and paths of those that are deleted."""
    newest: dict[str, int] = {}
    files: dict[str, Path] = {}
    deleted: set[str] = set()
    for folder, given in hosts.items():
        now = stamps(folder)
        deleted |= given.keys() - now.keys()
        for path, (size, changed) in now.items():
            if given.get(path) != [size, changed] and changed >= newest.get(path, 0):
                newest[path], files[path] = changed, folder / path
    return files, deleted - files.keys()


def put(files: Mapping[str, Path], whole: Path) -> None:
    """Have these files and no others in ``whole``, which stays as it is until they are all copied."""
    recover(whole)
    part = whole.with_name(f".{whole.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for path, file in files.items():
        (part / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, part / path)  # with its time, by which the newer is known
    if whole.exists():
        whole.rename(_before(whole))
    part.rename(whole)
    recover(whole)


def recover(whole: Path) -> None:
    """After a death at any moment: what there was is back, unless what should come is there."""
    before = _before(whole)
    if before.exists() and not whole.exists():
        before.rename(whole)
    shutil.rmtree(before, ignore_errors=True)


def _before(whole: Path) -> Path:
    return whole.with_name(f".{whole.name}-before")
