"""The snapshot of a training job, and hyperparameters by every way they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dltrain.config import Config, load_overrides
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment, first_host, rendezvous
from dltrain.sagemaker.folders import Folders
from dltrain.sagemaker.hyperparameters import read_hyperparameters
from dltrain.sagemaker.model_parallel import settings_of
from dltrain.sagemaker.network import variables_for
from dltrain.sagemaker.placing import placed
from dltrain.sagemaker.training_job import TrainingJob


def laid_down(base: Path, **files: Any) -> dict[str, str]:
    folder = base / "input" / "config"
    folder.mkdir(parents=True, exist_ok=True)
    for name, tree in files.items():
        (folder / f"{name}.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return {"SAGEMAKER_BASE_DIR": str(base)}


RESOURCES = {
    "current_host": "algo-2",
    "hosts": ["algo-1", "algo-10", "algo-2"],
    "network_interface_name": "eth1",
    "current_group_name": "a",
    "instance_groups": [
        {"instance_group_name": "a", "instance_type": "ml.p4d.24xlarge", "hosts": ["algo-1", "algo-2"]},
        {"instance_group_name": "b", "instance_type": "ml.g5.xlarge", "hosts": ["algo-10"]},
    ],
}


def test_outside_there_is_no_job(tmp_path: Path) -> None:
    assert TrainingJob.read({"SAGEMAKER_BASE_DIR": str(tmp_path)}) is None


def test_hosts_stand_by_number_and_groups_give_the_type(tmp_path: Path) -> None:
    checkpoints = {"S3Uri": "s3://b/c", "LocalPath": "/elsewhere"}
    variables = laid_down(tmp_path, resourceconfig=RESOURCES, checkpointconfig=checkpoints)
    job = TrainingJob.read({**variables, "TRAINING_JOB_NAME": "mine", "AWS_REGION": "eu-west-1"})
    assert job is not None
    assert (job.way, job.name, job.region) == ("container", "mine", "eu-west-1")
    assert job.hosts == ("algo-1", "algo-2", "algo-10")
    assert (job.host, job.rank_of_host, job.interface) == ("algo-2", 1, "eth1")
    assert job.instance_type == "ml.p4d.24xlarge"
    assert [group.hosts for group in job.groups] == [("algo-1", "algo-2"), ("algo-10",)]
    assert job.checkpoints is not None
    assert (str(job.checkpoints.folder), job.checkpoints.url) == ("/elsewhere", "s3://b/c")


@pytest.mark.parametrize(
    ("variables", "way"),
    [
        ({"SM_TRAINING_ENV": "{}"}, "toolkit"),
        ({"SM_DISTRIBUTED_CONFIG": "{}", "TRAINING_JOB_NAME": "x"}, "drivers"),
        ({"TRAINING_JOB_NAME": "x"}, "container"),
    ],
)
def test_who_started_it_is_told_by_what_they_set(tmp_path: Path, variables: dict[str, str], way: str) -> None:
    job = TrainingJob.read({"SAGEMAKER_BASE_DIR": str(tmp_path), **variables})
    assert job is not None
    assert (job.way, job.hosts) == (way, ("localhost",))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"resourceconfig": "{"}, "resourceconfig.json is not JSON"),
        ({"resourceconfig": "[]"}, "writes a JSON object there"),
        ({"resourceconfig": {"hosts": "algo-1"}}, "hosts 'algo-1', which is no list"),
        ({"resourceconfig": {"hosts": ["a"], "current_host": "b"}}, "this host, 'b', is none of them"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TrainingJob.read(laid_down(tmp_path, **files) | {"TRAINING_JOB_NAME": "x"})


def test_folders_follow_the_base_and_what_is_said_otherwise(tmp_path: Path) -> None:
    folders = Folders.read({"SAGEMAKER_BASE_DIR": str(tmp_path), "SM_MODEL_DIR": "/m", "SM_OUTPUT_DIR": "/o"})
    assert folders.config == tmp_path / "input" / "config"
    assert (str(folders.model), str(folders.output_data)) == ("/m", "/o/data")
    assert str(Folders.read({}).config) == "/opt/ml/input/config"


GIVEN = {
    "preset": "digits",
    "optim__learning_rate": 0.1,
    "run.name": 7,
    "precision__compile": True,
    "data__sources": ["a", "b"],
    "debugger__collections": {"heads": {"include": ["head"]}},
    "model__weights": None,
    "run__stop_file": "",
}
WANTED = {
    "optim.learning_rate": 0.1,
    "run.name": "7",
    "precision.compile": True,
    "data.sources": ("a", "b"),
}


def check(settings: Any) -> None:
    config = load_overrides(Config(), settings)
    assert config.optim.learning_rate == WANTED["optim.learning_rate"]
    assert (config.run.name, config.run.stop_file) == (WANTED["run.name"], "")
    assert config.precision.compile is True
    assert tuple(source.url for source in config.data.sources) == WANTED["data.sources"]
    assert config.debugger.collections["heads"].include == ("head",)


def test_values_come_through_every_encoding(tmp_path: Path) -> None:
    as_json = {name: json.dumps(value) for name, value in GIVEN.items()}  # SDK v2
    raw = {name: value if isinstance(value, str) else json.dumps(value) for name, value in GIVEN.items()}  # SDK v3
    for file in (as_json, raw):
        found = read_hyperparameters(laid_down(tmp_path, hyperparameters=file))
        check(found.settings)
        assert found.words == {"preset": "digits"}
    sm_hps = read_hyperparameters({"SM_HPS": json.dumps({**GIVEN, "sagemaker_program": "x.py"})})
    check(sm_hps.settings)
    lower = {**GIVEN, "precision__compile": "true", "data__sources": '["a", "b"]', "optim__learning_rate": "1e-1"}
    check(read_hyperparameters({"SM_HPS": json.dumps(lower)}).settings)
    upper = {**GIVEN, "precision__compile": "True", "data__sources": "a,b"}
    check(read_hyperparameters({"SM_HPS": json.dumps(upper)}).settings)


@pytest.mark.parametrize(
    "arguments",
    [
        # SDK v2's toolkit, its older versions whose shell splits values, and SDK v3's driver
        ["--flag.on", "True", "--layers__of", "[1, 2]", "-n", "5", "--opts__a", "a=1,b=x y"],
        ["--flag.on", "True", "--layers__of", "[1,", "2]", "-n", "5", "--opts__a", "a=1,b=x", "y"],
        ["--flag.on", "true", "--layers__of", "[1, 2]", "--n", "5", "--opts__a", '{"a": 1}'],
    ],
)
def test_of_the_command_line_only_what_is_no_hyperparameter_is_left(arguments: list[str]) -> None:
    given = {"flag.on": True, "layers__of": [1, 2], "opts__a": {"a": 1}, "preset": "x"}
    found = read_hyperparameters({"SM_HPS": json.dumps(given)})
    found = type(found)(found.settings, found.words, found.names | {"n"})
    assert found.arguments([*arguments, "--preset", "x"]) == []
    assert found.arguments(["train", *arguments, "--run.seed=3"]) == ["train", "--run.seed=3"]
    assert found.arguments([*arguments, "--run.seed", "-3"]) == ["--run.seed", "-3"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": 3}, "hyperparameter 'epochs' is no setting"),
        ({"lr": 3}, r"hyperparameter 'lr' is no setting \(did you mean 'optim.learning_rate'\?\)"),
        ({"run__seed": 1, "run.seed": 2}, "'run.seed' is given twice"),
        ({"mp_parameters": {"partitions": 2}}, "take instead: parallel.pp"),
        ({"mp_parameters": {"tensor_paralel_degree": 2}}, "did you mean 'tensor_parallel_degree'"),
        ({"mp_parameters": {"tensor_parallel_degree": "two"}}, "give a whole number"),
        ({"mp_parameters": {"expert_parallel_degree": 2}}, "experts are not divided"),
        ({"mp_parameters": [1]}, "give a mapping"),
    ],
)
def test_hyperparameters_that_cannot_be_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_hyperparameters({"SM_HPS": json.dumps(given)})


def test_degrees_of_smp_are_those_of_the_mesh() -> None:
    parameters = {"hybrid_shard_degree": 4, "tensor_parallel_degree": 2, "sm_activation_offloading": "true"}
    settings, told = settings_of(json.dumps({**parameters, "allow_empty_shards": False}))
    assert settings == {
        "parallel.dp_shard": 4,
        "parallel.tp": 2,
        "parallel.activation_checkpointing": "full",
    }
    assert len(told) == 2
    assert settings_of({"hybrid_shard_degree": 0})[0] == {"parallel.dp_shard": -1}
    own = read_hyperparameters({"SM_HPS": json.dumps({"mp_parameters": parameters, "parallel__tp": 8})})
    assert own.settings["parallel.tp"] == 8  # what is said in our own words wins


def test_the_run_lies_where_sagemaker_keeps_it(tmp_path: Path) -> None:
    variables = laid_down(tmp_path, resourceconfig=RESOURCES)
    job = TrainingJob.read(variables)
    assert job is not None
    run = placed(Config(), job, ()).run
    assert (run.folder, run.resume) == (str(tmp_path / "output" / "data" / "runs"), "auto")
    laid_down(tmp_path, checkpointconfig={"S3Uri": "s3://b/c", "LocalPath": str(tmp_path / "checkpoints")})
    job = TrainingJob.read(variables)
    assert job is not None
    assert placed(Config(), job, ()).run.folder == str(tmp_path / "checkpoints")
    assert placed(Config(), job, ("run.folder", "run.resume")).run == Config().run.replace(grace=110.0)


def test_hosts_with_efa_use_it_and_the_user_may_say_otherwise() -> None:
    found = variables_for("ml.p5.48xlarge", "eth0", 2)
    assert (found["FI_PROVIDER"], found["FI_EFA_USE_DEVICE_RDMA"]) == ("efa", "1")
    assert "NCCL_PROTO" not in found
    assert variables_for("ml.p4d.24xlarge", "eth0", 2)["NCCL_PROTO"] == "simple"
    assert "FI_EFA_USE_DEVICE_RDMA" not in variables_for("ml.p3dn.24xlarge", "eth0", 2)
    for alone in (variables_for("ml.p5.48xlarge", "eth0", 1), variables_for("ml.g5.xlarge", "eth0", 2)):
        assert set(alone) == {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG"}
    for accelerator in ("ml.trn1.32xlarge", "ml.trn1n.32xlarge", "ml.inf2.xlarge"):
        with pytest.raises(UserError, match="take a p or g instance"):
            variables_for(accelerator, "eth0", 1)


STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu-[03-04]",
    "SLURM_JOB_ID": "123456",
}


def test_ranks_of_a_slurm_step_are_its_tasks() -> None:
    here = Environment.read(STEP)
    assert here == Environment(5, 8, 1, 4, "slurm", "gpu-03")
    found = rendezvous(here, STEP)
    assert (found["RANK"], found["LOCAL_WORLD_SIZE"], found["MASTER_ADDR"]) == ("5", "4", "gpu-03")
    assert found["MASTER_PORT"] == str(29500 + 123456 % 20000)
    assert Environment.read({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Environment()  # in a batch script
    assert Environment.read({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0",
                             "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}).launcher == ""  # fmt: skip
    with pytest.raises(UserError, match="--ntasks-per-node"):
        Environment.read({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4,3"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu-[03-05,9],login", "gpu-03"), ("a,b", "a"), ("n[1-2]x", "n1x"), ("one", "one"), ("", "")],
)
def test_the_first_of_slurms_hosts(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_ranks_of_mpi() -> None:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    variables = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(names, "3412", strict=True)}
    here = Environment.read({**variables, "MASTER_ADDR": "head"})
    assert here == Environment(3, 4, 1, 2, "mpi", "head")
    assert "MASTER_ADDR" not in rendezvous(here, {"MASTER_ADDR": "head"})
    assert rendezvous(Environment(3, 4, 3, 4, "mpi"), {})["MASTER_ADDR"] == "127.0.0.1"
    assert rendezvous(Environment(0, 4, 0, 4, "torchrun"), {}) == {}
