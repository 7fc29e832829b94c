# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Rewards on images that need no download.

All take images of shape ``(B, C, H, W)`` in [0, 1] with 3 channels, or 1 where colour plays no
part.
:func:`image_reward` makes them by name, for the command line.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_twist.rewards.registry import RewardRegistry
from pyro_twist.rewards.reward import Reward

__all__ = [
    "brightness",
    "colour",
    "colourfulness",
    "contrast",
    "darkness",
    "dominance",
    "image_reward",
    "image_rewards",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "saturation",
    "smoothness",
    "symmetry",
]

Channel = Literal["red", "green", "blue"]
Axis = Literal["left-right", "top-bottom"]

_CHANNELS = ("red", "green", "blue")
_COLOURS = {
    "black": (0.0, 0.0, 0.0),
    "white": (1.0, 1.0, 1.0),
    "grey": (0.5, 0.5, 0.5),
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0),
    "magenta": (1.0, 0.0, 1.0),
    "orange": (1.0, 0.5, 0.0),
    "pink": (1.0, 0.75, 0.8),
    "brown": (0.6, 0.3, 0.0),
    "purple": (0.5, 0.0, 0.5),
}
# Rec. 601, as in JPEG.
_LUMA = (0.299, 0.587, 0.114)


def jpeg_compressibility(quality: int = 95) -> Reward:
    """
    Minus the size of the image as a JPEG file, in kilobytes of 1000 bytes [1].

    A file has about 0.6 kB of headers, whatever the image. Not differentiable.

    :param int quality: The JPEG quality, 1 to 95.
    :returns: The reward, at most 0.

    **References**

    [1] `Training Diffusion Models with Reinforcement Learning`
        Kevin Black, Michael Janner, Yilun Du, Ilya Kostrikov, Sergey Levine (2023), section 5,
        https://arxiv.org/abs/2305.13301

    Example::

        >>> images = torch.stack([torch.zeros(3, 32, 32), torch.rand(3, 32, 32)])
        >>> flat, noisy = jpeg_compressibility()(images)
        >>> bool(flat > noisy)
        True
    """
    return _jpeg("jpeg_compressibility", quality, -1.0)


def jpeg_incompressibility(quality: int = 95) -> Reward:
    """
    The size of the image as a JPEG file, in kilobytes; see :func:`jpeg_compressibility`.

    :param int quality: The JPEG quality, 1 to 95.
    :returns: The reward.
    """
    return _jpeg("jpeg_incompressibility", quality, 1.0)


def brightness() -> Reward:
    """
    Mean luma, from 0 (black) to 1 (white). Differentiable.

    :returns: The reward.
    """
    return _statistic("brightness", lambda images: _luma(images).mean((-1, -2)))


def darkness() -> Reward:
    """
    One minus the mean luma, from 0 (white) to 1 (black). Differentiable.

    :returns: The reward.
    """
    return _statistic("darkness", lambda images: 1 - _luma(images).mean((-1, -2)))


def contrast() -> Reward:
    """
    Standard deviation of luma over pixels, from 0 (flat) to 0.5 (half black, half white).

    Differentiable.

    :returns: The reward.
    """
    return _statistic("contrast", lambda images: _spread(_luma(images).flatten(1)))


def dominance(channel: Channel) -> Reward:
    """
    Mean of one colour channel minus the mean of the other two, from -1 to 1; grey is 0.

    Differentiable, and linear in the pixels.

    :param str channel: ``"red"``, ``"green"`` or ``"blue"``.
    :returns: The reward.
    :raises ValueError: If there is no such channel.

    Example::

        >>> red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(1, 3, 4, 4)
        >>> dominance("red")(red).tolist(), dominance("green")(red).tolist()
        ([1.0], [-0.5])
    """
    if channel not in _CHANNELS:
        raise ValueError(f"channel={channel!r}; choose one of {_CHANNELS}")
    weights = torch.full((3,), -0.5)
    weights[_CHANNELS.index(channel)] = 1.0
    return _statistic(
        f"dominance of {channel}", lambda images: _mean_colour(images) @ weights.to(images)
    )


def colour(rgb: str | Sequence[float]) -> Reward:
    """
    Closeness of the mean colour to a given one: 1 if they are equal, 0 at the farthest colour.

    Differentiable. One minus the Euclidean distance in RGB, as a fraction of the largest.

    :param rgb: Three numbers in [0, 1], ``"#rrggbb"``, or a name such as ``"orange"``.
    :returns: The reward.
    :raises ValueError: If ``rgb`` is no colour.

    Example::

        >>> colour("white")(torch.ones(1, 3, 4, 4)).tolist()
        [1.0]
    """
    target = torch.tensor(_parse_colour(rgb))
    farthest = torch.maximum(target, 1 - target).norm().item()

    def closeness(images: Tensor) -> Tensor:
        difference = _mean_colour(images) - target.to(images)
        return 1 - torch.linalg.vector_norm(difference, dim=-1) / farthest

    return _statistic(f"colour {rgb}", closeness)


def saturation() -> Reward:
    """
    Mean HSV saturation over pixels, the fraction of the strongest channel that the weakest lacks.

    From 0 (grey) to 1 (pure colours); black pixels count as 0. Differentiable almost everywhere.

    :returns: The reward.
    """

    def mean_saturation(images: Tensor) -> Tensor:
        high, low = _rgb(images).amax(1), _rgb(images).amin(1)
        return ((high - low) / high.clamp_min(1e-6)).mean((-1, -2))

    return _statistic("saturation", mean_saturation)


def colourfulness() -> Reward:
    """
    The colourfulness metric of Hasler and Süsstrunk, for pixels in [0, 1]: 0 for grey images [1].

    On their scale of 0 to 255, 0.06 is slightly, 0.13 moderately, 0.18 averagely, 0.32 highly and
    0.43 extremely colourful. Differentiable.

    :returns: The reward.

    **References**

    [1] `Measuring colourfulness in natural images`
        David Hasler, Sabine Süsstrunk (2003), Human Vision and Electronic Imaging VIII, equation
        for M3, https://doi.org/10.1117/12.477378
    """

    def metric(images: Tensor) -> Tensor:
        red, green, blue = _rgb(images).flatten(2).unbind(1)
        axes = torch.stack([red - green, (red + green) / 2 - blue], 1)
        means = axes.mean(-1)
        spread = torch.linalg.vector_norm(_spread(axes), dim=-1)
        return spread + 0.3 * torch.linalg.vector_norm(means, dim=-1)

    return _statistic("colourfulness", metric)


def symmetry(axis: Axis = "left-right") -> Reward:
    """
    One minus the mean absolute difference between the image and its mirror image.

    From 0 to 1, which is perfect symmetry; a flat image is symmetric too. Differentiable.

    :param str axis: ``"left-right"`` or ``"top-bottom"``.
    :returns: The reward.
    :raises ValueError: If there is no such axis.
    """
    if axis not in ("left-right", "top-bottom"):
        raise ValueError(f"axis={axis!r}; choose 'left-right' or 'top-bottom'")
    dim = -1 if axis == "left-right" else -2
    return _statistic(
        f"symmetry {axis}",
        lambda images: 1 - (images - images.flip(dim)).abs().mean((-1, -2, -3)),
    )


def smoothness() -> Reward:
    """
    Minus the mean absolute difference between neighbouring pixels, from -1 to 0 (a flat image).

    Differentiable.

    :returns: The reward.
    """

    def minus_variation(images: Tensor) -> Tensor:
        across, down = images.diff(dim=-1).abs(), images.diff(dim=-2).abs()
        return -(across.flatten(1).mean(-1) + down.flatten(1).mean(-1)) / 2

    return _statistic("smoothness", minus_variation)


_REGISTRY = RewardRegistry(
    "image",
    {
        "blue": (lambda: dominance("blue"), "blue minus the mean of red and green, -1 to 1"),
        "bright": (brightness, "mean luma, 0 (black) to 1 (white)"),
        "colour": (colour, "closeness of the mean colour to rgb=..., 0 to 1"),
        "colourful": (colourfulness, "Hasler-Süsstrunk colourfulness, 0 (grey) to about 1"),
        "compressible": (jpeg_compressibility, "minus the JPEG file size, in kB"),
        "contrast": (contrast, "standard deviation of luma, 0 to 0.5"),
        "dark": (darkness, "one minus mean luma, 0 (white) to 1 (black)"),
        "green": (lambda: dominance("green"), "green minus the mean of red and blue, -1 to 1"),
        "incompressible": (jpeg_incompressibility, "JPEG file size, in kB"),
        "red": (lambda: dominance("red"), "red minus the mean of green and blue, -1 to 1"),
        "saturated": (saturation, "mean HSV saturation, 0 (grey) to 1"),
        "smooth": (smoothness, "minus the mean difference of neighbouring pixels, -1 to 0"),
        "symmetric": (symmetry, "one minus the mean difference to the mirror image, 0 to 1"),
    },
)


def image_rewards() -> dict[str, str]:
    """
    Lists the named image rewards.

    :returns: For every name one line that says what is measured, in which unit.
    """
    return _REGISTRY.descriptions()


def image_reward(name: str, **options: Any) -> Reward:
    """
    Makes an image reward by name.

    :param str name: One of :func:`image_rewards`.
    :param options: The options of the function that makes it, such as ``quality=50`` for
        ``"compressible"``.
    :returns: The reward.
    :raises ValueError: If there is no such name or option.

    Example::

        >>> image_reward("bright")(torch.full((2, 3, 8, 8), 0.25)).tolist()
        [0.25, 0.25]
    """
    return _REGISTRY.make(name, **options)


def _jpeg(name: str, quality: int, sign: float) -> Reward:
    if not 1 <= quality <= 95:
        raise ValueError(f"quality={quality}; give a JPEG quality from 1 to 95")

    def kilobytes(images: list[Any]) -> list[float]:
        return [sign * _jpeg_bytes(image, quality) / 1000 for image in images]

    return Reward(kilobytes, name=name, input="pil", differentiable=False)


def _jpeg_bytes(image: Any, quality: int) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


def _statistic(name: str, fn: Callable[[Tensor], Tensor]) -> Reward:
    return Reward(lambda images: fn(_checked(images)), name=name, differentiable=True)


def _checked(images: Tensor) -> Tensor:
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images need shape (B, C, H, W) with 1 or 3 channels, got {tuple(images.shape)}"
        )
    return images if images.is_floating_point() else images.float() / 255


def _rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)


def _luma(images: Tensor) -> Tensor:
    weights = images.new_tensor(_LUMA)
    return (_rgb(images) * weights[:, None, None]).sum(1)


def _mean_colour(images: Tensor) -> Tensor:
    return _rgb(images).mean((-1, -2))


def _spread(values: Tensor) -> Tensor:
    """Standard deviation over the last dim, with gradient 0 where it is 0."""
    deviations = values - values.mean(-1, keepdim=True)
    return torch.linalg.vector_norm(deviations, dim=-1) / values.shape[-1] ** 0.5


def _parse_colour(rgb: str | Sequence[float]) -> list[float]:
    if isinstance(rgb, str) and rgb in _COLOURS:
        return list(_COLOURS[rgb])
    try:
        values = _parse_hex(rgb) if isinstance(rgb, str) else [float(value) for value in rgb]
    except (TypeError, ValueError):
        values = []
    if len(values) != 3 or not all(0 <= value <= 1 for value in values):
        raise ValueError(
            f"rgb={rgb!r} is no colour; give three numbers in [0, 1], '#rrggbb' or one of: "
            f"{', '.join(_COLOURS)}"
        )
    return values


def _parse_hex(text: str) -> list[float]:
    digits = text.removeprefix("#")
    if len(digits) != 6:
        raise ValueError(text)
    return [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
