# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Learned twists with parameters of their own at every step."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch

from pyro_twist.twists.learned import LearnedTwist, LinearTwist, is_normal, loc_scale

__all__ = ["NeuralTwist", "QuadraticTwist", "ShiftTwist", "low_frequencies"]


def low_frequencies(event_shape: tuple[int, ...], count: int) -> torch.Tensor:
    """
    Smooth images: the lowest ``count`` by ``count`` cosine waves in each channel.

    :param tuple event_shape: ``(channels, height, width)``.
    :param int count: Frequencies along each side.
    :returns: An orthonormal basis, of shape ``(channels * count ** 2,) + event_shape``.
    :rtype: torch.Tensor
    """
    channels, height, width = event_shape
    waves = torch.einsum("ih,jw->ijhw", _cosines(count, height), _cosines(count, width))
    eye = torch.eye(channels)
    basis = torch.einsum("cd,ijhw->cijdhw", eye, waves)
    return basis.reshape(-1, channels, height, width)


def _cosines(count: int, size: int) -> torch.Tensor:
    grid = (torch.arange(size) + 0.5) * torch.pi / size
    waves = torch.cos(torch.arange(count)[:, None] * grid)
    return waves / waves.norm(dim=1, keepdim=True)


class ShiftTwist(LinearTwist):
    """
    A linear twist :math:`\\log \\psi_t(x) = \\theta_t \\cdot B x` with parameters for every step.

    The proposal is the exactly tilted kernel. This is the optimal family for linear-Gaussian chains
    with a linear reward.

    :param model: A model with ``timesteps``.
    :param tuple event_shape: The shape of a value; by default the model's ``event_shape``.
    :param torch.Tensor basis: Directions, of shape ``(num_directions,) + event_shape``, for images
        for example :func:`low_frequencies`; by default all coordinates.
    :param bool value: Whether the twist also enters the weights. Without, it is a proposal only,
        for use beside a look-ahead.
    :param str key: The entry of the state that holds the value.
    :param float ridge: See :class:`~pyro_twist.twists.LinearTwist`.
    """

    reads = ()
    basis: torch.Tensor

    def __init__(
        self,
        model: Any,
        *,
        event_shape: tuple[int, ...] | None = None,
        basis: torch.Tensor | None = None,
        value: bool = True,
        key: str = "x",
        ridge: float = 1e-3,
    ) -> None:
        shape = tuple(model.event_shape if event_shape is None else event_shape)
        if basis is None:
            size = torch.Size(shape).numel()
            basis = torch.eye(size).reshape((size, *shape))
        super().__init__(model, len(basis), len(model.timesteps) + 1, ridge=ridge)
        self.register_buffer("basis", basis)
        self.value, self.key = value, key

    def block(self) -> int:
        """One block for every time index."""
        return self.time_after(*self.args_kwargs[0][1:])

    def features(self, name: str, prior: Any) -> torch.Tensor | None:
        """The basis, the same for all particles."""
        if not is_normal(prior):
            return None
        batch = (1,) * len(prior.batch_shape)
        return self.basis.reshape(self.basis.shape[:1] + batch + self.basis.shape[1:])

    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`~pyro_twist.twists.Twist.log_twist`."""
        if not self.value:
            return 0.0
        now = self.time_after(t)
        direction = torch.tensordot(self.theta[now], self.basis, dims=1).double()
        return _contract(direction * state[self.key].double(), direction.dim())


def _contract(value: torch.Tensor, event_dim: int) -> torch.Tensor:
    return value.sum(tuple(range(-event_dim, 0))) if event_dim else value


class QuadraticTwist(LearnedTwist):
    """
    A diagonal quadratic twist :math:`\\log \\psi_t(x) = b_t \\cdot x - x \\cdot A_t x / 2`.

    The tilted normal kernel is exact, so that for linear-Gaussian models with Gaussian
    observations (of diagonal structure) the family contains the optimal twist.

    :param model: A model with ``timesteps`` whose sites are normally distributed.
    :param tuple event_shape: The shape of a value; by default the model's ``event_shape``.
    :param str key: The entry of the state that holds the value.
    :param float ridge: Penalty on ``b`` and ``A``, in units of the kernel's precision.
    """

    reads = ()

    def __init__(
        self,
        model: Any,
        *,
        event_shape: tuple[int, ...] | None = None,
        key: str = "x",
        ridge: float = 1e-2,
    ) -> None:
        super().__init__(model)
        shape = tuple(model.event_shape if event_shape is None else event_shape)
        blocks = len(model.timesteps) + 1
        self.slope = torch.nn.Parameter(torch.zeros((blocks, *shape), dtype=torch.float64))
        self.precision = torch.nn.Parameter(torch.zeros((blocks, *shape), dtype=torch.float64))
        self.key, self.ridge = key, ridge

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The exactly tilted kernel."""
        now = self.time_after(*self.args_kwargs[0][1:])
        slope, precision = self.slope[now], self.precision[now]
        unused = not torch.is_grad_enabled() and not (slope.any() or precision.any())
        if unused or not is_normal(prior):
            return prior
        loc, scale = loc_scale(prior)
        base = scale.double().square().reciprocal()
        # the tilted precision stays above a tenth of the kernel's
        tilted = base + torch.maximum(precision, -0.9 * base)
        mean = (base * loc.double() + slope) / tilted
        tilted_prior = dist.Normal(mean.to(loc.dtype), tilted.rsqrt().to(loc.dtype))
        return tilted_prior.to_event(prior.event_dim)

    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`~pyro_twist.twists.Twist.log_twist`."""
        now = self.time_after(t)
        x = state[self.key].double()
        value = self.slope[now] * x - 0.5 * self.precision[now] * x.square()
        return _contract(value, self.slope.dim() - 1)

    def penalty(self) -> torch.Tensor:
        """A ridge on both parameters."""
        return 0.5 * self.ridge * (self.slope.square().sum() + self.precision.square().sum())


class NeuralTwist(LearnedTwist):
    """
    A small network :math:`\\log \\psi(x, t)`; kernels are tilted by its gradient at their mean.

    Value and proposal are one function, so that fitting the proposal by likelihood also gives the
    look-ahead. With few paths a network overfits them; prefer families with few parameters unless
    a pass has hundreds.

    :param model: A model with ``timesteps`` and ``event_shape``.
    :param int hidden: The width of the two hidden layers.
    :param float weight_decay: The penalty on the weights.
    :param str key: The entry of the state that holds the value.
    """

    reads = ()

    def __init__(
        self, model: Any, *, hidden: int = 32, weight_decay: float = 1e-2, key: str = "x"
    ) -> None:
        super().__init__(model)
        size = torch.Size(model.event_shape).numel()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(size + 2, hidden),
            torch.nn.SiLU(),
            torch.nn.Linear(hidden, hidden),
            torch.nn.SiLU(),
        )
        self.head = torch.nn.Linear(hidden, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.weight_decay, self.key = weight_decay, key

    def _value(self, x: torch.Tensor, now: int) -> torch.Tensor:
        """The log-twist at time ``now``, of the batch shape of ``x``."""
        event_dim = len(self.model.event_shape)
        flat = x.reshape(x.shape[: x.dim() - event_dim] + (-1,))
        share = now / self.model.timesteps[0]
        time = flat.new_tensor([share, share**2]).expand(flat.shape[:-1] + (2,))
        value: torch.Tensor = self.head(self.body(torch.cat([flat, time], -1)))
        return value[..., 0]

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The kernel, tilted by the gradient of the network at its mean."""
        from pyro_twist.twists.tilting import tilt

        fitting = torch.is_grad_enabled()
        if not is_normal(prior) or (not fitting and not self.head.weight.any()):
            return prior
        with torch.enable_grad():
            mean = loc_scale(prior)[0].detach().clone().requires_grad_()
            total = self._value(mean, self.time_after(*self.args_kwargs[0][1:])).sum()
            (gradient,) = torch.autograd.grad(total, mean, create_graph=fitting)
        return tilt(prior, gradient)

    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`~pyro_twist.twists.Twist.log_twist`."""
        now = self.time_after(t)
        return self._value(state[self.key], now).double()

    def penalty(self) -> torch.Tensor:
        """Weight decay, except for biases."""
        weights = [p.square().sum() for p in self.parameters() if p.dim() > 1]
        return self.weight_decay * torch.stack(weights).sum().double()
