"""Collections, histograms, raw tensors, evaluations and actions, as a user asks for them."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dltrain.checkpoint.checkpointer import committed
from dltrain.config import Collection, Config, Debugger, Length
from dltrain.debugger.histograms import BINS, EDGES, counts_of, quantile
from dltrain.debugger.policy import Policy
from dltrain.debugger.run import open_run
from dltrain.debugger.selection import Selection
from dltrain.errors import UserError
from tests.conftest import ROOT, TINY, Cli

SMALL = ("train", TINY, "--preset", "small", "--run.name", "mine")


def st(steps: int) -> Length:
    return Length.parse(f"{steps}st")


NAMES = [
    f"{kind}{name}"
    for kind in ("", "gradient/", "update/", "exp_avg/", "exp_avg_sq/")
    for name in ("stem.weight", "stem.bias", "head.weight")
] + ["relu_output_0", "active/relu", "stem_input_0"]


def names(step: int, **settings: object) -> set[str]:
    config = Config(debugger=Debugger(every=st(4), **settings))  # type: ignore[arg-type]
    return set(Selection(config).choose(NAMES).due(step))


def test_kinds_are_chosen_by_name() -> None:
    assert names(4, collect=("biases",)) == {"stem.bias"}
    assert names(4, collect=("optimizer_state",)) == {name for name in NAMES if name.startswith("exp")}
    assert names(4, collect=("all",)) == set(NAMES)
    assert names(4, collect=("losses",)) == set()


def test_a_collection_has_steps_of_its_own() -> None:
    heads = {"heads": Collection(include=("head",), every=st(2), start=2)}
    some = {"weights": Collection(every=st(3))}
    collect = ("weights", "gradients")
    assert names(2, collect=collect, collections=heads) == {name for name in NAMES if "head" in name}
    assert names(4, collect=collect, collections=heads) >= {"stem.weight", "gradient/stem.bias", "exp_avg/head.weight"}
    assert names(6, collect=collect, collections=some) == {"stem.weight", "stem.bias", "head.weight"}
    assert names(4, collect=collect, collections=some) == {name for name in NAMES if name.startswith("gradient/")}
    listed = {"heads": Collection(include=("head",), steps=(5,))}
    assert names(5, collect=(), collections=listed) == {name for name in NAMES if "head" in name}
    assert names(6, collect=(), collections=listed) == set()


def test_a_policy_knows_its_next_step() -> None:
    for policy in (Policy(5), Policy(5, start=7, end=20), Policy(0, steps=frozenset({3, 9})), Policy(0), Policy(3, 4)):
        due = [step for step in range(1, 40) if policy.due(step)]
        for step in range(1, 30):
            following = next((each for each in due if each >= step), None)
            assert policy.next(step) == following or (following is None and policy.next(step) > 40)
    assert [step for step in range(1, 30) if Policy(5, start=7, end=20).due(step)] == [7, 10, 15]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"collect": ("weight",)}, "did you mean 'weights'"),
        ({"collections": {"gradient": Collection(every=st(2))}}, "includes nothing.*did you mean 'gradients'"),
    ],
)
def test_an_unknown_collection_is_told(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        names(4, **settings)


def test_histograms_are_numpys_and_quantiles_are_within_a_bin() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 5000)
    counts = counts_of(values).numpy()
    assert (counts == np.histogram(values.double().numpy(), bins=EDGES)[0]).all()
    assert len(counts) == BINS
    for share in (0.01, 0.05, 0.5, 0.95, 0.99):
        assert quantile(counts, share) == pytest.approx(float(values.quantile(share)), rel=0.25, abs=1e-9)
    odd = counts_of(torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-30]))
    assert odd.sum() == 5
    assert odd[BINS // 2] == 3
    assert odd[0] == odd[-1] == 1


@pytest.mark.slow
def test_everything_that_can_be_collected_is(cli: Cli, tmp_path: Path) -> None:
    collections = "{last: {include: ['5_(in|out)put_'], every: 3st, raw: true}}"
    words = ("--debugger.every", "4st", "--debugger.collect", "all", "--debugger.histograms", "true")
    more = ("--debugger.collections", collections, "--debugger.raw", "^gradient/5.weight,^5.bias$")
    done = cli(*SMALL, *words, *more, "--debugger.evaluation", "true", "--nproc", "2", "--parallel.dp_shard", "2")
    assert done.status == 0, done.err
    run = open_run(str(tmp_path / "runs/mine"))
    assert run.modes() == ["train", "eval"]
    assert run.steps() == [1, 3, 4, 6, 8, 9, 12, 15, 16]
    assert run.tensor("5_output_0").steps == run.steps()  # of the collection, and of activations' collection: all
    assert run.tensor("1.weight").steps == [1, 4, 8, 12, 16]
    assert run.tensor("exp_avg/1.weight").steps == [1, 4, 8, 12, 16]
    assert run.steps("eval") == [8, 16]
    assert run.tensor("3_output_0", "eval").reduction_value(16, "fraction_zero") > 0
    assert run.tensor("3_output_0", "eval").moments[0, 0] >= 360 * 16
    weight = run.tensor("5.bias")
    whole = weight.value(4)
    assert whole.shape == (10,)
    assert weight.reduction_value(4, "l2") == pytest.approx(float(np.linalg.norm(whole)), rel=1e-6)
    assert run.tensor("gradient/5.weight").value(8).shape == (10, 16)
    outputs, keys = run.raw(3)
    assert outputs["5_output_0"].shape == (100, 10)
    assert len(set(keys)) == 100
    counts = run.tensor("1.weight").counts[4]
    assert counts.sum() == 64 * 16
    assert run.tensor("1.weight").quantiles(0.5)[0] == pytest.approx(0.0, abs=0.05)
    clipped, before = run.tensor("clipped/5.weight"), run.tensor("gradient/5.weight")
    factor = np.minimum(1, 1 / (run.scalars("norm")[1][[step - 1 for step in before.steps]] + 1e-6))
    assert clipped.reductions("abs_max") == pytest.approx(before.reductions("abs_max") * factor)
    assert clipped.reductions("l2") == pytest.approx(before.reductions("l2") * factor)


class Listener(BaseHTTPRequestHandler):
    posted: list[dict[str, object]]

    def do_POST(self) -> None:
        self.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


def test_actions_follow_what_a_rule_of_the_users_finds(cli: Cli, tmp_path: Path) -> None:
    Listener.posted = []
    server = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hook = f"webhook:http://127.0.0.1:{server.server_port}/found"
    rules = "tests.recipes.rules.LossBelow:threshold=100:action=capture+save"
    actions = f"call:tests.recipes.rules.note,call:tests.recipes.rules.fail,{hook}"
    words = ("--debugger.every", "4st", "--debugger.rules", rules, "--debugger.actions", actions)
    done = cli(*SMALL, *words, "--checkpoint.every", "0st", "--evaluation.every", "0st", PYTHONPATH=str(ROOT))
    server.shutdown()
    assert done.status == 0, done.err
    assert "LossBelow at step 1: the loss is" in done.err
    assert (tmp_path / "noted.txt").read_text() == "LossBelow 1\n"
    assert [each["rule"] for each in Listener.posted] == ["LossBelow"]
    assert "call:tests.recipes.rules.fail was not told of LossBelow (ValueError: no such number)" in done.err
    batch = load_file(tmp_path / "runs/mine/debugger/batches/step-00000001.safetensors")
    assert batch["png"].shape[0] == 100
    saved = [path.name for path in committed(tmp_path / "runs/mine/checkpoints")]
    assert len(saved) == 2  # what the rule asked for, and the last one


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--debugger.actions", "[stpo]"), "there is no action 'stpo'; did you mean 'stop'"),
        (("--debugger.actions", "[call]"), "action 'call' needs a target, such as call:my_module.tell"),
        (("--debugger.actions", "['call:no.such']"), "names 'no.such', which cannot be imported"),
        (("--debugger.rules", "[tests.recipes.rules.note]"), "which is no @dataclass derived from Rule"),
        (("--debugger.collections", "{a: {include: ['(']}}"), "is no regular expression"),
        (("--debugger.collections", "{a: {inclde: [b]}}"), "collections.a.inclde"),
        (("--debugger.collections", "{a: {include: [nothing]}}", "--debugger.strict", "true"), "a matches no tensor"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_sentence(cli: Cli, words: tuple[str, ...], sentence: str) -> None:
    done = cli(*SMALL, "--debugger.every", "4st", *words, PYTHONPATH=str(ROOT))
    assert done.status == 2, done.err
    assert sentence in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_a_disk_that_fills_ends_the_statistics_and_not_the_training(cli: Cli, small_disk: Path) -> None:
    words = (*SMALL, "--run.folder", str(small_disk), "--debugger.every", "1st", "--checkpoint.every", "0st")
    done = cli(*words, "--debugger.collect", "all", "--debugger.histograms", "true", "--debugger.raw", "[.]")
    assert done.err.count("training goes on without raw tensors") == 1, done.err
    assert "No space left on device" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_told_once(cli: Cli, tmp_path: Path) -> None:
    rules = "tests.recipes.rules.InTheWay"
    words = (*SMALL[:4], "--debugger.every", "1st", "--debugger.rules", rules, "--profiler.trace", "8")
    done = cli(
        *words, "--run.name", "mine", "--debugger.collections", "{a: {include: [nothing]}}", PYTHONPATH=str(ROOT)
    )
    assert done.status == 0, done.err
    assert done.err.count("the debugger cannot write") == 1
    assert done.err.count("training goes on without traces") == 1
    assert "debugger.collections.a matches no tensor" in done.err
    strict = cli(*words, "--run.name", "strict", "--debugger.strict", "true", PYTHONPATH=str(ROOT))
    assert strict.status == 2
    assert "the debugger cannot write traces" in strict.err
    assert "Traceback" not in strict.err
