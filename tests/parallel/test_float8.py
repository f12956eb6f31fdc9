"""Linear layers in float8: which they are, how far off, and the same under every layout; emulated, without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dltrain.errors import UserError
from dltrain.models.vision import vit
from dltrain.parallel import float8
from dltrain.parallel.float8 import multiply_in_float8
from dltrain.testing.ranks import run_ranks
from tests.parallel.matrix import CPU, LAYOUTS, train

pytest.importorskip("torchao")
FLOAT8 = {"precision.float8": True}


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(each).__name__ for name, each in model.named_modules() if isinstance(each, nn.Linear)}


def test_layers_of_fitting_sizes_inside_of_units_are_replaced_and_keep_their_weights() -> None:
    model = vit.ViT(8, 4, 3, 5, depth=2, width=32, heads=4)
    before = dict(model.named_parameters())
    multiply_in_float8(vit.PLAN.modules(model), CPU)
    assert all(after is before[name] for name, after in model.named_parameters())
    found = kinds(model)
    assert {name for name, kind in found.items() if kind == "Float8Linear"} == {
        name for name in found if name.startswith("blocks.")
    }
    assert found["head.classify" if "head.classify" in found else list(found)[-1]] == "Linear"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_are_near_those_of_float32(device: str) -> None:
    torch.manual_seed(0)
    unit = nn.Sequential(nn.Linear(64, 32)).to(device)
    values = torch.randn(16, 64, device=device)
    expected = unit(values)
    multiply_in_float8([unit], torch.device(device))
    off = (unit(values) - expected).norm() / expected.norm()
    assert 1e-3 < off < 0.05  # three bits of mantissa


def test_what_float8_cannot_do_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no linear layer inside of the plan's units has inputs and outputs in"):
        multiply_in_float8([nn.Sequential(nn.Linear(8, 32))], CPU)
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torchao is not installed; pip install 'dltrain\[float8\]'"):
        multiply_in_float8([nn.Sequential(nn.Linear(16, 16))], CPU)


@pytest.mark.parametrize(
    "name",
    [
        "fsdp 2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp 2", "tp 2", "pp 2, 1f1b", "pp 2 x fsdp 2")),
    ],
)
def test_layouts_stay_within_the_bound_of_verify(name: str) -> None:
    expected, layout = run_ranks(train, 1, 1, "vit", FLOAT8)[0], LAYOUTS[name]
    for found in run_ranks(train, layout.ranks, layout.ranks, "vit", {**layout.overrides, **FLOAT8}):
        assert found.losses == pytest.approx(expected.losses, abs=5e-2)
        assert found.losses != pytest.approx(run_ranks(train, 1, 1, "vit", {})[0].losses, abs=1e-6)
