# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Building a model from a pipeline, and the register of the kinds of pipelines."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_twist.diffusion.maskedlm import check_evaluating
from pyro_twist.diffusion.pipelines.adapter import (
    Conditioning,
    PipelineAdapter,
    PipelineDenoiser,
)
from pyro_twist.diffusion.pipelines.schedulers import choose_scheduler

if TYPE_CHECKING:
    from pyro_twist.diffusion.gaussian import GaussianDiffusion

__all__ = ["build", "register_pipeline"]

# The shipped kinds, by where they are; what users register comes first.
_SHIPPED: dict[str, tuple[str, str]] = {
    "StableDiffusionPipeline": ("unets", "StableDiffusion"),
    "StableDiffusionImg2ImgPipeline": ("unets", "StableDiffusion"),
    "StableDiffusionInpaintPipeline": ("unets", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("unets", "StableDiffusionXL"),
    "StableDiffusionXLImg2ImgPipeline": ("unets", "StableDiffusionXL"),
    "StableDiffusionXLInpaintPipeline": ("unets", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("flows", "StableDiffusion3"),
    "StableDiffusion3Img2ImgPipeline": ("flows", "StableDiffusion3"),
    "FluxPipeline": ("flows", "Flux"),
    "FluxImg2ImgPipeline": ("flows", "Flux"),
    "PixArtSigmaPipeline": ("dits", "PixArtSigma"),
    "DiTPipeline": ("dits", "DiT"),
    "DDPMPipeline": ("pixels", "Pixels"),
    "DDIMPipeline": ("pixels", "Pixels"),
}
_REGISTERED: dict[str, Callable[..., PipelineAdapter]] = {}


def register_pipeline(kind: str | type, adapter: Callable[..., PipelineAdapter]) -> None:
    """
    Makes ``GaussianDiffusion.from_pipeline`` know a kind of pipelines.

    :param kind: The pipeline's class, or the name of it; its subclasses are known with it.
    :param callable adapter: A subclass of :class:`PipelineAdapter`, or a function ``adapter(pipe,
        **options)`` that returns an instance. The names of its options are those that
        ``from_pipeline`` takes for this kind.
    """
    if not callable(adapter):
        raise ValueError(
            f"adapter={adapter!r} cannot be called; give a subclass of PipelineAdapter"
        )
    _REGISTERED[kind if isinstance(kind, str) else kind.__name__] = adapter


def build(
    cls: type[GaussianDiffusion],
    pipe: Any,
    prompt: Any,
    negative_prompt: Any,
    *,
    guidance_scale: Any,
    num_inference_steps: int,
    scheduler: Any,
    eta: float | None,
    image: Any,
    strength: float | None,
    timestep_options: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    chunk_size: int | None,
    decode_chunk_size: int | None,
) -> GaussianDiffusion:
    """
    Builds a model; the arguments are those of ``GaussianDiffusion.from_pipeline``.

    :param type cls: The class of the model.
    :param dict options: The options that are the kind's own.
    """
    kind = _find(pipe)
    _check_steps(num_inference_steps)
    adapter = kind(pipe, **_known(kind, pipe, {**options, "image": image}))
    _check_components(adapter)
    prompts = adapter.read_prompts(prompt)
    plate = ("prompts", len(prompts)) if isinstance(prompt, (list, tuple)) else None
    scale = adapter.guidance(_scales(guidance_scale, plate))
    negatives = adapter.read_negatives(negative_prompt, len(prompts))
    guided = isinstance(scale, Tensor) or scale != 1 or negatives is not None
    with torch.no_grad():
        conditioning = adapter.encode(prompts, negatives, guided)
    chosen = choose_scheduler(pipe.scheduler, scheduler, eta)
    given, listed = _timesteps(adapter, chosen, num_inference_steps, timestep_options or {})
    denoiser = PipelineDenoiser(adapter)
    model = cls(
        denoiser,
        chosen,
        adapter.event_shape,
        num_inference_steps=num_inference_steps if listed is None else None,
        eta=eta,
        guidance_scale=scale,
        plate=plate,
        chunk_size=chunk_size,
        decode_chunk_size=decode_chunk_size,
        decoder=adapter.decode,
        timestep_options=given,
        **_tensors(conditioning, plate),
        **_start(adapter, image, strength, listed or num_inference_steps, plate),
    )
    denoiser.learned = model.schedule.learned_variance is not None
    model.prompts = tuple(str(one) for one in prompts)
    return model


def _find(pipe: Any) -> Callable[..., PipelineAdapter]:
    for cls in type(pipe).__mro__:
        if cls.__name__ in _REGISTERED:
            return _REGISTERED[cls.__name__]
        if cls.__name__ in _SHIPPED:
            module, name = _SHIPPED[cls.__name__]
            found = getattr(import_module(f"pyro_twist.diffusion.pipelines.{module}"), name)
            kind: Callable[..., PipelineAdapter] = found
            return kind
    known = ", ".join(sorted({*_REGISTERED, *_SHIPPED}))
    raise ValueError(
        f"pipe is a {type(pipe).__name__}, which is not known; known are {known}. Teach it by "
        f"register_pipeline('{type(pipe).__name__}', adapter), with a subclass of PipelineAdapter"
    )


def _known(kind: Callable[..., Any], pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, checked against the names that the kind has."""
    parameters = inspect.signature(kind).parameters
    names = [name for name in parameters if name != "pipe"]
    given = {name: value for name, value in options.items() if value is not None}
    if "image" not in names:
        given.pop("image", None)  # for a start from it, which any kind may have
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    unknown = [name for name in given if name not in names]
    if unknown and not takes_all:
        raise ValueError(
            f"{type(pipe).__name__} has no option {', '.join(map(repr, unknown))} here; it has "
            f"{', '.join(names) or 'none'}"
        )
    return given


def _check_components(adapter: PipelineAdapter) -> None:
    for component in adapter.pipe.components.values():
        if isinstance(component, torch.nn.Module):
            check_evaluating(component)
    if adapter.network.config.get("encoder_hid_dim_type") == "ip_image_proj":
        raise ValueError(
            f"{adapter.name} has an IP-Adapter loaded, which needs images as prompts; call "
            "pipe.unload_ip_adapter() first"
        )


def _check_steps(number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"num_inference_steps={number!r} is not a positive integer")


def _timesteps(
    adapter: PipelineAdapter, scheduler: Any, number: int, options: Mapping[str, Any]
) -> tuple[dict[str, Any], int | None]:
    """The arguments of ``set_timesteps``, and how many steps they list, if they list them."""
    lists = ("timesteps", "sigmas")
    own = adapter.timestep_options(scheduler, number)
    if any(options.get(name) is not None for name in lists):
        own = {name: value for name, value in own.items() if name not in lists}
    given = {**own, **{name: _as_list(value) for name, value in options.items()}}
    found = [len(given[name]) for name in lists if given.get(name) is not None]
    return given, found[0] if found else None


def _as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _scales(scale: Any, plate: tuple[str, int] | None) -> Any:
    """A number, a tensor with one entry per prompt, or ``None``."""
    if scale is None:
        return None
    try:
        scales = torch.as_tensor(scale, dtype=torch.get_default_dtype())
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"guidance_scale={scale!r}; give a number, or one per entry of a list of prompts"
        ) from error
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(f"guidance_scale={scale!r} is not finite")
    if isinstance(scale, (int, float)):
        return scale
    if scales.dim() and scales.shape != (0 if plate is None else plate[1],):
        raise ValueError(
            f"guidance_scale has shape {tuple(scales.shape)}; give a number, or one per entry of a "
            "list of prompts"
        )
    return scales if scales.dim() else float(scales)


def _tensors(conditioning: Conditioning, plate: tuple[str, int] | None) -> dict[str, Any]:
    """The conditioning of the model: one entry per prompt, or that of the only one."""
    inputs, null = conditioning.inputs, conditioning.null
    dims = {name: value.dim() - 1 for name, value in inputs.items()}
    if plate is None:
        inputs = {name: value[0] for name, value in inputs.items()}
        null = None if null is None else {name: value[0] for name, value in null.items()}
    return dict(conditioning=inputs, null_conditioning=null, conditioning_event_dims=dims)


def _start(
    adapter: PipelineAdapter,
    image: Any,
    strength: float | None,
    number: int,
    plate: tuple[str, int] | None,
) -> dict[str, Any]:
    """Where a start from an image begins."""
    if image is None:
        if strength is not None:
            raise ValueError(
                f"strength={strength} is for a start from an image; give image as well"
            )
        return {}
    strength = adapter.default("strength", 0.8) if strength is None else strength
    if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise ValueError(f"strength={strength!r} is outside (0, 1]")
    time = adapter.start_time(number, strength)
    if time < 1:
        enough = math.ceil(100 / number) / 100
        raise ValueError(
            f"strength={strength} leaves none of the {number} steps; try {enough:g} or more"
        )
    if adapter.starts_from_noise(strength):
        return {}
    with torch.no_grad():
        mean, std = adapter.encode_image(image)
    if len(mean) not in (1, 1 if plate is None else plate[1]):
        raise ValueError(
            f"image holds {len(mean)} images for {1 if plate is None else plate[1]} prompts; give "
            "one, or one for each"
        )
    if len(mean) == 1:
        mean, std = mean[0], std[0]
    return dict(start=mean, start_std=std, start_time=time)
