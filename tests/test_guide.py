"""Settings and commands that the documentation shows exist, and their values are accepted."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dltrain.config import split_arguments
from dltrain.data.writer import ShardWriter
from dltrain.errors import UserError
from dltrain.recipes import declarations
from tests.conftest import ROOT, Cli

PAGES = {
    page: (ROOT / page).read_text()
    for page in ("README.md", "docs/guide.md", "docs/data.md", "docs/debugger.md", "docs/sagemaker.md")
}
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
    assert declarations(recipe).configure(preset, overrides)


RECIPE = '''"""A regression, as the guide shows it."""

import torch
from torch import nn

from dltrain import Config, Task, main, preset
from dltrain.config import Data, Length, Run
from dltrain.data.decode import decode_field


@preset
def small() -> Config:
    """Numbers."""
    data = Data(train="train", evaluation="train", global_batch_size=8)
    return Config(run=Run(length=Length.parse("30st")), data=data)


{blocks}

def model(self):
    return nn.Linear(3, 2)


Regress.model = model

if __name__ == "__main__":
    main(Regress)
'''


def test_the_task_and_the_metric_that_the_guide_shows_train(cli: Cli, tmp_path: Path) -> None:
    blocks = [
        block
        for block in re.findall(r"```python\n(.*?)```", PAGES["docs/guide.md"], re.DOTALL)
        if block.startswith(("class Regress(Task)", "class AbsoluteError"))
    ]
    assert len(blocks) == 2
    (tmp_path / "mine.py").write_text(RECIPE.replace("{blocks}", "\n\n".join(blocks)))
    random = np.random.default_rng(0)
    with ShardWriter(str(tmp_path / "train"), samples_per_shard=16) as writer:
        for number in range(40):
            x = random.normal(size=3).astype(np.float32)
            writer.write(f"{number:04d}", {"x.npy": npy(x), "y.npy": npy(x[:2] - x[1:])})
    words = ("--optim.learning_rate", "0.1", "--evaluation.metric", "mae", "--evaluation.mode", "min")
    done = cli("train", "mine.py", "--preset", "small", "--nproc", "2", *words)
    assert done.status == 0, done.err
    assert done.result["samples"] == 40
    assert 0 < done.result["mae"] < 0.3


def npy(values: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()
