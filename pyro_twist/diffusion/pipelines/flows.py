# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Pipelines of flow matching: Stable Diffusion 3 and Flux."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyro_twist.diffusion.pipelines.adapter import (
    Conditioning,
    LatentAdapter,
    at_least_one,
    repeated,
)

__all__ = ["FlowAdapter", "Flux", "StableDiffusion3"]


class FlowAdapter(LatentAdapter):
    """
    A transformer over patches of latents, with timesteps that depend on their number.

    :param pipe: A pipeline with a transformer.
    :param int height: The height of the images in pixels.
    :param int width: Their width.
    """

    component = "transformer"
    patch = 2

    def start_time(self, number: int, strength: float) -> int:
        """How many steps are run for a start from an image."""
        return number - int(number - min(number * strength, number))

    def shift(self, scheduler: Any) -> float:
        """The shift of the timesteps, linear in the number of patches."""
        config = scheduler.config
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        patches = self.event_shape[1] * self.event_shape[2] // self.patch**2
        slope = (high - low) / (many - few)
        return float(low + slope * (patches - few))


class StableDiffusion3(FlowAdapter):
    """
    Stable Diffusion 3 and 3.5.

    :param pipe: A ``StableDiffusion3Pipeline``, or its ``Img2Img``.
    :param int height: The height of the images in pixels.
    :param int width: Their width.
    :param prompt_2: For the second text encoder; by default the prompt.
    :param prompt_3: For the third text encoder; by default the prompt.
    :param negative_prompt_2: For the second text encoder.
    :param negative_prompt_3: For the third text encoder.
    :param int clip_skip: How many of the text encoders' last layers are left out.
    :param int max_sequence_length: At most this many tokens for the third text encoder.
    :param dict joint_attention_kwargs: Passed to the network's attention.
    :param float mu: The shift of the timesteps, for schedulers that take it.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int = 256,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        mu: float | None = None,
    ) -> None:
        self.patch = pipe.transformer.config.patch_size
        super().__init__(pipe, height=height, width=width)
        self.texts = dict(
            prompt_2=prompt_2,
            prompt_3=prompt_3,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
        )
        self.clip_skip, self.max_sequence_length = clip_skip, max_sequence_length
        self.attention, self.mu = joint_attention_kwargs, mu

    def encode(self, prompts: list[Any], negatives: list[str] | None, guided: bool) -> Conditioning:
        """Encodes the prompts by all text encoders."""
        number = len(prompts)
        embeds, null, pooled, null_pooled = self.pipe.encode_prompt(
            prompt=prompts,
            negative_prompt=negatives,
            device=self.device,
            do_classifier_free_guidance=guided,
            clip_skip=self.clip_skip,
            max_sequence_length=self.max_sequence_length,
            lora_scale=(self.attention or {}).get("scale"),
            **{name: repeated(texts, number, name) for name, texts in self.texts.items()},
        )
        inputs = dict(encoder_hidden_states=embeds, pooled_projections=pooled)
        without = dict(encoder_hidden_states=null, pooled_projections=null_pooled)
        return Conditioning(inputs, without if guided else None)

    def denoise(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """Evaluates the transformer."""
        output: Tensor = self.network(
            hidden_states=x,
            timestep=timestep,
            joint_attention_kwargs=self.attention,
            return_dict=False,
            **inputs,
        )[0]
        return output

    def timestep_options(self, scheduler: Any, number: int) -> dict[str, Any]:
        """The shift of the timesteps, if the scheduler takes it."""
        if self.mu is not None:
            return {"mu": self.mu}
        shifts = scheduler.config.get("use_dynamic_shifting")
        return {"mu": self.shift(scheduler)} if shifts else {}


class Flux(FlowAdapter):
    """
    Flux.1: the guidance scale is an input of the network.

    :param pipe: A ``FluxPipeline``, or its ``Img2Img``.
    :param int height: The height of the images in pixels.
    :param int width: Their width.
    :param prompt_2: For the second text encoder; by default the prompt.
    :param negative_prompt_2: For the second text encoder; by default the negative prompt.
    :param float true_cfg_scale: The strength of classifier-free guidance, on top; it needs a
        negative prompt.
    :param int max_sequence_length: At most this many tokens for the second text encoder.
    :param dict joint_attention_kwargs: Passed to the network's attention.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        true_cfg_scale: float = 1.0,
        max_sequence_length: int = 512,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(pipe, height=height, width=width)
        if not isinstance(true_cfg_scale, (int, float)) or not math.isfinite(true_cfg_scale):
            raise ValueError(f"true_cfg_scale={true_cfg_scale!r}; give one number for all prompts")
        self.prompt_2, self.negative_prompt_2 = prompt_2, negative_prompt_2
        self.true_cfg_scale = true_cfg_scale
        self.max_sequence_length = max_sequence_length
        self.attention = joint_attention_kwargs
        self.embedded_scale: Any = None

    def guidance(self, scale: Any) -> Any:
        """The strength of classifier-free guidance; the usual scale is an input of the network."""
        if self.network.config.guidance_embeds:
            self.embedded_scale = self.default("guidance_scale", 3.5) if scale is None else scale
        elif scale is not None and (isinstance(scale, Tensor) or scale > 1):
            raise ValueError(
                f"guidance_scale={scale}: the network of {self.name} is distilled and takes no "
                "guidance (guidance_embeds=False); leave guidance_scale out, or give "
                "true_cfg_scale and a negative_prompt"
            )
        return at_least_one(self.true_cfg_scale)

    def read_negatives(self, negative: Any, number: int) -> list[str] | None:
        """The negative prompts, which go with ``true_cfg_scale``."""
        if (negative is None) == (self.true_cfg_scale > 1):
            raise ValueError(
                f"negative_prompt={negative!r} with true_cfg_scale={self.true_cfg_scale}: "
                f"{self.name} guides away from a negative prompt, which may be '', where "
                "true_cfg_scale is above 1, and only there"
            )
        return super().read_negatives(negative, number)

    def encode(self, prompts: list[Any], negatives: list[str] | None, guided: bool) -> Conditioning:
        """Encodes the prompts by both text encoders."""
        inputs = self._encode(prompts, self.prompt_2, "prompt_2")
        if self.embedded_scale is not None:
            scale = torch.as_tensor(self.embedded_scale, dtype=torch.float32)
            inputs["guidance"] = scale.to(self.device).expand(len(prompts))
        if negatives is None:
            return Conditioning(inputs)
        return Conditioning(
            inputs, self._encode(negatives, self.negative_prompt_2, "negative_prompt_2")
        )

    def denoise(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """Evaluates the transformer on patches of two by two latents."""
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        packed = functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        length = inputs["encoder_hidden_states"].shape[1]
        ranges = [torch.arange(size, device=x.device) for size in (1, height, width)]
        output: Tensor = self.network(
            hidden_states=packed,
            timestep=timestep.to(x.dtype) / 1000,
            txt_ids=x.new_zeros(length, 3),
            img_ids=torch.cartesian_prod(*ranges).to(x),
            joint_attention_kwargs=self.attention,
            return_dict=False,
            **inputs,
        )[0]
        patches = output.transpose(1, 2).unflatten(2, (height, width))
        return functional.pixel_shuffle(patches, 2)

    def timestep_options(self, scheduler: Any, number: int) -> dict[str, Any]:
        """Evenly spaced noise levels, and their shift."""
        options: dict[str, Any] = {"mu": self.shift(scheduler)}
        if not scheduler.config.get("use_flow_sigmas"):
            options["sigmas"] = torch.linspace(1, 1 / number, number, dtype=torch.float64).tolist()
        return options

    def _encode(self, texts: list[str], second: Any, name: str) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=texts,
            prompt_2=repeated(second, len(texts), name),
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            lora_scale=(self.attention or {}).get("scale"),
        )
        return dict(encoder_hidden_states=embeds, pooled_projections=pooled)
