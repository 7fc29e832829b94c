# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""How a kind of pipelines is taken apart: the interface, and what pipelines with a VAE share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_twist.diffusion.pipelines import latents

__all__ = [
    "Conditioning",
    "LatentAdapter",
    "PipelineAdapter",
    "PipelineDenoiser",
    "at_least_one",
    "repeated",
]


@dataclass(frozen=True)
class Conditioning:
    """
    What a network is told about each prompt.

    :param dict inputs: Tensors with one entry per prompt, by the name of the argument of
        :meth:`PipelineAdapter.denoise` that they are for.
    :param dict null: What replaces some of them in the unconditional evaluation of guidance;
        ``None`` if there is none.
    """

    inputs: Mapping[str, Tensor]
    null: Mapping[str, Tensor] | None = None


class PipelineAdapter:
    """
    How one kind of pipelines is run: prompts, shape, network, images.

    A derived class overrides what is different. Its constructor names the options of
    ``from_pipeline`` that its kind has; others are refused. See :func:`register_pipeline`.

    :param pipe: A pipeline of diffusers; read, never changed.
    """

    #: The name of the pipeline's network among its components.
    component = "unet"

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def name(self) -> str:
        """The pipeline's class, for messages."""
        return type(self.pipe).__name__

    @property
    def network(self) -> Any:
        """The pipeline's network."""
        return getattr(self.pipe, self.component)

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        device: torch.device = self.pipe._execution_device
        return device

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one state, channels first."""
        size = _pair(self.network.config.sample_size)
        return (self.network.config.in_channels, *size)

    def read_prompts(self, prompt: Any) -> list[Any]:
        """
        The prompts as a list.

        :param prompt: What the user gave: a prompt, or a list of prompts.
        :raises ValueError: If the pipeline does not take it.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts:
            raise ValueError(f"prompt={prompt!r}; {self.name} takes a prompt or a list of prompts")
        if not all(isinstance(one, str) for one in prompts):
            raise ValueError(f"prompt={prompt!r} holds something that is not a string")
        return list(prompts)

    def read_negatives(self, negative: Any, number: int) -> list[str] | None:
        """
        The negative prompts, one per prompt, or ``None`` for the pipeline's own.

        :param negative: What the user gave.
        :param int number: The number of prompts.
        :raises ValueError: If the pipeline does not take it.
        """
        return repeated(negative, number, "negative_prompt")

    def guidance(self, scale: Any) -> Any:
        """
        The strength of classifier-free guidance, 1 for none.

        :param scale: A number, a tensor with one per prompt, or ``None`` for the pipeline's own.
        :raises ValueError: If the pipeline takes no guidance.
        """
        return at_least_one(self.default("guidance_scale", 1.0) if scale is None else scale)

    def encode(self, prompts: list[Any], negatives: list[str] | None, guided: bool) -> Conditioning:
        """
        Encodes the prompts.

        :param list prompts: What :meth:`read_prompts` returned.
        :param list negatives: One per prompt; ``None`` for the pipeline's own.
        :param bool guided: Whether the unconditional evaluation is needed.
        """
        raise NotImplementedError

    def denoise(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """
        Evaluates the network.

        :param Tensor x: States of shape ``(rows,) + event_shape``, in the network's dtype.
        :param Tensor timestep: The scheduler's timestep, of shape ``(rows,)``.
        :param inputs: The entries of :class:`Conditioning`, one per row.
        :returns: Of the shape of ``x``, or with twice the channels, of which the second half is
            the variance.
        :rtype: Tensor
        """
        raise NotImplementedError

    def decode(self, x: Tensor) -> Tensor:
        """
        Maps states to images.

        :param Tensor x: Of shape ``(rows,) + event_shape``.
        :returns: Images in [0, 1] of shape ``(rows, channels, height, width)``, in float32.
        :rtype: Tensor
        """
        return (x.float() / 2 + 0.5).clamp(0, 1)

    def encode_image(self, image: Any) -> tuple[Tensor, Tensor]:
        """
        The law of clean states that belong to an image, for starts from an image.

        :param image: What the user gave.
        :returns: Mean and standard deviation, each of shape ``(number of images,) + event_shape``.
        :rtype: tuple
        """
        raise ValueError(f"{self.name} has no start from an image; leave image out")

    def timestep_options(self, scheduler: Any, number: int) -> dict[str, Any]:
        """
        Arguments of the scheduler's ``set_timesteps`` that the pipeline gives.

        :param scheduler: The scheduler that is used.
        :param int number: The number of steps; left out where ``sigmas`` are returned.
        """
        return {}

    def start_time(self, number: int, strength: float) -> int:
        """
        How many steps are run for a start from an image.

        :param int number: The number of steps.
        :param float strength: In (0, 1].
        """
        return min(int(number * strength), number)

    def starts_from_noise(self, strength: float) -> bool:
        """
        Whether nothing of the image is in the first state.

        :param float strength: In (0, 1].
        """
        return False

    def default(self, option: str, otherwise: Any) -> Any:
        """What the pipeline's own call takes for an option that is not given."""
        parameter = inspect.signature(type(self.pipe).__call__).parameters.get(option)
        if parameter is None or parameter.default in (None, inspect.Parameter.empty):
            return otherwise
        return parameter.default


class LatentAdapter(PipelineAdapter):
    """
    A pipeline whose states are the latents of a VAE.

    :param pipe: A pipeline with the components ``vae`` and, for starts from an image,
        ``image_processor``.
    :param int height: The height of the images in pixels.
    :param int width: Their width.
    :raises ValueError: If the network or the VAE cannot have this size.
    """

    #: Whether the pipeline runs a VAE of float16 in float32 if its config says ``force_upcast``.
    upcasts = False
    #: Number of latents that a side is a multiple of.
    patch = 1

    def __init__(self, pipe: Any, *, height: int | None = None, width: int | None = None) -> None:
        super().__init__(pipe)
        scale = self.scale
        usual = [side * scale for side in self.sample_size]
        self.height = usual[0] if height is None else height
        self.width = usual[1] if width is None else width
        unit = scale * self.patch
        for side, given in (("height", self.height), ("width", self.width)):
            if isinstance(given, bool) or not isinstance(given, int) or given < 1:
                raise ValueError(f"{side}={given!r} is not a positive integer")
            if given % unit:
                lower = given // unit * unit
                raise ValueError(
                    f"{side}={given} is not divisible by {unit}, as {self.name} needs; try "
                    f"{lower or unit} or {lower + unit}"
                )

    @property
    def scale(self) -> int:
        """Number of pixels that a latent is wide."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @property
    def sample_size(self) -> tuple[int, int]:
        """The usual height and width in latents."""
        size = getattr(self.pipe, "default_sample_size", None)
        return _pair(self.network.config.sample_size if size is None else size)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of the latents of one image."""
        channels = self.pipe.vae.config.latent_channels
        return (channels, self.height // self.scale, self.width // self.scale)

    def decode(self, x: Tensor) -> Tensor:
        """
        Decodes latents by the VAE.

        :param Tensor x: Of shape ``(rows,) + event_shape``.
        """
        images = latents.decode(self.pipe.vae, x, self.upcasts)
        processor = getattr(self.pipe, "image_processor", None)
        if processor is None:
            return super().decode(images)
        processed: Tensor = processor.postprocess(images, output_type="pt")
        return processed

    def encode_image(self, image: Any) -> tuple[Tensor, Tensor]:
        """
        Encodes images by the VAE.

        :param image: A PIL image, an array, a tensor in [0, 1], latents, or a list of images.
        """
        if self.is_latents(image):
            given = image.reshape((-1,) + self.event_shape).to(self.device).float()
            return given, torch.zeros_like(given)
        pixels = self.preprocess(image)
        return latents.encode(self.pipe.vae, pixels.to(self.device))

    def preprocess(self, image: Any) -> Tensor:
        """An image as the pipeline's image processor makes it, in [-1, 1]."""
        processor = getattr(self.pipe, "image_processor", None)
        if processor is None:
            raise ValueError(f"{self.name} has no image_processor, so no start from an image")
        pixels: Tensor = processor.preprocess(image, height=self.height, width=self.width)
        channels = self.pipe.vae.config.get("in_channels", 3)
        if pixels.shape[1] != channels or pixels.abs().max() > 1 + 1e-3:
            low, high = pixels.aminmax()
            raise ValueError(
                f"image has {pixels.shape[1]} channels, and values from {low:.3g} to {high:.3g} "
                f"after preprocessing; give images with {channels} channels and values in [0, 1], "
                f"or latents of shape {self.event_shape}"
            )
        return pixels

    def is_latents(self, image: Any) -> bool:
        """Whether a tensor is of latents, not of pixels."""
        return isinstance(image, Tensor) and tuple(image.shape[-3:]) == self.event_shape


class PipelineDenoiser(torch.nn.Module):
    """
    The network of a pipeline, as a denoiser of :class:`~pyro_twist.diffusion.GaussianDiffusion`.

    :param PipelineAdapter adapter: How it is called.
    """

    def __init__(self, adapter: PipelineAdapter) -> None:
        super().__init__()
        self.network, self.adapter = adapter.network, adapter
        #: Whether the process takes a learned variance from the output.
        self.learned = False

    @property
    def placement(self) -> tuple[torch.device, torch.dtype]:
        """Where and in which type the network computes, also if it is kept elsewhere or smaller."""
        first = next(p for p in self.network.parameters() if p.is_floating_point())
        small = first.dtype.itemsize == 1
        return latents.device_of(self.network), self.network.dtype if small else first.dtype

    def forward(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """
        The prediction, without a variance that the scheduler does not use.

        :param Tensor x: Of shape ``(rows,) + event_shape``.
        :param Tensor timestep: Of shape ``(rows,)``.
        :param inputs: What the prompts were encoded to.
        """
        output = self.adapter.denoise(x, timestep, **inputs)
        return output if self.learned else output[:, : x.shape[1]]


def at_least_one(scale: Any) -> Any:
    """Guidance as diffusers understands it: off at 1 or less."""
    if isinstance(scale, Tensor):
        return scale.clamp(min=1.0) if (scale > 1).any() else 1.0
    return max(float(scale), 1.0)


def repeated(texts: Any, number: int, name: str) -> list[str] | None:
    """
    One text per prompt, or ``None`` for none.

    :param texts: One text, or one per prompt.
    :param int number: The number of prompts.
    :param str name: What the user calls them, for messages.
    :raises ValueError: If it is something else.
    """
    if texts is None:
        return None
    found = [texts] * number if isinstance(texts, str) else texts
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"{name}={texts!r}; give a string, or a list of one for each prompt")
    if len(found) != number:
        raise ValueError(
            f"{name} has {len(found)} entries for {number} prompts; give one, or one for each"
        )
    return list(found)


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
