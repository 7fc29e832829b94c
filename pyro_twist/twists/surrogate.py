# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
A direction learnt from every reward that was ever looked at, without a gradient of the reward.

Look-ahead scores the predicted end state at every step, so a pass of a few particles leaves
hundreds of pairs of prediction and log-potential. A regression on them is a surrogate of the
reward that has a gradient; the kernel is tilted along it, and only how far is fitted by likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyro_twist.twists.learned import LinearTwist, is_normal, loc_scale
from pyro_twist.twists.paths import Pass
from pyro_twist.twists.regression import KernelRidge, Surrogate

__all__ = ["SurrogateTwist"]


class SurrogateTwist(LinearTwist):
    """
    Tilts the kernels of a diffusion model along the gradient of a surrogate reward.

    With :math:`x_0` predicted as :math:`\\hat x_0`, the surrogate :math:`\\hat\\ell` of the
    terminal log-potential, and :math:`\\alpha_t`, :math:`\\sigma_t` the signal and noise level,
    the tilt is

    .. math::

        \\eta_t = \\gamma_t \\frac{A_t}{s_t^2} v_t \\nabla \\hat\\ell(\\hat x_0), \\qquad
        v_t = \\frac{v_0 \\sigma_t^2}{\\alpha_t^2 v_0 + \\sigma_t^2}

    where :math:`A_t` is the coefficient of the prediction in the kernel's mean, :math:`s_t` its
    standard deviation and :math:`v_t` the variance of :math:`x_0` given :math:`x_t` for data of
    variance :math:`v_0`. The shift at gain 1 is capped at ``cap`` standard deviations in norm. The
    gains :math:`\\gamma_t` are interpolated between ``knots`` values, the only parameters.

    The twist is a proposal; the value of the look-ahead is the business of a
    :class:`~pyro_twist.twists.LookaheadTwist` beside it, which also provides the pairs.

    :param model: A tilted :class:`~pyro_twist.diffusion.GaussianDiffusion`.
    :param str surrogate: ``"linear"``, ``"quadratic"`` or ``"kernel"``; see
        :class:`~pyro_twist.twists.KernelRidge`.
    :param int knots: The number of gains.
    :param float cap: The largest shift at gain 1, in standard deviations.
    :param float ridge: How many paths the prior gain is worth; the prior gain is the share of
        variance that the surrogate explains on paths left out, or 0 if that is below ``gate``.
    :param float gate: See ``ridge``.
    :param float prior_gain: Multiplies the prior gain.
    :param bool fitted: Whether the gains are fitted; otherwise they stay at the prior.
    """

    data_variance: torch.Tensor

    def __init__(
        self,
        model: Any,
        *,
        surrogate: Surrogate = "quadratic",
        knots: int = 3,
        cap: float = 2.0,
        ridge: float = 20.0,
        gate: float = 0.1,
        prior_gain: float = 1.0,
        fitted: bool = True,
    ) -> None:
        super().__init__(model, knots, ridge=ridge)
        if not hasattr(model, "schedule"):
            raise ValueError(
                f"{type(model).__name__} has no noise `schedule`, which SurrogateTwist needs; it "
                "is for diffusion models. Try QuadraticTwist or ShiftTwist."
            )
        self.knots, self.cap, self.gate = knots, cap, gate
        self.prior_gain, self.fitted = prior_gain, fitted
        self.regression = KernelRidge(surrogate)
        self.register_buffer("data_variance", torch.tensor(0.0, dtype=torch.float64))

    @property
    def score(self) -> float:
        """Share of variance that the surrogate explains on paths left out."""
        return float(self.regression.score)

    def observe(self, passes: Sequence[Pass]) -> None:
        """Fits the surrogate to all pairs so far, and sets the prior of the gains."""
        points, targets, groups = _pairs(passes, self._event_dim())
        if len(points) < 8 or float(targets.std()) < 1e-9:
            return
        self.regression.fit(points, targets, groups)
        # over the entries of a sample as well: resampled particles are too alike to tell
        ends = torch.cat([self._flat(one.state["x"]) for one in passes])
        self.data_variance = ends.double().var().clamp(min=1e-6)
        trust = self.score if self.score > self.gate else 0.0
        self.prior_mean.fill_(self.prior_gain * trust)
        # the likelihood moves the gains from there, and only as far as it proves itself
        with torch.no_grad():
            self.theta.copy_(self.prior_mean)

    def _event_dim(self) -> int:
        return len(self.model.event_shape)

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape((-1, torch.Size(self.model.event_shape).numel()))

    def features(self, name: str, prior: Any) -> torch.Tensor | None:
        """The capped direction, in shares by knot."""
        state, args = self.args_kwargs[0][0], self.args_kwargs[0]
        if not self.stepping or len(args) < 2 or not self.regression.fitted or not is_normal(prior):
            return None
        direction = self._direction(state["x0_hat"], int(args[1]), loc_scale(prior)[1])
        shares = _hat(self.time_after(*args[1:]) / self.model.timesteps[0], self.knots)
        return shares.to(direction).reshape((-1,) + (1,) * direction.dim()) * direction

    def _direction(self, x0_hat: torch.Tensor, t: int, std: torch.Tensor) -> torch.Tensor:
        step = self.model.schedule[t]
        signal, noise, v0 = step.alpha**2, step.sigma**2, float(self.data_variance)
        posterior = v0 * noise / (signal * v0 + noise)
        gradient = self.regression.gradient(self._flat(x0_hat)).reshape(x0_hat.shape)
        shift = (step.x0_coef * posterior) * gradient / std.double()
        norm = self._flat(shift).norm(dim=1).reshape(shift.shape[: -self._event_dim()])
        shrink = (self.cap / norm.clamp(min=1e-300)).clamp(max=1.0)
        shift = shift * shrink.reshape(shrink.shape + (1,) * self._event_dim())
        return (shift / std.double()).to(x0_hat.dtype)

    def solve(self, batches: Sequence[Any]) -> torch.Tensor:
        """The gains; the prior ones where they are not fitted or there is no surrogate."""
        if not self.fitted or not self.regression.fitted:
            return self.prior_mean.double()
        return super().solve(batches)

    def constrain(self) -> None:
        """Gains are between 0 and 1.5."""
        self.theta.clamp_(0.0, 1.5)


def _hat(position: float, knots: int) -> torch.Tensor:
    """Shares of the two neighbouring knots at a position between 0 and 1."""
    if knots == 1:
        return torch.ones(1)
    distance = (torch.arange(knots) - position * (knots - 1)).abs()
    return (1 - distance).clamp(min=0)


def _pairs(
    passes: Sequence[Pass], event_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All predictions with their log-potentials, and the pass and first ancestor of each."""
    points, targets, groups = [], [], []
    for number, one in enumerate(passes):
        roots = _roots(one)
        for sites, root in zip(one.steps, roots, strict=True):
            state = sites[0].state if sites else {}
            if "lookahead" not in state or sites[0].t is None:
                continue
            if int(state["lookahead_time"].reshape(-1)[0]) != sites[0].t:
                continue
            x0_hat = state["x0_hat"]
            points.append(x0_hat.reshape((root.numel(), -1)))
            targets.append(state["lookahead"].reshape(-1))
            groups.append((root + number * one.log_path.shape[0]).reshape(-1))
    if not points:
        return torch.zeros(0, 1), torch.zeros(0), torch.zeros(0)
    return torch.cat(points), torch.cat(targets), torch.cat(groups)


def _roots(one: Pass) -> list[torch.Tensor]:
    """For every step the first ancestor of each particle, before the step's resampling."""
    like = one.log_path
    root = torch.arange(like.shape[0]).reshape((-1,) + (1,) * (like.dim() - 1)).expand(like.shape)
    roots = []
    for index in one.ancestors:
        roots.append(root)
        root = root if index is None else root.gather(0, index)
    return roots
