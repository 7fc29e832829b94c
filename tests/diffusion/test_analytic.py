# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Analytic denoisers against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from pyro_twist.diffusion import GaussianDenoiser, GaussianMixtureDenoiser

WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -2.0]], dtype=torch.float64)
FULL = torch.tensor(
    [[[0.3, 0.1], [0.1, 0.2]], [[0.5, -0.3], [-0.3, 0.4]], [[0.1, 0.0], [0.0, 0.6]]],
    dtype=torch.float64,
)
DIAGONAL = FULL.diagonal(dim1=1, dim2=2)
SCALAR = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)


def by_quadrature(x: Tensor, alpha: float, sigma: float, covariances: Tensor) -> tuple[Any, Any]:
    """Posterior mean of x_0 and log-density of x on a grid fine enough for 1e-6."""
    axis = torch.linspace(-7, 7, 561, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    prior = torch.stack(
        [
            torch.distributions.MultivariateNormal(m, c).log_prob(grid)
            for m, c in zip(MEANS, covariances, strict=True)
        ]
    )
    log_prior = (prior + WEIGHTS.log()[:, None]).logsumexp(0)
    likelihood = torch.distributions.Normal(alpha * grid, sigma).log_prob(x).sum(-1)
    joint = log_prior + likelihood
    cell = 2 * float((axis[1] - axis[0]).log())
    return (joint.softmax(0)[:, None] * grid).sum(0), joint.logsumexp(0) + cell


def covariances_of(variances: Tensor) -> Tensor:
    if variances.dim() == 3:
        return variances
    diagonal = variances if variances.dim() == 2 else variances[:, None].expand(3, 2)
    return torch.diag_embed(diagonal)


@pytest.mark.parametrize("timestep", [100, 400, 950])
@pytest.mark.parametrize("variances", [FULL, DIAGONAL, SCALAR], ids=["full", "diagonal", "scalar"])
def test_mixture_against_quadrature(variances: Tensor, timestep: int) -> None:
    scheduler = DDPMScheduler(prediction_type="sample")
    denoiser = GaussianMixtureDenoiser(WEIGHTS, MEANS, variances, scheduler)
    bar = float(scheduler.alphas_cumprod[timestep])
    x = torch.tensor([[0.3, -0.4], [-1.2, 1.0]], dtype=torch.float64)
    found = denoiser(x, torch.full((2,), timestep))
    density = denoiser.log_prob(x, torch.tensor(timestep))
    for row in range(2):
        mean, log_prob = by_quadrature(
            x[row], bar**0.5, (1 - bar) ** 0.5, covariances_of(variances)
        )
        assert torch.allclose(found[row], mean, atol=1e-6)
        assert torch.allclose(density[row], log_prob, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_prediction_types_agree(prediction: str) -> None:
    x, timestep = torch.randn(5, 2), torch.tensor([10, 200, 400, 600, 990])
    arguments = (WEIGHTS, MEANS, FULL)
    expected = GaussianMixtureDenoiser(*arguments, DDPMScheduler(prediction_type="sample"))
    scheduler = DDPMScheduler(prediction_type=prediction)
    output = GaussianMixtureDenoiser(*arguments, scheduler)(x, timestep)
    bar = scheduler.alphas_cumprod[timestep][:, None]
    if prediction == "epsilon":
        x0 = (x - (1 - bar) ** 0.5 * output) / bar**0.5
    else:
        x0 = bar**0.5 * x - (1 - bar) ** 0.5 * output
    assert torch.allclose(x0, expected(x, timestep), atol=1e-3)


def test_velocity() -> None:
    denoiser = GaussianDenoiser(torch.tensor([1.0]), 0.5, FlowMatchEulerDiscreteScheduler())
    x, sigma = torch.tensor([[0.4]]), 0.25
    gain = (1 - sigma) * 0.5 / ((1 - sigma) ** 2 * 0.5 + sigma**2)
    x0 = 1.0 + gain * (x - (1 - sigma))
    expected = (x - (1 - sigma) * x0) / sigma - x0
    assert torch.allclose(denoiser(x, torch.tensor([250.0])), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_fractional_timesteps_interpolate_as_the_scheduler_does() -> None:
    scheduler = EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(7)
    level = GaussianDenoiser(torch.zeros(1), 1.0, scheduler).noise_level
    alpha, sigma = level(scheduler.timesteps)
    assert torch.allclose((sigma / alpha).float(), scheduler.sigmas[:-1], rtol=1e-5)
    assert torch.allclose(alpha**2 + sigma**2, torch.tensor(1.0, dtype=torch.float64))


def test_gaussian_is_a_mixture_of_one() -> None:
    scheduler = DDPMScheduler()
    x, timestep = torch.randn(4, 3, 2, 2), torch.tensor([5, 50, 500, 900])
    mean, variance = torch.randn(3, 2, 2), torch.rand(3, 2, 2) + 0.1
    one = GaussianDenoiser(mean, variance, scheduler)(x, timestep)
    full = GaussianDenoiser(mean, torch.diag(variance.reshape(-1)), scheduler)(x, timestep)
    twice = GaussianMixtureDenoiser(
        torch.ones(2), torch.stack([mean, mean]), torch.stack([variance, variance]), scheduler
    )(x, timestep)
    assert one.shape == x.shape and one.dtype == torch.float32
    assert torch.allclose(one, full, atol=1e-4)
    assert torch.allclose(one, twice, atol=1e-4)


def test_a_point_mass_is_predicted_exactly() -> None:
    denoiser = GaussianDenoiser(torch.tensor([0.7]), 0.0, DDPMScheduler(prediction_type="sample"))
    assert torch.allclose(denoiser(torch.randn(3, 1), torch.tensor(300)), torch.tensor(0.7))


@pytest.mark.parametrize(
    "weights, variances, message",
    [
        (torch.ones(2), 1.0, "weights of shape \\(2,\\)"),
        (-torch.ones(3), 1.0, "non-negative"),
        (torch.ones(3), torch.ones(2), "variances have shape \\(2,\\)"),
        (torch.ones(3), -1.0, "positive semi-definite"),
    ],
)
def test_bad_arguments(weights: Tensor, variances: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixtureDenoiser(weights, MEANS, variances, DDPMScheduler())
