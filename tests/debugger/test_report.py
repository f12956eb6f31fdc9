"""The report of a run is one page that holds what there is of it, says it in words, and fetches nothing."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dltrain import storage
from dltrain.debugger.layers import Layers, blocks_of, layers_of
from dltrain.debugger.reductions import reduce
from dltrain.debugger.report.drawing import on_a_grid, thinned
from dltrain.debugger.report.facts import ended, watching
from dltrain.debugger.report.verdict import verdict
from dltrain.debugger.report.writing import report, write_report
from dltrain.debugger.rules.catalogue import DEFAULT
from dltrain.debugger.run import open_run
from dltrain.debugger.severity import by_gravity, grouped
from dltrain.errors import UserError
from dltrain.run_folder import RunFolder
from dltrain.testing.s3 import S3Server
from tests.conftest import TINY, Cli
from tests.debugger.recorded import finding, parameters, recorded

VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """What a browser would make of it: tags that are closed, headings, links, pictures and words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.ids: set[str] = set()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.figures = self.captions = 0
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag not in VOID:
            self.open.append(tag)
        self.ids.add(given.get("id", ""))
        self.figures += tag == "svg"
        self.captions += tag == "figcaption"
        for name in ("src", "href", "xlink:href", "data", "srcset"):
            target = given.get(name, "")
            (self.links if target.startswith("#") else self.fetched).append(target)
        assert tag not in ("script", "link", "iframe")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)
        if self.open and self.open[-1] != "style":
            self.words += data


def read(text: str) -> Page:
    """A page that is whole: all tags closed, nothing fetched, all links go somewhere, and every plot is explained."""
    page = Page(text)
    assert not page.open
    assert all(target == "" or target.startswith("data:image/png;base64,") for target in page.fetched)
    assert "@import" not in text
    assert "url(http" not in text
    assert {link[1:] for link in page.links} <= page.ids
    assert page.figures == page.captions
    return page


def test_a_page_holds_all_that_there_is(tmp_path: Path) -> None:
    findings = (finding(5), finding(7), finding(9, "DataWait"))
    path = recorded(tmp_path, steps=40, ranks=2, gpus=2, findings=findings)
    page = read(report(open_run(str(path))))
    wanted = ["What was trained", "Findings", "How it learnt", "Gradients", "Updates beside weights"]
    wanted += ["Units that do nothing", "Weights", "Activations", "How values are spread", "Where the time went"]
    wanted += ["The machine", "Classes", "Samples that are not learnt"]
    assert [heading for heading in page.headings if heading in wanted] == wanted
    assert "3 findings of 2 rules, of which the gravest: VanishingGradient at step 5" in page.words
    assert "something <b>odd</b> at 5" in page.words
    assert "once more, at step 7" in page.words
    assert "The run finished after 40 steps in 12 s. Held-out scores at its end: loss 0.3." in page.words
    assert "optim.learning_rate" in page.words
    assert "Rank by rank" in page.headings
    assert "GPU 1" in page.words
    assert "model FLOPs utilisation (MFU), of the devices' peak41.2%" in page.words
    assert "s0" in page.words


def test_what_there_is_nothing_of_is_left_out(tmp_path: Path) -> None:
    path = recorded(tmp_path, steps=10)
    for name in ("observations.jsonl", "histograms.z"):
        (path / "debugger" / name).unlink()
    for name in ("metrics.jsonl", "run.json"):
        (path / name).unlink()
    text = report(open_run(str(path)))
    assert report(open_run(str(path))) == text  # drawn alike each time
    page = read(text)
    assert "Nothing was found by any rule; none watched." in page.words
    for heading in ("What was trained", "Findings", "How values are spread", "Where the time went", "The machine"):
        assert heading not in page.headings
    assert "Gradients" in page.headings


def test_the_verdict_names_who_watched_or_the_gravest_and_the_first() -> None:
    watched = watching({"config": {"debugger": {"rules": ["default", "own.module.Mine:most=3"]}}})
    assert watched == [*(rule.partition(":")[0] for rule in DEFAULT), "Mine"]
    assert verdict([], ["LossSpike", "Mine"]) == "Nothing was found by the 2 rules that watched: LossSpike, Mine."
    told = verdict(grouped([finding(3, "DataWait"), finding(8, "ExplodingTensor")]), watched)
    assert told.startswith(
        "2 findings of 2 rules, of which the gravest: ExplodingTensor at step 8 (the training itself"
    )
    assert told.endswith("The first that was heard of was DataWait, at step 3.")
    assert verdict(grouped([finding(3)]), watched).startswith("1 finding: VanishingGradient at step 3")


def test_a_run_that_goes_on_says_how_far_it_is(tmp_path: Path) -> None:
    path = recorded(tmp_path, steps=10)
    run = open_run(str(path))
    record = {**run.record(), "status": "running", "scores": {}}
    told = ended(run, record)
    assert told.startswith("It died, or was killed: the last step seen is 10, ")
    assert told.endswith("Held-out scores so far: loss 2.512.")
    with RunFolder(path).claim():
        assert ended(run, record).startswith("It is still going on: the last step seen is 10, ")


def test_hundreds_of_layers_are_shown_by_blocks_and_the_page_stays_small(tmp_path: Path) -> None:
    path = recorded(tmp_path, blocks=96, steps=60, ranks=64, findings=tuple(map(finding, range(1, 60))))
    text = report(open_run(str(path)))
    page = read(text)
    assert len(text) < 3_000_000
    assert "482 tensors are shown by blocks, in 34 rows" in page.words
    assert "layers.3 to 5" in page.words
    assert "95 of 96 layers, which have fewer of them, are left out" in page.words
    assert page.words.count("and 28 more") == 1  # of 58 later findings


@pytest.mark.parametrize(
    ("blocks", "rows"), [(2, 12), (6, 32), (8, 26), (96, 34)], ids=["tensors", "still", "parts of blocks", "several"]
)
def test_blocks_are_as_fine_as_there_is_room_for(blocks: int, rows: int) -> None:
    names = parameters(blocks)
    found = blocks_of(names, 40)
    assert len(found) == len(names)
    assert len(set(found)) == rows
    assert (found == names) == (rows == len(names))


@pytest.mark.parametrize("most", [1, 3, 7])
def test_names_without_parts_are_put_together_by_neighbourhood(most: int) -> None:
    names = [f"p{place}" for place in range(20)]
    assert len(set(blocks_of(names, most))) <= most
    assert blocks_of([], most) == []


def test_a_block_is_as_if_it_were_one_tensor() -> None:
    random = np.random.default_rng(0)
    tensors = [random.standard_normal(count) for count in (5, 50, 500)]
    rows = np.array([[_row(each)] for each in tensors])
    whole = Layers(["a.x", "a.y", "a.z"], np.array([1]), rows).grouped(1)
    assert whole.names == ["a"]
    for name in ("mean", "std", "abs_mean", "min", "max", "abs_min", "l2"):
        expected = reduce(name, _row(np.concatenate(tensors)))
        np.testing.assert_allclose(whole.reduced(name)[0, 0], expected, rtol=1e-12)


def _row(values: Any) -> Any:
    sums = [len(values), values.sum(), (values**2).sum(), np.abs(values).sum(), 0, 0]
    return np.array([*sums, values.max(), -values.min(), -np.abs(values).min()])


def test_a_cell_of_a_heat_map_is_what_was_seen_last(tmp_path: Path) -> None:
    values = np.ma.array([[1.0, 2.0, 3.0], [5.0, 0.0, 7.0]], mask=[[False] * 3, [False, True, False]])
    (first, last), grid = on_a_grid([1, 3, 5], values)
    assert (first, last) == (1, 5)
    assert grid.tolist() == [[1, 1, 2, 2, 3], [5, 5, 5, 5, 7]]


def test_thinned_lines_keep_what_is_least_largest_and_not_finite() -> None:
    values = np.sin(np.arange(10_000.0))
    values[7000] = np.nan
    steps, mean, low, high = thinned(np.arange(10_000.0), values, 100)
    assert len(steps) == len(mean) == 100
    assert np.isnan(mean).sum() == 1
    assert np.nanmin(low) < -0.999
    assert np.nanmax(high) > 0.999


def test_tensors_that_are_due_at_their_own_steps_are_masked_elsewhere(tmp_path: Path) -> None:
    layers = layers_of(open_run(str(recorded(tmp_path, steps=10))).segments(), "gradients")
    assert layers.names == parameters(2)
    assert layers.steps.tolist() == [1, 5, 10]
    layers.moments[0, 1] = 0
    assert np.ma.getmaskarray(layers.reduced("mean")).sum() == 1


def test_the_gravest_comes_first_and_the_newest_last() -> None:
    groups = grouped([finding(3, "DataWait"), finding(4), finding(5, "Own"), finding(9, "DataWait")])
    assert [group.rule for group in groups] == ["VanishingGradient", "Own", "DataWait"]
    assert [group.rule for group in by_gravity(groups)] == ["VanishingGradient", "Own", "DataWait"]
    assert [group.level for group in by_gravity(groups)] == ["broken", "learning", "cost"]


def test_a_run_on_s3_is_read_and_its_report_written_there(tmp_path: Path, s3: S3Server) -> None:
    path = recorded(tmp_path, steps=10)
    for file in filter(Path.is_file, path.rglob("*")):
        storage.upload(file, f"s3://data/report/{file.relative_to(path)}")
    assert write_report("s3://data/report") == "s3://data/report/debugger/report.html"
    page = read(bytes(storage.read("s3://data/report/debugger/report.html")).decode())
    assert "Gradients" in page.headings


def test_mistakes_are_one_sentence(cli: Cli, tmp_path: Path) -> None:
    path = recorded(tmp_path / "runs/mine", steps=1)
    (path / "debugger/observations.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot write /proc/nowhere/x\.html"):
        write_report(str(path), "/proc/nowhere/x.html")
    shutil.rmtree(path / "debugger")
    with pytest.raises(UserError, match=r"debugger/statistics has no statistics; train with --debugger\.every"):
        write_report(str(path))
    done = cli("debug", "report", "mime")
    assert done.status == 2
    assert done.err == "dltrain: error: there is no run 'mime' here or in runs; did you mean 'mine'?\n"


WILD = ("--optim.learning_rate", "1e9", "--optim.max_norm", "0", "--run.nonfinite", "skip", "--debugger.every", "2st")


@pytest.mark.slow
def test_a_training_that_goes_wrong_has_a_report(cli: Cli, tmp_path: Path) -> None:
    done = cli("train", TINY, "--preset", "small", *WILD, "--debugger.histograms", "true", "--nproc", "2")
    assert done.status == 0, done.err
    made = cli("debug", "report", done.result["run"], "--output", "here.html")
    assert made.status == 0, made.err
    assert made.out == "here.html\n"
    page = read((tmp_path / "here.html").read_text())
    assert "the training itself is broken" in page.words
    assert "not finite" in page.words
    assert "Rank by rank" in page.headings
