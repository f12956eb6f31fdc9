"""``dltrain verify RECIPE --nproc N [--parallel.NAME value ...]``"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dltrain.cli.main import Parser
from dltrain.config import Config, split_arguments
from dltrain.config.tree import AUTO
from dltrain.degrees import degrees_of
from dltrain.errors import UserError
from dltrain.parallel.pipeline.schedule import micro_batches, stages_per_rank
from dltrain.recipes import declarations, find, recipe_name
from dltrain.runtime.environment import Environment, cores
from dltrain.runtime.launch import RECIPE, launch

BOUNDS = {"fp32": (1e-5, 3e-5), "bf16": (1e-2, 1e-1), "fp16": (1e-2, 1e-1), "float8": (5e-2, 2e-1)}
"""Of losses, absolute, and of norms and gradients, relative: in fp32 40 times the rounding measured over ten steps. In
bf16 FSDP2 rounds what residual connections add up, which autocast on one process does not: gradients are 3e-2 apart."""

_ONE_PROCESS = {"parallel.engine": "plain", "parallel.dp_replicate": -1} | {
    **{f"parallel.{axis}": 1 for axis in ("dp_shard", "tp", "cp", "pp")},
    **{f"parallel.{name}": False for name in ("sequence", "offload")},
}

_WHAT = (
    "Train a recipe for some steps on one process and under a layout, and compare losses, gradient norms and the first "
    "step's gradients. Exit status 1 where they differ. Dropout is off and batch norm keeps its statistics."
)


def run(arguments: Sequence[str]) -> int:
    """Record both, compare, and end with one line of JSON."""
    words, overrides = split_arguments(arguments)
    parser = Parser(prog="dltrain verify", description=_WHAT)
    parser.add_argument("recipe", help="a name from `dltrain recipe ls`, or a file of yours")
    parser.add_argument("--preset", default="")
    parser.add_argument("--nproc", type=int, default=2, help="ranks of the layout (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="(default: %(default)s)")
    known = parser.parse_args(words)
    for name in ("nproc", "steps"):
        if getattr(known, name) < 1:
            raise UserError(f"--{name} is {getattr(known, name)}; give 1 or more")
    config = declarations(known.recipe).configure(known.preset, overrides)
    program, preset = [sys.executable, str(find(known.recipe)), "verify"], ["--preset", known.preset]
    threads = config.run.threads or max(1, cores() // known.nproc)
    whole = {"run.threads": threads, **overrides}
    alone = {name: value for name, value in whole.items() if not name.startswith("parallel.deepspeed.")} | _ONE_PROCESS
    alone["parallel.micro_batch"] = _micro_batch(config, known.nproc)
    with tempfile.TemporaryDirectory(prefix="dltrain-verify-") as folder:
        for name, settings, ranks in (("layout", whole, known.nproc), ("alone", alone, 1)):  # its refusals first
            place = Path(folder) / name
            place.mkdir()
            command = [*program, str(place), "--steps", str(known.steps), *(preset if known.preset else [])]
            command += [f"--{key}={value}" for key, value in settings.items()]
            status = launch(command, ranks, {RECIPE: recipe_name(known.recipe)})
            if status:
                return status
        return _judge(Path(folder), config, known)


def _micro_batch(config: Config, ranks: int) -> int | str:
    """Of one process that cuts a batch into as many micro-batches as the ranks do."""
    parallel, degrees = config.parallel, degrees_of(config.parallel, Environment(0, ranks, 0, ranks))
    if parallel.micro_batch == AUTO:
        return "auto"
    size = parallel.micro_batch
    if degrees.pp > 1:
        stages = degrees.pp * (parallel.stages_per_rank or stages_per_rank(parallel.schedule))
        samples = -(-config.data.global_batch_size // degrees.data_ranks)
        size = micro_batches(samples, size, stages, degrees.pp)[1]
    return size * degrees.data_ranks


def _judge(folder: Path, config: Config, known: Any) -> int:
    from dltrain.verification import Bounds, compare, read  # imports torch

    difference = compare(read(folder / "alone"), read(folder / "layout"))
    bounds = Bounds(*BOUNDS[_coarsest(config)])
    same, first = difference.within(bounds), difference.first(bounds)
    print(f"{known.recipe}: {known.steps} steps on {known.nproc} rank(s) against one process, largest differences")
    print(f"  loss           {difference.loss:.1e}")
    print(f"  gradient norm  {difference.norm:.1e}, relative")
    print(f"  gradient       {difference.gradient:.1e} of the largest, at {difference.parameter}")
    print(f"  weight         {difference.weight:.1e} after the last step, for show")
    verdict = "the same" if same else "NOT THE SAME"
    print(f"  {verdict}: losses within {bounds.loss:g}, the others {bounds.gradient:g}" + _at(first))
    parts = {name: getattr(difference, name) for name in ("loss", "norm", "gradient", "parameter", "weight")}
    parts = {
        name: None if isinstance(part, float) and not math.isfinite(part) else part for name, part in parts.items()
    }
    print(json.dumps({"same": same, "bounds": bounds, **parts}), flush=True)
    return 0 if same else 1


def _coarsest(config: Config) -> str:
    """The number format that rounds most: of products, or of what ranks send."""
    precision, parallel = config.precision, config.parallel
    if precision.float8:
        return "float8"
    sends = "bf16" if precision.reduce == "bf16" or parallel.compress in ("fp16", "bf16") else precision.compute
    return "float8" if parallel.compress == "powersgd" else sends


def _at(parameter: str) -> str:
    return f"; gradients depart from {parameter} on" if parameter else ""
