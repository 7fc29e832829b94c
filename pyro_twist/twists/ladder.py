# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Look-ahead with learned confidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pyro_twist.twists.learned import LearnedTwist
from pyro_twist.twists.lookahead import LookaheadTwist
from pyro_twist.twists.paths import Pass

__all__ = ["CalibratedLookahead", "DiscountedLookahead"]


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

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The look-ahead."""
        return self.state_keys()

    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`~pyro_twist.twists.Twist.log_twist`."""
        now = self.time_after(t)
        if now in self.schedule:
            self._look(state, now)
            state[f"{self.key}_log_twist"] = self._sloped(state[self.key], self.slopes[now])
        return state.get(f"{self.key}_log_twist", 0.0)

    def _sloped(self, value: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """Sloped where the reward is known; what a prediction forbids stays as far below."""
        forbidden = self._forbidden(value)
        return slope * value - torch.where(forbidden, (1 - slope) * self.floor, 0.0)

    def _forbidden(self, value: torch.Tensor) -> torch.Tensor:
        """Which look-aheads were minus infinity: they were put exactly so far below the best."""
        return value == value.amax(0) - self.floor

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


class DiscountedLookahead(CalibratedLookahead):
    """
    Look-ahead that is trusted as far as the end can be seen: a power of the share that is known.

    With signal and noise levels :math:`\\alpha_t, \\sigma_t` and data of variance :math:`v_0`, the
    share of :math:`x_0` that :math:`x_t` tells is
    :math:`u_t = \\alpha_t^2 v_0 / (\\alpha_t^2 v_0 + \\sigma_t^2)`, and the slope of the
    look-ahead is :math:`u_t^p`. A reward that is linear in the prediction has the exponent 0; one
    that depends on detail is worth less the less is known, and a noisy one least. A bend is seen
    only where particles are pushed: else the look-ahead of a quadratic changes by a number on
    average, and its exponent is 0 as well.

    The exponent is the only number to learn. It is fitted, with a normal prior, to how far each
    look-ahead carried over to the next one, among the particles of a step: these pairs are before
    any resampling, so that selection does not enter, and there are as many as look-aheads.

    :param model: A tilted :class:`~pyro_twist.diffusion.GaussianDiffusion`.
    :param float exponent: The exponent before learning, and its prior mean.
    :param float spread: The prior standard deviation of the exponent.
    :param float variance: The variance of data entries before learning; images in [-1, 1] have
        about a quarter.
    :param options: Further options of :class:`~pyro_twist.twists.LookaheadTwist`.
    :raises ValueError: If the model has no noise levels.
    """

    exponent: torch.Tensor
    variance: torch.Tensor
    reads = CalibratedLookahead.reads

    def __init__(
        self,
        model: Any,
        *,
        exponent: float = 0.15,
        spread: float = 0.15,
        variance: float = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if not hasattr(model, "schedule"):
            raise ValueError(
                f"{type(model).__name__} has no noise `schedule`, which DiscountedLookahead needs; "
                "it is for diffusion models. Try CalibratedLookahead."
            )
        if exponent < 0 or spread <= 0 or variance <= 0:
            raise ValueError(
                f"exponent={exponent}, spread={spread}, variance={variance}; give an exponent of "
                "at least 0 and positive numbers for the others"
            )
        self.prior = (exponent, spread)
        self.follows = (self.key,)
        self.register_buffer("exponent", torch.tensor(exponent, dtype=torch.float64))
        self.register_buffer("variance", torch.tensor(variance, dtype=torch.float64))
        self.slopes.copy_(self._known() ** self.exponent)
        #: The slopes before learning.
        self.slopes_before = self.slopes.clone()

    def _known(self) -> torch.Tensor:
        """The share that is known of the data at every time, from 0."""
        steps = [self.model.schedule[t] for t in range(1, len(self.model.timesteps) + 1)]
        signal = torch.tensor([step.alpha**2 for step in steps], dtype=torch.float64)
        noise = torch.tensor([step.sigma**2 for step in steps], dtype=torch.float64)
        share = signal * self.variance.cpu() / (signal * self.variance.cpu() + noise)
        return torch.cat([torch.ones(1, dtype=torch.float64), share]).clamp(min=1e-12)

    def observe(self, passes: Sequence[Pass]) -> None:
        """Fits the exponent to consecutive look-aheads."""
        ends = torch.cat([one.state["x"].flatten() for one in passes]).double()
        if len(ends) > 1:
            self.variance.copy_(ends.var().clamp(min=1e-6))
        known = self._known()
        found = [pair for one in passes for pair in self._consecutive(one)]
        mean, spread = self.prior
        grid = torch.linspace(0.0, 1.5, 151, dtype=torch.float64)
        fit = -0.5 * ((grid - mean) / spread).square()
        noise = _noise_levels(found, len(known))
        for before, after, early, late in found:
            decay = (known[before] / known[after]) ** grid
            missed = late[..., None] - decay * early[..., None]
            fit = fit - 0.5 * missed.square().sum((0, 1)) / noise[after]
        self.exponent.copy_(torch.softmax(fit, 0) @ grid)
        self.slopes.copy_(known ** self.exponent.cpu())

    def _consecutive(self, one: Pass) -> Iterator[_Pair]:
        """Look-aheads before and after each step, less the mean of the population."""
        key, time, _ = self.state_keys()
        for sites in one.steps:
            step = sites[0] if sites else None
            if step is None or step.t is None or key not in step.state:
                continue
            after = step.after.get(key)
            if after is None or step.t - 1 not in self.schedule:
                continue
            early, late = (v.reshape(len(v), -1).cpu() for v in (step.state[key], after))
            before = int(step.state[time].reshape(-1)[0])
            known = ~(self._forbidden(early) | self._forbidden(late))
            yield before, step.t - 1, _deviations(early, known), _deviations(late, known)


def _deviations(value: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Differences from the mean of the population, 0 where nothing is known."""
    mean = torch.where(known, value, 0.0).sum(0) / known.sum(0).clamp(min=1)
    return torch.where(known, value - mean, 0.0)


_Pair = tuple[int, int, torch.Tensor, torch.Tensor]


def _noise_levels(pairs: Sequence[_Pair], size: int) -> torch.Tensor:
    """The variance of the change of a look-ahead at each time, smoothed over times."""
    total, count = torch.zeros(2, size, dtype=torch.float64)
    for _, after, early, late in pairs:
        total[after] += (late - early).square().sum()
        count[after] += max(late.numel() - late.shape[1], 1)
    kernel = _smoother(size, 2.0 / size)
    return ((kernel @ total) / (kernel @ count).clamp(min=1e-12)).clamp(min=1e-12)


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
