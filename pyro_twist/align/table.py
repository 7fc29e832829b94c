# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The table of the job, for the terminal and for the page alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pyro_twist.align.outcome import Arm, Outcome, Score

__all__ = ["Column", "columns", "number", "remarks", "summary_rows", "table_rows"]

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
    :param callable error: The standard error of a population's figure, for figures that have one.
    """

    heading: str
    explanation: str
    value: Callable[[Arm, int], float | None]
    combine: Callable[[list[float]], float]
    shown: Callable[[float | None], str]
    error: Callable[[Arm, int], float | None] = lambda arm, p: None

    def cell(self, arm: Arm, populations: Iterable[int]) -> str:
        """The figure of some populations together, with a standard error where there is one."""
        chosen = list(populations)
        known = [v for v in (self.value(arm, p) for p in chosen) if v is not None]
        text = self.shown(self.combine(known) if known else None)
        errors = [e for e in (self.error(arm, p) for p in chosen) if e is not None]
        if not known or len(errors) < len(chosen):
            return text
        decimals = len(text.partition(".")[2])
        return f"{text} ±{math.hypot(*errors) / len(errors):.{decimals}f}"


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


def _count(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f}".removesuffix(".0")


def _fixed(digits: int) -> Callable[[float | None], str]:
    return lambda value: ABSENT if value is None else f"{value:.{digits}f}"


def columns(outcome: Outcome) -> list[Column]:
    """
    The columns that belong to each class; calls and seconds belong to the whole run.

    :param Outcome outcome: Decides about units.
    """
    name = outcome.single_reward
    what = f"reward ({name})" if name else "sum of lambda * reward, in nats,"
    falling = name is not None and any(one.scale < 0 for one in outcome.strengths)
    judge = outcome.domain.judge_explained(outcome.labels != ("",))
    size = outcome.options.particles
    found = [
        Column(
            "reward mean" if name else "lambda * reward",
            f"Mean {what} of what the method returns: over equal weights for the base model, "
            "weighted for the tilted law, of the one returned sample for a maximiser. The ± is one "
            "standard error of this run, from the spread between the families of the initial "
            "particles: too low where few ancestors are left, and left out where fewer than four.",
            lambda arm, p: _mean_reward(arm.scores[p], outcome),
            _average,
            number,
            lambda arm, p: _mean_error(arm.scores[p], outcome),
        ),
        Column(
            "best",
            "The same of the particle of highest lambda * reward; where lambda is 0, of highest "
            "reward.",
            lambda arm, p: _best_reward(arm.scores[p], outcome),
            min if falling else max,
            number,
        ),
        Column(
            "judge",
            judge,
            lambda arm, p: arm.scores[p].judge,
            _average,
            _fixed(2),
            lambda arm, p: arm.scores[p].judge_error,
        ),
        Column(
            "diversity",
            f"Mean distance ({outcome.domain.distance_explained()}) between two of {size} "
            "draws of what the method returns, relative to the base model, without which it is "
            "left out; copies have distance 0.",
            outcome.relative_diversity,
            _average,
            _fixed(2),
        ),
        Column(
            "final ESS",
            f"Effective sample size at the end, of {size}: 1 if one particle has all the weight. "
            "It does not see that particles are related or copies, and is high right after a "
            "resampling: read it together with the ancestors. The lowest of all steps is in "
            "results.json.",
            lambda arm, p: arm.scores[p].ess,
            _average,
            _fixed(1),
        ),
        Column(
            "ancestors",
            f"How many of the {size} initial particles the final ones descend from. Those of one "
            "ancestor are relatives; how many samples differ at all is in results.json.",
            lambda arm, p: arm.scores[p].ancestors,
            _average,
            _count,
        ),
        Column(
            "log Z",
            "Log of the estimate of E[exp(lambda * reward)] under the base model; the estimate "
            "itself is unbiased, its log is low on average, by more for a worse sampler. That "
            "shows in averages over many seeds; a single run says little.",
            lambda arm, p: arm.scores[p].log_normalizer,
            _average,
            _fixed(2),
        ),
    ]
    return [column for column in found if judge or column.heading != "judge"]


CALLS = {
    "denoiser calls": "Samples that went through the network, the budget that all methods share; "
    "classifier-free guidance counts once, and a sequence that a step left as it was not again.",
    "reward calls": "Samples that were scored, the look-aheads of the samplers included; copies "
    "in one batch are scored once.",
    "seconds": "Time of the run, learning included, loading not.",
}


def table_rows(outcome: Outcome, population: int) -> list[list[str]]:
    """A row for each method with the figures of one class."""
    chosen = columns(outcome)
    return [
        [arm.method.name, *(column.cell(arm, [population]) for column in chosen)]
        for arm in outcome.arms
    ]


def summary_rows(outcome: Outcome) -> list[list[str]]:
    """A row for each method with figures averaged over classes, calls and seconds."""
    return [[arm.method.name, *_summary(arm, outcome)] for arm in outcome.arms]


def _summary(arm: Arm, outcome: Outcome) -> Iterable[str]:
    for column in columns(outcome):
        yield column.cell(arm, range(len(outcome.labels)))
    yield f"{arm.counts.get('denoiser', 0):,}"
    yield f"{arm.counts.get('reward', 0):,}"
    yield f"{arm.seconds:.1f}"


def remarks(outcome: Outcome) -> Iterator[str]:
    """Says what is special about these rows."""
    names = [arm.method.name for arm in outcome.arms]
    for arm in outcome.arms:
        if arm.method.stream in names:
            yield (
                f"{arm.method.name} draws the same samples as {arm.method.stream}, so that both "
                "have the same best one."
            )
        elif arm.roots is None and arm.method.returns != "a maximiser":
            yield (
                f"{arm.method.name} pools several passes or keeps no genealogy, so that its "
                "ancestors cannot be counted."
            )
    if outcome.arms and outcome.base is None:
        yield (
            "There is no diversity without the base model, to which it is relative: add --method "
            "base."
        )


def _mean_reward(score: Score, outcome: Outcome) -> float | None:
    if outcome.single_reward:
        return score.reward_mean[outcome.single_reward]
    return score.objective_mean if outcome.strengths else None


def _mean_error(score: Score, outcome: Outcome) -> float | None:
    if outcome.single_reward:
        return score.reward_error[outcome.single_reward]
    return score.objective_error if outcome.strengths else None


def _best_reward(score: Score, outcome: Outcome) -> float | None:
    if outcome.single_reward:
        return score.reward_best[outcome.single_reward]
    return score.objective_best if outcome.strengths else None
