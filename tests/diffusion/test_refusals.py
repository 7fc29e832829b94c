# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What has no exact Gaussian kernel is refused by name, with the reason."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)

from pyro_twist.diffusion import make_schedule

NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@NUMPY
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize(
    "name, reason",
    [
        ("DDIMInverseScheduler", "from data to noise"),
        ("DEISMultistepScheduler", "earlier network outputs"),
        ("DPMSolverMultistepScheduler", "earlier network outputs"),
        ("DPMSolverSinglestepScheduler", "earlier network outputs"),
        ("EDMEulerScheduler", "deterministic"),
        ("EulerDiscreteScheduler", "deterministic"),
        ("FlowMatchHeunDiscreteScheduler", "intermediate points"),
        ("HeunDiscreteScheduler", "intermediate points"),
        ("IPNDMScheduler", "earlier network outputs"),
        ("KDPM2AncestralDiscreteScheduler", "intermediate points"),
        ("LMSDiscreteScheduler", "earlier network outputs"),
        ("PNDMScheduler", "earlier network outputs"),
        ("SASolverScheduler", "earlier network outputs"),
        ("ScoreSdeVeScheduler", "predictor and corrector"),
        ("UnCLIPScheduler", "no exact Gaussian kernel is known"),
        ("UniPCMultistepScheduler", "earlier network outputs"),
    ],
)
def test_schedulers(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not supported.*{reason}.*Use "):
        make_schedule(getattr(diffusers, name)())


def test_flow_matching_is_not_sent_to_ddim() -> None:
    with pytest.raises(ValueError, match="Use FlowMatchEulerDiscreteScheduler"):
        make_schedule(diffusers.FlowMatchHeunDiscreteScheduler())


def test_a_subclass_with_its_own_step() -> None:
    class Mine(DDPMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return None

    class Same(DDPMScheduler):
        pass

    with pytest.raises(ValueError, match="Mine is not supported"):
        make_schedule(Mine())
    assert len(make_schedule(Same(), 5)) == 5


@pytest.mark.parametrize("eta", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("make", [DDIMScheduler, FlowMatchEulerDiscreteScheduler, TCDScheduler])
def test_deterministic(make: Any, eta: float) -> None:
    with pytest.raises(ValueError, match="deterministic"):
        make_schedule(make(), 4, eta=eta)


@NUMPY
@pytest.mark.parametrize(
    "make", [DDPMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler, FlowMatchLCMScheduler]
)
def test_eta_where_there_is_none(make: Any) -> None:
    with pytest.raises(ValueError, match="no such option"):
        make_schedule(make(), 4, eta=1.0)


@pytest.mark.parametrize("make", [DDIMScheduler, FlowMatchEulerDiscreteScheduler])
def test_too_much_noise(make: Any) -> None:
    with pytest.raises(ValueError, match="more noise than the process has"):
        make_schedule(make(), 10, eta=3.0)
    with pytest.raises(ValueError, match=r"gamma is in \(0, 1\]"):
        make_schedule(TCDScheduler(), 4, eta=1.5)


@NUMPY
@pytest.mark.parametrize(
    "make", [DDPMScheduler, DDIMScheduler, EulerAncestralDiscreteScheduler, TCDScheduler]
)
def test_zero_terminal_snr_with_epsilon(make: Any) -> None:
    scheduler = make(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    options = dict(timestep_options={"timesteps": [999, 499]}) if make is TCDScheduler else {}
    with pytest.raises(ValueError, match="zero terminal SNR"):
        make_schedule(scheduler, None if options else 10, **options)
    leading = make(rescale_betas_zero_snr=True, timestep_spacing="leading")
    if make is not TCDScheduler:
        make_schedule(leading, 10)


def test_ddim_of_zero_terminal_snr_at_full_noise() -> None:
    """Where the variance left to the predicted noise is a rounding error below zero."""
    scheduler = DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    for number in (5, 10, 50, 200):
        schedule = make_schedule(scheduler, number)
        assert schedule[number].eps_coef == pytest.approx(0.0, abs=1e-3)


def test_betas_without_noise() -> None:
    betas = [0.0, 0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="no finite kernel at timestep 0"):
        make_schedule(DDPMScheduler(num_train_timesteps=4, trained_betas=betas), 4)


@pytest.mark.parametrize(
    "scheduler, number, options, message",
    [
        (DDPMScheduler(), 2000, {}, "refused num_inference_steps=2000"),
        (DDPMScheduler(), 0, {}, "not a positive integer"),
        (DDPMScheduler(), 10, {"mu": 1.0}, "refused .*'mu': 1.0"),
        (DDIMScheduler(steps_offset=1), 1000, {}, "outside 0..999"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 10, {}, "`mu` must be"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 10, {}, "invert_sigmas"),
        (FlowMatchEulerDiscreteScheduler(), 2, {"sigmas": [0.5, 0.7]}, "decrease strictly"),
        (FlowMatchLCMScheduler(scale_factors=[1, 2]), 3, {}, "scale_factors"),
    ],
)
def test_options(scheduler: Any, number: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(scheduler, number, timestep_options=options)


@NUMPY
def test_other_options() -> None:
    with pytest.raises(ValueError, match="has its own noise"):
        make_schedule(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), 4, eta=1.0)
    with pytest.raises(ValueError, match="option of DDIM"):
        make_schedule(DDPMScheduler(), 4, use_clipped_model_output=True)
    with pytest.raises(ValueError, match="prediction_type 'sample' is not defined"):
        make_schedule(EulerAncestralDiscreteScheduler(prediction_type="sample"), 4)
    with pytest.raises(ValueError, match="prediction_type 'score'"):
        make_schedule(DDPMScheduler(prediction_type="score"), 4)
    with pytest.raises(ValueError, match="variance_type 'huge'"):
        make_schedule(DDPMScheduler(variance_type="huge"), 4)


def test_custom_timesteps() -> None:
    options = {"timesteps": [900, 500, 100]}
    schedule = make_schedule(DDPMScheduler(), None, timestep_options=options)
    assert [schedule[t].timestep for t in (3, 2, 1)] == [900, 500, 100]
    shifted = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    schedule = make_schedule(shifted, 4, timestep_options={"mu": 0.8})
    reference = copy.deepcopy(shifted)
    reference.set_timesteps(4, mu=0.8)
    sigmas = torch.tensor([step.sigma for step in schedule.steps])
    assert torch.allclose(sigmas, reference.sigmas[:-1])
