"""The lines that a run prints, and regular expressions that find their numbers again: one table makes both.

line_of(record)  # loss 0.1817  lr 0.00395  norm 1.33  2147 samples/s  waiting 13%
definitions(["accuracy", "loss"])  # for SageMaker, which takes metrics from what a job prints
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NUMBER = r"(-?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf))"
"""As ``.4g`` writes them."""


@dataclass(frozen=True)
class Column:
    """A number of a step's record: ``before`` and ``after`` stand around it."""

    key: str
    metric: str
    form: str
    before: str = ""
    after: str = ""
    factor: float = 1.0

    def text(self, value: float) -> str:
        return f"{self.before}{value * self.factor:{self.form}}{self.after}"


COLUMNS = (
    Column("loss", "train:loss", ".4g", "loss "),
    Column("learning_rate", "train:learning_rate", ".3g", "lr "),
    Column("grad_norm", "train:grad_norm", ".3g", "norm "),
    Column("samples_per_second", "train:samples_per_second", ".0f", after=" samples/s"),
    Column("data_wait", "train:data_wait_percent", ".0f", "waiting ", "%", 100.0),
)

_SCORES = "evaluation/"


def line_of(record: Mapping[str, Any]) -> str:
    """The numbers of a step's record."""
    return "  ".join(column.text(record[column.key]) for column in COLUMNS)


def step_line(record: Mapping[str, Any], total: str) -> str:
    """A logged step of so many."""
    return f"step {record['step']}/{total} epoch {record['epoch']:.2f} {line_of(record)}"


def evaluation_line(record: Mapping[str, Any]) -> str:
    """An evaluation's scores."""
    scores = {key.removeprefix(_SCORES): value for key, value in record.items() if key.startswith(_SCORES)}
    return f"evaluation at step {record['step']}: " + "  ".join(f"{name} {v:.4g}" for name, v in scores.items())


def definitions(scores: Iterable[str]) -> list[dict[str, str]]:
    """SageMaker's ``MetricDefinitions``: each column, and these scores as ``validation:<score>``."""
    found = [
        {"Name": column.metric, "Regex": rf"\bstep \d+/\S+ epoch \S+(?: | .*  ){_found(column)}"} for column in COLUMNS
    ]
    found += [
        {"Name": f"validation:{name}", "Regex": rf"\bevaluation at step \d+: (?:.*  )?{name} {NUMBER}"}
        for name in dict.fromkeys(scores)
    ]
    return found


def _found(column: Column) -> str:
    return rf"{column.before}{NUMBER}{column.after}(?:  |\s*$)"
