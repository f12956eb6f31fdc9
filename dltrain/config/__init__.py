"""Configuration: a typed tree, strict loading, dotted overrides, a YAML record. Imports no torch.

config = load_overrides(digits(), {"optim.learning_rate": "0.1"})
assert from_yaml(Config, to_yaml(config)) == config
"""

from dltrain.config.debugger import Collection, Debugger, Profiler
from dltrain.config.deepspeed import DeepSpeed
from dltrain.config.length import Length
from dltrain.config.load import flattened, from_tree, from_yaml, load_overrides, split_arguments, to_yaml
from dltrain.config.section import Section
from dltrain.config.tree import (
    Checkpoint,
    Config,
    Data,
    Evaluation,
    Logging,
    Model,
    Optim,
    Parallel,
    Precision,
    Run,
    Schedule,
    Source,
    Storage,
    preset,
)

__all__ = [
    "Checkpoint",
    "Collection",
    "Config",
    "Data",
    "Debugger",
    "DeepSpeed",
    "Evaluation",
    "Length",
    "Logging",
    "Model",
    "Optim",
    "Parallel",
    "Precision",
    "Profiler",
    "Run",
    "Schedule",
    "Section",
    "Source",
    "Storage",
    "flattened",
    "from_tree",
    "from_yaml",
    "load_overrides",
    "preset",
    "split_arguments",
    "to_yaml",
]
