# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The forward process of a diffusers scheduler, and what its network predicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["eps_from", "is_flow_matching", "noise_level", "prediction_type", "x0_from"]


def is_flow_matching(scheduler: Any) -> bool:
    """Whether the scheduler's network predicts a velocity along straight paths."""
    return any(cls.__name__.startswith("FlowMatch") for cls in type(scheduler).__mro__)


def prediction_type(scheduler: Any) -> str:
    """
    What the scheduler takes its network to predict.

    :param scheduler: A diffusers scheduler.
    :returns: ``"epsilon"``, ``"sample"``, ``"v_prediction"`` or ``"velocity"`` (flow matching).
    :rtype: str
    :raises ValueError: For any other prediction type.
    """
    if is_flow_matching(scheduler):
        return "velocity"
    kind = str(scheduler.config.prediction_type)
    if kind not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"prediction_type '{kind}' of {type(scheduler).__name__} is not one of 'epsilon', "
            "'sample', 'v_prediction'"
        )
    return kind


def noise_level(scheduler: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    r"""
    The forward process as the network sees it: a function from timesteps to :math:`(\alpha,
    \sigma)` such that the network's input is :math:`\alpha x_0 + \sigma \epsilon`.

    :param scheduler: A diffusers scheduler.
    :returns: A function of a tensor of timesteps of any shape that returns two float64 tensors of
        that shape. Fractional timesteps interpolate :math:`\sigma / \alpha`, as schedulers do.
    """
    if is_flow_matching(scheduler):
        return partial(_linear_level, scheduler.config.num_train_timesteps)
    bars = scheduler.alphas_cumprod.double()
    return partial(_table_level, bars, ((1 - bars) / bars).sqrt())


# functions of the module, so that what holds them can be pickled
def _linear_level(total: int, timestep: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - timestep.double() / total, timestep.double() / total


def _table_level(bars: Tensor, ratios: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    time = timestep.double()
    low, high = time.floor().long(), time.ceil().long()
    table, ratio = bars.to(time.device), ratios.to(time.device)
    between = torch.lerp(ratio[low], ratio[high], time - low)
    bar = torch.where(low == high, table[low], 1 / (1 + between**2))
    return bar.sqrt(), (1 - bar).sqrt()


def x0_from(kind: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Coefficients of the state and of the network's output in the prediction of x_0."""
    if kind == "epsilon":
        return (1 / alpha, -sigma / alpha) if alpha else (math.inf, -math.inf)
    if kind == "sample":
        return 0.0, 1.0
    return (alpha, -sigma) if kind == "v_prediction" else (1.0, -sigma)


def eps_from(kind: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Coefficients of the state and of the network's output in the predicted noise."""
    if kind == "epsilon":
        return 0.0, 1.0
    if kind == "sample":
        return (1 / sigma, -alpha / sigma) if sigma else (math.inf, -math.inf)
    return (sigma, alpha) if kind == "v_prediction" else (1.0, alpha)
