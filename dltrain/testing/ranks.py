"""Running a function on several ranks, as a test wants it: free port, time limit, the first failing rank's traceback.

def adds(rank: int) -> float:
    total = torch.ones(())
    dist.all_reduce(total)
    return total.item()

assert run_ranks(adds, 3) == [3.0, 3.0, 3.0]
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from dltrain.runtime.launch import free_port, rank_variables


class RankError(AssertionError):
    """What happened on the rank that failed first."""


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, seconds: float = 60.0) -> list[Any]:
    """Call ``function(rank, *arguments)`` in ``ranks`` processes joined by gloo; returns their results by rank.

    The function and its arguments must be picklable (a function at the top of a module). One rank joins no process
    group. Raises :class:`RankError` with the traceback of the first rank that failed, or when time is up.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "dltrain.job"])
    port = free_port()
    pipes: list[Connection] = []
    processes = []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        variables = rank_variables(rank, ranks, port)
        process = context.Process(target=_body, args=(theirs, function, rank, arguments, variables), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _body(pipe: Connection, function: Any, rank: int, arguments: tuple[Any, ...], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
        if int(variables["WORLD_SIZE"]) > 1:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        result = function(rank, *arguments)
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps((True, result)))  # by value: torch would share memory with a process about to end
    except BaseException:  # noqa: BLE001 - sent to the caller, who raises
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(set(range(len(pipes))) - set(results))} did not end in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                well, result = pickle.loads(pipes[rank].recv_bytes())
            except (EOFError, ConnectionResetError):
                raise RankError(f"rank {rank} died without a word") from None
            if not well:
                raise RankError(f"rank {rank} failed:\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]
