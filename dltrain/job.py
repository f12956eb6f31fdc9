"""One rank's part of a job: what ``dltrain train`` starts on each rank, and what ``torchrun RECIPE.py`` runs itself.

    if __name__ == "__main__":
        main(Classify)

The command line of a recipe file is ``[train | eval RUN] [--preset NAME | --config FILE] [--section.key value ...]``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dltrain import storage
from dltrain.checkpoint.checkpointer import Checkpointer, committed, read_state, step_folder
from dltrain.checkpoint.weights import starting_weights, wants_weights
from dltrain.config import Config, from_tree, load_overrides, split_arguments
from dltrain.config.tree import AUTO
from dltrain.errors import EXIT_STOPPED, UserError
from dltrain.evaluation import evaluate, write_report
from dltrain.hooks.base import Hook
from dltrain.job_data import Place, evaluation_loader, open_data, open_held_out, train_loader
from dltrain.job_hooks import hooks_of
from dltrain.job_process import environment_of_process, guarded, leave
from dltrain.job_run import Job, agreed, checkpointer_of, chosen, held, own, record_end, recorded
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.checks import check_layout, layout_for_scoring
from dltrain.planning import plan
from dltrain.recipes import Declarations, describe_module, recipe_name
from dltrain.run_folder import RunFolder, find_run
from dltrain.runtime.environment import Environment
from dltrain.runtime.launch import RECIPE
from dltrain.runtime.logs import outlive_readers, say, warn
from dltrain.runtime.process_group import joined
from dltrain.runtime.stop import stop_flag
from dltrain.runtime.together import gathered
from dltrain.runtime.word import report_ready, report_running, report_stopped
from dltrain.sagemaker.channels import apply_channels, read_channels, refuse_resume
from dltrain.sagemaker.debug_hook import apply_debug_hook
from dltrain.sagemaker.delivery import deliver
from dltrain.sagemaker.hyperparameters import Hyperparameters
from dltrain.sagemaker.placing import kept, placed
from dltrain.sagemaker.profiler import apply_profiler
from dltrain.sagemaker.training_job import TrainingJob
from dltrain.task import Task
from dltrain.trainer import Trainer
from dltrain.verification import record_steps


def main(task: type[Task], arguments: Sequence[str] | None = None) -> None:
    """Run a recipe file as a program. Exits 0, 2 after the user's mistake, 75 when stopped and resumable."""
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise TypeError(f"main() takes a class derived from Task, not {task!r}")
    outlive_readers()
    environment = environment_of_process()
    report_running(environment.rank, True)
    status = guarded(lambda: _run(task, environment, sys.argv[1:] if arguments is None else arguments), environment)
    report_running(environment.rank, False)
    if environment.world_size > 1:
        leave(status)
    sys.exit(status)


def train(job: Job) -> int:
    """Train; returns the exit status. The last line on standard output is the result as one JSON object."""
    started = time.monotonic()
    check_layout(job.config, job.environment)
    storage.configure(job.config.storage)
    with joined(job.config, job.environment) as device, stop_flag(job.config.run, _generations(job)) as stop:
        report_ready(job.environment.rank)
        job = _with_one_debugger(job)
        task = job.task(job.config)
        mesh = build_mesh(job.config.parallel, job.environment, device)
        place = Place(job.config, task, job.environment, mesh, device)
        data = open_data(job.config, task, job.environment)
        run = own(job, *agreed(job, partial(chosen, job)))
        loader = train_loader(data, place, run.quarantine)
        checkpointer = checkpointer_of(job, run)
        hooks = hooks_of(job.config, task, run, job.environment)
        weights = None if _goes_on(job, run) else starting_weights(job.config, job.environment)
        trainer = Trainer(
            job.config,
            task,
            parallelize(task, job.config, mesh, device, loader.peek, weights, partial(_show_model, hooks)),
            loader,
            evaluation=evaluation_loader(data.held_out, place) if data.held_out else None,
            checkpointer=checkpointer,
            hooks=hooks,
            stop=stop,
            random_stream=mesh.random_stream,
        )
        with held(job, run):
            _resume(job, run, trainer, checkpointer)
            with recorded(job, run, data.train, hooks, weights):
                status = trainer.fit()
                return _conclude(job, run, trainer, status, time.monotonic() - started, hooks, stop.reason)


def evaluate_run(job: Job, run: RunFolder) -> int:
    """Score a run's best checkpoint (or its last) on the held-out samples and write its report."""
    storage.configure(job.config.storage)
    with joined(job.config, job.environment) as device:
        task = job.task(job.config)
        mesh = build_mesh(job.config.parallel, job.environment, device)
        held_out = open_held_out(job.config, task)
        task.facts = run.read()["facts"]  # the training data's, as when it was trained
        loader = evaluation_loader(held_out, Place(job.config, task, job.environment, mesh, device))
        engine = parallelize(task, job.config, mesh, device, loader.peek)
        checkpointer = Checkpointer(run.checkpoints, job.config.checkpoint.keep, job.environment)
        path = checkpointer.best() or checkpointer.latest()
        if path is None:
            raise UserError(f"the run {run.path} has no checkpoint to evaluate")
        state = checkpointer.load(path, engine)
        if engine.micro_batch == AUTO:
            engine.micro_batch = state.get("micro_batch", AUTO)
        metric = evaluate(engine, task, loader)
        facts = _report_facts(run, state["step"], path, job.config)
        target = write_report(metric, run.report, facts, job.environment)
        if job.environment.is_main:
            _show({"report": str(target.with_suffix(".html")), "checkpoint": str(path), **metric.compute()})
    return 0


def _run(task: type[Task], environment: Environment, arguments: Sequence[str]) -> int:
    job = TrainingJob.read()
    given = Hyperparameters() if job is None else job.hyperparameters
    words, overrides = split_arguments(given.arguments(arguments))
    if words[:1] == ["plan"]:
        return plan(task, _declared(task), words[1:], overrides)
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[task.__module__]))
    parser.add_argument("command", nargs="?", choices=("train", "eval", "verify"), default="train")
    parser.add_argument("run", nargs="?", help="the run to evaluate, or the folder of what verify compares")
    parser.add_argument("--steps", type=int, default=10, help="of verify")
    parser.add_argument("--preset", default=given.words.get("preset", ""))
    parser.add_argument("--config", type=Path, default=given.words.get("config"))
    known = parser.parse_args(words)
    recipe = _declared(task)
    if known.command == "train":
        settings = {**given.settings, **overrides}
        settings = settings if job is None else kept(settings, job)
        config = recipe.configure(known.preset, settings, known.config)
        config = apply_channels(config, read_channels(), settings, partial(warn, environment))
        config = apply_profiler(apply_debug_hook(config, settings, environment), settings, environment)
        for told in given.told:
            say(environment, told)
        config = config if job is None else placed(config, job, settings)
        return train(Job(task, recipe.name, known.preset, config, environment, job))
    if known.run is None:
        raise UserError(f"{known.command} needs a folder: {known.command} FOLDER")
    if known.command == "verify":
        record_steps(task, recipe.configure(known.preset, overrides), environment, Path(known.run), known.steps)
        return 0
    run = find_run(known.run)
    record = run.read()
    config = load_overrides(from_tree(recipe.config, record["config"], str(run.record)), overrides)
    config, other = layout_for_scoring(config, environment, overrides)
    if other:
        say(environment, other)
    return evaluate_run(Job(task, recipe.name, record["preset"], config, environment), run)


def _declared(task: type[Task]) -> Declarations:
    module = sys.modules[task.__module__]
    path = Path(inspect.getfile(task))
    name = os.environ.get(RECIPE, recipe_name(str(path)))
    return describe_module(module, name, path, module.__doc__ or "")


def _generations(job: Job) -> int:
    """Of processes above this one whose end is the job's: not a shell's, which may be left behind."""
    if job.of is not None and job.of.way != "container":
        return 2  # torchrun, and what started it, which SageMaker's signal ends without a word to anybody
    return int(bool(job.environment.launcher))


def _with_one_debugger(job: Job) -> Job:
    """Rank 0's settings of the debugger on every rank: a file of each host may have been read."""
    debugger = agreed(job, lambda: job.config.debugger)
    return replace(job, config=job.config.replace(debugger=debugger))


def _show_model(hooks: list[Hook], model: nn.Module) -> None:
    for hook in hooks:
        hook.model_built(model)


def _goes_on(job: Job, run: RunFolder) -> bool:
    """Whether a checkpoint will give the weights."""
    return job.config.run.resume != "never" and agreed(job, lambda: bool(committed(run.checkpoints)))


def _resume(job: Job, run: RunFolder, trainer: Trainer, checkpointer: Checkpointer) -> None:
    if job.config.run.resume == "never":
        return
    path = checkpointer.latest()
    if path is None:
        damaged = _goes_on(job, run)
        if wants_weights(job.config) and damaged:
            raise UserError(f"no checkpoint of {run.path} is whole; start a new run from model.weights")
        if damaged:
            checkpointer.begin_anew()
            warn(
                job.environment,
                f"no checkpoint of {run.path} is whole: it begins anew, at step 0; they are kept as damaged-...",
            )
        return
    refuse_resume(job.config, read_channels(), job.environment.nodes)
    state = read_state(path)
    trainer.load_state_dict(state)  # before the tensors: a changed data set is told at once
    checkpointer.resume_from(path, trainer.engine)
    for name, before, now in _changes(state["config"], job.config.model_dump(mode="json")):
        if not name.startswith("run."):
            warn(job.environment, f"{name} was {before} and is {now} since the resume")


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    changes = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            changes += _changes(old, value, f"{prefix}{name}.")
        elif old != value:
            changes.append((prefix + name, old, value))
    return changes


def _conclude(
    job: Job, run: RunFolder, trainer: Trainer, status: str, seconds: float, hooks: list[Hook], reason: str
) -> int:
    """Report, record, and the last line; ``reason`` is why this rank was asked to stop."""
    if status == "stopped":
        reason = next(filter(None, gathered(reason)), "")  # which another rank may know alone
        record_end(job, run, status, step=trainer.step, micro_batch=trainer.engine.micro_batch, reason=reason)
        why = f" ({reason})" if reason else ""
        say(job.environment, f"stopped and saved at step {trainer.step}{why}; go on with: --run.resume {run.path}")
        told = report_stopped(job.environment.rank, reason, trainer.step)
        # torchrun and srun take every status but 0 for a failure, and end or start again what is whole
        return 0 if told or job.environment.launcher else EXIT_STOPPED
    if trainer.last_metric is not None and job.config.evaluation.report:
        path = step_folder(run.checkpoints, trainer.step)
        facts = _report_facts(run, trainer.step, path, job.config)
        write_report(trainer.last_metric, run.report, facts, job.environment)
        for hook in hooks if job.environment.is_main else ():
            hook.report_written(trainer.step, run.report)
    rate = trainer.trained_samples / max(trainer.trained_seconds, 1e-9)
    facts = {"seconds": round(seconds, 2), "samples_per_second": round(rate, 1), "step": trainer.step}
    if job.of is not None:  # before the run counts as finished: one that is ended in between goes on from here
        deliver(job.of, run, trainer.engine, trainer.scores, trainer.step, job.environment)
    record_end(job, run, status, scores=trainer.scores, micro_batch=trainer.engine.micro_batch, **facts)
    report = f"; report: {run.report / 'evaluation.html'}" if run.report.is_dir() else ""
    say(job.environment, f"finished {trainer.step} steps in {seconds:.1f} s: {run.path}{report}")
    if job.environment.is_main:
        _show({**trainer.scores, **facts, "run": str(run.path)})
    return 0


def _report_facts(run: RunFolder, step: int, checkpoint: Path | None, config: Config) -> dict[str, Any]:
    facts = {"run": run.name, "step": step, "checkpoint": str(checkpoint or ""), "data": config.data.evaluation}
    return {**facts, "weights": f"averaged, optim.ema {config.optim.ema:g}"} if config.optim.ema else facts


def _show(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)
