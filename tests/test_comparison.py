# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The tables of comparisons, made from rows whose figures are known."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.perf import tables
from tests.perf.comparison import Tables
from tests.perf.comparison_discrete import SequenceTables
from tests.perf.harness import Job, missing, read, run_all

Row = dict[str, Any]
SHIFTS = {"importance": -3.0, "fk": -2.0, "fk-pooled": -2.5, "fk-few": -4.0, "tri": -0.5}


@dataclass(frozen=True)
class _Task:
    name: str
    zoo: str = "digits"
    tuned: bool = False


def _row(task: str, arm: str, seed: int, log_z: float | None, size: int = 4) -> Row:
    figures = {"log_z": log_z, "reward": log_z, "best": log_z, "judge": 0.5, "diversity": 1.0}
    calls = {"ess": 1.5, "seconds": 2.0, "denoiser": 400, "reward_calls": 400}
    return {"task": task, "arm": arm, "seed": seed, "size": size, **figures, **calls}


def _rows(task: str = "ink") -> list[Row]:
    """Five seeds whose noise all arms share, but for a part of their own."""
    found = [
        _row(task, arm, seed, 10.0 + shift + seed + 0.01 * (seed % 2) * place)
        for seed in range(5)
        for place, (arm, shift) in enumerate(SHIFTS.items())
    ]
    values = ((0, "reference fk", 12.03), (0, "reference tri", 12.0), (1, "reference tri", 11.97))
    return found + [_row(task, arm, seed, value, 1000) for seed, arm, value in values]


def _line(text: str, *cells: str) -> list[str]:
    """The first line of a table that has these cells."""
    for line in text.splitlines():
        found = [cell.strip() for cell in line.split("|")[1:-1]]
        if all(cell in found for cell in cells):
            return found
    raise AssertionError(f"no line with {cells} in {text}")


def test_the_gap_is_taken_to_references_that_agree() -> None:
    text = Tables({"ink": _Task("ink")}).report(_rows())
    assert _line(text, "ink", "1000")[-2:] == ["12.00", "yes"]
    # the mean over five seeds is 12 and a shift, so the gap is about minus the shift
    assert _line(text, "ink", "severe")[4].startswith("3.00 ±")
    assert _line(text, "tri", "5")[4].startswith("0.48 ±")


def test_references_that_disagree_leave_the_gap_out() -> None:
    rows = [*_rows(), _row("ink", "reference tri", 2, 12.2, 1000)]
    text = Tables({"ink": _Task("ink")}).report(rows)
    assert _line(text, "ink", "1000")[-1] == "no"
    assert _line(text, "ink", "severe")[4] == "left out"


def test_an_arm_is_compared_with_the_better_arm_of_steering_seed_by_seed() -> None:
    text = Tables({"ink": _Task("ink", tuned=True)}).against(_rows(), 4, "tri")
    line = _line(text, "ink", "tuned")
    assert line[2] == "fk"
    assert line[5].startswith("1.51 ±")
    assert line[-1] == "better"
    assert "1 better, 0 worse, 0 even" in text


def test_a_difference_inside_its_interval_is_even() -> None:
    assert tables.word((0.1, 0.2)) == "even"
    assert tables.word((-0.3, 0.2)) == "worse"
    assert tables.word((0.3, math.nan)) == "even"


def test_intervals_are_those_of_students_t() -> None:
    mean, half = tables.with_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.30 / math.sqrt(3), rel=1e-3)


def test_a_pass_without_weight_is_minus_infinity_and_has_no_interval() -> None:
    rows = [*_rows(), _row("ink", "fk", 5, None)]
    assert tables.by_seed(rows, "ink", 4, "fk", "log_z")[5] == -math.inf
    assert tables.interval(tables.with_interval([1.0, -math.inf])) == "–"


def test_sequences_have_tables_of_their_kind() -> None:
    tasks = {"qed": _Task("qed", "molecules"), "tone": _Task("tone", "text")}
    rows = [
        {**row, "success": 0.25, "valid": 1.0, "unique": 0.75, "dist_1": 0.5}
        for row in _rows("qed") + _rows("tone")
        if row["size"] == 4
    ]
    text = SequenceTables(tasks).report([row for row in rows if row["task"] == "qed"])
    assert "### Rewards, molecules, N = 4" in text
    assert "text, N = 4" not in text
    assert "0.75 ± 0.00" in _line(text.split("### Rewards")[1], "tri")


def test_jobs_that_are_in_the_file_are_not_repeated(tmp_path: Path) -> None:
    jobs = [Job("ink", 4, seed, ("fk", "tri")) for seed in range(2)]
    rows = [_row("ink", "fk", 0, 1.0), _row("ink", "tri", 0, 1.0), _row("ink", "fk", 1, 1.0)]
    assert missing(jobs, rows) == [Job("ink", 4, 1, ("tri",))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path) == rows
    assert read(tmp_path / "none") == []
    run_all(lambda job: [], [], path, 1)
    assert len(read(path)) == 3
