# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyro_twist.twists import log_normalizer, log_ratio, register_tilt, tilt


def test_normal_by_quadrature() -> None:
    prior, eta = dist.Normal(torch.tensor(0.7).double(), 0.4), torch.tensor(1.3).double()
    grid = torch.linspace(-10, 10, 200001, dtype=torch.float64)
    density = (prior.log_prob(grid) + eta * grid).exp()
    mass = torch.trapezoid(density, grid)
    assert log_normalizer(prior, eta).item() == pytest.approx(mass.log().item(), abs=1e-9)
    expected = density / mass
    assert torch.allclose(tilt(prior, eta).log_prob(grid).exp(), expected, atol=1e-9)


@pytest.mark.parametrize("event_dim", [0, 1, 2])
def test_identity_between_the_three(event_dim: int) -> None:
    """``log p - log q = log p(psi) - log psi`` at any value."""
    prior = dist.Normal(torch.randn(5, 3, 2), torch.rand(5, 3, 2) + 0.1).to_event(event_dim)
    eta = torch.randn(5, 3, 2)
    tilted = tilt(prior, eta)
    assert (tilted.batch_shape, tilted.event_shape) == (prior.batch_shape, prior.event_shape)
    value = tilted.sample()
    log_psi = (eta * value).sum(tuple(range(3 - event_dim, 3))) if event_dim else eta * value
    expected = log_normalizer(prior, eta) - log_psi.double()
    assert torch.allclose(log_ratio(prior, tilted, value), expected, atol=1e-5)


def test_delta_stays() -> None:
    prior = dist.Delta(torch.randn(4, 3), event_dim=1)
    eta = torch.randn(4, 3)
    assert tilt(prior, eta) is prior
    assert torch.allclose(log_normalizer(prior, eta), (eta * prior.v).sum(-1).double())
    independent = dist.Delta(torch.randn(4, 3)).to_event(1)
    assert tilt(independent, eta) is independent


def test_zero_tilt_is_the_prior() -> None:
    prior = dist.Normal(torch.randn(5), 1.0)
    assert (log_ratio(prior, tilt(prior, torch.zeros(5)), torch.randn(5)) == 0).all()


@pytest.mark.parametrize("size", [16_384, 196_608])
def test_precision_at_image_size(size: int) -> None:
    """Float32 densities are off by 1e-3 and more at this size; the ratio is not."""
    prior = dist.Normal(torch.randn(size), torch.tensor(0.04)).to_event(1)
    tilted = tilt(prior, torch.randn(size) * 0.02 / 0.04)
    value = tilted.sample()
    wide = [
        dist.Normal(d.base_dist.loc.double(), d.base_dist.scale.double()) for d in (prior, tilted)
    ]
    exact = (wide[0].log_prob(value.double()) - wide[1].log_prob(value.double())).sum()
    assert log_ratio(prior, tilted, value).item() == pytest.approx(exact.item(), abs=1e-8)
    naive = prior.log_prob(value) - tilted.log_prob(value)
    assert abs(naive.item() - exact.item()) > 1e-5


def test_different_scales() -> None:
    p, q = dist.Normal(0.0, 1.0), dist.Normal(0.5, 2.0)
    value = torch.linspace(-3, 3, 7)
    assert torch.allclose(
        log_ratio(p, q, value).float(), p.log_prob(value) - q.log_prob(value), atol=1e-6
    )


def test_other_families_fall_back() -> None:
    p, q = dist.Gamma(2.0, 1.0), dist.Gamma(3.0, 2.0)
    value = torch.tensor([0.5, 2.0])
    assert torch.allclose(log_ratio(p, q, value), (p.log_prob(value) - q.log_prob(value)).double())


def test_unknown_family_names_the_way_out() -> None:
    with pytest.raises(ValueError, match="no tilting rule for Gamma.*register_tilt"):
        tilt(dist.Gamma(1.0, 1.0), torch.tensor(0.5))


def test_registered_family() -> None:
    register_tilt(
        dist.Exponential,
        lambda prior, eta: dist.Exponential(prior.rate - eta),
        lambda prior, eta: (prior.rate / (prior.rate - eta)).log(),
    )
    prior, eta = dist.Exponential(2.0), torch.tensor(0.5)
    value = torch.tensor(1.7)
    expected = log_normalizer(prior, eta) - eta * value
    assert log_ratio(prior, tilt(prior, eta), value).item() == pytest.approx(
        expected.item(), abs=1e-6
    )
