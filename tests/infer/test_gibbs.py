# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Particle Gibbs: the tilted law of paths is invariant, and chains reach it."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from diffusers import DDIMScheduler

from pyro_twist.diffusion import GaussianDenoiser, GaussianDiffusion
from pyro_twist.infer import ParticleGibbs, TwistedSMC
from pyro_twist.latents import WithLatents
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import ChildrenTwist, LookaheadTwist
from tests.oracles import ExactTwist, LinearGaussianChain, MaskedChain
from tests.statistics import FIVE_SIGMA, assert_frequencies, assert_unbiased

REPLICATES = 6000
COMMON: dict[str, Any] = {"max_plate_nesting": 1, "population_plate": "replicates", "seed": 5}


def exact_paths(model: Any, guide: Any) -> dict[str, torch.Tensor]:
    """A path of each population from the tilted law itself."""
    options = {**COMMON, "seed": 77, "history": "paths"}
    samples = TwistedSMC(model, guide, 2, **options).run().samples or {}
    return {name: value[:1] for name, value in samples.items()}


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("looking", [False, True])
def test_the_law_of_paths_is_invariant(sampling: bool, threshold: float, looking: bool) -> None:
    """From exact paths, with two particles: means of x_0 and of x_T, rate 1e-6 each."""
    model = LinearGaussianChain(num_steps=3, k=1.2, replicates=REPLICATES)
    guide = LookaheadTwist(model) if looking else None
    options = {**COMMON, "ancestor_sampling": sampling, "ess_threshold": threshold}
    gibbs = ParticleGibbs(model, guide, 2, num_iterations=3, **options)
    gibbs._stream.restart()
    gibbs.kept = exact_paths(model, ExactTwist(model))
    start = gibbs.kept["x_0"].clone()
    gibbs.resume()
    assert (gibbs.kept["x_0"] != start).double().mean() > 0.2
    for name, mean in (("x_0", model.tilted_mean), ("x_3", model.k * model.a**3)):
        values = gibbs.kept[name].double().flatten()
        error = float(values.std()) / math.sqrt(REPLICATES)
        assert abs(float(values.mean()) - mean) < FIVE_SIGMA * error


@pytest.mark.parametrize("children", [False, True])
@pytest.mark.parametrize("sampling", [False, True])
def test_masked_sequences(sampling: bool, children: bool) -> None:
    """PG-DLM: the whole law of x_0, chi-square at rate 1e-6, after twelve passes of four."""
    chain = MaskedChain(plate=("replicates", REPLICATES), num_inference_steps=2)
    model = RewardTilted(chain.diffusion, chain.reward, decode=False)
    guide: Any = LookaheadTwist(model)
    guide = guide + ChildrenTwist(model, 3) if children else guide
    gibbs = ParticleGibbs(
        model,
        guide,
        4,
        num_iterations=12,
        ancestor_sampling=sampling,
        **COMMON,
    )
    gibbs.run()
    drawn = chain.index(gibbs.kept["x_0"][0])
    assert_frequencies(torch.bincount(drawn, minlength=chain.size), chain.tilted)


def test_the_children_of_the_path_that_is_kept() -> None:
    """
    A proposal that draws more than its value: the path kept is among its draws, and weighed as
    such. From exact paths, two particles with strong children, the mean reward at rate 1e-6.
    """
    chain = MaskedChain(plate=("replicates", REPLICATES), num_inference_steps=2)
    model = RewardTilted(chain.diffusion, chain.reward, decode=False)
    free = ParticleGibbs(model, None, 64, num_iterations=1, **COMMON)
    free.run()
    start = {name: value.clone() for name, value in free.kept.items()}
    twist = ChildrenTwist(model, 4, strength=2.0)
    gibbs = ParticleGibbs(model, twist, 2, num_iterations=4, **COMMON)
    gibbs._stream.restart()
    gibbs.kept = start
    gibbs.resume()
    values = chain.rewards.reshape(-1)[chain.index(gibbs.kept["x_0"][0])].double()
    error = float(values.std()) / math.sqrt(REPLICATES)
    expected = float((chain.tilted * chain.rewards).sum())
    assert abs(float(values.mean()) - expected) < FIVE_SIGMA * error


def steep(**options: Any) -> RewardTilted:
    """A diffusion of vectors, whose last step has no noise."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    denoiser = GaussianDenoiser(torch.zeros(2), 1.0, scheduler)
    diffusion = GaussianDiffusion(denoiser, scheduler, (2,), num_inference_steps=4, **options)
    return RewardTilted(diffusion, lambda x: x.sum(-1), decode=False)


def test_ancestors_of_a_value_without_noise() -> None:
    """Rounded otherwise, such as by another batch, it fits no past, and keeps its own."""
    model = steep()
    options: dict[str, Any] = {"ancestor_sampling": True, "seed": 0, "ess_threshold": 1.0}
    gibbs = ParticleGibbs(model, LookaheadTwist(model), 4, num_iterations=1, **options)
    gibbs.run()
    gibbs.kept["x_0"] = gibbs.kept["x_0"] + 1e-6
    gibbs.num_iterations = 2
    assert gibbs.resume().log_weights.isfinite().all()


def test_ancestors_with_a_plate_inside() -> None:
    """Its entries are summed over, as in the weights."""
    model = steep(plate=("pair", 3))
    options: dict[str, Any] = {"ancestor_sampling": True, "seed": 0, "ess_threshold": 1.0}
    gibbs = ParticleGibbs(model, LookaheadTwist(model), 4, 1, num_iterations=3, **options)
    assert gibbs.run().log_weights.shape == (12,)


def test_ancestors_need_a_trajectory_alone() -> None:
    model = RewardTilted(
        WithLatents(steep().model, lambda: {"strength": pyro.sample("s", dist.Normal(1.0, 0.1))}),
        lambda x: x.sum(-1),
        "strength",
        decode=False,
    )
    gibbs = ParticleGibbs(model, None, 4, ancestor_sampling=True, seed=0)
    with pytest.raises(ValueError, match="draws 's' beside its trajectory"):
        gibbs.run()
    assert ParticleGibbs(model, None, 4, seed=0).run().log_weights.isfinite().all()


def test_latents_beside_the_trajectory_are_kept() -> None:
    model = RewardTilted(
        WithLatents(steep().model, lambda: {"strength": pyro.sample("s", dist.Normal(1.0, 0.1))}),
        lambda x: x.sum(-1),
        "strength",
        decode=False,
    )
    gibbs = ParticleGibbs(model, None, 4, num_iterations=1, seed=0)
    gibbs.run()
    kept = gibbs.kept["s"].clone()
    gibbs.num_iterations = 2
    gibbs.resume()
    assert (gibbs.passes[1].samples or {})["s"][0] == kept


def test_the_first_pass_alone_estimates_the_normalizer() -> None:
    model = LinearGaussianChain(num_steps=3, replicates=3000)
    gibbs = ParticleGibbs(model, None, 4, num_iterations=2, **COMMON)
    result = gibbs.run()
    assert_unbiased(result.log_normalizer, model.log_normalizer)
    mean = result.log_weights.logsumexp(0) - math.log(result.num_particles)
    assert torch.allclose(mean, result.log_normalizer)


def test_burn_in_is_left_out_but_counted() -> None:
    model = LinearGaussianChain(num_steps=3)
    gibbs = ParticleGibbs(model, None, 5, num_iterations=3, burn_in=1, seed=0)
    result = gibbs.run()
    last = torch.cat([one.state["x"] for one in gibbs.passes[1:]])
    assert torch.equal(result.state["x"], last)
    assert result.counts["denoiser"] == 3 * 5 * 3


def test_diagnostics_are_those_of_single_passes() -> None:
    """They would add up to no normaliser of the pooled particles."""
    gibbs = ParticleGibbs(LinearGaussianChain(num_steps=3), None, 4, num_iterations=3, seed=0)
    with pytest.raises(ValueError, match="no pass yet"):
        _ = gibbs.last
    assert gibbs.run().diagnostics is None
    assert gibbs.last.diagnostics.ess.shape == (4,)


def test_particle_zero_follows_the_path_that_was_kept() -> None:
    model = LinearGaussianChain(num_steps=3)
    gibbs = ParticleGibbs(model, None, 5, num_iterations=1, seed=0, ess_threshold=1.0)
    gibbs.run()
    kept = dict(gibbs.kept)
    gibbs.num_iterations = 2
    gibbs.resume()
    second = gibbs.passes[1]
    assert all((value == kept[name]).any() for name, value in (second.samples or {}).items())
    assert torch.equal(second.diagnostics.ancestors[:, 0], torch.zeros(4, dtype=torch.long))


def test_a_run_goes_on_after_a_failure() -> None:
    """The same particles as without it: what was drawn before is kept."""

    class Fragile(LinearGaussianChain):
        fails_at = -1

        def step(self, state: Any, t: int) -> None:
            self.fails_at -= 1
            if self.fails_at == 0:
                raise RuntimeError("a reward has failed")
            super().step(state, t)

    whole = ParticleGibbs(Fragile(num_steps=3), None, 5, num_iterations=3, seed=2).run()
    model = Fragile(num_steps=3)
    model.fails_at = 6
    gibbs = ParticleGibbs(model, None, 5, num_iterations=3, seed=2)
    with pytest.raises(RuntimeError, match="reward has failed"):
        gibbs.run()
    other = ParticleGibbs(Fragile(num_steps=3), None, 5, num_iterations=3, seed=2)
    other.load_state_dict(gibbs.state_dict())
    for engine in (gibbs, other):
        assert torch.equal(engine.resume().state["x"], whole.state["x"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_particles": 1}, "num_particles=1"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"num_iterations": True}, "num_iterations=True"),
        ({"burn_in": 4}, "burn_in=4"),
        ({"resampling": "systematic"}, "resampling='systematic'"),
        ({"history": "off"}, "keeps paths"),
    ],
)
def test_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ParticleGibbs(LinearGaussianChain(), None, **options)
