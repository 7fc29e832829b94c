# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_twist.infer import TrustRegionTwist, TwistedSMC
from pyro_twist.infer.trustregiontwist import default_twist
from tests.perf.statespace import Growth, LinearGaussian, StochasticVolatility
from tests.statistics import assert_unbiased


def chain(length: int) -> Any:
    return LinearGaussian(torch.tensor([[0.95]]), 0.6, 0.3).simulated(length, 0)


def fitted(model: Any, particles: int) -> Any:
    twist = default_twist(model)
    TrustRegionTwist(model, twist, particles, guard=False, seed=100).fit(3)
    return twist


def log_normalizers(model: Any, twist: Any, particles: int, seeds: int) -> torch.Tensor:
    # resampled at every step, since otherwise a twist matters less
    samplers = [
        TwistedSMC(model, twist, particles, ess_threshold=1.0, seed=s) for s in range(seeds)
    ]
    return torch.stack([smc.run().log_normalizer for smc in samplers])


def test_learned_twist_against_bootstrap_and_kalman() -> None:
    """The optimal twist is in the family: at equal particles, a hundredth of the spread at most."""
    model = chain(12)
    learned = log_normalizers(model, fitted(model, 200), 100, 30)
    bootstrap = log_normalizers(model, None, 100, 30)
    assert learned.std() < 0.01 * bootstrap.std()
    assert learned.mean().item() == pytest.approx(model.log_likelihood(), abs=1e-2)


def test_unbiased_against_kalman() -> None:
    """Half of a fitted twist, so that there is a variance; 400 runs, z-test, rate 1e-6."""
    model = chain(6)
    twist = fitted(model, 200)
    half = {key: 0.5 * value for key, value in twist.state_dict().items()}
    twist.load_state_dict(half)
    values = log_normalizers(model, twist, 30, 400)
    assert values.std() > 1e-3
    assert_unbiased(values, model.log_likelihood())


@pytest.mark.parametrize("kind", [StochasticVolatility, Growth])
def test_grid_and_bootstrap_agree(kind: Any) -> None:
    """The reference of the benchmark; six standard errors of eight long runs."""
    model = kind().simulated(15, 1)
    values = log_normalizers(model, None, 20_000, 8)
    error = abs(float(values.mean()) - model.log_likelihood(801))
    assert error < 6 * float(values.std()) / 8**0.5 + 0.5 * float(values.var()) + 1e-3


def test_a_saved_twist_is_used_again(tmp_path: Path) -> None:
    """In another process, as it were: a new model object, a new twist, more particles."""
    model = StochasticVolatility().simulated(10, 0)
    twist = fitted(model, 100)
    twist.save(tmp_path / "twist.safetensors")
    again = StochasticVolatility().simulated(10, 0)
    loaded = default_twist(again).load(tmp_path / "twist.safetensors")
    first = TwistedSMC(model, twist, 200, seed=1).run()
    second = TwistedSMC(again, loaded, 200, seed=1).run()
    assert torch.equal(first.log_weights, second.log_weights)
    plain = TwistedSMC(model, None, 200, seed=1).run()
    assert second.diagnostics is not None and plain.diagnostics is not None
    assert second.diagnostics.ess.mean() > plain.diagnostics.ess.mean()
