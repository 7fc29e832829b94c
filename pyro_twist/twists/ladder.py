# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Look-ahead with learned confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyro_twist.twists.learned import LearnedTwist
from pyro_twist.twists.lookahead import LookaheadTwist
from pyro_twist.twists.paths import Pass

__all__ = ["CalibratedLookahead"]


class CalibratedLookahead(LookaheadTwist, LearnedTwist):
    """
    Feynman-Kac steering that knows how far to trust its look-ahead: ``slope_t`` times it.

    A predicted reward is a noisy guess of the final one, and at full strength it is overconfident.
    The slope at each step is the regression of the terminal log-potential on the look-ahead of
    the same lineage, under the law the paths were drawn from, over all earlier passes; it is
    smoothed over steps and shrunk to 1. At the start all slopes are 1.

    :param model: A model with ``terminal``.
    :param float shrinkage: How many paths the prior slope of 1 is worth.
    :param float smoothing: Width of the smoothing over steps, as a share of all steps.
    :param options: Further options of :class:`~pyro_twist.twists.LookaheadTwist`.
    """

    slopes: torch.Tensor

    def __init__(
        self, model: Any, *, shrinkage: float = 4.0, smoothing: float = 0.05, **options: Any
    ) -> None:
        super().__init__(model, "diff", **options)
        self.shrinkage, self.smoothing = shrinkage, smoothing
        ones = torch.ones(len(model.timesteps) + 1, dtype=torch.float64)
        self.register_buffer("slopes", ones)

    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`~pyro_twist.twists.Twist.log_twist`."""
        now = self.time_after(t)
        if now in self.schedule:
            self._look(state, now)
            state[f"{self.key}_log_twist"] = self.slopes[now] * state[self.key]
        return state.get(f"{self.key}_log_twist", 0.0)

    def observe(self, passes: Sequence[Pass]) -> None:
        """Regresses terminal log-potentials on look-aheads."""
        cross = torch.zeros_like(self.slopes)
        spread = torch.zeros_like(self.slopes)
        for one in passes:
            self._accumulate(one, cross, spread)
        kernel = _smoother(len(self.slopes), self.smoothing)
        cross, spread = kernel @ cross, kernel @ spread
        # the prior weighs as much as `shrinkage` paths of average spread
        prior = self.shrinkage * spread[spread > 0].mean() if (spread > 0).any() else 0.0
        count = sum(one.log_path.shape[0] for one in passes)
        prior = prior / max(count, 1)
        slopes = (cross + prior) / (spread + prior)
        known = spread > 0
        self.slopes.copy_(torch.where(known, slopes.clamp(0.0, 1.5), self.slopes))

    def _accumulate(self, one: Pass, cross: torch.Tensor, spread: torch.Tensor) -> None:
        for sites, lineage in zip(one.steps, one.lineages(), strict=True):
            t = sites[0].t if sites else None
            if t is None or t not in self.schedule or self.key not in sites[0].state:
                continue
            guess = sites[0].state[self.key].reshape(one.log_path.shape).gather(0, lineage)
            c, s = _moments(guess, one.log_terminal, one.log_base)
            cross[t] += c
            spread[t] += s


def _moments(
    guess: torch.Tensor, truth: torch.Tensor, log_base: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted co-moment and second moment, summed over particles and populations."""
    alive = torch.isfinite(truth) & torch.isfinite(log_base)
    weights = torch.where(alive, (log_base - log_base.amax(0)).exp(), 0.0)
    weights = weights / weights.sum(0).clamp(min=1e-300)
    truth = torch.where(alive, truth, 0.0)
    size = guess.shape[0]
    centred = guess - (weights * guess).sum(0)
    cross = size * (weights * centred * (truth - (weights * truth).sum(0))).sum()
    return cross, size * (weights * centred.square()).sum()


def _smoother(size: int, share: float) -> torch.Tensor:
    steps = torch.arange(size, dtype=torch.float64)
    width = max(share * size, 1e-6)
    kernel = torch.exp(-0.5 * ((steps[:, None] - steps) / width).square())
    return kernel / kernel.sum(1, keepdim=True)
