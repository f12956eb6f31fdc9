"""``dltrain shards``: what it makes, what its last lines say, and one sentence for every bad input."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dltrain.cli.main import main
from dltrain.data.formats import recordio, tfrecord
from dltrain.data.manifest import load_manifest
from dltrain.data.writer import ShardWriter
from tests.conftest import Done

Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """``dltrain shards ...`` in this process, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Done:
        status = main(["shards", *words])
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return call


def write_tar(folder: Path) -> None:
    with tarfile.open(folder / "x.tar", "w") as archive:
        for number in range(12):
            info = tarfile.TarInfo(f"{number:02d}.cls")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"%d" % (number % 3)))


def write_parquet(folder: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"label": [number % 3 for number in range(12)]}), folder / "x.parquet")


def write_recordio(folder: Path) -> None:
    labels = [np.array([number % 3], np.int32) for number in range(12)]
    with (folder / "x.rec").open("wb") as file:
        recordio.write_records(file, [recordio.encode_record({}, {"values": label}) for label in labels])


def write_tfrecord(folder: Path) -> None:
    # Example{features{feature{"label": int64_list{value: n}}}}, by hand
    labels = [b"\n\x10\n\x0e\n\x05label\x12\x05\x1a\x03\n\x01" + bytes([number % 3]) for number in range(12)]
    with (folder / "x.tfrecord").open("wb") as file:
        tfrecord.write_records(file, labels)


def write_folder(folder: Path) -> None:
    for number in range(12):
        (folder / f"{number % 3}").mkdir(exist_ok=True)
        Image.new("L", (2, 2)).save(folder / f"{number % 3}" / f"{number}.png")


def write_csv(folder: Path) -> None:
    (folder / "x.csv").write_text("value,label\n" + "".join(f"{number},{number % 3}\n" for number in range(12)))


def write_ground_truth(folder: Path) -> None:
    lines = [{"source": "a text", "label": number % 3, "label-metadata": {}} for number in range(12)]
    (folder / "x.manifest").write_text("\n".join(map(json.dumps, lines)))


WRITERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "tar": (write_tar, ()),
    "parquet": (write_parquet, ()),
    "recordio": (write_recordio, ()),
    "tfrecord": (write_tfrecord, ()),
    "folder": (write_folder, ()),
    "csv": (write_csv, ("--label", "label")),
    "ground-truth": (write_ground_truth, ()),
}


@pytest.mark.parametrize("told", [False, True], ids=["guessed", "told"])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_is_converted(run: Run, tmp_path: Path, kind: str, told: bool) -> None:
    (tmp_path / "in").mkdir()
    write, options = WRITERS[kind]
    write(tmp_path / "in")
    done = run("convert", "in", "out", *options, *(("--from", kind) if told else ()), "--samples-per-shard", "5")
    assert done.status == 0, done.err
    result = done.result
    assert (result["url"], result["samples"], result["shards"]) == ("out", 12, 3)
    assert re.search(r"^wrote 12 samples in 3 shards, [35]0\.0 KiB: out$", done.out, re.MULTILINE)
    assert result["fingerprint"] == load_manifest("out").fingerprint
    listed = run("ls", "out", "--samples")
    assert listed.out.count("cls 1") == 12
    assert "3 shards of out are whole: 12 samples, each key once" in run("verify", "out").out


def test_columns_are_chosen_on_the_command_line(run: Run, tmp_path: Path) -> None:
    table = {"id": ["x", "y"], "picture": [b"one", b"two"], "grade": [1, 2], "when": ["now", "then"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    assert run("convert", "a.parquet", "out", "--fields", "jpg=picture, cls=grade,when", "--key", "id").status == 0
    assert run("ls", "out", "--samples").out.splitlines()[:2] == ["x  jpg 3  cls 1  when 3", "y  jpg 3  cls 1  when 4"]


def write_data_set(url: str, samples: int = 40) -> None:
    with ShardWriter(url, samples_per_shard=10, facts={"classes": ["a", "b"]}) as writer:
        for number in range(samples):
            writer.write(f"{number:03d}", {"bin": bytes([number % 256]) * 800})


def test_a_data_set_is_resharded(run: Run, tmp_path: Path) -> None:
    write_data_set("d")
    done = run("reshard", "d", "e", "--bytes-per-shard", "25KiB")
    assert done.status == 0, done.err
    assert [shard.samples for shard in load_manifest("e").shards] == [12, 12, 12, 4]
    assert load_manifest("e").facts == {"classes": ["a", "b"]}
    shuffled = run("reshard", "d", "f", "--shuffle", "7")
    assert shuffled.result["shards"] == 1
    lines = run("ls", "f", "--samples").out.splitlines()[:40]
    assert lines != sorted(lines)
    assert sorted(lines) == [f"{number:03d}  bin 800" for number in range(40)]


def test_an_index_goes_beside_the_shards_or_elsewhere(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in")
    done = run("index", "./in/", "--at", "elsewhere")
    assert done.status == 0, done.err
    assert "indexed 12 samples in 1 shards" in done.out
    assert [file.name for file in (tmp_path / "in").iterdir()] == ["x.tar"]
    assert str(tmp_path / "in" / "x.tar") in run("ls", "elsewhere").out
    assert run("index", "in").result["fingerprint"] == done.result["fingerprint"]
    assert (tmp_path / "in" / "x.tar.idx").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["convert", "nowhere", "out"], "there is nothing at nowhere; check the URL"),
        (["convert", "nowhere.tar", "out", "--from", "tar"], "there are no tars at nowhere.tar"),
        (["convert", "d", "out", "--from", "zip"], "there is no format 'zip'"),
        (["convert", "d", "d"], "there is a data set at d; write to another URL"),
        (["convert", "d", "out", "--workers", "0"], "--workers is 0; give 1 or more"),
        (["convert", "d", "out", "--bytes-per-shard", "many"], "--bytes-per-shard is 'many'; give bytes with a unit"),
        (["convert", "d", "out", "--bytes-per-shard", "0B"], "0 bytes holds nothing; give more"),
        (["convert", "d", "out", "--fields", "=x"], "--fields is '=x'; give fields by column"),
        (["convert", "d", "out", "--series", "x"], "--series does not go with --from tar"),
        (["convert", "d", "out", "--fields", "x=y"], "there is no column 'y'"),
        (["convert", "broken", "out"], "x.tar is truncated: it ends at byte 700"),
        (["reshard", "broken", "out"], "there is no data set at broken"),
        (["index", "nowhere"], "there are no tars, TFRecord or RecordIO files at nowhere"),
        (["index", "broken"], "x.tar is truncated: it ends at byte 700"),
        (["verify", "nowhere"], "there is no data set at nowhere"),
        (["ls", "nowhere", "--samples"], "there is no data set at nowhere"),
        (["build", "digit", "out"], "did you mean 'digits'?"),
        (["pack", "d"], "invalid choice: 'pack'"),
    ],
)
def test_bad_input_is_one_sentence(run: Run, tmp_path: Path, words: list[str], reason: str) -> None:
    write_data_set("d")
    (tmp_path / "broken").mkdir()
    write_tar(tmp_path / "broken")
    (tmp_path / "broken" / "x.tar").write_bytes((tmp_path / "broken" / "x.tar").read_bytes()[:700])
    done = run(*words)
    assert done.status == 2
    assert reason in done.err
    assert done.err.startswith("dltrain: error: ")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def start(tmp_path: Path, *words: str, **streams: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dltrain", "shards", *words]
    return subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "COLUMNS": "120"}, **streams)


def test_a_terminal_sees_a_bar(tmp_path: Path) -> None:
    write_data_set(str(tmp_path / "d"))
    ours, theirs = pty.openpty()
    process = start(tmp_path, "verify", "d", stderr=theirs, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert b"4 shards of d are whole" in out
    assert "4/4" in shown
    assert "40 samples" in shown


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_the_same_command_goes_on(tmp_path: Path) -> None:
    write_data_set(str(tmp_path / "d"), samples=3000)
    words = ("reshard", "d", "e", "--samples-per-shard", "5", "--workers", "2")
    process = start(tmp_path, *words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    while len(list((tmp_path / "e").glob("*.tar"))) < 8:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")
    there = len(list((tmp_path / "e").glob("*.tar")))
    assert there < 120
    time.sleep(0.1)
    assert len(list((tmp_path / "e").glob("*.tar"))) == there  # nobody is left at work
    assert main(["shards", "reshard", str(tmp_path / "d"), str(tmp_path / "f"), "--samples-per-shard", "5"]) == 0
    again = start(tmp_path, *words, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    expected = load_manifest(str(tmp_path / "f")).fingerprint
    assert json.loads(out.splitlines()[-1])["fingerprint"] == expected
