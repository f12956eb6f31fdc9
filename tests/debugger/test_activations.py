"""What modules return is noted once, on due steps, and is the same under every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dltrain.config import Config, load_overrides
from dltrain.debugger.activations import Activations
from dltrain.debugger.reductions import reduce
from dltrain.debugger.sampler import Sampler, names_of
from dltrain.debugger.selection import NOTHING
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.plan import Plan
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks
from tests.parallel.matrix import CPU
from tests.parallel.test_engine import Regression, share_of


class Blocks(nn.Module):
    """Of its ReLUs a quarter of the units is dead, and half of the tanhs' units are saturated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.second = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        with torch.no_grad():
            self.first[0].bias[::4] = -100.0  # type: ignore[index]
            self.second[0].bias[::2] = 100.0  # type: ignore[index]

    def forward(self, values: Tensor) -> Tensor:
        returned: Tensor = self.second(self.first(values))
        return returned


class Watched(Regression):
    def model(self) -> nn.Module:
        return Blocks()

    def plan(self) -> Plan:
        styles = {"0": "column", "2": "row"}
        tensor = {f"{block}.{layer}": style for block in ("first", "second") for layer, style in styles.items()}
        return Plan(units=("first", "second"), tensor=tensor, chain=("first", "second"))


def watched(rank: int, ranks: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Moments by name of the second of three steps."""
    config = load_overrides(Config(), overrides)
    mesh = build_mesh(config.parallel, Environment(rank, ranks, rank, ranks), CPU)
    activations = Activations()
    task = Watched(config)
    example = lambda: share_of(0, 0, 1, samples=12)  # noqa: E731
    engine = parallelize(task, config, mesh, CPU, example, watch=activations.install)
    sampler = Sampler(engine, names_of(engine, (), activations.names()))
    for step in range(3):
        activations.begin(frozenset(activations.names()) if step == 1 else NOTHING, "train")
        engine.forward_backward(share_of(step, mesh.data_rank, mesh.data_ranks, samples=12), torch.tensor(12.0))
        engine.step(0.0, 0.0)
        if step == 1:
            for name, row in activations.taken(mesh):
                sampler.put(name, row)
            table = sampler.send()
    assert not list(activations.taken(mesh))
    return dict(zip(sampler.names, table.rows(), strict=True))


def test_outputs_and_units_are_those_of_the_forward_pass() -> None:
    found = run_ranks(watched, 1, 1, {})[0]
    assert set(found) == {"first.1_output_0", "second.1_output_0", "active/first.1", "unsaturated/second.1"}
    assert found["first.1_output_0"][0] == 12 * 16
    assert reduce("min", found["first.1_output_0"]) == 0
    assert reduce("max", found["second.1_output_0"]) == 1
    assert reduce("fraction_zero", found["active/first.1"]) >= 4 / 16
    assert reduce("fraction_zero", found["unsaturated/second.1"]) == 8 / 16


LAYOUTS = {
    "micro-batches": (1, {"parallel.micro_batch": 4}),
    "ddp 2": (2, {}),
    "fsdp 2, computed again": (2, {"parallel.dp_shard": 2, "parallel.activation_checkpointing": "full"}),
    "selective": (1, {"parallel.activation_checkpointing": "selective", "parallel.micro_batch": 4}),
    "tp 2": (2, {"parallel.tp": 2}),
    "pp 2": (2, {"parallel.pp": 2}),
    "pp 2 x tp 2": (4, {"parallel.pp": 2, "parallel.tp": 2}),
}


QUICK = ("micro-batches", "fsdp 2, computed again", "tp 2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_a_layout_gives_the_statistics_of_one_process(name: str) -> None:
    expected = run_ranks(watched, 1, 1, {})[0]
    ranks, overrides = LAYOUTS[name]
    everyone = run_ranks(watched, ranks, ranks, overrides)
    for found in everyone:
        assert found.keys() == expected.keys()
        for key, row in expected.items():
            for reduction in ("mean", "std", "min", "max", "fraction_zero"):
                # units are counted on the first samples of each pass
                bound = 0.2 if "/" in key and reduction != "fraction_zero" else 1e-5
                assert reduce(reduction, found[key]) == pytest.approx(float(reduce(reduction, row)), abs=bound), key
            assert np.array_equal(found[key], everyone[0][key])


def test_a_compiled_model_has_two_variants_and_is_noted_as_it_is_without() -> None:
    torch.manual_seed(0)
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    torch._dynamo.reset()
    plain, watched = Blocks(), Blocks()
    watched.load_state_dict(plain.state_dict())
    eager, noted = Activations(), Activations(compiled=True)
    eager.install(plain)
    noted.install(watched)
    watched.first.compile(backend=backend)
    watched.second.compile(backend=backend)
    values, seen = torch.randn(12, 6), []
    names = noted.names()
    for due in (NOTHING, frozenset(names), NOTHING, frozenset(names[:1]), NOTHING, frozenset(names[1:])):
        for model, activations in ((plain, eager), (watched, noted)):
            activations.begin(due, "train")
            model(values)
        rows = dict(noted.taken(build_mesh(Config().parallel, Environment(), CPU)))
        for name, row in eager.taken(build_mesh(Config().parallel, Environment(), CPU)):
            assert torch.allclose(rows.pop(name), row)
        assert not rows
        noted.end()
        eager.end()
        seen.append(compiled)
    without, both = seen[0], seen[1]
    assert without == 2  # one for each block
    assert seen[1:] == [both] * 5  # the other variant is compiled once, whatever is due
