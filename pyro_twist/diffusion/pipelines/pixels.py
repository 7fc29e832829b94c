# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Pipelines over pixels, without prompts: DDPM and DDIM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_twist.diffusion.pipelines.adapter import Conditioning, PipelineAdapter

__all__ = ["Pixels"]


class Pixels(PipelineAdapter):
    """
    An unconditional model of images.

    :param pipe: A ``DDPMPipeline`` or ``DDIMPipeline``.
    """

    def read_prompts(self, prompt: Any) -> list[Any]:
        """Refuses prompts."""
        if prompt is not None:
            raise ValueError(f"prompt={prompt!r}: {self.name} has no prompts; leave it out")
        return []

    def read_negatives(self, negative: Any, number: int) -> None:
        """Refuses negative prompts."""
        if negative is not None:
            raise ValueError(f"negative_prompt={negative!r}: {self.name} has no prompts")

    def guidance(self, scale: Any) -> float:
        """Refuses guidance."""
        if scale is not None:
            raise ValueError(f"guidance_scale={scale}: {self.name} is unconditional; leave it out")
        return 1.0

    def encode(self, prompts: list[Any], negatives: list[str] | None, guided: bool) -> Conditioning:
        """Nothing to tell the network."""
        return Conditioning({})

    def denoise(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """Evaluates the U-Net."""
        output: Tensor = self.network(x, timestep, return_dict=False)[0]
        return output

    def encode_image(self, image: Any) -> tuple[Tensor, Tensor]:
        """
        Images in [-1, 1].

        :param Tensor image: In [0, 1], of shape ``event_shape``.
        """
        if not isinstance(image, Tensor) or tuple(image.shape[-3:]) != self.event_shape:
            raise ValueError(
                f"image is not a tensor of shape {self.event_shape} with values in [0, 1]"
            )
        pixels = 2 * image.reshape((-1,) + self.event_shape).float() - 1
        return pixels.to(self.device), torch.zeros_like(pixels, device=self.device)
