# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What the tables of comparisons are made with: means over seeds, intervals, and Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

__all__ = [
    "Row",
    "by_seed",
    "interval",
    "with_interval",
    "number",
    "paired",
    "sd",
    "spread_gain",
    "table",
    "word",
]

Row = dict[str, Any]

# two-sided 95 % points of Student's t with so many degrees of freedom, from 1
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def by_seed(rows: Sequence[Row], task: str, size: int, arm: str, name: str) -> dict[int, float]:
    """The figure of each seed; minus infinity where no particle had weight."""
    found = {}
    for row in rows:
        # what only draws have is missing where nothing could be drawn
        if (row["task"], row["size"], row["arm"]) == (task, size, arm) and name in row:
            found[row["seed"]] = -math.inf if row[name] is None else row[name]
    return found


def paired(a: dict[int, float], b: dict[int, float]) -> tuple[float, float]:
    """Mean of ``a - b`` over their common seeds, and half of its 95 % interval."""
    both = sorted(a.keys() & b.keys())
    return with_interval([a[seed] - b[seed] for seed in both])


def with_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds, and half of its 95 % interval."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return (sum(values) / len(values) if values else math.nan), math.nan
    point = _T[len(values) - 2] if len(values) - 1 <= len(_T) else 2.09
    return statistics.mean(values), point * statistics.stdev(values) / math.sqrt(len(values))


def sd(values: Sequence[float]) -> float:
    """The standard deviation over seeds; NaN for fewer than two, or where one is not finite."""
    finite = all(map(math.isfinite, values)) and len(values) > 1
    return statistics.stdev(values) if finite else math.nan


def spread_gain(a: dict[int, float], b: dict[int, float]) -> tuple[float, float, float]:
    """The ratio of the standard deviations of ``a`` and ``b``, with a 95 % bootstrap interval."""
    import random

    draw, x, y = random.Random(0), list(a.values()), list(b.values())
    ratios = []
    for _ in range(2000):
        top, bottom = sd(draw.choices(x, k=len(x))), sd(draw.choices(y, k=len(y)))
        ratios.append(top / bottom if bottom else math.inf)
    ratios.sort()
    whole = sd(x) / sd(y) if sd(y) else math.nan
    return whole, ratios[50], ratios[1949]


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float, digits: int = 2) -> str:
    """A number, or a dash if it is not finite."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def interval(pair: tuple[float, float], digits: int = 2) -> str:
    """A mean and half of its interval."""
    mean, half = pair
    return f"{number(mean, digits)} ± {number(half, digits)}" if math.isfinite(half) else "–"


def word(pair: tuple[float, float]) -> str:
    """Whether a difference lies beyond its interval."""
    mean, half = pair
    if not math.isfinite(half) or abs(mean) <= half:
        return "even"
    return "better" if mean > 0 else "worse"
