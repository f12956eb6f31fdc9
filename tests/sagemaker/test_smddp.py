"""SageMaker's data parallel library where a job asks for it, by a stand-in that registers its backend over gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dltrain.errors import UserError
from dltrain.runtime.backend import choose_backend, is_asked_for
from tests.conftest import ROOT, TINY, Cli

STANDIN = str(Path(__file__).parent.parent / "standins")
ASKED = {"SM_FRAMEWORK_PARAMS": json.dumps({"sagemaker_distributed_dataparallel_enabled": True})}
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

TRAIN = ("train", TINY, "--preset", "small", "--run.length", "8st", "--run.name", "x")


def test_without_it_one_line_says_why() -> None:
    assert choose_backend("auto", CPU, {}) == ("gloo", "torch finds no CUDA device")
    assert choose_backend("auto", GPU, {})[0] == "cpu:gloo,cuda:nccl"
    name, why = choose_backend("auto", GPU, ASKED)
    assert name == "cpu:gloo,cuda:nccl"
    assert why.startswith(
        "smddp was asked for, and smdistributed is not installed (its last version is for torch 2.4.1)"
    )
    assert choose_backend("gloo", GPU, ASKED)[0] == "gloo"


def test_what_is_wanted_and_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="'smddp', and smdistributed is not installed"):
        choose_backend("smddp", CPU, {})
    with pytest.raises(UserError, match="'nccl', which talks between GPUs"):
        choose_backend("nccl", CPU, {})


def test_only_a_job_that_switches_it_on_asks_for_it() -> None:
    assert is_asked_for(ASKED)
    assert is_asked_for({"SM_FRAMEWORK_PARAMS": '{"sagemaker_distributed_dataparallel_enabled": "true"}'})
    for parameters in ("", "{", "{}", '{"sagemaker_distributed_dataparallel_enabled": false}'):
        assert not is_asked_for({"SM_FRAMEWORK_PARAMS": parameters})


LAYOUTS = {
    "ddp": (),
    "ddp, synchronised batch norm": ("--precision.batch_norm", "synchronised"),
    "fsdp": ("--parallel.dp_shard", "2"),
    "hsdp": ("--parallel.dp_shard", "2"),
    "deepspeed": ("--parallel.engine", "deepspeed", "--parallel.deepspeed.stage", "2"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "ddp" else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_layouts_give_on_it_what_they_give_on_gloo(cli: Cli, name: str) -> None:
    variables = {**ASKED, "PYTHONPATH": f"{STANDIN}:{ROOT}"}
    if name.startswith("ddp"):
        variables["SMDDP_REPLICAS"] = "1"
    ranks = "4" if name == "hsdp" else "2"
    plain = cli(*TRAIN, "--nproc", ranks, *LAYOUTS[name])
    done = cli(*TRAIN[:-1], "y", "--nproc", ranks, *LAYOUTS[name], **variables)
    assert done.status == 0, done.err
    assert f"{ranks} ranks talk by smddp: SageMaker's data parallel library, which the job asks for" in done.err
    assert done.result["loss"] == pytest.approx(plain.result["loss"], abs=1e-6)


@pytest.mark.slow
def test_an_instance_that_it_refuses_is_told_in_one_line(cli: Cli) -> None:
    words = (*TRAIN[:-1], "z", "--nproc", "2")
    done = cli(*words, **ASKED, PYTHONPATH=f"{STANDIN}:{ROOT}", SMDDP_REFUSES="1")
    assert done.status == 0, done.err
    told = "smddp was asked for, and it cannot be imported here (ValueError: SMDDP does not support this instance type"
    assert done.err.count(told) == 1
    assert "Traceback" not in done.err
