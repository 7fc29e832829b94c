# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Inverse problems: a picture was seen through an operator, with noise.

The prior is a diffusion model, the likelihood an observed site of a Pyro program. The operators
here are linear and take any batch dims; any other differentiable function of pictures will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional

from pyro_twist.rewards.tilted import Tilted

__all__ = ["AveragePooling", "GaussianBlur", "Mask", "observed", "psnr"]

_NO_PICTURES = "x has shape {}; pictures have channels, height and width as last dims"


class Mask:
    """
    Inpainting: the entries of a picture that were seen.

    Those that were not are no part of the observation, so that the evidence is that of what was
    seen.

    :param Tensor keep: Boolean, of the shape of one picture, ``event_shape``.
    :raises ValueError: If ``keep`` is not boolean, or keeps nothing.
    """

    def __init__(self, keep: Tensor) -> None:
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or not keep.any():
            raise ValueError(
                f"keep={_told(keep)}; give a boolean tensor of the shape of one picture that is "
                "true for at least one entry, such as torch.rand(diffusion.event_shape) < 0.5"
            )
        self.keep = keep

    def __call__(self, x: Tensor) -> Tensor:
        """
        The entries that are kept, in the order of the picture's.

        :param Tensor x: Pictures of shape ``batch_shape + keep.shape``.
        :returns: Of shape ``batch_shape + (number_kept,)``.
        :rtype: Tensor
        """
        if x.shape[x.dim() - self.keep.dim() :] != self.keep.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, which does not end in that of keep, "
                f"{tuple(self.keep.shape)}"
            )
        return x[..., self.keep.to(x.device)]


class AveragePooling:
    """
    Super-resolution: every entry seen is the mean of a square of pixels.

    :param int factor: The side of the square, which divides height and width.
    :raises ValueError: If it is not a whole number of at least 1.
    """

    def __init__(self, factor: int) -> None:
        if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
            raise ValueError(f"factor={factor!r}; give a whole number of pixels, 1 or more")
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        """
        The means of squares.

        :param Tensor x: Pictures of shape ``batch_shape + (channels, height, width)``.
        :returns: Of shape ``batch_shape + (channels, height / factor, width / factor)``.
        :rtype: Tensor
        """
        if x.dim() < 3:
            raise ValueError(_NO_PICTURES.format(tuple(x.shape)))
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(
                f"factor={self.factor} does not divide pictures of {x.shape[-2]} x {x.shape[-1]} "
                "pixels; try factor=2"
            )
        pooled = functional.avg_pool2d(x.reshape((-1, 1) + x.shape[-2:]), self.factor)
        return pooled.reshape(x.shape[:-2] + pooled.shape[-2:])


class GaussianBlur:
    """
    Deblurring: every pixel seen is a mean of those around, with Gaussian weights.

    Rows and columns are blurred one after the other. Beyond the border a picture goes on as it is
    there, so that one of a single value stays as it is.

    :param float width: The standard deviation of the weights, in pixels.
    :param int radius: How far the weights reach; by default three standard deviations.
    :raises ValueError: If one of them is not positive.
    """

    def __init__(self, width: float, radius: int | None = None) -> None:
        if not isinstance(width, (int, float)) or not 0 < width < math.inf:
            raise ValueError(f"width={width!r}; give a positive number of pixels, such as 1.0")
        radius = math.ceil(3 * width) if radius is None else radius
        if not isinstance(radius, int) or radius < 1:
            raise ValueError(f"radius={radius!r}; give a whole number of pixels, 1 or more")
        self.width, self.radius = width, radius
        place = torch.arange(-radius, radius + 1, dtype=torch.float64)
        self.weights = (-0.5 * (place / width).square()).softmax(0)

    def __call__(self, x: Tensor) -> Tensor:
        """
        The blurred pictures.

        :param Tensor x: Pictures of shape ``batch_shape + (channels, height, width)``.
        :returns: Of the same shape.
        :rtype: Tensor
        """
        if x.dim() < 3:
            raise ValueError(_NO_PICTURES.format(tuple(x.shape)))
        return self._matrix(x.shape[-2]).to(x) @ x @ self._matrix(x.shape[-1]).to(x).mT

    def _matrix(self, size: int) -> Tensor:
        """What a line of pixels is multiplied with; quicker than a convolution, also backwards."""
        place = torch.arange(size)[:, None] + torch.arange(-self.radius, self.radius + 1)
        weights = self.weights.expand(size, -1)
        return weights.new_zeros(size, size).scatter_add(1, place.clamp(0, size - 1), weights)


def observed(
    model: Any,
    operator: Callable[[Tensor], Tensor],
    y: Tensor,
    noise: float | Tensor,
    *,
    name: str = "y",
) -> Tilted:
    """
    A model whose end state was seen through an operator, with independent Gaussian noise.

    It is short for::

        def likelihood(state, x0):
            pyro.sample("y", dist.Normal(operator(x0), noise).to_event(event_dim), obs=y)

        model = Tilted(model, likelihood)

    The normaliser of the result is the evidence: the density of ``y`` under the model.

    :param model: A model with ``event_shape``, such as
        :class:`~pyro_twist.diffusion.GaussianDiffusion`.
    :param callable operator: Maps samples of shape ``batch_shape + event_shape``, on the model's
        own scale (images in [-1, 1]), to ``batch_shape`` and the shape of an observation.
    :param Tensor y: The observation, on the same scale. A model with a ``plate`` may have one for
        each entry, along the first dim.
    :param noise: The standard deviation of the noise, a positive number or a tensor that broadcasts
        to the shape of an observation.
    :param str name: The name of the site.
    :returns: The model times the likelihood.
    :rtype: Tilted
    :raises ValueError: If shapes do not fit, ``y`` is not finite, or the noise not positive.

    Example::

        blur = GaussianBlur(1.0)
        model = observed(diffusion, blur, y, noise=0.2)
    """
    shape = _observation_shape(model, operator)
    _check_observation(model, y, shape)
    _check_noise(noise, shape)

    def likelihood(state: Any, x0: Tensor) -> None:
        seen = operator(x0)
        sd = torch.as_tensor(noise).to(seen)
        pyro.sample(name, dist.Normal(seen, sd).to_event(len(shape)), obs=y.to(seen))

    return Tilted(model, likelihood)


def psnr(pictures: Tensor, truth: Tensor, *, peak: float = 1.0) -> Tensor:
    """
    The peak signal-to-noise ratio, in decibels.

    :param Tensor pictures: Of shape ``batch_shape + truth.shape``.
    :param Tensor truth: One picture.
    :param float peak: The range of pixels: 1 for images in [0, 1], 2 for [-1, 1].
    :returns: Of shape ``batch_shape``; infinite where a picture is the truth.
    :rtype: Tensor
    :raises ValueError: If shapes do not fit.

    Example::

        >>> import torch
        >>> psnr(torch.full((2, 1, 4, 4), 0.5), torch.zeros(1, 4, 4)).round(decimals=2).tolist()
        [6.02, 6.02]
    """
    if truth.dim() == 0 or pictures.shape[pictures.dim() - truth.dim() :] != truth.shape:
        raise ValueError(
            f"pictures have shape {tuple(pictures.shape)}, which does not end in that of the "
            f"truth, {tuple(truth.shape)}"
        )
    error = (pictures.double() - truth.double()).square().flatten(-truth.dim()).mean(-1)
    return 20 * math.log10(peak) - 10 * error.log10()


def _observation_shape(model: Any, operator: Callable[[Tensor], Tensor]) -> torch.Size:
    """The shape of what the operator makes of one sample."""
    if not hasattr(model, "event_shape"):
        raise ValueError(
            f"{type(model).__name__} has no `event_shape`; give it the shape of one sample, for "
            "example event_shape = (3, 32, 32)"
        )
    seen = operator(torch.zeros((2,) + tuple(model.event_shape)))
    if not isinstance(seen, Tensor) or seen.shape[:1] != (2,) or seen.dim() < 2:
        raise ValueError(
            f"operator made {_told(seen)} of 2 samples of shape {tuple(model.event_shape)}; it "
            "must return a tensor with the same batch dims, here (2,), and at least one dim more"
        )
    return seen.shape[1:]


def _check_observation(model: Any, y: Any, shape: torch.Size) -> None:
    plate = getattr(model, "plate", None)
    size = plate[1] if isinstance(plate, tuple) else getattr(plate, "size", None)
    fitting = [shape] if size is None else [shape, torch.Size((size,)) + shape]
    if not isinstance(y, Tensor) or y.shape not in fitting:
        wanted = " or ".join(str(tuple(one)) for one in fitting)
        raise ValueError(
            f"y is {_told(y)}, but the operator makes observations of shape {wanted}; an "
            "observation is operator(picture) with noise"
        )
    if not torch.isfinite(y).all():
        raise ValueError("y is not finite; leave out what was not seen, with a Mask")


def _check_noise(noise: Any, shape: torch.Size) -> None:
    number = isinstance(noise, (int, float, Tensor))
    sd = torch.as_tensor(noise) if number else torch.zeros(())
    if not bool(((sd > 0) & torch.isfinite(sd)).all()):
        raise ValueError(f"noise={noise}; give the standard deviation of the noise, above 0")
    try:
        sd.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"noise has shape {tuple(sd.shape)}, which does not broadcast to that of an "
            f"observation, {tuple(shape)}"
        ) from None


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return type(value).__name__
