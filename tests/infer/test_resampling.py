# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import partial

import pytest
import torch

from pyro_twist.infer import RESAMPLING, get_resampling
from pyro_twist.weights import effective_sample_size, weighted_mean
from tests.statistics import FIVE_SIGMA

SCHEMES = sorted(RESAMPLING)


def constant(value: float, probs: torch.Tensor, size: int, generator: object) -> torch.Tensor:
    """Stands in for the uniforms."""
    return torch.full((size,), value, dtype=torch.float64)


def counts(scheme: str, probs: torch.Tensor, size: int, repeats: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    draws = [RESAMPLING[scheme](probs, size, generator) for _ in range(repeats)]
    return torch.stack([torch.bincount(d, minlength=len(probs)) for d in draws]).double()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1, 4, 7, 12])
def test_unbiased(scheme: str, size: int) -> None:
    # z-tests of seven means, rate 1e-6 each
    probs = torch.tensor([0.3, 0.0, 0.25, 0.05, 0.2, 0.0, 0.2], dtype=torch.float64)
    drawn = counts(scheme, probs, size, repeats=3000)
    assert (drawn.sum(-1) == size).all()
    error = (drawn.std(0) / 3000**0.5).clamp(min=1e-9)
    assert ((drawn.mean(0) - size * probs).abs() / error < FIVE_SIGMA).all()
    assert (drawn[:, probs == 0] == 0).all()


@pytest.mark.parametrize("scheme", sorted(set(SCHEMES) - {"multinomial", "residual", "stratified"}))
def test_counts_round_the_expected_ones(scheme: str) -> None:
    probs = torch.rand(50, dtype=torch.float64).softmax(0)
    drawn = counts(scheme, probs, 50, repeats=200)
    assert ((drawn - 50 * probs).abs() < 1).all()


@pytest.mark.parametrize("scheme", sorted(set(SCHEMES) - {"multinomial"}))
def test_equal_weights_keep_every_particle(scheme: str) -> None:
    probs = torch.full((16,), 1 / 16, dtype=torch.float64)
    assert (counts(scheme, probs, 16) == 1).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_hot_and_single(scheme: str) -> None:
    probs = torch.zeros(9, dtype=torch.float64)
    probs[4] = 1.0
    assert RESAMPLING[scheme](probs, 9, None).tolist() == [4] * 9
    assert RESAMPLING[scheme](torch.ones(1, dtype=torch.float64), 3, None).tolist() == [0, 0, 0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_never_past_the_end(
    scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cumulative sum that ends below one must not reach an index that is not there, or dead."""
    from pyro_twist.infer import resampling

    largest = torch.tensor(1.0, dtype=torch.float64).nextafter(torch.tensor(0.0)).item()
    for value in (0.0, largest):
        uniform = partial(constant, value)
        monkeypatch.setattr(resampling, "_uniform", uniform)
        for seed in range(50):
            torch.manual_seed(seed)
            logits = torch.randn(1000, dtype=dtype) * 3
            logits[-3:] = -torch.inf
            index = RESAMPLING[scheme](logits.softmax(0), 1000, None)
            assert index.min() >= 0 and index.max() < 997


def test_more_or_fewer_draws_than_particles() -> None:
    probs = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert counts("systematic", probs, 8).tolist() == [[2.0, 6.0]]
    assert len(get_resampling("residual")(probs, 1, None)) == 1


def test_unknown_scheme() -> None:
    with pytest.raises(ValueError, match="unknown resampling scheme 'sistematic'.*'systematic'"):
        get_resampling("sistematic")


def test_effective_sample_size() -> None:
    inf = -torch.inf
    columns = torch.tensor([[0.0, 5.0, inf], [0.0, inf, inf], [0.0, inf, inf]])
    assert effective_sample_size(columns.double()).tolist() == pytest.approx([3.0, 1.0, 0.0])
    shifted = torch.tensor([1000.0, 1000.0, 999.0], dtype=torch.float64)
    w = torch.tensor([1.0, 1.0, 0.36787944117]).double()
    assert effective_sample_size(shifted).item() == pytest.approx(
        (w.sum() ** 2 / (w**2).sum()).item()
    )


def test_weighted_mean_ignores_dead_particles() -> None:
    values = torch.tensor([1.0, torch.nan, 3.0])
    log_weights = torch.tensor([0.0, -torch.inf, 0.0], dtype=torch.float64)
    assert weighted_mean(values, log_weights).item() == 2.0
