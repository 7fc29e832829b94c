# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Feynman-Kac correctors against closed forms and quadrature.

Correctors are right in the limit of small steps. Comparisons with exact numbers allow for what is
left at so many steps, which each test states, and beside that for five standard errors: z-tests
fail by chance once in a million each. Orders are found without any draws where all is Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, tensor

from pyro_twist.diffusion import (
    GaussianDenoiser,
    GaussianDiffusion,
    GaussianMixtureDenoiser,
    MixtureOfModels,
)
from pyro_twist.diffusion.correctors import ProductCorrector, RewardCorrector
from pyro_twist.infer import ImportanceSampling, TwistedSMC
from pyro_twist.rewards import RewardTilted
from tests.statistics import FIVE_SIGMA, assert_mean

GRID = torch.linspace(-9, 9, 6001, dtype=torch.float64)
Law = tuple[Sequence[float], Sequence[float], Sequence[float]]
GAUSS: Law = ([1.0], [0.5], [0.5])
WIDE: Law = ([1.0], [0.0], [1.0])
MIXED: Law = ([0.6, 0.4], [-0.9, 0.8], [0.3, 0.2])
NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def diffusion(law: Law, steps: int, *, kind: Any = None, **options: Any) -> GaussianDiffusion:
    scheduler: Any = (
        kind() if kind else DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    )
    weights, means, variances = (tensor(entry) for entry in law)
    denoiser = GaussianMixtureDenoiser(weights, means[:, None], variances, scheduler)
    return GaussianDiffusion(denoiser, scheduler, (1,), num_inference_steps=steps, **options)


def log_density(law: Law) -> Tensor:
    weights, means, variances = (tensor(entry).double() for entry in law)
    normal = torch.distributions.Normal(means, variances.sqrt())
    return (normal.log_prob(GRID[:, None]) + weights.log()).logsumexp(-1)


def on_grid(log_values: Tensor) -> tuple[float, float, float]:
    """Log-normaliser, mean and variance, by quadrature."""
    z = float(torch.trapezoid(log_values.exp(), GRID))
    density = log_values.exp() / z
    mean = float(torch.trapezoid(density * GRID, GRID))
    return math.log(z), mean, float(torch.trapezoid(density * (GRID - mean) ** 2, GRID))


def draw(model: Any, size: int = 40_000, seed: int = 0) -> Any:
    return ImportanceSampling(model, size, seed=seed, progress=False).run()


def found_in(result: Any) -> tuple[Tensor, Tensor]:
    """Log-normaliser, mean and variance of ``x``, and their standard errors."""
    weights = result.get_normalized_weights()
    x = result.state["x"][:, 0].double()
    mean = (weights * x).sum()
    values = [torch.ones_like(x) / len(x) / weights, x - mean, (x - mean) ** 2]
    variance = (weights * values[2]).sum()
    log_z = result.log_normalizer
    relative = (weights * len(x)).std() / math.sqrt(len(x))
    spread = [
        (weights * (v - m)).square().sum().sqrt() for v, m in ((x, mean), (values[2], variance))
    ]
    return torch.stack([log_z, mean, variance]), torch.stack([relative, *spread])


def assert_close(result: Any, exact: Sequence[float], tolerances: Sequence[float]) -> None:
    """Within the tolerance and the Monte Carlo error, which may be no more than 0.05."""
    found, errors = found_in(result)
    assert bool((FIVE_SIGMA * errors < 0.05).all()), f"standard errors {errors.tolist()}"
    allowed = tensor(tolerances).double() + FIVE_SIGMA * errors
    apart = found - tensor(exact).double()
    assert bool((apart.abs() < allowed).all()), (
        f"off by {apart.tolist()}, allowed {allowed.tolist()}"
    )


# Products


@NUMPY
@pytest.mark.parametrize(
    ("laws", "exponents"),
    [
        ([GAUSS], [2.0]),
        ([MIXED], [2.0]),
        ([MIXED], [0.6]),
        ([GAUSS, MIXED], [1.0, 1.0]),
        ([MIXED, WIDE], [2.0, -1.0]),
        ([MIXED, GAUSS], [0.5, 0.5]),
    ],
)
def test_products_have_their_law(laws: list[Law], exponents: list[float]) -> None:
    """At 64 steps within 0.015 of log-normaliser, mean and variance."""
    model = ProductCorrector([diffusion(law, 64) for law in laws], exponents)
    total = sum(e * log_density(law) for e, law in zip(exponents, laws, strict=True))
    assert isinstance(total, Tensor)
    assert_close(draw(model), on_grid(total), [0.015] * 3)


def test_a_power_of_a_gaussian_has_constant_weights() -> None:
    """The linear drift is the one for which rates do not depend on the state."""
    model = ProductCorrector.annealed(diffusion(([1.0], [0.0], [0.7]), 32), 2.0, variance=0.7)
    result = draw(model, 1000)
    assert float(result.log_weights.std()) < 1e-4
    exact = -0.5 * math.log(2 * math.pi * 0.7) - 0.5 * math.log(2.0)
    assert float(result.log_normalizer) == pytest.approx(exact, abs=0.01)


def test_without_the_linear_drift_weights_fluctuate() -> None:
    base = diffusion(GAUSS, 32)
    with_drift = draw(ProductCorrector.annealed(base, 2.0), 4000).get_ESS()
    without = draw(ProductCorrector.annealed(base, 2.0, variance=None), 4000).get_ESS()
    assert float(with_drift) > 2000 and float(without) < 200


def error_of_variance(steps: int, power: float, second_order: bool) -> float:
    """
    How far the variance of x_1 is off, relatively, found from the linear kernels alone.

    The last step has no noise, whatever comes before, and is left out.
    """
    law: Law = ([1.0], [0.0], [0.5])
    base = diffusion(law, steps)
    options: dict[str, Any] = {"variance": 0.5, "second_order": second_order}
    model = ProductCorrector.annealed(base, power, **options)
    covariance = torch.zeros(2, 2).double()
    covariance[0, 0] = model.schedule.init_std**2
    for t in model.timesteps[:-1]:
        slope = 0.5 * base.schedule[t].alpha / noised_variance(base, t)
        rows = []
        for x, before in ((1.0, 0.0), (0.0, 1.0)):
            state = {"x": tensor([x]), "x0_hat": tensor([slope * x])}
            if t < steps:
                state["x0_hat_before"] = tensor([before])
            kernel = model.kernel(state, t)
            rows.append([float(kernel.mean), slope * x])
        move = tensor(rows).double().T
        covariance = move @ covariance @ move.T
        covariance[0, 0] += float(kernel.variance)
    return float(covariance[0, 0]) * power / noised_variance(base, 1) - 1.0


def noised_variance(base: GaussianDiffusion, t: int) -> float:
    step = base.schedule[t]
    return 0.5 * step.alpha**2 + step.sigma**2


@NUMPY
@pytest.mark.parametrize(
    ("power", "second_order", "low", "high"),
    [(1.0, False, 1.7, 2.2), (2.0, False, 1.7, 2.2), (0.6, True, 2.9, 4.4), (2.0, True, 2.9, 4.4)],
)
def test_order_of_the_law(power: float, second_order: bool, low: float, high: float) -> None:
    """Twice the steps: half of the error with plain predictions, a quarter extrapolated."""
    errors = [error_of_variance(steps, power, second_order) for steps in (250, 500)]
    assert low < errors[0] / errors[1] < high, errors


def test_order_of_the_normaliser() -> None:
    """That of a power of a Gaussian has no Monte Carlo error: the trapezoid's is left."""
    exact = -0.5 * math.log(2 * math.pi * 0.7) - 0.5 * math.log(2.0)
    errors = []
    for steps in (50, 100, 200):
        base = diffusion(([1.0], [0.0], [0.7]), steps)
        model = ProductCorrector.annealed(base, 2.0, variance=0.7)
        errors.append(abs(float(draw(model, 2).log_normalizer) - exact))
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2], errors


def conditional(steps: int, **options: Any) -> GaussianDiffusion:
    """A model with the classes 0 and 1, and a null condition 2: all of the data."""
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    narrow = GaussianDenoiser(tensor([0.8]), tensor(0.3), scheduler)
    wide = GaussianDenoiser(tensor([0.0]), tensor(1.0), scheduler)

    def network(x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        null = (class_labels == 2)[:, None]
        return torch.where(null, wide(x, timestep), narrow(x, timestep))

    settings: dict[str, Any] = {
        "conditioning": {"class_labels": 0},
        "null_conditioning": {"class_labels": 2},
        "num_inference_steps": steps,
        **options,
    }
    return GaussianDiffusion(network, scheduler, (1,), **settings)


@NUMPY
def test_guidance_samples_what_it_says() -> None:
    """At 64 steps within 0.015; guidance alone has a mean 0.03 away and no log-normaliser."""
    model = ProductCorrector.guided(conditional(64, guidance_scale=2.5))
    assert model.exponents == (2.5, -1.5)
    total = 2.5 * log_density(([1.0], [0.8], [0.3])) - 1.5 * log_density(WIDE)
    assert_close(draw(model), on_grid(total), [0.015] * 3)


def test_rate_of_guidance() -> None:
    """Half of ``w (w - 1)`` times the squared difference of the scores, and nothing else."""
    model = ProductCorrector.guided(conditional(16), 3.0)
    state: dict[str, Tensor] = {"x": torch.linspace(-2, 2, 5)[:, None]}
    t = 9
    model._write(state, t, state["x"])
    step = model.schedule[t]
    score = [
        -(state["x"] - step.alpha * mean) / (step.alpha**2 * variance + step.sigma**2)
        for mean, variance in ((0.8, 0.3), (0.0, 1.0))
    ]
    expected = 0.5 * 3.0 * 2.0 * step.sigma**2 * (score[0] - score[1]).square().sum(-1)
    assert torch.allclose(state["rate"], expected.double(), rtol=1e-4)


def test_scale_one_is_the_conditional_model() -> None:
    result = draw(ProductCorrector.guided(conditional(8), 1.0), 100)
    assert result.log_weights.abs().max() < 1e-6
    assert result.counts["denoiser"] == 800
    assert draw(ProductCorrector.guided(conditional(8), 2.0), 100).counts["denoiser"] == 1600


@NUMPY
@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler])
def test_schedules_that_begin_without_signal(scheduler: Any) -> None:
    """At 64 steps within 0.04."""
    base = diffusion(MIXED, 64, kind=scheduler)
    model = ProductCorrector.annealed(base, 1.5)
    assert_close(draw(model), on_grid(1.5 * log_density(MIXED)), [0.04] * 3)


def test_kernels_of_one_model_are_those_of_ddpm() -> None:
    base = diffusion(MIXED, 12)
    model = ProductCorrector.annealed(base, 1.0, second_order=False)
    for t in base.timesteps:
        one, other = base.schedule[t].without_eps(), model.schedule[t]
        for name in ("x0_coef", "x_coef", "std"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-6), (t, name)


def test_products_run_in_an_engine() -> None:
    """Images, classes in a plate, resampling and a reward on top."""
    scheduler = DDPMScheduler(clip_sample=False)
    denoiser = GaussianDenoiser(torch.zeros(1, 2, 2), tensor(0.25), scheduler)
    options: dict[str, Any] = {"num_inference_steps": 6, "plate": ("classes", 3)}
    base = GaussianDiffusion(denoiser, scheduler, (1, 2, 2), **options)
    model = RewardTilted(
        ProductCorrector.annealed(base, 1.5, variance=0.25), lambda x: x.mean((1, 2, 3))
    )
    result = TwistedSMC(
        model, None, 16, 1, population_plate="classes", ess_threshold=1.0, seed=0
    ).run()
    assert result.state["x"].shape == (16, 3, 1, 2, 2)
    assert result.log_normalizer.shape == (3,) and result.log_weights.isfinite().all()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda base: ProductCorrector([]), "empty"),
        (lambda base: ProductCorrector([base], [0.0]), "exponents"),
        (lambda base: ProductCorrector([base], [-1.0]), "sum is positive"),
        (lambda base: ProductCorrector([base], [1.0, 2.0]), "2 exponents for 1"),
        (lambda base: ProductCorrector([base], [2.0], variance=0.0), "variance=0.0"),
        (lambda base: ProductCorrector([base, diffusion(MIXED, 5)]), "kernels of model 1"),
        (lambda base: ProductCorrector.guided(base, 2.0), "no null_conditioning"),
        (lambda base: ProductCorrector.guided(conditional(4), torch.ones(2)), "give a number"),
    ],
)
def test_products_refuse(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(diffusion(MIXED, 4))


# Rewards


def quadratic(x: Tensor) -> Tensor:
    return -0.5 * (x[:, 0] - 1.0) ** 2


def rewarded(law: Law, steps: int, strength: float, **options: Any) -> RewardCorrector:
    tilted = RewardTilted(diffusion(law, steps), quadratic, scale=2.0, decode=False)
    return RewardCorrector(tilted, strength, **options)


def tilted_law(law: Law) -> tuple[float, float, float]:
    return on_grid(log_density(law) - (GRID - 1.0) ** 2)


@NUMPY
@pytest.mark.parametrize("law", [GAUSS, MIXED])
@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8])
def test_tilted_marginals(law: Law, strength: float) -> None:
    """At 64 steps within 0.015 of log-normaliser, mean and variance, whatever the drift."""
    assert_close(draw(rewarded(law, 64, strength)), tilted_law(law), [0.015] * 3)


@NUMPY
@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_tilted_marginals_of_predictions(strength: float) -> None:
    """At 64 steps within 0.02, and 0.08 of log-normaliser, which is of the first order."""
    model = rewarded(MIXED, 64, strength, at="prediction")
    assert_close(draw(model), tilted_law(MIXED), [0.08, 0.02, 0.02])


@NUMPY
@pytest.mark.parametrize(
    ("at", "low", "high"), [("state", 6.0, math.inf), ("prediction", 2.0, 6.0)]
)
def test_order_of_tilted_normalisers(at: Any, low: float, high: float) -> None:
    """Four times the steps: sixteenth and quarter of the error, in short runs no clean powers."""
    law: Law = ([1.0], [0.5], [0.5])
    exact, errors = tilted_law(law)[0], []
    for steps in (10, 40):
        model = rewarded(law, steps, 0.0 if at == "state" else 0.5, at=at)
        errors.append(abs(float(draw(model).log_normalizer) - exact))
    assert low < errors[0] / errors[1] < high, errors


def rates(laplacian: Any, copies: int = 1) -> Tensor:
    scheduler = DDPMScheduler(clip_sample=False)
    means = tensor([[1.0, 0.0, 0.5], [-1.0, 0.3, 0.0]])
    denoiser = GaussianMixtureDenoiser(torch.ones(2), means, tensor([0.4, 0.3]), scheduler)
    base = GaussianDiffusion(denoiser, scheduler, (3,), num_inference_steps=10)
    reward = RewardTilted(base, lambda x: (x[:, 0] * x[:, 1]) - x.square().sum(-1), decode=False)
    model = RewardCorrector(reward, 1.0, at="prediction", laplacian=laplacian)
    state: dict[str, Tensor] = {}
    torch.manual_seed(0)
    model._write(state, 5, tensor([0.3, -0.4, 0.2]).expand(copies, 3))
    return state["rate"]


def test_hutchinson_is_unbiased() -> None:
    """One probe for each of 20,000 copies, and four; z-tests."""
    [exact] = rates("exact")
    for probes in (1, 4):
        estimates = rates(probes, 20_000)
        assert float(estimates.std()) > 1e-4
        assert_mean(estimates, float(exact))
    assert abs(float(rates("none")) - float(exact)) > 0.05


@NUMPY
def test_leaving_the_laplacian_out_is_biased() -> None:
    exact, _, _ = tilted_law(MIXED)
    found, errors = found_in(draw(rewarded(MIXED, 64, 0.8, laplacian="none")))
    assert found[0] - exact > 0.3 > 10 * errors[0]


def test_half_of_the_gradient_needs_no_laplacian() -> None:
    found = [draw(rewarded(MIXED, 8, 0.5, laplacian=one), 50) for one in ("exact", "none", 2)]
    for other in found[1:]:
        assert torch.equal(found[0].log_weights, other.log_weights)


def test_the_end_is_written_and_not_weighted_again() -> None:
    import pyro.poutine as poutine

    model = rewarded(MIXED, 5, 0.5)
    with poutine.trace() as tracer:
        model()
    names = [name for name in tracer.trace.nodes if name.startswith(("x_", "corrector", "reward"))]
    expected = ["x_5", "corrector_5"]
    for t in range(4, -1, -1):
        expected += [f"x_{t}", f"corrector_{t}"]
    assert names == expected
    result = TwistedSMC(model, None, 8, seed=0).run()
    assert torch.allclose(result.state["reward"], quadratic(result.state["x"]).double())
    assert result.counts == {"denoiser": 40, "reward": 48}


def test_marginals_run_in_an_engine() -> None:
    """Images, classes in a plate and resampling."""
    scheduler = DDPMScheduler(clip_sample=False)
    denoiser = GaussianDenoiser(torch.zeros(1, 2, 2), tensor(0.25), scheduler)
    options: dict[str, Any] = {"num_inference_steps": 6, "plate": ("classes", 3)}
    base = GaussianDiffusion(denoiser, scheduler, (1, 2, 2), **options)
    model = RewardCorrector(RewardTilted(base, lambda x: x.mean((1, 2, 3)), 3.0), 1.0)
    result = TwistedSMC(
        model, None, 16, 1, population_plate="classes", ess_threshold=1.0, seed=0
    ).run()
    assert result.state["x"].shape == (16, 3, 1, 2, 2)
    assert result.log_normalizer.shape == (3,) and result.log_weights.isfinite().all()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda base: RewardCorrector(base), "no factors on its end"),
        (lambda base: RewardCorrector(tilt(MixtureOfModels([base, base]))), "MixtureOfModels"),
        (lambda base: RewardCorrector(tilt(base), -1.0), "strength=-1.0"),
        (lambda base: RewardCorrector(tilt(base), "half"), "strength='half'"),
        (lambda base: RewardCorrector(tilt(base), ramp=0.5), "ramp=0.5"),
        (lambda base: RewardCorrector(tilt(base), at="end"), "at='end'"),
        (lambda base: RewardCorrector(tilt(base), laplacian=0), "laplacian=0"),
        (lambda base: RewardCorrector(tilt(base), laplacian="some"), "laplacian='some'"),
        (lambda base: draw(RewardCorrector(tilt(base, black_box)), 2), "no gradient"),
    ],
)
def test_rewards_refuse(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(diffusion(MIXED, 4))


def tilt(base: Any, reward: Any = quadratic) -> RewardTilted:
    return RewardTilted(base, reward, decode=False)


def black_box(x: Tensor) -> Tensor:
    return quadratic(x.detach())
