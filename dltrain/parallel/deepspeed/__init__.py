"""DeepSpeed as an engine: ZeRO and offload, data parallel."""
