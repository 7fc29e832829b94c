# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The gradient of the evidence against closed forms.

``Z_hat`` times the estimate has mean ``Z`` times the gradient, for any number of particles: that is
what z-tests here are of, each with a false-alarm rate of one in a million.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.reparam import LocScaleReparam
from pyro.optim import Adam
from torch import Tensor, tensor
from torch.distributions.constraints import positive

from pyro_twist import handlers
from pyro_twist.diffusion import MixtureOfModels
from pyro_twist.infer import EvidenceGradient, TrustRegionTwist, TwistedSMC
from pyro_twist.latents import JointTwist, WithLatents
from pyro_twist.rewards import RewardTilted, Tilted
from pyro_twist.twists import LookaheadTwist, ShiftTwist, Twist
from tests.diffusion.test_products import gaussian
from tests.infer.composition import composes
from tests.infer.test_diffusion_oracles import chain_law
from tests.infer.test_handlers import end_of, guided_diffusion
from tests.statistics import assert_tilted_mean, assert_unbiased

REPLICATES = 1000
LEARNING = "Learning and looking at results"
VALUES = {"start": 0.3, "drift": 0.1, "k": 0.4, "noise": 1.3}
OBSERVED, STEPS, A, S = 0.9, 3, 0.9, 0.5


def parameter(name: str, replicates: int | None) -> Tensor:
    """One value for each population, so that each has a gradient of its own."""
    value = torch.full((replicates,) if replicates else (), VALUES[name])
    if name == "noise":
        return pyro.param(name, value, constraint=positive)
    return pyro.param(name, value)


class Chain:
    """``x_T ~ N(start, 1)``, ``x_{t-1} ~ N(a x_t + drift, s)``, a factor and an observation."""

    timesteps = tuple(range(STEPS, 0, -1))
    event_shape = ()

    def __init__(self, replicates: int | None = REPLICATES) -> None:
        self.replicates = replicates
        self.plate = None if replicates is None else ("replicates", replicates)
        with poutine.block():
            self._copies = nullcontext() if replicates is None else pyro.plate(*self.plate, dim=-1)

    def copies(self) -> Any:
        return self._copies

    def init(self, state: Any) -> None:
        with self.copies():
            start = parameter("start", self.replicates)
            self.write(state, pyro.sample(f"x_{STEPS}", dist.Normal(start, 1.0)), STEPS)

    def step(self, state: Any, t: int) -> None:
        with self.copies():
            loc = A * state["x"] + parameter("drift", self.replicates)
            self.write(state, pyro.sample(f"x_{t - 1}", dist.Normal(loc, S)), t - 1)
            if t == 1:
                self.terminal(state, state["x"])

    def write(self, state: Any, x: Tensor, t: int) -> None:
        state["x"], state["x0_hat"] = x, A**t * x

    def terminal(self, state: Any, x0: Tensor) -> None:
        pyro.factor("reward", parameter("k", self.replicates) * x0)
        law = dist.Normal(x0, parameter("noise", self.replicates))
        pyro.sample("y", law, obs=tensor(OBSERVED))


def exact(power: float = 1.0) -> tuple[float, dict[str, float]]:
    """
    The log evidence and its gradient in unconstrained space, by differentiating the formula.

    A normal density to a power is one of a smaller variance, and a constant.
    """
    theta = {k: tensor(v, dtype=torch.float64, requires_grad=True) for k, v in VALUES.items()}
    log_noise = theta["noise"].detach().log().requires_grad_()
    variances = [tensor(1.0).double(), *[tensor(S**2).double()] * STEPS, (2 * log_noise).exp()]
    constant = sum(_constant(variance, power) for variance in variances)
    mean, variance = theta["start"], variances[0] / power
    for _ in range(STEPS):
        mean, variance = A * mean + theta["drift"], A**2 * variance + S**2 / power
    k = power * theta["k"]
    spread = (variance + variances[-1] / power).sqrt()
    observed = dist.Normal(mean + k * variance, spread).log_prob(tensor(OBSERVED).double())
    log_z = constant + k * mean + 0.5 * k**2 * variance + observed
    log_z.backward()
    gradients = {name: one.grad for name, one in theta.items() if name != "noise"}
    gradients["noise"] = log_noise.grad
    return float(log_z.detach()), {k: float(v) for k, v in gradients.items() if v is not None}


def _constant(variance: Tensor, power: float) -> Tensor:
    log_det = (2 * math.pi * variance).log()
    return 0.5 * (1 - power) * log_det - 0.5 * math.log(power)


class Moved(Twist):
    """A proposal that is off, so that weights and ancestors matter."""

    def get_posterior(self, name: str, prior: Any) -> Any:
        return dist.Normal(prior.mean + 0.2, prior.stddev)


class Explicit:
    """The same as an explicit guide; it draws ``x_0`` as the model does."""

    def __init__(self, model: Chain) -> None:
        self.model = model

    def init(self, state: Any) -> None:
        with self.model.copies():
            pyro.sample(f"x_{STEPS}", dist.Normal(torch.zeros(()), 1.1))

    def step(self, state: Any, t: int) -> None:
        if t > 1:
            with self.model.copies():
                pyro.sample(f"x_{t - 1}", dist.Normal(A * state["x"] + 0.3, S))


def elbo(size: int = 8, **options: Any) -> EvidenceGradient:
    return EvidenceGradient(size, 1, population_plate="replicates", seed=0, **options)


def gradients(names: Any) -> dict[str, Tensor]:
    """What a gradient of the loss says of the gradient of the evidence."""
    found = {}
    for name in names:
        grad = pyro.param(name).unconstrained().grad
        assert grad is not None
        found[name] = -grad.double()
    return found


GUIDES: dict[str, Any] = {
    "prior": lambda model: None,
    "twist": Moved,
    "look-ahead": LookaheadTwist,
    "explicit": Explicit,
}


@composes(
    LEARNING,
    "`pyro.param` in rewards, likelihoods, priors and kernels, with `EvidenceGradient` as the loss "
    "of Pyro's `SVI`",
    "the gradient of the estimated log evidence by Fisher's identity; times the estimated evidence "
    "it is unbiased, for any guide and any resampling",
)
@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_gradient_of_the_evidence(kind: str, threshold: float) -> None:
    model, loss = Chain(), elbo(ess_threshold=threshold)
    value = loss.loss_and_grads(model, GUIDES[kind](model))
    log_z, wanted = exact()
    assert loss.result is not None
    log_normalizer = loss.result.log_normalizer
    assert value == pytest.approx(-float(log_normalizer.sum()))
    assert_unbiased(log_normalizer, log_z)
    for name, found in gradients(VALUES).items():
        assert abs(wanted[name]) > 0.05
        assert_tilted_mean(log_normalizer, found, log_z, wanted[name])


def test_the_run_is_that_of_the_engine() -> None:
    """Scoring changes neither weights nor draws, and leaves no graph behind."""
    model, loss = Chain(), elbo(ess_threshold=1.0)
    loss.loss_and_grads(model, Moved(model))
    plain = TwistedSMC(
        model, Moved(model), 8, 1, population_plate="replicates", seed=0, ess_threshold=1.0
    ).run()
    assert loss.result is not None
    assert torch.equal(loss.result.log_weights, plain.log_weights)
    assert torch.equal(loss.result.state["x"], plain.state["x"])
    assert not any(value.requires_grad for value in loss.result.state.values())
    assert loss.loss(model, Moved(model)) == pytest.approx(-float(plain.log_normalizer.sum()))


def test_differentiable_loss() -> None:
    model = Chain()
    loss = elbo().differentiable_loss(model, None)
    loss.backward()
    found = gradients(VALUES)
    pyro.clear_param_store()
    assert loss.item() == pytest.approx(elbo().loss_and_grads(model, None))
    for name, grad in gradients(VALUES).items():
        assert torch.allclose(found[name], grad, atol=1e-6)


@pytest.mark.parametrize("kind", ["reparam", "block", "scale", "mask"])
def test_handlers_around_a_learned_model(kind: str) -> None:
    """A function of its noise, or hidden, a site gives the gradient by another way."""
    model: Any = Chain()
    log_z, wanted = exact()
    if kind == "reparam":
        model = handlers.reparam(model, {"x_2": LocScaleReparam(0.0), "x_1": LocScaleReparam(0.0)})
    elif kind == "block":
        model = handlers.block(model, hide=["x_1"])
    elif kind == "scale":
        model = handlers.scale(model, 1.3)
        log_z, wanted = exact(1.3)
    else:
        model = handlers.mask(model, False)
        log_z, wanted = 0.0, dict.fromkeys(VALUES, 0.0)
    loss = elbo(16)
    loss.loss_and_grads(model, None)
    assert loss.result is not None
    if kind == "mask":
        grads = [pyro.param(name).unconstrained().grad for name in ("k", "noise")]
        assert all(grad is None or not bool(grad.any()) for grad in grads)
    for name in ("start", "drift") if kind == "mask" else VALUES:
        found = gradients([name])[name]
        assert_tilted_mean(loss.result.log_normalizer, found, log_z, wanted[name])


@composes(
    LEARNING,
    "`pyro.param` in a guide, under `EvidenceGradient`",
    "the gradient of its weighted log-density, as in the wake phase of reweighted wake-sleep; the "
    "model's own parameters get none of it",
)
@pytest.mark.parametrize("kind", ["joint", "explicit"])
def test_parameters_of_guides(kind: str) -> None:
    """The posterior mean of a style, which is standard normal and shifts every step."""

    class Styled(Chain):
        def init(self, state: Any) -> None:
            with self.copies():
                state["style"] = pyro.sample("style", dist.Normal(torch.zeros(()), 1.0))
            super().init(state)

        def step(self, state: Any, t: int) -> None:
            with self.copies():
                loc = A * state["x"] + parameter("drift", self.replicates) + state["style"]
                self.write(state, pyro.sample(f"x_{t - 1}", dist.Normal(loc, S)), t - 1)
                if t == 1:
                    self.terminal(state, state["x"])

    def proposal(state: Any = None) -> None:
        loc = pyro.param("loc", torch.full((REPLICATES,), 0.2))
        pyro.sample("style", dist.Normal(loc, 1.2))

    class Guide:
        def init(self, state: Any) -> None:
            with model.copies():
                proposal()

        def step(self, state: Any, t: int) -> None:
            pass

    model, loss = Styled(), elbo(24)
    guide: Any = JointTwist(Twist(model), lambda: proposal()) if kind == "joint" else Guide()
    loss.loss_and_grads(model, guide)
    gain = sum(A**i for i in range(STEPS))
    log_z, mean = styled_posterior(gain)
    own = guide.parts()[1].own["loc"] if kind == "joint" else pyro.param("loc").unconstrained()
    assert loss.result is not None and own.grad is not None
    normalizer = loss.result.log_normalizer
    assert_unbiased(normalizer, log_z)
    assert_tilted_mean(normalizer, -own.grad.double(), log_z, (mean - 0.2) / 1.2**2)


def styled_posterior(gain: float) -> tuple[float, float]:
    """Log evidence and posterior mean of the style, on a grid of it."""
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    variance = 1.0
    for _ in range(STEPS):
        variance = A**2 * variance + S**2
    mean = A**STEPS * VALUES["start"] + gain * (VALUES["drift"] + grid)
    k = VALUES["k"]
    law = dist.Normal(mean + k * variance, math.sqrt(variance + VALUES["noise"] ** 2))
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid) + k * mean + 0.5 * k**2 * variance
    joint = (log_joint + law.log_prob(tensor(OBSERVED).double())).exp()
    z = float(torch.trapezoid(joint, grid))
    return math.log(z), float(torch.trapezoid(joint * grid, grid)) / z


def test_weights_of_a_mixture() -> None:
    """A discrete latent: the gradient of its logits is posterior less prior."""
    models = [gaussian(-0.4, 0.5), gaussian(0.6, 0.9)]
    replicates = models[0].plate[1]

    def weights() -> Any:
        return dist.Categorical(logits=pyro.param("logits", torch.zeros(replicates, 2)))

    mixed = MixtureOfModels(models, weights)
    model = RewardTilted(mixed, lambda x: x[:, 0], scale=0.7, decode=False)
    means, variances = (torch.cat(one) for one in zip(*map(chain_law, models), strict=True))
    terms = 0.7 * means + 0.5 * 0.49 * variances + math.log(0.5)
    loss, log_z = elbo(24), float(terms.logsumexp(0))
    loss.loss_and_grads(model, LookaheadTwist(model))
    assert loss.result is not None
    found = gradients(["logits"])["logits"][:, 1]
    wanted = float(terms.softmax(0)[1]) - 0.5
    assert_tilted_mean(loss.result.log_normalizer, found, log_z, wanted)


def test_a_parameter_that_reaches_the_denoiser() -> None:
    """The strength of guidance: its gradient goes through every prediction."""
    diffusion, k = guided_diffusion(), 0.7
    replicates = diffusion.plate[1] if diffusion.plate else 1

    def prior() -> dict[str, Tensor]:
        label = pyro.sample("label", dist.Categorical(tensor([0.1, 0.9])))
        strength = pyro.param("strength", torch.full((replicates,), 1.5))
        return {"class_labels": label, "guidance_scale": strength.expand(label.shape)}

    def log_evidence(strength: float) -> float:
        ends = [end_of(diffusion, label, strength) for label in (0, 1)]
        terms = [k * mean + 0.5 * k**2 * variance for mean, variance in ends]
        logs = tensor([0.1, 0.9], dtype=torch.float64).log()
        return float((tensor(terms, dtype=torch.float64) + logs).logsumexp(0))

    model = RewardTilted(WithLatents(diffusion, prior), lambda x: x[:, 0], scale=k, decode=False)
    loss = elbo(64)
    loss.loss_and_grads(model, None)
    wanted = (log_evidence(1.6) - log_evidence(1.4)) / 0.2
    assert loss.result is not None and wanted > 0.1
    found = gradients(["strength"])["strength"]
    assert_tilted_mean(loss.result.log_normalizer, found, log_evidence(1.5), wanted)


def test_svi_climbs_the_evidence() -> None:
    """The start that explains the observation best; the average of steps is within five errors."""
    pyro.set_rng_seed(0)
    model = Chain(None)
    frozen = handlers.handle(model, _Fixed({"drift": 0.0, "k": 0.0, "noise": 0.3}))
    svi = SVI(frozen, LookaheadTwist(frozen), Adam({"lr": 0.1}), EvidenceGradient(64))
    losses, starts = [], []
    for _ in range(100):
        losses.append(svi.step())
        starts.append(pyro.param("start").item())
    best = OBSERVED / A**STEPS
    assert sum(starts[40:]) / 60 == pytest.approx(best, abs=0.12)
    assert sum(losses[40:]) / 60 < losses[0] - 0.05
    assert isinstance(svi.evaluate_loss(), float)
    assert set(pyro.get_param_store().keys()) == {"start"}


class _Fixed(poutine.messenger.Messenger):
    """Parameters that are not learned."""

    def __init__(self, values: dict[str, float]) -> None:
        super().__init__()
        self.values = values

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"], msg["stop"] = tensor(self.values[msg["name"]]), True, True


@composes(
    LEARNING,
    "`TrustRegionTwist` and `EvidenceGradient` in turn",
    "the one fits the twist, the other the model's parameters, with that twist as its guide",
)
def test_twists_and_parameters_in_turn() -> None:
    """With the fitted twist the gradient is unbiased, and its particles are worth more."""
    model, plated, log_z = Chain(None), Chain(), exact()[0]
    sampler = TrustRegionTwist(model, ShiftTwist(model), 64, seed=0)
    sampler.fit(2)
    pyro.clear_param_store()
    twist, loss, plain = ShiftTwist(plated), elbo(), elbo()
    twist.load_state_dict(sampler.guide.state_dict())
    plain.loss(plated, None)
    loss.loss_and_grads(plated, twist)
    assert loss.result is not None and plain.result is not None
    assert loss.result.log_normalizer.std() < 0.8 * plain.result.log_normalizer.std()
    assert_unbiased(loss.result.log_normalizer, log_z)
    for name, found in gradients(VALUES).items():
        assert_tilted_mean(loss.result.log_normalizer, found, log_z, exact()[1][name])


def test_populations_add_up() -> None:
    """Observations that share a parameter: the loss is the sum of their log evidences."""
    data = tensor([0.2, 1.1, -0.4])

    class Shared(Chain):
        def terminal(self, state: Any, x0: Tensor) -> None:
            noise = pyro.param("noise", tensor(1.3), constraint=positive)
            pyro.sample("y", dist.Normal(x0, noise), obs=data)

    model = Tilted(Shared(3), lambda state, x0: None)
    loss = EvidenceGradient(2000, 1, population_plate="replicates", seed=0)
    value = loss.loss_and_grads(model, None)
    assert loss.result is not None and loss.result.log_normalizer.shape == (3,)
    assert value == pytest.approx(-float(loss.result.log_normalizer.sum()))
    grad = pyro.param("noise").unconstrained().grad
    assert grad is not None and grad.shape == ()


def test_gradients_that_are_not_finite_are_refused() -> None:
    """Weight zero does not help: the derivative of ``log(k x)`` at 0 is 0 / 0."""

    class Hard(Chain):
        def terminal(self, state: Any, x0: Tensor) -> None:
            pyro.factor("hard", (pyro.param("k", tensor(1.0)) * x0.clamp(min=0)).log())

    class Kept(Chain):
        def terminal(self, state: Any, x0: Tensor) -> None:
            inside = (pyro.param("k", tensor(1.0)) * x0.clamp(min=1e-6)).log()
            pyro.factor("hard", torch.where(x0 > 0, inside, -math.inf))

    with pytest.raises(ValueError, match="gradient of the parameter 'k' is not finite"):
        EvidenceGradient(64, seed=0).loss_and_grads(Hard(None), None)
    EvidenceGradient(64, seed=0).loss_and_grads(Kept(None), None)
    # log Z is that of k = 1 and log k
    assert gradients(["k"])["k"].item() == pytest.approx(1.0, abs=1e-5)


def test_options_are_those_of_the_engine() -> None:
    with pytest.raises(ValueError, match="ess_threshold=2"):
        EvidenceGradient(4, ess_threshold=2).loss(Chain(None), None)
    with pytest.raises(ValueError, match="is none of: None, an effect-based guide"):
        EvidenceGradient(4).loss_and_grads(Chain(None), 3)
