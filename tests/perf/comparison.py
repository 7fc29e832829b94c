# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Tables of the comparison, made from its rows."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tests.perf.tables import (
    Row,
    by_seed,
    interval,
    number,
    paired,
    sd,
    spread_gain,
    table,
    with_interval,
    word,
)
from tests.perf.tasks import TASKS

__all__ = ["report"]

_FK = ("fk", "fk-pooled", "fk-few")
_TRI = ("tri", "tri, one pass")
_SHOWN = (
    "best-of-n",
    "importance",
    "fk-few",
    "fk-pooled",
    "fk",
    "tri",
    "tri, one pass",
    "tri, last pass",
)
_AGREE = 0.1


def report(rows: Sequence[Row]) -> str:
    """
    The tables in Markdown.

    :param list rows: What ``tests.perf.compare`` wrote.
    """
    parts = [_references(rows)]
    for size in sorted({row["size"] for row in rows if row["arm"] in _TRI}):
        parts += [_evidence(rows, size), _rewards(rows, size), _verdict(rows, size)]
    return "\n\n".join(part for part in [*parts, _ablations(rows)] if part)


def _is_reference(row: Row) -> bool:
    return bool(row["arm"].startswith("reference"))


def _reference_runs(rows: Sequence[Row], task: str) -> list[Row]:
    """The longest reference runs of a task of which there are three, else most."""
    runs = [row for row in rows if row["task"] == task and _is_reference(row)]
    sizes = Counter(row["size"] for row in runs)
    best = max(sizes, key=lambda size: (min(sizes[size], 3), size), default=0)
    return [row for row in runs if row["size"] == best]


def _reference(rows: Sequence[Row], task: str) -> tuple[float, bool]:
    """The mean of the reference runs, and whether three of two methods agree."""
    runs = _reference_runs(rows, task)
    found = [row["log_z"] for row in runs]
    if not found:
        return math.nan, False
    enough = len(found) >= 3 and len({row["arm"] for row in runs}) >= 2
    return statistics.mean(found), enough and max(found) - min(found) <= _AGREE


def _references(rows: Sequence[Row]) -> str:
    body = []
    for task in TASKS.values():
        runs = _reference_runs(rows, task.name)
        if runs:
            value, agreed = _reference(rows, task.name)
            found = ", ".join(f"{row['log_z']:.2f}" for row in runs)
            few = len(runs) < 3
            verdict = "yes" if agreed else f"{len(runs)} runs" if few else "no"
            body.append([task.name, str(runs[0]["size"]), found, number(value), verdict])
    if not body:
        return ""
    head = ["task", "particles", "log Z of each run", "mean", f"within {_AGREE} nat"]
    return "### References\n\n" + table(head, body)


def _tasks(rows: Sequence[Row], size: int) -> list[str]:
    return [name for name in TASKS if by_seed(rows, name, size, "tri", "log_z")]


def _evidence(rows: Sequence[Row], size: int) -> str:
    """Gap and spread of log Z, the primary figure."""
    body = []
    for name in _tasks(rows, size):
        reference, agreed = _reference(rows, name)
        title, mark = name, "severe" if _severe(rows, name, size) else ""
        for arm in ("importance", "fk-few", "fk-pooled", "fk", "tri", "tri, one pass"):
            found = list(by_seed(rows, name, size, arm, "log_z").values())
            gap = [reference - value for value in found]
            cell = interval(with_interval(gap)) if agreed else "left out"
            body.append([title, mark, arm, cell, number(sd(found)), str(len(found))])
            title, mark = "", ""
    head = ["task", "", "arm", "gap of log Z", "sd of log Z", "seeds"]
    return f"### Evidence, N = {size}, {4 * size} trajectories\n\n" + table(head, body)


def _severe(rows: Sequence[Row], name: str, size: int) -> bool:
    """Whether importance sampling with the whole budget is left with less than two particles."""
    found = by_seed(rows, name, size, "importance", "ess").values()
    return statistics.mean(max(value, 0.0) for value in found) < 2


def _rewards(rows: Sequence[Row], size: int) -> str:
    body = []
    for name in _tasks(rows, size):
        title = name
        for arm in _SHOWN:
            cells = [title, arm]
            for column, digits in (("reward", 2), ("best", 2), ("judge", 2), ("diversity", 2)):
                found = list(by_seed(rows, name, size, arm, column).values())
                cells.append(interval(with_interval(found), digits) if found else "–")
            for column, digits in (("seconds", 1), ("denoiser", 0), ("reward_calls", 0)):
                found = list(by_seed(rows, name, size, arm, column).values())
                cells.append(number(statistics.median(found), digits) if found else "–")
            body.append(cells)
            title = ""
    head = ["task", "arm", "reward", "best", "judge", "diversity", "s", "denoiser", "rewards"]
    return f"### Rewards, N = {size}, in nats\n\n" + table(head, body)


def _verdict(rows: Sequence[Row], size: int) -> str:
    """Each arm of TRI-TSMC against Feynman-Kac steering, task by task."""
    parts = [_against(rows, size, arm) for arm in _TRI]
    return "\n\n".join(part for part in parts if part)


def _against(rows: Sequence[Row], size: int, arm: str) -> str:
    body, counts = [], {"better": 0, "worse": 0, "even": 0}
    for name in _tasks(rows, size):
        tri = by_seed(rows, name, size, arm, "log_z")
        if not tri:
            continue
        best = _best_arm(rows, name, size, "log_z")
        other = by_seed(rows, name, size, best, "log_z")
        rise, ratio = paired(tri, other), spread_gain(tri, other)
        verdict = word(rise)
        counts[verdict] += 1
        tuned = "tuned" if TASKS[name].tuned else ""
        gaps = [number(_gap(rows, name, values)) for values in (other, tri)]
        spread = f"{number(ratio[0])} ({number(ratio[1])} to {number(ratio[2])})"
        rewards = [_ahead(rows, name, size, arm, column) for column in ("reward", "best")]
        body.append([name, tuned, best, *gaps, interval(rise), spread, *rewards, verdict])
    if not body:
        return ""
    head = ["task", "", "better FK arm", "its gap", "own gap", "log Z, less FK", "ratio of sd"]
    head += ["reward, less FK", "best, less FK", "log Z"]
    tally = ", ".join(f"{count} {word}" for word, count in counts.items())
    title = f"### `{arm}` against the better arm of FK steering, N = {size}"
    return f"{title}\n\n{table(head, body)}\n\nlog Z beyond the 95 % interval: {tally}."


def _best_arm(rows: Sequence[Row], task: str, size: int, column: str) -> str:
    """The arm of Feynman-Kac steering whose mean is highest; estimates of log Z fall short."""
    arms = {arm: by_seed(rows, task, size, arm, column) for arm in _FK}
    found = {arm: statistics.mean(values.values()) for arm, values in arms.items() if values}
    return max(found, key=found.__getitem__)


def _gap(rows: Sequence[Row], task: str, values: dict[int, float]) -> float:
    reference, agreed = _reference(rows, task)
    return reference - statistics.mean(values.values()) if agreed else math.nan


def _ahead(rows: Sequence[Row], task: str, size: int, arm: str, column: str) -> str:
    """By how much an arm is ahead of the arm of Feynman-Kac steering that is best in a column."""
    best = _best_arm(rows, task, size, column)
    own, other = (by_seed(rows, task, size, one, column) for one in (arm, best))
    return interval(paired(own, other))


def _ablations(rows: Sequence[Row]) -> str:
    arms = sorted({row["arm"] for row in rows if row["arm"].startswith("tri, ")} - set(_TRI))
    names = [n for n in TASKS if any(by_seed(rows, n, 4, arm, "log_z") for arm in arms)]
    if not arms or not names:
        return ""

    def cell(name: str, arm: str, column: str, show: Callable[[Any], str]) -> str:
        tri, other = (by_seed(rows, name, 4, a, column) for a in ("tri", arm))
        return show(paired(other, tri)) if other and tri else "–"

    body = [[arm, *(cell(name, arm, "log_z", interval) for name in names)] for arm in arms]
    title = "### Ablation at the same budget, N = 4: change of the mean of log Z"
    return f"{title}\n\n{table(['arm', *names], body)}"
