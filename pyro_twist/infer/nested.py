# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Nested sequential Monte Carlo: each particle has children, of which one is chosen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_twist import weights
from pyro_twist.infer.particles import take_ancestors
from pyro_twist.infer.resampling import get_resampling
from pyro_twist.infer.twistedsmc import TwistedSMC

__all__ = ["NestedSMC", "check_groups", "check_whole", "draw_within"]


class NestedSMC(TwistedSMC):
    r"""
    Nested SMC [1, 2]: every parent draws several children and continues as one of them.

    With :math:`v_j` the weight increment of child :math:`j`, twist included, a child is chosen with
    probability :math:`v_j / \sum_k v_k` and the weight of its parent grows by the mean of the
    :math:`v_j`. Leaving the mean out would be wrong: that is the biased relative
    :class:`~pyro_twist.infer.SVDD`.

    The budget is that of every other class: ``num_particles`` evaluations of the denoiser in each
    step, which are those of ``num_particles / num_children`` parents with ``num_children``
    children each. Children of one parent come from the same kernel, that is from one evaluation at
    the parent. After the last step none is chosen: the result has all of them, with their weights.

    :param object model: A model with ``init`` and ``step``; see :class:`TwistedSMC`.
    :param object guide: A twist, which the children are judged by.
    :param int num_particles: The number of children in all, a multiple of ``num_children``.
    :param int max_plate_nesting: Bound on the number of nested plates in the model.
    :param int num_children: The number of children of a parent, :math:`M`.
    :param bool fully_adapted: Resample parents before their children are chosen, so that copies of
        one parent may continue as different children [2].
    :param options: Further options of :class:`TwistedSMC`. Resampling is that of parents.
    :raises ValueError: If ``num_particles`` is no multiple of ``num_children``.

    **References**

    [1] `Nested Sequential Monte Carlo Methods`
        Christian A. Naesseth, Fredrik Lindsten, Thomas B. Schon (2015),
        https://arxiv.org/abs/1502.02536

    [2] `Discrete diffusion inference-time control with nested SMC`
        Yadala Chanchu, Hany Abdulsamad, Christian A. Naesseth (2026)
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        num_particles: int,
        max_plate_nesting: int = 0,
        *,
        num_children: int = 4,
        fully_adapted: bool = False,
        **options: Any,
    ) -> None:
        check_groups(num_particles, num_children)
        super().__init__(model, guide, num_particles, max_plate_nesting, **options)
        self.num_children = num_children
        self.fully_adapted = fully_adapted

    @property
    def num_parents(self) -> int:
        """The number of parents in each population."""
        return self.num_particles // self.num_children

    def _maybe_resample(self, ess: Tensor, allowed: bool) -> tuple[Tensor | None, Tensor]:
        if not (allowed and self.state):
            return super()._maybe_resample(ess, False)
        log_weights = self.state._log_weights
        groups = log_weights.unflatten(0, (self.num_parents, self.num_children))
        parents, chosen = self._parents(groups.logsumexp(1))
        index = self._heirs(groups, parents).repeat_interleave(self.num_children, 0)
        self._follow(index)
        kept = groups.logsumexp(1) - math.log(self.num_children)
        kept = kept.masked_fill(chosen, -math.log(self.num_particles))
        self.state._log_weights = kept.repeat_interleave(self.num_children, 0)
        return index, chosen

    def _parents(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Which parent each continues, of shape ``(num_parents, ...)``, and who was resampled."""
        ess = weights.effective_sample_size(log_weights)
        chosen = ess < self.ess_threshold * self.num_parents * (1 - 1e-9)
        if self.resampling == "none" or not self._may_resample():
            chosen = torch.zeros_like(chosen)
        same = torch.arange(self.num_parents, device=log_weights.device)
        pairs = zip(_columns(log_weights), chosen.reshape(-1).tolist(), strict=True)
        columns = [self._drawn(column) if drawn else same for column, drawn in pairs]
        return torch.stack(columns, -1).reshape(log_weights.shape), chosen

    def _drawn(self, log_weights: Tensor) -> Tensor:
        """Parents of one population, resampled."""
        scheme = get_resampling(self.resampling)
        return scheme(log_weights.exp(), self.num_parents, self._generator())

    def _heirs(self, groups: Tensor, parents: Tensor) -> Tensor:
        """The particle that each parent continues as, of shape ``(num_parents, ...)``."""
        if self.fully_adapted:
            each = take_ancestors(groups.movedim(1, -1), parents).movedim(-1, 1)
            return parents * self.num_children + draw_within(each, self._generator())
        drawn = draw_within(groups, self._generator())
        return parents * self.num_children + take_ancestors(drawn, parents)


def _columns(value: Tensor) -> Tensor:
    return value.reshape(len(value), -1).T


def draw_within(log_weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """
    Draws one member of each group.

    :param Tensor log_weights: Of shape ``(num_groups, size, ...)``; a group of weight zero counts
        as one of equal weights.
    :param torch.Generator generator: Source of randomness.
    :returns: Places in the groups, of shape ``(num_groups, ...)``.
    :rtype: Tensor
    """
    rows = log_weights.movedim(1, -1)
    rows = torch.where(rows.amax(-1, keepdim=True) == -torch.inf, torch.zeros_like(rows), rows)
    cumulative = rows.softmax(-1).cumsum(-1)
    device = "cpu" if generator is None else generator.device
    shape = (*cumulative.shape[:-1], 1)
    uniforms = torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
    threshold = uniforms.to(rows.device) * cumulative[..., -1:]
    # the first whose sum exceeds the threshold: never a member of probability zero
    return (cumulative <= threshold).sum(-1)


def check_groups(num_particles: int, num_children: int) -> None:
    """
    Refuses numbers of children that do not divide that of particles.

    :raises ValueError: If one is no whole number, or ``num_children`` no divisor.
    """
    check_whole(num_particles=num_particles, num_children=num_children)
    if num_particles % num_children:
        raise ValueError(
            f"num_children={num_children!r} of num_particles={num_particles!r}: particles are the "
            "children of all parents together; give a whole number of children that divides them"
        )


def check_whole(**given: Any) -> None:
    """
    Refuses what are no whole numbers of 1 or more.

    :raises ValueError: Names the first that is none.
    """
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}; give a whole number, 1 or more")
