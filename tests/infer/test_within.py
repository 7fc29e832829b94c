# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Twists that learn from a pass while it goes on leave its weights exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from pyro_twist.diffusion import GaussianDenoiser, GaussianDiffusion
from pyro_twist.infer import TrustRegionTwist
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import DiscountedLookahead, SurrogateTwist
from tests.infer.test_diffusion_oracles import chain_law
from tests.statistics import assert_unbiased

SLOPE = torch.tensor([0.9, -0.6, 0.3])


def make_model(num_steps: int = 6) -> Any:
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    denoiser = GaussianDenoiser(
        torch.tensor([0.7, -0.4, 0.1]), torch.tensor([0.5, 1.5, 1.0]), scheduler
    )
    diffusion = GaussianDiffusion(denoiser, scheduler, (3,), num_inference_steps=num_steps)
    return RewardTilted(diffusion, lambda x: x @ SLOPE, decode=False)


def learner(model: Any, particles: int, **options: Any) -> TrustRegionTwist:
    twist = DiscountedLookahead(model) + SurrogateTwist(model, surrogate="linear")
    settings: dict[str, Any] = {"num_iterations": 0, "seed": 0, **options}
    return TrustRegionTwist(model, twist, particles, **settings)


def pushed(smc: TrustRegionTwist) -> list[int]:
    """The time indices of the steps in which the proposal was not the model's own kernel."""
    steps = [sites[0] for sites in smc.passes[0].steps]
    return [int(step.t or 0) for step in steps if step.posterior is not step.prior]


def test_weights_are_those_of_what_was_proposed() -> None:
    """Slopes and directions change between steps; without resampling the path weight is left."""
    smc = learner(make_model(10), 8, ess_threshold=0.0)
    result = smc.run()
    assert len(pushed(smc)) >= 4
    one = smc.passes[0]
    total = one.log_terminal.clone()
    for (step,) in one.steps:
        total += step.prior.log_prob(step.value) - step.posterior.log_prob(step.value)
    assert torch.allclose(result.log_weights, total, atol=1e-4)
    assert torch.allclose(result.log_weights, one.log_path, atol=1e-9)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_the_normaliser_stays_unbiased(threshold: float) -> None:
    """Of the coarse chain itself, whose law is known; 1e-6 each."""
    model = make_model()
    mean, variance = chain_law(model.model)
    exact = float((SLOPE * mean + 0.5 * SLOPE**2 * variance).sum())
    found = []
    for seed in range(100):
        smc = learner(model, 6, seed=seed, ess_threshold=threshold)
        found.append(smc.run().log_normalizer)
        assert seed or pushed(smc)
    assert_unbiased(torch.stack(found), exact)


def test_it_can_be_switched_off() -> None:
    smc = learner(make_model(), 8, within=False)
    smc.run()
    assert pushed(smc) == []


def test_a_failed_step_is_taken_again_as_it_would_have_been() -> None:
    model, runs = make_model(), []
    for failing in (False, True):
        smc = learner(model, 8)
        original = smc._propagate

        def broken(method: str, args: Any, kwargs: Any, smc: Any = smc, to: Any = original) -> Any:
            if args == (2,):
                smc._propagate = to
                raise RuntimeError("out of memory")
            return to(method, args, kwargs)

        if failing:
            smc._propagate = broken  # type: ignore[method-assign]
            with pytest.raises(RuntimeError):
                smc.run()
            runs.append(smc.resume())
        else:
            runs.append(smc.run())
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)
