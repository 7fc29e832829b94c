# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_twist.infer import SMCFailed, TrustRegionTwist, TwistedSMC, pool
from pyro_twist.infer.trustregion import temper, tempered
from pyro_twist.infer.trustregiontwist import _temper_columns
from pyro_twist.twists import (
    BackwardTwist,
    CalibratedLookahead,
    LinearTwist,
    LookaheadTwist,
    QuadraticTwist,
    ShiftTwist,
    SumTwist,
    SurrogateTwist,
    Twist,
)
from tests.oracles import LinearGaussianChain
from tests.statistics import assert_mean, assert_tilted_mean, assert_unbiased

RECORDS = ("paths", "statistics")


class Pull(LinearTwist):
    """A user's family: features read the state, and steps share their parameters."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, 2)

    def features(self, name: str, prior: Any) -> torch.Tensor | None:
        state = self.args_kwargs[0][0]
        if "x" not in state:
            return None
        return torch.stack([torch.ones_like(state["x"]), state["x"].tanh()])


class Positive(LinearGaussianChain):
    def terminal(self, state: Any, x0: torch.Tensor) -> None:
        pyro.factor("positive", torch.where(x0[..., 0] > 0, 0.0, -torch.inf))


def plain(chain: Any, particles: int, budget: float, **options: Any) -> TrustRegionTwist:
    """Plain maximum likelihood on unresampled passes: the algorithm of the theory."""
    settings = dict(
        kl_budget=budget, guard=False, centring=0.0, reuse=False, ess_threshold=0.0, seed=0
    )
    return TrustRegionTwist(chain, ShiftTwist(chain), particles, **{**settings, **options})


@pytest.mark.parametrize("budget, expected", [(0.2, 4), (1.0, 2)])
def test_number_of_iterations_and_escort_path(budget: float, expected: int) -> None:
    """``K = ceil(sqrt(D / eps))`` on the linear-Gaussian chain; then the twist is optimal."""
    chain = LinearGaussianChain(8, k=1.5, dim=2)
    divergence = chain.log_normalizer
    assert math.ceil(math.sqrt(divergence / budget)) == expected
    smc = plain(chain, 5000, budget).fit(expected + 1)
    taus = [one.tau for one in smc.iterations]
    assert [tau == 1.0 for tau in taus] == [k >= expected - 1 for k in range(expected + 1)]
    remaining = 1.0
    for one in smc.iterations[: expected - 1]:
        # each step moves eta by sqrt(eps / D); 15 % for the noise of tau
        assert one.tau * remaining == pytest.approx(math.sqrt(budget / divergence), rel=0.15)
        remaining *= 1 - one.tau
        assert one.eta == pytest.approx(1 - remaining)
    last = smc.sample()
    assert last.get_ESS().item() / 5000 > 0.95
    assert last.log_normalizer.item() == pytest.approx(divergence, abs=0.02)


def test_chi_square_falls_from_pass_to_pass() -> None:
    """On average over ten seeds, at every iteration."""
    chain = LinearGaussianChain(6, k=1.0, dim=2)
    logs = []
    for seed in range(10):
        smc = plain(chain, 300, 0.2, seed=seed).fit(4)
        logs.append([math.log1p(one.chi_square) for one in smc.iterations])
    means = torch.tensor(logs).mean(0).tolist()
    assert means == sorted(means, reverse=True)


def test_resampled_passes_are_tempered_as_paths() -> None:
    """
    The mean of x_0 under the tempered law is eta times the target's; tempering the final SMC
    weights instead is far off. 40 runs, five standard errors; rate 1e-6.
    """
    chain = LinearGaussianChain(5, k=1.2)
    right, naive = [], []
    for seed in range(40):
        smc = TrustRegionTwist(
            chain, CalibratedLookahead(chain), 2000, ess_threshold=1.0, seed=seed
        )
        smc.sample()
        one = smc.passes[0]
        weights = temper(one.log_path, one.log_base, math.inf).base.log() + 0.5 * one.log_path
        right.append(float((weights.softmax(0) * one.state["x"]).sum()))
        final = 0.5 * smc.state._log_weights
        naive.append(float((final.softmax(0) * one.state["x"]).sum()))
    values = torch.tensor(right)
    expected = 0.5 * chain.tilted_mean
    error = values.std() / 40**0.5
    assert abs(values.mean() - expected) < 5 * error + 0.01 and error < 0.05
    assert abs(torch.tensor(naive).mean() - expected) > 0.3


def test_base_weights_lead_back_to_the_law_of_the_pass() -> None:
    """Under them x_0 has its base mean, zero, although the pass was steered."""
    chain = LinearGaussianChain(5, k=1.0)
    means = []
    for seed in range(40):
        smc = TrustRegionTwist(
            chain, CalibratedLookahead(chain), 1000, ess_threshold=1.0, seed=seed
        )
        smc.sample()
        one = smc.passes[0]
        means.append(float((one.log_base.softmax(0) * one.state["x"]).sum()))
    values = torch.tensor(means)
    assert abs(values.mean()) < 5 * values.std() / 40**0.5 + 0.01


@pytest.mark.parametrize("particles", [1, 2, 4])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_few_particles_are_unbiased(particles: int, threshold: float) -> None:
    """Each population is a replicate; parameters are shared, so replicates are few and many."""
    ratios, weighted = [], []
    for seed in range(8):
        chain = LinearGaussianChain(3, k=0.6, dim=1, replicates=150)
        twist = ShiftTwist(chain) + CalibratedLookahead(chain)
        smc = TrustRegionTwist(
            chain,
            twist,
            particles,
            1,
            population_plate="replicates",
            ess_threshold=threshold,
            seed=seed,
        )
        result = smc.run()
        ratios.append(result.log_normalizer)
        weighted.append(result.expectation("x")[:, 0])
    log_z, means = torch.cat(ratios), torch.cat(weighted)
    assert_unbiased(log_z, chain.log_normalizer)
    assert_tilted_mean(log_z, means, chain.log_normalizer, chain.tilted_mean)


def test_pooled_normaliser_is_unbiased_with_adaptive_passes() -> None:
    """300 independent fits of 8 particles a pass; z-test, rate 1e-6."""
    chain = LinearGaussianChain(3, k=0.8, dim=1)
    found = []
    for seed in range(300):
        twist = ShiftTwist(chain)
        smc = TrustRegionTwist(chain, twist, 8, num_iterations=2, guard=False, seed=seed)
        found.append(smc.run().log_normalizer)
    assert_unbiased(torch.stack(found), chain.log_normalizer)


def test_bad_parameters_do_not_change_the_target() -> None:
    chain = LinearGaussianChain(3, k=0.5, dim=1, replicates=1500)
    for family in (ShiftTwist, QuadraticTwist):
        twist = family(chain)
        with torch.no_grad():
            for parameter in twist.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        smc = TwistedSMC(chain, twist, 48, 1, population_plate="replicates", seed=1)
        result = smc.run()
        assert_unbiased(result.log_normalizer, chain.log_normalizer)
        means = result.expectation("x")[:, 0]
        assert_tilted_mean(result.log_normalizer, means, chain.log_normalizer, chain.tilted_mean)


def test_fitted_beats_unfitted() -> None:
    """At equal numbers of particles: the spread of log Z at least halves, over 20 seeds."""
    chain = LinearGaussianChain(5, k=1.2, dim=2)
    learned, bootstrap = [], []
    for seed in range(20):
        smc = TrustRegionTwist(chain, ShiftTwist(chain), 64, seed=seed)
        smc.fit(3)
        learned.append(smc.sample().log_normalizer)
        bootstrap.append(TwistedSMC(chain, None, 64, seed=seed).run().log_normalizer)
    assert torch.stack(learned).std() < 0.5 * torch.stack(bootstrap).std()


def test_amortised_twist() -> None:
    """A fitted twist is used by a plain engine, with more particles, at no cost of fitting."""
    chain = LinearGaussianChain(5, k=1.2, dim=2)
    smc = TrustRegionTwist(chain, ShiftTwist(chain), 500, seed=0).fit(4)
    result = TwistedSMC(chain, smc.guide, 2000, seed=1).run()
    assert result.get_ESS() > 0.8 * 2000
    assert result.counts == {"denoiser": 2000 * 5 * 2}


class LocalLevel:
    """A Gaussian random walk seen through noise, with every datum a factor on the way."""

    event_shape = (1,)

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.timesteps = tuple(range(len(data), 0, -1))

    def init(self, state: Any) -> None:
        prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        state["x"] = pyro.sample("x_first", prior)

    def step(self, state: Any, t: int) -> None:
        kernel = dist.Normal(state["x"], 0.6).to_event(1)
        state["x"] = pyro.sample(f"x_{t - 1}", kernel)
        y = self.data[len(self.data) - t]
        pyro.sample(f"y_{t}", dist.Normal(state["x"], 0.3).to_event(1), obs=y)


def test_state_space_model_against_kalman() -> None:
    """Learned twists, bootstrap filter and the exact likelihood of a linear-Gaussian model."""
    torch.manual_seed(0)
    data = torch.randn(8, 1).cumsum(0) * 0.6 + 0.3 * torch.randn(8, 1)
    eye = torch.eye(1)
    normal = lambda scale: dist.Normal(torch.zeros(1), scale).to_event(1)  # noqa: E731
    hmm = dist.GaussianHMM(normal(1.0), eye, normal(0.6), eye, normal(0.3), duration=8)
    exact = float(hmm.log_prob(data))
    model = LocalLevel(data)
    smc = TrustRegionTwist(model, None, 150, seed=0, num_iterations=4, guard=False)
    assert isinstance(smc.guide, BackwardTwist)
    smc.fit()
    learned = [TwistedSMC(model, smc.guide, 100, seed=s).run().log_normalizer for s in range(30)]
    bootstrap = [TwistedSMC(model, None, 100, seed=s).run().log_normalizer for s in range(30)]
    spread = torch.stack(learned).std()
    assert spread < 0.6 * torch.stack(bootstrap).std()
    error = abs(torch.stack(learned).mean().item() - exact)
    assert error < 6 * float(spread) / 30**0.5 + 0.1


def test_degenerate_rewards() -> None:
    class Constant(LinearGaussianChain):
        def reward(self, x0: torch.Tensor) -> torch.Tensor:
            return torch.full(x0.shape[:-1], 2.0)

    chain = Constant(3, k=1.0, dim=1)
    smc = TrustRegionTwist(chain, ShiftTwist(chain) + CalibratedLookahead(chain), 8, seed=0)
    result = smc.run()
    assert result.log_normalizer.item() == pytest.approx(2.0, abs=0.3)
    assert all(one.tau == 1.0 for one in smc.iterations[:1])


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_hard_constraints(threshold: float) -> None:
    found = []
    for seed in range(100):
        chain = Positive(3, dim=1)
        twist = ShiftTwist(chain) + CalibratedLookahead(chain)
        smc = TrustRegionTwist(chain, twist, 24, seed=seed, ess_threshold=threshold)
        found.append(smc.run().log_normalizer)
    assert_unbiased(torch.stack(found), math.log(0.5))


def test_early_stop_freezes_the_twist_but_not_the_passes() -> None:
    chain = LinearGaussianChain(3, k=0.05, dim=1)
    smc = TrustRegionTwist(chain, ShiftTwist(chain), 50, num_iterations=3, seed=0)
    result = smc.run()
    assert len(smc.iterations) == 1 and len(smc.passes) == 4
    assert result.num_particles == 200 and result.counts == {"denoiser": 4 * 50 * 3}


def test_pool_weighs_by_size_and_normaliser() -> None:
    chain = LinearGaussianChain(3, k=1.0)
    a, b = (TwistedSMC(chain, None, n, seed=n).run() for n in (10, 30))
    pooled = pool([a, b])
    expected = (10 * a.log_normalizer.exp() + 30 * b.log_normalizer.exp()) / 40
    assert pooled.log_normalizer.exp().item() == pytest.approx(expected.item())
    za, zb = 10 * a.log_normalizer.exp(), 30 * b.log_normalizer.exp()
    mean = (za * a.expectation("x") + zb * b.expectation("x")) / (za + zb)
    assert pooled.expectation("x").item() == pytest.approx(mean.item())


def test_seed_and_table() -> None:
    chain = LinearGaussianChain(3, k=1.0, dim=1)
    runs = [TrustRegionTwist(chain, ShiftTwist(chain), 16, seed=5) for _ in range(2)]
    results = [smc.run() for smc in runs]
    assert torch.equal(results[0].log_weights, results[1].log_weights)
    assert not torch.equal(results[0].state["x"][:16], results[0].state["x"][16:32])
    table = runs[0].table().splitlines()
    assert table[0].split()[:3] == ["tau", "kl", "eta"] and len(table) == 4


class Flaky(LinearGaussianChain):
    calls, broken = 0, True

    def reward(self, x0: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 7 and self.broken:
            raise RuntimeError("the reward service is down")
        return super().reward(x0)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("family", [ShiftTwist, Pull])
def test_resume_after_a_failing_reward(record: Any, family: Any) -> None:
    """The look-ahead fails after the step was recorded: it is taken again, recorded once."""

    def fresh(chain: Any) -> TrustRegionTwist:
        twist = LookaheadTwist(chain) + family(chain)
        return TrustRegionTwist(chain, twist, 16, seed=5, record=record, ess_threshold=1.0)

    whole = fresh(LinearGaussianChain(3, k=1.0, dim=1)).run()
    chain = Flaky(3, k=1.0, dim=1)
    smc = fresh(chain)
    with pytest.raises(RuntimeError, match="service is down"):
        smc.run()
    chain.broken = False
    result = smc.resume()
    assert torch.equal(result.log_weights, whole.log_weights)


def test_resume_never_counts_a_pass_twice() -> None:
    chain = LinearGaussianChain(3, k=1.0, dim=1)
    smc = TrustRegionTwist(chain, ShiftTwist(chain), 16, seed=5)
    result = smc.run()
    assert torch.equal(smc.resume().log_weights, result.log_weights)
    assert len(smc.passes) == 4


def test_a_step_that_fails_after_weighting_is_recorded_once() -> None:
    chain = LinearGaussianChain(4, k=2.0, dim=1)
    smc = TrustRegionTwist(chain, CalibratedLookahead(chain), 16, ess_threshold=1.0, seed=5)
    original, failures = smc._resample, [True]

    def failing(*args: Any) -> None:
        if failures.pop() if failures else False:
            raise RuntimeError("interrupted")
        original(*args)

    smc._resample = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="interrupted"):
        smc.run()
    smc.resume()
    assert [len(one.steps) for one in smc.passes] == [5] * 4


def test_saving_in_the_middle_is_refused() -> None:
    chain = LinearGaussianChain(3, dim=1)
    with pytest.raises(ValueError, match="save the fitted twist"):
        TrustRegionTwist(chain, ShiftTwist(chain), 4).state_dict()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guide": CalibratedLookahead, "num_iterations": -1}, "num_iterations=-1"),
        ({"guide": CalibratedLookahead, "kl_budget": 0.0}, "kl_budget=0.0.*positive"),
        ({"guide": CalibratedLookahead, "centring": 2.0}, "centring=2.0"),
        ({"guide": CalibratedLookahead, "history": "off"}, "fitting needs the ancestors"),
        ({"guide": CalibratedLookahead, "record_device": "nope"}, "record_device='nope'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    chain = LinearGaussianChain(3)
    options["guide"] = options["guide"](chain)
    with pytest.raises(ValueError, match=message):
        TrustRegionTwist(chain, num_particles=4, **options)


def test_fixed_guides_and_empty_updates_are_refused() -> None:
    from pyro_twist.twists import LookaheadTwist

    chain = LinearGaussianChain(3)
    with pytest.raises(ValueError, match="no part to learn; use TwistedSMC"):
        TrustRegionTwist(chain, LookaheadTwist(chain), 4)
    with pytest.raises(ValueError, match="no pass to learn from"):
        TrustRegionTwist(chain, CalibratedLookahead(chain), 4).update()


@pytest.fixture
def double() -> Iterator[None]:
    """Parameters in float64, so that rounding does not reach the draws of the next pass."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same_runs(chain: Any, family: Any, particles: int, **options: Any) -> TrustRegionTwist:
    """Runs with either record, compares everything and returns the one without paths."""
    runs = []
    for record in RECORDS:
        twist = LookaheadTwist(chain) + family(chain)
        smc = TrustRegionTwist(chain, twist, particles, seed=3, record=record, **options)
        runs.append((smc, smc.run()))
    (paths, expected), (statistics, result) = runs
    assert torch.allclose(result.log_weights, expected.log_weights, atol=1e-9)
    assert torch.allclose(statistics.guide.twists[1].theta, paths.guide.twists[1].theta, atol=1e-9)
    for ours, theirs in zip(statistics.iterations, paths.iterations, strict=True):
        assert astuple(ours) == pytest.approx(astuple(theirs), rel=1e-6, nan_ok=True)
    return statistics


@pytest.mark.parametrize("family", [ShiftTwist, Pull])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"reuse": False}, {"guard": False, "centring": 0.3}])
@pytest.mark.parametrize("replicates", [None, 3])
def test_statistics_are_as_good_as_paths(
    family: Any, threshold: float, options: Any, replicates: int | None, double: None
) -> None:
    chain = LinearGaussianChain(4, k=1.2, dim=2, replicates=replicates)
    if replicates:
        options = {**options, "max_plate_nesting": 1, "population_plate": "replicates"}
    smc = assert_same_runs(chain, family, 30, ess_threshold=threshold, kl_budget=0.3, **options)
    assert smc.guide.twists[1].theta.any() and all(one.steps == [] for one in smc.passes)
    resampled = [any(a is not None for a in one.ancestors) for one in smc.passes]
    assert all(resampled) if threshold else not any(resampled)


@pytest.mark.parametrize("particles", [1, 2, 4])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_few_particles_with_both_records(particles: int, threshold: float, double: None) -> None:
    chain = LinearGaussianChain(4, k=1.0, dim=2)
    smc = assert_same_runs(chain, ShiftTwist, particles, ess_threshold=threshold)
    assert len(smc.passes) == 4 and torch.isfinite(smc.guide.twists[1].theta).all()


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_dead_particles_with_both_records(threshold: float, double: None) -> None:
    smc = assert_same_runs(Positive(3, dim=1), ShiftTwist, 24, ess_threshold=threshold)
    assert any(bool((one.log_path == -math.inf).any()) for one in smc.passes)
    assert torch.isfinite(smc.guide.twists[1].theta).all()


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_equal_weights_teach_nothing(record: Any, threshold: float) -> None:
    """The target is the current law: tau is 1, and centring takes all of the score away."""
    chain = LinearGaussianChain(4, k=0.0, dim=2)
    smc = TrustRegionTwist(
        chain, ShiftTwist(chain), 16, seed=0, record=record, ess_threshold=threshold, guard=False
    )
    iteration = smc.fit(1).iterations[0]
    assert (iteration.tau, iteration.path_ess) == (1.0, pytest.approx(1.0))
    assert (iteration.kl, iteration.chi_square) == (pytest.approx(0.0), pytest.approx(0.0))
    assert smc.guide.theta.abs().max() < 1e-12


def test_memory_of_statistics_does_not_grow_with_steps() -> None:
    """Where steps share parameters; and what all particles share is kept once."""
    for steps in (3, 30):
        chain = LinearGaussianChain(steps, dim=2)
        smc = TrustRegionTwist(chain, Pull(chain), 10, seed=0, record="statistics")
        smc.sample()
        (found,) = smc.passes[0].statistics or ()
        assert found.score.shape == (10, 2) and found.information.shape == (10, 2, 2)
    smc = TrustRegionTwist(chain, ShiftTwist(chain), 10, seed=0, record="statistics")
    smc.sample()
    assert [one.block for one in smc.passes[0].statistics or ()] == list(range(31))
    assert (smc.passes[0].statistics or ())[0].information.shape == (1, 2, 2)


class Nudge(Twist):
    """A fixed proposal that may read anything."""

    def get_posterior(self, name: str, prior: Any) -> Any:
        return prior


class Curious(ShiftTwist):
    """Overrides the features, so that what its base reads says nothing."""

    def features(self, name: str, prior: Any) -> torch.Tensor | None:
        return super().features(name, prior)


def test_statistics_are_refused_where_they_are_not_enough() -> None:
    chain = LinearGaussianChain(3, dim=1)

    class Refitted(ShiftTwist):
        def observe(self, passes: Any) -> None: ...

    class Capped(ShiftTwist):
        def get_posterior(self, name: str, prior: Any) -> Any:
            return prior

    frozen = ShiftTwist(chain)
    frozen.theta.requires_grad_(False)
    for twist, message in [
        (ShiftTwist(chain) + CalibratedLookahead(chain), "CalibratedLookahead learns from them"),
        (QuadraticTwist(chain), "QuadraticTwist learns from them.*record='paths'"),
        (Refitted(chain), "Refitted learns from them"),
        (Capped(chain), "Capped learns from them"),
        (ShiftTwist(chain) + Pull(chain), r"has 2 with.*ShiftTwist, Pull"),
        (frozen, r"has 0 with.*\(none\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrustRegionTwist(chain, twist, 4, record="statistics")
    with pytest.raises(ValueError, match="record='all'"):
        TrustRegionTwist(chain, ShiftTwist(chain), 4, record="all")  # type: ignore[arg-type]
    assert SurrogateTwist.observe is not LinearTwist.observe  # and so it needs paths


def test_only_entries_that_are_read_are_recorded() -> None:
    chain = LinearGaussianChain(3, dim=2)
    everything = {"x", "x0_hat"}
    looking = {"lookahead", "lookahead_time", "lookahead_log_twist"}

    class Asking(Pull):
        reads = ("x",)

    class Watching(CalibratedLookahead):
        def observe(self, passes: Any) -> None:
            """May read anything."""

    for twist, expected in [
        (ShiftTwist(chain), set()),
        (LookaheadTwist(chain) + ShiftTwist(chain), set()),
        (Nudge(chain) + ShiftTwist(chain), everything),
        (Curious(chain), everything),
        (Pull(chain), everything),
        (Asking(chain) + QuadraticTwist(chain), {"x"}),
        (SumTwist(ShiftTwist(chain), CalibratedLookahead(chain)), looking),
        (Watching(chain), everything | looking),
    ]:
        smc = TrustRegionTwist(chain, twist, 4, seed=0)
        smc.sample()
        assert [set(sites[0].state) for sites in smc.passes[0].steps] == [set(), *3 * [expected]]


def recorded(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a pass."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from recorded(one)
    elif isinstance(value, dict):
        yield from recorded(list(value.values()))
    elif hasattr(value, "__dict__"):
        yield from recorded(vars(value))


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("replicates", [None, 3])
def test_recorded_tensors_are_moved(record: Any, replicates: int | None) -> None:
    """To a device without data, where nothing could be left behind unseen."""
    chain = LinearGaussianChain(3, dim=2, replicates=replicates)
    options: dict[str, Any] = {} if replicates is None else {"population_plate": "replicates"}
    twist = Pull(chain)
    with torch.no_grad():
        twist.theta.fill_(0.3)
    smc = TrustRegionTwist(
        chain, twist, 6, 1, seed=0, record=record, record_device="meta", **options
    )
    smc.sample()
    tensors = list(recorded(smc.passes))
    assert len(tensors) > 5 and {one.device.type for one in tensors} == {"meta"}
    assert {one.device.type for one in smc.state.values()} == {"cpu"}
    for sites in smc.passes[0].steps:
        assert sites[0].device == torch.device("cpu")
    smc = TrustRegionTwist(chain, twist, 6, 1, seed=0, record=record, **options)
    smc.sample()
    for sites in smc.passes[0].steps:
        assert sites[0].restored() is sites[0]
        back = replace(sites[0], device=torch.device("meta")).restored()
        assert {one.device.type for one in recorded(back)} == {"meta"}


def test_recording_elsewhere_changes_nothing() -> None:
    chain, runs = LinearGaussianChain(4, k=1.2, dim=2), []
    for device in (None, "cpu"):
        twist = CalibratedLookahead(chain) + Pull(chain)
        smc = TrustRegionTwist(chain, twist, 16, seed=0, record_device=device)
        runs.append(smc.run())
        assert not any(one.requires_grad for one in recorded(smc.passes))
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)


@pytest.mark.parametrize("record", RECORDS)
def test_no_graph_is_recorded(record: Any) -> None:
    """Although the model keeps one for a twist that takes gradients."""

    class Graph(LinearGaussianChain):
        def write(self, state: Any, x: torch.Tensor, t: int) -> None:
            with torch.enable_grad():
                super().write(state, x.detach().requires_grad_(), t)

    chain = Graph(3, dim=2)
    smc = TrustRegionTwist(chain, Pull(chain), 8, seed=0, record=record)
    smc.sample()
    tensors = list(recorded([smc.passes[0].steps, smc.passes[0].statistics]))
    assert tensors and not any(one.requires_grad for one in tensors)


def test_a_lost_pass_counts_as_zero() -> None:
    """A hard constraint that every other particle meets: the mean is its probability, 1e-6."""
    found, lost = [], 0
    for seed in range(400):
        chain = Positive(3, dim=1)
        smc = TrustRegionTwist(chain, ShiftTwist(chain), 1, num_iterations=2, seed=seed)
        try:
            result = smc.run()
        except SMCFailed:
            found.append(0.0)
            continue
        lost += result.num_particles < 3
        assert result.counts == {"denoiser": 9}
        mean = torch.logsumexp(result.log_weights, 0) - math.log(result.num_particles)
        assert mean.item() == pytest.approx(result.log_normalizer.item())
        found.append(float(result.log_normalizer.exp()))
    assert lost > 200
    assert_mean(torch.tensor(found), 0.5, max_relative_sd=0.05)


def test_a_larger_last_pass_is_pooled_without_bias() -> None:
    """Passes of 1, 1 and 3 particles, some of them lost: the mean is the probability, 1e-6."""
    found, sizes = [], set()
    for seed in range(400):
        chain = Positive(3, dim=1)
        options: dict[str, Any] = dict(num_iterations=2, final_particles=3, seed=seed)
        try:
            result = TrustRegionTwist(chain, ShiftTwist(chain), 1, **options).run()
        except SMCFailed:
            found.append(0.0)
            continue
        sizes.add(result.num_particles)
        assert result.counts == {"denoiser": 15}
        found.append(float(result.log_normalizer.exp()))
    assert {3, 4, 5} <= sizes  # neither, one or both of the small passes kept
    assert_mean(torch.tensor(found), 0.5, max_relative_sd=0.05)


def test_only_the_pass_after_the_fits_is_larger() -> None:
    chain = LinearGaussianChain(3, dim=1)
    smc = TrustRegionTwist(chain, None, 4, num_iterations=2, final_particles=6, seed=0)
    for _ in range(2):
        assert smc.run().num_particles == 14
        assert [len(one.log_path) for one in smc.passes] == [4, 4, 6]
    with pytest.raises(ValueError, match="final_particles=0"):
        TrustRegionTwist(chain, None, 4, final_particles=0)


class Eager(LinearTwist):
    """Fits to whatever it sees, in place, and so far that held-out paths refuse."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, 2, ridge=1e-3)

    def features(self, name: str, prior: Any) -> torch.Tensor | None:
        size = prior.batch_shape + prior.event_shape
        return torch.randn((2, *size), generator=torch.Generator().manual_seed(len(name)))


def watch(monkeypatch: pytest.MonkeyPatch, smc: TrustRegionTwist) -> list[torch.Tensor]:
    """The parameters from which every fit starts."""
    from pyro_twist.infer import trustregiontwist as module

    starts: list[torch.Tensor] = []
    original = module.fit_likelihood

    def watched(twist: Any, batches: Any, **options: Any) -> None:
        starts.append(smc.guide.theta.detach().clone())
        original(twist, batches, **options)

    monkeypatch.setattr(module, "fit_likelihood", watched)
    return starts


START = torch.tensor([[0.07, -0.05]])


def started(seed: int) -> TrustRegionTwist:
    chain = LinearGaussianChain(3, k=1.0, dim=2)
    smc = TrustRegionTwist(chain, Eager(chain), 16, seed=seed)
    with torch.no_grad():
        smc.guide.theta.copy_(START)
    smc.sample()
    return smc


def test_rejected_steps_leave_the_parameters_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits write in place, and parameters that are made of a vector share its memory."""
    rejected = 0
    for seed in range(30):
        smc = started(seed)
        starts = watch(monkeypatch, smc)
        if smc.update().step == 0.0:
            rejected += 1
            assert torch.equal(smc.guide.theta.detach(), START)
        assert len(starts) in (4, 5) and all(torch.equal(one, START) for one in starts)
    assert 5 <= rejected < 30


@pytest.mark.parametrize("accepted", [0.25, 1.0])
def test_accepted_steps_go_that_share_of_the_way(
    accepted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    smc = started(0)
    original = smc._accepted
    monkeypatch.setattr(smc, "_accepted", lambda *args: original(*args) and accepted)
    assert smc.update().step == accepted
    fitted = smc.guide.solve([smc._evidence(smc.iterations[-1].tau)(None, True)[0]])
    expected = START + accepted * (fitted - START)
    assert torch.allclose(smc.guide.theta.detach(), expected.float(), atol=1e-6)


@pytest.mark.parametrize("guard", [False, True])
def test_parameters_share_no_memory_with_what_was_kept(guard: bool) -> None:
    """What a fit or a user writes into them stays in them."""
    chain = LinearGaussianChain(3, k=1.0, dim=2)
    smc = TrustRegionTwist(
        chain, ShiftTwist(chain) + QuadraticTwist(chain), 16, guard=guard, seed=0
    )
    smc.fit(1)
    first, *others = (p for p in smc.guide.parameters())
    kept = [one.detach().clone() for one in others]
    with torch.no_grad():
        first.fill_(7.0)
    assert all(torch.equal(*pair) for pair in zip(others, kept, strict=True))


class Wall(LinearGaussianChain):
    """A factor in the middle of the path that kills half of the particles."""

    def step(self, state: Any, t: int) -> None:
        super().step(state, t)
        if t == 3:
            pyro.factor("wall", torch.where(state["x"][..., 0] > 0, 0.0, -torch.inf))


@pytest.mark.parametrize("centring", ["ess", 1.0])
def test_centring_keeps_what_a_constraint_says(centring: Any) -> None:
    """Dead paths count where the score has mean zero: the fit is that of plain likelihood."""
    found = []
    for share in (0.0, centring):
        smc = plain(Positive(4, dim=1), 4000, 1e9, centring=share)
        found.append(smc.fit(1).guide.theta.detach())
    assert found[0].abs().max() > 0.3
    # two estimates from 4000 paths with sds of about 0.02: 5 of them
    assert torch.allclose(*found, atol=0.1)


def test_dead_paths_that_were_resampled_away_switch_centring_off() -> None:
    smc = plain(Wall(4, dim=1), 64, 1e9, centring=1.0, ess_threshold=0.9)
    smc.fit(1)
    assert smc.passes[0].gap and smc._centring_of(0) == 0.0
    smc = plain(Positive(4, dim=1), 64, 1e9, centring=1.0, ess_threshold=0.9)
    smc.fit(1)  # they are there at the end
    assert not smc.passes[0].gap and smc._centring_of(0) == 1.0


def test_every_pass_stays_in_its_trust_region() -> None:
    """Whatever the nominal way to the target: older passes, and those after its end, as well."""
    budget = 0.2
    smc = plain(LinearGaussianChain(6, k=1.5, dim=3), 16, budget, reuse=True, centring="ess")
    smc.fit(4)
    for etas in (smc._etas, [1.0] * 4):
        smc._etas = list(etas)
        for k, one in enumerate(smc.passes):
            tau = smc._tau_towards(1.0, k)
            used = tempered(tau, one.log_path, one.log_base)
            assert 0 < tau <= 1 and used.kl <= budget + 1e-6


def test_the_hardest_population_sets_the_step() -> None:
    """The divergence is inside the budget in each, and the reported one is that of the step."""
    chain = LinearGaussianChain(2, k=1.0, dim=1)
    smc = plain(chain, 8, 0.1)
    smc.sample()
    scale = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    one = replace(
        smc.passes[0],
        log_path=torch.linspace(0, 1, 8, dtype=torch.float64)[:, None] * scale,
        log_base=torch.zeros(8, 3, dtype=torch.float64),
    )
    steps = _temper_columns(one, 0.1)
    assert len({step.tau for step in steps}) == 1
    assert max(step.kl for step in steps) == pytest.approx(0.1, abs=1e-6)


def test_paths_of_one_ancestor_are_in_one_fold() -> None:
    """Systematic resampling puts siblings side by side: by position they would be split."""
    chain = LinearGaussianChain(6, k=1.5, dim=1)
    guide = LookaheadTwist(chain) + Pull(chain)
    smc = TrustRegionTwist(chain, guide, 16, ess_threshold=1.0, seed=2)
    smc.sample()
    one, folds = smc.passes[0], smc._folds[0]
    lineage = next(x for x in one.lineages() if len(x.unique()) > 1)
    assert len(lineage.unique()) < 16
    for ancestor in lineage.unique():
        assert len(folds[lineage == ancestor].unique()) == 1
    assert len(folds.unique()) == min(4, len(lineage.unique()))


def test_pooled_results_claim_no_diagnostics() -> None:
    chain = LinearGaussianChain(3, dim=1)
    smc = TrustRegionTwist(chain, Pull(chain), 4, num_iterations=1, seed=0)
    pooled = smc.run()
    assert pooled.diagnostics is None and smc.last.diagnostics is not None
    with pytest.raises(ValueError, match="TrustRegionTwist.last"):
        pooled.plot()
    alone = TrustRegionTwist(chain, Pull(chain), 4, num_iterations=0, seed=0).run()
    assert alone.diagnostics is not None


def test_passes_lost_in_fit_count_as_zero() -> None:
    """1e-6, as for passes lost in a run."""
    found = []
    for seed in range(300):
        smc = TrustRegionTwist(Positive(2, dim=1), None, 1, seed=seed)
        for _ in range(2):
            with suppress(SMCFailed):
                smc.fit(1)
        lost = len(smc._lost) == 2
        found.append(0.0 if lost else float(smc.pooled().log_normalizer.exp()))
    assert_mean(torch.tensor(found), 0.5, max_relative_sd=0.1)


def test_sizes_of_passes_made_by_hand() -> None:
    chain = LinearGaussianChain(3, dim=1)
    options: dict[str, Any] = dict(num_iterations=2, final_particles=16, seed=0)
    smc = TrustRegionTwist(chain, None, 4, **options)
    assert [one.log_path.shape[0] for one in smc.fit(4).passes] == [4] * 4
    assert smc.sample().num_particles == 4
    assert smc.run().num_particles == 24
    smc.init()
    assert smc.state["x"].shape[0] == 4


def test_resuming_a_fit_ends_with_the_fit() -> None:
    class Fragile(LinearGaussianChain):
        calls = 0

        def step(self, state: Any, t: int) -> None:
            self.calls += 1
            if self.calls == 5:
                raise RuntimeError("out of memory")
            super().step(state, t)

    chain = Fragile(3, dim=1)
    smc = TrustRegionTwist(chain, None, 4, seed=0)
    with pytest.raises(RuntimeError):
        smc.fit(3)
    smc.resume()
    assert len(smc.passes) == len(smc.iterations) == 3


@pytest.mark.parametrize("size", [0, -3, 4.5, True, "a"])
def test_numbers_of_particles_are_checked(size: Any) -> None:
    chain = LinearGaussianChain(3, dim=1)
    with pytest.raises(ValueError, match="num_particles"):
        TrustRegionTwist(chain, None, size)
    with pytest.raises(ValueError, match="final_particles"):
        TrustRegionTwist(chain, None, 4, final_particles=size)


@pytest.mark.parametrize(
    "options",
    [
        {"kl_budget": 0},
        {"kl_budget": "x"},
        {"centring": "all"},
        {"centring": None},
        {"centring": -0.1},
        {"stop_ess": 5},
        {"stop_ess": "x"},
        {"num_iterations": True},
        {"num_iterations": 1.5},
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    chain = LinearGaussianChain(3, dim=1)
    with pytest.raises(ValueError, match=next(iter(options))):
        TrustRegionTwist(chain, None, 4, **options)
    with pytest.raises(ValueError, match="num_iterations"):
        TrustRegionTwist(chain, None, 4).fit(-1)


def test_a_failed_population_is_not_replaced_by_resuming() -> None:
    """To draw another pass instead would choose passes by their outcome."""
    failed = 0
    for seed in range(20):
        chain = Positive(3, dim=1, replicates=2)
        options: dict[str, Any] = dict(num_iterations=1, population_plate="replicates", seed=seed)
        smc = TrustRegionTwist(chain, ShiftTwist(chain), 2, 1, **options)
        try:
            smc.run()
        except SMCFailed:
            failed, made = failed + 1, len(smc.passes)
            with pytest.raises(SMCFailed):
                smc.resume()
            assert len(smc.passes) == made
    assert failed > 3
