# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Kernels of EulerAncestral, in the variance-exploding scale of the scheduler."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pyro_twist.diffusion.forward import prediction_type
from pyro_twist.diffusion.kernels import GaussianSchedule, GaussianStep

__all__ = ["euler_ancestral"]


def euler_ancestral(scheduler: Any, eta: float | None) -> GaussianSchedule:
    """An Euler step below the next noise level, then noise back up to it."""
    kind = prediction_type(scheduler)
    if kind == "sample":
        raise ValueError(
            "prediction_type 'sample' is not defined for EulerAncestralDiscreteScheduler; use "
            "DDIMScheduler or DDPMScheduler"
        )
    sigmas, timesteps = scheduler.sigmas, [float(t) for t in scheduler.timesteps]
    steps = [
        _euler_ancestral_step(kind, timestep, sigma, lower)
        for timestep, sigma, lower in zip(timesteps, sigmas[:-1], sigmas[1:], strict=True)
    ]
    return GaussianSchedule(steps=tuple(steps), init_std=float(scheduler.init_noise_sigma))


def _euler_ancestral_step(kind: str, timestep: float, sigma: Tensor, lower: Tensor) -> GaussianStep:
    up = (lower**2 * (sigma**2 - lower**2) / sigma**2) ** 0.5
    down = float((lower**2 - up**2) ** 0.5)
    level = float(sigma)
    scale = 1 / math.sqrt(level**2 + 1)
    by_v = kind == "v_prediction"
    return GaussianStep(
        timestep=timestep,
        alpha=1.0,
        sigma=level,
        x0_from=(scale**2, -level * scale) if by_v else (1.0, -level),
        eps_from=(level * scale**2, scale) if by_v else (0.0, 1.0),
        x0_coef=1 - down / level,
        x_coef=down / level,
        std=float(up),
        input_scale=scale,
    )
