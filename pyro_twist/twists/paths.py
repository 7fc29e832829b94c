# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Recorded paths, and the weighted likelihood of a twist on them.

A pass is kept as it was drawn, step by step. To weight its final paths, their weights are pushed
back through the genealogy: a particle weighs as much as the final paths that go through it. No
path is ever copied together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributions import Distribution, Transform

from pyro_twist.twists.statistics import Statistics
from pyro_twist.twists.tilting import _compact, log_ratio

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
    :param int population_axis: The batch dim of the populations, ``None`` if there is one.
    :param torch.Tensor emitted: The log of all factors and observations of the step, shaped like
        ``weights``.
    :param dict after: Entries of the state right after the step, before any resampling; those that
        twists ask for in ``follows``.
    :param torch.device device: Where fits compute with it, if it is kept elsewhere.
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
    population_axis: int | None = None
    emitted: torch.Tensor | None = None
    after: dict[Any, torch.Tensor] = field(default_factory=dict)
    device: torch.device | None = None

    @property
    def t(self) -> int | None:
        """The time index of the step, ``None`` for ``init``."""
        known = self.stepping and self.args and isinstance(self.args[0], int)
        return int(self.args[0]) if known else None

    def kept(self, reads: tuple[str, ...] | None, device: Any = None) -> PathStep:
        """
        What fits need of it and no more: detached, without the other entries of the state.

        :param tuple reads: The entries of the state to keep, all if ``None``.
        :param torch.device device: Where to keep the tensors; where they are if ``None``.
        """
        state = {k: v for k, v in self.state.items() if reads is None or k in reads}
        home = None if device is None else self.value.device
        return replace(replace(self, state=state)._carried(device), device=home)

    def followed(self, emitted: torch.Tensor, after: dict[Any, Any], device: Any) -> PathStep:
        """
        The step with what came of it.

        :param torch.Tensor emitted: See the class.
        :param dict after: See the class.
        :param torch.device device: Where to keep the tensors; where they are if ``None``.
        """
        return replace(self, emitted=_carried(emitted, device), after=_carried(after, device))

    def restored(self) -> PathStep:
        """The step with its tensors back where they were drawn."""
        return self if self.device is None else self._carried(self.device)

    def _carried(self, device: Any) -> PathStep:
        names = ("args", "kwargs", "state", "prior", "value", "weights", "base", "emitted", "after")
        moved = {name: _carried(getattr(self, name), device) for name in names}
        same = self.posterior is self.prior
        posterior = moved["prior"] if same else _carried(self.posterior, device)
        return replace(self, posterior=posterior, **moved)

    def proposal(self, twist: Any) -> Any:
        """What the twist proposes here."""
        twist.args_kwargs = ((self.state, *self.args), self.kwargs)
        twist.stepping = self.stepping
        try:
            return twist.get_posterior(self.name, self.prior)
        finally:
            del twist.args_kwargs

    def log_prob(self, twist: Any) -> torch.Tensor:
        """
        Log-density of the twist's proposal at the value, relative to the model's.

        :returns: Of shape ``(num_particles,)`` or ``(num_particles, num_populations)``, in
            float64.
        :rtype: torch.Tensor
        """
        proposal = self.proposal(twist)
        if proposal is self.prior:
            value = torch.zeros(
                self.prior.batch_shape, dtype=torch.float64, device=self.value.device
            )
        else:
            value = -log_ratio(self.prior, proposal, self.value)
        rest = [dim for dim in range(1, value.dim()) if dim != self.population_axis]
        return value.sum(rest) if rest else value


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
        """The steps, with their tensors where they were drawn."""
        return (step.restored() for step in self.steps)

    def log_likelihood(self, twist: Any, which: str = "weights") -> torch.Tensor:
        """
        The weighted log-likelihood of whole paths under a twist, relative to the model's own.

        :param twist: A twist with ``get_posterior``.
        :param str which: ``"weights"`` or ``"base"``.
        :returns: A number, differentiable in the twist's parameters.
        :rtype: torch.Tensor
        """
        total = torch.zeros((), dtype=torch.float64)
        for step in self:
            total = total + (getattr(step, which) * step.log_prob(twist)).sum()
        return total


@dataclass(frozen=True)
class Pass:
    """
    One pass of an inference run, as it was drawn.

    :param list steps: For every step its latent sites; empty if only statistics were kept.
    :param list ancestors: For every step the indices of its resampling, ``None`` where none was.
    :param torch.Tensor log_path: Log-weights of the final paths under the target relative to the
        law they were drawn from, never reset by resampling, of shape ``(num_particles,)`` or
        ``(num_particles, num_populations)``.
    :param torch.Tensor log_base: Their log-weights back to that law; constant unless resampled.
    :param torch.Tensor log_terminal: The summed factors and observations along each path.
    :param dict state: The state at the end.
    :param tuple statistics: What was kept of the final paths instead of their steps: one entry for
        every block of parameters that a step belonged to. ``None`` if the steps were kept.
    :param bool gap: Whether paths of weight zero were resampled away, so that those left cannot
        stand for the law they were drawn from.
    :param torch.Tensor ess: Effective sample sizes of the twisted weights, of shape
        ``(num_steps,)`` or ``(num_steps, num_populations)``.
    """

    steps: list[list[PathStep]]
    ancestors: list[torch.Tensor | None]
    log_path: torch.Tensor
    log_base: torch.Tensor
    log_terminal: torch.Tensor
    state: dict[Any, torch.Tensor]
    statistics: tuple[Statistics, ...] | None = None
    ess: torch.Tensor | None = None
    gap: bool = False

    def kept(self, device: Any) -> Pass:
        """The pass with all tensors on a device, those of its steps left out; see ``PathStep``."""
        if device is None:
            return self
        names = ("ancestors", "log_path", "log_base", "log_terminal", "state", "statistics", "ess")
        return replace(self, **{name: _carried(getattr(self, name), device) for name in names})

    def paths(self, weights: torch.Tensor, base: torch.Tensor, centring: float) -> Paths:
        """
        The pass, weighted.

        :param torch.Tensor weights: Weights of the final paths towards the law to fit, of the
            shape of ``log_path``.
        :param torch.Tensor base: Their weights back to the law they were drawn from.
        :param float centring: See :class:`Paths`.
        """
        towards, back = self.pushed(weights), self.pushed(base)
        steps = zip(self.steps, towards, back, strict=True)
        sites = [replace(s, weights=w, base=b) for sites, w, b in steps for s in sites]
        return Paths(tuple(sites), centring)

    def pushed(self, weights: torch.Tensor) -> list[torch.Tensor]:
        """
        Weights of the final paths, pushed back through the genealogy.

        :param torch.Tensor weights: Of the shape of ``log_path``, after any leading dims.
        :returns: For every step, the summed weights of the paths through each particle.
        :rtype: list
        """
        dim, pushed = weights.dim() - self.log_path.dim(), []
        for index in reversed(self.ancestors):
            if index is not None:
                index = index.expand(weights.shape)
                weights = torch.zeros_like(weights).scatter_add_(dim, index, weights)
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


def _carried(value: Any, device: Any) -> Any:
    """A detached copy on a device (where it is if ``None``), of all tensors in a container."""
    if isinstance(value, torch.Tensor):
        return _moved(value.detach(), device)
    if isinstance(value, dict):
        return {key: _carried(one, device) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_carried(one, device) for one in value)
    if isinstance(value, (Distribution, Transform, Statistics)):
        clone = copy.copy(value)
        clone.__dict__.update(_carried(vars(value), device))
        return clone
    return value


def _moved(value: torch.Tensor, device: Any) -> torch.Tensor:
    if device is None or value.device == torch.device(device):
        return value
    # a value that is the same for all particles stays a single one
    return _compact(value).to(device).expand(value.shape)
