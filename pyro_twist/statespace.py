# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Models that are written for Pyro's filter and for its epidemiology package, as they are.

:class:`TimeSeries` gives a model with ``init`` and ``step`` the ``timesteps`` that a run needs, and
its steps the data they take. :class:`Compartmental` does the same for a
:class:`~pyro.contrib.epidemiology.compartmental.CompartmentalModel`; :class:`ObservedFlows` is a
twist for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import get_plates
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_twist.twists.twist import Twist
from pyro_twist.wrapper import ModelWrapper, run_model

__all__ = ["Compartmental", "ObservedFlows", "ThinnedBinomial", "TimeSeries"]


class TimeSeries(ModelWrapper):
    """
    A model written for Pyro's ``SMCFilter``, with the arguments of its steps.

    Such a model has ``init(state, ...)`` and ``step(state, ...)``, where each step takes, say, an
    observation, and the loop over observations is the user's. Here the steps are counted down,
    as inference classes and twists expect, and step ``t = T`` gets the first arguments::

        model = TimeSeries(oscillator, observations, event_shape=(2,))
        twist = BackwardTwist(model, key="z")
        result = TrustRegionTwist(model, twist, 100).run(initial)

    A guide written for the same filter is given the same arguments by being wrapped as well.

    :param model: An object with ``init`` and ``step``.
    :param steps: The arguments of each step in order of time: a tuple for several positional
        ones, a dict for named ones, anything else, such as the rows of a tensor, for a single one;
        or the number of steps, if they take none.
    :param event_shape: The shape of the entry of the state that a twist reads, for those that ask.
    :raises ValueError: If there are no steps.
    """

    def __init__(
        self, model: Any, steps: Sequence[Any] | Tensor | int, event_shape: Sequence[int] = ()
    ) -> None:
        super().__init__(model)
        self.steps: list[Any] = [()] * steps if isinstance(steps, int) else list(steps)
        if not self.steps:
            raise ValueError(f"steps={steps!r}; give one entry for each step, or their number")
        self.event_shape = torch.Size(event_shape)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """One for each entry of ``steps``, counting down to 1."""
        return tuple(range(len(self.steps), 0, -1))

    def step(self, state: Any, t: int, *args: Any, **kwargs: Any) -> None:
        """
        Runs the model's ``step`` with its arguments.

        :param dict state: The state, written to.
        :param int t: The time index, ``T`` for the first step.
        """
        given = self.steps[len(self.steps) - t]
        if isinstance(given, Mapping):
            self.model.step(state, *args, **given, **kwargs)
        elif isinstance(given, tuple):
            self.model.step(state, *given, *args, **kwargs)
        else:
            self.model.step(state, given, *args, **kwargs)


class Compartmental:
    """
    A compartmental epidemic model of Pyro as a model with ``init`` and ``step``.

    ``init`` draws what ``global_model`` draws and sets the compartments to where ``initialize``
    has them; ``step`` makes one ``transition``. Global latents are in the state under the names of
    their sites, compartments under theirs. Nothing of the epidemic model is changed::

        model = Compartmental(SimpleSIRModel(population, recovery_time, data))
        result = TwistedSMC(model, None, 1000, model.max_plate_nesting).run()
        result.expectation("R0")

    :param model: A :class:`~pyro.contrib.epidemiology.compartmental.CompartmentalModel`, also
        one with regions.
    :raises ValueError: If it is none, or has a likelihood of whole series in ``finalize``, which
        no step could weigh.
    """

    #: Compartments are numbers.
    event_shape = torch.Size()

    def __init__(self, model: Any) -> None:
        from pyro.contrib.epidemiology.compartmental import CompartmentalModel

        if not isinstance(model, CompartmentalModel):
            raise ValueError(
                f"model={type(model).__name__} is no CompartmentalModel of "
                "pyro.contrib.epidemiology; wrap models with init and step in a TimeSeries"
            )
        if type(model).finalize is not CompartmentalModel.finalize:
            raise ValueError(
                f"{type(model).__name__} has a finalize, a likelihood of whole series; particles "
                "are weighted step by step. Move it into transition, or leave it out."
            )
        self.model = model

    def __repr__(self) -> str:
        return f"Compartmental({type(self.model).__name__})"

    @property
    def timesteps(self) -> tuple[int, ...]:
        """One for each transition."""
        return tuple(range(self.model.duration, 0, -1))

    @property
    def max_plate_nesting(self) -> int:
        """What an inference class needs: 1 if there are regions, 0 otherwise."""
        return int(self.model.is_regional)

    def init(self, state: Any) -> None:
        """
        Draws the global latents and fills the compartments.

        :param dict state: The state, written to.
        """
        with poutine.trace() as tracer:
            parameters = self.model.global_model()
        for name, site in tracer.trace.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                state[name] = site["value"]
        for name, value in self.model.initialize(parameters).items():
            state[name] = self._batched(value)

    def _batched(self, value: Any) -> Tensor:
        """Numbers, the same for all particles or one for each region, as a batch."""
        plates = {plate.dim or 0: plate.size for plate in get_plates() if plate.vectorized}
        if self.model.is_regional:
            plates.setdefault(-1, len(self.model.population))
        depth = max((-dim for dim in plates), default=0)
        batch = tuple(plates.get(dim, 1) for dim in range(-depth, 0))
        value = torch.as_tensor(value, dtype=torch.get_default_dtype())
        return value.expand(torch.broadcast_shapes(value.shape, batch)).contiguous()

    def step(self, state: Any, t: int) -> None:
        """
        Makes a transition, with its observations.

        :param dict state: The state, read and written.
        :param int t: The time index; the transition's own index is ``duration - t``.
        """
        # parameters are for handlers outside to see, at every step
        hidden = poutine.block(hide_types=["sample", "observe"])
        with hidden, poutine.condition(data=dict(state)):
            parameters = self.model.global_model()
        moved = dict(state)
        for name in self.model.approximate:
            moved[f"{name}_approx"] = state[name]
        self.model.transition(parameters, moved, self.model.duration - t)
        for name in self.model.approximate:
            del moved[f"{name}_approx"]
        for name, value in moved.items():
            if name not in state or state[name] is not value:
                state[name] = value

    def __call__(self) -> Any:
        """
        Simulates a whole epidemic, for any Pyro tool that takes a callable.

        :returns: The state at the end.
        """
        return run_model(self)


class ThinnedBinomial(dist.TorchDistribution):
    """
    A binomial count given how many of it were seen, where each is seen with the same probability.

    If ``x ~ Binomial(n, p)`` and ``y ~ Binomial(x, r)``, then ``x - y`` given ``y`` is binomial
    again, of ``n - y`` with probability ``p (1 - r) / (1 - p r)``. Where ``y > n``, which cannot
    be, it is all of ``n``.

    :param Tensor total_count: The number ``n``.
    :param Tensor probs: The probability ``p``.
    :param Tensor seen: The number ``y``.
    :param Tensor rate: The probability ``r`` to be seen.
    """

    arg_constraints: dict[str, Any] = {}
    support = dist.constraints.integer

    def __init__(
        self, total_count: Tensor, probs: Tensor, seen: Tensor | float, rate: Tensor | float
    ) -> None:
        n, p, y, r = torch.broadcast_tensors(
            *(
                torch.as_tensor(value, dtype=probs.dtype)
                for value in (total_count, probs, seen, rate)
            )
        )
        self.total_count, self.probs, self.seen, self.rate = n, p, y, r
        unseen = p * (1 - r) / (1 - p * r).clamp(min=torch.finfo(p.dtype).tiny)
        self._rest = dist.ExtendedBinomial((n - y).clamp(min=0), unseen.clamp(0, 1))
        super().__init__(n.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ThinnedBinomial:
        """See :meth:`torch.distributions.Distribution.expand`."""
        values = (self.total_count, self.probs, self.seen, self.rate)
        return ThinnedBinomial(*(value.expand(batch_shape) for value in values))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws counts."""
        return torch.minimum(self.seen + self._rest.sample(sample_shape), self.total_count)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of counts."""
        possible = self.seen <= self.total_count
        value = torch.where(possible, value, self.seen)
        inside = self._rest.log_prob(value - self.seen)
        return torch.where(possible, inside, torch.zeros_like(inside))

    @property
    def log_evidence(self) -> Tensor:
        """The log-probability of what was seen, ``Binomial(n, p r)``; minus infinity if none."""
        both: Tensor = dist.ExtendedBinomial(self.total_count, self.probs * self.rate).log_prob(
            self.seen
        )
        return both


class ObservedFlows(Twist):
    """
    A twist for binomial flows of which a share is observed, as in Pyro's epidemic models.

    A flow such as the infections ``S2I_3`` of step 3 is binomial, and reported cases are a binomial
    share of it. Given the cases, the flow is a :class:`ThinnedBinomial`, from which it is
    proposed; and what the *next* step's cases say of the state is known before they are
    reached, and is the twist. So no particle is lost to cases that its epidemic could not have had,
    and resampling looks one step ahead. A flow is never proposed below what was seen of it, so that
    only those may be named of which the model observes a share. Nothing is learnt; beside an
    :class:`~pyro_twist.latents.AutoLatents` in a :class:`~pyro_twist.latents.JointTwist`, the
    guide of the global latents is::

        twist = ObservedFlows(model, {"S2I": (data, "rho")})
        guide = JointTwist(twist, AutoLatents(model), sites=("R0", "rho"))
        result = TrustRegionTwist(model, guide, 500).run()

    :param model: A :class:`Compartmental`, or another model whose flows are named so.
    :param dict flows: By the name of a flow, without the number of the step, the observations of
        all steps, of which ``None`` and NaN are none, and the probability to be observed: a number,
        or the name of an entry of the state. Flows that are not binomial are left alone.
    :param float floor: The least log-twist, in nats below the best particle's.
    :raises ValueError: If an entry of ``flows`` is no such pair, or names what the model does not
        have.
    """

    def __init__(
        self,
        model: Any,
        flows: Mapping[str, tuple[Tensor, str | float]],
        *,
        floor: float = 20.0,
    ) -> None:
        super().__init__(model)
        for name, pair in flows.items():
            _check_flow(name, pair)
        self.flows = {name: (_observations(data), rate) for name, (data, rate) in flows.items()}
        self.floor = floor

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The flow given what was seen of it."""
        thinned = self._thinned(name, prior, self.args_kwargs[0][0])
        return prior if thinned is None else thinned

    def _thinned(self, name: str, prior: Any, state: Any) -> ThinnedBinomial | None:
        flow, _, number = name.rpartition("_")
        if flow not in self.flows or not number.isdigit():
            return None
        data, rate = self.flows[flow]
        if int(number) >= len(data) or not isinstance(prior, torch.distributions.Binomial):
            return None
        if not bool(data[int(number)].isfinite().all()):
            return None
        known = _rate_of(flow, rate, state) if isinstance(rate, str) else rate
        return ThinnedBinomial(prior.total_count, prior.probs, data[int(number)], known)

    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """The log-probability of the next step's observations, from the state."""
        now, ahead = self.time_after(t), dict(state)
        with poutine.block(), poutine.trace() as tracer:
            self.model.step(ahead, now)
        if now == self.model.timesteps[0]:
            self._check_names(tracer.trace)
        total: Any = 0.0
        for name, site in tracer.trace.nodes.items():
            thinned = self._thinned(name, site["fn"], state) if site["type"] == "sample" else None
            if thinned is not None:
                total = total + thinned.log_evidence.double()
        return self._floored(total) if isinstance(total, Tensor) else total

    def _check_names(self, trace: poutine.Trace) -> None:
        """Refuses flows that the first step does not have: they would do nothing."""
        known = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
        for flow in self.flows:
            if all(name.rpartition("_")[0] != flow for name in known):
                raise ValueError(
                    f"flows names {flow!r}, but the first step has only the sites {known}; give a "
                    "name without the number of the step"
                )

    def _floored(self, value: Tensor) -> Tensor:
        best = value.amax(0, keepdim=True)
        best = torch.where(best.isfinite(), best, torch.zeros_like(best))
        return torch.maximum(value, best - self.floor)


def _check_flow(name: str, pair: Any) -> None:
    if not (isinstance(pair, tuple) and len(pair) == 2):
        raise ValueError(
            f"flows[{name!r}]={pair!r}; give the observations and the probability to be "
            'observed, as in {"S2I": (data, "rho")}'
        )
    rate = pair[1]
    if not isinstance(rate, str) and not 0 < float(rate) <= 1:
        raise ValueError(
            f"flows[{name!r}] has the probability {rate} to be observed; give one from 0 to 1, or "
            "the name of an entry of the state"
        )


def _observations(data: Any) -> Tensor:
    """Counts of all steps, with NaN where nothing was observed."""
    if isinstance(data, Tensor):
        return data
    return torch.stack([torch.as_tensor(math.nan if one is None else one) for one in data])


def _rate_of(flow: str, key: str, state: Any) -> Tensor:
    if key not in state:
        raise ValueError(
            f"flows[{flow!r}] reads the probability to be observed from state[{key!r}], but the "
            f"state has only {list(state)}"
        )
    rate: Tensor = state[key]
    return rate
