"""Stages of a model that is no chain of modules, cut by tracing its forward (torch.export).

A trace is of one mode and one size of the micro-batch: each stage has two, for training and for evaluation, on the same
parameters. Values that later stages want, as in a skip connection, are handed on by those between.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from dltrain.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.pipelining import Pipe

Value = tuple[int, int]
"""Something a stage returned: the stage, and the place in what it returned."""
Source = int | Value
"""One of the model's inputs, or a value."""


class TracedStage(nn.Module):
    """A stage in its two modes, on the same parameters."""

    def __init__(self, training: Trace, evaluation: Trace) -> None:
        super().__init__()
        self.training_trace, self.evaluation_trace = training, evaluation

    def forward(self, values: tuple[Any, ...], inputs: tuple[Any, ...]) -> Any:
        trace = self.training_trace if self.training else self.evaluation_trace
        return trace(values, inputs)

    def train(self, mode: bool = True) -> TracedStage:
        self.training = mode  # the traces know their mode, and refuse to change it
        return self


class Trace(nn.Module):
    """One stage in one mode: ``part`` takes inputs of the model and values of stages before, from ``sources``.

    ``comes`` are the values that the stage is given, ``goes`` those that later stages want.
    """

    def __init__(
        self, number: int, part: nn.Module, sources: Sequence[Source], comes: Sequence[Value], goes: Sequence[Value]
    ) -> None:
        super().__init__()
        self.part = part
        self._number, self._sources, self._comes, self._goes = number, sources, comes, goes

    def forward(self, values: tuple[Any, ...], inputs: tuple[Any, ...]) -> Any:
        known = dict(zip(self._comes, values, strict=True)) if self._comes else {}
        returned = self.part(*(inputs[at] if isinstance(at, int) else known[at] for at in self._sources))
        if not self._goes:
            return returned
        own = returned if isinstance(returned, tuple | list) else (returned,)
        known |= {(self._number, place): value for place, value in enumerate(own)}
        return tuple(known[value] for value in self._goes)


def traced(model: nn.Module, inputs: tuple[Any, ...], begins: Sequence[str]) -> list[TracedStage]:
    """The model in stages, each but the first beginning with the module of that name, all it saves in one of them.

    ``inputs`` are those of one micro-batch. Raises :class:`UserError` with the line that cannot be traced.
    """
    training = _traces(_trace(model.train(), inputs, begins), len(begins) + 1)
    evaluation = _traces(_trace(model.eval(), inputs, begins), len(begins) + 1)
    model.train()
    stages = [TracedStage(*both) for both in zip(training, evaluation, strict=True)]
    _refuse_other_outputs(model, stages, inputs)
    _give_unused(model, stages)
    return stages


@torch.no_grad()
def _refuse_other_outputs(model: nn.Module, stages: Sequence[TracedStage], inputs: tuple[Any, ...]) -> None:
    """A trace may leave out what is no operation on tensors of its own, such as a write into a buffer of the model."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    expected = tree_leaves(model.eval()(*inputs))
    model.train()
    try:
        values: Any = inputs
        for stage in stages:
            values = stage.eval()(values if isinstance(values, tuple) else (values,), inputs)
        found = tree_leaves(values)
        same = all(torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(found, expected, strict=True))
        reason = "" if same else "they give other outputs than the model"
    except (TypeError, RuntimeError, ValueError, KeyError) as error:
        reason = f"they do not run: {_first_line(error)}"
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    for stage in stages:
        stage.train()
    if reason:
        raise UserError(
            f"parallel.pp cuts {type(model).__name__} by tracing its forward, for its plan names no chain, into stages "
            f"that are wrong ({reason}); name the modules that the forward calls one after another in Plan(chain=(...))"
        )


def keep_tensors(model: nn.Module, stages: Sequence[TracedStage]) -> None:
    """Leave only the parameters and buffers of the stages in ``model``, in place."""
    traces = [trace for stage in stages for trace in (stage.training_trace, stage.evaluation_trace)]
    kept = {id(tensor) for trace in traces for tensor in (*trace.parameters(), *trace.buffers())}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name in [name for name, tensor in tensors.items() if id(tensor) not in kept]:
                tensors[name] = None


def adopt(model: nn.Module, stages: Iterable[nn.Module]) -> None:
    """Give ``model`` the parameters that its stages have by now, when FSDP2 has put shards in the place of the first.

    The traces call them by the names that they have in the model.
    """
    for stage in stages:
        assert isinstance(stage, TracedStage)
        for name, parameter in stage.training_trace.part.named_parameters():
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._parameters[last] = parameter


def _give_unused(model: nn.Module, stages: Sequence[TracedStage]) -> None:
    """The first stage gets what is saved with the model and no trace has use for, under its name in the model."""
    used = {id(tensor) for stage in stages for tensor in (*stage.parameters(), *stage.buffers())}
    saved = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) in used or name not in saved:
            continue
        path, _, last = name.rpartition(".")
        part: Any = stages[0].training_trace.part
        if path and path not in dict(part.named_modules(remove_duplicate=False)):
            part.add_submodule(path, nn.Module())
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        getattr(part.get_submodule(path), f"register_{kind}")(last, tensor)


def _trace(model: nn.Module, inputs: tuple[Any, ...], begins: Sequence[str]) -> Pipe:
    from torch.distributed.pipelining import SplitPoint, pipeline  # slow to import

    try:
        with _quiet():
            return pipeline(model, inputs, split_spec=dict.fromkeys(begins, SplitPoint.BEGINNING))
    except Exception as error:
        cause = error
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        raise UserError(
            f"parallel.pp cuts {type(model).__name__} by tracing its forward, for its plan names no chain, and "
            f"{_where(cause)} cannot be traced ({_first_line(cause)}); change that line, or name the modules that the "
            "forward calls one after another in Plan(chain=(...))"
        ) from error
    finally:
        for name in begins:  # where torch has put its marks
            model.get_submodule(name).__dict__.pop("forward", None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's logs of what it could not trace, and warnings about its own code."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _where(error: BaseException) -> str:
    """The last line outside of torch."""
    torch_folder = str(Path(torch.__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if torch_folder not in frame.filename]
    mine = [frame for frame in frames if frame.filename != __file__]
    if not mine:
        return "it"
    return f"line {mine[-1].lineno} of {Path(mine[-1].filename).name} ({mine[-1].line})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _traces(pipe: Pipe, wanted: int) -> list[Trace]:
    sources = _sources(pipe)
    assert len(sources) == wanted, f"{len(sources)} stages were traced, not {wanted}"
    between: list[list[Value]] = []
    for stage in range(wanted):
        later = {at for each in sources[stage:] for at in each if not isinstance(at, int)}
        between.append(sorted(value for value in later if value[0] < stage))
    return [
        Trace(stage, pipe.get_stage_module(stage), sources[stage], between[stage], goes)
        for stage, goes in enumerate([*between[1:], []])
    ]


def _sources(pipe: Pipe) -> list[list[Source]]:
    """Where each stage's arguments come from."""
    found: list[list[Source]] = []
    known: dict[Node, Source] = {}
    for node in pipe.split_gm.graph.nodes:
        if node.op == "placeholder":
            known[node] = sum(isinstance(source, int) for source in known.values())
        elif node.op == "call_module":
            found.append([known[argument] for argument in node.args])
            known[node] = (len(found) - 1, 0)
        elif node.op == "call_function" and isinstance(node.args[0], Node):
            stage = known[node.args[0]]
            assert isinstance(stage, tuple)
            known[node] = (stage[0], int(node.args[1]))
    return found
