# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What the job found out: an arm for each method, a score for each class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_twist.align.domains import Domain
from pyro_twist.align.methods import Method
from pyro_twist.align.options import AlignOptions
from pyro_twist.infer import SMCResult
from pyro_twist.rewards.samples import originals

__all__ = ["Arm", "Outcome", "Score", "Strength", "score_arm"]


# Fewer say nothing about the spread between them.
FEWEST_FAMILIES = 4


@dataclass(frozen=True)
class Strength:
    """
    How strongly the law is tilted by a reward.

    :param str name: The reward.
    :param float scale: ``lambda``.
    :param float strength: ``lambda`` in units of ``1 / sd``, if it was chosen so.
    :param float mean: The mean of the reward under the model, if it was measured, over the samples
        that are allowed.
    :param float sd: Its standard deviation within classes, if it was measured.
    :param int size: The number of samples on which it was measured.
    :param int allowed: How many of those have a reward above minus infinity.
    """

    name: str
    scale: float
    strength: float | None = None
    mean: float | None = None
    sd: float | None = None
    size: int = 0
    allowed: int = 0


@dataclass(frozen=True)
class Score:
    """
    The figures of one method on one class. Means are over what the method returns: weighted for a
    tilted law, the one best sample for a maximiser.

    :param str label: The class, empty if none was asked for.
    :param dict reward_mean: The mean of each reward.
    :param dict reward_best: The rewards of the particle of highest objective, or, where lambda is
        zero, of highest reward.
    :param float objective_mean: The mean of the sum of the scaled rewards.
    :param float objective_best: The highest such sum.
    :param float judge: The mean score of the judge, ``None`` without one.
    :param dict judge_details: The means of its other figures.
    :param float diversity: Mean distance between two returned samples, ``None`` for a maximiser.
    :param float ess: The effective sample size at the end, ``None`` for a maximiser.
    :param float log_normalizer: The log of the estimated normaliser, if the method has one.
    :param float ess_min: The lowest effective sample size of any step, ``None`` for a maximiser and
        for particles pooled from several passes.
    :param int ancestors: How many initial particles the final ones of positive weight descend from;
        ``None`` as above.
    :param int distinct: How many different samples have a positive weight.
    :param dict reward_error: A standard error of each mean, where there is one.
    :param float objective_error: Likewise of ``objective_mean``.
    :param float judge_error: Likewise of ``judge``.
    """

    label: str
    reward_mean: Mapping[str, float]
    reward_best: Mapping[str, float]
    objective_mean: float
    objective_best: float
    judge: float | None
    judge_details: Mapping[str, float]
    diversity: float | None
    ess: float | None
    log_normalizer: float | None
    ess_min: float | None = None
    ancestors: int | None = None
    distinct: int = 0
    reward_error: Mapping[str, float | None] = field(default_factory=dict)
    objective_error: float | None = None
    judge_error: float | None = None


@dataclass(frozen=True)
class Arm:
    """
    One method's run. Tensors have shape ``(num_particles, num_populations)``; without classes
    there is one population.

    :param Method method: The method.
    :param samples: The decoded samples: a tensor with the sample's shape behind, or an array of
        strings.
    :param dict rewards: The unscaled values of each reward, float64.
    :param torch.Tensor objective: The sum of the scaled rewards.
    :param torch.Tensor weights: The share of each particle in what the method returns; a
        maximiser's best has weight one.
    :param torch.Tensor log_weights: The log-weights, unnormalised; for a maximiser the logs of
        ``weights``.
    :param SMCResult result: The result itself.
    :param SMCResult last: The result of the last pass, with diagnostics; of a method of one pass
        the result itself.
    :param int passes: The number of passes.
    :param float seconds: What the run took, learning included.
    :param twist: The guide that it ran with at the end, if it has one.
    :param tuple iterations: The :class:`~pyro_twist.infer.Iteration` of each time that it learned
        between passes.
    :param bool learned_within: Whether it learned while a pass went on.
    :param tuple scores: A :class:`Score` for each population.
    """

    method: Method
    samples: Any
    rewards: Mapping[str, Tensor]
    objective: Tensor
    weights: Tensor
    log_weights: Tensor
    result: SMCResult
    last: SMCResult
    passes: int = 1
    seconds: float = 0.0
    twist: Any = None
    iterations: tuple[Any, ...] = ()
    learned_within: bool = False
    scores: tuple[Score, ...] = ()

    @property
    def ranking(self) -> Tensor:
        """What the best particle has most of: the objective, the reward where lambda is zero."""
        return self.objective if self.objective.any() else sum_of(self.rewards)

    @property
    def roots(self) -> Tensor | None:
        """
        The initial particle that each final one descends from, shaped like ``weights``; ``None``
        for a maximiser and for particles pooled from several passes.
        """
        diagnostics = self.result.diagnostics
        if diagnostics is None or diagnostics.ancestors is None:
            return None
        if self.method.returns == "a maximiser":
            return None
        first = diagnostics.lineages()[0]
        return first.reshape(self.weights.shape) if first.numel() == self.weights.numel() else None

    @property
    def counts(self) -> Mapping[str, int]:
        """Evaluations of the denoiser and of the rewards."""
        return self.result.counts

    @property
    def has_learned(self) -> bool:
        """Whether the method has learned a twist on the way."""
        return bool(self.iterations) or self.learned_within


@dataclass
class Outcome:
    """
    Everything the job found out.

    :param AlignOptions options: What was asked for.
    :param Domain domain: The model and its surroundings.
    :param labels: The classes; one empty string if none was asked for.
    :param indices: The index of each class; none if none was asked for.
    :param int num_steps: The number of steps of the reverse process.
    :param facts: Settings of the model that matter, by name.
    :param strengths: ``lambda`` of each reward.
    :param dict calibration: Calls spent on choosing ``lambda`` beyond the arms.
    :param int pilot: How many samples were drawn for that beyond the arms.
    :param arms: The methods that have finished, in order.
    :param dict failures: Why others have not, by name.
    :param str error: What ended the job early, empty if nothing did.
    :param float seconds: What the whole job took.
    :param str started: When it began.
    :param bool finished: Whether it has ended, be it early.
    :param str command: The command line that does the same.
    """

    options: AlignOptions
    domain: Domain
    labels: tuple[str, ...]
    indices: Sequence[int]
    num_steps: int
    facts: Sequence[tuple[str, str]] = ()
    strengths: list[Strength] = field(default_factory=list)
    calibration: Mapping[str, int] = field(default_factory=dict)
    pilot: int = 0
    arms: list[Arm] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    started: str = ""
    finished: bool = False
    command: str = ""

    def arm(self, name: str) -> Arm:
        """
        The arm of a method.

        :raises KeyError: If it has not finished.
        """
        found = [arm for arm in self.arms if arm.method.name == name]
        if not found:
            raise KeyError(f"{name!r} is not among {[arm.method.name for arm in self.arms]}")
        return found[0]

    def heading(self, population: int) -> str:
        """What to write above a class; nothing if none was asked for."""
        label = self.labels[population]
        return f"class {label}" if label.isdigit() else label

    @property
    def learned(self) -> dict[str, Any]:
        """The twists that were learned, by method."""
        return {arm.method.name: arm.twist for arm in self.arms if arm.has_learned}

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The names of the rewards, known as soon as a method has finished."""
        if self.strengths:
            return tuple(strength.name for strength in self.strengths)
        return tuple(self.arms[0].rewards) if self.arms else ()

    @property
    def single_reward(self) -> str | None:
        """The name of the reward, if there is only one, whose unit can then be used."""
        return self.reward_names[0] if len(self.reward_names) == 1 else None

    @property
    def base(self) -> Arm | None:
        """The arm of the model as it is, if it has finished."""
        return next((arm for arm in self.arms if not arm.method.tilted), None)

    def relative_diversity(self, arm: Arm, population: int) -> float | None:
        """Diversity of an arm as a fraction of that of the base model, if both are known."""
        mine = arm.scores[population].diversity
        reference = self.base.scores[population].diversity if self.base else None
        return mine / reference if mine is not None and reference else None


def score_arm(arm: Arm, domain: Domain, labels: tuple[str, ...], indices: list[int]) -> list[Score]:
    """
    Scores an arm, class by class.

    :param Arm arm: The arm.
    :param Domain domain: Has the judge and the distances.
    :param labels: The name of each population.
    :param indices: The class of each population; empty if none was asked for.
    """
    columns = range(arm.weights.shape[1])
    return [_score(arm, domain, labels[p], indices[p] if indices else None, p) for p in columns]


def _score(arm: Arm, domain: Domain, label: str, index: int | None, p: int) -> Score:
    weights, samples, objective = arm.weights[:, p], arm.samples[:, p], arm.objective[:, p]
    roots = None if arm.roots is None else arm.roots[:, p]
    best = int(torch.where(weights > 0, arm.ranking[:, p], -torch.inf).argmax())
    judged = domain.judge(samples, index)
    score, details = (judged.score, judged.details) if judged else (None, {})
    maximiser = arm.method.returns == "a maximiser"
    log_z = arm.result.log_normalizer.reshape(-1)[p].item()
    estimates = arm.method.weighted
    return Score(
        label=label,
        reward_mean={name: mean(values[:, p], weights) for name, values in arm.rewards.items()},
        reward_best={name: values[best, p].item() for name, values in arm.rewards.items()},
        objective_mean=mean(objective, weights),
        objective_best=objective[best].item(),
        judge=None if score is None else mean(score, weights),
        judge_details={name: mean(value, weights) for name, value in details.items()},
        diversity=None if maximiser else _diversity(domain.distances(samples), weights),
        ess=None if maximiser else (1 / weights.square().sum()).item(),
        log_normalizer=log_z if estimates and math.isfinite(log_z) else None,
        ess_min=None if roots is None else _least_ess(arm, p),
        ancestors=None if roots is None else len(roots[weights > 0].unique()),
        distinct=len(originals(_listed(rows_of(samples, weights > 0))).unique()),
        reward_error={n: standard_error(v[:, p], weights, roots) for n, v in arm.rewards.items()},
        objective_error=standard_error(objective, weights, roots),
        judge_error=None if score is None else standard_error(score, weights, roots),
    )


def _listed(samples: Any) -> Any:
    return samples if isinstance(samples, Tensor) else list(samples)


def _least_ess(arm: Arm, p: int) -> float | None:
    diagnostics = arm.result.diagnostics
    if diagnostics is None:
        return None
    ess = diagnostics.ess.reshape(len(diagnostics.ess), -1)
    return ess[:, p].min().item()


def standard_error(values: Tensor, weights: Tensor, roots: Tensor | None) -> float | None:
    """
    A standard error of the weighted mean from the spread between families, the particles that
    descend from one initial particle; for equal weights and no resampling the usual one.

    :param torch.Tensor values: One number per particle.
    :param torch.Tensor weights: Their weights, summing to one.
    :param torch.Tensor roots: The family of each particle.
    :returns: The error, too low where families are few; ``None`` without families, with fewer than
        four, or for values that are not finite.
    """
    counted = weights > 0
    if roots is None or not values[counted].isfinite().all():
        return None
    if len(roots[counted].unique()) < FEWEST_FAMILIES:
        return None
    centred = torch.where(counted, values.double() - mean(values, weights), 0.0)
    zeros = torch.zeros_like(weights)
    share = zeros.index_add(0, roots, weights).square().sum().item()
    parts = zeros.index_add(0, roots, weights * centred).square().sum().item()
    return math.sqrt(parts / (1 - share)) if share < 1 - 1e-9 else None


def sum_of(rewards: Mapping[str, Tensor]) -> Tensor:
    """The sum of the rewards as they are."""
    return torch.stack(list(rewards.values())).sum(0)


def mean(values: Tensor, weights: Tensor) -> float:
    """The weighted mean; what has no weight does not count, whatever its value."""
    counted = weights > 0
    return (weights[counted] * values[counted].double()).sum().item()


def _diversity(distances: Tensor, weights: Tensor) -> float | None:
    """
    The mean distance between two of ``N`` draws, so that a particle drawn twice counts as zero;
    for equal weights the mean over all pairs.
    """
    size = len(weights)
    if size < 2:
        return None
    return (weights @ distances @ weights).item() * size / (size - 1)


def rows_of(samples: Any, index: Tensor) -> Any:
    """
    Some of a batch of samples.

    :param samples: A tensor, or an array of strings.
    :param torch.Tensor index: Indices or booleans, of shape ``(B,)``.
    """
    return samples[index] if isinstance(samples, Tensor) else samples[index.cpu().numpy()]


def as_matrix(value: Any, populations: bool) -> Any:
    """Gives a value without populations a dim of size one for them, behind the particles."""
    return value if populations else value[:, None]


def versions(more: Sequence[str] = ()) -> dict[str, Any]:
    """
    The versions that determine the numbers, and the machine's kind.

    :param more: Further packages; those that are not installed are left out.
    """
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from pyro_twist import __version__

    packages = {}
    for name in ("torch", "pyro-ppl", "numpy", *more):
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    machine = f"{platform.system()} {platform.machine()}"
    return {
        "pyro_twist": __version__,
        "python": platform.python_version(),
        **packages,
        "machine": machine,
        "threads": torch.get_num_threads(),
    }
