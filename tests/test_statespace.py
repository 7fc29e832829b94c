# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Models of Pyro's filter and of its epidemiology package, run as they are."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.epidemiology.distributions import infection_dist
from pyro.contrib.epidemiology.models import RegionalSIRModel, SimpleSEIRModel, SimpleSIRModel
from pyro.infer.smcfilter import SMCFilter
from torch import Tensor, tensor

from pyro_twist import handlers
from pyro_twist.infer import SMCFailed, TrustRegionTwist, TwistedSMC
from pyro_twist.latents import AutoLatents, JointTwist
from pyro_twist.statespace import Compartmental, ObservedFlows, ThinnedBinomial, TimeSeries
from tests.infer.composition import composes, refuses
from tests.perf.epidemic import FixedSIR, sir_posterior
from tests.perf.statespace import Oscillator, kalman, oscillator
from tests.statistics import (
    assert_frequencies,
    assert_mean,
    assert_tilted_mean,
    assert_unbiased,
)

CASES = tensor([1.0, 0.0, 2.0, 1.0])
SERIES = "State-space models of Pyro"


# models written for SMCFilter


class WiderGuide(Oscillator):
    """A guide of one's own, written for the same filter: the same move, half as wide again."""

    def init(self, state: Any, initial: Tensor) -> None:
        self.t = 0
        pyro.sample("z_init", dist.Delta(initial, event_dim=1))

    def step(self, state: Any, y: Tensor | None = None) -> None:
        self.t += 1
        kernel = dist.Normal(state["z"] @ self.matrix, 1.5 * self.spread).to_event(1)
        pyro.sample(f"z_{self.t}", kernel)


@composes(
    SERIES,
    "a model written for `SMCFilter`, with data as arguments of `step`: `TimeSeries(model, data)`",
    "runs as it is, also under `TrustRegionTwist`, where the estimate becomes exact for "
    "linear-Gaussian models; compared with the Kalman filter",
)
def test_the_oscillator_against_kalman() -> None:
    """The optimal twist is in the family: after two passes, what is left is rounding."""
    task = oscillator(8, 1)
    assert task.reference is not None
    exact = task.reference()
    sampler = TrustRegionTwist(task.model, task.twist(task.model), 200, seed=0).fit(2, *task.args)
    for seed in range(3):
        run = TwistedSMC(task.model, sampler.guide, 50, seed=seed).run(*task.args)
        assert float(run.log_normalizer) == pytest.approx(exact, abs=1e-3)


@composes(
    SERIES,
    "a guide written for `SMCFilter`",
    "is given the same data by being wrapped as well; the estimate is unbiased",
)
@pytest.mark.parametrize("guided", [False, True])
def test_estimates_of_the_oscillator_are_unbiased(guided: bool) -> None:
    """With no guide and with one written for ``SMCFilter``: 40 runs, z-test, rate 1e-6."""
    task = oscillator(4, 1)
    assert task.reference is not None
    guide = TimeSeries(WiderGuide(1.0, 1.0), task.model.steps) if guided else None
    values = []
    for seed in range(40):
        smc = TwistedSMC(task.model, guide, 1000, seed=seed)
        values.append(smc.run(*task.args).log_normalizer)
    assert_unbiased(torch.stack(values), task.reference())


def test_a_series_is_the_model_stepped_by_hand() -> None:
    task = oscillator(6, 1)
    run = TwistedSMC(task.model, None, 20, seed=0).run(*task.args)
    by_hand = TwistedSMC(Oscillator(1.0, 1.0), None, 20, seed=0)
    by_hand.init(*task.args)
    for y in task.model.steps:
        by_hand.step(y)
    assert by_hand.get_log_normalizer().item() == pytest.approx(run.log_normalizer.item())
    plain = SMCFilter(Oscillator(1.0, 1.0), WiderGuide(1.0, 1.0), 20, 0)
    plain.init(*task.args)
    plain.step(task.model.steps[0])


def test_kalman_against_the_density_of_the_observations() -> None:
    """One dimension, two observations: their joint normal density."""
    one, data = torch.ones(1, 1), tensor([[0.3], [-0.5]])
    found = kalman(data, torch.zeros(1), one, 0.8 * one, 0.5 * one, 2.0 * one, 0.3 * one)
    first, shared = 0.64 + 0.5, 0.8 * (0.64 + 0.5)
    second = 0.64 * first + 0.5
    covariance = 4 * tensor([[first, shared], [shared, second]]) + 0.3 * torch.eye(2)
    law = torch.distributions.MultivariateNormal(torch.zeros(2), covariance)
    assert found == pytest.approx(float(law.log_prob(data[:, 0])), abs=1e-5)


def test_arguments_of_steps() -> None:
    seen: list[Any] = []

    class Model:
        def init(self, state: Any) -> None:
            state["x"] = pyro.sample("x", dist.Normal(0.0, 1.0))

        def step(self, state: Any, *args: Any, **kwargs: Any) -> None:
            seen.append((args, kwargs))

    TwistedSMC(TimeSeries(Model(), [(1, 2), {"y": 3}, 4]), None, 2).run()
    TwistedSMC(TimeSeries(Model(), 1), None, 2).run()
    assert seen == [((1, 2), {}), ((), {"y": 3}), ((4,), {}), ((), {})]
    for steps in (0, []):
        with pytest.raises(ValueError, match="give one entry for each step"):
            TimeSeries(Model(), steps)


# thinned counts


@pytest.mark.parametrize("seen", [0, 2, 5])
def test_thinned_binomial(seen: int) -> None:
    """Bayes' rule, by enumeration; frequencies of draws by a chi-square test, rate 1e-6."""
    n, p, rate, counts = tensor(7.0), tensor(0.3), 0.4, torch.arange(8.0)
    joint = dist.Binomial(n, p).log_prob(counts).double()
    counted = dist.ExtendedBinomial(counts, tensor(rate)).log_prob(tensor(float(seen)))
    joint = joint + counted.double()
    law = ThinnedBinomial(n, p, float(seen), rate)
    posterior = law.log_prob(counts).double()
    alive = joint > -torch.inf
    assert torch.equal(posterior > -torch.inf, alive)
    expected = (joint - joint.logsumexp(0))[alive]
    assert torch.allclose(posterior[alive], expected, atol=1e-5)
    assert float(law.log_evidence) == pytest.approx(float(joint.logsumexp(0)), abs=1e-5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = law.expand([20_000]).sample().long()
    assert_frequencies(torch.bincount(drawn, minlength=8), joint.softmax(0))


def test_what_cannot_have_been_seen() -> None:
    law = ThinnedBinomial(tensor([3.0, 9.0]), tensor([0.5, 0.5]), 5.0, 0.5)
    assert law.log_evidence[0] == -torch.inf and law.log_evidence[1] > -torch.inf
    drawn = law.sample()
    assert drawn[0] == 3.0 and torch.isfinite(law.log_prob(drawn)).all()


# epidemic models


def fixed(data: Tensor = CASES) -> Compartmental:
    return Compartmental(FixedSIR(8, 3.0, data, 2.5, 0.5))


def flows_of(model: Any, rate: Any) -> ObservedFlows:
    return ObservedFlows(model, {"S2I": (CASES, rate)})


@composes(
    SERIES,
    "a `CompartmentalModel` of `pyro.contrib.epidemiology`: `Compartmental(model)`",
    "runs as it is; `ObservedFlows` proposes flows given the cases and looks one step ahead; "
    "compared with a sum over all epidemics",
)
@pytest.mark.parametrize("kind", ["bootstrap", "twist", "pyro"])
def test_small_epidemics_against_enumeration(kind: str) -> None:
    """40 runs with known parameters; z-test, rate 1e-6."""
    model = fixed()
    exact = sir_posterior(model.model)[0]
    guide = {"bootstrap": None, "twist": flows_of(model, 0.5), "pyro": _Prior(model)}[kind]
    values = []
    for seed in range(40):
        smc = TwistedSMC(model, guide, 600, seed=seed, ess_threshold=1.0)
        values.append(smc.run().log_normalizer)
    log_zs = torch.stack(values)
    assert_unbiased(log_zs, exact)
    if kind == "twist":
        assert log_zs.std() < 0.05


class _Prior:
    """A guide as Pyro's heuristic has it: the model without its observations."""

    def __init__(self, model: Compartmental) -> None:
        self.model = model

    def init(self, state: Any) -> None:
        self.model.init(dict(state))

    def step(self, state: Any, t: int) -> None:
        with pyro.poutine.block(hide_types=["observe"]):
            self.model.step(dict(state), t)


@composes(
    SERIES,
    "its global latents, drawn in `init`, with a guide in a `JointTwist`",
    "posteriors and evidence, compared with quadrature over the priors",
)
@pytest.mark.parametrize("kind", ["bootstrap", "twist", "joint"])
def test_unknown_parameters_against_enumeration(kind: str) -> None:
    """Priors integrated by quadrature; log Z and posterior means within five standard errors."""
    sir = SimpleSIRModel(8, 3.0, CASES)
    model = Compartmental(sir)
    log_z, r0, rho = sir_posterior(sir)
    guide: Any = None if kind == "bootstrap" else flows_of(model, "rho")
    if kind == "joint":
        guide = JointTwist(guide, AutoLatents(model), sites=("R0", "rho"), ridge=0.3)
        TrustRegionTwist(model, guide, 200, seed=5).fit(1)
    runs = [TwistedSMC(model, guide, 2000, seed=seed).run() for seed in range(30)]
    log_zs = torch.stack([run.log_normalizer for run in runs])
    assert_unbiased(log_zs, log_z)
    for name, exact in (("R0", r0), ("rho", rho)):
        ratio = (log_zs - log_z).exp() * torch.stack([run.expectation(name) for run in runs])
        assert_mean(ratio, exact)


def test_epidemics_that_the_prior_does_not_find() -> None:
    """Nearly all cases are seen, and come at once: the prior's particles are lost."""
    data = tensor([0.0, 1.0, 20.0, 8.0])
    model = Compartmental(FixedSIR(40, 3.0, data, 6.0, 0.95))
    with pytest.raises(SMCFailed, match="'obs_2'"):
        TwistedSMC(model, None, 20, seed=1).run()
    guide = ObservedFlows(model, {"S2I": (data, 0.95)})
    for seed in range(3):
        run = TwistedSMC(model, guide, 20, seed=seed).run()
        assert torch.isfinite(run.log_normalizer)


def test_regions_and_other_compartments() -> None:
    """One weight for all regions; the compartments add up."""
    population, data = tensor([8.0, 6.0]), tensor([[1.0, 0.0], [0.0, 2.0]])
    coupling = 0.5 + 0.5 * torch.eye(2)
    model = Compartmental(RegionalSIRModel(population, coupling, 3.0, data))
    assert model.max_plate_nesting == 1
    run = TwistedSMC(model, None, 500, model.max_plate_nesting, seed=0).run()
    assert run.state["S"].shape == (500, 2) and run.log_weights.shape == (500,)
    again = TwistedSMC(model, flows_of(model, "rho"), 50, 1, seed=0)
    assert torch.isfinite(again.run().log_normalizer)
    seir = Compartmental(SimpleSEIRModel(8, 2.0, 3.0, CASES))
    state = TwistedSMC(seir, None, 500, seed=0).run().state
    assert set(state) == {"R0", "rho", "S", "E", "I"}
    assert ((state["S"] + state["E"] + state["I"]) <= 8).all()


def test_a_parameter_can_be_conditioned() -> None:
    """The evidence of the known value, times its prior density."""
    model = Compartmental(SimpleSIRModel(8, 3.0, CASES))
    values = {"R0": tensor(2.5), "rho": tensor(0.5)}
    known = handlers.condition(model, values)
    prior = dist.LogNormal(0.0, 1.0).log_prob(values["R0"])
    prior = prior + dist.Beta(10, 10).log_prob(values["rho"])
    exact = sir_posterior(fixed().model)[0] + float(prior)
    log_zs = [TwistedSMC(known, None, 500, seed=s).run().log_normalizer for s in range(60)]
    assert_unbiased(torch.stack(log_zs), exact)


class Levelled(FixedSIR):
    """The reproduction number is a parameter, in steps of one."""

    def global_model(self) -> Any:
        return 1.5 + pyro.param("level", tensor(0.0)), self.recovery_time, self.rho


@composes(
    SERIES,
    "`pyro.param` in a `CompartmentalModel`",
    "`handlers.lift` makes it a latent that every transition knows; compared with a sum",
)
def test_a_lifted_parameter_reaches_every_transition() -> None:
    model = handlers.lift(
        Compartmental(Levelled(8, 3.0, CASES, 1.5, 0.5)), {"level": dist.Categorical(torch.ones(3))}
    )
    exact = [sir_posterior(FixedSIR(8, 3.0, CASES, 1.5 + k, 0.5))[0] for k in range(3)]
    terms = tensor(exact).double() - torch.tensor(3.0).log()
    runs = [TwistedSMC(model, None, 600, seed=seed).run() for seed in range(40)]
    log_zs = torch.stack([run.log_normalizer for run in runs])
    assert_unbiased(log_zs, float(terms.logsumexp(0)))
    means = torch.stack([run.expectation("level") for run in runs])
    share = float(terms.softmax(0) @ torch.arange(3.0).double())
    assert_tilted_mean(log_zs, means, float(terms.logsumexp(0)), share)


@composes(
    SERIES,
    "`ObservedFlows` with steps of which nothing is known",
    "`None` or NaN leaves the flow of that step to the model; the estimate is unbiased",
)
@pytest.mark.parametrize("missing", [None, float("nan")])
def test_flows_with_gaps(missing: Any) -> None:
    model = fixed()
    guide = ObservedFlows(model, {"S2I": ([1.0, missing, 2.0, 1.0], 0.5)})
    runs = [TwistedSMC(model, guide, 400, seed=seed).run() for seed in range(40)]
    assert_unbiased(
        torch.stack([run.log_normalizer for run in runs]), sir_posterior(model.model)[0]
    )


def test_the_twist_is_the_probability_of_the_next_cases() -> None:
    """One case on the first day; where nobody is susceptible there is none, and the floor holds."""
    model = fixed()
    state = {"S": tensor([7.0, 5.0, 0.0]), "I": tensor([1.0, 3.0, 1.0])}
    law = infection_dist(
        individual_rate=model.model.r0 / model.model.recovery_time,
        num_infectious=state["I"],
        num_susceptible=state["S"],
        population=8,
    )
    expected = dist.ExtendedBinomial(state["S"], law.probs * 0.5).log_prob(CASES[0]).double()
    assert expected[2] == -torch.inf
    expected[2] = expected[:2].max() - 7.0
    twist = ObservedFlows(model, {"S2I": (CASES, 0.5)}, floor=7.0)
    twist.stepping = False
    assert torch.allclose(twist.log_twist(state), expected, atol=1e-6)


def test_flows_that_the_model_does_not_have() -> None:
    model = fixed()
    cases: dict[str, Any] = {
        r"'S2J', but the first step has only the sites \['S2I_0'": {"S2J": (CASES, 0.5)},
        r"reads the probability .* from state\['rhoo'\]": {"S2I": (CASES, "rhoo")},
        "the probability 2.0 to be observed": {"S2I": (CASES, 2.0)},
        "the probability 0 to be observed": {"S2I": (CASES, 0)},
    }
    for message, flows in cases.items():
        with pytest.raises(ValueError, match=message):
            TwistedSMC(model, ObservedFlows(model, flows), 4, seed=0).run()


def test_a_call_simulates() -> None:
    state = Compartmental(SimpleSIRModel(8, 3.0, [None] * 4))()
    assert 0 <= float(state["S"]) < 8


@refuses(
    SERIES,
    "a `CompartmentalModel` with a `finalize`",
    "error: a likelihood of whole series weighs no step",
)
def test_what_is_no_epidemic_model() -> None:
    with pytest.raises(ValueError, match="no CompartmentalModel.*TimeSeries"):
        Compartmental(Oscillator(1.0, 1.0))

    class Finalized(SimpleSIRModel):  # type: ignore[misc]
        def finalize(self, params: Any, prev: Any, curr: Any) -> None:
            pass

    with pytest.raises(ValueError, match="a likelihood of whole series"):
        Compartmental(Finalized(8, 3.0, CASES))
    with pytest.raises(ValueError, match=r'as in \{"S2I": \(data, "rho"\)\}'):
        ObservedFlows(fixed(), {"S2I": CASES})  # type: ignore[dict-item]


def test_a_fit_without_a_maximum_leaves_the_guide_as_it_was() -> None:
    """Where all paths left have one ancestor, a normal guide would close in on it for ever."""
    model = Compartmental(SimpleSIRModel(8, 3.0, CASES))
    guide = JointTwist(flows_of(model, "rho"), AutoLatents(model), sites=("R0", "rho"))
    sampler = TrustRegionTwist(model, guide, 20, seed=0, guard=False)
    sampler.sample()
    before = [value.detach().clone() for value in guide.parameters()]
    sampler.guide.parts()[1].penalty = _overflowing
    sampler.update()
    assert all(torch.equal(*both) for both in zip(before, guide.parameters(), strict=True))


def _overflowing() -> Tensor:
    raise RuntimeError("value cannot be converted to type float without overflow")
