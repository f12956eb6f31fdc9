"""What only a GPU can show: fused steps that skip themselves, bf16 with compile, the steps of one process."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from dltrain.config import Config, load_overrides
from dltrain.hooks.base import NOTHING
from dltrain.mesh import build_mesh
from dltrain.optim.ema import Average
from dltrain.parallel.apply import parallelize
from dltrain.parallel.scaling import LossScale
from dltrain.readings import Readings
from dltrain.runtime.environment import Environment
from dltrain.runtime.process_group import set_numerics
from dltrain.testing.ranks import run_ranks
from tests.parallel.test_engine import Regression, share_of

pytestmark = pytest.mark.gpu


def losses(device: str, poison: int = -1, **overrides: str) -> tuple[list[float], list[torch.Tensor]]:
    settings = {"optim.max_norm": 0.5, **{key.replace("__", "."): value for key, value in overrides.items()}}
    config, place = load_overrides(Config(), settings), torch.device(device)
    set_numerics(config)
    engine = parallelize(Regression(config), config, build_mesh(config.parallel, Environment(), place), place)
    readings, found = Readings(place), []
    for step in range(6):
        batch = share_of(step, 0, 1)
        if step == poison:
            batch.fields["x"][0, 0] = float("nan")
        count = readings.reduce(torch.dot(Regression(config).count(batch), batch.weight), NOTHING)
        loss = engine.forward_backward(batch, count)
        norm = engine.step(0.01, 0.5)
        readings.push(step, (0, 0), 0.01, loss.sum, norm)
        found += [reading.loss for reading in readings.flush()]
    return found, [weight.detach().cpu() for _, weight in engine.named_parameters()]


def test_a_gpu_gives_the_losses_of_the_cpu() -> None:
    assert losses("cuda")[0] == pytest.approx(losses("cpu")[0], abs=1e-4)


def test_bf16_compiled_stays_near_fp32() -> None:
    found = losses("cuda", precision__compute="bf16", precision__compile="true")[0]
    assert found == pytest.approx(losses("cpu")[0], abs=5e-2)


def test_fp16_stays_near_fp32_and_halves_its_scale_when_it_overflows() -> None:
    found = losses("cuda", precision__compute="fp16")[0]
    assert found == pytest.approx(losses("cpu")[0], abs=2e-2)
    scale = LossScale(torch.device("cuda"))
    for overflows in (0.0, 1.0, 0.0):
        scale.update(torch.tensor(overflows, device="cuda"))
    assert scale.value.item() == 2.0**15


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_average_of_weights_skips_a_step_without_a_word_from_the_host(memory: torch.memory_format) -> None:
    """Its formula is tested on a CPU; here it is the same kernel, told on the device what to do."""
    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(device).to(memory_format=memory)  # type: ignore[call-overload]
        average = Average(model, 0.9, warmup=True, device=torch.device(device))
        torch.cuda.set_sync_debug_mode("error")
        for skip in (0.0, 0.0, 1.0, 0.0):
            mark = torch.zeros((), device=device) + skip
            with torch.no_grad():
                torch._foreach_add_([*model.parameters(), model[1].running_var], 0.5)
            average.update(mark)
        torch.cuda.set_sync_debug_mode("default")
        found[device] = {name: value.cpu() for name, value in average.state_dict()["weights"].items()}
        assert average.state_dict()["updates"].item() == 3
    for name, value in found["cpu"].items():
        torch.testing.assert_close(found["cuda"][name], value, atol=1e-6, rtol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    found, weights = losses("cuda", poison=2)
    assert sum(value != value for value in found) == 1
    assert all(bool(weight.isfinite().all()) for weight in weights)


def zero_losses(rank: int, settings: dict[str, str]) -> list[float]:
    return losses("cuda", parallel__engine="deepspeed", **settings)[0]


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize(("stage", "offload"), [("0", "false"), ("1", "false"), ("2", "true"), ("3", "true")])
def test_zero_on_a_gpu_gives_the_losses_of_the_cpu(stage: str, offload: str) -> None:
    settings = {"parallel__deepspeed__stage": stage, "parallel__deepspeed__offload_optimizer": offload}
    assert run_ranks(zero_losses, 1, settings)[0] == pytest.approx(losses("cpu")[0], abs=1e-4)


def test_a_deterministic_run_repeats_its_bits() -> None:
    one, other = (losses("cuda", run__deterministic="true") for _ in range(2))
    assert one[0] == other[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
