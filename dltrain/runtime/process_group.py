"""Joining the ranks: device, threads, backend."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.runtime.backend import choose_backend
from dltrain.runtime.environment import Environment, cores
from dltrain.runtime.logs import say


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank. Raises :class:`UserError` when CUDA is asked for and absent."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("run.device is 'cuda' and torch finds no CUDA device; take 'cpu', or install a CUDA build")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this host has no GPU: there are {torch.cuda.device_count()}; start fewer ranks"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def joined(config: Config, environment: Environment) -> Iterator[torch.device]:
    """Set device, threads and numerics, and hold the process group while the body runs."""
    device = choose_device(config.run.device, environment.local_rank)
    torch.set_num_threads(config.run.threads or max(1, cores() // environment.local_world_size))
    set_numerics(config)
    if environment.world_size > 1:
        _check_rendezvous(os.environ)
        backend, why = choose_backend(config.parallel.backend, device, os.environ, config.run.device)
        say(environment, f"{environment.world_size} ranks talk by {backend}: {why}")
        dist.init_process_group(
            backend,
            timeout=timedelta(seconds=config.parallel.timeout),
            device_id=device if backend.endswith("nccl") else None,
        )
    yield device
    # not after an error: leaving the group may wait for ranks that wait for this one
    if dist.is_initialized():
        dist.destroy_process_group()


def join_alone(device: torch.device) -> None:
    """A process group of this process alone, for libraries that know no other way to be one process."""
    backend = choose_backend("auto", device, {})[0]
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def on_the_host() -> torch.device:
    """Where to lay a number that ranks agree on: the host, where a backend takes tensors of it, so that no stream
    waits."""
    types = dist.group.WORLD._device_types if dist.group.WORLD is not None else []
    return (
        torch.device("cpu") if torch.device("cpu") in types or not torch.cuda.is_available() else torch.device("cuda")
    )


def _check_rendezvous(variables: Mapping[str, str]) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if variables.get(name, "0") == "0":
            raise UserError(
                f"WORLD_SIZE is {variables.get('WORLD_SIZE')} and {name} is {variables.get(name, 'not set')}: ranks "
                "cannot find each other; start them with dltrain train --nproc N or torchrun (--standalone on one host)"
            )


def set_numerics(config: Config) -> None:
    """Deterministic algorithms and the precision of fp32 matrix products."""
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    if config.run.deterministic != torch.are_deterministic_algorithms_enabled():  # torch imports its compiler to set it
        torch.use_deterministic_algorithms(config.run.deterministic)
    torch.set_float32_matmul_precision(config.precision.matmul)
    torch.backends.cudnn.allow_tf32 = config.precision.matmul == "high"
