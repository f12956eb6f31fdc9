"""The settings of DeepSpeed's engine. Imports no DeepSpeed."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dltrain.config.section import Section


class DeepSpeed(Section):
    """What DeepSpeed does where `parallel.engine` is deepspeed; its ZeRO shards over all ranks."""

    stage: int = Field(default=2, ge=0, le=3)
    """ZeRO (Rajbhandari et al. 2020) shards the optimizer (1), gradients too (2), weights too (3); 0 shards nothing."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the host's memory and update there; stages 1 to 3."""
    offload_parameters: bool = False
    """Keep sharded weights in the host's memory between uses; stage 3."""
    config: str = ""
    """URL or path of a DeepSpeed JSON; what this config says too must be equal there, or 'auto'."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3: stage 0 has no shard to keep elsewhere")
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3: stage {self.stage} keeps whole weights on each rank")
        return self


def refuse_other_layouts(parallel: Section) -> None:
    """Raises :class:`ValueError` for degrees, of the section ``parallel``, that DeepSpeed's engine has not."""
    degrees = dict(parallel)
    if degrees["dp_shard"] != 1:
        raise ValueError(
            f"dp_shard is {degrees['dp_shard']} and engine 'deepspeed', whose ZeRO shards over all ranks by itself; "
            "leave parallel.dp_shard 1 and choose parallel.deepspeed.stage"
        )
    for name in ("tp", "pp", "cp"):
        if degrees.get(name, 1) != 1:
            raise ValueError(f"{name} is {degrees[name]} and engine 'deepspeed', which divides data alone; leave it 1")
