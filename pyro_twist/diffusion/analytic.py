# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

r"""
Denoisers known in closed form: the exact :math:`E[x_0 | x_t]` of Gaussian and Gaussian-mixture
data, in the scheduler's prediction type.

With :math:`x_t = \alpha x_0 + \sigma \epsilon` and one component :math:`N(m, S)`,

.. math::

    E[x_0 | x_t] = m + \alpha S (\alpha^2 S + \sigma^2 I)^{-1} (x_t - \alpha m)

and a mixture weighs its components' means by their posterior probabilities given :math:`x_t`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_twist.diffusion.forward import noise_level, prediction_type

__all__ = ["GaussianDenoiser", "GaussianMixtureDenoiser"]


class GaussianMixtureDenoiser:
    """
    The exact denoiser of Gaussian-mixture data.

    :param Tensor weights: Mixture weights of shape ``(components,)``; normalised here.
    :param Tensor means: Means of shape ``(components,) + event_shape``.
    :param variances: A number, or a tensor of shape ``(components,)``, ``(components,) +
        event_shape`` (diagonal) or ``(components, dim, dim)`` (full covariance of the flattened
        event, ``dim`` elements).
    :param scheduler: The diffusers scheduler whose timesteps and prediction type are used.
    :raises ValueError: If a shape does not fit, or a variance is negative.
    """

    def __init__(
        self, weights: Tensor, means: Tensor, variances: float | Tensor, scheduler: Any
    ) -> None:
        means, weights = torch.as_tensor(means), torch.as_tensor(weights)
        if means.dim() < 1 or weights.shape != means.shape[:1]:
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} do not fit means of shape "
                f"{tuple(means.shape)}; expected (components,) and (components,) + event_shape"
            )
        if not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
            raise ValueError("weights must be non-negative and not all zero")
        self.event_shape = means.shape[1:]
        self.means = means.reshape(len(means), -1)
        self.log_weights = (weights / weights.sum()).log()
        self.eigenvalues, self.basis = self._diagonalise(torch.as_tensor(variances))
        self.prediction_type = prediction_type(scheduler)
        self.noise_level = noise_level(scheduler)

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        """
        What a perfectly trained network would output.

        :param Tensor x: Network inputs of shape ``(rows,) + event_shape``.
        :param Tensor timestep: The scheduler's timesteps, of shape ``(rows,)`` or a single one.
        :returns: The prediction in the scheduler's prediction type, of the shape of ``x``.
        :rtype: Tensor
        """
        x0_hat = self.x0_hat(x, timestep)
        alpha, sigma = (a.reshape((-1,) + (1,) * (x.dim() - 1)) for a in self._level(x, timestep))
        if self.prediction_type == "sample":
            return x0_hat
        epsilon = (x - alpha * x0_hat) / sigma
        if self.prediction_type == "epsilon":
            return epsilon
        if self.prediction_type == "velocity":
            return epsilon - x0_hat
        return alpha * epsilon - sigma * x0_hat

    def x0_hat(self, x: Tensor, timestep: Tensor) -> Tensor:
        """
        The posterior mean of :math:`x_0`.

        :param Tensor x: Network inputs of shape ``(rows,) + event_shape``.
        :param Tensor timestep: The scheduler's timesteps, of shape ``(rows,)`` or a single one.
        :returns: A tensor of the shape of ``x``.
        :rtype: Tensor
        """
        alpha, variance, residual = self._residual(x, timestep)
        shift = alpha * self.eigenvalues.to(x) / variance * residual
        if self.basis is not None:
            shift = torch.einsum("bkd,ked->bke", shift, self.basis.to(x))
        posterior = self._log_joint(variance, residual).softmax(-1)
        means = self.means.to(x) + shift
        return (posterior.unsqueeze(-1) * means).sum(1).reshape(x.shape)

    def log_prob(self, x: Tensor, timestep: Tensor | None) -> Tensor:
        """
        The log-density of the noised data, or of the data.

        :param Tensor x: Network inputs of shape ``(rows,) + event_shape``.
        :param Tensor timestep: The scheduler's timesteps, of shape ``(rows,)`` or a single one;
            ``None`` for data without noise, which has a density if no variance is zero.
        :returns: A tensor of shape ``(rows,)``.
        :rtype: Tensor
        """
        _, variance, residual = self._residual(x, timestep)
        return self._log_joint(variance, residual).logsumexp(-1)

    def _level(self, x: Tensor, timestep: Tensor | None) -> tuple[Tensor, Tensor]:
        if timestep is None:
            return x.new_ones(len(x)), x.new_zeros(len(x))
        timestep = torch.as_tensor(timestep, device=x.device).expand(len(x))
        alpha, sigma = self.noise_level(timestep)
        return alpha.to(x), sigma.to(x)

    def _residual(self, x: Tensor, timestep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Per row and component: alpha, marginal variances and residuals in the eigenbasis."""
        alpha, sigma = (a.reshape(-1, 1, 1) for a in self._level(x, timestep))
        residual = x.flatten(1).unsqueeze(1) if x.dim() > 1 else x.reshape(-1, 1, 1)
        residual = residual - alpha * self.means.to(x)
        if self.basis is not None:
            residual = torch.einsum("bkd,kde->bke", residual, self.basis.to(x))
        return alpha, alpha**2 * self.eigenvalues.to(x) + sigma**2, residual

    def _log_joint(self, variance: Tensor, residual: Tensor) -> Tensor:
        """Log-density of each row and component, of shape ``(rows, components)``."""
        log_density = torch.distributions.Normal(
            torch.zeros_like(residual), variance.sqrt().expand_as(residual), validate_args=False
        ).log_prob(residual)
        return self.log_weights.to(residual) + log_density.sum(-1)

    def _diagonalise(self, variances: Tensor) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues of shape ``(components, dim)`` and, for full covariances, eigenvectors."""
        number, dim = self.means.shape
        basis = None
        if variances.shape == (number, dim, dim) and variances.dim() == 3 and dim > 1:
            eigenvalues, basis = torch.linalg.eigh(variances.double())
        elif variances.shape in ((), (number,)):
            eigenvalues = variances.reshape(-1, 1).expand(number, dim)
        elif variances.shape == (number,) + self.event_shape:
            eigenvalues = variances.reshape(number, dim)
        else:
            raise ValueError(
                f"variances have shape {tuple(variances.shape)}; expected (), ({number},), "
                f"{(number,) + tuple(self.event_shape)} or {(number, dim, dim)}"
            )
        if not bool((eigenvalues >= -1e-9).all()):
            raise ValueError("variances must be non-negative (positive semi-definite)")
        return eigenvalues.clamp(min=0), basis


class GaussianDenoiser(GaussianMixtureDenoiser):
    """
    The exact denoiser of Gaussian data.

    :param Tensor mean: Mean of shape ``event_shape``.
    :param variance: A number, or a tensor of shape ``event_shape`` (diagonal) or ``(dim, dim)``
        (full covariance of the flattened event, ``dim`` elements).
    :param scheduler: The diffusers scheduler whose timesteps and prediction type are used.
    """

    def __init__(self, mean: Tensor, variance: float | Tensor, scheduler: Any) -> None:
        mean, variance = torch.as_tensor(mean), torch.as_tensor(variance)
        variance = variance.unsqueeze(0) if variance.dim() else variance
        super().__init__(torch.ones(1), mean.unsqueeze(0), variance, scheduler)
