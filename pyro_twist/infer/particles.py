# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The particle system's state, and how it moves along with its ancestors."""

from __future__ import annotations

import torch
from pyro.infer.smcfilter import SMCState

__all__ = ["ParticleState", "take_ancestors"]


def take_ancestors(value: torch.Tensor, index: torch.Tensor, axis: int = 1) -> torch.Tensor:
    """
    The values of the ancestors.

    :param torch.Tensor value: One entry per particle along dim 0 and, if ``index`` has two dims,
        one per population along dim ``axis``.
    :param torch.Tensor index: Ancestors, of shape ``(num_particles,)`` or
        ``(num_particles, num_populations)``.
    :returns: A tensor shaped like ``value``.
    :rtype: torch.Tensor
    """
    index = index.to(value.device)
    # a graph kept for a gradient twist must outlive the resampling
    with torch.set_grad_enabled(value.requires_grad):
        return _take(value, index, axis)


def _take(value: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    if index.dim() == 1:
        return value.index_select(0, index)
    populations = torch.arange(index.shape[1], device=index.device)
    moved = value.movedim(axis, 1)[index, populations]
    return moved.movedim(1, axis).contiguous()


class ParticleState(SMCState):
    """
    Pyro's :class:`~pyro.infer.smcfilter.SMCState` with float64 log-weights on the particles'
    device, and resampling of each population by itself.

    :param int num_particles: The leading size of every entry.
    """

    def __init__(self, num_particles: int) -> None:
        super().__init__(num_particles)
        self._log_weights = torch.full((num_particles,), 0.0, dtype=torch.float64)
        self.population_axis = 1

    def _resample(self, index: torch.Tensor) -> None:
        for key, value in self.items():
            self._check(key, value, index)
            dict.__setitem__(self, key, take_ancestors(value, index, self.population_axis))

    def _check(self, key: object, value: torch.Tensor, index: torch.Tensor) -> None:
        if index.dim() == 1:
            return
        axis, size = self.population_axis, index.shape[1]
        if value.dim() <= axis or value.shape[axis] != size:
            raise ValueError(
                f"state[{key!r}] has shape {tuple(value.shape)}, but populations are resampled "
                f"separately, so it needs size {size} at dim {axis}. Expand it over the "
                "population plate."
            )
