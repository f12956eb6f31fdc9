"""What a person sees: two small runs, TensorBoard's own server, and every tab of it read in a browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tensorboard.browser import CHROMIUM, Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is missing: apt install chromium"),
]

DIGITS = ("image/classify", "--preset", "digits", "--run.length", "4ep", "--evaluation.every", "1ep")
CO2 = ("timeseries/forecast", "--preset", "co2", "--run.length", "6ep", "--evaluation.every", "2ep")


SEEN = (
    "--debugger.every",
    "10st",
    "--debugger.histograms",
    "true",
    "--debugger.rules",
    "VanishingGradient:threshold=1",
)
"""All gradients are below 1, so there is something to tell."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the digits with the debugger, and one of CO2."""
    folder = tmp_path_factory.mktemp("seen")
    for name, words in (("digits", (*DIGITS, *SEEN)), ("co2", CO2)):
        command = [sys.executable, "-m", "dltrain", "train", *words, "--run.name", name]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "runs"


@pytest.fixture(scope="module")
def url(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of TensorBoard's server."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", "0"]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        found = Browser.until(lambda: re.search(r"at (http://\S+?)/? ", log.read_text()), 60)
        assert found, log.read_text()
        yield found[1]
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


TABS = [
    ("timeseries", ["digits/tensorboard", "/accuracy", "optimizer"], ("canvas, path", 100)),
    ("scalars", ["evaluation/accuracy", "loss", "optimizer", "speed", "tensors_update_ratio"], ("path", 100)),
    ("images", ["inputs/image", "inputs/values", "evaluation/confusion_matrix", "evaluation/forecasts"], ("img", 100)),
    ("histograms", ["tensors_gradients/head.2.weight", "tensors_weights"], ("path", 100)),
    ("distributions", ["tensors_gradients/head.2.weight"], ("path", 100)),
    (
        "text",
        ["learning_rate: 0.004", "VanishingGradient", "are below 1 in the mean", "gradient/head.2.weight"],
        ("pre, code", 50),
    ),
    ("hparams", ["digits/tensorboard", "small_cnn", "evaluation/accuracy", "evaluation/mase"], ("vaadin-grid", 300)),
    ("pr_curves", ["precision and recall/0", "step 90"], ("path", 20)),
    ("graphs", ["DLinear", "input", "output"], ("g.node", 50)),
    ("projector", ["features at step", "predicted", "Points:", "variance described:"], ("canvas", 300)),
    (
        "custom_scalars",
        ["Training and held-out loss", "mase beside the naive forecast", "Speed"],
        ("path", 50),
    ),
]
"""Words on each tab, and how wide what is drawn there must be."""


@pytest.mark.parametrize(("tab", "words", "drawn"), TABS, ids=[tab for tab, _, _ in TABS])
def test_every_tab_shows_something(
    browser: Browser, url: str, tab: str, words: list[str], drawn: tuple[str, int], tmp_path: Path
) -> None:
    browser.open(f"{url}/#{tab}")
    Browser.until(lambda: browser.count(*drawn) and all(word in browser.text() for word in words), 60)
    browser.picture(tmp_path / "tab.png")
    text = browser.text()
    assert [word for word in words if word not in text] == []
    assert browser.count(*drawn), f"no {drawn[0]} is {drawn[1]} pixels wide"
    assert "data was found" not in text
