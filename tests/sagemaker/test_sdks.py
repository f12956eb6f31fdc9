"""SageMaker's Python SDKs, as they are: what they send of a job of ours, and that what they send trains.

Each is installed into a folder of its own and runs in a process of its own, against a local server of AWS's services.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest

from dltrain.recipes import declarations
from dltrain.sagemaker.fabricated import Fabricated
from dltrain.sagemaker.options import JobOptions
from dltrain.sagemaker.request import build
from dltrain.testing.s3 import S3Server
from tests.conftest import ROOT, TINY
from tests.sagemaker.test_supervisor import until

pytestmark = pytest.mark.slow

PACKAGES = {"v2": ["sagemaker==2.257.7"], "v3": ["sagemaker-train==1.27.0", "sagemaker-core==2.27.0"]}
PINNED = ("boto3", "botocore", "cryptography", "numpy", "pandas", "pydantic", "pydantic_core", "PyYAML", "requests")
"""Versions that the SDKs and our constraints agree upon; of others they want older ones."""

OPTIONS: dict[str, Any] = {
    "instance_type": "ml.p5.48xlarge",
    "image": "123456789012.dkr.ecr.us-east-1.amazonaws.com/dltrain:0.1",
    "role": "arn:aws:iam::123456789012:role/training",
    "bucket": "s3://data/training",
}
EVERYTHING: dict[str, Any] = {
    "count": 2,
    "nproc": 8,
    "spot": True,
    "max_hours": 2,
    "wait_hours": 5,
    "volume": 500,
    "channels": {"train": "s3://data/t:FastFile", "validation": "s3://data/v", "piped": "s3://data/p:Pipe"},
    "environment": {"A": "b"},
    "tags": {"team": "vision"},
    "subnets": ["subnet-1"],
    "security_groups": ["sg-1"],
    "kms_key": "k",
    "volume_kms_key": "v",
    "isolate": True,
    "encrypt": True,
    "checkpoints": "s3://data/earlier",
}
WARM = {"keep_alive": 600, "tensorboard": False}

NOTHING = None
SETUP = "/opt/ml/input/data/sm_drivers/sm_train.sh"
OF_THE_TOOLKIT = {
    "HyperParameters.recipe": NOTHING,
    "HyperParameters.nproc": NOTHING,
    "AlgorithmSpecification.ContainerEntrypoint": NOTHING,
    "HyperParameters.sagemaker_program": '"(tiny|classify).py"',
    "HyperParameters.sagemaker_submit_directory": '"(s3://data/training/NAME/source|/opt/ml/input/data/code)/sourcedir.tar.gz"',
    "HyperParameters.sagemaker_job_name": '"NAME"',
    "HyperParameters.sagemaker_region": '"us-east-1"',
    "HyperParameters.sagemaker_container_log_level": "20",
    "HyperParameters.sagemaker_torch_distributed_enabled": "true",
    "HyperParameters.sagemaker_instance_type": '"ml.p5.48xlarge"',
    "HyperParameters.sagemaker_mpi_num_of_processes_per_host": "8",
    "InputDataConfig.code": r".*/NAME/source/sourcedir.tar.gz.*",  # with isolation; else our upload is not there
}
OF_THE_DRIVERS = {
    "TrainingJobName": r"NAME-\d{14}",
    "AlgorithmSpecification.EnableSageMakerMetricsTimeSeries": NOTHING,  # the trainer has no word for it
    "ProfilerConfig.DisableProfiler": NOTHING,  # nor for this
    "AlgorithmSpecification.ContainerEntrypoint": r"\['/bin/bash'\]",
    "AlgorithmSpecification.ContainerArguments": rf"\['-c', 'chmod \+x {SETUP} && {SETUP}'\]",
    "OutputDataConfig.CompressionType": "GZIP",
    "InputDataConfig.code": r".*s3://data/training/NAME/NAME-\d{14}/input/code'.*",
    "InputDataConfig.sm_drivers": r".*s3://data/training/NAME/NAME-\d{14}/input/sm_drivers'.*",
}
DIFFERENT: dict[tuple[str, str], dict[str, str | None]] = {
    ("v2", "container"): {},
    ("v2", "script"): OF_THE_TOOLKIT,
    ("v3", "container"): OF_THE_DRIVERS,
    ("v3", "script"): {**OF_THE_DRIVERS, "HyperParameters.recipe": NOTHING, "HyperParameters.nproc": NOTHING},
}
"""What of a request may differ from ours, and what stands there then."""


def constraints(target: Path) -> Path:
    wanted = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.split("==")[0] in PINNED]
    target.write_text("\n".join(wanted))
    return target


@pytest.fixture(scope="session", params=["v2", "v3"])
def sdk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its name, and the folder where it is installed; a gigabyte, which is not left lying."""
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder / "packages")]
    command += ["-c", str(constraints(folder / "constraints.txt")), *PACKAGES[request.param]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{PACKAGES[request.param]} cannot be installed: {done.stderr[-300:]}")
    yield request.param, folder / "packages"
    shutil.rmtree(folder)


@pytest.fixture
def role(s3: S3Server) -> None:
    trust = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
    client = boto3.client("iam", endpoint_url=s3.url, region_name="us-east-1")
    if not client.list_roles()["Roles"]:
        client.create_role(
            RoleName="training", AssumeRolePolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        )


def job(name: str, entry: str, settings: Mapping[str, Any], recipe: str = TINY, **options: Any) -> dict[str, Any]:
    given = {**OPTIONS, "name": name, **options}
    preset = "small" if recipe == TINY else "digits"
    return {"recipe": recipe, "preset": preset, "settings": settings, "options": given, "entry": entry}


def sent(sdk: tuple[str, Path], s3: S3Server, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """The requests that the SDK sends."""
    name, packages = sdk
    variables = {**os.environ, **s3.variables, "PYTHONPATH": f"{packages}:{ROOT}", "SAGEMAKER_SUPPRESS_V2_WARNING": "1"}
    command = [sys.executable, str(Path(__file__).parent / "sdk_sender.py"), name, json.dumps(jobs)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(jobs)
    return list(found)


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their place, channels and tags by their names; what is not said and what is switched off is alike."""
    found: dict[str, Any] = {}
    for name, each in tree.items():
        if name in ("InputDataConfig", "Tags"):
            found |= {f"{name}.{member.get('ChannelName') or member['Key']}": member for member in each}
        elif isinstance(each, dict):
            found |= {f"{name}.{inside}": value for inside, value in flat(each).items()}
        elif each not in ("", None, False):
            found[name] = each
    return found


def test_every_field_of_a_request_is_in_the_sdks(sdk: tuple[str, Path], s3: S3Server, role: None) -> None:
    data = {"data.evaluation": "", "data.train": "s3://data/digits", "optim.learning_rate": 0.01}
    jobs = [
        job(f"{sdk[0]}-{entry}-{number}", entry, settings, recipe, **options)
        for entry in ("container", "script")
        for number, (recipe, settings, options) in enumerate(
            [(TINY, {**data, "data.train": ""}, EVERYTHING), (TINY, data, {}), ("image/classify", data, WARM)]
        )
    ]
    for given, theirs in zip(jobs, sent(sdk, s3, *jobs), strict=True):
        config = declarations(given["recipe"]).configure(given["preset"], given["settings"])
        options = JobOptions(**given["options"])
        ours = flat(build(given["recipe"], given["preset"], given["settings"], config, options))
        other = flat(theirs)
        assert not [name for name in other if name.startswith(("DebugHook", "DebugRule", "ProfilerRule"))]
        may = DIFFERENT[sdk[0], given["entry"]]
        for place in {*ours, *other}:
            if ours.get(place) == other.get(place):
                continue
            assert place in may, (options.name, place, ours.get(place), other.get(place))
            expected = (may[place] or "").replace("NAME", options.name)
            if place in other:
                assert re.fullmatch(expected, str(other[place])), (options.name, place, other[place])
            else:
                assert may[place] is NOTHING or place == "InputDataConfig.code", (options.name, place)


SETTINGS = {"run.length": "8st", "run.name": 'a "name" of mine', "optim.learning_rate": 0.01, "optim.nesterov": False}
TOOLKIT = "import sys; from sagemaker_training.cli.train import main; sys.exit(main())"
INSIDE = 'mount -t tmpfs none /opt && mkdir /opt/ml && mount --bind "$0" /opt/ml && exec "$@"'


def laid_down(tmp_path: Path, request: Mapping[str, Any], s3: S3Server) -> Fabricated:
    """What SageMaker makes of a request on one host: descriptions, and channels as they are in S3."""
    folders = Fabricated(tmp_path, 1, {})
    folders.lay_down()
    base = folders.base(folders.names[0])
    channels = request.get("InputDataConfig", [])
    described = {each["ChannelName"]: {"TrainingInputMode": "File"} for each in channels}
    files = {
        "hyperparameters": request["HyperParameters"],
        "inputdataconfig": described,
        "checkpointconfig": request["CheckpointConfig"],
    }
    for name, tree in files.items():
        (base / "input" / "config" / f"{name}.json").write_text(json.dumps(tree))
    client = boto3.client("s3", endpoint_url=s3.url)
    for each in channels:
        prefix = each["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://data/")
        for found in client.list_objects_v2(Bucket="data", Prefix=f"{prefix}/")["Contents"]:
            target = base / "input" / "data" / each["ChannelName"] / found["Key"].removeprefix(f"{prefix}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download_file("data", found["Key"], str(target))
    return folders


def container(folders: Fabricated, request: Mapping[str, Any], s3: S3Server, *unshared: str) -> subprocess.Popen[str]:
    """The container's command, with these folders as its ``/opt/ml``."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace needs root")
    algorithm = request["AlgorithmSpecification"]
    command = [*algorithm.get("ContainerEntrypoint", [sys.executable, "-c", TOOLKIT])]  # the toolkit is the image's own
    command += algorithm.get("ContainerArguments", [])
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SAGEMAKER", "SM_"))}
    variables |= {**s3.variables, **request.get("Environment", {}), "TRAINING_JOB_NAME": request["TrainingJobName"]}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SM_STUDIO_LOCAL_MODE": "true"}
    variables["SAGEMAKER_TRAINING_MODULE"] = "sagemaker_pytorch_container.training:main"
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    base = folders.base(folders.names[0])
    return subprocess.Popen(
        ["unshare", "--mount", *unshared, "bash", "-c", INSIDE, str(base), *command],
        env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("entry", ["container", "script"])
def test_what_an_sdk_sends_trains(sdk: tuple[str, Path], s3: S3Server, role: None, tmp_path: Path, entry: str) -> None:
    (request,) = sent(sdk, s3, job(f"{sdk[0]}-{entry}-trains", entry, SETTINGS, nproc=2))
    folders = laid_down(tmp_path, request, s3)
    process = container(folders, request, s3)
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0, printed
    base = folders.base(folders.names[0])
    record = json.loads((base / "checkpoints" / 'a "name" of mine' / "run.json").read_text())
    assert record["world_size"] == 2
    assert record["status"] == "finished"
    assert record["config"]["optim"]["learning_rate"] == 0.01
    assert (base / "model" / "model.safetensors").is_file()
    started = re.search(r"torchrun --nnodes.1 --nproc_per_node.2 tiny\.py", printed)
    assert bool(started) == (entry == "script")


def test_a_stop_of_the_job_reaches_the_ranks(sdk: tuple[str, Path], s3: S3Server, role: None, tmp_path: Path) -> None:
    """The first process of a container gets SIGTERM, and of the drivers that is a shell."""
    settings = {"run.length": "100000st", "checkpoint.every": "0st", "evaluation.every": "0st"}
    (request,) = sent(sdk, s3, job(f"{sdk[0]}-stops", "container", settings, nproc=2))
    folders = laid_down(tmp_path, request, s3)
    process = container(folders, request, s3, "--pid", "--fork", "--mount-proc", "--kill-child")
    base = folders.base(folders.names[0])
    try:
        until(lambda: any(file.read_text().count("\n") > 5 for file in base.glob("checkpoints/*/metrics.jsonl")))
        first = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        os.kill(first, signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
    finally:
        process.kill()  # and with it all that a signal has not reached
    record = json.loads(next(base.glob("checkpoints/*/run.json")).read_text())
    assert record["status"] == "stopped", printed
    assert len(list(base.glob("checkpoints/*/checkpoints/*/COMMITTED"))) == 1
