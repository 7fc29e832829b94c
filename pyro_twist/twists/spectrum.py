# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
How a predicted end moves with the noise, by spatial frequency.

A push of :math:`x_t` moves the prediction of :math:`x_0` by the Jacobian of the denoiser, which is
:math:`\\alpha_t / \\sigma_t^2` times the covariance of :math:`x_0` given :math:`x_t`. For images
that is far from a multiple of the identity: the mean colour follows a push at once, a fine texture
hardly at all before the end. Here it is diagonal in a basis of cosines and of uncorrelated
channels, with one number per band of frequencies, learnt from the noise that was drawn anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Spectrum"]

_VARIANCES = torch.logspace(-4, 2.5, 60, dtype=torch.float64)
# more channels than this are not images or latents, and are left as they are
_MAX_CHANNELS = 64


class Spectrum(torch.nn.Module):
    """
    An orthonormal basis of samples, and the variance of data along it.

    For events of two and more dimensions the basis is made of cosines over the last two, and of
    the principal axes of the channels before them. Other events are left as they are.

    :param event_shape: The shape of a sample.
    """

    mixing: Tensor
    variance: Tensor
    bands: Tensor

    def __init__(self, event_shape: Any) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)
        self._axes = [_cosines(n) for n in self.event_shape[-2:]] if self._flat_dims else []
        channels = self.event_shape[:-2].numel() if self._axes else 1
        bands = _bands(self.event_shape) if self._axes else torch.zeros(self.event_shape.numel())
        self.num_bands = int(bands.max()) + 1
        self.register_buffer("bands", bands.long().reshape(-1), persistent=False)
        self.register_buffer("mixing", torch.eye(channels, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(self.num_bands, dtype=torch.float64))

    @property
    def _flat_dims(self) -> bool:
        return len(self.event_shape) > 1

    def forward(self, x: Tensor) -> Tensor:
        """
        Coefficients of samples.

        :param Tensor x: Of shape ``(num_rows,) + event_shape``.
        :returns: Of shape ``(num_rows, dimension)``, in float64.
        """
        x = x.double()
        if not self._axes:
            return x.reshape(len(x), -1)
        high, wide = (axis.to(x.device) for axis in self._axes)
        x = x.reshape((len(x), -1) + self.event_shape[-2:])
        return (
            torch.einsum("dc,nchw->ndhw", self.mixing, x).matmul(wide.T).mT @ high.T
        ).mT.reshape(len(x), -1)

    def inverse(self, coefficients: Tensor) -> Tensor:
        """
        The samples of given coefficients.

        :param Tensor coefficients: Of shape ``(num_rows, dimension)``.
        :returns: Of shape ``(num_rows,) + event_shape``, in float64.
        """
        rows = len(coefficients)
        if not self._axes:
            return coefficients.reshape((rows,) + self.event_shape)
        high, wide = (axis.to(coefficients.device) for axis in self._axes)
        x = coefficients.reshape((rows, -1) + self.event_shape[-2:])
        x = (x.matmul(wide).mT @ high).mT
        return torch.einsum("dc,ndhw->nchw", self.mixing, x).reshape((rows,) + self.event_shape)

    def mix(self, samples: Tensor) -> None:
        """
        Turns the channels to their principal axes.

        :param Tensor samples: Of shape ``(num_rows,) + event_shape``.
        """
        channels = len(self.mixing)
        if not 1 < channels <= _MAX_CHANNELS:
            return
        x = samples.double().reshape(len(samples), channels, -1)
        x = x - x.mean(0)
        covariance = torch.einsum("ncp,ndp->cd", x, x)
        self.mixing.copy_(torch.linalg.eigh(covariance).eigenvectors.T)

    def fit(self, moves: Iterable[tuple[Tensor, Tensor, float, float]]) -> None:
        """
        Finds for each band the variance whose response fits best to what was seen.

        :param moves: For every step the displacements of :math:`x_t` by noise and push and the
            changes of the prediction that followed, both of shape ``(num_rows, dimension)`` in
            coefficients, and the signal and noise levels of :math:`x_t`.
        """
        grid = _VARIANCES.to(self.variance.device)
        error = torch.zeros(self.num_bands, len(grid), dtype=torch.float64, device=grid.device)
        for pushed, moved, alpha, sigma in moves:
            cross, square = self._sums(pushed * moved), self._sums(pushed.square())
            response = _response(grid, alpha, sigma)
            # in units of the pushes, so that no step counts by its size alone
            scale = square.sum().clamp(min=1e-300) / len(self.bands)
            error += (square[:, None] * response**2 - 2 * cross[:, None] * response) / scale
        self.variance.copy_(grid[error.argmin(1)])

    def _sums(self, values: Tensor) -> Tensor:
        total = torch.zeros(self.num_bands, dtype=torch.float64, device=values.device)
        return total.index_add(0, self.bands, values.sum(0))

    def response(self, alpha: float, sigma: float) -> Tensor:
        """
        How far the prediction moves with :math:`x_t`, for every coefficient.

        :param float alpha: Signal level of :math:`x_t`.
        :param float sigma: Noise level; 0 for the data themselves, which are their own prediction.
        :returns: Of shape ``(dimension,)``.
        """
        if sigma == 0:
            return torch.ones(len(self.bands), dtype=torch.float64, device=self.bands.device)
        return _response(self.variance, alpha, sigma)[self.bands]


def _response(variance: Tensor, alpha: float, sigma: float) -> Tensor:
    """For Gaussian data of that variance."""
    return alpha * variance / (alpha**2 * variance + sigma**2)


def _cosines(size: int) -> Tensor:
    """The orthonormal cosines on a grid, one per row, lowest first (DCT-II)."""
    k, i = torch.arange(size).double()[:, None], torch.arange(size).double()
    rows = torch.cos(math.pi * (i + 0.5) * k / size) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def _bands(event_shape: torch.Size) -> Tensor:
    """The band of every coefficient: one per channel and rounded radial frequency."""
    high, wide = (torch.arange(n).double() for n in event_shape[-2:])
    radius = (high[:, None].square() + wide.square()).sqrt().round()
    channels = event_shape[:-2].numel()
    offsets = torch.arange(channels) if channels <= _MAX_CHANNELS else torch.zeros(channels)
    return offsets.double()[:, None, None] * (radius.max() + 1) + radius
