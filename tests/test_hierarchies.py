# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Sets of samples, shared latents, unknown reward weights: laws and normalisers in closed form.

Z-tests fail by chance once in a million. Most tests are rows of ``docs/composition_table.md``.
"""

from __future__ import annotations

import math
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, tensor

from pyro_twist import handlers
from pyro_twist.diffusion import (
    GaussianDenoiser,
    GaussianDiffusion,
    MixtureOfModels,
    ProductOfModels,
)
from pyro_twist.hierarchies import SetOf, mixture, over_set
from pyro_twist.infer import ImportanceSampling, TrustRegionTwist, TwistedSMC
from pyro_twist.latents import AutoLatents, JointTwist, WithLatents
from pyro_twist.rewards import RewardTilted, Tilted
from pyro_twist.twists import LookaheadTwist, ShiftTwist, Twist
from tests.diffusion.test_products import ONE, OTHER, averaged, gaussian, product_on_grid
from tests.diffusion.test_products import mixture as mixture_model
from tests.infer.composition import composes, refuses
from tests.oracles import LinearGaussianChain, MaskedChain
from tests.statistics import assert_mean, assert_tilted_mean, assert_unbiased

REPLICATES, STEPS, SIZE, SLOPE = 1500, 3, 3, 0.3
SPREAD, CLOSE, ALIKE = 0.7, 1.5, 2.0

HIERARCHIES = "Plates and hierarchies"


def run(model: Any, guide: Any = None, **options: Any) -> Any:
    """Many populations at once, by a plate around the whole model."""
    plated = handlers.handle(model, pyro.plate("replicates", REPLICATES, dim=-1))
    options = {"population_plate": "replicates", "seed": 0, "ess_threshold": 1.0, **options}
    return TwistedSMC(plated, guide, 32, 1, **options).run()


def quadratic_law(prior: Tensor, form: Tensor, slope: Tensor) -> tuple[float, Tensor]:
    """Log Z and mean of ``N(0, diag(prior)) exp(slope z - z' form z / 2)``."""
    precision = prior.double().reciprocal().diag() + form.double()
    mean = torch.linalg.solve(precision, slope.double())
    log_det = float(torch.logdet(precision) + prior.double().log().sum())
    return 0.5 * float(slope.double() @ mean) - 0.5 * log_det, mean


def pairs(size: int) -> Tensor:
    """The form of the sum of squared differences of all pairs."""
    return size * torch.eye(size) - torch.ones(size, size)


def near(state: Any, x0: Tensor) -> None:
    """Each entry should be near what the set shares."""
    pyro.factor("near", -0.5 * ((x0 - state["palette"]) / CLOSE).square())


def alike(sets: Tensor) -> Tensor:
    """The entries of a set should be alike."""
    return -0.5 * (sets[..., :, None] - sets[..., None, :]).square().sum((-1, -2)) / 2


def draw_palette() -> dict[str, Tensor]:
    return {"palette": pyro.sample("palette", dist.Normal(0.0, SPREAD))}


def family(size: int = SIZE) -> Any:
    """A palette for the set, a factor and a slope for each entry, a reward of the whole set."""
    entries = SetOf(Tilted(LinearGaussianChain(STEPS, k=SLOPE), near), size)
    shared = WithLatents(entries, draw_palette)
    return RewardTilted(shared, {"alike": alike}, scale=1 / ALIKE**2, decode=False)


def family_law(size: int = SIZE) -> tuple[float, Tensor]:
    """Log Z, and the means of the palette and of the entries."""
    variance = LinearGaussianChain(STEPS).variance
    form = torch.zeros(size + 1, size + 1)
    form[0, 0], form[0, 1:], form[1:, 0] = size, -1.0, -1.0
    form[1:, 1:] = torch.eye(size)
    form = form / CLOSE**2
    form[1:, 1:] += pairs(size) / ALIKE**2
    prior = tensor([SPREAD**2] + [variance] * size)
    return quadratic_law(prior, form, tensor([0.0] + [SLOPE] * size))


GUIDES = {
    "none": lambda model: None,
    "look-ahead": LookaheadTwist,
    "joint": lambda model: JointTwist(LookaheadTwist(model), AutoLatents(model)),
}


@composes(
    HIERARCHIES,
    "`SetOf(model, size)`: a set of samples as one particle",
    "what is put around the inner model is for each entry, what is put around the set is shared: "
    "latents, rewards, potentials; twists see sets",
)
@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_set_with_a_palette(kind: str, threshold: float) -> None:
    model = family()
    log_z, mean = family_law()
    result = run(model, GUIDES[kind](model), ess_threshold=threshold)
    assert result.state["x"].shape == (32, REPLICATES, SIZE)
    assert result.state["palette"].shape == (32, REPLICATES)
    assert_unbiased(result.log_normalizer, log_z)
    palette = result.expectation("palette")
    assert_tilted_mean(result.log_normalizer, palette, log_z, float(mean[0]))
    last = result.expectation(lambda state: state["x"][..., -1])
    assert_tilted_mean(result.log_normalizer, last, log_z, float(mean[-1]))


def test_laws_of_sets_differ_from_those_of_independent_entries() -> None:
    """The oracle can tell: without the shared palette, another number."""
    variance = LinearGaussianChain(STEPS).variance
    alone = quadratic_law(tensor([variance]), torch.eye(1) / CLOSE**2, tensor([SLOPE]))[0]
    assert abs(family_law()[0] - SIZE * alone) > 0.2


@composes(
    HIERARCHIES,
    "a latent for each entry of a set: `SetOf(WithLatents(model, prior), size)`",
    "one draw for each entry; around the set, one draw for all of them",
)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_classes_of_a_set(shared: bool, guided: bool) -> None:
    chain, prior = Classes(STEPS, k=SLOPE), tensor([0.6, 0.4])

    def draw() -> dict[str, Tensor]:
        return {"label": pyro.sample("label", dist.Categorical(prior))}

    if shared:
        model: Any = WithLatents(SetOf(chain, SIZE), draw)
    else:
        model = SetOf(WithLatents(chain, draw), SIZE)
    gain = sum(chain.a**i for i in range(STEPS))
    terms = SLOPE * gain * Classes.shift.double() + 0.5 * SLOPE**2 * chain.variance
    power = SIZE if shared else 1
    joint = prior.double().log() + power * terms
    log_z = float(joint.logsumexp(0)) * (1 if shared else SIZE)
    guide = JointTwist(LookaheadTwist(model), AutoLatents(model)) if guided else None
    result = run(model, guide)
    assert result.state["label"].shape == (32, REPLICATES) + (() if shared else (SIZE,))
    assert_unbiased(result.log_normalizer, log_z)
    expected = float(joint.softmax(0)[1])
    label = (lambda s: s["label"].double()) if shared else (lambda s: s["label"][..., 0].double())
    assert_tilted_mean(result.log_normalizer, result.expectation(label), log_z, expected)


class Classes(LinearGaussianChain):
    """Every step moves by what the class adds."""

    shift = tensor([-0.6, 0.9])

    def kernel(self, state: Any, t: int) -> Any:
        return dist.Normal(self.a * state["x"] + self.shift[state["label"]], self.s)


@composes(
    HIERARCHIES,
    "`SetOf(..., given={name: values})`",
    "conditions each entry of the set by a value of its own, such as its class",
)
def test_entries_of_given_classes() -> None:
    chain = Classes(STEPS, k=SLOPE)
    model = SetOf(chain, 3, given={"label": tensor([0, 1, 1])})
    gain = sum(chain.a**i for i in range(STEPS))
    means = SLOPE * gain * Classes.shift[tensor([0, 1, 1])]
    log_z = float((means + 0.5 * SLOPE**2 * chain.variance).sum())
    result = run(model, LookaheadTwist(model))
    assert_unbiased(result.log_normalizer, log_z)
    with pytest.raises(ValueError, match=r"given\['label'\] has shape \(2,\).*of size 3"):
        SetOf(chain, 3, given={"label": tensor([0, 1])})


def diffusion(**options: Any) -> GaussianDiffusion:
    """Numbers around -1 or 1 by class."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=100, clip_sample=False)
    exact, slope = GaussianDenoiser(torch.zeros(1), torch.ones(1), scheduler), tensor([-0.2, 0.3])

    def denoiser(x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return exact(x, timestep) - slope[class_labels][:, None]

    labels = {"class_labels": 0}
    return GaussianDiffusion(
        denoiser, scheduler, (1,), num_inference_steps=3, conditioning=labels, **options
    )


def end_of(model: GaussianDiffusion, label: int) -> tuple[float, float]:
    """Mean and variance of ``x_0``, from what the kernels do to two points."""
    mean, variance = 0.0, float(model.schedule.init_std) ** 2
    for t in model.timesteps:
        x = tensor([[0.0], [1.0]])
        state = {"x": x, "class_labels": tensor(label)}
        kernel = model.kernel({**state, **_predicted(model, state, t)}, t)
        zero, one = kernel.mean.reshape(-1).tolist()
        mean = zero + (one - zero) * mean
        variance = (one - zero) ** 2 * variance + float(kernel.variance.reshape(-1)[0])
    return mean, variance


def _predicted(model: GaussianDiffusion, state: Any, t: int) -> dict[str, Tensor]:
    return {k: v.reshape(state["x"].shape) for k, v in model._predict(state, t).items()}


def shared_class(plate: bool) -> tuple[Any, float, float]:
    """A set of two numbers of one unknown class; log Z and probability of the second class."""
    options = {"plate": ("numbers", 2)} if plate else {}
    base, k = diffusion(**options), 0.6
    terms = []
    for label in (0, 1):
        mean, variance = end_of(diffusion(), label)
        terms.append(math.log(0.5) + 2 * (k * mean + 0.5 * k**2 * variance))
    joint = tensor(terms, dtype=torch.float64)

    def draw() -> dict[str, Tensor]:
        return {"class_labels": pyro.sample("label", dist.Categorical(torch.ones(2)))}

    inner = base if plate else SetOf(base, 2)
    shared = WithLatents(inner, draw, shared=plate)
    reward = (lambda x: x[:, 0]) if plate else over_set(lambda x: x[:, 0])
    model = RewardTilted(shared, reward, scale=k, decode=False)
    return model, float(joint.logsumexp(0)), float(joint.softmax(0)[1])


@composes(
    HIERARCHIES,
    "a plate of a `GaussianDiffusion` whose entries share latents, "
    "`WithLatents(diffusion, prior, shared=True)`",
    "without `population_plate`, a particle is the whole plate and its weight the sum over it; "
    "rewards are of single entries",
)
@pytest.mark.parametrize("look", [False, True])
def test_a_plate_that_shares_a_class(look: bool) -> None:
    model, log_z, share = shared_class(plate=True)
    guide = LookaheadTwist(model) if look else Twist(model)
    smc = TwistedSMC(model, guide, 20_000, 1, seed=0, resampling="none")
    result = smc.run()
    assert result.state["class_labels"].shape == (20_000, 1)
    assert_law_of_one(result, log_z, share)


@composes(
    HIERARCHIES,
    "`SetOf` of a `GaussianDiffusion`, with the class as a shared latent",
    "the denoiser is given the class for every entry",
)
@pytest.mark.parametrize("look", [False, True])
def test_a_set_that_shares_a_class(look: bool) -> None:
    model, log_z, share = shared_class(plate=False)
    guide = LookaheadTwist(model) if look else Twist(model)
    result = TwistedSMC(model, guide, 20_000, seed=0, resampling="none").run()
    assert result.state["class_labels"].shape == (20_000,)
    assert result.counts["denoiser"] == 2 * 3 * 20_000
    assert_law_of_one(result, log_z, share)


def assert_law_of_one(result: Any, log_z: float, share: float) -> None:
    """Z-tests over the particles of one run that was not resampled, rate 1e-6 each."""
    terms = (result.log_weights - log_z).exp()
    assert_mean(terms, 1.0)
    second = result.state["class_labels"].reshape(-1).double()
    assert_mean(terms * second, share)


@composes(
    HIERARCHIES,
    "`TrustRegionTwist` on sets",
    "learns from sets as from single samples; the pooled estimate is unbiased",
)
def test_fits_on_sets() -> None:
    model, log_z, _ = shared_class(plate=False)
    log_zs = []
    for seed in range(20):
        twist = JointTwist(ShiftTwist(model), AutoLatents(model), value=True)
        smc = TrustRegionTwist(model, twist, 200, num_iterations=1, guard=False, seed=seed)
        log_zs.append(smc.run().log_normalizer)
    assert_unbiased(torch.stack(log_zs), log_z)


def test_the_default_twist_of_a_set() -> None:
    """Within five times what weights of a relative spread of 2 would allow."""
    model, log_z, _ = shared_class(plate=False)
    found = TrustRegionTwist(model, None, 24, num_iterations=1, seed=0).run().log_normalizer
    assert float(found) == pytest.approx(log_z, abs=5 * 2 / 48**0.5)


@composes(
    HIERARCHIES,
    "`SetOf` of a masked diffusion model",
    "without a look-ahead; compared with a sum over all pairs of sequences",
)
def test_a_set_of_sequences() -> None:
    chain = MaskedChain(2, 3, 2, num_inference_steps=2)
    law = chain.laws()[-1]

    def same(sets: Tensor) -> Tensor:
        index = chain.index(sets)
        return 1.5 * (index[:, 0] == index[:, 1]).double() + chain.rewards[index].sum(-1)

    model = RewardTilted(SetOf(chain.diffusion, 2), same, decode=False)
    tilted = law * chain.rewards.exp()
    total = tilted.sum() ** 2 + (math.exp(1.5) - 1) * tilted.square().sum()
    result = run(model)
    assert_unbiased(result.log_normalizer, float(total.log()))
    with pytest.raises(ValueError, match="look-aheads by completions"):
        LookaheadTwist(model)


@composes(
    HIERARCHIES,
    "handlers around a `SetOf`",
    "sites hold the whole set: `condition` on an image of each entry",
)
def test_handlers_around_a_set() -> None:
    chain, value = LinearGaussianChain(STEPS, k=SLOPE), tensor([0.4, -0.2])
    model = handlers.condition(SetOf(chain, 2), {"x_0": value})
    density = dist.Normal(0.0, math.sqrt(chain.variance)).log_prob(value).sum()
    result = run(model)
    assert_unbiased(result.log_normalizer, float(density + SLOPE * value.sum()))


@composes(
    HIERARCHIES,
    "`SetOf` of a mixture or a product of models",
    "each entry follows a model of its own; the agreement of all entries weighs the set",
)
@pytest.mark.parametrize("kind", ["mixture", "product"])
def test_a_set_of_combined_models(kind: str) -> None:
    k, weights = 0.6, tensor([0.7, 0.3])
    if kind == "mixture":
        pair = [gaussian(-0.4, 0.5, plate=None), gaussian(0.6, 0.9, plate=None)]
        model: Any = SetOf(MixtureOfModels(pair, weights), 2)
        log_z = 2 * averaged(k)[2]
    else:
        pair = [mixture_model(*law, plate=None) for law in (ONE, OTHER)]
        model = SetOf(ProductOfModels(pair, target="marginals"), 2)
        log_z = 2 * product_on_grid((1.0, 1.0), [ONE, OTHER], slope=k)[0]
    reward = RewardTilted(model, over_set(lambda x: x[:, 0]), scale=k, decode=False)
    result = TwistedSMC(reward, None, 20_000, seed=0, resampling="none").run()
    assert_mean((result.log_weights - log_z).exp(), 1.0)
    if kind == "mixture":
        assert result.state["component"].shape == (20_000, 2)


def test_functions_of_latents_inside_a_set() -> None:
    """What ``pyro.deterministic`` is given comes back as it was, and the law is the same."""

    def plain(state: Any, x0: Tensor) -> None:
        pyro.factor("twice", 0.4 * x0)

    def named(state: Any, x0: Tensor) -> None:
        pyro.factor("twice", pyro.deterministic("half", 0.4 * x0))
        pyro.deterministic("entries", x0, event_dim=0)

    runs = [
        TwistedSMC(SetOf(Tilted(LinearGaussianChain(2), one), 3), None, 6, seed=0).run()
        for one in (plain, named)
    ]
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)


@refuses(
    HIERARCHIES,
    "handlers, plates, and factors of other shapes inside a `SetOf`",
    "error: they know nothing of the entries of the set; put them around it",
)
def test_what_a_set_cannot_hold() -> None:
    chain = LinearGaussianChain(STEPS)
    with pytest.raises(ValueError, match="put the handler around the SetOf"):
        SetOf(WithLatents(handlers.scale(chain, 2.0), draw_palette), 2)
    with pytest.raises(ValueError, match=r"has the plate .*given="):
        SetOf(LinearGaussianChain(2, replicates=2), 2)
    cases: dict[str, Any] = {
        "in the plate 'inner'": _plated_factor,
        "whose last dim should be that of the 3 entries": lambda s, x: pyro.factor(
            "flat", torch.zeros(5, 4)
        ),
        r"a scale of shape \(3,\)": _scaled_factor,
    }
    for message, potential in cases.items():
        model = SetOf(Tilted(chain, potential), 3)
        with pytest.raises(ValueError, match=message):
            TwistedSMC(model, None, 5).run()


def _plated_factor(state: Any, x0: Tensor) -> None:
    with pyro.plate("inner", 2, dim=-3):
        pyro.factor("plated", torch.zeros(2, 1, 1))


def _scaled_factor(state: Any, x0: Tensor) -> None:
    with pyro.poutine.scale(scale=torch.ones(3)):
        pyro.factor("scaled", x0)


def test_names_of_a_set() -> None:
    chain = LinearGaussianChain(STEPS)
    with pytest.raises(ValueError, match="size=0"):
        SetOf(chain, 0)
    with pytest.raises(ValueError, match=r"as in \['palette'\]"):
        SetOf(chain, 2, shared="palette")
    with pytest.raises(ValueError, match="no `event_shape`"):
        SetOf(object(), 2)

    def clash() -> dict[str, Tensor]:
        return {"x": pyro.sample("x", dist.Normal(0.0, 1.0))}

    with pytest.raises(ValueError, match=r"writes state\['x'\], which the set shares"):
        TwistedSMC(WithLatents(SetOf(chain, 2), clash), None, 4).run()


def test_checkpoints_of_sets() -> None:
    """A new object does not know what is shared unless it is told."""
    saved = TwistedSMC(family(), None, 8, seed=1)
    saved.init()
    checkpoint = saved.state_dict()
    expected = saved.resume()
    with pytest.raises(ValueError, match="shared="):
        other = TwistedSMC(family(), None, 8, seed=1)
        other.load_state_dict(checkpoint)
        other.resume()
    entries = SetOf(Tilted(LinearGaussianChain(STEPS, k=SLOPE), near), SIZE, shared=["palette"])
    told = RewardTilted(
        WithLatents(entries, draw_palette), {"alike": alike}, scale=1 / ALIKE**2, decode=False
    )
    again = TwistedSMC(told, None, 8, seed=1)
    again.load_state_dict(checkpoint)
    assert torch.equal(again.resume().state["x"], expected.state["x"])


def test_a_called_set_and_its_decoded_entries() -> None:
    base = GaussianDiffusion(
        GaussianDenoiser(torch.zeros(3, 4, 4), torch.ones(3, 4, 4) * 0.1, _scheduler()),
        _scheduler(),
        (3, 4, 4),
        num_inference_steps=2,
    )
    model = SetOf(base, 2)
    with pyro.plate("particles", 5):
        x = model()
    assert x.shape == (5, 2, 3, 4, 4) and model.decode(x).shape == x.shape
    assert float(model.decode(x).min()) >= 0.0
    brightest = RewardTilted(model, over_set(lambda images: images.mean((1, 2, 3)), "max"))
    result = TwistedSMC(brightest, LookaheadTwist(brightest), 5, seed=0).run()
    assert result.best(2).state["x"].shape == (2, 2, 3, 4, 4)
    deepest = model.decode(result.state["x"]).mean((2, 3, 4)).amax(1)
    assert torch.allclose(result.state["reward"], deepest.double(), atol=1e-6)


def _scheduler() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=100)


def test_reductions_over_sets() -> None:
    sets = tensor([[1.0, 3.0], [2.0, 5.0]])
    for reduce, expected in (
        ("sum", [4.0, 7.0]),
        ("mean", [2.0, 3.5]),
        ("min", [1.0, 2.0]),
        ("max", [3.0, 5.0]),
    ):
        assert over_set(lambda x: x, reduce)(sets).tolist() == expected  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduce='best'"):
        over_set(lambda x: x, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(2,\) for 2 sets of 2; .* of 4 samples"):
        over_set(lambda x: x[:2])(sets)
    again = pickle.loads(pickle.dumps(over_set(torch.abs, "min")))
    assert again(-sets).tolist() == [1.0, 2.0] and again.__name__ == "min of rewards"


# unknown reward weights


def draw_weights() -> dict[str, Tensor]:
    mean = pyro.sample("mean", dist.Normal(0.2, 0.1))
    return {name: pyro.sample(name, dist.Normal(mean, 0.2)) for name in ("w_a", "w_b")}


@composes(
    HIERARCHIES,
    "several rewards as factors with unknown weights, with priors of their own",
    "a joint law, in which a weight's marginal is its prior times the normaliser at that weight",
)
@pytest.mark.parametrize("kind", GUIDES)
def test_unknown_reward_weights(kind: str) -> None:
    """Two coordinates, a weight for each, and an unknown mean of the two weights."""
    chain = LinearGaussianChain(STEPS, k=0.0, dim=2)
    rewards = {"a": lambda x: x[:, 0], "b": lambda x: x[:, 1]}
    scales = {"a": "w_a", "b": "w_b"}
    model = RewardTilted(WithLatents(chain, draw_weights), rewards, scale=scales, decode=False)
    # the normaliser given the weights is exp(V |w|^2 / 2): a Gaussian form of negative precision
    covariance = 0.04 * torch.eye(2).double() + 0.01
    precision = torch.linalg.inv(covariance)
    posterior = precision - chain.variance * torch.eye(2).double()
    force = precision @ torch.full((2,), 0.2).double()
    mean = torch.linalg.solve(posterior, force)
    log_z = 0.5 * float(force @ mean - 0.2 * force.sum())
    log_z -= 0.5 * float(torch.logdet(posterior) - torch.logdet(precision))
    result = run(model, GUIDES[kind](model))
    assert_unbiased(result.log_normalizer, log_z)
    weight = result.expectation("w_b")
    assert_tilted_mean(result.log_normalizer, weight, log_z, float(mean[1]))
    assert float(mean[1]) > 0.205


def populations(scales: Tensor, particles: int = 20_000) -> Any:
    chain = LinearGaussianChain(STEPS, k=0.0, replicates=len(scales))
    model = RewardTilted(chain, lambda x: x, scale=scales, decode=False)
    smc = ImportanceSampling(model, particles, 1, population_plate="replicates", seed=0)
    return smc.run()


@composes(
    HIERARCHIES,
    "draws of an unknown reward weight as populations, joined by `mixture`",
    '`weights="equal"` keeps the prior of the weight and mixes the tilted laws; '
    '`"evidence"` makes it a latent again',
)
@pytest.mark.parametrize("weights", ["equal", "evidence", "given"])
def test_mixtures_of_populations(weights: str) -> None:
    """Means within five standard errors of 20,000 draws each."""
    scales, variance = tensor([0.2, 0.5, 0.9]), LinearGaussianChain(STEPS).variance
    log_zs = 0.5 * scales.double().square() * variance
    given = tensor([1.6, 0.0, 0.4])
    exact = {"equal": torch.ones(3) / 3, "evidence": log_zs.softmax(0), "given": given / 2}[weights]
    result = mixture(populations(scales), given if weights == "given" else weights)  # type: ignore[arg-type]
    mean = float((exact * scales).sum()) * variance
    assert result.state["x"].shape == result.log_weights.shape == (60_000,)
    error = 5 * 1.5 / float(result.get_ESS()) ** 0.5
    assert error < 0.1
    shares = result.get_normalized_weights().reshape(20_000, 3).sum(0)
    if weights != "evidence":
        assert torch.allclose(shares, exact.double(), atol=1e-6)
    assert result.expectation("x").item() == pytest.approx(mean, abs=error)
    if weights == "evidence":
        log_z = float(log_zs.logsumexp(0)) - math.log(3)
        assert result.log_normalizer.item() == pytest.approx(log_z, abs=error)
        assert float(result.log_weights.logsumexp(0)) - math.log(60_000) == pytest.approx(
            result.log_normalizer.item()
        )
    else:
        assert result.log_normalizer.isnan()
    assert result.resample(10).state["x"].shape == (10,)


def test_mixtures_that_cannot_be() -> None:
    result = populations(tensor([0.2, 0.5]), 10)
    with pytest.raises(ValueError, match="one number for each of the 2 populations"):
        mixture(result, tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="weights='best'"):
        mixture(result, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one population"):
        mixture(ImportanceSampling(LinearGaussianChain(2), 4, seed=0).run())


def test_mixtures_of_paths_and_shared_entries() -> None:
    chain = LinearGaussianChain(2, replicates=3)
    smc = TwistedSMC(chain, None, 4, 1, population_plate="replicates", seed=0, history="paths")
    result = smc.run()
    joined = mixture(result)
    assert joined.samples is not None and result.samples is not None
    assert torch.equal(joined.samples["x_0"], result.samples["x_0"].flatten())


# subsampling


class Observed(LinearGaussianChain):
    """Ten readings of the end, of which a step may look at some."""

    def __init__(self, drawn: int | None) -> None:
        super().__init__(2, k=0.0)
        self.drawn = drawn

    def terminal(self, state: Any, x0: Tensor) -> None:
        with pyro.plate("readings", 10, subsample_size=self.drawn, dim=-1) as index:
            pyro.sample("y", dist.Normal(x0, 1.0), obs=torch.zeros(len(index)))


@refuses(
    HIERARCHIES,
    "observations or factors in a subsampled plate",
    "error: the exponential of a subsampled log-likelihood is no unbiased estimate of a weight, "
    "and the same part would count for all particles",
)
@pytest.mark.parametrize("guided", [False, True])
def test_subsampled_observations(guided: bool) -> None:
    def run_with(drawn: int | None) -> Any:
        model = Observed(drawn)
        guide = _Drift() if guided else None
        return TwistedSMC(model, guide, 20_000, 1, seed=0, resampling="none").run()

    with pytest.raises(ValueError, match="plate 'readings', of which 4 of 10.*unbiased"):
        run_with(4)
    result, variance = run_with(None), Observed(None).variance
    exact = -5 * math.log(2 * math.pi) - 0.5 * math.log(1 + 10 * variance)
    assert_mean((result.log_weights - exact).exp(), 1.0)


class _Drift:
    """An explicit guide."""

    def init(self, state: Any) -> None:
        pyro.sample("x_2", dist.Normal(torch.zeros(()), 1.1))

    def step(self, state: Any, t: int) -> None:
        pyro.sample(f"x_{t - 1}", dist.Normal(0.8 * state["x"], 0.6))
