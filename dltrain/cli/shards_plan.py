"""``dltrain shards plan URL --nodes 16 --epochs 10 ...``: what a training would read, from the manifest alone.

dltrain shards plan s3://bucket/imagenet/train --nodes 16 --ranks-per-node 8 --global-batch-size 4096 --epochs 90
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from math import gcd
from typing import Any

from dltrain import storage
from dltrain.config import Config
from dltrain.data.building.progress import size_text
from dltrain.data.bundled import materialise
from dltrain.data.manifest import NAME, load_manifest
from dltrain.data.planning import Plan, Training, make_plan

Rows = list[tuple[str, str]]


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add ``plan`` to the commands of ``dltrain shards``; :func:`run` takes what it parses."""
    plan = commands.add_parser("plan", help="what a training would download, keep and pay, from the manifest alone")
    data, store = Config().data, Config().storage
    add = plan.add_argument
    add("url", help="the data set")
    add("--nodes", type=int, default=1, help="hosts, each with a cache of its own (default: %(default)s)")
    add("--ranks-per-node", type=int, default=1, help="ranks of a host (default: %(default)s)")
    add("--global-batch-size", type=int, default=data.global_batch_size, help="samples of a step (%(default)s)")
    add("--epochs", type=int, default=1, help="passes over the data (default: %(default)s)")
    add("--window", type=int, default=data.window, help="as data.window (default: %(default)s)")
    add("--lanes", type=int, default=data.lanes, help="as data.lanes (default: %(default)s)")
    add("--seed", type=int, default=0, help="as run.seed (default: %(default)s)")
    add("--cache-gib", type=float, default=0.0, help="GiB of each host's cache; 0 is no limit (the default)")
    add("--ahead-mib", type=int, default=data.ahead_mib, help="as data.ahead_mib (default: %(default)s)")
    add("--part-mib", type=int, default=store.part_mib, help="as storage.part_mib (default: %(default)s)")
    add("--in-flight", type=int, default=store.in_flight, help="as storage.in_flight (default: %(default)s)")
    add(
        "--price-get",
        type=float,
        default=Training.price_get,
        help="USD for 1,000 GETs (default: %(default)s, S3 Standard in us-east-1, https://aws.amazon.com/s3/pricing)",
    )
    add("--price-transfer", type=float, default=0.0, help="USD for a GB to the hosts (default: 0, as within a region)")
    add(
        "--mbps",
        type=float,
        default=Training.megabits,
        help="megabits per second a host gets from the store (default: %(default)s)",
    )


def run(known: argparse.Namespace) -> None:
    """Print the plan: a table for people, and for programs one JSON object in the last line."""
    url = materialise(known.url)
    manifest, training = load_manifest(url), _training(known)
    plan = make_plan(manifest, training, storage.size(storage.join(url, NAME)))
    _show(_tables(plan, training))
    for note in _notes(plan, training, storage.is_remote(manifest.shard_url(0))):
        print(note)
    print(json.dumps({"url": known.url, "shards": len(manifest.shards), **plan.as_json()}))


def _training(known: argparse.Namespace) -> Training:
    given = {field.name: getattr(known, field.name) for field in fields(Training) if hasattr(known, field.name)}
    return Training(
        **given,
        cache_bytes=int(known.cache_gib * (1 << 30)),
        part_bytes=known.part_mib << 20,
        ahead_bytes=known.ahead_mib << 20,
        megabits=known.mbps,
    )


def _tables(plan: Plan, training: Training) -> dict[str, Rows]:
    by_epoch = [f"{times:.2f}" for times in plan.times_dataset_by_epoch]
    shown = ", ".join(by_epoch[:6]) + (", ..." if len(by_epoch) > 6 else "")
    return {
        f"epochs {training.epochs}, hosts {training.nodes}, ranks of each {training.ranks_per_node}": [
            ("samples in an epoch", f"{plan.samples_per_epoch:,}"),
            ("steps in an epoch; in all", f"{plan.steps_per_epoch:,}; {plan.steps:,}"),
            ("data set", size_text(plan.dataset_bytes)),
        ],
        "downloads": [
            ("each host", size_text(plan.downloaded_bytes_per_node)),
            ("all hosts", f"{size_text(plan.downloaded_bytes)}, {plan.times_dataset:.2f} x the data set"),
            ("by epoch, x the data set", shown),
            ("GET requests", f"{plan.get_requests:,}"),
            ("requests and transfer", f"{plan.cost:,.4f} USD"),
        ],
        "cache of a host": [
            ("smaller is refused", size_text(plan.cache_required_bytes)),
            ("no shard twice in an epoch", size_text(plan.cache_once_bytes)),
            ("no shard twice at all", size_text(plan.cache_all_bytes)),
        ],
        "shuffling": [
            ("shards in a lane's window", f"{plan.shards_per_window_mean:.1f}, at most {plan.shards_per_window_max}"),
            ("shards mixed over all lanes", f"{plan.shards_mixed_mean:.1f}, at most {plan.shards_mixed_max}"),
            ("neighbours end up apart by", f"{plan.neighbour_distance_mean:,.0f} samples in the mean"),
            ("of a full shuffle's distance", f"{plan.neighbour_distance_of_full_shuffle:.2%}"),
        ],
        f"start at {training.megabits:,.0f} Mbit/s, and memory": [
            ("first batch", f"{plan.first_batch_seconds:.1f} s at best"),
            ("first window on disk", f"{plan.first_window_seconds:.1f} s at best"),
            ("lists and indexes of a process", size_text(plan.memory_bytes_per_process)),
            ("a rank's batch, as stored", size_text(plan.batch_bytes_per_rank)),
        ],
    }


def _notes(plan: Plan, training: Training, remote: bool) -> list[str]:
    sharing = training.nodes // gcd(training.nodes, training.lanes)
    notes = [] if remote else ["note: these shards lie on this host and are read here; the plan is for them on S3"]
    if sharing > 1:
        notes.append(
            f"note: {sharing} hosts read each lane, so each shard is downloaded {sharing} times; make lanes "
            f"{training.nodes} or a multiple of it, so that every host has lanes of its own"
        )
    if 0 < training.cache_bytes < plan.cache_once_bytes:
        notes.append("note: in this cache some shards are downloaded twice in an epoch")
    return notes


def _show(tables: dict[str, Rows]) -> None:
    if not sys.stdout.isatty():
        for title, rows in tables.items():
            print(f"{title}:")
            for name, value in rows:
                print(f"  {name:30} {value}")
        return
    from rich.console import Console  # slow to import, and of no use without a terminal
    from rich.table import Table

    table = Table(show_header=False, min_width=72)
    table.add_column(style="cyan")
    table.add_column()
    for title, rows in tables.items():
        table.add_row(f"[bold]{title}")
        for row in rows:
            table.add_row(*row)
        table.add_section()
    Console().print(table)
