# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

r"""
Tempered look-ahead: how much of the look-ahead is in the weights at each step.

The twist is :math:`\psi_t = \exp(\lambda_t \ell_t)` with the log-potential :math:`\ell_t` of the
prediction made from :math:`x_t` and a temperature :math:`\lambda_t`. The twist is divided out in
the end, so that every schedule samples the same tilted law; one that starts near 0 does not trust
early predictions, and spreads the selection over the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_twist.twists.completions import Completions
from pyro_twist.twists.lookahead import LookaheadTwist, _floored
from pyro_twist.weights import effective_sample_size

__all__ = [
    "AdaptiveTempering",
    "TemperedLookahead",
    "Tempering",
    "geometric_temperatures",
    "linear_temperatures",
    "next_temperature",
    "temperatures",
]

# (1 + 0.008)^100, the total growth of the schedule of DAS over its hundred steps
_GROWTH = 1.008**100
_BISECTIONS = 30


@dataclass(frozen=True)
class AdaptiveTempering:
    """
    Temperatures that cost no more than a share of the effective sample size in each step.

    Early predictions hardly differ between particles, so that to count them in full costs nothing
    yet. Hence there is a schedule that the temperatures are not above.

    :param float share: The effective sample size after a change of the temperature, as a share of
        that before it; more than 0 and less than 1.
    :param at_most: The schedule that bounds the temperatures, see
        :func:`~pyro_twist.twists.tempering.temperatures`.
    :raises ValueError: If ``share`` is out of range.
    """

    share: float = 0.9
    at_most: str | Sequence[float] | Callable[[int], float] = "geometric"

    def __post_init__(self) -> None:
        if not (isinstance(self.share, float) and 0 < self.share < 1):
            raise ValueError(
                f"share={self.share!r}; give the share of the effective sample size that a step "
                "leaves, more than 0 and less than 1, such as 0.9"
            )


Tempering = str | Sequence[float] | Callable[[int], float] | AdaptiveTempering


def linear_temperatures(num_steps: int) -> tuple[float, ...]:
    """
    Temperatures from 0 at the start, linear in the step: :math:`\\lambda_t = 1 - t / T`.

    :param int num_steps: The number of steps ``T``.
    :returns: ``T + 1`` numbers by time index, from 1 at index 0.
    """
    return tuple(1 - t / num_steps for t in range(num_steps + 1))


def geometric_temperatures(num_steps: int, gamma: float | None = None) -> tuple[float, ...]:
    """
    The schedule of DAS [1]: :math:`\\min((1 + \\gamma)^{T - t} - 1, 1)`.

    :param int num_steps: The number of steps ``T``.
    :param float gamma: The rate of growth, positive. By default that which gives the paper's
        schedule, 0.008 for 100 steps, for any number of steps: it is 1 after 87 % of them.
    :returns: ``T + 1`` numbers by time index, with 1 at index 0.
    :raises ValueError: If ``gamma`` is not positive.

    **References**

    [1] `Test-time Alignment of Diffusion Models without Reward Over-optimization`
        Sunwoo Kim, Minkyu Kim, Dongmin Park (2025), https://arxiv.org/abs/2501.05803
    """
    if gamma is not None and not gamma > 0:
        raise ValueError(f"gamma={gamma}; give a positive rate of growth, such as 0.008")
    rate = math.log(_GROWTH) / num_steps if gamma is None else math.log1p(gamma)
    grown = [min(math.expm1(rate * (num_steps - t)), 1.0) for t in range(1, num_steps + 1)]
    return (1.0, *grown)


def temperatures(tempering: Tempering, num_steps: int) -> tuple[float, ...]:
    """
    A schedule as numbers.

    :param tempering: ``"constant"`` (1 throughout), ``"linear"``, ``"geometric"``, a sequence of
        ``T`` numbers for the states :math:`x_T` to :math:`x_1`, or a function of the time index.
    :param int num_steps: The number of steps ``T``.
    :returns: ``T + 1`` numbers by time index, with 1 at index 0.
    :raises ValueError: If there is no such schedule, or a temperature is negative or not finite.
    """
    named = {"linear": linear_temperatures, "geometric": geometric_temperatures}
    if isinstance(tempering, str):
        if tempering == "constant":
            return (1.0,) * (num_steps + 1)
        if tempering not in named:
            raise ValueError(_unknown(tempering))
        return named[tempering](num_steps)
    return (1.0, *_checked(_given(tempering, num_steps)))


def _given(tempering: Any, num_steps: int) -> list[float]:
    """The temperatures of the states 1 to T."""
    if callable(tempering):
        return [float(tempering(t)) for t in range(1, num_steps + 1)]
    if not isinstance(tempering, (Sequence, Tensor)):
        raise ValueError(_unknown(tempering))
    values = [float(value) for value in tempering]
    if len(values) != num_steps:
        raise ValueError(
            f"the schedule has {len(values)} temperatures; give {num_steps}, one for each of the "
            f"states x_{num_steps} to x_1"
        )
    return values[::-1]


def _checked(values: list[float]) -> list[float]:
    for t, value in enumerate(values, start=1):
        if not 0 <= value < math.inf:
            raise ValueError(
                f"the temperature of the state x_{t} is {value}; give finite numbers of at least 0"
            )
    return values


def _unknown(tempering: Any) -> str:
    return (
        f"the schedule {tempering!r} is none of: 'constant', 'linear', 'geometric', 'adaptive', an "
        "AdaptiveTempering, a sequence of temperatures, or a function of the time index"
    )


def next_temperature(
    log_weights: Tensor,
    slope: Tensor,
    offset: Tensor,
    low: Tensor,
    share: float,
    high: float = 1.0,
) -> Tensor:
    """
    The largest temperature that keeps a share of the effective sample size.

    The log-weights after the change to the temperature :math:`\\lambda` are ``log_weights +
    lambda * slope - offset``. The root is found by bisection between ``low`` and
    ``high``.

    :param Tensor log_weights: Of shape ``(num_particles,)`` or
        ``(num_particles, num_populations)``.
    :param Tensor slope: What the temperature multiplies, of the same shape.
    :param Tensor offset: The log-twist that is in ``log_weights``, of the same shape.
    :param Tensor low: The lowest temperature, of shape ``()`` or ``(num_populations,)``.
    :param float share: The share of the effective sample size of ``log_weights`` to be kept.
    :param float high: The highest temperature; ``low`` may be above it, and is kept then.
    :returns: Of the shape of ``low``; ``low`` where any change costs more than that.
    :rtype: Tensor
    """

    def kept(value: Tensor) -> Tensor:
        return effective_sample_size(log_weights + value * slope - offset) >= target

    target = share * effective_sample_size(log_weights)
    good, bad = low, low.clamp(min=high)
    good = torch.where(kept(bad), bad, good)
    for _ in range(_BISECTIONS):
        middle = (good + bad) / 2
        enough = kept(middle)
        good, bad = torch.where(enough, middle, good), torch.where(enough, bad, middle)
    return good


class TemperedLookahead(LookaheadTwist):
    r"""
    Look-ahead at a temperature: the log-twist is :math:`\lambda_t \ell_t`.

    The adaptive schedule finds the temperature of the next state at the start of a step, from the
    weights and the look-ahead that are known then, for every population by itself. The
    temperature depends on all particles; it is divided out as it was multiplied in, so that the
    normaliser stays unbiased.

    :param model: A model with ``terminal``, such as :class:`~pyro_twist.rewards.RewardTilted`.
    :param tempering: The schedule: see
        :func:`~pyro_twist.twists.tempering.temperatures`, or ``"adaptive"`` for an
        :class:`AdaptiveTempering` with its default.
    :param int every: As for :class:`~pyro_twist.twists.LookaheadTwist`.
    :param schedule: As for :class:`~pyro_twist.twists.LookaheadTwist`.
    :param float floor: As for :class:`~pyro_twist.twists.LookaheadTwist`; in nats of
        :math:`\ell_t`.
    :param str key: As for :class:`~pyro_twist.twists.LookaheadTwist`.
    :param completions: As for :class:`~pyro_twist.twists.LookaheadTwist`.
    :raises ValueError: If the model has no terminal potential, or an option is out of range.
    """

    def __init__(
        self,
        model: Any,
        tempering: Tempering = "geometric",
        *,
        every: int = 1,
        schedule: Collection[int] | None = None,
        floor: float = 3.0,
        key: str = "lookahead",
        completions: Completions | None = None,
    ) -> None:
        super().__init__(
            model, every=every, schedule=schedule, floor=floor, key=key, completions=completions
        )
        if isinstance(tempering, str) and tempering == "adaptive":
            tempering = AdaptiveTempering()
        self.adaptive = tempering if isinstance(tempering, AdaptiveTempering) else None
        #: The temperatures by time index; the highest if they are adaptive.
        self.temperatures = temperatures(
            tempering.at_most if isinstance(tempering, AdaptiveTempering) else tempering,
            len(model.timesteps),
        )

    def state_keys(self) -> tuple[str, ...]:
        """Those of the look-ahead and, if it is adaptive, the temperature."""
        return super().state_keys() + (() if self.adaptive is None else (self._temperature,))

    @property
    def _temperature(self) -> str:
        return f"{self.key}_temperature"

    def temperature(self, state: Any, t: int) -> float | Tensor:
        """
        The temperature of a state.

        :param dict state: The state; with an adaptive schedule, at the time ``t`` or, from
            :meth:`get_posterior` on, in the step that leads there.
        :param int t: Its time index.
        :returns: A number, or a tensor that broadcasts to the batch shape.
        """
        if self.adaptive is None:
            return self.temperatures[t]
        found: Tensor | float = state.get(self._temperature, 0.0) if t > 0 else 1.0
        return found

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The prior; an adaptive schedule finds its next temperature here."""
        state = self.args_kwargs[0][0]
        if self.adaptive is not None and self._steps_to(name) and self.key in state:
            now = self.time_after(*self.args_kwargs[0][1:])
            state[self._temperature] = self._next(state, self.temperatures[now])
        return prior

    def _steps_to(self, name: str) -> bool:
        """Whether a site is the next state of the trajectory."""
        args = self.args_kwargs[0][1:]
        return self.stepping and len(args) > 0 and name == f"x_{self.time_after(*args)}"

    def _next(self, state: Any, high: float) -> Tensor:
        assert self.adaptive is not None
        value, known = state[self.key], state[f"{self.key}_log_twist"]
        log_weights = getattr(state, "_log_weights", None)
        if log_weights is None:
            log_weights = torch.zeros_like(value)
        axis = getattr(state, "population_axis", 1)
        rest = [d for d in range(value.dim()) if d and not (log_weights.dim() > 1 and d == axis)]
        before = state.get(self._temperature, torch.zeros_like(value))
        low = before.amax([0, *rest])
        slope, offset = (v.sum(rest) if rest else v for v in (value, known))
        share = self.adaptive.share
        found = next_temperature(log_weights.double(), slope, offset, low, share, high)
        shape = [1 if d == 0 or d in rest else value.shape[d] for d in range(value.dim())]
        return found.reshape(shape).expand(value.shape).clone()

    def _look(self, state: Any, now: int, completed: Tensor | None) -> None:
        key, time, log_twist = self._values()
        state[key] = _floored(self._potential_ahead(state, now, completed), self.floor)
        state[time] = torch.full_like(state[key], now)
        state[log_twist] = self.temperature(state, now) * state[key]
