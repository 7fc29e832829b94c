# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What a vision network is shown of an image: resized, cropped or padded, normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["CLIP_MEAN", "CLIP_STD", "Preprocessing"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Fit = Literal["shortest", "longest", "exact"]

_RANGE_TOLERANCE = 1e-3
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_NOT_HERE = ("do_pad", "do_convert_to_grayscale", "do_thumbnail", "do_align_long_axis")


@dataclass(frozen=True)
class Preprocessing:
    """
    Maps images in [0, 1] to what a vision network takes, differentiably.

    Resizing is that of Pillow, with its filter that grows when an image shrinks, width first. On
    PIL images it is Pillow itself, or the processor of the network, with their rounding to 8 bits.

    :param size: The edge that ``fit`` speaks of, in pixels, or height and width; ``None`` leaves
        the size as it is.
    :param str fit: Which edge gets the size ``size``: the ``"shortest"``, with the rest cropped;
        the ``"longest"``, with black bars around the rest; or both, ``"exact"``, whatever becomes
        of the shape.
    :param crop: Height and width of the part in the middle; ``None`` for no crop.
    :param bool centred: How an odd margin is split: as torchvision does, rounded to even, or as
        transformers does, with the smaller half above and to the left.
    :param str resample: ``"bicubic"`` or ``"bilinear"``.
    :param tuple mean: What is subtracted from each channel.
    :param tuple std: What each channel is divided by afterwards.
    :param bool eight_bit: Whether the published chain works on 8-bit images. It then clamps to
        [0, 1] after each pass of resizing, as 8 bits do.
    :param bool rounds: Whether tensors are rounded to 8 bits wherever the published chain does
        so, with the gradient passed straight through. Without, values are within a grey level or
        two of the published ones, and the gradient is that of the value.
    :param processor: A transformers image processor that PIL images go through.
    """

    size: int | tuple[int, int] | None = 224
    fit: Fit = "shortest"
    crop: tuple[int, int] | None = (224, 224)
    centred: bool = False
    resample: str = "bicubic"
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    eight_bit: bool = True
    rounds: bool = False
    processor: Any = None

    @classmethod
    def from_processor(cls, processor: Any) -> Self:
        """
        Reads off what a transformers image processor does.

        :param processor: One that resizes, crops, rescales and normalises, such as
            ``CLIPImageProcessor`` or ``BlipImageProcessor``.
        :returns: The same on tensors.
        :raises ValueError: If it does something else.
        """
        _check_processor(processor)
        size, fit = _size_of(processor)
        crop = _pair(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
        return cls(
            size=size,
            fit=fit,
            crop=crop,
            resample=_RESAMPLE[int(processor.resample)],
            mean=tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
            processor=processor,
        )

    def rounding(self, rounds: bool) -> Self:
        """
        The same with or without rounding of tensors.

        :param bool rounds: As in the class.
        """
        return replace(self, rounds=rounds)

    def __call__(self, images: Tensor) -> Tensor:
        """
        Prepares tensors.

        :param torch.Tensor images: Of shape ``(B, 1 or 3, H, W)``, in [0, 1] or uint8.
        :returns: Of shape ``(B, 3, h, w)``.
        :raises ValueError: If shape or values are others.
        """
        images = self._kept(_checked(images))
        return self._normalised(self._cropped(self._resized(images)))

    def pil(self, images: Sequence[Any]) -> Tensor:
        """
        Prepares PIL images.

        :param images: ``B`` PIL images, of any sizes.
        :returns: In float32, of shape ``(B, 3, h, w)``.
        """
        other = [type(image).__name__ for image in images if not hasattr(image, "convert")]
        if other:
            raise ValueError(f"a list of images holds a {other[0]}; give PIL images, or one tensor")
        if self.processor is not None:
            shown = [image.convert("RGB") for image in images]
            pixels: Tensor = self.processor(images=shown, return_tensors="pt")["pixel_values"]
            return pixels
        exact = replace(self, rounds=self.eight_bit)
        return torch.cat([exact(_from_pil(image)) for image in images])

    def _kept(self, images: Tensor) -> Tensor:
        """Clamps and rounds where 8 bits do."""
        if not self.eight_bit:
            return images
        images = images.clamp(0, 1)
        if not self.rounds:
            return images
        levels = (images.detach() * 255 + 0.5).floor() / 255
        return images + (levels - images.detach())

    def _resized(self, images: Tensor) -> Tensor:
        height, width = self._target(images.shape[-2], images.shape[-1])
        if images.shape[-1] != width:
            images = self._kept(self._pass(images, (images.shape[-2], width)))
        if images.shape[-2] != height:
            images = self._kept(self._pass(images, (height, width)))
        return images

    def _pass(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        return functional.interpolate(
            images, size, mode=self.resample, align_corners=False, antialias=True
        )

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        if self.fit == "longest":
            scale = self.size / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size

    def _cropped(self, images: Tensor) -> Tensor:
        if self.fit == "longest" and isinstance(self.size, int):
            return _padded(images, self.size)
        if self.crop is None:
            return images
        short = [max(0, want - have) for want, have in zip(self.crop, images.shape[-2:])]
        if any(short):
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels are smaller than the "
                f"crop {self.crop}; let the preprocessing resize to at least that"
            )
        top, left = (self._margin(have - want) for have, want in zip(images.shape[-2:], self.crop))
        return images[..., top : top + self.crop[0], left : left + self.crop[1]]

    def _margin(self, excess: int) -> int:
        return round(excess / 2) if self.centred else excess // 2

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(list(each))[:, None, None] for each in (self.mean, self.std))
        return (images - mean) / std


def _checked(images: Tensor) -> Tensor:
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images need shape (B, C, H, W) with 1 or 3 channels, got {tuple(images.shape)}"
        )
    if not images.is_floating_point():
        images = images.float() / 255
    low, high = images.detach().aminmax() if images.numel() else (images.sum(), images.sum())
    if low < -_RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
        raise ValueError(
            f"images need values in [0, 1], got {low:.3g} to {high:.3g}; let model.decode return "
            "[0, 1], and keep decode=True"
        )
    return images.expand(-1, 3, -1, -1)


def _padded(images: Tensor, size: int) -> Tensor:
    """Puts black around, the larger half below and to the right."""
    down, across = size - images.shape[-2], size - images.shape[-1]
    bars = (across // 2, across - across // 2, down // 2, down - down // 2)
    return functional.pad(images, bars)


def _from_pil(image: Any) -> Tensor:
    import numpy as np

    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1)[None].float() / 255


# What a processor of transformers says of itself


def _check_processor(processor: Any) -> None:
    other = [name for name in _NOT_HERE if getattr(processor, name, False)]
    if other:
        raise ValueError(
            f"{type(processor).__name__} has {', '.join(other)}, which is not known here. Give "
            "preprocessing=Preprocessing(processor=...) and input='pil', with which images go "
            "through the processor itself"
        )
    if int(getattr(processor, "resample", 3)) not in _RESAMPLE:
        raise ValueError(
            f"{type(processor).__name__} resizes by resample={processor.resample}; bilinear (2) "
            "and bicubic (3) are known here"
        )
    if not processor.do_rescale or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise ValueError(
            f"{type(processor).__name__} does not rescale by 1/255, so that its networks do not "
            "take images in [0, 1]"
        )


def _size_of(processor: Any) -> tuple[int | tuple[int, int] | None, Fit]:
    size = dict(processor.size) if processor.do_resize else {}
    size = {name: value for name, value in size.items() if value is not None}
    if not size:
        return None, "exact"
    if set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"]), "shortest"
    if set(size) == {"height", "width"}:
        return _pair(size), "exact"
    raise ValueError(
        f"{type(processor).__name__} has size={size}; a shortest_edge, or height and width, are "
        "known here"
    )


def _pair(size: Any) -> tuple[int, int]:
    size = dict(size)
    return int(size["height"]), int(size["width"])
