"""The data benchmark's part of the results page: its targets, its figures, and a picture of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.data_peers.rows import OURS, number

PANELS = ("raw_local", "raw_s3", "crops_local", "crops_s3", "windows", "resume")
"""Rows of the table that the picture shows."""

WIDTH = 46
"""Characters of a panel's title; longer ones are broken."""


def section(name: str, result: dict[str, Any], origin: tuple[str, str, str]) -> str:
    """Targets, picture and figures of one stored result; ``origin`` is its hardware, torch and link."""
    machine, torch, link = origin
    rows = result["rows"].values()
    peers = ", ".join(f"{peer} {version}" for peer, version in result["peers"].items() if version)
    return "".join(
        [
            f"\n### {link}: {machine}, torch {torch}\n\n`{result['command']}`, beside {peers}.\n",
            "\n| work | target | found | |\n|---|---|---|---|\n",
            *(line for row in rows for line in _targets(row)),
            f"\n![the figures below as bars]({picture(name)})\n",
            "\n| work | contestant | figure | ours / theirs |\n|---|---|---|---|\n",
            *(line for row in rows for line in _figures(row)),
            *_failures(result),
        ]
    )


def picture(name: str) -> str:
    """The picture's file, from the result's."""
    return f"{Path(name).stem}.svg"


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of each panel's medians, ours in colour, with their quartiles."""
    import matplotlib  # slow to import, and needed for the picture alone
    from matplotlib.figure import Figure

    rows = [result["rows"][name] for name in PANELS if result["rows"].get(name, {}).get("figures")]
    heights = [max(len(row["figures"]) for row in rows[first : first + 2]) + 2 for first in range(0, len(rows), 2)]
    # the same result gives the same file: no dates, and names of elements that do not change
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "font.size": 8}):
        figure = Figure(figsize=(10, 0.28 * sum(heights)), layout="constrained")
        panels = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights)
        for panel in panels.flat[len(rows) :]:
            panel.axis("off")
        for panel, row in zip(panels.flat, rows, strict=False):
            _bars(panel, row)
        figure.savefig(path, metadata={"Date": None})


def _bars(panel: Any, row: dict[str, Any]) -> None:
    from textwrap import fill

    names = list(row["figures"])[::-1]
    spreads = [row["figures"][name] for name in names]
    middle = [spread["median"] for spread in spreads]
    below = [spread["median"] - spread["lower_quartile"] for spread in spreads]
    above = [spread["upper_quartile"] - spread["median"] for spread in spreads]
    colours = ["C0" if name.startswith(OURS) else "0.75" for name in names]
    panel.barh(names, middle, xerr=(below, above), color=colours, ecolor="0.3")
    for place, spread in enumerate(spreads):
        panel.text(spread["upper_quartile"], place, f"  {number(spread['median'])}", va="center")
    panel.set_title(fill(f"{row['title']} ({row['unit']})", WIDTH))
    panel.set_xlim(0, 1.2 * max(spread["upper_quartile"] for spread in spreads))
    panel.spines[["top", "right"]].set_visible(False)


def _targets(row: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for target in row["targets"]:
        verdict = {True: "met", False: "**missed**", None: "not measured"}[target["met"]]
        found = "" if target["found"] is None else number(target["found"])
        lines.append(f"| {'' if lines else row['title']} | {target['text']} | {found} | {verdict} |\n")
    return lines


def _figures(row: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for contestant, spread in row["figures"].items():
        ratio = _spread(row["ratios"][contestant]) if contestant in row["ratios"] else ""
        title = "" if lines else f"{row['title']}, {row['unit']}{'' if row['steady'] else '; unsteady machine'}"
        lines.append(f"| {title} | {contestant} | {_spread(spread)} | {ratio} |\n")
    return lines


def _failures(result: dict[str, Any]) -> list[str]:
    """Who was not measured, and why."""
    lines = [
        f"- {row['title']}, {name}: {why}\n" for row in result["rows"].values() for name, why in row["failed"].items()
    ]
    return ["\nNot measured:\n\n", *lines] if lines else []


def _spread(spread: dict[str, float]) -> str:
    lower, upper = number(spread["lower_quartile"]), number(spread["upper_quartile"])
    return f"{number(spread['median'])} ({lower} to {upper})"
