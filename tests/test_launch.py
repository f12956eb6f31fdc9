"""What `dltrain launch` makes for Slurm and Kubernetes: it is what they take, and it trains, stops and goes on."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dltrain.checkpoint.checkpointer import committed
from dltrain.cli.launch_slurm import seconds
from dltrain.cli.templates import filled, folder
from dltrain.runtime.launch import free_port
from tests.conftest import ROOT, TINY, Cli

SBATCH = """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot
dependency distribution error exclude exclusive export export-file extra-node-info get-user-env gid gpu-bind
gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags help hint hold ignore-pbs input
job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu
mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu
ntasks-per-node ntasks-per-socket open-mode oom-kill-step output overcommit oversubscribe parsable partition
power prefer priority profile propagate qos quiet reboot requeue reservation resv-ports segment signal
sockets-per-node spread-job stepmgr switches test-only thread-spec threads-per-core time time-min tmp
tres-bind tres-per-task uid usage use-min-nodes verbose version wait wait-all-nodes wckey wrap x11
"""
"""Long options of sbatch 24.11."""

SRUN = {"kill-on-bad-exit", "ntasks-per-node", "cpus-per-task", "container-image", "container-mounts",
        "container-workdir"}  # fmt: skip
"""Of srun, the last three of its plugin Pyxis."""

PLAIN = ("image/classify", "--preset", "digits")


def options(text: str) -> dict[str, str]:
    """Of the lines that sbatch reads, which are those before the first command."""
    head = text.partition("\nset -")[0]
    lines = [line.removeprefix("#SBATCH ") for line in head.splitlines() if line.startswith("#SBATCH")]
    return {word.removeprefix("--").partition("=")[0]: word.partition("=")[2] for word in lines}


def until(what: Callable[[], Any], limit: float = 90) -> None:
    deadline = time.monotonic() + limit
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def last_step(run: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in committed(run / "checkpoints"))


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--nodes", "4", "--gpus-per-node", "8", "--cpus-per-task", "12", "--partition", "gpu", "--account", "lab",
         "--time", "1-00:00:00", "--lead", "300", "--container", "docker://nvcr.io#nvidia/pytorch:25.01-py3",
         "--run.name", "it's mine", "--data.train", "s3://bucket/a b"),
    ],
    ids=["least", "most"],
)  # fmt: skip
def test_the_batch_script_is_one(cli: Cli, tmp_path: Path, more: tuple[str, ...]) -> None:
    if "--container" in more:
        refused = cli("launch", "slurm", *PLAIN, *more)
        assert "--container is" in refused.err  # a '#' would begin a comment
        more = tuple(word.replace("#", "/") for word in more)
    done = cli("launch", "slurm", *PLAIN, *more, "--output", "job.sbatch")
    assert done.status == 0, done.err
    text = (tmp_path / "job.sbatch").read_text()
    assert subprocess.run(["bash", "-n", "job.sbatch"], cwd=tmp_path).returncode == 0
    assert "{{" not in text
    found = options(text)
    assert set(found) <= set(SBATCH.split())
    assert {"requeue", "signal", "open-mode", "nodes", "ntasks-per-node"} <= set(found)
    assert found["signal"] == ("TERM@300" if more else "TERM@120")
    assert not found["signal"].startswith("B:")
    srun = shlex.split(text[text.index("\nsrun ") :].partition("\nstatus=")[0].replace("\\\n", " "))
    assert srun[0] == "srun"
    own = srun[1 : srun.index("python")]
    assert {word.removeprefix("--").partition("=")[0] for word in own} <= SRUN
    assert "--run.resume=auto" in srun
    assert f"--run.grace={300 if more else 120}" in srun
    if more:
        assert (found["nodes"], found["ntasks-per-node"], found["time"]) == ("4", "8", "1-00:00:00")
        assert "--data.train=s3://bucket/a b" in srun
        assert "--cpus-per-task=12" in own  # srun no longer takes sbatch's
        assert "--container-image=docker://nvcr.io/nvidia/pytorch:25.01-py3" in own
    else:
        assert not {"time", "partition", "account", "gpus-per-node", "cpus-per-task"} & set(found)
        assert "RUN=classify-digits-$SLURM_JOB_ID" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("slurm", "--time", "00:02:00"), "not longer than --lead 120"),
        (("slurm", "--time", "soon"), "give HH:MM:SS"),
        (("slurm", "--account", "a b"), "--account is 'a b'"),
        (("slurm", "--nodes", "0"), "--nodes is 0"),
        (("slurm", "--gpus-per-node", "-1"), "give 0 or more"),
        (("slurm", "--lead", "0"), "1 to 65535"),
        (("slurm", "--run.resume", "runs/x"), "goes on with its own run"),
        (("slurm", "--run.sed", "1"), "did you mean 'run.seed'"),
        (("slurm", "--gpus-per-node", "8", "--parallel.tp", "3"), "parallel.tp"),
        (("slurm", "--submit"), "there is no command sbatch here"),
        (("slurm", "--output", "no/such/folder"), "cannot write"),
        (("kubernetes", "--claim", "runs"), "--image"),
        (("kubernetes", "--image", "a"), "--claim"),
        (("kubernetes", "--image", "a", "--claim", "runs", "--name", "Mine"), "a-z, 0-9 and -"),
        (("kubernetes", "--image", "a", "--claim", "runs", "--shm", "0"), "give 1 or more"),
        (("kubernetes", "--image", "a", "--claim", "runs", "--run.folder", "runs"), "whole path"),
        (("kubernetes", "--image", "a", "--claim", "runs", "--run.stop_file", "x"), "kubectl delete job"),
        (("kubernetes", "--image", "a", "--claim", "runs", "--run.deadline", "2h"), "take --run.length in hours"),
        (("kubernetes", "--image", "a", "--claim", "runs", "--run.grace", "9"), "take --grace"),
        (("kubernetes", "--image", "a", "--claim", "runs", "--apply"), "there is no command kubectl here"),
    ],
)
def test_mistakes_are_refused(cli: Cli, words: tuple[str, ...], sentence: str) -> None:
    done = cli("launch", words[0], *PLAIN, *words[1:], PATH=str(Path(sys.executable).parent))
    assert (done.status, done.out) == (2, "")
    assert sentence in done.err
    assert "Traceback" not in done.err


def documented() -> list[str]:
    text = (ROOT / "docs" / "launching.md").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if line.startswith("dltrain ")]


def test_there_are_commands_in_the_page() -> None:
    assert {line.split()[2] for line in documented()} == {"slurm", "kubernetes"}


@pytest.mark.parametrize("line", documented(), ids=lambda line: line.split()[2])
def test_a_command_of_the_page_makes_its_file(cli: Cli, tmp_path: Path, line: str) -> None:
    words = shlex.split(line)
    done = cli(*words[1:])
    assert done.status == 0, done.err
    assert (tmp_path / words[words.index("--output") + 1]).stat().st_size > 1000


def test_times_of_slurms() -> None:
    times = {"30": 1800, "30:10": 1810, "12:00:00": 43200, "2-12": 216000, "2-12:30": 217800, "1-00:00:01": 86401}
    assert {time: seconds(time) for time in times} == times


def test_each_value_of_a_template_is_named_in_it() -> None:
    assert "#SBATCH --account" not in filled("slurm.sbatch", _Any(account=""))
    for file in ("slurm.sbatch", "kubernetes.yaml"):
        names = set(re.findall(r"\{\{(\w+)\}\}", (folder() / file).read_text()))
        assert {"name", "nodes", "nproc", "command"} <= names
        assert "{{" not in filled(file, dict.fromkeys(names, 7))


class _Any(dict[str, "str | int"]):
    def __missing__(self, name: str) -> str:
        return "x"


def manifest(cli: Cli, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    words = ("launch", "kubernetes", *PLAIN, "--image", "registry/dltrain:1", "--claim", "runs")
    done = cli(*words, "--nodes", "4", "--gpus", "8", *more)
    assert done.status == 0, done.err
    service, job = yaml.safe_load_all(done.out)
    return service, job


@pytest.mark.parametrize("version", ["1.31", "1.34"])
def test_the_manifest_is_what_kubernetes_takes(cli: Cli, version: str) -> None:
    for document in manifest(cli, "--service-account", "trainer", "--optim.learning_rate", "0.01"):
        kubernetes_validate.validate(document, version, strict=True)
    for document in manifest(cli, "--gpus", "0"):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_manifest_says_what_it_must(cli: Cli) -> None:
    service, job = manifest(cli, "--grace", "300", "--shm", "32", "--run.name", "$(no) 'variable'")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == job["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert spec["backoffLimit"] == 12
    assert pod["restartPolicy"] == "Never"  # a policy of failures needs it
    codes = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert codes == {2: "FailJob", 75: "Ignore"}
    conditions = [rule["onPodConditions"] for rule in spec["podFailurePolicy"]["rules"][2:]]
    assert conditions == [[{"type": "DisruptionTarget", "status": "True"}]]
    assert pod["terminationGracePeriodSeconds"] == 300
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}} in pod["volumes"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"runs": "/runs", "shm": "/dev/shm"}
    command = container["command"]
    assert command[:5] == ["python", "-m", "dltrain", "node", "image/classify"]
    assert {"--run.folder=/runs", "--run.resume=auto", "--run.grace=300"} <= set(command)
    assert "--run.name=$$(no) 'variable'" in command  # Kubernetes would put one of its own in
    assert "--address=classify-digits-$(JOB_COMPLETION_INDEX).classify-digits" in container["args"]


def script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


FAKE_SRUN = """#!{python}
# Two tasks of one step on this host; a SIGTERM to the step goes to each of them, as slurmstepd does it.
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
step = {{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost"}}
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
for rank in range(2):
    own = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}}
    tasks.append(subprocess.Popen(words, env={{**os.environ, **step, **own}}))
open("step.pid", "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.slow
def test_the_batch_script_trains_stops_is_queued_again_and_goes_on(cli: Cli, tmp_path: Path) -> None:
    script(tmp_path / "bin" / "srun", FAKE_SRUN.format(python=sys.executable))
    script(tmp_path / "bin" / "squeue", '#!/bin/sh\necho "$@" >> squeue.log\necho "${JOB_STATE:-RUNNING}"\n')
    script(tmp_path / "bin" / "scontrol", '#!/bin/sh\necho "$@" >> scontrol.log\n')
    words = ("launch", "slurm", TINY, "--preset", "small", "--nproc", "2", "--output", "job.sbatch")
    assert cli(*words, "--run.length", "100000st", "--checkpoint.every", "0st").status == 0
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = str(30000 + free_port() % 20000)  # ranks meet at a port that follows from it
    variables = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": job, "OMP_NUM_THREADS": "1"}
    variables |= {"TINY_PAUSE": "0.02", "SLURM_CPUS_PER_TASK": "1"}
    run, log = tmp_path / "runs" / f"tiny-small-{job}", tmp_path / "scontrol.log"

    def started(**more: str) -> subprocess.Popen[str]:
        (tmp_path / "step.pid").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", "job.sbatch"], cwd=tmp_path, env={**variables, **more}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def stopped(process: subprocess.Popen[str]) -> str:
        before = steps(run)
        until(lambda: steps(run) > before + 5 or process.poll() is not None)
        os.kill(int((tmp_path / "step.pid").read_text()), signal.SIGTERM)
        printed = process.communicate(timeout=90)[0]
        assert process.returncode == 0, printed
        return printed

    printed = stopped(started())
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["reason"], record["world_size"]) == ("stopped", "SIGTERM", 2)
    assert "queued again" in printed
    assert log.read_text() == f"requeue {job}\n"
    saved = last_step(run)
    printed = stopped(started(JOB_STATE="COMPLETING"))  # it was cancelled
    assert f"resumed at step {saved}" in printed
    assert log.read_text().count("requeue") == 1
    text = (tmp_path / "job.sbatch").read_text().replace("100000st", f"{last_step(run) + 3}st")
    (tmp_path / "job.sbatch").write_text(text)
    process = started()
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert log.read_text().count("requeue") == 1


def pods(job: dict[str, Any], folder: Path, port: int) -> list[subprocess.Popen[str]]:
    """Its containers as processes of this machine, with addresses of the loopback for names."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    name, started = job["metadata"]["name"], []
    for index in range(job["spec"]["completions"]):
        words = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["command"]]
        words += [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["args"]]
        for host in range(job["spec"]["completions"]):
            words = [word.replace(f"{name}-{host}.{name}", f"127.0.0.{host + 1}") for word in words]
        words = [sys.executable, *(word.replace(":7777", f":{port}") for word in words[1:])]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TINY_PAUSE": "0.02"}
        started.append(
            subprocess.Popen(
                words, cwd=folder, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    return started


@pytest.mark.slow
def test_pods_train_together_stop_together_and_go_on(cli: Cli, tmp_path: Path) -> None:
    words = ("launch", "kubernetes", TINY, "--preset", "small", "--image", "x", "--claim", "runs", "--nodes", "2")
    words += ("--run.folder", str(tmp_path / "runs"), "--checkpoint.every", "0st", "--parallel.dp_shard", "2")
    (_, job) = yaml.safe_load_all(cli(*words, "--run.length", "100000st").out)
    run = tmp_path / "runs" / "tiny-small"
    both = pods(job, tmp_path, free_port())
    until(lambda: steps(run) > 5 or any(pod.poll() is not None for pod in both))
    both[1].send_signal(signal.SIGTERM)
    printed = [pod.communicate(timeout=90)[0] for pod in both]
    assert [pod.returncode for pod in both] == [75, 75], printed
    assert all("stopped at step" in each for each in printed)
    step = last_step(run)
    (_, job) = yaml.safe_load_all(cli(*words, "--run.length", f"{step + 3}st").out)
    both = pods(job, tmp_path, free_port())
    printed = [pod.communicate(timeout=120)[0] for pod in both]
    assert [pod.returncode for pod in both] == [0, 0], printed
    assert any(f"resumed at step {step}" in each for each in printed)
    assert json.loads((run / "run.json").read_text())["world_size"] == 2


def test_a_node_tells_mistakes_of_the_user_from_hosts_that_have_not_come(cli: Cli) -> None:
    words = ("node", TINY, "--preset", "small")
    for wrong, sentence in (
        (("--run.sed", "1"), "did you mean 'run.seed'"),
        (("--hosts", "0"), "give 1 or more"),
        (("--head", "first"), "give HOST:PORT"),
        (("--nproc", "2", "--parallel.tp", "3"), "parallel.tp"),
    ):
        done = cli(*words, *wrong)
        assert done.status == 2
        assert sentence in done.err
    away = cli(*words, "--hosts", "2", "--head", "nobody.invalid:7777", DLTRAIN_HOSTS_TIMEOUT="0.1")
    assert away.status == 1
    assert "nobody.invalid" in away.err


def test_a_node_that_waits_for_others_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    words = ("node", TINY, "--preset", "small", "--hosts", "2", "--head", "nobody.invalid:7777")
    command = [sys.executable, "-m", "dltrain", *words]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    caught = Path(f"/proc/{process.pid}/status")
    bit = 1 << (signal.SIGTERM - 1)
    until(lambda: int(re.findall(r"SigCgt:\s*(\w+)", caught.read_text())[0], 16) & bit)
    process.send_signal(signal.SIGTERM)
    assert "nothing to save" in process.communicate(timeout=20)[1]
    assert process.returncode == 130


def test_under_a_launcher_train_becomes_the_rank(cli: Cli) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    refused = cli("train", TINY, "--preset", "small", "--nproc", "2", **step)
    assert refused.status == 2
    assert "slurm has started 2 rank(s)" in refused.err
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = cli("train", TINY, "--preset", "small", "--run.length", "5st", **alone)
    assert done.status == 0, done.err
    assert done.result["step"] == 5
