# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Exponential tilting of kernels, and log-ratios of densities that survive image size.

:func:`tilt` turns a base kernel :math:`p` into :math:`q(x) \\propto p(x) \\exp(\\eta \\cdot s(x))`;
:func:`log_ratio` is :math:`\\log p - \\log q` at a value, summed over the event. A difference of
two summed float32 log-densities is noise at image size; here the summands are differences already,
in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions.utils import _sum_rightmost as sum_rightmost

from pyro_twist.diffusion.unmasking import Unmasking

__all__ = ["log_normalizer", "log_ratio", "register_log_ratio", "register_tilt", "tilt"]

Rule = Callable[[Any, torch.Tensor], Any]
Ratio = Callable[[Any, Any, torch.Tensor], torch.Tensor]
_TILTS: dict[type, Rule] = {}
_NORMALIZERS: dict[type, Rule] = {}
_RATIOS: dict[type, Ratio] = {}


def register_tilt(kind: type, tilted: Rule, normalizer: Rule) -> None:
    """
    Makes a family of distributions known to :func:`tilt` and :func:`log_normalizer`.

    :param type kind: The distribution class.
    :param callable tilted: ``tilted(prior, eta)``, the tilted distribution.
    :param callable normalizer: ``normalizer(prior, eta)``, the log of the mean of
        ``exp(eta s(x))`` under the prior, elementwise.
    """
    _TILTS[kind], _NORMALIZERS[kind] = tilted, normalizer


def register_log_ratio(kind: type, ratio: Ratio) -> None:
    """
    Makes a closed form known to :func:`log_ratio`, for pairs of one family of distributions.

    :param type kind: The distribution class of both.
    :param callable ratio: ``ratio(p, q, value)``, as for :func:`log_ratio`.
    """
    _RATIOS[kind] = ratio


def _rule(rules: dict[type, Rule], prior: Any) -> Rule:
    for kind in type(prior).__mro__:
        if kind in rules:
            return rules[kind]
    known = ", ".join(kind.__name__ for kind in rules)
    raise ValueError(
        f"no tilting rule for {type(prior).__name__}; known are Independent, {known}. "
        "Try register_tilt, or write the proposal as an explicit guide."
    )


def tilt(prior: Any, eta: torch.Tensor) -> Any:
    """
    The distribution proportional to ``prior`` times ``exp(eta s(x))``.

    The sufficient statistic is :math:`s(x) = x` for a normal distribution, whose mean moves by
    the variance times ``eta``. A ``Delta`` stays what it is.

    :param prior: The base distribution.
    :type prior: ~pyro.distributions.Distribution
    :param torch.Tensor eta: Broadcastable to the prior's batch and event shape.
    :returns: A distribution of the same shapes.
    :raises ValueError: If the family of ``prior`` has no rule; see :func:`register_tilt`.
    """
    if isinstance(prior, torch.distributions.Independent):
        tilted = tilt(prior.base_dist, eta)
        if tilted is prior.base_dist:
            return prior
        return tilted.to_event(prior.reinterpreted_batch_ndims)
    return _rule(_TILTS, prior)(prior, eta)


def log_normalizer(prior: Any, eta: torch.Tensor) -> torch.Tensor:
    """
    The log of the mean of ``exp(eta s(x))`` under ``prior``, of the prior's batch shape.

    Arguments as in :func:`tilt`.
    """
    if isinstance(prior, torch.distributions.Independent):
        inner = log_normalizer(prior.base_dist, eta)
        return sum_rightmost(inner, prior.reinterpreted_batch_ndims)
    return _rule(_NORMALIZERS, prior)(prior, eta)


def _tilt_normal(prior: dist.Normal, eta: torch.Tensor) -> dist.Normal:
    return dist.Normal(prior.loc + prior.scale.square() * eta, prior.scale)


def _normal_normalizer(prior: dist.Normal, eta: torch.Tensor) -> torch.Tensor:
    eta = eta.double()
    return eta * prior.loc + 0.5 * (prior.scale * eta).square()


def _delta_normalizer(prior: dist.Delta, eta: torch.Tensor) -> torch.Tensor:
    return sum_rightmost((eta.double() * prior.v), prior.event_dim)


register_tilt(torch.distributions.Normal, _tilt_normal, _normal_normalizer)
register_tilt(dist.Delta, lambda prior, eta: prior, _delta_normalizer)


def log_ratio(p: Any, q: Any, value: torch.Tensor) -> torch.Tensor:
    """
    ``p.log_prob(value) - q.log_prob(value)`` in float64, without cancellation for normal kernels.

    :param p: The base distribution.
    :param q: The proposal.
    :param torch.Tensor value: A value in the support of both.
    :returns: The log-ratio, summed over the event, of the common batch shape.
    :rtype: torch.Tensor
    """
    independent = torch.distributions.Independent
    if isinstance(p, independent) and isinstance(q, independent):
        dims = p.reinterpreted_batch_ndims
        if dims == q.reinterpreted_batch_ndims:
            return sum_rightmost(log_ratio(p.base_dist, q.base_dist, value), dims)
    for kind, ratio in _RATIOS.items():
        if isinstance(p, kind) and isinstance(q, kind):
            return ratio(p, q, value)
    return p.log_prob(value).double() - q.log_prob(value).double()


def _normal_ratio(
    p: torch.distributions.Normal, q: torch.distributions.Normal, value: torch.Tensor
) -> torch.Tensor:
    p_loc, q_loc, value = p.loc.double(), q.loc.double(), value.double()
    p_scale, q_scale = _compact(p.scale).double(), _compact(q.scale).double()
    if p_scale.shape == q_scale.shape and torch.equal(p_scale, q_scale):
        # (p_loc - q_loc) (2 value - p_loc - q_loc) / (2 scale^2), in place: memory is the cost
        twice = (value - p_loc).add_(value).sub_(q_loc)
        return twice.mul_(p_loc - q_loc).mul_(0.5 / p_scale.square())
    p_z, q_z = (value - p_loc) / p_scale, (value - q_loc) / q_scale
    return 0.5 * (q_z - p_z) * (q_z + p_z) + (q_scale / p_scale).log()


register_log_ratio(torch.distributions.Normal, _normal_ratio)

# a position that stays masked says nothing: the tilt is of tokens given that they are revealed
register_tilt(Unmasking, Unmasking.tilted, Unmasking.log_normalizer)
register_log_ratio(Unmasking, Unmasking.log_ratio)


def _compact(value: torch.Tensor) -> torch.Tensor:
    """Undoes broadcasting: dims along which a tensor only repeats itself get size one."""
    strides = zip(value.stride(), value.shape, strict=True)
    return value[tuple(slice(0, 1) if s == 0 and n > 1 else slice(None) for s, n in strides)]
