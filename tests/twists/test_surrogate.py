# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_twist.infer import TrustRegionTwist, TwistedSMC, default_twist
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import (
    DiscountedLookahead,
    LookaheadTwist,
    SurrogateTwist,
)
from pyro_twist.twists.paths import Pass
from pyro_twist.twists.regression import _folds
from tests.oracles import LinearGaussianChain
from tests.statistics import FIVE_SIGMA, assert_tilted_mean, assert_unbiased
from tests.twists.gaussian import chain_law, gaussian, picture_covariance, tilted

SHAPE = (1, 4, 4)
COVARIANCE = picture_covariance(torch.tensor([2.0, 1.0, 0.3, 0.1, 0.03]))
SLOPE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def linear(x: torch.Tensor) -> torch.Tensor:
    return (SLOPE.to(x) * x).sum((1, 2, 3))


def pictures(reward: Any = linear, scale: float = 1.0, steps: int = 12, **options: Any) -> Any:
    return tilted(gaussian(SHAPE, COVARIANCE, steps=steps, **options), reward, scale)


def learned(
    model: Any,
    particles: int = 64,
    passes: int = 2,
    seed: int = 0,
    ladder: Any = None,
    **options: Any,
) -> tuple[SurrogateTwist, TrustRegionTwist]:
    """A surrogate beside plain look-ahead, which is right for linear rewards."""
    twist = SurrogateTwist(model, **options)
    ladder = LookaheadTwist(model) if ladder is None else ladder
    smc = TrustRegionTwist(model, ladder + twist, particles, seed=seed, progress=False)
    return twist, smc.fit(passes)


def exact_tilt(model: RewardTilted, t: int) -> torch.Tensor:
    """The Jacobian of the prediction, times the gradient of the reward."""
    step, size = model.schedule[t - 1], COVARIANCE.shape[0]
    inverse = step.alpha**2 * COVARIANCE + step.sigma**2 * torch.eye(size).double()
    return step.alpha * torch.linalg.solve(inverse, COVARIANCE @ SLOPE.double().flatten())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), 0))


def test_direction_and_gains_of_a_linear_reward() -> None:
    """The optimal tilt is the exact one, at gain 1."""
    model = pictures()
    twist, smc = learned(model)
    assert twist.score > 0.97
    places = smc.passes[-1].state["x"][:3]
    for t in model.timesteps[:-1]:
        for found in twist.full_tilt(places, t):
            exact = exact_tilt(model, t)
            assert cosine(found, exact) > 0.98
            assert float(found.norm() / exact.norm()) == pytest.approx(1.0, abs=0.15)
    assert torch.allclose(twist.prior_mean, torch.ones(1, 3), atol=0.15)
    assert torch.allclose(twist.theta, torch.ones(1, 3), atol=0.25)


def test_bands_matter() -> None:
    """With one variance for all coordinates, the direction is the plain gradient's."""
    model = pictures()
    plain, _ = learned(model, spectral=False)
    assert plain.spectrum.num_bands == 1 and plain.theta.numel() == 3
    middle = model.timesteps[len(model.timesteps) // 2]
    [found] = plain.full_tilt(torch.zeros(1, *SHAPE), middle)
    assert cosine(found, SLOPE.double()) > 0.98
    assert cosine(found, exact_tilt(model, middle)) < 0.9


@pytest.mark.parametrize("ladder", [LookaheadTwist, DiscountedLookahead])
def test_gains_do_not_depend_on_the_zero_of_the_reward(ladder: Any) -> None:
    """A number added to the reward drops out, although a discounted look-ahead grows with it."""
    found = []
    for offset in (0.0, 100.0):
        model = pictures(lambda x, offset=offset: linear(x) + offset)
        found.append(learned(model, passes=1, ladder=ladder(model))[0].prior_mean)
    assert found[0].min() > 0.2
    assert torch.allclose(*found, atol=1e-3)


def in_classes(
    reward: Any, classes: int, particles: int = 64, scale: Any = 1.0
) -> tuple[SurrogateTwist, TrustRegionTwist]:
    model = pictures(reward, scale, plate=("classes", classes))
    twist = SurrogateTwist(model)
    plates: dict[str, Any] = {"max_plate_nesting": 1, "population_plate": "classes"}
    guide = LookaheadTwist(model) + twist
    smc = TrustRegionTwist(model, guide, particles, seed=0, progress=False, **plates)
    return twist, smc.fit(1)


def test_populations_share_a_direction() -> None:
    twist, _ = in_classes(linear, 2)
    assert torch.allclose(twist.prior_mean, torch.ones(1, 3), atol=0.2)


def test_folds_have_particles_of_every_population() -> None:
    twist, smc = in_classes(linear, 4, particles=8)
    for _, _, group in twist._looks(smc.passes):
        assert group.shape == (32,)
    first = next(twist._looks(smc.passes))[2].reshape(8, 4)
    assert len(first.unique()) == 32
    for population in _folds(first.flatten()).reshape(8, 4).T:
        assert population.bincount().tolist() == [2, 2, 2, 2]


def test_rewards_of_noise_have_no_gain() -> None:
    """Nothing is predicted on paths left out, and what is pushed costs hardly any weight."""
    for seed in range(2):
        noise = pictures(lambda x: torch.randn(len(x)))
        twist, smc = learned(noise, 32, 2, seed=seed)
        assert twist.score < 0.1
        assert pushed_nats(smc) < 0.1
    twist, smc = learned(pictures(), 32, 2)
    assert pushed_nats(smc) > 1.0


def pushed_nats(smc: TrustRegionTwist) -> float:
    """The divergence of the proposal from the model, on the paths of one more pass."""
    smc.sample()
    total = 0.0
    for sites in smc.passes[-1].steps:
        for site in sites:
            prior, posterior = (getattr(p, "base_dist", p) for p in (site.prior, site.posterior))
            if site.posterior is not site.prior:
                shift = (posterior.loc - prior.loc) / prior.scale
                total += 0.5 * float(shift.square().sum() / len(site.value))
    return total


def test_looks_far_apart_give_no_evidence_on_gains() -> None:
    """Between scheduled looks the log-twist stands still, which is not what a push does to it."""
    model = pictures()
    twist, smc = learned(model, passes=1, ladder=LookaheadTwist(model, every=4))
    assert list(twist._with_gradients(smc.passes, torch.zeros(1000, 16))) == []
    assert torch.allclose(twist.prior_mean, torch.full((1, 3), twist.score))
    assert twist.score > 0.9


def test_pairs_are_those_before_resampling() -> None:
    """The mistake, to take what came after the step in the order after the resampling."""

    def reordered(one: Pass) -> Pass:
        steps = [
            [replace(s, after={k: v[i] for k, v in s.after.items()}) for s in sites]
            if i is not None
            else sites
            for sites, i in zip(one.steps, one.ancestors, strict=True)
        ]
        return replace(one, steps=steps)

    model = pictures(scale=2.0)
    twist = SurrogateTwist(model)
    guide = LookaheadTwist(model) + twist
    smc = TrustRegionTwist(model, guide, 64, seed=0, ess_threshold=1.0, progress=False)
    smc.sample()
    twist.observe(smc.passes)
    assert torch.allclose(twist.prior_mean, torch.ones(1, 3), atol=0.2)
    twist.observe([reordered(smc.passes[0])])
    assert twist.prior_mean.min() < 0.6


def test_no_steps_are_needed_to_hold_still() -> None:
    """Rewards that are all alike teach nothing, and a twist that knows nothing does nothing."""
    model = pictures(lambda x: torch.full((len(x),), 2.0))
    twist, smc = learned(model)
    assert not twist.regression.fitted and not twist.theta.any()
    assert pushed_nats(smc) == 0.0


def test_options() -> None:
    model = pictures()
    fixed, _ = learned(model, fitted=False, gain=0.7)
    assert torch.equal(fixed.theta, torch.full((1, 3), 0.7))
    prior, _ = learned(model, fitted=False)
    assert torch.equal(prior.theta, prior.prior_mean)
    moving, _ = learned(model, gain=0.7)
    assert torch.equal(moving.prior_mean, torch.full((1, 3), 0.7))
    one, _ = learned(model, knots=1, surrogate="diagonal")
    assert one.theta.shape == (1, 1) and one.regression.kind == "diagonal"
    assert 0.7 < one.theta < 1.3
    with torch.no_grad():
        one.theta.fill_(9.0)
        one.constrain()
    assert one.theta == 3.0


def test_the_cap() -> None:
    """The shift at gain 1 is at most so many standard deviations in norm."""
    model = pictures(scale=50.0)
    twist, smc = learned(model, cap=0.5, fitted=False, gain=1.0)
    smc.sample()
    norms = []
    for sites in smc.passes[-1].steps[1:-1]:
        prior, posterior = sites[0].prior.base_dist, sites[0].posterior.base_dist
        norms.append(((posterior.loc - prior.loc) / prior.scale).flatten(1).norm(dim=1))
    assert torch.stack(norms).max() == pytest.approx(0.5, abs=1e-4)
    assert twist.full_tilt(torch.zeros(1, *SHAPE), 6).norm() > 5.0


def test_derived_classes_may_read_anything() -> None:
    class Curious(SurrogateTwist):
        def features(self, name: str, prior: Any) -> torch.Tensor | None:
            return super().features(name, prior)

    model = pictures()
    for kind, missing in [(SurrogateTwist, True), (Curious, False)]:
        twist = LookaheadTwist(model) + kind(model)
        smc = TrustRegionTwist(model, twist, 4, seed=0, progress=False)
        smc.sample()
        assert ("x" not in smc.passes[0].steps[2][0].state) == missing


def test_needs_noise_levels() -> None:
    with pytest.raises(ValueError, match="LinearGaussianChain has no noise `schedule`"):
        SurrogateTwist(LinearGaussianChain(3, dim=2))


@pytest.mark.parametrize("shape", [(3, 4, 4), (5,)])
def test_saved_and_loaded(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Runs with what was loaded are the same to the bit."""
    covariance = torch.linspace(0.1, 1.0, math.prod(shape)).reshape(shape)
    model = tilted(gaussian(shape, covariance), lambda x: x.flatten(1).square().sum(1), -0.3)
    smc = TrustRegionTwist(model, None, 32, seed=0, num_iterations=2, progress=False)
    smc.run()
    smc.guide.save(tmp_path / "twist.safetensors")
    loaded = default_twist(model).load(tmp_path / "twist.safetensors")
    for name, value in smc.guide.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert smc.guide.parts()[1].theta.any()
    guides = (smc.guide, loaded, default_twist(model))
    ours, theirs, fresh = (TwistedSMC(model, g, 20, seed=3, progress=False).run() for g in guides)
    assert torch.equal(ours.log_weights, theirs.log_weights)
    assert torch.equal(ours.state["x"], theirs.state["x"])
    assert not torch.equal(ours.state["x"], fresh.state["x"])


def test_recording_elsewhere_changes_nothing() -> None:
    model, runs = pictures(), []
    for device in (None, "cpu"):
        options: dict[str, Any] = {"seed": 0, "record_device": device, "progress": False}
        runs.append(TrustRegionTwist(model, None, 24, **options).run())
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)


# the law

REPLICATES, SCALE, STEPS = 500, 0.6, 8


def exact_law(model: RewardTilted, scale: float = SCALE) -> tuple[float, torch.Tensor]:
    """Log-normaliser and mean of the law of the chain, discretisation included, tilted."""
    mean, covariance = chain_law(model.model)
    slope = scale * SLOPE.double().flatten()
    drift = covariance @ slope
    return float(slope @ mean + 0.5 * slope @ drift), mean + drift


def assert_exact(result: Any, model: RewardTilted) -> None:
    log_z, mean = exact_law(model)
    assert_unbiased(result.log_normalizer, log_z)
    along = SLOPE.double().flatten()
    means = result.expectation("x").flatten(1).double() @ along / along.norm()
    assert_tilted_mean(result.log_normalizer, means, log_z, float(mean @ along / along.norm()))
    # every pixel: 16 z-tests at 1e-6
    ratio = (result.log_normalizer - log_z).exp()[:, None]
    products = ratio * (result.expectation("x").flatten(1) - mean)
    z = products.mean(0) / (products.std(0) / math.sqrt(len(products)))
    assert (z.abs() < FIVE_SIGMA).all()


def frozen(twist: Any, particles: int = 16, seed: int = 1) -> tuple[Any, RewardTilted]:
    """A run of many populations with a twist as it is."""
    model = pictures(scale=SCALE, steps=STEPS, plate=("replicates", REPLICATES))
    guide = default_twist(model)
    guide.load_state_dict(twist.state_dict())
    plates: dict[str, Any] = {"max_plate_nesting": 1, "population_plate": "replicates"}
    smc = TwistedSMC(model, guide, particles, seed=seed, progress=False, **plates)
    return smc.run(), model


@pytest.fixture(scope="module")
def default() -> Any:
    model = pictures(scale=SCALE, steps=STEPS)
    return TrustRegionTwist(model, None, 32, seed=0, progress=False).fit(2).guide


def test_the_default_twist_samples_the_exact_law(default: Any) -> None:
    assert isinstance(default.parts()[0], DiscountedLookahead)
    assert default.parts()[1].theta.min() > 0.3
    result, model = frozen(default)
    assert_exact(result, model)
    # and is worth learning: the spread of log Z is less than before
    before, _ = frozen(default_twist(pictures(scale=SCALE, steps=STEPS)))
    assert result.log_normalizer.std() < 0.7 * before.log_normalizer.std()


def test_bad_parameters_do_not_change_the_law(default: Any) -> None:
    model = pictures(scale=SCALE, steps=STEPS)
    bad = default_twist(model)
    bad.load_state_dict(default.state_dict())
    ladder, surrogate = bad.parts()
    with torch.no_grad():
        ladder.slopes.copy_(torch.rand(STEPS + 1) * 1.5)
        surrogate.theta.copy_(torch.tensor([[0.0, 0.8, 2.0]]))
        surrogate.spectrum.variance.copy_(surrogate.spectrum.variance.flip(0))
        surrogate.regression.coefficients.add_(
            0.2
            * surrogate.regression.coefficients.std()
            * torch.randn(len(surrogate.regression.coefficients))
        )
    result, model = frozen(bad, particles=64)
    assert_exact(result, model)


def test_learning_while_sampling_is_unbiased() -> None:
    """Independent runs, each with a twist of its own: z-test of Z, rate 1e-6."""
    model, found = pictures(scale=0.5, steps=5), []
    for seed in range(120):
        smc = TrustRegionTwist(model, None, 12, num_iterations=2, seed=seed, progress=False)
        found.append(smc.run().log_normalizer)
    assert_unbiased(torch.stack(found), exact_law(model, 0.5)[0])


@pytest.mark.parametrize("wrong", [{"knots": 0}, {"cap": 0.0}, {"gain": -1.0}])
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SurrogateTwist(pictures(), **wrong)
