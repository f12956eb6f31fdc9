"""Where events go: a folder, and from there to S3, whether or not S3 can be reached."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from torch.utils.tensorboard import summary

from dltrain import storage
from dltrain.config import Config, Storage
from dltrain.config.tree import Logging
from dltrain.tensorboard.events import Events, place_of
from dltrain.testing.s3 import S3Server
from tests.conftest import TINY, Cli
from tests.tensorboard.made_up import read, started, trainer_of, values


def test_the_place_is_the_runs_own_or_a_folder_of_its_name(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    assert place_of("", run) == (run / "tensorboard", "")
    assert place_of(f"{tmp_path}/all", run) == (tmp_path / "all" / "mine", "")
    assert place_of(f"file://{tmp_path}/all", run) == (tmp_path / "all" / "mine", "")
    assert place_of("s3://bucket/all/", run) == (run / "tensorboard", "s3://bucket/all/mine")


def test_a_folder_that_cannot_be_written_to_is_refused() -> None:
    with pytest.raises(ValueError, match="events cannot be written to https://x; give a local folder or an s3:// URL"):
        Logging(tensorboard_folder="https://x")


def test_events_can_be_read_while_the_file_is_open(tmp_path: Path) -> None:
    events = Events(tmp_path)
    events.open(0)
    events.add(summary.scalar("a", 1.5), 3)
    events.show()
    assert values(read(tmp_path), "a") == [(3, 1.5)]
    events.close()
    events.close()


def test_events_are_copied_to_s3_as_they_grow(tmp_path: Path, s3: S3Server) -> None:
    url = f"s3://data{tmp_path}/mine"
    events = Events(tmp_path / "here", url)
    events.open(0)
    events.add(summary.scalar("a", 1.0), 1)
    events.copy()
    end = time.monotonic() + 20
    while not storage.listing(url) and time.monotonic() < end:
        time.sleep(0.05)
    (first,) = storage.listing(url)
    before = storage.size(first)
    events.add(summary.scalar("a", 2.0), 2)
    events.add_files({"projector/features.tsv": b"1\t2\n"})
    events.copy()
    events.close()
    events.copy(wait=True)
    assert storage.size(first) > before
    assert bytes(storage.read(f"{url}/projector/features.tsv")) == b"1\t2\n"
    for copied in storage.listing(url):
        local = tmp_path / "there" / copied.removeprefix(url).lstrip("/")
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(storage.read(copied))
    assert values(read(tmp_path / "there"), "a") == [(1, 1.0), (2, 2.0)]


def test_a_store_that_does_not_answer_is_told_once_holds_nobody_up_and_gets_all_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upload, answers = storage.upload, threading.Event()

    def refuse(file: Path, url: str) -> None:
        if not answers.is_set():
            time.sleep(0.2)
            raise OSError(f"nobody at {url}")
        upload(file, url)

    monkeypatch.setattr(storage, "upload", refuse)
    url = f"memory://{tmp_path}/mine"
    hook, trainer = started(tmp_path, copy_to=url), trainer_of(Config())
    for step in (1, 2, 3):
        began = time.monotonic()
        hook.checkpoint_saved(trainer, tmp_path)
        assert time.monotonic() - began < 0.1
        hook.logged(trainer, {"step": step, "loss": 2.0})
        time.sleep(0.3)
    answers.set()
    hook.close()
    told = capsys.readouterr().err
    assert told.count("warning:") == 1
    assert f"nobody at {url}/events.out.tfevents" in told
    assert values(read(tmp_path), "loss/train") == [(1, 2.0), (2, 2.0), (3, 2.0)]
    (copied,) = storage.listing(url)
    (local,) = tmp_path.glob("events*")
    assert storage.size(copied) == local.stat().st_size


@pytest.mark.slow
def test_a_run_is_copied_to_s3(cli: Cli, s3: S3Server, tmp_path: Path) -> None:
    url = f"s3://data{tmp_path}/events"
    job = ("train", TINY, "--preset", "small", "--logging.tensorboard", "true", "--run.name", "mine")
    done = cli(*job, "--logging.tensorboard_folder", url, **s3.variables)
    assert done.status == 0, done.err
    names = [name.removeprefix(f"{url}/mine/") for name in storage.listing(url)]
    assert {"projector_config.pbtxt", "projector/features.tsv"} <= set(names)
    (events,) = (tmp_path / "runs/mine/tensorboard").glob("events*")
    assert storage.size(f"{url}/mine/{events.name}") == events.stat().st_size


def test_storage_settings_reach_the_copy(tmp_path: Path) -> None:
    """The copy is made by this process, whose storage settings are the run's."""
    storage.configure(Storage())
    events = Events(tmp_path, f"memory://{tmp_path}/mine")
    events.open(0)
    events.close()
    events.copy(wait=True)
    assert len(storage.listing(f"memory://{tmp_path}/mine")) == 1
