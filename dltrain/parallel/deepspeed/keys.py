"""The keys of DeepSpeed's JSON: an unknown one is refused, with the nearest that there is.

Where DeepSpeed has a pydantic model of a section, its fields are the keys, at every depth. The other sections and the
keys outside of sections are listed here, as DeepSpeed 0.19 reads them; what lies inside a section of free form
(autotuning, data efficiency, parameters of optimizer and scheduler) is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, get_args

from pydantic import BaseModel

from dltrain.errors import UserError, nearest

_SCALARS = {
    "communication_data_type",
    "data_parallel_size",
    "dataloader_drop_last",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "gradient_accumulation_steps",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "log_level",
    "managed_gradient_accumulation",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "sequence_parallel_size",
    "steps_per_print",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}

_FREE = {
    "autotuning",
    "data_efficiency",
    "datastates_ckpt",
    "expert_parallel",
    "pipeline",
    "weight_quantization",
}

_LISTED = {
    "activation_checkpointing": {
        "contiguous_memory_optimization",
        "cpu_checkpointing",
        "number_checkpoints",
        "partition_activations",
        "profile",
        "synchronize_checkpoint_boundary",
    },
    "aio": {"block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit", "use_gds"},
    "checkpoint": {
        "checkpoint_serialization",
        "load_universal",
        "parallel_write",
        "tag_validation",
        "use_node_local_storage",
        "writer",
    },
    "data_types": {"buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"},
    "flops_profiler": {
        "detailed",
        "enabled",
        "module_depth",
        "output_file",
        "profile_step",
        "recompute_fwd_factor",
        "top_modules",
    },
    "optimizer": {"legacy_fusion", "params", "type"},
    "scheduler": {"params", "type"},
    "torch_autocast": {"dtype", "enabled", "lower_precision_safe_modules"},
}

_MODELS = {
    "bf16": "runtime.precision_config:DeepSpeedBF16Config",
    "bfloat16": "runtime.precision_config:DeepSpeedBF16Config",
    "comet": "monitor.config:CometConfig",
    "comms_logger": "comm.config:CommsLoggerConfig",
    "compile": "compile.config:CompileConfig",
    "csv_monitor": "monitor.config:CSVConfig",
    "fp16": "runtime.precision_config:DeepSpeedFP16Config",
    "hybrid_engine": "runtime.config:HybridEngineConfig",
    "tensor_parallel": "runtime.tensor_parallel.config:TPTrainingConfig",
    "tensorboard": "monitor.config:TensorBoardConfig",
    "timers.throughput": "utils.config:DeepSpeedThroughputTimerConfig",
    "wandb": "monitor.config:WandbConfig",
    "zero_optimization": "runtime.zero.config:DeepSpeedZeroConfig",
}


def refuse_unknown(given: Mapping[str, Any], source: str) -> None:
    """Raises :class:`UserError` for the first key in ``given`` that DeepSpeed does not know."""
    sections = {name.partition(".")[0] for name in _MODELS} | _LISTED.keys() | _FREE
    _refuse(given, _SCALARS | sections, "", source)
    for name in given.keys() & sections:
        if not isinstance(given[name], Mapping | None):
            raise UserError(f"{name} in {source} is {given[name]!r}; it is a section with keys of its own")
    for name in _LISTED.keys() & given.keys():
        _refuse(given[name] or {}, _LISTED[name], f"{name}.", source)
    for name, path in _MODELS.items():
        section, _, inner = name.partition(".")
        part = given.get(section) or {}
        if inner:
            _refuse(part, {inner}, f"{section}.", source)
            part = part.get(inner) or {}
        if part:
            _refuse_fields(part, _model(path), f"{name}.", source)


def _model(path: str) -> type[BaseModel]:
    module, _, name = path.partition(":")
    model: type[BaseModel] = getattr(import_module(f"deepspeed.{module}"), name)
    return model


def _refuse_fields(given: Mapping[str, Any], model: type[BaseModel], prefix: str, source: str) -> None:
    """By the model's field names and their other names, such as ``stage3_prefetch_bucket_size``."""
    fields = model.model_fields
    aliases = {field.alias: field for field in fields.values() if field.alias}
    known = {**fields, **aliases}
    _refuse(given, known.keys(), prefix, source)
    for name, value in given.items():
        for kind in (known[name].annotation, *get_args(known[name].annotation)):
            if isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, BaseModel):
                _refuse_fields(value, kind, f"{prefix}{name}.", source)


def _refuse(given: Mapping[str, Any], known: Any, prefix: str, source: str) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"DeepSpeed has no key {prefix + name!r}, which stands in {source}; {nearest(name, known)}")
