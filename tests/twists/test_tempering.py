# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Schedules, the adaptive temperature, and the law that none of them changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pyro_twist.infer import TwistedSMC
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import LookaheadTwist
from pyro_twist.twists.guided import GradientTwist
from pyro_twist.twists.tempering import (
    AdaptiveTempering,
    TemperedLookahead,
    geometric_temperatures,
    next_temperature,
    temperatures,
)
from pyro_twist.weights import effective_sample_size
from tests.statistics import assert_unbiased
from tests.twists.steering import PLATE, REWARDS, check, sampled, tilted_law, vectors

TEMPERINGS: dict[str, Any] = {
    "linear": "linear",
    "geometric": "geometric",
    "adaptive": "adaptive",
    "severe": AdaptiveTempering(0.2),
    "unbounded": AdaptiveTempering(0.9, "constant"),
    "sequence": [0.0, 0.9, 0.1, 1.3, 0.7],
    "function": lambda t: 1 / t,
}


def test_geometric_is_that_of_the_paper_for_a_hundred_steps() -> None:
    found = geometric_temperatures(100)
    exact = [min(1.008**i - 1, 1.0) for i in range(100)]
    assert found[:0:-1] == pytest.approx(exact)
    assert found[0] == 1.0
    assert geometric_temperatures(100, 0.008) == pytest.approx(found)
    assert geometric_temperatures(10)[10] == 0.0


def test_schedules_by_time_index() -> None:
    assert temperatures("constant", 3) == (1.0, 1.0, 1.0, 1.0)
    assert temperatures("linear", 4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert temperatures([0.0, 0.5, 0.8], 3) == (1.0, 0.8, 0.5, 0.0)
    assert temperatures(lambda t: t / 10, 2) == (1.0, 0.1, 0.2)


@pytest.mark.parametrize(
    "given, told",
    [
        ("warm", "'warm' is none of"),
        ([1.0, 1.0], "has 2 temperatures; give 5"),
        ([1.0, -0.5, 1.0, 1.0, 1.0], "of the state x_4 is -0.5"),
        (lambda t: math.nan, "x_1 is nan"),
        (3, "3 is none of"),
    ],
)
def test_what_is_no_schedule(given: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TemperedLookahead(vectors(), given)


@pytest.mark.parametrize("share", [0.0, 1.0, math.nan])
def test_what_is_no_share(share: float) -> None:
    with pytest.raises(ValueError, match="share="):
        AdaptiveTempering(share)


def test_next_temperature_is_the_root_of_every_population() -> None:
    log_weights, slope = torch.randn(30, 5).double(), 20 * torch.randn(30, 5).double()
    low = torch.tensor([0.0, 0.01, 0.0, 0.0, 0.9]).double()
    slope[:, 2] *= 1e-3
    offset = low * slope
    found = next_temperature(log_weights, slope, offset, low, 0.7)
    ess = effective_sample_size(log_weights + (found - low) * slope)
    target = 0.7 * effective_sample_size(log_weights)
    assert torch.allclose(ess[:2], target[:2]) and torch.allclose(ess[3], target[3])
    assert found[2] == 1.0 and ess[2] > target[2]
    assert (found >= low).all() and (found <= 1).all()
    for k in range(5):
        alone = next_temperature(log_weights[:, k], slope[:, k], offset[:, k], low[k], 0.7)
        assert torch.equal(alone, found[k])


def test_next_temperature_where_any_change_costs_too_much() -> None:
    """One particle is all there is: nothing can be lost, or all of it at once."""
    one = torch.zeros(1).double()
    assert next_temperature(one, one + 5, one, torch.tensor(0.0).double(), 0.9) == 1.0
    cloud = torch.zeros(2).double()
    slope = torch.tensor([0.0, 1e12]).double()
    low = torch.tensor(0.5).double()
    assert float(next_temperature(cloud, slope, low * slope, low, 0.9)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "name, threshold",
    [(name, 0.5) for name in TEMPERINGS]
    + [(name, threshold) for name in ("adaptive", "sequence") for threshold in (0.0, 1.0)],
)
def test_tilted_law(name: str, threshold: float) -> None:
    """All schedules sample one law; rate 3e-6 for each."""
    model = vectors()
    twist = TemperedLookahead(model, TEMPERINGS[name])
    result = sampled(model, twist, 8, ess_threshold=threshold)
    check(result, *tilted_law(model, "quadratic"))


@pytest.mark.parametrize("particles", [1, 2])
def test_few_particles_and_an_adaptive_schedule(particles: int) -> None:
    """Where the temperature depends most on each particle, Z is unbiased too."""
    model = vectors("linear")
    twist = GradientTwist(model, tempering=AdaptiveTempering(0.99))
    result = sampled(model, twist, particles, ess_threshold=1.0)
    check(result, *tilted_law(model, "linear"))


def test_a_temperature_that_does_not_follow_its_particle_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The log-twist divided out must be that multiplied in; else Z is off."""

    def forgetful(self: TwistedSMC, index: torch.Tensor) -> None:
        self.state._resample(index)
        assert self._log_twist is not None
        self._log_twist = self._log_twist.roll(1, 0)

    monkeypatch.setattr(TwistedSMC, "_follow", forgetful)
    model = vectors()
    twist = TemperedLookahead(model, "adaptive")
    result = sampled(model, twist, 16, ess_threshold=1.0)
    with pytest.raises(AssertionError):
        assert_unbiased(result.log_normalizer, tilted_law(model, "quadratic")[0])


def test_adaptive_temperatures_rise_and_keep_the_share() -> None:
    model = RewardTilted(vectors().model, REWARDS["quadratic"], 60.0, decode=False)
    twist = TemperedLookahead(model, AdaptiveTempering(0.95, "constant"))
    smc = TwistedSMC(model, twist, 16, 1, population_plate=PLATE[0], ess_threshold=0.0, seed=0)
    smc.init()
    before = torch.zeros(16, PLATE[1]).double()
    for t in model.timesteps[:-1]:
        log_weights = smc.state._log_weights.clone()
        look, known = smc.state["lookahead"].clone(), smc.state["lookahead_log_twist"].clone()
        smc.step(t)
        now = smc.state["lookahead_temperature"]
        assert (now == now[0]).all() and (now >= before).all() and (now <= 1).all()
        kept = effective_sample_size(log_weights + now * look - known)
        assert (kept >= 0.95 * effective_sample_size(log_weights) - 1e-6).all()
        assert torch.equal(smc.state["lookahead_log_twist"], now * smc.state["lookahead"])
        if t == model.timesteps[0]:
            assert now[0].std() > 0.01, "every population has its own"
        assert (now[0] > before[0]).float().mean() > 0.9 or (now[0] == 1).float().mean() > 0.5
        before = now.clone()


def test_adaptive_temperatures_are_bounded() -> None:
    """A weak reward costs nothing, so that the bound is all there is."""
    model = RewardTilted(vectors().model, REWARDS["quadratic"], 1e-3, decode=False)
    twist = TemperedLookahead(model, AdaptiveTempering(0.5, "linear"))
    smc = TwistedSMC(model, twist, 16, 1, population_plate=PLATE[0], seed=0)
    smc.init()
    assert (smc.state["lookahead_log_twist"] == 0).all()
    for t in model.timesteps[:-1]:
        smc.step(t)
        assert smc.state["lookahead_temperature"][0, 0] == pytest.approx(1 - (t - 1) / 5)


def test_adaptive_run_goes_on_where_it_was_saved() -> None:
    def make() -> TwistedSMC:
        model = vectors()
        twist = GradientTwist(model, tempering="adaptive")
        return TwistedSMC(model, twist, 8, 1, population_plate=PLATE[0], seed=3)

    whole = make().run()
    first = make()
    first.init()
    for t in (5, 4):
        first.step(t)
    second = make()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.resume().log_normalizer, whole.log_normalizer)


def test_constant_is_plain_lookahead() -> None:
    model = vectors()
    plain = sampled(model, LookaheadTwist(model, every=2))
    tempered = sampled(model, TemperedLookahead(model, "constant", every=2))
    assert torch.equal(plain.log_normalizer, tempered.log_normalizer)
    assert torch.equal(plain.state["x"], tempered.state["x"])


def test_rare_looks_keep_the_temperature_of_the_last() -> None:
    model = vectors("linear")
    twist = TemperedLookahead(model, "adaptive", schedule={5, 2})
    check(sampled(model, twist), *tilted_law(model, "linear"))


@pytest.mark.parametrize("share", [0, 1, 1.5, "a", math.nan])
def test_shares(share: Any) -> None:
    with pytest.raises(ValueError, match="share="):
        AdaptiveTempering(share)
