"""Scoring the held-out samples, each exactly once on any number of ranks, and the report of it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dltrain import storage
from dltrain.data.batch import Batch
from dltrain.data.loader import Loader
from dltrain.errors import UserError
from dltrain.metrics.base import Metric, reduce_sums, worst
from dltrain.parallel.engine import Engine
from dltrain.runtime.environment import Environment
from dltrain.runtime.process_group import on_the_host
from dltrain.task import Task

STOP_EVERY = 8
"""Batches of an evaluation between which ranks agree on whether to break it off: the same on all of them."""


class BrokenOff(Exception):
    """An evaluation that is not to be finished."""


def evaluate(
    engine: Engine,
    task: Task,
    loader: Loader,
    watch: Callable[[Batch, Any, Tensor], object] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Metric:
    """One pass over the loader's epoch with the averaged weights, where an average is kept; collective. Returns the
    metric, its sums reduced over all ranks. Who wants to ``watch`` is given each batch with its predictions and losses.
    Where any rank's ``stop`` says so, all raise :class:`BrokenOff`.

    The padded tail keeps ranks in step and counts for nothing. Raises :class:`UserError` when the samples counted are
    not those of the data set.
    """
    metric = task.metrics()
    loader.position = 0
    with engine.averaged():
        for place, batch in enumerate(loader):
            if stop is not None and place % STOP_EVERY == 0 and _any_rank(stop()):
                raise BrokenOff
            outputs, losses = engine.evaluate(batch)
            if engine.counts:
                metric.update(outputs, losses, batch)
                if watch is not None:
                    watch(batch, outputs, losses)
    reduce_sums(metric)
    counted = metric.compute().get("samples", loader.samples)
    if round(counted) != loader.samples:
        raise UserError(f"the evaluation counted {counted:.0f} samples of {loader.samples}: its metric is at fault")
    return metric


def _any_rank(stops: bool) -> bool:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return stops
    found = torch.tensor(int(stops), device=on_the_host())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def write_report(metric: Metric, folder: Path, facts: dict[str, Any], environment: Environment) -> Path:
    """Write ``evaluation.json``, ``evaluation.html`` (one file, pictures inside) and the pictures; collective."""
    examples = _gather_examples(metric)
    target = folder / "evaluation.json"
    if environment.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        details, pictures = metric.report(folder, examples)
        record = {**facts, "scores": metric.compute(), **details}
        storage.write(str(target), (json.dumps(record, indent=1) + "\n").encode())
        storage.write(str(folder / "evaluation.html"), _page(facts, metric.compute(), details, pictures).encode())
    return target


def _gather_examples(metric: Metric) -> list[dict[str, Any]]:
    mine = metric.examples()
    if not dist.is_initialized():
        return mine
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return worst([example for part in parts for example in part], max(map(len, parts)))


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
td:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums } th { text-align: left }
img { max-width: 100% }
"""


def _page(
    facts: dict[str, Any], scores: dict[str, float], details: dict[str, Any], pictures: list[tuple[str, Path]]
) -> str:
    parts = [f"<h1>Evaluation of {html.escape(str(facts.get('run', '')))}</h1>", _table(facts), "<h2>Scores</h2>"]
    parts.append(_table({name: f"{value:.6g}" for name, value in scores.items()}))
    for title, path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        )
    if details.get("classes"):
        parts.append("<h2>Classes</h2>" + _classes(details["classes"]))
    if details.get("mistakes"):
        rows = [{key: _short(value) for key, value in mistake.items()} for mistake in details["mistakes"]]
        parts.append("<h2>Samples of greatest loss</h2>" + _rows(rows))
    body = "\n".join(parts)
    return f'<!doctype html><meta charset="utf-8"><title>Evaluation</title><style>{_STYLE}</style>\n{body}\n'


def _table(values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in values.items())
    return f"<table>{rows}</table>"


def _classes(classes: dict[str, dict[str, float]]) -> str:
    return _rows([{"class": name, **{k: _short(v) for k, v in row.items()}} for name, row in classes.items()])


def _rows(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
