"""dltrain: distributed training of image and time-series models in PyTorch.

Importing the package imports neither torch nor boto3: every public name is looked up when it is first used,
so that ``dltrain --help`` answers at once.

    from dltrain import Config, Task, preset
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Batch": "dltrain.task",
    "Config": "dltrain.config",
    "Dataset": "dltrain.data.reader",
    "Finding": "dltrain.debugger.findings",
    "Hook": "dltrain.hooks.base",
    "Cache": "dltrain.data.dataset",
    "Length": "dltrain.config",
    "Loader": "dltrain.data.loader",
    "Loss": "dltrain.task",
    "MixedDataset": "dltrain.data.mixture",
    "Order": "dltrain.data.order",
    "Plan": "dltrain.parallel.plan",
    "Request": "dltrain.hooks.base",
    "Rule": "dltrain.debugger.rules.base",
    "Sample": "dltrain.task",
    "Section": "dltrain.config",
    "Seen": "dltrain.debugger.seen",
    "Source": "dltrain.data.mixture",
    "ShardWriter": "dltrain.data.writer",
    "Task": "dltrain.task",
    "Trainer": "dltrain.trainer",
    "UserError": "dltrain.errors",
    "main": "dltrain.job",
    "open_dataset": "dltrain.data.dataset",
    "open_run": "dltrain.debugger.run",
    "preset": "dltrain.config",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dltrain' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if TYPE_CHECKING:
    from dltrain.config import Config, Length, Section, preset
    from dltrain.data.dataset import Cache, open_dataset
    from dltrain.data.loader import Loader
    from dltrain.data.mixture import MixedDataset, Source
    from dltrain.data.order import Order
    from dltrain.data.reader import Dataset
    from dltrain.data.writer import ShardWriter
    from dltrain.debugger.findings import Finding
    from dltrain.debugger.rules.base import Rule
    from dltrain.debugger.run import open_run
    from dltrain.debugger.seen import Seen
    from dltrain.errors import UserError
    from dltrain.hooks.base import Hook, Request
    from dltrain.job import main
    from dltrain.parallel.plan import Plan
    from dltrain.task import Batch, Loss, Sample, Task
    from dltrain.trainer import Trainer
