# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Composition, and nothing else: handlers around models, and latents beside the trajectory.

Laws and normalisers are compared with closed forms; a z-test fails by chance once in a million.
Each test is a row of ``docs/composition_table.md``; see :mod:`tests.infer.composition`.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, pyro_method
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, tensor

from pyro_twist import handlers
from pyro_twist.diffusion import GaussianDenoiser, GaussianDiffusion
from pyro_twist.infer import ImportanceSampling, SMCFailed, TrustRegionTwist, TwistedSMC
from pyro_twist.latents import AutoLatents, JointTwist, WithLatents
from pyro_twist.rewards import RewardTilted, Tilted, log_potential
from pyro_twist.twists import LookaheadTwist, ShiftTwist, Twist
from tests.infer.composition import PAGE, composes, refuses, table
from tests.oracles import ExactGuide, ExactTwist, LinearGaussianChain, MaskedChain
from tests.statistics import assert_mean, assert_tilted_mean, assert_unbiased

REPLICATES = 1500
STEPS = 3
GUIDES = ["prior", "twist", "explicit"]

HANDLERS = "Handlers around a model"
RUNS = "Handlers around a run"
LATENTS = "Latents beside the trajectory"
GUIDED = "Guides for these latents"


class Law:
    """
    A Gaussian law of named numbers, each linear in independent standard normal ones.

    The oracle: observations, tilts and powers have closed forms, written down here once more.
    """

    def __init__(self, size: int) -> None:
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.cov = torch.eye(size, dtype=torch.float64)
        self.rows: dict[str, Tensor] = {}
        self.consts: dict[str, float] = {}
        self.log_z = 0.0

    def add(self, name: str, row: Tensor, const: float = 0.0) -> None:
        self.rows[name], self.consts[name] = row, const

    def moments(self, name: str) -> tuple[float, float]:
        row = self.rows[name]
        return float(row @ self.mean) + self.consts[name], float(row @ self.cov @ row)

    def observe(self, name: str, value: float) -> Law:
        mean, var = self.moments(name)
        self.log_z += -0.5 * ((value - mean) ** 2 / var + math.log(2 * math.pi * var))
        gain = self.cov @ self.rows[name] / var
        self.mean = self.mean + gain * (value - mean)
        self.cov = self.cov - torch.outer(gain, self.cov @ self.rows[name])
        return self

    def tilt(self, name: str, slope: float) -> Law:
        mean, var = self.moments(name)
        self.log_z += slope * mean + 0.5 * slope**2 * var
        self.mean = self.mean + slope * self.cov @ self.rows[name]
        return self

    def power(self, exponent: float) -> Law:
        """The density of all named numbers to a power; as many as there are normal ones."""
        size = len(self.mean)
        log_det = float(torch.stack(list(self.rows.values())).slogdet().logabsdet)
        self.log_z += (1 - exponent) * (log_det + 0.5 * size * math.log(2 * math.pi))
        self.log_z -= 0.5 * size * math.log(exponent)
        self.cov = self.cov / exponent
        return self


def law_of(
    chain: LinearGaussianChain,
    do: Mapping[str, float] | None = None,
    drift: float = 0.0,
    drifting: bool = False,
) -> Law:
    """
    The law of a chain before its factor; ``drift`` is added in every step, and with ``drifting``
    a standard normal number of that name as well.
    """
    do, top = do or {}, chain.timesteps[0]
    law = Law(top + 1 + drifting)
    units = torch.eye(top + 1 + drifting, dtype=torch.float64)
    moved = units[top + 1] if drifting else torch.zeros_like(units[0])
    if drifting:
        law.add("drift", moved)
    law.add(f"x_{top}", units[0])
    row, const = units[0], 0.0
    if f"x_{top}" in do:
        row, const = torch.zeros_like(row), do[f"x_{top}"]
    for t in chain.timesteps:
        row = chain.a * row + chain.s * units[top - t + 1] + moved
        const = chain.a * const + drift
        law.add(f"x_{t - 1}", row, const)
        if f"x_{t - 1}" in do:
            row, const = torch.zeros_like(row), do[f"x_{t - 1}"]
            law.add("end" if t == 1 else "fixed", row, const)
    return law


def replicated(k: float = 0.7) -> LinearGaussianChain:
    return LinearGaussianChain(STEPS, k=k, replicates=REPLICATES)


def guide_of(
    kind: str, model: Any, chain: LinearGaussianChain, *, without: tuple[str, ...] = ()
) -> Any:
    """A proposal that is wrong, so that weights have something to do."""
    if kind == "prior":
        return None
    if kind == "twist":
        return JointTwist(ExactTwist(_Like(model, chain), 0.6))
    explicit = ExactGuide(chain)
    return handlers.block(explicit, hide=list(without)) if without else explicit


class _Like:
    """A handled model with the attributes of the oracle's chain that its twist reads."""

    def __init__(self, model: Any, chain: Any) -> None:
        self.timesteps, self.k, self.a, self.s = model.timesteps, chain.k, chain.a, chain.s
        self.dim, self.reward, self.event_shape = chain.dim, chain.reward, chain.event_shape


def run(model: Any, guide: Any = None, **options: Any) -> Any:
    options = {"population_plate": "replicates", "seed": 0, "ess_threshold": 1.0, **options}
    return TwistedSMC(model, guide, 32, 1, **options).run()


def assert_law(result: Any, log_z: float, mean: float | None = None, entry: Any = "x") -> None:
    if float(result.log_normalizer.std()) < 1e-6:
        assert result.log_normalizer.mean().item() == pytest.approx(log_z, abs=1e-6)
    else:
        assert_unbiased(result.log_normalizer, log_z)
    if mean is not None:
        assert_tilted_mean(result.log_normalizer, result.expectation(entry), log_z, mean)


# Handlers around a model


@composes(
    HANDLERS,
    "`condition` on a site of the path, in `init`, `step` or at the end",
    "the log-probability becomes part of the weight; no twist proposes the site; the value is "
    "shared by all particles or has their batch shape",
)
@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("site", ["x_3", "x_1", "x_0"])
def test_condition(kind: str, site: str) -> None:
    chain = replicated()
    model = handlers.condition(chain, {site: tensor(0.4)})
    law = law_of(chain).observe(site, 0.4).tilt("x_0", chain.k)
    result = run(model, guide_of(kind, model, chain, without=(site,)), history="paths")
    assert_law(result, law.log_z, law.moments("x_0")[0] if site != "x_0" else None)
    assert site not in result.samples


@composes(
    HANDLERS,
    "`condition` with a value for each particle",
    "the values stay with their particles",
)
def test_condition_on_values_for_each_particle() -> None:
    values = torch.linspace(-1, 1, 8)
    model = handlers.condition(LinearGaussianChain(STEPS), {"x_3": values})
    result = ImportanceSampling(model, 8, seed=0, history="paths").run()
    expected = dist.Normal(0.0, 1.0).log_prob(values) + result.state["reward"]
    assert torch.allclose(result.log_weights, expected.double(), atol=1e-6)


@composes(
    HANDLERS,
    "a value whose event has as many entries as there are particles",
    "is taken as one event, not as one number for each particle",
)
def test_values_of_the_size_of_the_population() -> None:
    value = tensor([1.0, -1.0, 0.5, 0.0])
    for handler in (handlers.condition, handlers.do):
        chain = LinearGaussianChain(STEPS, dim=4)
        smc = TwistedSMC(handler(chain, {"x_2": value}), None, 4, seed=0, ess_threshold=1.0)
        smc.init()
        smc.step(3)
        assert torch.equal(smc.state["x"], value.expand(4, 4))
    with pytest.raises(ValueError, match=r"'x_2' has shape \(3,\).*event shape \(4,\)"):
        TwistedSMC(handlers.condition(chain, {"x_2": value[:3]}), None, 4).run()


@refuses(
    HANDLERS,
    "`condition` on a site that an explicit guide draws",
    "error; hide it from the guide with `handlers.block(guide, hide=[...])`",
)
@pytest.mark.parametrize("given", ["observes", "has been given a value for"])
def test_explicit_guides_must_leave_observations(given: str) -> None:
    chain = LinearGaussianChain(STEPS)
    values = {"x_1": tensor(0.4)}
    if given == "observes":
        model = handlers.condition(chain, values)
    else:
        model = handlers.replay(chain, trace=_recorded(**values))
    with pytest.raises(ValueError, match=f"samples 'x_1', which the model {given}.*block"):
        TwistedSMC(model, ExactGuide(chain), 4).run()


def _recorded(**values: Tensor) -> poutine.Trace:
    """A trace of latent sites with given values."""
    trace = poutine.Trace()
    for name, value in values.items():
        site = {"type": "sample", "name": name, "value": value, "is_observed": False}
        # as a guide's own sites have it in a trace of a run
        trace.add_node(name, **site, infer={"prior": dist.Normal(0.0, 9.0), "_from_guide": True})
    return trace


@composes(
    HANDLERS,
    "`do` on a site of the path",
    "the value is set and adds nothing to the weight; the fresh site of the same name that Pyro "
    "draws is left alone by twists, and is in no path and no fit",
)
@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("site", ["x_3", "x_1"])
def test_do(kind: str, site: str) -> None:
    chain = replicated()
    model = handlers.do(chain, {site: tensor(0.4)})
    law = law_of(chain, do={site: 0.4}).tilt("x_0", chain.k)
    result = run(model, guide_of(kind, model, chain), history="paths")
    assert_law(result, law.log_z, law.moments("x_0")[0])
    assert site not in result.samples


@composes(
    HANDLERS,
    "`condition` around `do`",
    "observes the fresh site: the weight is that of a counterfactual",
)
@pytest.mark.parametrize("kind", ["prior", "twist"])
def test_counterfactual(kind: str) -> None:
    """What would ``x_0`` have been with ``x_1`` at -0.5, given that ``x_1`` came out as 0.8."""
    chain = replicated()
    model = handlers.condition(handlers.do(chain, {"x_1": -0.5}), {"x_1": tensor(0.8)})
    law = law_of(chain, do={"x_1": -0.5}).observe("x_1", 0.8).tilt("x_0", chain.k)
    result = run(model, guide_of(kind, model, chain))
    assert_law(result, law.log_z, law.moments("x_0")[0])


@composes(
    HANDLERS,
    "`scale` around a whole model",
    "the joint density to that power, of latents as of factors: a latent site weighs "
    "`scale * log p - log q`, for any guide and for none",
)
@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("scale", [0.8, 1.3])
def test_scale(kind: str, scale: float) -> None:
    chain = replicated(0.4)
    model = handlers.scale(chain, scale)
    law = law_of(chain).power(scale).tilt("x_0", scale * chain.k)
    result = run(model, guide_of(kind, model, chain))
    assert_law(result, law.log_z, law.moments("x_0")[0])


@composes(
    HANDLERS,
    "`poutine.scale` or `poutine.mask` inside a potential",
    "tempers or removes these factors alone, in the last step and in every look-ahead",
)
@pytest.mark.parametrize("kept", [True, False])
def test_scaled_potential(kept: bool) -> None:
    chain = LinearGaussianChain(STEPS, k=0.0, replicates=REPLICATES)

    def potential(state: Any, x0: Tensor) -> None:
        with poutine.scale(scale=0.5), poutine.mask(mask=kept):
            pyro.factor("tempered", 1.4 * x0)

    model = Tilted(chain, potential)
    law = law_of(chain).tilt("x_0", 0.7 if kept else 0.0)
    result = run(model, LookaheadTwist(model))
    assert_law(result, law.log_z, law.moments("x_0")[0])
    assert log_potential(model, {}, torch.ones(2, REPLICATES))[0, 0] == pytest.approx(0.7 * kept)


@composes(
    HANDLERS,
    "`mask` around a whole model",
    "takes factors and observations away; latents keep their law, whatever a twist proposes",
)
@pytest.mark.parametrize("kind", GUIDES)
def test_mask(kind: str) -> None:
    chain = replicated()
    kept = torch.arange(REPLICATES) < REPLICATES // 2
    model = handlers.mask(chain, kept)
    result = run(model, guide_of(kind, model, chain))
    law = law_of(chain)
    assert_unbiased(result.log_normalizer[~kept], law.log_z)
    law.tilt("x_0", chain.k)
    assert_unbiased(result.log_normalizer[kept], law.log_z)


@composes(
    HANDLERS,
    "`reparam` of sites of the path",
    "twists meet the auxiliary site under its own name, tilt it if they tilt any site, and leave "
    "it to the model in a `JointTwist`; the law is the same",
)
@pytest.mark.parametrize("kind", ["prior", "twist", "tilts all"])
@pytest.mark.parametrize("centered", [0.0, 0.5])
def test_reparam(kind: str, centered: float) -> None:
    chain = replicated()
    config = {"x_3": LocScaleReparam(0.0), "x_1": LocScaleReparam(centered)}
    model = handlers.reparam(chain, config)
    if kind == "tilts all":
        guide = ShiftTwist(model)
        guide.theta.data.fill_(0.3)
    else:
        guide = guide_of(kind, model, chain)
    law = law_of(chain).tilt("x_0", chain.k)
    assert_law(run(model, guide), law.log_z, law.moments("x_0")[0])


class RandomScale(LinearGaussianChain):
    """The scale of the first step depends on the state, so that a Jacobian would be missed."""

    def kernel(self, state: Any, t: int) -> Any:
        if t < 3:
            return super().kernel(state, t)
        return dist.Normal(0.0, torch.where(state["x"] > 0, 2.0, 0.5))


@composes(
    HANDLERS,
    "`reparam` around `condition`",
    "an observed site is left as it is, since Pyro's location-scale reparametriser would drop the "
    "Jacobian of an observation",
)
def test_reparam_of_an_observation() -> None:
    chain = RandomScale(STEPS, k=0.0, replicates=REPLICATES)
    observed = handlers.condition(chain, {"x_2": tensor(1.0)})
    result = run(handlers.reparam(observed, {"x_2": LocScaleReparam(0.0)}))
    density = [float(dist.Normal(0.0, s).log_prob(tensor(1.0)).exp()) for s in (2.0, 0.5)]
    assert_law(result, math.log(sum(density) / 2))


@refuses(
    HANDLERS,
    "`condition` around `reparam`",
    "error: the site is a function of its noise by then; condition first",
)
def test_condition_on_a_function_of_others() -> None:
    model = handlers.reparam(LinearGaussianChain(STEPS), {"x_2": LocScaleReparam(0.0)})
    with pytest.raises(ValueError, match=r"'x_2' is a function of other sites.*condition it first"):
        TwistedSMC(handlers.condition(model, {"x_2": tensor(0.0)}), None, 4).run()


@composes(
    HANDLERS,
    "`block` of a latent site",
    "the site is drawn from the model's kernel, for each particle by itself, and no guide sees it",
)
@pytest.mark.parametrize("kind", GUIDES)
def test_block_of_a_latent(kind: str) -> None:
    chain = replicated()
    model = handlers.block(chain, hide=["x_1"])
    law = law_of(chain).tilt("x_0", chain.k)
    result = run(model, guide_of(kind, model, chain, without=("x_1",)), history="paths")
    assert_law(result, law.log_z, law.moments("x_0")[0])
    assert sorted(result.samples) == ["x_0", "x_2", "x_3"]


@composes(
    HANDLERS,
    "`block` of everything",
    "the model without its factors: nothing is seen, and every particle has draws of its own",
)
def test_block_of_everything() -> None:
    chain = LinearGaussianChain(STEPS)
    result = ImportanceSampling(handlers.block(chain), 20_000, seed=0).run()
    assert float(result.log_normalizer) == 0.0
    assert_mean(result.state["x"].square(), law_of(chain).moments("x_0")[1])


@composes(HANDLERS, "`block` of a factor or an observation", "it does not count")
@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("options", [{"hide": ["reward_factor"]}, {"hide_types": ["observe"]}])
def test_block_of_a_factor(kind: str, options: dict[str, Any]) -> None:
    chain = replicated()
    model = handlers.block(chain, **options)
    assert_law(run(model, guide_of(kind, model, chain)), 0.0, 0.0)


@composes(
    HANDLERS,
    "`infer_config`",
    "reaches the sites of models and of explicit guides; an extra site of a guide marked "
    "`is_auxiliary` counts as part of the proposal",
)
def test_infer_config() -> None:
    class Noise(ExactGuide):
        def step(self, state: Any, t: int) -> None:
            with self.model.copies():
                scale, x = 1.2 * self.model.s, state["x"]
                u = pyro.sample(f"u_{t}", dist.Normal(torch.zeros_like(x), 1.0))
                density = torch.full_like(x, -math.log(scale))
                value = self.model.a * x + scale * u
                pyro.sample(f"x_{t - 1}", dist.Delta(value, log_density=density))

    chain = replicated()
    with pytest.raises(ValueError, match="samples 'u_3'.*is_auxiliary"):
        run(chain, Noise(chain))
    guide = handlers.infer_config(Noise(chain), lambda site: {"is_auxiliary": True})
    model = handlers.infer_config(chain, lambda site: {"enumerate": "parallel"})
    law = law_of(chain).tilt("x_0", chain.k)
    assert_law(run(model, guide), law.log_z, law.moments("x_0")[0])


class Drifting(LinearGaussianChain):
    """Parameters in two steps of three, and in the factor."""

    def kernel(self, state: Any, t: int) -> Any:
        drift = pyro.param("drift", torch.zeros(())) if t > 1 else 0.0
        return dist.Normal(self.a * state["x"] + drift, self.s)

    def terminal(self, state: Any, x0: Tensor) -> None:
        pyro.factor("reward_factor", pyro.param("slope", tensor(0.5)) * x0)


@composes(
    HANDLERS,
    "`lift` of parameters",
    "each becomes a latent, drawn once in `init`, kept in the state under its name and resampled "
    "with its particle; look-aheads know it; `result.state[name]` has its posterior",
)
@pytest.mark.parametrize("kind", ["prior", "guide", "look-ahead"])
def test_lift(kind: str) -> None:
    """Two of three steps drift, so that ``x_0`` has ``(a + a^2) drift``; then a mixture of two."""
    chain = Drifting(STEPS, k=0.0)
    slopes = dist.Uniform(0.0, 0.6)
    model = handlers.lift(chain, {"drift": dist.Normal(0.0, 0.5), "slope": slopes})
    guides: dict[str, Any] = {
        "prior": None,
        "guide": JointTwist(Twist(model), AutoNormalMessenger(model, init_scale=1.2)),
        "look-ahead": LookaheadTwist(model),
    }
    variance = chain.variance + 0.25 * (chain.a + chain.a**2) ** 2
    grid = torch.linspace(0.0, 0.6, 2001, dtype=torch.float64)
    density = (0.5 * grid.square() * variance).exp() / 0.6
    z = float(torch.trapezoid(density, grid))
    slope = float(torch.trapezoid(grid * density, grid)) / z
    drift = 0.25 * slope * (chain.a + chain.a**2)
    runs = [
        TwistedSMC(model, guides[kind], 300, seed=s, ess_threshold=0.9).run() for s in range(100)
    ]
    log_zs = torch.stack([one.log_normalizer for one in runs])
    assert_unbiased(log_zs, math.log(z))
    for name, mean in (("slope", slope), ("drift", drift)):
        means = torch.stack([one.expectation(name) for one in runs])
        assert_tilted_mean(log_zs, means, math.log(z), mean)


@composes(
    HANDLERS,
    "`lift` in a call",
    "one draw for the whole path, as in Pyro, drawn first; a name that is no parameter warns",
)
def test_lift_of_a_called_model() -> None:
    chain = Drifting(STEPS)
    model = handlers.lift(chain, {"drift": dist.Normal(0.0, 1.0)})
    trace = poutine.trace(model).get_trace()
    assert [name for name in trace.nodes if name.startswith(("drift", "x"))][:2] == ["drift", "x_3"]
    sites = trace.nodes
    moved = [sites[f"x_{t - 1}"]["fn"].loc - chain.a * sites[f"x_{t}"]["value"] for t in (3, 2)]
    assert torch.allclose(torch.stack(moved), trace.nodes["drift"]["value"].expand(2))
    other = handlers.lift(LinearGaussianChain(STEPS), {"drfit": dist.Normal(0.0, 1.0)})
    for call in (other, ImportanceSampling(other, 4).run):
        with pytest.warns(UserWarning, match="no parameters .*drfit"):
            call()


@refuses(
    HANDLERS,
    "`lift` without names, of a name that the model writes to the state, or across populations",
    "error; name the parameters, rename one, or draw the latent in a `WithLatents`",
)
def test_lift_is_refused() -> None:
    chain = Drifting(STEPS)
    with pytest.raises(ValueError, match="must be named"):
        handlers.lift(chain, dist.Normal(0.0, 1.0))  # type: ignore[arg-type]

    class Clash(LinearGaussianChain):
        def init(self, state: Any) -> None:
            super().init(state)
            pyro.param("x", torch.zeros(()))

    with pytest.raises(ValueError, match=r"writes state\['x'\]"):
        TwistedSMC(handlers.lift(Clash(2), {"x": dist.Normal(0.0, 1.0)}), None, 4).run()
    shared = handlers.lift(Drifting(2, replicates=3), {"drift": dist.Normal(0.0, 1.0)})
    with pytest.raises(ValueError, match="'drift' is outside the plate 'replicates'"):
        run(shared)


@composes(
    HANDLERS,
    "`trace`",
    "the sites since `init`, as drawn and before resampling; a look-ahead is not in it",
)
def test_trace() -> None:
    chain = LinearGaussianChain(STEPS, k=0.5, replicates=2)
    model = handlers.trace(chain)
    options: dict[str, Any] = {"population_plate": "replicates", "seed": 0, "resampling": "none"}
    result = TwistedSMC(model, LookaheadTwist(model), 8, 1, **options).run()
    plain = TwistedSMC(chain, LookaheadTwist(chain), 8, 1, **options).run()
    assert torch.equal(result.log_weights, plain.log_weights)
    names = [name for name in model.trace.nodes if name != "replicates"]
    assert names == ["x_3", "x_2", "x_1", "x_0", "reward_factor"]
    assert torch.equal(model.trace.nodes["x_0"]["value"], result.state["x"])
    called = handlers.trace(LinearGaussianChain(2)).get_trace()
    assert [name for name in called.nodes if name[0] != "_"][:3] == ["x_2", "x_1", "x_0"]


@composes(
    HANDLERS,
    "`replay`",
    "values are taken as if the model had drawn them: no weight, no proposal of a twist",
)
@pytest.mark.parametrize("kind", ["prior", "twist"])
def test_replay(kind: str) -> None:
    """Two recorded values; what Pyro has recorded of another run's inference is not used."""
    chain = replicated()
    model = handlers.replay(chain, trace=_recorded(x_3=tensor(0.3), x_1=tensor(0.4)))
    law = law_of(chain, do={"x_1": 0.4}).tilt("x_0", chain.k)
    result = run(model, guide_of(kind, model, chain), history="paths")
    assert_law(result, law.log_z, law.moments("x_0")[0])
    assert torch.equal(result.samples["x_1"], tensor(0.4).expand(32, REPLICATES))


@composes(
    HANDLERS,
    "`seed`",
    "one stream from the seed on, through all steps and runs of the object, so that no noise is "
    "used twice; a call starts at the seed, as in Pyro",
)
def test_seed() -> None:
    chain = LinearGaussianChain(STEPS, k=0.7)
    first, second = (handlers.seed(chain, 3) for _ in range(2))
    one, other = (ImportanceSampling(m, 500, history="paths").run() for m in (first, second))
    assert torch.equal(one.state["x"], other.state["x"])
    noise = [one.samples[f"x_{t - 1}"] - chain.a * one.samples[f"x_{t}"] for t in (3, 2, 1)]
    # independent within a correlation of five standard errors
    assert torch.corrcoef(torch.stack(noise)).fill_diagonal_(0).abs().max() < 5 / 500**0.5
    assert not torch.equal(ImportanceSampling(first, 500).run().state["x"], one.state["x"])
    called = [poutine.trace(one).get_trace().log_prob_sum() for one in (first, first, second)]
    assert called[0] == called[1] == called[2]
    model = handlers.seed(replicated(), 3)
    law = law_of(chain).tilt("x_0", chain.k)
    assert_law(run(model, guide_of("twist", model, chain)), law.log_z, law.moments("x_0")[0])


@composes(
    HANDLERS,
    "a plate, as in `handle(model, pyro.plate(...))`",
    "opens it around every step; it can be the `population_plate`",
)
def test_plate_around_a_model() -> None:
    chain = LinearGaussianChain(STEPS, k=0.7)
    model = handlers.handle(chain, pyro.plate("replicates", REPLICATES, dim=-1))
    law = law_of(chain).tilt("x_0", chain.k)
    assert_law(run(model), law.log_z, law.moments("x_0")[0])
    together = TwistedSMC(model, ExactTwist(_Like(model, chain)), 8, 1, seed=0).run()
    assert together.log_normalizer.item() == pytest.approx(REPLICATES * law.log_z, rel=1e-4)


@composes(
    HANDLERS,
    "several handlers",
    "apply from the inside out, as in Pyro: `scale(condition(...))` scales the observation",
)
def test_nested_handlers() -> None:
    chain = replicated(0.4)
    model = handlers.scale(handlers.condition(chain, {"x_1": tensor(0.4)}), 0.8)
    law = law_of(chain).power(0.8)
    # the density of the joint to a power is conditioned on x_1 without another power
    law.observe("x_1", 0.4).tilt("x_0", 0.8 * chain.k)
    assert_law(run(model, guide_of("twist", model, chain)), law.log_z, law.moments("x_0")[0])


@composes(
    HANDLERS,
    "a look-ahead of a twist",
    "`log_potential` runs `terminal` inside the handlers",
)
def test_look_ahead_sees_handlers() -> None:
    chain, x0 = LinearGaussianChain(STEPS, k=2.0), tensor([1.0, 3.0])
    assert log_potential(handlers.scale(chain, 0.5), {}, x0).tolist() == [1.0, 3.0]
    assert log_potential(handlers.mask(chain, False), {}, x0).tolist() == [0.0, 0.0]
    assert log_potential(handlers.block(chain), {}, x0).tolist() == [0.0, 0.0]
    lifted = handlers.lift(Drifting(STEPS), {"slope": dist.Normal(0.0, 1.0)})
    assert log_potential(lifted, {"slope": tensor([2.0, 3.0])}, x0).tolist() == [2.0, 9.0]
    kernel = handlers.lift(Drifting(STEPS), {"drift": dist.Normal(0.0, 1.0)}).kernel
    assert kernel({"x": x0, "drift": tensor([2.0, 3.0])}, 3).loc.tolist() == pytest.approx(
        [2.9, 5.7]
    )
    assert not hasattr(handlers.scale(_Plain(), 2.0), "terminal")


class _Plain:
    """No more than ``SMCFilter`` asks for."""

    def init(self, state: Any) -> None:
        state["z"] = pyro.sample("z_0", dist.Normal(0.0, 1.0))

    def step(self, state: Any, y: Tensor) -> None:
        pyro.sample("y", dist.Normal(state["z"], 1.0), obs=y)


@composes(
    HANDLERS,
    "models without `timesteps`, stepped by hand",
    "as any other",
)
def test_models_without_timesteps() -> None:
    smc = TwistedSMC(handlers.scale(_Plain(), 2.0), None, 10_000, seed=0, resampling="none")
    smc.init()
    smc.step(tensor(0.5))
    # the integral of the square of N(z; 0, 1) N(y; z, 1), within five standard errors
    exact = -math.log(4 * math.pi**2) + 0.5 * math.log(math.pi / 2) - 0.125
    terms = (smc.log_weights - exact).exp()
    assert abs(float(terms.mean()) - 1) < 5 * float(terms.std()) / 100


CALLED: list[Callable[[Any], Any]] = [
    lambda f: poutine.condition(f, data={"x_1": tensor(0.4)}),
    lambda f: poutine.do(f, data={"x_1": tensor(0.4)}),
    lambda f: poutine.scale(f, scale=0.5),
    lambda f: poutine.mask(f, mask=False),
    lambda f: poutine.reparam(f, config={"x_1": LocScaleReparam(0.0)}),
    lambda f: poutine.infer_config(f, config_fn=lambda site: {"num_samples": 3}),
    lambda f: poutine.block(f, hide=["x_1"]),
    lambda f: poutine.replay(f, trace=_recorded(x_1=tensor(0.4))),
    lambda f: poutine.seed(f, rng_seed=4),
    lambda f: poutine.trace(f),
]


@composes(
    HANDLERS,
    "all of them on a call of the model, `model()`",
    "the same sites, values and log-probabilities as Pyro's handler around a function",
)
@pytest.mark.parametrize("number", range(len(CALLED)))
def test_called_models(number: int) -> None:
    handler = CALLED[number]
    model = RewardTilted(LinearGaussianChain(STEPS), lambda x: x, decode=False)
    handled = handlers.handle(model, handler(None))
    expected = poutine.trace(poutine.seed(handler(lambda: model()), rng_seed=1)).get_trace()
    found = poutine.trace(poutine.seed(lambda: handled(), rng_seed=1)).get_trace()
    assert list(found.nodes) == list(expected.nodes)
    assert float(found.log_prob_sum()) == float(expected.log_prob_sum())
    assert torch.equal(found.nodes["_RETURN"]["value"], expected.nodes["_RETURN"]["value"])


class Table:
    """A chain on three states; laws by enumeration."""

    timesteps = (3, 2, 1)
    event_shape = ()

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.start = torch.rand(3, generator=generator)
        self.rows = torch.rand(3, 3, generator=generator)
        self.reward = tensor([0.0, 1.0, -1.0])

    def init(self, state: Any) -> None:
        with pyro.plate("replicates", REPLICATES, dim=-1):
            state["x"] = pyro.sample("x_3", dist.Categorical(self.start))

    def step(self, state: Any, t: int) -> None:
        with pyro.plate("replicates", REPLICATES, dim=-1):
            state["x"] = pyro.sample(f"x_{t - 1}", dist.Categorical(self.rows[state["x"]]))
            if t == 1:
                pyro.factor("reward", self.reward[state["x"]])

    def enumerated(self, weight: Callable[..., float]) -> tuple[float, float]:
        """Log-normaliser and probability of state 1 at the end."""
        start, rows = self.start / self.start.sum(), self.rows / self.rows.sum(-1, keepdim=True)
        totals = [0.0, 0.0, 0.0]
        for x in torch.cartesian_prod(*[torch.arange(3)] * 4).tolist():
            p = [float(start[x[0]])] + [float(rows[a, b]) for a, b in zip(x, x[1:], strict=False)]
            totals[x[3]] += weight(x, p, math.exp(float(self.reward[x[3]])))
        return math.log(sum(totals)), totals[1] / sum(totals)


class TableGuide(Twist):
    """Tilts every step towards state 1, and looks ahead to it."""

    def get_posterior(self, name: str, prior: Any) -> Any:
        return dist.Categorical(logits=prior.logits + tensor([0.0, 0.4, -0.2]))

    def log_twist(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor([0.0, 0.3, -0.2])[state["x"]]


TABLES: dict[str, tuple[Callable[[Any], Any], Callable[..., float]]] = {
    "condition": (
        lambda m: handlers.condition(m, {"x_1": tensor(2)}),
        lambda x, p, g: (x[2] == 2) * math.prod(p) * g,
    ),
    "do": (
        lambda m: handlers.do(m, {"x_1": tensor(2)}),
        lambda x, p, g: (x[2] == 2) * p[0] * p[1] * p[3] * g,
    ),
    "scale": (lambda m: handlers.scale(m, 1.2), lambda x, p, g: (math.prod(p) * g) ** 1.2),
    "mask": (lambda m: handlers.mask(m, False), lambda x, p, g: math.prod(p)),
    "block": (lambda m: handlers.block(m, hide=["x_2"]), lambda x, p, g: math.prod(p) * g),
    "replay": (
        lambda m: handlers.replay(m, trace=_recorded(x_1=tensor(2))),
        lambda x, p, g: (x[2] == 2) * p[0] * p[1] * p[3] * g,
    ),
}


@composes(
    HANDLERS,
    "the same on discrete sites",
    "compared with sums over all paths",
)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("guided", [False, True])
def test_discrete_sites(name: str, guided: bool) -> None:
    chain = Table()
    handled, weight = TABLES[name]
    model = handled(chain)
    log_z, share = chain.enumerated(weight)
    assert_law(run(model, TableGuide(model) if guided else None), log_z, share, _is_one)


def _is_one(state: Mapping[str, Tensor]) -> Tensor:
    return (state["x"] == 1).double()


@composes(
    HANDLERS,
    "`condition` on the text that a masked diffusion model ends with",
    "estimates its probability, here compared with a sum over all orders of unmasking",
)
def test_probability_of_a_sequence() -> None:
    chain = MaskedChain(2, 3, 2, num_inference_steps=3)
    tokens = tensor([1, 0])
    law = torch.zeros(chain.size, dtype=torch.float64)
    law[chain.index(tensor([2, 2]))] = 1.0
    for t in chain.diffusion.timesteps:
        law = law @ chain.transition(t)
    model = handlers.condition(chain.diffusion, {"x_0": tokens})
    result = ImportanceSampling(model, 20_000, seed=0).run()
    terms = (result.log_weights - law[chain.index(tokens)].log()).exp()
    assert_mean(terms, 1.0)


# Handlers around a run


@composes(
    RUNS,
    "parameters of model and guide",
    "their messages reach handlers outside",
)
def test_parameters_reach_outer_handlers() -> None:
    chain = Drifting(STEPS)
    guide = JointTwist(ShiftTwist(chain), _ParameterGuide())
    model = WithLatents(chain, lambda: {"style": pyro.sample("style", dist.Normal(0.0, 1.0))})
    with poutine.trace(param_only=True) as tracer:
        TwistedSMC(model, guide, 4).run()
    assert set(tracer.trace.nodes) == {"drift", "slope", "loc", "scale"}


class _ParameterGuide:
    def init(self, state: Any) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        pyro.sample("style", dist.Normal(loc, scale))


@composes(
    RUNS,
    "`lift`",
    "one value for the whole run, which belongs to the program outside; the run estimates the "
    "normaliser given it",
)
@pytest.mark.parametrize("kind", GUIDES)
def test_lift_around_a_run(kind: str) -> None:
    chain = Drifting(STEPS, k=0.5)
    with poutine.trace() as tracer, poutine.lift(prior={"drift": dist.Normal(1.0, 0.1)}):
        smc = TwistedSMC(chain, guide_of(kind, chain, chain), 4000, seed=0, history="paths")
        result = smc.run()
    drift = float(tracer.trace.nodes["drift"]["value"])
    law = law_of(chain).tilt("x_0", 0.5)
    exact = law.log_z + 0.5 * drift * (chain.a + chain.a**2)
    # the weights of 4000 particles have a relative standard deviation below 1.2
    assert result.log_normalizer.item() == pytest.approx(exact, abs=5 * 1.2 / 4000**0.5)
    assert sorted(result.samples) == ["x_0", "x_1", "x_2", "x_3"]
    TrustRegionTwist(chain, ShiftTwist(chain), 8, num_iterations=1).run()


@refuses(
    RUNS,
    "a plate",
    "error, in `init` and in `step`; put it inside the model, or around it with `handle`",
)
def test_plates_around_a_run() -> None:
    smc = TwistedSMC(LinearGaussianChain(STEPS), None, 4)
    plate = pyro.plate("prompts", 2, dim=-3)
    with plate, pytest.raises(ValueError, match="init was called inside the plate 'prompts'"):
        smc.run()
    smc.init()
    with plate, pytest.raises(ValueError, match="step was called inside the plate 'prompts'"):
        smc.step(3)


@refuses(
    RUNS,
    "`condition` and `do`",
    "error if they name a site of the model; put them around the model",
)
@pytest.mark.parametrize("name", ["condition", "do"])
def test_values_around_a_run(name: str) -> None:
    smc = TwistedSMC(LinearGaussianChain(STEPS), None, 4)
    handler = getattr(poutine, name)
    with handler(data={"x_1": tensor(0.0)}), pytest.raises(ValueError, match=f"handlers.{name}"):
        smc.run()
    with handler(data={"other": tensor(0.0)}):
        smc.run()


@refuses(
    RUNS,
    "`trace`, `scale`, `mask`, `replay`, `block`, `reparam`, `infer_config`",
    "no effect on the sites of a run, which are closed to the program outside",
)
def test_a_run_is_closed() -> None:
    chain = LinearGaussianChain(STEPS, k=0.7)
    expected = TwistedSMC(chain, None, 8, seed=0).run().log_weights
    outside: list[Any] = [
        poutine.trace(),
        poutine.scale(scale=2.0),
        poutine.mask(mask=False),
        poutine.replay(trace=_recorded(x_1=tensor(0.4))),
        poutine.block(),
        poutine.reparam(config={"x_1": LocScaleReparam(0.0)}),
        poutine.infer_config(config_fn=lambda site: {"is_auxiliary": True}),
    ]
    for handler in outside:
        with handler:
            found = TwistedSMC(chain, None, 8, seed=0).run().log_weights
        assert torch.equal(found, expected)
    assert not outside[0].trace.nodes


@composes(RUNS, "`seed`", "fixes all draws that do not come from a `seed=` of the engine")
def test_seed_around_a_run() -> None:
    def run_once() -> Tensor:
        return TwistedSMC(LinearGaussianChain(STEPS), None, 8).run().log_weights

    assert torch.equal(*[poutine.seed(run_once, rng_seed=2)() for _ in range(2)])


@refuses(
    HANDLERS,
    "latents in a subsampled plate",
    "error: particles cannot be weighted by a part of their latents",
)
@pytest.mark.parametrize("guided", [False, True])
def test_subsampled_latents(guided: bool) -> None:
    class Subsampled(LinearGaussianChain):
        def init(self, state: Any) -> None:
            super().init(state)
            with pyro.plate("data", 10, subsample_size=4, dim=-1):
                pyro.sample("local", dist.Normal(0.0, 1.0))

    chain = Subsampled(2)
    with pytest.raises(ValueError, match="'local' is in the plate 'data', of which 4 of 10"):
        TwistedSMC(chain, Twist(chain) if guided else None, 6, 1).run()


@refuses(
    HANDLERS,
    "what is no model, or no handler; `poutine.equalize`, which relates sites of several steps",
    "error",
)
def test_what_cannot_be_handled() -> None:
    chain = LinearGaussianChain(2)
    with pytest.raises(ValueError, match="no methods init.*poutine for plain functions"):
        handlers.scale(lambda: None, 2.0)
    for handler in (poutine.scale, Twist(chain), None):
        with pytest.raises(ValueError, match="is no handler such as"):
            handlers.handle(chain, handler)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="draw what they share once, in a WithLatents"):
        handlers.handle(chain, poutine.equalize(sites=["x_1", "x_0"]))
    with pytest.raises(SMCFailed, match="'x_0' at step"):
        TwistedSMC(handlers.condition(_Ends(2), {"x_0": tensor(9.0)}), None, 4).run()


class _Ends(LinearGaussianChain):
    def kernel(self, state: Any, t: int) -> Any:
        return super().kernel(state, t) if t > 1 else dist.Delta(state["x"])


# Latents beside the trajectory


class Styled(LinearGaussianChain):
    """Every step moves by a style and by what the class adds."""

    classes = tensor([0.0, 0.8])

    def kernel(self, state: Any, t: int) -> Any:
        shift = 0.0
        if "style" in state:
            shift = shift + state["style"]
        if "label" in state:
            shift = shift + self.classes[state["label"]]
        return dist.Normal(self.a * state["x"] + shift, self.s)


PRIOR = tensor([0.7, 0.3])


def draw_style() -> dict[str, Tensor]:
    return {"style": pyro.sample("style", dist.Normal(0.0, 0.6))}


def draw_both() -> dict[str, Tensor]:
    return {**draw_style(), "label": pyro.sample("label", dist.Categorical(PRIOR))}


def styled(k: float = 0.5, **options: Any) -> Any:
    return Styled(STEPS, k=k, replicates=REPLICATES, **options)


def exact_posterior(k: float, spread: float = 0.6) -> tuple[float, float, float]:
    """Log-normaliser, posterior mean of the style, probability of the second class."""
    chain = Styled(STEPS, k=k)
    gain = sum(chain.a**i for i in range(STEPS))
    variance = chain.variance + (gain * spread) ** 2
    terms = PRIOR.double().log() + k * gain * chain.classes + 0.5 * k**2 * variance
    return float(terms.logsumexp(0)), k * gain * spread**2, float(terms.softmax(0)[1])


def latent_guides(model: Any) -> dict[str, Any]:
    """Proposals of both latents, none of them right."""

    class Effect(AutoNormalMessenger):
        def get_posterior(self, name: str, prior: Any) -> Any:
            if name == "label":
                logits = pyro.param("logits", tensor([0.0, 0.3]))
                tilted = logits * torch.stack([-self.upstream_value("style")] * 2, -1)
                return dist.Categorical(logits=tilted)
            return super().get_posterior(name, prior)

    class Module(PyroModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.loc = torch.nn.Parameter(tensor(0.2))
            self.scale = PyroParam(tensor(0.7), constraint=dist.constraints.positive)

        @pyro_method
        def init(self, state: Any) -> None:
            style = pyro.sample("style", dist.Normal(self.loc, self.scale))
            logits = torch.stack([torch.zeros_like(style), style], -1)
            pyro.sample("label", dist.Categorical(logits=logits))

    def function() -> None:
        loc = pyro.param("loc", tensor(0.3))
        pyro.sample("style", dist.Normal(loc, 0.7))
        pyro.sample("label", dist.Categorical(tensor([0.5, 0.5])))

    return {
        "none": None,
        "automatic": AutoLatents(model),
        "effect": Effect(model, init_scale=0.7),
        "module": Module(),
        "function": function,
    }


@composes(
    LATENTS,
    "a class (`Categorical`) and a style vector, in a `WithLatents`",
    "kept in the state, resampled with their particle; posteriors from `result.expectation`, "
    "`get_empirical` and `resample` as for `x`",
)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_class_and_style(threshold: float) -> None:
    model = WithLatents(styled(0.4), draw_both)
    log_z, style, share = exact_posterior(0.4)
    result = run(model, ess_threshold=threshold, history="paths")
    assert_law(result, log_z, style, "style")
    assert_law(result, log_z, share, lambda state: state["label"].double())
    for name in ("style", "label"):
        assert torch.equal(result.state[name], result.samples[name])
    small = TwistedSMC(WithLatents(Styled(STEPS), draw_both), None, 64, seed=0)
    small.run()
    empirical = small.get_empirical()["style"]
    assert float(empirical.mean) == pytest.approx(float(small.result().expectation("style")))
    assert small.result().resample(5).state["label"].shape == (5,)


@composes(
    LATENTS,
    "the temperature of a reward, with a prior",
    '`RewardTilted(model, reward, scale="temperature")` reads it from the state, in the last '
    "step and in every look-ahead",
)
@pytest.mark.parametrize("look", [False, True])
def test_temperature(look: bool) -> None:
    chain = LinearGaussianChain(STEPS, k=0.0, replicates=REPLICATES)

    def prior() -> dict[str, Tensor]:
        return {"temperature": pyro.sample("temperature", dist.Uniform(0.1, 0.9))}

    model = RewardTilted(WithLatents(chain, prior), lambda x: x, scale="temperature", decode=False)
    grid = torch.linspace(0.1, 0.9, 2001, dtype=torch.float64)
    density = (0.5 * grid.square() * chain.variance).exp() / 0.8
    z = float(torch.trapezoid(density, grid))
    mean = float(torch.trapezoid(grid * density, grid)) / z
    result = run(model, LookaheadTwist(model) if look else None)
    assert_law(result, math.log(z), mean, "temperature")


@refuses(LATENTS, "a scale that names no entry of the state", "error")
def test_temperature_that_was_not_drawn() -> None:
    model = RewardTilted(LinearGaussianChain(2), lambda x: x, scale="heat", decode=False)
    with pytest.raises(ValueError, match=r"state\['heat'\].*WithLatents"):
        TwistedSMC(model, None, 4).run()


def guided_diffusion() -> GaussianDiffusion:
    """Numbers around -1 or 1 by class, and around 0 without a class."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=100, clip_sample=False)
    exact = GaussianDenoiser(torch.zeros(1), torch.ones(1), scheduler)
    slope = tensor([-0.25, 0.25, 0.0])

    def denoiser(x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return exact(x, timestep) - slope[class_labels][:, None]

    return GaussianDiffusion(
        denoiser,
        scheduler,
        (1,),
        num_inference_steps=3,
        conditioning={"class_labels": 0},
        null_conditioning={"class_labels": 2},
        guidance_scale=1.5,
        plate=("replicates", REPLICATES),
    )


def end_of(diffusion: GaussianDiffusion, label: int, strength: float) -> tuple[float, float]:
    """Mean and variance of ``x_0``, from what the kernels do to two points."""
    mean, variance, T = 0.0, float(diffusion.schedule.init_std) ** 2, len(diffusion.timesteps)
    for t in range(T, 0, -1):
        x = torch.tensor([[[0.0]], [[1.0]]])
        state = {"x": x, "class_labels": tensor(label), "guidance_scale": tensor(strength)}
        predicted = {k: v.reshape(x.shape) for k, v in diffusion._predict(state, t).items()}
        kernel = diffusion.kernel({**state, **predicted}, t)
        zero, one = kernel.mean.reshape(-1).tolist()
        mean = zero + (one - zero) * mean
        variance = (one - zero) ** 2 * variance + float(kernel.variance.reshape(-1)[0])
    return mean, variance


@composes(
    LATENTS,
    "class and guidance scale of a `GaussianDiffusion`",
    "entries `class_labels` and `guidance_scale` of the state take precedence in the denoiser",
)
@pytest.mark.parametrize("kind", ["none", "automatic", "look-ahead"])
def test_guidance_scale(kind: str) -> None:
    diffusion, k = guided_diffusion(), 0.7
    strengths = tensor([0.0, 1.0, 4.0])

    def prior() -> dict[str, Tensor]:
        label = pyro.sample("label", dist.Categorical(torch.ones(2)))
        chosen = pyro.sample("strength", dist.Categorical(torch.ones(3)))
        return {"class_labels": label, "guidance_scale": strengths[chosen]}

    model = RewardTilted(WithLatents(diffusion, prior), lambda x: x[:, 0], scale=k, decode=False)
    terms = {}
    for label in (0, 1):
        for strength in strengths.tolist():
            mean, variance = end_of(diffusion, label, strength)
            terms[label, strength] = k * mean + 0.5 * k**2 * variance
    z = torch.tensor(list(terms.values()), dtype=torch.float64).exp() / 6
    share = float(z[3:].sum() / z.sum())
    expected = float((z * tensor(strengths.tolist() * 2)).sum() / z.sum())
    assert abs(share - 0.5) > 0.05 and abs(expected - 5 / 3) > 0.05
    look = LookaheadTwist(model) if kind == "look-ahead" else Twist(model)
    result = run(model, JointTwist(look, AutoLatents(model) if kind == "automatic" else None))
    log_z = float(z.sum().log())
    assert_law(result, log_z, share, lambda state: state["class_labels"].double())
    assert_law(result, log_z, expected, "guidance_scale")


@composes(
    LATENTS,
    "several populations",
    "each entry of the model's plate has latents of its own, and a guide of them parameters of its "
    "own",
)
@pytest.mark.parametrize("guided", [False, True])
def test_latents_of_populations(guided: bool) -> None:
    """Half of the populations have a reward, the other half none."""
    model = WithLatents(styled(0.0), draw_both)
    rewarded = (torch.arange(REPLICATES) < REPLICATES // 2).float()
    model = Tilted(model, lambda state, x0: pyro.factor("k", 0.5 * rewarded * x0))
    guide = AutoLatents(model)
    joint = JointTwist(Twist(model), guide) if guided else None
    TwistedSMC(model, joint, 2, 1, population_plate="replicates", seed=0).init()
    if guided:
        assert guide.shifts.label.shape == (REPLICATES, 2)
        guide.shifts.label.data[rewarded > 0] += tensor([0.0, 0.7])
        guide.locs.style_unconstrained.data += 0.2 * rewarded
    result = run(model, joint)
    assert result.state["style"].shape == (32, REPLICATES)
    for share, k in ((rewarded > 0, 0.5), (rewarded == 0, 0.0)):
        log_z, style, second = exact_posterior(k)
        found = result.log_normalizer[share]
        if k or guided:
            assert_unbiased(found, log_z)
        means = result.expectation("style")[share]
        assert_tilted_mean(found, means, log_z, style)
        means = result.expectation(lambda state: state["label"].double())[share]
        assert_tilted_mean(found, means, log_z, second)


@composes(
    LATENTS,
    "latents that the entries of a plate share, `WithLatents(..., shared=True)`",
    "without `population_plate`: one draw for the whole plate, weighted by all its entries",
)
def test_latents_of_a_whole_plate() -> None:
    """A style that is squeezed by three ends: their sum has a normal law."""
    chain = Styled(STEPS, k=0.3, replicates=3)
    model = WithLatents(chain, draw_style, shared=True)
    result = TwistedSMC(model, None, 20_000, 1, seed=0, resampling="none").run()
    assert result.state["style"].shape == (20_000, 1) and result.log_weights.shape == (20_000,)
    gain = sum(chain.a**i for i in range(STEPS))
    log_z = 0.5 * 0.09 * (3 * chain.variance + (3 * gain * 0.6) ** 2)
    terms = (result.log_weights - log_z).exp()
    assert_mean(terms, 1.0)
    assert_mean(terms * result.state["style"][:, 0], 0.3 * 3 * gain * 0.36)


@refuses(
    LATENTS,
    "a latent under a name that the model writes to the state, such as `x`",
    "error; return it from the prior under another name",
)
def test_latents_that_the_model_overwrites() -> None:
    for name in ("x", "style"):
        inner = WithLatents(Styled(2), draw_style) if name == "style" else Styled(2)
        model = WithLatents(
            inner, lambda name=name: {name: pyro.sample("u", dist.Normal(0.0, 1.0))}
        )
        with pytest.raises(ValueError, match=rf"writes state\['{name}'\].*another name"):
            TwistedSMC(model, None, 4).run()


@refuses(
    LATENTS,
    "latents that populations share",
    "error: populations are resampled separately; leave `population_plate` out",
)
def test_shared_latents_of_populations() -> None:
    model = WithLatents(Styled(STEPS, replicates=3), draw_style, shared=True)
    with pytest.raises(ValueError, match="'style' is outside the plate 'replicates'"):
        run(model)


@composes(
    LATENTS,
    "handlers around or inside a `WithLatents`",
    "`condition` on the class, `do` of the style, as for any site",
)
@pytest.mark.parametrize("kind", ["none", "automatic"])
def test_handlers_of_latents(kind: str) -> None:
    model = WithLatents(styled(), draw_both)
    handled = handlers.condition(handlers.do(model, {"style": 0.2}), {"label": tensor(1)})
    chain = Styled(STEPS, k=0.5)
    log_z = law_of(chain, drift=1.0).tilt("x_0", chain.k).log_z + math.log(0.3)
    result = run(handled, JointTwist(Twist(handled), latent_guides(handled)[kind]))
    assert_law(result, log_z)
    assert (result.state["label"] == 1).all() and (result.state["style"] == 0.2).all()


# Guides for these latents


@composes(
    GUIDED,
    "`JointTwist(twist, guide)`: the prior, `AutoLatents`, Pyro's messengers, a `PyroModule` or "
    "any object with `init`, a function",
    "the guide proposes the latents, the twist the trajectory; a later latent may depend on an "
    "earlier one",
)
@pytest.mark.parametrize("kind", ["none", "automatic", "effect", "module", "function"])
@pytest.mark.parametrize("value", [False, True])
def test_guides_of_latents(kind: str, value: bool) -> None:
    model = WithLatents(styled(), draw_both)
    guide = latent_guides(model)[kind]
    twist = ExactTwist(_Like(model, model), 0.6)
    joint = JointTwist(twist, guide, value=value)
    log_z, style, share = exact_posterior(0.5)
    if kind == "automatic":
        TwistedSMC(model, joint, 2, 1).init()
        guide.shifts.label.data += tensor([0.0, 0.4])
        guide.locs.style_unconstrained.data += 0.2
    result = run(model, joint)
    assert_law(result, log_z, style, "style")
    assert_law(result, log_z, share, lambda state: state["label"].double())
    assert value == ("latents_log_ratio" in result.state and kind != "none") or kind == "none"


KINDS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "counts": (dist.Poisson(1.5), lambda value: value),
    "classes": (dist.Categorical(tensor([0.2, 0.3, 0.5]).expand(2, 3)).to_event(1), lambda v: v[1]),
    "one-hot": (dist.OneHotCategorical(tensor([0.2, 0.3, 0.5])), lambda value: value[2]),
    "switches": (dist.Bernoulli(tensor([0.3, 0.6])).to_event(1), lambda value: value[1]),
    "heavy tails": (dist.HalfCauchy(1.0), lambda value: value.clamp(max=2.0)),
    "shares": (dist.Dirichlet(torch.ones(3)), lambda value: value[1]),
}


@composes(
    GUIDED,
    "`AutoLatents` for classes, one-hot vectors, switches, shares, heavy tails, and events of them",
    "each entry is moved by itself; counts without logits come from their prior",
)
@pytest.mark.parametrize("kind", KINDS)
def test_automatic_guides_of_all_kinds(kind: str) -> None:
    """Of a number made of the latent, ``y = number + x_0`` is tilted; its own law is drawn from."""
    law, number = KINDS[kind]

    def prior() -> dict[str, Tensor]:
        return {"latent": pyro.sample("latent", law)}

    def potential(state: Any, x0: Tensor) -> None:
        latent = state["latent"]
        value = number(
            latent.movedim(tuple(range(2, latent.dim())), tuple(range(latent.dim() - 2)))
        )
        pyro.factor("tilt", 0.4 * value + 0.3 * x0)

    chain = LinearGaussianChain(1, k=0.0, replicates=REPLICATES)
    model = Tilted(WithLatents(chain, prior), potential)
    guide = AutoLatents(model)
    joint = JointTwist(Twist(model), guide)
    TwistedSMC(model, joint, 2, 1, population_plate="replicates", seed=0).init()
    own = list(guide.parameters())
    assert bool(own) == (kind != "counts")
    for value in own:
        value.data += 0.1
    result = run(model, joint)
    log_z = expected_gain(kind) + 0.5 * 0.09 * chain.variance
    assert_unbiased(result.log_normalizer, log_z)


def expected_gain(kind: str) -> float:
    """The log of the mean of ``exp(0.4 number)``, by a sum or by quadrature."""
    if kind == "counts":
        return 1.5 * math.expm1(0.4)
    if kind in ("one-hot", "switches"):
        p = 0.5 if kind == "one-hot" else 0.6
        return math.log(1 + p * math.expm1(0.4))
    if kind == "classes":
        return math.log(0.2 + 0.3 * math.exp(0.4) + 0.5 * math.exp(0.8))
    if kind == "heavy tails":
        # by the quantiles, which are tan(pi u / 2)
        u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        values = (math.pi * u / 2).tan().clamp(max=2.0)
    else:
        # one of three uniform shares is Beta(1, 2)
        u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        values = 1 - (1 - u).sqrt()
    return float((0.4 * values).exp().mean().log())


def test_joint_twists_can_be_pickled() -> None:
    model = WithLatents(Styled(STEPS), draw_style)
    joint = JointTwist(Twist(model), AutoLatents(Styled(STEPS)), sites=["style"])
    for one in (joint, JointTwist(Twist(model))):
        again = pickle.loads(pickle.dumps(one))
        assert again.proposes("style") and not again.proposes("x_2")


@composes(
    GUIDED,
    "`JointTwist(..., value=True)`",
    "the weights of young particles include the guide's density over the prior's, so that the "
    "first resampling does not undo the proposal",
)
def test_value_of_a_guide() -> None:
    model = WithLatents(Styled(STEPS), draw_style)

    def ess(value: bool) -> float:
        joint = JointTwist(Twist(model), lambda: pyro.sample("style", _SHARP), value=value)
        smc = TwistedSMC(model, joint, 64, seed=0, resampling="none")
        smc.init()
        assert float(smc.get_ESS()) < 40
        return float(smc.twisted_ess)

    assert ess(True) == pytest.approx(64) and ess(False) < 40


_SHARP = dist.Normal(0.8, 0.4)


@composes(
    GUIDED,
    "`TrustRegionTwist` with a `JointTwist`",
    "fits the guide's parameters, those made by `pyro.param` too, by weighted likelihood of the "
    "latents, beside the twist's own fit; the estimates stay unbiased",
)
@pytest.mark.parametrize("kind", ["automatic", "module", "explicit"])
def test_fitted_guides(kind: str) -> None:
    """The posterior of the style is N(0.49, 0.6), of the second class 0.55."""
    chain = Styled(STEPS, k=0.5)
    model = WithLatents(chain, draw_both)
    log_z, style, share = exact_posterior(0.5)
    guide = latent_guides(model)[kind] if kind != "explicit" else _Explicit()
    joint = JointTwist(ShiftTwist(model), guide, value=True)
    smc = TrustRegionTwist(model, joint, 500, num_iterations=2, guard=False, seed=0)
    result = smc.run()
    assert len(pyro.get_param_store()) == (2 if kind == "module" else 0)
    proposal = ImportanceSampling(model, 20_000, guide=joint, seed=1).run()
    plain = ImportanceSampling(model, 20_000, seed=1).run()
    assert proposal.get_ESS() > 1.7 * plain.get_ESS()
    drawn = proposal.state["style"].double().mean().item()
    # a thousand paths, of which 150 are effective: four standard errors of the fit
    assert drawn == pytest.approx(style, abs=0.2)
    if kind != "module":
        assert proposal.state["label"].double().mean().item() == pytest.approx(share, abs=0.16)
    for one in (result, proposal):
        error = 5 / float(one.get_ESS()) ** 0.5
        assert one.log_normalizer.item() == pytest.approx(log_z, abs=error)


class _Explicit:
    def init(self, state: Any) -> None:
        loc, scale = pyro.param("loc", tensor(0.0)), pyro.param("scale", tensor(0.6))
        style = pyro.sample("style", dist.Normal(loc, scale.abs() + 0.05))
        logits = (
            pyro.param("logits", PRIOR.log())
            + pyro.param("slope", torch.zeros(2)) * style[..., None]
        )
        pyro.sample("label", dist.Categorical(logits=logits))


def test_the_ridge_holds_a_guide_where_it_started() -> None:
    """The same pass, fitted with a penalty that nothing outweighs, and with hardly any."""

    def moved(ridge: float) -> float:
        model = WithLatents(Styled(STEPS, k=0.5), draw_both)
        joint = JointTwist(ShiftTwist(model), AutoLatents(model), value=True, ridge=ridge)
        smc = TrustRegionTwist(model, joint, 200, num_iterations=1, guard=False, seed=0)
        smc.sample()
        before = [value.detach().clone() for value in joint.parts()[1].parameters()]
        smc.update()
        pairs = zip(joint.parts()[1].parameters(), before, strict=True)
        return max(float((now - then).detach().abs().max()) for now, then in pairs)

    assert moved(1e6) < 1e-3 and moved(1e-2) > 0.1


@composes(
    GUIDED,
    "adaptive passes of few particles",
    "the pooled estimate is unbiased",
)
def test_fitted_guides_are_unbiased() -> None:
    log_z, _, _ = exact_posterior(0.25)
    log_zs = []
    for seed in range(25):
        model = WithLatents(Styled(STEPS, k=0.25), draw_both)
        joint = JointTwist(LookaheadTwist(model), AutoLatents(model))
        smc = TrustRegionTwist(model, joint, 48, num_iterations=1, guard=False, seed=seed)
        log_zs.append(smc.run().log_normalizer)
    assert_unbiased(torch.stack(log_zs), log_z)


@refuses(
    GUIDED,
    "explicit guides that draw auxiliary sites or another order, miss a latent, or give it a value",
    "error; of Pyro's automatic guides, those in `pyro.infer.autoguide.effect` fit",
)
def test_guides_that_do_not_fit() -> None:
    model = WithLatents(Styled(STEPS), draw_both)

    def reversed_order() -> None:
        pyro.sample("label", dist.Categorical(PRIOR))
        pyro.sample("style", dist.Normal(0.0, 1.0))

    def half() -> None:
        pyro.sample("style", dist.Normal(0.0, 1.0))

    def point() -> None:
        pyro.sample("style", dist.Delta(tensor(0.0)))

    automatic = AutoNormal(draw_style)
    cases = {
        "draws 'label' before 'style'": reversed_order,
        "does not draw the latent 'label'": half,
        "gives 'style' a value instead": point,
        "autoguide.effect": automatic,
    }
    for message, guide in cases.items():
        with pytest.raises(ValueError, match=message):
            TwistedSMC(model, JointTwist(Twist(model), guide), 4).run()
    with pytest.raises(ValueError, match="is none of: an effect-based guide"):
        JointTwist(Twist(model), 3)
    with pytest.raises(ValueError, match="is no Twist"):
        JointTwist(None, half)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"as in sites=\['style'\]"):
        JointTwist(Twist(model), half, sites="style")
    with pytest.raises(ValueError, match="prior returned NoneType"):
        TwistedSMC(WithLatents(Styled(STEPS), half), None, 4).run()  # type: ignore[arg-type]


@composes(
    GUIDED,
    "guides of one's own that are effect-based",
    "see earlier latents by `upstream_value`, when drawing and when fitted",
)
def test_upstream_values_in_fits() -> None:
    seen: list[Tensor] = []

    class Copying(GuideMessenger):
        def get_posterior(self, name: str, prior: Any) -> Any:
            if name != "label":
                return prior
            weight = pyro.param("weight", tensor(0.0))
            style = self.upstream_value("style")
            seen.append(style)
            return dist.Categorical(logits=torch.stack([0.0 * style, weight * style], -1))

    model = WithLatents(Styled(STEPS, k=0.5), draw_both)
    joint = JointTwist(LookaheadTwist(model), Copying(model))
    smc = TrustRegionTwist(model, joint, 64, num_iterations=1, guard=False, seed=0)
    smc.sample()
    drawn, count = seen[0], len(seen)
    smc.update()
    assert len(seen) > count and all(torch.equal(one, drawn) for one in seen)
    assert joint.parts()[1].own["weight"].item() != 0.0


# The table


def test_the_table_in_the_documentation_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(), "run python -m tests.infer.composition"
