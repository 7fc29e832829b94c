# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
What is left of a path when a twist is linear in its parameters: a few numbers that add up.

Relative to a normal kernel :math:`N(m, s^2)`, its tilt by :math:`\\eta = \\sum_k \\theta_k f_k` has
the log-density :math:`\\theta \\cdot S_1 - \\theta \\cdot S_2 \\theta / 2` with

.. math::

    S_1 = f \\cdot (x' - m), \\qquad S_2 = s^2 f f^\\top.

Sums of these over the steps of a path hold all that its likelihood depends on. The step itself
need not be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pyro_twist.twists.tilting import _compact

__all__ = ["PathSums", "Quadratic", "Statistics", "WeightedSums", "linear_statistics"]


@dataclass(frozen=True)
class Statistics:
    """
    The statistics of every particle's path, or of one step of it, for one block of parameters.

    They add over steps. ``particles`` stands for ``(num_particles,)`` or
    ``(num_particles, num_populations)``; all tensors are float64.

    :param torch.Tensor score: :math:`S_1`, of shape ``particles + (num_parameters,)``.
    :param torch.Tensor drift: The part of the score that is due to the proposal the value was
        drawn from, of the same shape; under it, ``score - drift`` has mean zero.
    :param torch.Tensor information: :math:`S_2`, of shape
        ``particles + (num_parameters, num_parameters)``. Where it is the same for all particles,
        their dims have size one.
    :param int block: The block of parameters.
    """

    score: torch.Tensor
    drift: torch.Tensor
    information: torch.Tensor
    block: int = 0


def linear_statistics(
    features: torch.Tensor,
    value: torch.Tensor,
    kernel: Any,
    proposal: Any,
    population_axis: int | None = None,
    block: int = 0,
) -> Statistics:
    """
    The statistics of one step.

    :param torch.Tensor features: The tilts of the single parameters, of shape
        ``(num_parameters,) + batch_shape + event_shape``, or broadcastable to it.
    :param torch.Tensor value: The values drawn, of shape ``batch_shape + event_shape``.
    :param ~torch.distributions.Normal kernel: The kernel that is tilted.
    :param ~torch.distributions.Normal proposal: What the values were drawn from.
    :param int population_axis: The batch dim of the populations, ``None`` if there is one.
    :param int block: The block of parameters.
    """
    shape, axis = kernel.loc.shape, population_axis
    particles = shape[:1] if axis is None else (shape[0], shape[axis])
    # differences in float64, of which value and means need no copy of their own
    moved = _rows((value.double() - kernel.loc)[None], shape, axis)[0]
    tilts = _rows(features, shape, axis)
    score = _dot(moved, tilts).reshape((*particles, -1))
    drift = torch.zeros_like(score)
    if proposal is not kernel:
        applied = _rows((proposal.loc.double() - kernel.loc)[None], shape, axis)[0]
        drift = _dot(applied, tilts).reshape(score.shape)
    shifts = tilts * _rows(kernel.scale[None], shape, axis).square()
    information = shifts.transpose(0, 1) @ tilts.permute(1, 2, 0)
    leading = particles if len(information) > 1 else (1,) * len(particles)
    information = information.reshape(leading + information.shape[1:])
    return Statistics(score, drift, information, block)


def _rows(value: torch.Tensor, shape: torch.Size, axis: int | None) -> torch.Tensor:
    """
    In float64 with three dims: leading, particles and populations, all the rest of ``shape``.

    The second has size one where the values are the same for all particles.
    """
    value = _compact(value).double()
    kept = [0] if axis is None else [0, axis]
    shared = all(value.shape[1 + dim] == 1 for dim in kept)
    target = [1 if shared and dim in kept else size for dim, size in enumerate(shape)]
    value = value.expand(value.shape[:1] + tuple(target))
    if axis is not None:
        value = value.movedim(1 + axis, 2)
    count = value.shape[1] if axis is None else value.shape[1] * value.shape[2]
    return value.reshape(value.shape[0], count, -1)


def _dot(moved: torch.Tensor, tilts: torch.Tensor) -> torch.Tensor:
    """Inner products, of shape ``(num_rows, num_parameters)``."""
    if tilts.shape[1] == 1:
        return moved @ tilts[:, 0].T
    return torch.einsum("nm,knm->nk", moved, tilts.expand(-1, len(moved), -1))


@dataclass(frozen=True)
class PathSums:
    """
    The statistics of paths so far, for all blocks, while they are drawn.

    There is one tensor for each kind of sum, however many steps and blocks: many small ones, kept
    between large ones that come and go with every step, would fragment the heap. They are written
    to only where no block was before, so that earlier sums stay valid.

    :param torch.Tensor score: Of shape ``particles + (num_blocks, num_parameters)``.
    :param torch.Tensor drift: Of the same shape.
    :param torch.Tensor information: Of shape
        ``particles + (num_blocks, num_parameters, num_parameters)``, or with ones for particles.
    :param frozenset blocks: The blocks that steps belonged to.
    """

    score: torch.Tensor
    drift: torch.Tensor
    information: torch.Tensor
    blocks: frozenset[int] = frozenset()

    @staticmethod
    def empty(
        particles: tuple[int, ...], parameters: tuple[int, ...], device: torch.device
    ) -> PathSums:
        """
        No step yet.

        :param tuple particles: The shape of the weights.
        :param tuple parameters: The numbers of blocks and of parameters in each.
        :param torch.device device: Where the particles are.
        """
        zeros = torch.zeros(particles + parameters, dtype=torch.float64, device=device)
        shared = (1,) * len(particles) + parameters + parameters[1:]
        return PathSums(zeros, zeros.clone(), zeros.new_zeros(shared))

    def __add__(self, step: Statistics) -> PathSums:
        sums = (self.score, self.drift, self._room(step))
        known = step.block in self.blocks
        score, drift, information = (one.clone() for one in sums) if known else sums
        pairs = (score, step.score), (drift, step.drift), (information, step.information)
        for one, value in pairs:
            row = one.select(step.score.dim() - 1, step.block)
            row.copy_(row + value if known else value)
        return PathSums(score, drift, information, self.blocks | {step.block})

    def _room(self, step: Statistics) -> torch.Tensor:
        """The information, with a copy for every particle once they differ."""
        sizes = step.information.shape[:-2]
        if self.information.shape[: len(sizes)].numel() >= sizes.numel():
            return self.information
        return self.information.expand(sizes + self.information.shape[len(sizes) :]).clone()

    def take(self, move: Callable[[torch.Tensor], torch.Tensor]) -> PathSums:
        """
        The sums of other particles.

        :param callable move: Takes the entries of their ancestors along dim 0.
        """
        dims = self.score.dim() - 2
        shared = self.information.shape[:dims] != self.score.shape[:dims]
        information = self.information if shared else move(self.information)
        return PathSums(move(self.score), move(self.drift), information, self.blocks)

    def statistics(self) -> tuple[Statistics, ...]:
        """By block."""
        dim = self.score.dim() - 2
        sums = (self.score, self.drift, self.information)
        rows = {block: [one.select(dim, block) for one in sums] for block in sorted(self.blocks)}
        return tuple(
            Statistics(score, drift, information, block)
            for block, (score, drift, information) in rows.items()
        )


@dataclass(frozen=True)
class Quadratic:
    """
    The weighted log-likelihood of paths under a linear twist, a quadratic of its parameters.

    :param torch.Tensor score: Weighted sum of the scores, of shape
        ``(num_blocks, num_parameters)``.
    :param torch.Tensor noise: What centring subtracts from it, of the same shape.
    :param torch.Tensor information: Weighted sum of the information, of shape
        ``(num_blocks, num_parameters, num_parameters)``.
    """

    score: torch.Tensor
    noise: torch.Tensor
    information: torch.Tensor

    def log_likelihood(self, theta: torch.Tensor) -> torch.Tensor:
        """
        The log-likelihood, without centring, relative to parameters of zero.

        :param torch.Tensor theta: Of shape ``(num_blocks, num_parameters)``.
        """
        theta = theta.detach().to(self.score)
        curvature = torch.einsum("bk,bkl,bl->", theta, self.information, theta)
        return (theta * self.score).sum() - 0.5 * curvature


class WeightedSums:
    """
    Sums of statistics over paths, for several sets of weights at once.

    An information that all paths share is kept once, and not for every set of weights. No small
    tensors are kept from step to step; see :class:`PathSums`.

    :param int num_sets: The number of sets of weights.
    :param torch.Tensor theta: The parameters, of shape ``(num_blocks, num_parameters)``.
    """

    def __init__(self, num_sets: int, theta: torch.Tensor) -> None:
        blocks, size = theta.shape
        zeros = theta.new_zeros((num_sets, blocks, size), dtype=torch.float64)
        self.score, self.noise = zeros, zeros.clone()
        self._shared, self._share = zeros.new_zeros(blocks, size, size), zeros[..., 0].clone()
        self._single: torch.Tensor | None = None

    def add(self, statistics: Statistics, weights: torch.Tensor, base: torch.Tensor) -> None:
        """
        Adds paths, or a step of them.

        :param Statistics statistics: Of the paths.
        :param torch.Tensor weights: Of shape ``(num_sets,) + particles``.
        :param torch.Tensor base: Weights of the noise that centring subtracts, of the same shape.
        """
        device, block = self.score.device, statistics.block
        weights, base = (w.reshape(len(w), -1).to(device) for w in (weights, base))
        score, drift = (
            value.reshape(weights.shape[1], -1).to(device)
            for value in (statistics.score, statistics.drift)
        )
        self.score[:, block] += weights @ score
        self.noise[:, block] += base @ (score - drift)
        self._inform(block, statistics.information.flatten(0, -3).to(device), weights)

    def _inform(self, block: int, information: torch.Tensor, weights: torch.Tensor) -> None:
        shared = len(information) == 1
        weights = weights.sum(1, keepdim=True) if shared else weights
        if shared and not self._share[:, block].any():
            self._shared[block] = information[0]
        if shared and torch.equal(self._shared[block], information[0]):
            self._share[:, block] += weights[:, 0]
            return
        if self._single is None:
            self._single = self._shared.new_zeros((len(weights), *self._shared.shape))
        self._single[:, block] += torch.tensordot(weights, information, dims=1)

    def __getitem__(self, index: int) -> Quadratic:
        """The sums for one set of weights."""
        information = self._share[index][:, None, None] * self._shared
        if self._single is not None:
            information = information + self._single[index]
        return Quadratic(self.score[index], self.noise[index], information)
