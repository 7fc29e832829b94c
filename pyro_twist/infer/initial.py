# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Initial particles where the twist is: Metropolis-Hastings moves before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_twist.infer.increments import _increment, latent_sites, sample_sites
from pyro_twist.infer.particles import ParticleState, take_ancestors
from pyro_twist.infer.twistedsmc import TwistedSMC
from pyro_twist.twists.guided import GradientTwist, GuidedTwist
from pyro_twist.twists.learned import is_normal, loc_scale
from pyro_twist.twists.lookahead import LookaheadTwist, _below
from pyro_twist.twists.tempering import TemperedLookahead
from pyro_twist.twists.twist import SumTwist

__all__ = ["InitialKernel", "PsiSampler"]

InitialKernel = Literal["pcnl", "mala", "pcn"]

# acceptance that a pilot aims at
_TARGETS = {"pcnl": 0.574, "mala": 0.574, "pcn": 0.3}
_LARGEST = 4.0


@dataclass(frozen=True)
class _Cloud:
    """Particles at the initial state, with what moves need to know of them."""

    z: Tensor
    state: dict[Any, Any]
    log_twist: Tensor
    log_target: Tensor
    slope: Tensor | None

    def chosen(self, other: _Cloud, mask: Tensor, axis: int) -> _Cloud:
        """The other cloud's particles where the mask says so."""

        def pick(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(_spread(mask, old.dim(), axis), new, old)

        return _Cloud(
            pick(other.z, self.z),
            {key: pick(other.state[key], value) for key, value in self.state.items()},
            pick(other.log_twist, self.log_twist),
            pick(other.log_target, self.log_target),
            None if self.slope is None or other.slope is None else pick(other.slope, self.slope),
        )

    def taken(self, index: Tensor, axis: int) -> _Cloud:
        """The ancestors."""
        return _Cloud(
            take_ancestors(self.z, index, axis),
            {key: take_ancestors(value, index, axis) for key, value in self.state.items()},
            take_ancestors(self.log_twist, index),
            take_ancestors(self.log_target, index),
            None if self.slope is None else take_ancestors(self.slope, index, axis),
        )


class PsiSampler(TwistedSMC):
    r"""
    Twisted SMC that starts from particles of the law :math:`\mu(x_T) \psi_T(x_T)` [1].

    The initial particles are resampled by :math:`\psi_T`, whatever the ESS threshold, and then make
    ``num_moves`` Metropolis-Hastings moves, each by itself, that leave
    :math:`\mu(x_T) \psi_T(x_T)` invariant. This is the law of the resampled particles already, so
    that neither the law of the result nor the mean of its normaliser depends on how many moves
    there are, or how good. Moves separate copies, and go where the twist is. From then on it is
    :class:`~pyro_twist.infer.TwistedSMC`.

    With :math:`z` standard normal under :math:`\mu`, :math:`\ell = \log \psi_T`, a step size
    :math:`\epsilon`, :math:`\rho = (1 - \epsilon/4) / (1 + \epsilon/4)` and noise :math:`\xi` the
    proposals are [2]

    ============  ======================================================================
    ``"pcnl"``    :math:`\rho z + \sqrt{1 - \rho^2} (\xi + \tfrac{\sqrt\epsilon}{2}
                  \nabla \ell(z))`
    ``"pcn"``     :math:`\rho z + \sqrt{1 - \rho^2} \, \xi`, which takes no gradient
    ``"mala"``    :math:`z + \tfrac\epsilon2 (\nabla \ell(z) - z) + \sqrt\epsilon \, \xi`
    ============  ======================================================================

    The first two are accepted always where :math:`\psi_T` is constant, in any dimension.

    Each move evaluates denoiser and reward once for every particle; the run counts them. With one
    particle nothing is resampled, and moves only add to the spread of the normaliser. In the
    record the initial particles are those after the moves, and their own ancestors.

    :param model: A model whose :math:`x_T` is normal.
    :param guide: A twist with a value at :math:`x_T`; for ``"pcnl"`` and ``"mala"`` a
        :class:`~pyro_twist.twists.GradientTwist`, a
        :class:`~pyro_twist.twists.GuidedTwist` by the reward, or a sum with one. At
        :math:`x_T` its value must be a function of the particle alone: look-aheads of minus
        infinity, which count as something below the best particle, are refused.
    :param int num_particles: As for :class:`~pyro_twist.infer.TwistedSMC`.
    :param int max_plate_nesting: As for :class:`~pyro_twist.infer.TwistedSMC`.
    :param int num_moves: How many moves each particle makes.
    :param str kernel: ``"pcnl"``, ``"mala"`` or ``"pcn"``.
    :param step_size: The step size :math:`\epsilon`, or a pair: then every move of every particle
        draws its own between them, uniform in its logarithm. At most 4.
    :param int pilot: How many moves of a second population, drawn for this, to fit the step size
        on before, starting from ``step_size``. They cost as much as other moves. To fit it on the
        moves of the particles themselves would make the step depend on where they are.
    :param options: As for :class:`~pyro_twist.infer.TwistedSMC`.
    :raises ValueError: If the guide has no value or gradient at :math:`x_T`, or an option is out of
        range.

    **References**

    [1] `Psi-Sampler: Initial Particle Sampling for SMC-Based Inference-Time Reward Alignment ...`
        Taehoon Yoon, Yunhong Min, Kyeongmin Yeo, Minhyuk Sung (2025),
        https://arxiv.org/abs/2506.01320

    [2] `MCMC Methods for Functions: Modifying Old Algorithms to Make Them Faster`
        Simon Cotter, Gareth Roberts, Andrew Stuart, David White (2013), Statistical Science 28,
        424-446
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        num_particles: int,
        max_plate_nesting: int = 0,
        *,
        num_moves: int = 10,
        kernel: InitialKernel = "pcnl",
        step_size: float | tuple[float, float] = 0.5,
        pilot: int = 0,
        **options: Any,
    ) -> None:
        _check_moves(num_moves=num_moves, pilot=pilot)
        _check_kernel(guide, kernel)
        super().__init__(model, guide, num_particles, max_plate_nesting, **options)
        self.num_moves, self.kernel, self.pilot = num_moves, kernel, pilot
        self.step_size = _checked_sizes(step_size)

    def _reset(self) -> None:
        super()._reset()
        self._fitted: tuple[float, float] | None = None
        self._accepted: list[float] = []
        self._given: dict[str, Tensor] = {}

    @property
    def acceptance(self) -> tuple[float, ...]:
        """The mean probability that a move was accepted, for each of the moves."""
        return tuple(self._accepted)

    @property
    def fitted_step_size(self) -> tuple[float, float]:
        """The least and largest step size in use, fitted by a pilot if there was one."""
        return self._fitted or self.step_size

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`~pyro_twist.infer.TwistedSMC.state_dict`; with what the moves were."""
        moves = {"accepted": list(self._accepted), "fitted": self._fitted}
        return {**super().state_dict(), "initial_moves": moves}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """See :meth:`~pyro_twist.infer.TwistedSMC.load_state_dict`."""
        super().load_state_dict(saved)
        moves = saved.get("initial_moves", {})
        self._accepted = list(moves.get("accepted", []))
        self._fitted = moves.get("fitted")

    # hooks of the engine

    def _observe(
        self, trace: poutine.Trace, before: dict[Any, Any], args: Any, kwargs: Any
    ) -> None:
        super()._observe(trace, before, args, kwargs)
        if self._num_steps < 0:
            self._init_call = (args, kwargs)
            self._given = {n: s["value"] for n, s in latent_sites(trace, given=True)}
            self._set_prior(trace)
            self._log_factors = self._factors(trace)

    def _set_prior(self, trace: poutine.Trace) -> None:
        """Learns the law of the initial state."""
        site: Any = trace.nodes.get(self._site)
        prior: Any = None if site is None else site["infer"].get("prior", site["fn"])
        if prior is None or not is_normal(prior) or self._site not in self._given:
            raise ValueError(
                f"{type(self).__name__} moves a normal latent {self._site!r}, which "
                f"{type(self.model).__name__} does not draw. Use TwistedSMC."
            )
        self._prior, self._event_dim = loc_scale(prior), prior.event_dim

    @property
    def _site(self) -> str:
        return f"x_{self._timesteps()[0]}"

    def _maybe_resample(self, ess: Tensor, allowed: bool) -> tuple[Tensor | None, Tensor]:
        if self._num_steps >= 0:
            return super()._maybe_resample(ess, allowed)
        if self._log_twist is None:
            raise ValueError(
                f"the twist has no value at {self._site}, so the initial law is the model's own; "
                "use TwistedSMC, or a twist that looks ahead from there"
            )
        if self.num_moves:
            self._refuse_floored()
        threshold, self.ess_threshold = self.ess_threshold, 1.0
        try:
            index, chosen = super()._maybe_resample(ess, allowed)
        finally:
            self.ess_threshold = threshold
        self._move_initial(index)
        return None, chosen

    # moves

    def _move_initial(self, index: Tensor | None) -> None:
        """Moves the particles, which have been resampled."""
        if index is not None:
            self._follow_given(index)
        if self.num_moves and self.pilot:
            self._fitted = self._fit()
        if self.num_moves:
            cloud = self._cloud(self._log_factors)
            for _ in range(self.num_moves):
                cloud, rate = self._moved(cloud, self.fitted_step_size)
                self._accepted.append(float(rate.mean()))
            self._adopt(cloud)
        if self.history == "paths":
            self._record._pending = dict(self._given)
        self._given = {}

    def _follow_given(self, index: Tensor) -> None:
        axis = self.state.population_axis
        self._given = {k: take_ancestors(v, index, axis) for k, v in self._given.items()}
        self._log_factors = take_ancestors(self._log_factors, index)
        shape = self._given[self._site].shape
        loc, scale = (value.expand(shape) for value in self._prior)
        self._prior = (take_ancestors(loc, index, axis), take_ancestors(scale, index, axis))

    def _adopt(self, cloud: _Cloud) -> None:
        """Makes a cloud the particles."""
        self.state.update(cloud.state)
        self._log_twist = cloud.log_twist
        self._given[self._site] = cloud.state["x"]

    def _fit(self) -> tuple[float, float]:
        """The step size that a pilot population accepts at the usual rate."""
        if len(self._given) > 1:
            raise ValueError(
                f"pilot={self.pilot} is for models that draw nothing in init but {self._site}; "
                "give a pair of step sizes instead"
            )
        loc, scale = self._prior
        noise = torch.randn_like(self._given[self._site])
        cloud = self._evaluated(loc + scale * noise)
        cloud = cloud.taken(_drawn(cloud.log_target), self.state.population_axis)
        low, high = self.step_size
        for _ in range(self.pilot):
            cloud, rate = self._moved(cloud, (low, high))
            factor = math.exp(float(rate.mean()) - _TARGETS[self.kernel])
            factor = min(factor, _LARGEST / high)
            low, high = low * factor, high * factor
        return low, high

    def _evaluated(self, x: Tensor) -> _Cloud:
        """Initial particles at given places: denoiser, look-ahead and gradient."""
        outer, log_twist = self.state, self._log_twist
        self.state = ParticleState(self.num_particles)
        self.state.population_axis = outer.population_axis
        try:
            log_factors = self._initialised(x)
            self._log_twist = self._look_ahead("init", *self._init_call)
            self._refuse_floored()
            return self._cloud(log_factors)
        finally:
            self.state, self._log_twist = outer, log_twist

    def _cloud(self, log_factors: Tensor) -> _Cloud:
        """The present particles."""
        loc, scale = (value.double() for value in self._prior)
        assert self._log_twist is not None
        return _Cloud(
            (self.state["x"].double() - loc) / scale,
            dict(self.state),
            self._log_twist,
            log_factors + self._log_twist,
            None if self.kernel == "pcn" else self._slope(self.state),
        )

    def _initialised(self, x: Tensor) -> Tensor:
        """Runs the model's ``init`` with given values; returns :meth:`_factors`."""
        args, kwargs = self._init_call
        values = {**self._given, self._site: x}
        for part in _gradient_parts(self.guide):
            part.stepping, part.args_kwargs = False, ((self.state, *args), kwargs)
            part.prepare(self._site)
            del part.args_kwargs
        with (
            poutine.block(),
            poutine.trace() as tracer,
            self.particle_plate,
            poutine.condition(data=values),
        ):
            self.model.init(self.state, *args, **kwargs)
        return self._factors(tracer.trace)

    def _factors(self, trace: poutine.Trace) -> Tensor:
        """The log-probability of all sites of the model's ``init`` but the state's own."""
        shape, device = self._reducer.shape, self._reducer.device
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        for name, site in sample_sites(trace):
            infer = site["infer"]
            if name == self._site or infer.get("_deterministic") or infer.get("_from_guide"):
                continue
            law = infer.get("prior", site["fn"])
            value = scale_and_mask(law.log_prob(site["value"]), site["scale"], site["mask"])
            total = total + self._reducer(_increment(name, site, value)).value
        return total

    def _slope(self, state: Any) -> Tensor:
        """The gradient of the log-twist in standard coordinates."""
        t, total = self._timesteps()[0], None
        for part in _gradient_parts(self.guide):
            gradient = part.gradient(state, t)
            if gradient is not None:
                scale = torch.as_tensor(part.temperature(state, t), device=gradient.device)
                term = scale.reshape(scale.shape + (1,) * self._event_dim * (scale.dim() > 0))
                total = term * gradient if total is None else total + term * gradient
        if total is None:
            raise ValueError(
                f"the guide has no gradient at {self._site}, which kernel={self.kernel!r} needs. "
                "Give it a strength other than 0 there, or use kernel='pcn'."
            )
        return self._prior[1].double() * total.double()

    def _refuse_floored(self) -> None:
        for part in _lookahead_parts(self.guide):
            value = self.state.get(part.key)
            if value is not None and (value == _below(value.amax(0), part.floor)).any():
                raise ValueError(
                    f"a look-ahead from {self._site} is minus infinity. Its value then depends on "
                    "the other particles, and moves would not leave the law invariant. Soften the "
                    "constraint, or use TwistedSMC."
                )

    def _moved(self, cloud: _Cloud, sizes: tuple[float, float]) -> tuple[_Cloud, Tensor]:
        """One move of each particle, and the probabilities that it was accepted."""
        axis = self.state.population_axis
        low, high = (math.log(size) for size in sizes)
        like = cloud.log_target
        size = (low + (high - low) * torch.rand_like(like)).exp() if high > low else None
        size = torch.full_like(like, sizes[0]) if size is None else size
        propose = _PROPOSALS[self.kernel]
        z, correction = propose(cloud, _spread(size, cloud.z.dim(), axis))
        loc, scale = (value.double() for value in self._prior)
        dtype = cloud.state["x"].dtype
        other = self._evaluated((loc + scale * z).to(dtype))
        change = self._summed(correction(other)) + other.log_target - cloud.log_target
        accepted = torch.rand_like(change).log() < change
        return cloud.chosen(other, accepted, axis), change.clamp(max=0.0).exp()

    def _summed(self, value: Tensor) -> Tensor:
        """Over the event and all plates but that of the populations."""
        rows = value.flatten(-self._event_dim).sum(-1) if self._event_dim else value
        return self._reducer._reduce(self._site, rows)


Correction = Callable[[_Cloud], Tensor]


def _pcn(cloud: _Cloud, size: Tensor) -> tuple[Tensor, Correction]:
    rho, spread = _rotation(size)
    z = rho * cloud.z + spread * torch.randn_like(cloud.z)
    return z, lambda other: torch.zeros_like(other.z)


def _pcnl(cloud: _Cloud, size: Tensor) -> tuple[Tensor, Correction]:
    """
    The correction is that of the drift alone: without it the move is a rotation of the state and
    the noise, which leaves their joint density as it is.
    """
    assert cloud.slope is not None
    (rho, spread), half, slope = _rotation(size), size.sqrt() / 2, cloud.slope
    total = torch.randn_like(cloud.z) + half * slope
    z = rho * cloud.z + spread * total

    def correction(other: _Cloud) -> Tensor:
        assert other.slope is not None
        back = (cloud.z - rho * other.z) / spread
        shifts = half * (other.slope * back - slope * total)
        return shifts - half.square() / 2 * (other.slope.square() - slope.square())

    return z, correction


def _mala(cloud: _Cloud, size: Tensor) -> tuple[Tensor, Correction]:
    assert cloud.slope is not None
    noise, slope = torch.randn_like(cloud.z), cloud.slope
    z = cloud.z + size / 2 * (slope - cloud.z) + size.sqrt() * noise

    def correction(other: _Cloud) -> Tensor:
        assert other.slope is not None
        back = (cloud.z - other.z - size / 2 * (other.slope - other.z)) / size.sqrt()
        # differences of squares, term by term
        law = (cloud.z - other.z) * (cloud.z + other.z)
        return (law + (noise - back) * (noise + back)) / 2

    return z, correction


_PROPOSALS = {"pcnl": _pcnl, "pcn": _pcn, "mala": _mala}


def _rotation(size: Tensor) -> tuple[Tensor, Tensor]:
    rho = (1 - size / 4) / (1 + size / 4)
    return rho, (1 - rho.square()).sqrt()


def _spread(value: Tensor, dims: int, axis: int) -> Tensor:
    """A tensor of the shape of the weights, broadcastable to entries of the state."""
    if value.dim() == dims:
        return value
    shape = [1] * dims
    shape[0] = value.shape[0]
    if value.dim() == 2:
        shape[axis] = value.shape[1]
    return value.reshape(shape)


def _drawn(log_weights: Tensor) -> Tensor:
    """Ancestors of the pilot, independent draws in every population."""
    probs = (log_weights - log_weights.amax(0)).exp()
    columns = probs.reshape(len(probs), -1).T
    index = torch.multinomial(columns, len(probs), replacement=True).T
    return index.reshape(probs.shape)


def _parts(guide: Any) -> Iterator[Any]:
    """The twists that a guide is made of."""
    if isinstance(guide, SumTwist):
        for part in guide.parts():
            yield from _parts(part)
    elif isinstance(guide, GuidedTwist):
        yield from () if guide.look is None or guide.ramp is None else (guide.look,)
    else:
        yield guide


def _gradient_parts(guide: Any) -> list[GradientTwist]:
    return [part for part in _parts(guide) if isinstance(part, GradientTwist)]


def _lookahead_parts(guide: Any) -> list[LookaheadTwist]:
    return [part for part in _parts(guide) if isinstance(part, LookaheadTwist)]


def _check_kernel(guide: Any, kernel: Any) -> None:
    if kernel not in get_args(InitialKernel):
        raise ValueError(f"kernel={kernel!r}; choose one of {get_args(InitialKernel)}")
    if not callable(getattr(guide, "log_twist", None)):
        raise ValueError(
            f"the guide {type(guide).__name__} has no `log_twist`; give a twist that looks ahead"
        )
    if kernel != "pcn" and not _gradient_parts(guide):
        raise ValueError(
            f"kernel={kernel!r} follows the gradient of the twist, which {type(guide).__name__} "
            "does not have. Use a GradientTwist, or kernel='pcn'."
        )
    looks = [part for part in _parts(guide) if isinstance(part, TemperedLookahead)]
    for look in looks:
        if look.adaptive is not None or look.temperatures[-1] == 0:
            raise ValueError(
                f"the temperature of {type(look).__name__} is 0 at the initial state, so that the "
                "initial law is the model's own. Give it another there: tempering=None, "
                "ramp='constant', or a sequence."
            )


def _check_moves(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}={value!r}; give a whole number of moves, 0 or more")


def _checked_sizes(step_size: Any) -> tuple[float, float]:
    sizes = step_size if isinstance(step_size, (tuple, list)) else (step_size, step_size)
    numbers = len(sizes) == 2 and all(isinstance(one, (int, float)) for one in sizes)
    if not numbers or not 0 < sizes[0] <= sizes[1] <= _LARGEST:
        raise ValueError(
            f"step_size={step_size!r}; give a positive number of at most {_LARGEST}, or a pair of "
            "them, the smaller first"
        )
    return float(sizes[0]), float(sizes[1])
