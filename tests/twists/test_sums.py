# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Sums of learned families: each keeps its dtype, its prior and its place."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from pyro_twist.diffusion import GaussianDenoiser, GaussianDiffusion
from pyro_twist.infer import TrustRegionTwist
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import (
    CalibratedLookahead,
    DiscountedLookahead,
    LinearTwist,
    LookaheadTwist,
    NeuralTwist,
    QuadraticTwist,
    ShiftTwist,
    SurrogateTwist,
)
from tests.oracles import LinearGaussianChain

FAMILIES: dict[str, Any] = {
    "calibrated": CalibratedLookahead,
    "discounted": lambda model: DiscountedLookahead(model, key="discounted"),
    "surrogate": lambda model: SurrogateTwist(model, surrogate="linear"),
    "shift": ShiftTwist,
    "quadratic": QuadraticTwist,
    "neural": lambda model: NeuralTwist(model, hidden=4),
}


def make_model() -> Any:
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    denoiser = GaussianDenoiser(torch.tensor([0.7, -0.4]), torch.tensor([0.5, 1.5]), scheduler)
    diffusion = GaussianDiffusion(denoiser, scheduler, (2,), num_inference_steps=5)
    return RewardTilted(diffusion, lambda x: x.sum(-1), decode=False)


@pytest.mark.parametrize("first, second", list(combinations(FAMILIES, 2)))
def test_every_pair_is_fitted_twice(first: str, second: str) -> None:
    model = make_model()
    twist = FAMILIES[first](model) + FAMILIES[second](model)
    if {first, second}.isdisjoint({"calibrated", "discounted"}):
        twist = LookaheadTwist(model) + twist
    dtypes = {name: value.dtype for name, value in twist.named_parameters()}
    smc = TrustRegionTwist(model, twist, 8, num_iterations=2, seed=0)
    assert torch.isfinite(smc.run().log_weights).all()
    assert {name: value.dtype for name, value in twist.named_parameters()} == dtypes


class Along(LinearTwist):
    """Along the mean of the kernel it is given."""

    def features(self, name: str, prior: Any) -> torch.Tensor | None:
        return prior.mean[None] if self.stepping else None


class Up(LinearTwist):
    """Upwards, at every step alike."""

    def features(self, name: str, prior: Any) -> torch.Tensor | None:
        return torch.ones_like(prior.mean)[None] if self.stepping else None


@pytest.mark.parametrize("order", [(Up, Along), (Along, Up)])
def test_features_are_those_of_the_models_kernel(order: tuple[type, type]) -> None:
    """In either order, while sampling as while fitting."""
    chain = LinearGaussianChain(3, dim=2)
    twist = sum([kind(chain, 1) for kind in order], start=0)  # type: ignore[arg-type, call-overload]
    with torch.no_grad():
        for part, value in zip(twist.parts(), (0.3, 0.2), strict=True):
            part.theta.fill_(value if order[0] is Up else 0.5 - value)
    state: dict[str, Any] = {}
    chain.init(state)
    prior = chain.kernel(state, 3)
    twist.args_kwargs, twist.stepping = ((state, 3), {}), True
    found = twist.get_posterior("x_2", prior).mean
    variance = prior.variance
    assert torch.allclose(found, prior.mean + variance * (0.3 + 0.2 * prior.mean))
    assert all(part.base_kernel is None for part in twist.parts())


def test_a_ridge_holds_beside_other_families() -> None:
    chain = LinearGaussianChain(4, k=1.5, dim=2)
    stiff, free = ShiftTwist(chain, ridge=1e6), QuadraticTwist(chain)
    TrustRegionTwist(chain, stiff + free, 64, seed=0).fit(1)
    assert stiff.theta.abs().max() < 1e-3


def test_gains_that_are_not_fitted_stay_beside_other_families() -> None:
    model = make_model()
    fixed = SurrogateTwist(model, surrogate="linear", gain=1.0, fitted=False)
    twist = LookaheadTwist(model) + fixed + ShiftTwist(model)
    TrustRegionTwist(model, twist, 16, num_iterations=2, seed=0).run()
    assert (fixed.theta == 1.0).all()
