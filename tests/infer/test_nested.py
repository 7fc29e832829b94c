# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Nested SMC and children: exact for any number of children, scheme and threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
