"""The page: sections with their plots, tables and words, a table of contents, and a sober style that prints.

part = Section("Loss", [plot(text, "Look for a curve that falls.")])
text = page("Report of mine", "digits", words("Nothing was found."), [part])
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, as HTML."""

    title: str
    parts: Sequence[str]

    @property
    def anchor(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --muted: #5c646e; --grid: #d5d9de; --paper: #fff; --card: #f6f7f9;
  --broken: #c93535; --learning: #c9781f; --data: #7a52bd; --cost: #2f6fc4; --good: #2f8a4f }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --muted: #a2abb5; --grid: #3a4149; --paper: #15181c;
  --card: #1e2227; --broken: #f07070; --learning: #eaa04d; --data: #b795ea; --cost: #78aef2; --good: #6cc58a } }
@media print { :root { --ink: #000; --muted: #444; --grid: #ccc; --paper: #fff; --card: #fff; color-scheme: light }
  nav { display: none } figure, .card, tr { break-inside: avoid } h2, h3 { break-after: avoid } }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto 5rem; padding: 0 1.2rem;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere } h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem } p { margin: .5rem 0 } a { color: inherit }
.muted, figcaption { color: var(--muted) } figcaption { font-size: .88rem; max-width: 52rem }
.verdict { border-left: 5px solid var(--good); background: var(--card); padding: .7rem 1rem; margin: 1rem 0;
  font-size: 1.05rem }
.card { border-left: 5px solid var(--learning); background: var(--card); padding: .6rem 1rem; margin: .8rem 0 }
.broken { border-color: var(--broken) } .learning { border-color: var(--learning) } .data { border-color: var(--data) }
.cost { border-color: var(--cost) } .card h3 { margin: 0 } .card p { margin: .25rem 0; overflow-wrap: anywhere }
.number { display: inline-block; min-width: 1.4em; text-align: center; border-radius: 1em; font-size: .8rem;
  border: 1px solid currentColor; margin-right: .4rem }
figure { margin: 1rem 0 1.6rem } svg { display: block; width: 100%; height: auto }
nav ul { columns: 3 14rem; padding-left: 1.1rem; margin: .4rem 0; font-size: .92rem }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem } caption { text-align: left; color: var(--muted) }
td, th { padding: .18rem .9rem .18rem 0; border-bottom: 1px solid var(--grid); text-align: left; vertical-align: top;
  overflow-wrap: anywhere }
table.numbers td:not(:first-child), table.numbers th:not(:first-child) { text-align: right;
  font-variant-numeric: tabular-nums; padding: .18rem .9rem }
details { margin: .4rem 0 } summary { cursor: pointer; color: var(--muted) }
code { font: .88em ui-monospace, monospace; overflow-wrap: anywhere }
.wide { overflow-x: auto }
"""


def page(title: str, under: str, head: str, sections: Iterable[Section]) -> str:
    """The whole file; ``under`` stands under the title, ``head`` is HTML that comes before the table of contents."""
    kept = [section for section in sections if section.parts]
    contents = "".join(f'<li><a href="#{each.anchor}">{html.escape(each.title)}</a></li>' for each in kept)
    body = "".join(_section(each) for each in kept)
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{name}</title>'
        f"<style>{STYLE}</style>\n<h1>{name}</h1>\n<p class=muted>{html.escape(under)}</p>\n{head}\n"
        f"<nav><ul>{contents}</ul></nav>\n{body}\n</html>\n"
    )


def _section(section: Section) -> str:
    return (
        f'<section><h2 id="{section.anchor}">{html.escape(section.title)}</h2>\n'
        + "\n".join(section.parts)
        + "</section>\n"
    )


def plot(svg: str, caption: str, title: str = "") -> str:
    """A plot and the sentence that says what one looks for in it."""
    heading = f"<h3>{html.escape(title)}</h3>" if title else ""
    return f"{heading}<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def words(text: str, kind: str = "") -> str:
    """A paragraph."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def pairs(values: Mapping[str, Any]) -> str:
    """A table of names and values; those that are empty are left out."""
    rows = "".join(
        f"<tr><td class=muted>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
        if value not in (None, "")
    )
    return f"<table>{rows}</table>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", numbers: bool = True) -> str:
    """A table; with ``numbers`` all columns but the first are set to the right."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    said = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    kind = " class=numbers" if numbers else ""
    return f"<div class=wide><table{kind}>{said}<tr>{top}</tr>{body}</table></div>"


def folded(summary: str, content: str) -> str:
    """What is shown when asked for."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"
