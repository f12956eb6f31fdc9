"""The model's graph: traced once, on the CPU, from a model that the task builds anew, so that nothing of the run's is
touched.

    graph = graph_of(task, batch, config.precision)
"""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import replace

import torch
from tensorboard.compat.proto.graph_pb2 import GraphDef
from torch.utils.tensorboard import _pytorch_graph

from dltrain.config import Config, Precision
from dltrain.data.batch import Batch
from dltrain.mesh import Mesh
from dltrain.parallel.forward import inputs_of
from dltrain.task import Task

_LARGEST = 500_000_000
"""Parameters of a model that is built once more for its graph."""

_FEW = 2
"""Samples that it is traced with."""


def lacks_graph(config: Config, mesh: Mesh, parameters: int) -> str:
    """Why a run has no graph, or nothing."""
    whole = not mesh.is_sharded and mesh.tp * mesh.cp * mesh.pp == 1
    if not whole or config.parallel.engine == "deepspeed" or config.parallel.meta:
        return "the model is not whole on one rank"
    return f"the model has {parameters:,} parameters" if parameters > _LARGEST else ""


def graph_of(task: Task, batch: Batch, precision: Precision) -> GraphDef:
    """The graph of a forward pass in evaluation. Raises what the model or torch's tracing raises."""
    few = next(batch.split(_FEW)).to(torch.device("cpu"))
    few = replace(
        few, fields={name: values.cpu() for name, values in few.fields.items()}
    )  # a GPU may have decoded them
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of values that a trace takes for constants, and of tracing's own age
        inputs = inputs_of(task, few, precision)
        return _pytorch_graph.graph(task.model(), inputs)[0]  # type: ignore[no-untyped-call]
