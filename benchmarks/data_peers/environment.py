"""The peers' own virtual environment: made on first use beside the corpus, under the project's constraints.

torch is the very build of the project's interpreter, for another one, or CUDA, would be measured otherwise. A peer that
cannot be installed keeps its reason and is reported.

    python, reasons = install(work)
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from dltrain.errors import UserError

CONSTRAINTS = Path(__file__).parent.parent.parent / "constraints.txt"

SHARED = ("numpy", "pillow", "simplejpeg", "boto3")
"""Beside torch, what every peer's process uses."""

WITHOUT_DEPENDENCIES = ("torchvision", "mosaicml-streaming")
"""torchvision would pull the torch it was built for; streaming caps numpy and transformers below the constraints."""

PEERS: dict[str, tuple[str, ...]] = {
    "folder": ("torchvision==0.28.0",),
    "webdataset": ("webdataset==1.0.2",),
    "aws": ("awscli==1.46.2",),
    "litdata": ("litdata==0.2.76",),
    "mosaic": (
        "mosaicml-streaming==0.13.0",
        *("brotli", "catalogue", "matplotlib", "python-snappy", "requests", "tqdm", "transformers", "xxhash", "zstd"),
    ),
    "s3torchconnector": ("s3torchconnector==1.5.0",),
}
"""What to install for each peer; for streaming what it imports, without its clients of clouds that nobody asks."""

DISTRIBUTIONS = {
    "folder": "torchvision",
    "webdataset": "webdataset",
    "aws": "awscli",
    "litdata": "litdata",
    "mosaic": "mosaicml-streaming",
    "s3torchconnector": "s3torchconnector",
}
"""The package whose version is a peer's."""


def install(work: Path) -> tuple[Path, dict[str, str]]:
    """The environment's interpreter, and for each peer that could not be installed the reason."""
    torch = f"torch=={version('torch')}"
    wanted = json.dumps([torch, SHARED, PEERS, CONSTRAINTS.read_text(), sys.version])
    folder = work / f"peers-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    python, state = folder / "bin" / "python", folder / "state.json"
    if not state.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing the peers into {folder.name} (once) ...", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if reason := _pip(python, [torch, *SHARED]):
            raise UserError(f"the peers' environment cannot be made: {reason}; check pip and the network")
    missing = json.loads(state.read_text()) if state.is_file() else PEERS  # what failed before is tried again
    reasons = {peer: reason for peer in missing if (reason := _install_peer(python, peer))}
    state.write_text(json.dumps(reasons))
    return python, reasons


def installed_here() -> tuple[Path, dict[str, str]]:
    """The project's own interpreter, and the reason for each peer it lacks."""
    reasons = {peer: "not installed; --peers installs it" for peer, name in DISTRIBUTIONS.items() if not _has(name)}
    return Path(sys.executable), reasons


def peer_versions(python: Path) -> dict[str, str | None]:
    """Versions of the peers and of what they share, in the environment of ``python``."""
    names = ["torch", *SHARED, *DISTRIBUTIONS.values()]
    program = (
        "import json, sys; from importlib.metadata import distributions;"
        "found = {d.metadata['Name'].lower(): d.version for d in distributions()};"
        "print(json.dumps({name: found.get(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([str(python), "-c", program, *names], capture_output=True, text=True, check=True)
    versions: dict[str, str | None] = json.loads(done.stdout)
    return versions


def _install_peer(python: Path, peer: str) -> str:
    """Why it failed; nothing if it did not."""
    alone = [package for package in PEERS[peer] if package.partition("==")[0] in WITHOUT_DEPENDENCIES]
    rest = [package for package in PEERS[peer] if package not in alone]
    return (_pip(python, ["--no-deps", *alone]) if alone else "") or (_pip(python, rest) if rest else "")


def _pip(python: Path, words: Sequence[str]) -> str:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--constraint", str(CONSTRAINTS), *words], capture_output=True, text=True, check=False
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
    return (errors[-1] if errors else f"pip failed with status {done.returncode}") if done.returncode else ""


def _has(distribution: str) -> bool:
    try:
        version(distribution)
    except ImportError:  # PackageNotFoundError is one
        return False
    return True
