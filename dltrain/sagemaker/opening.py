"""Opening the training data of a special channel: one shared out over the hosts, or a Pipe.

opened = open_special(config, channels, environment, gather, task.window())
if opened is not None:
    loader = Loader(opened.dataset, opened.order, task.sample, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dltrain.config import Config
from dltrain.data.dataset import default_folder
from dltrain.data.files import LocalFiles
from dltrain.data.manifest import load_manifest
from dltrain.data.order import Order, SampleOrder
from dltrain.data.reader import Dataset, ShardDataset, ShardReader
from dltrain.data.windows import Window, WindowDataset
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.channels import INDEX, Channel, Channels, caution, special_channel
from dltrain.sagemaker.parts import Gather, PartOrder, open_part
from dltrain.sagemaker.pipe import ENDLESS, Arrival, PipeDataset


@dataclass(frozen=True)
class Opened:
    """Training data, their order, and the line that their user should read."""

    dataset: Dataset
    order: SampleOrder
    caution: str


def open_special(
    config: Config,
    channels: Channels,
    environment: Environment,
    gather: Gather,
    window: Window | None = None,
    scratch: Path | None = None,
) -> Opened | None:
    """``data.train`` if it lies in a special channel, else None; called by all ranks together.

    ``gather`` returns every rank's value in the order of the ranks. ``scratch`` is a folder that a host's ranks share.
    Raises :class:`UserError` on all ranks alike. :func:`~dltrain.sagemaker.channels.refuse_impossible` comes before.
    """
    if not channels:
        return None
    channel = special_channel(config, channels, environment.nodes)
    _refuse_differences(channel, config, gather)
    if channel is None:
        return None
    if channel.is_pipe:
        return _open_pipe(config, channel, channels, environment)
    scratch = scratch or default_folder().with_name("channels") / channel.name
    reader = _reader(channel, channels, environment, gather, scratch)
    dataset: Dataset = ShardDataset(reader) if window is None else WindowDataset(reader, window)
    counts = gather(sum(dataset.shard_sizes))[:: environment.local_world_size]
    local = Order(dataset.shard_sizes, config.run.seed, config.data.lanes, config.data.window)
    order = PartOrder(local, tuple(counts), environment.node)
    left = f"; {order.left_out} of {sum(counts)} samples, other ones each time, are left out of an epoch"
    return Opened(dataset, order, caution(channel) + (left if order.left_out else ""))


def _refuse_differences(channel: Channel | None, config: Config, gather: Gather) -> None:
    """What one host opens by itself and another together with all would wait for ever."""
    mine = (channel.name, channel.mode, channel.distribution) if channel is not None else ("no special channel",)
    for rank, other in enumerate(gather(mine)):
        if other != mine:
            raise UserError(
                f"data.train {config.data.train} is {', '.join(mine)} here and {', '.join(other)} on rank {rank}; "
                "give all hosts the same channels"
            )


def _reader(
    channel: Channel, channels: Channels, environment: Environment, gather: Gather, scratch: Path
) -> ShardReader:
    part = open_part(channel, channels, environment, gather, scratch)
    return ShardReader(part, LocalFiles(part))


def _open_pipe(config: Config, channel: Channel, channels: Channels, environment: Environment) -> Opened:
    """What a manifest beside the channel says of the data is known, the number of samples among it."""
    index = channels.get(channel.name + INDEX)
    manifest = load_manifest(str(index.folder)) if index is not None else None
    samples, facts = (manifest.samples, manifest.facts) if manifest is not None else (ENDLESS, {})
    hosts = environment.nodes if channel.is_part(environment.nodes) else 1
    return Opened(
        PipeDataset(channel, environment, facts, samples, stride=environment.world_size // hosts),
        Arrival(samples, hosts, config.run.seed, lanes=environment.world_size),
        caution(channel),
    )
