"""The request in the words of SageMaker's SDKs, without them; what they send of it is in test_sdks.py."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dltrain.errors import UserError
from dltrain.sagemaker.options import JobOptions
from dltrain.sagemaker.sdk import to_estimator, to_model_trainer
from dltrain.sagemaker.sdk_arguments import (
    SdkJob,
    described,
    estimator_arguments,
    estimator_inputs,
    model_trainer_arguments,
    snaked,
)
from tests.conftest import TINY

OPTIONS: dict[str, Any] = {
    "instance_type": "ml.p5.48xlarge",
    "image": "123456789012.dkr.ecr.eu-west-1.amazonaws.com/dltrain:0.1",
    "role": "arn:aws:iam::123456789012:role/training",
    "bucket": "s3://data/training",
    "name": "mine",
    "region": "eu-west-1",
}
TRAIN = {"data.train": "s3://data/digits"}
SHIPPED = "image/classify"


def made(recipe: str = SHIPPED, entry: str = "container", settings: Any = TRAIN, **options: Any) -> SdkJob:
    preset = "digits" if recipe == SHIPPED else "small"
    return described(recipe, preset, {"data.evaluation": "", **settings}, JobOptions(**{**OPTIONS, **options}), entry)


def test_an_estimator_has_all_of_the_request() -> None:
    job = made(
        settings={},
        count=2,
        spot=True,
        max_hours=2,
        wait_hours=5,
        channels={"train": "s3://data/t:FastFile"},
        subnets=("subnet-1",),
        security_groups=("sg-1",),
        kms_key="k",
        volume_kms_key="v",
        isolate=True,
        encrypt=True,
    )
    given = estimator_arguments(job)
    assert given["container_entry_point"] == ["python", "-m", "dltrain.sagemaker"]
    assert given["hyperparameters"]["recipe"] == '"image/classify"'
    assert (given["use_spot_instances"], given["max_run"], given["max_wait"]) == (True, 7200, 18000)
    assert (given["subnets"], given["security_group_ids"]) == (["subnet-1"], ["sg-1"])
    assert (given["output_kms_key"], given["volume_kms_key"]) == ("k", "v")
    assert given["enable_network_isolation"] is given["encrypt_inter_container_traffic"] is True
    assert given["checkpoint_s3_uri"] == "s3://data/training/mine/checkpoints"
    assert (given["debugger_hook_config"], given["disable_profiler"]) == (False, True)
    assert given["tensorboard_output_config"]["container_local_output_path"] == "/opt/ml/output/tensorboard"
    assert estimator_inputs(job) == {
        "train": {"s3_data": "s3://data/t", "distribution": "FullyReplicated", "input_mode": "FastFile"}
    }
    assert estimator_arguments(made(tensorboard=False))["tensorboard_output_config"] is None


def test_a_script_is_started_by_the_toolkit_with_values_that_are_no_text_yet() -> None:
    given = estimator_arguments(made(TINY, "script", {**TRAIN, "optim.learning_rate": 0.1}, nproc=2))
    assert (given["entry_point"], given["source_dir"]) == ("tiny.py", str(Path(TINY).parent))
    assert given["distribution"] == {"torch_distributed": {"enabled": True}}
    assert given["hyperparameters"] == {
        "preset": "small",
        "data__evaluation": "",
        "data__train": "s3://data/digits",
        "optim__learning_rate": 0.1,
        "run__deadline": "23.95h",
        "sagemaker_mpi_num_of_processes_per_host": 2,
    }
    assert "container_entry_point" not in given


def test_a_recipe_below_the_top_of_the_source_is_named_by_its_place_there() -> None:
    source = str(Path(TINY).parent.parent)
    job = made(TINY, "script", source=source)
    given = estimator_arguments(job)
    assert (given["entry_point"], given["source_dir"]) == ("recipes/tiny.py", source)
    assert model_trainer_arguments(job)["source_code"]["entry_script"] == "recipes/tiny.py"
    assert made(TINY, source=source).hyperparameters()["recipe"] == '"recipes/tiny.py"'


def test_code_comes_by_our_channel_where_our_entry_point_needs_it() -> None:
    assert estimator_inputs(made(TINY))["code"]["s3_data"] == "s3://data/training/mine/code"
    assert "code" not in estimator_inputs(made(TINY, "script"))
    assert "code" not in estimator_inputs(made())


def test_a_model_trainer_has_all_of_the_request() -> None:
    given = model_trainer_arguments(made(TINY, nproc=8, keep_alive=60, tags={"a": "b"}, environment={"A": "b"}))
    assert given["source_code"]["command"] == "exec python -m dltrain.sagemaker"
    assert given["source_code"]["source_dir"] == str(Path(TINY).parent)
    assert given["compute"] == {
        "instance_type": "ml.p5.48xlarge",
        "instance_count": 1,
        "volume_size_in_gb": 100,
        "keep_alive_period_in_seconds": 60,
        "enable_managed_spot_training": False,
    }
    assert given["checkpoint_config"] == {
        "s3_uri": "s3://data/training/mine/checkpoints",
        "local_path": "/opt/ml/checkpoints",
    }
    assert (given["tags"], given["environment"]) == ([{"key": "a", "value": "b"}], {"A": "b"})
    assert given["hyperparameters"]["nproc"] == "8"
    assert given["input_data_config"] == []  # of code the SDK makes a channel
    assert {"name", "regex"} == set(given["metric_definitions"][0])
    assert "distributed" not in given
    assert len(model_trainer_arguments(made(name="a" * 63))["base_job_name"]) == 48


def test_a_script_of_a_model_trainer_has_its_ranks_and_its_requirements(tmp_path: Path) -> None:
    given = model_trainer_arguments(made(TINY, "script", nproc=2))
    assert given["distributed"] == {"process_count_per_node": 2}
    assert given["source_code"]["entry_script"] == "tiny.py"
    assert "requirements" not in given["source_code"]
    shutil.copy(TINY, tmp_path / "tiny.py")
    (tmp_path / "requirements.txt").write_text("einops\n")
    with_them = model_trainer_arguments(made(str(tmp_path / "tiny.py"), "script"))
    assert with_them["source_code"]["requirements"] == "requirements.txt"
    assert with_them["distributed"] == {"process_count_per_node": None}  # which is one for each GPU
    shipped = model_trainer_arguments(made(entry="script"))
    assert shipped["source_code"]["entry_script"] == "classify.py"


def test_names_are_written_as_sdk_v3_writes_them() -> None:
    tree = {"VolumeSizeInGB": 1, "S3DataSource": {"S3Uri": "s3://b"}, "Subnets": [{"KmsKeyId": "AbC"}]}
    assert snaked(tree) == {
        "volume_size_in_gb": 1,
        "s3_data_source": {"s3_uri": "s3://b"},
        "subnets": [{"kms_key_id": "AbC"}],
    }


def test_what_the_drivers_of_sdk_v3_break_on_is_refused() -> None:
    job = made(settings={**TRAIN, "run.name": "it's mine"})
    with pytest.raises(UserError, match=r"run\.name is \"it's mine\", and SDK v3 cannot bring a ' to the container"):
        model_trainer_arguments(job)
    assert estimator_arguments(job)["hyperparameters"]["run__name"] == '"it\'s mine"'


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"entry": "scirpt"}, "entry is 'scirpt'; did you mean 'script'"),
        ({"role": "training"}, "SageMaker would refuse this job: RoleArn"),
        ({"instance_type": ""}, "--instance-type is missing"),
        ({"settings": {"data.train": ""}}, "there are no training data"),
        ({"settings": {**TRAIN, "optim.lerning_rate": 1}}, "did you mean 'optim.learning_rate'"),
        ({"settings": {**TRAIN, "parallel.dp_shard": 3}, "nproc": 8}, "parallel"),
    ],
)
def test_what_the_request_refuses_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(**options)


@pytest.mark.parametrize(
    ("made_of", "package"), [(to_estimator, "sagemaker>=2"), (to_model_trainer, "sagemaker-train>=1")]
)
def test_an_sdk_that_is_not_there_is_a_sentence(made_of: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sagemaker", "sagemaker.session", "sagemaker.train"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"cannot be imported .*; pip install '{package}"):
        made_of(SHIPPED, "digits", {**TRAIN, "data.evaluation": ""}, JobOptions(**OPTIONS))
    with pytest.raises(UserError, match="RoleArn"):  # before any SDK is looked for
        made_of(SHIPPED, "digits", {**TRAIN, "data.evaluation": ""}, JobOptions(**{**OPTIONS, "role": "me"}))


def test_there_must_be_room_for_what_an_sdk_adds() -> None:
    channels = {f"c{number}": "s3://data/c" for number in range(19)}
    assert len(model_trainer_arguments(made(channels=channels))["input_data_config"]) == 19
    with pytest.raises(UserError, match="has 19 channels, the SDK adds 2, and 20 are the most"):
        model_trainer_arguments(made(TINY, channels=channels))
    job = made(TINY, "script")
    many = {f"model__a{number}": "1" for number in range(96)}
    job = replace(job, request={**job.request, "HyperParameters": many})
    with pytest.raises(UserError, match="has 96 hyperparameters, the SDK adds 7, and 100 are the most"):
        estimator_arguments(job)


class Recorded:
    """Stands for an estimator of the SDK's: what it was made of, and how it was started."""

    def __init__(self, **given: Any) -> None:
        self.given = given
        self.jobs: list[str] = []
        self.fitted: list[tuple[Any, ...]] = []

    def fit(self, *given: Any) -> None:
        self.jobs.append("job")
        self.fitted.append(given)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "session": SimpleNamespace(Session=dict),
        "inputs": SimpleNamespace(TrainingInput=dict),
        "estimator": SimpleNamespace(Estimator=Recorded),
        "debugger": SimpleNamespace(TensorBoardOutputConfig=dict),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"sagemaker.{name}", module)


def test_an_estimator_knows_name_and_channels(recorded: None) -> None:
    options = JobOptions(**OPTIONS, channels={"train": "s3://data/t", "more": "s3://data/m:Pipe"})
    estimator = to_estimator(SHIPPED, "digits", {"data.train": "", "data.evaluation": ""}, options)
    session = estimator.given["sagemaker_session"]
    assert (session["default_bucket"], session["default_bucket_prefix"]) == ("data", "training")
    assert session["boto_session"].region_name == "eu-west-1"
    estimator.fit()
    estimator.fit({"more": "s3://data/other"}, False)
    (channels, wait, _, name, _), (others, waits, _, second, _) = estimator.fitted
    assert (sorted(channels), wait, name) == (["more", "train"], True, "mine")
    assert (others["more"], waits, second) == ("s3://data/other", False, None)  # a name is for one job
    estimator.fit("s3://data/plain", job_name="third")
    assert sorted(estimator.fitted[2][0]) == ["more", "train", "training"]
    assert estimator.fitted[2][3] == "third"


def test_a_region_must_be_known(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(UserError, match=r"AWS's region is not known; give it in the options \(region\)"):
        to_estimator(SHIPPED, "digits", {**TRAIN, "data.evaluation": ""}, JobOptions(**{**OPTIONS, "region": ""}))
