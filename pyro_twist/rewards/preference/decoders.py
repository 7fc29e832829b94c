# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""A small decoder for the guesses that twists score, in place of the model's own."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from pyro_twist.rewards.preference.base import at_least_float, check_evaluating
from pyro_twist.rewards.preference.loading import explained, placed

__all__ = ["TinyDecoder"]


class TinyDecoder:
    """
    Decodes latents by a tiny autoencoder, such as TAESD, for look-aheads.

    Given as ``lookahead_decoder`` to :class:`~pyro_twist.rewards.RewardTilted`. The samples' own
    decoder still decodes the final latents, so that the law stays what it is.

    :param autoencoder: A diffusers ``AutoencoderTiny`` in evaluation mode, trained for the
        latents of the model's own autoencoder.
    :param int chunk_size: The most latents per call; by default all.
    :raises ValueError: If the autoencoder is in training mode.

    Example::

        decoder = TinyDecoder.from_pretrained("madebyollin/taesd")
        model = RewardTilted(diffusion, reward, scale=10.0, lookahead_decoder=decoder)
    """

    def __init__(self, autoencoder: Any, *, chunk_size: int | None = None) -> None:
        check_evaluating(autoencoder)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}; give 1 or more, or None for no chunks")
        self.autoencoder, self.chunk_size = autoencoder, chunk_size

    def __repr__(self) -> str:
        return f"TinyDecoder({type(self.autoencoder).__name__})"

    @classmethod
    def from_pretrained(
        cls,
        model: str = "madebyollin/taesd",
        *,
        revision: str = "main",
        local_files_only: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> Self:
        """
        Loads the autoencoder.

        :param str model: A folder, or a name on the hub: ``"madebyollin/taesd"`` for Stable
            Diffusion 1 and 2, ``"madebyollin/taesdxl"`` for SDXL, ``"madebyollin/taesd3"`` and
            ``"madebyollin/taef1"`` for SD3 and Flux.
        :param str revision: The model's version on the hub.
        :param bool local_files_only: Whether to look on this machine only.
        :param torch.dtype dtype: The precision of its weights.
        :param device: Where it runs.
        :param options: The options of the class.
        :returns: The decoder.
        :raises OSError: If something is not found.
        """
        from diffusers import AutoencoderTiny

        with explained(cls.__name__, model, "config.json, diffusion_pytorch_model.safetensors"):
            found = AutoencoderTiny.from_pretrained(
                model, revision=revision, local_files_only=local_files_only, use_safetensors=True
            )
        return cls(placed(found, device, dtype), **options)

    def __call__(self, x: Tensor) -> Tensor:
        """
        Decodes.

        :param torch.Tensor x: Latents in the scale of the diffusion, of shape ``(B, C, h, w)``.
        :returns: Images in [0, 1], in float32 or better, of shape ``(B, 3, H, W)``.
        """
        chunks = x.split(self.chunk_size or max(1, len(x)))
        return torch.cat([self._decoded(chunk) for chunk in chunks]).to(x.device)

    def _decoded(self, latents: Tensor) -> Tensor:
        config = self.autoencoder.config
        latents = latents.to(self.autoencoder.device, self.autoencoder.dtype)
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        images = at_least_float(self.autoencoder.decode(latents).sample)
        return (images / 2 + 0.5).clamp(0, 1)
