"""A machine and a planned job are looked at, and what is bad is said with what to do."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from dltrain.config import Config
from dltrain.doctor import job, machine, store
from dltrain.doctor.checked import Checked, all_of
from dltrain.errors import UserError
from dltrain.sagemaker.options import JobOptions
from dltrain.testing.s3 import S3Server
from tests.conftest import TINY, Cli
from tests.sagemaker.test_fabricated import wheel

JOB = {
    "instance_type": "ml.p5.48xlarge",
    "image": "123456789012.dkr.ecr.eu-west-1.amazonaws.com/pytorch-training:2.12-gpu",
    "role": "arn:aws:iam::123456789012:role/training",
    "bucket": "s3://data/training",
}


def states(found: Iterator[Checked]) -> list[str]:
    return [each.state for each in found]


@pytest.mark.parametrize(
    ("torch", "vision", "state"),
    [
        ("2.13.0+cpu", "0.28.0", "good"),
        ("2.10.1", "0.25.0", "bad"),
        ("2.11.0", "0.28.0", "bad"),
        ("2.15.0", "1.0", "good"),
    ],
)
def test_versions_that_do_not_go_together_are_bad(
    monkeypatch: pytest.MonkeyPatch, torch: str, vision: str, state: str
) -> None:
    monkeypatch.setattr(machine.metadata, "version", {"torch": torch, "torchvision": vision}.__getitem__)
    assert states(machine.versions()) == [state]


def test_little_shared_memory_few_files_and_a_full_disk_are_doubtful(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 26))
    (shared,) = machine.shared_memory(tmp_path)
    assert (shared.state, "--shm-size" in shared.said) == ("doubtful", True)
    assert states(machine.disk()) == ["doubtful", "doubtful"]
    assert states(machine.shared_memory(tmp_path / "none")) == ["doubtful"]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 524288))
    (files,) = machine.open_files()
    assert (files.state, files.said.endswith("ulimit -n 65536")) == ("doubtful", True)


def test_an_adapter_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/fi_info")
    listed = "provider: efa\n    fabric: efa-direct\nprovider: efa\n    fabric: efa\n"
    answers = {"there": SimpleNamespace(returncode=0, stdout=listed), "not": SimpleNamespace(returncode=61, stdout="")}
    for name, said in (("there", "2 interface(s): efa, efa-direct"), ("not", "finds no EFA adapter")):
        monkeypatch.setattr(subprocess, "run", lambda *_, answer=answers[name], **__: answer)
        assert said in next(machine.adapter()).said


def test_ranks_that_talk_are_good_and_those_that_do_not_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(machine.ranks()) == ["good"]
    monkeypatch.setattr(machine, "_RANKS", "raise SystemExit('no way through')")
    (found,) = machine.ranks()
    assert (found.state, "no way through" in found.said) == ("bad", True)


def test_a_check_that_breaks_is_told_and_the_others_go_on() -> None:
    def breaks() -> Iterator[Checked]:
        raise OSError("no such device")
        yield

    found = list(all_of([("one", breaks), ("two", lambda: [Checked("two", "good", "it is")])]))
    assert [(each.name, each.state) for each in found] == [("one", "bad"), ("two", "good")]
    assert "could not be looked at: OSError: no such device" in found[0].said


def test_s3_is_written_read_and_left_as_it_was(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from dltrain import storage

    (found,) = store.place("s3://data/doctor")
    assert (found.state, "MiB/s to write" in found.said) == ("good", True)
    assert not list(storage.listing("s3://data/doctor"))
    assert states(store.clock("s3://data/doctor")) == ["good"]
    early = datetime.now(UTC) - timedelta(hours=1)
    monkeypatch.setattr(store, "parsedate_to_datetime", lambda _: early)
    (wrong,) = store.clock("s3://data/doctor")
    assert (wrong.state, "NTP" in wrong.said) == ("bad", True)
    with pytest.raises(UserError, match="give an address such as"):
        list(store.place("/tmp"))


@pytest.mark.parametrize(
    ("image", "state"),
    [("x/pytorch-training:2.8.0-gpu", "bad"), ("x/pytorch:2.12-cu130", "good"), ("x/dltrain:0.1", "good")],
)
def test_an_image_whose_tag_names_an_old_torch_is_bad(image: str, state: str) -> None:
    assert states(job.image(JobOptions(**{**JOB, "image": image}))) == [state]


def test_a_request_that_sagemaker_would_refuse_is_bad() -> None:
    config = Config.model_validate({"data": {"train": "s3://data/x"}})
    options = JobOptions(**{**JOB, "role": "me"})
    (found,) = all_of([("request", lambda: job.request("image/classify", "digits", {}, config, options))])
    assert found.state == "bad"
    assert "RoleArn has 2 characters" in found.said


def test_a_trial_by_channels_is_left_out() -> None:
    options = JobOptions(**JOB, channels={"train": "s3://data/x"})
    assert states(job.trial("image/classify", "digits", {}, options)) == ["doubtful"]


@pytest.mark.slow
def test_the_command_says_what_is_bad_and_exits_by_it(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(JOB))
    words = ("doctor", "--sagemaker", str(file), TINY, "--preset", "small")
    done = cli(*words)
    assert done.status == 0, done.out + done.err
    assert "trial: two steps in a fabricated container ended well" in done.out
    assert ", 0 bad" in done.out
    refused = cli("doctor", "--sagemaker", str(file))
    assert (refused.status, "needs the recipe" in refused.err) == (2, True)


@pytest.mark.slow
def test_a_trial_that_fails_says_why(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps({**JOB, "image": "pytorch:2.8"}))
    done = cli("doctor", "--sagemaker", str(file), TINY, "--preset", "small", TINY_RAISE="1:0:the sky fell")
    assert done.status == 1
    assert done.out.count("BAD ") == 2
    assert "the sky fell" in done.out


@pytest.mark.slow
def test_a_trial_has_the_code_that_the_job_would_have_and_nothing_of_the_job_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = wheel(tmp_path, "only_there")
    recipe = tmp_path / "source" / "recipes" / "mine.py"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("import only_there\n" + Path(TINY).read_text())
    (tmp_path / "source" / "requirements.txt").write_text(f"--no-index\n{package}\n")
    (tmp_path / "source" / "data.bin").touch()
    monkeypatch.setenv("SM_HPS", '{"preset": "none"}')
    options = JobOptions(**JOB, source=str(tmp_path / "source"), ignore=("*.bin",))
    (found,) = job.trial(str(recipe), "small", {}, options)
    assert found.state == "good", found.said
    (refused,) = all_of([("trial", lambda: job.trial(str(recipe), "small", {}, JobOptions(**JOB, source="docs")))])
    assert (refused.state, "is not in it; give --source" in refused.said) == ("bad", True)
