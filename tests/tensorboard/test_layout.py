"""Tags, charts of several lines, and the columns of the HParams tab."""

from __future__ import annotations

import re

from tensorboard.plugins.hparams import metadata

from dltrain.config import Config, Length, Optim
from dltrain.config.tree import Debugger
from dltrain.metrics.forecasting import Forecasting
from dltrain.tensorboard.layout import layout_of, tag_of
from dltrain.tensorboard.settings import columns_of, session_end, session_start
from dltrain.tensorboard.tensors import scalars
from tests.tensorboard.made_up import statistics


def lines(config: Config, scores: list[str]) -> dict[str, list[str]]:
    charts = [chart for section in layout_of(config, scores).values() for chart in section.items()]
    return {title: [str(tag) for tag in tags] for title, (_, tags) in charts}


def test_the_loss_of_training_stands_beside_the_held_out_one() -> None:
    found = lines(Config(), ["accuracy", "f1", "loss", "samples"])
    assert found["Training and held-out loss"] == [tag_of("loss"), tag_of("evaluation/loss")]
    assert found["Share of samples"] == [tag_of("evaluation/accuracy"), tag_of("evaluation/f1")]


def test_forecasts_stand_beside_the_naive_one() -> None:
    found = lines(Config(), list(Forecasting(4, 2, 2).compute()))
    assert found["mase beside the naive forecast"] == ["evaluation/mase", "evaluation/naive_mase"]
    assert not any("samples" in title and "second" not in title for title in found)


def test_charts_of_tensors_find_the_tags_that_are_written() -> None:
    assert not any(title.startswith("Gradients") for title in lines(Config(), []))
    found = lines(Config(debugger=Debugger(every=Length.parse("5st"))), [])
    written = [tag for tag, _ in scalars(statistics(1))]
    for title in (
        "Gradients: mean absolute value",
        "Updates beside weights",
        "Weights: norm",
        "Activations: deviation",
    ):
        (pattern,) = found[title]
        assert sum(bool(re.fullmatch(pattern, tag)) for tag in written) >= 3


def test_columns_are_settings_that_one_compares_runs_by() -> None:
    config = Config(optim=Optim(learning_rate=0.25, betas=(0.9, 0.95), nesterov=True))
    experiment, start = session_start(config, ["evaluation/mine"])
    content = metadata.parse_session_start_info_plugin_data(start.value[0].metadata.plugin_data.content)
    assert content.hparams["optim.learning_rate"].number_value == 0.25
    assert content.hparams["optim.betas"].string_value == "0.9, 0.95"
    assert content.hparams["optim.nesterov"].string_value == "true"
    assert content.hparams["run.length"].string_value == "10ep"
    assert "storage.endpoint_url" not in content.hparams
    assert "run.folder" not in content.hparams
    told = metadata.parse_experiment_plugin_data(experiment.value[0].metadata.plugin_data.content)
    tags = [each.name.tag for each in told.metric_infos]
    assert tags[0] == "evaluation/mine"
    assert {"loss/train", "loss/evaluation", "evaluation/accuracy", "evaluation/mase"} <= set(tags), "of other recipes"
    assert {each.name for each in told.hparam_infos} == set(content.hparams)
    assert session_end().value[0].tag == metadata.SESSION_END_INFO_TAG


def test_trees_are_flattened() -> None:
    assert columns_of({"a": {"b": 1, "c": [2, 3]}, "d": False, "e": None}) == {
        "a.b": 1,
        "a.c": "2, 3",
        "d": "false",
        "e": "none",
    }
