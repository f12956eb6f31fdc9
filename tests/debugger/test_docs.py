"""What docs/debugger.md says is there."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dltrain.debugger.reductions import REDUCTIONS
from dltrain.debugger.rules.base import Watch
from dltrain.debugger.rules.catalogue import DEFAULT, RULES
from dltrain.debugger.run import SavedRun, SavedTensor
from dltrain.debugger.seen import Seen
from tests.conftest import ROOT

PAGE = (ROOT / "docs/debugger.md").read_text()


def test_the_rule_that_the_page_shows_finds() -> None:
    block = next(code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class TooLow" in code)
    scope: dict[str, Any] = {"__name__": __name__}
    exec(block, scope)
    watch = Watch([scope["TooLow"]()], print)
    found = [each for seen in (Seen(1, loss=0.5), Seen(2, loss=0.001)) for each in watch.update(seen)]
    assert [(each.step, each.what, each.why) for each in found] == [
        (2, "the loss is 0.001", "Such losses mean that labels leak into the inputs.")
    ]


def test_every_rule_is_in_the_table_and_the_default_ones_have_a_dot() -> None:
    rows = re.findall(r"^\| (.?) ?\| (`[^|]*) \|", PAGE, re.MULTILINE)
    marked = {name: mark for mark, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert RULES.keys() - marked.keys() == {"OverallSystemUsage", "OverallFrameworkMetrics"}
    assert {name for name, mark in marked.items() if mark.strip()} == {word.partition(":")[0] for word in DEFAULT}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"^(?:run|head)\.(\w+)", PAGE, re.MULTILINE))))
def test_what_a_run_is_asked_for_is_there(name: str) -> None:
    assert hasattr(SavedRun, name) or hasattr(SavedTensor, name)
    assert {"l2", "abs_mean"} <= REDUCTIONS.keys()
