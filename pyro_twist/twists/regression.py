# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Ridge regressions with gradients, for surrogates of black-box rewards."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

__all__ = ["KernelRidge", "Surrogate"]

Surrogate = Literal["linear", "quadratic", "kernel"]


class KernelRidge(torch.nn.Module):
    """
    Kernel ridge regression in dual form; its ridge is chosen by leaving out groups of points.

    The dual form costs the cube of the number of points, whatever the dimension, so that latents
    of any size will do. Points are centred and scaled to unit mean square distance from their mean.

    :param str kind: ``"linear"``; ``"quadratic"``, the kernel ``u + u^2 / 2`` with ``u`` the inner
        product, whose functions are all quadratics; or ``"kernel"``, the Gaussian kernel of width
        two, in units of the scaled points.
    :param int max_points: Use at most so many points, evenly spaced.
    """

    points: torch.Tensor
    coefficients: torch.Tensor
    centre: torch.Tensor
    width: torch.Tensor
    score: torch.Tensor

    def __init__(self, kind: Surrogate = "quadratic", *, max_points: int = 1500) -> None:
        super().__init__()
        if kind not in get_args(Surrogate):
            raise ValueError(f"surrogate={kind!r}; choose one of {get_args(Surrogate)}")
        self.kind, self.max_points = kind, max_points
        for name, shape in {"points": (0, 0), "coefficients": (0,), "centre": (0,)}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        for name, value in {"width": 1.0, "score": 0.0}.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    @property
    def fitted(self) -> bool:
        """Whether there is a fit."""
        return len(self.coefficients) > 0

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # the number of points is that of the saved fit
        for name in ("points", "coefficients", "centre"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit(self, points: torch.Tensor, targets: torch.Tensor, groups: torch.Tensor) -> KernelRidge:
        """
        Fits, and measures the fit on groups left out.

        :param torch.Tensor points: Of shape ``(num_points, dimension)``.
        :param torch.Tensor targets: Of shape ``(num_points,)``.
        :param torch.Tensor groups: Which points belong together, of shape ``(num_points,)``, such
            as the path a point is on; points of one group are never split.
        :returns: Itself; ``score`` is the share of variance explained on groups left out, which
            is negative for a fit worse than the mean.
        """
        chosen = torch.linspace(0, len(points) - 1, min(len(points), self.max_points))
        chosen = chosen.round().long().unique()
        x, y, groups = points[chosen].double(), targets[chosen].double(), groups[chosen]
        self.centre, mean = x.mean(0), y.mean()
        x = x - self.centre
        self.width = x.square().sum(1).mean().sqrt().clamp(min=1e-12)
        self.points = x / self.width
        gram = self._kernel(self.points @ self.points.T, self.points, self.points)
        ridge, score = self._best_ridge(gram, y - mean, groups)
        self.score = torch.tensor(score, dtype=torch.float64)
        eye = torch.eye(len(y), dtype=torch.float64)
        self.coefficients = torch.linalg.solve(gram + ridge * eye, y - mean)
        return self

    def _kernel(self, inner: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.kind == "linear":
            return inner
        if self.kind == "quadratic":
            return inner + 0.5 * inner.square()
        distance = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * inner
        return torch.exp(-distance / 8)

    def _best_ridge(
        self, gram: torch.Tensor, y: torch.Tensor, groups: torch.Tensor
    ) -> tuple[float, float]:
        total = y.square().sum().clamp(min=1e-300)
        scale = float(gram.diagonal().mean())
        ridges = [scale * 10.0**e for e in (-3, -2, -1, 0, 1)]
        errors = [float(self._left_out(gram, y, groups, r).square().sum() / total) for r in ridges]
        best = min(range(len(ridges)), key=errors.__getitem__)
        return ridges[best], 1.0 - errors[best]

    @staticmethod
    def _left_out(
        gram: torch.Tensor, y: torch.Tensor, groups: torch.Tensor, ridge: float
    ) -> torch.Tensor:
        """Residuals of predictions made without the point's own fold of groups."""
        labels, fold = groups.unique(return_inverse=True)
        fold = fold % min(4, len(labels)) if len(labels) > 1 else torch.arange(len(y)) % 2
        residual = y.clone()
        for k in fold.unique():
            out, kept = (fold == k).nonzero()[:, 0], (fold != k).nonzero()[:, 0]
            system = gram[kept][:, kept] + ridge * torch.eye(len(kept), dtype=torch.float64)
            mean = y[kept].mean()
            weights = torch.linalg.solve(system, y[kept] - mean)
            residual[out] = y[out] - mean - gram[out][:, kept] @ weights
        return residual

    def gradient(self, points: torch.Tensor) -> torch.Tensor:
        """
        The gradient of the fitted function.

        :param torch.Tensor points: Of shape ``(num_points, dimension)``.
        :returns: Of the same shape, in float64.
        :rtype: torch.Tensor
        """
        assert self.fitted, "call fit first"
        x = (points.double() - self.centre) / self.width
        inner = x @ self.points.T
        if self.kind == "linear":
            slopes = self.coefficients.expand(len(x), -1)
            return slopes @ self.points / self.width
        if self.kind == "quadratic":
            return ((1 + inner) * self.coefficients) @ self.points / self.width
        weights = self._kernel(inner, x, self.points) * self.coefficients / 4
        return (weights @ self.points - weights.sum(1, keepdim=True) * x) / self.width
