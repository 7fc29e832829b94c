# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""How far look-aheads of masked models are trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_twist.infer import TrustRegionTwist, TwistedSMC
from pyro_twist.infer.trustregiontwist import default_twist
from pyro_twist.twists import (
    CalibratedLookahead,
    DiscountedLookahead,
    LearnedTwist,
    TokenTilt,
)
from tests.twists.masked import additive, chain, tilted

STEPS = 6
SIGNS = torch.tensor([1.0, -1.0, 0.0, 0.0]).double()


def uniform(reward: Any, scale: float = 0.2) -> Any:
    """Three positions with two equally likely tokens, so that all shares are known."""
    one = chain(num_inference_steps=STEPS, forbidden_token_ids=(2,))
    one.table = torch.zeros(4).expand(one.size, 3, 4)
    return tilted(one, reward, scale)


def parity(x: torch.Tensor) -> torch.Tensor:
    """The product of the signs of all tokens: nothing is known until all are."""
    return SIGNS[x].prod(1)


def fitted(model: Any, twist: LearnedTwist, particles: int = 3000) -> TrustRegionTwist:
    smc = TrustRegionTwist(model, twist, particles, seed=0, ess_threshold=0.0, progress=False)
    return smc.fit(1)


def test_before_learning() -> None:
    """The power of the share that is known, and the reliability of a mean."""
    model = uniform(additive(SIGNS))
    share = torch.arange(STEPS, -1, -1).double() / STEPS
    assert torch.allclose(DiscountedLookahead(model).slopes, share**1.5, atol=1e-6)
    twist = DiscountedLookahead(model, completions=4, exponent=1.0)
    assert torch.allclose(twist.slopes, 4 * share / (1 + 3 * share), atol=1e-6)
    twist = DiscountedLookahead(model, completions="argmax")
    assert torch.allclose(twist.slopes, share**1.2, atol=1e-6)


@pytest.mark.parametrize("completions", [1, 4])
def test_a_sum_over_tokens_has_the_exponent_one(completions: int) -> None:
    """Within 0.1, five times the standard deviation over seeds."""
    model = uniform(additive(SIGNS))
    twist = DiscountedLookahead(model, completions=completions)
    fitted(model, twist)
    assert float(twist.exponent) == pytest.approx(1.0, abs=0.1)


def test_a_reward_of_all_tokens_has_their_number() -> None:
    """The grid of exponents ends at three."""
    model = uniform(parity)
    twist = DiscountedLookahead(model)
    fitted(model, twist)
    assert 2.6 < float(twist.exponent) <= 3.0


def test_calibrated_slopes_are_the_share_that_is_known() -> None:
    model = uniform(additive(SIGNS))
    twist = CalibratedLookahead(model)
    fitted(model, twist)
    share = torch.arange(STEPS, -1, -1).double() / STEPS
    assert (twist.slopes - share)[1:].abs().max() < 0.1


def test_resampling_does_not_matter() -> None:
    """
    Weights go back to the law that paths were drawn from: the mean of four seeds, whose standard
    deviation is 0.055, is near 1. Without them it is 1.5.
    """
    model = uniform(additive(SIGNS), scale=1.0)
    found = []
    for seed in range(4):
        twist = DiscountedLookahead(model)
        smc = TrustRegionTwist(model, twist, 3000, seed=seed, ess_threshold=1.0, progress=False)
        smc.fit(1)
        found.append(float(twist.exponent))
    assert sum(found) / 4 == pytest.approx(1.0, abs=0.25)


def test_prompts_of_different_lengths_have_slopes_of_their_own(tmp_path: Path) -> None:
    """Groups: what is known depends on how much was free."""
    prompt = torch.tensor([[3, 3, 3], [0, 3, 3]])
    one = chain(unmasking="uniform", prompt=prompt, plate=("runs", 2))
    model = tilted(one, additive(SIGNS))
    twist = DiscountedLookahead(model, exponent=1.0)
    shares = torch.tensor([[1.0, 1.0], [2 / 3, 1.0], [1 / 3, 1 / 2], [0.0, 0.0]]).double()
    assert torch.allclose(twist.slopes, shares, atol=1e-6)
    smc = TwistedSMC(
        model, twist, 8, max_plate_nesting=1, population_plate="runs", seed=0, progress=False
    )
    smc.init()
    smc.step(3)
    looks = smc.state["lookahead"]
    expected = looks * torch.tensor([1 / 3, 1 / 2]).double()
    assert torch.allclose(smc.state["lookahead_log_twist"], expected, atol=1e-6)
    plates: dict[str, Any] = {"max_plate_nesting": 1, "population_plate": "runs"}
    fit = TrustRegionTwist(model, twist, 500, seed=0, progress=False, **plates).fit(1)
    fitted_slopes = shares ** float(twist.exponent)
    assert torch.allclose(fit.guide.slopes, fitted_slopes, atol=1e-6) and twist.exponent != 1
    # the exponent is good for other prompts
    twist.save(tmp_path / "twist.safetensors")
    other = tilted(chain(unmasking="uniform"), additive(SIGNS))
    loaded = DiscountedLookahead(other).load(tmp_path / "twist.safetensors")
    assert torch.allclose(loaded.slopes, fitted_slopes[:, 0], atol=1e-6)


def test_few_data_leave_the_prior() -> None:
    model = uniform(additive(SIGNS))
    twist = DiscountedLookahead(model)
    fitted(model, twist, particles=1)
    assert float(twist.exponent) == pytest.approx(1.5, abs=0.01)


def test_nothing_is_left_under_the_optimal_tilt() -> None:
    model = uniform(additive(SIGNS), scale=1.0)
    tilt = TokenTilt(model)
    tilt.theta.data[0] = SIGNS
    twist = DiscountedLookahead(model, under=tilt)
    smc = TrustRegionTwist(model, twist + tilt, 50, seed=0, progress=False)
    smc.sample()
    one = smc.passes[0]
    for t, guess, _ in twist._lineage_looks(one):
        assert guess.abs().max() < 1e-12 and twist._end(one, t).abs().max() < 1e-12
    twist.observe([one])
    assert float(twist.exponent) == pytest.approx(1.5, abs=0.01)


def test_the_default_twist() -> None:
    parts = default_twist(uniform(additive(SIGNS))).parts()
    assert [type(part) for part in parts] == [DiscountedLookahead, TokenTilt]


def test_the_state_dict_has_the_tilt_once() -> None:
    model = uniform(additive(SIGNS))
    tilt = TokenTilt(model)
    ladder = DiscountedLookahead(model, under=tilt)
    assert not [name for name in ladder.state_dict() if "theta" in name]
    assert len([name for name in (ladder + tilt).state_dict() if "theta" in name]) == 1
    result = TwistedSMC(model, ladder + tilt, 8, seed=0, progress=False).run()
    plain = TwistedSMC(model, DiscountedLookahead(model), 8, seed=0, progress=False).run()
    assert torch.equal(result.state["x"], plain.state["x"])
