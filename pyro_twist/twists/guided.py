# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

r"""
Guided proposals: the drift of the reverse process plus the gradient of a potential.

A kernel :math:`N(m, s^2)` becomes :math:`N(m + s^2 \nabla G, s^2)`. The weights get the density
ratio of the two at the noise that was drawn, which is Girsanov's term

.. math::

    -s \nabla G \cdot \xi - \tfrac12 s^2 \lVert \nabla G \rVert^2

at the size of the step, not in a limit: whatever guides, and however well, the weighted particles
sample the tilted law. :func:`guided` is the same without the weights, a model of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, get_args

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_twist.potential import log_potential, rewards_of
from pyro_twist.twists.learned import is_normal, loc_scale
from pyro_twist.twists.tempering import TemperedLookahead, Tempering
from pyro_twist.twists.tilting import tilt
from pyro_twist.twists.twist import Twist
from pyro_twist.wrapper import ModelWrapper

__all__ = ["CFGGuidance", "GradientTwist", "GuidedModel", "GuidedTwist", "guided"]

Through = Literal["denoiser", "prediction"]
Strength = float | Callable[[int], float]
GuidanceFunction = Callable[[Any, int], Tensor]

_PREDICTED = ("x", "x0_hat", "eps_hat", "std_hat")


class GradientTwist(TemperedLookahead):
    r"""
    Look-ahead that also steers: proposals follow the gradient of the look-ahead [1, 2].

    With the log-potential :math:`\ell_t` of the prediction :math:`\hat x_0(x_t)`, temperatures
    :math:`\lambda_t` and a strength :math:`c`, the twist and the tilt of the kernel
    :math:`N(m_t, s_t^2)` to :math:`x_{t-1}` are

    .. math::

        \psi_t(x_t) = \exp(\lambda_t \ell_t(x_t)), \qquad
        \eta_t = c \, \lambda_{t-1} \nabla_{x_t} \ell_t(x_t)

    so that the mean moves by :math:`s_t^2 \eta_t`. Without tempering this is TDS [1], with it DAS
    [2]. A kernel without noise, such as a scheduler's last step, stays as it is, and the gradient
    for it is not computed.

    ``through="denoiser"`` differentiates the denoiser, whose evaluation for the kernel is then made
    with a graph. The graph is used up before anything is resampled. ``through="prediction"``
    differentiates the potential only, keeps no graph, and takes how the prediction moves with the
    state from the noise levels of the state that the step leads to,

    .. math::

        \eta_t = c \, \lambda_{t-1} J_{t-1} \nabla_{\hat x_0} \ell_t, \qquad
        J_t = \frac{\alpha_t v}{\alpha_t^2 v + \sigma_t^2}

    for data of variance :math:`v` in each coordinate. For Gaussian data of that variance and a
    linear reward it is the optimal tilt.

    **Memory.** The look-ahead needs the activations of denoiser, decoder and reward for as many
    samples at once as the smallest ``chunk_size`` among them says, or for one particle of every
    population if that is more; all of them if there is none. With a ``chunk_size`` the activations
    of the denoiser are not kept but computed again chunk by chunk, so that a step costs two forward
    passes and one backward pass of the network, without it one of each. Besides there is one tensor
    of the shape of the state. A network whose parameters need no gradients should be told so, by
    ``requires_grad_(False)``: it keeps less.

    **Counts.** The run counts under ``"gradient"`` the samples for which the denoiser was
    differentiated. Copies after resampling are not spared.

    :param model: A model with a terminal potential that is differentiable in ``x0``; for
        ``through="denoiser"`` it has ``keep_graph``, for ``"prediction"`` a noise ``schedule``, as
        :class:`~pyro_twist.diffusion.GaussianDiffusion` has both.
    :param strength: The factor :math:`c` of the gradient, or a function of the time index ``t`` of
        the state that the step starts from; 0 is plain look-ahead.
    :param str through: ``"denoiser"`` or ``"prediction"``.
    :param tempering: The temperatures: ``None`` for 1 throughout, or as for
        :class:`~pyro_twist.twists.TemperedLookahead`.
    :param float cap: The largest shift of a kernel's mean, as the norm of standard deviations;
        ``None`` for no limit.
    :param float variance: The variance :math:`v` for ``through="prediction"``; images in [-1, 1]
        have about a quarter.
    :param int every: As for :class:`~pyro_twist.twists.LookaheadTwist`; a state that is not looked
        ahead from is not guided from either.
    :param schedule: As for :class:`~pyro_twist.twists.LookaheadTwist`.
    :param float floor: As for :class:`~pyro_twist.twists.LookaheadTwist`. A look-ahead of minus
        infinity has no gradient.
    :param str key: As for :class:`~pyro_twist.twists.LookaheadTwist`.
    :raises ValueError: If no reward is differentiable, the model has no gradient, or an option is
        out of range.

    **References**

    [1] `Practical and Asymptotically Exact Conditional Sampling in Diffusion Models`
        Luhuan Wu, Brian Trippe, Christian Naesseth, David Blei, John Cunningham (2023),
        https://arxiv.org/abs/2306.17775

    [2] `Test-time Alignment of Diffusion Models without Reward Over-optimization`
        Sunwoo Kim, Minkyu Kim, Dongmin Park (2025), https://arxiv.org/abs/2501.05803
    """

    def __init__(
        self,
        model: Any,
        *,
        strength: Strength = 1.0,
        through: Through = "denoiser",
        tempering: Tempering | None = None,
        cap: float | None = None,
        variance: float = 0.25,
        every: int = 1,
        schedule: Collection[int] | None = None,
        floor: float = 3.0,
        key: str = "lookahead",
    ) -> None:
        name = type(self).__name__
        tempering = "constant" if tempering is None else tempering
        super().__init__(
            model, tempering, every=every, schedule=schedule, floor=floor, key=key, completions=None
        )
        _check_continuous(model, name)
        _check_differentiable(model, name)
        _check_through(model, through, variance, name)
        _check_strength(strength, cap)
        self.strength, self.through, self.cap, self.variance = strength, through, cap, variance
        self._num_gradients = 0

    @property
    def counts(self) -> dict[str, int]:
        """Samples for which the denoiser was differentiated so far."""
        return {"gradient": self._num_gradients}

    @property
    def _gradient(self) -> str:
        return f"{self.key}_gradient"

    def state_keys(self) -> tuple[str, ...]:
        """Those of the look-ahead, and the gradient."""
        return (*super().state_keys(), self._gradient)

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The tilted prior at the sites ``x_{T-1}`` to ``x_0``."""
        super().get_posterior(name, prior)
        self.prepare(name)
        if not self._steps_to(name) or not is_normal(prior):
            return prior
        state, t = self.args_kwargs[0][:2]
        gradient = self.gradient(state, int(t))
        if gradient is None:
            return prior
        temperature = _per_sample(self.temperature(state, int(t) - 1), gradient, prior.event_dim)
        return _steered(prior, _at(self.strength, int(t)) * temperature * gradient, self.cap)

    def prepare(self, name: str) -> None:
        """
        Makes the model keep a graph of the next evaluation if its gradient will be wanted.

        :param str name: The site that is about to be drawn.
        """
        now = self.time_after(*self.args_kwargs[0][1:])
        if self.through == "denoiser" and name == f"x_{now}":
            self.model.keep_graph = self._wanted(now)

    def gradient(self, state: Any, t: int) -> Tensor | None:
        """
        The gradient of the look-ahead at a state, without temperature and strength.

        :param dict state: The state.
        :param int t: Its time index.
        :returns: Of the shape of ``state["x"]``; ``None`` where there was no look-ahead.
        :rtype: Tensor
        :raises ValueError: If the evaluation of the denoiser was made without a graph.
        """
        time = state.get(f"{self.key}_time")
        if time is None or int(time.reshape(-1)[0]) != t:
            return None
        found: Tensor | None = state.get(self._gradient)
        if found is None and self._wanted(t):
            raise ValueError(
                f"the prediction at x_{t} has no graph to differentiate: the site was given its "
                "value, or the model ignores keep_graph. Try through='prediction'."
            )
        return found

    def _wanted(self, now: int) -> bool:
        """Whether the step from a state can be guided."""
        looked = now in self.schedule and now >= 1
        return looked and _has_noise(self.model, now) and _at(self.strength, now) != 0

    def _look(self, state: Any, now: int, completed: Tensor | None) -> None:
        state.pop(self._gradient, None)
        super()._look(state, now, completed)

    def _potential_ahead(self, state: Any, now: int, completed: Tensor | None) -> Tensor:
        """The log-potential; its gradient is written to the state."""
        known = self.through == "prediction" or state["x0_hat"].requires_grad
        if not known or not self._wanted(now):
            return super()._potential_ahead(state, now, completed)
        try:
            value, slope = self._value_and_slope(state)
            state[self._gradient] = self._carried(state, now, slope)
        finally:
            self._forget(state)
        return value

    def _value_and_slope(self, state: Any) -> tuple[Tensor, Tensor]:
        """The log-potential of the predictions and its gradient there, a few particles a time."""
        parts = [
            _differentiated(self.model, some, x0_hat)
            for some, x0_hat in _chunks(self.model, state, state["x0_hat"].detach())
        ]
        values, slopes = zip(*parts, strict=True)
        if len(parts) == 1:
            return values[0], slopes[0]
        return torch.cat(values), torch.cat(slopes)

    def _carried(self, state: Any, now: int, slope: Tensor) -> Tensor:
        """From a gradient at the predictions to one at the state."""
        if self.through == "prediction":
            return _response(self.model, now - 1, self.variance) * slope
        x, x0_hat = state["x"], state["x0_hat"]
        self._num_gradients += slope.numel() // max(torch.Size(self.model.event_shape).numel(), 1)
        (gradient,) = torch.autograd.grad(x0_hat, x, slope)
        _check_finite(gradient, f"the gradient through the denoiser at x_{now}")
        return gradient

    def _forget(self, state: Any) -> None:
        """Lets go of the graph."""
        if self.through == "prediction":
            return
        self.model.keep_graph = False
        for name in _PREDICTED:
            if name in state:
                state[name] = state[name].detach()


class CFGGuidance:
    r"""
    Classifier-free guidance as a drift: what a conditional model has beyond an unconditional one.

    With scale :math:`w` a kernel of the conditional model moves to where guidance of that scale
    has it, :math:`m_u + w (m_c - m_u)` for the means of the two models. In the limit of small steps
    that is :math:`\nabla G = (w - 1) (\nabla \log p_c - \nabla \log p_u)`; at any step it is the
    scheduler's own kernel under guidance, as long as nothing is clipped.

    The target is the law of the conditional model, with its rewards: guidance only proposes. To
    have guidance in the target, give the model itself a ``guidance_scale``.

    :param unconditional: A :class:`~pyro_twist.diffusion.GaussianDiffusion` with the same
        scheduler and steps, which is evaluated once more for every particle and step.
    :param scale: The scale :math:`w`, a number or a tensor that broadcasts to the batch shape; 1 is
        no guidance.
    """

    def __init__(self, unconditional: Any, scale: float | Tensor) -> None:
        if not hasattr(unconditional, "schedule"):
            raise ValueError(
                f"unconditional={type(unconditional).__name__} has no noise `schedule`; give a "
                "GaussianDiffusion without the condition"
            )
        self.unconditional, self.scale = unconditional, scale

    @property
    def counts(self) -> dict[str, int]:
        """The evaluations of the unconditional model so far."""
        return dict(self.unconditional.counts)

    def __call__(self, state: Any, t: int) -> Tensor:
        """
        The gradient of :math:`G`, such that a tilt by it is the guided kernel.

        :param dict state: The state of the conditional model.
        :param int t: Its time index.
        :returns: Of the shape of ``state["x"]``.
        """
        schedule, x = self.unconditional.schedule, state["x"]
        found = self.unconditional._predict({"x": x}, t)
        other = {**state, **{name: value.reshape(x.shape) for name, value in found.items()}}
        mean, std = schedule.kernel(t, state)
        away = mean - schedule.kernel(t, other)[0]
        event_dim = len(self.unconditional.event_shape)
        return (_per_sample(self.scale, x, event_dim) - 1) * away / std**2


class GuidedTwist(Twist):
    r"""
    URGE [1]: any guided drift, corrected by Girsanov's term, with a ramped look-ahead as twist.

    Kernels :math:`N(m_t, s_t^2)` are proposed as :math:`N(m_t + c s_t^2 \nabla G(x_t), s_t^2)`. The
    twist is :math:`\psi_t = \exp(\rho_t \ell_t)` with the log-potential :math:`\ell_t` of the
    prediction made from :math:`x_t`. In a step the log-weight grows by

    .. math::

        \rho_{t-1} \ell_{t-1} - \rho_t \ell_t
        - s_t c \nabla G \cdot \xi - \tfrac12 s_t^2 c^2 \lVert \nabla G \rVert^2

    which is exact at any step size. The ramp that is 0 at the start is the paper's
    :math:`r(x, 0) = 0`; where it is not, the first weights have the factor :math:`\psi_T`.

    :param model: The model; with a terminal potential unless there is neither a ramp nor guidance
        by the reward.
    :param guidance: The drift: ``"reward"``, the gradient of :math:`\rho_t \ell_t` at :math:`x_t`
        through the denoiser; ``"prediction"``, the same without, see
        :class:`GradientTwist`; a :class:`CFGGuidance`; or a function ``guidance(state, t)`` that
        returns :math:`\nabla G` at ``state["x"]``, of its shape. A function with a ``counts``
        has it added to the run's. Nothing is called for a kernel without noise.
    :param ramp: The ramp :math:`\rho_t`: ``"linear"``, from 0 at :math:`x_T`; ``"constant"``, 1;
        what else :func:`~pyro_twist.twists.tempering.temperatures` takes, such as a function of the
        time index; or ``None`` for no twist, the guidance being that of 1.
    :param strength: The factor :math:`c`, or a function of the time index.
    :param float cap: As for :class:`GradientTwist`.
    :param float variance: As for :class:`GradientTwist`, for ``"prediction"``.
    :param int every: As for :class:`~pyro_twist.twists.LookaheadTwist`; does not bear on other
        guidance than by the reward.
    :param schedule: As for :class:`~pyro_twist.twists.LookaheadTwist`.
    :param float floor: As for :class:`~pyro_twist.twists.LookaheadTwist`.
    :param str key: As for :class:`~pyro_twist.twists.LookaheadTwist`.
    :raises ValueError: If the model lacks what is asked for, or an option is out of range.

    **References**

    [1] `URGE: Unbiased Resampling via Girsanov Estimation`
        C. Wang, W. Wang, Y. Ren, J. Blanchet, Y. Lu (2026), https://arxiv.org/abs/2605.17850
    """

    def __init__(
        self,
        model: Any,
        guidance: str | CFGGuidance | GuidanceFunction = "reward",
        *,
        ramp: Tempering | None = "linear",
        strength: Strength = 1.0,
        cap: float | None = None,
        variance: float = 0.25,
        every: int = 1,
        schedule: Collection[int] | None = None,
        floor: float = 3.0,
        key: str = "lookahead",
    ) -> None:
        super().__init__(model)
        _check_guidance(guidance, model)
        _check_strength(strength, cap)
        self.guidance, self.ramp, self.strength, self.cap = guidance, ramp, strength, cap
        options: dict[str, Any] = {"every": every, "schedule": schedule, "floor": floor, "key": key}
        self.look: TemperedLookahead | None = None
        if isinstance(guidance, str):
            through: Any = "denoiser" if guidance == "reward" else guidance
            self.look = GradientTwist(
                model,
                strength=strength,
                through=through,
                tempering=ramp,
                variance=variance,
                **options,
            )
        elif ramp is not None:
            self.look = TemperedLookahead(model, ramp, **options)

    @property
    def counts(self) -> dict[str, int]:
        """What the guidance has evaluated so far."""
        return dict(getattr(self._source(), "counts", {}))

    def _source(self) -> Any:
        return self.look if isinstance(self.guidance, str) else self.guidance

    def state_keys(self) -> tuple[str, ...]:
        """Those of the look-ahead."""
        return () if self.look is None else self.look.state_keys()

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The guided kernel at the sites ``x_{T-1}`` to ``x_0``."""
        args = self.args_kwargs[0]
        # read before an adaptive ramp moves on: the drift is that of where the step starts
        start = self._temperature(args) if self.stepping and len(args) > 1 else 0.0
        if self.look is not None:
            self._ask(name, prior)
        now = self.time_after(*args[1:])
        if not self.stepping or name != f"x_{now}" or not is_normal(prior):
            return prior
        eta = self._drift(args[0], now + 1, start, prior.event_dim)
        return prior if eta is None else _steered(prior, eta, self.cap)

    def _temperature(self, args: Any) -> Any:
        if self.look is None or self.ramp is None:
            return 1.0
        return self.look.temperature(args[0], int(args[1]))

    def _ask(self, name: str, prior: Any) -> None:
        """Lets the look-ahead see the site, and leaves its proposal."""
        assert self.look is not None
        self.look.stepping, self.look.args_kwargs = self.stepping, self.args_kwargs
        try:
            TemperedLookahead.get_posterior(self.look, name, prior)
            if isinstance(self.look, GradientTwist):
                self.look.prepare(name)
        finally:
            del self.look.args_kwargs

    def _drift(self, state: Any, t: int, start: Any, event_dim: int) -> Tensor | None:
        """The tilt of the kernel from ``x_t``, without the cap."""
        strength = _at(self.strength, t)
        if strength == 0:
            return None
        if isinstance(self.look, GradientTwist):
            gradient = self.look.gradient(state, t)
            return (
                None
                if gradient is None
                else strength * _per_sample(start, gradient, event_dim) * gradient
            )
        assert callable(self.guidance)
        gradient = self.guidance(state, t)
        _check_given(gradient, state["x"], t)
        return strength * gradient

    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`~pyro_twist.twists.Twist.log_twist`."""
        if self.look is None:
            return 0.0
        self.look.stepping = self.stepping
        value = self.look.log_twist(state, t, *args, **kwargs)
        return 0.0 if self.ramp is None else value


class GuidedModel(ModelWrapper):
    """
    A model whose own kernels are those that a twist proposes; see :func:`guided`.

    :param model: The model.
    :param Twist twist: A twist of it.
    """

    def __init__(self, model: Any, twist: Twist) -> None:
        super().__init__(model)
        self.twist = twist

    @property
    def counts(self) -> dict[str, int]:
        """Evaluations of the model and of the guidance."""
        counts = super().counts
        for name, number in getattr(self.twist, "counts", {}).items():
            counts[name] = counts.get(name, 0) + number
        return counts

    def init(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """Runs the model's ``init`` and looks ahead for the first step."""
        self._run("init", state, args, kwargs)
        self.twist.log_twist(state, *args, **kwargs)

    def step(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """Runs the model's ``step`` with the tilted kernel and looks ahead for the next."""
        self._run("step", state, args, kwargs)
        if args[0] != self.timesteps[-1]:
            self.twist.log_twist(state, *args, **kwargs)

    def kernel(self, state: Any, t: int) -> Any:
        """The tilted kernel at a state."""
        self.twist.stepping, self.twist.args_kwargs = True, ((state, t), {})
        try:
            return self.twist.get_posterior(f"x_{t - 1}", self.model.kernel(state, t))
        finally:
            del self.twist.args_kwargs

    def _run(self, method: str, state: Any, args: Any, kwargs: Any) -> None:
        self.twist.stepping, self.twist.args_kwargs = method == "step", ((state, *args), kwargs)
        try:
            with _Tilting(self.twist):
                getattr(self.model, method)(state, *args, **kwargs)
        finally:
            del self.twist.args_kwargs


class _Tilting(Messenger):
    """Replaces the law of latent sites by the proposal of a twist."""

    def __init__(self, twist: Twist) -> None:
        super().__init__()
        self.twist = twist

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg) and msg["value"] is None:
            tilted = self.twist.get_posterior(msg["name"], msg["fn"])
            same = tilted.batch_shape == msg["fn"].batch_shape
            msg["fn"] = tilted if same else tilted.expand(msg["fn"].batch_shape)


def guided(model: Any, twist: Twist) -> GuidedModel:
    """
    Pure guidance: a model whose own kernels are the tilted ones.

    Its law is not that of the model: nothing corrects the guidance. Feynman-Kac steering on it,
    ``TwistedSMC(guided(model, twist), LookaheadTwist(model, key="fk"), ...)``, is what the
    literature calls gradient-guided FK, whose particles have the factors of the look-ahead and no
    density ratio. It samples ``guided_law(x_0) exp(reward)``, not ``base_law(x_0) exp(reward)``:
    the reward counts twice, once in the drift. ``TwistedSMC(model, twist, ...)`` is the corrected
    sampler with the same proposals.

    :param model: The model that the twist was made for.
    :param Twist twist: A twist, such as :class:`GradientTwist` or :class:`GuidedTwist`. Its
        log-twist is evaluated, for the gradients that it leaves in the state, and not used; give
        another look-ahead another ``key``.
    :returns: The model, which can be run, and inferred with, like any other.
    :rtype: GuidedModel
    """
    return GuidedModel(model, twist)


# shared pieces


def _at(strength: Strength, t: int) -> float:
    value = strength(t) if callable(strength) else strength
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"strength({t}) is {value!r}; return a finite number")
    return float(value)


def _per_sample(value: Any, like: Tensor, event_dim: int) -> Any:
    """A number per sample, ready to be multiplied with events."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.reshape(value.shape + (1,) * event_dim).to(like)


def _steered(prior: Any, eta: Tensor, cap: float | None) -> Any:
    """The prior with its mean moved by the variance times ``eta``, and by no more than the cap."""
    loc, scale = loc_scale(prior)
    eta = eta.to(loc)
    if cap is not None:
        rest = prior.event_dim
        shift = (scale * eta).double()
        norm = (shift.flatten(-rest) if rest else shift[..., None]).norm(dim=-1)
        shrink = (cap / norm.clamp(min=1e-300)).clamp(max=1.0)
        eta = eta * _per_sample(shrink, eta, rest)
    return tilt(prior, eta)


def _has_noise(model: Any, t: int) -> bool:
    """Whether the kernel from ``x_t`` has noise, as far as the model says so beforehand."""
    schedule = getattr(model, "schedule", None)
    return schedule is None or getattr(schedule[t], "std", 1.0) != 0


def _response(model: Any, t: int, variance: float) -> float:
    """How a prediction moves with the state, for data of a variance in each coordinate."""
    alpha, sigma = (model.schedule[t].alpha, model.schedule[t].sigma) if t > 0 else (1.0, 0.0)
    return alpha * variance / (alpha**2 * variance + sigma**2)


def _chunk_size(model: Any) -> int | None:
    """The smallest chunk of denoiser, decoder and rewards."""
    parts = [getattr(model, "denoiser", None), *(reward for _, reward in rewards_of(model))]
    sizes = [getattr(part, "chunk_size", None) for part in parts]
    return min((size for size in sizes if size is not None), default=None)


def _chunks(model: Any, state: Any, x0: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """The state and the predictions of a few particles at a time."""
    size, event_shape = _chunk_size(model), torch.Size(model.event_shape)
    batch_shape = x0.shape[: x0.dim() - len(event_shape)]
    if size is None or not batch_shape or batch_shape.numel() <= size:
        yield state, x0
        return
    number = max(1, size // max(batch_shape[1:].numel(), 1))
    for start in range(0, len(x0), number):
        part = slice(start, start + number)
        yield {name: value[part] for name, value in state.items()}, x0[part]


def _differentiated(model: Any, state: Any, x0: Tensor) -> tuple[Tensor, Tensor]:
    """The log-potential and its gradient at ``x0``, which is 0 where the potential is 0."""
    with torch.enable_grad():
        x0 = x0.detach().requires_grad_()
        value = log_potential(model, state, x0)
        if not value.requires_grad:
            raise ValueError(
                "the reward has no gradient at the prediction: it is computed outside of torch, "
                "detached, or rounds. Use LookaheadTwist or SurrogateTwist, which need none."
            )
        possible = value.detach() != -math.inf
        (slope,) = torch.autograd.grad(torch.where(possible, value, 0.0).sum(), x0)
    shape = possible.shape + (1,) * (x0.dim() - possible.dim())
    slope = torch.where(possible.reshape(shape), slope, 0.0)
    _check_finite(slope, "the gradient of the reward")
    return value.detach(), slope


def _check_finite(gradient: Tensor, what: str) -> None:
    finite = torch.isfinite(gradient)
    if not finite.all():
        place = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{what} is {float(gradient[tuple(place)])} at {place}, although the reward is finite "
            "there. Clamp what the reward divides by or takes roots of, or use LookaheadTwist."
        )


def _check_given(gradient: Any, x: Tensor, t: int) -> None:
    shape = tuple(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
    if shape != tuple(x.shape):
        raise ValueError(
            f"guidance(state, {t}) returned {shape}; return a tensor of the shape of state['x'], "
            f"{tuple(x.shape)}"
        )
    if not torch.isfinite(gradient).all():
        raise ValueError(f"guidance(state, {t}) is not finite; clamp it")


def _check_guidance(guidance: Any, model: Any) -> None:
    if isinstance(guidance, CFGGuidance):
        _check_same_steps(model, guidance.unconditional)
    elif not callable(guidance) and guidance not in ("reward", "prediction"):
        raise ValueError(
            f"guidance={guidance!r}; give 'reward', 'prediction', a CFGGuidance, or a function "
            "guidance(state, t) that returns the gradient of G at state['x']"
        )


def _check_same_steps(model: Any, other: Any) -> None:
    schedules = [getattr(one, "schedule", None) for one in (model, other)]
    kinds = [None if s is None else [(k.alpha, k.sigma, k.std) for k in s.steps] for s in schedules]
    if kinds[0] is None or kinds[0] != kinds[1]:
        raise ValueError(
            f"{type(model).__name__} and the unconditional {type(other).__name__} have different "
            "noise levels; make both with the same scheduler, num_inference_steps and eta"
        )


def _check_continuous(model: Any, name: str) -> None:
    if hasattr(model, "complete"):
        raise ValueError(
            f"{name} is for states with a gradient; the tokens of {type(model).__name__} have "
            "none. Use GradientTokenTwist with a reward of token probabilities, or TokenTilt."
        )


def _check_differentiable(model: Any, name: str) -> None:
    found = list(rewards_of(model))
    if found and all(getattr(one, "differentiable", None) is False for _, one in found):
        told = ", ".join(repr(str(getattr(one, "name", key))) for key, one in found)
        raise ValueError(
            f"{name} needs the gradient of the reward, but {told} is a black box "
            "(differentiable=False). Use LookaheadTwist, or SurrogateTwist, which learns a "
            "direction from values; or give a reward that is differentiable."
        )


def _check_through(model: Any, through: Any, variance: float, name: str) -> None:
    if through not in get_args(Through):
        raise ValueError(f"through={through!r}; choose one of {get_args(Through)}")
    if not 0 < variance < math.inf:
        raise ValueError(f"variance={variance}; give the variance of the data, a positive number")
    needed = "keep_graph" if through == "denoiser" else "schedule"
    if not hasattr(model, needed) or not hasattr(model, "event_shape"):
        raise ValueError(
            f"{name} with through={through!r} needs a model with `{needed}` and `event_shape`, "
            f"which {type(model).__name__} is not. Try the other way through, or LookaheadTwist."
        )


def _check_strength(strength: Any, cap: Any) -> None:
    number = isinstance(strength, (int, float)) and math.isfinite(strength)
    if not number and not callable(strength):
        raise ValueError(f"strength={strength!r}; give a number, or a function of the time index")
    if cap is not None and not (isinstance(cap, (int, float)) and 0 < cap < math.inf):
        raise ValueError(f"cap={cap!r}; give a positive number of standard deviations, or None")
