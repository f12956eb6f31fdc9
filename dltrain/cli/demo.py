"""``dltrain demo``: the main job. Shards of real digit scans, a local S3 endpoint, two ranks that stream from it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence

from dltrain import storage
from dltrain.cli.main import Parser
from dltrain.data.bundled import build
from dltrain.testing.s3 import S3Server

BUCKET = "dltrain-demo"


def run(arguments: Sequence[str]) -> int:
    """Build, serve, train, and end with a table and one JSON line."""
    parser = Parser(prog="dltrain demo", description=__doc__)
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    known, settings = parser.parse_known_args(arguments)
    started = time.monotonic()
    with S3Server(BUCKET) as server:
        url = f"s3://{BUCKET}/digits"
        train, held_out = build("digits", url)
        shards = [name for name in storage.listing(url) if name.endswith(".tar")]
        print(f"{len(shards)} shards of scikit-learn's digits are at {url}, served by {server.url}", flush=True)
        command = [sys.executable, "-m", "dltrain", "train", "image/classify", "--preset", "digits"]
        command += ["--nproc", str(known.nproc), "--data.train", train, "--data.evaluation", held_out, *settings]
        print("running: dltrain " + " ".join(command[3:]), flush=True)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        output = process.communicate()[0]
    if process.returncode or not output.strip():
        return process.returncode or 1
    result = json.loads(output.splitlines()[-1])
    _table(result, time.monotonic() - started)
    return 0


def _table(result: dict[str, float | str], seconds: float) -> None:
    rows = {
        "accuracy on the held-out scans": f"{result['accuracy']:.4f}",
        "seconds, shards and S3 included": f"{seconds:.1f}",
        "training samples/s": f"{result['samples_per_second']:,.0f}",
        "run": str(result["run"]),
        "report": f"{result['run']}/report/evaluation.html",
        "look at it": f"tensorboard --logdir {result['run']}/tensorboard",
    }
    print()
    for name, value in rows.items():
        print(f"  {name:32} {value}")
    keys = ("accuracy", "samples_per_second", "run")
    print(json.dumps({**{key: result[key] for key in keys}, "seconds": round(seconds, 1)}), flush=True)
