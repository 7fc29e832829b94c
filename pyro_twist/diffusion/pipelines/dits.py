# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Pipelines with a transformer over latents: PixArt-Sigma and DiT."""

from __future__ import annotations

from importlib import import_module
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pyro_twist.diffusion.pipelines.adapter import Conditioning, LatentAdapter

__all__ = ["DiT", "PixArtSigma"]

# The pipeline's tables of usual sizes, by the network's sample size.
_BINS = {256: "2048", 128: "1024", 64: "512", 32: "256"}


class PixArtSigma(LatentAdapter):
    """
    PixArt-Sigma.

    :param pipe: A ``PixArtSigmaPipeline``.
    :param int height: The height of the images in pixels.
    :param int width: Their width.
    :param bool clean_caption: Whether prompts are cleaned, as by default in the pipeline.
    :param int max_sequence_length: At most this many tokens.
    :param bool use_resolution_binning: Whether images are made in the nearest usual size and then
        resized, as by default in the pipeline; for networks of a usual size.
    """

    component = "transformer"

    def __init__(
        self,
        pipe: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        clean_caption: bool = True,
        max_sequence_length: int = 300,
        use_resolution_binning: bool = True,
    ) -> None:
        self.patch = pipe.transformer.config.patch_size
        self.asked: tuple[int, int] | None = None
        size = pipe.transformer.config.sample_size
        if use_resolution_binning and size in _BINS:
            usual = size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
            self.asked = (height or usual, width or usual)
            height, width = pipe.image_processor.classify_height_width_bin(
                *self.asked, ratios=_ratios(_BINS[size])
            )
        super().__init__(pipe, height=height, width=width)
        self.texts = dict(clean_caption=clean_caption, max_sequence_length=max_sequence_length)

    def encode(self, prompts: list[Any], negatives: list[str] | None, guided: bool) -> Conditioning:
        """Encodes the prompts by the text encoder, with the mask of their tokens."""
        embeds, mask, null, null_mask = self.pipe.encode_prompt(
            prompts,
            guided,
            negative_prompt="" if negatives is None else negatives,
            device=self.device,
            **self.texts,
        )
        inputs = dict(encoder_hidden_states=embeds, encoder_attention_mask=mask)
        without = dict(encoder_hidden_states=null, encoder_attention_mask=null_mask)
        return Conditioning(inputs, without if guided else None)

    def denoise(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """Evaluates the transformer."""
        output: Tensor = self.network(
            x,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
            **inputs,
        )[0]
        return output

    def decode(self, x: Tensor) -> Tensor:
        """Decodes latents by the VAE, in the size that was asked for."""
        images = super().decode(x)
        if self.asked is None or self.asked == (self.height, self.width):
            return images
        height, width = self.asked
        resized: Tensor = self.pipe.image_processor.resize_and_crop_tensor(images, width, height)
        return resized


class DiT(LatentAdapter):
    """
    Class-conditional DiT; a prompt is a class, by name or index.

    :param pipe: A ``DiTPipeline``.
    """

    component = "transformer"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)

    def read_prompts(self, prompt: Any) -> list[int]:
        """The classes as indices."""
        given = [prompt] if isinstance(prompt, (str, Integral)) else prompt
        if not isinstance(given, (list, tuple)) or not given:
            raise ValueError(f"prompt={prompt!r}; {self.name} takes a class or a list of classes")
        return [self._index(one) for one in given]

    def read_negatives(self, negative: Any, number: int) -> None:
        """Refuses negative prompts: guidance leads away from "no class"."""
        if negative is not None:
            raise ValueError(f"negative_prompt={negative!r}: {self.name} has none; leave it out")

    def encode(self, prompts: list[Any], negatives: list[str] | None, guided: bool) -> Conditioning:
        """The classes; the index after the last is "no class"."""
        labels = torch.tensor(prompts, device=self.device)
        none = torch.full_like(labels, self._number)
        return Conditioning({"class_labels": labels}, {"class_labels": none})

    def denoise(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """Evaluates the transformer."""
        output: Tensor = self.network(x, timestep=timestep, return_dict=False, **inputs)[0]
        return output

    @property
    def _number(self) -> int:
        number: int = self.network.config.num_embeds_ada_norm
        return number

    def _index(self, label: Any) -> int:
        index = self.pipe.labels.get(label) if isinstance(label, str) else label
        is_index = isinstance(index, Integral) and not isinstance(index, bool)
        if is_index and 0 <= index < self._number:
            return int(index)
        names = ", ".join(list(self.pipe.labels)[:4])
        raise ValueError(
            f"prompt={label!r} is no class of {self.name}; give an index from 0 to "
            f"{self._number - 1}" + (f", or a name such as {names}" if names else "")
        )


def _ratios(name: str) -> Any:
    package = "diffusers.pipelines.pixart_alpha"
    for module in ("pipeline_pixart_sigma", "pipeline_pixart_alpha"):
        found = getattr(import_module(f"{package}.{module}"), f"ASPECT_RATIO_{name}_BIN", None)
        if found is not None:
            return found
    raise ImportError(f"diffusers has no table ASPECT_RATIO_{name}_BIN; use another version")
