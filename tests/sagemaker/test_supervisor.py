"""Containers as SageMaker starts them, fabricated: to the end, interrupted, resumed, and with everything that fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from dltrain.checkpoint.checkpointer import committed
from dltrain.sagemaker.fabricated import Fabricated
from tests.conftest import ROOT, TINY, Cli

SETTINGS = {"recipe": TINY, "preset": "small", "nproc": 1}
LONG = {**SETTINGS, "run__length": "100000st", "checkpoint__every": "0st", "evaluation__every": "0st"}

FULL = """from dltrain.checkpoint.checkpointer import Checkpointer


def full(*_, **__):
    raise OSError(28, "No space left on device")


Checkpointer.save = full
"""
"""Part of a recipe whose checkpoints find no room."""

Hosts = dict[str, "subprocess.Popen[str]"]


@contextmanager
def started(
    made: Fabricated,
    variables: Mapping[str, str] | None = None,
    prefixes: Mapping[str, tuple[str, ...]] | None = None,
    words: tuple[str, ...] = (),
) -> Iterator[Hosts]:
    """The entry point of each host, by the command before it."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
    base |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(variables or {})}
    hosts = {
        host: subprocess.Popen(
            [*(prefixes or {}).get(host, ()), sys.executable, "-m", "dltrain.sagemaker", *words],
            env={**base, **made.variables(host)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in made.names
    }
    try:
        yield hosts
    finally:
        for process in hosts.values():
            if process.poll() is None:
                process.kill()
            process.communicate()


def until(what: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def steps(made: Fabricated) -> int:
    """Of the first host's run, so far."""
    files = list(made.base(made.names[0]).glob("checkpoints/*/metrics.jsonl"))
    return files[0].read_text().count("\n") if files else 0


def ended(hosts: Hosts) -> dict[str, tuple[int, str]]:
    """Statuses and what was printed."""
    outputs = {host: process.communicate(timeout=90)[0] for host, process in hosts.items()}
    return {host: (process.returncode, outputs[host]) for host, process in hosts.items()}


def run_of(made: Fabricated, host: int = 0) -> Path:
    return next(made.base(made.names[host]).glob("checkpoints/*/checkpoints")).parent


def test_a_job_leaves_model_scores_and_checkpoints_in_their_places(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 1, {**SETTINGS, "nproc": 2, "evaluation__report": True})
    made.lay_down()
    with started(made) as hosts:
        ((status, printed),) = ended(hosts).values()
    assert status == 0, printed
    made.collect()
    facts = json.loads((made.bucket / "model" / "model.json").read_text())
    assert facts["scores"]["accuracy"] == json.loads((made.bucket / "output" / "scores.json").read_text())["accuracy"]
    assert facts["facts"]["classes"] == [str(digit) for digit in range(10)]
    weights = load_file(made.bucket / "model" / "model.safetensors")
    assert {"1.weight", "1.bias", "2.running_mean", "5.weight"} <= set(weights)
    assert (made.bucket / "output" / "report" / "evaluation.html").is_file()
    assert (made.bucket / "model" / "recipe.py").read_text() == Path(TINY).read_text()
    assert len(list(made.bucket.glob("checkpoints/*/checkpoints/step-*"))) == 2
    assert not made.failure(made.names[0])


def test_a_signal_to_one_host_of_two_saves_on_both_and_the_job_goes_on_later(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 2, {**LONG, "parallel__dp_shard": 2})
    made.lay_down()
    with started(made, {"TINY_PAUSE": "0.01"}) as hosts:
        until(lambda: steps(made) > 5)
        asked = time.monotonic()
        hosts[made.names[1]].send_signal(signal.SIGTERM)
        done = ended(hosts)
        assert time.monotonic() - asked < 20
    for host, (status, printed) in done.items():
        assert status == 75, printed
        assert "stopped at step" in made.failure(host)
        assert "SIGTERM" in made.failure(made.names[1])
        assert json.loads((run_of(made) / "run.json").read_text())["reason"] == "SIGTERM"  # which rank 0 may not know
        assert "Traceback" not in printed
    parts = [{file.name for file in run_of(made, host).rglob("*.distcp")} for host in (0, 1)]
    assert parts == [{"__0_0.distcp"}, {"__1_0.distcp"}]  # each host has what its rank has saved
    made.collect()
    step = int(committed(next(made.bucket.glob("checkpoints/*/checkpoints")))[0].name.removeprefix("step-"))
    again = Fabricated(tmp_path, 2, {**LONG, "parallel__dp_shard": 2, "run__length": f"{step + 4}st"})
    again.lay_down()
    with started(again) as hosts:
        done = ended(hosts)
    for status, printed in done.values():
        assert status == 0, printed
    assert f"resumed at step {step}" in done[made.names[0]][1]
    assert len(committed(run_of(again) / "checkpoints")) == 2
    assert not committed(run_of(again, 1) / "checkpoints")[1:]  # host 2 has its copy of what the job began with alone


def test_the_first_rank_that_fails_is_in_the_failure_file_and_not_those_that_missed_it(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 2, {**LONG, "parallel__dp_shard": 2})
    made.lay_down()
    with started(made, {"TINY_RAISE": "3:1:the sky fell"}) as hosts:
        done = ended(hosts)
    failed = [host for host in made.names if "the sky fell" in made.failure(host)]
    assert len(failed) == 1  # whichever host has rank 1
    assert {status for status, _ in done.values()} == {1}
    told = made.failure(failed[0])
    assert told.startswith(f"rank 1 on {failed[0]}, step 3: RuntimeError: the sky fell")
    assert "tiny.py" in told
    assert len(told) <= 1024
    log = made.base(failed[0]) / "output" / "data" / f"failure-{failed[0]}-rank-1.log"
    assert "Traceback" in log.read_text()
    other = next(host for host in made.names if host != failed[0])
    assert "Another rank or host ended first" in made.failure(other)


def test_a_package_that_a_recipe_lacks_is_the_reason(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text("import no_such_package\n" + Path(TINY).read_text())
    made = Fabricated(tmp_path / "made", 1, {**SETTINGS, "recipe": str(recipe), "nproc": 2})
    made.lay_down()
    with started(made) as hosts:
        ((status, printed),) = ended(hosts).values()
    assert status == 1, printed
    told = made.failure(made.names[0])
    assert re.match(rf"rank [01] on {made.names[0]}: ModuleNotFoundError: No module named 'no_such_package'", told)
    assert "requirements.txt beside the recipe" in told
    assert "mine.py:1 in <module>" in told


@pytest.mark.slow
def test_a_rank_that_is_killed_is_told_with_what_it_mostly_means(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 1, {**LONG, "nproc": 2})
    made.lay_down()
    with started(made, {"TINY_DIE": "3:SIGKILL"}) as hosts:
        ((status, printed),) = ended(hosts).values()
    assert status == 128 + 9, printed
    assert made.failure(made.names[0]).startswith(f"rank 0 on {made.names[0]}: was ended by SIGKILL")
    assert "host's memory" in made.failure(made.names[0])


@pytest.mark.slow
def test_hosts_that_lose_an_agent_have_saved_and_end(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 2, LONG)
    made.lay_down()
    with started(made, {"TINY_PAUSE": "0.05"}) as hosts:
        until(lambda: steps(made) > 5)
        first, second = (hosts[host] for host in made.names)
        (agent,) = (child for child in psutil.Process(second.pid).children() if "elastic" in " ".join(child.cmdline()))
        agent.kill()  # its rank is told by the kernel, and all ranks stop
        assert second.wait(60) == 75
        asked = time.monotonic()
        assert first.wait(60) == 75  # whose agent waits for the other's
        assert time.monotonic() - asked < 30
        ended(hosts)
    assert "the process that started it has ended" in made.failure(made.names[0])
    assert "torchrun's agent was ended by SIGKILL" in made.failure(made.names[1])


@pytest.mark.slow
def test_a_save_that_fails_at_a_signal_is_told(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(Path(TINY).read_text().replace("if __name__", f"{FULL}if __name__"))
    made = Fabricated(tmp_path / "made", 1, {**LONG, "recipe": str(recipe)})
    made.lay_down()
    with started(made, {"TINY_PAUSE": "0.05"}) as hosts:
        until(lambda: steps(made) > 5)
        hosts[made.names[0]].send_signal(signal.SIGTERM)
        ((status, printed),) = ended(hosts).values()
    assert status == 1, printed
    assert "OSError: [Errno 28] No space left on device. The disk is full" in made.failure(made.names[0])


@pytest.mark.slow
def test_a_deadline_stops_the_job_in_time(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 1, {**LONG, "run__deadline": "0.004h"})  # 14 s
    made.lay_down()
    with started(made) as hosts:
        began = time.monotonic()
        ((status, printed),) = ended(hosts).values()
    assert status == 75, printed
    assert "run.deadline 0.004h is near" in made.failure(made.names[0])
    assert time.monotonic() - began < 14.4
    assert committed(run_of(made) / "checkpoints")


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_status_is_that_of_a_failure(tmp_path: Path, small_disk: Path) -> None:
    made = Fabricated(tmp_path, 1, {**LONG, "model__width": 4096, "checkpoint__every": "2st"})
    made.lay_down()
    file = made.base(made.names[0]) / "input" / "config" / "checkpointconfig.json"
    file.write_text(json.dumps({"S3Uri": "s3://b/c", "LocalPath": str(small_disk)}))
    with started(made) as hosts:
        ((status, printed),) = ended(hosts).values()
    assert status in (1, 2), printed  # by who is the first to want to write
    assert "No space left on device" in made.failure(made.names[0])
    assert "ask for a larger volume" in made.failure(made.names[0])


@pytest.mark.slow
def test_a_failure_that_the_disk_has_no_room_for_is_in_the_log(tmp_path: Path, small_disk: Path) -> None:
    made = Fabricated(small_disk, 1, LONG)
    made.lay_down()
    with pytest.raises(OSError, match="No space"), (small_disk / "rest").open("wb") as rest:
        rest.write(bytes(1 << 20))
    with started(made) as hosts:
        ((status, printed),) = ended(hosts).values()
    assert status != 0
    assert "No space left on device" in printed


@pytest.fixture
def two_networks() -> Iterator[tuple[str, str]]:
    """Two hosts as the kernel has them: network namespaces with a cable between them."""
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("network namespaces need root and iproute2")
    names = (f"dltrain-a-{os.getpid()}", f"dltrain-b-{os.getpid()}")
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}")
    for place, name in enumerate(names):
        inside = f"ip netns exec {name} ip"
        commands += [f"{inside} addr add 10.77.0.{place + 1}/24 dev veth0", f"{inside} link set veth0 up"]
        commands += [f"{inside} link set lo up"]
    for command in commands:
        done = subprocess.run(command.split(), capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.slow
def test_two_hosts_with_networks_of_their_own_train_together(tmp_path: Path, two_networks: tuple[str, str]) -> None:
    made = Fabricated(tmp_path, 2, {**SETTINGS, "parallel__dp_shard": 2})
    made.lay_down()
    addresses = ["10.77.0.1", "10.77.0.2"]
    for host, address in zip(made.names, addresses, strict=True):
        file = made.base(host) / "input" / "config" / "resourceconfig.json"
        tree = json.loads(file.read_text())
        tree |= {"current_host": address, "hosts": addresses, "network_interface_name": "veth0"}
        file.write_text(json.dumps(tree))
    networks = zip(made.names, two_networks, strict=True)
    with started(made, prefixes={host: ("ip", "netns", "exec", network) for host, network in networks}) as hosts:
        done = list(ended(hosts).values())
    assert [status for status, _ in done] == [0, 0], done
    assert "2 ranks talk by gloo" in done[0][1] + done[1][1]


@pytest.mark.parametrize(
    ("changes", "variables", "words"),
    [
        ({"optim__lerning_rate": 1}, {}, "there is no setting 'optim.lerning_rate'; did you mean"),
        ({"preset": "smal"}, {}, "has no preset 'smal'"),
        ({"recipe": None}, {}, "give the hyperparameter recipe"),
        ({"recipe": "image/clasify"}, {}, "did you mean 'image/classify'"),
        ({"nproc": "many"}, {}, "nproc is 'many'"),
        ({"parallel__tp": 2}, {}, "parallel.tp"),
    ],
    ids=["setting", "preset", "none", "recipe", "nproc", "layout"],
)
def test_mistakes_are_refused_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], variables: dict[str, str], words: str
) -> None:
    made = Fabricated(tmp_path, 1, {**SETTINGS, **changes})
    made.lay_down()
    with started(made, variables) as hosts:
        ((status, printed),) = ended(hosts).values()
    assert status == 2
    assert words in made.failure(made.names[0])
    assert "Traceback" not in printed


def test_the_word_that_sagemaker_hands_to_every_image_is_no_recipe(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 1, {**SETTINGS, "preset": "smal"})
    made.lay_down()
    with started(made, words=("train",)) as hosts:
        assert [status for status, _ in ended(hosts).values()] == [2]
    assert "has no preset 'smal'" in made.failure(made.names[0])


def test_accelerators_that_torch_does_not_know_are_refused(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 1, SETTINGS, instance_type="ml.trn1.32xlarge")
    made.lay_down()
    with started(made) as hosts:
        assert [status for status, _ in ended(hosts).values()] == [2]
    assert "ml.trn1.32xlarge has no GPU" in made.failure(made.names[0])


@pytest.mark.slow
def test_a_recipe_below_the_top_of_its_code_finds_modules_there(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 1, {**SETTINGS, "recipe": "sub/mine.py", "run__length": "4st"})
    made.lay_down()
    code = made.base(made.names[0]) / "code"
    for file, text in (("lib/there.py", "VALUE = 1\n"), ("sub/mine.py", "import lib.there\n" + Path(TINY).read_text())):
        (code / file).parent.mkdir(parents=True)
        (code / file).write_text(text)
    with started(made) as hosts:
        ((status, printed),) = ended(hosts).values()
    assert status == 0, printed


def test_groups_of_different_instances_are_refused(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 1, {"recipe": TINY, "preset": "small"})
    made.lay_down()
    file = made.base(made.names[0]) / "input" / "config" / "resourceconfig.json"
    kinds = ("ml.p5.48xlarge", "ml.c5.xlarge")
    groups = [{"instance_group_name": kind, "instance_type": kind, "hosts": made.names} for kind in kinds]
    file.write_text(json.dumps({**json.loads(file.read_text()), "instance_groups": groups}))
    with started(made) as hosts:
        assert [status for status, _ in ended(hosts).values()] == [2]
    assert "groups are of ml.c5.xlarge and ml.p5.48xlarge" in made.failure(made.names[0])


def test_a_host_that_never_comes_is_named(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 1, SETTINGS)
    made.lay_down()
    file = made.base(made.names[0]) / "input" / "config" / "resourceconfig.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps({**tree, "hosts": [*made.names, "algo-2.invalid"]}))
    with started(made, {"DLTRAIN_HOSTS_TIMEOUT": "1"}) as hosts:
        ((status, printed),) = ended(hosts).values()
    assert status == 2, printed
    assert "algo-2.invalid of 2 hosts are not found by name" in made.failure(made.names[0])


@pytest.mark.slow
def test_a_host_that_has_a_name_and_never_comes_is_told_too(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 2, SETTINGS)
    made.lay_down()
    with started(made, {"DLTRAIN_HOSTS_TIMEOUT": "6"}) as hosts:
        hosts[made.names[1]].kill()
        status, printed = ended(hosts)[made.names[0]]
    assert status == 1, printed
    assert "the 2 hosts did not come together" in made.failure(made.names[0])
    assert "Not all hosts came" in made.failure(made.names[0])


def test_as_process_one_of_a_container_it_saves_within_the_time_that_is_left(tmp_path: Path) -> None:
    prefix = ("unshare", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child=SIGKILL")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("a namespace of processes needs root")
    made = Fabricated(tmp_path, 1, {**LONG, "nproc": 2})
    made.lay_down()
    with started(made, prefixes={made.names[0]: prefix}) as hosts:
        (process,) = hosts.values()
        until(lambda: steps(made) > 5)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        asked = time.monotonic()
        os.kill(int(children[0]), signal.SIGTERM)  # process 1 in there
        ((status, printed),) = ended(hosts).values()
    assert status == 75, printed
    assert time.monotonic() - asked < 20
    assert len(committed(run_of(made) / "checkpoints")) == 1


def test_a_signal_while_hosts_are_waited_for_ends_it_at_once(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 1, SETTINGS)
    made.lay_down()
    file = made.base(made.names[0]) / "input" / "config" / "resourceconfig.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hosts": [*made.names, "algo-2.invalid"]}))
    with started(made) as hosts:
        (process,) = hosts.values()
        time.sleep(2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        ((status, printed),) = ended(hosts).values()
    assert status == 130, printed
    assert "SIGTERM came before any rank was started" in made.failure(made.names[0])


@pytest.mark.slow
def test_the_command_shows_what_a_job_would_do(cli: Cli, tmp_path: Path) -> None:
    words = ("launch", "local", "--as-sagemaker", "--hosts", "2", TINY, "--preset", "small")
    done = cli(*words)
    assert done.status == 0, done.err
    assert "[algo-1] " in done.out
    assert "algo-1 ended well" in done.err
    assert "algo-2 ended well" in done.err
    assert (tmp_path / "sagemaker-local" / "s3" / "model" / "model.safetensors").is_file()
    for wrong, sentence in (
        (("--channel", "train"), "give NAME=FOLDER"),
        (("--hosts", "0"), "give 1 or more"),
        (("--run.sed", "1"), "did you mean 'run.seed'"),
    ):
        refused = cli(*words, *wrong)
        assert (refused.status, refused.out) == (2, "")
        assert sentence in refused.err
    assert "add --as-sagemaker" in cli("launch", "local", TINY, "--hosts", "2").err
    assert "no place 'sagemaker2'" in cli("launch", "sagemaker2").err
