# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Latents and images: a pipeline's VAE, with the scale and shift of its latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["decode", "device_of", "encode"]


def device_of(module: Any) -> torch.device:
    """Where a module computes, which is not where its weights are while it is offloaded."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        return next(module.parameters()).device
    return torch.device(device)


def decode(vae: Any, x: Tensor, upcasts: bool) -> Tensor:
    """
    Decodes latents.

    :param vae: A VAE of diffusers.
    :param Tensor x: Latents in the scale of the diffusion, of shape ``(rows, channels, height,
        width)``.
    :param bool upcasts: Whether a VAE of float16 is run in float32 if its config says so.
    :returns: Images in about [-1, 1], in float32.
    :rtype: Tensor
    :raises ValueError: If float16 overflows.
    """
    half = vae.dtype == torch.float16
    shift, scale = _affine(vae, x)
    with _in_float32(vae, upcasts and half and bool(vae.config.force_upcast)):
        given = (x * scale + shift).to(device_of(vae), vae.dtype)
        images: Tensor = vae.decode(given, return_dict=False)[0]
    _check_overflow(vae, images)
    return images.to(x.device).float()


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """
    The law of the latents of images, in the scale of the diffusion.

    :param vae: A VAE of diffusers.
    :param Tensor pixels: Images in [-1, 1].
    :returns: Mean and standard deviation of independent Gaussians, in float32; 0 for a VAE
        without variance.
    :rtype: tuple
    :raises ValueError: If float16 overflows.
    """
    with _in_float32(vae, bool(vae.config.get("force_upcast", False))):
        output = vae.encode(pixels.to(device_of(vae), vae.dtype))
        law = getattr(output, "latent_dist", None)
        mean = (output.latents if law is None else law.mean).float()
        std = torch.zeros_like(mean) if law is None else law.std.float()
    _check_overflow(vae, mean)
    shift, scale = _affine(vae, mean)
    return (mean - shift) / scale, std / scale


def _check_overflow(vae: Any, output: Tensor) -> None:
    if vae.dtype == torch.float16 and not bool(torch.isfinite(output).all()):
        raise ValueError(
            f"{type(vae).__name__} in float16 overflowed; run it in a wider type, as by "
            "pipe.vae.to(torch.float32) or pipe.vae.to(torch.bfloat16)"
        )


def _affine(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """Shift and scale from the diffusion's latents to the VAE's."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        shift, factor = like.new_tensor(mean).reshape(shape), like.new_tensor(std).reshape(shape)
        return shift, factor / config.scaling_factor
    return config.get("shift_factor") or 0.0, 1 / config.scaling_factor


@contextmanager
def _in_float32(vae: Any, wanted: bool) -> Iterator[None]:
    """Runs a VAE in float32 and gives it its own type back, which loses nothing."""
    dtype = vae.dtype
    if not wanted or dtype == torch.float32:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)
