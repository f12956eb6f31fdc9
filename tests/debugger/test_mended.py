"""Faults that a reader found: each stays mended."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import pytest
import torch
from torch import nn

from dltrain.config import Config, Debugger, Length
from dltrain.debugger.activations import Activations
from dltrain.debugger.findings import Finding
from dltrain.debugger.needs import Needs
from dltrain.debugger.raw import names_of_raw, read_raw, write_raw
from dltrain.debugger.reductions import reduce
from dltrain.debugger.rules.base import Rule
from dltrain.debugger.rules.catalogue import build
from dltrain.debugger.run import open_run
from dltrain.debugger.selection import Selection
from dltrain.debugger.store import write_whole
from dltrain.errors import UserError
from dltrain.mesh import build_mesh
from dltrain.runtime.environment import Environment
from tests.conftest import TINY, Cli

CPU = torch.device("cpu")


@dataclass
class OfNumpy(Rule):
    """Its numbers are numpy's."""


def test_numbers_of_numpy_are_written() -> None:
    found = OfNumpy().finding(np.int64(3), "it is", [np.str_("w")], place=np.int64(7), size=np.float32(0.5))  # type: ignore[arg-type]
    assert Finding.of(json.loads(found.as_json())).numbers == {"place": 7.0, "size": 0.5}


def test_what_goes_into_a_module_that_works_in_place_is_noted_before() -> None:
    config = Config(debugger=Debugger(every=Length.parse("1st")))
    watched = Activations(Selection(config, Needs(activation_inputs=True)))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True))
    watched.install(model)
    watched.begin(frozenset(watched.names()), "train")
    model(torch.randn(16, 4))
    rows = dict(watched.taken(build_mesh(config.parallel, Environment(), CPU)))
    watched.end()
    assert reduce("min", rows["1_input_0"].numpy()) < 0
    assert reduce("min", rows["1_output_0"].numpy()) == 0


def test_units_after_a_convolution_over_time_are_its_channels() -> None:
    config = Config(debugger=Debugger(every=Length.parse("1st")))
    watched = Activations(Selection(config, Needs(first_input=True)))
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(4 * 6, 5), nn.ReLU())
    with torch.no_grad():
        model[0].bias[1] = -100.0  # type: ignore[index]
    watched.install(model)
    watched.begin(frozenset(watched.names()), "train")
    model(torch.stack([torch.full((16, 8), 3.0), torch.zeros(16, 8)], 1))
    rows = {name: row.numpy() for name, row in watched.taken(build_mesh(config.parallel, Environment(), CPU))}
    watched.end()
    assert (rows["active/1"][0], rows["active/4"][0], rows["channels/0_input_0"][0]) == (4, 5, 2)
    assert reduce("fraction_zero", rows["active/1"]) >= 1 / 4
    assert reduce("max", rows["channels/0_input_0"]) == 3


def test_modules_have_hooks_on_due_steps_alone() -> None:
    config = Config(debugger=Debugger(every=Length.parse("1st")))
    for compiled in (False, True):
        watched = Activations(Selection(config, Needs()), compiled)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        watched.install(model)
        assert bool(model[1]._forward_hooks) == compiled
        watched.begin(frozenset(watched.names()), "train")
        assert len(model[1]._forward_hooks) == 1
        watched.end()
        assert bool(model[1]._forward_hooks) == compiled


def test_raw_tensors_of_few_bits_and_of_other_steps_are_read(tmp_path: Path) -> None:
    write_raw(tmp_path, 3, 0, {"head": torch.ones(2, dtype=torch.bfloat16)}, ("a",))
    write_raw(tmp_path, 5, 0, {"other": torch.ones(2)}, ())
    assert names_of_raw(str(tmp_path)) == {"head": [3], "other": [5]}
    tensors, keys = read_raw(str(tmp_path), 3)
    assert (tensors["head"].dtype, keys) == (np.float32, ["a"])


class Full:
    """A file on a disk that takes five bytes more."""

    def __init__(self) -> None:
        self.data = b"before"

    def write(self, data: bytes) -> int:
        self.data += data[:5]
        return min(5, len(data))

    def tell(self) -> int:
        return len(self.data)

    def truncate(self, size: int) -> None:
        self.data = self.data[:size]


def test_a_row_is_written_whole_or_not_at_all() -> None:
    file = Full()
    write_whole(cast(IO[bytes], file), b"four")
    with pytest.raises(OSError, match="No space left"):
        write_whole(cast(IO[bytes], file), b"too long")
    assert file.data == b"beforefour"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("AllZero:collection_names=weigths", "did you mean 'weights'"),
        ("NLPSequenceRatio:token_values=0+1", "as many token_thresholds_percent as token_values"),
    ],
)
def test_what_a_rule_would_look_for_in_vain_is_refused(word: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build([word])


@pytest.mark.slow
def test_rules_remember_what_they_saw_before_a_resume(cli: Cli, tmp_path: Path) -> None:
    words = ("train", TINY, "--preset", "small", "--run.name", "mine", "--run.resume", "auto", "--run.length", "60st")
    seen = ("--debugger.every", "2st", "--debugger.rules", "LossSpike:window=5,AllZero,Overfit")
    assert cli(*words, *seen, TINY_DIE="40:SIGKILL").status != 0
    done = cli(*words, *seen)
    assert done.status == 0, done.err
    run = open_run(str(tmp_path / "runs/mine"))
    assert run.steps() == [1, *range(2, 61, 2)]
    live = [str(each) for each in run.findings()]
    assert live == [str(each) for each in run.judge(["LossSpike:window=5", "AllZero", "Overfit"])]


@pytest.mark.slow
def test_a_rule_in_the_folder_at_hand_is_found_and_mistakes_are_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "my_rules.py").write_text(
        "from dataclasses import dataclass\nfrom dltrain import Rule\n\n@dataclass\nclass Always(Rule):\n"
        "    def update(self, seen):\n        return [self.finding(seen.step, 'it is so')]\n"
    )
    words = ("train", TINY, "--preset", "small", "--run.length", "5st", "--run.name", "mine", "--debugger.every", "2st")
    done = cli(*words, "--schedule.warmup", "1st", "--debugger.rules", "my_rules.Always")
    assert done.status == 0, done.err
    assert "Always at step 1: it is so" in done.err
    shown = cli("debug", "show", "mine", "--rules", "AllZero,DeadRelu")
    assert shown.status == 0, shown.err
    blind = cli("debug", "show", "mine", "--rules", "LabelNoise")
    assert blind.status == 2
    assert "rule LabelNoise needs losses, which runs/mine has not kept" in blind.err
    refused = cli(*words[:-4], "--debugger.every", "2st", "--debugger.raw", "nothing", "--debugger.strict", "true")
    assert refused.status == 2
    assert "debugger.raw 'nothing' matches no tensor" in refused.err
