"""A contestant's process: ``python -m benchmarks.data_peers.worker JOB``.

Standard output carries answers alone; whatever a library prints goes to standard error.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.data_peers.job import Job

Epoch = Callable[[int], Iterable[Any]]
"""The samples of an epoch by its number: (JPEG, class) as bytes, or a crop."""

Answer = dict[str, Any]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = Job.from_json(sys.argv[1])
    passes = PASSES.get(job.work, _single)(job)
    for _ in sys.stdin:
        try:
            answer = next(passes)
        except Exception as error:
            message = next(iter(str(error).splitlines()), "")[:200]
            print(json.dumps({"error": f"{type(error).__name__}: {message}"}), file=answers)
            raise
        print(json.dumps(answer), file=answers)


def _samples(job: Job) -> Iterator[Answer]:
    """Passes over whole epochs; before the first, one epoch to warm up and one to see how many make a pass."""
    epoch: Epoch = import_module(f"benchmarks.data_peers.{job.module}").epochs(job)
    seconds = 0.0
    for number in range(2):
        if seconds < job.seconds:
            seconds = _measure(epoch, range(number, number + 1))["seconds"]
    yield {"ready": True}
    number = 2
    while True:
        span = range(number, number + max(1, math.ceil(job.seconds / seconds)))
        number = span.stop
        yield {**_measure(epoch, span), "epochs": len(span), "peak_rss": peak_memory()}


def _measure(epoch: Epoch, numbers: range) -> Answer:
    gc.collect()
    samples = size = 0
    cpu, started = sum(os.times()[:4]), time.perf_counter()
    for number in numbers:
        for sample in epoch(number):
            samples += 1
            size += len(sample[0]) + len(sample[1]) if type(sample) is tuple else sample.nbytes
    seconds = time.perf_counter() - started
    return {"samples": samples, "bytes": size, "seconds": seconds, "cpu_seconds": sum(os.times()[:4]) - cpu}


def _memory(job: Job) -> Iterator[Answer]:
    """Bytes in memory after each of ``job.epochs`` epochs; ``anonymous`` are those that are no file's pages."""
    epoch: Epoch = import_module(f"benchmarks.data_peers.{job.module}").epochs(job)
    while True:
        resident, anonymous = [], []
        for number in range(job.epochs):
            for _ in epoch(number):
                pass
            gc.collect()
            resident.append(_status("VmRSS"))
            anonymous.append(_status("RssAnon"))
        yield {"resident": resident, "anonymous": anonymous, "peak_rss": peak_memory()}


def _single(job: Job) -> Iterator[Answer]:
    """Passes that a contestant's function times itself: an iterator of answers."""
    passes: Iterator[Answer] = getattr(import_module(f"benchmarks.data_peers.{job.module}"), job.work)(job)
    return passes


PASSES = {"samples": _samples, "memory": _memory}


def peak_memory() -> int:
    """The most this process ever had in memory, in bytes; unlike getrusage's, it does not count the parent's."""
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
