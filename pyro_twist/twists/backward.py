# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
A twist for state-space models, learnt backwards in time.

Weighted maximum likelihood needs weights of whole paths, which degenerate within a few dozen
observations. Where kernels are normal and the log-twist is quadratic, the backward recursion of
the optimal twist is known in closed form at every particle, and is fitted step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pyro.distributions as dist
import torch

from pyro_twist.twists.learned import LearnedTwist, is_normal, loc_scale
from pyro_twist.twists.paths import Pass, PathStep

__all__ = ["BackwardTwist"]

_RIDGES = (1e-6, 1e-2)


class BackwardTwist(LearnedTwist):
    """
    A quadratic twist fitted by regression, from the last step to the first [1, 2].

    With :math:`g_t` the factors and observations emitted at :math:`x_t`, the two functions

    .. math::

        \\psi_t(x_t) = \\mathbb{E}[\\phi_{t-1}(x_{t-1}) \\mid x_t], \\qquad
        \\phi_t(x_t) = g_t(x_t) \\, \\psi_t(x_t)

    are approximated by exponentials of quadratic ones. The kernel that draws :math:`x_t` is tilted
    by :math:`\\phi_t`, exactly, since it should be drawn to the observation at :math:`x_t`;
    :math:`\\psi_t` enters the weights, which have that observation already. The expectation is
    known in closed form at every particle of a pass, so that the fit has noise only where the
    quadratic does not fit. For linear-Gaussian models it is exact after a pass or two.

    Fitting happens in :meth:`observe`, evaluates nothing, and has no use for weights of whole
    paths, hence none for the trust region. Every regression is the best of several (with and
    without cross terms, more or less ridge, on one pass or all), chosen and shrunk by its
    leave-one-out errors. A twist whose pass went worse than an earlier one is taken back, and
    half a step is tried instead.

    :param model: A model with ``timesteps``, one latent site in each step, and few dimensions.
        Sites that are neither normal nor multivariate normal are left alone.
    :param tuple event_shape: ``()`` or ``(dim,)``; by default the model's ``event_shape``.
    :param str key: The entry of the state that holds the value.
    :raises ValueError: If the event shape has more than one dim.

    **References**

    [1] `The iterated auxiliary particle filter`
        Pieralberto Guarniero, Adam M. Johansen, Anthony Lee (2017),
        https://arxiv.org/abs/1511.06286

    [2] `Controlled sequential Monte Carlo`
        Jeremy Heng, Adrian N. Bishop, George Deligiannidis, Arnaud Doucet (2020),
        https://arxiv.org/abs/1708.08396
    """

    slope: torch.Tensor
    precision: torch.Tensor

    #: No entry of the recorded states.
    reads = ()

    def __init__(
        self, model: Any, *, event_shape: tuple[int, ...] | None = None, key: str = "x"
    ) -> None:
        super().__init__(model)
        self.event_shape = tuple(model.event_shape if event_shape is None else event_shape)
        if len(self.event_shape) > 1:
            raise ValueError(
                f"event_shape={self.event_shape}; BackwardTwist takes () or (dim,). Try "
                "QuadraticTwist, or flatten the state."
            )
        self.key = key
        self._tried: list[tuple[torch.Tensor, torch.Tensor]] = []
        size, blocks = torch.Size(self.event_shape).numel(), len(model.timesteps) + 1
        # entry 0 is phi, which tilts kernels, entry 1 is psi, which enters the weights
        slope = torch.zeros(2, blocks, size, dtype=torch.float64)
        self.register_buffer("slope", slope)
        self.register_buffer("precision", slope.new_zeros(2, blocks, size, size))

    # use

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The exactly tilted kernel."""
        now = self.time_after(*self.args_kwargs[0][1:])
        if not _is_gaussian(prior) or self._is_one(now):
            return prior
        loc, precision = self._kernel(prior)
        slope, curve = self._coefficients(0, now, loc)
        tilted = precision + curve
        mean = _solve(tilted, _times(precision, loc) + slope)
        return self._normal(mean, tilted, prior.mean.dtype)

    def _normal(self, mean: torch.Tensor, precision: torch.Tensor, dtype: torch.dtype) -> Any:
        if self.slope.shape[-1] > 1:
            return dist.MultivariateNormal(mean.to(dtype), precision_matrix=precision.to(dtype))
        scale = precision[..., 0].rsqrt().expand(mean.shape).to(dtype)
        if self.event_shape:
            return dist.Normal(mean.to(dtype), scale).to_event(1)
        return dist.Normal(mean[..., 0].to(dtype), scale[..., 0])

    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`~pyro_twist.twists.Twist.log_twist`."""
        now = self.time_after(t)
        if self._is_one(now):
            return 0.0
        x = self._vector(state[self.key])
        slope, curve = self._coefficients(1, now, x)
        return x @ slope - 0.5 * (x * _times(curve, x)).sum(-1)

    def _is_one(self, now: int) -> bool:
        return not (self.slope[:, now].any() or self.precision[:, now].any())

    def _coefficients(
        self, which: int, now: int, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slope, curve = self.slope[which, now], self.precision[which, now]
        return slope.to(like.device), curve.to(like.device)

    def _vector(self, x: torch.Tensor) -> torch.Tensor:
        return x.double() if self.event_shape else x.double()[..., None]

    def _kernel(self, prior: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and precision matrix of a kernel, the matrix not repeated over particles."""
        if isinstance(prior, torch.distributions.MultivariateNormal):
            return prior.loc.double(), _once(prior.precision_matrix, 2).double()
        loc, scale = (self._vector(value) for value in loc_scale(prior))
        return loc, _once(scale, 1).square().reciprocal().diag_embed()

    # learning

    def observe(self, passes: Sequence[Pass]) -> None:
        """The backward recursion, over the particles of all passes, those of the best last."""
        best = self._put_back_best(passes)
        slope, precision = self.slope.clone(), self.precision.clone()
        self._recur([*passes[:best], *passes[best + 1 :], passes[best]])
        step = 0.5 ** (len(passes) - 1 - best)
        self.slope.copy_(slope + step * (self.slope - slope))
        self.precision.copy_(precision + step * (self.precision - precision))

    def _put_back_best(self, passes: Sequence[Pass]) -> int:
        """Returns to the coefficients of the best pass so far, and says which that is."""
        if len(passes) <= len(self._tried):
            self._tried = []
        now = (self.slope.clone(), self.precision.clone())
        self._tried += [now] * (len(passes) - len(self._tried))
        best = _best_pass(passes)
        self.slope.copy_(self._tried[best][0])
        self.precision.copy_(self._tried[best][1])
        return best

    def _recur(self, passes: Sequence[Pass]) -> None:
        for now, step in enumerate(reversed(range(len(passes[-1].steps)))):
            parts = [self._pairs(one, step, now) for one in passes]
            x, emitted, later = (torch.cat(columns) for columns in zip(*parts, strict=True))
            recent = len(x) - len(parts[-1][0])
            for which, y in enumerate((emitted + later, later)):
                fit = _best_quadratic(x, y, recent)
                self.slope[which, now], self.precision[which, now] = fit

    def _pairs(self, one: Pass, step: int, now: int) -> tuple[torch.Tensor, ...]:
        """Distinct particles that survived a step, what they emitted, what they may expect."""
        site = self._site(one, step)
        chosen, first = _distinct(one.ancestors[step], one.log_path)
        assert site.emitted is not None
        emitted = site.emitted.reshape(-1)[chosen]
        x = self._vector(site.value).reshape(-1, self.slope.shape[-1])[chosen]
        later = torch.zeros_like(emitted)
        if now > 0 and _is_gaussian(one.steps[step + 1][0].prior):
            later = self._expectation(one.steps[step + 1][0].prior, now)[first]
        alive = torch.isfinite(emitted)
        return x[alive], emitted[alive], later[alive]

    def _site(self, one: Pass, step: int) -> PathStep:
        names = [site.name for site in one.steps[step]]
        if len(names) != 1 or one.steps[step][0].value.numel() != self.slope.shape[-1] * (
            one.log_path.numel()
        ):
            raise ValueError(
                f"step {step} draws the sites {names}; BackwardTwist takes models with one latent "
                f"site of event shape {self.event_shape} in each step, one value per particle. Try "
                "ShiftTwist or a LearnedTwist of your own."
            )
        return one.steps[step][0]

    def _expectation(self, prior: Any, now: int) -> torch.Tensor:
        """``log E[phi(x_{t-1}) | x_t]`` at every particle, up to a constant."""
        loc, precision = self._kernel(prior)
        slope, curve = self._coefficients(0, now - 1, loc)
        tilted, force = precision + curve, _times(precision, loc)
        shift = _solve(tilted, force + slope)
        moved = (shift * (force + slope)).sum(-1) - (loc * force).sum(-1)
        return 0.5 * (moved - torch.logdet(tilted) + torch.logdet(precision)).reshape(-1)


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _solve(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    solution: torch.Tensor = torch.linalg.solve(matrix, vector[..., None])[..., 0]
    return solution


def _is_gaussian(prior: Any) -> bool:
    return is_normal(prior) or isinstance(prior, torch.distributions.MultivariateNormal)


def _once(value: torch.Tensor, event_dim: int) -> torch.Tensor:
    """Undoes broadcasting over the particles."""
    for dim in range(value.dim() - event_dim):
        if value.stride(dim) == 0:
            value = value.narrow(dim, 0, 1)
    return value


def _best_pass(passes: Sequence[Pass]) -> int:
    """
    The pass of least estimated relative variance, of those that are not evidently lost.

    An unbiased estimate exceeds the normaliser ``c``-fold with a probability of ``1 / c`` at most,
    so a pass that is ten nats below another has lost the target.
    """
    log_z = torch.stack([(p.log_path + p.log_base).logsumexp(0).mean() for p in passes])
    losses = torch.stack([_relative_variance(one) for one in passes])
    lost = log_z < log_z.max() - 10
    return int(torch.where(lost, torch.inf, losses).argmin())


def _relative_variance(one: Pass) -> torch.Tensor:
    assert one.ess is not None
    size = one.log_path.shape[0]
    return (size / one.ess.clamp(min=1e-9) - 1).sum(0).mean()


def _distinct(index: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The particles that have offspring, and the first offspring of each, counted through."""
    everyone = torch.arange(like.numel(), device=like.device)
    if index is None:
        return everyone, everyone
    columns = like.shape[1:].numel()
    column = everyone.reshape(like.shape) % columns
    parent, first = (index * columns + column).reshape(-1).sort(stable=True)
    new = torch.ones_like(parent, dtype=torch.bool)
    new[1:] = parent[1:] != parent[:-1]
    return parent[new], first[new]


@dataclass(frozen=True)
class _Fit:
    """A regression: its mean squared leave-one-out error, and standardised coefficients."""

    error: float
    linear: torch.Tensor
    curve: torch.Tensor


def _best_quadratic(
    x: torch.Tensor, y: torch.Tensor, recent: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope and precision of what predicts the points from number ``recent`` on best."""
    centre, spread = x[recent:].mean(0), x[recent:].std(0, correction=0)
    z = (x - centre) / torch.where(spread > 0, spread, 1.0)
    spread = torch.where(spread > 0, spread, torch.inf)
    options = product({0, recent}, {True, x.shape[1] == 1}, _RIDGES)
    fits = [_regress(z[s:], y[s:], full, ridge, recent - s) for s, full, ridge in options]
    best = min(fits, key=lambda fit: fit.error)
    # where the quadratic is wrong by several nats, it is wronger still where it leads to
    trust = 1 / (1 + best.error)
    curve = trust * best.curve / (spread[:, None] * spread)
    return trust * best.linear / spread + curve @ centre, curve


def _regress(z: torch.Tensor, y: torch.Tensor, full: bool, ridge: float, recent: int) -> _Fit:
    rows, columns = _monomials(z.shape[1], full)
    features = torch.cat([z, z[:, rows] * z[:, columns]], -1)
    features, y = features - features.mean(0), y - y.mean()
    coefficients, guess = _ridge(features, y, ridge)
    y, guess = y[recent:], guess[recent:]
    share = (y @ guess / (guess @ guess).clamp(min=1e-300)).clamp(0.0, 1.0)
    error = float((y - share * guess).square().mean())
    linear, second = (share * coefficients).split([z.shape[1], len(rows)])
    curve = z.new_zeros(z.shape[1], z.shape[1])
    curve[rows, columns] = -second
    return _Fit(error, linear, _semidefinite(curve + curve.T))


def _ridge(
    features: torch.Tensor, y: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients for centred features, and predictions of points from all others."""
    information = features.T @ features
    information.diagonal().add_(ridge * len(y))
    solved = torch.linalg.solve(information, features.T)
    leverage = (features.T * solved).sum(0) + 1 / len(y)
    errors = (y - features @ (solved @ y)) / (1 - leverage).clamp(min=1e-9)
    return solved @ y, y - errors


def _monomials(size: int, full: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if not full:
        return torch.arange(size), torch.arange(size)
    pairs = torch.triu_indices(size, size)
    return pairs[0], pairs[1]


def _semidefinite(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    nearest: torch.Tensor = (vectors * values.clamp(min=0.0)) @ vectors.T
    return nearest
