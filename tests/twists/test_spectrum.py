# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyro_twist.twists import SurrogateTwist
from pyro_twist.twists.paths import Pass
from pyro_twist.twists.spectrum import Spectrum
from tests.twists.gaussian import (
    SIZE,
    cosines,
    gaussian,
    one_pass,
    picture_covariance,
    radii,
    tilted,
    without_after,
)

BY_BAND = torch.tensor([2.0, 1.0, 0.3, 0.1, 0.03])
SHAPES = [(5,), (4, 6), (1, 4, 4), (3, 5, 4), (2, 3, 4, 4), (70, 2, 2)]


def total(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).sum(1)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthonormal(shape: tuple[int, ...]) -> None:
    spectrum = Spectrum(shape)
    x = torch.randn(7, *shape)
    spectrum.mix(torch.randn(50, *shape) * torch.rand(shape[0], *(1,) * (len(shape) - 1)))
    found = spectrum(x)
    assert found.dtype == torch.float64 and found.shape == (7, x[0].numel())
    assert torch.allclose(spectrum.inverse(found), x.double(), atol=1e-12)
    assert torch.allclose(found.norm(dim=1), x.double().flatten(1).norm(dim=1))
    units = torch.eye(x[0].numel(), dtype=torch.float64)
    assert torch.allclose(spectrum(spectrum.inverse(units)), units, atol=1e-12)


def test_cosines_against_scipy() -> None:
    """Rows of the basis, and the band of each."""
    spectrum = Spectrum((1, SIZE, SIZE))
    units = torch.eye(SIZE * SIZE, dtype=torch.float64)
    assert torch.allclose(spectrum.inverse(units)[:, 0], cosines(), atol=1e-12)
    assert torch.equal(spectrum.bands, radii())
    assert spectrum.num_bands == len(BY_BAND)


def test_channels_have_bands_of_their_own() -> None:
    spectrum = Spectrum((3, SIZE, SIZE))
    bands = spectrum.bands.reshape(3, -1)
    assert torch.equal(bands, radii() + 5 * torch.arange(3)[:, None])
    # a stack too high to be channels shares its bands
    assert Spectrum((70, 2, 2)).num_bands == Spectrum((1, 2, 2)).num_bands


def test_vectors_are_one_band() -> None:
    spectrum = Spectrum((6,))
    x = torch.randn(4, 6)
    spectrum.mix(x)
    assert torch.equal(spectrum(x), x.double()) and torch.equal(spectrum.inverse(x), x)
    assert spectrum.num_bands == 1 and spectrum.response(0.5, 0.7).shape == (6,)


def fitted(one: Pass, model: Any) -> SurrogateTwist:
    twist = SurrogateTwist(model)
    twist._fit_spectrum([one])
    return twist


def jacobian(model: Any, t: int) -> torch.Tensor:
    """How the prediction moves with the state at a time index, by autograd."""
    denoiser, step = model.denoiser.network, model.schedule[t]

    def predict(x: torch.Tensor) -> torch.Tensor:
        return denoiser.x0_hat(x.reshape(1, *model.event_shape), step.timestep).flatten()

    x = torch.randn(model.event_shape.numel(), dtype=torch.float64)
    return torch.autograd.functional.jacobian(predict, x)


def assert_response(twist: SurrogateTwist, model: Any, rtol: float) -> None:
    """The response is the Jacobian, and diagonal in the basis, at every time index."""
    size = model.event_shape.numel()
    basis = twist.spectrum.inverse(torch.eye(size, dtype=torch.float64)).reshape(size, size)
    for t in model.timesteps[1:]:
        exact = basis @ jacobian(model, t) @ basis.T
        found = twist.spectrum.response(model.schedule[t].alpha, model.schedule[t].sigma)
        assert torch.allclose(exact.diagonal(), found, rtol=rtol)
        off = exact - exact.diagonal().diag()
        assert off.abs().max() < rtol * exact.diagonal().max()


def test_variances_and_response_of_gaussian_pictures() -> None:
    """The grid of variances has steps of 29 %; the fit is at most one away."""
    model = tilted(gaussian((1, SIZE, SIZE), picture_covariance(BY_BAND)), total, 0.1)
    one = one_pass(model)
    twist = fitted(one, model)
    assert torch.allclose(twist.spectrum.variance.log(), BY_BAND.double().log(), atol=0.3)
    assert_response(twist, model, rtol=0.25)
    with pytest.raises(AssertionError):
        assert_response(fitted(without_after(one), model), model, rtol=0.25)


def test_pushes_do_not_disturb_it() -> None:
    """What moves the state may be noise or push."""
    model = tilted(gaussian((1, SIZE, SIZE), picture_covariance(BY_BAND)), total, 2.0)
    from pyro_twist.infer import TrustRegionTwist

    smc = TrustRegionTwist(model, None, 32, seed=0, num_iterations=2, progress=False)
    smc.run()
    spectrum = fitted(smc.passes[-1], model).spectrum
    assert torch.allclose(spectrum.variance.log(), BY_BAND.double().log(), atol=0.3)


def test_colours_mixed_by_a_rotation() -> None:
    """The principal axes of the channels come back, each with its variances."""
    axes = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    strengths = torch.tensor([0.05, 0.4, 3.0], dtype=torch.float64)
    colours = axes.T @ strengths.diag() @ axes
    covariance = torch.kron(colours, picture_covariance(BY_BAND))
    model = tilted(gaussian((3, SIZE, SIZE), covariance), total, 0.02)
    twist = fitted(one_pass(model, particles=200), model)
    overlap = (twist.spectrum.mixing @ axes.T).abs()
    assert torch.allclose(overlap, torch.eye(3, dtype=torch.float64), atol=0.1)
    expected = strengths[:, None] * BY_BAND.double()
    found = twist.spectrum.variance.reshape(3, -1)
    assert torch.allclose(found.log(), expected.log(), atol=0.4)


def test_events_of_one_dimension() -> None:
    model = tilted(gaussian((6,), torch.full((6,), 0.4)), total, 0.1)
    twist = fitted(one_pass(model), model)
    assert float(twist.spectrum.variance) == pytest.approx(0.4, rel=0.3)
    assert_response(twist, model, rtol=0.25)


def test_the_end_is_its_own_prediction() -> None:
    assert torch.equal(Spectrum((2, 2)).response(1.0, 0.0), torch.ones(4, dtype=torch.float64))
