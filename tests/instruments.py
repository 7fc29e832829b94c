# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
An inverse problem with an unknown instrument: blurred and noisy, by unknown amounts.

Shared by the test against the exact posterior and by ``tests.perf.calibration``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_twist import Tilted, Twist, WithLatents
from pyro_twist.twists import tilt

__all__ = ["Instrument", "SpreadTwist", "blur_matrix", "chain_moments", "posterior_ranks"]


def blur_matrix(width: Tensor, size: int) -> Tensor:
    """
    A Gaussian blur of lines of ``size`` pixels, of shape ``width.shape + (size, size)``.

    The rows sum to one, so that a line of one value stays.
    """
    place = torch.arange(size, dtype=width.dtype)
    distance = (place[:, None] - place) / width[..., None, None]
    return (-0.5 * distance.square()).softmax(-1)


@dataclass(frozen=True)
class Instrument:
    """
    Priors of an instrument, and what it does to a line of pixels or to a picture.

    :param tuple width: Median and log-sd of the blur's width in pixels.
    :param tuple noise: Median and log-sd of the standard deviation of the noise.
    :param bool picture: Whether samples are pictures, of shape ``(1, size, size)``, or lines.
    """

    width: tuple[float, float] = (1.0, 0.5)
    noise: tuple[float, float] = (0.3, 0.5)
    picture: bool = False

    def prior(self) -> dict[str, Tensor]:
        """The instrument, before the image."""
        width = pyro.sample("width", dist.LogNormal(math.log(self.width[0]), self.width[1]))
        noise = pyro.sample("noise", dist.LogNormal(math.log(self.noise[0]), self.noise[1]))
        return {"width": width, "noise": noise}

    def blurred(self, x: Tensor, width: Tensor) -> Tensor:
        """What reaches the detector."""
        matrix = blur_matrix(width, x.shape[-1])
        if not self.picture:
            return (matrix @ x[..., None])[..., 0]
        matrix = matrix[..., None, :, :]
        return matrix @ x @ matrix.mT

    def law(self, state: Mapping[str, Tensor], x: Tensor) -> Any:
        """The law of an observation."""
        dims = 3 if self.picture else 1
        noise = state["noise"].reshape(state["noise"].shape + (1,) * dims)
        return dist.Normal(self.blurred(x, state["width"]), noise).to_event(dims)

    def observing(self, diffusion: Any, y: Tensor, *, wrong: float = 1.0) -> Any:
        """
        The joint model of instrument and image, given an observation.

        :param float wrong: A factor on the noise that the likelihood believes in, to be 1.
        """

        def likelihood(state: Any, x0: Tensor) -> None:
            believed = {"width": state["width"], "noise": wrong * state["noise"]}
            pyro.sample("y", self.law(believed, x0), obs=y)

        return Tilted(WithLatents(diffusion, self.prior), likelihood)

    def log_evidence(self, mean: Tensor, cov: Tensor, y: Tensor, points: int = 81) -> Any:
        """
        Log evidence and posterior means of log-width and log-noise for Gaussian lines, on a grid.

        :param Tensor mean: The mean of the lines.
        :param Tensor cov: Their covariance.
        """
        z = torch.linspace(-5, 5, points, dtype=torch.float64)
        log_width = math.log(self.width[0]) + self.width[1] * z
        log_noise = math.log(self.noise[0]) + self.noise[1] * z
        blur = blur_matrix(log_width.exp(), len(mean))
        eye = torch.eye(len(mean), dtype=torch.float64)
        covs = (blur @ cov @ blur.mT)[:, None] + (2 * log_noise).exp()[:, None, None] * eye
        law = dist.MultivariateNormal((blur @ mean)[:, None].expand(-1, points, -1), covs)
        standard = dist.Normal(0.0, 1.0).log_prob(z)
        joint = (law.log_prob(y.double()) + standard[:, None] + standard).exp()
        total = joint.sum()
        means = (joint.sum(1) @ log_width / total, joint.sum(0) @ log_noise / total)
        return float((total * (z[1] - z[0]) ** 2).log()), float(means[0]), float(means[1])


class SpreadTwist(Twist):
    """
    Looks ahead to the likelihood at the prediction, whose own spread is added to the noise.

    The kernel is moved as the prediction would be if that were its error: along the gradient of the
    likelihood, times the spread.

    :param model: The joint model.
    :param Instrument instrument: What observes.
    :param Tensor y: The observation.
    :param float variance: That of an entry of the data.
    """

    def __init__(self, model: Any, instrument: Instrument, y: Tensor, variance: float) -> None:
        super().__init__(model)
        self.instrument, self.y = instrument, y
        self.spread = (variance * (1 - model.known_share(variance))).tolist()

    def _likelihood(self, state: Any, x0: Tensor, t: int) -> Tensor:
        noise = (state["noise"].square() + self.spread[t]).sqrt()
        law = self.instrument.law({"width": state["width"], "noise": noise}, x0)
        log_prob: Tensor = law.log_prob(self.y)
        return log_prob

    def get_posterior(self, name: str, prior: Any) -> Any:
        if not (self.stepping and name.startswith("x_")):
            return prior
        state, t = self.args_kwargs[0]
        with torch.enable_grad():
            x0 = state["x0_hat"].detach().requires_grad_()
            [slope] = torch.autograd.grad(self._likelihood(state, x0, t).sum(), x0)
        step = self.model.schedule[t]
        weight = step.x0_coef * self.spread[t] / step.std**2 if step.std else 0.0
        return tilt(prior, weight * slope)

    def log_twist(self, state: Any, *args: Any) -> Tensor:
        return self._likelihood(state, state["x0_hat"], self.time_after(*args))


def chain_moments(model: Any) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``x_0``, lines of pixels, from what affine kernels do to a basis."""
    size = model.event_shape[0]
    points = torch.cat([torch.zeros(1, size), torch.eye(size)])
    mean, cov = torch.zeros(size).double(), torch.eye(size).double()
    for t in model.timesteps:
        state = {"x": points}
        model._write(state, t, points)
        kernel = model.kernel(state, t)
        values = kernel.mean.double()
        matrix = (values[1:] - values[0]).T
        mean, cov = values[0] + matrix @ mean, matrix @ cov @ matrix.T
        cov = cov + kernel.variance[0].double().diag()
    return mean, cov


def posterior_ranks(values: Tensor, weights: Tensor, truth: Tensor) -> Tensor:
    """
    The share of the posterior below the truth: uniform if the posterior is right.

    :param Tensor values: Particles along dim 0, then populations.
    :param Tensor weights: Of the same shape, summing to one.
    :param Tensor truth: One for each population.
    """
    return (weights * (values.double() < truth.double())).sum(0)
