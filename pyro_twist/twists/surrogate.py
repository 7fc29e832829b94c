# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
A direction learnt from every reward that was ever looked at, without a gradient of the reward.

Look-ahead scores the predicted end state at every step, so a pass of a few particles leaves
hundreds of pairs of prediction and log-potential. A regression on them is a surrogate of the
reward that has a gradient. How far to go along it is told by the noise that was drawn anyway: by
how much the look-ahead rose where noise and direction agreed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_twist.twists.learned import LinearTwist, is_normal, loc_scale
from pyro_twist.twists.paths import Pass, PathStep
from pyro_twist.twists.regression import KernelRidge, Surrogate
from pyro_twist.twists.spectrum import Spectrum
from pyro_twist.twists.statistics import Quadratic

__all__ = ["SurrogateTwist"]

_MAX_GAIN = 3.0


class SurrogateTwist(LinearTwist):
    """
    Tilts the kernels of a diffusion model along the gradient of a surrogate reward.

    With :math:`x_0` predicted as :math:`\\hat x_0` and the surrogate :math:`\\hat\\ell` of the
    terminal log-potential, the tilt of the kernel to :math:`x_{t-1}` is

    .. math::

        \\eta_t = \\gamma_t J_{t-1} \\nabla \\hat\\ell(\\hat x_0), \\qquad
        J_t = \\frac{\\alpha_t v}{\\alpha_t^2 v + \\sigma_t^2}

    where :math:`J_t` is how the prediction moves with :math:`x_t`, diagonal in a
    :class:`~pyro_twist.twists.spectrum.Spectrum` with a variance :math:`v` for each band of
    frequencies. The shift at gain 1 is capped at ``cap`` standard deviations in norm. The gains
    :math:`\\gamma_t` are interpolated between ``knots`` values, the only parameters.

    What the gains are before the likelihood has its say is a regression as well: of the change of
    the look-ahead's log-twist in a step on the noise drawn in the step, along a direction that was
    fitted without the path in question. A direction that the reward does not follow gets no gain.

    The twist is a proposal; the value of the look-ahead is the business of a
    :class:`~pyro_twist.twists.LookaheadTwist` beside it, which also provides the pairs.

    :param model: A tilted :class:`~pyro_twist.diffusion.GaussianDiffusion`.
    :param surrogate: The kind of regression, or several to choose from on paths left out; see
        :class:`~pyro_twist.twists.regression.KernelRidge`.
    :param int knots: The number of gains.
    :param float cap: The largest shift at gain 1, in standard deviations.
    :param float ridge: Prior precision of the gains in the likelihood, see
        :class:`~pyro_twist.twists.LinearTwist`.
    :param bool spectral: Whether the response depends on the band; otherwise one variance serves
        all coordinates.
    :param float gain: A gain to use instead of the learned ones.
    :param bool fitted: Whether the gains move on by likelihood.
    :param str key: The entry of the state that holds the look-ahead.
    :raises ValueError: If the model has no noise levels, or an option is out of range.
    """

    def __init__(
        self,
        model: Any,
        *,
        surrogate: Surrogate | Sequence[Surrogate] = ("linear", "diagonal", "quadratic"),
        knots: int = 3,
        cap: float = 2.0,
        ridge: float = 20.0,
        spectral: bool = True,
        gain: float | None = None,
        fitted: bool = True,
        key: str = "lookahead",
    ) -> None:
        super().__init__(model, knots, ridge=ridge)
        if not hasattr(model, "schedule"):
            raise ValueError(
                f"{type(model).__name__} has no noise `schedule`, which SurrogateTwist needs; it "
                "is for diffusion models. Try QuadraticTwist or ShiftTwist."
            )
        if knots < 1 or cap <= 0 or (gain is not None and gain < 0):
            raise ValueError(
                f"knots={knots}, cap={cap}, gain={gain}; give a whole number of at least 1, a "
                "positive number, and None or a number of at least 0"
            )
        self.knots, self.cap, self.gain, self.fitted, self.key = knots, cap, gain, fitted, key
        self.regression = KernelRidge(surrogate)
        self.spectrum = Spectrum(model.event_shape if spectral else (model.event_shape.numel(),))
        # what is not fitted is no parameter, beside other families either
        self.theta.requires_grad_(fitted)
        self.follows = ("x0_hat", f"{key}_time", f"{key}_log_twist")

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The prediction and the look-ahead at it."""
        return ("x0_hat", self.key, f"{self.key}_time", f"{self.key}_log_twist")

    @property
    def score(self) -> float:
        """Share of variance that the surrogate explains on paths left out."""
        return float(self.regression.score)

    # learning

    @property
    def learns_within(self) -> bool:
        """Every look-ahead so far is a pair to learn from."""
        return True

    def observe(self, passes: Sequence[Pass]) -> None:
        """Fits spectrum and surrogate to all steps so far, and sets the prior of the gains."""
        looks = list(self._looks(passes))
        targets = torch.cat([target for _, target, _ in looks]) if looks else torch.zeros(0)
        if len(targets) < 8 or float(targets.std()) < 1e-9:
            return
        self._fit_spectrum(passes)
        points = self.spectrum(self._rows(torch.cat([x0_hat for x0_hat, _, _ in looks])))
        groups = torch.cat([group for _, _, group in looks])
        gradients = self.regression.cross_fit(points, targets, groups)
        self.prior_mean.copy_(self._gains(passes, gradients)[None])
        # the likelihood moves the gains from there, and only as far as it proves itself
        with torch.no_grad():
            self.theta.copy_(self.prior_mean)

    def _fit_spectrum(self, passes: Sequence[Pass]) -> None:
        steps = [step for one in passes for step in _steps(one)]
        predictions = [self._flat(step.state["x0_hat"]) for step in steps if step.t is not None]
        self.spectrum.mix(self._rows(torch.cat(predictions)))
        self.spectrum.fit(self._moves(steps))

    def _moves(self, steps: Sequence[PathStep]) -> Iterator[tuple[Tensor, Tensor, float, float]]:
        """How far noise and push moved the state, and the prediction after it."""
        for step in steps:
            if not self._drawn(step) or "x0_hat" not in step.after:
                continue
            level = self._level(step)
            pushed = self._coefficients(step.value - loc_scale(step.prior)[0])
            moved = self._coefficients(step.after["x0_hat"] - step.state["x0_hat"])
            yield pushed, moved, *level

    def _gains(self, passes: Sequence[Pass], gradients: Tensor) -> Tensor:
        """The gains that explain how the log-twist changed, by least squares."""
        if self.gain is not None:
            return torch.full((self.knots,), self.gain, dtype=torch.float64)
        information = torch.zeros(self.knots, self.knots, dtype=torch.float64)
        score, rows = torch.zeros(self.knots, dtype=torch.float64), 0
        for step, gradient in self._with_gradients(passes, gradients):
            change = self._change(step)
            expected = _centred(self._expected(step, gradient).reshape(change.shape))
            share = _hat((int(step.t or 0) - 1) / self.model.timesteps[0], self.knots).double()
            information += float(expected.square().sum()) * share[:, None] * share
            score += float((expected * _centred(change)).sum()) * share
            rows += change.numel()
        # the prior is the score of the surrogate, and is worth ten particles' steps
        prior = 10.0 / max(rows, 1) * information.diagonal().mean().clamp(min=1e-12)
        start = torch.full_like(score, max(self.score, 0.0))
        system = information + prior * torch.eye(self.knots, dtype=torch.float64)
        return torch.linalg.solve(system, score + prior * start).clamp(0.0, _MAX_GAIN)

    def _with_gradients(
        self, passes: Sequence[Pass], gradients: Tensor
    ) -> Iterator[tuple[PathStep, Tensor]]:
        """The steps after which the log-twist is known, with the gradients before them."""
        start = 0
        for one in passes:
            for step in _steps(one):
                if not self._looked(step):
                    continue
                rows = step.state[self.key].numel()
                gradient, start = gradients[start : start + rows], start + rows
                if self._drawn(step) and _time(step.after, self.key) == int(step.t or 0) - 1:
                    yield step, gradient

    def _expected(self, step: PathStep, gradient: Tensor) -> Tensor:
        """By how much the surrogate says that the log-twist has risen."""
        response = self.spectrum.response(*self._level(step))
        moved = self._coefficients(step.value - loc_scale(step.prior)[0])
        return (gradient * response * moved).sum(1)

    def _change(self, step: PathStep) -> Tensor:
        name = f"{self.key}_log_twist"
        return step.after[name] - step.state[name]

    def _looks(self, passes: Sequence[Pass]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Predictions with their log-potentials, and the pass and first ancestor of each."""
        for number, one in enumerate(passes):
            for step, root in zip(_steps(one), _roots(one), strict=True):
                if self._looked(step):
                    group = (root + number * one.log_path.numel()).reshape(-1)
                    yield step.state["x0_hat"], step.state[self.key].reshape(-1), group

    def _looked(self, step: PathStep) -> bool:
        """Whether there was a look-ahead just before the step."""
        return step.t is not None and _time(step.state, self.key) == step.t

    def _drawn(self, step: PathStep) -> bool:
        # the last step leads to the data themselves, and has no look-ahead
        return step.t is not None and step.t > 1 and is_normal(step.prior)

    def _level(self, step: PathStep) -> tuple[float, float]:
        """Signal and noise levels of the state that a step leads to."""
        return self._levels(int(step.t or 1) - 1)

    def _levels(self, t: int) -> tuple[float, float]:
        if t < 1:
            return 1.0, 0.0
        return self.model.schedule[t].alpha, self.model.schedule[t].sigma

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape((-1, torch.Size(self.model.event_shape).numel()))

    def _rows(self, x: Tensor) -> Tensor:
        return self._flat(x).reshape((-1,) + self.spectrum.event_shape)

    def _coefficients(self, x: Tensor) -> Tensor:
        return self.spectrum(self._rows(x))

    # steering

    def features(self, name: str, prior: Any) -> Tensor | None:
        """The capped direction, in shares by knot."""
        state, args = self.args_kwargs[0][0], self.args_kwargs[0]
        if not self.stepping or len(args) < 2 or not self.regression.fitted or not is_normal(prior):
            return None
        direction = self._direction(state["x0_hat"], int(args[1]), loc_scale(prior)[1])
        shares = _hat(self.time_after(*args[1:]) / self.model.timesteps[0], self.knots)
        return shares.to(direction).reshape((-1,) + (1,) * direction.dim()) * direction

    def _direction(self, x0_hat: Tensor, t: int, std: Tensor) -> Tensor:
        tilt = self.full_tilt(x0_hat, t)
        norm = self._flat(tilt * std.double()).norm(dim=1)
        shrink = (self.cap / norm.clamp(min=1e-300)).clamp(max=1.0)
        event_dim = len(self.model.event_shape)
        shape = x0_hat.shape[: x0_hat.dim() - event_dim] + (1,) * event_dim
        return (tilt * shrink.reshape(shape)).to(x0_hat.dtype)

    def full_tilt(self, x0_hat: Tensor, t: int) -> Tensor:
        """
        The tilt at gain 1, without the cap: the gradient of the surrogate, carried to the state.

        :param Tensor x0_hat: Predictions of shape ``batch_shape + event_shape``.
        :param int t: The time index of the step, which leads to ``t - 1``.
        :returns: Of the same shape, in float64.
        :rtype: Tensor
        """
        response = self.spectrum.response(*self._levels(t - 1))
        return self.spectrum.inverse(response * self.gradient(x0_hat)).reshape(x0_hat.shape)

    def gradient(self, x0_hat: Tensor) -> Tensor:
        """
        The gradient of the surrogate, in coefficients of the spectrum.

        :param Tensor x0_hat: Predictions of shape ``batch_shape + event_shape``.
        :returns: Of shape ``(num_rows, dimension)``, in float64.
        :rtype: Tensor
        """
        return self.regression.gradient(self._coefficients(x0_hat))

    def solve(self, batches: Sequence[Quadratic]) -> Tensor:
        """The gains; the prior ones where there is no surrogate."""
        if not self.regression.fitted:
            return self.prior_mean.double()
        return super().solve(batches)

    def constrain(self) -> None:
        """Gains are between 0 and 3."""
        self.theta.clamp_(0.0, _MAX_GAIN)


def _hat(position: float, knots: int) -> Tensor:
    """Shares of the two neighbouring knots at a position between 0 and 1."""
    if knots == 1:
        return torch.ones(1)
    distance = (torch.arange(knots) - position * (knots - 1)).abs()
    return (1 - distance).clamp(min=0)


def _time(state: dict[Any, Tensor], key: str) -> int | None:
    """When the latest look-ahead was made."""
    return int(state[f"{key}_time"].reshape(-1)[0]) if f"{key}_time" in state else None


def _centred(values: Tensor) -> Tensor:
    """Less the mean of the population, which depends on where the reward has its zero."""
    return values - values.mean(0)


def _steps(one: Pass) -> list[PathStep]:
    """The first site of every step, back where fits compute."""
    return [sites[0].restored() for sites in one.steps if sites]


def _roots(one: Pass) -> list[Tensor]:
    """For every step the first ancestor of each particle, before the step's resampling."""
    like = one.log_path
    # one population after the other, so that neighbours are particles: folds take turns
    root = torch.arange(like.numel(), device=like.device).reshape(like.shape[::-1]).movedim(-1, 0)
    roots = []
    for sites, index in zip(one.steps, one.ancestors, strict=True):
        if sites:
            roots.append(root)
        root = root if index is None else root.gather(0, index)
    return roots
