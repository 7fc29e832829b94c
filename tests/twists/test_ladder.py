# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_twist.infer import TrustRegionTwist, TwistedSMC
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import DiscountedLookahead, SumTwist, SurrogateTwist
from pyro_twist.twists.paths import Pass
from tests.oracles import LinearGaussianChain
from tests.twists.gaussian import chain_law, gaussian, tilted

STEPS, VARIANCE, MEAN = 20, 0.5, 0.3

Reward = Callable[[torch.Tensor], torch.Tensor]


def linear(x: torch.Tensor) -> torch.Tensor:
    return x.sum(1)


def bent(x: torch.Tensor) -> torch.Tensor:
    return -x.square().sum(1)


def detailed(x: torch.Tensor) -> torch.Tensor:
    """Changes sign several times within the data."""
    return (4 * x[:, 0]).cos()


def numbers(reward: Any, dim: int = 1, scale: float = 1.0, **options: Any) -> RewardTilted:
    variance = torch.full((dim,), VARIANCE)
    return tilted(gaussian((dim,), variance, MEAN, STEPS, **options), reward, scale)


def fitted(
    model: Any, particles: int = 200, passes: int = 1, seed: int = 0, **options: Any
) -> tuple[DiscountedLookahead, TrustRegionTwist]:
    plates: dict[str, Any] = {}
    if model.plate is not None:
        plates = {"max_plate_nesting": 1, "population_plate": model.plate[0]}
    twist = DiscountedLookahead(model, **options)
    smc = TrustRegionTwist(model, twist, particles, seed=seed, progress=False, **plates)
    return twist, smc.fit(passes)


def known(model: Any, variance: float = VARIANCE) -> torch.Tensor:
    """The share that is known at 1 .. T, written out."""
    levels = [model.schedule[t] for t in range(1, STEPS + 1)]
    shares = [a * a * variance / (a * a * variance + s * s) for a, s in map(_level, levels)]
    return torch.tensor(shares, dtype=torch.float64)


def _level(step: Any) -> tuple[float, float]:
    return step.alpha, step.sigma


def test_before_learning() -> None:
    model = numbers(linear)
    twist = DiscountedLookahead(model)
    assert twist.slopes[0] == 1.0
    assert torch.allclose(twist.slopes[1:], known(model, 0.25) ** 0.15)
    other = DiscountedLookahead(model, exponent=0.4, variance=2.0)
    assert torch.allclose(other.slopes[1:], known(model, 2.0) ** 0.4)
    assert twist.slopes.diff().max() < 0  # the later, the more is known


def test_slopes_multiply_the_look_ahead() -> None:
    model = numbers(linear)
    smc = TwistedSMC(model, DiscountedLookahead(model), 5, seed=0, progress=False)
    smc.init()
    for t in model.timesteps[:-1]:
        smc.step(t)
        expected = smc.guide.slopes[t - 1] * smc.state["lookahead"]
        assert torch.equal(smc.state["lookahead_log_twist"], expected)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_a_linear_reward_is_believed(scale: float) -> None:
    """Predictions are a martingale, and so are their rewards: the exponent is 0."""
    twist, _ = fitted(numbers(linear, scale=scale), particles=1000)
    assert 0 <= twist.exponent < 0.05
    variance = float(chain_law(twist.model.model)[1])
    assert float(twist.variance) == pytest.approx(variance, rel=0.4)
    assert torch.allclose(
        twist.slopes[1:], known(twist.model, float(twist.variance)) ** twist.exponent
    )


def oracle(model: Any, frequency: float) -> float:
    """
    The exponent of least squares for ``cos(frequency x)``, with all moments in closed form.

    Predictions are normal and have independent increments, so that after one of variance ``d`` a
    look-ahead is ``exp(-f^2 d / 2)`` of what it was, on average.
    """
    levels = [_level(model.schedule[t]) for t in range(1, STEPS + 1)]
    slope = torch.tensor([a * VARIANCE / (a * a * VARIANCE + s * s) for a, s in levels]).double()
    noise = [float(model.kernel(origin(model, t), t).variance) for t in range(2, STEPS + 1)]
    rise = slope[:-1].square() * torch.tensor(noise).double()
    spread = torch.cat([rise, slope[-1:].square()]).flip(0).cumsum(0).flip(0)
    mean = (-(frequency**2) * spread / 2).exp() * math.cos(frequency * MEAN)
    double = (-2 * frequency**2 * spread).exp() * math.cos(2 * frequency * MEAN)
    variance = 0.5 * (1 + double) - mean**2
    shrink = (-(frequency**2) * rise / 2).exp()
    change = smooth(variance[:-1] + (1 - 2 * shrink) * variance[1:])
    share = known(model, float(chain_law(model.model)[1]))
    grid = torch.linspace(0, 3, 3001, dtype=torch.float64)[:, None]
    missed = shrink - (share[1:] / share[:-1]) ** grid
    return float(grid[(variance[1:] / change * missed**2).sum(1).argmin()])


def smooth(values: torch.Tensor) -> torch.Tensor:
    """Over two steps, as the noise of a step is hard to tell from one."""
    place = torch.arange(len(values)).double()
    kernel = (-0.5 * ((place[:, None] - place) / 2).square()).exp()
    return (kernel @ values) / kernel.sum(1)


def origin(model: Any, t: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    model.model._write(state, t, torch.zeros(1, 1))
    return state


@pytest.mark.parametrize("frequency", [4.0, 8.0])
def test_a_reward_of_detail_is_discounted(frequency: float) -> None:
    """
    The exponent is that of the exact moments, whatever the prior, and the finer the larger.

    Within 0.1, five times the standard deviation over seeds; rate 1e-6.
    """
    model = numbers(lambda x: (frequency * x[:, 0]).cos(), scale=0.3)
    expected = oracle(model, frequency)
    assert expected == pytest.approx({4.0: 0.34, 8.0: 0.82}[frequency], abs=0.01)
    for exponent in (0.15, 0.9):
        twist, _ = fitted(model, particles=2000, exponent=exponent, spread=0.5)
        assert float(twist.exponent) == pytest.approx(expected, abs=0.1)


def test_a_bend_alone_is_not_noise() -> None:
    """
    A quadratic changes by a number and by what nobody can foresee, so the slope stays 1.

    It is only discounted where a direction that is learned pushes particles to its top, as the
    tilted law does.
    """
    twist, _ = fitted(numbers(bent, 4, scale=0.5), particles=500)
    assert twist.exponent < 0.1
    model = numbers(bent, 4, scale=3.0)
    both = SumTwist(DiscountedLookahead(model), SurrogateTwist(model))
    smc = TrustRegionTwist(model, both, 100, seed=0, progress=False).fit(3)
    assert smc.guide.parts()[0].exponent > 0.15


def test_noise_is_hardly_believed() -> None:
    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(x))

    twist, _ = fitted(numbers(noise), passes=2)
    assert twist.exponent > 1.2


def test_few_data_leave_the_prior() -> None:
    twist, _ = fitted(numbers(linear), particles=1)
    density = torch.distributions.Normal(0.15, 0.15)
    grid = torch.linspace(0, 1.5, 1501)
    expected = torch.softmax(density.log_prob(grid), 0) @ grid  # of a prior that is cut off at 0
    assert float(twist.exponent) == pytest.approx(float(expected), abs=0.01)
    assert twist.variance == 0.25 and torch.isfinite(twist.slopes).all()


def reordered(one: Pass) -> Pass:
    """The mistake: what came after each step, taken after the resampling."""
    steps = [
        [replace(s, after={k: _taken(v, index) for k, v in s.after.items()}) for s in sites]
        for sites, index in zip(one.steps, one.ancestors, strict=True)
    ]
    return replace(one, steps=steps)


def _taken(value: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return value if index is None else value[index]


def test_pairs_are_those_before_resampling() -> None:
    model = numbers(linear, scale=4.0)
    twist = DiscountedLookahead(model)
    smc = TrustRegionTwist(model, twist, 200, seed=0, ess_threshold=1.0, progress=False)
    smc.sample()
    one = smc.passes[0]
    assert all(index is not None for index in one.ancestors[:-1])
    following = zip(one.steps[:-1], one.ancestors[:-1], one.steps[1:], strict=True)
    for before, index, after in list(following)[:-1]:
        expected = after[0].state["lookahead"]
        assert torch.equal(before[0].after["lookahead"][index], expected)
        # the same particle, one step on
        drawn = model.model._predict({"x": before[0].value}, after[0].t)["x0_hat"]
        looked = 4.0 * drawn.sum(-1).double()
        assert torch.allclose(before[0].after["lookahead"], looked, atol=1e-5)
    twist.observe([one])
    assert twist.exponent < 0.04
    twist.observe([reordered(one)])
    assert twist.exponent > 1.0


@pytest.mark.parametrize("options", [{"every": 5}, {"schedule": (20, 15, 10, 5)}])
def test_pairs_of_a_schedule(options: Any) -> None:
    twist, smc = fitted(numbers(linear), **options)
    found = [(pair[0], pair[1]) for pair in twist._consecutive(smc.passes[0])]
    assert found == [(20, 15), (15, 10), (10, 5)]
    assert twist.exponent < 0.1


def test_every_population_has_its_own_zero() -> None:
    """Offsets between populations say nothing about how far a look carries over."""

    def waves(x: torch.Tensor) -> torch.Tensor:
        return (8.0 * x[:, 0]).cos()

    rewards = [waves, lambda x: waves(x) + 1000.0, lambda x: 2 * waves(x) - 500.0]
    model = numbers(rewards, scale=0.3, plate=("classes", 3))
    twist, smc = fitted(model, particles=1000, spread=0.5)
    assert smc.passes[0].log_path.shape == (1000, 3)
    assert float(twist.exponent) == pytest.approx(oracle(model, 8.0), abs=0.1)


@pytest.mark.parametrize("records", [None, "cpu"])
def test_saved_and_loaded(records: Any, tmp_path: Path) -> None:
    model = numbers(detailed)
    twist = DiscountedLookahead(model)
    smc = TrustRegionTwist(model, twist, 30, seed=0, record_device=records, progress=False)
    smc.fit(2).guide.save(tmp_path / "twist.safetensors")
    other = DiscountedLookahead(model).load(tmp_path / "twist.safetensors")
    for name, value in twist.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    a, b = (TwistedSMC(model, one, 10, seed=1, progress=False).run() for one in (twist, other))
    assert torch.equal(a.log_weights, b.log_weights)


def test_errors() -> None:
    with pytest.raises(ValueError, match="LinearGaussianChain has no method `known_share`"):
        DiscountedLookahead(LinearGaussianChain(3))
    with pytest.raises(ValueError, match="exponent=-0.1, spread=0.15"):
        DiscountedLookahead(numbers(linear), exponent=-0.1)
    with pytest.raises(ValueError, match="spread=0.0"):
        DiscountedLookahead(numbers(linear), spread=0.0)


@pytest.mark.parametrize("wrong", [{"exponent": -1.0}, {"spread": 0.0}, {"variance": 0.0}])
def test_discount_out_of_range(wrong: dict[str, float]) -> None:
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        DiscountedLookahead(numbers(detailed), **wrong)
