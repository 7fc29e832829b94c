# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""A reverse process with Gaussian kernels, written down as plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["GaussianSchedule", "GaussianStep"]


@dataclass(frozen=True, kw_only=True)
class GaussianStep:
    """
    The kernel from :math:`x_t` to :math:`x_{t-1}` as plain numbers.

    :param float timestep: What the network is told; an int where the scheduler's timesteps are.
    :param float alpha: Coefficient of :math:`x_0` in :math:`x_t`.
    :param float sigma: Coefficient of the noise in :math:`x_t`.
    :param tuple x0_from: Coefficients of :math:`x_t` and of the network's output in the unclipped
        prediction of :math:`x_0`.
    :param tuple eps_from: The same for the predicted noise.
    :param float x0_coef: Coefficient of the prediction in the kernel's mean.
    :param float x_coef: Coefficient of :math:`x_t` in the kernel's mean.
    :param float eps_coef: Coefficient of the predicted noise in the kernel's mean.
    :param float std: The kernel's standard deviation; 0 means that the step is deterministic, and
        any other number nothing if the variance is learned.
    :param float input_scale: The network sees ``input_scale`` times :math:`x_t`.
    :param tuple boundary: Coefficients of the clipped prediction and of :math:`x_t` in the
        prediction that the kernel uses (consistency models).
    :param tuple log_variance_range: Bounds of a learned log-variance.
    """

    timestep: float
    alpha: float
    sigma: float
    x0_from: tuple[float, float]
    eps_from: tuple[float, float]
    x0_coef: float
    x_coef: float = 0.0
    eps_coef: float = 0.0
    std: float = 0.0
    input_scale: float = 1.0
    boundary: tuple[float, float] = (1.0, 0.0)
    log_variance_range: tuple[float, float] = (0.0, 0.0)

    def without_eps(self) -> GaussianStep:
        """The same kernel in terms of :math:`x_0` and :math:`x_t` only; wrong if anything clips."""
        if self.eps_coef == 0:
            return self
        weight = self.eps_coef / self.sigma
        return replace(
            self,
            x0_coef=self.x0_coef - weight * self.alpha,
            x_coef=self.x_coef + weight,
            eps_coef=0.0,
        )


@dataclass(frozen=True, kw_only=True)
class GaussianSchedule:
    """
    A reverse process with Gaussian kernels, indexed by time: ``schedule[t]`` leads to
    :math:`x_{t-1}`.

    :param tuple steps: One :class:`GaussianStep` per time index, from T down to 1.
    :param float init_std: Standard deviation of :math:`x_T`.
    :param clip: Bounds a batch of predictions of shape ``(rows,) + event_shape``; None if nothing
        is clipped.
    :param str learned_variance: None, or how the second half of the network's output channels sets
        the variance: ``"learned"`` (it is the variance) or ``"learned_range"`` (it interpolates
        between the bounds of the log-variance).
    """

    steps: tuple[GaussianStep, ...]
    init_std: float = 1.0
    clip: Callable[[Tensor], Tensor] | None = None
    learned_variance: Literal["learned", "learned_range"] | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, t: int) -> GaussianStep:
        if not 1 <= t <= len(self.steps):
            raise ValueError(f"time index {t} is outside {len(self.steps)}..1")
        return self.steps[len(self.steps) - t]

    def starting_at(self, t: int) -> GaussianSchedule:
        """
        The rest of the process, from :math:`x_t` on.

        :param int t: A time index, at most the number of steps.
        :returns: A process of ``t`` steps whose ``init_std`` is the noise level of :math:`x_t`.
        :rtype: GaussianSchedule
        """
        return replace(self, steps=self.steps[len(self) - t :], init_std=self[t].sigma)

    def read(self, t: int, x: Tensor, output: Tensor) -> dict[str, Tensor]:
        """
        What the kernel needs besides ``x``, from the network's output.

        :param int t: The time index of ``x``.
        :param Tensor x: States of shape ``(rows,) + event_shape``.
        :param Tensor output: The network's output at ``x``, of the same shape, or with twice the
            channels if the variance is learned.
        :returns: ``x0_hat``, and where the kernel uses them ``eps_hat`` and ``std_hat``, each of
            the shape of ``x``.
        :rtype: dict
        """
        step, found = self[t], {}
        if self.learned_variance is not None:
            output, variance = output.chunk(2, dim=1)
            found["std_hat"] = self._learned_std(step, variance)
        x0_hat = _read_out(step.x0_from, x, output)
        if self.clip is not None:
            x0_hat = self.clip(x0_hat)
        found["x0_hat"] = _combine((step.boundary[0], x0_hat), (step.boundary[1], x))
        if step.eps_coef:
            found["eps_hat"] = _read_out(step.eps_from, x, output)
        return found

    def kernel(self, t: int, state: Mapping[Any, Tensor]) -> tuple[Tensor, float | Tensor]:
        """
        Mean and standard deviation of :math:`x_{t-1}`.

        :param int t: The time index of the state.
        :param state: Holds ``x`` and what :meth:`read` found, in any one batch shape.
        :returns: The mean, of the shape of ``x``, and the standard deviation: a number, or a tensor
            of the shape of ``x`` if it is learned; 0 for a deterministic step.
        :rtype: tuple
        """
        step = self[t]
        terms = [(step.x0_coef, state["x0_hat"]), (step.x_coef, state["x"])]
        if step.eps_coef:
            terms.append((step.eps_coef, state["eps_hat"]))
        std = state["std_hat"] if self.learned_variance is not None and step.std else step.std
        return _combine(*terms), std

    def _learned_std(self, step: GaussianStep, variance: Tensor) -> Tensor:
        if step.std == 0:
            return torch.zeros_like(variance)
        if self.learned_variance == "learned":
            if not bool((variance > 0).all()):
                raise ValueError(
                    f"the variance learned for timestep {step.timestep} is not positive everywhere "
                    "(variance_type 'learned' takes the network's output as the variance); "
                    "is variance_type 'learned_range' meant?"
                )
            return variance.sqrt()
        low, high = step.log_variance_range
        fraction = (variance + 1) / 2
        return torch.exp(0.5 * (fraction * high + (1 - fraction) * low))


def _read_out(coefficients: tuple[float, float], x: Tensor, output: Tensor) -> Tensor:
    of_x, of_output = coefficients
    if of_x <= 1:
        return _combine((of_x, x), (of_output, output))
    # Both terms are large here: subtract first, so that only the difference is magnified.
    return torch.add(x, output, alpha=of_output / of_x) * of_x


def _combine(*terms: tuple[float, Tensor]) -> Tensor:
    """The linear combination of tensors, skipping those with coefficient zero."""
    total: Tensor | None = None
    for coefficient, value in terms:
        if coefficient == 0:
            continue
        if total is None:
            total = value if coefficient == 1 else coefficient * value
        else:
            total = torch.add(total, value, alpha=coefficient)
    return torch.zeros_like(terms[0][1]) if total is None else total
