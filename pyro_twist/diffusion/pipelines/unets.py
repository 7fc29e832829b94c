# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Pipelines with a U-Net over latents: Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyro_twist.diffusion.pipelines import latents
from pyro_twist.diffusion.pipelines.adapter import Conditioning, LatentAdapter, repeated

__all__ = ["StableDiffusion", "StableDiffusionXL"]


class StableDiffusion(LatentAdapter):
    """
    Stable Diffusion 1.x and 2.x, with image to image and inpainting.

    A network that takes the guidance scale as an input (a guidance-distilled one) gets it there.

    :param pipe: A ``StableDiffusionPipeline``, or its ``Img2Img`` or ``Inpaint``.
    :param int height: The height of the images in pixels.
    :param int width: Their width.
    :param int clip_skip: How many of the text encoder's last layers are left out.
    :param dict cross_attention_kwargs: Passed to the network's attention.
    :param image: The image to be filled in, for inpainting.
    :param mask_image: Where it is filled in: 1 or white there.
    :param Tensor masked_image_latents: The latents of the rest of the image; by default the mean of
        the VAE's.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        clip_skip: int | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
    ) -> None:
        super().__init__(pipe, height=height, width=width)
        self.clip_skip, self.attention = clip_skip, cross_attention_kwargs
        self.image, self.mask_image = image, mask_image
        self.masked_image_latents = masked_image_latents
        self.embedded_scale: Any = None
        self._check_channels()

    def guidance(self, scale: Any) -> Any:
        """The strength of guidance, 1 if the network has it as an input."""
        if self.network.config.time_cond_proj_dim is None:
            return super().guidance(scale)
        self.embedded_scale = self.default("guidance_scale", 1.0) if scale is None else scale
        return 1.0

    def read_negatives(self, negative: Any, number: int) -> list[str] | None:
        """The negative prompts, refused where guidance is an input of the network."""
        if negative is not None and self.embedded_scale is not None:
            raise ValueError(
                f"the network of {self.name} is guidance-distilled: it has guidance_scale as an "
                "input and takes no negative_prompt; leave it out"
            )
        return super().read_negatives(negative, number)

    def encode(self, prompts: list[Any], negatives: list[str] | None, guided: bool) -> Conditioning:
        """Encodes the prompts by the pipeline's text encoder."""
        embeds, null = self.pipe.encode_prompt(
            prompts,
            self.device,
            1,
            guided,
            negatives,
            lora_scale=(self.attention or {}).get("scale"),
            clip_skip=self.clip_skip,
        )
        return self.completed(
            {"encoder_hidden_states": embeds}, {"encoder_hidden_states": null} if guided else None
        )

    def completed(self, inputs: dict[str, Tensor], null: dict[str, Tensor] | None) -> Conditioning:
        """Adds what does not depend on the prompts."""
        number = len(next(iter(inputs.values())))
        if self.embedded_scale is not None:
            inputs["timestep_cond"] = self._embedded(number)
        if self.mask_image is not None:
            inputs["mask"], inputs["masked_image_latents"] = self._masked(number)
        return Conditioning(inputs, null)

    def denoise(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """Evaluates the U-Net."""
        if "mask" in inputs:
            x = torch.cat([x, inputs.pop("mask"), inputs.pop("masked_image_latents")], dim=1)
        return self.evaluate(x, timestep, **inputs)

    def evaluate(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """Evaluates the U-Net on all its channels."""
        output: Tensor = self.network(
            x, timestep, cross_attention_kwargs=self.attention, return_dict=False, **inputs
        )[0]
        return output

    def starts_from_noise(self, strength: float) -> bool:
        """Whether nothing of the image is in the first state: inpainting of full strength."""
        return self.mask_image is not None and strength == 1

    def _embedded(self, number: int) -> Tensor:
        scale = torch.as_tensor(self.embedded_scale, dtype=torch.float32).expand(number)
        size = self.network.config.time_cond_proj_dim
        embedding: Tensor = self.pipe.get_guidance_scale_embedding(scale - 1, embedding_dim=size)
        return embedding.to(self.device)

    def _masked(self, number: int) -> tuple[Tensor, Tensor]:
        """The mask in latents, and the latents of the image outside of it."""
        size = dict(height=self.height, width=self.width)
        mask = self.pipe.mask_processor.preprocess(self.mask_image, **size).to(self.device)
        hidden = self.masked_image_latents
        if hidden is None:
            pixels = self.preprocess(self.image).to(self.device)
            hidden = latents.encode(self.pipe.vae, pixels * (mask < 0.5))[0]
        hidden = hidden.to(self.device).float().expand((number,) + self.event_shape)
        mask = functional.interpolate(mask, size=self.event_shape[1:])
        return mask.float().expand((number, 1) + self.event_shape[1:]), hidden

    def _check_channels(self) -> None:
        """Refuses networks with inputs that are not known, and masks that they do not take."""
        channels, own = self.network.config.in_channels, self.event_shape[0]
        if self.mask_image is None and channels == own:
            return
        if self.mask_image is not None and channels == own:
            raise ValueError(
                f"the network of {self.name} does not take a mask: the pipeline keeps overwriting "
                "the rest of the image, with the same noise at each step, which is no reverse "
                "process. Use an inpainting checkpoint, whose network has "
                f"{2 * own + 1} channels, or leave mask_image out and observe the rest of the "
                "image with pyro_twist.inverse"
            )
        if channels != 2 * own + 1:
            raise ValueError(
                f"the network of {self.name} takes {channels} channels for latents of {own}; only "
                f"{own} and, for inpainting, {2 * own + 1} are known"
            )
        if self.mask_image is None or self.image is None:
            raise ValueError(
                f"the network of {self.name} is one of inpainting; give image and mask_image"
            )


class StableDiffusionXL(StableDiffusion):
    """
    Stable Diffusion XL, with its micro-conditioning.

    :param pipe: A ``StableDiffusionXLPipeline``, or its ``Img2Img`` or ``Inpaint``, not the
        refiner's.
    :param int height: The height of the images in pixels.
    :param int width: Their width.
    :param prompt_2: For the second text encoder; by default the prompt.
    :param negative_prompt_2: For the second text encoder; by default the negative prompt.
    :param tuple original_size: Height and width; by default those of the images.
    :param tuple crops_coords_top_left: Top and left.
    :param tuple target_size: Height and width; by default those of the images.
    :param tuple negative_original_size: For the unconditional evaluation, with
        ``negative_target_size``.
    :param tuple negative_crops_coords_top_left: For the unconditional evaluation.
    :param tuple negative_target_size: For the unconditional evaluation.
    :param options: Those of :class:`StableDiffusion`.
    """

    upcasts = True

    def __init__(
        self,
        pipe: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
    ) -> None:
        super().__init__(
            pipe,
            height=height,
            width=width,
            clip_skip=clip_skip,
            cross_attention_kwargs=cross_attention_kwargs,
            image=image,
            mask_image=mask_image,
            masked_image_latents=masked_image_latents,
        )
        self.prompt_2, self.negative_prompt_2 = prompt_2, negative_prompt_2
        size = (self.height, self.width)
        self.sizes = _sizes(original_size or size, crops_coords_top_left, target_size or size)
        self.negative_sizes = self.sizes
        if (negative_original_size is None) != (negative_target_size is None):
            raise ValueError(
                "negative_original_size and negative_target_size go together; give both or neither"
            )
        if negative_original_size is not None:
            self.negative_sizes = _sizes(
                negative_original_size, negative_crops_coords_top_left, negative_target_size
            )

    def encode(self, prompts: list[Any], negatives: list[str] | None, guided: bool) -> Conditioning:
        """Encodes the prompts by both text encoders, and the sizes."""
        embeds, null, pooled, null_pooled = self.pipe.encode_prompt(
            prompt=prompts,
            prompt_2=repeated(self.prompt_2, len(prompts), "prompt_2"),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negatives,
            negative_prompt_2=repeated(self.negative_prompt_2, len(prompts), "negative_prompt_2"),
            lora_scale=(self.attention or {}).get("scale"),
            clip_skip=self.clip_skip,
        )
        inputs = dict(
            encoder_hidden_states=embeds,
            text_embeds=pooled,
            time_ids=self._time_ids(self.sizes, pooled),
        )
        if not guided:
            return self.completed(inputs, None)
        without = dict(
            encoder_hidden_states=null,
            text_embeds=null_pooled,
            time_ids=self._time_ids(self.negative_sizes, pooled),
        )
        return self.completed(inputs, without)

    def evaluate(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """Evaluates the U-Net on all its channels."""
        added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids")}
        return super().evaluate(x, timestep, added_cond_kwargs=added, **inputs)

    def _time_ids(self, sizes: tuple[int, ...], pooled: Tensor) -> Tensor:
        """The sizes as the network takes them, one row per prompt."""
        config = self.network.config
        width = config.addition_time_embed_dim * len(sizes) + pooled.shape[-1]
        expected = config.projection_class_embeddings_input_dim
        if width != expected:
            raise ValueError(
                f"the network of {self.name} takes {expected} entries of added conditioning, and "
                f"{len(sizes)} sizes with the pooled prompt make {width}; the XL refiner, which "
                "takes an aesthetic score, is not supported"
            )
        return pooled.new_tensor(sizes).expand(len(pooled), -1)


def _sizes(*pairs: Any) -> tuple[int, ...]:
    """The entries of pairs of numbers, one after another."""
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(
                f"a size or a corner is {pair!r}; give two numbers, height or top first"
            )
    return tuple(number for pair in pairs for number in pair)
