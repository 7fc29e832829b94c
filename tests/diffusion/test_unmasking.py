# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Kernels of masked diffusion: normaliser, tilts, ratios, and accuracy in float64."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_twist.diffusion import unmasking
from pyro_twist.diffusion.unmasking import (
    AncestralUnmasking,
    GroupUnmasking,
    TokenLogits,
    Unmasking,
)
from pyro_twist.twists import log_normalizer, log_ratio, tilt
from pyro_twist.twists.paths import _carried
from tests.statistics import assert_frequencies

MASK = 2
VALUES = torch.tensor(list(itertools.product(range(4), repeat=3)))
#: Two masked positions, a revealed one, and another pattern.
TOKENS = torch.tensor([[MASK, 0, MASK], [3, 1, MASK]])


def all_values(kernel: Unmasking) -> Tensor:
    """Every sequence for each of the two, of shape (64, 2, 3)."""
    return VALUES[:, None].expand(-1, len(kernel.tokens), -1)


def head(hidden: Tensor) -> Tensor:
    weight = torch.linspace(-1.5, 1.5, 20, dtype=hidden.dtype).reshape(5, 4).cos()
    return hidden @ weight


def make_logits(kind: str = "dense", **options: Any) -> TokenLogits:
    hidden = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3))
    if kind == "dense":
        return TokenLogits(head(hidden), **options)
    return TokenLogits(hidden=hidden, head=head, vocab_size=4, **options)


KERNELS: dict[str, Any] = {
    "ancestral": lambda logits: AncestralUnmasking(TOKENS, MASK, logits, math.log(0.4)),
    "last": lambda logits: AncestralUnmasking(TOKENS, MASK, logits, -math.inf),
    "remasking": lambda logits: AncestralUnmasking(
        TOKENS,
        MASK,
        logits,
        math.log(0.4),
        math.log(0.3),
        frozen=torch.tensor([False, True, False]),
    ),
    "one": lambda logits: GroupUnmasking(TOKENS, MASK, logits, 1),
    "group": lambda logits: GroupUnmasking(TOKENS, MASK, logits, 2),
}
ETA = torch.tensor([0.7, -0.4, 5.0, 1.1])
ETAS = [ETA, torch.arange(12.0).reshape(3, 4).sin(), torch.arange(24.0).reshape(2, 3, 4).cos()]


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_probabilities_add_up_to_one(name: str, tilted: bool) -> None:
    kernel = KERNELS[name](make_logits("hidden"))
    kernel = kernel.tilted(ETAS[1]).tilted(ETA) if tilted else kernel
    log_prob = kernel.log_prob(all_values(kernel))
    assert log_prob.dtype == torch.float64 and log_prob.shape == (64, 2)
    assert torch.allclose(log_prob.logsumexp(0), torch.zeros(2, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_samples_have_the_law_of_log_prob(name: str, tilted: bool) -> None:
    """Chi-square, rate 1e-6 for each of two sequences."""
    kernel = KERNELS[name](make_logits("hidden"))
    kernel = kernel.tilted(ETAS[2]) if tilted else kernel
    draws = kernel.expand((50_000, 2)).sample()
    index = (draws * torch.tensor([16, 4, 1])).sum(-1)
    probs = kernel.log_prob(all_values(kernel)).exp()
    for sequence in range(2):
        counts = torch.bincount(index[:, sequence], minlength=64)
        assert_frequencies(counts, probs[:, sequence])


def test_stays_masked_with_the_normalised_probability() -> None:
    """``(1 - a_s) / (1 - a_t)``; unnormalised masses as in MDLM's code would give another."""
    alpha_t, alpha_s = 0.3, 0.5
    stay = (1 - alpha_s) / (1 - alpha_t)
    kernel = AncestralUnmasking(TOKENS, MASK, make_logits(), math.log(stay))
    assert torch.allclose(kernel.log_prob(TOKENS).exp(), torch.tensor([stay**2, stay]).double())


def test_a_group_is_one_of_all_subsets() -> None:
    tokens = torch.full((6,), MASK)
    kernel = GroupUnmasking(tokens, MASK, TokenLogits(torch.randn(6, 4)), 2)
    value = torch.tensor([MASK, 1, MASK, MASK, 0, MASK])
    token = kernel.token_log_prob(value).sum()
    assert torch.allclose(kernel.log_prob(value), token - math.log(15))
    draws = kernel.expand((30_000,)).sample() != MASK
    groups = list(itertools.combinations(range(6), 2))
    found = torch.tensor([[i in group for i in range(6)] for group in groups])
    counts = (draws[:, None] == found).all(-1).sum(0)
    assert counts.sum() == 30_000
    assert_frequencies(counts, torch.full((15,), 1 / 15))


@pytest.mark.parametrize(
    "name, value",
    [
        ("ancestral", [MASK, 1, MASK]),  # another token
        ("ancestral", [MASK, MASK, MASK]),  # masked again
        ("last", [0, 0, MASK]),  # not revealed
        ("remasking", [0, MASK, 0]),  # a fixed one masked again
        ("one", [0, 0, 0]),  # two revealed
        ("group", [0, 0, MASK]),  # one revealed
        ("ancestral", [-1, 0, 0]),
        ("ancestral", [4, 0, 0]),
    ],
)
def test_what_cannot_be_reached_has_no_probability(name: str, value: list[int]) -> None:
    kernel = KERNELS[name](make_logits())
    kernel._validate_args = False
    values = torch.stack([torch.tensor(value), torch.tensor([3, 1, 0])])
    assert kernel.log_prob(values)[0] == -math.inf
    assert kernel.log_prob(values)[1] > -math.inf


def test_fixed_positions_never_change() -> None:
    frozen = torch.tensor([True, True, False])
    kernel = AncestralUnmasking(TOKENS, MASK, make_logits(), -9.0, -0.01, frozen=frozen)
    draws = kernel.expand((200, 2)).sample()
    assert (draws[..., :2] == TOKENS[:, :2]).all()
    assert kernel.rows.tolist() == [2, 5]


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("name", KERNELS)
def test_tilt_is_of_tokens_given_a_reveal(name: str, eta: Tensor) -> None:
    """Against the definition: probabilities times exp(eta), normalised; events as they were."""
    prior = KERNELS[name](make_logits())
    tilted = tilt(prior, eta)
    assert type(tilted) is type(prior)
    dense = eta.expand(2, 3, 4).double()
    for (_, before), (_, after) in zip(prior.chunks(), tilted.chunks(), strict=True):
        weights = before.exp() * dense.reshape(-1, 4)[prior.rows].exp()
        weights[:, MASK] = 0.0
        assert torch.allclose(after.exp(), weights / weights.sum(-1, keepdim=True))
    values = all_values(prior)
    kept = (values == MASK).sum(-1)
    for count in range(3):
        same = [k.log_prob(values).exp().where(kept == count, 0.0).sum(0) for k in (prior, tilted)]
        assert torch.allclose(*same)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("name", KERNELS)
def test_log_ratio_is_the_difference(name: str, eta: Tensor) -> None:
    prior = KERNELS[name](make_logits("hidden"))
    tilted, further = tilt(prior, eta), tilt(tilt(prior, eta), ETA)
    other = KERNELS[name](make_logits("dense", temperature=0.7))
    value = prior.expand((40, 2)).sample()
    for p, q in ((prior, tilted), (tilted, prior), (further, tilted), (prior, other)):
        p, q = p.expand((40, 2)), q.expand((40, 2))
        expected = p.log_prob(value) - q.log_prob(value)
        found = log_ratio(p, q, value)
        assert found.dtype == torch.float64 and found.shape == (40, 2)
        assert torch.allclose(found, expected, atol=1e-13)


@pytest.mark.parametrize("name", KERNELS)
def test_log_ratio_of_tilts_of_one_kernel(name: str) -> None:
    """The closed form in the tilts alone."""
    prior = KERNELS[name](make_logits("hidden"))
    tilted = tilt(prior, ETAS[2])
    for proposal in (tilted, tilt(tilted, ETA)):
        for p, q in ((prior, proposal), (proposal, prior), (tilted, proposal)):
            value = prior.sample()
            expected = p.log_prob(value) - q.log_prob(value)
            assert torch.allclose(log_ratio(p, q, value), expected, atol=1e-13)


def test_log_ratio_of_different_events() -> None:
    value = torch.tensor([[0, 0, MASK], [3, 1, MASK]])
    p, q = KERNELS["ancestral"](make_logits()), KERNELS["remasking"](make_logits())
    assert torch.allclose(log_ratio(p, q, value), p.log_prob(value) - q.log_prob(value))


@pytest.mark.parametrize("name", ["ancestral", "one", "group", "last"])
def test_log_normalizer(name: str) -> None:
    """It is the mean of the exponentials whose value for "stays masked" is their own mean."""
    prior, eta = KERNELS[name](make_logits()).tilted(ETAS[1]), ETAS[2]
    single = torch.zeros(2, 3, 4, dtype=torch.float64)
    for part, log_probs in prior.chunks():
        means = (log_probs + eta.reshape(-1, 4)[prior.rows[part]]).logsumexp(-1)
        single.reshape(-1, 4)[prior.rows[part]] = eta.double().reshape(-1, 4)[prior.rows[part]]
        single.reshape(-1, 4)[prior.rows[part], MASK] = means
    values = all_values(prior)
    score = single.expand(64, -1, -1, -1).gather(-1, values[..., None])[..., 0].sum(-1)
    expected = (prior.log_prob(values) + score).logsumexp(0)
    assert torch.allclose(log_normalizer(prior, eta), expected)


@pytest.mark.parametrize("eta", ETAS)
def test_gradients_of_the_tilt(eta: Tensor) -> None:
    prior = KERNELS["ancestral"](make_logits("hidden"))
    value = torch.tensor([[0, 0, 3], [3, 1, 1]])
    eta = eta.double().requires_grad_()
    ratio = lambda e: log_ratio(prior, prior.tilted(e), value)  # noqa: E731
    assert torch.autograd.gradcheck(ratio, eta)
    assert torch.autograd.gradcheck(lambda e: prior.tilted(e).log_prob(value), eta)


def test_chunks_are_the_same_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = KERNELS["ancestral"](make_logits("hidden")).tilted(ETA)
    [(part, expected)] = list(whole.chunks())
    assert part == slice(0, 3)
    monkeypatch.setattr(unmasking, "_ENTRIES", 4)
    pieces = KERNELS["ancestral"](make_logits("hidden")).tilted(ETA)
    found = list(pieces.chunks())
    assert [part for part, _ in found] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert torch.allclose(torch.cat([one for _, one in found]), expected)
    torch.manual_seed(1)
    value = whole.sample()
    torch.manual_seed(1)
    assert torch.equal(pieces.sample(), value)
    assert torch.allclose(pieces.log_prob(value), whole.log_prob(value))
    uniforms = torch.rand(5, 2, 3, dtype=torch.float64)
    assert torch.equal(pieces.complete(uniforms), whole.complete(uniforms))
    for one, other in zip(
        pieces.complete_tilted(ETA, uniforms), whole.complete_tilted(ETA, uniforms), strict=True
    ):
        assert torch.allclose(one.double(), other.double(), rtol=1e-13)
    which = torch.tensor([2, 0])
    chosen = torch.cat([one for _, one in pieces.chunks(which)])
    assert torch.allclose(chosen, expected[which])


def test_head_is_applied_once() -> None:
    calls: list[int] = []

    def counted(hidden: Tensor) -> Tensor:
        calls.append(len(hidden))
        return head(hidden)

    logits = TokenLogits(hidden=torch.randn(2, 3, 5), head=counted, vocab_size=4)
    prior = KERNELS["ancestral"](logits)
    proposal = prior.tilted(ETA)
    value = proposal.sample()
    revealed = len(prior.reveals(value))
    log_ratio(prior, proposal, value)
    log_ratio(prior, prior.tilted(ETAS[1]), value)
    assert sum(calls) == revealed, "only revealed positions, and only once"
    calls.clear()
    prior.complete()
    proposal.complete()
    assert calls == [3]
    # what is normalised afterwards comes from the same logits
    assert torch.equal(
        torch.cat([one for _, one in prior.chunks()]),
        torch.cat([one for _, one in KERNELS["ancestral"](logits).chunks()]),
    )
    assert sum(calls) == 6


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("eta", ETAS)
def test_completions_and_normaliser_in_one(name: str, eta: Tensor) -> None:
    """The head is applied once for both."""
    calls: list[int] = []

    def counted(hidden: Tensor) -> Tensor:
        calls.append(len(hidden))
        return head(hidden)

    values = make_logits("hidden").values
    logits = TokenLogits(hidden=values, head=counted, vocab_size=4)
    for first in (None, ETA):
        kernel, other = KERNELS[name](logits), KERNELS[name](logits)
        if first is not None:
            kernel, other = kernel.tilted(first), other.tilted(first)
        uniforms = torch.rand(5, *kernel.tokens.shape, dtype=torch.float64)
        calls.clear()
        completed, normalizer = kernel.complete_tilted(eta, uniforms)
        assert len(calls) == 1
        assert torch.equal(completed, other.tilted(eta).complete(uniforms))
        assert torch.allclose(normalizer, other.log_normalizer(eta), rtol=1e-12, atol=1e-13)
        most = kernel.tilted(eta).complete().reshape(-1)[kernel.rows]
        probs = torch.cat([one for _, one in other.tilted(eta).chunks()])
        assert torch.equal(most, probs.argmax(-1))


def test_a_tilt_may_be_the_same_for_all_tokens() -> None:
    """It then changes nothing but the normaliser."""
    kernel = KERNELS["ancestral"](make_logits())
    value = kernel.sample()
    for eta in (torch.tensor([0.7]), torch.tensor([[0.7], [0.1], [0.2]])):
        eta = eta.double()
        assert torch.allclose(kernel.tilted(eta).log_prob(value), kernel.log_prob(value))
        assert torch.allclose(kernel.log_ratio(kernel.tilted(eta), value), torch.zeros(2).double())
        sums = eta.expand(3, 1)[:, 0].expand(kernel.tokens.shape)
        expected = torch.where(kernel._masked(), sums, 0.0).sum(-1)
        assert torch.allclose(kernel.log_normalizer(eta), expected)


def test_completions() -> None:
    kernel = KERNELS["ancestral"](make_logits()).tilted(ETA)
    probs = torch.cat([one for _, one in kernel.chunks()]).exp()
    best = kernel.complete()
    assert torch.equal(best.reshape(-1)[kernel.rows], probs.argmax(-1))
    assert torch.equal(best[TOKENS != MASK], TOKENS[TOKENS != MASK])
    # a fine grid of uniforms has every token in exactly its share
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    many = kernel.complete(grid[:, None, None].expand(-1, 2, 3))
    assert many.shape == (10_000, 2, 3)
    drawn = many.reshape(10_000, -1)[:, kernel.rows]
    shares = torch.stack([(drawn == token).double().mean(0) for token in range(4)], -1)
    assert torch.allclose(shares, probs, atol=1.01e-4)
    with pytest.raises(ValueError, match=r"uniforms have shape \(3,\)"):
        kernel.complete(torch.rand(3, dtype=torch.float64))


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """
    100,000 tokens of probability 1e-8 each, in 2e6 draws: 2,000 of them, Poisson, rate 1e-6.

    They are all different but for 20 pairs on average; 50 have the probability 1e-8. With float32
    uniforms, in steps of 6e-8, there would be 120; float32 Gumbel numbers, which end at 16.6, draw
    hardly any of them, since log(1e-8) + 16.6 < 0.
    """
    log_probs = torch.full((1, 100_001), math.log(1e-8), dtype=torch.float64)
    log_probs[0, 0] = math.log1p(-1e-3)
    drawn = unmasking._inverse_cdf(log_probs, torch.rand(1, 2_000_000, dtype=torch.float64))
    rare = drawn[drawn > 0]
    assert abs(len(rare) - 2_000) < 4.9 * math.sqrt(2_000)
    assert len(rare) - len(rare.unique()) < 50


def test_a_rare_token_has_exactly_its_share_of_the_uniforms() -> None:
    log_probs = torch.tensor([[0.0, math.log(1e-9)]], dtype=torch.float64).log_softmax(-1)
    edge = 1 / (1 + 1e-9)
    near = torch.tensor([[edge - 1e-15, edge + 1e-15, 1 - 2**-53]], dtype=torch.float64)
    assert unmasking._inverse_cdf(log_probs, near).tolist() == [[0, 1, 1]]


def test_draws_are_made_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    inverse, seen = unmasking._inverse_cdf, []

    def watched(log_probs: Tensor, uniforms: Tensor) -> Tensor:
        seen.append((log_probs.dtype, uniforms.dtype, bool((uniforms.float() != uniforms).any())))
        return inverse(log_probs, uniforms)

    monkeypatch.setattr(unmasking, "_inverse_cdf", watched)
    KERNELS["last"](make_logits("hidden")).sample()
    assert seen == [(torch.float64, torch.float64, True)]


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    log_probs = torch.tensor([[-math.inf, 0.0, -math.inf, -math.inf]], dtype=torch.float64)
    ends = torch.tensor([[0.0, 0.5, 1 - 2**-53, 1.0]], dtype=torch.float64)
    assert unmasking._inverse_cdf(log_probs, ends).tolist() == [[1, 1, 1, 1]]
    logits = make_logits(forbidden=(0, 1))
    kernel = AncestralUnmasking(TOKENS, MASK, logits, -math.inf).tilted(ETA)
    assert (kernel.expand((500, 2)).sample()[..., 2] == 3).all()


def test_uniforms_used_do_not_depend_on_the_tokens() -> None:
    after = []
    for tokens in (TOKENS, torch.full((2, 3), MASK), torch.zeros(2, 3, dtype=torch.long)):
        torch.manual_seed(2)
        AncestralUnmasking(tokens, MASK, make_logits(), -0.5).sample()
        after.append(torch.rand(()))
    assert after[0] == after[1] == after[2]


@pytest.mark.parametrize("name", ["remasking", "group"])
def test_copies(name: str) -> None:
    kernel = KERNELS[name](make_logits("hidden")).tilted(ETAS[2])
    value = kernel.sample()
    expected = kernel.log_prob(value)
    for clone in (copy.copy(kernel), pickle.loads(pickle.dumps(kernel)), _carried(kernel, None)):
        assert not hasattr(clone, "_memory"), "copies leave out what can be computed again"
        assert torch.equal(clone.log_prob(value), expected)
    kernel = kernel.tilted(ETA.requires_grad_(False).clone().requires_grad_())
    assert not _carried(kernel, None).eta.requires_grad


def test_expand_and_sample_shape() -> None:
    kernel = KERNELS["ancestral"](make_logits("hidden")).tilted(ETAS[2])
    wide = kernel.expand((5, 2))
    assert wide.batch_shape == (5, 2) and wide.event_shape == (3,)
    value = wide.sample()
    assert torch.allclose(wide.log_prob(value), kernel.log_prob(value))
    assert torch.allclose(kernel.expand((1, 2)).log_prob(value), kernel.log_prob(value))
    assert kernel.sample((4, 5)).shape == (4, 5, 2, 3)
    assert kernel.sample((0,)).shape == (0, 2, 3)


def test_two_tokens_and_one_position() -> None:
    """V = 2 with the mask: nothing is random but when."""
    kernel = AncestralUnmasking(
        torch.tensor([[1], [1]]), 1, TokenLogits(torch.randn(2, 1, 2)), math.log(0.25)
    )
    assert torch.allclose(
        kernel.log_prob(torch.tensor([[0], [1]])).exp(), torch.tensor([0.75, 0.25]).double()
    )
    assert set(kernel.expand((99, 2)).sample().flatten().tolist()) == {0, 1}
    one = GroupUnmasking(torch.tensor([1]), 1, TokenLogits(torch.randn(1, 2)), 5)
    assert one.sample().tolist() == [0] and one.log_prob(torch.tensor([0])) == 0


def test_nothing_masked() -> None:
    tokens = torch.tensor([[0, 1, 3]])
    for kernel in (
        AncestralUnmasking(tokens, MASK, TokenLogits(torch.randn(1, 3, 4)), -1.0),
        GroupUnmasking(tokens, MASK, TokenLogits(torch.randn(1, 3, 4)), 2),
    ):
        tilted = kernel.tilted(ETA)
        assert torch.equal(tilted.sample(), tokens)
        assert torch.equal(tilted.log_prob(tokens), torch.zeros(1, dtype=torch.float64))
        assert torch.equal(log_ratio(kernel, tilted, tokens), torch.zeros(1).double())
        assert torch.equal(tilted.complete(), tokens)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_without_normaliser_are_named(bad: float) -> None:
    logits = torch.randn(2, 3, 4)
    logits[1, 2, 0] = bad
    kernel = KERNELS["last"](TokenLogits(logits))
    with pytest.raises(ValueError, match=r"sequence \(1,\) at position 2"):
        kernel.sample()
    logits = torch.randn(2, 3, 4)
    logits[0, 0] = torch.tensor([-math.inf, -math.inf, 0.0, -math.inf])
    with pytest.raises(ValueError, match=r"sequence \(0,\) at position 0 have the maximum -inf"):
        KERNELS["last"](TokenLogits(logits)).sample()


def test_arguments_are_checked() -> None:
    logits = make_logits()
    with pytest.raises(ValueError, match="log_stay=0.1 is no log-probability"):
        AncestralUnmasking(TOKENS, MASK, logits, 0.1)
    with pytest.raises(ValueError, match="size=0"):
        GroupUnmasking(TOKENS, MASK, logits, 0)
    with pytest.raises(ValueError, match=r"sequences of shape \(2, 3\), tokens have shape \(2,\)"):
        GroupUnmasking(TOKENS[:, 0], MASK, logits, 1)
    with pytest.raises(ValueError, match=r"eta has shape \(5,\), which does not broadcast"):
        KERNELS["one"](logits).tilted(torch.zeros(5))
    with pytest.raises(ValueError, match=r"normaliser is not finite"):
        KERNELS["last"](logits).tilted(torch.full((4,), math.nan)).sample()
    for given in ({}, {"hidden": torch.zeros(1, 2)}, {"logits": ETA, "hidden": ETA}):
        with pytest.raises(ValueError, match="either logits=, or hidden="):
            TokenLogits(**given)
    wrong = TokenLogits(hidden=torch.randn(2, 3, 5), head=head, vocab_size=7)
    with pytest.raises(ValueError, match=r"the head returned shape \(3, 4\).*expected \(3, 7\)"):
        KERNELS["last"](wrong).sample()
