"""Settings and commands that the documentation shows exist, and their values are accepted."""

from __future__ import annotations

import re
import shlex

import pytest

from dltrain.config import split_arguments
from dltrain.errors import UserError
from dltrain.recipes import declarations
from tests.conftest import ROOT

PAGES = {page: (ROOT / page).read_text() for page in ("README.md", "docs/guide.md", "docs/data.md")}
RECIPES = (("image/classify", "digits"), ("timeseries/forecast", "co2"))
SPANS = [
    (page, re.sub(r"\s+", " ", span))
    for page, text in PAGES.items()
    for span in re.findall(r"`(--[a-z_]+\.[^`|]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    if " " in span
]
LINES = [
    (page, line)
    for page, text in PAGES.items()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"dltrain (train|verify|plan) ", line)
]


def test_there_are_some() -> None:
    assert len(SPANS) > 25
    assert len(LINES) > 8


@pytest.mark.parametrize(("page", "span"), SPANS, ids=[span[:40] for _, span in SPANS])
def test_a_setting_in_the_text_is_one_of_a_recipe(page: str, span: str) -> None:
    overrides = split_arguments(shlex.split(span))[1]
    refusals = []
    for recipe, preset in RECIPES:
        try:
            declarations(recipe).configure(preset, overrides)
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) < len(RECIPES), f"{page}: {span}: {refusals[0]}"


@pytest.mark.parametrize(("page", "line"), LINES, ids=[line[:50] for _, line in LINES])
def test_a_command_in_a_block_has_settings_that_there_are(page: str, line: str) -> None:
    words, overrides = split_arguments(shlex.split(line, comments=True)[2:])
    recipe = "image/classify" if words[0].endswith(".py") else words[0]
    preset = words[words.index("--preset") + 1] if "--preset" in words else ""
    declarations(recipe).configure(preset, overrides)
