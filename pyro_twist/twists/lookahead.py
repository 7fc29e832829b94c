# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Look-ahead twists: the reward of the predicted end state, as in Feynman-Kac steering."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, get_args

import torch

from pyro_twist.rewards.tilted import log_potential
from pyro_twist.twists.twist import Twist

__all__ = ["LookaheadTwist", "Potential"]

Potential = Literal["diff", "max", "sum", "rt"]


class LookaheadTwist(Twist):
    """
    Feynman-Kac steering [1]: the terminal log-potential at the predicted end state ``x0_hat``.

    With :math:`\\ell_t` the log-potential (for a reward, ``scale * reward``) at the prediction made
    from :math:`x_t`, the log-twist after the scheduled steps so far is

    ============  =====================================================================
    ``"diff"``    :math:`\\ell_t`, so that the factors are differences of rewards
    ``"rt"``      :math:`\\sum_{s \\ge t} \\ell_s`
    ``"max"``     :math:`\\sum_{s \\ge t} \\max_{u \\ge s} \\ell_u`
    ``"sum"``     :math:`\\sum_{s \\ge t} \\sum_{u \\ge s} \\ell_u`
    ============  =====================================================================

    where only scheduled steps count. The engine divides the whole twist out again after the last
    step, so all four sample the same tilted law; they differ in where particles are lost. The
    proposal is the model's own kernel. All but ``"diff"`` add up over the schedule: give them a
    few steps to look ahead at, since at every step they are far too greedy.

    A look-ahead of :math:`-\\infty` (a hard constraint that the prediction violates) is no proof
    that the particle is lost: it counts as ``floor`` nats below the best particle. A floor far
    below is as risky as a hard cut: particles that would have recovered are then rare and heavy.

    :param model: A model with ``terminal``, such as :class:`~pyro_twist.rewards.RewardTilted`.
    :param str potential: ``"diff"``, ``"rt"``, ``"max"`` or ``"sum"``.
    :param int every: Look ahead after every so many steps, counted from the first state.
    :param schedule: The states ``t`` at which to look ahead instead, as a collection of time
        indices; ``T`` is the initial state, 1 the last before the end. Steps outside apply no
        factor, cost no reward call, and leave the twist as it was.
    :param float floor: How many nats below the best particle a look-ahead of minus infinity is.
    :param str key: The entry of the state for the latest look-ahead; two more begin with it.
    :raises ValueError: If the model has no ``terminal``, or an option is out of range.

    **References**

    [1] `A General Framework for Inference-time Scaling and Steering of Diffusion Models`
        Raghav Singhal, Zachary Horvitz, Ryan Teehan, Mengye Ren, Zhou Yu, Kathleen McKeown,
        Rajesh Ranganath (2025), https://arxiv.org/abs/2501.06848
    """

    def __init__(
        self,
        model: Any,
        potential: Potential = "diff",
        *,
        every: int = 1,
        schedule: Collection[int] | None = None,
        floor: float = 3.0,
        key: str = "lookahead",
    ) -> None:
        super().__init__(model)
        if potential not in get_args(Potential):
            raise ValueError(f"potential={potential!r}; choose one of {get_args(Potential)}")
        if every < 1:
            raise ValueError(f"every={every}; give a whole number of steps, 1 or more")
        if not hasattr(model, "terminal"):
            raise ValueError(
                f"{type(model).__name__} has no method `terminal`, so there is nothing to look "
                "ahead to. Wrap it: RewardTilted(model, reward)."
            )
        self.potential = potential
        self.floor, self.key = floor, key
        self.schedule = _check_schedule(schedule, every, model.timesteps)

    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`Twist.log_twist`; keeps its running sums in ``state``."""
        now = self.time_after(t)
        if now in self.schedule:
            self._look(state, now)
        return state.get(f"{self.key}_log_twist", 0.0)

    def state_keys(self) -> tuple[str, ...]:
        """The latest look-ahead, when it was made, and the log-twist."""
        return (self.key, f"{self.key}_time", f"{self.key}_log_twist")

    def _look(self, state: Any, now: int) -> None:
        key, time, log_twist = self.state_keys()
        value = _floored(log_potential(self.model, state, state["x0_hat"]), self.floor)
        if self.potential == "max" and key in state:
            value = torch.maximum(value, state[key])
        if self.potential == "sum" and key in state:
            value = value + state[key]
        state[key] = value
        state[time] = torch.full_like(value, now)
        if self.potential != "diff" and log_twist in state:
            value = value + state[log_twist]
        state[log_twist] = value


def _check_schedule(
    schedule: Collection[int] | None, every: int, timesteps: tuple[int, ...]
) -> frozenset[int]:
    if schedule is None:
        return frozenset(timesteps[::every])
    unknown = sorted(set(schedule) - set(timesteps))
    if unknown:
        raise ValueError(
            f"schedule names the states {unknown}; the model's are {timesteps[0]} (the initial "
            f"state) to {timesteps[-1]}"
        )
    return frozenset(schedule)


def _floored(value: torch.Tensor, floor: float) -> torch.Tensor:
    """Replaces minus infinity by ``floor`` below the best value of the population."""
    best = value.amax(0, keepdim=True)
    best = torch.where(best == -math.inf, torch.zeros_like(best), best)
    return torch.where(value == -math.inf, best - floor, value)
