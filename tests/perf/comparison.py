# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Tables of a comparison, made from its rows."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

__all__ = ["Tables"]

_AGREE = 0.1


@dataclass(frozen=True)
class Tables:
    """
    Makes tables in Markdown from the rows that a study wrote.

    :param dict tasks: The tasks by name; a task has ``tuned``.
    :param tuple fk: The arms of Feynman-Kac steering.
    :param tuple tri: The arms of TRI-TSMC.
    :param tuple shown: The arms of the table of rewards.
    :param tuple sampled: Those of them that estimate the evidence.
    :param tuple columns: What the table of rewards shows of each, and with how many digits.
    """

    tasks: Mapping[str, Any]
    fk: tuple[str, ...] = ("fk", "fk-pooled", "fk-few")
    tri: tuple[str, ...] = ("tri", "tri, one pass")
    shown: tuple[str, ...] = (
        "best-of-n",
        "importance",
        "fk-few",
        "fk-pooled",
        "fk",
        "tri",
        "tri, one pass",
        "tri, last pass",
    )
    sampled: tuple[str, ...] = ("importance", "fk-few", "fk-pooled", "fk", "tri", "tri, one pass")
    columns: tuple[tuple[str, int], ...] = (
        ("reward", 2),
        ("best", 2),
        ("judge", 2),
        ("diversity", 2),
    )

    def report(self, rows: Sequence[Row]) -> str:
        """
        All tables.

        :param list rows: What the study wrote.
        """
        parts = [self.references(rows)]
        for size in sorted({row["size"] for row in rows if row["arm"] in self.tri}):
            parts += [self.evidence(rows, size), self.rewards(rows, size)]
            parts += [self.against(rows, size, arm) for arm in self.tri]
        return "\n\n".join(part for part in [*parts, self.ablations(rows)] if part)

    def references(self, rows: Sequence[Row]) -> str:
        """The long runs that the evidence is known from."""
        body = []
        for name in self.tasks:
            runs = _reference_runs(rows, name)
            if runs:
                value, agreed = _reference(rows, name)
                found = ", ".join(f"{row['log_z']:.2f}" for row in runs)
                verdict = "yes" if agreed else "too few" if len(runs) < 3 else "no"
                body.append([name, str(runs[0]["size"]), found, number(value), verdict])
        if not body:
            return ""
        head = ["task", "particles", "log Z of each run", "mean", f"within {_AGREE} nat"]
        return "### References\n\n" + table(head, body)

    def _names(self, rows: Sequence[Row], size: int) -> list[str]:
        return [
            name
            for name in self.tasks
            if any(by_seed(rows, name, size, arm, "log_z") for arm in self.tri)
        ]

    def evidence(self, rows: Sequence[Row], size: int) -> str:
        """Gap and spread of log Z, the primary figure."""
        body = []
        for name in self._names(rows, size):
            reference, agreed = _reference(rows, name)
            title, mark = name, "severe" if _severe(rows, name, size) else ""
            for arm in self.sampled:
                found = list(by_seed(rows, name, size, arm, "log_z").values())
                gap = [reference - value for value in found]
                cell = interval(with_interval(gap)) if agreed else "left out"
                mean = number(statistics.mean(found)) if found else "–"
                body.append([title, mark, arm, mean, cell, number(sd(found)), _seeds(found)])
                title, mark = "", ""
        head = ["task", "", "arm", "mean of log Z", "gap of log Z", "sd of log Z", "seeds"]
        return f"### Evidence, N = {size}, {4 * size} trajectories\n\n" + table(head, body)

    def rewards(self, rows: Sequence[Row], size: int) -> str:
        """The particles, and what they cost."""
        body = []
        for name in self._names(rows, size):
            title = name
            for arm in self.shown:
                cells = [title, arm]
                for column, digits in self.columns:
                    found = list(by_seed(rows, name, size, arm, column).values())
                    cells.append(interval(with_interval(found), digits) if found else "–")
                for column, digits in (("seconds", 1), ("denoiser", 0), ("reward_calls", 0)):
                    found = list(by_seed(rows, name, size, arm, column).values())
                    cells.append(number(statistics.median(found), digits) if found else "–")
                body.append(cells)
                title = ""
        head = ["task", "arm", *(name for name, _ in self.columns), "s", "denoiser", "rewards"]
        return f"### Rewards, N = {size}\n\n" + table(head, body)

    def against(self, rows: Sequence[Row], size: int, arm: str) -> str:
        """An arm of TRI-TSMC against Feynman-Kac steering, task by task."""
        names = [n for n in self._names(rows, size) if by_seed(rows, n, size, arm, "log_z")]
        if not names:
            return ""
        lines = [self._against(rows, name, size, arm) for name in names]
        counts = Counter(line[-1] for line in lines)
        head = ["task", "", "better FK arm", "its gap", "own gap", "log Z, less FK", "ratio of sd"]
        head += ["reward, less FK", "best, less FK", "log Z"]
        tally = ", ".join(f"{counts[word]} {word}" for word in ("better", "worse", "even"))
        title = f"### `{arm}` against the better arm of FK steering, N = {size}"
        return f"{title}\n\n{table(head, lines)}\n\nlog Z beyond the 95 % interval: {tally}."

    def _against(self, rows: Sequence[Row], name: str, size: int, arm: str) -> list[str]:
        tri = by_seed(rows, name, size, arm, "log_z")
        best = self._best_arm(rows, name, size, "log_z")
        other = by_seed(rows, name, size, best, "log_z")
        rise, ratio = paired(tri, other), spread_gain(tri, other)
        tuned = "tuned" if self.tasks[name].tuned else ""
        gaps = [number(_gap(rows, name, values)) for values in (other, tri)]
        spread = f"{number(ratio[0])} ({number(ratio[1])} to {number(ratio[2])})"
        rewards = [self._ahead(rows, name, size, arm, column) for column in ("reward", "best")]
        return [name, tuned, best, *gaps, interval(rise), spread, *rewards, word(rise)]

    def _best_arm(self, rows: Sequence[Row], task: str, size: int, column: str) -> str:
        """The arm of FK steering whose mean is highest; estimates of log Z fall short."""
        arms = {arm: by_seed(rows, task, size, arm, column) for arm in self.fk}
        found = {arm: statistics.mean(values.values()) for arm, values in arms.items() if values}
        return max(found, key=found.__getitem__)

    def _ahead(self, rows: Sequence[Row], task: str, size: int, arm: str, column: str) -> str:
        """By how much an arm is ahead of the arm of FK steering that is best in a column."""
        best = self._best_arm(rows, task, size, column)
        own, other = (by_seed(rows, task, size, one, column) for one in (arm, best))
        return interval(paired(own, other))

    def ablations(self, rows: Sequence[Row]) -> str:
        """What is lost where a part is left out."""
        arms = sorted({row["arm"] for row in rows if row["arm"].startswith("tri, ")})
        arms = [arm for arm in arms if arm not in (*self.shown, "tri, last pass")]
        names = [n for n in self.tasks if any(by_seed(rows, n, 4, arm, "log_z") for arm in arms)]
        if not arms or not names:
            return ""

        def cell(name: str, arm: str, show: Callable[[Any], str]) -> str:
            tri, other = (by_seed(rows, name, 4, a, "log_z") for a in ("tri", arm))
            return show(paired(other, tri)) if other and tri else "–"

        body = [[arm, *(cell(name, arm, interval) for name in names)] for arm in arms]
        title = "### Ablation at the same budget, N = 4: change of the mean of log Z"
        return f"{title}\n\n{table(['arm', *names], body)}"


def _seeds(found: Sequence[float]) -> str:
    """How many there are, and in how many no particle had weight."""
    dead = sum(value == -math.inf for value in found)
    return f"{len(found)} ({dead} dead)" if dead else str(len(found))


def _reference_runs(rows: Sequence[Row], task: str) -> list[Row]:
    """The longest reference runs of a task of which there are three, else most."""
    runs = [row for row in rows if row["task"] == task and row["arm"].startswith("reference")]
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


def _severe(rows: Sequence[Row], name: str, size: int) -> bool:
    """Whether importance sampling with the whole budget is left with less than two particles."""
    found = by_seed(rows, name, size, "importance", "ess").values()
    return bool(found) and statistics.mean(max(value, 0.0) for value in found) < 2


def _gap(rows: Sequence[Row], task: str, values: dict[int, float]) -> float:
    reference, agreed = _reference(rows, task)
    return reference - statistics.mean(values.values()) if agreed else math.nan
