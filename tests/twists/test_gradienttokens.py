# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""First-order token proposals, against the exact law of an enumerable chain."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_twist.infer import TwistedSMC
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import LookaheadTwist
from pyro_twist.twists.gradienttokens import GradientTokenTwist, relaxed_tokens
from tests.infer.test_masked_smc import KINDS, check
from tests.oracles import MaskedChain
from tests.statistics import assert_unbiased
from tests.twists.steering import vectors

PLATE = ("replicates", 600)


def relaxed(chain: MaskedChain) -> Callable[[Tensor], Tensor]:
    """The mean reward of tokens that are independent of each other, linear in each position."""
    table = chain.rewards.reshape((chain.vocab_size,) * 3).float()
    return lambda p: torch.einsum("bi,bj,bk,ijk->b", p[:, 0], p[:, 1], p[:, 2], table)


def make(kind: str = "ancestral", **options: Any) -> tuple[MaskedChain, RewardTilted]:
    chain = MaskedChain(plate=PLATE, **KINDS[kind], **options)
    return chain, RewardTilted(chain.diffusion, chain.reward)


def run(model: Any, twist: Any, particles: int = 16, **options: Any) -> Any:
    smc = TwistedSMC(model, twist, particles, 1, population_plate=PLATE[0], seed=0, **options)
    return smc.run()


@pytest.mark.parametrize("looking", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tilted_law(kind: str, looking: bool) -> None:
    """The exact law; rate 1e-5 for each of eight."""
    chain, model = make(kind)
    twist: Any = GradientTokenTwist(model, relaxed(chain), strength=0.8)
    twist = LookaheadTwist(model) + twist if looking else twist
    check(chain, run(model, twist))


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_tilted_law_at_thresholds(threshold: float) -> None:
    chain, model = make()
    twist = LookaheadTwist(model) + GradientTokenTwist(model, relaxed(chain), cap=0.5)
    check(chain, run(model, twist, ess_threshold=threshold))


def test_one_particle() -> None:
    chain, model = make()
    result = run(model, GradientTokenTwist(model, relaxed(chain)), 1)
    assert_unbiased(result.log_normalizer, chain.log_normalizer)


@pytest.mark.parametrize("kind", ["ancestral", "group", "prompt"])
def test_optimal_for_additive_rewards(kind: str) -> None:
    """Independent tokens and a sum over positions: the first order is all there is."""
    chain = MaskedChain(product=True, plate=PLATE, **KINDS[kind])
    worth = torch.tensor([[0.6, -0.5, 0.2, 0.0], [0.0, 0.9, -0.3, 0.0], [0.3, 0.3, -1.0, 0.0]])
    model = RewardTilted(chain.diffusion, lambda x: worth.double()[torch.arange(3), x].sum(-1))
    twist = GradientTokenTwist(model, lambda probs: (probs * worth).sum((1, 2)))
    log_z = run(model, twist, 2, ess_threshold=0.0).log_normalizer
    probs = chain.token_probs(0)
    for position, token in enumerate(chain.options.get("prompt", [3, 3, 3])):
        if token != 3:
            probs[position] = torch.nn.functional.one_hot(torch.as_tensor(token), 4)
    exact = float((probs * worth.double().exp()).sum(-1).log().sum())
    assert log_z.std() < 1e-5 and float(log_z[0]) == pytest.approx(exact, abs=1e-5)
    assert run(model, None, 2, ess_threshold=0.0).log_normalizer.std() > 0.3


def test_dropping_the_ratio_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, model = make()
    twist = GradientTokenTwist(model, relaxed(chain))
    monkeypatch.setattr(
        "pyro_twist.infer.increments.log_ratio", lambda p, q, x: torch.zeros(x.shape[:-1]).double()
    )
    with pytest.raises(AssertionError):
        check(chain, run(model, twist))


def test_tilt_by_summing_over_all_sequences() -> None:
    """The gradient at a token is the mean reward given it, less the mean reward."""
    chain = MaskedChain(num_inference_steps=3)
    model = RewardTilted(chain.diffusion, chain.reward)
    twist = GradientTokenTwist(model, relaxed(chain))
    tokens = torch.tensor([[3, 3, 3], [1, 3, 0], [3, 2, 3]])
    kernel = chain.diffusion.kernel({"x": tokens, "logits": chain.denoiser(tokens)}, 2)
    found = twist.eta(kernel)
    for row, start in enumerate(tokens.tolist()):
        probs = chain.token_probs(int(chain.index(tokens[row])))
        laws = [
            probs[i] if token == 3 else torch.eye(4)[token].double()
            for i, token in enumerate(start)
        ]
        for position in range(3):
            if start[position] != 3:
                assert (found[row, position] == 0).all()
                continue
            given = torch.zeros(4).double()
            for values in itertools.product(range(4), repeat=3):
                others = [laws[i][values[i]] for i in range(3) if i != position]
                weight = torch.stack(others).prod()
                given[values[position]] += weight * chain.reward(torch.tensor(values))
            expected = given - (laws[position] * given).sum()
            assert torch.allclose(found[row, position].double(), expected, atol=1e-5)


def test_the_relaxed_prediction() -> None:
    chain = MaskedChain(num_inference_steps=3, forbidden_token_ids=(1,))
    tokens = torch.tensor([[[3, 2, 3]], [[0, 2, 3]]])
    kernel = chain.diffusion.kernel({"x": tokens, "logits": chain.denoiser(tokens)}, 2)
    probs = relaxed_tokens(kernel)
    assert probs.shape == (2, 1, 3, 4)
    assert torch.allclose(probs.sum(-1), torch.ones(2, 1, 3))
    assert torch.equal(probs[0, 0, 1], torch.tensor([0.0, 0.0, 1.0, 0.0]))
    exact = chain.token_probs(int(chain.index(tokens[0, 0])))[0]
    assert torch.allclose(probs[0, 0, 0].double(), exact, atol=1e-6)
    assert (probs[..., [1, 3]] == 0).all()


def test_the_sum_takes_the_gradient_at_the_models_own_prediction() -> None:
    """Another tilt that comes first does not bear on where the gradient is taken."""
    chain, model = make()
    first, second = (GradientTokenTwist(model, relaxed(chain)) for _ in range(2))
    kernel = chain.diffusion.kernel(
        {"x": torch.full((2, 3), 3), "logits": chain.denoiser(torch.full((2, 3), 3))}, 3
    )
    both = first + second
    both.stepping, both.args_kwargs = True, (({}, 3), {})
    assert torch.allclose(both.get_posterior("x_2", kernel).eta, 2 * first.eta(kernel))


def test_chunks_and_counts() -> None:
    chain, model = make()
    results = []
    for size in (None, 7):
        twist = GradientTokenTwist(model, relaxed(chain), chunk_size=size)
        results.append(run(model, twist, 4))
    assert torch.allclose(results[0].log_normalizer, results[1].log_normalizer, atol=1e-5)
    # three steps, in the last of which a row may have no masks left
    assert results[0].counts["gradient"] == 3 * 4 * PLATE[1]


def test_strength_zero_and_the_cap() -> None:
    chain, model = make()
    plain = run(model, None)
    assert torch.equal(
        plain.state["x"],
        run(model, GradientTokenTwist(model, relaxed(chain), strength=0)).state["x"],
    )
    tokens = torch.full((1, 3), 3)
    kernel = chain.diffusion.kernel({"x": tokens, "logits": chain.denoiser(tokens)}, 3)
    eta = GradientTokenTwist(model, relaxed(chain), cap=0.1).eta(kernel)
    assert float(eta.abs().max()) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "function, told",
    [
        (lambda p: p.sum(), r"relaxed returned \(\)"),
        (lambda p: p.argmax(-1).double().sum(-1), "has no gradient"),
        (lambda p: p.log().clamp(min=-5).sum((1, 2)) * 0, "is not finite"),
    ],
)
def test_rewards_that_do_not_fit(function: Any, told: str) -> None:
    chain, model = make()
    with pytest.raises(ValueError, match=told):
        run(model, GradientTokenTwist(model, function))


def test_refusals() -> None:
    chain, model = make()
    with pytest.raises(ValueError, match="is for masked models"):
        GradientTokenTwist(vectors(), lambda p: p)
    with pytest.raises(ValueError, match="relaxed=None"):
        GradientTokenTwist(model, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_size=0"):
        GradientTokenTwist(model, relaxed(chain), chunk_size=0)
    with pytest.raises(ValueError, match="cap=-1"):
        GradientTokenTwist(model, relaxed(chain), cap=-1)
