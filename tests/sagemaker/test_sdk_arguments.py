"""The request in the words of SageMaker's SDKs, without them; what they send of it is in test_sdks.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
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
