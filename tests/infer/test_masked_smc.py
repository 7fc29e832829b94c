# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Masked diffusion under twisted SMC, against the exact tilted law of an enumerable chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_twist.diffusion import MaskedDiffusion
from pyro_twist.infer import TwistedSMC
from pyro_twist.infer.particles import ParticleState, take_ancestors
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import LearnedTwist, Twist, log_normalizer, tilt
from tests.oracles import ExactMaskedTwist, MaskedChain
from tests.statistics import assert_mean, assert_unbiased

REPLICATES = 600
PLATE = ("replicates", REPLICATES)
SCHEMES = ("systematic", "stratified", "multinomial", "residual", "ssp")
KINDS: dict[str, dict[str, Any]] = {
    "ancestral": {"num_inference_steps": 3},
    "remasking": {"num_inference_steps": 3, "remasking": ("rescaled", 0.7)},
    "group": {"unmasking": "uniform"},
    "prompt": {"num_inference_steps": 3, "prompt": torch.tensor([3, 1, 3])},
}
PROMPTS: dict[str, dict[str, Any]] = {
    "prompt": KINDS["prompt"],
    "remasked prompt": {**KINDS["prompt"], "remasking": ("rescaled", 0.7)},
    "group of prompt": {"unmasking": "uniform", "prompt": torch.tensor([3, 1, 3])},
}


class FixedPsi(Twist):
    """Part of the reward of the most probable completion, as a look-ahead would have it."""

    def __init__(self, model: Any, chain: MaskedChain) -> None:
        super().__init__(model)
        self.chain = chain

    def log_twist(self, state: Any, t: int | None = None) -> Tensor:
        return 0.8 * self.chain.reward(self.model.complete(state))


class FixedTilt(Twist):
    """A tilt of the tokens by rewards of single tokens, and its value as the look-ahead."""

    def __init__(self, model: Any, chain: MaskedChain) -> None:
        super().__init__(model)
        self.eta = torch.tensor(
            [[0.6, -0.5, 0.2, 0.0], [0.0, 0.9, -0.3, 0.0], [0.3, 0.3, -1.0, 0.0]]
        )

    def get_posterior(self, name: str, prior: Any) -> Any:
        return tilt(prior, self.eta) if self.stepping else prior

    def log_twist(self, state: Any, t: int | None = None) -> Tensor:
        gained = self.eta[torch.arange(3), state["x"]].double().masked_fill(state["x"] == 3, 0.0)
        return gained.sum(-1) + log_normalizer(self.model.kernel(state, 1), self.eta)


TWISTS: dict[str, Callable[..., Any]] = {
    "bootstrap": lambda model, chain: None,
    "fixed psi": FixedPsi,
    "tilt": FixedTilt,
    "sum": lambda model, chain: FixedPsi(model, chain) + FixedTilt(model, chain),
    "exact": ExactMaskedTwist,
}


def make(kind: str) -> tuple[MaskedChain, RewardTilted]:
    chain = MaskedChain(plate=PLATE, **{**KINDS, **PROMPTS}[kind])
    return chain, RewardTilted(chain.diffusion, chain.reward)


def check(chain: MaskedChain, result: Any) -> None:
    """
    Z and ``Z_hat`` times the self-normalised probability of every sequence are unbiased.

    z-tests at 1e-6 for Z and 1e-7 for each of the 27 sequences, together under 1e-5.
    """
    assert_unbiased(result.log_normalizer, chain.log_normalizer)
    index = chain.index(result.state["x"])
    weights = torch.softmax(result.log_weights, 0)
    ratio = (result.log_normalizer - chain.log_normalizer).exp()
    for sequence, exact in enumerate(chain.tilted.tolist()):
        found = ratio * (weights * (index == sequence)).sum(0)
        if exact == 0:
            assert found.sum() == 0
            continue
        error = max(float(found.std()) / REPLICATES**0.5, 1e-12)
        assert error < 0.02, "the test is blunt"
        assert abs(float(found.mean()) - exact) < 5.33 * error


def run(kind: str, twist: str, threshold: float, scheme: str, particles: int = 16) -> Any:
    chain, model = make(kind)
    smc = TwistedSMC(
        model,
        TWISTS[twist](model, chain),
        particles,
        1,
        ess_threshold=threshold,
        resampling=scheme,
        population_plate=PLATE[0],
        seed=0,
    )
    return chain, smc.run()


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("twist", ["bootstrap", "fixed psi", "tilt", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_tilted_law(kind: str, twist: str, threshold: float) -> None:
    check(*run(kind, twist, threshold, "systematic"))


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tilted_law_for_all_schemes(scheme: str, threshold: float) -> None:
    check(*run("ancestral", "sum", threshold, scheme))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_twist_has_no_variance(kind: str, scheme: str, threshold: float) -> None:
    chain, result = run(kind, "exact", threshold, scheme, 3)
    assert result.log_normalizer.std() < 1e-9
    assert float(result.log_normalizer[0]) == pytest.approx(chain.log_normalizer, abs=1e-9)
    counts = torch.bincount(chain.index(result.state["x"]).flatten(), minlength=chain.size)
    assert (counts[chain.tilted == 0] == 0).all()


@pytest.mark.parametrize("kind", ["ancestral", "group"])
def test_token_tilt_is_optimal_for_additive_rewards(kind: str) -> None:
    """With a prediction that depends on the position only, tilt and log-normaliser are exact."""
    chain = MaskedChain(product=True, plate=PLATE, **KINDS[kind])
    model = RewardTilted(chain.diffusion, lambda x: twist.eta.double()[torch.arange(3), x].sum(-1))
    twist = FixedTilt(model, chain)
    smc = TwistedSMC(model, twist, 3, 1, population_plate=PLATE[0], ess_threshold=1.0)
    log_z = smc.run().log_normalizer
    assert log_z.std() < 1e-9
    probs = chain.token_probs(0)[:, :3]
    exact = (probs * twist.eta[:, :3].double().exp()).sum(-1).log().sum()
    assert float(log_z.mean()) == pytest.approx(float(exact), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_no_factor_no_evidence(kind: str) -> None:
    """Under a twist and without a factor log Z is 0 at every step, and the law is the model's."""
    chain, _ = make(kind)
    twist = FixedTilt(chain.diffusion, chain)
    for guide, bound in ((None, 1e-12), (twist, None)):
        smc = TwistedSMC(chain.diffusion, guide, 8, 1, population_plate=PLATE[0], seed=1)
        result = smc.run()
        if bound is not None:
            assert (result.log_normalizer.abs() < bound).all()
        else:
            assert_unbiased(result.log_normalizer, 0.0)


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("twist", TWISTS)
def test_prompts_survive_resampling(kind: str, twist: str) -> None:
    _, result = run(kind, twist, 1.0, "multinomial")
    assert (result.state["x"][..., 1] == 1).all()


def test_every_prompt_is_a_population() -> None:
    """Prompts are resampled by themselves, keep their tokens, and have their own evidence."""
    prompts = torch.tensor([[0, 3, 3], [1, 3, 3], [3, 3, 3], [3, 2, 0]]).repeat(150, 1)
    single = [MaskedChain(num_inference_steps=3, prompt=prompt) for prompt in prompts[:4]]
    chain = single[0]
    model = MaskedDiffusion(
        chain.denoiser, 3, 4, 3, num_inference_steps=3, prompt=prompts, plate=PLATE
    )
    tilted = RewardTilted(model, chain.reward)
    smc = TwistedSMC(tilted, None, 16, 1, population_plate=PLATE[0], ess_threshold=1.0)
    result = smc.run()
    fixed = prompts != 3
    assert (result.state["x"] == prompts)[:, fixed].all()
    for k, one in enumerate(single):
        ratio = (result.log_normalizer[k::4] - one.log_normalizer).exp()
        assert_mean(ratio, 1.0, max_relative_sd=0.05)


class Watched(MaskedDiffusion):
    """Checks at every step that the prediction in the state is that of the particle's tokens."""

    table: MaskedChain

    def step(self, state: Any, t: int) -> None:
        masked = (state["x"] == 3).any(-1)
        exact = self.table.table[self.table.index(state["x"])]
        assert torch.equal(state["logits"][masked], exact[masked]), "not permuted together"
        super().step(state, t)


def watched(**options: Any) -> TwistedSMC:
    chain = MaskedChain(num_inference_steps=5)
    model = Watched(chain.denoiser, 3, 4, 3, num_inference_steps=5, plate=PLATE, **options)
    model.table = chain
    tilted = RewardTilted(model, chain.reward)
    guide = FixedPsi(tilted, chain)
    return TwistedSMC(tilted, guide, 8, 1, population_plate=PLATE[0], ess_threshold=1.0)


def test_the_state_is_permuted_together() -> None:
    watched().run()


def test_a_state_that_is_not_permuted_together_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: ParticleState, index: Tensor) -> None:
        dict.__setitem__(self, "x", take_ancestors(self["x"], index))

    monkeypatch.setattr(ParticleState, "_resample", forgetful)
    with pytest.raises(AssertionError, match="not permuted together"):
        watched().run()


class LearnedTilt(LearnedTwist):
    """One number for each token, fitted by an optimiser."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.eta = torch.nn.Parameter(torch.zeros(model.vocab_size))

    def get_posterior(self, name: str, prior: Any) -> Any:
        return tilt(prior, self.eta) if self.stepping else prior

    def penalty(self) -> Tensor:
        return 0.02 * self.eta.double().square().sum()


def test_trust_region_fit_of_a_token_tilt() -> None:
    """Recorded kernels serve the fit unchanged, and no denoiser call is spent on it."""
    from pyro_twist.infer import TrustRegionTwist

    chain = MaskedChain(6, 4, product=True, unmasking="uniform", group_size=2)
    gain = torch.tensor([1.5, -1.0, 0.0, 0.0])
    model = RewardTilted(chain.diffusion, lambda x: gain[x].sum(-1))
    twist = LearnedTilt(model)
    smc = TrustRegionTwist(model, twist, 128, num_iterations=2, seed=0)
    result = smc.run()
    # 3 steps, at each of which all particles still have masks
    assert result.counts["denoiser"] % (3 * 128) == 0
    eta = twist.eta.detach()
    assert eta[0] > eta[2] > eta[1], "the order of the tokens' rewards"
