# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Ridge regressions with gradients, for surrogates of black-box rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["KernelRidge", "Surrogate"]

Surrogate = Literal["linear", "diagonal", "quadratic", "kernel"]

_KINDS: tuple[Surrogate, ...] = get_args(Surrogate)
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class KernelRidge(torch.nn.Module):
    """
    Kernel ridge regression in dual form; kind and ridge are chosen by leaving out groups of points.

    The dual form costs the cube of the number of points, whatever the dimension, so that latents
    of any size will do. Points are centred and scaled to unit mean square distance from their mean.

    ================  =======================================================================
    kind              functions
    ================  =======================================================================
    ``"linear"``      linear ones
    ``"diagonal"``    a linear one plus a weight for the square of every coordinate
    ``"quadratic"``   all quadratics, by the kernel ``(1 + u)^2 / 2`` of the inner product ``u``
    ``"kernel"``      smooth ones, by the Gaussian kernel of width two in units of the points
    ================  =======================================================================

    :param kinds: One of these, or several to choose from.
    :param int max_points: Use at most so many points, evenly spaced.
    """

    points: Tensor
    coefficients: Tensor
    centre: Tensor
    width: Tensor
    squares: Tensor
    stretch: Tensor
    score: Tensor
    chosen: Tensor

    def __init__(
        self, kinds: Surrogate | Sequence[Surrogate] = "quadratic", *, max_points: int = 300
    ) -> None:
        super().__init__()
        self.kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        if not self.kinds or not set(self.kinds) <= set(_KINDS):
            raise ValueError(f"surrogate={kinds!r}; choose one of {_KINDS}, or several")
        self.max_points = max_points
        shapes = {"points": (0, 0), "coefficients": (0,), "centre": (0,), "squares": (0,)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        for name, value in {"width": 1.0, "stretch": 1.0, "score": 0.0}.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.register_buffer("chosen", torch.tensor(_KINDS.index(self.kinds[0])))

    @property
    def fitted(self) -> bool:
        """Whether there is a fit."""
        return len(self.coefficients) > 0

    @property
    def kind(self) -> Surrogate:
        """The kind that was chosen."""
        return _KINDS[int(self.chosen)]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # the number of points is that of the saved fit
        for name in ("points", "coefficients", "centre", "squares"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit(self, points: Tensor, targets: Tensor, groups: Tensor) -> KernelRidge:
        """
        Fits, and measures the fit on groups left out.

        :param Tensor points: Of shape ``(num_points, dimension)``.
        :param Tensor targets: Of shape ``(num_points,)``.
        :param Tensor groups: Which points belong together, of shape ``(num_points,)``, such as the
            path a point is on; points of one group are never split.
        :returns: Itself; ``score`` is the share of variance explained on groups left out, which
            is negative for a fit worse than the mean.
        """
        self._fit(points, targets, groups)
        return self

    def cross_fit(self, points: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """
        Fits, and says at each point the gradient of a fit that has not seen the point's group.

        :returns: Of the shape of ``points``, in float64.
        :rtype: Tensor

        The arguments are those of :meth:`fit`.
        """
        prepared, ridge = self._fit(points, targets, groups)
        fold, gradients = _folds(groups), torch.zeros_like(points, dtype=torch.float64)
        whole = self.points, self.coefficients
        for k in fold.unique():
            kept = prepared.fold != k
            gram = prepared.grams[self.kind][kept][:, kept]
            targets = prepared.targets[kept]
            self.points = prepared.points[kept]
            self.coefficients = _solve(gram, targets - targets.mean(), ridge)
            gradients[fold == k] = self.gradient(points[fold == k])
        self.points, self.coefficients = whole
        return gradients

    def _fit(self, points: Tensor, targets: Tensor, groups: Tensor) -> tuple[_Prepared, float]:
        x, y, fold = self._thinned(points.double(), targets.double(), _folds(groups))
        self.centre = x.mean(0)
        x = x - self.centre
        self.width = x.square().sum(1).mean().sqrt().clamp(min=1e-12)
        x = x / self.width
        self.squares = x.square().mean(0)
        spread = (x.square() - self.squares).square().sum(1).mean()
        # squares and coordinates count alike
        self.stretch = spread.clamp(min=1e-12).rsqrt()
        grams = {kind: self._gram(x, x, kind) for kind in self.kinds}
        prepared = _Prepared(x, y - y.mean(), fold, grams)
        kind, ridge, score = prepared.best()
        self.chosen, self.score = self.chosen.new_tensor(_KINDS.index(kind)), y.new_tensor(score)
        self.points = x
        self.coefficients = _solve(grams[kind], prepared.targets, ridge)
        return prepared, ridge

    def _thinned(self, *columns: Tensor) -> list[Tensor]:
        size = len(columns[0])
        chosen = torch.linspace(0, size - 1, min(size, self.max_points)).round().long().unique()
        return [column[chosen.to(column.device)] for column in columns]

    def _gram(self, a: Tensor, b: Tensor, kind: Surrogate) -> Tensor:
        inner = a @ b.T
        if kind == "linear":
            return inner
        if kind == "quadratic":
            return 0.5 * (1 + inner).square()
        if kind == "diagonal":
            return inner + self._squared(a) @ self._squared(b).T
        distance = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * inner
        return torch.exp(-distance / 8)

    def _squared(self, x: Tensor) -> Tensor:
        return (x.square() - self.squares) * self.stretch

    def gradient(self, points: Tensor) -> Tensor:
        """
        The gradient of the fitted function.

        :param Tensor points: Of shape ``(num_points, dimension)``.
        :returns: Of the same shape, in float64.
        :rtype: Tensor
        """
        assert self.fitted, "call fit first"
        x = (points.double() - self.centre) / self.width
        return self._slopes(x) / self.width

    def _slopes(self, x: Tensor) -> Tensor:
        linear = self.coefficients @ self.points
        if self.kind == "linear":
            return linear.expand(len(x), -1)
        if self.kind == "diagonal":
            curved = self.coefficients @ self._squared(self.points)
            return linear + 2 * self.stretch * x * curved
        if self.kind == "quadratic":
            return ((1 + x @ self.points.T) * self.coefficients) @ self.points
        weights = self._gram(x, self.points, "kernel") * self.coefficients / 4
        return weights @ self.points - weights.sum(1, keepdim=True) * x


@dataclass(frozen=True)
class _Prepared:
    """Scaled points, centred targets, the fold of each, and a kernel matrix for each kind."""

    points: Tensor
    targets: Tensor
    fold: Tensor
    grams: dict[Surrogate, Tensor]

    def best(self) -> tuple[Surrogate, float, float]:
        """Kind and relative ridge of the smallest error on folds left out, and their score."""
        total = float(self.targets.square().sum().clamp(min=1e-300))
        errors = {(k, r): self.error(k, r) / total for k in self.grams for r in _RIDGES}
        kind, ridge = min(errors, key=errors.__getitem__)
        return kind, ridge, 1.0 - errors[kind, ridge]

    def error(self, kind: Surrogate, ridge: float) -> float:
        """Squared error of predictions that were made without the point's own fold."""
        gram, total = self.grams[kind], 0.0
        for k in self.fold.unique():
            out, kept = self.fold == k, self.fold != k
            mean = self.targets[kept].mean()
            weights = _solve(gram[kept][:, kept], self.targets[kept] - mean, ridge)
            predicted = mean + gram[out][:, kept] @ weights
            total += float((self.targets[out] - predicted).square().sum())
        return total


def _solve(gram: Tensor, targets: Tensor, ridge: float) -> Tensor:
    eye = torch.eye(len(targets), dtype=gram.dtype, device=gram.device)
    scale = gram.diagonal().mean().clamp(min=1e-12)
    factor = torch.linalg.cholesky(gram + ridge * scale * eye)
    return torch.cholesky_solve(targets[:, None], factor)[:, 0]


def _folds(groups: Tensor) -> Tensor:
    """At most four folds of whole groups; halves of the points if there is one group."""
    labels, index = groups.unique(return_inverse=True)
    if len(labels) == 1:
        return torch.arange(len(groups), device=groups.device) % 2
    return index % min(4, len(labels))
