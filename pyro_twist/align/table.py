# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The table of the job, for the terminal and for the page alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pyro_twist.align.outcome import Arm, Outcome, Score

__all__ = ["Column", "columns", "number", "summary_rows", "table_rows"]

ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """
    A column of the table.

    :param str heading: Its heading.
    :param str explanation: What it is, in a sentence or two.
    :param callable value: The figure of a population.
    :param callable combine: Makes one figure of those of all classes.
    :param callable shown: Formats it.
    """

    heading: str
    explanation: str
    value: Callable[[Arm, int], float | None]
    combine: Callable[[list[float]], float]
    shown: Callable[[float | None], str]


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


def number(value: float | None) -> str:
    """A figure with three or four digits that matter, a dash for none."""
    if value is None or math.isnan(value):
        return ABSENT
    if math.isinf(value):
        return "-inf" if value < 0 else "inf"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:.{digits}f}"


def _fixed(digits: int) -> Callable[[float | None], str]:
    return lambda value: ABSENT if value is None else f"{value:.{digits}f}"


def columns(outcome: Outcome) -> list[Column]:
    """
    The columns that belong to each class; calls and seconds belong to the whole run.

    :param Outcome outcome: Decides about units.
    """
    name = outcome.single_reward
    what = f"reward ({name})" if name else "sum of lambda * reward, in nats"
    judge = outcome.domain.judge_explained(outcome.labels != ("",))
    size = outcome.options.particles
    return [
        Column(
            "reward mean",
            f"Mean {what} of what the method returns: over equal weights for the base model, "
            "weighted for the tilted law, of the one returned sample for a maximiser.",
            lambda arm, p: _mean_reward(arm.scores[p], name),
            _average,
            number,
        ),
        Column(
            "best",
            "The same of the best particle.",
            lambda arm, p: _best_reward(arm.scores[p], name),
            max,
            number,
        ),
        Column("judge", judge, lambda arm, p: arm.scores[p].judge, _average, _fixed(2)),
        Column(
            "diversity",
            f"Mean distance ({outcome.domain.distance_explained()}) between two of {size} "
            "draws of what the method returns, relative to the base model; copies have distance "
            "0.",
            outcome.relative_diversity,
            _average,
            _fixed(2),
        ),
        Column(
            "ESS",
            f"Effective sample size at the end, of {size}: 1 if one particle has all the weight. "
            "It does not see that particles are related: the genealogy does.",
            lambda arm, p: arm.scores[p].ess,
            _average,
            _fixed(1),
        ),
        Column(
            "log Z",
            "Log of the estimate of E[exp(lambda * reward)] under the base model; the estimate "
            "itself is unbiased, its log is low on average, so that of two samplers the one with "
            "the higher log Z is usually the better.",
            lambda arm, p: arm.scores[p].log_normalizer,
            _average,
            _fixed(2),
        ),
    ]


CALLS = {
    "denoiser calls": "Samples that went through the network, the budget that all methods share; "
    "classifier-free guidance counts once.",
    "reward calls": "Samples that were scored, the look-aheads of the samplers included; copies "
    "in one batch are scored once.",
    "seconds": "Time of the run, loading not included.",
}


def table_rows(outcome: Outcome, population: int) -> list[list[str]]:
    """A row for each method with the figures of one class."""
    chosen = columns(outcome)
    return [
        [arm.method.name, *(column.shown(column.value(arm, population)) for column in chosen)]
        for arm in outcome.arms
    ]


def summary_rows(outcome: Outcome) -> list[list[str]]:
    """A row for each method with figures averaged over classes, calls and seconds."""
    return [[arm.method.name, *_summary(arm, outcome)] for arm in outcome.arms]


def _summary(arm: Arm, outcome: Outcome) -> Iterable[str]:
    populations = range(len(outcome.labels))
    for column in columns(outcome):
        values = [column.value(arm, p) for p in populations]
        known = [value for value in values if value is not None]
        yield column.shown(column.combine(known) if known else None)
    yield f"{arm.counts.get('denoiser', 0):,}"
    yield f"{arm.counts.get('reward', 0):,}"
    yield f"{arm.seconds:.1f}"


def _mean_reward(score: Score, name: str | None) -> float:
    return score.objective_mean if name is None else score.reward_mean[name]


def _best_reward(score: Score, name: str | None) -> float:
    return score.objective_best if name is None else score.reward_best[name]
