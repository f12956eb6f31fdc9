"""DeepSpeed's JSON, filled in from our config and checked against it.

What the config says too (batch sizes, precision, clipping, optimizer, schedule, ZeRO) must be equal in the JSON, or
"auto", or absent. What the engine relies on must be as it needs it. Everything else that DeepSpeed knows is passed on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from pydantic import ValidationError

from dltrain import storage
from dltrain.config import Config, Optim, flattened
from dltrain.errors import UserError
from dltrain.parallel.deepspeed.keys import refuse_unknown

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
    given = {key: value for key, value in flattened(tree).items() if value is not None and value != "auto"}
    agreed = _agreed(config, data_ranks)
    for key, value in given.items():
        _refuse_scheduler(key, value, path, config)
        _refuse_difference(key, value, path, agreed)
    rest = {key: value for key, value in given.items() if key not in agreed and key not in _NEEDED}
    settings = _nested(_defaults(device) | rest | _passed(config))
    _refuse_values(settings, path)
    return settings


def _read(path: str) -> dict[str, Any]:
    try:
        tree = json.loads(storage.read(path))
    except UserError as error:
        raise UserError(f"parallel.deepspeed.config is {path!r}: {error}") from None
    except ValueError as error:
        raise UserError(f"parallel.deepspeed.config: {path} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"parallel.deepspeed.config: {path} is not a JSON object")
    return tree


def _agreed(config: Config, data_ranks: int) -> dict[str, tuple[Any, str]]:
    """Keys of the JSON that our config has a setting for: our value, and the words for it."""
    deepspeed, precision = config.parallel.deepspeed, config.precision.compute
    share = -(-config.data.global_batch_size // data_ranks)
    micro = min(config.parallel.micro_batch or share, share)
    split = f"parallel.micro_batch {config.parallel.micro_batch} on {data_ranks} rank(s) makes it"
    agreed = {
        "train_batch_size": (config.data.global_batch_size, "data.global_batch_size is"),
        "train_micro_batch_size_per_gpu": (micro, split),
        "gradient_accumulation_steps": (-(-share // micro), split),
        "gradient_clipping": (config.optim.max_norm, "optim.max_norm is"),
        f"{_ZERO}.stage": (deepspeed.stage, "parallel.deepspeed.stage is"),
        **{f"{_ZERO}.{key}.device": (device, f"{name} makes it") for key, device, name in _offloads(config)},
        **_optimizer(config.optim),
    }
    for section in ("bf16", "bfloat16", "torch_autocast"):
        agreed[f"{section}.enabled"] = (precision == "bf16", f"precision.compute {precision} makes it")
    return {key: (ours, f"{words} {ours!r}") for key, (ours, words) in agreed.items()}


def _offloads(config: Config) -> Iterator[tuple[str, str, str]]:
    """What may be kept in the host's memory: DeepSpeed's section, its device, and our name for it."""
    deepspeed = config.parallel.deepspeed
    kept = {"offload_optimizer": deepspeed.offload_optimizer, "offload_parameters": deepspeed.offload_parameters}
    for name, on in kept.items():
        key = "offload_param" if name == "offload_parameters" else name
        yield key, "cpu" if on else "none", f"parallel.deepspeed.{name}"


def _optimizer(optim: Optim) -> dict[str, tuple[Any, str]]:
    values = {"lr": "learning_rate", "weight_decay": "weight_decay"}
    values |= {name: name for name in (("betas", "eps") if optim.name == "adamw" else ("momentum", "nesterov"))}
    agreed: dict[str, tuple[Any, str]] = {"optimizer.type": (optim.name, "optim.name is")}
    for key, name in values.items():
        value = getattr(optim, name)
        agreed[f"optimizer.params.{key}"] = (list(value) if isinstance(value, tuple) else value, f"optim.{name} is")
    return agreed


def _refuse_scheduler(key: str, value: Any, path: str, config: Config) -> None:
    if key.startswith("scheduler."):
        raise UserError(
            f"{key} is {value!r} in {path} and schedule.name is {config.schedule.name!r}, which sets the learning rate "
            "before each step; remove the scheduler from the JSON"
        )


def _refuse_difference(key: str, value: Any, path: str, agreed: Mapping[str, tuple[Any, str]]) -> None:
    if key.startswith(_NO_PLACE):
        raise UserError(f"{key} is {value!r} in {path}: this engine is data parallel alone; remove it")
    if key in _NEEDED and value != _NEEDED[key]:
        raise UserError(f"{key} is {value!r} in {path} and must be {_NEEDED[key]!r} here; leave it out")
    if key in agreed and agreed[key][0] not in (value, _spelt(value)):
        raise UserError(f"{key} is {value!r} in {path} and {agreed[key][1]}; make them agree, or write 'auto' there")
    if key.startswith("optimizer.") and key not in agreed and key not in _NEEDED:
        raise UserError(
            f"{key} is {value!r} in {path}, and {agreed['optimizer.type'][1]}, which has no such setting; remove it"
        )


def _refuse_values(settings: dict[str, Any], path: str) -> None:
    """What DeepSpeed itself finds wrong with values, before it is given a model."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(deepcopy(settings))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"DeepSpeed refuses {name} {first['input']!r} in {path}: {first['msg']}") from None
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        raise UserError(f"DeepSpeed refuses {path}: {error}") from None


def _spelt(value: Any) -> Any:
    """An optimizer by our name for it; DeepSpeed's Adam is AdamW unless `adam_w_mode` is false."""
    name = value.lower() if isinstance(value, str) else value
    return "adamw" if name == "adam" else name


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
    return {
        **_PASSED,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        f"{_ZERO}.stage": config.parallel.deepspeed.stage,
        **{f"{_ZERO}.{key}.device": device for key, device, _ in _offloads(config)},
        "torch_autocast.enabled": config.precision.compute == "bf16",
        "torch_autocast.dtype": "bfloat16",
        "torch_autocast.lower_precision_safe_modules": [],
    }


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        *path, last = key.split(".")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return tree
