"""The hooks of a job, in the order in which they are told: the recipe's own, what watches, what writes."""

from __future__ import annotations

from collections.abc import Iterator

from dltrain.config import Config
from dltrain.debugger.rules.base import Rule
from dltrain.errors import UserError
from dltrain.hooks.agreement import CheckAgreement
from dltrain.hooks.base import Hook
from dltrain.hooks.collection import Collection
from dltrain.hooks.progress import progress
from dltrain.hooks.records import Records
from dltrain.run_folder import RunFolder
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.tensorboard import tensorboard_folder
from dltrain.task import Task


def hooks_of(config: Config, task: Task, run: RunFolder, environment: Environment) -> list[Hook]:
    """Those of this rank. Raises :class:`UserError` for what a recipe or a setting has wrong."""
    hooks = _of_the_recipe(task)
    if config.run.check_every:
        hooks.append(CheckAgreement(int(config.run.check_every.value)))
    if config.run.collect_every:
        hooks.append(Collection(config.run.collect_every))
    writers: list[Hook] = []
    board = None
    folder = config.logging.tensorboard_folder or tensorboard_folder()  # on every rank: all refuse a mistake
    if environment.is_main and config.logging.tensorboard:
        from dltrain.tensorboard.events import Events, place_of  # slow to import, and may be switched off
        from dltrain.tensorboard.hook import TensorBoard

        board = TensorBoard(Events(*place_of(folder, run.path)), config, environment)
        writers.append(board)
    if config.debugger.on or config.profiler.every:
        from dltrain.debugger.hook import Debug

        hooks.append(Debug(config, environment, run.debugger, _rules_of(task), () if board is None else (board,)))
    hooks += _of_the_profiler(config, task, run, environment)
    if environment.is_main:
        writers = [Records(run.metrics), *progress(config.logging.progress), *writers]
    return [*hooks, *writers]


def _of_the_recipe(task: Task) -> list[Hook]:
    hooks = task.hooks()
    if not isinstance(hooks, list) or not all(isinstance(hook, Hook) for hook in hooks):
        raise UserError(f"{type(task).__name__}.hooks() must return a list of hooks, such as [MyHook()], not {hooks!r}")
    return list(hooks)


def _rules_of(task: Task) -> list[Rule]:
    rules = task.rules()
    if not isinstance(rules, list) or not all(isinstance(rule, Rule) for rule in rules):
        raise UserError(f"{type(task).__name__}.rules() must return a list of rules, such as [MyRule()], not {rules!r}")
    return rules


def _of_the_profiler(config: Config, task: Task, run: RunFolder, environment: Environment) -> Iterator[Hook]:
    settings, watched = config.profiler, config.debugger.on
    if not (watched or settings.trace or settings.memory or settings.flops):
        return
    from dltrain.debugger.recorder import Guard
    from dltrain.profiling.memory import Snapshots
    from dltrain.profiling.trace import Traces
    from dltrain.profiling.utilisation import Utilisation

    guard = Guard(environment, config.debugger.strict)
    if settings.trace and environment.rank in settings.ranks:
        yield Traces(settings.trace, run.debugger / "trace", environment, guard)
    if settings.memory or watched:
        yield Snapshots(settings.memory, run.debugger / "memory", environment, guard)
    if environment.is_main and (settings.flops or watched):
        yield Utilisation(task, config, environment)
