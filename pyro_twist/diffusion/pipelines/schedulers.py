# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The scheduler that a pipeline is run with."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch

from pyro_twist.diffusion.forward import is_flow_matching
from pyro_twist.diffusion.schedules import refusal_reason

__all__ = ["alike", "choose_scheduler", "remade"]

# How pipelines run schedulers whose strength of noise is an argument of the step, and ours.
_WITH_STRENGTH = {"DDIMScheduler": 1.0, "DDIMParallelScheduler": 1.0, "TCDScheduler": 0.3}


def choose_scheduler(own: Any, scheduler: Any, eta: float | None) -> Any:
    """
    The pipeline's scheduler, or another one if its steps are not Markov and Gaussian.

    :param own: The pipeline's scheduler.
    :param scheduler: A scheduler to use instead, ``None``, or ``"keep"``.
    :param float eta: The strength of the noise that was asked for.
    :returns: A scheduler that :func:`~pyro_twist.diffusion.make_schedule` takes.
    :raises ValueError: If the pipeline's is to be kept but cannot be, if nothing can stand in for
        it, or if the given one does not fit the network.
    """
    if scheduler is not None and not isinstance(scheduler, str):
        _check_given(own, scheduler)
        return scheduler
    if scheduler not in (None, "keep"):
        raise ValueError(
            f"scheduler={scheduler!r}; give a diffusers scheduler, 'keep' for the pipeline's own, "
            "or nothing for one that is like it and stochastic"
        )
    judged = _judge(own, eta)
    if judged is None:
        return own
    reason, replacement, said = judged
    name = type(own).__name__
    if scheduler == "keep":
        raise ValueError(
            f"scheduler='keep': {name} cannot be kept, since {reason}. Leave scheduler out to "
            f"sample with {said}."
        )
    warnings.warn(
        f"{name} is not used as the pipeline uses it, since {reason}. Sampling with {said}; give "
        "scheduler= or eta= to choose yourself.",
        UserWarning,
        stacklevel=4,
    )
    return replacement


def remade(own: Any, name: str, **options: Any) -> Any:
    """
    A scheduler made from another one's config, with its defaults too.

    ``from_config`` leaves out what the other scheduler was not told, and takes its own default
    instead, for which the network was not trained.

    :param own: The scheduler whose config is taken.
    :param str name: The class of the new one.
    :param options: What is different.
    """
    import diffusers

    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    given = {option: value for option, value in own.config.items() if option in known}
    return kind(**{**given, **options})


def _judge(own: Any, eta: float | None) -> tuple[str, Any, str] | None:
    """Why the pipeline's scheduler is not used as the pipeline uses it, and what is instead."""
    reason = refusal_reason(own)
    if _predicts_velocity(own):
        said = f"the stochastic process of the same marginals, eta={1.0 if eta is None else eta:g}"
        if reason is not None:
            return reason, _flow(own), said
        if eta is None and _is_plain_flow(own):
            return "its step is deterministic", own, said
        return None
    if reason is not None:
        said = f"DDIM made from its config, eta={1.0 if eta is None else eta:g}"
        return reason, _ddim(own, reason), said
    usual = _WITH_STRENGTH.get(type(own).__name__)
    if eta is None and usual is not None:
        return "the pipeline runs it with eta=0, which is deterministic", own, f"eta={usual:g}"
    return None


def _predicts_velocity(scheduler: Any) -> bool:
    """Whether its network predicts a velocity: of flow matching, or a solver that is told so."""
    return is_flow_matching(scheduler) or (
        scheduler.config.get("prediction_type") == "flow_prediction"
        and bool(scheduler.config.get("use_flow_sigmas"))
    )


def _is_plain_flow(own: Any) -> bool:
    return type(own).__name__ == "FlowMatchEulerDiscreteScheduler" and not bool(
        own.config.get("stochastic_sampling")
    )


def _flow(own: Any) -> Any:
    shift = own.config.get("flow_shift", own.config.get("shift", 1.0))
    return remade(own, "FlowMatchEulerDiscreteScheduler", shift=shift)


def alike(own: Any, name: str) -> Any:
    """
    A scheduler for the network of another one, with the same noise levels.

    :param own: The scheduler that the network was trained for.
    :param str name: The class of the new one.
    :returns: The new one, or ``None`` where it is not known to have these noise levels.
    """
    options: dict[str, Any] = {}
    if name != "EulerAncestralDiscreteScheduler":
        # These clip unless told otherwise; a scheduler without that option did not.
        options["clip_sample"] = bool(own.config.get("clip_sample", False))
    if name == "DDIMScheduler" and own.config.get("timestep_spacing") == "linspace":
        # DDIM goes back by a fixed stride, which this spacing is not; both begin at the end.
        options["timestep_spacing"] = "trailing"
    if _has_table(own):
        made = remade(own, name, **options)
        if _same_levels(own.alphas_cumprod, made.alphas_cumprod):
            return made
    return None


def _ddim(own: Any, reason: str) -> Any:
    made = alike(own, "DDIMScheduler")
    if made is not None:
        return made
    name = type(own).__name__
    raise ValueError(
        f"{name} cannot be used, since {reason}, and no scheduler that can is known to have its "
        "noise levels; give scheduler=, one that fits the network"
    )


def _has_table(own: Any) -> bool:
    """Whether the network is told an index of a table, and predicts what DDIM can."""
    return (
        hasattr(own, "alphas_cumprod")
        and own.config.get("prediction_type", "epsilon") in ("epsilon", "sample", "v_prediction")
        and own.config.get("timestep_type", "discrete") == "discrete"
    )


def _same_levels(own: Any, other: Any) -> bool:
    """Whether two tables of noise levels are the same, but for what stands for no signal."""
    own, other = own.float().cpu(), other.float().cpu()
    return own.shape == other.shape and torch.allclose(own, other, atol=1e-6)


def _check_given(own: Any, scheduler: Any) -> None:
    if isinstance(scheduler, type) or not hasattr(scheduler, "config"):
        raise ValueError(
            f"scheduler={scheduler!r} is no scheduler; give an instance, such as "
            "DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    if _predicts_velocity(scheduler) != _predicts_velocity(own):
        raise ValueError(
            f"scheduler={type(scheduler).__name__} does not fit the network, which was trained "
            f"for {type(own).__name__}: one of them is of flow matching and the other is not"
        )
