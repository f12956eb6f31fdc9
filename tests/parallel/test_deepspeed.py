"""DeepSpeed behind the engine's protocol: what the matrix of layouts does not ask of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dltrain.config import Config, load_overrides
from dltrain.errors import UserError
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.deepspeed.engine import DeepSpeedEngine, import_deepspeed
from dltrain.parallel.deepspeed.settings import deepspeed_settings
from dltrain.parallel.plain import PlainEngine
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks
from tests.conftest import TINY, Cli
from tests.parallel.matrix import CPU, build, share_of, train, whole, zero
from tests.parallel.test_engine import Regression
from tests.parallel.test_engine import share_of as regression_share

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

SLOW = pytest.mark.slow
SHARDED = {
    "zero-1": zero(2, 1).overrides,
    "zero-2": zero(2, 2).overrides,
    "zero-3": zero(2, 3).overrides,
    "zero-2, offload": zero(2, 2, **{"deepspeed.offload_optimizer": True}).overrides,
    "zero-3, offload": zero(
        2, 3, **{"deepspeed.offload_optimizer": True, "deepspeed.offload_parameters": True}
    ).overrides,
}
ALL = {"zero-0": zero(2, 0).overrides, **SHARDED}


def cases(layouts: dict[str, dict[str, Any]], quick: tuple[str, ...]) -> list[Any]:
    return [pytest.param(o, id=name, marks=() if name in quick else SLOW) for name, o in layouts.items()]


Flat = dict[str, Tensor]


def flat(engine: PlainEngine) -> Flat:
    """Weights and optimizer state by name, copied."""
    state = engine.state_dict()
    entries = {f"{name} {key}": v for name, s in state["optimizer"]["state"].items() for key, v in s.items()}
    return {name: value.detach().clone() for name, value in {**state["model"], **entries}.items()}


def shapes(tensors: Flat) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in tensors.items()}


def step(engine: PlainEngine, number: int, rank: int, ranks: int, poison: bool = False) -> float:
    batch = share_of("vit", number, rank, ranks)
    if poison and rank == ranks - 1:
        batch.fields["x"][0, 0] = float("nan")
    engine.forward_backward(batch, torch.tensor(10.0))
    return engine.step(0.003, 0.5).item()


def built(rank: int, ranks: int, overrides: dict[str, Any]) -> PlainEngine:
    engine = build("vit", rank, ranks, overrides)[2]
    assert isinstance(engine, PlainEngine)
    return engine


def state_and_gradients(rank: int, ranks: int, overrides: dict[str, Any]) -> tuple[Flat, Flat]:
    """The gradients of the third step, and the state after two."""
    engine = built(rank, ranks, overrides)
    for number in range(2):
        step(engine, number, rank, ranks)
    before = flat(engine)
    engine.forward_backward(share_of("vit", 2, rank, ranks), torch.tensor(10.0))
    return before, {name: gradient.clone() for name, gradient in engine.gradients()}


@pytest.fixture(scope="module")
def plain() -> tuple[Flat, Flat]:
    return run_ranks(state_and_gradients, 1, 1, {})[0]


@pytest.mark.parametrize("overrides", cases(ALL, ("zero-1",)))
def test_state_and_gradients_are_whole_and_have_the_names_of_the_plain_engine(
    overrides: dict[str, Any], plain: tuple[Flat, Flat]
) -> None:
    for found in run_ranks(state_and_gradients, 2, 2, overrides):
        for ours, theirs in zip(found, plain, strict=True):
            assert {n: (v.shape, v.dtype) for n, v in ours.items()} == {
                n: (v.shape, v.dtype) for n, v in theirs.items()
            }
        gradients = plain[1]
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[1][name], gradient, atol=1e-6 * largest, rtol=0)
        for name, value in plain[0].items():
            if name.endswith(("exp_avg", "step")):
                torch.testing.assert_close(found[0][name], value, atol=1e-6, rtol=1e-5)


def resumed(rank: int, ranks: int, overrides: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a state that is loaded is the state that was saved, and whether training goes on from it in its bits."""
    first = built(rank, ranks, overrides)
    for number in range(3):
        step(first, number, rank, ranks)
    state = first.state_dict()
    second = built(rank, ranks, overrides)
    second.load_state_dict(state)
    saved, loaded = flat(first), flat(second)
    for number in range(3, 6):
        assert step(first, number, rank, ranks) == step(second, number, rank, ranks)
    on, again = flat(first), flat(second)
    assert not torch.equal(saved["head.norm.weight"], on["head.norm.weight"])
    return all(torch.equal(saved[n], loaded[n]) for n in saved), all(torch.equal(on[n], again[n]) for n in on)


@pytest.mark.parametrize("overrides", cases(SHARDED, ("zero-3",)))
def test_a_state_is_loaded_and_gone_on_from_to_the_bit(overrides: dict[str, Any]) -> None:
    assert run_ranks(resumed, 2, 2, overrides) == [(True, True)] * 2


@SLOW
def test_a_state_is_exact_where_ranks_do_not_divide_parameters() -> None:
    for overrides in (zero(3, 1).overrides, zero(3, 3, micro_batch=2).overrides):
        assert run_ranks(resumed, 3, 3, overrides) == [(True, True)] * 3


def poisoned(rank: int, ranks: int, overrides: dict[str, Any]) -> tuple[bool, float, bool]:
    """Whether a step with a gradient that is not a number changed nothing, its norm, and whether the next one is as if
    it had not been."""
    engine, untouched = built(rank, ranks, overrides), built(rank, ranks, overrides)
    for one in (engine, untouched):
        step(one, 0, rank, ranks)
    before = flat(engine)
    norm = step(engine, 1, rank, ranks, poison=True)
    after = flat(engine)
    for one in (engine, untouched):
        step(one, 2, rank, ranks)
    last, expected = flat(engine), flat(untouched)
    same = all(torch.equal(before[name], after[name]) for name in before)
    return same, norm, all(torch.equal(last[name], expected[name]) for name in last)


@pytest.mark.parametrize("overrides", cases(ALL, ("zero-2",)))
def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(overrides: dict[str, Any]) -> None:
    for same, norm, as_if in run_ranks(poisoned, 2, 2, {**overrides, "parallel.micro_batch": 2}):
        assert same
        assert not torch.tensor(norm).isfinite()
        assert as_if


@pytest.mark.parametrize("overrides", cases(ALL, ()))
def test_sgd_gives_the_numbers_of_one_process(overrides: dict[str, Any]) -> None:
    sgd = {"optim.name": "sgd", "optim.nesterov": True, "optim.weight_decay": 0.1, "optim.no_decay": ["*positions"]}
    expected = run_ranks(train, 1, 1, "vit", sgd)[0]
    for found in run_ranks(train, 2, 2, "vit", {**overrides, **sgd}):
        assert found.losses == pytest.approx(expected.losses, abs=1e-5)
        for name, weight in expected.weights.items():
            torch.testing.assert_close(found.weights[name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("overrides", cases(ALL, ()))
def test_bf16_keeps_fp32_weights_and_is_that_of_ddp(overrides: dict[str, Any]) -> None:
    half = {"precision.compute": "bf16"}
    fp32, ddp = run_ranks(train, 1, 1, "vit", {})[0], run_ranks(train, 2, 2, "vit", half)[0]
    for found in run_ranks(train, 2, 2, "vit", {**overrides, **half}):
        assert found.losses == pytest.approx(fp32.losses, abs=1e-2)
        assert found.losses == pytest.approx(ddp.losses, abs=2e-3)
        assert all(weight.dtype == torch.float32 for weight in found.weights.values())


class Frozen(Regression):
    """A layer that is not trained, and batch norm."""

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 4))
        model[0].requires_grad_(False)
        return model


class Idle(Regression):
    """A layer that no forward pass uses."""

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        model[1].unused = nn.Linear(3, 3)
        return model


def regression(rank: int, ranks: int, task: type[Regression], overrides: dict[str, Any]) -> tuple[list[float], Flat]:
    """Gradient norms and the weights, of DeepSpeed after its state was taken and loaded."""
    config = load_overrides(Config(), {**overrides, "optim.weight_decay": 0.0})
    mesh = build_mesh(config.parallel, Environment(rank, ranks, rank, ranks), CPU)
    engine = parallelize(task(config), config, mesh, CPU)
    norms = []
    for number in range(4):
        engine.forward_backward(regression_share(number, rank, ranks), torch.tensor(28.0))
        norms.append(engine.step(0.01, 0.5).item())
    if isinstance(engine, DeepSpeedEngine):
        engine.load_state_dict(engine.state_dict())
    return norms, whole(engine)


@pytest.mark.parametrize("compute", ["fp32", pytest.param("bf16", marks=SLOW)])
@pytest.mark.parametrize("stage", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3])
def test_frozen_weights_and_running_statistics_are_those_of_ddp(stage: int, compute: str) -> None:
    precision, tolerance = {"precision.compute": compute}, 1e-5 if compute == "fp32" else 1e-2
    expected = run_ranks(regression, 2, 2, Frozen, precision)[0]
    for found in run_ranks(regression, 2, 2, Frozen, {**zero(2, stage).overrides, **precision}):
        assert found[0] == pytest.approx(expected[0], rel=tolerance)
        assert found[1].keys() == expected[1].keys()
        for name, value in expected[1].items():
            torch.testing.assert_close(found[1][name], value, atol=tolerance, rtol=tolerance)


@SLOW
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_that_no_forward_pass_uses_stay_as_they_are(stage: int) -> None:
    expected = run_ranks(regression, 1, 1, Idle, {})[0]
    for found in run_ranks(regression, 2, 2, Idle, zero(2, stage).overrides):
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert torch.equal(found[1]["1.unused.weight"], expected[1]["1.unused.weight"])


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What DeepSpeed is given for a JSON and overrides, on four ranks."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def given(tree: dict[str, Any] | str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        path = tmp_path / "ds.json"
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
        all_of_them = {"parallel.engine": "deepspeed", "parallel.deepspeed.config": str(path), **(overrides or {})}
        return deepspeed_settings(load_overrides(Config(), all_of_them), 4, CPU)

    return given


Settings = Callable[..., dict[str, Any]]


def test_what_the_json_leaves_to_auto_is_filled_in_and_the_rest_is_passed_on(settings: Settings) -> None:
    tree = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": "auto",
                              "offload_optimizer": {"device": "auto", "pin_memory": True}},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
        "comms_logger": {"enabled": True},
    }  # fmt: skip
    more = {"parallel.micro_batch": 8, "optim.max_norm": 1.0, "precision.compute": "bf16"}  # 64 / 4 ranks = 2 x 8
    found = settings(tree, {**more, "parallel.deepspeed.stage": 3, "parallel.deepspeed.offload_optimizer": True})
    sharding = found["zero_optimization"]
    assert (sharding["stage"], sharding["reduce_bucket_size"]) == (3, 1000)
    assert sharding["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "stage3_prefetch_bucket_size" not in sharding
    assert "optimizer" not in found  # ours is given to DeepSpeed as it is
    assert found["comms_logger"] == {"enabled": True}
    assert found["torch_autocast"]["enabled"]
    assert found["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"train_batch_size": 32}, "train_batch_size is 32 in .* and data.global_batch_size is 64"),
        ({"train_micro_batch_size_per_gpu": 8}, "per_gpu is 8 .* parallel.micro_batch 0 on 4 rank.* makes it 16"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4 .* makes it 1"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 .* optim.max_norm is 0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True .* precision.compute fp32 makes it False"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True in .* must be False"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage is 1 .* parallel.deepspeed.stage is 2"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "device is 'nvme' .* makes it 'none'"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is 'Lamb' .* optim.name is 'adamw'"),
        ({"optimizer": {"params": {"lr": 0.1}}}, "optimizer.params.lr is 0.1 .* optim.learning_rate is 0.001"),
        ({"optimizer": {"params": {"momentum": 0.9}}}, "momentum is 0.9 .* optim.name is 'adamw', which has no such"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type is 'WarmupLR' .* schedule.name is 'cosine'"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is 'sum' .* must be 'mean'"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size is 2 .* data parallel alone"),
        ({"train_batchsize": 32}, "no key 'train_batchsize', .* did you mean 'train_batch_size'"),
        ({"zero_optimization": {"stag": 3}}, "no key 'zero_optimization.stag', .* did you mean 'stage'"),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            "no key 'zero_optimization.offload_param.devise', .* did you mean 'device'",
        ),
        ({"data_types": {"grad_accum_type": "fp32"}}, "no key 'data_types.grad_accum_type', .* 'grad_accum_dtype'"),
        ({"timers": {"thruput": {}}}, "no key 'timers.thruput', .* did you mean 'throughput'"),
        ({"zero_optimization": True}, "zero_optimization in .* is True; it is a section"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "DeepSpeed refuses reduce_bucket_size -1 in .* greater"),
        ({"communication_data_type": "fp8"}, "communication_data_type is 'fp8' .* must be 'fp32'"),
        ({"checkpoint": {"tag_validation": "loud"}}, "DeepSpeed refuses .* invalid tag_validation"),
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_a_json_that_says_something_else_is_refused_in_one_sentence(
    tree: dict[str, Any] | str, words: str, settings: Settings
) -> None:
    with pytest.raises(UserError, match=words) as error:
        settings(tree)
    assert "\n" not in str(error.value)


def test_a_json_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "none.json")
    config = load_overrides(Config(), {"parallel.engine": "deepspeed", "parallel.deepspeed.config": path})
    with pytest.raises(UserError, match=r"config is .*none\.json.: there is no file .*none\.json"):
        deepspeed_settings(config, 2, CPU)


def test_an_adam_of_the_json_is_adamw_as_deepspeed_takes_it(settings: Settings) -> None:
    assert settings({"optimizer": {"type": "Adam"}})
    with pytest.raises(UserError, match=r"adam_w_mode is False in .* must be True"):
        settings({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"engine": "deepspeed", "tp": 2}, "tp is 2 and engine 'deepspeed'"),
        ({"engine": "deepspeed", "dp_shard": -1}, "dp_shard is -1 and engine 'deepspeed'.* parallel.deepspeed.stage"),
        ({"engine": "deepspeed", "deepspeed.offload_parameters": True}, "offload_parameters needs stage 3"),
        ({"engine": "deepspeed", "deepspeed.stage": 0, "deepspeed.offload_optimizer": True}, "needs stage 1, 2 or 3"),
        ({"deepspeed.stage": 3}, "--parallel.deepspeed.stage is given and parallel.engine is 'plain'; add --parallel"),
        ({"engine": "deepspeed", "deepspeed.stage": 4}, "less than or equal to 3"),
    ],
)
def test_layouts_that_deepspeed_has_not_are_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_overrides(Config(), {f"parallel.{name}": value for name, value in overrides.items()})


def test_compiled_zero_3_is_refused() -> None:
    settings = {"parallel.engine": "deepspeed", "parallel.deepspeed.stage": 3, "precision.compile": True}
    with pytest.raises(UserError, match=r"precision.compile is true and parallel.deepspeed.stage is 3, .* stage 2"):
        build("vit", 0, 1, settings)


def test_a_missing_package_is_told_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install --no-build-isolation 'dltrain\[deepspeed\]'"):
        import_deepspeed(CPU)


def imported(rank: int, overrides: dict[str, Any]) -> bool:
    built(rank, 1, overrides)
    return "deepspeed" in sys.modules


def test_deepspeed_is_imported_only_when_it_is_chosen() -> None:
    assert run_ranks(imported, 1, {}) == [False]
    assert run_ranks(imported, 1, ALL["zero-1"]) == [True]


@SLOW
def test_a_run_keeps_quiet_and_goes_on_under_fsdp(cli: Cli) -> None:
    words = ("train", TINY, "--preset", "small", "--nproc", "2", "--run.name", "mine", "--checkpoint.every", "8st")
    first = cli(*words, "--run.length", "8st", "--parallel.engine", "deepspeed", "--parallel.deepspeed.stage", "3")
    assert first.status == 0, first.err
    assert first.result["step"] == 8
    assert len(first.out.splitlines()) == 1  # the result, and nothing of DeepSpeed's
    assert "eepSpeed" not in first.err
    assert "Warning" not in first.err
    second = cli(*words, "--run.length", "16st", "--run.resume", "auto", "--parallel.dp_shard", "2")
    assert second.status == 0, second.err
    assert second.result["step"] == 16
    assert second.result["accuracy"] > first.result["accuracy"]
