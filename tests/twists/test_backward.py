# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_twist.infer import TrustRegionTwist, TwistedSMC
from pyro_twist.infer.trustregiontwist import default_twist
from pyro_twist.twists import BackwardTwist
from tests.oracles import LinearGaussianChain
from tests.perf.statespace import LinearGaussian
from tests.statistics import assert_unbiased


class Flexible:
    """Linear dynamics with correlated noise or a scalar state, observed from the start."""

    def __init__(self, kind: str, replicates: int | None = None) -> None:
        self.kind, self.timesteps, self.replicates = kind, (4, 3, 2, 1), replicates
        self.event_shape: tuple[int, ...] = () if kind == "scalar" else (2,)
        self.root = torch.tensor([[0.7, 0.0], [0.4, 0.5]])

    def kernel(self, mean: torch.Tensor) -> Any:
        if self.kind == "scalar":
            return dist.Normal(0.9 * mean, 0.6)
        if self.kind == "correlated":
            return dist.MultivariateNormal(0.9 * mean, scale_tril=self.root)
        return dist.Normal(0.9 * mean, 0.6).to_event(1)

    def init(self, state: Any) -> None:
        self.move(state, torch.zeros(self.event_shape), 4)

    def step(self, state: Any, t: int) -> None:
        self.move(state, state["x"], t - 1)

    def move(self, state: Any, mean: torch.Tensor, now: int) -> None:
        x = state["x"] = pyro.sample(f"x_{now}", self.kernel(mean))
        seen = x if self.kind == "scalar" else x.sum(-1)
        pyro.sample(f"y_{now}", dist.Normal(seen, 0.3), obs=torch.tensor(1.0 - 0.5 * now))


@pytest.mark.parametrize("kind", ["scalar", "independent", "correlated"])
def test_zero_variance_on_linear_gaussian_models(kind: str) -> None:
    """Exact after two passes, with an observation at the start too: all seeds agree."""
    model = Flexible(kind)
    smc = TrustRegionTwist(model, BackwardTwist(model), 300, seed=0).fit(3)
    # resampled at every step, since otherwise any twist cancels in the end
    runs = [TwistedSMC(model, smc.guide, 5, ess_threshold=1.0, seed=s).run() for s in range(5)]
    values = torch.stack([run.log_normalizer for run in runs])
    assert values.std() < 1e-4
    large = TwistedSMC(model, None, 100_000, seed=1).run().log_normalizer
    assert values.mean().item() == pytest.approx(large.item(), abs=0.05)


def test_terminal_rewards() -> None:
    """The exact twist of the chain with a linear reward, from one pass."""
    chain = LinearGaussianChain(5, k=1.2, dim=2)
    assert isinstance(default_twist(chain), BackwardTwist)
    smc = TrustRegionTwist(chain, None, 100, seed=0).fit(1)
    expected = [chain.k * chain.a**now for now in range(6)]
    assert smc.guide.slope[0, :, 0].tolist() == pytest.approx(expected, abs=1e-3)
    result = smc.sample()
    assert result.get_ESS() > 99.9
    assert result.log_normalizer.item() == pytest.approx(chain.log_normalizer, abs=1e-4)


def test_bad_coefficients_do_not_change_the_target() -> None:
    """2,000 populations of 32; z-test, rate 1e-6."""
    chain = LinearGaussianChain(3, k=0.5, dim=1, replicates=2000)
    twist = BackwardTwist(chain)
    twist.slope.add_(0.3 * torch.randn_like(twist.slope))
    twist.precision.add_(0.3)
    smc = TwistedSMC(chain, twist, 32, 1, population_plate="replicates", seed=1)
    assert_unbiased(smc.run().log_normalizer, chain.log_normalizer)


def test_populations_share_a_twist() -> None:
    chain = LinearGaussianChain(3, k=1.0, dim=1, replicates=7)
    twist = BackwardTwist(chain)
    smc = TrustRegionTwist(chain, twist, 20, 1, population_plate="replicates", seed=0).fit(1)
    log_z = smc.sample().log_normalizer
    assert log_z.tolist() == pytest.approx([chain.log_normalizer] * 7, abs=1e-3)


def test_a_twist_that_made_things_worse_is_taken_back() -> None:
    torch.manual_seed(0)
    model = LinearGaussian(torch.tensor([[0.9]]), 0.5, 0.3).simulated(10, 0)
    twist = BackwardTwist(model)
    smc = TrustRegionTwist(model, twist, 100, seed=0).fit(1)
    good = twist.slope.clone()
    smc.sample()
    smc.update()
    twist.slope.add_(20.0)
    smc.sample()
    smc.update()
    assert (twist.slope - good).abs().max() < 1e-2


def test_dead_particles_are_left_out() -> None:
    class Positive(Flexible):
        def move(self, state: Any, mean: torch.Tensor, now: int) -> None:
            super().move(state, mean, now)
            pyro.factor(f"positive_{now}", torch.where(state["x"] > -1.0, 0.0, -torch.inf))

    model = Positive("scalar")
    smc = TrustRegionTwist(model, BackwardTwist(model), 100, seed=0).fit(2)
    assert torch.isfinite(smc.guide.slope).all() and torch.isfinite(smc.guide.precision).all()
    assert torch.isfinite(smc.sample().log_normalizer)


@pytest.mark.parametrize("particles", [1, 2, 3])
def test_few_particles(particles: int) -> None:
    model = Flexible("independent")
    result = TrustRegionTwist(model, BackwardTwist(model), particles, seed=0).run()
    assert torch.isfinite(result.log_normalizer)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"event_shape=\(3, 8, 8\)"):
        BackwardTwist(LinearGaussianChain(3), event_shape=(3, 8, 8))

    class Two(Flexible):
        def step(self, state: Any, t: int) -> None:
            super().step(state, t)
            state["z"] = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))

    model = Two("scalar")
    with pytest.raises(ValueError, match=r"step 4 draws the sites \['x_0', 'z_1'\]"):
        TrustRegionTwist(model, BackwardTwist(model), 10, seed=0).fit(1)
