# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Every operation across particles, in log space and float64.

Log-weights have the particles along dim 0 and, where there are several populations, the
populations along dim 1. Nothing else in the package reduces over particles, so that a population
shared between processes needs another version of this module and of nothing else.
"""

from __future__ import annotations

import math

import torch

__all__ = [
    "effective_sample_size",
    "log_mean_exp",
    "log_normalize",
    "log_sum_exp",
    "total_and_ess",
    "weighted_mean",
]


def log_sum_exp(log_weights: torch.Tensor) -> torch.Tensor:
    """
    Log of the sum of the weights of each population.

    :param torch.Tensor log_weights: Of shape ``(num_particles,)`` or
        ``(num_particles, num_populations)``.
    :returns: Of shape ``()`` or ``(num_populations,)``.
    :rtype: torch.Tensor
    """
    return log_weights.logsumexp(0)


def log_mean_exp(log_weights: torch.Tensor) -> torch.Tensor:
    """Log of the mean weight of each population; shapes as in :func:`log_sum_exp`."""
    return log_sum_exp(log_weights) - math.log(log_weights.shape[0])


def log_normalize(log_weights: torch.Tensor) -> torch.Tensor:
    """Shifts the log-weights of each population so that its weights sum to one."""
    return log_weights - log_sum_exp(log_weights)


def total_and_ess(log_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log of the sum of the weights, and Kong's effective sample size, from one pass.

    :param torch.Tensor log_weights: Shape as in :func:`log_sum_exp`.
    :returns: The results of :func:`log_sum_exp` and :func:`effective_sample_size`. The log-sum is
        NaN or plus infinity if any log-weight is.
    :rtype: tuple
    """
    top = log_weights.amax(0)
    shift = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    scaled = (log_weights - shift).exp_()
    total = scaled.sum(0)
    squares = (scaled * scaled).sum(0) if scaled.dim() > 1 else scaled.dot(scaled)
    ess = torch.where(total == 0, torch.zeros_like(total), total * total / squares)
    return shift + total.log(), ess


def effective_sample_size(log_weights: torch.Tensor) -> torch.Tensor:
    """
    Kong's effective sample size :math:`(\\sum_i w_i)^2 / \\sum_i w_i^2` of each population.

    It is the number of particles for equal weights, 1 where one particle has all the weight, and
    0 where none has any.

    :param torch.Tensor log_weights: Shape as in :func:`log_sum_exp`; need not be normalised.
    :returns: Of shape ``()`` or ``(num_populations,)``.
    :rtype: torch.Tensor
    """
    return total_and_ess(log_weights)[1]


def weighted_mean(values: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    """
    Self-normalised weighted mean over the particles.

    :param torch.Tensor values: Of shape ``log_weights.shape + event_shape``.
    :param torch.Tensor log_weights: Shape as in :func:`log_sum_exp`.
    :returns: Of shape ``log_weights.shape[1:] + event_shape``, in float64. Particles of weight
        zero do not contribute, whatever their value.
    :rtype: torch.Tensor
    """
    weights = log_normalize(log_weights).exp()
    weights = weights.reshape(weights.shape + (1,) * (values.dim() - weights.dim()))
    products = weights * values.to(weights.dtype)
    return torch.where(weights == 0, torch.zeros_like(products), products).sum(0)
