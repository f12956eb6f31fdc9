"""DeepSpeed's JSON, filled in from our config and checked against it.

What the config says too (batch sizes, precision, clipping, optimizer, schedule, ZeRO) must be equal in the JSON, or
"auto", or absent. What the engine relies on must be as it needs it. Everything else that DeepSpeed knows is passed on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dltrain import storage
from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.parallel.deepspeed_keys import refuse_unknown

_ZERO = "zero_optimization"

_PASSED = {
    "communication_data_type": "fp32",
    "data_types.grad_accum_dtype": "fp32",
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "zero_allow_untested_optimizer": True,  # SGD; the losses are compared with one process
    "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW updates on the host, and needs no compiler
}
"""What the engine relies on, and DeepSpeed is told."""

_NEEDED = {
    **_PASSED,
    f"{_ZERO}.compute_grad_norm": True,
    f"{_ZERO}.cpu_offload": False,
    f"{_ZERO}.cpu_offload_param": False,
    f"{_ZERO}.offload_optimizer.ratio": 1.0,
    f"{_ZERO}.offload_optimizer.super_offload": False,
    f"{_ZERO}.zero_hpz_partition_size": 1,
    "bf16.bf16_master_weights_and_grads": False,
    "compile.deepcompile": False,
    "data_efficiency.enabled": False,
    "fp16.enabled": False,
    "hybrid_engine.enabled": False,
    "optimizer.params.adam_w_mode": True,
    "torch_autocast.dtype": "bfloat16",
    "torch_autocast.lower_precision_safe_modules": [],  # of these it would reduce gradients in bf16
}
"""What must not stand in the JSON with another value."""

_NO_PLACE = ("expert_parallel", "pipeline", "sequence_parallel_size", "tensor_parallel", f"{_ZERO}.zenflow")


def deepspeed_settings(config: Config, data_ranks: int, device: torch.device) -> dict[str, Any]:
    """What DeepSpeed is given. Raises :class:`UserError` naming the key at fault and both values."""
    path = config.parallel.deepspeed.config
    tree = _read(path) if path else {}
    refuse_unknown(tree, path)
    given = {key: value for key, value in _leaves(tree) if value is not None and value != "auto"}
    _refuse_no_place(given, path, config)
    for key, ours, name in _agreed(config, data_ranks):
        if given.get(key, ours) != ours and _spelt(given[key]) != ours:
            raise UserError(
                f"{key} is {given[key]!r} in {path} and {name} is {ours!r}; make them equal, or write 'auto' there"
            )
    for key, needed in _NEEDED.items():
        if given.get(key, needed) != needed:
            raise UserError(f"{key} is {given[key]!r} in {path} and must be {needed!r} here; leave it out")
    agreed = {key for key, _, _ in _agreed(config, data_ranks)}
    rest = {key: value for key, value in given.items() if key not in agreed and not key.startswith("optimizer.")}
    return _nested(_defaults(device) | rest | _passed(config))


def _read(path: str) -> dict[str, Any]:
    try:
        tree = json.loads(storage.read(path))
    except FileNotFoundError:
        raise UserError(f"parallel.deepspeed.config is {path!r}, where there is no file") from None
    except ValueError as error:
        raise UserError(f"parallel.deepspeed.config: {path} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"parallel.deepspeed.config: {path} is not a JSON object")
    return tree


def _agreed(config: Config, data_ranks: int) -> Iterator[tuple[str, Any, str]]:
    """Keys of the JSON that our config has a setting for: the key, our value, and our name for it."""
    deepspeed, optim, bf16 = config.parallel.deepspeed, config.optim, config.precision.compute == "bf16"
    share = -(-config.data.global_batch_size // data_ranks)
    micro = min(config.parallel.micro_batch or share, share)
    yield "train_batch_size", config.data.global_batch_size, "data.global_batch_size"
    yield "train_micro_batch_size_per_gpu", micro, "by parallel.micro_batch and the ranks it"
    yield "gradient_accumulation_steps", -(-share // micro), "by parallel.micro_batch and the ranks it"
    yield "gradient_clipping", optim.max_norm, "optim.max_norm"
    for key in ("bf16", "bfloat16", "torch_autocast"):
        yield f"{key}.enabled", bf16, "bf16 as precision.compute"
    yield f"{_ZERO}.stage", deepspeed.stage, "parallel.deepspeed.stage"
    for key, offload, name in (
        ("offload_optimizer", deepspeed.offload_optimizer, "offload_optimizer"),
        ("offload_param", deepspeed.offload_parameters, "offload_parameters"),
    ):
        yield f"{_ZERO}.{key}.device", "cpu" if offload else "none", f"by parallel.deepspeed.{name} it"
    yield "optimizer.type", optim.name, "optim.name"
    names = {"lr": "learning_rate", "weight_decay": "weight_decay"}
    extra = ("betas", "eps") if optim.name == "adamw" else ("momentum", "nesterov")
    for key, name in (names | {name: name for name in extra}).items():
        value = getattr(optim, name)
        yield f"optimizer.params.{key}", list(value) if isinstance(value, tuple) else value, f"optim.{name}"


def _spelt(value: Any) -> Any:
    """An optimizer by our name for it; DeepSpeed's Adam is AdamW unless `adam_w_mode` is false."""
    name = value.lower() if isinstance(value, str) else value
    return "adamw" if name == "adam" else name


def _refuse_no_place(given: Mapping[str, Any], path: str, config: Config) -> None:
    for key, value in given.items():
        if key.startswith("scheduler."):
            raise UserError(
                f"{key} is {value!r} in {path} and schedule.name is {config.schedule.name!r}, which sets the learning "
                "rate before each step; remove the scheduler from the JSON"
            )
        if key.startswith(_NO_PLACE):
            raise UserError(f"{key} is {value!r} in {path}: this engine is data parallel alone; remove it")
        if key.startswith("optimizer.") and key not in _optimizer_keys(config):
            raise UserError(f"{key} is {value!r} in {path}, which optim.name {config.optim.name!r} has not; remove it")


def _optimizer_keys(config: Config) -> set[str]:
    return {key for key, _, _ in _agreed(config, 1)} | {"optimizer.params.adam_w_mode"}


def _defaults(device: torch.device) -> dict[str, Any]:
    """Where the JSON says nothing."""
    pinned = device.type == "cuda"
    return {
        "timers.throughput.enabled": False,  # it would wait for the device in every step
        f"{_ZERO}.offload_optimizer.pin_memory": pinned,
        f"{_ZERO}.offload_param.pin_memory": pinned,
    }


def _passed(config: Config) -> dict[str, Any]:
    """What DeepSpeed is told whatever the JSON says. It counts neither samples nor micro-batches, for shares may be
    ragged, and it clips by the norm that each step is given."""
    deepspeed, bf16 = config.parallel.deepspeed, config.precision.compute == "bf16"
    offloads = {"offload_optimizer": deepspeed.offload_optimizer, "offload_param": deepspeed.offload_parameters}
    return {
        **_PASSED,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        f"{_ZERO}.stage": deepspeed.stage,
        **{f"{_ZERO}.{key}.device": "cpu" if offload else "none" for key, offload in offloads.items()},
        "torch_autocast.enabled": bf16,
        "torch_autocast.dtype": "bfloat16",
        "torch_autocast.lower_precision_safe_modules": [],
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        *path, last = key.split(".")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return tree
