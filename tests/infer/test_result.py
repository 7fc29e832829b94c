# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_twist.infer import BestOfN, ImportanceSampling, SMCResult, TwistedSMC
from pyro_twist.twists import LookaheadTwist
from tests.oracles import LinearGaussianChain
from tests.statistics import assert_tilted_mean, assert_unbiased


def finished(**options: Any) -> SMCResult:
    chain = LinearGaussianChain(4, k=1.0)
    return TwistedSMC(chain, LookaheadTwist(chain), 64, seed=0, **options).run()


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        finished().log_normalizer = torch.tensor(0.0)  # type: ignore[misc]


def test_weights_normaliser_and_ess_agree() -> None:
    result = finished()
    mean = result.log_weights.logsumexp(0) - torch.tensor(64.0).double().log()
    assert torch.allclose(mean, result.log_normalizer)
    assert torch.equal(result.get_log_normalizer(), result.log_normalizer)
    weights = result.get_normalized_weights()
    assert weights.sum().item() == pytest.approx(1.0)
    assert torch.allclose(weights.log(), result.get_normalized_weights(log_scale=True))
    assert result.get_ESS().item() == pytest.approx((1 / weights.square().sum()).item())
    assert result.diagnostics.increments.sum().item() == pytest.approx(result.log_normalizer.item())
    assert result.diagnostics.ess[-1].item() == pytest.approx(result.get_ESS().item())


def test_expectation() -> None:
    result = finished()
    expected = (result.get_normalized_weights() * result.state["x"]).sum()
    assert torch.allclose(result.expectation("x"), expected)
    assert torch.allclose(result.expectation(lambda state: state["x"] ** 0).double(), expected**0)


@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
def test_resample_draws_by_weight(resampling: str) -> None:
    """Frequencies of 64 particles in 200,000 draws, within five standard errors; rate 4e-5."""
    result = finished(resampling="none")
    drawn = result.resample(200_000, resampling=resampling)
    weights = result.get_normalized_weights()
    hits = (drawn.state["x"][:, None] == result.state["x"]).double().mean(0)
    error = (weights * (1 - weights) / 200_000).sqrt()
    assert ((hits - weights).abs() <= 5 * error + 1e-5).all()
    assert drawn.get_ESS().item() == pytest.approx(200_000)
    assert torch.allclose(drawn.get_log_normalizer(), result.log_normalizer)


def test_resample_is_reproducible_with_a_generator() -> None:
    result = finished()
    draws = [
        result.resample(10, generator=torch.Generator().manual_seed(2)).state["x"] for _ in range(2)
    ]
    assert torch.equal(*draws)


def test_best_ranks_by_reward_not_by_weight() -> None:
    result = finished()
    best = result.best(3)
    assert torch.equal(best.state["reward"], result.state["reward"].topk(3).values)
    assert best.kind == "maximiser" and best.log_normalizer.isnan()
    assert best.get_ESS().item() == pytest.approx(3)
    with pytest.raises(ValueError, match="by='score'.*'reward'"):
        result.best(by="score")
    with pytest.raises(ValueError, match="k=65; give a number from 1 to 64"):
        result.best(65)


def test_best_leaves_dead_particles_out() -> None:
    result = finished()
    log_weights = result.log_weights.clone()
    log_weights[result.state["reward"].argmax()] = -torch.inf
    alive = dataclasses.replace(result, log_weights=log_weights).best()
    assert torch.equal(alive.state["reward"], result.state["reward"].topk(2).values[1:])


def test_repr_says_the_essential() -> None:
    text = repr(finished())
    for part in ("tilted law", "(64,)", "log_normalizer", "ESS", "'denoiser': 256", "x (64,)"):
        assert part in text


def test_samples_replay_and_condition() -> None:
    """Paths are site-named: conditioning the called model on them gives the same end."""
    result = finished(history="paths")
    chain = LinearGaussianChain(4, k=1.0)

    def whole() -> torch.Tensor:
        state: dict[str, torch.Tensor] = {}
        chain.init(state)
        for t in chain.timesteps:
            chain.step(state, t)
        return state["x"]

    assert torch.equal(poutine.condition(whole, data=result.samples)(), result.state["x"])
    drawn = result.resample(5)
    assert drawn.samples["x_4"].shape == (5,) and torch.equal(
        drawn.samples["x_0"], drawn.state["x"]
    )


def test_plots() -> None:
    chain = LinearGaussianChain(4, k=2.0)
    options: dict[str, Any] = {"seed": 0, "ess_threshold": 1.0}
    figure = TwistedSMC(chain, LookaheadTwist(chain), 20, **options).run().plot()
    assert len(figure.axes) == 3
    assert "descend from" in figure.axes[2].get_title()
    several = LinearGaussianChain(4, k=2.0, replicates=3)
    smc = TwistedSMC(several, None, 20, 1, population_plate="replicates", history="off", **options)
    assert len(smc.run().plot().axes) == 2
    with pytest.raises(ValueError, match="no diagnostics"):
        dataclasses.replace(smc.result(), diagnostics=None).plot()


def test_arviz() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = finished().to_arviz(num_samples=100)
    assert data.posterior["x"].shape == (1, 100)
    assert data.sample_stats["ess"].shape == (1, 5)
    assert data.posterior.attrs["kind"] == "tilted law"


# importance sampling and best-of-N


def test_importance_sampling() -> None:
    chain = LinearGaussianChain(3, k=0.7, replicates=1500)
    result = ImportanceSampling(chain, 32, 1, population_plate="replicates", seed=1).run()
    assert_unbiased(result.log_normalizer, chain.log_normalizer)
    means = result.expectation("x")
    assert_tilted_mean(result.log_normalizer, means, chain.log_normalizer, chain.tilted_mean)
    assert not result.diagnostics.resampled.any()


def test_best_of_n_is_the_maximum_of_base_samples() -> None:
    chain = LinearGaussianChain(3, k=0.7)
    everything = ImportanceSampling(chain, 50, seed=2).run()
    best = BestOfN(chain, 50, keep=4, seed=2).run()
    assert torch.equal(best.state["reward"], everything.state["reward"].topk(4).values)
    assert best.kind == "maximiser" and best.counts == everything.counts
    assert best.log_normalizer.isnan()


def test_best_of_n_does_not_sample_the_tilted_law() -> None:
    """Its law depends on N and not on the strength of the reward."""
    weak, strong = (
        BestOfN(LinearGaussianChain(3, k=k), 16, seed=3).run().state["x"] for k in (0.1, 10.0)
    )
    assert torch.equal(weak, strong)


def test_best_of_n_over_populations_and_bad_keep() -> None:
    chain = LinearGaussianChain(3, replicates=5)
    result = BestOfN(chain, 8, 1, population_plate="replicates", keep=2, seed=0).run()
    assert result.state["x"].shape == (2, 5)
    with pytest.raises(ValueError, match="keep=9; give a number from 1 to num_particles=8"):
        BestOfN(chain, 8, keep=9)


def test_importance_sampling_with_a_guide() -> None:
    class Guide:
        def init(self, state: Any) -> None:
            pass

        def step(self, state: Any, t: int) -> None:
            if t == 1:
                import pyro

                pyro.sample("x_0", dist.Normal(0.9 * state["x"] + 0.25, 0.5))

    chain = LinearGaussianChain(3, k=1.0)
    plain = ImportanceSampling(chain, 4000, seed=0).run()
    guided = ImportanceSampling(chain, 4000, guide=Guide(), seed=0).run()
    assert guided.get_ESS() > plain.get_ESS()
    assert guided.log_normalizer.item() == pytest.approx(chain.log_normalizer, abs=0.15)
