# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

r"""
Feynman-Kac correctors: marginals that are prescribed at every time, sampled by another drift and a
weight in every step.

A tilted model is a law of paths times a factor, and weights make it exact for any number of steps.
Here only the law of each :math:`x_t` is given, say :math:`\prod_i p_{i,t}^{\gamma_i}`, and no law
of paths. A stochastic differential equation with a drift near the right one is simulated, and each
step emits a :func:`pyro.factor` for the rate at which its law falls behind [1, 2]. That is right
as the steps get finer, and not before: **correctors are consistent, not exact**. Predictions are
extrapolated from the last two states, and rates averaged over both ends of a step, so that errors
are of the second order (of the first for rewards of predictions), at one evaluation of the network
for each state. The last step has no noise and one end.

All is written for :math:`y = x_t / \alpha_t = x_0 + \sqrt{\rho} \epsilon` with
:math:`\rho = \sigma_t^2 / \alpha_t^2`, for which the reversal of the noising is
:math:`dy = s(y) \, |d\rho| + dW_{|\rho|}` with the score :math:`s = (\hat x_0 - y) / \rho`,
whatever the schedule. A step solves that equation exactly for a prediction that stays the same.
Only signal and noise levels are taken from the scheduler, and not the variance of its kernels,
which for one model are those of DDPM.

**References**

[1] M. Skreta, T. Akhound-Sadegh, V. Ohanesian, R. Bondesan, A. Aspuru-Guzik, A. Doucet,
    R. Brekelmans, A. Tong, K. Neklyudov (2025), Feynman-Kac Correctors in Diffusion,
    https://arxiv.org/abs/2503.02819.

[2] C. Wang, W. Wang, Y. Ren, J. Blanchet, Y. Lu (2026), Unbiased Resampling via Girsanov
    Estimation, https://arxiv.org/abs/2605.17850.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_twist.diffusion.gaussian import GaussianDiffusion
from pyro_twist.diffusion.kernels import GaussianSchedule
from pyro_twist.diffusion.products import (
    CombinedModels,
    Reads,
    _check_exponents,
    _view,
    _weighted,
    conditioned,
)
from pyro_twist.potential import (
    batch_shape_of,
    log_potential,
    rewards_of,
    sum_of_factors,
)
from pyro_twist.wrapper import ModelWrapper

__all__ = ["ProductCorrector", "RewardCorrector"]

At = Literal["state", "prediction"]
Laplacian = Literal["exact", "none"]

# the noise-to-signal ratio that stands for no signal at all
_MOST_NOISE = 1e8
_NODES = 48


@dataclass(frozen=True)
class _Clock:
    """
    The steps of a reversal in terms of the noise-to-signal ratio.

    :param GaussianSchedule schedule: Where the noise levels are read.
    :param float total: The sum of the exponents.
    :param float variance: The variance of data for which a sum other than one has constant
        weights; ``None`` for no linear drift of that kind.
    """

    schedule: GaussianSchedule
    total: float = 1.0
    variance: float | None = None

    def level(self, t: int) -> tuple[float, float]:
        """Signal and noise level of a state."""
        return (self.schedule[t].alpha, self.schedule[t].sigma) if t else (1.0, 0.0)

    def ratio(self, t: int) -> float:
        """The ratio of the variances of noise and signal."""
        alpha, sigma = self.level(t)
        return sigma**2 / max(alpha**2, sigma**2 / _MOST_NOISE)

    def span(self, t: int) -> float:
        """What a rate at state t is integrated over in its step; the last step has one end."""
        return math.log(self.ratio(t) / self.ratio(t - 1)) if self.ratio(t - 1) else 1.0

    def pull(self, ratio: float | Tensor) -> Any:
        """The linear drift, times the ratio."""
        if self.variance is None or self.total == 1:
            return 0.0 * ratio
        return 0.5 * (self.total - 1) * ratio / (self.variance + ratio)

    def reversal(self) -> GaussianSchedule:
        """A schedule of the steps for a constant prediction."""
        steps = []
        for t in range(len(self.schedule), 0, -1):
            of_x0, of_x, std = self._step(t)
            plain = replace(self.schedule[t], x0_coef=of_x0, x_coef=of_x, eps_coef=0.0, std=std)
            steps.append(plain)
        init_std = self.schedule.init_std / math.sqrt(self.total)
        return replace(
            self.schedule, steps=tuple(steps), init_std=init_std, clip=None, learned_variance=None
        )

    def _step(self, t: int) -> tuple[float, float, float]:
        """Coefficients of prediction and state, and the standard deviation."""
        start, end, alpha = self.ratio(t), self.ratio(t - 1), self.level(t - 1)[0]
        if not end:
            return alpha, 0.0, 0.0
        span = math.log(start / end)
        nodes, weights = _gauss_legendre()
        ratios = end * torch.exp(span * nodes)
        decay = self._decay(ratios, end)
        of_x0 = span * float((weights * decay).sum()) * self.total
        variance = span * float((weights * decay.square() * ratios).sum())
        kept = float(self._decay(torch.tensor(start, dtype=torch.float64), end))
        signal = max(self.level(t)[0], self.level(t)[1] / math.sqrt(_MOST_NOISE))
        return alpha * of_x0, alpha * kept / signal, alpha * math.sqrt(variance)

    def _decay(self, start: Tensor, end: float) -> Tensor:
        """What is left at ``end`` of a displacement at ``start``."""
        decay = (end / start) ** self.total
        if self.variance is None or self.total == 1:
            return decay
        widening = (self.variance + start) / (self.variance + end)
        return decay * widening ** (0.5 * (self.total - 1))

    def extrapolation(self, t: int) -> float:
        """By how much of its last change a prediction is carried on to the middle of a step."""
        if t == len(self.schedule) or not self.ratio(t - 1):
            return 0.0
        return 0.5 * min(self.span(t) / self.span(t + 1), 1.0)


def _gauss_legendre() -> tuple[Tensor, Tensor]:
    import numpy

    nodes, weights = numpy.polynomial.legendre.leggauss(_NODES)
    return torch.from_numpy(0.5 * (nodes + 1)), torch.from_numpy(0.5 * weights)


def _ahead(
    clock: _Clock, state: Mapping[Any, Tensor], t: int, name: str, second_order: bool
) -> dict[str, Tensor]:
    """A prediction carried on from the last two, and the state."""
    now, share = state[name], clock.extrapolation(t) if second_order else 0.0
    if share and f"{name}_before" in state:
        now = now + share * (now - state[f"{name}_before"])
    return {"x": state["x"], "x0_hat": now}


def _over_step(clock: _Clock, t: int, start: Tensor, end: Tensor) -> Tensor:
    """The integral of a rate over a step: of the last step only the start is known."""
    return clock.span(t) * (0.5 * (start + end) if t > 1 else start)


def _forget(state: MutableMapping[Any, Tensor], *names: str) -> None:
    """Drops what only steps need."""
    for name in names:
        state.pop(name, None)


class ProductCorrector(CombinedModels):
    r"""
    A product of powers of diffusion models at every time: :math:`\pi_t \propto \prod_i
    p_{i,t}^{\gamma_i}`.

    With scores :math:`s_i`, their sum :math:`S = \sum_i \gamma_i s_i`, the sum of exponents
    :math:`\Gamma` and dimension :math:`d`, the drift is :math:`S + k y` and the rate of the
    log-weight

    .. math::

        \tfrac12 \Bigl(\lVert S \rVert^2 - \sum_i \gamma_i \lVert s_i \rVert^2\Bigr)
        + k (d + y \cdot S), \qquad k = \frac{\Gamma - 1}{2 (v + \rho)}

    each per unit of :math:`|d\rho|`. The first term is that of [1]. The second goes with the linear
    drift, for which rates are constant if the data are Gaussian of variance :math:`v`; without it
    they fluctuate even where there is no data in the state yet. It vanishes for exponents of sum
    one. The initial state is drawn from the product of the initial laws, and the normaliser is
    :math:`\int \prod_i p_i(x_0)^{\gamma_i} dx_0`.

    The target is that of :class:`~pyro_twist.diffusion.ProductOfModels` with
    ``target="marginals"``, which is exact for any number of steps and needs densities; here
    denoisers are enough. The end has the noise of the last step taken out of it, as that of any
    diffusion model with a silent last step::

        sharp = ProductCorrector.annealed(zoo.load("digits"), power=2.0, variance=0.25)
        result = TwistedSMC(sharp, None, num_particles=64).run()

    :param list models: :class:`~pyro_twist.diffusion.GaussianDiffusion` models with the same noise
        levels and kernels, of fixed variance.
    :param list exponents: One for each model, 1 by default. Some may be negative; the sum must be
        positive.
    :param float variance: The variance :math:`v` of an entry of the data; images in [-1, 1] have
        about a quarter. ``None`` for :math:`k = 0`.
    :param bool second_order: Whether to extrapolate predictions.
    :param list reads: For each model a dict from the names of its conditioning to entries of the
        state; see :class:`~pyro_twist.diffusion.ProductOfModels`.
    :raises ValueError: If models do not fit together, or an exponent or the variance does not fit.
    """

    def __init__(
        self,
        models: Sequence[GaussianDiffusion],
        exponents: Sequence[float] | None = None,
        *,
        variance: float | None = 1.0,
        second_order: bool = True,
        reads: Reads | None = None,
    ) -> None:
        super().__init__(models, reads)
        self.exponents = _check_exponents(models, exponents)
        number = isinstance(variance, (int, float)) and 0 < variance < math.inf
        if variance is not None and not number:
            raise ValueError(f"variance={variance!r}; give a positive number, or None for no drift")
        self.second_order = second_order
        self._clock = _Clock(self.schedule, sum(self.exponents), variance)
        self.schedule = self._clock.reversal()
        self._rate = torch.zeros(())

    @classmethod
    def annealed(cls, model: GaussianDiffusion, power: float, **options: Any) -> ProductCorrector:
        r"""
        One model at another temperature: :math:`p_t^\beta` at every time.

        :param GaussianDiffusion model: The model.
        :param float power: The exponent :math:`\beta`; above 1 likely samples become likelier.
        :param options: Further options of the class.
        """
        return cls([model], [power], **options)

    @classmethod
    def guided(
        cls, model: GaussianDiffusion, scale: float | None = None, **options: Any
    ) -> ProductCorrector:
        r"""
        Classifier-free guidance that samples what it says: :math:`p_t(x \mid c)^w p_t(x)^{1 - w}`.

        Guidance without weights samples no such law. The rate is :math:`\tfrac12 w (w - 1) \lVert
        s_c - s_u \rVert^2`, and the path that of guidance. Each state takes two evaluations.

        :param GaussianDiffusion model: A model with conditioning and ``null_conditioning``.
        :param float scale: The scale :math:`w`; by default the model's own.
        :param options: Further options of the class.
        """
        null = model.denoiser.null_conditioning
        if null is None:
            raise ValueError(
                "the model has no null_conditioning, so its law without a condition is not known; "
                "give it one, such as null_conditioning={'class_labels': num_classes}"
            )
        power = model.denoiser.guidance_scale if scale is None else scale
        if not isinstance(power, (int, float)):
            raise ValueError(f"scale={power!r}; give a number, the same for all of a batch")
        if power == 1:
            return cls([conditioned(model, {})], **options)
        both = [conditioned(model, {}), conditioned(model, null)]
        return cls(both, [power, 1.0 - power], **options)

    def init(self, state: MutableMapping[Any, Tensor]) -> None:
        """
        Samples :math:`x_T` from the product of the models' initial laws, and predicts from it.

        :param dict state: Written: ``x``, ``x0_hat`` and ``rate``.
        """
        super().init(state)
        self._emit(len(self.schedule), state["rate"].new_full((), self._log_mass()))

    def step(self, state: MutableMapping[Any, Tensor], t: int) -> None:
        """
        Samples :math:`x_{t-1}` and emits what its law fell behind by.

        :param dict state: Read and written.
        :param int t: Time index of the state, one of :attr:`timesteps`.
        """
        prediction, rate = state["x0_hat"], state["rate"]
        super().step(state, t)
        state["x0_hat_before"] = prediction
        self._emit(t - 1, _over_step(self._clock, t, rate, state["rate"]))
        if t == 1:
            _forget(state, "x0_hat_before", "rate")

    def kernel(self, state: Mapping[Any, Tensor], t: int) -> dist.TorchDistribution:
        """
        The law of :math:`x_{t-1}` given the state, of the reversal's variance.

        :param dict state: What :meth:`init` or :meth:`step` has written.
        :param int t: Time index of the state, one of :attr:`timesteps`.
        """
        ahead = _ahead(self._clock, state, t, "x0_hat", self.second_order)
        return super().kernel(ahead, t)

    def _emit(self, t: int, factor: Tensor) -> None:
        with self._plate:
            pyro.factor(f"corrector_{t}", factor)

    def _log_mass(self) -> float:
        """The log-integral of the product of the initial laws, as laws of the data's scale."""
        total, dim = self._clock.total, self.event_shape.numel()
        ratio, std = self._clock.ratio(len(self.schedule)), self._clock.schedule.init_std
        spread = ratio * (std / self._clock.level(len(self.schedule))[1]) ** 2
        return 0.5 * dim * ((1 - total) * math.log(2 * math.pi * spread) - math.log(total))

    def _write(self, state: MutableMapping[Any, Tensor], t: int, x: Tensor) -> None:
        super()._write(state, t, x)
        if t:
            state["rate"] = self._rate.reshape(self._batch_shape(x))

    def _predict(self, state: Mapping[Any, Tensor], t: int) -> dict[str, Tensor]:
        """The average prediction; notes the rate of the log-weight."""
        found = [
            model._predict(_view(state, read), t)["x0_hat"]
            for model, read in zip(self.models, self.reads, strict=True)
        ]
        self._rate = self._rates(t, state["x"].reshape(found[0].shape), found).detach()
        total = sum(self.exponents)
        return {"x0_hat": _weighted([exponent / total for exponent in self.exponents], found)}

    def _rates(self, t: int, rows: Tensor, found: Sequence[Tensor]) -> Tensor:
        """The rate of each row, per unit of the log of the noise-to-signal ratio."""
        alpha, sigma = self._clock.level(t)
        noises = [((rows - alpha * x0_hat) / sigma).double().flatten(1) for x0_hat in found]
        whole = _weighted(self.exponents, noises)
        squares = _weighted(self.exponents, [noise.square().sum(-1) for noise in noises])
        rates = 0.5 * (whole.square().sum(-1) - squares)
        inner = (rows.double().flatten(1) / sigma * whole).sum(-1)
        return rates + self._clock.pull(self._clock.ratio(t)) * (whole.shape[1] - inner)


class RewardCorrector(ModelWrapper):
    r"""
    Marginals tilted by a reward at every time: :math:`\pi_t \propto p_t(x_t)\, e^{r(x_t, t)}`.

    With the model's score :math:`s` the drift is :math:`s + a \nabla r` and the rate of the
    log-weight, per unit of :math:`|d\rho|`,

    .. math::

        -\partial_\rho r + a\, s \cdot \nabla r
        + (a - \tfrac12) \bigl(\Delta r + \lVert \nabla r \rVert^2\bigr)

    with gradients in :math:`y`. It is a property of the particle, whatever the noise of its steps
    was, where that of URGE is one of the path [2]. With :math:`a = 1/2` (Feynman-Kac correctors
    [1]) there is no Laplacian. With :math:`a = 1` (AFDPS) there is: it is exact through autograd,
    in as many passes as there are entries, or estimated with random signs (Hutchinson), which is
    unbiased for the rate, and for the weight as the steps get finer. **Left out, with another a
    than 1/2, the law is another one**; where the Laplacian is a constant, as that of a quadratic
    reward at the state, only its normaliser is.

    The change of :math:`r` in time is known where the reward is taken at the state: it is that of
    the ramp and of the state's scale, and errors are of the second order. At the prediction it is
    how :math:`r` changed in the step less what the movement explains, and errors of the normaliser
    are of the first order: large where predictions bend within a step, as those of networks do, so
    compare with more steps before it is relied on. The last step ends in the reward itself, so that
    the factors of a path have the whole of it. **There is no terminal factor besides**::

        model = RewardCorrector(RewardTilted(diffusion, reward, scale=5.0), strength=0.5)
        result = TwistedSMC(model, None, num_particles=64).run()

    :param model: A model with differentiable factors on its end, such as
        :class:`~pyro_twist.rewards.RewardTilted`, around a
        :class:`~pyro_twist.diffusion.GaussianDiffusion`.
    :param float strength: The share :math:`a` of the gradient in the drift, 0 or more.
    :param str at: Where the factors are evaluated: ``"state"``, at :math:`x_t` as it is, or
        ``"prediction"``, at ``x0_hat``, with gradients through the denoiser.
    :param callable ramp: What the log-factor of state ``t`` is multiplied by; by default one for
        predictions, and for states the share of the data that they tell, for data of variance one.
        At the end it is one. What it leaves of the initial state is in the initial weight.
    :param laplacian: ``"exact"``, the number of probes of an estimate, or ``"none"``.
    :param bool second_order: Whether to extrapolate predictions.
    :raises ValueError: If the model has no such factors or is of another kind, or an option does
        not fit.
    """

    def __init__(
        self,
        model: Any,
        strength: float = 0.5,
        *,
        at: At = "state",
        ramp: Callable[[int], float] | None = None,
        laplacian: Laplacian | int = "exact",
        second_order: bool = True,
    ) -> None:
        super().__init__(model)
        self.base = _check_base(model)
        _check_options(strength, at, laplacian, ramp)
        self.strength, self.at, self.laplacian = float(strength), at, laplacian
        self.second_order = second_order
        self._clock = _Clock(self.base.schedule)
        self.schedule = self._clock.reversal()
        self._given_ramp = ramp
        self._shares = tuple(self.base.known_share(1.0).tolist())

    def init(self, state: MutableMapping[Any, Tensor], *args: Any, **kwargs: Any) -> None:
        """
        Samples :math:`x_T`, predicts from it, and weighs it by the reward's share at that time.

        :param dict state: Written: ``x``, ``x0_hat`` and what the next step needs.
        """
        with self._plate():
            x = pyro.sample(f"x_{len(self.schedule)}", self.base.initial())
            state["x"] = x
            self._write(state, len(self.schedule), x)
            pyro.factor(f"corrector_{len(self.schedule)}", state["tilt"])

    def step(self, state: MutableMapping[Any, Tensor], t: int, *args: Any, **kwargs: Any) -> None:
        """
        Samples :math:`x_{t-1}` and emits what its law fell behind by.

        :param dict state: Read and written.
        :param int t: Time index of the state, one of :attr:`timesteps`.
        """
        before = dict(state)
        with self._plate():
            x = pyro.sample(f"x_{t - 1}", self.kernel(state, t))
            self._write(state, t - 1, x)
            pyro.factor(f"corrector_{t - 1}", self._increment(before, state, t))
        if t == 1:
            _forget(state, "x0_guided", "x0_guided_before", "slope", "rate", "potential", "tilt")

    def kernel(self, state: Mapping[Any, Tensor], t: int) -> dist.TorchDistribution:
        """
        The law of :math:`x_{t-1}` given the state, guided.

        :param dict state: What :meth:`init` or :meth:`step` has written.
        :param int t: Time index of the state, one of :attr:`timesteps`.
        """
        ahead = _ahead(self._clock, state, t, "x0_guided", self.second_order)
        mean, std = self.schedule.kernel(t, ahead)
        if std == 0:
            return dist.Delta(mean, event_dim=len(self.base.event_shape))
        return dist.Normal(mean, std).to_event(len(self.base.event_shape))

    def _plate(self) -> AbstractContextManager[Any]:
        return self.base._plate if self.base.plate is not None else nullcontext()

    def _ramp(self, t: int) -> float:
        """What the log-factor of a state is multiplied by."""
        if self._given_ramp is not None:
            return self._given_ramp(t)
        return 1.0 if self.at == "prediction" else self._shares[t]

    def _signal(self, t: int) -> float:
        """The signal level, or next to nothing where there is none."""
        return self._clock.level(t)[1] / math.sqrt(self._clock.ratio(t)) if t else 1.0

    def _write(self, state: MutableMapping[Any, Tensor], t: int, x: Tensor) -> None:
        """Stores a state, and what is known of the reward there."""
        if "x0_guided" in state:
            state["x0_guided_before"] = state["x0_guided"]
        state["x"] = x
        if t == 0:
            self._end(state, x)
            return
        found = self._look(state, t, x)
        alpha, sigma = self._clock.level(t)
        slope, curvature = found["slope"].double(), found.pop("curvature")
        inner = self._dot(alpha * found["x0_hat"] - x, slope)
        curvature = sigma**2 * (curvature + self._dot(slope, slope))
        found["rate"] = self.strength * inner + (self.strength - 0.5) * curvature
        push = self.strength * sigma**2 / self._signal(t)
        found["x0_guided"] = found["x0_hat"] + push * found["slope"]
        state.update(found)

    def _end(self, state: MutableMapping[Any, Tensor], x: Tensor) -> None:
        """The reward at the end, written like that of the model without a corrector."""
        with poutine.block(), poutine.trace() as tracer:
            end = getattr(self.model, "_end", None)
            self.model.terminal(state, x) if end is None else end(state)
        batch_shape = batch_shape_of(self.model, x)
        total = sum_of_factors(tracer.trace, batch_shape, x.device)
        state["tilt"] = state["potential"] = total.detach()
        state["x0_hat"] = x

    def _look(self, state: Mapping[Any, Tensor], t: int, x: Tensor) -> dict[str, Tensor]:
        """Prediction, log-factor, its gradient and its Laplacian, at one evaluation."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            with torch.set_grad_enabled(self.at == "prediction"):
                x0_hat = self.base._predict({**state, "x": x}, t)["x0_hat"].reshape(x.shape)
            point = x0_hat if self.at == "prediction" else x
            potential = log_potential(self.model, state, point)
            tilt = self._ramp(t) * potential
            if not tilt.requires_grad:
                raise ValueError(
                    "the reward has no gradient; a corrector needs one. For a black box take "
                    "TwistedSMC with a LookaheadTwist"
                )
            curved = self.strength != 0.5 and self.laplacian != "none"
            [slope] = torch.autograd.grad(tilt.sum(), x, create_graph=curved)
            curvature = self._curvature(slope, x) if curved else torch.zeros_like(tilt)
        found = {"x0_hat": x0_hat, "tilt": tilt, "slope": slope, "curvature": curvature}
        if self.at == "state":
            found["potential"] = potential
        return {name: value.detach() for name, value in found.items()}

    def _curvature(self, slope: Tensor, x: Tensor) -> Tensor:
        """The Laplacian of the log-factor, or an estimate of it."""
        dims = len(self.base.event_shape)
        if not slope.requires_grad:
            return slope.new_zeros(slope.shape[: slope.dim() - dims]).double()
        exact = self.laplacian == "exact"
        total = torch.zeros(slope.shape[: slope.dim() - dims], dtype=torch.float64)
        probes = _unit_vectors(x, dims) if exact else _signs(x, int(self.laplacian))
        for probe in probes:
            [column] = torch.autograd.grad(slope, x, probe.expand_as(x), retain_graph=True)
            total = total.to(x.device) + self._dot(column, probe.expand_as(x))
        return total if exact else total / int(self.laplacian)

    def _increment(self, before: Mapping[Any, Tensor], after: Mapping[Any, Tensor], t: int) -> Any:
        """What one step adds to the log-weight."""
        of_time = self._of_prediction if self.at == "prediction" else self._of_state
        rate = _over_step(self._clock, t, before["rate"], after["rate"])
        return of_time(before, after, t) + rate

    def _of_prediction(
        self, before: Mapping[Any, Tensor], after: Mapping[Any, Tensor], t: int
    ) -> Tensor:
        """The log-factor's change in time: its change less what the movement explains."""
        start, end = self._signal(t), self._signal(t - 1)
        moved = after["x"] * (start / end) - before["x"]
        explained = self._dot(before["slope"], moved)
        if t > 1:
            arrived = self._dot(after["slope"], moved) * (end / start)
            explained = 0.5 * (explained + arrived)
        change: Tensor = after["tilt"] - before["tilt"] - explained
        return change

    def _of_state(
        self, before: Mapping[Any, Tensor], after: Mapping[Any, Tensor], t: int
    ) -> Tensor:
        """The same where it is known: from the ramp, and from the state's scale."""
        share = self._ramp(t)
        start = self._dot(before["slope"], before["x"])
        end = self._dot(after["slope"], after["x"]) if t > 1 else start
        rise = (self._ramp(t - 1) if t > 1 else 1.0) - share
        widened = math.log(self._signal(t - 1) / self._signal(t))
        plain = 0.5 * (before["potential"] + after["potential"])
        return plain * rise + 0.5 * (start + end) * widened

    def _dot(self, one: Tensor, other: Tensor) -> Tensor:
        dims = tuple(range(-len(self.base.event_shape), 0))
        return (one.double() * other.double()).sum(dims)


def _unit_vectors(x: Tensor, dims: int) -> Any:
    """Each entry of a sample in turn."""
    shape = x.shape[x.dim() - dims :]
    return torch.eye(shape.numel(), dtype=x.dtype, device=x.device).reshape((-1,) + shape)


def _signs(x: Tensor, number: int) -> Any:
    """Random signs, of each sample its own."""
    return (torch.randint(0, 2, x.shape, device=x.device).to(x) * 2 - 1 for _ in range(number))


# Checks


def _check_base(model: Any) -> GaussianDiffusion:
    inner = getattr(model, "model", None)
    if not callable(getattr(model, "terminal", None)) or inner is None:
        raise ValueError(
            f"{type(model).__name__} has no factors on its end to tilt by; wrap it: "
            "RewardCorrector(RewardTilted(model, reward))"
        )
    for name, reward in rewards_of(model):
        if getattr(reward, "differentiable", None) is False:
            raise ValueError(
                f"the reward {name!r} is a black box (differentiable=False), and a corrector needs "
                "the gradient of the whole; take TwistedSMC with a LookaheadTwist"
            )
    while hasattr(inner, "model"):
        inner = inner.model
    if not isinstance(inner, GaussianDiffusion) or isinstance(inner, CombinedModels):
        raise ValueError(
            f"the model inside is a {type(inner).__name__}; give a tilted GaussianDiffusion"
        )
    if inner.schedule.learned_variance is not None:
        raise ValueError("the model has a learned variance; give one with a fixed one")
    return inner


def _check_options(strength: Any, at: str, laplacian: Any, ramp: Any) -> None:
    if not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
        raise ValueError(f"strength={strength!r}; give a number, 0 or more, such as 0.5")
    if ramp is not None and not callable(ramp):
        raise ValueError(f"ramp={ramp!r}; give a function of the time index, or None")
    if at not in get_args(At):
        raise ValueError(f"at={at!r}; choose one of {get_args(At)}")
    counted = isinstance(laplacian, int) and not isinstance(laplacian, bool) and laplacian > 0
    if not counted and laplacian not in get_args(Laplacian):
        raise ValueError(
            f"laplacian={laplacian!r}; choose one of {get_args(Laplacian)}, or a number of probes"
        )
