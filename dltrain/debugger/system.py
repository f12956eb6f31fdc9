"""What the machine does while a model trains: CPU, memory, disk, network, and GPUs where NVIDIA's library is there.

A thread looks every so many seconds; nothing waits for it. Of a job on several hosts it sees the first.

    watch = SystemWatch(1.0, device)
    watch.taken()  # [{"time": ..., "cpu": 35.0, "gpus": [{"used": 97.0, "memory": 40.0}], ...}, ...]
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from typing import Any

import psutil
import torch

MOST = 10_000
"""Samples that are kept until somebody takes them."""


class SystemWatch:
    """Samples since the last time, as plain numbers.

    ``cpu`` is the mean over all cores and ``core`` the busiest one, in percent; ``io_wait`` in percent of all cores;
    ``memory`` in percent; ``resident`` bytes of this process; ``read``, ``written``, ``sent`` and ``received`` bytes
    per second; ``workers`` child processes and ``cores``; of each of ``gpus`` ``used`` and ``memory`` in percent.
    """

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._seconds = seconds
        self._process = psutil.Process()
        self._gpus = _gpus() if device.type == "cuda" else None
        self._found: list[dict[str, Any]] = []
        self._before = self._counters()
        psutil.cpu_percent(percpu=True)  # the first call has nothing to compare with
        psutil.cpu_times_percent()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="system watch", daemon=True)
        self._thread.start()

    def taken(self) -> list[dict[str, Any]]:
        """What was seen since last time."""
        found, self._found = self._found, []
        return found

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self._found = [*self._found[-MOST:], self._sample()]
            except Exception as error:  # noqa: BLE001 - drivers have errors of their own
                reason = f"{type(error).__name__}: {error}"
                print(f"warning: the machine is no longer watched ({reason})", file=sys.stderr, flush=True)
                return

    def _sample(self) -> dict[str, Any]:
        cores, times = psutil.cpu_percent(percpu=True), psutil.cpu_times_percent()
        before, self._before = self._before, self._counters()
        passed = max(self._before["time"] - before["time"], 1e-9)
        rates = {name: (value - before[name]) / passed for name, value in self._before.items() if name != "time"}
        return {
            "time": time.time(),
            "cpu": sum(cores) / len(cores),
            "core": max(cores),
            "io_wait": getattr(times, "iowait", 0.0),
            "memory": psutil.virtual_memory().percent,
            "resident": self._process.memory_info().rss,
            **{name: round(rate) for name, rate in rates.items()},
            "workers": len(self._process.children(recursive=True)),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else len(cores),
            "gpus": [] if self._gpus is None else _used(*self._gpus),
        }

    def _counters(self) -> dict[str, float]:
        disk, network = psutil.disk_io_counters(), psutil.net_io_counters()
        return {
            "time": time.monotonic(),
            "read": disk.read_bytes if disk else 0,
            "written": disk.write_bytes if disk else 0,
            "sent": network.bytes_sent,
            "received": network.bytes_recv,
        }


def _gpus() -> tuple[Any, list[Any]] | None:
    """NVIDIA's library and its handles; ``None`` where ``nvidia-ml-py`` or a driver is missing."""
    try:
        library = importlib.import_module("pynvml")
        library.nvmlInit()
        places = _visible(library.nvmlDeviceGetCount())
        return library, [library.nvmlDeviceGetHandleByIndex(place) for place in places]
    except Exception:  # noqa: BLE001 - the library has errors of its own, and may not be there to name them
        return None


def _visible(count: int) -> list[int]:
    """Places of the GPUs that CUDA lets this job see; all where it names them otherwise than by number."""
    named = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    if not named or not all(each.isdecimal() and int(each) < count for each in named):
        return list(range(count))
    return [int(each) for each in named]


def _used(library: Any, handles: list[Any]) -> list[dict[str, float]]:
    found = []
    for handle in handles:
        memory = library.nvmlDeviceGetMemoryInfo(handle)
        used = float(library.nvmlDeviceGetUtilizationRates(handle).gpu)
        found.append({"used": used, "memory": 100.0 * memory.used / memory.total})
    return found
