"""Faults that were planted in a training are named by ``dltrain debug show``; a healthy training is left in peace."""

from __future__ import annotations

from pathlib import Path

import pytest

from dltrain.debugger.run import open_run
from tests.conftest import Cli
from tests.recipes.faulty import mislabelled

FAULTY = str(Path(__file__).parent.parent / "recipes" / "faulty.py")
TRAIN = ("train", FAULTY, "--preset", "digits", "--debugger.every", "5st", "--debugger.rules")
RULES = "default,LabelNoise"


def shown(cli: Cli, fault: str, *words: str, rules: str = RULES) -> tuple[str, str]:
    """What ``debug show`` prints of a run with that fault, and the run's folder."""
    done = cli(*TRAIN, rules, "--run.name", fault or "healthy", *words, FAULT=fault)
    assert done.status == 0, done.err
    told = cli("debug", "show", done.result["run"])
    assert told.status == 0, told.err
    return told.out, done.result["run"]


@pytest.mark.slow
def test_a_healthy_training_is_left_in_peace(cli: Cli) -> None:
    assert "0 finding(s)" in shown(cli, "")[0]


@pytest.mark.slow
def test_a_layer_with_another_learning_rate_is_named(cli: Cli) -> None:
    told, _ = shown(cli, "learning_rate", "--run.length", "40st")
    assert "UnevenUpdates at step 5: updates of second.0.weight are" in told
    assert "GreatLoss at step 2: the loss is" in told  # which the recipe brings


@pytest.mark.slow
def test_a_dead_block_is_named(cli: Cli) -> None:
    told, _ = shown(cli, "dead", "--run.length", "20st")
    assert "DeadRelu at step 1: up to 100% of the units of second.1 are dead" in told


@pytest.mark.slow
def test_mislabelled_samples_are_named_by_key(cli: Cli, tmp_path: Path) -> None:
    told, run = shown(cli, "labels")
    assert "LabelNoise at step" in told
    named = {
        key for each in open_run(str(tmp_path / run)).findings() for key in each.where if each.rule == "LabelNoise"
    }
    right = sum(mislabelled(key) for key in named)
    assert right / len(named) > 0.9
    assert right > 0.8 * 144  # about a tenth of 1437
    assert cli(*TRAIN, RULES, "--run.name", "two", "--nproc", "2", FAULT="labels").status == 0
    again = open_run(str(tmp_path / "runs/two")).findings()
    assert {key for each in again for key in each.where} >= set(list(named)[:5])


@pytest.mark.slow
def test_a_slow_rank_is_named(cli: Cli) -> None:
    told, _ = shown(cli, "slow", "--nproc", "2", "--run.length", "40st")
    assert "Straggler at step" in told
    assert "rank 1 takes" in told
    assert "most in forward" in told


@pytest.mark.slow
def test_a_starving_loader_is_named(cli: Cli) -> None:
    told, _ = shown(cli, "starved", "--run.length", "40st")
    assert "DataWait at step" in told


@pytest.mark.slow
def test_replicas_that_drift_apart_are_named(cli: Cli) -> None:
    told, _ = shown(cli, "drift", "--nproc", "2", "--run.length", "20st", rules="ReplicaDivergence")
    assert "ReplicaDivergence at step 10: parameter first.0.weight is not the same on ranks" in told
