# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Diffusion models of Gaussian pictures, for which everything a learned twist finds is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from scipy.fft import idctn

from pyro_twist.diffusion import GaussianDenoiser, GaussianDiffusion
from pyro_twist.infer import TrustRegionTwist
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import LookaheadTwist
from pyro_twist.twists.paths import Pass

SIZE = 4


def cosines(size: int = SIZE) -> torch.Tensor:
    """The orthonormal cosines over a square, one picture per row, by SciPy."""
    units = np.eye(size * size).reshape(-1, size, size)
    return torch.from_numpy(np.stack([idctn(unit, norm="ortho") for unit in units]).copy())


def radii(size: int = SIZE) -> torch.Tensor:
    """The rounded radial frequency of each of them."""
    k = torch.arange(size).double()
    return (k[:, None].square() + k.square()).sqrt().round().long().flatten()


def picture_covariance(by_band: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """Of pictures of one channel, with a variance for every rounded radial frequency."""
    basis = cosines(size).reshape(size * size, -1)
    return basis.T @ (by_band.double()[radii(size)][:, None] * basis)


def gaussian(
    event_shape: tuple[int, ...],
    covariance: torch.Tensor,
    mean: float = 0.3,
    steps: int = 8,
    **options: Any,
) -> GaussianDiffusion:
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    denoiser = GaussianDenoiser(torch.full(event_shape, mean), covariance, scheduler)
    return GaussianDiffusion(denoiser, scheduler, event_shape, num_inference_steps=steps, **options)


def chain_law(model: GaussianDiffusion) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of x_0, by passing a basis through the affine kernels."""
    size = model.event_shape.numel()
    points = torch.cat([torch.zeros(1, size), torch.eye(size)]).reshape(-1, *model.event_shape)
    mean, covariance = torch.zeros(size).double(), torch.eye(size).double()
    for t in model.timesteps:
        state = {"x": points}
        model._write(state, t, points)
        kernel = model.kernel(state, t)
        values = kernel.mean.reshape(size + 1, size).double()
        matrix = values[1:] - values[0]
        noise = kernel.variance.reshape(size + 1, size)[0].double().diag()
        mean, covariance = values[0] + mean @ matrix, matrix.T @ covariance @ matrix + noise
    return mean, covariance


def tilted(
    model: GaussianDiffusion, reward: Callable[[torch.Tensor], torch.Tensor], scale: float = 1.0
) -> RewardTilted:
    return RewardTilted(model, reward, scale, decode=False)


def one_pass(model: Any, guide: Any = None, particles: int = 64, **options: Any) -> Pass:
    """A pass of plain look-ahead with what the guide reads, recorded."""
    from pyro_twist.twists import SurrogateTwist

    guide = LookaheadTwist(model) + SurrogateTwist(model) if guide is None else guide
    smc = TrustRegionTwist(model, guide, particles, seed=0, progress=False, **options)
    smc.sample()
    return smc.passes[0]


def without_after(one: Pass) -> Pass:
    """As if nothing had been recorded after the steps."""
    return replace(one, steps=[[replace(s, after={}) for s in sites] for sites in one.steps])
