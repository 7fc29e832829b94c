# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Twisted sequential Monte Carlo with the interface of Pyro's ``SMCFilter``."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.smcfilter import SMCFailed, SMCFilter
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.runtime import _PYRO_STACK, get_plates

from pyro_twist import weights
from pyro_twist.infer.increments import (
    Increment,
    LogProbReducer,
    effect_increments,
    explicit_increments,
    sample_sites,
)
from pyro_twist.infer.particles import ParticleState, take_ancestors
from pyro_twist.infer.randomness import RandomStream
from pyro_twist.infer.record import Record
from pyro_twist.infer.resampling import get_resampling
from pyro_twist.infer.result import SMCResult
from pyro_twist.twists.twist import Twist

__all__ = ["History", "SMCFailed", "TwistedSMC"]

History = Literal["off", "ancestors", "paths"]


class TwistedSMC(SMCFilter):
    """
    Sequential Monte Carlo whose guide may look ahead; a drop-in for
    :class:`~pyro.infer.smcfilter.SMCFilter`.

    After every step the twisted log-weight of a particle has grown by [1]

    .. math::

        \\log p(x_{t-1} \\mid x_t) - \\log q(x_{t-1} \\mid x_t) + \\log g
        + \\log \\psi_{t-1}(x_{t-1}) - \\log \\psi_t(x_t)

    where :math:`q` is the guide's proposal, :math:`g` the product of the model's factors and
    observations, and :math:`\\psi` the guide's twist, 1 after the last step. Effective sample size
    and resampling use these weights; :attr:`log_weights` and :meth:`get_log_normalizer` have the
    twist divided out and are right at any step, for any twist.

    The guide is one of

    - ``None``: the model's own kernels (the bootstrap filter);
    - an effect-based guide, such as a :class:`~pyro_twist.twists.Twist` or any
      :class:`~pyro.poutine.guide.GuideMessenger`: the model runs once, its sites are tilted;
    - an object with ``init`` and ``step``, as for ``SMCFilter``, and optionally ``log_twist``.

    :param object model: Probabilistic model with methods ``init(state, ...)`` and
        ``step(state, ...)``; for :meth:`run` also ``timesteps``.
    :param object guide: The guide, see above.
    :param int num_particles: The number of particles in each population.
    :param int max_plate_nesting: Bound on the number of nested plates in the model.
    :param float ess_threshold: Resample when the effective sample size is below this share of the
        particles: 0 never, 1 always unless the weights are equal.
    :param str resampling: ``"systematic"``, ``"stratified"``, ``"multinomial"``, ``"residual"``,
        ``"ssp"`` or ``"none"``.
    :param resample_at: The states ``t`` after which to resample at all, as a collection of time
        indices from ``T``, the initial state, down to 1; by default any.
    :param str population_plate: The name of the plate whose entries are separate populations,
        for example prompts. Their weights have shape ``(num_particles, num_populations)`` and
        they are resampled separately.
    :param torch.Generator generator: The generator of the resampling; by default one seeded from
        the run's random stream when it is first needed.
    :param int seed: Makes all of torch's draws in the run depend on nothing but this seed, and
        leaves torch's global random state alone. Runs of one seed share their noise, also across
        guides. By default the run draws from torch's global stream.
    :param str history: ``"ancestors"`` keeps who descends from whom, ``"paths"`` also the value of
        every latent site, ``"off"`` neither, so that memory does not grow with the steps.
    :param bool progress: Whether :meth:`run` shows a progress bar; by default on a terminal only,
        and so not in a notebook.
    :raises ValueError: If an argument is out of range.

    **References**

    [1] `Twisted particle filters`
        Nick Whiteley, Anthony Lee (2014), https://arxiv.org/abs/1210.0220
    """

    state: ParticleState

    def __init__(
        self,
        model: Any,
        guide: Any,
        num_particles: int,
        max_plate_nesting: int = 0,
        *,
        ess_threshold: float = 0.5,
        resampling: str = "systematic",
        resample_at: Collection[int] | None = None,
        population_plate: str | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        history: History = "ancestors",
        progress: bool | None = None,
    ) -> None:
        _check_arguments(num_particles, max_plate_nesting, ess_threshold, history)
        _check_guide(guide)
        if resampling != "none":
            get_resampling(resampling)
        if population_plate is not None and max_plate_nesting == 0:
            raise ValueError(
                f"population_plate={population_plate!r} needs max_plate_nesting of 1 or more, "
                "since the populations are a plate inside the particle plate"
            )
        super().__init__(model, guide, num_particles, max_plate_nesting, ess_threshold=1.0)
        self.ess_threshold = ess_threshold
        self.resampling = resampling
        self.resample_at = _check_resample_at(resample_at, model)
        self.population_plate = population_plate
        self.history = history
        self.progress = progress
        self._given_generator = generator
        self._stream = RandomStream(seed)
        self._num_steps = -1
        self._arguments: tuple[Any, Any] = ((), {})
        self._reset()

    def _reset(self) -> None:
        self.state = ParticleState(self.num_particles)
        self._reducer = LogProbReducer(
            self.num_particles, self.max_plate_nesting, self.population_plate
        )
        self._log_twist: torch.Tensor | None = None
        self._log_normalizer = torch.zeros((), dtype=torch.float64)
        self._record = Record(self.history)
        self._memory: dict[str, torch.Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        self._num_steps = -1

    def _model_counts(self) -> dict[str, int]:
        counts = Counter(getattr(self.model, "counts", {}))
        counts.update(getattr(self.guide, "counts", {}))
        return dict(counts)

    # stepping

    def init(self, *args: Any, **kwargs: Any) -> None:
        """
        Starts afresh: draws the initial particles, weights and, if called for, resamples them.

        Any arguments are passed to the ``init`` of model and guide.
        """
        _refuse_plates("init")
        self._reset()
        self._restart_stream()
        with poutine.block():
            self.particle_plate = pyro.plate(
                "particles", self.num_particles, dim=-1 - self.max_plate_nesting
            )
        self._move("init", args, kwargs)

    def _restart_stream(self) -> None:
        self._stream.restart()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """
        Moves, weights and, if called for, resamples the particles.

        Any arguments are passed to the ``step`` of model and guide; for models with ``timesteps``
        the first is the time index.
        """
        if self._num_steps < 0:
            raise ValueError("step was called before init; call init first")
        self._move("step", args, kwargs)

    def run(self, *args: Any, **kwargs: Any) -> SMCResult:
        """
        Runs all steps; never resamples after the last.

        Any arguments are passed to ``init``. If a step fails, say in the reward, the particles
        stay as they were before it (unless the model writes into its tensors), and :meth:`resume`
        goes on from there.

        :returns: The weighted particles.
        :rtype: SMCResult
        :raises ValueError: If the model has no ``timesteps``.
        :raises SMCFailed: If no particle of a population has weight; names site and step.
        """
        self._arguments = (args, kwargs)
        self._num_steps = -1
        return self.resume()

    def resume(self) -> SMCResult:
        """Runs the steps that are left, after a failed :meth:`run` or :meth:`load_state_dict`."""
        self._timesteps()
        with self._bar() as bar:
            if self._num_steps < 0:
                args, kwargs = self._arguments
                self.init(*args, **kwargs)
                self._report(bar)
            return self._remaining(bar)

    def _remaining(self, bar: Any) -> SMCResult:
        timesteps = self._timesteps()
        for t in timesteps[self._num_steps :]:
            self._move("step", (t,), {}, resample=t != timesteps[-1])
            self._report(bar)
        return self.result()

    def _timesteps(self) -> tuple[int, ...]:
        if not hasattr(self.model, "timesteps"):
            raise ValueError(
                f"{type(self.model).__name__} has no `timesteps`, so the number of steps is "
                "unknown. Call init() and step() by hand, or give the model a tuple `timesteps`."
            )
        timesteps = tuple(self.model.timesteps)
        if timesteps != tuple(range(len(timesteps), 0, -1)):
            raise ValueError(
                f"the model's timesteps are {timesteps}; they count down from the number of steps "
                f"to 1, as in tuple(range({len(timesteps)}, 0, -1)). Keep other times, such as a "
                "scheduler's, inside the model."
            )
        return timesteps

    @contextmanager
    def _bar(self) -> Iterator[Any]:
        from tqdm import tqdm

        disable = None if self.progress is None else not self.progress
        total, done = len(self._timesteps()) + 1, self._num_steps + 1
        with tqdm(total=total, initial=done, disable=disable, desc=type(self).__name__) as bar:
            yield bar

    def _report(self, bar: Any) -> None:
        ess, log_z = self._record.last()
        bar.set_postfix_str(f"ESS {ess:.1f}, log Z {log_z:.3f}", refresh=False)
        bar.update()

    # one step

    def _move(self, method: str, args: Any, kwargs: Any, *, resample: bool = True) -> None:
        _refuse_plates(method)
        with self._accounts(), self._transaction(), self._stream(), torch.no_grad():
            increments = self._propagate(method, args, kwargs)
            log_twist = self._look_ahead(method, args, kwargs)
            increment, ess = self._reweight(increments, log_twist, method, args)
            log_normalizer = self.get_log_normalizer()
            ancestors, resampled = self._maybe_resample(ess, resample)
            self._record.add(ess, log_normalizer, increment, resampled, ancestors)
        self._num_steps += 1

    @contextmanager
    def _accounts(self) -> Iterator[None]:
        """Adds up time and the model's evaluations, those of a step that fails included."""
        start, before = time.perf_counter(), Counter(self._model_counts())
        try:
            yield
        finally:
            spent = Counter(self._model_counts())
            spent.subtract(before)
            self._counts.update(spent)
            self._seconds += time.perf_counter() - start

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Puts the particles back if a step fails half-way."""
        entries, memory = dict(self.state), dict(self._memory)
        log_weights = self.state._log_weights
        twist, normalizer = self._log_twist, self._log_normalizer
        generator = self._given_generator
        drawn = None if generator is None else generator.get_state()
        try:
            yield
        except BaseException:
            if generator is not None and drawn is not None:
                generator.set_state(drawn)
            self.state.clear()
            self.state.update(entries)
            self.state._log_weights, self._memory = log_weights, memory
            self._log_twist, self._log_normalizer = twist, normalizer
            raise

    def _propagate(self, method: str, args: Any, kwargs: Any) -> list[Increment]:
        run, before = getattr(self.model, method), dict(self.state)
        if isinstance(self.guide, Twist):
            self.guide.stepping = method == "step"
        with poutine.block(hide_types=["sample", "observe"]), self._around_step():
            if self.guide is None or isinstance(self.guide, GuideMessenger):
                trace, found = effect_increments(
                    run, self.guide, self.particle_plate, self.state, args, kwargs
                )
            else:
                trace, found = explicit_increments(
                    run, getattr(self.guide, method), self.particle_plate, self.state, args, kwargs
                )
        _refuse_outer_values(trace)
        if method == "init":
            self._allocate(trace)
        self._reducer.check_latents(trace)
        self._observe(trace, before, args, kwargs)
        return [self._reducer(increment) for increment in found]

    def _around_step(self) -> AbstractContextManager[Any]:
        """A handler around model and guide in every step; for subclasses."""
        return nullcontext()

    def _observe(
        self, trace: poutine.Trace, before: dict[Any, Any], args: Any, kwargs: Any
    ) -> None:
        """Sees every step's trace and the state before it; for what a subclass wants to keep."""
        self._record.keep_sites(trace)

    def _allocate(self, trace: poutine.Trace) -> None:
        """Makes the weights, now that device and populations are known."""
        self._reducer.find_populations(trace)
        shape, device = self._reducer.shape, self._reducer.device
        log_n = math.log(self.num_particles)
        uniform = torch.full(shape, -log_n, dtype=torch.float64, device=device)
        self.state._log_weights = uniform
        self.state.population_axis = self._reducer.population_axis
        self._log_normalizer = torch.zeros(shape[1:], dtype=torch.float64, device=device)

    def _look_ahead(self, method: str, args: Any, kwargs: Any) -> torch.Tensor | None:
        """The log-twist at the new state; ``None`` where it is zero."""
        log_twist = getattr(self.guide, "log_twist", None)
        if log_twist is None or self._is_last(method, args, kwargs):
            return None
        with poutine.block(hide_types=["sample", "observe"]), self.particle_plate:
            value = log_twist(self.state, *args, **kwargs)
        if isinstance(value, (int, float)) and value == 0:
            return None
        return self._reducer.check_log_twist(value, _label(method, args))

    def _is_last(self, method: str, args: Any, kwargs: Any) -> bool:
        timesteps = getattr(self.model, "timesteps", None)
        if method == "init" or not timesteps:
            return False
        t = args[0] if args else kwargs.get("t")
        return isinstance(t, int) and t == timesteps[-1]

    def _reweight(
        self, increments: list[Increment], log_twist: torch.Tensor | None, method: str, args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the increments and the change of the twist; returns the log-increment and ESS."""
        log_weights = self.state._log_weights.clone()
        for increment in increments:
            log_weights += increment.value
        if log_twist is not None:
            log_weights += log_twist
        if self._log_twist is not None:
            log_weights -= self._log_twist
        total, ess = weights.total_and_ess(log_weights)
        if not torch.isfinite(total).all():
            self._explain(increments, _label(method, args))
        self.state._log_weights = log_weights.sub_(total)
        self._log_twist = log_twist
        self._log_normalizer = self._log_normalizer + total
        return total, ess

    def _explain(self, increments: list[Increment], step: str) -> None:
        """Raises the error of the site at which the weights broke."""
        log_weights = self.state._log_weights
        for increment in increments:
            log_weights = log_weights + increment.value
            if torch.isnan(log_weights).any() or (log_weights == math.inf).any():
                bad = ~torch.isfinite(increment.value) & (increment.value != -math.inf)
                first = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"site {increment.name!r} at {step}: the log-probability of particle {first} "
                    f"is {increment.value[tuple(first)].item()}. Log-probabilities, factors and "
                    "rewards must be finite or minus infinity."
                )
            if (weights.log_sum_exp(log_weights) == -math.inf).any():
                raise SMCFailed(
                    f"Failed to find feasible hypothesis after site {increment.name!r} at {step}: "
                    f"all {self.num_particles} particles have weight zero. Try more particles, a "
                    "twist that looks ahead, or a softer constraint."
                )
        raise SMCFailed(f"Failed to find feasible hypothesis at {step}: the weights vanished")

    def _maybe_resample(
        self, ess: torch.Tensor, allowed: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        # equal weights must not resample at threshold 1, whatever the rounding of the ESS
        chosen = ess < self.ess_threshold * self.num_particles * (1 - 1e-9)
        possible = allowed and self.state and self.resampling != "none" and self._may_resample()
        if not possible or not chosen.any():
            return None, torch.zeros_like(chosen)
        index = self._ancestors(chosen)
        self._resample(index, chosen)
        return index, chosen

    def _may_resample(self) -> bool:
        return self.resample_at is None or self._time() in self.resample_at

    def _time(self) -> int:
        """The time index of the state that the step under way has produced."""
        return len(self.model.timesteps) - self._num_steps - 1

    def _ancestors(self, chosen: torch.Tensor) -> torch.Tensor:
        scheme, size = get_resampling(self.resampling), self.num_particles
        generator = self._generator()
        if self.state._log_weights.dim() == 1:
            return scheme(self.state._log_weights.exp(), size, generator)
        probs = self.state._log_weights.exp()
        same = torch.arange(size, device=probs.device)
        columns = [
            scheme(column, size, generator) if drawn else same
            for column, drawn in zip(probs.T, chosen.tolist(), strict=True)
        ]
        return torch.stack(columns, -1)

    def _generator(self) -> torch.Generator:
        return self._given_generator or self._stream.generator()

    def _resample(self, index: torch.Tensor, chosen: torch.Tensor) -> None:
        """Replaces the particles by their ancestors, of equal weight where they were chosen."""
        self._follow(index)
        log_n = math.log(self.num_particles)
        self.state._log_weights = self.state._log_weights.masked_fill(chosen, -log_n)

    def _follow(self, index: torch.Tensor) -> None:
        """Moves everything that belongs to a particle along with it, but for its weight."""
        self.state._resample(index)
        for key, value in self._memory.items():
            self._memory[key] = take_ancestors(value, index)
        if self._log_twist is not None:
            self._log_twist = take_ancestors(self._log_twist, index)

    # reading

    @property
    def log_weights(self) -> torch.Tensor:
        """
        Unnormalised log-weights with the twist divided out, of shape ``(num_particles,)`` or
        ``(num_particles, num_populations)``; their log-mean-exp is :meth:`get_log_normalizer`.
        """
        scale = self._log_normalizer + math.log(self.num_particles)
        log_weights = self.state._log_weights + scale
        return log_weights if self._log_twist is None else log_weights - self._log_twist

    def get_log_normalizer(self) -> torch.Tensor:
        """
        Log of the unbiased estimate of the normaliser of the model so far.

        :returns: Of shape ``()`` or ``(num_populations,)``.
        :rtype: torch.Tensor
        """
        if self._log_twist is None:
            return self._log_normalizer
        return weights.log_mean_exp(self.log_weights)

    def get_normalized_weights(self, log_scale: bool = False) -> torch.Tensor:
        """
        The weights, with the twist divided out, summing to one in each population.

        :param bool log_scale: Whether to return their logs.
        """
        normalized = weights.log_normalize(self.log_weights)
        return normalized if log_scale else normalized.exp()

    def get_ESS(self) -> torch.Tensor:
        """The effective sample size of :attr:`log_weights`, of each population."""
        return weights.effective_sample_size(self.log_weights)

    @property
    def twisted_ess(self) -> torch.Tensor:
        """The effective sample size of the twisted weights, on which resampling decides."""
        return weights.effective_sample_size(self.state._log_weights)

    def get_empirical(self) -> dict[Any, dist.Empirical]:
        """
        Marginal distributions over all entries of the state, as copies.

        :returns: A dictionary from the entries' names to
            :class:`~pyro.distributions.Empirical` distributions, batched over populations.
        :rtype: dict
        """
        log_weights = self.get_normalized_weights(log_scale=True)
        if log_weights.dim() == 1:
            return {k: _empirical(v, log_weights) for k, v in self.state.items()}
        axis = self.state.population_axis
        moved = {k: v.movedim(axis, 0) for k, v in self.state.items()}
        return {k: _empirical(v, log_weights.T) for k, v in moved.items()}

    def result(self) -> SMCResult:
        """The weighted particles as they are now."""
        return SMCResult(
            state=dict(self.state),
            log_weights=self.log_weights,
            log_normalizer=self.get_log_normalizer(),
            diagnostics=self._record.diagnostics(self.state._log_weights),
            counts=dict(self._counts),
            seconds=self._seconds,
            samples=self._record.samples(self.state.population_axis),
            population_axis=self.state.population_axis,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here, fit for ``torch.save``."""
        generator = self._given_generator
        return {
            "state": dict(self.state),
            "log_weights": self.state._log_weights,
            "log_twist": self._log_twist,
            "memory": dict(self._memory),
            "log_normalizer": self._log_normalizer,
            "population_axis": self.state.population_axis,
            "reducer": self._reducer.state_dict(),
            "record": self._record.state_dict(),
            "stream": self._stream.state_dict(),
            "generator": None if generator is None else generator.get_state(),
            "timesteps": getattr(self.model, "timesteps", None),
            "counts": dict(self._counts),
            "seconds": self._seconds,
            "num_steps": self._num_steps,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """
        Restores what :meth:`state_dict` returned, in an object made with the same arguments.

        :raises ValueError: If the number of particles or steps, or the history kept, differs.
        """
        if saved["timesteps"] != getattr(self.model, "timesteps", None):
            raise ValueError(
                f"the saved run has the timesteps {saved['timesteps']}, this one's model "
                f"{getattr(self.model, 'timesteps', None)}"
            )
        size = saved["log_weights"].shape[0]
        if size != self.num_particles:
            raise ValueError(
                f"the saved run has {size} particles, this one num_particles={self.num_particles}"
            )
        self._reset()
        self.state.update(saved["state"])
        self.state._log_weights = saved["log_weights"]
        self.state.population_axis = saved["population_axis"]
        self._memory = dict(saved["memory"])
        self._log_twist, self._log_normalizer = saved["log_twist"], saved["log_normalizer"]
        self._reducer.load_state_dict(saved["reducer"], saved["log_weights"].device)
        if self._given_generator is not None and saved["generator"] is not None:
            self._given_generator.set_state(saved["generator"])
        self._record.load_state_dict(saved["record"])
        self._stream.load_state_dict(saved["stream"])
        self._counts = Counter(saved["counts"])
        self._seconds, self._num_steps = saved["seconds"], saved["num_steps"]
        with poutine.block():
            self.particle_plate = pyro.plate(
                "particles", self.num_particles, dim=-1 - self.max_plate_nesting
            )


def _label(method: str, args: Any) -> str:
    """A short name of a step for messages."""
    return f"{method}({args[0]})" if args and isinstance(args[0], (int, str)) else method


def _check_resample_at(times: Any, model: Any) -> frozenset[int] | None:
    if times is None:
        return None
    timesteps = tuple(getattr(model, "timesteps", ()))
    listed = isinstance(times, Collection) and not isinstance(times, str)
    if not listed or any(time not in timesteps for time in times):
        raise ValueError(
            f"resample_at={times!r}; give a collection of states of the model, whose timesteps are "
            f"{timesteps[:1]} to {timesteps[-1:]}; for never, resampling='none'"
        )
    return frozenset(times)


def _refuse_plates(method: str) -> None:
    vectorized = [plate.name for plate in get_plates() if plate.vectorized]
    if vectorized:
        raise ValueError(
            f"{method} was called inside the plate {vectorized[0]!r}, which cannot reach the "
            "particles. Put the plate inside the model and name it population_plate."
        )


def _refuse_outer_values(trace: poutine.Trace) -> None:
    """Handlers around a run see its parameters only; values meant for its sites are an error."""
    for frame in _PYRO_STACK:
        if not isinstance(frame, (ConditionMessenger, DoMessenger)):
            continue
        meant = [name for name, _ in sample_sites(trace) if name in frame.data]
        if meant:
            name = "condition" if isinstance(frame, ConditionMessenger) else "do"
            raise ValueError(
                f"a poutine.{name} around the run sets {meant[0]!r}, which it cannot reach. Wrap "
                f"the model instead: pyro_twist.handlers.{name}(model, data=...)."
            )


def _check_guide(guide: Any) -> None:
    stepped = callable(getattr(guide, "init", None)) and callable(getattr(guide, "step", None))
    if guide is None or isinstance(guide, GuideMessenger) or (stepped and not _is_class(guide)):
        return
    raise ValueError(
        f"guide={guide!r} is none of: None, an effect-based guide such as a Twist, or an object "
        "with methods init(state, ...) and step(state, ...)"
    )


def _is_class(guide: Any) -> bool:
    return isinstance(guide, type)


def _empirical(value: torch.Tensor, log_weights: torch.Tensor) -> dist.Empirical:
    dtype = value.dtype if value.is_floating_point() else torch.float64
    return dist.Empirical(value.clone(), log_weights.to(dtype).contiguous())


def _check_arguments(
    num_particles: int, max_plate_nesting: int, ess_threshold: float, history: str
) -> None:
    if not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"num_particles={num_particles!r}; give a whole number, 1 or more")
    if not isinstance(max_plate_nesting, int) or max_plate_nesting < 0:
        raise ValueError(f"max_plate_nesting={max_plate_nesting!r}; give a whole number, 0 or more")
    if not 0 <= ess_threshold <= 1:
        raise ValueError(f"ess_threshold={ess_threshold!r}; give a number from 0 to 1")
    if history not in get_args(History):
        raise ValueError(f"history={history!r}; choose one of {get_args(History)}")
