"""The HParams tab: a run's settings beside its scores, in columns that are the same for all runs of a recipe.

begin = session_start(config, ["evaluation/accuracy", "loss/evaluation"])
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from dltrain.config import Config, flattened
from dltrain.metrics.known import scores
from dltrain.tensorboard.layout import tag_of

_SECTIONS = ("model", "optim", "schedule", "precision")
_LAYOUT = ("engine", "dp_replicate", "dp_shard", "tp", "cp", "pp", "micro_batch")
_OTHERS = ("run.length", "run.seed", "data.global_batch_size", "data.tail", *(f"parallel.{name}" for name in _LAYOUT))
"""What changes what is learnt, or how fast; of the rest one does not compare runs by."""

_KNOWN = ("loss", *(f"evaluation/{name}" for name in scores() if not name.startswith("naive_")))

_FIRST = ("optim.learning_rate", "optim.weight_decay", "data.global_batch_size", "model.name", "run.length")
"""Columns that are seen before one asks for others."""


def session_start(config: Config, metrics: Sequence[str]) -> list[Summary]:
    """What is written when a run begins: its settings, and the tags whose last values are its scores.

    Of all runs in a folder TensorBoard asks one alone which scores there are: each names those of other recipes, too.
    """
    flat = columns_of(config.model_dump(mode="json"))
    columns = {name: value for name, value in flat.items() if name.partition(".")[0] in _SECTIONS or name in _OTHERS}
    infos = [
        api_pb2.HParamInfo(
            name=name,
            type=api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64,
            differs=name in _FIRST,
        )
        for name, value in columns.items()
    ]
    tags = dict.fromkeys([*metrics, *map(tag_of, _KNOWN)])
    shown = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in tags]
    start = SessionStartInfo(start_time_secs=time.time())
    for name, value in columns.items():
        setattr(start.hparams[name], "string_value" if isinstance(value, str) else "number_value", value)
    experiment = HParamsPluginData(experiment=api_pb2.Experiment(hparam_infos=infos, metric_infos=shown))
    return [
        _summary(metadata.EXPERIMENT_TAG, experiment),
        _summary(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start)),
    ]


def session_end() -> Summary:
    """What is written when a run has ended well."""
    end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return _summary(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def columns_of(tree: dict[str, Any]) -> dict[str, int | float | str]:
    """A tree's leaves by dotted name; numbers are numbers, all else is text."""
    return {name: _shown(value) for name, value in flattened(tree).items()}


def _shown(value: Any) -> int | float | str:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | dict) else str(value).lower()


def _summary(tag: str, data: HParamsPluginData) -> Summary:
    """What the tab reads stands beside a tensor without meaning."""
    about = metadata.create_summary_metadata(data)
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])
