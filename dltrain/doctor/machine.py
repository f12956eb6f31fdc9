"""Checks of this machine: versions, GPUs, memory that loaders share, open files, disk, EFA, and ranks that talk."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dltrain.doctor.checked import Checked

LEAST_TORCH = (2, 11)

LEAST_SHARED = 1 << 30
"""Bytes of /dev/shm below which loader processes fail sooner or later."""

LEAST_FILES = 4096
LEAST_DISK = 10 << 30

PAIRS = {(2, 11): (0, 26), (2, 12): (0, 27), (2, 13): (0, 28)}
"""Of torch and torchvision."""


def versions() -> Iterator[Checked]:
    """Python, torch, and torchvision beside it."""
    torch = metadata.version("torch")
    found = _numbers(torch)
    text = f"Python {sys.version.split()[0]}, torch {torch}"
    if found < LEAST_TORCH:
        yield Checked("versions", "bad", f"{text}; dltrain needs torch 2.11 or later")
        return
    try:
        vision = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        yield Checked("versions", "good", f"{text}, no torchvision")
        return
    pair = PAIRS.get(found, _numbers(vision))
    fits = _numbers(vision) == pair
    more = "" if fits else f"; torch {found[0]}.{found[1]} goes with torchvision {pair[0]}.{pair[1]}"
    yield Checked("versions", "good" if fits else "bad", f"{text}, torchvision {vision}{more}")


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def gpus() -> Iterator[Checked]:
    """What torch finds, and NCCL with it."""
    import torch  # slow to import

    if not torch.cuda.is_available():
        built = torch.version.cuda
        seen = shutil.which("nvidia-smi") is not None
        if seen and built is None:
            yield Checked("gpus", "bad", "there is a GPU, and torch is a build for CPUs; install one for CUDA")
        elif seen:
            yield Checked("gpus", "bad", f"there is a GPU, and torch (CUDA {built}) cannot use it; look at the driver")
        else:
            yield Checked("gpus", "good", "none: training is on the CPU")
        return
    names = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield Checked("gpus", "good", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}, NCCL {nccl}")
    if len(set(names)) > 1:
        yield Checked("gpus", "doubtful", f"GPUs of several kinds: {', '.join(sorted(set(names)))}; the slowest counts")


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Checked]:
    """Where loader processes lay what they have decoded."""
    if not folder.is_dir():
        yield Checked("shared memory", "doubtful", f"there is no {folder}; set data.workers 0")
        return
    free = shutil.disk_usage(folder).free
    small = free < LEAST_SHARED
    more = "; loader processes may end by a bus error: give the container more (--shm-size, emptyDir)" if small else ""
    yield Checked("shared memory", "doubtful" if small else "good", f"{free / 2**30:.1f} GiB in {folder}{more}")


def open_files() -> Iterator[Checked]:
    """How many a process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < LEAST_FILES
    more = f"; raise it: ulimit -n {min(hard, 65536)}" if few else ""
    yield Checked("open files", "doubtful" if few else "good", f"a process may have {soft} files open{more}")


def disk() -> Iterator[Checked]:
    """Where caches and, by default, runs are written."""
    for name, folder in (("disk for caches", Path(tempfile.gettempdir())), ("disk here", Path.cwd())):
        free = shutil.disk_usage(folder).free
        few = free < LEAST_DISK
        yield Checked(name, "doubtful" if few else "good", f"{free / 2**30:.0f} GiB are free in {folder}")


def adapter() -> Iterator[Checked]:
    """EFA, where hosts talk by it."""
    if shutil.which("fi_info") is None:
        yield Checked("efa", "good", "not installed: several hosts talk by TCP")
        return
    done = subprocess.run(["fi_info", "-p", "efa"], capture_output=True, text=True)
    found = [line.split()[-1] for line in done.stdout.splitlines() if line.strip().startswith("fabric:")]
    if done.returncode or not found:
        yield Checked("efa", "doubtful", "libfabric finds no EFA adapter; several hosts would talk by TCP")
    else:
        yield Checked("efa", "good", f"{len(found)} interface(s): {', '.join(sorted(set(found)))}")


_RANKS = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([float(dist.get_rank())])
dist.all_reduce(value)
assert value.item() == 1.0, value
print(os.environ["RANK"], value.item() / 2)
"""


def ranks() -> Iterator[Checked]:
    """Two processes of this host average a number by gloo."""
    from dltrain.runtime.launch import free_port, rank_variables

    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _RANKS],
            env={**os.environ, **rank_variables(rank, 2, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60) for process in started]
    except subprocess.TimeoutExpired:
        for process in started:
            process.kill()
            process.communicate()
        yield Checked("ranks", "bad", "two ranks of this host did not find each other in 60 s; does a firewall bar the "
                      "loopback interface, or its name not resolve?")  # fmt: skip
        return
    if any(process.returncode for process in started):
        said = next(error for _, error in outputs if error).strip().splitlines()[-1]
        yield Checked("ranks", "bad", f"two ranks of this host cannot talk by gloo: {said}")
    else:
        yield Checked("ranks", "good", "two ranks of this host average by gloo")
