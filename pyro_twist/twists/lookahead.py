# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Look-ahead twists: the reward of the predicted end state, as in Feynman-Kac steering."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, get_args

import torch

from pyro_twist.rewards.tilted import log_potential
from pyro_twist.twists.completions import (
    Completions,
    check_completions,
    draw_uniforms,
    score_completions,
    tilt_of,
    tilt_value,
    tilted_completions,
)
from pyro_twist.twists.twist import Twist

__all__ = ["LookaheadTwist", "Potential", "check_tilted"]

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

    A masked model has no prediction to score, since no token is the mean of two. There the masks
    are filled in from the denoiser's token law, ``completions`` times, and :math:`\\ell_t` is the
    log of the mean of ``exp`` of their log-potentials: its ``exp`` is then an unbiased estimate of
    the expected factor under that law. The random numbers are drawn once for each particle, which
    keeps them, so that a completion changes only where the state did; one that does not change is
    not scored again.

    With a tilt :math:`\\eta` of tokens ``under``, completions are drawn from the tilted law, and
    weighted back. With :math:`Z_\\eta` the mean of :math:`\\exp \\eta` over the masked positions of
    :math:`x_t`, and :math:`\\eta(x)` the sum over the tokens of a sequence,

    .. math::

        \\log \\psi_t = \\eta(x_t) + \\log Z_\\eta(x_t) + \\ell_t, \\qquad
        \\ell_t = \\log \\frac{1}{J} \\sum_j \\exp(r(c_j) - \\eta(c_j))

    so that the look-ahead is only about what the tilt does not explain. The first two terms are
    those of the state at every step, whether it is looked ahead from or not.

    :param model: A model with ``terminal``, such as :class:`~pyro_twist.rewards.RewardTilted`.
    :param str potential: ``"diff"``, ``"rt"``, ``"max"`` or ``"sum"``.
    :param int every: Look ahead after every so many steps, counted from the first state.
    :param schedule: The states ``t`` at which to look ahead instead, as a collection of time
        indices; ``T`` is the initial state, 1 the last before the end. Steps outside apply no
        factor, cost no reward call, and leave the twist as it was.
    :param float floor: How many nats below the best particle a look-ahead of minus infinity is; at
        least 0.
    :param str key: The entry of the state for the latest look-ahead; more begin with it.
    :param completions: For models with a method ``complete``: how many sampled completions to
        score at every look, 1 by default, or ``"argmax"`` for one of the likeliest tokens.
    :param under: The tilt that completions are drawn under, a part of the same sum such as
        :class:`~pyro_twist.twists.TokenTilt`; it has a method ``eta(t)``, and not ``value=True``,
        since its value is counted here.
    :raises ValueError: If the model has no terminal potential, or an option is out of range.

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
        completions: Completions | None = None,
        under: Any = None,
    ) -> None:
        super().__init__(model)
        if potential not in get_args(Potential):
            raise ValueError(f"potential={potential!r}; choose one of {get_args(Potential)}")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every={every!r}; give a whole number of steps, 1 or more")
        if not isinstance(floor, (int, float)) or not 0 <= floor < math.inf:
            raise ValueError(
                f"floor={floor!r}; give a finite number of nats, 0 or more: a look-ahead of minus "
                "infinity counts as so far below the best. Try floor=3.0."
            )
        check_tilted(model, "look ahead to")
        self.potential = potential
        self.floor, self.key = floor, key
        self.schedule = _check_schedule(schedule, every, model.timesteps)
        self.completions = check_completions(completions, model)
        if under is not None:
            _check_under(under, model)
        if under is not None and (potential != "diff" or not isinstance(self.completions, int)):
            raise ValueError(
                f"under={type(under).__name__} is for sampled completions and potential='diff', "
                f"got completions={completions!r}, potential={potential!r}"
            )
        # not a submodule: it is another part of the sum, with its own place in the state dict
        self._under = (under,)

    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`Twist.log_twist`; keeps its running sums in ``state``."""
        now = self.time_after(t)
        eta = self._eta(now)
        if now not in self.schedule:
            explained = None if eta is None else tilt_value(self.model.kernel(state, now), eta)
        else:
            completed, explained = self._complete(state, now, eta)
            self._look(state, now, completed)
        looked = state.get(f"{self.key}_log_twist", 0.0)
        return looked if explained is None else looked + explained

    def state_keys(self) -> tuple[str, ...]:
        """The latest look-ahead, its time, the log-twist without that of ``under``, completions."""
        if self.completions is None:
            return self._values()
        drawn = () if self.completions == "argmax" else (f"{self.key}_uniforms",)
        return (*self._values(), f"{self.key}_completions", f"{self.key}_potentials", *drawn)

    def _values(self) -> tuple[str, str, str]:
        return (self.key, f"{self.key}_time", f"{self.key}_log_twist")

    def _look(self, state: Any, now: int, completed: torch.Tensor | None) -> None:
        key, time, log_twist = self._values()
        value = _floored(self._potential_ahead(state, now, completed), self.floor)
        if self.potential == "max" and key in state:
            value = torch.maximum(value, state[key])
        if self.potential == "sum" and key in state:
            value = value + state[key]
        state[key] = value
        state[time] = torch.full_like(value, now)
        if self.potential != "diff" and log_twist in state:
            value = value + state[log_twist]
        state[log_twist] = value

    def _eta(self, now: int) -> torch.Tensor | None:
        """The tilt that completions are drawn under; ``None`` where there is none."""
        [under] = self._under
        return None if under is None else under.eta(now)

    def _potential_ahead(
        self, state: Any, now: int, completed: torch.Tensor | None
    ) -> torch.Tensor:
        """The log-potential of the prediction, or the log-mean of those of completions."""
        if completed is None:
            return log_potential(self.model, state, state["x0_hat"])
        tokens, potentials = f"{self.key}_completions", f"{self.key}_potentials"
        known = (state[tokens], state[potentials]) if tokens in state else None
        state[tokens] = completed
        state[potentials] = score_completions(self.model, state, state[tokens], known)
        return self._mean_potential(state[tokens], state[potentials], now)

    def _mean_potential(
        self, tokens: torch.Tensor, potentials: torch.Tensor, now: int
    ) -> torch.Tensor:
        """The log-mean over completions, less what the tilt explains of them."""
        eta = self._eta(now)
        if eta is not None:
            potentials = potentials - tilt_of(tokens, eta).sum(-1)
        return potentials.logsumexp(-1) - math.log(potentials.shape[-1])

    def _complete(
        self, state: Any, now: int, eta: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Completions of the state, of shape ``batch_shape + (num_completions, length)``, and what a
        tilt explains; ``None`` where there is none.
        """
        if self.completions is None:
            return None, None
        if self.completions == "argmax":
            return self.model.complete(state)[..., None, :], None
        uniforms = self._uniforms(state).movedim(-2, 0)
        if eta is None:
            return self.model.complete(state, uniforms).movedim(0, -2), None
        completed, explained = tilted_completions(self.model.kernel(state, now), eta, uniforms)
        return completed.movedim(0, -2), explained

    def _uniforms(self, state: Any) -> torch.Tensor:
        """The random numbers of the particles, drawn when they are first wanted."""
        name, x = f"{self.key}_uniforms", state["x"]
        if name not in state:
            shape = (*x.shape[:-1], self.completions, x.shape[-1])
            state[name] = draw_uniforms(shape, x.device, self.key)
        found: torch.Tensor = state[name]
        return found


def check_tilted(model: Any, purpose: str) -> None:
    """
    Refuses models without a terminal potential.

    :param model: The model.
    :param str purpose: What the potential is for, such as ``"look ahead to"``.
    :raises ValueError: If it has no ``terminal``, or only that of a diffusion model, which is
        empty.
    """
    terminal = getattr(model, "terminal", None)
    if terminal is None:
        raise ValueError(
            f"{type(model).__name__} has no method `terminal`, so there is nothing to {purpose}. "
            "Wrap it: RewardTilted(model, reward)."
        )
    if str(getattr(terminal, "__module__", "")).startswith("pyro_twist.diffusion"):
        raise ValueError(
            f"{type(model).__name__} has no reward or other terminal potential, so there is "
            f"nothing to {purpose}. Wrap it: RewardTilted(model, reward)."
        )


def _check_under(under: Any, model: Any) -> None:
    if not callable(getattr(under, "eta", None)):
        raise ValueError(
            f"under={under if isinstance(under, (int, float, str)) else type(under).__name__} has "
            "no method `eta(t)`, the tilt of tokens at a time; give a TokenTilt or TokenSurrogate "
            "that is also a part of the sum"
        )
    if getattr(under, "value", False):
        raise ValueError(
            f"under={type(under).__name__} has value=True, but the look-ahead counts its value as "
            "well; make it with value=False"
        )
    sizes = [getattr(one, "vocab_size", None) for one in (getattr(under, "model", None), model)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"under={type(under).__name__} is for a model of {sizes[0]} tokens, this one has "
            f"{sizes[1]}; make it for the same model"
        )


def _check_schedule(schedule: Any, every: int, timesteps: tuple[int, ...]) -> frozenset[int]:
    if schedule is None:
        return frozenset(timesteps[::every])
    if isinstance(schedule, str) or not isinstance(schedule, Collection) or not len(schedule):
        raise ValueError(
            f"schedule={schedule!r}; give a collection of at least one state to look ahead at, "
            f"from {timesteps[0]} (the initial state) to {timesteps[-1]}. To look at none, leave "
            "the look-ahead out."
        )
    if every != 1:
        raise ValueError(f"every={every} and schedule={schedule!r} are alternatives; give one")
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
    return torch.where(value == -math.inf, _below(best, floor), value)


def _below(best: torch.Tensor, floor: float) -> torch.Tensor:
    """What stands for minus infinity: no value that a reward of whole numbers would have."""
    return torch.nextafter(best - floor, best.new_full((), -math.inf))
