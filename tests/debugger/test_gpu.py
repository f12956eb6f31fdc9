"""On a GPU a due step waits for nothing, and has the statistics of a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from dltrain.config import Config, Debugger, Length
from dltrain.debugger.collecting import Collector
from dltrain.debugger.histograms import counts_of
from dltrain.debugger.moments import moments_of
from dltrain.debugger.needs import Needs
from dltrain.debugger.recorder import Guard
from dltrain.hooks.base import View
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.runtime.environment import Environment
from tests.debugger.test_activations import Watched
from tests.parallel.test_engine import share_of

pytestmark = pytest.mark.gpu


def watched(device: torch.device, folder: Path, strict: bool) -> dict[str, Any]:
    """Moments by name of the third of four due steps; with ``strict`` waiting for the device is an error in them."""
    config = Config(debugger=Debugger(every=Length.parse("1st"), histograms=True))
    environment = Environment()
    collector = Collector(config, environment, folder, Needs(), Guard(environment, strict=True))
    mesh, task = build_mesh(config.parallel, environment, device), Watched(config)
    example = lambda: share_of(0, 0, 1, samples=12)  # noqa: E731
    engine = parallelize(task, config, mesh, device, example, watch=collector.install)
    view = cast(View, SimpleNamespace(step=0, engine=engine, loader=SimpleNamespace(peek=example)))
    collector.begin(view)
    for step in range(4):
        batch = share_of(step, 0, 1, samples=12).to(device)
        count = torch.tensor(12.0, device=device)
        if strict and step:
            torch.cuda.set_sync_debug_mode("error")
        try:
            collector.step_start(view, batch)
            engine.forward_backward(batch, count)
            collector.gradients_ready(view)
            engine.step(0.01, 0.0)
            cast(Any, view).step += 1
            collector.step_end(view)
        finally:
            if strict:
                torch.cuda.set_sync_debug_mode("default")
    found = [collector.read(step) for step in range(1, 5)][2]
    assert found is not None
    assert found.counts
    return dict(zip(found.index.names, found.rows, strict=True))


def test_due_steps_wait_for_nothing_and_see_what_a_cpu_sees(tmp_path: Path) -> None:
    host = watched(torch.device("cpu"), tmp_path, strict=False)
    for name, row in watched(torch.device("cuda"), tmp_path, strict=True).items():
        assert np.allclose(row, host[name], rtol=1e-3, atol=1e-4), name


def test_moments_and_histograms_are_those_of_the_cpu() -> None:
    values = torch.randn(100_003, generator=torch.Generator().manual_seed(0)) * torch.logspace(-5, 2, 100_003)
    assert torch.allclose(moments_of([values.cuda()])[0].cpu(), moments_of([values])[0], rtol=1e-5)
    assert torch.equal(counts_of(values.cuda()).cpu(), counts_of(values))
