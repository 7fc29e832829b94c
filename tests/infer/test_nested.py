# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Nested SMC and children: exact for any number of children, scheme and threshold."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine

from pyro_twist.infer import NestedSMC, TwistedSMC
from pyro_twist.infer.nested import draw_within
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import ChildrenTwist, LookaheadTwist
from tests.oracles import ExactTwist, LinearGaussianChain, MaskedChain
from tests.statistics import assert_frequencies, assert_tilted_mean, assert_unbiased

REPLICATES = 3000


def run(model: Any, guide: Any, **options: Any) -> Any:
    given = {"num_particles": 8, "max_plate_nesting": 1, "population_plate": "replicates"}
    return NestedSMC(model, guide, **{**given, "seed": 0, "progress": False, **options}).run()


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("children", [1, 4, 8])
def test_law_and_normalizer(adapted: bool, threshold: float, children: int) -> None:
    """z-tests, rate 1e-6 each; the mean of the children's weights is what makes them pass."""
    model = LinearGaussianChain(replicates=REPLICATES)
    options = {"num_children": children, "fully_adapted": adapted, "ess_threshold": threshold}
    result = run(model, LookaheadTwist(model), **options)
    assert_unbiased(result.log_normalizer, model.log_normalizer)
    assert_tilted_mean(
        result.log_normalizer, result.expectation("x"), model.log_normalizer, model.tilted_mean
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_many_parents_that_are_resampled_a_lot(adapted: bool) -> None:
    """The child of a copy is one of its own parent's, by its weight; rate 1e-6 each."""
    model = LinearGaussianChain(replicates=REPLICATES, k=0.7)
    options = {"num_children": 2, "fully_adapted": adapted, "ess_threshold": 1.0}
    options |= {"num_particles": 16, "resampling": "multinomial"}
    result = run(model, LookaheadTwist(model), **options)
    assert_unbiased(result.log_normalizer, model.log_normalizer)
    assert_tilted_mean(
        result.log_normalizer, result.expectation("x"), model.log_normalizer, model.tilted_mean
    )


def test_leaving_the_mean_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children chosen without a weight for their parent: what the tests above must not pass."""
    model = LinearGaussianChain(replicates=REPLICATES)
    monkeypatch.setattr(
        "pyro_twist.infer.nested.draw_within", lambda rows, generator: rows.argmax(1)
    )
    result = run(model, LookaheadTwist(model), ess_threshold=0.0)
    with pytest.raises(AssertionError):
        assert_tilted_mean(
            result.log_normalizer, result.expectation("x"), model.log_normalizer, model.tilted_mean
        )


@pytest.mark.parametrize("options", [{"resampling": "none"}, {"resample_at": [6]}])
def test_parents_are_kept_where_nothing_is_resampled(options: dict[str, Any]) -> None:
    """Children are chosen all the same, and the normaliser is right; rate 1e-6."""
    model = LinearGaussianChain(num_steps=6, replicates=REPLICATES)
    result = run(model, LookaheadTwist(model), ess_threshold=1.0, **options)
    assert_unbiased(result.log_normalizer, model.log_normalizer)
    resampled = result.diagnostics.resampled
    assert not resampled[1:].any()
    parents = result.diagnostics.ancestors[1:-1] // 4
    assert (parents == torch.arange(2).repeat_interleave(4)[:, None]).all()


def test_a_parent_whose_children_are_all_impossible() -> None:
    """It has no weight from then on, and the normaliser is right; rate 1e-6."""

    class Narrow(LinearGaussianChain):
        def step(self, state: Any, t: int) -> None:
            super().step(state, t)
            if t == 3:
                with poutine.block():
                    plate = pyro.plate("replicates", REPLICATES, dim=-1)
                with plate:
                    pyro.factor("above", torch.where(state["x"] > 0, 0.0, -torch.inf))

    for adapted in (False, True):
        for threshold in (0.0, 1.0):
            model = Narrow(num_steps=4, k=0.0, replicates=REPLICATES)
            options = {"fully_adapted": adapted, "ess_threshold": threshold, "num_particles": 32}
            result = run(model, None, num_children=2, **options)
            assert_unbiased(result.log_normalizer, math.log(0.5))


@pytest.mark.parametrize("adapted", [False, True])
def test_adapted_copies_of_a_parent_may_part(adapted: bool) -> None:
    model = LinearGaussianChain(num_steps=4, replicates=200)
    options = {"num_children": 2, "fully_adapted": adapted, "ess_threshold": 1.0}
    ancestors = run(model, LookaheadTwist(model), **options).diagnostics.ancestors[0]
    same_parent = ancestors[::2].diff(dim=0) // 2 == 0
    apart = (ancestors[::2].diff(dim=0) == 1) & (ancestors[:-2:2] % 2 == 0)
    assert same_parent.any() and apart.any() == adapted


def test_exact_twist_has_no_variance() -> None:
    model = LinearGaussianChain(replicates=5)
    result = run(model, ExactTwist(model))
    assert float((result.log_normalizer - model.log_normalizer).abs().max()) < 1e-5


@pytest.mark.parametrize("looking", [False, True])
@pytest.mark.parametrize("unmasking", [{"num_inference_steps": 3}, {"unmasking": "uniform"}])
def test_children_of_one_evaluation(looking: bool, unmasking: dict[str, Any]) -> None:
    """On the enumerable chain: normaliser at rate 1e-6, the law of x_0 by its mean reward."""
    chain = MaskedChain(plate=("replicates", 2 * REPLICATES), **unmasking)
    model = RewardTilted(chain.diffusion, chain.reward, decode=False)
    guide: Any = ChildrenTwist(model)
    guide = LookaheadTwist(model) + guide if looking else guide
    result = TwistedSMC(model, guide, 4, 1, population_plate="replicates", seed=3).run()
    assert_unbiased(result.log_normalizer, chain.log_normalizer)
    expected = float((chain.tilted * chain.rewards).sum())
    means = result.expectation("reward")
    assert_tilted_mean(result.log_normalizer, means, chain.log_normalizer, expected)


def test_children_cost_no_evaluation_of_the_network() -> None:
    chain = MaskedChain(unmasking="uniform")
    model = RewardTilted(chain.diffusion, chain.reward, decode=False)
    plain = TwistedSMC(model, None, 6, seed=0).run().counts["denoiser"]
    assert TwistedSMC(model, ChildrenTwist(model), 6, seed=0).run().counts["denoiser"] <= plain


def test_draws_within_groups() -> None:
    """Chi-square, rate 1e-6; a group of weight zero is drawn from evenly."""
    probs = torch.tensor([0.0, 0.2, 0.5, 0.3], dtype=torch.float64)
    rows = probs.log().expand(20_000, 4)
    drawn = draw_within(rows, torch.Generator().manual_seed(0))
    assert_frequencies(torch.bincount(drawn, minlength=4), probs)
    dead = draw_within(torch.full((4000, 2), -torch.inf), torch.Generator().manual_seed(1))
    assert_frequencies(torch.bincount(dead, minlength=2), torch.full((2,), 0.5).double())


@pytest.mark.parametrize("children", [3, 0, 2.0, True])
def test_numbers_of_children(children: Any) -> None:
    with pytest.raises(ValueError, match="num_children"):
        NestedSMC(LinearGaussianChain(), None, 8, num_children=children)


def test_children_are_for_masked_models() -> None:
    model = LinearGaussianChain()
    with pytest.raises(ValueError, match="mask_token_id"):
        ChildrenTwist(model)
