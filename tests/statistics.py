# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Assertions about random quantities, with their false-alarm rates."""

from __future__ import annotations

import torch

#: Two-sided normal quantile at a false-alarm rate of 1e-6.
FIVE_SIGMA = 4.892


def assert_mean(values: torch.Tensor, expected: float, *, max_relative_sd: float = 0.1) -> None:
    """
    A z-test that the mean of independent ``values`` is ``expected``; rate 1e-6.

    ``max_relative_sd`` bounds the standard error relative to ``expected``, so that the test cannot
    pass by being blunt.
    """
    values = values.double()
    error = float(values.std() / len(values) ** 0.5)
    assert error <= max_relative_sd * abs(expected), f"standard error {error} is too large"
    z = (float(values.mean()) - expected) / max(error, 1e-12)
    assert abs(z) < FIVE_SIGMA, f"mean {float(values.mean())}, expected {expected}, z = {z:.1f}"


def assert_unbiased(log_normalizer: torch.Tensor, expected: float) -> None:
    """A z-test that the normaliser of independent populations is unbiased; rate 1e-6."""
    ratio = (log_normalizer - expected).exp()
    assert float(ratio.std()) < 1.0, "the relative spread of Z is too large for a z-test"
    assert_mean(ratio, 1.0, max_relative_sd=0.05)


def assert_tilted_mean(
    log_normalizer: torch.Tensor, means: torch.Tensor, log_z: float, expected: float
) -> None:
    """
    A z-test that ``Z_hat`` times the self-normalised mean has mean ``Z`` times the true one.

    That product is unbiased for every number of particles; rate 1e-6.
    """
    ratio = (log_normalizer - log_z).exp() * (means.double() - expected)
    assert_mean(ratio + 1.0, 1.0, max_relative_sd=0.05)


def assert_frequencies(counts: torch.Tensor, probs: torch.Tensor) -> None:
    """
    A chi-square test that counts of outcomes are multinomial with ``probs``; rate 1e-6.

    Outcomes expected less than ten times count as one; one of probability 0 may not occur at all.
    """
    from scipy.stats import chi2

    counts, expected = counts.double().flatten(), probs.double().flatten() * counts.sum()
    assert abs(float(probs.sum()) - 1) < 1e-9, "the probabilities do not add up to 1"
    impossible = counts[expected == 0].sum()
    assert impossible == 0, f"{int(impossible)} outcomes of probability 0"
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    distance = float(((counts - expected).square() / expected).sum())
    limit = float(chi2.isf(1e-6, len(counts) - 1)) if len(counts) > 1 else 1e-9
    assert distance < limit, f"chi-square {distance:.1f} of {len(counts)} cells, limit {limit:.1f}"
