# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The scheduler that a pipeline is run with."""

from __future__ import annotations

import warnings
from typing import Any

from pyro_twist.diffusion.forward import is_flow_matching
from pyro_twist.diffusion.schedules import refusal_reason

__all__ = ["choose_scheduler"]


def choose_scheduler(own: Any, scheduler: Any, eta: float | None) -> Any:
    """
    The pipeline's scheduler, or another one if its steps are not Markov and Gaussian.

    :param own: The pipeline's scheduler.
    :param scheduler: A scheduler to use instead, ``None``, or ``"keep"``.
    :param float eta: The strength of the noise that was asked for.
    :returns: A scheduler that :func:`~pyro_twist.diffusion.make_schedule` takes.
    :raises ValueError: If the pipeline's is to be kept but cannot be.
    """
    if scheduler is not None and not isinstance(scheduler, str):
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


def _judge(own: Any, eta: float | None) -> tuple[str, Any, str] | None:
    """Why the pipeline's scheduler is not used as the pipeline uses it, and what is instead."""
    reason = refusal_reason(own)
    strength = f"eta={1.0 if eta is None else eta:g}"
    if is_flow_matching(own):
        said = f"the stochastic process of the same marginals, {strength}"
        if reason is not None:
            return reason, _made("FlowMatchEulerDiscreteScheduler", own), said
        if eta is None and _is_plain_flow(own):
            return "its step is deterministic", own, said
        return None
    if reason is not None:
        return reason, _ddim(own), f"DDIM made from its config, {strength}"
    if eta is None and type(own).__name__.startswith("DDIM"):
        return "the pipeline runs it with eta=0, which is deterministic", own, strength
    return None


def _is_plain_flow(own: Any) -> bool:
    return type(own).__name__ == "FlowMatchEulerDiscreteScheduler" and not bool(
        own.config.get("stochastic_sampling")
    )


def _ddim(own: Any) -> Any:
    # DDIM clips unless told otherwise; a scheduler without that option did not.
    clip = bool(own.config.get("clip_sample", False))
    return _made("DDIMScheduler", own, clip_sample=clip)


def _made(name: str, own: Any, **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, name).from_config(own.config, **options)
