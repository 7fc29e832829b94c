# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

r"""
Exact Gaussian kernels read off diffusers schedulers.

A scheduler whose step is "a mean plus independent noise" defines a Markov chain with Gaussian
kernels. :func:`make_schedule` writes that chain down once, as one :class:`GaussianStep` of plain
numbers per time index, so that nothing is recomputed and no stateful ``step`` is called during
inference. With the forward process :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` every supported
kernel has the form

.. math::

    p(x_{t-1} | x_t) = N(a_t \hat x_0 + b_t x_t + c_t \hat\epsilon, s_t^2)

where :math:`\hat x_0` is the prediction after clipping and :math:`\hat\epsilon` the predicted
noise before clipping. The numbers are computed in the order and precision (float32) of the
scheduler itself, so that the kernel is the scheduler's own law and not a nearby one.

============================  ===================================================================
scheduler                     kernel
============================  ===================================================================
DDPM, DDPMParallel            the posterior :math:`q(x_{t-1} | x_t, \hat x_0)` [1], with the
                              variance of ``variance_type``
DDIM, DDIMParallel            equations 12 and 16 of [2], ``eta > 0``
EulerAncestral                :math:`x = x_0 + \sigma \epsilon`; the network's input is scaled
LCM, FlowMatchLCM, TCD        the consistency prediction, noised again
FlowMatchEuler                the stochastic process below, or, with ``stochastic_sampling``, the
                              scheduler's own: the prediction, noised again
============================  ===================================================================

**Flow matching.** The path is :math:`x_\sigma = (1 - \sigma) x_0 + \sigma \epsilon` and the network
predicts the velocity :math:`v = \epsilon - x_0`. The scheduler's own step solves an ordinary
differential equation, which leaves nothing to steer. The stochastic differential equation

.. math::

    dx = v d\sigma - \tfrac12 g^2(\sigma) \nabla \log p_\sigma(x) d\sigma + g(\sigma) dW,
    \qquad g^2(\sigma) = 2 \eta^2 \sigma / (1 - \sigma)

run from :math:`\sigma = 1` to 0 has the same marginals for every strength :math:`\eta` [3]; at
:math:`\eta = 1` it is the time reversal of the Markov noising process, the memoryless choice of
[4]. From :math:`\sigma` to :math:`\sigma' < \sigma` it is discretised as DDIM is,

.. math::

    x' = (1 - \sigma') \hat x_0 + (\sigma'^2 - s^2)^{1/2} \hat\epsilon + s z, \qquad
    s = \eta \sigma' \Bigl(1 - \Bigl(\frac{(1 - \sigma) \sigma'}
    {(1 - \sigma') \sigma}\Bigr)^2 \Bigr)^{1/2}

with :math:`\hat x_0 = x - \sigma v` and :math:`\hat\epsilon = x + (1 - \sigma) v`. It agrees with
the Euler-Maruyama step to first order, is regular at :math:`\sigma = 1`, and tends to the
scheduler's own Euler step as :math:`\eta \to 0`. The last step, to :math:`\sigma' = 0`, is
deterministic.

**References**

[1] J. Ho, A. Jain, P. Abbeel (2020), Denoising Diffusion Probabilistic Models,
    https://arxiv.org/abs/2006.11239, equations 6 and 7.

[2] J. Song, C. Meng, S. Ermon (2021), Denoising Diffusion Implicit Models,
    https://arxiv.org/abs/2010.02502, equations 12 and 16.

[3] M. Albergo, N. Boffi, E. Vanden-Eijnden (2023), Stochastic Interpolants: A Unifying Framework
    for Flows and Diffusions, https://arxiv.org/abs/2303.08797.

[4] C. Domingo-Enrich, M. Drozdzal, B. Karrer, R. Chen (2024), Adjoint Matching,
    https://arxiv.org/abs/2409.08861.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

from pyro_twist.diffusion.flow import flow_euler, flow_lcm
from pyro_twist.diffusion.kernels import GaussianSchedule
from pyro_twist.diffusion.ve import euler_ancestral
from pyro_twist.diffusion.vp import ddim, ddpm, lcm, tcd

__all__ = ["make_schedule", "refusal_reason"]


def make_schedule(
    scheduler: Any,
    num_inference_steps: int | None = 50,
    *,
    eta: float | None = None,
    use_clipped_model_output: bool = False,
    timestep_options: Mapping[str, Any] | None = None,
) -> GaussianSchedule:
    """
    Writes down the Markov chain that a diffusers scheduler defines; the scheduler is not changed.

    :param scheduler: A diffusers scheduler with Markov, Gaussian steps.
    :param int num_inference_steps: Number of steps T; None if ``timestep_options`` set it.
    :param float eta: Strength of the noise: DDIM's and flow matching's ``eta > 0`` (default 1),
        TCD's ``gamma`` in (0, 1] (default 0.3). Other schedulers have no such option.
    :param bool use_clipped_model_output: DDIM only: take the noise from the clipped prediction, as
        the option of that name of the scheduler's ``step``.
    :param timestep_options: More arguments of the scheduler's ``set_timesteps``, such as ``mu`` or
        ``timesteps``.
    :returns: The kernels, one per time index.
    :rtype: GaussianSchedule
    :raises ValueError: If the scheduler has no exact Gaussian kernel, or not with these options.
    """
    build, takes_eta = _find_family(scheduler)
    name = type(scheduler).__name__
    if eta is not None and not takes_eta:
        raise ValueError(f"eta={eta}: {name} has no such option; leave eta out")
    if eta is not None and not eta > 0:
        raise ValueError(
            f"eta={eta} makes {name} deterministic: resampled particles would stay identical, and "
            "no kernel has a density; use eta > 0, for example eta=1.0"
        )
    if use_clipped_model_output and build is not ddim:
        raise ValueError(f"use_clipped_model_output is an option of DDIM, not of {name}")
    scheduler = copy.deepcopy(scheduler)
    _set_timesteps(scheduler, num_inference_steps, timestep_options or {})
    schedule = build(scheduler, eta)
    _check_finite(schedule, scheduler)
    if schedule.clip is not None and not use_clipped_model_output:
        return schedule
    return replace(schedule, steps=tuple(step.without_eps() for step in schedule.steps))


def _set_timesteps(scheduler: Any, number: int | None, options: Mapping[str, Any]) -> None:
    name = type(scheduler).__name__
    if number is not None and (isinstance(number, bool) or int(number) != number or number < 1):
        raise ValueError(f"num_inference_steps={number} is not a positive integer")
    try:
        scheduler.set_timesteps(number, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}.set_timesteps refused num_inference_steps={number} with timestep_options "
            f"{dict(options)}: {error}"
        ) from error


def _check_finite(schedule: GaussianSchedule, scheduler: Any) -> None:
    """Refuses what has no finite prediction, zero terminal signal above all."""
    # EulerAncestral replaces a signal of zero by 2**-24, so that nothing overflows there.
    blind = scheduler.config.get("rescale_betas_zero_snr", False)
    for step in schedule.steps:
        signal = step.alpha * step.input_scale
        no_signal = signal == 0 or (blind and signal**2 < 2.0**-23)
        if no_signal and scheduler.config.get("prediction_type") == "epsilon":
            raise ValueError(
                f"the signal is zero at timestep {step.timestep} (zero terminal SNR), where "
                "prediction_type 'epsilon' says nothing about x_0; use a network with "
                "'v_prediction' or 'sample', or timestep_spacing='leading'"
            )
        if not all(math.isfinite(value) for value in _numbers(astuple(step))):
            raise ValueError(
                f"{type(scheduler).__name__} has no finite kernel at timestep {step.timestep}; "
                "check its betas: each must be above 0 and below 1"
            )


def _numbers(values: Sequence[Any]) -> list[float]:
    return [number for value in values for number in (value if type(value) is tuple else (value,))]


_Family = tuple[Callable[[Any, "float | None"], GaussianSchedule], bool]

# Each with whether it takes eta.
_FAMILIES: dict[str, _Family] = {
    "DDPMScheduler": (ddpm, False),
    "DDPMParallelScheduler": (ddpm, False),
    "DDIMScheduler": (ddim, True),
    "DDIMParallelScheduler": (ddim, True),
    "EulerAncestralDiscreteScheduler": (euler_ancestral, False),
    "LCMScheduler": (lcm, False),
    "TCDScheduler": (tcd, True),
    "FlowMatchEulerDiscreteScheduler": (flow_euler, True),
    "FlowMatchLCMScheduler": (flow_lcm, False),
}

_ODE = "its step is deterministic (it solves an ordinary differential equation)"
_HISTORY = "its step uses earlier network outputs, so its chain is not Markov in x"
_STAGES = "it evaluates the network at intermediate points within a step"
_INVERSE = "it runs from data to noise"
_DISCRETE = "it samples tokens, not Gaussians"

_REASONS: dict[str, str] = {
    "AmusedScheduler": _DISCRETE,
    "BlockRefinementScheduler": _DISCRETE,
    "CosineDPMSolverMultistepScheduler": _HISTORY,
    "DDIMInverseScheduler": _INVERSE,
    "DEISMultistepScheduler": _HISTORY,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "DPMSolverMultistepScheduler": _HISTORY,
    "DPMSolverSDEScheduler": _STAGES,
    "DPMSolverSinglestepScheduler": _HISTORY,
    "DiscreteDDIMScheduler": _DISCRETE,
    "EDMDPMSolverMultistepScheduler": _HISTORY,
    "EDMEulerScheduler": _ODE,
    "EntropyBoundScheduler": _DISCRETE,
    "EulerDiscreteScheduler": _ODE,
    "FlowMapEulerDiscreteScheduler": _ODE,
    "FlowMatchHeunDiscreteScheduler": f"{_ODE}, and {_STAGES}",
    "HeunDiscreteScheduler": f"{_ODE}, and {_STAGES}",
    "IPNDMScheduler": _HISTORY,
    "KDPM2AncestralDiscreteScheduler": _STAGES,
    "KDPM2DiscreteScheduler": f"{_ODE}, and {_STAGES}",
    "LMSDiscreteScheduler": _HISTORY,
    "PNDMScheduler": _HISTORY,
    "RePaintScheduler": "its step mixes in a known image, which belongs into a likelihood",
    "SASolverScheduler": _HISTORY,
    "ScoreSdeVeScheduler": "it alternates predictor and corrector steps",
    "UniPCMultistepScheduler": _HISTORY,
    "VQDiffusionScheduler": _DISCRETE,
}


def refusal_reason(scheduler: Any) -> str | None:
    """
    Why a scheduler has no exact Gaussian kernel.

    :param scheduler: A diffusers scheduler.
    :returns: Half a sentence; ``None`` if it has one.
    """
    if _family(scheduler) is not None:
        return None
    return _REASONS.get(type(scheduler).__name__, "no exact Gaussian kernel is known for it")


def _family(scheduler: Any) -> _Family | None:
    for cls in type(scheduler).__mro__:
        # A subclass with a step of its own is another process.
        if cls.__name__ in _FAMILIES and type(scheduler).step is vars(cls).get("step"):
            return _FAMILIES[cls.__name__]
    return None


def _find_family(scheduler: Any) -> _Family:
    family = _family(scheduler)
    if family is None:
        raise ValueError(_refusal(scheduler))
    return family


def _refusal(scheduler: Any) -> str:
    name = type(scheduler).__name__
    reason = refusal_reason(scheduler)
    advice = (
        "FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)"
        if name.startswith(("FlowM", "LTX"))
        else "DDIMScheduler.from_config(scheduler.config) with eta=1.0"
    )
    return f"{name} is not supported: {reason}. Use {advice}, or one of {', '.join(_FAMILIES)}."
