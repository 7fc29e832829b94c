# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Guided proposals: the law that correction gives, and what it is without."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.multiprocessing.reductions import StorageWeakRef

from pyro_twist.diffusion import GaussianDenoiser, GaussianDiffusion
from pyro_twist.infer import ImportanceSampling, TwistedSMC
from pyro_twist.latents import WithLatents
from pyro_twist.rewards import Reward, RewardTilted, Tilted
from pyro_twist.twists import LookaheadTwist
from pyro_twist.twists.guided import CFGGuidance, GradientTwist, GuidedTwist, guided
from tests.oracles import MaskedChain
from tests.statistics import assert_unbiased
from tests.twists.gaussian import chain_law, gaussian
from tests.twists.steering import (
    PLATE,
    REWARDS,
    SLOPE,
    Chain,
    check,
    linear,
    quadratic,
    sampled,
    tilted_law,
    vectors,
)


def drift(state: Any, t: int) -> torch.Tensor:
    """Guidance that knows nothing of the reward."""
    return 0.3 * torch.sin(state["x"]) - 0.1 * state["x0_hat"]


def cfg(model: Any) -> CFGGuidance:
    other = gaussian((2,), torch.tensor([0.9, 0.7]), mean=-0.3, steps=5, plate=PLATE)
    return CFGGuidance(other, 1.7)


TWISTS: dict[str, Callable[[Any], Any]] = {
    "TDS": GradientTwist,
    "TDS, strong": lambda model: GradientTwist(model, strength=lambda t: 1.5 if t > 2 else 0.5),
    "TDS, prediction": lambda model: GradientTwist(model, through="prediction", cap=0.5),
    "TDS, rare": lambda model: GradientTwist(model, schedule={4, 2}),
    "DAS": lambda model: GradientTwist(model, tempering="geometric"),
    "DAS, adaptive": lambda model: GradientTwist(model, tempering="adaptive"),
    "URGE": GuidedTwist,
    "URGE, constant": lambda model: GuidedTwist(model, "prediction", ramp="constant"),
    "URGE, adaptive": lambda model: GuidedTwist(model, ramp="adaptive"),
    "URGE, no twist": lambda model: GuidedTwist(model, ramp=None),
    "URGE, function": lambda model: GuidedTwist(model, drift, ramp=lambda t: 1 / t),
    "URGE, CFG": lambda model: GuidedTwist(model, cfg(model)),
    "sum": lambda model: GradientTwist(model) + GuidedTwist(model, drift, ramp=None),
}


@pytest.mark.parametrize("name", TWISTS)
@pytest.mark.parametrize("reward", REWARDS)
def test_tilted_law(name: str, reward: str) -> None:
    """Whatever guides, the law is the tilted one; rate 3e-6 for each."""
    model = vectors(reward)
    check(sampled(model, TWISTS[name](model)), *tilted_law(model, reward))


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("name", ["TDS", "DAS", "URGE"])
def test_tilted_law_at_thresholds(name: str, threshold: float) -> None:
    model = vectors()
    result = sampled(model, TWISTS[name](model), ess_threshold=threshold)
    check(result, *tilted_law(model, "quadratic"))


@pytest.mark.parametrize("name", ["TDS", "URGE, function"])
def test_one_particle(name: str) -> None:
    model = vectors("linear")
    check(sampled(model, TWISTS[name](model), 1), *tilted_law(model, "linear"))


@pytest.mark.parametrize("name", ["TDS", "URGE"])
def test_a_run_without_the_density_ratio_is_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Girsanov's term dropped from the weights the tests above fail."""
    monkeypatch.setattr(
        "pyro_twist.infer.increments.log_ratio", lambda p, q, x: torch.zeros(x.shape[:-1]).double()
    )
    model = vectors()
    with pytest.raises(AssertionError):
        check(sampled(model, TWISTS[name](model), 32), *tilted_law(model, "quadratic"))


# the linear-Gaussian chain


def chain(**options: Any) -> Chain:
    return Chain(4, 0.7, 0.8, 0.5, replicates=PLATE[1], **options)


def step_increments(model: Any, twist: Any) -> torch.Tensor:
    """Log-weights after the last step less those after the first state, without resampling."""
    smc = TwistedSMC(model, twist, 8, 1, population_plate=PLATE[0], ess_threshold=0.0, seed=0)
    smc.init()
    before = smc.state._log_weights + smc._log_normalizer
    for t in model.timesteps:
        smc.step(t)
    return smc.state._log_weights + smc._log_normalizer - before


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_chain_law(threshold: float) -> None:
    model = chain()
    result = sampled(model, GradientTwist(model), ess_threshold=threshold)
    check(result, model.log_normalizer, torch.full((2,), model.tilted_mean).double())


def test_optimal_strength_has_no_variance() -> None:
    """
    With ``x_{t-1} = a x_t + s z`` the best tilt is ``grad log psi_{t-1}``, which is the gradient at
    ``x_t`` divided by ``a``; then every step adds a number.
    """
    model = chain()
    added = step_increments(model, GradientTwist(model, strength=1 / model.a))
    exact = sum(0.5 * 2 * (model.k * model.a**t * model.s) ** 2 for t in range(4))
    assert torch.allclose(added, torch.full_like(added, exact), atol=1e-5)
    assert step_increments(model, GradientTwist(model)).std() > 0.05
    assert step_increments(model, LookaheadTwist(model)).std() > 0.5


def test_prediction_has_no_variance_for_linear_rewards() -> None:
    """Gaussian data of one variance: the response of the prediction is known exactly."""
    base = gaussian((2,), torch.tensor(0.6), steps=5, plate=PLATE)
    model = RewardTilted(base, linear, decode=False)
    twist = GradientTwist(model, through="prediction", variance=0.6)
    added = step_increments(model, twist)
    assert (added - added.mean()).abs().max() < 1e-4
    assert step_increments(model, LookaheadTwist(model)).std() > 0.3


def test_guided_model_has_the_bias_of_guidance() -> None:
    """
    Without a density ratio the law is that of the shifted chain.

    Each kernel moves by ``s^2 k a^t`` and the rest of the chain shrinks that by ``a^{t-1}``. FK on
    the guided model samples that law, tilted once more, and misses the tilted law by far.
    """
    model = chain()
    shift = sum(model.s**2 * model.k * model.a**t * model.a ** (t - 1) for t in model.timesteps)
    plain = guided(model, GradientTwist(model))
    log_z = 2 * model.k * shift + model.log_normalizer
    mean = torch.full((2,), model.tilted_mean + shift).double()
    for twist in (None, LookaheadTwist(model, key="fk")):
        result = sampled(plain, twist, 32)
        check(result, log_z, mean)
        with pytest.raises(AssertionError):
            check(result, model.log_normalizer, mean - shift)
    assert result.counts["gradient"] == 4 * 32 * PLATE[1]


def test_guided_model_runs_by_itself() -> None:
    """Its trajectories are those of the proposals, in and out of plates."""
    base = gaussian((2,), torch.tensor([0.5, 1.5]), steps=5)
    model = RewardTilted(base, linear, 8.0, decode=False)
    plain = guided(model, GradientTwist(model))
    with pyro.plate("particles", 2000):
        moved = plain().mean(0)
        still = base().mean(0)
    # the shift is 0.3 or more, six standard errors more than asked for
    assert (moved > still + 0.15).all()
    assert plain().shape == (2,)
    state: dict[Any, Any] = {}
    plain.init(state)
    kernel, own = plain.kernel(state, 5), model.kernel(state, 5)
    expected = own.mean + own.variance * state["lookahead_gradient"]
    assert torch.allclose(kernel.mean, expected) and torch.equal(kernel.variance, own.variance)


# URGE: increments and their limit


class EulerMaruyama:
    """``dX = -X ds + dW`` for one unit of time from one place; its prediction is its state."""

    event_shape = (1,)

    def __init__(self, num_steps: int) -> None:
        self.timesteps = tuple(range(num_steps, 0, -1))
        self.width, self.keep_graph = 1 / num_steps, False

    def init(self, state: Any) -> None:
        start = dist.Delta(torch.tensor([0.3]), event_dim=1)
        self.write(state, pyro.sample(f"x_{self.timesteps[0]}", start))

    def step(self, state: Any, t: int) -> None:
        self.write(state, pyro.sample(f"x_{t - 1}", self.kernel(state, t)))

    def kernel(self, state: Any, t: int) -> Any:
        return dist.Normal(state["x"] * (1 - self.width), self.width**0.5).to_event(1)

    def write(self, state: Any, x: torch.Tensor) -> None:
        with torch.enable_grad():
            state["x"] = x.detach().requires_grad_(self.keep_graph)
            state["x0_hat"] = state["x"] * 1.0


def bend(x: torch.Tensor) -> torch.Tensor:
    return -0.5 * (x[..., 0] - 1) ** 2


def rate(x: torch.Tensor, ramp: float) -> torch.Tensor:
    """What particles gain per unit time: with a ramp that rises by a half."""
    slope = ramp * (1 - x)
    return 0.5 * bend(x[..., None]) - x * slope + 0.5 * (slope**2 - ramp)


def path_and_particle_weights(num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-weights of whole paths, and the time integrals of the rate along them."""
    model = RewardTilted(EulerMaruyama(num_steps), bend)
    twist = GuidedTwist(model, ramp=lambda t: 1 - t / (2 * num_steps))
    smc = TwistedSMC(model, twist, 1000, ess_threshold=0.0, seed=0)
    smc.init()
    start = smc.state._log_weights + smc._log_normalizer
    total = torch.zeros(1000).double()
    for t in model.timesteps:
        total += rate(smc.state["x"][..., 0].double(), 1 - t / (2 * num_steps)) / num_steps
        smc.step(t)
    return smc.state._log_weights + smc._log_normalizer - start, total


def test_path_weights_tend_to_particle_weights() -> None:
    r"""
    With ``G = r`` the log-weight of a path tends to :math:`\int \lambda(x_s, s) ds` along it.

    :math:`\lambda = \partial_s r + v \cdot \nabla r + (\Delta r + |\nabla r|^2) / 2` for the
    drift v and unit noise. The difference falls as the square root of the step: by 2 for a quarter,
    of which 1,000 paths know a few percent. Girsanov's term alone does not fall.
    """
    errors = []
    for num_steps in (16, 64, 256):
        paths, particles = path_and_particle_weights(num_steps)
        errors.append(float((paths - particles).square().mean().sqrt()))
    assert particles.std() > 5 * errors[-1], "the weights are no constant"
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.2)


def test_increment_is_that_of_the_paper() -> None:
    """The change of the ramped look-ahead, less both of Girsanov's terms at the noise drawn."""
    model = vectors(steps=4)
    twist = GuidedTwist(model, strength=0.8)
    smc = TwistedSMC(model, twist, 8, 1, population_plate=PLATE[0], ess_threshold=0.0, seed=0)
    smc.init()
    smc.step(4)
    before = {key: value.clone() for key, value in smc.state.items()}
    log_weights = smc.state._log_weights + smc._log_normalizer
    kernel = model.kernel(before, 3)
    smc.step(3)
    tilt = 0.8 * 0.25 * before["lookahead_gradient"]
    noise = (smc.state["x"] - kernel.mean) / kernel.stddev - kernel.stddev * tilt
    girsanov = -(kernel.stddev * tilt * noise + 0.5 * (kernel.stddev * tilt) ** 2).sum(-1)
    rise = 0.5 * smc.state["lookahead"] - 0.25 * before["lookahead"]
    added = smc.state._log_weights + smc._log_normalizer - log_weights
    assert torch.allclose(added, rise + girsanov, atol=1e-5)


def test_guidance_is_that_of_the_scheduler() -> None:
    """CFG as a drift proposes the kernel of a model with a guidance scale."""
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    parts = [GaussianDenoiser(torch.full((2,), m), 0.5, scheduler) for m in (1.0, -1.0)]

    def network(x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        both = torch.stack([part(x, timestep) for part in parts])
        return both[label, torch.arange(len(x))]

    def make(label: int, **options: Any) -> GaussianDiffusion:
        conditioning = {"label": label}
        return GaussianDiffusion(
            network, scheduler, (2,), num_inference_steps=5, conditioning=conditioning, **options
        )

    whole = make(0, guidance_scale=2.5, null_conditioning={"label": 1})
    base = make(0)
    guidance = CFGGuidance(make(1), 2.5)
    twist = GuidedTwist(base, guidance, ramp=None)
    x, states = torch.randn(6, 2), []
    for model in (whole, base):
        states.append({"x": x})
        model._write(states[-1], 4, x)
    found, expected = guided(base, twist).kernel(states[1], 4), whole.kernel(states[0], 4)
    assert torch.allclose(found.mean, expected.mean, atol=1e-5)
    assert torch.equal(found.variance, expected.variance)
    assert twist.counts == {"denoiser": 6}
    result = TwistedSMC(base, twist, 6, seed=0).run()
    # the last step has no noise, and is not guided
    assert result.counts == {"denoiser": 6 * 5 + 6 * 4}


# cost, memory, precision


def network(width: int = 16, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, 2)]
    return torch.nn.Sequential(*layers).to(dtype).requires_grad_(False)


class Timeless(torch.nn.Module):
    """A network that ignores the time, and notes how many samples' activations are alive."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = network(dtype=dtype)
        self.alive: list[tuple[Any, int]] = []
        self.most = 0

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        first, activation, last = self.layers
        hidden = activation(first(x))
        self.alive = [(ref, rows) for ref, rows in self.alive if not ref.expired()]
        self.alive.append((StorageWeakRef(hidden.untyped_storage()), len(x)))
        self.most = max(self.most, sum(rows for _, rows in self.alive))
        return last(hidden)


def learned(chunk: int | None, reward_chunk: int | None = None, **options: Any) -> RewardTilted:
    base = GaussianDiffusion(
        Timeless(**options),
        DDPMScheduler(),
        (2,),
        num_inference_steps=4,
        chunk_size=chunk,
        plate=("prompts", 2),
    )
    reward = Reward(quadratic, chunk_size=reward_chunk, differentiable=True)
    return RewardTilted(base, reward, decode=False)


@pytest.mark.parametrize("chunks", [(3, None), (None, 2), (4, 3), (1, 1)])
def test_chunks_change_nothing(chunks: tuple[int | None, int | None]) -> None:
    results = []
    for model in (learned(None), learned(*chunks)):
        smc = TwistedSMC(
            model, GradientTwist(model), 5, 1, population_plate="prompts", ess_threshold=0.0, seed=0
        )
        smc.init()
        gradient = smc.state["lookahead_gradient"].clone()
        results.append((gradient, smc.run()))
    (whole, first), (chunked, second) = results
    assert whole.abs().max() > 0 and torch.allclose(whole, chunked, atol=1e-6)
    assert torch.allclose(first.log_normalizer, second.log_normalizer, atol=1e-4)
    assert first.counts == second.counts == {"denoiser": 40, "reward": 50, "gradient": 30}


def test_chunks_bound_what_is_alive() -> None:
    most = {}
    for chunk in (None, 3):
        model = learned(chunk)
        smc = TwistedSMC(model, GradientTwist(model), 6, 1, population_plate="prompts", seed=0)
        smc.run()
        most[chunk] = model.denoiser.network.most
    assert most == {None: 12, 3: 3}


def test_no_graph_is_left() -> None:
    model = learned(None)
    smc = TwistedSMC(model, GradientTwist(model), 4, 1, population_plate="prompts", seed=0)
    smc.init()
    assert not any(value.requires_grad for value in smc.state.values())
    assert model.keep_graph is False
    result = smc.run()
    assert not any(value.requires_grad for value in result.state.values())
    assert not result.log_normalizer.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_network_of_its_own_dtype(dtype: torch.dtype) -> None:
    """
    A network without a closed form, clipped: two unbiased estimates of Z agree.

    A two-sample z-test, rate 1e-6.
    """
    base = GaussianDiffusion(
        Timeless(dtype), DDPMScheduler(), (2,), num_inference_steps=4, plate=PLATE
    )
    model = RewardTilted(base, quadratic, 0.5, decode=False)
    importance = ImportanceSampling(model, 32, 1, population_plate=PLATE[0], seed=1).run()
    result = sampled(model, GradientTwist(model), 8)
    assert result.state["x"].dtype == torch.float32
    level = importance.log_normalizer.logsumexp(0) - math.log(PLATE[1])
    ratios = [(one.log_normalizer - level).exp() for one in (importance, result)]
    error = math.sqrt(sum(float(ratio.var()) for ratio in ratios) / PLATE[1])
    assert error < 0.05
    assert abs(float(ratios[0].mean() - ratios[1].mean())) < 4.9 * error


def test_strength_zero_is_lookahead() -> None:
    model = vectors()
    plain = sampled(model, LookaheadTwist(model))
    for twist in (
        GradientTwist(model, strength=0),
        GuidedTwist(model, strength=0, ramp="constant"),
    ):
        result = sampled(model, twist)
        assert torch.equal(plain.state["x"], result.state["x"])
        assert torch.equal(plain.log_normalizer, result.log_normalizer)
        assert result.counts["gradient"] == 0


def test_the_last_step_without_noise_stays() -> None:
    """DDPM's last step is a Delta: no gradient is spent on it; DDIM's has none either."""
    for scheduler in (DDPMScheduler(clip_sample=False), DDIMScheduler(clip_sample=False)):
        denoiser = GaussianDenoiser(torch.zeros(2), 1.0, scheduler)
        base = GaussianDiffusion(denoiser, scheduler, (2,), num_inference_steps=4)
        model = RewardTilted(base, linear, decode=False)
        result = TwistedSMC(model, GradientTwist(model), 5, seed=0).run()
        assert result.counts == {"denoiser": 20, "reward": result.counts["reward"], "gradient": 15}


def test_the_cap_bounds_the_shift() -> None:
    model = vectors()
    twist = GradientTwist(model, strength=100.0, cap=0.3)
    smc = TwistedSMC(model, twist, 8, 1, population_plate=PLATE[0], seed=0)
    smc.init()
    kernel = model.kernel(smc.state, 5)
    twist.stepping, twist.args_kwargs = True, ((smc.state, 5), {})
    moved = (twist.get_posterior("x_4", kernel).mean - kernel.mean) / kernel.stddev
    assert torch.allclose(moved.norm(dim=-1), torch.tensor(0.3), atol=1e-4)


def test_a_failed_reward_is_taken_up_again() -> None:
    def run(failing: int) -> TwistedSMC:
        calls = []

        def reward(x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) == failing:
                raise KeyboardInterrupt
            return quadratic(x)

        base = gaussian((2,), torch.tensor([0.5, 1.5]), steps=5)
        model = RewardTilted(base, reward, decode=False)
        smc = TwistedSMC(model, GradientTwist(model), 6, seed=0)
        try:
            smc.run()
        except KeyboardInterrupt:
            smc.resume()
        return smc

    assert torch.equal(run(0).get_log_normalizer(), run(4).get_log_normalizer())


def test_forbidden_predictions_have_no_gradient() -> None:
    """Minus infinity is no direction, and says nothing about the others."""

    def barred(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[..., 0] < 0.4, -torch.inf, (x + 3).clamp(min=1e-3).log().sum(-1))

    base = gaussian((2,), torch.tensor(0.6), mean=0.5, steps=5)
    model = RewardTilted(base, barred, decode=False)
    smc = TwistedSMC(model, GradientTwist(model, strength=0.1), 200, ess_threshold=0.0, seed=0)
    smc.init()
    for t in (5, 4, 3):
        smc.step(t)
    forbidden = smc.state["x0_hat"][:, 0] < 0.4
    assert forbidden.any() and (smc.state["lookahead_gradient"][forbidden] == 0).all()
    assert (smc.state["lookahead_gradient"][~forbidden] != 0).all()


# errors


def test_black_boxes_are_refused_by_name() -> None:
    reward = Reward(lambda x: x[:, 0], name="my scorer", differentiable=False)
    model = RewardTilted(vectors().model, {"first": reward}, decode=False)
    for make in (GradientTwist, GuidedTwist):
        with pytest.raises(ValueError, match="'my scorer' is a black box.*SurrogateTwist"):
            make(model)
    check_only = GuidedTwist(model, drift)
    assert check_only.counts == {}


def test_one_gradient_of_two_rewards_is_enough() -> None:
    """A black box beside a differentiable reward is in the weights, not in the direction."""
    first = Reward(lambda x: SLOPE * x[:, 0], differentiable=False)
    model = RewardTilted(
        vectors().model, {"a": first, "b": lambda x: SLOPE * x[:, 1]}, decode=False
    )
    check(sampled(model, GradientTwist(model)), *tilted_law(vectors("linear"), "linear"))


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda m: GradientTwist(m, through="both"), "through='both'"),
        (lambda m: GradientTwist(m, variance=0.0), "variance=0.0"),
        (lambda m: GradientTwist(m, strength="big"), "strength='big'"),
        (lambda m: GradientTwist(m, strength=math.nan), "strength=nan"),
        (lambda m: GradientTwist(m, cap=0.0), "cap=0.0"),
        (lambda m: GradientTwist(m.model), "no reward or other terminal potential"),
        (lambda m: GuidedTwist(m, "up"), "guidance='up'"),
        (lambda m: GuidedTwist(m, ramp="steep"), "'steep' is none of"),
        (lambda m: GuidedTwist(m, CFGGuidance(gaussian((2,), torch.tensor(1.0)), 2.0)), "noise l"),
        (lambda m: CFGGuidance(object(), 2.0), "has no noise `schedule`"),
    ],
)
def test_refusals(make: Callable[[Any], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(vectors())


def test_models_without_a_gradient_are_refused() -> None:
    chain = MaskedChain(num_inference_steps=3)
    with pytest.raises(ValueError, match="GradientTokenTwist"):
        GradientTwist(RewardTilted(chain.diffusion, chain.reward))
    bare = EulerMaruyama(3)
    del bare.keep_graph
    with pytest.raises(ValueError, match="`keep_graph`"):
        GradientTwist(RewardTilted(bare, linear))
    with pytest.raises(ValueError, match="`schedule`"):
        GradientTwist(RewardTilted(EulerMaruyama(3), linear), through="prediction")


@pytest.mark.parametrize(
    "reward, told",
    [
        (lambda x: torch.tensor(x.tolist()).sum(-1), "has no gradient at the prediction"),
        (lambda x: (x - x.detach()).abs().sqrt().sum(-1), "gradient of the reward is"),
    ],
)
def test_rewards_whose_gradient_is_bad(reward: Any, told: str) -> None:
    model = RewardTilted(vectors().model, reward, decode=False)
    with pytest.raises(ValueError, match=told):
        sampled(model, GradientTwist(model))


@pytest.mark.parametrize(
    "guidance, told",
    [
        (lambda state, t: state["x"][..., 0], r"guidance\(state, 5\) returned \(8, 300\)"),
        (lambda state, t: 3.0, "returned float"),
        (lambda state, t: state["x"] / 0, "is not finite"),
    ],
)
def test_guidance_that_does_not_fit(guidance: Any, told: str) -> None:
    model = vectors()
    with pytest.raises(ValueError, match=told):
        sampled(model, GuidedTwist(model, guidance))


def test_a_state_given_from_outside_has_no_graph() -> None:
    from pyro_twist.handlers import condition

    model = vectors(plate=None)
    given = condition(model, data={"x_5": torch.zeros(2)})
    with pytest.raises(ValueError, match="through='prediction'"):
        TwistedSMC(given, GradientTwist(model), 4).run()
    twist = GradientTwist(model, through="prediction")
    assert torch.isfinite(TwistedSMC(given, twist, 4).run().log_normalizer)


def test_an_observation_as_the_potential() -> None:
    """An inverse problem: the evidence of a noisy picture of Gaussian data."""
    base = gaussian((2,), torch.tensor(0.5), steps=5, plate=PLATE)

    def likelihood(state: Any, x0: torch.Tensor) -> None:
        pyro.sample("y", dist.Normal(x0, 0.7).to_event(1), obs=torch.tensor([1.0, 0.2]))

    model = Tilted(base, likelihood)
    result = sampled(model, GradientTwist(model))
    mean, covariance = chain_law(base)
    law = torch.distributions.Normal(mean, (covariance.diag() + 0.49).sqrt())
    assert_unbiased(result.log_normalizer, float(law.log_prob(torch.tensor([1.0, 0.2])).sum()))


def test_the_value_alone_needs_no_graph() -> None:
    """In Pyro's own filter, with another proposal, the twist is a look-ahead."""
    from pyro.infer import SMCFilter

    from pyro_twist.twists import Twisted

    model = RewardTilted(gaussian((2,), torch.tensor(0.5), steps=4), linear, decode=False)

    class Proposal:
        def init(self, state: Any) -> None:
            pyro.sample("x_4", model.initial())

        def step(self, state: Any, t: int) -> None:
            pyro.sample(f"x_{t - 1}", model.kernel(state, t))

    twists = GradientTwist(model), LookaheadTwist(model)
    values = []
    for twist in twists:
        pyro.set_rng_seed(0)
        smc = SMCFilter(Twisted(model, twist), Proposal(), 50, max_plate_nesting=0)
        smc.init()
        for t in model.timesteps:
            smc.step(t)
        values.append(smc.state["x"])
    assert torch.equal(*values)


def test_the_shift_has_the_next_temperature() -> None:
    """As in DAS: the temperature of the state that the step leads to."""
    model = vectors()
    twist = GradientTwist(model, tempering=[0.1, 0.4, 0.5, 0.6, 0.7])
    smc = TwistedSMC(model, twist, 4, 1, population_plate=PLATE[0], seed=0)
    smc.init()
    kernel = model.kernel(smc.state, 5)
    twist.stepping, twist.args_kwargs = True, ((smc.state, 5), {})
    moved = twist.get_posterior("x_4", kernel).mean - kernel.mean
    expected = 0.4 * kernel.variance * smc.state["lookahead_gradient"]
    assert expected.abs().max() > 0 and torch.allclose(moved, expected, atol=1e-6)


def test_chunks_take_their_part_of_the_state() -> None:
    """A strength that is a latent is that of the particles in the chunk."""

    def prior() -> dict[str, torch.Tensor]:
        return {"strength": pyro.sample("strength", dist.Uniform(0.5, 4.0))}

    gradients = []
    for chunk in (None, 3):
        base = gaussian((2,), torch.tensor(0.5), steps=4, chunk_size=chunk)
        model = RewardTilted(WithLatents(base, prior), linear, "strength", decode=False)
        smc = TwistedSMC(model, GradientTwist(model), 7, ess_threshold=0.0, seed=0)
        smc.init()
        gradients.append(smc.state["lookahead_gradient"])
    assert gradients[0].std() > 0 and torch.allclose(*gradients)


@pytest.mark.parametrize("value", [math.nan, math.inf, "a", None])
def test_functions_of_strength_return_numbers(value: Any) -> None:
    model = RewardTilted(gaussian((2,), torch.eye(2)), lambda x: x.sum(-1), decode=False)
    twist = GradientTwist(model, strength=lambda t: value)
    with pytest.raises(ValueError, match=r"strength\(\d+\) is .*; return a finite number"):
        TwistedSMC(model, twist, 2, seed=0).run()


@pytest.mark.parametrize("cap", ["a", 0, -1.0, math.nan])
def test_caps(cap: Any) -> None:
    with pytest.raises(ValueError, match="cap="):
        GradientTwist(
            RewardTilted(gaussian((2,), torch.eye(2)), lambda x: x.sum(-1), decode=False), cap=cap
        )
