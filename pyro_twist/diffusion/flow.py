# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Kernels of flow matching: the marginal-preserving process, and the schedulers' own noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pyro_twist.diffusion.forward import eps_from, x0_from
from pyro_twist.diffusion.kernels import GaussianSchedule, GaussianStep
from pyro_twist.diffusion.vp import noise_weight

__all__ = ["flow_euler", "flow_lcm"]


def flow_euler(scheduler: Any, eta: float | None) -> GaussianSchedule:
    """The marginal-preserving process, unless the scheduler brings its own noise."""
    if scheduler.config.stochastic_sampling:
        if eta is not None:
            raise ValueError(
                f"eta={eta}: FlowMatchEulerDiscreteScheduler with stochastic_sampling=True has its "
                "own noise; leave eta out, or set stochastic_sampling=False"
            )
        return flow_lcm(scheduler, None)
    strength = 1.0 if eta is None else eta

    def kernel(sigma: float, lower: float) -> dict[str, Any]:
        correlation = (1 - sigma) * lower / ((1 - lower) * sigma)
        std = strength * lower * math.sqrt(1 - correlation**2)
        return dict(x0_coef=1 - lower, eps_coef=noise_weight(lower**2 - std**2, strength), std=std)

    return _flow_steps(scheduler, kernel)


def flow_lcm(scheduler: Any, eta: float | None) -> GaussianSchedule:
    """The prediction, noised to the next level."""
    if getattr(scheduler, "_scale_factors", None):
        raise ValueError(
            "FlowMatchLCMScheduler with scale_factors changes the shape of the sample between "
            "steps, which a state of fixed shape cannot hold; set scale_factors=None"
        )
    return _flow_steps(scheduler, lambda sigma, lower: dict(x0_coef=1 - lower, std=lower))


def _flow_steps(
    scheduler: Any, kernel: Callable[[float, float], dict[str, Any]]
) -> GaussianSchedule:
    sigmas = _flow_sigmas(scheduler)
    steps = [
        GaussianStep(
            timestep=float(timestep),
            alpha=1 - sigma,
            sigma=sigma,
            x0_from=x0_from("velocity", 1 - sigma, sigma),
            eps_from=eps_from("velocity", 1 - sigma, sigma),
            **kernel(sigma, lower),
        )
        for timestep, sigma, lower in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True)
    ]
    return GaussianSchedule(steps=tuple(steps))


def _flow_sigmas(scheduler: Any) -> list[float]:
    """The noise levels, checked to go down from at most 1."""
    if scheduler.config.invert_sigmas:
        raise ValueError(
            f"{type(scheduler).__name__} with invert_sigmas=True runs its noise level upwards; "
            "only the usual direction is supported"
        )
    sigmas = [float(s) for s in scheduler.sigmas]
    if sigmas[0] > 1 or any(b >= a for a, b in zip(sigmas, sigmas[1:], strict=False)):
        raise ValueError(
            f"{type(scheduler).__name__} has noise levels {sigmas[0]:.4g} ... {sigmas[-1]:.4g} "
            "that do not decrease strictly from at most 1; check shift and timestep_options"
        )
    return sigmas
