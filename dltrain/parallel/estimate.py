"""What a layout would take and give: memory, communication and time of a step, from the model's shapes alone.

    study = Study(task, config, model_on_meta, batch)
    for estimate in study.ranked(Cluster(64, 8, 80e9, device_of("h100")), given=()): ...

Memory (``memory.py``, ``pipeline/memory.py``) is counted, not guessed: tests compare it with what ranks allocate.
Beside it lie the CUDA context, workspaces, communicators and what the allocator cannot use: leave a few GB.

Time is an estimate for ranking layouts, not a promise. It takes for granted that

- matrix products reach ``EFFICIENCY`` of the device's peak, backward costs twice forward, and tensor and context
  parallelism share them out evenly; a stage takes that, or the time its tensors take to and from memory, or
  ``LAUNCH`` for each of its kernels, whatever is longest;
- a ring sends 2 (n - 1) / n of the bytes for an all-reduce, (n - 1) / n for a gather or a scatter, at ``LINK`` of the
  bandwidth: of the node where the group fits in one, of the network otherwise; each call costs ``LATENCY``;
- `full` checkpointing makes the products of a forward pass once more, `selective` none;
- DDP's sums hide behind the backward pass, FSDP2's gathers and sums behind both passes; what is longer shows. In a
  pipeline they do not hide: gradients are summed behind the last piece. Sums of split layers, tokens' gathers and one
  piece's way through the pipeline always show;
- a pipeline waits as its schedule does for stages of these costs; data are there when they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from dltrain.config import Config, Parallel
from dltrain.data.batch import Batch
from dltrain.degrees import Degrees, nearest_legal
from dltrain.errors import UserError
from dltrain.parallel.alone import Shares
from dltrain.parallel.checks import check_layout
from dltrain.parallel.devices import Device
from dltrain.parallel.forward import inputs_of
from dltrain.parallel.layouts import layouts
from dltrain.parallel.memory import Keeping, Memory, plain_memory, sizes_of
from dltrain.parallel.pipeline.cut import balanced, chain, costs_of
from dltrain.parallel.pipeline.discover import discovered
from dltrain.parallel.pipeline.memory import Footprint, footprints, pipeline_memory
from dltrain.parallel.pipeline.parts import refuse_shallow, schedule_of, units_in_order
from dltrain.parallel.pipeline.schedule import Schedule
from dltrain.parallel.pipeline.simulation import simulate
from dltrain.parallel.plan import Plan
from dltrain.parallel.rehearsal import SIZES, Rehearsed, Weight, on_meta, rehearse
from dltrain.runtime.environment import Environment
from dltrain.task import Task

EFFICIENCY = 0.5
"""Share of a device's peak that matrix products reach."""
LINK = 0.7
"""Share of a link's bandwidth that collectives reach."""
LAUNCH = 5e-6
"""Seconds between the starts of two kernels, which small models and small pieces wait for."""
LATENCY = 2e-5
"""Seconds of a collective beside its bytes."""

_AGAIN = {"full": 4 / 3, "selective": 1.0}
"""Products of a step, when units compute their activations again; selective keeps those of products."""

_PASSES = {"F": 1 / 3, "B": 2 / 3, "I": 1 / 3, "W": 1 / 3}


@dataclass(frozen=True)
class Cluster:
    """``world`` ranks, ``node_ranks`` on each node, each with ``memory`` bytes on a device."""

    world: int
    node_ranks: int
    memory: float
    device: Device

    def bandwidth(self, span: int) -> float:
        """Bytes per second between neighbours of a group that lies within ``span`` consecutive ranks."""
        return LINK * (self.device.intra if span <= self.node_ranks else self.device.inter)


@dataclass(frozen=True)
class Estimate:
    """One layout. ``sent`` are bytes a rank sends in a step by kind; ``bubble`` the share of time a pipeline waits."""

    parallel: Parallel
    memory: Memory
    sent: dict[str, float]
    bubble: float
    seconds: float
    samples_per_second: float
    fits: bool


@dataclass(frozen=True)
class _Work:
    """Of one rank in a step: seconds of its passes, of the sums and transfers that nothing hides."""

    memory: Memory
    passes: float
    shown: float
    bubble: float
    sent: dict[str, float]
    pieces: int


class Study:
    """A recipe's model, on meta, and some of its training samples; rehearsals, of which it may ``tell``, are kept."""

    def __init__(
        self, task: Task, config: Config, model: nn.Module, batch: Batch, tell: Callable[[str], object] = bool
    ) -> None:
        self._task, self._config, self._model, self._batch = task, config, model, batch
        self._plan = task.plan() or Plan.auto(model)
        self._units = list(self._plan.found(model))
        self._tell = tell
        self._rehearsed: dict[Shares, Rehearsed] = {}
        self.refused: list[str] = []

    def ranked(self, cluster: Cluster, given: Collection[str]) -> list[Estimate]:
        """Every layout that the model accepts: those that fit by samples per second, then those that do not.

        Settings of ``config.parallel`` whose names are ``given`` stay. Raises :class:`UserError` where none is left.
        """
        found = []
        for parallel in layouts(self._config.parallel, given, cluster.world, cluster.node_ranks):
            try:
                found.append(self.estimate(parallel, cluster))
            except UserError as error:
                self.refused.append(str(error))
        if not found:
            near = nearest_legal(self._config.parallel, Environment(0, cluster.world, 0, cluster.node_ranks))
            reason = f"the first was refused, for {self.refused[0]}" if self.refused else f"there are {near}"
            raise UserError(f"no layout of these settings suits {cluster.world} ranks; {reason}")
        return sorted(found, key=lambda each: (not each.fits, -each.samples_per_second, each.memory.peak))

    def estimate(self, parallel: Parallel, cluster: Cluster) -> Estimate:
        """Of one layout. Raises :class:`UserError` where the model or the batch does not allow it."""
        samples = self._samples(parallel)
        ranks = Environment(0, cluster.world, 0, min(cluster.world, cluster.node_ranks))
        check_layout(self._config.replace(parallel=parallel), ranks)
        kind = parallel.activation_checkpointing
        again = kind if kind in _AGAIN else ""
        shares = Shares(parallel.tp, parallel.cp, parallel.sequence, self._keeping(parallel).shards > 0, again)
        rehearsed = self._rehearse(shares)
        work = (self._pipeline if parallel.pp > 1 else self._plain)(parallel, rehearsed, samples, cluster)
        seconds, sent = self._data_parallel(parallel, work, cluster)
        seconds += work.passes + work.shown + self._update(work.memory, cluster.device)
        rate = self._config.data.global_batch_size / seconds
        return Estimate(
            parallel, work.memory, {**sent, **work.sent}, work.bubble, seconds, rate, work.memory.peak <= cluster.memory
        )

    def _samples(self, parallel: Parallel) -> int:
        """Of a data rank in a step."""
        ranks, whole = parallel.dp_replicate * parallel.dp_shard, self._config.data.global_batch_size
        if whole < ranks:
            raise UserError(f"data.global_batch_size is {whole}, smaller than the {ranks} data ranks")
        return -(-whole // ranks)

    def _keeping(self, parallel: Parallel) -> Keeping:
        degrees = _degrees(parallel)
        sharded = degrees.is_sharded
        optim = self._config.optim
        return Keeping(
            shards=parallel.dp_shard * parallel.cp if sharded else 0,
            ddp=not sharded and degrees.reduced_ranks > 1,
            stay=not parallel.reshard_after_forward or parallel.pp > 1,
            itemsize=2 if sharded and self._config.precision.compute != "fp32" else 4,
            states=(2 if optim.name == "adamw" else int(optim.momentum > 0)) + int(optim.ema > 0),
        )

    def _rehearse(self, shares: Shares) -> Rehearsed:
        if shares.cast and self._config.precision.compute == "fp32":
            shares = replace(shares, cast=False)
        if shares not in self._rehearsed:
            self._tell(f"rehearsing tp {shares.tp}, cp {shares.cp}{', sequence' if shares.sequence else ''}")
            self._rehearsed[shares] = rehearse(
                self._task, self._model, self._plan, self._config.precision, self._batch, shares, self._links
            )
        return self._rehearsed[shares]

    @cached_property
    def _links(self) -> list[str]:
        """Modules that a pipeline is cut at."""
        if self._plan.chain:
            return [link.name for link in chain(self._model, self._plan)]
        return list(discovered(self._model, self._inputs)) or units_in_order(self._model, self._plan)

    @cached_property
    def _inputs(self) -> tuple[Any, ...]:
        return inputs_of(self._task, on_meta(self._batch, SIZES[0]), self._config.precision)

    @cached_property
    def _flops(self) -> list[float]:
        """Of each link for one sample, forward and backward."""
        return [3 * cost / SIZES[0] for cost in costs_of(self._model, self._links, self._inputs)]

    @cached_property
    def _sample_bytes(self) -> float:
        tensors = [*self._batch.fields.values(), self._batch.weight, self._batch.position]
        return sum(_bytes(value) / len(value) for value in tensors)

    def _seconds(self, flops: float, moved: float, kernels: float, parallel: Parallel, device: Device) -> float:
        peak = device.peak(self._config.precision.compute, self._config.precision.matmul)
        flops *= _AGAIN.get(parallel.activation_checkpointing, 1.0)
        products = flops / (parallel.tp * parallel.cp) / (EFFICIENCY * peak)
        return max(products, moved / device.bandwidth, kernels * LAUNCH)

    def _plain(self, parallel: Parallel, rehearsed: Rehearsed, samples: int, cluster: Cluster) -> _Work:
        size = min(parallel.micro_batch or samples, samples)
        pieces = [size] * (samples // size) + [samples % size] * (samples % size > 0)
        memory = plain_memory(rehearsed, self._units, self._keeping(parallel), pieces, samples * self._sample_bytes)
        marks = [mark for piece in pieces for mark in rehearsed.at(piece)]
        sums = {name: sum(getattr(mark, name) for mark in marks) for name in ("moved", "kernels", "tensor", "context")}
        passes = self._seconds(samples * sum(self._flops), sums["moved"], sums["kernels"], parallel, cluster.device)
        shown = _sums(sums["tensor"], sums["context"], parallel, cluster) + len(pieces) * rehearsed.sums * LATENCY
        sent = {"tensor": sums["tensor"], "context": sums["context"], "pipeline": 0.0}
        return _Work(memory, passes, shown, 0.0, sent, len(pieces))

    def _pipeline(self, parallel: Parallel, rehearsed: Rehearsed, samples: int, cluster: Cluster) -> _Work:
        schedule, size = schedule_of(parallel, samples)
        refuse_shallow(self._model, len(self._links), "names", schedule.stages)
        cuts = balanced(self._flops, schedule.stages)
        keeping, marks = self._keeping(parallel), rehearsed.at(size)
        gradients = {each.name: sizes_of([each], keeping).gradients for each in rehearsed.weights}
        stages = footprints(marks, [self._links[cut[0]] for cut in cuts[1:]], gradients)
        whole = schedule.pieces * size
        inputs = whole * (marks[1].live - marks[0].live) / size
        memory = pipeline_memory(
            schedule, stages, self._by_stage(rehearsed.weights, cuts), self._units, keeping,
            whole * self._sample_bytes + inputs,
        )  # fmt: skip
        shares = [sum(self._flops[place] for place in cut) for cut in cuts]
        costs = [
            self._seconds(size * flops, stage.moved, stage.kernels, parallel, cluster.device)
            + _sums(stage.tensor, stage.context, parallel, cluster)
            + rehearsed.sums * LATENCY * len(cut) / len(self._links)
            for cut, stage, flops in zip(cuts, stages, shares, strict=True)
        ]
        timeline = simulate(schedule, _PASSES, costs)
        tensor, context = (_most(schedule, [getattr(each, name) for each in stages]) for name in ("tensor", "context"))
        sent = {"tensor": tensor, "context": context, "pipeline": _most(schedule, _transfers(schedule, stages))}
        way = 2 * (max(each.sent for each in stages) / cluster.bandwidth(cluster.world) + LATENCY)
        return _Work(memory, timeline.length, way * (schedule.stages - 1), timeline.bubble, sent, schedule.pieces)

    def _by_stage(self, weights: Sequence[Weight], cuts: Sequence[range]) -> list[list[Weight]]:
        """Weights of no link go with those before them."""
        found: list[list[Weight]] = [[] for _ in cuts]
        stages = {self._links[place]: number for number, cut in enumerate(cuts) for place in cut}
        here = 0
        for weight in weights:
            here = next((stage for name, stage in stages.items() if weight.name.startswith(f"{name}.")), here)
            found[here].append(weight)
        return found

    def _data_parallel(self, parallel: Parallel, work: _Work, cluster: Cluster) -> tuple[float, dict[str, float]]:
        """Seconds that sums and gathers of data parallelism show, and the bytes a rank sends for them."""
        keeping, inner = self._keeping(parallel), parallel.tp * parallel.cp * parallel.dp_shard
        gradients, shards = work.memory.gradients, max(1, keeping.shards)
        replicas = parallel.dp_replicate if keeping.shards else parallel.dp_replicate * parallel.cp
        gathers = 1 if parallel.pp > 1 else work.pieces * (1 if keeping.stay else 2)
        sent = {
            "all_reduce": ring(gradients, replicas, 2),
            "reduce_scatter": ring(gradients * shards, shards),
            "all_gather": gathers * ring(work.memory.parameters * keeping.itemsize / 4 * shards, shards),
        }
        seconds = sent["all_reduce"] / cluster.bandwidth(inner * parallel.dp_replicate)
        seconds += (sent["reduce_scatter"] + sent["all_gather"]) / cluster.bandwidth(inner)
        if parallel.pp > 1:
            return seconds + LATENCY * (replicas * shards > 1), sent
        hidden = work.passes * (1.0 if keeping.shards else 2 / 3)
        calls = (1 + gathers) * (1 + len(self._units)) if shards > 1 else int(replicas > 1)
        return max(0.0, seconds - hidden) + calls * LATENCY, sent

    def _update(self, memory: Memory, device: Device) -> float:
        """Gradients are read, weights and states read and written."""
        return (memory.gradients + 2 * (memory.parameters + memory.optimizer)) / device.bandwidth


def ring(number: float, ranks: int, turns: int = 1) -> float:
    """Bytes each of the ranks sends so that a tensor of so many bytes goes round: 1 turn gathers, or sums and
    scatters; 2 turns sum it for all (Patarasuk and Yuan, "Bandwidth optimal all-reduce", 2009)."""
    return turns * number * (ranks - 1) / ranks


def _sums(tensor: float, context: float, parallel: Parallel, cluster: Cluster) -> float:
    return tensor / cluster.bandwidth(parallel.tp) + context / cluster.bandwidth(parallel.tp * parallel.cp)


def _transfers(schedule: Schedule, stages: Sequence[Footprint]) -> list[float]:
    """Bytes of a piece that each stage sends to other ranks, activations down and gradients up."""
    owners = schedule.owners
    down = [each.sent * (owners[place] != owners[min(place + 1, len(owners) - 1)]) for place, each in enumerate(stages)]
    up = [each.given * (owners[place] != owners[max(place - 1, 0)]) for place, each in enumerate(stages)]
    return [sum(both) for both in zip(down, up, strict=True)]


def _most(schedule: Schedule, by_stage: Sequence[float]) -> float:
    """What the rank with most of it has, over all pieces."""
    ranks = range(len(schedule.actions))
    return schedule.pieces * max(sum(by_stage[stage] for stage in schedule.stages_of(rank)) for rank in ranks)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _degrees(parallel: Parallel) -> Degrees:
    return Degrees(parallel.pp, parallel.dp_replicate, parallel.dp_shard, parallel.cp, parallel.tp)
