# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Look-ahead with learned confidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pyro_twist.twists.completions import tilt_of
from pyro_twist.twists.learned import LearnedTwist
from pyro_twist.twists.lookahead import LookaheadTwist, _below, _floored
from pyro_twist.twists.paths import Pass

__all__ = ["CalibratedLookahead", "DiscountedLookahead"]

_LOOKS = 4.0


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
        if "potential" in options:
            raise ValueError(
                f"potential={options['potential']!r} is for LookaheadTwist: {type(self).__name__} "
                "multiplies the look-ahead by a slope, which is for potential='diff'; leave it out"
            )
        super().__init__(model, "diff", **options)
        self.shrinkage, self.smoothing = shrinkage, smoothing
        ones = torch.ones(len(model.timesteps) + 1, dtype=torch.float64)
        self.register_buffer("slopes", ones)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The look-ahead."""
        return self._values() if self._under == (None,) else self.state_keys()[:-1]

    def _look(self, state: Any, now: int, completed: torch.Tensor | None) -> None:
        super()._look(state, now, completed)
        state[f"{self.key}_log_twist"] = self._sloped(state[self.key], self.slopes[now])

    def _sloped(self, value: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """Sloped where the reward is known; what a prediction forbids stays as far below."""
        forbidden = self._forbidden(value)
        return slope * value - torch.where(forbidden, (1 - slope) * self.floor, 0.0)

    def _forbidden(self, value: torch.Tensor) -> torch.Tensor:
        """Which look-aheads were minus infinity: they were put exactly so far below the best."""
        return value == _below(value.amax(0), self.floor)

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
        weights = _base_weights(one)
        for t, guess, _ in self._lineage_looks(one):
            c, s, _ = _moments(guess, self._end(one, t), weights)
            cross[t] += len(weights) * c.sum()
            spread[t] += len(weights) * s.sum()

    def _lineage_looks(self, one: Pass) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Every look on the way of the final paths, and which particle it was a look at."""
        for sites, lineage in zip(one.steps, one.lineages(), strict=True):
            t = sites[0].t if sites else None
            if t is None or t not in self.schedule or self.key not in sites[0].state:
                continue
            guess = self._guess(sites[0].state, t).reshape(lineage.shape)
            yield t, guess.gather(0, lineage), lineage

    def _guess(self, state: Any, t: int) -> torch.Tensor:
        """The look-ahead in a recorded state, less what the tilt explains of it by now."""
        value: torch.Tensor = state[self.key]
        if self._eta(t) is None:
            return value
        tokens, potentials = (state[f"{self.key}_{x}"] for x in ("completions", "potentials"))
        return _floored(self._mean_potential(tokens, potentials, t), self.floor)

    def _end(self, one: Pass, t: int) -> torch.Tensor:
        """What the look-ahead is a guess of."""
        eta = self._eta(t)
        if eta is None:
            return one.log_terminal
        return one.log_terminal - tilt_of(one.state["x"], eta).sum(-1).reshape_as(one.log_terminal)


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

    Masked models know the share :math:`u_t` of the tokens. Of the variance of the reward of a
    sampled completion, a part :math:`\\rho_t = u_t^p` is due to what is revealed: for a sum of
    contributions of groups of :math:`p` tokens each, that is the chance that all of a group are
    known. This is the slope for one completion. The mean of :math:`J` has the slope
    :math:`J \\rho_t / (1 + (J - 1) \\rho_t)` [1]. One of the likeliest tokens has no sampling
    noise, and its exponent starts at a smaller number. Since completions of one particle share
    their random numbers, consecutive look-aheads agree for no good reason: here the exponent is
    fitted to how far each look-ahead carried over to the end of its path.

    :param model: A tilted :class:`~pyro_twist.diffusion.GaussianDiffusion` or
        :class:`~pyro_twist.diffusion.MaskedDiffusion`.
    :param float exponent: The exponent before learning, and its prior mean; by default 0.15, for
        sampled completions 1.5, for the likeliest 1.2.
    :param float spread: The prior standard deviation of the exponent; by default 0.15, for
        completions 0.5.
    :param float variance: The variance of data entries before learning; images in [-1, 1] have
        about a quarter. Masked models do not use it.
    :param options: Further options of :class:`~pyro_twist.twists.LookaheadTwist`.
    :raises ValueError: If the model does not say how much is known, or an option is out of range.

    **References**

    [1] The formula of Spearman and Brown for the reliability of a mean:
        `Correlation calculated from faulty data`, Charles Spearman (1910), British Journal of
        Psychology 3, 271-295.
    """

    exponent: torch.Tensor
    variance: torch.Tensor
    reads = CalibratedLookahead.reads

    def __init__(
        self,
        model: Any,
        *,
        exponent: float | None = None,
        spread: float | None = None,
        variance: float = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if not hasattr(model, "known_share"):
            raise ValueError(
                f"{type(model).__name__} has no method `known_share`, which DiscountedLookahead "
                "needs; it is for diffusion models. Try CalibratedLookahead."
            )
        exponent = self._first_exponent() if exponent is None else exponent
        spread = (0.15 if self.completions is None else 0.5) if spread is None else spread
        if exponent < 0 or spread <= 0 or variance <= 0:
            raise ValueError(
                f"exponent={exponent}, spread={spread}, variance={variance}; give an exponent of "
                "at least 0 and positive numbers for the others"
            )
        self.prior = (exponent, spread)
        self.follows = (self.key,) if self.completions is None else ()
        self.register_buffer("exponent", torch.tensor(exponent, dtype=torch.float64))
        self.register_buffer("variance", torch.tensor(variance, dtype=torch.float64))
        # one for each entry of the plate where they know different shares
        self.slopes = self._slopes(self._known(), self.exponent)
        #: The slopes before learning.
        self.slopes_before = self.slopes.clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # slopes follow from the exponent: those that are saved may be of other prompts
        slopes, exponent = (state_dict.get(prefix + name) for name in ("slopes", "exponent"))
        if slopes is not None and exponent is not None and len(slopes) == len(self.slopes):
            state_dict[prefix + "slopes"] = self._slopes_of(slopes, exponent)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _slopes_of(self, saved: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
        return saved if saved.shape == self.slopes.shape else self._slopes(self._known(), exponent)

    def _first_exponent(self) -> float:
        if self.completions is None:
            return 0.15
        return 1.2 if self.completions == "argmax" else 1.5

    def _known(self) -> torch.Tensor:
        """The share known of the data at every time, from 0, and of every entry of a plate."""
        given = (self.variance.cpu(),) if self.completions is None else ()
        return self.model.known_share(*given).cpu().double().clamp(min=1e-12)

    def _slopes(self, known: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
        """The slopes of exponents, which broadcast to the shares."""
        single = known ** exponent.cpu()
        count = self.completions if isinstance(self.completions, int) else 1
        return count * single / (1 + (count - 1) * single)

    @property
    def learns_within(self) -> bool:
        """Where consecutive look-aheads are enough; completions are compared with the end."""
        return self.completions is None

    def observe(self, passes: Sequence[Pass]) -> None:
        """Fits the exponent, to consecutive look-aheads or to the ends of paths."""
        mean, spread = self.prior
        largest = 1.5 if self.completions is None else 3.0
        grid = torch.linspace(0.0, largest, round(100 * largest) + 1, dtype=torch.float64)
        seen = self._by_next if self.completions is None else self._by_end
        fit = -0.5 * ((grid - mean) / spread).square() + seen(passes, grid)
        self.exponent.copy_(torch.softmax(fit, 0) @ grid)
        self.slopes.copy_(self._slopes(self._known(), self.exponent))

    def _by_next(self, passes: Sequence[Pass], grid: torch.Tensor) -> torch.Tensor:
        """The log-likelihood of exponents by how each look-ahead carried over to the next."""
        ends = torch.cat([one.state["x0_hat"].flatten() for one in passes]).double()
        if len(ends) > 1:
            self.variance.copy_(ends.var().clamp(min=1e-6))
        known = self._known()
        found = [pair for one in passes for pair in self._consecutive(one)]
        noise, fit = _noise_levels(found, len(known)), torch.zeros_like(grid)
        for before, after, early, late in found:
            decay = (known[before] / known[after]) ** grid
            missed = late[..., None] - decay * early[..., None]
            fit = fit - 0.5 * missed.square().sum((0, 1)) / noise[after]
        return fit

    def _by_end(self, passes: Sequence[Pass], grid: torch.Tensor) -> torch.Tensor:
        """
        The log-likelihood of exponents by how each look-ahead carried over to the end.

        All looks on a path share its end: together they count as ``_LOOKS`` independent ones.
        """
        found = [row for one in passes for row in self._to_end(one)]
        if not found:
            return torch.zeros_like(grid)
        known, *columns = torch.tensor(found, dtype=torch.float64).T
        share, cross, spread, noise = columns
        slope = self._slopes(known[:, None], grid)
        explained = 2 * slope * cross[:, None] - slope.square() * spread[:, None]
        noise = (share * (spread + noise)).sum() / (2 * share.sum())
        return 0.5 * _LOOKS * (share[:, None] * explained).sum(0) / noise.clamp(min=1e-12)

    def _to_end(self, one: Pass) -> Iterator[tuple[float, ...]]:
        """
        For every look at a population the share that is known, how much it counts, and moments with
        the end.
        """
        weights, looks, known = _base_weights(one), list(self._lineage_looks(one)), self._known()
        for t, guess, lineage in looks:
            size = _num_ancestors(weights, lineage) / len(looks)
            columns = (size, *_moments(guess, self._end(one, t), weights))
            share = known[t] if known[t].dim() <= size.dim() else known[t].mean()
            shares = share.expand(size.shape)
            found = (column.flatten().tolist() for column in (shares, *columns))
            yield from zip(*found, strict=True)

    def _consecutive(self, one: Pass) -> Iterator[_Pair]:
        """Look-aheads before and after each step, less the mean of the population."""
        key, time, _ = self._values()
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


def _base_weights(one: Pass) -> torch.Tensor:
    """Weights of the final paths back to the law they were drawn from; 0 for lost ones."""
    alive = torch.isfinite(one.log_terminal) & torch.isfinite(one.log_base)
    weights = torch.where(alive, (one.log_base - one.log_base.amax(0)).exp(), 0.0)
    return weights / weights.sum(0).clamp(min=1e-300)


def _moments(
    guess: torch.Tensor, truth: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted co-moment of guess and truth, and the variance of each, in every population."""
    truth = torch.where(weights > 0, truth, 0.0)
    guess, truth = guess - (weights * guess).sum(0), truth - (weights * truth).sum(0)
    pairs = (guess * truth, guess.square(), truth.square())
    cross, spread, noise = ((weights * pair).sum(0) for pair in pairs)
    return cross, spread, noise


def _num_ancestors(weights: torch.Tensor, lineage: torch.Tensor) -> torch.Tensor:
    """The effective number of particles that weighted final paths went through."""
    through = torch.zeros_like(weights).scatter_add_(0, lineage, weights)
    return 1 / through.square().sum(0).clamp(min=1e-300)


def _smoother(size: int, share: float) -> torch.Tensor:
    steps = torch.arange(size, dtype=torch.float64)
    width = max(share * size, 1e-6)
    kernel = torch.exp(-0.5 * ((steps[:, None] - steps) / width).square())
    return kernel / kernel.sum(1, keepdim=True)
