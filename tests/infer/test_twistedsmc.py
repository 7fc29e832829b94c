# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import io
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SMCFilter

from pyro_twist.infer import RESAMPLING, SMCFailed, TwistedSMC
from pyro_twist.twists import LookaheadTwist, Twist, Twisted, tilt
from tests.oracles import ExactGuide, ExactTwist, LinearGaussianChain
from tests.statistics import assert_tilted_mean, assert_unbiased

REPLICATES = 1500


def run(chain: LinearGaussianChain, twist: Any, particles: int = 32, **options: Any) -> Any:
    plates = int(chain.replicates is not None)
    options = {"population_plate": "replicates" if plates else None, "seed": 0, **options}
    return TwistedSMC(chain, twist, particles, plates, **options).run()


def assert_right(chain: LinearGaussianChain, result: Any) -> None:
    """Unbiased normaliser and tilted mean; false-alarm rate 2e-6."""
    assert_unbiased(result.log_normalizer, chain.log_normalizer)
    means = result.expectation("x")
    assert_tilted_mean(result.log_normalizer, means, chain.log_normalizer, chain.tilted_mean)


# the law


@pytest.mark.parametrize("scheme", [*sorted(RESAMPLING), "none"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("guide", ["bootstrap", "diff", "explicit", "half"])
def test_law(scheme: str, threshold: float, guide: str) -> None:
    chain = LinearGaussianChain(3, k=0.8, replicates=REPLICATES)
    guides = {
        "bootstrap": lambda: None,
        "diff": lambda: LookaheadTwist(chain),
        "explicit": lambda: ExactGuide(LinearGaussianChain(3, k=0.4, replicates=REPLICATES)),
        "half": lambda: ExactTwist(chain, 0.5),
    }
    result = run(chain, guides[guide](), ess_threshold=threshold, resampling=scheme)
    assert_right(chain, result)
    resampled = bool(result.diagnostics.resampled.any())
    if scheme == "none" or threshold == 0:
        assert not resampled
    if scheme != "none" and threshold == 1 and guide == "diff":
        assert resampled


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("potential", ["diff", "max", "sum", "rt"])
@pytest.mark.parametrize("options", [{}, {"every": 2}, {"schedule": (3, 1)}])
def test_every_ladder_has_the_same_law(potential: Any, threshold: float, options: Any) -> None:
    k = 0.2 if potential == "sum" else 0.5
    chain = LinearGaussianChain(4, k=k, replicates=REPLICATES)
    twist = LookaheadTwist(chain, potential, **options)
    assert_right(chain, run(chain, twist, particles=48, ess_threshold=threshold))


def test_the_law_test_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving the twist out of what resampling permutes is noticed."""

    def forgetful(self: Any, index: torch.Tensor, chosen: torch.Tensor) -> None:
        before = self._log_twist
        original(self, index, chosen)
        self._log_twist = before

    original = TwistedSMC._resample
    monkeypatch.setattr(TwistedSMC, "_resample", forgetful)
    chain = LinearGaussianChain(3, k=0.8, replicates=REPLICATES)
    with pytest.raises(AssertionError):
        assert_right(chain, run(chain, LookaheadTwist(chain), ess_threshold=1.0))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dim", [0, 3])
def test_zero_variance_at_the_optimal_twist(threshold: float, dim: int) -> None:
    chain = LinearGaussianChain(8, k=1.5, dim=dim)
    result = run(chain, ExactTwist(chain), ess_threshold=threshold)
    assert result.log_normalizer.item() == pytest.approx(chain.log_normalizer, abs=2e-5)
    assert result.get_ESS().item() == pytest.approx(32, abs=1e-3)
    assert not result.diagnostics.resampled[:-1].any() or threshold == 1.0


def test_psi_left_out_of_the_weights_costs_dearly() -> None:
    """The exact kernel without its twist in the weights: right on average, far from exact."""
    chain = LinearGaussianChain(8, k=1.5, replicates=200)
    result = run(chain, ExactGuide(chain), particles=64, ess_threshold=1.0)
    assert result.log_normalizer.std() > 0.2


def test_log_normalizer_is_right_at_any_step() -> None:
    """Before the last step the model has no factor, so its normaliser is one."""
    chain = LinearGaussianChain(4, k=0.6, replicates=REPLICATES)
    smc = TwistedSMC(chain, ExactTwist(chain, 0.7), 32, 1, population_plate="replicates", seed=3)
    smc.init()
    for t in chain.timesteps[:-1]:
        smc.step(t)
        assert_unbiased(smc.get_log_normalizer(), 0.0)
    assert torch.allclose(
        smc.get_log_normalizer(), smc.log_weights.logsumexp(0) - torch.tensor(32.0).log().double()
    )


@pytest.mark.parametrize("twist", [None, "zero"])
def test_no_reward_reproduces_the_base_sampler(twist: str | None) -> None:
    chain = LinearGaussianChain(5, k=0.0, dim=2)
    pyro.set_rng_seed(7)
    with pyro.plate("particles", 6):
        base: dict[str, torch.Tensor] = {}
        chain.init(base)
        for t in chain.timesteps:
            chain.step(base, t)
    pyro.set_rng_seed(7)
    guide = LookaheadTwist(chain) if twist else None
    result = TwistedSMC(chain, guide, 6, ess_threshold=1.0).run()
    assert torch.equal(result.state["x"], base["x"])
    assert result.log_normalizer.item() == 0.0


def test_constant_reward_adds_its_value() -> None:
    class Constant(LinearGaussianChain):
        def reward(self, x0: torch.Tensor) -> torch.Tensor:
            return torch.full_like(x0, 3.0)

    chain = Constant(3, k=2.0)
    result = run(chain, LookaheadTwist(chain, "max"), ess_threshold=1.0)
    assert result.log_normalizer.item() == pytest.approx(6.0, abs=1e-12)
    assert not result.diagnostics.resampled.any()


def test_twisted_model_in_the_stock_filter_agrees() -> None:
    """Engine, and model transformation in Pyro's own filter: same particles and weights."""
    chain = LinearGaussianChain(5, k=1.2)
    twist = ExactTwist(chain, 0.6)

    pyro.set_rng_seed(11)
    ours = TwistedSMC(chain, twist, 50, resampling="none")
    ours.init()
    pyro.set_rng_seed(11)
    proposal = ExactGuide(chain)
    proposal.twist = twist
    stock = SMCFilter(Twisted(chain, twist), proposal, 50, 0, ess_threshold=1e-9)
    stock.init()
    for t in chain.timesteps:
        pyro.set_rng_seed(100 + t)
        ours.step(t)
        pyro.set_rng_seed(100 + t)
        stock.step(t)
    assert torch.allclose(ours.state["x"], stock.state["x"])
    stock_weights = stock.state._log_weights - stock.state._log_weights.logsumexp(0)
    assert torch.allclose(
        ours.get_normalized_weights(log_scale=True).float(), stock_weights, atol=1e-4
    )


# as a drop-in for SMCFilter


class StateSpaceModel:
    """A random walk seen through noise, stepped by data, in Pyro's own style: no timesteps."""

    def init(
        self, state: Any, init: torch.Tensor, process: torch.Tensor, noise: torch.Tensor
    ) -> None:
        self.t, self.process, self.noise = 0, process, noise
        state["z"] = pyro.sample("z_init", dist.Normal(init, 1.0).to_event(1))

    def step(self, state: Any, y: torch.Tensor | None = None) -> None:
        self.t += 1
        state["z"] = pyro.sample(f"z_{self.t}", dist.Normal(state["z"], self.process).to_event(1))
        pyro.sample(f"y_{self.t}", dist.Normal(state["z"], self.noise).to_event(1), obs=y)


class StateSpaceGuide:
    def init(
        self, state: Any, init: torch.Tensor, process: torch.Tensor, noise: torch.Tensor
    ) -> None:
        self.t, self.process = 0, process
        pyro.sample("z_init", dist.Normal(init, 1.0).to_event(1))

    def step(self, state: Any, y: torch.Tensor) -> None:
        self.t += 1
        pyro.sample(
            f"z_{self.t}", dist.Normal(0.7 * state["z"] + 0.3 * y, self.process).to_event(1)
        )


@pytest.mark.parametrize("max_plate_nesting", [0, 1, 2])
@pytest.mark.parametrize("state_dim", [1, 3])
def test_against_the_exact_filter(max_plate_nesting: int, state_dim: int) -> None:
    """Against Pyro's GaussianHMM; means within 5 standard errors, log Z within 0.1."""
    torch.manual_seed(0)
    init, process, noise = torch.zeros(state_dim), torch.tensor(0.5), torch.tensor(0.8)
    data = torch.randn(6, state_dim).cumsum(0) * 0.5
    eye = torch.eye(state_dim)
    normal = lambda scale: dist.Normal(torch.zeros(state_dim), scale).to_event(1)  # noqa: E731
    hmm = dist.GaussianHMM(normal(1.0), eye, normal(process), eye, normal(noise), duration=6)
    exact = hmm.filter(data)
    smc = TwistedSMC(StateSpaceModel(), StateSpaceGuide(), 20_000, max_plate_nesting)
    smc.init(init, process=process, noise=noise)
    for y in data:
        smc.step(y)
    z = smc.get_empirical()["z"]
    assert torch.allclose(z.mean.reshape(-1), exact.mean, atol=0.05)
    variance = z.variance.reshape(-1)
    assert torch.allclose(variance, exact.covariance_matrix.diagonal(), rtol=0.15)
    assert smc.get_log_normalizer().item() == pytest.approx(hmm.log_prob(data).item(), abs=0.1)


def test_is_a_smcfilter_with_its_signature() -> None:
    smc = TwistedSMC(StateSpaceModel(), StateSpaceGuide(), 10, 0, ess_threshold=0.7)
    assert isinstance(smc, SMCFilter)
    assert smc.init(torch.zeros(2), torch.tensor(1.0), noise=torch.tensor(1.0)) is None
    assert smc.step(torch.zeros(2)) is None
    assert set(smc.get_empirical()) == {"z"} and smc.ess_threshold == 0.7
    with pytest.raises(ValueError, match="no `timesteps`.*by hand"):
        smc.run()


def test_empty_guide_and_empty_state() -> None:
    class Model:
        def init(self, state: Any) -> None:
            pyro.sample("z", dist.Normal(0.0, 1.0))

        def step(self, state: Any) -> None:
            pyro.factor("f", pyro.sample("z", dist.Normal(0.0, 1.0)) * 0.1)

    class Empty:
        def init(self, state: Any) -> None:
            pass

        step = init

    smc = TwistedSMC(Model(), Empty(), 20_000, 0, ess_threshold=1.0)
    smc.init()
    smc.step()
    assert smc.get_log_normalizer().item() == pytest.approx(0.005, abs=0.005)
    assert smc.get_empirical() == {}


def test_guide_cannot_write_the_state() -> None:
    class Writer(ExactGuide):
        def step(self, state: Any, t: int) -> None:
            state["x"] = state["x"] + 1

    smc = TwistedSMC(LinearGaussianChain(2), Writer(LinearGaussianChain(2)), 4)
    with pytest.raises(RuntimeError, match="Guide cannot write"):
        smc.run()


def test_init_starts_afresh() -> None:
    chain = LinearGaussianChain(3, k=2.0)
    smc = TwistedSMC(chain, None, 50, resampling="none")
    smc.run()
    smc.init()
    assert smc.get_ESS().item() == pytest.approx(50)
    assert smc.get_log_normalizer().item() == 0.0
    assert len(smc.result().diagnostics.ess) == 1


def test_empirical_is_a_copy() -> None:
    chain = LinearGaussianChain(3, k=2.0)
    smc = TwistedSMC(chain, None, 50)
    smc.init()
    empirical = smc.get_empirical()["x"]
    before = empirical.mean.clone()
    for t in chain.timesteps:
        smc.step(t)
    assert torch.equal(empirical.mean, before)


def test_integer_state() -> None:
    class Model:
        def init(self, state: Any) -> None:
            state["k"] = pyro.sample("k", dist.Categorical(torch.ones(3)))

        def step(self, state: Any) -> None:
            pyro.factor("f", (state["k"] == 2).float())

    smc = TwistedSMC(Model(), None, 3000, 0, ess_threshold=1.0)
    smc.init()
    smc.step()
    assert smc.state["k"].dtype == torch.long
    share = (smc.state["k"] == 2).double().mean().item()
    assert share == pytest.approx(2.71828 / 4.71828, abs=0.05)
    assert smc.get_empirical()["k"].sample((5,)).shape == (5,)


# what SMCFilter gets wrong


def test_guide_factors_count_as_proposal() -> None:
    """The twist as factors of an unnormalised guide: the same weights at every step."""
    chain = LinearGaussianChain(3, k=0.8)
    twist = ExactTwist(chain, 0.6)

    class Factors:
        def init(self, state: Any) -> None:
            x = pyro.sample("x_3", dist.Normal(twist.slope(3), 1.0))
            self.factor(0.0, twist.log_twist({"x": x}), 3)

        def step(self, state: Any, t: int) -> None:
            old = twist.log_twist(state, t + 1) if t < 3 else twist.log_twist(state)
            kernel = chain.kernel(state, t)
            x = pyro.sample(f"x_{t - 1}", tilt(kernel, torch.tensor(twist.slope(t - 1))))
            self.factor(old, twist.log_twist({"x": x}, t) if t > 1 else 0.0, t - 1)

        def factor(self, old: Any, new: Any, t: int) -> None:
            pyro.factor(f"twist_{t}", old - new, has_rsample=False)

    engine = TwistedSMC(chain, twist, 32, ess_threshold=1.0, seed=0)
    factors = TwistedSMC(chain, Factors(), 32, ess_threshold=1.0, seed=0)
    engine.init()
    factors.init()
    for t in chain.timesteps:
        engine.step(t)
        factors.step(t)
        assert torch.allclose(engine.state["x"], factors.state["x"])
        assert torch.allclose(engine.state._log_weights, factors.state._log_weights, atol=1e-5)
    assert engine.get_log_normalizer().item() == pytest.approx(factors.get_log_normalizer().item())


def test_namesake_factor_is_refused() -> None:
    class Guide(ExactGuide):
        def step(self, state: Any, t: int) -> None:
            super().step(state, t)
            if t == 1:
                pyro.factor("reward_factor", torch.zeros(4), has_rsample=False)

    with pytest.raises(ValueError, match="'reward_factor' has a namesake.*twice"):
        run(LinearGaussianChain(2), Guide(LinearGaussianChain(2)), particles=4)


def test_auxiliary_guide_sites() -> None:
    """The proposal draws x through an auxiliary variable; the Jacobian is in the Delta."""
    chain = LinearGaussianChain(1, k=0.7, replicates=REPLICATES)

    class Guide:
        def init(self, state: Any) -> None:
            pass

        def step(self, state: Any, t: int) -> None:
            with chain.copies():
                base = dist.Normal(torch.zeros_like(state["x"]), 1.0)
                u = pyro.sample("u", base, infer={"is_auxiliary": True})
                jacobian = torch.full_like(u, -torch.tensor(0.6).log())
                x = 0.9 * state["x"] + 0.2 + 0.6 * u
                pyro.sample("x_0", dist.Delta(x, log_density=jacobian))

    assert_right(chain, run(chain, Guide()))


def test_unknown_guide_site() -> None:
    class Guide(ExactGuide):
        def step(self, state: Any, t: int) -> None:
            pyro.sample("typo", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="samples 'typo', but the model has no such site.*'x_1'"):
        run(LinearGaussianChain(2), Guide(LinearGaussianChain(2)), particles=4)


def test_event_dims_must_agree() -> None:
    class Guide(ExactGuide):
        def init(self, state: Any) -> None:
            pyro.sample("x_2", dist.Normal(torch.zeros(4, 3), 1.0))

    chain = LinearGaussianChain(2, dim=3)
    with pytest.raises(ValueError, match="event_dim"):
        TwistedSMC(chain, Guide(chain), 4, 1).run()


def test_plates_deeper_than_declared_are_refused() -> None:
    class Model(LinearGaussianChain):
        def terminal(self, state: Any, x0: torch.Tensor) -> None:
            with pyro.plate("data", 3, dim=-2):
                pyro.sample("y", dist.Normal(x0, 1.0), obs=torch.zeros(3, 1))

    with pytest.raises(ValueError, match="'y'.*raise max_plate_nesting"):
        TwistedSMC(Model(2), None, 5, 0).run()


def test_inner_plates_are_summed() -> None:
    data = torch.tensor([0.3, -0.2, 1.0])

    class Plated(LinearGaussianChain):
        def terminal(self, state: Any, x0: torch.Tensor) -> None:
            with pyro.plate("data", 3, dim=-1):
                pyro.sample("y", dist.Normal(x0, 1.0), obs=data)

    class Flat(LinearGaussianChain):
        def terminal(self, state: Any, x0: torch.Tensor) -> None:
            pyro.factor("y", dist.Normal(x0[..., None], 1.0).log_prob(data).sum(-1))

    plated = TwistedSMC(Plated(2), None, 40, 1, seed=1, resampling="none").run()
    flat = TwistedSMC(Flat(2), None, 40, 0, seed=1, resampling="none").run()
    assert torch.allclose(plated.log_weights, flat.log_weights, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_factor_names_site_step_and_particle(value: float) -> None:
    class Model(LinearGaussianChain):
        def terminal(self, state: Any, x0: torch.Tensor) -> None:
            bad = torch.zeros(5)
            bad[3] = value
            pyro.factor("broken", bad)

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match=r"'broken' at step\(1\).*particle \[3\] is (nan|inf)"):
            TwistedSMC(Model(2), None, 5).run()


def test_all_dead_names_site_and_step() -> None:
    class Model(LinearGaussianChain):
        def terminal(self, state: Any, x0: torch.Tensor) -> None:
            pyro.factor("impossible", torch.full((5,), -torch.inf))

    with pytest.raises(SMCFailed, match=r"'impossible' at step\(1\).*all 5 particles"):
        TwistedSMC(Model(2), None, 5).run()


def test_hard_constraints() -> None:
    """Factors of minus infinity: no resampled particle is dead; the law is right."""

    class Positive(LinearGaussianChain):
        def terminal(self, state: Any, x0: torch.Tensor) -> None:
            pyro.factor("positive", torch.where(x0 > 0, 0.0, -torch.inf))

    chain = Positive(3, replicates=REPLICATES)
    for twist in (None, LookaheadTwist(chain, floor=2.0), LookaheadTwist(chain, "rt", floor=0.7)):
        result = run(chain, twist, ess_threshold=1.0)
        assert_unbiased(result.log_normalizer, torch.tensor(0.5).log().item())
        assert (result.resample().state["x"] > 0).all()


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_log_twist_must_be_finite(value: float) -> None:
    class Broken(Twist):
        def log_twist(self, state: Any, *args: Any) -> torch.Tensor:
            return torch.full((5,), value)

    with pytest.raises(ValueError, match="log_twist after init.*not finite"):
        run(LinearGaussianChain(2), Broken(LinearGaussianChain(2)), particles=5)


def test_no_graph_is_kept() -> None:
    class Learned:
        def __init__(self) -> None:
            self.shift = torch.nn.Parameter(torch.tensor(0.1))

        def init(self, state: Any) -> None:
            pass

        def step(self, state: Any, t: int) -> None:
            pyro.sample(f"x_{t - 1}", dist.Normal(0.9 * state["x"] + self.shift, 0.5))

    result = run(LinearGaussianChain(3), Learned())
    assert not result.state["x"].requires_grad and not result.log_weights.requires_grad


def test_outer_handlers() -> None:
    """Sample sites stay inside, parameters are seen outside."""

    class Learned(ExactGuide):
        def step(self, state: Any, t: int) -> None:
            pyro.param("shift", torch.tensor(0.0))
            super().step(state, t)

    chain = LinearGaussianChain(2)
    with poutine.trace() as tracer:
        TwistedSMC(chain, Learned(chain), 5).run()
        TwistedSMC(chain, Learned(chain), 5).run()
    assert set(tracer.trace.nodes) == {"shift"}


def test_outer_plate_is_refused() -> None:
    smc = TwistedSMC(LinearGaussianChain(2), None, 5)
    with pytest.raises(ValueError, match="inside the plate 'outer'.*population_plate"):
        with pyro.plate("outer", 3, dim=-2):
            smc.run()


def test_scale_and_mask_are_honoured() -> None:
    class Scaled(LinearGaussianChain):
        def terminal(self, state: Any, x0: torch.Tensor) -> None:
            with poutine.scale(scale=0.5), poutine.mask(mask=torch.tensor(True)):
                super().terminal(state, x0)
            with poutine.mask(mask=torch.tensor(False)):
                pyro.factor("masked", 100 * x0)

    tempered = LinearGaussianChain(2, k=0.5)
    a = run(Scaled(2, k=1.0), None, resampling="none")
    b = run(tempered, None, resampling="none")
    assert torch.allclose(a.log_weights, b.log_weights, atol=1e-6)


# populations


def test_populations_equal_separate_runs_in_law_and_never_mix() -> None:
    class Prompts(LinearGaussianChain):
        """Population p lives around 100 p, so that any mixing would show."""

        def write(self, state: Any, x: torch.Tensor, t: int) -> None:
            super().write(state, x, t)
            offset = 100.0 * torch.arange(3.0)
            state["tagged"] = offset + x

    model = Prompts(4, k=1.0, replicates=3)
    smc = TwistedSMC(
        model, LookaheadTwist(model), 64, 1, population_plate="replicates", ess_threshold=1.0
    )
    result = smc.run()
    assert result.log_weights.shape == (64, 3) and result.log_normalizer.shape == (3,)
    assert result.diagnostics.ess.shape == (5, 3)
    near = (result.state["tagged"] / 100).round().long()
    assert (near == torch.arange(3)).all()
    resampled = result.resample(10)
    assert resampled.state["x"].shape == (10, 3)
    assert ((resampled.state["tagged"] / 100).round() == torch.arange(3)).all()
    best = result.best(2)
    assert torch.equal(best.state["reward"][0], result.state["reward"].amax(0))
    assert smc.get_empirical()["x"].batch_shape == (3,)


def test_one_population_is_the_plain_run() -> None:
    many = run(LinearGaussianChain(4, replicates=1), None, ess_threshold=1.0)
    one = run(LinearGaussianChain(4), None, ess_threshold=1.0)
    assert torch.equal(many.state["x"][:, 0], one.state["x"])
    assert torch.allclose(many.log_weights[:, 0], one.log_weights)


def test_population_plate_must_exist() -> None:
    chain = LinearGaussianChain(2, replicates=3)
    with pytest.raises(ValueError, match=r"population_plate='prompts'.*\['replicates'\]"):
        TwistedSMC(chain, None, 4, 1, population_plate="prompts").run()
    with pytest.raises(ValueError, match="needs max_plate_nesting"):
        TwistedSMC(chain, None, 4, 0, population_plate="replicates")


def test_sites_outside_the_population_plate_are_refused() -> None:
    class Shared(LinearGaussianChain):
        def step(self, state: Any, t: int) -> None:
            pyro.factor(f"shared_{t}", torch.zeros(4, 1))
            super().step(state, t)

    with pytest.raises(ValueError, match="'shared_2' is outside the plate"):
        TwistedSMC(Shared(2, replicates=3), None, 4, 1, population_plate="replicates").run()


def test_state_without_populations_is_refused() -> None:
    class Narrow(LinearGaussianChain):
        def write(self, state: Any, x: torch.Tensor, t: int) -> None:
            super().write(state, x, t)
            state["narrow"] = torch.zeros(8)

    chain = Narrow(2, k=5.0, replicates=3)
    with pytest.raises(ValueError, match=r"state\['narrow'\] has shape \(8,\).*size 3 at dim 1"):
        run(chain, LookaheadTwist(chain), particles=8, ess_threshold=1.0)


# seeds, failures, checkpoints, history


def test_seed_makes_the_run_its_own_world() -> None:
    chain = LinearGaussianChain(4)
    a = run(chain, LookaheadTwist(chain), seed=5, ess_threshold=1.0)
    before = torch.get_rng_state()
    torch.manual_seed(123)
    outside = torch.get_rng_state()
    b = run(chain, LookaheadTwist(chain), seed=5, ess_threshold=1.0)
    assert torch.equal(torch.get_rng_state(), outside)
    c = run(chain, LookaheadTwist(chain), seed=6, ess_threshold=1.0)
    assert torch.equal(a.state["x"], b.state["x"]) and torch.equal(a.log_weights, b.log_weights)
    assert not torch.equal(a.state["x"], c.state["x"])
    torch.set_rng_state(before)


def test_global_seed_and_generator() -> None:
    chain = LinearGaussianChain(4)
    runs = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        generator = torch.Generator().manual_seed(0)
        runs.append(run(chain, None, seed=None, generator=generator, ess_threshold=1.0))
    assert torch.equal(runs[0].state["x"], runs[1].state["x"])


class Flaky(LinearGaussianChain):
    broken = True

    def step(self, state: Any, t: int) -> None:
        super().step(state, t)
        if t == 2 and self.broken:
            raise RuntimeError("the reward service is down")


@pytest.mark.parametrize("seed", [None, 4])
def test_a_failed_step_loses_nothing(seed: int | None) -> None:
    def fresh(chain: LinearGaussianChain) -> TwistedSMC:
        pyro.set_rng_seed(1)
        return TwistedSMC(chain, LookaheadTwist(chain), 16, ess_threshold=1.0, seed=seed)

    whole = fresh(LinearGaussianChain(4, k=2.0)).run()
    flaky = Flaky(4, k=2.0)
    smc = fresh(flaky)
    with pytest.raises(RuntimeError, match="service is down"):
        smc.run()
    flaky.broken = False
    result = smc.resume()
    assert torch.equal(result.state["x"], whole.state["x"])
    assert torch.equal(result.log_weights, whole.log_weights)
    assert len(result.diagnostics.ess) == 5


@pytest.mark.parametrize("seed", [None, 4])
def test_checkpoint_goes_on_with_the_same_stream(seed: int | None) -> None:
    def fresh() -> TwistedSMC:
        chain = LinearGaussianChain(4, k=2.0)
        return TwistedSMC(
            chain, LookaheadTwist(chain, "sum"), 16, ess_threshold=1.0, seed=seed, history="paths"
        )

    pyro.set_rng_seed(1)
    smc = fresh()
    smc.init()
    smc.step(4)
    smc.step(3)
    file = io.BytesIO()
    torch.save(smc.state_dict(), file)
    expected = smc.resume()
    file.seek(0)
    torch.manual_seed(99)
    other = fresh()
    other.load_state_dict(torch.load(file, weights_only=True))
    result = other.resume()
    assert torch.equal(result.log_weights, expected.log_weights)
    assert torch.equal(result.diagnostics.ancestors, expected.diagnostics.ancestors)
    assert torch.equal(result.samples["x_4"], expected.samples["x_4"])
    assert result.counts == expected.counts
    with pytest.raises(ValueError, match="16 particles.*num_particles=8"):
        TwistedSMC(LinearGaussianChain(4), None, 8).load_state_dict(smc.state_dict())


def test_paths_are_consistent_with_the_weights() -> None:
    """Replaying the stored lineages through the model gives every particle its own path."""
    chain = LinearGaussianChain(4, k=2.0)
    result = run(chain, LookaheadTwist(chain), ess_threshold=1.0, history="paths")
    assert list(result.samples) == ["x_4", "x_3", "x_2", "x_1", "x_0"]
    assert torch.equal(result.samples["x_0"], result.state["x"])
    lineages = result.diagnostics.lineages()
    assert lineages.shape == (5, 32)
    assert lineages[0].unique().numel() < 32
    same_root = lineages[0][:, None] == lineages[0]
    same_start = result.samples["x_4"][:, None] == result.samples["x_4"]
    assert torch.equal(same_root, same_start)


def test_history_off_keeps_only_scalars() -> None:
    result = run(LinearGaussianChain(4), None, history="off", ess_threshold=1.0)
    assert result.diagnostics.ancestors is None and result.samples is None
    with pytest.raises(ValueError, match="history='ancestors'"):
        result.diagnostics.lineages()


def test_run_never_resamples_last_but_a_step_does() -> None:
    chain = LinearGaussianChain(3, k=3.0)
    smc = TwistedSMC(chain, None, 64, ess_threshold=1.0, seed=0)
    assert smc.run().get_ESS() < 60
    smc.init()
    for t in chain.timesteps:
        smc.step(t)
    assert smc.get_ESS().item() == pytest.approx(64)


def test_cost_law() -> None:
    chain = LinearGaussianChain(6)
    smc = TwistedSMC(chain, LookaheadTwist(chain), 10)
    assert smc.run().counts == {"denoiser": 60}
    assert smc.run().counts == {"denoiser": 60}


@pytest.mark.parametrize("particles", [1, 2])
def test_few_particles(particles: int) -> None:
    chain = LinearGaussianChain(3, k=0.5, replicates=3000)
    assert_right(chain, run(chain, LookaheadTwist(chain), particles=particles, ess_threshold=1.0))


def test_float64_weights_whatever_the_state() -> None:
    result = run(LinearGaussianChain(2), None)
    assert result.state["x"].dtype == torch.float32 and result.log_weights.dtype == torch.float64


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_particles": 0}, "num_particles=0"),
        ({"num_particles": 2.5}, "num_particles=2.5"),
        ({"max_plate_nesting": -1}, "max_plate_nesting=-1"),
        ({"ess_threshold": 1.5}, "ess_threshold=1.5.*from 0 to 1"),
        ({"resampling": "sys"}, "unknown resampling scheme 'sys'"),
        ({"history": "all"}, "history='all'.*'paths'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    arguments = {"num_particles": 4, **options}
    with pytest.raises(ValueError, match=message):
        TwistedSMC(LinearGaussianChain(2), None, **arguments)


def test_step_before_init() -> None:
    with pytest.raises(ValueError, match="call init first"):
        TwistedSMC(LinearGaussianChain(2), None, 4).step(2)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    run(LinearGaussianChain(3), None, progress=True)
    err = capsys.readouterr().err
    assert "TwistedSMC" in err and "ESS" in err and "log Z" in err and "4/4" in err


@pytest.mark.filterwarnings("error")
def test_no_warnings_on_resampling_generator_device() -> None:
    generator = torch.Generator(device="cpu")
    run(LinearGaussianChain(2), None, generator=generator, ess_threshold=1.0)


def test_resampling_at_some_states_only() -> None:
    """At those and no others, with an estimate that is right; rate 1e-6."""
    model = LinearGaussianChain(num_steps=5, replicates=3000)
    options: dict[str, Any] = {"population_plate": "replicates", "ess_threshold": 1.0, "seed": 0}
    result = TwistedSMC(model, LookaheadTwist(model), 4, 1, resample_at=[4, 1], **options).run()
    assert result.diagnostics is not None
    assert result.diagnostics.resampled.any(1).tolist() == [t in (4, 1) for t in range(5, -1, -1)]
    assert_unbiased(result.log_normalizer, model.log_normalizer)


@pytest.mark.parametrize("times", [3, "4", [0], [6], [[1]]])
def test_states_to_resample_at(times: Any) -> None:
    with pytest.raises(ValueError, match="resample_at"):
        TwistedSMC(LinearGaussianChain(num_steps=5), None, 4, resample_at=times)
