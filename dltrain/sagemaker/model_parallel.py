"""``mp_parameters`` of SageMaker's model parallel library (SMP v2) as settings of our mesh.

    settings_of({"tensor_parallel_degree": 2})  # {"parallel.tp": 2}, and what to tell the user

The library itself is not used: degrees mean the same here. Parameters of its first version, which cut models in its own
way, are refused with the setting that takes their place.

Reference: https://docs.aws.amazon.com/sagemaker/latest/dg/distributed-model-parallel-v2-reference.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dltrain.errors import UserError, nearest

NAME = "mp_parameters"

_OURS = {
    "tensor_parallel_degree": "parallel.tp",
    "context_parallel_degree": "parallel.cp",
    "random_seed": "run.seed",
}

_WITHOUT_MEANING = ("fsdp_cache_flush_warnings", "allow_empty_shards", "activation_loading_horizon")

_KNOWN = (*_OURS, "hybrid_shard_degree", "expert_parallel_degree", "sm_activation_offloading", *_WITHOUT_MEANING)

_OF_VERSION_1 = {
    "partitions": "parallel.pp",
    "pipeline_parallel_degree": "parallel.pp",
    "microbatches": "parallel.micro_batch (samples of a rank in one pass)",
    "active_microbatches": "parallel.schedule",
    "pipeline": "parallel.schedule",
    "sharded_data_parallel_degree": "parallel.dp_shard",
    "shard_optimizer_state": "parallel.dp_shard",
    "ddp": "parallel.dp_replicate; ranks that are left over are replicas anyway",
    "ddp_dist_backend": "nothing: NCCL or gloo is chosen by the device",
    "offload_activations": "parallel.activation_checkpointing",
    "fp16": "precision.compute fp16",
    "fp16_params": "precision.compute fp16",
    "bf16": "precision.compute bf16",
    "sdp_gradient_clipping": "optim.max_norm",
    "sdp_reduce_bucket_size": "nothing: FSDP2 reduces unit by unit",
    "sdp_param_persistence_threshold": "nothing: FSDP2 shards all parameters",
    "sdp_max_live_parameters": "parallel.prefetch (units gathered ahead)",
    "sdp_hierarchical_allgather": "parallel.dp_replicate with parallel.dp_shard, which keeps gathers within a host",
    "auto_partition": "nothing: pipelines are cut by cost where parallel.pp is given",
    "default_partition": "the model's plan, which says where a pipeline may be cut",
    "memory_weight": "nothing: pipelines are cut by cost",
    "optimize": "parallel.tp and parallel.sequence",
    "placement_strategy": "nothing: the order is pipeline, replicas, shards, context, tensor",
    "deterministic_server": "run.deterministic",
    "prescaled_batch": "data.global_batch_size, which counts the samples of all ranks",
    "skip_tracing": "nothing: models are traced only where their plan does not say how to cut them",
}
"""Parameters of the library's first version, and what there is instead."""


def settings_of(parameters: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Settings by dotted name, and a sentence for each parameter that does something else here or nothing.

    ``parameters`` is a mapping or its JSON. Raises :class:`UserError` for what has no counterpart.
    """
    given = _mapping(parameters)
    settings: dict[str, Any] = {}
    told: list[str] = []
    for name, value in given.items():
        if name in _OF_VERSION_1:
            raise UserError(f"{NAME} has {name!r}, of SageMaker's first model parallel library; take instead: "
                            f"{_OF_VERSION_1[name]}")  # fmt: skip
        if name not in _KNOWN:
            raise UserError(f"{NAME} has {name!r}, which SMP v2 does not know; {nearest(name, _KNOWN)}")
        if name in _OURS:
            settings[_OURS[name]] = _whole(name, value)
        elif name == "hybrid_shard_degree":
            # 0 leaves it to FSDP, which takes all ranks; 1 is plain replication
            settings["parallel.dp_shard"] = _whole(name, value) or -1
        elif name == "expert_parallel_degree" and _whole(name, value) > 1:
            raise UserError(f"{NAME} has expert_parallel_degree {value}, and experts are not divided here")
        elif name == "sm_activation_offloading" and _truth(name, value):
            settings["parallel.activation_checkpointing"] = "full"
            told.append(
                f"{NAME} asks for sm_activation_offloading: activations are computed again instead of kept on the host "
                "(parallel.activation_checkpointing full)"
            )
        elif name in _WITHOUT_MEANING:
            told.append(f"{NAME} has {name}, which changes nothing here")
    return settings, tuple(told)


def _mapping(parameters: Any) -> Mapping[str, Any]:
    if isinstance(parameters, str):
        try:
            parameters = json.loads(parameters)
        except ValueError:
            pairs = [pair.partition("=") for pair in parameters.split(",")]
            parameters = {name.strip(): value for name, _, value in pairs if name.strip()}
    if not isinstance(parameters, Mapping):
        raise UserError(f"{NAME} is {parameters!r}; give a mapping of SMP's parameters, as JSON")
    return parameters


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not str(value).isdecimal():
        raise UserError(f"{NAME} has {name} {value!r}; give a whole number")
    return int(value)


def _truth(name: str, value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false", "1", "0"):
        raise UserError(f"{NAME} has {name} {value!r}; give true or false")
    return text in ("true", "1")
