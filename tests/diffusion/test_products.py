# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Products and mixtures of diffusion models against closed forms.

Z-tests fail by chance once in a million each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor, tensor
from torch.nn.functional import one_hot

from pyro_twist import handlers
from pyro_twist.diffusion import (
    GaussianDenoiser,
    GaussianDiffusion,
    GaussianMixtureDenoiser,
    MixtureOfModels,
    ProductOfModels,
    conditioned,
)
from pyro_twist.infer import ImportanceSampling, TrustRegionTwist, TwistedSMC
from pyro_twist.latents import AutoLatents, JointTwist, WithLatents
from pyro_twist.rewards import RewardTilted, Tilted
from pyro_twist.twists import LookaheadTwist
from tests.infer.composition import composes, refuses
from tests.infer.test_diffusion_oracles import chain_law
from tests.statistics import assert_tilted_mean, assert_unbiased

COMBINED = "Several models at once"
REPLICATES = 200
PLATE = ("replicates", REPLICATES)
NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def scheduler_of(kind: Any = DDPMScheduler) -> Any:
    options = {} if kind is EulerAncestralDiscreteScheduler else {"clip_sample": False}
    return kind(timestep_spacing="trailing", **options)


def gaussian(mean: float, variance: float, *, kind: Any = DDPMScheduler, **options: Any) -> Any:
    settings: dict[str, Any] = {"num_inference_steps": 6, "plate": PLATE, **options}
    scheduler = scheduler_of(kind)
    denoiser = GaussianDenoiser(tensor([mean]), tensor([variance]), scheduler)
    return GaussianDiffusion(denoiser, scheduler, (1,), **settings)


def mixture(
    weights: Sequence[float],
    means: Sequence[float],
    variances: Sequence[float],
    *,
    kind: Any = DDPMScheduler,
    **options: Any,
) -> Any:
    settings: dict[str, Any] = {"num_inference_steps": 6, "plate": PLATE, **options}
    scheduler = scheduler_of(kind)
    denoiser = GaussianMixtureDenoiser(
        tensor(weights), tensor(means)[:, None], tensor(variances), scheduler
    )
    return GaussianDiffusion(denoiser, scheduler, (1,), **settings)


ONE = ([0.6, 0.4], [-0.9, 0.8], [0.3, 0.2])
OTHER = ([0.3, 0.7], [-0.4, 1.1], [0.5, 0.4])
GRID = torch.linspace(-6, 6, 4001, dtype=torch.float64)


def product_on_grid(
    exponents: Sequence[float], parts: Sequence[Any], slope: float = 0.0
) -> tuple[float, float, float]:
    """Log-normaliser, mean and second moment of a product of mixtures, by quadrature."""
    total = slope * GRID
    for exponent, (weights, means, variances) in zip(exponents, parts, strict=True):
        law = dist.Normal(tensor(means).double(), tensor(variances).double().sqrt())
        terms = law.log_prob(GRID[:, None]) + tensor(weights).double().log()
        total = total + exponent * terms.logsumexp(-1)
    z = float(torch.trapezoid(total.exp(), GRID))
    moments = [float(torch.trapezoid(total.exp() * GRID**k, GRID)) / z for k in (1, 2)]
    return math.log(z), moments[0], moments[1]


def run(model: Any, guide: Any = None, size: int = 32, **options: Any) -> Any:
    settings: dict[str, Any] = {"population_plate": "replicates", "seed": 0, **options}
    return TwistedSMC(model, guide, size, 1, **settings).run()


def assert_law(result: Any, log_z: float, mean: float, second: float | None = None) -> None:
    if float(result.log_normalizer.std()) < 1e-6:
        assert result.log_normalizer.mean().item() == pytest.approx(log_z, abs=1e-5)
    else:
        assert_unbiased(result.log_normalizer, log_z)
    found = result.expectation("x")[..., 0]
    assert_tilted_mean(result.log_normalizer, found, log_z, mean)
    if second is not None:
        found = result.expectation(lambda state: state["x"].double().square())[..., 0]
        assert_tilted_mean(result.log_normalizer, found, log_z, second)


# Products of the laws of the data


@composes(
    COMBINED,
    '`ProductOfModels(..., target="marginals")`, where densities of the noised data are known',
    "the product of the laws of the data, to any exponents, exactly, with any number of steps",
)
@NUMPY
@pytest.mark.parametrize(
    ("kind", "exponents"),
    [
        (DDPMScheduler, (1.0, 1.0)),
        (DDPMScheduler, (1.5, -0.5)),
        (DDIMScheduler, (0.7, 0.3)),
        (EulerAncestralDiscreteScheduler, (1.0, 1.0)),
    ],
)
def test_products_of_mixtures_are_exact(kind: Any, exponents: tuple[float, float]) -> None:
    """With six steps, of which none is the reversal of anything: weights make up for it."""
    models = [mixture(*ONE, kind=kind), mixture(*OTHER, kind=kind)]
    model = ProductOfModels(models, exponents, target="marginals")
    assert_law(run(model, size=24), *product_on_grid(exponents, [ONE, OTHER]))


@composes(
    COMBINED,
    "rewards and twists on a product",
    "as on any model",
)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("looking", [False, True])
def test_rewards_on_a_product(threshold: float, looking: bool) -> None:
    models = [mixture(*ONE), mixture(*OTHER)]
    product = ProductOfModels(models, target="marginals")
    model = RewardTilted(product, lambda x: x[:, 0], scale=0.8, decode=False)
    guide = LookaheadTwist(model) if looking else None
    result = run(model, guide, 24, ess_threshold=threshold)
    assert_law(result, *product_on_grid((1.0, 1.0), [ONE, OTHER], slope=0.8))


def test_a_product_of_one_is_the_model_itself_with_the_data_as_its_end() -> None:
    model = ProductOfModels([mixture(*ONE)], target="marginals")
    assert_law(run(model), 0.0, *product_on_grid((1.0,), [ONE])[1:])


def test_equal_gaussians_weigh_next_to_nothing_more() -> None:
    """N(m, v)^2 is N(m, v/2): noise divided by the root of two leads there."""
    fine = {"num_inference_steps": 60, "plate": None}
    model = ProductOfModels([gaussian(0.3, 0.6, **fine)] * 2, target="marginals")
    result = TwistedSMC(model, None, 400, seed=0).run()
    assert result.log_normalizer.item() == pytest.approx(
        -0.5 * math.log(4 * math.pi * 0.6), abs=0.1
    )
    assert result.get_ESS() > 200


# Products of the laws of paths


def path_product(
    models: Sequence[Any], exponents: Sequence[float], stds: Sequence[float]
) -> tuple[float, float]:
    """
    Log-normaliser and mean of ``x_0`` of a product of linear-Gaussian chains in one dimension.

    Written down once more, as one quadratic form in the whole path.
    """
    first, total = models[0], sum(exponents)
    size = len(first.timesteps) + 1
    precision = torch.zeros(size, size, dtype=torch.float64)
    linear, const = torch.zeros(size, dtype=torch.float64), 0.0
    scale = first.schedule.init_std
    log_base = 0.5 * math.log(2 * math.pi * scale**2 / total)
    precision[0, 0] += total / scale**2
    for place, (t, std) in enumerate(zip(first.timesteps, stds, strict=True)):
        log_base += 0.5 * math.log(2 * math.pi * std**2 / total)
        for model, exponent in zip(models, exponents, strict=True):
            points = tensor([[0.0], [1.0]])
            state = {"x": points}
            model._write(state, t, points)
            zero, one = model.kernel(state, t).mean.double().flatten().tolist()
            row = torch.zeros(size, dtype=torch.float64)
            row[place + 1], row[place] = 1.0, -(one - zero)
            precision += exponent * torch.outer(row, row) / std**2
            linear += exponent * row * zero / std**2
            const += exponent * zero**2 / std**2
    mean = torch.linalg.solve(precision, linear)
    log_det = float(torch.logdet(precision))
    log_z = 0.5 * float(linear @ mean) - 0.5 * const
    return log_z + 0.5 * (size * math.log(2 * math.pi) - log_det) - log_base, float(mean[-1])


@composes(
    COMBINED,
    "`ProductOfModels(...)`, where only denoisers are known",
    "the product of the laws of whole paths, exactly",
)
@NUMPY
@pytest.mark.parametrize(
    ("kind", "exponents", "last_std"),
    [
        (DDPMScheduler, (1.0, 1.0), None),
        (DDPMScheduler, (1.0, 0.8, -0.8), 0.3),
        (DDIMScheduler, (0.6, 0.4), None),
        (EulerAncestralDiscreteScheduler, (1.0, 1.0), 0.3),
    ],
)
def test_products_of_paths_are_exact(
    kind: Any, exponents: tuple[float, ...], last_std: float | None
) -> None:
    laws = [(0.4, 0.8), (-0.2, 0.5), (0.0, 1.0)][: len(exponents)]
    models = [gaussian(*law, kind=kind) for law in laws]
    product = ProductOfModels(models, exponents, last_std=last_std)
    steps = models[0].schedule.steps
    stds = [step.std for step in steps]
    stds[-1] = last_std or steps[-1].sigma / steps[-1].alpha
    assert_law(run(product, size=24), *path_product(models, exponents, stds))


def end_of_paths(product: Any, *, weighted: bool) -> float:
    """The mean of ``x_0`` in one dimension, step by step on a grid, without any sampling."""
    grid = torch.linspace(-4.5, 4.5, 451, dtype=torch.float64)
    x, width = grid[:, None].float(), float(grid[1] - grid[0])
    law = product.initial().log_prob(x).double().exp()
    for t in product.timesteps:
        state = {"x": x}
        product._write(state, t, x)
        kernel = product.kernel(state, t)
        law = law * product._log_agreement.exp() if weighted else law
        moved = dist.Normal(kernel.mean.double(), product.schedule[t].std).log_prob(grid)
        law = law @ moved.exp()
        law = law / (law.sum() * width)
    return float((law * grid).sum() * width)


@composes(
    COMBINED,
    "the same with exponents that sum to one",
    "its end becomes the product of the laws of the data as steps get finer; adding up predictions "
    "without weights does not lead there",
)
def test_fine_steps_bring_the_product_of_paths_to_that_of_the_data() -> None:
    """For exponents with sum one, from denoisers alone; adding up predictions ends elsewhere."""
    exponents, options = (2.0, -1.0), {"num_inference_steps": 40, "plate": None}
    product = ProductOfModels([mixture(*ONE, **options), mixture(*OTHER, **options)], exponents)
    _, mean, _ = product_on_grid(exponents, [ONE, OTHER])
    assert end_of_paths(product, weighted=True) == pytest.approx(mean, abs=0.005)
    assert abs(end_of_paths(product, weighted=False) - mean) > 0.08


@refuses(
    COMBINED,
    "the same with exponents of another sum, taken for a product of the laws of the data",
    "another law, however fine the steps; give densities, or a condition and its null model",
)
def test_exponents_of_another_sum_lead_elsewhere() -> None:
    """As documented, the product of paths is then not that of the data, however fine the steps."""
    options = {"num_inference_steps": 40, "plate": None}
    product = ProductOfModels([mixture(*ONE, **options), mixture(*OTHER, **options)])
    _, mean, _ = product_on_grid((1.0, 1.0), [ONE, OTHER])
    assert abs(end_of_paths(product, weighted=True) - mean) > 0.04


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_kernels_and_agreement_are_the_product_of_kernels(kind: Any, clipped: bool) -> None:
    """But for a known constant of the step; clipped predictions have a noise of their own."""
    scheduler = kind(timestep_spacing="trailing", clip_sample=clipped, clip_sample_range=0.3)
    models = [
        GaussianDiffusion(
            GaussianDenoiser(tensor([mean]), tensor([variance]), scheduler),
            scheduler,
            (1,),
            num_inference_steps=6,
        )
        for mean, variance in ((0.4, 0.8), (-0.6, 0.5))
    ]
    exponents, total = (1.5, 0.7), 2.2
    product = ProductOfModels(models, exponents)
    x, after = torch.randn(2, 9, 1, generator=torch.Generator().manual_seed(0))
    laws = [(product.initial(), 0.0, [one.initial() for one in models], 1.0)]
    for t in product.timesteps[:-1]:
        states: list[dict[Any, Tensor]] = [{}, {}, {}]
        for model, state in zip((product, *models), states, strict=True):
            model._write(state, t, x)
        kernels = [model.kernel(state, t) for model, state in zip(models, states[1:], strict=True)]
        std = models[0].schedule[t].std
        laws.append((product.kernel(states[0], t), product._log_agreement, kernels, std))
    for law, agreement, parts, std in laws:
        found = law.log_prob(after) + agreement
        wanted = sum(b * one.log_prob(after) for b, one in zip(exponents, parts, strict=True))
        constant = 0.5 * (math.log(total) + (total - 1) * math.log(2 * math.pi * std**2))
        assert torch.allclose(found.double(), wanted.double() + constant, rtol=1e-4, atol=1e-3)


def test_models_that_agree_weigh_nothing() -> None:
    product = ProductOfModels([gaussian(0.3, 0.6)] * 3, (1.0, 0.5, -0.5))
    result = run(product, size=8)
    assert torch.allclose(result.log_weights, torch.zeros(8, REPLICATES).double(), atol=1e-6)
    assert result.counts == {"denoiser": 3 * 8 * 6 * REPLICATES}


# Conditions


def classes(plate: Any = PLATE, steps: int = 6) -> GaussianDiffusion:
    """Numbers around -1 or 1 by class, and in between without a class."""
    scheduler = scheduler_of()
    laws = [gaussian(-0.5, 0.6), gaussian(0.5, 0.8), gaussian(0.0, 1.0)]
    networks = [law.denoiser.network for law in laws]

    def denoiser(x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        outputs = torch.stack([network(x, timestep) for network in networks])
        return outputs[class_labels, torch.arange(len(x))]

    return GaussianDiffusion(
        denoiser,
        scheduler,
        (1,),
        num_inference_steps=steps,
        conditioning={"class_labels": 0},
        null_conditioning={"class_labels": 2},
        plate=plate,
    )


@composes(
    COMBINED,
    "`ProductOfModels.of_conditions`: several classes at once, guidance with weights",
    "the product of conditional laws of paths over powers of the unconditional one",
)
@pytest.mark.parametrize("strength", [1.0, 1.5, (1.0, 0.4)])
def test_two_conditions_at_once(strength: Any) -> None:
    model = classes()
    both = ProductOfModels.of_conditions(
        model, [{"class_labels": 0}, {"class_labels": 1}], strength
    )
    wanted = (strength, strength) if isinstance(strength, float) else strength
    exponents = (*wanted, 1 - sum(wanted))
    assert both.exponents == pytest.approx(exponents[: len(both.models)])
    stds = [step.std for step in model.schedule.steps]
    stds[-1] = model.schedule[1].sigma / model.schedule[1].alpha
    parts = [conditioned(model, {"class_labels": k}) for k in (0, 1, 2)]
    assert_law(run(both, size=24), *path_product(parts, exponents, stds))
    assert model.counts == {"denoiser": 0}


def test_guidance_with_weights_is_a_product() -> None:
    """One condition of strength w: guided kernels are the proposal, the weights are the rest."""
    model = classes(plate=None)
    guided = ProductOfModels.of_conditions(model, [{"class_labels": 1}], 2.0)
    twin = classes(plate=None)
    twin.denoiser.conditioning["class_labels"] = tensor(1)
    twin.denoiser.guidance_scale = 2.0
    state = {"x": torch.randn(5, 1)}
    other = dict(state)
    guided._write(state, 4, state["x"])
    twin._write(other, 4, other["x"])
    assert torch.allclose(state["x0_hat"], other["x0_hat"], atol=1e-5)
    plain = ProductOfModels.of_conditions(model, [{"class_labels": 1}])
    assert len(plain.models) == 1


@composes(
    COMBINED,
    "a condition of a product that is itself a latent",
    "the model reads the entry of the state that `reads=` names; the others do not",
)
def test_which_conditions_can_be_latent() -> None:
    """Of two conditions the second is drawn; the models see what `reads` names, and no more."""
    model = classes()
    both = ProductOfModels.of_conditions(
        model,
        [{"class_labels": 0}, {"class_labels": 1}],
        reads=[{}, {"class_labels": "second"}, {}],
    )

    def prior() -> dict[str, Tensor]:
        second = pyro.sample("second", dist.Categorical(tensor([0.5, 0.5])))
        return {"second": second, "class_labels": second}

    stds = [step.std for step in model.schedule.steps]
    stds[-1] = model.schedule[1].sigma / model.schedule[1].alpha
    log_zs = []
    for second in (0, 1):
        parts = [conditioned(model, {"class_labels": k}) for k in (0, second, 2)]
        log_zs.append(path_product(parts, (1.0, 1.0, -1.0), stds)[0])
    z = tensor(log_zs, dtype=torch.float64).exp() / 2
    result = run(WithLatents(both, prior), size=24)
    log_z = float(z.sum().log())
    assert_unbiased(result.log_normalizer, log_z)
    share = result.expectation(lambda state: state["second"].double())
    assert_tilted_mean(result.log_normalizer, share, log_z, float(z[1] / z.sum()))


# Mixtures


def averaged(k: float) -> tuple[list[Any], Tensor, float, float, float]:
    """Two models with a linear reward: log Z, the second model's posterior and the mean."""
    models, weights = [gaussian(-0.4, 0.5), gaussian(0.6, 0.9)], tensor([0.7, 0.3])
    means, variances = (torch.cat(one) for one in zip(*map(chain_law, models), strict=True))
    terms = weights.double().log() + k * means + 0.5 * k**2 * variances
    shares = terms.softmax(0)
    mean = float((shares * (means + k * variances)).sum())
    return models, weights, float(terms.logsumexp(0)), float(shares[1]), mean


@composes(
    COMBINED,
    "`MixtureOfModels`: which model, as a latent",
    "its posterior is that over models; a state is evaluated by its own model alone",
)
@pytest.mark.parametrize("kind", ["prior", "look-ahead", "automatic"])
def test_model_averaging(kind: str) -> None:
    models, weights, log_z, share, mean = averaged(0.7)
    mixed = MixtureOfModels(models, weights)
    model = RewardTilted(mixed, lambda x: x[:, 0], scale=0.7, decode=False)
    look = LookaheadTwist(model)
    guide = {"prior": None, "look-ahead": look, "automatic": JointTwist(look, AutoLatents(model))}
    result = run(model, guide[kind])
    assert_law(result, log_z, mean)
    found = result.expectation(lambda state: one_hot(state["component"], 2))
    assert_tilted_mean(result.log_normalizer, found[:, 1], log_z, share)
    assert result.counts["denoiser"] == 32 * 6 * REPLICATES
    assert all(0 < one.denoiser.num_rows for one in models)


@composes(
    COMBINED,
    "`condition` on which model",
    "its prior probability is part of the weight",
)
def test_the_model_can_be_observed() -> None:
    models, weights, _, _, _ = averaged(0.0)
    mixed = handlers.condition(MixtureOfModels(models, weights), {"component": tensor(1)})
    result = run(mixed, size=16)
    mean, _ = chain_law(models[1])
    assert_law(result, math.log(0.3), float(mean))


def test_rows_go_to_their_own_models() -> None:
    models = [gaussian(-3.0, 0.01, plate=None), gaussian(3.0, 0.01, plate=None)]
    result = ImportanceSampling(MixtureOfModels(models, [0.5, 0.5]), 40, seed=0).run()
    sign = 2.0 * result.state["component"] - 1
    assert (result.state["x"][:, 0] * sign > 2).all() and sign.unique().numel() == 2


def test_twists_are_learned_on_combinations() -> None:
    """The default twist of a tilted product or mixture."""
    models = [mixture(*ONE, plate=None), mixture(*OTHER, plate=None)]
    for combined in (ProductOfModels(models), MixtureOfModels(models)):
        model = RewardTilted(combined, lambda x: x[:, 0], scale=1.0, decode=False)
        result = TrustRegionTwist(model, None, 16, num_iterations=1, seed=0).run()
        assert torch.isfinite(result.log_normalizer)
        assert combined.known_share().shape == (7,)


# What is refused


@refuses(
    COMBINED,
    "models of other noise levels, kernels or shapes; rewards or latents inside a combination",
    "error; put rewards, latents and handlers around it",
)
def test_models_that_do_not_fit_together() -> None:
    model = gaussian(0.0, 1.0)
    others = {
        "plain GaussianDiffusion models": ProductOfModels([model]),
        "a Tilted": Tilted(model, lambda state, x0: None),
        "kernels of model 1": gaussian(0.0, 1.0, num_inference_steps=7),
        "kernels of model 1 ": gaussian(0.0, 1.0, kind=DDIMScheduler, eta=0.5),
        "event shape": GaussianDiffusion(
            GaussianDenoiser(torch.zeros(2), torch.ones(2), scheduler_of()),
            scheduler_of(),
            (2,),
            num_inference_steps=6,
            plate=PLATE,
        ),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message.strip()):
            ProductOfModels([model, other])
    with pytest.raises(ValueError, match="is empty"):
        MixtureOfModels([])


def test_exponents_and_weights_that_do_not_fit() -> None:
    pair = [gaussian(0.0, 1.0), gaussian(0.5, 1.0)]
    for exponents in [(1.0,), (1.0, 0.0), (1.0, -1.0), (math.inf, 1.0)]:
        with pytest.raises(ValueError, match="exponents"):
            ProductOfModels(pair, exponents)
    for weights in [(1.0,), (-1.0, 2.0), (0.0, 0.0), (math.inf, 1.0), (math.nan, 1.0)]:
        with pytest.raises(ValueError, match="none negative"):
            MixtureOfModels(pair, weights)
    with pytest.raises(ValueError, match="name='x' is an entry that the models write"):
        MixtureOfModels(pair, name="x")
    with pytest.raises(ValueError, match="last_std=0"):
        ProductOfModels(pair, last_std=0.0)
    with pytest.raises(ValueError, match="target='ends'"):
        ProductOfModels(pair, target="ends")  # type: ignore[arg-type]


def test_densities_that_are_not_known() -> None:
    with pytest.raises(ValueError, match="take target='paths'"):
        ProductOfModels([classes()], target="marginals")


def test_conditions_that_do_not_fit() -> None:
    model = classes()
    with pytest.raises(ValueError, match=r"\['label'\] is no conditioning"):
        ProductOfModels.of_conditions(model, [{"label": 0}])
    with pytest.raises(ValueError, match="2 strengths for 1 conditions"):
        ProductOfModels.of_conditions(model, [{"class_labels": 0}], (1.0, 1.0))
    with pytest.raises(ValueError, match="null_conditioning"):
        ProductOfModels.of_conditions(gaussian(0.0, 1.0), [{}])
    with pytest.raises(ValueError, match="reads has 1 entries"):
        ProductOfModels([model, model], reads=[{}])
    with pytest.raises(ValueError, match="no conditioning of model 1"):
        ProductOfModels([model, model], reads=[{}, {"label": "second"}])
    product = ProductOfModels([model], reads=[{"class_labels": "second"}])
    with pytest.raises(ValueError, match=r"reads names state\['second'\]"):
        run(product)
    listed = conditioned(model, {"class_labels": torch.zeros(REPLICATES, dtype=torch.long)})
    with pytest.raises(ValueError, match="one entry for each of a plate"):
        MixtureOfModels([listed])
    mixed = handlers.do(MixtureOfModels([model]), {"component": tensor(2)})
    with pytest.raises(ValueError, match="'component' is 2"):
        run(mixed)


def test_densities_of_the_data_itself() -> None:
    network = mixture(*ONE).denoiser.network
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    weights, means, variances = (tensor(one).double() for one in ONE)
    law = dist.Normal(means, variances.sqrt()).log_prob(x) + weights.log()
    assert torch.allclose(network.log_prob(x, None), law.logsumexp(-1), atol=1e-6)


def test_two_digits_at_once_on_the_zoo() -> None:
    """Three evaluations for each state, and weights that the disagreement of the networks makes."""
    from pyro_twist import zoo

    digits = zoo.load("digits", num_inference_steps=4)
    both = ProductOfModels.of_conditions(digits, [{"class_labels": k} for k in (3, 8)])
    result = TwistedSMC(both, None, 6, seed=0, ess_threshold=0.0).run()
    assert result.counts == {"denoiser": 3 * 4 * 6}
    assert torch.isfinite(result.log_weights).all() and result.log_weights.std() > 0.01
    assert both.decode(result.state["x"]).shape == (6, 1, 8, 8)
