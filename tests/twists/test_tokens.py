# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Learned tilts of tokens: TokenTilt, TokenSurrogate, HiddenTilt."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_twist.infer import TrustRegionTwist, TwistedSMC
from pyro_twist.infer.trustregiontwist import default_twist
from pyro_twist.twists import (
    DiscountedLookahead,
    HiddenTilt,
    LookaheadTwist,
    Paths,
    TokenSurrogate,
    TokenTilt,
    fit_likelihood,
)
from pyro_twist.twists.learned import log_likelihood
from tests.oracles import LinearGaussianChain, MaskedChain
from tests.twists.masked import (
    RUNS,
    THRESHOLDS,
    additive,
    chain,
    populations,
    recorded,
    tilted,
    wrong_hidden_tilt,
    wrong_surrogate,
    wrong_token_tilt,
)

WORTH = torch.tensor([0.5, -1.0, 1.5, 0.0]).double()

FAMILIES: dict[str, Callable[[Any], Any]] = {
    "token": TokenTilt,
    "position": lambda model: TokenTilt(model, per="position"),
    "surrogate": lambda model: DiscountedLookahead(model) + TokenSurrogate(model, knots=2),
    "hidden": lambda model: HiddenTilt(model, rank=3),
    "under": lambda model: _under(model),
    "default": default_twist,
}


def _under(model: Any) -> Any:
    tilt = TokenSurrogate(model)
    return DiscountedLookahead(model, completions=2, under=tilt) + tilt


WRONG = {"token": wrong_token_tilt, "surrogate": wrong_surrogate, "hidden": wrong_hidden_tilt}


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_at_the_start(family: str) -> None:
    """Bit for bit."""
    model = tilted(chain())
    completions = {"surrogate": 1, "default": 1, "under": 2}.get(family)
    guide = completions and DiscountedLookahead(model, completions=completions)
    ours = TwistedSMC(model, FAMILIES[family](model), 30, seed=0, progress=False).run()
    plain = TwistedSMC(model, guide, 30, seed=0, progress=False).run()
    assert torch.equal(ours.state["x"], plain.state["x"])
    assert torch.equal(ours.log_weights, plain.log_weights)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("per", ["token", "position"])
def test_zero_variance_at_the_optimum(per: Any, threshold: float) -> None:
    """For independent tokens and a sum over them the optimal twist is a tilt of tokens."""
    one = chain(product=True, num_inference_steps=4)
    worth = WORTH if per == "token" else torch.randn(3, 4).double()
    model = tilted(one, additive(worth))
    twist = TokenTilt(model, per=per, value=True)
    twist.theta.data = worth.reshape(twist.theta.shape).clone()
    smc = TwistedSMC(model, twist, 20, seed=0, ess_threshold=threshold, progress=False)
    result = smc.run()
    assert float(result.log_weights.std()) < 1e-12
    probs = one.token_probs(0)
    expected = (probs * torch.atleast_2d(worth).exp()).sum(1).log().sum()
    assert float(result.log_normalizer) == pytest.approx(float(expected))


@pytest.mark.parametrize("per", ["token", "position"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_the_fit_finds_the_optimum(per: Any, threshold: float) -> None:
    """
    With many particles the tilt is what tokens are worth, up to a number for each position.

    Within 0.15; over seeds the largest deviation is 0.05 on average, with standard deviation 0.02.
    """
    one = chain(product=True, num_inference_steps=4)
    worth = WORTH if per == "token" else torch.stack([WORTH, -WORTH, 0.5 * WORTH])
    model = tilted(one, additive(worth))
    twist = TokenTilt(model, per=per)
    options = {"seed": 0, "kl_budget": 2.0, "ess_threshold": threshold, "progress": False}
    TrustRegionTwist(model, twist, 2000, **options).fit(2)
    found = twist.theta.detach()[:, :3]
    missed = found - worth.reshape(twist.theta.shape)[:, :3]
    missed = missed - missed.mean(1, keepdim=True)
    assert missed.abs().max() < 0.15


@pytest.mark.parametrize("family", FAMILIES)
def test_learning_narrows_the_spread(family: str, tmp_path: Path) -> None:
    """The spread of log Z over 200 runs falls by a quarter or more; by chance at rate 1e-4."""
    model = tilted(chain(num_inference_steps=4), additive(2 * WORTH))
    twist = FAMILIES[family](model)
    TrustRegionTwist(model, twist, 200, seed=0, progress=False).fit(3)
    twist.save(tmp_path / "twist.safetensors")
    many = tilted(chain(num_inference_steps=4, plate=("runs", RUNS)), additive(2 * WORTH))
    fresh, learnt = FAMILIES[family](many), FAMILIES[family](many)
    learnt.load(tmp_path / "twist.safetensors")
    before, after = (populations(many, one, 6).log_normalizer.std() for one in (fresh, learnt))
    assert after < before / 1.3


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("guide", ["none", "other"])
@torch.no_grad()
def test_digests_have_the_likelihood_of_paths(kind: str, guide: str) -> None:
    """What fits compute from digests is the likelihood, whatever the paths were drawn from."""
    model = tilted(chain(num_inference_steps=4))
    drawn = LookaheadTwist(model) + WRONG[kind](model)
    if guide == "none":
        drawn.parts()[1].theta.data.zero_()
    smc = recorded(model, drawn, 50)
    twist = LookaheadTwist(model) + WRONG[kind](model)
    batches = smc._batches(0.7)
    expected = float(sum(one.log_likelihood(twist) for one in batches))
    assert log_likelihood(twist, batches) == pytest.approx(expected, abs=1e-5)
    if kind != "surrogate":
        # beside another tilt, likelihoods are relative to it
        both = twist + wrong_token_tilt(model)
        both.parts()[1].theta.requires_grad_(False)
        rest = twist.parts()[1].theta
        kept = rest.data.clone()
        found = log_likelihood(both, batches)
        expected = float(sum(one.log_likelihood(both) for one in batches))
        rest.data.zero_()
        expected -= float(sum(one.log_likelihood(both) for one in batches))
        rest.data.copy_(kept)
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("per", ["token", "position"])
@pytest.mark.parametrize("centring", [0.0, 0.8])
def test_iterative_scaling_ends_where_the_gradient_is_zero(per: Any, centring: float) -> None:
    """At the maximum of the weighted likelihood of paths, less the prior of pseudo-counts."""
    model = tilted(chain(num_inference_steps=4))
    twist = TokenTilt(model, per=per, pseudo_count=3.0)
    smc = recorded(model, wrong_token_tilt(model))
    paths = Paths(smc._batches(0.6)[0].steps, centring)
    fit_likelihood(twist, [paths])
    with torch.enable_grad():
        [score] = torch.autograd.grad(paths.log_likelihood(twist), [twist.theta])
    noise = torch.zeros_like(score)
    for step in paths:
        for row, particle, place in _revealed(step):
            token = int(step.value[particle, place])
            group = place if per == "position" else 0
            law = step.posterior.chunks(torch.tensor([row]))
            noise[group] -= step.base[particle] * next(law)[1][0].exp()
            noise[group, token] += step.base[particle]
    final = paths.steps[-1].weights
    prior = 3.0 * float(final.square().sum() / final.sum() ** 2)
    slope = score - centring * noise + prior * (1 - twist.theta.exp())
    assert slope.abs().max() < 1e-4


def _revealed(step: Any) -> list[tuple[int, int, int]]:
    if not hasattr(step.prior, "rows"):
        return []
    length = step.value.shape[-1]
    which = step.prior.reveals(step.value).tolist()
    rows = step.prior.rows.tolist()
    return [(row, rows[row] // length, rows[row] % length) for row in which]


def test_only_tokens_revealed_often_are_tilted() -> None:
    model = tilted(chain(num_inference_steps=4), additive(WORTH))
    twist = TokenTilt(model, max_tokens=2)
    smc = recorded(model, twist)
    counts = torch.bincount(smc.passes[0].state["x"].flatten(), minlength=4)
    smc.update()
    assert twist.tokens.tolist() == counts.topk(2).indices.sort().values.tolist()
    kept = torch.zeros(4, dtype=torch.bool).index_fill(0, twist.tokens, True)
    assert twist.theta[0, kept].all() and not twist.theta[0, ~kept].any()


def test_tokens_that_never_occur_are_not_tilted(tmp_path: Path) -> None:
    """However many may be: there is nothing to be learnt about them."""
    one = chain(num_inference_steps=4, forbidden_token_ids=(1,))
    model = tilted(one, additive(WORTH))
    for family in (TokenTilt, HiddenTilt):
        twist = family(model, max_tokens=3)
        recorded(model, twist).update()
        assert twist.tokens.tolist() == [0, 2]
        twist.save(tmp_path / "twist.safetensors")
        loaded = family(model, max_tokens=3).load(tmp_path / "twist.safetensors")
        assert loaded.tokens.tolist() == [0, 2]
    surrogate = TokenSurrogate(model, max_tokens=3)
    recorded(model, LookaheadTwist(model) + surrogate).update()
    assert surrogate.beta[0, [0, 2]].all() and not surrogate.beta[0, [1, 3]].any()


def test_tokens_that_are_not_tilted_any_more_are_not_proposed_as_if() -> None:
    """The choice changes from pass to pass; what is proposed is what was fitted."""
    model = tilted(chain(num_inference_steps=4), additive(WORTH))
    twist = TokenTilt(model, max_tokens=1)
    with torch.no_grad():
        twist.theta.fill_(0.3)  # as if all had been tilted before
    smc = recorded(model, twist)
    twist.observe(smc.passes)
    assert int((twist.theta != 0).sum()) == 1
    for step in (step for sites in smc.passes[0].steps for step in sites):
        digest = twist.digest(step, step.prior) if hasattr(step.prior, "rows") else None
        if digest is not None:
            found = twist.digest_log_prob(digest)
            assert torch.allclose(found, step.log_prob(twist).flatten().detach(), atol=1e-9)


def test_the_surrogate_learns_what_tokens_are_worth() -> None:
    model = tilted(chain(num_inference_steps=4), additive(WORTH))
    twist = TokenSurrogate(model)
    # many, as sequences that only paths left out have seen keep the score from 1
    TrustRegionTwist(model, LookaheadTwist(model) + twist, 16_000, seed=0, progress=False).fit(2)
    assert twist.score > 0.99
    found = twist.beta[0, :3] - twist.beta[0, 0]
    assert torch.allclose(found, WORTH[:3] - WORTH[0], atol=0.05)
    assert float(twist.theta.detach()) == pytest.approx(1.0, abs=0.4)


def test_the_surrogate_of_embeddings() -> None:
    """Two tokens of one embedding are worth the same, and a lone number is what counts."""
    embedding = torch.tensor([[0.0], [1.0], [3.0], [0.0]])
    model = tilted(chain(num_inference_steps=4), additive(embedding[:, 0].double()))
    twist = TokenSurrogate(model, embedding=embedding)
    TrustRegionTwist(model, LookaheadTwist(model) + twist, 100, seed=0, progress=False).fit(1)
    found = twist.beta[0, :3] - twist.beta[0, 0]
    assert torch.allclose(found, embedding[:3, 0].double(), atol=0.05)


def test_a_reward_of_no_pattern_gets_no_gain() -> None:
    one = chain(num_inference_steps=4, length=4)
    one.rewards = torch.randn(one.size, generator=torch.Generator().manual_seed(1)).double()
    one.table = torch.zeros_like(one.table)
    parity = torch.tensor([1.0, -1.0, 1.0, 0.0]).double()
    model = tilted(one, lambda x: 3 * parity[x].prod(1) * (x[:, 0] - 1))
    twist = TokenSurrogate(model)
    smc = TrustRegionTwist(model, LookaheadTwist(model) + twist, 60, seed=0, progress=False)
    smc.sample()
    twist.observe(smc.passes)
    assert twist.score < 0.2 and float(twist.theta.detach()) <= max(twist.score, 0.0)


def test_the_fitted_gain_is_the_best() -> None:
    """One knot: the maximum of the penalised likelihood on a fine grid."""
    model = tilted(chain(num_inference_steps=4), additive(WORTH))
    twist = LookaheadTwist(model) + TokenSurrogate(model, ridge=1.0)
    part = twist.parts()[1]
    smc = recorded(model, twist, 40)
    part.observe(smc.passes)
    paths = Paths(smc._batches(0.8)[0].steps, 0.0)
    fit_likelihood(twist, [paths])
    found, size = float(part.theta.detach()), _size(paths)
    values = []
    grid = torch.linspace(0, 1.5, 151)
    for gain in grid:
        part.theta.data.fill_(float(gain))
        missed = float((gain - part.prior_mean[0]) ** 2)
        values.append(float(paths.log_likelihood(twist)) - 0.5 * missed / size)
    assert found == pytest.approx(float(grid[torch.tensor(values).argmax()]), abs=0.011)


def _size(paths: Paths) -> float:
    final = paths.steps[-1].weights
    assert final is not None
    return float(final.sum() ** 2 / final.square().sum())


def test_the_hidden_tilt_sees_the_context() -> None:
    """A reward of equal neighbours: no token is worth anything by itself."""

    def neighbours(x: torch.Tensor) -> torch.Tensor:
        return 2.0 * (x[:, 1:] == x[:, :-1]).sum(1)

    one = chain(num_inference_steps=6, length=4)
    # what is revealed next to a mask speaks for that token, a little
    for index, sequence in enumerate(one.sequences):
        row = torch.zeros(4, 4)
        for place, token in enumerate(sequence):
            for other in (place - 1, place + 1):
                if token != one.mask and 0 <= other < 4:
                    row[other, token] += 0.3
        one.table = one.table.contiguous()
        one.table[index] = row
    model = tilted(one, neighbours)
    gains = {}
    for name, twist in {"token": TokenTilt(model), "hidden": HiddenTilt(model, rank=3)}.items():
        smc = recorded(model, twist, 1000, kl_budget=5.0, ess_threshold=0.0)
        smc.update()
        before = TokenTilt(model)
        batches = smc._batches(1.0)
        gains[name] = log_likelihood(twist, batches) - log_likelihood(before, batches)
    assert gains["hidden"] > 2 * max(gains["token"], 0.02)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("records", [None, "cpu"])
def test_saved_and_loaded(family: str, records: Any, tmp_path: Path) -> None:
    model = tilted(chain(num_inference_steps=4), additive(WORTH))
    twist = FAMILIES[family](model)
    smc = TrustRegionTwist(model, twist, 60, seed=0, record_device=records, progress=False)
    smc.fit(2).guide.save(tmp_path / "twist.safetensors")
    other = FAMILIES[family](model).load(tmp_path / "twist.safetensors")
    a, b = (TwistedSMC(model, one, 20, seed=3, progress=False).run() for one in (twist, other))
    assert torch.equal(a.log_weights, b.log_weights)
    fresh = TwistedSMC(model, FAMILIES[family](model), 20, seed=3, progress=False).run()
    assert not torch.equal(a.log_weights, fresh.log_weights)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("particles", [1, 2, 4])
def test_few_particles(family: str, particles: int) -> None:
    model = tilted(chain())
    smc = TrustRegionTwist(model, FAMILIES[family](model), particles, seed=0, progress=False)
    assert torch.isfinite(smc.run().log_normalizer)
    assert all(torch.isfinite(p).all() for p in smc.guide.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_of_minus_infinity(family: str) -> None:
    model = tilted(chain(), lambda x: torch.where(x[:, 0] == 0, -math.inf, WORTH[x[:, 1]]))
    result = TrustRegionTwist(model, FAMILIES[family](model), 20, seed=0, progress=False).run()
    alive = result.log_weights > -math.inf
    assert alive.any() and (result.state["x"][alive, 0] != 0).all()
    assert torch.isfinite(result.log_normalizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_constant_reward_teaches_nothing(family: str) -> None:
    model = tilted(chain(), lambda x: torch.full(x.shape[:1], 0.3))
    result = TrustRegionTwist(model, FAMILIES[family](model), 40, seed=0, progress=False).run()
    assert float(result.log_normalizer) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_forbidden_tokens_stay(family: str) -> None:
    one = chain(prompt=torch.tensor([1, 3, 3]), forbidden_token_ids=(2,))
    model = tilted(one, additive(WORTH))
    smc = TrustRegionTwist(model, FAMILIES[family](model), 40, seed=0, progress=False)
    x = smc.run().state["x"]
    assert (x[:, 0] == 1).all() and (x < 2).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_and_one_position(family: str) -> None:
    one = MaskedChain(1, 2, 1, num_inference_steps=2)
    model = tilted(one)
    result = TrustRegionTwist(model, FAMILIES[family](model), 8, seed=0, progress=False).run()
    assert float(result.log_normalizer) == pytest.approx(one.log_normalizer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", [{"unmasking": "uniform"}, {"remasking": ("rescaled", 0.5)}])
def test_populations(family: str, kernel: dict[str, Any]) -> None:
    one = chain(plate=("prompts", 2), prompt=torch.tensor([[1, 3, 3], [0, 3, 3]]), **kernel)
    model = tilted(one, additive(WORTH))
    plates = {"max_plate_nesting": 1, "population_plate": "prompts"}
    smc = TrustRegionTwist(model, FAMILIES[family](model), 30, seed=0, progress=False, **plates)
    result = smc.run()
    assert result.log_normalizer.shape == (2,)
    assert (result.state["x"][..., 0] == torch.tensor([1, 0])).all()


def test_fits_evaluate_nothing() -> None:
    one = chain(num_inference_steps=4)
    model = tilted(one)
    for family in FAMILIES.values():
        smc = recorded(model, family(model), 20)
        before = dict(model.counts)
        smc.update()
        assert dict(model.counts) == before


def test_digests_are_computed_once_for_a_fit() -> None:
    model = tilted(chain(num_inference_steps=4))
    twist = TokenTilt(model)
    smc = recorded(model, twist, 20)
    calls = []
    original = twist.digest
    object.__setattr__(twist, "digest", lambda *args: calls.append(1) or original(*args))
    smc.update()
    assert len(calls) == len(model.timesteps) + 1
    del smc
    gc.collect()
    assert not len(twist.digests)


@pytest.mark.parametrize("family", [TokenTilt, TokenSurrogate, HiddenTilt])
def test_models_that_are_not_masked(family: Any) -> None:
    with pytest.raises(ValueError, match=f"{family.__name__} is for masked models"):
        family(LinearGaussianChain(3, dim=2))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (TokenTilt, {"per": "time"}),
        (TokenTilt, {"pseudo_count": 0.0}),
        (TokenSurrogate, {"cap": 0.0}),
        (TokenSurrogate, {"knots": 0}),
        (TokenSurrogate, {"embedding": torch.zeros(3, 2)}),
        (HiddenTilt, {"rank": 0}),
        (HiddenTilt, {"max_tokens": 0}),
        (TokenTilt, {"max_tokens": 2.5}),
        (TokenTilt, {"max_tokens": True}),
        (TokenSurrogate, {"max_tokens": 2.5}),
        (HiddenTilt, {"rank": 1.5}),
    ],
)
def test_options_out_of_range(family: Any, options: dict[str, Any]) -> None:
    [name] = options
    with pytest.raises(ValueError, match=name):
        family(tilted(chain()), **options)


def test_other_sites_are_left_alone() -> None:
    model = tilted(chain())
    twist = wrong_token_tilt(model)
    prior = model.initial()
    assert twist.get_posterior("x_3", prior) is prior
    step = recorded(model, twist, 5).passes[0].steps[0][0]
    assert twist.digest(replace(step), step.prior) is None
