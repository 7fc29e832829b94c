# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Results in the hands of Pyro's own tools; z-tests fail by chance once in a million."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import EmpiricalMarginal, Predictive
from torch import Tensor, tensor

from pyro_twist.infer import ParticlePosterior, TwistedSMC
from pyro_twist.latents import WithLatents
from pyro_twist.rewards import Tilted
from tests.infer.composition import composes, refuses
from tests.infer.test_evidence import LEARNING
from tests.oracles import ExactTwist, LinearGaussianChain
from tests.statistics import assert_mean

NOISE = 0.5


def tilted_draws(size: int) -> tuple[LinearGaussianChain, Any]:
    """Independent draws of the tilted law: under the optimal twist all weights are equal."""
    chain = LinearGaussianChain(3, k=0.8)
    options: dict[str, Any] = {"seed": 0, "history": "paths"}
    result = TwistedSMC(chain, ExactTwist(chain), size, **options).run()
    assert result.get_ESS() > 0.99 * size
    return chain, result


@composes(
    LEARNING,
    "`Predictive(model, posterior_samples=result.resample().samples)`",
    'sites that the run did not have are drawn for each path of a run with `history="paths"`: '
    "posterior predictive draws",
)
def test_predictive() -> None:
    chain, result = tilted_draws(4000)

    def again(state: Any, x0: Tensor) -> None:
        pyro.sample("again", dist.Normal(x0, NOISE))

    predictive = Predictive(
        Tilted(chain, again), posterior_samples=result.resample().samples, parallel=True
    )
    found = predictive()["again"].double()
    assert found.shape == (4000,)
    assert_mean(found, chain.tilted_mean)
    assert_mean((found - chain.tilted_mean).square(), chain.variance + NOISE**2)


@composes(
    LEARNING,
    "`Predictive` of a model with its own observations",
    "`poutine.uncondition` around the model replicates them",
)
def test_predictive_of_observations() -> None:
    chain, result = tilted_draws(4000)

    def observed(state: Any, x0: Tensor) -> None:
        pyro.sample("y", dist.Normal(x0, NOISE), obs=tensor(9.0))

    free = poutine.uncondition(Tilted(chain, observed))
    samples = result.resample().samples
    found = Predictive(free, posterior_samples=samples, parallel=True, return_sites=["y"])()
    assert_mean(found["y"].double(), chain.tilted_mean)


def weighted(size: int = 300) -> Any:
    def prior() -> dict[str, Tensor]:
        return {"label": pyro.sample("label", dist.Categorical(tensor([0.3, 0.7])))}

    model = WithLatents(LinearGaussianChain(3, k=0.8), prior)
    return TwistedSMC(model, None, size, seed=0, history="paths", ess_threshold=0.0).run()


@composes(
    LEARNING,
    "`EmpiricalMarginal`, through `ParticlePosterior`",
    "weighted marginals of sites of the path, of latents and of what the state holds",
)
def test_empirical_marginal() -> None:
    result = weighted()
    posterior = ParticlePosterior(result).run()
    weights = result.get_normalized_weights()
    for site, values in {**result.state, **result.samples}.items():
        marginal = EmpiricalMarginal(posterior, site)
        values = values.double()
        if marginal.enumerate_support().is_floating_point():
            mean = (weights * values).sum()
            assert float(marginal.mean) == pytest.approx(float(mean), abs=1e-5)
            spread = (weights * (values - mean).square()).sum()
            assert float(marginal.variance) == pytest.approx(float(spread), abs=1e-5)
    labels = EmpiricalMarginal(posterior, "label")
    share = float(labels.log_prob(tensor(1)).exp())
    assert share == pytest.approx(float(result.expectation("label")), abs=1e-5)
    end = EmpiricalMarginal(posterior)
    assert float(end.mean) == pytest.approx(float(result.expectation("x")), abs=1e-5)
    both = posterior.marginal(["x_0", "x_1"]).empirical
    assert set(both) == {"x_0", "x_1"} and "x_2" in posterior().nodes


@refuses(
    LEARNING,
    "`EmpiricalMarginal` of several populations at once",
    "error: each has a posterior of its own; `result.expectation` has them all",
)
def test_posterior_of_several_populations() -> None:
    chain = LinearGaussianChain(2, replicates=3)
    result = TwistedSMC(chain, None, 4, 1, population_plate="replicates").run()
    with pytest.raises(ValueError, match="the result has 3 populations"):
        ParticlePosterior(result)


@composes(
    LEARNING,
    "ArviZ, through `result.to_arviz()`",
    "equally weighted draws of latents and samples beside the diagnostics of every step; its "
    "summaries are those of the weighted particles",
)
def test_arviz_summary() -> None:
    result = weighted(2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz

        data = result.to_arviz(num_samples=20_000)
        table = arviz.summary(data, var_names=["x", "label"], kind="stats", round_to=6)
    assert data.sample_stats["ess"].shape == (1, 4)
    # systematic resampling of 20,000 from 2,000 changes means by less than a particle's share
    for name in ("x", "label"):
        assert table.loc[name, "mean"] == pytest.approx(float(result.expectation(name)), abs=2e-3)
    log_z = data.sample_stats["log_normalizer"].values[0, -1]
    assert log_z == pytest.approx(float(result.log_normalizer))


def test_posterior_without_paths_has_the_state() -> None:
    result = TwistedSMC(LinearGaussianChain(2), None, 5, seed=0).run()
    posterior = ParticlePosterior(result).run()
    support = EmpiricalMarginal(posterior, "x").enumerate_support()
    assert torch.equal(support, result.state["x"])
