# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The kernels against the diffusers schedulers' own ``step``, with the same noise."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from pyro_twist.diffusion import GaussianDiffusion

ROWS, SHAPE = 3, (2, 4, 4)
CLIPS: dict[str, dict[str, Any]] = {
    "free": dict(clip_sample=False),
    "clip": dict(clip_sample=True, clip_sample_range=0.7),
    "threshold": dict(thresholding=True, dynamic_thresholding_ratio=0.8, sample_max_value=1.5),
}
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


class Script:
    """A denoiser that answers with what is put into ``output`` and keeps what it was asked."""

    output: Tensor
    x: Tensor
    timestep: Tensor

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.x, self.timestep = x, timestep
        return self.output


def draw(kernel: dist.TorchDistribution, noise: Tensor) -> Tensor:
    if isinstance(kernel, dist.Delta):
        return kernel.v
    return kernel.base_dist.loc + kernel.base_dist.scale * noise


def output_like(model: GaussianDiffusion, t: int, x: Tensor, kind: str) -> Tensor:
    """A plausible network output at ``x``: the right one for some x_0, disturbed."""
    step = model.schedule[t]
    x0 = torch.empty_like(x).uniform_(-1, 1)
    eps = (x - step.alpha * x0) / step.sigma
    alpha, sigma = step.alpha * step.input_scale, step.sigma * step.input_scale
    right = dict(epsilon=eps, sample=x0, v_prediction=alpha * eps - sigma * x0, velocity=eps - x0)[
        kind
    ]
    output = right + 0.2 * torch.randn_like(x)
    if model.schedule.learned_variance is None:
        return output
    return torch.cat([output, torch.rand_like(x) * 0.9 + 0.05], dim=1)


def assert_conforms(
    scheduler: Any,
    number: int,
    *,
    reference: Any = None,
    tolerance: float = 2e-6,
    step_options: dict[str, Any] | None = None,
    **options: Any,
) -> GaussianDiffusion:
    """Walks down a trajectory of random states and compares every kernel with ``step``."""
    denoiser = Script()
    model = GaussianDiffusion(denoiser, scheduler, SHAPE, num_inference_steps=number, **options)
    reference = copy.deepcopy(scheduler if reference is None else reference)
    reference.set_timesteps(number)
    kind = scheduler.config.get("prediction_type", "velocity")
    assert model.timesteps == tuple(range(len(reference.timesteps), 0, -1))
    state: dict[str, Tensor] = {}
    for t, timestep in zip(model.timesteps, reference.timesteps, strict=True):
        x = torch.randn(ROWS, *SHAPE) * math.hypot(model.schedule[t].alpha, model.schedule[t].sigma)
        denoiser.output = output_like(model, t, x, kind)
        with poutine.condition(data={f"x_{t}": x}):
            if t == model.timesteps[0]:
                model.init(state)
            else:
                model.step(state, t + 1)
        expected_input = getattr(reference, "scale_model_input", lambda x, _: x)(x, timestep)
        assert torch.allclose(denoiser.x, expected_input, rtol=1e-6)
        assert denoiser.timestep.tolist() == [timestep.item()] * ROWS
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        ours = draw(model.kernel(state, t), noise)
        theirs = reference.step(
            denoiser.output,
            timestep,
            x,
            generator=torch.Generator().manual_seed(t),
            **(step_options or {}),
        )
        bound = tolerance * (10 + float(state["x0_hat"].abs().max() + x.abs().max()))
        assert (ours - theirs.prev_sample).abs().max() < bound, t
        prediction = theirs.get("denoised", theirs.get("pred_original_sample"))
        if prediction is not None:
            assert torch.allclose(state["x0_hat"], prediction, rtol=1e-5, atol=bound)
    return model


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]
)
def test_ddpm(variance: str, prediction: str, clip: str) -> None:
    scheduler = DDPMScheduler(variance_type=variance, prediction_type=prediction, **CLIPS[clip])
    assert_conforms(scheduler, 8)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_fixed_large_log_is_fixed_large(prediction: str, clip: str) -> None:
    scheduler = DDPMScheduler(
        variance_type="fixed_large_log", prediction_type=prediction, **CLIPS[clip]
    )
    reference = DDPMScheduler.from_config(scheduler.config, variance_type="fixed_large")
    assert_conforms(scheduler, 8, reference=reference)


@pytest.mark.parametrize("number", [1, 7, 30, 50])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_ddpm_spacings(schedule: str, spacing: str, offset: int, number: int) -> None:
    scheduler = DDPMScheduler(beta_schedule=schedule, timestep_spacing=spacing, steps_offset=offset)
    model = assert_conforms(scheduler, number)
    final = model.kernel({"x": torch.zeros(SHAPE), "x0_hat": torch.zeros(SHAPE)}, 1)
    assert isinstance(final, dist.Delta)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim(eta: float, prediction: str, clip: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, **CLIPS[clip])
    assert_conforms(scheduler, 8, eta=eta, step_options=dict(eta=eta))


@pytest.mark.parametrize("clip", CLIPS)
def test_ddim_use_clipped_model_output(clip: str) -> None:
    assert_conforms(
        DDIMScheduler(**CLIPS[clip]),
        8,
        use_clipped_model_output=True,
        step_options=dict(eta=1.0, use_clipped_model_output=True),
    )


@pytest.mark.parametrize("number", [1, 20, 30, 50])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_spacings(spacing: str, to_one: bool, offset: int, number: int) -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=to_one,
        steps_offset=offset,
        timestep_spacing=spacing,
    )
    assert_conforms(scheduler, number, step_options=dict(eta=1.0))


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize("make", [DDPMScheduler, DDIMScheduler])
def test_zero_terminal_snr(make: Any, prediction: str) -> None:
    scheduler = make(
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type=prediction,
        clip_sample=False,
    )
    # At eta = 1 diffusers' DDIM may take the root of a rounding error below zero.
    options = dict(eta=0.9) if make is DDIMScheduler else {}
    assert_conforms(scheduler, 10, step_options=options, **options)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_parallel(prediction: str) -> None:
    assert_conforms(DDPMParallelScheduler(prediction_type=prediction), 8)
    ddim = DDIMParallelScheduler(prediction_type=prediction)
    assert_conforms(ddim, 8, step_options=dict(eta=1.0))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("number", [1, 7, 30])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_ancestral(prediction: str, spacing: str, number: int) -> None:
    scheduler = EulerAncestralDiscreteScheduler(
        prediction_type=prediction, timestep_spacing=spacing, steps_offset=1
    )
    model = assert_conforms(scheduler, number)
    scheduler.set_timesteps(number)
    assert float(model.initial().stddev.max()) == pytest.approx(float(scheduler.init_noise_sigma))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("number", [1, 4, 8])
def test_lcm(number: int, prediction: str, clip: str) -> None:
    assert_conforms(LCMScheduler(prediction_type=prediction, **CLIPS[clip]), number)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_tcd(gamma: float, prediction: str) -> None:
    scheduler = TCDScheduler(prediction_type=prediction)
    assert_conforms(scheduler, 4, eta=gamma, step_options=dict(eta=gamma))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("number", [1, 4, 20])
def test_flow_matching_noised_again(number: int, shift: float) -> None:
    stochastic = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    assert_conforms(stochastic, number)
    assert_conforms(FlowMatchLCMScheduler(shift=shift), number)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("number", [1, 4, 20])
def test_flow_matching_tends_to_euler(number: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert_conforms(scheduler, number, eta=1e-7)


def test_conformance_test_can_fail() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    with pytest.raises(AssertionError):
        assert_conforms(scheduler, 8, eta=0.99, step_options=dict(eta=1.0))


def test_ddim_is_ddpm_when_nothing_clips() -> None:
    options = dict(clip_sample=False, prediction_type="v_prediction")
    ddpm = GaussianDiffusion(Script(), DDPMScheduler(**options), SHAPE)
    ddim = GaussianDiffusion(Script(), DDIMScheduler(**options), SHAPE)
    for t, (x0, x) in itertools.product(ddpm.timesteps, [(1.0, 0.0), (0.0, 1.0)]):
        state = {"x": torch.full(SHAPE, x), "x0_hat": torch.full(SHAPE, x0)}
        one, two = ddpm.kernel(state, t), ddim.kernel(state, t)
        # Rounding in 1 - alpha_t / alpha_{t-1} is 6e-8 / 1e-4 at the smallest noise levels.
        assert torch.allclose(one.mean, two.mean, atol=1e-3)
        assert torch.allclose(one.variance.sqrt(), two.variance.sqrt(), rtol=1e-5)


def test_prediction_is_not_the_last_sample() -> None:
    """Stable Diffusion's DDIM: the last step still has noise, and moves away from x0_hat."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    step = GaussianDiffusion(Script(), scheduler, SHAPE).schedule[1]
    assert step.timestep == 1
    assert step.std == pytest.approx(0.0206, abs=1e-4)
