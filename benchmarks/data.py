"""The data path beside other libraries: samples per second, resume, memory, on the same files in one run.

python -m benchmarks data --peers

Every contestant runs in a process of its own with one thread, the page cache warm; rounds are interleaved, and a ratio
is the median of the ratios within rounds. Without ``--peers`` those take part that the project's environment has.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.data_peers.contest import Contestant, compete
from benchmarks.data_peers.corpus import BUCKET, Corpus, Sizes
from benchmarks.data_peers.environment import install, installed_here, peer_versions
from benchmarks.data_peers.job import Job
from benchmarks.data_peers.rows import Bench, Row, Target, measure, number
from benchmarks.result import Request, store
from dltrain.errors import UserError
from dltrain.testing.faulty_s3 import Faults, FaultyS3

LATENCY, BANDWIDTH = 0.030, 60e6
"""The S3's seconds to the first byte, and bytes per second of one connection."""

SIZES = {True: Sizes(photos=400, small=20_000, small_shards=4, series=100), False: Sizes()}
ROUNDS, SLOW_ROUNDS = {True: 3, False: 7}, {True: 2, False: 5}
SECONDS = {True: 0.3, False: 1.0}
"""By whether it is quick; a pass lasts as long, or one epoch if that takes longer."""

POSITION = 0.735
"""Where a run resumes, of all small samples: 147,000 of 200,000."""

CONVERTED = (
    ("litdata", "photos"),
    ("litdata", "small"),
    ("litdata", "jpeg"),
    ("mosaic", "photos"),
    ("mosaic", "small"),
)
"""Peers that read a form of their own, and of what."""


def run(request: Request) -> dict[str, Any]:
    """Measure all rows and store the result; returns the line that sums it up."""
    if not Path("/proc/self/status").is_file():
        raise UserError("this benchmark reads memory from /proc, which only Linux has; run it there")
    if request.device == "cuda":
        raise UserError("the data benchmark measures the host; leave out --device cuda")
    import torch  # here, so that the command's --help does not wait for it

    corpus = Corpus(request.work, SIZES[request.quick])
    corpus.build()
    python, reasons = install(request.work) if request.peers else installed_here()
    reasons = _convert(corpus, python, reasons)
    sizes = corpus.sizes
    faults = Faults(latency=LATENCY, bandwidth=BANDWIDTH)
    with FaultyS3(buckets=(BUCKET,), folder=corpus.folder, faults=faults) as server:
        bench = Bench(
            corpus=corpus,
            ours=Path(sys.executable),
            peers=python,
            reasons=reasons,
            remote={**server.variables, "S3_ENDPOINT_URL": server.url},
            rounds=ROUNDS[request.quick],
            slow_rounds=SLOW_ROUNDS[request.quick],
            seconds=SECONDS[request.quick],
            position=round(sizes.small * POSITION),
        )
        rows = {name: _shown(row) for name, row in measure(bench)}
    settings = {"peers": request.peers, "threads": 1, "latency": LATENCY, "bandwidth": BANDWIDTH, **asdict(sizes)}
    measured = {"rows": {name: row.to_json() for name, row in rows.items()}, "peers": peer_versions(python)}
    path = store(request, torch.device("cpu"), settings, _without_paths(measured, request.work))
    return {**_summary(rows), "result": path}


class _NotWritten(Exception):
    """Why a peer could not write its form of the corpus."""


def _convert(corpus: Corpus, python: Path, reasons: dict[str, str]) -> dict[str, str]:
    """Have peers write their forms where these are missing; returns the reasons with those of who could not."""
    found = dict(reasons)
    for module, variant in CONVERTED:
        if module not in found and (reason := _write_form(corpus, python, module, variant)):
            found[module] = reason
    return found


def _write_form(corpus: Corpus, python: Path, module: str, variant: str) -> str:
    """Why it failed; nothing if it did not, or was there."""
    what, form = ("photos", f"{module}-jpeg") if variant == "jpeg" else (variant, module)
    source = corpus.path(what, "files" if what == "photos" else "shards")

    def write(folder: Path) -> None:
        job = Job(module, "write", str(folder), "", source=str(source), variant=variant)
        failed = compete([Contestant(module, python, job)], 1, fresh=True).failed
        if failed:
            raise _NotWritten(failed[module])

    try:
        corpus.make(what, form, write)
    except _NotWritten as error:
        return f"cannot write its form of {what}: {error}"
    return ""


def _shown(row: Row) -> Row:
    """Print a row as soon as it is there."""
    ratios = {name: spread["median"] for name, spread in row.to_json()["ratios"].items()}
    print(f"{row.title} ({row.unit})")
    for name, spread in row.to_json()["figures"].items():
        quartiles = f"{number(spread['lower_quartile'])} to {number(spread['upper_quartile'])}"
        ratio = f"  ours is {ratios[name]:.2f} times as good" if name in ratios else ""
        print(f"  {name:32} {number(spread['median']):>10}  ({quartiles}){ratio}")
    for name, reason in row.failed.items():
        print(f"  {name:32} not measured: {reason}")
    for target in row.targets:
        print(f"  target {target.text}: {_verdict(target)}")
    if not row.steady:
        print("  UNSTEADY: the machine was busy with something else, measure again")
    sys.stdout.flush()
    return row


def _verdict(target: Target) -> str:
    if target.found is None:
        return "not measured"
    bound = f"{'at most' if target.at_most else 'at least'} {target.limit:,g}"
    return f"{'met' if target.met else 'MISSED'} ({number(target.found)}, {bound})"


def _summary(rows: dict[str, Row]) -> dict[str, Any]:
    """Every ratio and our own figures, and which targets were missed or could not be judged."""
    stored = {name: row.to_json() for name, row in rows.items()}
    targets = [(name, target) for name, row in rows.items() for target in row.targets]
    return {
        "benchmark": "data",
        "ratios": {
            name: {peer: round(spread["median"], 3) for peer, spread in row["ratios"].items()}
            for name, row in stored.items()
            if row["ratios"]
        },
        "ours": {
            name: row["figures"]["dltrain"]["median"] for name, row in stored.items() if "dltrain" in row["figures"]
        },
        "unsteady": [name for name, row in rows.items() if not row.steady],
        "missed": [
            f"{name}: {target.text} ({number(target.found or 0)})" for name, target in targets if target.met is False
        ],
        "not_measured": [f"{name}: {target.text}" for name, target in targets if target.met is None],
    }


def _without_paths(measured: dict[str, Any], work: Path) -> dict[str, Any]:
    """A peer's message may name a folder of this machine."""
    text = json.dumps(measured)
    for place in (work, Path(sys.prefix), Path(__file__).parent.parent, Path.home()):
        text = text.replace(str(place), "...")
    clean: dict[str, Any] = json.loads(text)
    return clean
