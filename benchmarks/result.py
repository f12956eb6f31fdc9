"""A benchmark's result as it is stored: what was measured, on what, with which versions. Imports no torch itself.

Neither the host's name nor a path of its file system is stored.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dltrain import __version__
from dltrain.runtime.environment import cores

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"
"""Where results are stored unless told otherwise."""

WORK = Path(tempfile.gettempdir()) / "dltrain-benchmarks"
"""Where what is made once is kept unless told otherwise: files to read, the peers' environment."""


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    name: str
    quick: bool = False
    device: str = "auto"
    output: Path = RESULTS
    peers: bool = False
    work: Path = WORK
    peer_python: str = ""

    @property
    def command(self) -> str:
        """The command that repeats the measurement, without the places of its files and its result."""
        device = "" if self.device == "auto" else f" --device {self.device}"
        flags = "".join(f" --{flag}" for flag in ("quick", "peers") if getattr(self, flag))
        peer = " --peer-python PYTHON" if self.name == "smdebug" else ""
        return f"python -m benchmarks {self.name}{flags}{device}{peer}"


def store(request: Request, device: torch.device, settings: dict[str, Any], measured: dict[str, Any]) -> str:
    """Write the result, and return its path as it may be shown: relative to the repository where it lies in it.

    A quick run's file has ``-quick`` in its name, so that it never replaces a full run's.
    """
    kind = device_kind(device)
    day = datetime.now(UTC)
    name = f"{request.name}-{kind}{'-quick' if request.quick else ''}-{day:%Y%m%d}.json"
    result = {
        "benchmark": request.name,
        "command": request.command,
        "date": day.isoformat(timespec="seconds"),
        "device": kind,
        "hardware": hardware(device),
        "versions": versions(),
        "settings": {"quick": request.quick, **settings},
        **measured,
    }
    request.output.mkdir(parents=True, exist_ok=True)
    path = request.output / name
    path.write_text(json.dumps(result, indent=1) + "\n")
    repository = RESULTS.parent.parent
    return str(path.relative_to(repository)) if path.is_relative_to(repository) else str(path)


def device_kind(device: torch.device) -> str:
    """``cpu-2cores``, or the GPU's name in the same style: ``nvidia-h200``."""
    name = _gpu(device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") if name else f"cpu-{cores()}cores"


def hardware(device: torch.device) -> dict[str, Any]:
    """The processor's model, the cores this process may use, and the GPU where it was used."""
    return {"cpu": _cpu_model(), "cores": cores(), "gpu": _gpu(device)}


def versions() -> dict[str, str | None]:
    """Python and the packages that matter; ``None`` for one that is not installed."""
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "torchvision": _version("torchvision"),
        "dltrain": __version__,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles (interpolated between the values) and extremes of at least two values."""
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": middle,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "min": min(values),
        "max": max(values),
    }


def steady(seconds: Sequence[float]) -> bool:
    """Whether equal rounds took about equally long: their quartiles lie within a fifth of each other.

    Where they do not, something else used the machine, and the result says more about that than about either loop.
    """
    rounds = spread(seconds)
    return rounds["upper_quartile"] <= 1.2 * rounds["lower_quartile"]


def _gpu(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    import torch  # here, so that the command's --help does not wait for it

    return torch.cuda.get_device_name(device)


def _cpu_model() -> str:
    table = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", table.read_text(), re.MULTILINE) if table.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
