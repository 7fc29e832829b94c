# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Inverse problems whose posterior is known: Gaussian and Gaussian-mixture pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import norm
from torch import Tensor

from pyro_twist import (
    GradientTwist,
    GuidedTwist,
    LookaheadTwist,
    NestedSMC,
    Tilted,
    TrustRegionTwist,
    TwistedSMC,
)
from pyro_twist.diffusion import GaussianDiffusion, GaussianMixtureDenoiser
from pyro_twist.infer import ImportanceSampling
from pyro_twist.inverse import AveragePooling, GaussianBlur, Mask, observed, psnr
from tests.instruments import posterior_ranks
from tests.statistics import assert_frequencies, assert_tilted_mean, assert_unbiased
from tests.twists.gaussian import chain_law, gaussian

SHAPE, STEPS, NOISE, REPLICATES = (1, 4, 4), 6, 0.8, 400
SEEN = torch.arange(16).reshape(SHAPE) % 3 != 0
OPERATORS: dict[str, Any] = {
    "inpainting": Mask(SEEN),
    "super-resolution": AveragePooling(2),
    "deblurring": GaussianBlur(0.8),
}


def urge(model: Any, number: int, **options: Any) -> Any:
    options = {"ess_threshold": 1.0, "resampling": "multinomial", **options}
    return TwistedSMC(model, GuidedTwist(model), number, **options)


METHODS: dict[str, Callable[..., Any]] = {
    "look-ahead": lambda model, n, **o: TwistedSMC(model, LookaheadTwist(model), n, **o),
    "TDS": lambda model, n, **o: TwistedSMC(model, GradientTwist(model), n, **o),
    "URGE": urge,
    "nested": lambda model, n, **o: NestedSMC(model, LookaheadTwist(model), n, num_children=4, **o),
}


def pictures(plate: int | None = None) -> GaussianDiffusion:
    """Correlated Gaussian pictures of four by four pixels."""
    place = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    covariance = 0.6 * (-0.3 * torch.cdist(place, place).square()).exp() + 0.05 * torch.eye(16)
    options: dict[str, Any] = {"plate": None if plate is None else ("data", plate)}
    return gaussian(SHAPE, covariance, mean=-0.2, steps=STEPS, **options)


def matrix(operator: Any, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """A linear operator as a matrix that is applied from the right."""
    size = math.prod(shape)
    seen: Tensor = operator(torch.eye(size, dtype=torch.float64).reshape(size, *shape))
    return seen.reshape(size, -1)


def exact(mean: Tensor, cov: Tensor, a: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log evidence, posterior mean and covariance of Gaussian pictures seen through ``a``."""
    seen_cov = a.T @ cov @ a + NOISE**2 * torch.eye(a.shape[1], dtype=torch.float64)
    gain = torch.linalg.solve(seen_cov, a.T @ cov).T
    residual = y.double().flatten() - mean @ a
    law = torch.distributions.MultivariateNormal(torch.zeros_like(residual), seen_cov)
    return law.log_prob(residual), mean + gain @ residual, cov - gain @ a.T @ cov


def observation(model: Any, operator: Any, seed: int = 3) -> Tensor:
    """A picture of the model, seen."""
    x = ImportanceSampling(model, 1, int(model.plate is not None), seed=seed).run().state["x"]
    clean: Tensor = operator(x[0] if model.plate is None else x[0, 0])
    torch.manual_seed(seed)
    return clean + NOISE * torch.randn(clean.shape)


def assert_moments(
    log_zs: Tensor, weights: Tensor, x: Tensor, log_z: Tensor, mean: Tensor, cov: Tensor
) -> None:
    """
    Mean and variance of every pixel, and a covariance, by z-tests; 1e-6 for all of them together.

    ``Z_hat`` times the weighted mean of a function is unbiased for ``Z`` times its posterior mean.
    """
    apart = x.double().flatten(2) - mean
    products = torch.cat([apart, apart.square() - cov.diagonal()], -1)
    corner = apart[..., :1] * apart[..., 1:2] - cov[0, 1]
    found = (weights[..., None] * torch.cat([products, corner], -1)).sum(0)
    found = (log_zs - log_z).exp()[:, None] * found
    z = found.mean(0) / (found.std(0) / math.sqrt(len(found)))
    assert float(z.abs().max()) < norm.isf(1e-6 / (2 * z.numel()))
    # and not for being blunt: errors of a tenth of the prior's deviation would be seen
    assert float(found[:, :16].std(0).max()) / math.sqrt(len(found)) < 0.02


@pytest.mark.parametrize("problem", OPERATORS)
@pytest.mark.parametrize("method", METHODS)
def test_posterior_of_gaussian_pictures(method: str, problem: str) -> None:
    """Evidence, mean and covariance are those of linear-Gaussian regression on the chain's law."""
    operator, diffusion = OPERATORS[problem], pictures(REPLICATES)
    y = observation(diffusion, operator)
    model = observed(diffusion, operator, y, NOISE)
    log_z, mean, cov = exact(*chain_law(diffusion), matrix(operator), y)
    smc = METHODS[method](
        model, 96, max_plate_nesting=1, population_plate="data", seed=0, progress=False
    )
    result = smc.run()
    assert_unbiased(result.log_normalizer, float(log_z))
    weights, x = result.get_normalized_weights(), result.state["x"]
    assert_moments(result.log_normalizer, weights, x, log_z, mean, cov)


def test_posterior_by_a_learned_twist() -> None:
    """TRI-TSMC, which learns while it goes on: the same, over independent runs."""
    operator, diffusion = OPERATORS["deblurring"], pictures()
    y = observation(diffusion, operator)
    model = observed(diffusion, operator, y, NOISE)
    log_z, mean, cov = exact(*chain_law(diffusion), matrix(operator), y)
    log_zs, means, squares = [], [], []
    for seed in range(25):
        smc = TrustRegionTwist(model, None, 256, num_iterations=0, seed=seed, progress=False)
        result = smc.run()
        apart = result.expectation(lambda s: s["x"].double().flatten(1) - mean)
        square = result.expectation(lambda s: (s["x"].double().flatten(1)[:, 5] - mean[5]).square())
        log_zs.append(result.log_normalizer)
        means.append(apart[5])
        squares.append(square - cov[5, 5])
    ratios = torch.stack(log_zs)
    assert_unbiased(ratios, float(log_z))
    assert_tilted_mean(ratios, torch.stack(means), float(log_z), 0.0)
    assert_tilted_mean(ratios, torch.stack(squares), float(log_z), 0.0)


MIXTURE_METHODS = {
    **METHODS,
    # every step for a hundred steps would leave few ancestors
    "URGE": lambda model, n, **o: TwistedSMC(model, GuidedTwist(model), n, **o),
    "nested": lambda model, n, **o: METHODS["nested"](model, 2 * n, **o),
    "TRI-TSMC": lambda model, n, **o: TrustRegionTwist(model, None, n // 3, num_iterations=0, **o),
}


@pytest.mark.parametrize("method", MIXTURE_METHODS)
def test_posterior_of_gaussian_mixture_pictures(method: str) -> None:
    """
    Two of four pixels of a mixture: which component it is, and what the others are.

    100 steps, whose discretisation moves log Z by 0.02, means of pixels and shares of components by
    0.01 or less. Log Z is to be within 0.12, the others within 0.1: more than five times the
    spread of every method.
    """
    shape, keep = (1, 2, 2), Mask(torch.tensor([[[True, False], [True, False]]]))
    a = matrix(keep, shape)
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    means = torch.tensor([[1.0, 1.0, 0.2, -1.0], [-0.8, -1.0, 0.4, 1.0], [0.2, 0.0, -1.0, -1.0]])
    weights, variance = torch.tensor([0.5, 0.3, 0.2]), 0.15
    denoiser = GaussianMixtureDenoiser(weights, means.reshape(3, *shape), variance, scheduler)
    diffusion = GaussianDiffusion(denoiser, scheduler, shape, num_inference_steps=100)
    y = torch.tensor([0.1, 0.3])
    parts = [exact(mean, variance * torch.eye(4).double(), a, y) for mean in means.double()]
    joint = weights.double().log() + torch.stack([log_z for log_z, _, _ in parts])
    shares = joint.softmax(0)
    mean = sum(share * part[1] for share, part in zip(shares, parts, strict=True))
    smc = MIXTURE_METHODS[method](observed(diffusion, keep, y, NOISE), 6000, seed=0, progress=False)
    result = smc.run()
    assert float(result.log_normalizer) == pytest.approx(float(joint.logsumexp(0)), abs=0.12)
    found = result.expectation(lambda state: state["x"].flatten(1))
    assert torch.allclose(found, mean, atol=0.1)
    nearest = torch.cdist(result.state["x"].double().flatten(1), means.double()).argmin(-1)
    exact_shares = _nearest_shares(parts, shares, means.double())
    for k in range(3):
        share = float(result.expectation(lambda state, k=k: (nearest == k).double()))
        assert share == pytest.approx(float(exact_shares[k]), abs=0.1)


def _nearest_shares(parts: Any, shares: Tensor, means: Tensor) -> Tensor:
    """How often draws of the posterior are nearest to each component's mean."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
    total = torch.zeros(3, dtype=torch.float64)
    for share, (_, mean, cov) in zip(shares, parts, strict=True):
        draws = mean + noise @ torch.linalg.cholesky(cov).T
        total += share * torch.bincount(torch.cdist(draws, means).argmin(-1), minlength=3) / 20_000
    return total


# calibration


def quantities(x: Tensor) -> dict[str, Tensor]:
    """A pixel that was not seen, one that was, and two numbers of the whole."""
    flat = x.flatten(-3)
    return {
        "hidden": flat[..., 0],
        "seen": flat[..., 5],
        "mean": flat.mean(-1),
        "contrast": x[..., :2].mean((-3, -2, -1)) - x[..., 2:].mean((-3, -2, -1)),
    }


def ranks(method: str, believed: float = NOISE) -> dict[str, Tensor]:
    """Simulation-based calibration: 400 pictures of the model, a posterior of each."""
    diffusion, operator = pictures(REPLICATES), OPERATORS["inpainting"]
    prior = ImportanceSampling(diffusion, 1, 1, population_plate="data", seed=11).run()
    truth = prior.state["x"][0]
    torch.manual_seed(12)
    y = operator(truth)
    y = y + NOISE * torch.randn(y.shape)
    model = observed(diffusion, operator, y, believed)
    smc = METHODS[method](
        model, 200, max_plate_nesting=1, population_plate="data", seed=13, progress=False
    )
    result = smc.run()
    weights, known = result.get_normalized_weights(), quantities(truth)
    found = quantities(result.state["x"])
    return {name: posterior_ranks(found[name], weights, known[name]) for name in known}


UNIFORM = torch.full((8,), 1 / 8)


@pytest.mark.parametrize("method", ["look-ahead", "TDS", "URGE"])
def test_credible_intervals_hold_the_truth(method: str) -> None:
    """
    Ranks of the truth are uniform, and intervals of 90 % hold it in 90 % of all cases.

    A chi-square test at 1e-6 and a binomial test at 1e-6 for each of four quantities.
    """
    for found in ranks(method).values():
        assert_frequencies(torch.histc(found, 8, 0.0, 1.0), UNIFORM)
        covered = float(((found > 0.05) & (found < 0.95)).double().mean())
        assert abs(covered - 0.9) < 4.9 * math.sqrt(0.9 * 0.1 / REPLICATES)


def test_calibration_notices_a_wrong_noise() -> None:
    """Noise believed to be a third of what it is: the same test fails."""
    found = ranks("TDS", NOISE / 3)["seen"]
    with pytest.raises(AssertionError, match="chi-square"):
        assert_frequencies(torch.histc(found, 8, 0.0, 1.0), UNIFORM)


# operators


def test_operators_are_what_they_say() -> None:
    """Against loops over pixels, for any batch dims; with gradients."""
    x = torch.randn(2, 3, 2, 6, 4, dtype=torch.float64)
    pooled = AveragePooling(2)(x)
    assert pooled.shape == (2, 3, 2, 3, 2)
    assert torch.allclose(pooled[..., 1, 0], x[..., 2:4, 0:2].mean((-2, -1)))
    keep = torch.rand(2, 6, 4) < 0.5
    assert torch.equal(Mask(keep)(x)[1, 2], x[1, 2][keep])
    blur = GaussianBlur(0.7, radius=2)
    weights = torch.tensor([math.exp(-0.5 * (i / 0.7) ** 2) for i in range(-2, 3)]).double()
    weights = weights / weights.sum()
    expected = torch.zeros_like(x)
    for i, a in zip(range(-2, 3), weights, strict=True):
        for j, b in zip(range(-2, 3), weights, strict=True):
            rows = (torch.arange(6) + i).clamp(0, 5)
            columns = (torch.arange(4) + j).clamp(0, 3)
            expected += a * b * x[..., rows, :][..., columns]
    assert torch.allclose(blur(x), expected)
    for operator in (Mask(keep), AveragePooling(2), blur):
        point = x.clone().requires_grad_()
        operator(point).square().sum().backward()
        assert point.grad is not None and bool(torch.isfinite(point.grad).all())
    one = torch.full((1, 1, 5, 5), 0.3)
    assert torch.allclose(GaussianBlur(2.0)(one), one)


def test_observed_is_the_long_form() -> None:
    """The helper writes the same program as the two lines that it stands for."""
    diffusion, blur = pictures(), GaussianBlur(1.0)
    y = torch.randn(SHAPE)

    def likelihood(state: Any, x0: Tensor) -> None:
        pyro.sample("y", dist.Normal(blur(x0), 0.5).to_event(3), obs=y)

    found = [
        TwistedSMC(model, LookaheadTwist(model), 8, seed=0).run().log_weights
        for model in (observed(diffusion, blur, y, 0.5), Tilted(diffusion, likelihood))
    ]
    assert torch.equal(*found)


def test_psnr() -> None:
    truth = torch.zeros(1, 4, 4)
    found = psnr(torch.stack([truth + 0.1, truth]), truth)
    assert found.tolist() == pytest.approx([20.0, math.inf])
    assert psnr(2 * truth + 0.2, truth, peak=2.0).item() == pytest.approx(20.0)
    with pytest.raises(ValueError, match="does not end in that of the truth"):
        psnr(torch.zeros(4, 4), truth)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: Mask(torch.ones(SHAPE)), "keep=.*boolean"),
        (lambda d: Mask(torch.zeros(SHAPE, dtype=torch.bool)), "at least one"),
        (lambda d: Mask(SEEN)(torch.zeros(2, 1, 5, 5)), "does not end in that of keep"),
        (lambda d: AveragePooling(0), "factor=0"),
        (lambda d: AveragePooling(3)(torch.zeros(SHAPE)), "does not divide"),
        (lambda d: GaussianBlur(0.0), "width=0.0"),
        (lambda d: GaussianBlur(1.0, radius=0), "radius=0"),
        (lambda d: GaussianBlur(1.0)(torch.zeros(4, 4)), "channels, height and width"),
        (lambda d: observed(d, AveragePooling(2), torch.zeros(SHAPE), 0.1), r"shape \(1, 2, 2\)"),
        (lambda d: observed(d, torch.sum, torch.zeros(()), 0.1), "same batch dims"),
        (lambda d: observed(d, Mask(SEEN), torch.full((10,), math.nan), 0.1), "not finite"),
        (lambda d: observed(d, Mask(SEEN), torch.zeros(10), 0.0), "above 0"),
        (lambda d: observed(d, Mask(SEEN), torch.zeros(10), torch.ones(3)), "noise has shape"),
        (lambda d: observed(object(), Mask(SEEN), torch.zeros(10), 0.1), "no `event_shape`"),
    ],
)
def test_errors_say_what_to_do(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(pictures())


def test_an_observation_for_each_entry_of_a_plate() -> None:
    """One observation for all entries, or one each; a wrong number is refused."""
    with pytest.raises(ValueError, match=r"\(10,\) or \(3, 10\)"):
        observed(pictures(3), Mask(SEEN), torch.zeros(4, 10), NOISE)
    y = torch.randn(3, 10)
    each = observed(pictures(3), Mask(SEEN), y, NOISE)
    result = ImportanceSampling(each, 5, 1, population_plate="data", seed=0).run()
    same = observed(pictures(3), Mask(SEEN), y[1], NOISE)
    other = ImportanceSampling(same, 5, 1, population_plate="data", seed=0).run()
    assert result.log_weights.shape == (5, 3)
    assert torch.allclose(result.log_weights[:, 1], other.log_weights[:, 1])
    assert not torch.allclose(result.log_weights[:, 0], other.log_weights[:, 0])


@pytest.mark.parametrize("width", ["a", 0, math.inf, None])
def test_widths_of_blurs(width: Any) -> None:
    with pytest.raises(ValueError, match="width="):
        GaussianBlur(width)


@pytest.mark.parametrize("noise", ["a", None, 0.0, math.nan])
def test_noise_is_a_positive_number(noise: Any) -> None:
    model = gaussian((2,), torch.eye(2))
    with pytest.raises(ValueError, match="noise="):
        observed(model, lambda x: x, torch.zeros(model.event_shape), noise)
