# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The correctness matrix, as far as every pair of values is covered; ``make matrix`` runs all of it.

Two z-tests a case at a rate of 1e-6 each: for the family of fewer than 150 cases 3e-4 at most.
"""

from __future__ import annotations

import pytest

from tests import matrix
from tests.matrix import BIASED, Case, cases, covering, departure, z_scores
from tests.statistics import FIVE_SIGMA

COVERING = covering(cases())


def test_the_subset_covers_every_pair() -> None:
    wanted = {pair for case in cases() for pair in matrix._pairs(case)}
    assert wanted == {pair for case in COVERING for pair in matrix._pairs(case)}
    assert len(COVERING) < 150


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_case(case: Case) -> None:
    found = z_scores(case)
    assert max(found["error_normalizer"], found["error_law"]) < 0.05, "too blunt to fail"
    assert abs(found["z_normalizer"]) < FIVE_SIGMA
    assert abs(found["z_law"]) < FIVE_SIGMA


@pytest.mark.parametrize("name", BIASED)
def test_biased_methods_are_biased(name: str) -> None:
    """Maximisers and uncorrected guidance go too far; drawing without a weight not far enough."""
    found = departure(name)
    assert found < -10 if name == "SVDD, sampled" else found > 10


def test_a_broken_engine_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-ratios of the wrong sign: what the matrix must not pass."""
    from pyro_twist.infer import increments

    right = increments.log_ratio
    monkeypatch.setattr(increments, "log_ratio", lambda p, q, value: -right(p, q, value))
    found = z_scores(Case("Gaussian mixture", "TwistedSMC", "TDS", 0.5, "systematic"))
    assert max(abs(found["z_normalizer"]), abs(found["z_law"])) > FIVE_SIGMA
