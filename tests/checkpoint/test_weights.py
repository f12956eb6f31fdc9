"""Files and checkpoints to start from: what is read, from where, and what is said of those that cannot be."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from dltrain import storage
from dltrain.checkpoint import weights as module
from dltrain.checkpoint.weights import on_this_host, open_tensors
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.testing.s3 import S3Server
from tests.conftest import TINY, Cli

ALONE = Environment(0, 1, 0, 1)
STATE = {"body.weight": torch.arange(6.0).reshape(3, 2), "body.bias": torch.ones(3, dtype=torch.bfloat16)}


def read(url: str) -> dict[str, Tensor]:
    tensors = open_tensors(url, ALONE)
    return {name: tensors.read(name) for name in tensors.shapes}


@pytest.mark.parametrize("inside", [None, "state_dict", "model"])
@pytest.mark.parametrize("old_format", [False, True])
def test_a_torch_file_is_read_whatever_it_holds_besides(inside: str | None, old_format: bool, tmp_path: Path) -> None:
    saved = STATE if inside is None else {inside: STATE, "epoch": 3}
    torch.save(saved, tmp_path / "model.pth", _use_new_zipfile_serialization=not old_format)
    torch.testing.assert_close(read(str(tmp_path / "model.pth")), STATE)


def test_a_file_on_s3_is_fetched_once_per_host(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    fetch = module._fetch
    monkeypatch.setattr(module, "_fetch", lambda url, copy: (fetched.append(url), fetch(url, copy)))
    url = "s3://data/weights/model.safetensors"
    storage.write(url, save(STATE))
    threads = [threading.Thread(target=on_this_host, args=(url,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [url]
    torch.testing.assert_close(read(url), STATE)
    storage.write(url, save({"other": torch.zeros(2)}))  # overwritten: not the copy of before
    assert read(url).keys() == {"other"}


def test_what_cannot_be_read_is_told_in_a_sentence(s3: S3Server, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "cut.safetensors")
    torch.save(STATE, tmp_path / "cut.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.bin")
    for name in ("cut.safetensors", "cut.pt"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    for name, words in {
        "cut.safetensors": "cut.safetensors cannot be read as a safetensors file: .*; fetch or save it anew",
        "cut.pt": "cut.pt cannot be read as a torch file: .*; fetch or save it anew",
        "pickled.pt": "pickled.pt is no torch file of tensors alone .*; save model.state_dict",
        "empty.bin": "empty.bin has no tensors by name",
        "missing.pt": "missing.pt",
        "weights.npz": "neither a .safetensors, .pt, .pth or .bin file nor the folder",
        ".": "the folder of neither a run nor a committed checkpoint",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            open_tensors(str(tmp_path / name), ALONE)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"s3://data/nothing\.pt"):
        open_tensors("s3://data/nothing.pt", ALONE)


@pytest.mark.slow
def test_a_run_starts_from_another_run_and_goes_on_from_its_own_checkpoint(cli: Cli, tmp_path: Path) -> None:
    quick = ("--preset", "small", "--evaluation.every", "0st", "--run.threads", "1")
    first = cli("train", TINY, *quick, "--run.length", "4st", "--run.name", "first")
    assert first.status == 0, first.err
    words = ("--run.name", "second", "--model.weights", "runs/first")
    second = cli("train", TINY, *quick, *words, TINY_DIE="6:SIGTERM")
    assert second.status == 75, second.err
    record = json.loads((tmp_path / "runs/second/run.json").read_text())["weights"]
    assert (record["missing"], record["left_over"], record["skipped"]) == ([], [], [])
    assert f"{record['matched']} matched" in second.err
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/second/metrics.jsonl").read_text().splitlines()]
    fresh = json.loads((tmp_path / "runs/first/metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert losses[0] < fresh
    again = cli("train", TINY, *quick, "--run.resume", "runs/second", "--run.length", "8st")
    assert again.status == 0, again.err
    assert "matched" not in again.err
