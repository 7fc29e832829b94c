# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch

from pyro_twist.infer import TrustRegionTwist, TwistedSMC
from pyro_twist.twists import (
    CalibratedLookahead,
    HiddenTilt,
    LearnedTwist,
    LookaheadTwist,
    NeuralTwist,
    Paths,
    QuadraticTwist,
    ShiftTwist,
    fit_likelihood,
    low_frequencies,
    tilt,
)
from pyro_twist.twists.minimise import Minimiser
from tests.oracles import LinearGaussianChain
from tests.twists.masked import chain as masked_chain
from tests.twists.masked import tilted

FAMILIES = [ShiftTwist, QuadraticTwist, NeuralTwist, CalibratedLookahead]


class PlainShift(LearnedTwist):
    """The shift family without its closed form: what a user would write."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.shift = torch.nn.Parameter(torch.zeros(len(model.timesteps) + 1, 2))

    def get_posterior(self, name: str, prior: Any) -> Any:
        return tilt(prior, self.shift[int(name.removeprefix("x_"))])


def one_pass(twist: Any, particles: int = 400, **options: Any) -> TrustRegionTwist:
    chain = twist.model
    smc = TrustRegionTwist(chain, twist, particles, seed=0, kl_budget=0.4, **options)
    smc.sample()
    return smc


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_at_the_start(family: Any) -> None:
    chain = LinearGaussianChain(4, dim=2)
    start = LookaheadTwist(chain) if family is CalibratedLookahead else None
    ours = TwistedSMC(chain, family(chain), 30, seed=0).run()
    plain = TwistedSMC(chain, start, 30, seed=0).run()
    assert torch.equal(ours.state["x"], plain.state["x"])
    assert torch.equal(ours.log_weights, plain.log_weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: Any, tmp_path: Path) -> None:
    chain = LinearGaussianChain(3, dim=2, k=1.0)
    smc = TrustRegionTwist(chain, family(chain), 60, seed=0, guard=False).fit(2)
    smc.guide.save(tmp_path / "twist.safetensors")
    other = family(chain).load(tmp_path / "twist.safetensors")
    a, b = (TwistedSMC(chain, guide, 20, seed=3).run() for guide in (smc.guide, other))
    assert torch.equal(a.log_weights, b.log_weights)
    fresh = TwistedSMC(chain, family(chain), 20, seed=3).run()
    assert not torch.equal(a.log_weights, fresh.log_weights)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("centring", [0.0, 0.7])
def test_projection_matches_sufficient_statistics(threshold: float, centring: float) -> None:
    """Forward-KL projection: the fitted model's expected score is that of the weighted paths."""
    chain = LinearGaussianChain(4, k=1.2, dim=2)
    smc = one_pass(ShiftTwist(chain, ridge=0.0), ess_threshold=threshold)
    paths = smc._batches(0.5)[0]
    paths = Paths(paths.steps, centring)
    fit_likelihood(smc.guide, [paths])
    for step in paths:
        now = int(step.name.removeprefix("x_"))
        noise = step.value - step.posterior.base_dist.loc
        weights = step.weights[:, None]
        drift = step.prior.base_dist.scale.square() * smc.guide.theta[now]
        gap = weights * (step.value - step.prior.base_dist.loc - drift)
        gap = gap - centring * step.base[:, None] * noise
        assert gap.sum(0).abs().max() < 1e-5


def test_closed_form_and_optimiser_agree() -> None:
    chain = LinearGaussianChain(3, k=1.0, dim=2)
    closed = one_pass(ShiftTwist(chain, ridge=0.0))
    plain = PlainShift(chain)
    for centring in (0.0, 0.5):
        paths = closed._batches(0.6)[0]
        paths = Paths(paths.steps, centring)
        fit_likelihood(closed.guide, [paths])
        with torch.no_grad():
            plain.shift.zero_()
        fit_likelihood(plain, [paths], max_iterations=200)
        assert torch.allclose(plain.shift, closed.guide.theta, atol=2e-3)


def test_gradient_is_zero_at_the_optimum() -> None:
    chain = LinearGaussianChain(3, k=1.0, dim=2)
    twist = QuadraticTwist(chain, ridge=0.0)
    smc = one_pass(twist)
    paths = Paths(smc._batches(0.6)[0].steps, centring=0.0)
    fit_likelihood(twist, [paths], max_iterations=300)
    likelihood = paths.log_likelihood(twist)
    grads = torch.autograd.grad(likelihood, [twist.slope, twist.precision])
    assert max(g.abs().max() for g in grads) < 1e-3


def test_fitting_calls_neither_model_nor_reward() -> None:
    chain = LinearGaussianChain(3, dim=2)
    smc = one_pass(ShiftTwist(chain) + CalibratedLookahead(chain))
    before = dict(chain.counts)
    chain.reward = None  # type: ignore[assignment, method-assign]
    smc.update()
    assert chain.counts == before


def test_slopes_of_a_useless_and_a_perfect_look_ahead() -> None:
    """Slopes are about 0 where the look-ahead is noise, about 1 where it is the reward."""

    class Blind(LinearGaussianChain):
        def write(self, state: Any, x: torch.Tensor, t: int) -> None:
            super().write(state, x, t)
            if t > 2:
                state["x0_hat"] = torch.randn_like(x)

    chain = Blind(6, k=1.0, s=0.05)
    smc = TrustRegionTwist(chain, CalibratedLookahead(chain, smoothing=1e-3), 400, seed=0)
    smc.fit(1)
    slopes = smc.guide.slopes
    assert slopes[3:].max() < 0.3 and 0.8 < slopes[1:3].min() <= slopes[1:3].max() < 1.2


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


OPTIMIZERS: dict[str, Any] = {
    "torch": adam,
    "pyro": pyro.optim.Adam({"lr": 0.02}),
    "pyro, scheduled": pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "gamma": 0.997}
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimiser_finds_the_maximum(name: str) -> None:
    """That of L-BFGS, from a fit that starts anew every time."""
    chain = LinearGaussianChain(4, k=1.2, dim=2)
    smc = one_pass(PlainShift(chain))
    batches = smc._batches(0.5)
    fit_likelihood(smc.guide, batches)
    expected = smc.guide.shift.detach().clone()
    minimise = Minimiser(OPTIMIZERS[name], 600)
    for _ in range(2):
        with torch.no_grad():
            smc.guide.shift.zero_()
        fit_likelihood(smc.guide, batches, minimise=minimise)
        assert torch.allclose(smc.guide.shift, expected, atol=2e-3)
    assert not getattr(OPTIMIZERS[name], "optim_objs", {}), "what was given has no state"


def test_the_optimiser_is_that_of_every_fit() -> None:
    """In iterations, for guides of several families, and for families that call it themselves."""
    made: list[int] = []

    def counted(parameters: Any) -> torch.optim.Optimizer:
        made.append(sum(one.numel() for one in parameters))
        return adam(parameters)

    chain = LinearGaussianChain(3, k=1.0, dim=2)
    options: dict[str, Any] = {"optimizer": counted, "optimizer_steps": 3, "seed": 0}
    smc = TrustRegionTwist(chain, PlainShift(chain), 40, guard=False, **options).fit(2)
    assert made == [8, 8] and smc.guide.shift.any()
    made.clear()
    TrustRegionTwist(chain, PlainShift(chain), 40, guard=True, **options).fit(1)
    assert made == [8] * len(made) and len(made) >= 4
    made.clear()
    model = tilted(masked_chain())
    smc = TrustRegionTwist(model, HiddenTilt(model, rank=2), 40, guard=False, **options).fit(1)
    assert made == [6] and smc.guide.theta.any()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": "adam"}, "optimizer='adam'; give a function of parameters"),
    ({"optimizer": adam([torch.zeros(1)])}, r"optimizer=Adam\(...\) belongs to parameters alr"),
    ({"optimizer": adam, "optimizer_steps": 0}, "optimizer_steps=0; give a whole number"),
    ({"optimizer_steps": 1.5}, "optimizer_steps=1.5"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_optimisers_are_refused(options: dict[str, Any], message: str) -> None:
    chain = LinearGaussianChain(3, dim=2)
    with pytest.raises(ValueError, match=message):
        TrustRegionTwist(chain, PlainShift(chain), 8, **options)


def test_optimisers_without_a_use_are_refused() -> None:
    chain = LinearGaussianChain(3, dim=2)
    with pytest.raises(ValueError, match=r"no part of the guide \(ShiftTwist\) is fitted by an"):
        TrustRegionTwist(chain, ShiftTwist(chain), 8, optimizer=adam)
    smc = TrustRegionTwist(chain, PlainShift(chain), 8, optimizer=lambda parameters: 3)
    smc.sample()
    with pytest.raises(ValueError, match="made int of the parameters; it is to make an optimiser"):
        smc.update()


def test_low_frequencies_are_orthonormal() -> None:
    basis = low_frequencies((3, 8, 8), 2).reshape(12, -1)
    assert torch.allclose(basis @ basis.T, torch.eye(12), atol=1e-5)


def test_quadratic_tilt_is_exact() -> None:
    """Against the product of densities by quadrature."""
    chain = LinearGaussianChain(2, dim=1)
    twist = QuadraticTwist(chain)
    with torch.no_grad():
        twist.slope.fill_(0.7)
        twist.precision.fill_(1.5)
    twist.args_kwargs = (({}, 2), {})
    prior = dist.Normal(torch.tensor([0.3]), 0.5).to_event(1)
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    density = (
        dist.Normal(0.3, 0.5).log_prob(grid) + twist.log_twist({"x": grid[:, None]}, 2)
    ).exp()
    density = density / torch.trapezoid(density, grid)
    with torch.no_grad():
        found = twist.get_posterior("x_1", prior).log_prob(grid[:, None].float()).exp()
    assert torch.allclose(found.double(), density, atol=1e-4)
