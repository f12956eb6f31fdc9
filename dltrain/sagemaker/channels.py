"""SageMaker's input channels: which there are, how their data come, and what they are to a training.

File and FastFile are folders of this host, read in place like any local data set. Two kinds are not the whole data set
on every host, and are opened by :mod:`dltrain.sagemaker.opening`: ``ShardedByS3Key`` gives each host other objects, and
Pipe gives bytes in one order, once. What these cannot do is refused here, before anything is read.

    channels = read_channels()
    config = apply_channels(config, channels, given, print)  # given: names of settings that count over a channel

Reference: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dltrain import storage
from dltrain.config import Config, Length
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.folders import Folders

CONFIG = "inputdataconfig.json"
INDEX = "-index"
"""Ends the name of a second channel, FullyReplicated, that holds ``manifest.json`` and the indexes of the first."""

TRAIN = ("train", "training")
EVALUATION = ("validation", "test", "evaluation")
"""Names of channels taken for ``data.train`` and ``data.evaluation``, the first that is there."""
OF_TRAINING, OF_EVALUATION = ("data.train", "data.sources"), ("data.evaluation",)
"""Settings that count over these channels."""

CODE = "code"
"""Name of the channel of the user's code."""
NOT_DATA = (CODE, "sm_drivers", "recipe", "model")
"""Names of channels that SDKs bring code by."""

FILE, FAST_FILE, PIPE = "File", "FastFile", "Pipe"
REPLICATED, SHARDED = "FullyReplicated", "ShardedByS3Key"

Channels = Mapping[str, "Channel"]


@dataclass(frozen=True)
class Channel:
    """One input channel on this host."""

    name: str
    folder: Path
    """Where its objects lie; the FIFOs of a Pipe are ``<folder>_<epoch>``."""
    mode: str = FILE
    """File, FastFile or Pipe."""
    distribution: str = REPLICATED
    """FullyReplicated, or ShardedByS3Key: other objects on every host."""
    content_type: str = ""
    compression: str = "None"
    record_wrapper: str = "None"
    """RecordIO, where a Pipe brings each object as one record."""

    @property
    def is_pipe(self) -> bool:
        return self.mode == PIPE

    def is_part(self, nodes: int) -> bool:
        """Whether each of ``nodes`` hosts has other data."""
        return self.distribution == SHARDED and nodes > 1


def read_channels(variables: Mapping[str, str] | None = None) -> dict[str, Channel]:
    """The channels of this host by name; none outside SageMaker.

    From ``inputdataconfig.json`` in ``SM_INPUT_CONFIG_DIR`` (or ``/opt/ml/input/config``, ``/opt/ml`` moved by
    ``SAGEMAKER_BASE_DIR``), or else from ``SM_INPUT_DATA_CONFIG`` and ``SM_CHANNELS``. Raises :class:`UserError` for
    what is none of the three modes.
    """
    variables = os.environ if variables is None else variables
    folders = Folders.read(variables)
    file, data = folders.config / CONFIG, folders.data
    if file.is_file():
        tree = _parsed(file.read_text(), str(file))
    else:
        tree = _parsed(variables.get("SM_INPUT_DATA_CONFIG", ""), "SM_INPUT_DATA_CONFIG")
        names = variables.get("SM_CHANNELS", "")
        tree = {**{name: {} for name in _parsed(names, "SM_CHANNELS")}, **tree}
    return {name: _channel(name, _folder(name, data, variables), said) for name, said in tree.items()}


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); it describes SageMaker's input channels") from None


def _folder(name: str, data: Path, variables: Mapping[str, str]) -> Path:
    """Launchers disagree on whether a dash in a name stays in the variable's."""
    for variable in (f"SM_CHANNEL_{name.upper()}", f"SM_CHANNEL_{name.upper().replace('-', '_')}"):
        if variables.get(variable):
            return Path(variables[variable])
    return data / name


def _channel(name: str, folder: Path, said: Any) -> Channel:
    said = said if isinstance(said, dict) else {}
    channel = Channel(
        name,
        folder,
        said.get("TrainingInputMode") or FILE,
        said.get("S3DistributionType") or REPLICATED,
        said.get("ContentType") or "",
        said.get("CompressionType") or "None",
        said.get("RecordWrapperType") or "None",
    )
    for value, known in ((channel.mode, (FILE, FAST_FILE, PIPE)), (channel.distribution, (REPLICATED, SHARDED))):
        if value not in known:
            raise UserError(f"channel {name!r} says {value!r}, which is none of {', '.join(known)}; set one of these")
    return channel


def apply_channels(
    config: Config, channels: Channels, given: Collection[str] = (), tell: Callable[[str], None] = lambda line: None
) -> Config:
    """The config with ``data.train`` and ``data.evaluation`` set to the channels' folders.

    A channel takes the place of what a preset or a config file names; a setting among the ``given`` names counts over
    it, and so does an address inside a channel. Held-out data of a preset whose training data gave way are of another
    data set, and are left out. That, and each channel that nothing uses, is told, a line each. Raises
    :class:`UserError` where there are channels and no training data.
    """
    data, changes = config.data, dict[str, Any]()
    urls = [url for url in (data.train, *(source.url for source in data.sources)) if url]
    train, evaluation = _first(TRAIN, channels), _first(EVALUATION, channels)
    if not urls:
        _refuse_unnamed(train, channels)
    if train is not None and (not urls or _gives_way(urls, OF_TRAINING, given, channels)):
        changes |= {"train": str(train.folder), "sources": ()}
    held_out = [data.evaluation] if data.evaluation else []
    if evaluation is not None and (not held_out or _gives_way(held_out, OF_EVALUATION, given, channels)):
        changes["evaluation"] = str(evaluation.folder)
    elif train is not None and urls and "train" in changes and _gives_way(held_out, OF_EVALUATION, given, channels):
        changes["evaluation"] = ""
        tell(_left_out(data.evaluation, train))
    if changes:
        config = config.replace(data=data.replace(**changes))
    for line in _unused(config, channels, given):
        tell(line)
    return config


def _gives_way(urls: Sequence[str], names: Collection[str], given: Collection[str], channels: Channels) -> bool:
    """Whether something is named, and by a preset or a file alone."""
    inside = any(channel_of(url, channels) is not None for url in urls)
    return bool(urls) and not inside and not set(names) & set(given)


def _left_out(url: str, train: Channel) -> str:
    return (
        f"nothing is evaluated: the held-out data of the preset, {url}, are not of the data that channel "
        f"{train.name!r} has put in the place of its own; bring a channel {EVALUATION[0]!r}, or give data.evaluation"
    )


def _unused(config: Config, channels: Channels, given: Collection[str]) -> Iterator[str]:
    """A line for each channel of data whose folder no setting names."""
    texts = _texts(config.model_dump(mode="json"))
    named = [channel_of(text, channels) for text in texts if text.startswith(("/", "file:"))]
    for channel in channels.values():
        if channel in named or channel.name in NOT_DATA or channel.name.endswith(INDEX):
            continue
        reason = f"no setting names its folder, {channel.folder}"
        for family, settings in ((TRAIN, OF_TRAINING), (EVALUATION, OF_EVALUATION)):
            if channel.name in family:
                said = [name for name in settings if name in given]
                reason = f"{said[0]} is given and counts over it" if said else "another channel is taken in its place"
        yield f"nothing uses channel {channel.name!r}: {reason}"


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    for each in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _texts(each)


def _refuse_unnamed(train: Channel | None, channels: Channels) -> None:
    others = [name for name in channels if name not in (*EVALUATION, *NOT_DATA)]
    if train is None and others:
        raise UserError(
            f"there are no training data: no channel is named {' or '.join(TRAIN)}, and there are "
            f"{', '.join(sorted(channels))}; rename one, or give data.train {channels[others[0]].folder}"
        )


def _first(names: tuple[str, ...], channels: Channels) -> Channel | None:
    return next((channels[name] for name in names if name in channels), None)


def channel_of(url: str, channels: Channels) -> Channel | None:
    """The channel whose folder ``url`` names or lies in, or None."""
    path = storage.local_path(url) if url and "://" not in url.removeprefix("file://") else None
    return next((c for c in channels.values() if path is not None and path.is_relative_to(c.folder)), None)


def special_channel(config: Config, channels: Channels, nodes: int) -> Channel | None:
    """The channel of ``data.train`` if it is a Pipe, or shared out over several hosts: then opened in its own way."""
    channel = channel_of(config.data.train, channels)
    return channel if channel is not None and (channel.is_pipe or channel.is_part(nodes)) else None


def caution(channel: Channel) -> str:
    """The one line that a user of a special channel should read."""
    return (
        f"channel {channel.name!r} is {_kind(channel)}: an exact resume and another world size are not available "
        "there; for them take File or FastFile with FullyReplicated, or give data.train an s3:// URL"
    )


def refuse_resume(config: Config, channels: Channels, nodes: int) -> None:
    """Raises :class:`UserError` where a checkpoint was found and ``data.train`` cannot go on from it."""
    channel = special_channel(config, channels, nodes)
    if channel is not None:
        raise UserError(
            f"this run cannot be resumed from channel {channel.name!r}: it is {_kind(channel)}, which need not bring "
            "the same samples again in the same order; start a new run, and for one that can be resumed take File or "
            "FastFile with FullyReplicated, or an s3:// URL"
        )


def refuse_impossible(config: Config, channels: Channels, environment: Environment, windows: bool = False) -> None:
    """Raises :class:`UserError` for what a channel's kind does not allow; ``windows`` are taken from time series."""
    nodes = environment.nodes
    for url, use in (
        *((source.url, "be part of a mixture") for source in config.data.sources),
        (config.data.evaluation, "hold the held-out samples, each scored once on any number of ranks"),
    ):
        channel = channel_of(url, channels)
        if channel is not None and (channel.is_pipe or channel.is_part(nodes)):
            raise UserError(f"channel {channel.name!r} is {_kind(channel)} and cannot {use}; {_INSTEAD}")
    channel = special_channel(config, channels, nodes)
    if channel is not None and config.parallel.tp > 1:
        raise UserError(
            f"channel {channel.name!r} is {_kind(channel)}, which every rank reads for itself, and with parallel.tp "
            f"{config.parallel.tp} several ranks need the same samples; {_INSTEAD}, or set parallel.tp 1"
        )
    if channel is not None and channel.is_pipe:
        for found in _against_a_pipe(config, channel, channels, environment, windows):
            raise UserError(found)


_INSTEAD = "give it File or FastFile with FullyReplicated"


def _kind(channel: Channel) -> str:
    return "a Pipe" if channel.is_pipe else SHARDED


def _against_a_pipe(
    config: Config, channel: Channel, channels: Channels, environment: Environment, windows: bool
) -> Iterator[str]:
    data, name, local = config.data, f"channel {channel.name!r} is a Pipe", environment.local_world_size
    if windows:
        yield f"{name}, and windows of time series are read from anywhere; {_INSTEAD}"
    if data.workers:
        yield f"{name}, which only one process can read; set data.workers 0"
    if data.bad_samples:
        yield f"{name}, where a bad sample cannot be replaced by another; set data.bad_samples 0"
    if data.tail != "carry":
        yield f"{name}, whose epochs follow one another without a gap; set data.tail carry"
    if local > 1 and data.global_batch_size % environment.world_size:
        yield (
            f"{name} that {local} ranks of a host share, so all need batches of one size: data.global_batch_size is "
            f"{data.global_batch_size}; give a multiple of {environment.world_size}"
        )
    in_epochs = [f"{key} {length}" for key, length in _lengths(config) if length.unit == "ep" and length]
    if in_epochs and channel.name + INDEX not in channels:
        yield (
            f"{name} and its epochs have no known length: {', '.join(in_epochs)}; give steps (st), or the data set's "
            f"manifest.json in a channel {channel.name + INDEX!r}"
        )


def _lengths(config: Config) -> Iterator[tuple[str, Length]]:
    yield "run.length", config.run.length
    yield "checkpoint.every", config.checkpoint.every
    if config.data.evaluation:
        yield "evaluation.every", config.evaluation.every
    yield "logging.every", config.logging.every
    yield "schedule.warmup", config.schedule.warmup
    for place, length in enumerate(config.schedule.milestones):
        yield f"schedule.milestones.{place}", length
