"""The benchmarks run, store what they measured, and make their page from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks import data_report
from benchmarks.data_peers.contest import Contestant, compete
from benchmarks.data_peers.corpus import Corpus, Sizes, make_photo
from benchmarks.data_peers.crops import AREA, RATIO, SIZE, crop_by_simplejpeg, random_box
from benchmarks.data_peers.job import Job
from benchmarks.data_peers.rows import OURS, Row, Target
from benchmarks.result import Request
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


def test_peers_belong_to_the_data_benchmark_alone() -> None:
    done = benchmark("throughput", "--peers")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--peers" in done.stderr


@pytest.mark.slow
def test_smdebug_is_measured_in_an_environment_of_its_own() -> None:
    for words, sentence in (
        (("smdebug", "--peer-python", "no-such-python"), "there is no interpreter 'no-such-python' with smdebug"),
        (("smdebug", "--quick", "--peer-python", sys.executable), "smdebug does not run there: ModuleNotFoundError"),
        (("debugger", "--peer-python", sys.executable), "--peer-python belongs to the benchmark 'smdebug'"),
    ):
        done = benchmark(*words)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert sentence in done.stderr


def test_the_command_repeats_what_was_measured() -> None:
    assert Request("data", quick=True, peers=True).command == "python -m benchmarks data --quick --peers"
    assert Request("smdebug", peer_python="/x/python").command == "python -m benchmarks smdebug --peer-python PYTHON"
    assert Request("data", work=Path("elsewhere")).command == "python -m benchmarks data"


TINY = Sizes(photos=6, shards=2, small=40, small_shards=2, series=2, steps=20, channels=2)


def test_the_corpus_is_the_same_every_time_and_whole_or_absent(tmp_path: Path) -> None:
    corpora = [Corpus(tmp_path / name, TINY) for name in "ab"]
    for corpus in corpora:
        corpus.build()
    tars = [sorted(corpus.path("photos", "shards").glob("*.tar")) for corpus in corpora]
    assert len(tars[0]) == TINY.shards
    assert [path.read_bytes() for path in tars[0]] == [path.read_bytes() for path in tars[1]]
    with tarfile.open(tars[0][0]) as tar:
        assert [Path(name).suffix for name in tar.getnames()] == [".jpg", ".cls"] * 3
    with pytest.raises(ZeroDivisionError):
        corpora[0].make("photos", "peer", lambda folder: 1 / 0)
    assert not corpora[0].path("photos", "peer").exists()


def test_a_photograph_is_as_large_as_one() -> None:
    sizes = [len(make_photo((Sizes(), number))) for number in range(12)]
    assert 60_000 < sum(sizes) / len(sizes) < 90_000
    assert max(sizes) > 1.3 * min(sizes)


def test_a_crop_has_its_area_and_ratio() -> None:
    random = Random(0)
    for _ in range(200):
        left, upper, right, lower = random_box(500, 375, random)
        assert 0 <= left < right <= 500
        assert 0 <= upper < lower <= 375
        width, height = right - left, lower - upper
        assert AREA[0] * 0.98 < width * height / (500 * 375) <= AREA[1]
        assert RATIO[0] * 0.98 < width / height < RATIO[1] * 1.02
    assert crop_by_simplejpeg(make_photo((Sizes(), 0)), random).shape == (SIZE, SIZE, 3)


def test_who_fails_is_named_with_the_reason_and_the_others_go_on() -> None:
    python = Path(sys.executable)
    contestants = [
        Contestant("dltrain", python, Job("plans", "ours", "", "")),
        Contestant("nobody", python, Job("nobody", "samples", "", "")),
        Contestant("dead", Path("/bin/false"), Job("plans", "ours", "", "")),
        Contestant("absent", python, Job("plans", "ours", "", ""), reason="not installed"),
    ]
    outcome = compete(contestants, 2, fresh=True)
    assert [answer["samples"] for answer in outcome.passes["dltrain"]] == [10**10, 10**10]
    assert outcome.passes.keys() == {"dltrain"}
    assert "No module named 'benchmarks.data_peers.nobody'" in outcome.failed["nobody"]
    assert outcome.failed["dead"] == "ended with status 1"
    assert outcome.failed["absent"] == "not installed"


def a_row(**changes: Any) -> Row:
    figures = {OURS: [10.0, 20.0, 30.0], "a": [5.0, 5.0, 5.0], "b": [2.0, 40.0, 3.0]}
    return Row(**{"title": "reading", "unit": "samples/s", "figures": figures, "passes": {}, "failed": {}, **changes})


def test_a_ratio_is_of_the_same_round_and_to_the_best_of_many() -> None:
    row = a_row()
    assert row.ratios == {"a": [2, 4, 6], "b": [5, 0.5, 10]}
    assert row.ratio_to(["a", "b", "not measured"]) == [2, 0.5, 6]
    assert row.ratio_to(["not measured"]) == []
    assert a_row(less_is_better=True).ratios["a"] == [0.5, 0.25, 5 / 30]
    row.aim("twice everyone", ["a", "b"], 2.0)
    row.aim("as good as nobody", ["not measured"], 1.0)
    assert [(target.found, target.met) for target in row.targets] == [(2.0, True), (None, None)]


def test_the_page_shows_what_was_missed_and_who_was_not_measured(tmp_path: Path) -> None:
    targets = [Target("2 x a", 1.5, 2.0), Target("0.1 s", 0.05, 0.1, at_most=True), Target("3 x c", None, 3.0)]
    row = a_row(targets=targets, failed={"c": "does not install"}).to_json()
    result = {"rows": {"raw_local": row}, "peers": {"a": "1.0", "c": None}, "command": "python -m benchmarks data"}
    page = data_report.section("data-x.json", result, ("a machine", "2.13", "[today](data-x.json)"))
    assert "| reading | 2 x a | 1.5 | **missed** |" in page
    assert "|  | 0.1 s | 0.05 | met |" in page
    assert "|  | 3 x c |  | not measured |" in page
    assert "|  | a | 5 (5 to 5) | 4 (3 to 5) |" in page
    assert "c: does not install" in page
    assert "beside a 1.0." in page
    pictures = [tmp_path / str(number) / data_report.picture("data-x.json") for number in range(2)]
    for picture in pictures:
        picture.parent.mkdir()
        data_report.draw(result, picture)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert b"<svg" in pictures[0].read_bytes()


@pytest.mark.slow
def test_the_data_benchmark_measures_without_peers_and_stores(tmp_path: Path) -> None:
    done = benchmark("data", "--quick", "--work", str(tmp_path / "work"), "--output", str(tmp_path))
    result = json.loads(done.stdout.splitlines()[-1])
    rows = json.loads(next(tmp_path.glob("data-*-quick-*.json")).read_text())["rows"]
    assert rows.keys() == {"raw_local", "raw_s3", "crops_local", "crops_s3", "resume", "plan", "windows", "memory"}
    assert all(OURS in row["figures"] for row in rows.values())
    assert result["ratios"]["raw_local"]["webdataset"] > 1 / SLOWNESS
    assert "litdata" in rows["raw_local"]["failed"]


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
