# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import math
import pickle
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SMCFilter
from pyro.infer.smcfilter import SMCFailed, SMCState

from pyro_twist.rewards import Reward, RewardError, RewardTilted, Tilted, log_potential
from tests.rewards.chain import Chain, Prior

# Two-sided normal quantile at a false-alarm rate of 1e-5.
Z_MAX = 4.42
BATCHES: list[tuple[tuple[int, ...], tuple[str, int] | None]] = [
    ((), None),
    ((5,), None),
    ((1,), None),
    ((5, 1), None),
    ((1, 1), None),
    ((3,), ("classes", 3)),
    ((5, 3), ("classes", 3)),
    ((3, 3), ("classes", 3)),
    ((1, 3), ("classes", 3)),
    ((5, 1), ("classes", 1)),
]


def total(samples: torch.Tensor) -> torch.Tensor:
    return samples.flatten(1).sum(-1)


def squares(samples: torch.Tensor) -> torch.Tensor:
    return -samples.flatten(1).square().sum(-1)


def batch(shape: tuple[int, ...], event_shape: tuple[int, ...] = (2,)) -> torch.Tensor:
    return torch.randn(shape + event_shape)


# log_potential: shapes and plates


@pytest.mark.parametrize(("shape", "plate"), BATCHES)
@pytest.mark.parametrize("event_shape", [(2,), (3, 4, 4)])
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_log_potential_has_the_batch_shape(
    shape: tuple[int, ...], plate: Any, event_shape: tuple[int, ...], inside: bool
) -> None:
    x0 = batch(shape, event_shape)
    model = RewardTilted(Chain(event_shape, plate=plate), total, scale=3.0)
    with ExitStack() as stack:
        particles = len(shape) - (plate is not None and len(shape) < 2)
        if inside and particles:
            stack.enter_context(pyro.plate("particles", shape[0], dim=-len(shape)))
        value = log_potential(model, {}, x0)
    assert value.dtype == torch.float64
    assert value.shape == shape
    expected = 3 * x0.flatten(len(shape)).sum(-1).double()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "plate"), BATCHES)
@pytest.mark.parametrize("dim", [None, -3])
def test_plates_opened_inside_are_summed(shape: tuple[int, ...], plate: Any, dim: Any) -> None:
    data = torch.randn(4)

    def likelihood(state: Any, x0: torch.Tensor) -> None:
        inner = pyro.plate("data", 4, dim=dim)
        with inner:
            view = data.reshape((4,) + (1,) * (-1 - inner.dim))
            pyro.sample("y", dist.Normal(x0[..., 0], 2.0), obs=view)

    x0 = batch(shape)
    if dim is None and not shape:
        likelihood_dims: Any = x0[..., 0]
        expected = dist.Normal(likelihood_dims, 2.0).log_prob(data).sum()
    else:
        expected = dist.Normal(x0[..., 0, None], 2.0).log_prob(data).sum(-1)
    value = log_potential(Tilted(Chain(plate=plate), likelihood), {}, x0)
    torch.testing.assert_close(value, expected.double(), rtol=1e-5, atol=1e-5)


def test_an_inner_plate_right_of_the_particles() -> None:
    x0, data = batch((5, 1)), torch.randn(4)

    def likelihood(state: Any, x0: torch.Tensor) -> None:
        with pyro.plate("data", 4, dim=-1):
            pyro.sample("y", dist.Normal(x0[..., 0], 1.0), obs=data)

    value = log_potential(Tilted(Chain(), likelihood), {}, x0)
    expected = dist.Normal(x0[:, 0, :1], 1.0).log_prob(data).sum(-1, keepdim=True)
    torch.testing.assert_close(value, expected.double())


def test_scale_mask_and_subsampling_are_honoured() -> None:
    x0, keep = batch((5,)), torch.tensor([True, False, True, True, False])

    def potential(state: Any, x0: torch.Tensor) -> None:
        with poutine.scale(scale=0.5), poutine.mask(mask=keep):
            pyro.factor("a", x0[:, 0])
        with poutine.mask(mask=False):
            pyro.factor("b", torch.full((5,), -math.inf))
        with pyro.plate("data", 8, subsample=torch.arange(2), dim=-2):
            pyro.factor("c", x0[:, 1].expand(2, 5))

    value = log_potential(Tilted(Chain(), potential), {}, x0)
    expected = 0.5 * x0[:, 0] * keep + 8 * x0[:, 1]
    torch.testing.assert_close(value, expected.double())


def test_one_number_counts_for_every_particle_and_entry() -> None:
    def potential(state: Any, x0: torch.Tensor) -> None:
        pyro.factor("constant", torch.tensor(0.5))

    for shape, plate in BATCHES:
        value = log_potential(Tilted(Chain(plate=plate), potential), {}, batch(shape))
        assert torch.equal(value, torch.full(shape, 0.5, dtype=torch.float64))


def test_nothing_reaches_outer_handlers() -> None:
    model, x0 = RewardTilted(Chain(), total), batch((4,))
    with poutine.trace() as tracer, poutine.scale(scale=7.0), pyro.plate("particles", 4):
        value = log_potential(model, {}, x0)
    assert not [name for name in tracer.trace.nodes if name != "particles"]
    torch.testing.assert_close(value, x0.sum(-1).double())


def test_deterministic_sites_do_not_count() -> None:
    def potential(state: Any, x0: torch.Tensor) -> None:
        pyro.deterministic("mean", x0.mean(-1), event_dim=0)
        pyro.factor("sum", x0.sum(-1))

    x0 = batch((4,))
    value = log_potential(Tilted(Chain(), potential), {}, x0)
    torch.testing.assert_close(value, x0.sum(-1).double())


def test_a_model_without_potential_has_log_potential_zero() -> None:
    assert torch.equal(log_potential(Chain(), {}, batch((4,))), torch.zeros(4).double())


def test_models_of_users_need_only_terminal() -> None:
    class Bare:
        def terminal(self, state: Any, x0: torch.Tensor) -> None:
            pyro.factor("sum", x0.sum(-1))

    torch.testing.assert_close(
        log_potential(Bare(), {}, torch.ones(4, 2)), 2 * torch.ones(4).double()
    )
    with pytest.raises(ValueError, match="attribute `event_shape`"):
        log_potential(Bare(), {}, torch.ones(4, 1, 2))


def test_gradients_flow_to_the_guess() -> None:
    for model in (
        RewardTilted(Chain(), squares, 0.5),
        Tilted(Chain(), lambda state, x0: pyro.factor("f", -0.5 * x0.square().sum(-1))),
    ):
        x0 = batch((4,)).requires_grad_()
        (gradient,) = torch.autograd.grad(log_potential(model, {}, x0).sum(), x0)
        torch.testing.assert_close(gradient, -x0.detach())


@pytest.mark.parametrize(
    ("potential", "message"),
    [
        (lambda s, x: pyro.sample("z", dist.Normal(0.0, 1.0)), "latent site 'z'"),
        (lambda s, x: pyro.factor("f", x.sum(-1) * math.nan), "site 'f' is NaN"),
        (lambda s, x: pyro.factor("f", x.sum(-1) + math.inf), r"site 'f' is \+inf"),
        (lambda s, x: pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(2)), "[Ss]ite '?y"),
        (lambda s, x: pyro.factor("f", x.sum(-1).expand(5, 5)), "site 'f'.*in no plate"),
    ],
)
def test_ill_formed_potentials_are_named(potential: Any, message: str) -> None:
    # Pyro's own validation would notice NaN first, but not say where.
    with pyro.validation_enabled("NaN" not in message):
        with pytest.raises(ValueError, match=message):
            log_potential(Tilted(Chain(), potential), {}, batch((5,)))


def test_one_number_for_several_populations_outside_their_plate_is_refused() -> None:
    class Undeclared(Chain):
        def terminal(self, state: Any, x0: torch.Tensor) -> None:
            pyro.factor("f", x0.sum((-1, -2), keepdim=True)[..., 0])

    with pytest.raises(ValueError, match=r"shape \(5, 1\) for the batch shape \(5, 3\)"):
        log_potential(Undeclared(), {}, batch((5, 3)))


def test_clear_words_without_terminal_or_with_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match="object has no method `terminal`.*RewardTilted"):
        log_potential(object(), {}, batch((5,)))
    with pytest.raises(ValueError, match=r"x0 has shape \(5, 3\).*event_shape \(2,\)"):
        log_potential(Chain(), {}, batch((5,), (3,)))


# The tilted model as a Pyro model


@pytest.mark.parametrize(("shape", "plate"), BATCHES)
def test_the_trace_of_a_trajectory_holds_the_factor(shape: Any, plate: Any) -> None:
    model = RewardTilted(Chain(plate=plate), total, scale=2.0)
    with ExitStack() as stack:
        if len(shape) > (plate is not None):
            stack.enter_context(pyro.plate("particles", shape[0], dim=-len(shape)))
        trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    x0, site = trace.nodes["x_0"]["value"], trace.nodes["reward"]
    assert trace.nodes["_RETURN"]["value"] is x0
    torch.testing.assert_close(site["log_prob"], 2 * x0.sum(-1).double())
    names = {frame.name for frame in site["cond_indep_stack"]}
    assert names == {frame.name for frame in trace.nodes["x_0"]["cond_indep_stack"]}
    assert [name for name in trace.nodes if name.startswith("x_")] == ["x_3", "x_2", "x_1", "x_0"]


def test_only_the_last_step_emits_and_writes() -> None:
    model, state = RewardTilted(Chain(), {"a": total, "b": squares}, {"a": 2.0, "b": 3.0}), {}
    with pyro.plate("particles", 4):
        traces = [poutine.trace(model.init).get_trace(state)]
        for t in model.timesteps:
            assert "a" not in state
            traces.append(poutine.trace(model.step).get_trace(state, t))
    assert ["a" in trace.nodes for trace in traces] == [False, False, False, True]
    torch.testing.assert_close(state["a"], total(state["x"]).double())
    torch.testing.assert_close(state["b"], squares(state["x"]).double())
    assert model.counts == {"denoiser": 12, "reward": 8}


def test_terminal_reads_a_locked_state_and_does_not_write() -> None:
    model, state = RewardTilted(Chain(), total), SMCState(4)
    with state._lock():
        log_potential(model, state, batch((4,)))
    assert not state


@pytest.mark.parametrize("decode", [True, False])
def test_rewards_get_decoded_flat_batches(decode: bool) -> None:
    shapes = []

    class Decoding(Chain):
        def decode(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :1] + 100

    def reward(samples: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(samples.shape))
        return samples.flatten(1)[:, 0]

    model, x0 = RewardTilted(Decoding((3, 2, 2)), reward, decode=decode), batch((4, 5), (3, 2, 2))
    value = model.evaluate(x0)["reward"]
    assert shapes == [(20, 1) if decode else (20, 3, 2, 2)]
    torch.testing.assert_close(value, x0[..., 0, 0, 0].double() + 100 * decode)


def test_everything_else_is_the_base_models() -> None:
    base = Chain()
    model = Tilted(RewardTilted(base, total), lambda state, x0: None)
    assert model.timesteps == base.timesteps and model.event_shape == base.event_shape
    assert model.kernel.__func__ is Chain.kernel and model.plate is None and model.s == base.s
    model.keep_graph = True
    assert base.keep_graph is True and model.keep_graph is True
    with pytest.raises(AttributeError, match="Chain.*no attribute 'colour'"):
        _ = model.colour
    assert "RewardTilted" in repr(model)


def test_tilted_models_can_be_copied_and_pickled() -> None:
    model = RewardTilted(Chain(), Reward(total))
    x0 = batch((3,))
    for clone in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(log_potential(clone, {}, x0), x0.sum(-1).double())


# Exact laws under the stock filter


def run(model: Any, base: Chain, num_particles: int = 20_000, nesting: int = 0) -> SMCFilter:
    smc = SMCFilter(model, Prior(base), num_particles, nesting, ess_threshold=1e-9)
    smc.init()
    for t in model.timesteps:
        smc.step(t)
    return smc


def assert_mean(smc: SMCFilter, values: torch.Tensor, expected: float) -> None:
    """z-test of a self-normalised mean of independent particles; rate 1e-5."""
    weights = smc.state._log_weights.double().softmax(-1)
    mean = (weights * values.double()).sum()
    error = (weights.square() * (values - mean).square()).sum().sqrt().item()
    assert error < 0.05
    assert abs(mean.item() - expected) < Z_MAX * error


def test_a_linear_reward_shifts_the_mean_by_scale_times_variance() -> None:
    base = Chain()
    smc = run(RewardTilted(base, total, scale=0.8), base)
    for coordinate in (0, 1):
        assert_mean(smc, smc.state["x"][:, coordinate], 0.8 * base.end_variance)
        assert_mean(
            smc,
            smc.state["x"][:, coordinate].square(),
            base.end_variance + (0.8 * base.end_variance) ** 2,
        )


def test_several_rewards_multiply() -> None:
    base = Chain()
    model = RewardTilted(base, {"up": total, "small": squares}, {"up": 0.8, "small": 0.5})
    variance = 1 / (1 / base.end_variance + 1.0)
    smc = run(model, base)
    assert_mean(smc, smc.state["x"][:, 0], 0.8 * variance)
    assert_mean(smc, smc.state["x"][:, 1], 0.8 * variance)


def test_an_observation_gives_the_posterior() -> None:
    base, y = Chain(), torch.tensor([1.0, -0.5])

    def likelihood(state: Any, x0: torch.Tensor) -> None:
        pyro.sample("y", dist.Normal(x0, 0.7).to_event(1), obs=y)

    smc = run(Tilted(base, likelihood), base)
    gain = base.end_variance / (base.end_variance + 0.7**2)
    for coordinate in (0, 1):
        assert_mean(smc, smc.state["x"][:, coordinate], gain * y[coordinate].item())


@pytest.mark.parametrize("reward_first", [True, False])
def test_nested_tilts_multiply(reward_first: bool) -> None:
    base, y = Chain((1,)), torch.tensor([1.0])

    def likelihood(state: Any, x0: torch.Tensor) -> None:
        pyro.sample("y", dist.Normal(x0, 0.7).to_event(1), obs=y)

    if reward_first:
        model: Any = Tilted(RewardTilted(base, total, 0.6), likelihood)
    else:
        model = RewardTilted(Tilted(base, likelihood), total, 0.6)
    variance = 1 / (1 / base.end_variance + 1 / 0.7**2)
    smc = run(model, base)
    assert_mean(smc, smc.state["x"][:, 0], variance * (1.0 / 0.7**2 + 0.6))
    # Two of so many float32 numbers may be equal.
    assert "reward" in smc.state and 19_900 < model.counts["reward"] <= 20_000

    x0 = batch((6,), (1,))
    expected = dist.Normal(x0, 0.7).to_event(1).log_prob(y) + 0.6 * x0[:, 0]
    torch.testing.assert_close(log_potential(model, {}, x0), expected.double())


def test_a_plate_of_classes_tilts_each_entry_with_its_own_reward() -> None:
    base = Chain((1,), plate=("classes", 3))
    rewards = [total, lambda x: -total(x), lambda x: torch.zeros(len(x))]
    model = RewardTilted(base, rewards, scale=0.5)
    smc = run(model, base, nesting=1)
    assert smc.state["x"].shape == (20_000, 3, 1) and smc.state["reward"].shape == (20_000, 3)
    for entry, sign in enumerate((1, -1, 0)):
        assert_mean(smc, smc.state["x"][:, entry, 0], 0.5 * sign * base.end_variance)
    assert 59_900 < model.counts["reward"] <= 60_000


def test_the_wrong_mean_is_noticed() -> None:
    base = Chain()
    smc = run(RewardTilted(base, total, scale=0.8), base)
    with pytest.raises(AssertionError):
        assert_mean(smc, smc.state["x"][:, 0], 0.9 * base.end_variance)


@pytest.mark.parametrize("constraint", [False, True])
def test_scale_zero_is_the_base_sampler_bit_for_bit(constraint: bool) -> None:
    def reward(samples: torch.Tensor) -> torch.Tensor:
        return torch.where(samples[:, 0] > 0, 0.0, -math.inf) if constraint else total(samples)

    states = []
    base = Chain()
    for model in (base, RewardTilted(base, reward, scale=0.0)):
        pyro.set_rng_seed(1)
        smc = SMCFilter(model, Prior(base), 50, 0)
        smc.init()
        for t in model.timesteps:
            smc.step(t)
        states.append(smc.state)
    assert torch.equal(states[0]["x"], states[1]["x"])
    assert torch.equal(states[0]._log_weights, states[1]._log_weights)


def test_hard_constraints() -> None:
    base = Chain((1,))
    model = RewardTilted(base, lambda x: torch.where(x[:, 0] > 0, 0.0, -math.inf))
    smc = run(model, base)
    assert_mean(smc, smc.state["x"][:, 0], (2 * base.end_variance / math.pi) ** 0.5)
    assert (log_potential(model, {}, -torch.ones(3, 1)) == -math.inf).all()
    with pytest.raises(SMCFailed):
        run(RewardTilted(base, lambda x: torch.full((len(x),), -math.inf)), base, 10)


def test_resampled_values_stay_with_their_particles() -> None:
    base = Chain()
    model = RewardTilted(base, total, scale=3.0)
    smc = SMCFilter(model, Prior(base), 200, 0, ess_threshold=1.0)
    smc.init()
    for t in model.timesteps:
        smc.step(t)
    assert len(smc.state["x"].unique(dim=0)) < 200
    torch.testing.assert_close(smc.state["reward"], total(smc.state["x"]).double())
    calls = model.counts["reward"]
    model.evaluate(smc.state["x"])
    assert model.counts["reward"] - calls == len(smc.state["x"].unique(dim=0))


# Failing rewards


def test_nan_is_raised_with_the_index_in_the_flat_batch() -> None:
    def reward(samples: torch.Tensor) -> torch.Tensor:
        return torch.where(samples[:, 0] == 7.0, math.nan, samples[:, 0])

    x0 = batch((4, 3))
    x0[2, 1, 0] = 7.0
    model = RewardTilted(Chain(plate=("classes", 3)), reward)
    with pytest.raises(RewardError, match="sample 7 of 12") as caught:
        log_potential(model, {}, x0)
    assert caught.value.index == 7
    model = RewardTilted(Chain(plate=("classes", 3)), [reward, reward, total])
    with pytest.raises(RewardError, match="entry 1.*sample 2 of 4") as caught:
        log_potential(model, {}, x0)
    assert caught.value.index == 7
    known = ~caught.value.values.isnan()
    assert known.nonzero()[:, 0].tolist() == [1, 4, 10]


def test_a_failed_chunk_can_be_retried_without_scoring_the_others_again() -> None:
    fail = [True]

    def reward(samples: torch.Tensor) -> torch.Tensor:
        if fail[0] and (samples[:, 0] == x0[6, 0]).any():
            raise ConnectionError("no answer")
        return total(samples)

    x0 = batch((10,))
    model = RewardTilted(Chain(), Reward(reward, chunk_size=2))
    with pytest.raises(RewardError, match="no answer") as caught:
        log_potential(model, {}, x0)
    assert caught.value.index == 6
    np.testing.assert_allclose(caught.value.values[:6], x0[:6].sum(-1), rtol=1e-6)
    assert model.counts["reward"] == 6
    fail[0] = False
    torch.testing.assert_close(log_potential(model, {}, x0), x0.sum(-1).double())
    assert model.counts["reward"] == 10


def test_a_noisy_reward_is_the_same_in_look_ahead_and_at_the_end() -> None:
    model = RewardTilted(Chain(), Reward(lambda x: torch.randn(len(x)), noisy=True))
    x0 = batch((6,))
    first = log_potential(model, {}, x0)
    assert torch.equal(log_potential(model, {}, x0), first)
    assert torch.equal(model.evaluate(x0)["reward"], first)


# Scales and names


@pytest.mark.parametrize(
    "scale", [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0], [2.0]]), torch.tensor(2.0)]
)
def test_scales_broadcast_over_the_batch(scale: torch.Tensor) -> None:
    x0 = batch((2, 3))
    model = RewardTilted(Chain(plate=("classes", 3)), total, scale)
    torch.testing.assert_close(log_potential(model, {}, x0), (scale * x0.sum(-1)).double())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardTilted(object(), total), "object has no `timesteps`"),
        (lambda: Tilted(Chain(), 3), "potential must be a function"),
        (lambda: RewardTilted(Chain(), {}), "empty dict"),
        (lambda: RewardTilted(Chain(), 3), "a reward is a callable"),
        (lambda: RewardTilted(Chain(), {"a": total}, {"b": 1.0}), r"\['b'\], the rewards \['a'\]"),
        (lambda: RewardTilted(Chain(), total, math.inf), "scale of 'reward' is inf"),
        (lambda: RewardTilted(RewardTilted(Chain(), total), total), "a reward 'reward' already"),
        (lambda: RewardTilted(Tilted(RewardTilted(Chain(), total), print), total), "already"),
        (lambda: RewardTilted(Chain(), {"a": total}, "a"), "where the reward of that name"),
        (
            lambda: RewardTilted(RewardTilted(Chain(), total), {"a": total}, "reward"),
            "where the reward of that name",
        ),
        (lambda: RewardTilted(Chain(), {"x0_hat": total}), "cannot be named 'x0_hat'"),
        (lambda: RewardTilted(Chain(), {"x_0": total}), "cannot be named 'x_0'"),
        (
            lambda: log_potential(RewardTilted(Chain(), [total]), {}, batch((3, 2))),
            "1 rewards, but",
        ),
        (
            lambda: log_potential(RewardTilted(Chain(), total, torch.ones(3)), {}, batch((2,))),
            "scale of 'reward'",
        ),
    ],
)
def test_wrong_use_answers_in_a_sentence(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_negative_scale_makes_no_infinite_weight() -> None:
    model = RewardTilted(Chain(), lambda x: torch.full((len(x),), -math.inf), scale=-1.0)
    with pytest.raises(ValueError, match="'reward' is -inf and its scale negative"):
        log_potential(model, {}, batch((2,)))


def test_a_model_must_say_its_event_shape() -> None:
    chain = Chain()
    del chain.event_shape
    with pytest.raises(ValueError, match="Chain has no `event_shape`"):
        RewardTilted(chain, total)
