# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The Gaussian-mixture benchmark: its exact law, its distances, and its tables."""

from __future__ import annotations

import math

import pytest
import torch

from tests.perf import mixture
from tests.perf.harness import Job
from tests.statistics import FIVE_SIGMA


def test_the_tilted_law_is_exact() -> None:
    """Against importance weights of 200,000 draws of the base law; z-tests, 61 in all."""
    known = mixture.problem()
    x = known.base.sample(200_000, torch.Generator().manual_seed(3))
    weights = known.reward(x).exp()
    z = weights.mean()
    error = weights.std() / z / math.sqrt(len(x))
    assert float(error) < 0.02
    assert abs(float(z.log()) - known.target.log_z) < FIVE_SIGMA * float(error)
    for power, expected in ((1, known.target.mean()), (2, known.target.covariance().diagonal())):
        values = x if power == 1 else (x - known.target.mean()) ** 2
        apart = weights[:, None] * (values - expected)
        scores = apart.mean(0) / (apart.std(0) / math.sqrt(len(x)))
        assert float(scores.abs().max()) < FIVE_SIGMA


def test_distances_of_the_exact_law_are_near_zero() -> None:
    known = mixture.problem()
    x = known.target.sample(2000, torch.Generator().manual_seed(4))
    weights = torch.full((2000,), 1 / 2000).double()
    found = mixture.figures(x, weights, known.target.log_z)
    shifted = mixture.figures(x + 1.0, weights, known.target.log_z + 0.5)
    assert found["mmd"] < 0.03 and found["swd"] < 0.12 and found["mean"] < 0.5
    assert shifted["mmd"] > 0.2 and shifted["mean"] == pytest.approx(math.sqrt(30), abs=0.5)
    assert shifted["swd"] == pytest.approx(1.0, abs=0.15)
    assert found["log_z"] == 0 and shifted["log_z"] == pytest.approx(0.5)
    assert found["ess"] == pytest.approx(2000)


def test_weights_count() -> None:
    """Two copies of half of the weight are one sample."""
    x = mixture.problem().target.sample(50, torch.Generator().manual_seed(5))
    one = mixture.figures(x, torch.full((50,), 0.02).double(), 0.0)
    both = mixture.figures(torch.cat([x, x]), torch.full((100,), 0.01).double(), 0.0)
    for name in ("mmd", "swd", "mean", "covariance"):
        assert one[name] == pytest.approx(both[name], rel=1e-6), name


def test_a_table_of_a_short_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "STEPS", 5)
    arms = ("exact", "guidance", "fk", "fkc", "urge")
    rows = [row for seed in range(2) for row in mixture.run(Job("mixture", 8, seed, arms))]
    assert [row["denoiser"] for row in rows[:5]] == [0, 40, 40, 40, 40]
    text = mixture.report(rows)
    assert "### N = 8, 2 seeds" in text and "| urge |" in text
