"""The rows of the table: who takes part in each, what is measured, and what we aim at."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.data_peers.contest import Contestant, Outcome, compete
from benchmarks.data_peers.corpus import BUCKET, Corpus
from benchmarks.data_peers.crops import SIZE
from benchmarks.data_peers.job import Job
from benchmarks.result import spread, steady

OURS = "dltrain"
EPOCHS = 10
CROP_BYTES = SIZE * SIZE * 3

SHIPPED = {
    "dltrain": "ours",
    "webdataset": "webdataset",
    "litdata": "litdata",
    "mosaicml-streaming": "mosaic",
    "ImageFolder": "folder",
    "s3torchconnector": "s3torchconnector",
}
"""Contestants by their names in the result, and their modules."""

FORMS = {"ours": "shards", "webdataset": "shards", "s3torchconnector": "shards", "folder": "files"}
"""The form of the corpus that a module reads, where it is not one of its own."""


@dataclass(frozen=True)
class Target:
    """Something we aim at: ``found`` is to be at least, or where ``at_most``, at most ``limit``."""

    text: str
    found: float | None
    limit: float
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """``None`` where it was not measured."""
        if self.found is None:
            return None
        return self.found <= self.limit if self.at_most else self.found >= self.limit


@dataclass
class Row:
    """One row of the table. ``figures`` are one number per pass and contestant, in ``unit``; ``ratios`` say how many
    times better ours was in the same round; where a figure is seconds or bytes, less is better."""

    title: str
    unit: str
    figures: dict[str, list[float]]
    passes: dict[str, list[dict[str, Any]]]
    failed: dict[str, str]
    targets: list[Target] = field(default_factory=list)
    less_is_better: bool = False
    comparable: bool = True
    """Whether contestants do the same work, so that a ratio says something."""

    @property
    def ratios(self) -> dict[str, list[float]]:
        if not self.comparable or OURS not in self.figures:
            return {}
        return {name: self.ratio_to([name]) for name in self.figures if name != OURS}

    def ratio_to(self, names: list[str]) -> list[float]:
        """By round, ours against the best of ``names`` in that round; none where nobody of them was measured."""
        measured = [self.figures[name] for name in names if name in self.figures]
        if not measured or OURS not in self.figures:
            return []
        if self.less_is_better:
            return [min(theirs) / ours for ours, *theirs in zip(self.figures[OURS], *measured, strict=True)]
        return [ours / max(theirs) for ours, *theirs in zip(self.figures[OURS], *measured, strict=True)]

    def aim(self, text: str, names: list[str], limit: float) -> None:
        """A target of the ratio to the best of ``names``."""
        ratios = self.ratio_to(names)
        self.targets.append(Target(text, statistics.median(ratios) if ratios else None, limit))

    @property
    def steady(self) -> bool:
        """Whether our rounds were about equal; where not, something else used the machine."""
        return not self.comparable or OURS not in self.figures or steady(self.figures[OURS])

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "unit": self.unit,
            "less_is_better": self.less_is_better,
            "steady": self.steady,
            "figures": {name: _spread(values) for name, values in self.figures.items()},
            "ratios": {name: _spread(values) for name, values in self.ratios.items()},
            "targets": [{**vars(target), "met": target.met} for target in self.targets],
            "failed": self.failed,
            "passes": self.passes,
        }


@dataclass(frozen=True)
class Bench:
    """What all rows share. ``reasons`` say why a peer cannot take part; ``remote`` are the variables of the S3.
    ``slow_rounds`` are for what takes long or needs a new process each time."""

    corpus: Corpus
    ours: Path
    peers: Path
    reasons: Mapping[str, str]
    remote: dict[str, str]
    rounds: int
    slow_rounds: int
    seconds: float
    position: int

    def contestant(
        self, name: str, work: str, what: str, shown: str = "", remote: bool = False, **job: Any
    ) -> Contestant:
        """One of :data:`SHIPPED` at some work, shown under its own name unless told otherwise."""
        module = SHIPPED[name]
        form = "litdata-jpeg" if (module, job.get("decoder")) == ("litdata", "own") else FORMS.get(module, module)
        path = self.corpus.path(what, form)
        url = f"s3://{BUCKET}/{what}/{form}" if remote else str(path)
        shards = tuple(shard.name for shard in sorted(path.glob("*.tar")))
        needs = [module, *(["aws"] if job.get("variant") == "aws" else [])]
        reason = next((self.reasons[need] for need in needs if need in self.reasons), "")
        return Contestant(
            name=shown or name,
            python=self.ours if module == "ours" else self.peers,
            job=Job(module, work, url, "", shards=shards, seconds=self.seconds, **job),
            variables=self.remote if remote else {},
            reason=reason,
        )


def raw_local(bench: Bench) -> Row:
    names = [name for name in SHIPPED if name != "s3torchconnector"]
    contestants = [bench.contestant(name, "samples", "photos") for name in names]
    outcome = compete(contestants, bench.rounds)
    row = _rates("raw members, local, one process, random order", bench, outcome)
    row.aim("12 x webdataset", ["webdataset"], 12)
    row.aim("1.5 x litdata", ["litdata"], 1.5)
    return row


def crops_local(bench: Bench) -> Row:
    """Everyone with what its users get, and everyone with simplejpeg; ours decodes its own way in both."""
    names = [name for name in SHIPPED if name != "s3torchconnector"]
    peers = [name for name in names if name != OURS]
    contestants = [
        *(bench.contestant(name, "samples", "photos", decoder="own") for name in names),
        bench.contestant("litdata", "samples", "photos", "litdata, Pillow", decoder="pillow"),
        *(bench.contestant(name, "samples", "photos", f"{name}, simplejpeg", decoder="simplejpeg") for name in names),
    ]
    outcome = compete(contestants, bench.slow_rounds)
    row = _rates("decoded to 224 px crops, local, one process", bench, outcome)
    shipped, strict = [*peers, "litdata, Pillow"], [f"{name}, simplejpeg" for name in peers]
    row.aim("1.0 x the best peer with what its users get", shipped, 1.0)
    row.aim("1.0 x the best peer with simplejpeg", strict, 1.0)
    row.aim("1.3 x webdataset with what its users get", ["webdataset"], 1.3)
    row.aim("1.3 x webdataset with simplejpeg", ["webdataset, simplejpeg"], 1.3)
    return row


def raw_s3(bench: Bench) -> Row:
    names = [name for name in SHIPPED if name != "ImageFolder"]
    contestants = [bench.contestant(name, "samples", "photos", remote=True) for name in names]
    aws = "webdataset, aws s3 cp"
    contestants.append(bench.contestant("webdataset", "samples", "photos", aws, remote=True, variant="aws"))
    outcome = compete(contestants, bench.rounds)
    row = _rates("raw members, S3 with 30 ms to the first byte and 60 MB/s per connection", bench, outcome)
    row.aim("5 x webdataset with a handler over boto3", ["webdataset"], 5)
    row.aim("5 x webdataset through aws s3 cp", [aws], 5)
    row.aim("ahead of every peer", [one.name for one in contestants if one.name != OURS], 1.0)
    return row


def crops_s3(bench: Bench) -> Row:
    local = f"{OURS}, local"
    contestants = [
        bench.contestant(OURS, "samples", "photos", remote=True, decoder="own"),
        bench.contestant(OURS, "samples", "photos", local, decoder="own"),
        *(
            bench.contestant(name, "samples", "photos", f"{name}, simplejpeg", remote=True, decoder="simplejpeg")
            for name in ("webdataset", "litdata")
        ),
    ]
    row = _rates("decoded to 224 px crops, the same S3", bench, compete(contestants, bench.slow_rounds))
    row.aim("0.9 of our local rate", [local], 0.9)
    return row


def resume(bench: Bench) -> Row:
    names = [OURS, "webdataset", "litdata", "mosaicml-streaming"]
    contestants = [bench.contestant(name, "resume", "small", position=bench.position) for name in names]
    outcome = compete(contestants, bench.slow_rounds, fresh=True)
    title = f"resume after {bench.position:,} samples, two workers, to the first batch"
    row = Row(title, "s", _field(outcome, "seconds"), outcome.passes, outcome.failed, less_is_better=True)
    row.targets.append(_at_most("0.1 s", row.figures.get(OURS), 0.1))
    return row


def plan(bench: Bench) -> Row:
    """Ours of 10^10 samples; that of streaming, which holds every sample's number, of a thousandth of them."""
    job = Job("plans", "ours", "", "")
    theirs = Contestant(
        name="mosaicml-streaming, 10^7 samples",
        python=bench.peers,
        job=replace(job, work="mosaic"),
        reason=bench.reasons.get("mosaic", ""),
    )
    outcome = compete([Contestant(OURS, bench.ours, job), theirs], bench.slow_rounds, fresh=True)
    title = "any position of 10^10 samples in 10,000 shards"
    row = Row(title, "s", _field(outcome, "seconds"), outcome.passes, outcome.failed)
    row.less_is_better, row.comparable = True, False
    megabytes = [answer["bytes"] / 1e6 for answer in outcome.passes.get(OURS, [])]
    row.targets.append(_at_most("20 ms", row.figures.get(OURS), 0.020))
    row.targets.append(_at_most("50 MB above an interpreter with numpy", megabytes, 50))
    return row


def windows(bench: Bench) -> Row:
    by_hand = "numpy memory map"
    contestants = [
        bench.contestant(OURS, "windows", "series", batch=256),
        bench.contestant("ImageFolder", "windows", "series", by_hand, batch=256),
    ]
    outcome = compete(contestants, bench.rounds)
    row = Row("windows of 512 x 8 float32 from long series, local", "windows/s", {}, outcome.passes, outcome.failed)
    row.figures = _rate(outcome)
    found = row.figures.get(OURS)
    row.targets.append(Target("200,000 per second", statistics.median(found) if found else None, 200_000))
    return row


def memory(bench: Bench) -> Row:
    """Resident memory after every epoch. The first one fills what stays; allocators go up and down, a leak only up."""
    names = [name for name in SHIPPED if name != "s3torchconnector"]
    loader = f"{OURS}, loader with crops"
    contestants = [
        *(bench.contestant(name, "memory", "photos", epochs=EPOCHS) for name in names),
        bench.contestant(OURS, "memory", "photos", loader, variant="loader", epochs=EPOCHS),
    ]
    outcome = compete(contestants, 1, fresh=True)
    growth = {
        name: [(min(one["resident"][EPOCHS // 2 :]) - min(one["resident"][1 : EPOCHS // 2])) / 1e6 for one in answers]
        for name, answers in outcome.passes.items()
    }
    title = f"resident memory over {EPOCHS} epochs: the later half's lowest above the earlier half's"
    row = Row(title, "MB", growth, outcome.passes, outcome.failed)
    row.less_is_better, row.comparable = True, False
    for name in (OURS, loader):
        row.targets.append(_at_most(f"flat: at most 5 MB ({name})", growth.get(name), 5))
    return row


ROWS: dict[str, Callable[[Bench], Row]] = {
    "raw_local": raw_local,
    "crops_local": crops_local,
    "raw_s3": raw_s3,
    "crops_s3": crops_s3,
    "resume": resume,
    "plan": plan,
    "windows": windows,
    "memory": memory,
}


def measure(bench: Bench) -> Iterator[tuple[str, Row]]:
    """One row after the other."""
    for name, row in ROWS.items():
        print(f"\nmeasuring {name} ...", flush=True)
        yield name, row(bench)


def number(value: float) -> str:
    """With at least three figures, and without an exponent: 14,517 or 0.0094."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _rates(title: str, bench: Bench, outcome: Outcome) -> Row:
    """Samples per second of those who gave every sample of every epoch, with all its bytes."""
    sizes = bench.corpus.sizes
    whole = {(sizes.photos, bench.corpus.photo_bytes), (sizes.photos, sizes.photos * CROP_BYTES)}
    for name, answers in list(outcome.passes.items()):
        given = {(one["samples"] / one["epochs"], one["bytes"] / one["epochs"]) for one in answers}
        if len(given) != 1 or not given <= whole:
            outcome.drop(name, f"samples and bytes of an epoch were {sorted(given)}, not one of {sorted(whole)}")
    return Row(title, "samples/s", _rate(outcome), outcome.passes, outcome.failed)


def _rate(outcome: Outcome) -> dict[str, list[float]]:
    return {name: [one["samples"] / one["seconds"] for one in answers] for name, answers in outcome.passes.items()}


def _field(outcome: Outcome, name: str) -> dict[str, list[float]]:
    return {contestant: [one[name] for one in answers] for contestant, answers in outcome.passes.items()}


def _spread(values: list[float]) -> dict[str, float]:
    return spread(values if len(values) > 1 else values * 2)


def _at_most(text: str, values: list[float] | None, limit: float) -> Target:
    return Target(text, statistics.median(values) if values else None, limit, at_most=True)
