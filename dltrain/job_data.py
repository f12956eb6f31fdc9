"""The data of a job: opened, put in order, and handed to one rank by loaders.

data = open_data(config, task, environment)
loader = train_loader(data, Place(config, task, environment, mesh, device), run.quarantine)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dltrain.config import Config
from dltrain.data.dataset import Cache, open_dataset
from dltrain.data.encoded import lacks_decoder
from dltrain.data.loader import Loader
from dltrain.data.mixture import MixedDataset, Source
from dltrain.data.order import Order, SampleOrder
from dltrain.data.prefetch import Depth
from dltrain.data.reader import Dataset
from dltrain.errors import UserError
from dltrain.mesh import Mesh
from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import warn
from dltrain.sagemaker.channels import read_channels, refuse_impossible
from dltrain.sagemaker.opening import open_special
from dltrain.task import Task


@dataclass(frozen=True)
class Opened:
    """Training samples in their order, and held-out ones if there are any."""

    train: Dataset
    order: SampleOrder
    held_out: Dataset | None


@dataclass(frozen=True)
class Place:
    """For whom a loader works: a task under a config, on one rank."""

    config: Config
    task: Task
    environment: Environment
    mesh: Mesh
    device: torch.device


def open_data(config: Config, task: Task, environment: Environment) -> Opened:
    """Open what the config names; what the training data say of themselves, the task knows from here on. Collective."""
    channels = read_channels()
    refuse_impossible(config, channels, environment, windows=task.window() is not None)
    special = open_special(config, channels, environment, _gathered, task.window())
    if special is not None:
        warn(environment, special.caution)
    data, order = (special.dataset, special.order) if special is not None else _open_training(config, task)
    task.facts = data.facts
    return Opened(data, order, open_held_out(config, task) if config.data.evaluation else None)


def open_held_out(config: Config, task: Task) -> Dataset:
    """The samples of ``data.evaluation``. Raises :class:`UserError` when it names none."""
    if not config.data.evaluation:
        raise UserError("data.evaluation is empty: name the held-out shards with --data.evaluation URL")
    return _open(config, task, config.data.evaluation)


def train_loader(data: Opened, place: Place, quarantine: Path) -> Loader:
    """Endless batches of this rank; samples that are bad within the budget are told in the folder ``quarantine``."""
    settings = place.config.data
    if settings.decode == "device" and (reason := lacks_decoder(place.device)):
        warn(place.environment, f"data.decode is device, but {reason}: images are decoded by the host")
    return Loader(
        data.train,
        data.order,
        place.task.sample,
        global_batch_size=settings.global_batch_size,
        tail=settings.tail,
        augment=True,
        workers=settings.workers,
        bad_samples=settings.bad_samples,
        quarantine=quarantine / f"rank-{place.environment.rank:05d}.jsonl",
        **_where(place),
    )


def evaluation_loader(dataset: Dataset, place: Place) -> Loader:
    """Every held-out sample once over all ranks, the last step padded."""
    config = place.config
    wanted = config.evaluation.batch_size or config.data.global_batch_size
    return Loader(
        dataset,
        Order(dataset.shard_sizes, config.run.seed, config.data.lanes, config.data.window, shuffle=False),
        place.task.sample,
        global_batch_size=max(min(wanted, sum(dataset.shard_sizes)), place.mesh.data_ranks),
        tail="pad",
        epochs=1,
        workers=config.evaluation.workers,
        **_where(place),
    )


def _open_training(config: Config, task: Task) -> tuple[Dataset, SampleOrder]:
    data, seed = config.data, config.run.seed
    if data.sources:
        sources = [Source(**source.model_dump()) for source in data.sources]
        mixed = MixedDataset(sources, [_open(config, task, source.url) for source in sources])
        return mixed, mixed.order(seed, data.lanes, data.window)
    if not data.train:
        raise UserError("data.train is empty: name the training shards with --data.train URL, or take a --preset")
    dataset = _open(config, task, data.train)
    return dataset, Order(dataset.shard_sizes, seed, data.lanes, data.window)


def _open(config: Config, task: Task, url: str) -> Dataset:
    data = config.data
    depth = Depth(data.ahead_mib << 20, data.ahead_seconds)
    return open_dataset(url, task.window(), Cache(data.cache, int(data.cache_gib * (1 << 30)), depth))


def _gathered(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks; collective."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def _where(place: Place) -> dict[str, Any]:
    """Where a loader runs, among ranks and nodes, and how its processes start."""
    return {
        "rank": place.mesh.data_rank,
        "ranks": place.mesh.data_ranks,
        "device": place.device,
        "node": place.environment.node,
        "nodes": place.environment.nodes,
        "prefetch": place.config.data.prefetch,
        "start_method": place.config.data.start_method,
        "decode": place.config.data.decode,
    }
