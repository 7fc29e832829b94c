# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Kernels of the variance-preserving schedulers: DDPM, DDIM, LCM and TCD."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_twist.diffusion.forward import eps_from, prediction_type, x0_from
from pyro_twist.diffusion.kernels import GaussianSchedule, GaussianStep

__all__ = ["ddim", "ddpm", "lcm", "noise_weight", "tcd"]

# What is left of a variance of zero after diffusers' own clamp.
_CLAMPED_VARIANCE = 1e-20

_DDPM_VARIANCES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
)


def ddpm(scheduler: Any, eta: float | None) -> GaussianSchedule:
    """The posterior given the prediction, from each timestep to the next of the list."""
    timesteps = _integer_timesteps(scheduler)
    kind = scheduler.variance_type
    if kind not in _DDPM_VARIANCES:
        raise ValueError(f"variance_type '{kind}' is not one of {', '.join(_DDPM_VARIANCES)}")
    following = timesteps[1:] + [-1]
    steps = [_ddpm_step(scheduler, t, p) for t, p in zip(timesteps, following, strict=True)]
    learned = kind if kind in ("learned", "learned_range") else None
    return GaussianSchedule(
        steps=tuple(steps), clip=_make_clip(scheduler), learned_variance=learned
    )


def _ddpm_step(scheduler: Any, timestep: int, previous: int) -> GaussianStep:
    bar = scheduler.alphas_cumprod[timestep]
    bar_previous = scheduler.alphas_cumprod[previous] if previous >= 0 else torch.ones_like(bar)
    alpha = bar / bar_previous
    beta = 1 - alpha
    small = torch.clamp((1 - bar_previous) / (1 - bar) * beta, min=_CLAMPED_VARIANCE)
    return GaussianStep(
        **_forward(scheduler, timestep),
        x0_coef=float(bar_previous**0.5 * beta / (1 - bar)),
        x_coef=float(alpha**0.5 * (1 - bar_previous) / (1 - bar)),
        std=_ddpm_std(scheduler.variance_type, small, beta) if timestep > 0 else 0.0,
        log_variance_range=(float(small.log()), float(beta.log())),
    )


def _ddpm_std(kind: str, small: Tensor, large: Tensor) -> float:
    """
    The fixed standard deviation, and 1 as a mark that a learned one is used.

    ``fixed_large_log`` means the variance ``beta``, stored as a logarithm. diffusers' own ``step``
    takes the square root of that negative logarithm and returns NaN; here it is exponentiated.
    """
    if kind in ("learned", "learned_range"):
        return 1.0
    variance = small if kind.startswith("fixed_small") else large
    return float(variance**0.5) if variance > _CLAMPED_VARIANCE else 0.0


def ddim(scheduler: Any, eta: float | None) -> GaussianSchedule:
    """Each step goes back by a fixed stride, even where the list of timesteps does not."""
    eta = 1.0 if eta is None else eta
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    timesteps = _integer_timesteps(scheduler)
    steps = [_ddim_step(scheduler, t, t - stride, eta) for t in timesteps]
    return GaussianSchedule(steps=tuple(steps), clip=_make_clip(scheduler))


def _ddim_step(scheduler: Any, timestep: int, previous: int, eta: float) -> GaussianStep:
    bars = scheduler.alphas_cumprod
    bar = bars[timestep]
    bar_previous = bars[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    variance = (1 - bar_previous) / (1 - bar) * (1 - bar / bar_previous)
    std = eta * variance**0.5
    return GaussianStep(
        **_forward(scheduler, timestep),
        x0_coef=float(bar_previous**0.5),
        eps_coef=noise_weight(float(1 - bar_previous - std**2), eta),
        std=float(std),
    )


def lcm(scheduler: Any, eta: float | None) -> GaussianSchedule:
    """The consistency prediction, noised to the next timestep."""
    timesteps = _integer_timesteps(scheduler)
    steps = []
    for index, timestep in enumerate(timesteps):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        final = index + 1 == len(timesteps)
        bar = torch.tensor(1.0) if final else scheduler.alphas_cumprod[timesteps[index + 1]]
        steps.append(
            GaussianStep(
                **_forward(scheduler, timestep),
                boundary=(float(out), float(skip)),
                x0_coef=float(bar**0.5),
                std=float((1 - bar) ** 0.5),
            )
        )
    return GaussianSchedule(steps=tuple(steps), clip=_make_clip(scheduler))


def tcd(scheduler: Any, eta: float | None) -> GaussianSchedule:
    """A deterministic step past the next timestep, then noise back up to it."""
    gamma = 0.3 if eta is None else eta
    if gamma > 1:
        raise ValueError(f"eta={gamma}: TCD's gamma is in (0, 1]")
    timesteps = _integer_timesteps(scheduler)
    following = timesteps[1:] + [0]
    steps = [_tcd_step(scheduler, t, p, gamma) for t, p in zip(timesteps, following, strict=True)]
    steps[-1] = replace(steps[-1], std=0.0)
    return GaussianSchedule(steps=tuple(steps))


def _tcd_step(scheduler: Any, timestep: int, previous: int, gamma: float) -> GaussianStep:
    bar_previous = scheduler.alphas_cumprod[previous]
    between = int(torch.floor((1 - gamma) * torch.tensor(previous)))
    bar = scheduler.alphas_cumprod[between]
    ratio = bar_previous / bar
    return GaussianStep(
        **_forward(scheduler, timestep),
        x0_coef=float(ratio.sqrt() * bar.sqrt()),
        eps_coef=float(ratio.sqrt() * (1 - bar).sqrt()),
        std=float((1 - ratio).sqrt()),
    )


def noise_weight(remainder: float, eta: float) -> float:
    """The square root of the variance left to the predicted noise, zero up to rounding."""
    if remainder < -1e-6:
        raise ValueError(f"eta={eta} asks for more noise than the process has; use eta <= 1")
    return math.sqrt(max(remainder, 0.0))


def _forward(scheduler: Any, timestep: int) -> dict[str, Any]:
    """The entries of a :class:`GaussianStep` that follow from the variance-preserving process."""
    bar = scheduler.alphas_cumprod[timestep]
    alpha, sigma = float(bar**0.5), float((1 - bar) ** 0.5)
    kind = prediction_type(scheduler)
    return dict(
        timestep=timestep,
        alpha=alpha,
        sigma=sigma,
        x0_from=x0_from(kind, alpha, sigma),
        eps_from=eps_from(kind, alpha, sigma),
    )


def _integer_timesteps(scheduler: Any) -> list[int]:
    """The scheduler's timesteps, checked against its table of noise levels."""
    timesteps = [int(t) for t in scheduler.timesteps]
    total = len(scheduler.alphas_cumprod)
    if not all(0 <= t < total for t in timesteps):
        raise ValueError(
            f"{type(scheduler).__name__} has timesteps from {timesteps[0]} to {timesteps[-1]}, "
            f"outside 0..{total - 1}; lower num_inference_steps or steps_offset"
        )
    return timesteps


def _make_clip(scheduler: Any) -> Callable[[Tensor], Tensor] | None:
    """How the scheduler bounds its prediction of x_0, if it does; thresholding comes first."""
    config = scheduler.config
    if config.thresholding:
        ratio, largest = config.dynamic_thresholding_ratio, config.sample_max_value
        return lambda x0: _threshold(x0, ratio, largest)
    if config.clip_sample:
        bound = float(config.clip_sample_range)
        return lambda x0: x0.clamp(-bound, bound)
    return None


def _threshold(x0: Tensor, ratio: float, largest: float) -> Tensor:
    """
    Dynamic thresholding (C. Saharia et al. 2022, https://arxiv.org/abs/2205.11487, section 2.3).

    :param Tensor x0: Predictions of shape ``(rows,) + event_shape``.
    """
    size = torch.quantile(x0.flatten(1).abs(), ratio, dim=1).clamp(1, largest)
    size = size.reshape((-1,) + (1,) * (x0.dim() - 1))
    return torch.minimum(torch.maximum(x0, -size), size) / size
