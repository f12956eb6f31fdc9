"""What was trained and how it ended, from ``run.json``, in words and tables."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dltrain import storage
from dltrain.config import Config, flattened
from dltrain.debugger.report.page import Section, folded, pairs, table, words
from dltrain.debugger.rules.catalogue import names_of
from dltrain.debugger.run import SavedRun
from dltrain.run_folder import RunFolder

_SHOWN_ELSEWHERE = ("run.name", "run.folder", "data.train", "data.evaluation")


def watching(record: Mapping[str, Any]) -> list[str]:
    """Names of the rules that watched, as the config says."""
    return names_of(record.get("config", {}).get("debugger", {}).get("rules", ()))


def ended(run: SavedRun, record: Mapping[str, Any]) -> str:
    """How the run ended, or how far it is, with its scores: a sentence or two."""
    steps, times = run.scalars("time")
    last = int(steps[-1]) if len(steps) else 0
    status = record.get("status", "")
    if status == "running":
        ago = time.time() - float(times[-1]) if len(times) else 0.0
        held = _is_held(run)
        state = "It is still going on" if held or (held is None and ago < 600) else "It died, or was killed"
        return f"{state}: the last step seen is {last}, {_lasting(ago)} ago. {_scores(run, record)}".strip()
    words = f"The run {status}" if status in ("finished", "failed", "stopped") else "The run ended"
    spent = f" in {_lasting(float(record['seconds']))}" if record.get("seconds") else ""
    return f"{words} after {last} steps{spent}. {_scores(run, record)}".strip()


def subtitle(run: SavedRun, record: Mapping[str, Any]) -> str:
    """The recipe and when it was started, in a line."""
    ranks = record.get("world_size", 1)
    parts = [_recipe(record), f"{ranks} ranks" if ranks > 1 else "", _started(record), run.url]
    return " · ".join(filter(None, parts))


def _recipe(record: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (record.get("recipe"), record.get("preset"))))


def _started(record: Mapping[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["created"])) if "created" in record else ""


def what_was_trained(run: SavedRun, record: Mapping[str, Any]) -> Section:
    """Recipe, data, ranks and versions, and the settings that somebody chose."""
    config = record.get("config", {})
    parts = [pairs(_summary(run, record, config))] if record else []
    changed = _changed(config)
    if changed:
        note = "Settings of the model are its recipe's, all of them; of the others those are shown that differ."
        settings = words(note, "muted") + table(("setting", "value", "default"), changed, numbers=False)
        parts.append(folded(f"settings that somebody chose ({len(changed)})", settings))
    scores = {name: f"{value:.6g}" for name, value in (record.get("scores") or {}).items() if value is not None}
    if scores:
        parts.append(folded("all final scores", pairs(scores)))
    return Section("What was trained", parts)


def _summary(run: SavedRun, record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    data, versions = config.get("data", {}), record.get("versions", {})
    sources = ", ".join(str(each.get("url", "")) for each in data.get("sources", ()))
    hardware = record.get("hardware", {})
    rate = record.get("samples_per_second")
    due = run.steps()
    return {
        "recipe": _recipe(record),
        "started": _started(record),
        "training data": data.get("train") or sources,
        "held-out data": data.get("evaluation"),
        "classes": ", ".join(map(str, record.get("facts", {}).get("classes", ())))[:300],
        "samples in a step": data.get("global_batch_size"),
        "ranks": record.get("world_size"),
        "speed": f"{rate:,.0f} samples/s" if rate else "",
        "machine": f"{hardware.get('processor', '')}, {hardware.get('cores', '')} cores" if hardware else "",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "source": record.get("git"),
        "statistics of": f"{len(due)} steps, {due[0]} to {due[-1]}" if due else "",
    }


def _changed(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    usual = flattened(Config().model_dump(mode="json"))
    found = []
    for name, value in flattened(config).items():
        if name in _SHOWN_ELSEWHERE or (name in usual and usual[name] == value):
            continue
        found.append((name, _text(value), _text(usual[name]) if name in usual else ""))
    return found


def _scores(run: SavedRun, record: Mapping[str, Any]) -> str:
    scores = record.get("scores") or {}
    at_end = bool(scores)
    evaluations = run.evaluations()
    if not at_end and evaluations:
        scores = {key.removeprefix("evaluation/"): value for key, value in evaluations[-1].items() if "/" in key}
    metric = record.get("config", {}).get("evaluation", {}).get("metric", "loss")
    chosen = [name for name in dict.fromkeys((metric, "loss")) if isinstance(scores.get(name), (int, float))]
    if not chosen:
        return ""
    when = "at its end" if at_end else "so far"
    return f"Held-out scores {when}: " + ", ".join(f"{name} {scores[name]:.4g}" for name in chosen) + "."


def _is_held(run: SavedRun) -> bool | None:
    """Whether a process of this host trains it; ``None`` where it lies elsewhere."""
    path = storage.local_path(storage.join(run.url, "run.json"))
    return RunFolder(path.parent).is_held if path is not None else None


def _lasting(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return "none" if value in ("", None) else f"{value:g}" if isinstance(value, float) else str(value)
