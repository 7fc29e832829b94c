# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Schedules of masked diffusion: how much is revealed when, and how much is masked again.

At time t in [0, 1] a position is revealed with probability :math:`\\alpha(t)`, 1 at the data and
about 0 at the start of sampling:

=================  ==========================================================================
``"linear"``       :math:`1 - t`
``"cosine"``       :math:`1 - \\cos(\\pi (1 - t) / 2)`: few positions at first, many at the end
``"log-linear"``   :math:`1 - 0.999 t`, the linear one as MDLM has it
a function         of the time, a number in [0, 1], to a number
=================  ==========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["MaskingSchedule", "Remasking", "check_remasking", "make_masking_schedule"]

Remasking = tuple[str, float]

_ALPHAS: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 1.0 - math.cos(0.5 * math.pi * (1.0 - t)),
    "log-linear": lambda t: 1.0 - (1.0 - 1e-3) * t,
}


@dataclass(frozen=True)
class MaskingSchedule:
    """
    The probabilities of the events of every step.

    :param tuple alphas: The share of revealed positions at each time index, from 0 to T.
    :param tuple remasked: The probability that a revealed position is masked again in the step
        from each time index; entry 0 is not used.
    """

    alphas: tuple[float, ...]
    remasked: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.alphas) - 1

    def log_stay(self, t: int) -> float:
        """The log-probability that a masked position stays masked in the step from ``t``."""
        now, later = self.alphas[t], self.alphas[t - 1]
        return _log((1.0 - later - self.remasked[t] * now) / (1.0 - now))

    def log_remask(self, t: int) -> float:
        """The log-probability that a revealed position is masked again in the step from ``t``."""
        return _log(self.remasked[t])


def make_masking_schedule(
    schedule: str | Callable[[float], float],
    num_inference_steps: int,
    remasking: Remasking | None = None,
) -> MaskingSchedule:
    """
    The schedule for a number of equal steps.

    A position that is masked again with probability :math:`\\sigma_t`, at most
    :math:`(1 - \\alpha_s) / \\alpha_t` and 1, leaves the share of revealed positions as it is [1].

    :param schedule: One of the names in :mod:`pyro_twist.diffusion.masking`, or a function.
    :param int num_inference_steps: The number of steps T.
    :param tuple remasking: ``("capped", eta)``: at most ``eta``; ``("rescaled", eta)``: the share
        ``eta`` of the greatest possible; ``None``: never.
    :returns: The schedule.
    :rtype: MaskingSchedule
    :raises ValueError: If a name is unknown, or the function does not fall from 1.

    **References**

    [1] `Remasking Discrete Diffusion Models with Inference-Time Scaling`
        Guanghan Wang, Yair Schiff, Subham Sekhar Sahoo, Volodymyr Kuleshov (2025), section 4,
        https://arxiv.org/abs/2503.00307
    """
    whole = isinstance(num_inference_steps, int) and not isinstance(num_inference_steps, bool)
    if not whole or num_inference_steps < 1:
        raise ValueError(
            f"num_inference_steps={num_inference_steps!r}; give a whole number of steps, 1 or more"
        )
    alpha = _alpha(schedule)
    alphas = [float(alpha(t / num_inference_steps)) for t in range(num_inference_steps + 1)]
    _check_alphas(alphas, schedule)
    alphas[0] = 1.0
    pairs = zip(alphas[1:], alphas[:-1], strict=True)
    remasked = [0.0] + [_remasked(now, later, remasking) for now, later in pairs]
    return MaskingSchedule(tuple(alphas), tuple(remasked))


def _alpha(schedule: str | Callable[[float], float]) -> Callable[[float], float]:
    if callable(schedule):
        return schedule
    if not isinstance(schedule, str) or schedule not in _ALPHAS:
        raise ValueError(f"schedule={schedule!r}; choose {', '.join(_ALPHAS)}, or give a function")
    return _ALPHAS[schedule]


def _check_alphas(alphas: list[float], schedule: object) -> None:
    last = len(alphas) - 1
    if not abs(alphas[0] - 1.0) < 1e-6:
        raise ValueError(
            f"schedule={schedule!r} has alpha(0) = {alphas[0]}; it must be 1, so that the last "
            "step reveals all positions"
        )
    for t, (later, now) in enumerate(zip(alphas[:-1], alphas[1:], strict=True)):
        if not now < later:
            raise ValueError(
                f"schedule={schedule!r} does not fall in t: alpha({t / last:g}) = {later:g} and "
                f"alpha({(t + 1) / last:g}) = {now:g}. It goes from 1, the data, at t = 0 to about "
                "0, all masked, at t = 1; perhaps it is the share of masks: give one minus it."
            )
    if alphas[-1] < 0.0:
        raise ValueError(f"schedule={schedule!r} has alpha(1) = {alphas[-1]:g}, which is negative")


def _remasked(now: float, later: float, remasking: Remasking | None) -> float:
    if remasking is None:
        return 0.0
    highest = min(1.0, (1.0 - later) / now) if now > 0.0 else 1.0
    kind, eta = check_remasking(remasking)
    return min(eta, highest) if kind == "capped" else eta * highest


def check_remasking(remasking: Any) -> Remasking:
    """
    The name and strength of a remasking.

    :param remasking: What was asked for.
    :raises ValueError: If it is not known, or deterministic.
    """
    if remasking == "low_confidence":
        raise ValueError(
            "low_confidence remasking picks the positions by a rule, so that copies of a particle "
            "never separate and a step has no transition density. Try unmasking='uniform', which "
            "picks them at random."
        )
    pair = isinstance(remasking, (tuple, list)) and len(remasking) == 2
    kind, eta = remasking if pair else ("", -1.0)
    if kind not in ("capped", "rescaled") or not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        raise ValueError(
            f"remasking={remasking!r}; give ('capped', eta) or ('rescaled', eta) with eta in "
            "[0, 1], or None"
        )
    return kind, eta


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0.0 else -math.inf
