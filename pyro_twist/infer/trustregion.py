# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The trust-region step on path space: how far to move towards the target in one iteration.

Among all laws within ``kl_budget`` nats of the current path law, the one nearest to the target is a
tempered reweighting of it,

.. math::

    q_\\tau \\propto q_0 R^\\tau, \\qquad
    KL(\\tau) = \\tau \\sum_i q_{\\tau, i} \\log R_i
    - \\log \\sum_i q_{0, i} R_i^\\tau \\le \\epsilon,

with the largest such :math:`\\tau \\le 1` [1]. Here :math:`R` is the weight of a whole path under
the target relative to the current law, never reset by resampling, and :math:`q_0` the weight back
to the current law, uniform unless paths were resampled. Paths of weight zero are left out, and the
divergence is measured against the rest.

**References**

[1] `Trust-Region Iterated Twisted Sequential Monte Carlo for diffusion alignment`
    Weixin Wang, Yu Yang, Wei Deng, Pan Xu (2026), https://arxiv.org/abs/2605.25123
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pyro_twist import weights

__all__ = ["Tempering", "dual_temper", "kl_divergence", "temper", "tempered"]


@dataclass(frozen=True)
class Tempering:
    """
    A trust-region step.

    :param float tau: The tempering exponent, in (0, 1].
    :param float kl: The divergence from the current law, at most the budget.
    :param torch.Tensor weights: The tempered weights, normalised, of shape ``(num_paths,)``.
    :param torch.Tensor base: The weights of the current law, normalised over the live paths.
    :param float chi_square: Estimate of the chi-square divergence of the target from the current
        law.
    """

    tau: float
    kl: float
    weights: torch.Tensor
    base: torch.Tensor
    chi_square: float


def _live(log_path: torch.Tensor, log_base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Path weights with dead ones harmless, and base weights renormalised over the live ones."""
    alive = torch.isfinite(log_path) & torch.isfinite(log_base)
    if not alive.any():
        raise ValueError(f"none of the {len(log_path)} paths has weight, so nothing can be fitted")
    base = weights.log_normalize(log_base.masked_fill(~alive, -math.inf))
    return log_path.masked_fill(~alive, 0.0), base


def kl_divergence(tau: float, log_path: torch.Tensor, log_base: torch.Tensor) -> float:
    """
    The divergence of the tempered law from the current one: 0 at ``tau=0``, increasing.

    :param float tau: The tempering exponent.
    :param torch.Tensor log_path: Log-weights of whole paths, of shape ``(num_paths,)``.
    :param torch.Tensor log_base: Normalised log-weights of the current law, of the same shape.
    """
    log_sum = weights.log_sum_exp(log_base + tau * log_path)
    tempered = (log_base + tau * log_path - log_sum).exp()
    return float(tau * (tempered * log_path).sum() - log_sum)


def temper(log_path: torch.Tensor, log_base: torch.Tensor, kl_budget: float) -> Tempering:
    """
    Solves the trust-region step by bisection.

    :param torch.Tensor log_path: Log-weights of whole paths relative to the current law, of shape
        ``(num_paths,)``; minus infinity is allowed.
    :param torch.Tensor log_base: Log-weights back to the current law, of the same shape.
    :param float kl_budget: The largest divergence, in nats. With ``n`` paths nothing above
        ``log(n)`` is ever reached.
    :returns: The step.
    :rtype: Tempering
    :raises ValueError: If no path has weight.
    """
    log_path, log_base = _live(log_path, log_base)
    tau = 1.0
    if kl_divergence(1.0, log_path, log_base) > kl_budget:
        low, tau = 0.0, 1.0
        for _ in range(60):
            middle = 0.5 * (low + tau)
            if kl_divergence(middle, log_path, log_base) > kl_budget:
                tau = middle
            else:
                low = middle
        tau = low
    return tempered(tau, log_path, log_base)


def tempered(tau: float, log_path: torch.Tensor, log_base: torch.Tensor) -> Tempering:
    """
    The step of a given size; arguments as in :func:`temper`.

    :param float tau: The tempering exponent.
    """
    log_path, log_base = _live(log_path, log_base)
    towards = weights.log_normalize(log_base + tau * log_path).exp()
    second = weights.log_sum_exp(log_base + 2 * log_path)
    first = weights.log_sum_exp(log_base + log_path)
    return Tempering(
        tau=tau,
        kl=kl_divergence(tau, log_path, log_base),
        weights=towards,
        base=log_base.exp(),
        chi_square=math.expm1(min(float(second - 2 * first), 700.0)),
    )


def dual_temper(log_path: torch.Tensor, log_base: torch.Tensor, kl_budget: float) -> float:
    """
    The exponent of :func:`temper` by way of the dual problem, for comparison.

    Minimises the convex :math:`l \\epsilon + (1 + l) \\log \\sum_i q_{0,i} R_i^{1/(1+l)}` over
    :math:`l \\ge 0`; then :math:`\\tau = 1 / (1 + l)`. Arguments as in :func:`temper`.
    """
    try:
        from scipy.optimize import minimize_scalar
    except ImportError as error:
        raise ImportError("dual_temper needs scipy: pip install 'pyro-twist[rewards]'") from error
    log_path, log_base = _live(log_path, log_base)

    def dual(tau: float) -> float:
        log_sum = float(weights.log_sum_exp(log_base + tau * log_path))
        return (1 / tau - 1) * kl_budget + log_sum / tau

    if kl_divergence(1.0, log_path, log_base) <= kl_budget:
        return 1.0
    found = minimize_scalar(
        lambda log_tau: dual(math.exp(log_tau)),
        bounds=(-30.0, 0.0),
        method="bounded",
        options={"xatol": 1e-12},
    )
    return math.exp(found.x)
