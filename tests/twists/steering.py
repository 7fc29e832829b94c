# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Models that can be steered by gradients, with their tilted laws."""

from __future__ import annotations

import math
from typing import Any

import torch

from pyro_twist.diffusion import GaussianDiffusion
from pyro_twist.infer import TwistedSMC
from pyro_twist.rewards import RewardTilted
from tests.oracles import LinearGaussianChain
from tests.statistics import assert_unbiased
from tests.twists.gaussian import chain_law, gaussian

REPLICATES = 300
PLATE = ("replicates", REPLICATES)
SLOPE = 0.6
CURVATURES = {"linear": 0.0, "quadratic": 0.8}


def linear(x: torch.Tensor) -> torch.Tensor:
    return (SLOPE * x).sum(-1)


def quadratic(x: torch.Tensor) -> torch.Tensor:
    return (SLOPE * x - 0.5 * CURVATURES["quadratic"] * x**2).sum(-1)


REWARDS = {"linear": linear, "quadratic": quadratic}


def vectors(reward: str = "quadratic", steps: int = 5, **options: Any) -> RewardTilted:
    """Vectors of Gaussian data, tilted by a reward."""
    covariance = torch.tensor([[0.5, 0.2], [0.2, 1.5]])
    base = gaussian((2,), covariance, steps=steps, **{"plate": PLATE, **options})
    return RewardTilted(base, REWARDS[reward], decode=False)


def tilted_law(model: RewardTilted, reward: str) -> tuple[float, torch.Tensor]:
    """Log-normaliser and mean of ``x_0``, by a Gaussian integral."""
    mean, covariance = chain_law(model.model)
    return gaussian_integral(mean, covariance, CURVATURES[reward])


def gaussian_integral(
    mean: torch.Tensor, covariance: torch.Tensor, curvature: float
) -> tuple[float, torch.Tensor]:
    precision = torch.linalg.inv(covariance)
    tilted = precision + curvature * torch.eye(len(mean)).double()
    vector = precision @ mean + SLOPE
    new_mean = torch.linalg.solve(tilted, vector)
    exponent = vector @ new_mean - mean @ precision @ mean
    return float(0.5 * (exponent - torch.logdet(tilted @ covariance))), new_mean


def sampled(model: Any, twist: Any, particles: int = 8, **options: Any) -> Any:
    smc = TwistedSMC(
        model, twist, particles, 1, population_plate=PLATE[0], **{"seed": 0, **options}
    )
    return smc.run()


def check(result: Any, log_z: float, mean: torch.Tensor) -> None:
    """
    ``Z_hat``, and ``Z_hat`` times the self-normalised mean, are unbiased.

    z-tests at 1e-6 for each of at most three numbers.
    """
    assert_unbiased(result.log_normalizer, log_z)
    ratio = (result.log_normalizer - log_z).exp()[:, None]
    products = ratio * (result.expectation("x") - mean)
    error = products.std(0) / math.sqrt(len(products))
    assert (error < 0.1).all(), "the test is blunt"
    assert (products.mean(0).abs() < 4.9 * error).all()


class Chain(LinearGaussianChain):
    """A :class:`~tests.oracles.LinearGaussianChain` of vectors that keeps graphs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"dim": 2, **options})
        self.keep_graph = False

    def write(self, state: Any, x: torch.Tensor, t: int) -> None:
        with torch.set_grad_enabled(self.keep_graph and t > 0):
            x = x.detach().requires_grad_(self.keep_graph and t > 0)
            super().write(state, x, t)


def diffusion_of(model: RewardTilted) -> GaussianDiffusion:
    inner = model.model
    assert isinstance(inner, GaussianDiffusion)
    return inner
