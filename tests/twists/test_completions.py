# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any

import pyro
import pytest
import torch

from pyro_twist.infer import TrustRegionTwist, TwistedSMC
from pyro_twist.rewards import RewardTilted, Tilted
from pyro_twist.twists import DiscountedLookahead, HiddenTilt, LookaheadTwist, TokenTilt
from pyro_twist.twists.completions import draw_uniforms, score_completions
from pyro_twist.wrapper import ModelWrapper
from tests.oracles import LinearGaussianChain, MaskedChain
from tests.statistics import assert_mean
from tests.twists.masked import (
    RUNS,
    THRESHOLDS,
    WRONG,
    additive,
    assert_law,
    chain,
    populations,
    tilted,
)

LADDERS = [1, 4, "argmax"]
KERNELS: dict[str, dict[str, Any]] = {
    "groups": {"unmasking": "uniform"},
    "remasking": {"remasking": ("rescaled", 0.5)},
    "prompt": {"prompt": torch.tensor([3, 1, 3])},
    "forbidden": {"forbidden_token_ids": (0,)},
}


# often resampled or never: those that differ most in what they do
EXTREMES = ["position", "look-ahead, 4", "under", "under, discounted"]


@pytest.mark.parametrize(
    ("twist", "threshold"),
    [(twist, 0.5) for twist in WRONG] + [(twist, t) for twist in EXTREMES for t in (0.0, 1.0)],
)
def test_every_twist_samples_the_tilted_law(twist: str, threshold: float) -> None:
    one = chain(plate=("runs", RUNS))
    model = tilted(one)
    assert_law(one, populations(model, WRONG[twist](model), 40, ess_threshold=threshold))


@pytest.mark.parametrize("twist", ["under, discounted", "look-ahead + hidden"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_with_every_kernel(kernel: str, twist: str) -> None:
    one = chain(plate=("runs", RUNS), **KERNELS[kernel])
    model = tilted(one)
    assert_law(one, populations(model, WRONG[twist](model), 40))


@pytest.mark.parametrize("completions", LADDERS)
def test_a_constant_reward_leaves_the_base_sampler(completions: Any) -> None:
    """Bit for bit: completions take no numbers from the stream of the run."""
    one = chain()
    model = tilted(one, lambda x: torch.full(x.shape[:1], 0.7))
    twist = LookaheadTwist(model, completions=completions)
    ours = TwistedSMC(model, twist, 20, seed=0, ess_threshold=1.0, progress=False).run()
    plain = TwistedSMC(one.diffusion, None, 20, seed=0, ess_threshold=1.0, progress=False).run()
    assert torch.equal(ours.state["x"], plain.state["x"])
    assert float(ours.log_normalizer) == pytest.approx(0.7)


def test_the_look_ahead_is_unbiased() -> None:
    """The mean of its exp is that of the factor under the completion's law, at J = 1 and 3."""
    one = chain()
    model = tilted(one)
    probs = one.token_probs(one.size - 1)
    joint = torch.einsum("i,j,k->ijk", *probs).flatten()
    expected = float(joint @ one.rewards.exp())
    for completions in (1, 3):
        smc = TwistedSMC(
            model, LookaheadTwist(model, completions=completions), 20000, seed=0, progress=False
        )
        smc.init()
        assert_mean(smc.state["lookahead"].exp(), expected, max_relative_sd=0.02)


def test_under_a_tilt_it_is_unbiased_too() -> None:
    one = chain()
    model = tilted(one)
    joint = torch.einsum("i,j,k->ijk", *one.token_probs(one.size - 1)).flatten()
    twist = WRONG["under, 4"](model)
    smc = TwistedSMC(model, twist, 20000, seed=0, ess_threshold=0.0, progress=False)
    smc.init()
    expected = float(joint @ one.rewards.exp())
    value = twist.parts()[0].log_twist(smc.state)
    assert_mean(value.exp(), expected, max_relative_sd=0.02)


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"schedule": [2]}])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("completions", [1, 4])
def test_zero_variance_under_the_optimal_tilt(
    completions: int, threshold: float, options: dict[str, Any]
) -> None:
    """Also between looks: what the tilt explains is that of the state at every step."""
    one = chain(product=True)
    worth = torch.tensor([0.5, -1.0, 2.0, 0.0]).double()
    model = tilted(one, additive(worth))
    part = TokenTilt(model)
    part.theta.data[0] = worth
    for look in (LookaheadTwist, DiscountedLookahead):
        twist = look(model, completions=completions, under=part, **options) + part
        smc = TwistedSMC(model, twist, 20, seed=0, ess_threshold=threshold, progress=False)
        result = smc.run()
        assert float(result.log_weights.std()) < 1e-12
        assert result.diagnostics is not None
        assert all(float(ess) > 20 - 1e-6 for ess in result.diagnostics.ess)


def test_uniforms_follow_their_particle() -> None:
    one = chain(num_inference_steps=6)
    model = tilted(one, scale=3.0)
    twist = LookaheadTwist(model, completions=2)
    smc = TwistedSMC(model, twist, 30, seed=0, ess_threshold=1.0, progress=False)
    smc.init()
    before = smc.state["lookahead_uniforms"]
    assert before.shape == (30, 2, 3) and before.dtype == torch.float64
    for t in model.timesteps[:-1]:
        smc.step(t)
        now = smc.state["lookahead_uniforms"]
        assert all((row == before).flatten(1).all(1).any() for row in now)
        again = model.complete(smc.state, now.movedim(-2, 0)).movedim(0, -2)
        assert torch.equal(again, smc.state["lookahead_completions"])
        values = model.evaluate(again[:, 0])["reward"] * 3.0
        assert torch.allclose(smc.state["lookahead_potentials"][:, 0], values)


def test_the_stream_is_left_alone() -> None:
    torch.manual_seed(3)
    first = draw_uniforms((1000,), torch.device("cpu"))
    after = torch.rand(1000)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1000), after)
    second = draw_uniforms((1000,), torch.device("cpu"))
    assert first.min() >= 0 and first.max() < 1
    correlations = torch.corrcoef(torch.stack([first, after.double(), second]))
    assert correlations.triu(1).abs().max() < 5 / math.sqrt(1000)


def test_two_look_aheads_have_numbers_of_their_own() -> None:
    model = tilted(chain())
    twist = LookaheadTwist(model, key="a") + LookaheadTwist(model, key="b")
    smc = TwistedSMC(model, twist, 400, seed=3, ess_threshold=0.0, progress=False)
    smc.init()
    both = torch.stack([smc.state[f"{key}_uniforms"].flatten() for key in "ab"])
    assert both[0].unique().numel() == both[0].numel()
    assert torch.corrcoef(both)[0, 1].abs() < 5 / math.sqrt(both.shape[1])
    again = TwistedSMC(model, twist, 400, seed=3, ess_threshold=0.0, progress=False)
    again.init()
    assert torch.equal(again.state["b_uniforms"], smc.state["b_uniforms"])


class Counting:
    """A potential that notes what it is asked for."""

    timesteps = (1,)
    event_shape = (2,)

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def terminal(self, state: Any, x0: torch.Tensor) -> None:
        self.asked.append(x0.tolist())
        pyro.factor("worth", x0.sum(-1).double())


def test_what_is_known_is_not_scored_again() -> None:
    model = Counting()
    tokens = torch.tensor([[[0, 1], [0, 1]], [[2, 2], [3, 0]]])
    values = score_completions(model, {}, tokens)
    assert values.tolist() == [[1.0, 1.0], [4.0, 3.0]]
    # the second completion of the first particle is known: a copy of the other takes its place
    assert model.asked == [[[0, 1], [2, 2]], [[3, 0], [3, 0]]]
    model.asked.clear()
    moved = torch.tensor([[[0, 1], [3, 3]], [[3, 0], [2, 2]]])
    values = score_completions(model, {}, moved, (tokens, torch.tensor([[7.0, 7.0], [8.0, 9.0]])))
    assert values.tolist() == [[7.0, 6.0], [9.0, 8.0]]
    assert model.asked == [[[3, 3], [3, 3]]]


def test_entries_with_nothing_new_are_not_scored_again() -> None:
    """One new completion among two particles of three prompts is one to be scored."""
    one = chain(plate=("runs", 3))
    model = tilted(one)
    tokens = torch.tensor([[[0, 0, 0], [1, 1, 1], [2, 2, 2]], [[0, 0, 1], [1, 1, 2], [2, 2, 0]]])
    known = (tokens[..., None, :], one.reward(tokens)[..., None])
    moved = tokens.clone()
    moved[0, 1] = torch.tensor([2, 1, 0])
    values = score_completions(model, {}, moved[..., None, :], known)
    assert torch.equal(values[..., 0], one.reward(moved))
    assert model.counts["reward"] == 1


def test_copies_are_counted_once() -> None:
    """A denoiser that is sure leaves one completion, which is scored once in the whole run."""
    one = chain(num_inference_steps=8)
    one.table = torch.zeros(4).index_fill(0, torch.tensor([1]), 1e6).expand(one.size, 3, 4)
    model = tilted(one)
    TwistedSMC(model, LookaheadTwist(model, completions=3), 10, seed=0, progress=False).run()
    assert model.counts["reward"] == 2  # and once at the end


@pytest.mark.parametrize("particles", [1, 2, 4])
@pytest.mark.parametrize("completions", LADDERS)
def test_hard_constraints(completions: Any, particles: int) -> None:
    one = chain(num_inference_steps=5)
    model = tilted(one, lambda x: torch.where(x[:, 0] == 0, -math.inf, 0.0))
    twist = LookaheadTwist(model, completions=completions)
    smc = TwistedSMC(model, twist, particles, seed=2, progress=False)
    result = smc.run()
    alive = result.log_weights > -math.inf
    assert alive.any() and (result.state["x"][alive, 0] != 0).all()


def test_two_tokens_and_one_position() -> None:
    one = MaskedChain(1, 2, 1, num_inference_steps=2)
    model = tilted(one)
    for completions in LADDERS:
        twist = LookaheadTwist(model, completions=completions)
        result = TwistedSMC(model, twist, 3, seed=0, progress=False).run()
        assert float(result.log_normalizer) == pytest.approx(one.log_normalizer)


def test_models_with_predictions_do_without() -> None:
    model = LinearGaussianChain(3)
    twist = LookaheadTwist(model)
    assert twist.completions is None
    assert twist.state_keys() == ("lookahead", "lookahead_time", "lookahead_log_twist")


def test_errors() -> None:
    model = tilted(chain())
    with pytest.raises(ValueError, match="completions=2, but LinearGaussianChain has no method"):
        LookaheadTwist(LinearGaussianChain(3), completions=2)
    for wrong in (0, "mean", True):
        with pytest.raises(ValueError, match=f"completions={wrong!r}; give a number"):
            LookaheadTwist(model, completions=wrong)
    with pytest.raises(ValueError, match="under=TokenTilt is for sampled completions"):
        LookaheadTwist(model, completions="argmax", under=TokenTilt(model))
    with pytest.raises(ValueError, match="potential='max'"):
        LookaheadTwist(model, "max", under=TokenTilt(model))
    with pytest.raises(ValueError, match="under=3 has no method `eta"):
        LookaheadTwist(model, under=3)
    with pytest.raises(ValueError, match="under=HiddenTilt has no method `eta"):
        LookaheadTwist(model, under=HiddenTilt(model))
    with pytest.raises(ValueError, match="under=TokenTilt has value=True, but the look-ahead"):
        LookaheadTwist(model, under=TokenTilt(model, value=True))
    other = TokenTilt(tilted(MaskedChain(3, 5, num_inference_steps=2)))
    with pytest.raises(ValueError, match="for a model of 5 tokens, this one has 4"):
        LookaheadTwist(model, under=other)
    assert isinstance(model, RewardTilted) and isinstance(model, Tilted)


WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"floor": -1}, "floor=-1; give a finite number of nats, 0 or more"),
    ({"floor": math.nan}, "floor=nan"),
    ({"floor": "3"}, "floor='3'"),
    ({"every": 1.5}, "every=1.5; give a whole number"),
    ({"schedule": []}, r"schedule=\[\]; give a collection of at least one state"),
    ({"schedule": 2}, "schedule=2; give a collection"),
    ({"schedule": [1], "every": 2}, r"every=2 and schedule=\[1\] are alternatives"),
]


@pytest.mark.parametrize("options, message", WRONG_OPTIONS)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LookaheadTwist(tilted(chain()), **options)


@pytest.mark.parametrize("twist", [LookaheadTwist, DiscountedLookahead, TrustRegionTwist])
def test_models_without_a_reward_are_refused(twist: Any) -> None:
    with pytest.raises(ValueError, match="MaskedDiffusion has no reward or other terminal"):
        twist(chain().diffusion)
    # a wrapper does not make one either
    with pytest.raises(ValueError, match="has no reward or other terminal"):
        twist(ModelWrapper(chain().diffusion))


def test_slopes_are_for_differences() -> None:
    with pytest.raises(ValueError, match="potential='max' is for LookaheadTwist"):
        DiscountedLookahead(tilted(chain()), potential="max")
