# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_twist import GaussianDiffusion, RewardTilted, TrustRegionTwist, TwistedSMC, zoo
from pyro_twist.infer import default_twist
from pyro_twist.twists import (
    CalibratedLookahead,
    DiscountedLookahead,
    ShiftTwist,
    SurrogateTwist,
    TokenSurrogate,
    TokenTilt,
    Twist,
)
from pyro_twist.twists.summary import Curve, Direction, Panel, Ranking
from tests.oracles import LinearGaussianChain
from tests.twists.masked import chain, wrong_hidden_tilt
from tests.twists.masked import tilted as masked_tilted

STEPS = 6


def tilted(*labels: int, scale: float = 60.0) -> RewardTilted:
    label = labels[0] if len(labels) == 1 else list(labels) or None
    model: GaussianDiffusion = zoo.load("digits", label, num_inference_steps=STEPS)
    return RewardTilted(model, {"left": left}, scale)


def left(images: torch.Tensor) -> torch.Tensor:
    """Linear, with a gradient that is plus one on the left half and minus one on the right."""
    return images[..., :4].mean((1, 2, 3)) - images[..., 4:].mean((1, 2, 3))


@pytest.fixture(scope="module")
def fitted() -> Iterator[TrustRegionTwist]:
    smc = TrustRegionTwist(tilted(3), None, 64, seed=0, num_iterations=2, progress=False)
    smc.run()
    yield smc


def find(panels: list[Panel], kind: Any, title: str = "") -> Any:
    [panel] = [one for one in panels if isinstance(one, kind) and title in one.title]
    return panel


def test_direction_is_the_gradient(fitted: TrustRegionTwist) -> None:
    panel = find(fitted.guide.summary(), Direction)
    expected = torch.ones(1, 8, 8)
    expected[..., 4:] = -1
    assert panel.at.shape == panel.change.shape == (1, 1, 8, 8)
    assert torch.cosine_similarity(panel.change[0].flatten(), expected.flatten(), 0) > 0.8


def test_direction_at_other_places(fitted: TrustRegionTwist) -> None:
    """It is what the kernel of the middle step is tilted by, and is as long as can be seen."""
    at = torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.3)])
    surrogate = fitted.guide.parts()[1]
    panel = find(fitted.guide.summary(at), Direction)
    assert torch.equal(panel.at, at)
    tilt = tilts(surrogate, at, STEPS // 2).flatten(1)
    assert torch.cosine_similarity(panel.change.flatten(1), tilt).min() > 1 - 1e-5
    gradient = surrogate.spectrum.inverse(surrogate.gradient(at)).flatten(1).float()
    assert torch.cosine_similarity(panel.change.flatten(1), gradient).max() < 0.99
    size = panel.change.square().flatten(1).mean(1).sqrt()
    assert size.tolist() == pytest.approx([0.5 * float(surrogate.regression.width) / 8] * 2)


def tilts(surrogate: SurrogateTwist, x0_hat: torch.Tensor, t: int) -> torch.Tensor:
    """What a kernel is tilted by if all gains are 1."""
    prior = torch.distributions.Normal(torch.zeros_like(x0_hat), 0.5)
    surrogate.stepping = True
    surrogate.args_kwargs = (({"x0_hat": x0_hat}, t), {})
    features = surrogate.features("x", torch.distributions.Independent(prior, 3))
    del surrogate.args_kwargs
    return features.sum(0)


def test_words_of_the_regression(fitted: TrustRegionTwist) -> None:
    surrogate = fitted.guide.parts()[1]
    text = find(fitted.guide.summary(), Direction).text
    known = {"linear": "straight line", "diagonal": "every frequency", "quadratic": "a quadratic"}
    assert known[surrogate.regression.kind] in text
    assert f"explains {surrogate.score:.0%} of" in text and "middle of the run" in text


def test_slopes_are_those_in_force(fitted: TrustRegionTwist) -> None:
    ladder = fitted.guide.parts()[0]
    panel = find(ladder.summary(), Curve)
    assert list(panel.steps) == list(range(STEPS))
    assert f"the power of {float(ladder.exponent):.2g}" in panel.text
    before = DiscountedLookahead(fitted.model)
    assert list(panel.reference) == [float(before.slopes[t]) for t in fitted.model.timesteps]
    assert list(panel.values) != list(panel.reference)
    smc = TwistedSMC(fitted.model, ladder, 4, seed=1, progress=False)
    smc.init()
    for value, t in zip(panel.values, [None, *fitted.model.timesteps]):
        if t is not None:
            smc.step(t)
        expected = value * smc.state["lookahead"]
        assert torch.allclose(smc.state["lookahead_log_twist"], expected)


def test_gains_are_those_in_force(fitted: TrustRegionTwist) -> None:
    surrogate = fitted.guide.parts()[1]
    with torch.no_grad():
        surrogate.theta.copy_(torch.tensor([[0.2, 0.9, 0.4]]))
    panel = find(surrogate.summary(), Curve)
    assert list(panel.steps) == list(range(1, STEPS + 1))
    state = {"x": torch.zeros(2, 1, 8, 8), "x0_hat": torch.full((2, 1, 8, 8), 0.1)}
    surrogate.stepping = True
    for value, t in zip(panel.values, fitted.model.timesteps):
        surrogate.args_kwargs = ((state, t), {})
        prior = torch.distributions.Normal(torch.zeros(2, 1, 8, 8), 0.5)
        features = surrogate.features("x", torch.distributions.Independent(prior, 3))
        tilt = torch.tensordot(surrogate.theta[0], features, dims=1)
        assert torch.allclose(tilt, value * features.sum(0), atol=1e-6)
    del surrogate.args_kwargs


def test_before_learning() -> None:
    model = tilted(3)
    slopes, pushes = default_twist(model).summary()
    share = [_share(model.schedule[t]) for t in model.timesteps]
    assert list(slopes.values) == pytest.approx([one**0.15 for one in share])
    assert list(slopes.reference) == list(slopes.values) and "exponent 0.15" in slopes.text
    assert type(pushes) is Panel and pushes.text.startswith("None: too few")
    [calibrated] = CalibratedLookahead(model).summary()
    assert set(calibrated.values) == set(calibrated.reference) == {1.0}


def _share(step: Any) -> float:
    """What is known of images of variance 1/4."""
    return step.alpha**2 / 4 / (step.alpha**2 / 4 + step.sigma**2)


def test_scheduled_looks_only() -> None:
    [panel] = CalibratedLookahead(tilted(3), every=2).summary()
    assert list(panel.steps) == [0, 2, 4] and len(panel.reference) == 3


def test_a_useless_regression_says_so() -> None:
    twist = SurrogateTwist(tilted(3))
    points = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(40, generator=torch.Generator().manual_seed(1))
    twist.regression.fit(points, noise, torch.arange(40))
    assert twist.score < 0
    assert "explains 0% of" in find(twist.summary(), Direction).text


def test_shifts_and_twists_without_anything_to_say() -> None:
    chain = LinearGaussianChain(3, dim=2)
    twist = ShiftTwist(chain)
    with torch.no_grad():
        twist.theta[1] = torch.tensor([3.0, 4.0])
    [panel] = twist.summary()
    assert dict(zip(panel.steps, panel.values)) == {1: 0.0, 2: 5.0, 3: 0.0}
    assert Twist(chain).summary() == []
    assert (Twist(chain) + twist).summary()[0].values == panel.values


@pytest.mark.parametrize("labels", [(), (3, 8)])
def test_a_sum_is_saved_and_loaded(labels: tuple[int, ...], tmp_path: Path) -> None:
    model = tilted(*labels)
    plates: dict[str, Any] = {"max_plate_nesting": 1, "population_plate": "classes"}
    plates = {**(plates if labels else {}), "progress": False}
    smc = TrustRegionTwist(model, None, 8, seed=0, num_iterations=2, **plates)
    smc.run()
    smc.guide.save(tmp_path / "twist.safetensors")
    fresh, loaded = default_twist(model), default_twist(model)
    assert loaded.load(tmp_path / "twist.safetensors") is loaded
    ours, theirs, without = (
        TwistedSMC(model, guide, 6, seed=5, **plates).run() for guide in (smc.guide, loaded, fresh)
    )
    assert torch.equal(ours.log_weights, theirs.log_weights)
    assert torch.equal(ours.state["x"], theirs.state["x"])
    assert not torch.equal(ours.state["x"], without.state["x"])


class Letters:
    """A decoder with a tokenizer, as those of texts have one."""

    def convert_ids_to_tokens(self, token: int) -> str:
        return "abc-"[token]

    @property
    def tokenizer(self) -> Letters:
        return self


def test_tokens_are_ranked() -> None:
    """By the odds of a tilt, those that are favoured first."""
    one = chain(decoder=Letters())
    twist = TokenTilt(masked_tilted(one))
    [panel] = twist.summary()
    assert type(panel) is Panel and panel.text.startswith("None: nothing has been learned yet")
    twist.theta.data[0] = torch.tensor([0.5, -1.0, 2.0, 0.0])
    [panel] = twist.summary()
    assert isinstance(panel, Ranking) and panel.kind == "token" and panel.label == "odds"
    assert panel.names == ["c", "a", "b"]
    assert panel.values == pytest.approx([math.exp(2.0), math.exp(0.5), math.exp(-1.0)])
    twist = TokenTilt(masked_tilted(chain()), per="position")
    twist.theta.data[1, 2], twist.theta.data[2, 0] = 0.3, -0.2
    [panel] = (DiscountedLookahead(twist.model) + twist).summary()[1:]
    assert isinstance(panel, Ranking) and panel.kind == "token and position"
    assert panel.names == ["token 2 at 1", "token 0 at 2"]


def test_tilts_of_tokens_that_depend_on_more_are_ranked_too() -> None:
    model = masked_tilted(chain())
    surrogate = TokenSurrogate(model, knots=2)
    surrogate.beta = torch.tensor([[1.0, -2.0, 0.0, 0.0]]).double()
    surrogate.theta.data = torch.tensor([0.5, 1.5]).double()
    ranking, gains = surrogate.summary()
    assert isinstance(ranking, Ranking) and ranking.names == ["token 0", "token 1"]
    assert ranking.values == pytest.approx([math.exp(1.0), math.exp(-2.0)])
    assert "explains 0% of the differences" in ranking.text
    assert isinstance(gains, Curve)
    assert gains.values == pytest.approx(
        [float(surrogate._shares(t - 1) @ surrogate.theta.detach()) for t in model.timesteps]
    )
    twist = wrong_hidden_tilt(model)
    [panel] = twist.summary()
    eta = twist.rows @ twist.theta.detach()[-1]
    assert isinstance(panel, Ranking)
    assert panel.values[0] == pytest.approx(float(eta.max().exp()))
