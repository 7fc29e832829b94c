# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Recorded paths, and the weighted likelihood of a twist on them.

A pass is kept as it was drawn, step by step. To weight its final paths, their weights are pushed
back through the genealogy: a particle weighs as much as the final paths that go through it. No
path is ever copied together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyro_twist.twists.tilting import log_ratio

__all__ = ["Pass", "PathStep", "Paths"]


@dataclass(frozen=True)
class PathStep:
    """
    One latent site of one step, for all particles, before the resampling of that step.

    :param str name: The site.
    :param tuple args: The arguments of ``init`` or ``step`` after the state.
    :param dict kwargs: Its keyword arguments.
    :param dict state: The state before the step.
    :param prior: The model's distribution.
    :param posterior: The proposal it was drawn from.
    :param torch.Tensor value: The value drawn.
    :param bool stepping: Whether it was drawn in a ``step``, not in ``init``.
    :param torch.Tensor weights: Summed weights of the final paths through each particle, of shape
        ``(num_particles,)`` or ``(num_particles, num_populations)``.
    :param torch.Tensor base: The same for their weights back to the law they were drawn from.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: dict[Any, torch.Tensor]
    prior: Any
    posterior: Any
    value: torch.Tensor
    stepping: bool = True
    weights: torch.Tensor | None = None
    base: torch.Tensor | None = None

    @property
    def t(self) -> int | None:
        """The time index of the step, ``None`` for ``init``."""
        known = self.stepping and self.args and isinstance(self.args[0], int)
        return int(self.args[0]) if known else None

    def proposal(self, twist: Any) -> Any:
        """What the twist proposes here."""
        twist.args_kwargs = ((self.state, *self.args), self.kwargs)
        twist.stepping = self.stepping
        return twist.get_posterior(self.name, self.prior)

    def log_prob(self, twist: Any) -> torch.Tensor:
        """Log-density of the twist's proposal at the value, relative to the model's; float64."""
        proposal = self.proposal(twist)
        if proposal is self.prior:
            return torch.zeros(self.prior.batch_shape, dtype=torch.float64)
        return -log_ratio(self.prior, proposal, self.value)


@dataclass(frozen=True)
class Paths:
    """
    The paths of a pass, weighted towards the law to fit.

    :param tuple steps: The steps in the order they were taken, with weights.
    :param float centring: How much of the score under the law the paths were drawn from is
        subtracted; its mean is zero, its noise is not.
    """

    steps: tuple[PathStep, ...]
    centring: float = 0.0

    def __iter__(self) -> Iterator[PathStep]:
        return iter(self.steps)

    def log_likelihood(self, twist: Any, which: str = "weights") -> torch.Tensor:
        """
        The weighted log-likelihood of whole paths under a twist, relative to the model's own.

        :param twist: A twist with ``get_posterior``.
        :param str which: ``"weights"`` or ``"base"``.
        :returns: A number, differentiable in the twist's parameters.
        :rtype: torch.Tensor
        """
        total = torch.zeros((), dtype=torch.float64)
        for step in self.steps:
            weight = getattr(step, which)
            total = total + (weight * _sum_to(step.log_prob(twist), weight)).sum()
        return total


@dataclass(frozen=True)
class Pass:
    """
    One pass of an inference run, as it was drawn.

    :param list steps: For every step its latent sites.
    :param list ancestors: For every step the indices of its resampling, ``None`` where none was.
    :param torch.Tensor log_path: Log-weights of the final paths under the target relative to the
        law they were drawn from, never reset by resampling, of shape ``(num_particles,)`` or
        ``(num_particles, num_populations)``.
    :param torch.Tensor log_base: Their log-weights back to that law; constant unless resampled.
    :param torch.Tensor log_terminal: The summed factors and observations along each path.
    :param dict state: The state at the end.
    """

    steps: list[list[PathStep]]
    ancestors: list[torch.Tensor | None]
    log_path: torch.Tensor
    log_base: torch.Tensor
    log_terminal: torch.Tensor
    state: dict[Any, torch.Tensor]

    def paths(self, weights: torch.Tensor, base: torch.Tensor, centring: float) -> Paths:
        """
        The pass, weighted.

        :param torch.Tensor weights: Weights of the final paths towards the law to fit, of the
            shape of ``log_path``.
        :param torch.Tensor base: Their weights back to the law they were drawn from.
        :param float centring: See :class:`Paths`.
        """
        towards, back = self._pushed(weights), self._pushed(base)
        steps = zip(self.steps, towards, back, strict=True)
        sites = [replace(s, weights=w, base=b) for sites, w, b in steps for s in sites]
        return Paths(tuple(sites), centring)

    def _pushed(self, weights: torch.Tensor) -> list[torch.Tensor]:
        pushed = []
        for index in reversed(self.ancestors):
            if index is not None:
                weights = torch.zeros_like(weights).scatter_add_(0, index, weights)
            pushed.append(weights)
        return pushed[::-1]

    def lineages(self) -> list[torch.Tensor]:
        """For every step the particle, before resampling, that each final path goes through."""
        like = self.log_path
        lineage = torch.arange(like.shape[0], device=like.device)
        lineage = lineage.reshape((-1,) + (1,) * (like.dim() - 1)).expand(like.shape)
        lineages = []
        for index in reversed(self.ancestors):
            lineage = lineage if index is None else index.gather(0, lineage)
            lineages.append(lineage)
        return lineages[::-1]


def _sum_to(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sums trailing batch dims away, down to those of the weights."""
    extra = tuple(range(like.dim(), value.dim()))
    return value.sum(extra) if extra else value
