# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Reading pipelines of diffusers from a folder or the hub."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch

from pyro_twist.align.options import AlignOptions, OptionError, unknown

__all__ = ["find_device", "find_dtype", "load_pipeline", "make_scheduler"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}


def find_device(options: AlignOptions) -> torch.device:
    """
    Where to compute: what was asked for, or else a GPU where there is one.

    :param AlignOptions options: The options.
    :raises OptionError: If there is no such device.
    """
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(options.device or usual)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        told = str(error).splitlines()[0]
        raise OptionError(f"--device {options.device}: {told}; try cpu or cuda") from None
    return device


def find_dtype(options: AlignOptions) -> torch.dtype:
    """
    The precision of the network: what was asked for, or else bfloat16 on a GPU.

    :param AlignOptions options: The options.
    :raises OptionError: If there is no such precision.
    """
    if options.dtype is None:
        return torch.float32 if find_device(options).type == "cpu" else torch.bfloat16
    if options.dtype not in _DTYPES:
        raise unknown("precision", options.dtype, _DTYPES)
    return _DTYPES[options.dtype]


def load_pipeline(name: str, options: AlignOptions) -> Any:
    """
    Loads a pipeline from safetensors files, without running code that comes with it.

    :param str name: A folder, or ``"owner/name"`` on the hub.
    :param AlignOptions options: Device and precision are used.
    :returns: The pipeline, ready to run; without a safety checker, which sees samples only in the
        pipeline's own call.
    :raises OptionError: If it cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    device, dtype = find_device(options), find_dtype(options)
    try:
        unsafe = "safety_checker" in DiffusionPipeline.load_config(name)
        given = {"safety_checker": None, "requires_safety_checker": False} if unsafe else {}
        pipe = DiffusionPipeline.from_pretrained(
            name, use_safetensors=True, **_in_precision(dtype), **given
        )
    except (OSError, ValueError, ImportError, AttributeError) as error:
        told = " ".join(str(error).split())[:300]
        raise OptionError(f"{name!r} cannot be loaded as a pipeline: {told}") from None
    pipe.set_progress_bar_config(disable=True)
    return ready(pipe.to(device))


def _in_precision(dtype: torch.dtype) -> dict[str, Any]:
    """What diffusers calls the precision, which has changed."""
    from diffusers import __version__

    release = tuple(int(part) for part in re.findall(r"\d+", __version__)[:2])
    return {"dtype" if release >= (0, 42) else "torch_dtype": dtype}


def ready(pipe: Any) -> Any:
    """
    A pipeline whose networks evaluate, and need no gradients of their weights.

    :param pipe: The pipeline.
    """
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe


def make_scheduler(name: str | None, pipe: Any) -> Any:
    """
    The scheduler that was asked for, from the config of the pipeline's own.

    :param str name: ``"ddpm"``, ``"ddim"``, ``"euler-ancestral"``, or ``None`` for the pipeline's
        own or, where that has no noise or keeps a history, what stands in for it.
    :param pipe: The pipeline.
    :raises OptionError: If there is no such scheduler.
    """
    from pyro_twist.diffusion.pipelines.schedulers import alike, choose_scheduler

    if name is None:
        with warnings.catch_warnings():
            # that it is replaced is said at the head of the page
            warnings.simplefilter("ignore", UserWarning)
            return choose_scheduler(pipe.scheduler, None, None)
    if name not in _SCHEDULERS:
        raise unknown("scheduler", name, _SCHEDULERS)
    made = alike(pipe.scheduler, _SCHEDULERS[name])
    if made is None:
        raise OptionError(
            f"--scheduler {name}: the network of {type(pipe).__name__} was trained for "
            f"{type(pipe.scheduler).__name__}, whose noise levels it does not have; leave it out"
        )
    return made
