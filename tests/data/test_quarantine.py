"""The list of bad samples outlives kills, restarts and older forms of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dltrain.data.quarantine import Bad, Quarantine
from dltrain.errors import UserError


def bad(index: int) -> Bad:
    return Bad(
        position=10 * index, replaced_by=10 * index + 4, shard=0, index=index, reason=f"sample {index} is damaged"
    )


def test_a_sample_counts_once_over_all_starts_and_ranks(tmp_path: Path) -> None:
    first, second = Quarantine(3, tmp_path / "rank-0.jsonl"), Quarantine(3, tmp_path / "rank-1.jsonl")
    for index in (1, 2, 1):
        first.add(bad(index))
    second.add(bad(3))
    again = Quarantine(3, tmp_path / "rank-0.jsonl")
    for index in (1, 2, 3):
        again.add(bad(index))
    with pytest.raises(UserError, match=r"4 samples are bad and data\.bad_samples allows 3.*sample 4 is damaged"):
        again.add(bad(4))
    assert [json.loads(line)["index"] for line in (tmp_path / "rank-0.jsonl").read_text().splitlines()] == [1, 2]


def test_lines_that_were_cut_off_or_are_older_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "rank-0.jsonl"
    whole = json.dumps({"position": 0, "replaced_by": 4, "shard": 0, "index": 1, "reason": ""})
    file.write_text(
        '{"position": 3, "replaced_by": 7, "reason": "of an older form"}\n' + whole + '\n{"position": 9, "re'
    )
    Quarantine(2, file).add(bad(2))
    known = Quarantine(2, file)
    known.add(bad(1))
    known.add(bad(2))
    with pytest.raises(UserError, match="3 samples are bad"):
        known.add(bad(3))
