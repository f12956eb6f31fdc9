"""A recipe as plain entry script, started by what SageMaker's containers and SDKs really start it with.

The training toolkit (of containers for SDK v2), an older one whose shell splits values, and the drivers that SDK v3
sends along run as they are, on fabricated folders.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dltrain.sagemaker.fabricated import Fabricated
from tests.conftest import ROOT, TINY
from tests.sagemaker.test_supervisor import until

OLD = "sagemaker-training==5.1.2"
DRIVERS = "sagemaker-train==1.27.0"

SETTINGS = {
    "preset": "small",
    "run__length": "8st",
    "debugger__every": "4st",
    "debugger__collections": {"heads": {"include": ["5.weight", "1.weight"]}},
    "debugger__raw": ["5.weight"],
    "optim__nesterov": False,
    "model__weights": None,
}
OF_THE_SDK = {
    "sagemaker_program": "tiny.py",
    "sagemaker_region": "us-east-1",
    "sagemaker_job_name": "local",
    "sagemaker_container_log_level": 20,
    "sagemaker_torch_distributed_enabled": True,
    "sagemaker_mpi_num_of_processes_per_host": 2,
}


def made(tmp_path: Path, hosts: int = 1, **more: Any) -> Fabricated:
    folders = Fabricated(tmp_path, hosts, {**SETTINGS, **more})
    folders.lay_down()
    return folders


def toolkit(folders: Fabricated, host: str, **variables: str) -> subprocess.Popen[str]:
    """What a container of SageMaker's runs for SDK v2."""
    base = folders.base(host)
    shutil.copytree(Path(TINY).parent, base / "code", dirs_exist_ok=True)
    file = base / "input" / "config" / "hyperparameters.json"
    own = {name: json.dumps(value) for name, value in OF_THE_SDK.items()}
    own["sagemaker_submit_directory"] = json.dumps(str(base / "code"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    environment = {
        **os.environ,
        **folders.variables(host),
        "SAGEMAKER_TRAINING_MODULE": "sagemaker_pytorch_container.training:main",
        "SM_STUDIO_LOCAL_MODE": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    train = "import sys; from sagemaker_training.cli.train import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", train], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check(folders: Fabricated, host: str) -> None:
    run = next(folders.base(host).glob("checkpoints/*"))
    config = json.loads((run / "run.json").read_text())["config"]
    assert config["debugger"]["collections"]["heads"]["include"] == ["5.weight", "1.weight"]
    assert config["debugger"]["raw"] == ["5.weight"]
    assert json.loads((run / "run.json").read_text())["world_size"] == 2 * folders.hosts
    assert (folders.base(host) / "model" / "model.safetensors").is_file()


def test_the_toolkit_starts_a_recipe_on_two_ranks(tmp_path: Path) -> None:
    folders = made(tmp_path)
    process = toolkit(folders, folders.names[0])
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    assert "torchrun --nnodes 1 --nproc_per_node 2 tiny.py" in printed
    check(folders, folders.names[0])


@pytest.mark.slow
def test_our_failure_file_outlives_the_toolkits(tmp_path: Path) -> None:
    folders = made(tmp_path)
    process = toolkit(folders, folders.names[0], TINY_RAISE="3:1:the sky fell")
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 1, printed  # the toolkit makes 1 of everything
    assert folders.failure(folders.names[0]).startswith("rank 1 on 127.0.0.1, step 3: RuntimeError: the sky fell")


@pytest.mark.slow
def test_ranks_save_and_stop_when_the_toolkit_is_ended_over_their_heads(tmp_path: Path) -> None:
    """What SageMaker's signal does to the toolkit: it dies at once, and says nothing to the ranks."""
    folders = made(tmp_path, run__length="100000st", checkpoint__every="0st", evaluation__every="0st")
    process = toolkit(folders, folders.names[0])
    base = folders.base(folders.names[0])
    until(lambda: any(file.read_text().count("\n") > 5 for file in base.glob("checkpoints/*/metrics.jsonl")))
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)
    record = next(base.glob("checkpoints/*")) / "run.json"
    until(lambda: json.loads(record.read_text())["status"] == "stopped")
    assert len(list(base.glob("checkpoints/*/checkpoints/*/COMMITTED"))) == 1
    process.communicate(timeout=20)


@pytest.mark.slow
def test_a_mistake_is_one_sentence_in_the_failure_file(tmp_path: Path) -> None:
    folders = made(tmp_path, optim__lerning_rate=1)
    process = toolkit(folders, folders.names[0])
    process.communicate(timeout=120)
    assert process.returncode == 1
    assert folders.failure(folders.names[0]).startswith("there is no setting 'optim.lerning_rate'; did you mean")


@pytest.mark.slow
def test_the_toolkit_starts_a_recipe_on_two_hosts(tmp_path: Path) -> None:
    folders = made(tmp_path, hosts=2, parallel__dp_shard=4)
    processes = [toolkit(folders, host) for host in folders.names]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    check(folders, folders.names[0])
    parts = [len(list(folders.base(host).rglob("*.distcp"))) for host in folders.names]
    assert parts[0] == parts[1] > 0


def installed(package: str, tmp_path: Path) -> Path:
    target = tmp_path / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{package} cannot be installed: {done.stderr[-300:]}")
    return target


@pytest.mark.slow
def test_an_older_toolkit_whose_shell_splits_values_starts_it_too(tmp_path: Path) -> None:
    packages = installed(OLD, tmp_path)
    folders = made(tmp_path, run__name="a name")
    process = toolkit(folders, folders.names[0], PYTHONPATH=f"{packages}:{ROOT}")
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    assert (folders.base(folders.names[0]) / "checkpoints" / "a name" / "run.json").is_file()
    check(folders, folders.names[0])


SCRIPT = """
set -e
mount -t tmpfs none /opt
cp -r {ml} /opt/ml
cp -r {packages}/sagemaker/train/container_drivers /opt/ml/input/data/sm_drivers
cp -r {code} /opt/ml/input/data/code
echo '{{"source_dir": "code", "entry_script": "tiny.py"}}' > /opt/ml/input/data/sm_drivers/sourcecode.json
echo '{{"process_count_per_node": 2}}' > /opt/ml/input/data/sm_drivers/distributed.json
bash /opt/ml/input/data/sm_drivers/sm_train.sh || status=$?
cp -r /opt/ml {after}
exit ${{status:-0}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_the_drivers_of_sdk_v3_start_a_recipe(tmp_path: Path, broken: bool) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace needs root")
    packages = installed(DRIVERS, tmp_path)
    sys.path.insert(0, str(packages / "sagemaker" / "train"))
    try:
        from templates import EXEUCTE_DISTRIBUTED_DRIVER, TRAIN_SCRIPT_TEMPLATE  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    folders = made(tmp_path, run__name='a "name" of mine', **({"optim__lerning_rate": 1} if broken else {}))
    base = folders.base(folders.names[0])
    config = base / "input" / "config"
    given = {**SETTINGS, **folders.hyperparameters}  # SDK v3 leaves text as it is
    raw = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    (config / "hyperparameters.json").write_text(json.dumps(raw))
    (config / "checkpointconfig.json").write_text('{"S3Uri": "s3://b/c", "LocalPath": "/opt/ml/checkpoints"}')
    driver = EXEUCTE_DISTRIBUTED_DRIVER.format(driver_name="Torchrun", driver_script="torchrun_driver.py")
    script = TRAIN_SCRIPT_TEMPLATE.format(working_dir="cd /opt/ml/input/data/code", install_requirements="",
                                          execute_driver=driver)  # fmt: skip
    after, code = tmp_path / "after", Path(TINY).parent
    shell = SCRIPT.format(ml=base, packages=packages, code=code, after=after)
    shell = shell.replace("bash /opt", f"cp {tmp_path}/sm_train.sh /opt/ml/input/data/sm_drivers; bash /opt")
    (tmp_path / "sm_train.sh").write_text(script.lstrip())
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SAGEMAKER")}
    variables |= {"TRAINING_JOB_NAME": "local", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["unshare", "--mount", "bash", "-c", shell], env=variables, capture_output=True, text=True)
    if broken:
        assert done.returncode == 1, done.stdout + done.stderr
        assert (after / "output" / "failure").read_text().startswith("there is no setting 'optim.lerning_rate'")
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert (after / "checkpoints" / 'a "name" of mine' / "run.json").is_file()
        assert (after / "model" / "model.safetensors").is_file()
