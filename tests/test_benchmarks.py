"""The benchmarks run, store what they measured, and make their page from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SLOWNESS = float(os.environ.get("DLTRAIN_TEST_SLOWNESS", "2"))


def benchmark(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks", *words], cwd=ROOT, capture_output=True, text=True)


def test_the_stored_results_have_what_makes_them_worth_something() -> None:
    results = sorted((ROOT / "benchmarks/results").glob("*.json"))
    assert {path.name.partition("-")[0] for path in results} >= {"throughput", "trainer_overhead"}
    for path in results:
        stored = json.loads(path.read_text())
        assert {"command", "hardware", "versions", "settings"} <= stored.keys()
        assert path.name in (ROOT / "benchmarks/results/README.md").read_text()


def test_an_unknown_benchmark_is_one_sentence() -> None:
    done = benchmark("througput")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "throughput" in done.stderr


@pytest.mark.slow
def test_the_trainer_adds_less_than_150_microseconds(tmp_path: Path) -> None:
    done = benchmark("trainer_overhead", "--quick", "--output", str(tmp_path))
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["microseconds_added"] < 150 * SLOWNESS
    assert list(tmp_path.glob("trainer_overhead-*.json"))


@pytest.mark.slow
def test_throughput_is_that_of_a_bare_loop(tmp_path: Path) -> None:
    done = benchmark("throughput", "--quick", "--output", str(tmp_path))
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"resnet18", "vit_b_16"} <= result.keys()
    assert result["ratio"] > 1 - 0.1 * SLOWNESS
