"""SageMaker's channels: found whoever describes them, taken for the data, and refused what they cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dltrain.config import Config, Data, Length, Parallel, Run
from dltrain.config.tree import Checkpoint, Evaluation, Source
from dltrain.data.bundled import build
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.channels import (
    Channel,
    apply_channels,
    caution,
    channel_of,
    read_channels,
    refuse_impossible,
    refuse_resume,
    special_channel,
)
from tests.conftest import TINY, Cli

# as the platform writes it (developer guide, "How Amazon SageMaker provides training information")
DESCRIBED = {
    "train": {
        "ContentType": "application/x-tar",
        "TrainingInputMode": "FastFile",
        "S3DistributionType": "ShardedByS3Key",
        "RecordWrapperType": "None",
    },
    "validation": {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"},
    "extra-2": {"TrainingInputMode": "Pipe", "RecordWrapperType": "RecordIO", "CompressionType": "Gzip"},
}
TWO_HOSTS = Environment(0, 4, 0, 2)
ONE_RANK = Environment()
NINE = Length.parse("9st")
STEPS = Config(run=Run(length=NINE), checkpoint=Checkpoint(every=NINE), evaluation=Evaluation(every=NINE))


def described(folder: Path, tree: Any) -> dict[str, str]:
    config = folder / "input" / "config"
    config.mkdir(parents=True)
    (config / "inputdataconfig.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return {"SAGEMAKER_BASE_DIR": str(folder)}


def reading(name: str, **changes: Any) -> Config:
    """A config of whole steps whose training data are the channel ``name``."""
    return STEPS.replace(data=Data(train=f"/ml/{name}", **changes))


def channels(**modes: str) -> dict[str, Channel]:
    """Channels below /ml by name: File, Pipe, or ShardedByS3Key."""
    return {
        name: Channel(name, Path("/ml") / name, distribution=mode)
        if mode == "ShardedByS3Key"
        else Channel(name, Path("/ml") / name, mode)
        for name, mode in modes.items()
    }


def test_the_platforms_file_says_what_each_channel_is(tmp_path: Path) -> None:
    data = tmp_path / "input" / "data"
    assert read_channels(described(tmp_path, DESCRIBED)) == {
        "train": Channel("train", data / "train", "FastFile", "ShardedByS3Key", "application/x-tar"),
        "validation": Channel("validation", data / "validation", "File", "FullyReplicated"),
        "extra-2": Channel("extra-2", data / "extra-2", "Pipe", "FullyReplicated", "", "Gzip", "RecordIO"),
    }


def test_variables_say_the_same_where_there_is_no_file(tmp_path: Path) -> None:
    said = {"SM_INPUT_CONFIG_DIR": str(tmp_path), "SM_INPUT_DATA_CONFIG": json.dumps(DESCRIBED)}
    assert read_channels(said)["extra-2"] == Channel(
        "extra-2", Path("/opt/ml/input/data/extra-2"), "Pipe", "FullyReplicated", "", "Gzip", "RecordIO"
    )
    named = {"SM_CHANNELS": '["train","extra-2"]', "SM_CHANNEL_TRAIN": "/data/a", "SM_CHANNEL_EXTRA_2": "/data/b"}
    found = read_channels({"SM_INPUT_CONFIG_DIR": str(tmp_path), **named})
    assert found == {"train": Channel("train", Path("/data/a")), "extra-2": Channel("extra-2", Path("/data/b"))}
    moved = read_channels({**described(tmp_path, DESCRIBED), "SM_CHANNEL_EXTRA-2": "/data/c"})
    assert moved["extra-2"].folder == Path("/data/c")


def test_outside_sagemaker_there_are_none(tmp_path: Path) -> None:
    assert read_channels({"SM_INPUT_CONFIG_DIR": str(tmp_path)}) == {}
    config = Config(data=Data(train="s3://bucket/train"))
    assert apply_channels(config, {}) is config
    assert special_channel(config, {}, nodes=2) is None


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ("{", r"inputdataconfig.json is not JSON .* input channels"),
        (
            {"train": {"TrainingInputMode": "Hose"}},
            "channel 'train' says 'Hose', which is none of File, FastFile, Pipe",
        ),
        (
            {"train": {"S3DistributionType": "ByMood"}},
            "says 'ByMood', which is none of FullyReplicated, ShardedByS3Key",
        ),
    ],
)
def test_a_description_nobody_knows_is_refused(tmp_path: Path, tree: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_channels(described(tmp_path, tree))


def test_data_left_empty_are_taken_from_the_channels() -> None:
    found = apply_channels(Config(), channels(training="File", test="FastFile", evaluation="File", other="File"))
    assert (found.data.train, found.data.evaluation) == ("/ml/training", "/ml/test")
    both = apply_channels(Config(), channels(train="File", training="File", validation="File", test="File"))
    assert (both.data.train, both.data.evaluation) == ("/ml/train", "/ml/validation")
    half = Config(data=Data(evaluation="s3://bucket/b"))
    assert apply_channels(half, channels(train="File")).data.evaluation == "s3://bucket/b"  # nothing gave way to it


PRESET = Config(data=Data(train="bundled://digits/train", evaluation="bundled://digits/heldout"))
MIXTURE = Config(data=Data(sources=(Source(url="s3://bucket/a"),)))
BOTH = {"train": "File", "validation": "File"}


@pytest.mark.parametrize(
    ("config", "known", "given", "train", "evaluation", "told"),
    [
        (PRESET, BOTH, (), "/ml/train", "/ml/validation", []),
        (MIXTURE, BOTH, (), "/ml/train", "/ml/validation", []),
        (PRESET, {"test": "File"}, (), "bundled://digits/train", "/ml/test", []),
        (PRESET, {"training": "File"}, (), "/ml/training", "", ["nothing is evaluated: the held-out data of the pre"]),
        (PRESET, {"train": "File"}, ("data.evaluation",), "/ml/train", "bundled://digits/heldout", []),
        (
            PRESET,
            BOTH,
            ("data.train", "data.evaluation"),
            "bundled://digits/train",
            "bundled://digits/heldout",
            [
                "nothing uses channel 'train': data.train is given and counts over it",
                "nothing uses channel 'validation': data.evaluation is given and counts over it",
            ],
        ),
        (
            MIXTURE,
            {"train": "File"},
            ("data.sources",),
            "",
            "",
            ["nothing uses channel 'train': data.sources is given"],
        ),
    ],
    ids=["both", "mixture", "evaluation alone", "train alone", "evaluation given", "all given", "mixture given"],
)
def test_a_channel_counts_over_a_preset_and_a_setting_over_the_channel(
    config: Config, known: dict[str, str], given: tuple[str, ...], train: str, evaluation: str, told: list[str]
) -> None:
    lines: list[str] = []
    found = apply_channels(config, channels(**known), given, lines.append).data
    assert (found.train, found.evaluation) == (train, evaluation)
    assert [line.startswith(start) for line, start in zip(lines, told, strict=True)] == [True] * len(told)


def test_an_address_inside_a_channel_stays() -> None:
    config = Config(data=Data(train="/ml/train/part", evaluation="/ml/train/held-out"))
    assert apply_channels(config, channels(train="File", test="File")).data.train == "/ml/train/part"
    assert apply_channels(config, channels(train="File")) == config


def test_a_channel_that_nothing_uses_is_told() -> None:
    lines: list[str] = []
    known = channels(
        train="File", training="File", extra="File", weights="File", code="File", **{"train-index": "File"}
    )
    config = PRESET.replace(model=PRESET.model.replace(weights="/ml/weights/a.safetensors"))
    apply_channels(config, known, ("data.evaluation",), lines.append)
    assert lines == [
        "nothing uses channel 'training': another channel is taken in its place",
        "nothing uses channel 'extra': no setting names its folder, /ml/extra",
    ]


def test_ranks_train_on_the_channel_and_rank_0_tells_what_follows(cli: Cli, tmp_path: Path) -> None:
    build("digits", str(tmp_path / "digits"))
    variables = {"SM_CHANNELS": '["train","extra"]', "SM_INPUT_CONFIG_DIR": str(tmp_path)}
    variables |= {"SM_CHANNEL_TRAIN": str(tmp_path / "digits" / "heldout")}
    words = ("train", TINY, "--preset", "small", "--run.length", "5st", "--run.name", "x")
    done = cli(*words, **variables)
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "runs" / "x" / "run.json").read_text())["config"]["data"]["train"].endswith("heldout")
    assert "warning: nothing is evaluated: the held-out data of the preset" in done.err
    assert "warning: nothing uses channel 'extra'" in done.err


def test_a_channel_whose_name_says_nothing_is_told() -> None:
    with pytest.raises(UserError, match=r"named train or training, and there are code, trian; .* data.train /ml/trian"):
        apply_channels(Config(), channels(trian="File", code="File"))
    assert apply_channels(Config(), channels(code="File", test="File")).data.train == ""  # refused later
    given = Config(data=Data(train="s3://a/b"))
    assert apply_channels(given, channels(weights="File")) == given


def test_a_url_belongs_to_the_channel_it_lies_in() -> None:
    known = channels(train="File", **{"train-index": "File"})
    for url in ("/ml/train", "/ml/train/digits", "file:///ml/train"):
        assert channel_of(url, known) == known["train"]
    assert channel_of("/ml/train-index", known) == known["train-index"]
    for url in ("", "/ml/other", "s3://ml/train", "bundled://digits/train"):
        assert channel_of(url, known) is None


def test_only_pipes_and_parts_are_special() -> None:
    known = channels(train="File", pipe="Pipe", part="ShardedByS3Key")
    assert special_channel(reading("train"), known, nodes=2) is None
    assert special_channel(reading("pipe"), known, nodes=1) == known["pipe"]
    assert special_channel(reading("part"), known, nodes=2) == known["part"]
    assert special_channel(reading("part"), known, nodes=1) is None  # one host has all of it
    for name, kind in (("pipe", "a Pipe"), ("part", "ShardedByS3Key")):
        line = caution(known[name])
        assert f"channel '{name}' is {kind}: an exact resume and another world size are not available" in line
        with pytest.raises(UserError, match=f"cannot be resumed from channel '{name}': it is {kind}"):
            refuse_resume(reading(name), known, nodes=2)
    refuse_resume(reading("train"), known, nodes=2)


@pytest.mark.parametrize(
    ("config", "environment", "sentence"),
    [
        (reading("a", evaluation="/ml/pipe"), ONE_RANK, "'pipe' is a Pipe and cannot hold the held-out samples"),
        (reading("a", evaluation="/ml/part"), TWO_HOSTS, "'part' is ShardedByS3Key and cannot hold the held-out"),
        (reading("pipe", workers=2), ONE_RANK, "only one process can read; set data.workers 0"),
        (reading("pipe", bad_samples=2), ONE_RANK, "set data.bad_samples 0"),
        (reading("pipe", tail="drop"), ONE_RANK, "set data.tail carry"),
        (reading("pipe").replace(parallel=Parallel(tp=2)), ONE_RANK, "several ranks need the same samples"),
        (reading("part").replace(parallel=Parallel(tp=2)), TWO_HOSTS, "'part' is ShardedByS3Key, .* set parallel.tp 1"),
        (reading("pipe", global_batch_size=6), TWO_HOSTS, "global_batch_size is 6; give a multiple of 4"),
        (
            Config(data=Data(train="/ml/pipe")),
            ONE_RANK,
            r"run.length 10ep, checkpoint.every 1ep; give steps \(st\), or .* in a channel 'pipe-index'",
        ),
        (
            STEPS.replace(data=Data(sources=(Source(url="/ml/pipe"),))),
            ONE_RANK,
            "'pipe' is a Pipe and cannot be part of a mixture",
        ),
    ],
)
def test_what_a_channel_cannot_do_is_refused(config: Config, environment: Environment, sentence: str) -> None:
    known = channels(a="File", pipe="Pipe", part="ShardedByS3Key")
    with pytest.raises(UserError, match=sentence):
        refuse_impossible(config, known, environment)


def test_what_a_channel_can_do_is_not_refused() -> None:
    known = channels(a="File", pipe="Pipe", part="ShardedByS3Key", indexed="Pipe", **{"indexed-index": "File"})
    refuse_impossible(reading("a", evaluation="/ml/part", workers=2, tail="drop"), known, ONE_RANK, windows=True)
    refuse_impossible(reading("part", workers=2, tail="drop"), known, TWO_HOSTS, windows=True)
    refuse_impossible(reading("pipe", evaluation="/ml/a", global_batch_size=8), known, TWO_HOSTS)
    refuse_impossible(Config(data=Data(train="/ml/indexed")), known, ONE_RANK)  # a manifest tells how long an epoch is
    with pytest.raises(UserError, match="windows of time series"):
        refuse_impossible(reading("pipe"), known, ONE_RANK, windows=True)
