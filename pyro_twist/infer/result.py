# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What a run returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from pyro_twist import weights
from pyro_twist.infer.particles import take_ancestors
from pyro_twist.infer.resampling import get_resampling

if TYPE_CHECKING:
    from arviz import InferenceData
    from matplotlib.figure import Figure

__all__ = ["Diagnostics", "SMCResult"]


@dataclass(frozen=True)
class Diagnostics:
    """
    One entry per step, the initial draw included, before any resampling of that step.

    :param torch.Tensor ess: Effective sample sizes of the twisted weights, of shape
        ``(num_steps,)`` or ``(num_steps, num_populations)``, as all others.
    :param torch.Tensor log_normalizer: Estimates of the log normaliser of the model up to here.
    :param torch.Tensor increments: Increments of the log normaliser of the twisted targets. They
        sum to the final ``log_normalizer``.
    :param torch.Tensor resampled: Whether the population was resampled after the step.
    :param torch.Tensor ancestors: Of shape ``(num_steps,)`` plus the shape of the log-weights:
        after step ``s``, particle ``i`` continues particle ``ancestors[s, i]``. ``None`` where
        no history was kept.
    """

    ess: torch.Tensor
    log_normalizer: torch.Tensor
    increments: torch.Tensor
    resampled: torch.Tensor
    ancestors: torch.Tensor | None = None

    def lineages(self) -> torch.Tensor:
        """
        The genealogy of the final particles.

        :returns: Shaped like ``ancestors``; entry ``[s, i]`` is the particle at step ``s``, before
            its resampling, from which final particle ``i`` descends.
        :raises ValueError: If the run kept no history.
        """
        if self.ancestors is None:
            raise ValueError("this run kept no ancestors; run with history='ancestors'")
        lineages = [self.ancestors[-1]]
        for ancestors in self.ancestors.flip(0)[1:]:
            lineages.append(take_ancestors(ancestors, lineages[-1]))
        return torch.stack(lineages[::-1])


@dataclass(frozen=True)
class SMCResult:
    """
    Weighted particles. Sampling and maximising are different methods, :meth:`resample` and
    :meth:`best`.

    :param dict state: The entries of the state, particles along dim 0.
    :param torch.Tensor log_weights: Unnormalised log-weights in float64, of shape
        ``(num_particles,)`` or ``(num_particles, num_populations)``; the mean of their
        exponentials is the estimate of the normaliser.
    :param torch.Tensor log_normalizer: Log of the estimated normaliser, of shape ``()`` or
        ``(num_populations,)``; the estimate itself (not its log) is unbiased. NaN for methods
        that do not estimate it.
    :param Diagnostics diagnostics: What happened step by step.
    :param dict counts: Evaluations by kind, such as ``denoiser`` and ``reward``, counted in
        samples.
    :param float seconds: Time spent in the steps.
    :param dict samples: The value of each latent site along the lineages of the final particles,
        if the run kept paths. Fit for ``poutine.condition`` and ``Predictive``.
    :param int population_axis: The dim of the entries of ``state`` that holds the populations,
        where there are several.
    :param str kind: What the particles are: ``"tilted law"`` or ``"maximiser"``.
    """

    state: Mapping[str, torch.Tensor]
    log_weights: torch.Tensor
    log_normalizer: torch.Tensor
    diagnostics: Diagnostics | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    samples: Mapping[str, torch.Tensor] | None = None
    population_axis: int = 1
    kind: str = "tilted law"

    @property
    def num_particles(self) -> int:
        """Number of particles in each population."""
        return self.log_weights.shape[0]

    def get_log_normalizer(self) -> torch.Tensor:
        """The log of the estimated normaliser; the name Pyro's ``Importance`` gives it."""
        return self.log_normalizer

    def get_normalized_weights(self, log_scale: bool = False) -> torch.Tensor:
        """
        The weights, summing to one in each population.

        :param bool log_scale: Whether to return their logs.
        """
        normalized = weights.log_normalize(self.log_weights)
        return normalized if log_scale else normalized.exp()

    def get_ESS(self) -> torch.Tensor:
        """The effective sample size of each population."""
        return weights.effective_sample_size(self.log_weights)

    def expectation(
        self, function: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] | str
    ) -> torch.Tensor:
        """
        Self-normalised estimate of an expectation under the tilted law.

        :param function: Maps the state to values with the batch dims of the state, or the name of
            an entry.
        :returns: The weighted mean, in float64.
        """
        values = self.state[function] if isinstance(function, str) else function(self.state)
        return weights.weighted_mean(self._by_population(values), self.log_weights)

    def _by_population(self, value: torch.Tensor) -> torch.Tensor:
        """Moves the populations to dim 1."""
        if self.log_weights.dim() == 2:
            return value.movedim(self.population_axis, 1)
        return value

    def resample(
        self,
        num_samples: int | None = None,
        *,
        resampling: str = "systematic",
        generator: torch.Generator | None = None,
    ) -> SMCResult:
        """
        Equally weighted draws, approximately from the tilted law; duplicates are to be expected.

        :param int num_samples: How many, ``num_particles`` by default.
        :param str resampling: The name of a resampling scheme.
        :param torch.Generator generator: Source of randomness, the global one if ``None``.
        :returns: A result with ``num_samples`` particles of equal weight.
        """
        size = self.num_particles if num_samples is None else num_samples
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"num_samples={num_samples!r}; give a whole number, 1 or more")
        scheme = get_resampling(resampling)
        probs = self.get_normalized_weights()
        columns = [scheme(column, size, generator) for column in probs.reshape(len(probs), -1).T]
        index = torch.stack(columns, -1).reshape((size,) + probs.shape[1:])
        return self.select(index)

    def select(self, index: torch.Tensor) -> SMCResult:
        """
        The particles at ``index``, equally weighted.

        :param torch.Tensor index: Of shape ``(size,)`` or ``(size, num_populations)``.
        """
        take = {k: take_ancestors(v, index, self.population_axis) for k, v in self.state.items()}
        paths = None
        if self.samples is not None:
            axis = self.population_axis
            paths = {k: take_ancestors(v, index, axis) for k, v in self.samples.items()}
        log_weights = self.log_normalizer.expand(index.shape)
        log_weights = torch.where(log_weights.isnan(), 0.0, log_weights)
        return replace(self, state=take, log_weights=log_weights, samples=paths)

    def best(self, k: int = 1, *, by: str = "reward") -> SMCResult:
        """
        The ``k`` particles of highest reward: a maximiser, not a draw from the tilted law.

        :param int k: How many, of each population.
        :param str by: The entry of the state to rank by.
        :returns: A result with ``k`` particles, best first, whose weights are equal and whose
            normaliser is NaN.
        :raises ValueError: If there is no such entry, or ``k`` is out of range.
        """
        if by not in self.state:
            known = ", ".join(repr(key) for key in self.state)
            raise ValueError(f"by={by!r} is no entry of the state; there are {known}")
        if not 1 <= k <= self.num_particles:
            raise ValueError(f"k={k}; give a number from 1 to {self.num_particles}")
        values = self._by_population(self.state[by])
        if values.numel() != self.log_weights.numel():
            raise ValueError(
                f"by={by!r} has shape {tuple(self.state[by].shape)}; ranking needs one number for "
                f"each of the weights, whose shape is {tuple(self.log_weights.shape)}"
            )
        values = values.reshape(self.log_weights.shape)
        alive = torch.where(self.log_weights > -torch.inf, values.double(), -torch.inf)
        chosen = self.select(alive.topk(k, dim=0).indices)
        nan = torch.full_like(self.log_normalizer, torch.nan)
        equal = torch.zeros_like(chosen.log_weights)
        return replace(chosen, log_weights=equal, log_normalizer=nan, kind="maximiser")

    def plot(self, **options: Any) -> Figure:
        """
        Draws ESS, log-normaliser increments and genealogy; needs the extra ``plots``.

        :param options: Passed to :func:`pyro_twist.infer.plots.plot_diagnostics`.
        """
        from pyro_twist.infer.plots import plot_diagnostics

        return plot_diagnostics(self, **options)

    def to_arviz(self, *, num_samples: int | None = None) -> InferenceData:
        """
        Resampled particles, and the diagnostics, as an ArviZ object; needs the extra ``plots``.

        :param int num_samples: How many draws, ``num_particles`` by default.
        :returns: Groups ``posterior`` (one chain of equally weighted draws) and ``sample_stats``.
        """
        from pyro_twist.infer.export import to_arviz

        return to_arviz(self, num_samples)

    def __repr__(self) -> str:
        shape = tuple(self.log_weights.shape)
        log_z = ", ".join(f"{x:.3f}" for x in self.log_normalizer.reshape(-1).tolist())
        ess = ", ".join(f"{x:.1f}" for x in self.get_ESS().reshape(-1).tolist())
        entries = ", ".join(f"{key} {tuple(value.shape)}" for key, value in self.state.items())
        return (
            f"SMCResult({self.kind}; log_weights {shape}; log_normalizer {log_z}; ESS {ess}; "
            f"counts {dict(self.counts)}; state: {entries})"
        )
