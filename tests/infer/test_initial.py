# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Moves of the initial particles: the law stays, copies part."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_twist.infer import TwistedSMC, initial
from pyro_twist.infer.initial import PsiSampler
from pyro_twist.latents import WithLatents
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import LookaheadTwist
from pyro_twist.twists.guided import GradientTwist, GuidedTwist
from pyro_twist.twists.tempering import TemperedLookahead
from tests.oracles import MaskedChain
from tests.statistics import assert_mean, assert_unbiased
from tests.twists.gaussian import gaussian
from tests.twists.steering import (
    CURVATURES,
    PLATE,
    REPLICATES,
    REWARDS,
    SLOPE,
    Chain,
    check,
    tilted_law,
    vectors,
)

MOVES: dict[str, dict[str, Any]] = {
    "pcnl": {"kernel": "pcnl", "step_size": 2.0},
    "mala": {"kernel": "mala", "step_size": 1.0},
    "pcn": {"kernel": "pcn", "step_size": 2.0},
    "any size": {"kernel": "pcnl", "step_size": (0.1, 4.0)},
    "pilot": {"kernel": "mala", "pilot": 4},
}


class Quadratic(Chain):
    """A short chain that remembers its start, so that the twist of the start matters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(3, 1.0, 0.95, 0.3, replicates=REPLICATES, **options)
        self.scale = 2.0

    def reward(self, x0: torch.Tensor) -> torch.Tensor:
        return self.scale * REWARDS["quadratic"](x0)

    def law(self) -> tuple[float, torch.Tensor]:
        """Of the chain tilted by ``scale`` times the reward, by a change of units."""
        unit = self.scale**0.5
        covariance = torch.eye(2).double() * self.variance * self.scale
        # 2 (b x - c x^2 / 2) is (b sqrt 2) y - c y^2 / 2 at y = sqrt 2 x
        precision = 1 / covariance[0, 0] + CURVATURES["quadratic"]
        slope = SLOPE * unit
        mean = slope / precision
        log_z = 0.5 * (slope * mean - torch.log(precision * covariance[0, 0]))
        return float(2 * log_z), (mean / unit).expand(2)

    def initial_law(self) -> tuple[float, torch.Tensor]:
        """Mean and normaliser of ``mu psi_T`` for the look-ahead at the first prediction."""
        step = self.a**3
        curvature, slope = self.scale * CURVATURES["quadratic"] * step**2, self.scale * SLOPE * step
        mean = slope / (1 + curvature)
        log_z = 0.5 * (slope * mean - torch.log(torch.tensor(1 + curvature).double()))
        return float(2 * log_z), torch.full((2,), mean).double()


def make(model: Any, guide: Any = None, particles: int = 8, **options: Any) -> PsiSampler:
    options = {"seed": 0, "num_moves": 3, **options}
    if guide is None:
        looking = options.get("kernel") == "pcn"
        guide = LookaheadTwist(model) if looking else GradientTwist(model)
    return PsiSampler(model, guide, particles, 1, population_plate=PLATE[0], **options)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", MOVES)
def test_tilted_law(name: str, threshold: float) -> None:
    """The law and the mean of Z are those without moves; rate 3e-6 for each."""
    model = Quadratic()
    result = make(model, ess_threshold=threshold, **MOVES[name]).run()
    check(result, *model.law())


@pytest.mark.parametrize("reward", REWARDS)
def test_tilted_law_of_data(reward: str) -> None:
    model = vectors(reward)
    check(make(model).run(), *tilted_law(model, reward))


@pytest.mark.parametrize("particles, moves", [(1, 4), (2, 0), (2, 9)])
def test_few_particles(particles: int, moves: int) -> None:
    model = Quadratic()
    model.scale = float(particles)
    result = make(model, particles=particles, num_moves=moves).run()
    check(result, *model.law())


@pytest.mark.parametrize("name", MOVES)
def test_initial_law(name: str) -> None:
    """
    After the moves particles are still of ``mu psi_T``, in mean and in spread.

    ``Z_hat`` of the first state and its product with means of the particles are unbiased.
    """
    model = Quadratic()
    smc = make(model, num_moves=6, **MOVES[name])
    smc.init()
    log_z, mean = model.initial_law()
    assert_unbiased(smc._log_normalizer, log_z)
    x = smc.state["x"].double()
    weights = (smc.state._log_weights.exp() * (smc._log_normalizer - log_z).exp())[..., None]
    variance = 1 / (1 + model.scale * CURVATURES["quadratic"] * model.a**6)
    for k in range(2):
        assert_mean((weights * x).sum(0)[:, k] + 1, 1 + float(mean[k]))
        assert_mean((weights * (x - mean) ** 2).sum(0)[:, k] + 1, 1 + variance)
    assert len(smc.acceptance) == 6 and 0.2 < min(smc.acceptance) < 1


@pytest.mark.parametrize("name", ["pcnl", "mala", "pcn"])
def test_moves_from_elsewhere_go_there(name: str) -> None:
    """
    Many moves forget where they began: mean and variance of each coordinate of 2,400 particles.

    z-tests at 1e-6. Without resampling, so that nothing but moves brings them there.
    """
    model = Quadratic()
    smc = make(model, num_moves=40, resampling="none", **MOVES[name])
    smc.init()
    mean = model.initial_law()[1]
    variance = 1 / (1 + model.scale * CURVATURES["quadratic"] * model.a**6)
    x = smc.state["x"].double().reshape(-1, 2)
    z = (x.mean(0) - mean) / (x.std(0) / len(x) ** 0.5)
    assert (z.abs() < 4.9).all()
    ratio = x.var(0) / variance
    assert ((ratio - 1).abs() < 4.9 * (2 / len(x)) ** 0.5).all()


@pytest.mark.parametrize("name", ["pcnl", "mala"])
def test_a_wrong_correction_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the correction for the drift moves have another law."""
    proposal = initial._PROPOSALS[name]

    def uncorrected(cloud: Any, size: Any) -> Any:
        z, _ = proposal(cloud, size)
        return z, lambda other: torch.zeros_like(other.z)

    monkeypatch.setitem(initial._PROPOSALS, name, uncorrected)
    with pytest.raises(AssertionError):
        test_moves_from_elsewhere_go_there(name)


def test_moves_separate_copies() -> None:
    """What resampling copied is apart again, and a flat twist accepts every move."""
    model = Quadratic()
    for moves, distinct in ((0, False), (3, True)):
        smc = make(model, num_moves=moves)
        smc.init()
        number = len(smc.state["x"][:, 0].unique(dim=0))
        assert (number == 8) == distinct or number > 6
    model.scale = 1e-9
    smc = make(model, kernel="pcn", step_size=4.0)
    smc.init()
    assert smc.acceptance == pytest.approx((1.0, 1.0, 1.0))


def test_what_moved_is_one_particle() -> None:
    """Prediction, look-ahead, gradient and log-twist are those of the place it moved to."""
    base = gaussian((2,), torch.tensor([0.5, 1.5]), steps=5, plate=PLATE)
    model = RewardTilted(base, REWARDS["quadratic"], 300.0, decode=False)
    smc = make(model, step_size=3.0)
    smc.init()
    fresh = {"x": smc.state["x"]}
    base._write(fresh, 5, fresh["x"])
    assert torch.allclose(fresh["x0_hat"], smc.state["x0_hat"], atol=1e-6)
    look = 300 * REWARDS["quadratic"](fresh["x0_hat"])
    assert torch.allclose(look.double(), smc.state["lookahead"], atol=1e-2)
    assert smc._log_twist is not None
    assert torch.allclose(smc._log_twist, smc.state["lookahead"])
    assert not any(value.requires_grad for value in smc.state.values())
    assert min(smc.acceptance) < 0.999, "some stayed"


def test_counts() -> None:
    """Each move is one evaluation of denoiser, reward and gradient for each particle."""
    rows = 4 * REPLICATES
    for moves, pilot in ((0, 0), (3, 0), (2, 4)):
        model = vectors()
        smc = make(model, particles=4, num_moves=moves, pilot=pilot)
        counts = smc.run().counts
        extra = moves + (pilot + 1 if pilot else 0)
        assert counts["denoiser"] == (5 + extra) * rows
        assert counts["gradient"] == (4 + extra) * rows
        assert counts["reward"] == (6 + extra) * rows


def test_seeds_and_resuming() -> None:
    def fresh() -> PsiSampler:
        model = vectors()
        return make(model, GradientTwist(model), seed=5, pilot=2, history="paths")

    whole = fresh()
    result = whole.run()
    first = fresh()
    first.init()
    first.step(5)
    second = fresh()
    second.load_state_dict(first.state_dict())
    again = second.resume()
    assert torch.equal(again.log_normalizer, result.log_normalizer)
    assert torch.equal(again.state["x"], result.state["x"])
    assert second.acceptance == whole.acceptance
    assert second.fitted_step_size == whole.fitted_step_size != second.step_size
    assert torch.equal(whole.run().log_normalizer, result.log_normalizer)


def test_paths_start_where_the_particles_do() -> None:
    model = Quadratic()
    smc = make(model, GradientTwist(model), history="paths", ess_threshold=1.0)
    smc.init()
    start = smc.state["x"].clone()
    for t in model.timesteps:
        smc.step(t)
    result = smc.result()
    assert result.samples is not None
    for path in result.samples["x_3"][:, 0]:
        assert (start[:, 0] == path).all(-1).any()


def test_a_failed_move_is_taken_up_again() -> None:
    def run(failing: int) -> Any:
        calls: list[int] = []

        def reward(x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) == failing:
                raise KeyboardInterrupt
            return REWARDS["quadratic"](x)

        model = RewardTilted(vectors().model, reward, decode=False)
        smc = make(model, GradientTwist(model))
        try:
            return smc.run()
        except KeyboardInterrupt:
            return smc.resume()

    assert torch.equal(run(0).log_normalizer, run(3).log_normalizer)


def test_other_latents_stay_with_their_particle() -> None:
    """A strength that is drawn in ``init`` keeps its prior and its particle."""
    base = gaussian((2,), torch.tensor([0.5, 1.5]), steps=4)

    def prior() -> dict[str, torch.Tensor]:
        return {"strength": pyro.sample("strength", dist.Uniform(0.5, 4.0))}

    model = RewardTilted(WithLatents(base, prior), REWARDS["quadratic"], "strength", decode=False)
    exact = TwistedSMC(model, LookaheadTwist(model), 20_000, seed=1).run()
    moved = PsiSampler(model, GradientTwist(model), 20_000, num_moves=3, seed=2).run()
    # spreads of these are 0.01 or less
    assert float(moved.log_normalizer) == pytest.approx(float(exact.log_normalizer), abs=0.08)
    means = [float(one.expectation("strength")) for one in (exact, moved)]
    assert means[0] == pytest.approx(means[1], abs=0.1)


def test_sums_and_urge() -> None:
    model = vectors("linear")
    drift = GuidedTwist(model, lambda state, t: 0.1 * state["x"], ramp=None)
    for guide in (GradientTwist(model) + drift, GuidedTwist(model, ramp="constant")):
        check(make(model, guide).run(), *tilted_law(model, "linear"))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"num_moves": -1}, "num_moves=-1"),
        ({"pilot": 1.5}, "pilot=1.5"),
        ({"kernel": "hmc"}, "kernel='hmc'"),
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"step_size": (1.0, 0.5)}, "the smaller first"),
        ({"step_size": 5.0}, "at most 4"),
    ],
)
def test_refusals(options: dict[str, Any], told: str) -> None:
    model = vectors()
    with pytest.raises(ValueError, match=told):
        make(model, GradientTwist(model), **options)


def test_guides_that_do_not_do() -> None:
    model = vectors()
    with pytest.raises(ValueError, match="has no `log_twist`"):
        make(model, object(), kernel="pcn")
    with pytest.raises(ValueError, match="follows the gradient"):
        make(model, LookaheadTwist(model))
    for guide in (GuidedTwist(model), TemperedLookahead(model, "adaptive")):
        with pytest.raises(ValueError, match="is 0 at the initial state"):
            make(model, guide, kernel="pcn")
    with pytest.raises(ValueError, match="has no gradient at 'x_5'|has no gradient at x_5"):
        make(model, GradientTwist(model, strength=lambda t: float(t < 5))).run()
    with pytest.raises(ValueError, match="no value at x_5"):
        make(model, Silent(model), kernel="pcn").run()


class Silent(LookaheadTwist):
    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        return 0.0


def test_models_that_do_not_do() -> None:
    chain = MaskedChain(num_inference_steps=3, plate=PLATE)
    tokens = RewardTilted(chain.diffusion, chain.reward)
    with pytest.raises(ValueError, match="moves a normal latent 'x_3'"):
        make(tokens, LookaheadTwist(tokens), kernel="pcn").run()

    def barred(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[..., 0] < 0.3, -torch.inf, x[..., 1])

    model = RewardTilted(vectors().model, barred, decode=False)
    with pytest.raises(ValueError, match="is minus infinity"):
        make(model, LookaheadTwist(model), kernel="pcn").run()
    base = gaussian((2,), torch.tensor(1.0), steps=4, plate=PLATE)

    def prior() -> dict[str, torch.Tensor]:
        return {"strength": pyro.sample("strength", dist.Uniform(0.5, 4.0))}

    latent = RewardTilted(WithLatents(base, prior), REWARDS["linear"], "strength", decode=False)
    with pytest.raises(ValueError, match="draw nothing in init"):
        smc = PsiSampler(latent, GradientTwist(latent), 4, 1, pilot=2)
        smc.run()
