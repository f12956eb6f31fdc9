"""What the debugger looks at, when, and what follows: statistics of tensors, rules, profiling.

Debugger(every=Length.parse("50st"), collections={"heads": Collection(include=("head",), every=Length.parse("1st"))})
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from dltrain.config.length import Length
from dltrain.config.section import Section

NotNegative = Field(default=0, ge=0)


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
    return text


Expression = Annotated[str, AfterValidator(_expression)]
"""A regular expression, which is looked for anywhere in a tensor's name."""


def _in_steps(length: Length) -> Length:
    if length.unit != "st":
        raise ValueError("give it in steps, such as 50st")
    return length


Interval = Annotated[Length, AfterValidator(_in_steps)]


class Collection(Section):
    """Tensors by name that have steps or forms of their own; what is left out is the debugger's."""

    include: tuple[Expression, ...] = ()
    """Regular expressions of tensor names, such as gradient/head or blocks.0.attn_output; empty for the tensors of the
    kind that the collection is named after, such as gradients."""
    every: Interval = Length.parse("0st")
    """Interval between its statistics, in steps; 0st is the debugger's."""
    start: int = NotNegative
    """First step with its statistics."""
    end: int = NotNegative
    """First step without its statistics again; 0 for none."""
    steps: tuple[int, ...] = ()
    """Steps with its statistics, in place of the interval."""
    histograms: bool = False
    """Count values in bins, too, which brings quantiles."""
    raw: bool = False
    """Keep the tensors themselves, too, as safetensors."""


class Debugger(Section):
    """Statistics of tensors while the model trains, and rules that watch them; off while `every` is 0st."""

    every: Interval = Length.parse("0st")
    """Interval between statistics of tensors, in steps; the first step has them, too."""
    start: int = NotNegative
    """First step with statistics."""
    end: int = NotNegative
    """First step without statistics again; 0 for none."""
    steps: tuple[int, ...] = ()
    """Steps with statistics, in place of the interval."""
    evaluation: bool = False
    """Statistics of activations during evaluations, too."""
    collect: tuple[str, ...] = ("weights", "gradients", "updates", "activations")
    """Kinds of tensors: weights, biases, gradients (before clipping), updates (what a step adds to the weights),
    activations (what ReLU, GELU and the like return), states of the optimizer by their own names, such as exp_avg, or
    optimizer_state for all of them, and all."""
    collections: dict[str, Collection] = Field(default={})
    """Tensors with steps or forms of their own, by a name of yours or a kind's: {head: {include: [head], every: 1st}}.
    What modules take in and return is had by name: {attention: {include: ['attn_(in|out)put_']}}."""
    histograms: bool = False
    """Count values in bins, too, which brings quantiles, and TensorBoard's histograms."""
    raw: tuple[Expression, ...] = ()
    """Tensors that are kept themselves, too, by regular expressions of their names."""
    rules: tuple[str, ...] = ("default",)
    """Rules by name, with parameters as in VanishingGradient:threshold=1e-6, or Overfit:action=stop; default stands for
    several; a rule of your own as module.Class."""
    actions: tuple[str, ...] = ("log",)
    """What follows when a rule finds something: log, save (a checkpoint), capture (the batch), stop (resumable),
    call:module.function, webhook:https://..., sns:arn:..."""
    config: str = ""
    """SageMaker Debugger's debughookconfig.json, or a list of its rules, by path or URL; empty reads the one that
    SMDEBUG_CONFIG_FILE_PATH names or that lies in /opt/ml/input/config, if any, and off none. Other settings win."""
    strict: bool = False
    """End the run when a part of the debugger fails, such as by a full disk; otherwise it is told and left out."""

    @property
    def on(self) -> bool:
        """Whether any statistics are taken."""
        due: list[Any] = [self.every, self.steps, *((each.every or each.steps) for each in self.collections.values())]
        return any(bool(each) for each in due)


class Profiler(Section):
    """Where the time goes: the parts of steps, traces of some of them, memory, and what the machine does meanwhile."""

    every: Interval = Length.parse("0st")
    """Interval between steps whose parts are timed; 0st is the debugger's `every`, and none where that is off."""
    trace: tuple[int, ...] = ()
    """Steps that torch.profiler traces, for Perfetto, such as 10,11,12; and a table of their parts."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that trace."""
    memory: tuple[int, ...] = ()
    """Steps after which a snapshot of the device's memory is written; out of memory writes one anyway."""
    system: float = Field(default=1.0, gt=0)
    """Seconds between looks at CPU, disk, network and GPUs, where the debugger is on."""
    flops: bool = False
    """Count the model's FLOPs, and tell how many are done per second; it is on where the debugger is."""
    peak_tflops: float = Field(default=0.0, ge=0)
    """TFLOPs per second of a device at its best, for its utilisation (mfu); 0 takes those of GPUs that are known."""
