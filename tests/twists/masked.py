# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Tilted masked chains, and tests of the law that a twist samples from."""

from __future__ import annotations

from typing import Any

import torch

from pyro_twist.infer import TrustRegionTwist, TwistedSMC
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import (
    DiscountedLookahead,
    HiddenTilt,
    LookaheadTwist,
    TokenSurrogate,
    TokenTilt,
)
from tests.oracles import MaskedChain
from tests.statistics import assert_tilted_mean, assert_unbiased

RUNS = 200
THRESHOLDS = [0.0, 0.5, 1.0]


def chain(**options: Any) -> MaskedChain:
    if options.get("unmasking") != "uniform":
        options.setdefault("num_inference_steps", 3)
    return MaskedChain(**options)


def tilted(one: MaskedChain, reward: Any = None, scale: float = 1.0) -> RewardTilted:
    return RewardTilted(one.diffusion, reward or one.reward, scale, decode=False)


def additive(worth: torch.Tensor) -> Any:
    """A reward that is a sum over tokens, with a number for each or each position and token."""
    worth = torch.atleast_2d(worth)

    def reward(tokens: torch.Tensor) -> torch.Tensor:
        place = torch.arange(tokens.shape[-1]) % len(worth)
        return worth[place, tokens].sum(-1)

    return reward


def populations(model: Any, guide: Any, particles: int = 8, **options: Any) -> Any:
    """Independent runs, as the populations of one."""
    plates = {"max_plate_nesting": 1, "population_plate": "runs"}
    return TwistedSMC(model, guide, particles, seed=1, progress=False, **plates, **options).run()


def assert_law(one: MaskedChain, result: Any) -> None:
    """Z-tests of the normaliser and of all marginals of the tilted law; rate 2e-5 for all."""
    assert_unbiased(result.log_normalizer, one.log_normalizer)
    weights = torch.softmax(result.log_weights, 0)
    sequences = torch.tensor(one.sequences)
    for position in range(one.length):
        for token in range(one.vocab_size):
            expected = float(one.tilted[sequences[:, position] == token].sum())
            hits = (result.state["x"][..., position] == token).double()
            if expected == 0:
                assert not hits.any()
            else:
                means = (weights * hits).sum(0)
                assert_tilted_mean(result.log_normalizer, means, one.log_normalizer, expected)


def recorded(model: Any, guide: Any, particles: int = 200, **options: Any) -> TrustRegionTwist:
    """A pass, recorded."""
    smc = TrustRegionTwist(model, guide, particles, seed=0, progress=False, **options)
    smc.sample()
    return smc


def _random(*size: int, scale: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return scale * torch.randn(size, generator=generator, dtype=torch.float64)


def wrong_token_tilt(model: Any, **options: Any) -> TokenTilt:
    twist = TokenTilt(model, **options)
    twist.theta.data = _random(*twist.theta.shape)
    return twist


def wrong_surrogate(model: Any, **options: Any) -> TokenSurrogate:
    twist = TokenSurrogate(model, knots=2, **options)
    twist.theta.data, twist.beta = torch.tensor([0.4, 1.2]).double(), _random(1, model.vocab_size)
    return twist


def wrong_hidden_tilt(model: Any) -> HiddenTilt:
    twist = HiddenTilt(model, rank=2)
    twist.centre, twist.directions = _random(model.vocab_size), _random(model.vocab_size, 2)
    twist.theta.data = 0.5 * _random(3, 2)
    return twist


def _under(model: Any, completions: int) -> Any:
    part = wrong_token_tilt(model, per="position")
    return LookaheadTwist(model, under=part, completions=completions) + part


def _calibrated(model: Any) -> Any:
    part = wrong_surrogate(model)
    return DiscountedLookahead(model, completions=2, under=part) + part


#: Twists with parameters that no fit would find.
WRONG = {
    "token": wrong_token_tilt,
    "position": lambda model: wrong_token_tilt(model, per="position"),
    "token, value": lambda model: wrong_token_tilt(model, value=True),
    "surrogate": wrong_surrogate,
    "surrogate, value": lambda model: wrong_surrogate(model, value=True),
    "hidden": wrong_hidden_tilt,
    "look-ahead": lambda model: LookaheadTwist(model),
    "look-ahead, 4": lambda model: LookaheadTwist(model, completions=4),
    "look-ahead, argmax": lambda model: LookaheadTwist(model, completions="argmax"),
    "look-ahead, max": lambda model: LookaheadTwist(model, "max", completions=2),
    "discounted": lambda model: DiscountedLookahead(model, completions=3),
    "discounted + token": lambda model: DiscountedLookahead(model) + wrong_token_tilt(model),
    "look-ahead + hidden": lambda model: LookaheadTwist(model) + wrong_hidden_tilt(model),
    "under": lambda model: _under(model, 1),
    "under, 4": lambda model: _under(model, 4),
    "under, discounted": _calibrated,
}
