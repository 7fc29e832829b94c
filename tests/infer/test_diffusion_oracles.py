# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The whole stack, scheduler to evidence, where the tilted law is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from pyro_twist.diffusion import GaussianDenoiser, GaussianDiffusion, GaussianMixtureDenoiser
from pyro_twist.infer import ImportanceSampling, TwistedSMC
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import LookaheadTwist
from tests.statistics import assert_unbiased

REPLICATES = 600
CURVATURE, SLOPE = 0.8, 0.6


def quadratic(x: torch.Tensor) -> torch.Tensor:
    """A concave reward of vectors, for which a tilted Gaussian is a Gaussian."""
    return (SLOPE * x - 0.5 * CURVATURE * x**2).sum(-1)


def tilted_gaussian(mean: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
    """Log-normaliser, mean and variance of independent Gaussians under the reward."""
    new_variance = 1 / (1 / variance + CURVATURE)
    new_mean = new_variance * (mean / variance + SLOPE)
    log_z = 0.5 * (
        (new_variance / variance).log() + new_mean**2 / new_variance - mean**2 / variance
    )
    return log_z.sum(-1), new_mean, new_variance


def chain_law(model: GaussianDiffusion) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of x_0, by passing two points through the affine kernels."""
    points = torch.stack([torch.zeros(model.event_shape), torch.ones(model.event_shape)])
    mean, variance = torch.zeros(model.event_shape), torch.ones(model.event_shape)
    for t in model.timesteps:
        state = {"x": points}
        model._write(state, t, points)
        kernel = model.kernel(state, t)
        values = kernel.mean
        offset, factor = values[0], values[1] - values[0]
        mean, variance = offset + factor * mean, factor**2 * variance + kernel.variance[0]
    return mean.double(), variance.double()


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("looking", [False, True])
def test_gaussian_data(kind: Any, looking: bool) -> None:
    """Linear kernels: the law of the coarse chain itself is known, discretisation included."""
    scheduler = kind(clip_sample=False, timestep_spacing="trailing")
    mean, variance = torch.tensor([0.7, -0.4]), torch.tensor([0.5, 1.5])
    denoiser = GaussianDenoiser(mean, variance, scheduler)
    diffusion = GaussianDiffusion(
        denoiser, scheduler, (2,), num_inference_steps=8, plate=("replicates", REPLICATES)
    )
    exact, tilted_mean, _ = tilted_gaussian(*chain_law(diffusion))
    model = RewardTilted(diffusion, quadratic, decode=False)
    guide = LookaheadTwist(model) if looking else None
    smc = TwistedSMC(model, guide, 32, 1, population_plate="replicates", seed=0)
    result = smc.run()
    assert_unbiased(result.log_normalizer, float(exact))
    # the product of Z and the mean is unbiased: z-test, rate 1e-6 for each coordinate
    ratio = (result.log_normalizer - exact).exp()[:, None]
    products = ratio * (result.expectation("x") - tilted_mean)
    z = products.mean(0) / (products.std(0) / math.sqrt(REPLICATES))
    assert (z.abs() < 4.9).all()


@pytest.mark.parametrize("method", ["importance", "look-ahead"])
def test_gaussian_mixture(method: str) -> None:
    """
    Against the closed form of the tilted mixture, whose discretisation gap at 200 steps is small.

    Log Z within 0.1, the mean within 0.08, weights of the modes within 0.08; the spread of 6,000
    particles is a fifth of that or less.
    """
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]])
    weights, variances = torch.tensor([0.5, 0.3, 0.2]), torch.full((3, 2), 0.09)
    denoiser = GaussianMixtureDenoiser(weights, means, variances, scheduler)
    diffusion = GaussianDiffusion(denoiser, scheduler, (2,), num_inference_steps=200)
    model = RewardTilted(diffusion, quadratic, decode=False)
    log_z, mode_means, _ = tilted_gaussian(means.double(), variances.double())
    exact = (weights.double().log() + log_z).logsumexp(0)
    mode_weights = (weights.double().log() + log_z).softmax(0)
    if method == "importance":
        result = ImportanceSampling(model, 6000, seed=0).run()
    else:
        result = TwistedSMC(model, LookaheadTwist(model, every=20), 6000, seed=0).run()
    assert result.log_normalizer.item() == pytest.approx(exact.item(), abs=0.1)
    mean = (mode_weights[:, None] * mode_means).sum(0)
    assert torch.allclose(result.expectation("x"), mean, atol=0.08)
    nearest = torch.cdist(result.state["x"].double(), means.double()).argmin(-1)
    shares = [result.expectation(lambda state, k=k: (nearest == k).double()) for k in range(3)]
    assert torch.allclose(torch.stack(shares), mode_weights, atol=0.08)
    assert result.counts == {"denoiser": 200 * 6000, "reward": result.counts["reward"]}


def test_base_law_without_reward_is_the_scheduler_loop() -> None:
    """Scale zero: the same draws as a bare loop over the kernels, and log Z exactly zero."""
    scheduler = DDPMScheduler(clip_sample=False)
    denoiser = GaussianDenoiser(torch.zeros(3), torch.ones(3), scheduler)
    diffusion = GaussianDiffusion(denoiser, scheduler, (3,), num_inference_steps=10)
    model = RewardTilted(diffusion, quadratic, scale=0.0, decode=False)
    torch.manual_seed(5)
    state: dict[str, torch.Tensor] = {}
    diffusion._write(state, 10, torch.randn(7, 3))
    for t in diffusion.timesteps:
        kernel = diffusion.kernel(state, t)
        diffusion._write(state, t - 1, kernel.rsample() if t > 1 else kernel.mean)
    torch.manual_seed(5)
    result = TwistedSMC(model, LookaheadTwist(model), 7, ess_threshold=1.0).run()
    assert torch.allclose(result.state["x"], state["x"], atol=1e-6)
    assert result.log_normalizer.item() == 0.0
