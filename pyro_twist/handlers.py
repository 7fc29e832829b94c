# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Pyro's effect handlers on models with ``init`` and ``step``.

:func:`handle` puts any handler of :mod:`pyro.poutine` around a model, and gives a model again: with
the same ``timesteps``, ``decode`` and so on, that an inference class takes, a twist looks ahead in,
and that can be called. The other functions are named like Pyro's own and have their arguments::

    from pyro_twist import handlers

    model = handlers.condition(model, data={"x_0": image})
    model = handlers.scale(model, scale=0.5)

Handlers apply from the inside out, as in Pyro. They are around the model, not around the run: a
run is closed to handlers outside it, except that they see its parameters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pyro
import torch
from pyro import params, poutine
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.equalize_messenger import EqualizeMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.lift_messenger import LiftMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.reparam_messenger import ReparamMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import get_plates
from pyro.poutine.seed_messenger import SeedMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample

from pyro_twist.infer.randomness import RandomStream
from pyro_twist.wrapper import ModelWrapper, run_model

__all__ = [
    "Handled",
    "Lifted",
    "Seeded",
    "Traced",
    "block",
    "condition",
    "do",
    "handle",
    "infer_config",
    "lift",
    "mask",
    "reparam",
    "replay",
    "scale",
    "seed",
    "trace",
]

# what engines and twists call, besides init and step, with the state first
_CALLED = ("terminal", "kernel", "complete")


class Handled(ModelWrapper):
    """
    A model inside a handler; made by :func:`handle`.

    Every ``init``, ``step`` and ``terminal`` runs inside the handler, and so does a call of the
    whole model; everything else is the inner model's.

    :param model: An object with ``init`` and ``step``: a model, or an explicit guide.
    :param handler: The handler, of which every call uses a fresh copy.
    """

    def __init__(self, model: Any, handler: Messenger) -> None:
        super().__init__(model)
        self.handler = handler

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return self._around(value) if name in _CALLED and callable(value) else value

    def __repr__(self) -> str:
        return f"{type(self.handler).__name__}({self.model!r})"

    def _fresh(self) -> Messenger:
        """The handler as if it were new, in the form that suits particles."""
        for kind, adapted in _ADAPTED.items():
            if isinstance(self.handler, kind):
                return adapted(self.handler)
        return copy.copy(self.handler)

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the state and more, inside the handler."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            return self._fresh()(function)(*args, **kwargs)

        return inside

    def init(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """
        Runs the inner model's ``init`` inside the handler.

        :param dict state: The state, written to.
        """
        self._around(self.model.init)(state, *args, **kwargs)

    def step(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """
        Runs the inner model's ``step`` inside the handler.

        :param dict state: The state, written to.
        """
        self._around(self.model.step)(state, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Runs a whole trajectory inside one handler, for any Pyro tool that takes a callable.

        Any arguments are passed to ``init``.

        :returns: What the inner model returns, or the end state if it cannot be called.
        """
        return self._fresh()(self._whole())(*args, **kwargs)

    def _whole(self) -> Callable[..., Any]:
        """The inner model as a function."""
        return self.model if callable(self.model) else partial(run_model, self.model)


class Lifted(Handled):
    """
    A model whose parameters are latents; made by :func:`lift`.

    They are drawn at the start of ``init``, outside the model's own plates, and kept in the state
    under their names, so that they stay the same along a path and are resampled with it.
    """

    def __init__(self, model: Any, handler: LiftMessenger) -> None:
        super().__init__(model, handler)
        prior = handler.prior
        if not isinstance(prior, dict) or not all(
            isinstance(one, TorchDistributionMixin) for one in prior.values()
        ):
            raise ValueError(
                "lift draws parameters before the model asks for them, so they must be named: "
                'give prior={"name": distribution, ...}'
            )
        self.prior: Mapping[str, Any] = prior
        self._found: set[str] = set()

    def init(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """
        Draws the parameters and runs the inner model's ``init``.

        :param dict state: The state, written to.
        """
        for name, value in self._drawn().items():
            state[name] = value
        self._run(self.model.init, state, args, kwargs)

    def step(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """
        Runs the inner model's ``step`` with the parameters in the state.

        :param dict state: The state, written to.
        """
        self._run(self.model.step, state, args, kwargs)
        timesteps = getattr(self.model, "timesteps", None)
        if timesteps and args and args[0] == timesteps[-1]:
            self._check_found()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a whole trajectory with one draw of the parameters; see :class:`Handled`."""
        with self._parameters(self._drawn()):
            result = self._whole()(*args, **kwargs)
        self._check_found()
        return result

    def _drawn(self) -> dict[str, torch.Tensor]:
        return {name: pyro.sample(name, one) for name, one in self.prior.items()}

    def _parameters(self, values: Mapping[str, torch.Tensor]) -> AbstractContextManager[Any]:
        return _Parameters({name: values[name] for name in self.prior}, self._found)

    def _run(self, function: Callable[..., Any], state: Any, args: Any, kwargs: Any) -> None:
        values = {name: state[name] for name in self.prior}
        with self._parameters(values):
            function(state, *args, **kwargs)
        for name, value in values.items():
            if state[name] is not value:
                raise ValueError(
                    f"the model writes state[{name!r}], where lift keeps the parameter of that "
                    "name; rename one of them"
                )

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(state: Any, *args: Any, **kwargs: Any) -> Any:
            with self._parameters(state):
                return function(state, *args, **kwargs)

        return inside

    def _check_found(self) -> None:
        missing = sorted(set(self.prior) - self._found)
        if missing:
            warnings.warn(
                f"lift found no parameters {missing} in the model; they were drawn and not used",
                stacklevel=3,
            )


class Traced(Handled):
    """
    A model that remembers its sites; made by :func:`trace`.

    :attr:`trace` holds the sites since the last ``init``, or those of the last call: values as they
    were drawn, before any resampling. A look-ahead is not recorded.
    """

    def __init__(self, model: Any, handler: TraceMessenger) -> None:
        super().__init__(model, handler)
        self.trace = poutine.Trace()

    def init(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """
        Runs the inner model's ``init`` and begins a new trace.

        :param dict state: The state, written to.
        """
        self.trace = poutine.Trace()
        self._record(self.model.init, state, args, kwargs)

    def step(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """
        Runs the inner model's ``step`` and adds its sites to the trace.

        :param dict state: The state, written to.
        """
        self._record(self.model.step, state, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a whole trajectory and begins a new trace; see :class:`Handled`."""
        traced: Any = self._fresh()(self._whole())
        result = traced(*args, **kwargs)
        self.trace = traced.trace
        return result

    def get_trace(self, *args: Any, **kwargs: Any) -> poutine.Trace:
        """Runs a whole trajectory and returns its trace, as Pyro's ``trace(...).get_trace``."""
        self(*args, **kwargs)
        return self.trace.copy()

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def _record(self, function: Callable[..., Any], state: Any, args: Any, kwargs: Any) -> None:
        tracer = self._fresh()
        assert isinstance(tracer, TraceMessenger)
        with tracer:
            function(state, *args, **kwargs)
        for name, node in tracer.trace.nodes.items():
            # plates and parameters may turn up at every step
            if name not in self.trace or not (node["type"] == "param" or site_is_subsample(node)):
                self.trace.add_node(name, **node)


class Seeded(Handled):
    """
    A model that draws from a random stream of its own; made by :func:`seed`.

    The stream starts at the seed when the object is made, and goes on from step to step and from
    run to run, so that no noise is used twice. A call of the whole model starts at the seed.
    """

    def __init__(self, model: Any, handler: SeedMessenger) -> None:
        super().__init__(model, handler)
        self._stream = RandomStream(handler.rng_seed)

    def init(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """
        Runs the inner model's ``init`` on the stream.

        :param dict state: The state, written to.
        """
        with self._stream():
            self.model.init(state, *args, **kwargs)

    def step(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """
        Runs the inner model's ``step`` on the stream.

        :param dict state: The state, written to.
        """
        with self._stream():
            self.model.step(state, *args, **kwargs)

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # what looks ahead must not change the model's noise
        return function


def handle(model: Any, handler: Messenger) -> Handled:
    """
    Puts a handler around a model with ``init`` and ``step``.

    Each ``init``, ``step``, ``terminal`` (at which twists look ahead), and each call of the whole
    model, runs inside a fresh copy of the handler. Where a copy for each step would mean something
    else than one handler around the whole path, or values for one particle must serve many, the
    handler is adapted; see the functions of this module.

    :param model: An object with ``init`` and ``step``: a model, or an explicit guide.
    :param handler: Any handler of :mod:`pyro.poutine`, as one gets without a function, such as
        ``poutine.scale(scale=2.0)``, or a plate.
    :returns: A model.
    :rtype: Handled
    :raises ValueError: If ``model`` has no ``init`` and ``step``, ``handler`` is no handler, or it
        is one that relates sites of several steps, as ``poutine.equalize`` does.
    """
    if not (callable(getattr(model, "init", None)) and callable(getattr(model, "step", None))):
        raise ValueError(
            f"{type(model).__name__} has no methods init(state, ...) and step(state, ...); use "
            "the handlers of pyro.poutine for plain functions"
        )
    if not isinstance(handler, Messenger) or isinstance(handler, GuideMessenger):
        raise ValueError(
            f"handler={handler!r} is no handler such as poutine.scale(scale=2.0); guides are given "
            "to the inference class"
        )
    if isinstance(handler, EqualizeMessenger):
        raise ValueError(
            "poutine.equalize gives several sites one value, but steps are handled one by one; "
            "draw what they share once, in a WithLatents"
        )
    for kind, handled in _HANDLED.items():
        if isinstance(handler, kind):
            return handled(model, handler)
    return Handled(model, handler)


def condition(model: Any, data: Any) -> Handled:
    """
    Observes sites: their log-probability becomes part of the weight, and no guide proposes them.

    :param model: A model.
    :param data: A dict of values by the names of sites, or a trace. Values have the shape of one
        event, the same for all particles, or the batch dims as well.
    :returns: A model.
    :rtype: Handled
    """
    return handle(model, poutine.condition(data=data))


def do(model: Any, data: Mapping[str, Any]) -> Handled:
    """
    Sets sites to values, which adds nothing to the weight.

    As in Pyro, a fresh site of the same name is drawn, and its value is not used; guides leave it
    alone, and it can be observed with :func:`condition` from outside.

    :param model: A model.
    :param dict data: Values by the names of sites, shaped as for :func:`condition`.
    :returns: A model.
    :rtype: Handled
    """
    return handle(model, poutine.do(data=dict(data)))


def scale(model: Any, scale: float | torch.Tensor) -> Handled:
    """
    Raises the density of the model to a power: of factors, observations and latent sites.

    A latent site is weighted by ``scale * log p - log q``, also where ``q`` is the model's own
    kernel, so that the law does not depend on the guide. To temper rewards only, use
    ``RewardTilted(..., scale=...)`` or put the scale inside the potential.

    :param model: A model.
    :param scale: A positive number, or a tensor that broadcasts to the batch shape.
    :returns: A model.
    :rtype: Handled
    """
    return handle(model, poutine.scale(scale=scale))


def mask(model: Any, mask: Any) -> Handled:
    """
    Takes factors and observations away where the mask is false.

    Latent sites keep their law there, whatever a guide proposes: without a density they would
    have none.

    :param model: A model.
    :param mask: A boolean or a boolean tensor that broadcasts to the batch shape.
    :returns: A model.
    :rtype: Handled
    """
    return handle(model, poutine.mask(mask=mask))


def reparam(model: Any, config: Any) -> Handled:
    """
    Replaces latent sites by auxiliary ones and a deterministic transformation.

    Guides meet the auxiliary sites. Sites that :func:`condition` inside has observed are left as
    they are.

    :param model: A model.
    :param config: A dict of reparametrisers by the names of sites, or a function from a site to
        one or ``None``; see :mod:`pyro.infer.reparam`.
    :returns: A model.
    :rtype: Handled
    """
    return handle(model, poutine.reparam(config=config))


def infer_config(model: Any, config_fn: Callable[[Any], Any]) -> Handled:
    """
    Updates the ``infer`` entries of sites.

    :param model: A model, or an explicit guide.
    :param callable config_fn: A function from a site to a dict.
    :returns: A model.
    :rtype: Handled
    """
    return handle(model, poutine.infer_config(config_fn=config_fn))


def block(model: Any, hide_fn: Callable[[Any], Any] | None = None, **options: Any) -> Handled:
    """
    Hides sites from guides and weights.

    A hidden latent site is drawn from the model's kernel, for each particle by itself; a hidden
    factor or observation does not count.

    :param model: A model, or an explicit guide.
    :param callable hide_fn: A function from a site to whether to hide it.
    :param options: ``hide``, ``expose`` and so on; see :func:`pyro.poutine.block`. Without any, all
        sites are hidden.
    :returns: A model.
    :rtype: Handled
    """
    return handle(model, poutine.block(hide_fn=hide_fn, **options))


def lift(model: Any, prior: dict[str, Any]) -> Handled:
    """
    Makes parameters latents, each drawn once, in ``init``, and kept in the state under its name.

    :param model: A model with ``pyro.param`` statements.
    :param dict prior: Distributions by the names of parameters.
    :returns: A model.
    :rtype: Lifted
    :raises ValueError: If ``prior`` is not a dict of distributions.
    """
    return handle(model, poutine.lift(prior=prior))


def trace(model: Any, graph_type: Any = None, param_only: bool | None = None) -> Traced:
    """
    Records sites and parameters; see :class:`Traced`.

    :param model: A model.
    :param str graph_type: ``"flat"`` or ``"dense"``.
    :param bool param_only: Whether to record parameters only.
    :returns: A model with ``trace`` and ``get_trace``.
    :rtype: Traced
    """
    return Traced(model, poutine.trace(graph_type=graph_type, param_only=param_only))


def replay(model: Any, trace: Any = None, params: Any = None) -> Handled:
    """
    Takes the values of latent sites from a trace, as if the model had drawn them.

    They add nothing to the weight, which is right for values drawn from the model, and no guide
    proposes them. To weigh values as observations, use :func:`condition`.

    :param model: A model.
    :param trace: A trace; values are shaped as for :func:`condition`.
    :param dict params: Constrained values of parameters by name.
    :returns: A model.
    :rtype: Handled
    """
    return handle(model, poutine.replay(trace=trace, params=params))


def seed(model: Any, rng_seed: int) -> Handled:
    """
    Lets the model draw from a random stream of its own; see :class:`Seeded`.

    :param model: A model.
    :param int rng_seed: Where the stream starts. For whole runs, resampling included, give the
        inference class a ``seed``.
    :returns: A model.
    :rtype: Seeded
    """
    return handle(model, poutine.seed(rng_seed=rng_seed))


# Handlers in the form that suits particles


def _batched(msg: Any) -> torch.Tensor:
    """The value of a site, expanded over the plates around it."""
    plates = {plate.dim or 0: plate.size for plate in get_plates() if plate.vectorized}
    depth = max((-dim for dim in plates), default=0)
    batch = tuple(plates.get(dim, 1) for dim in range(-depth, 0))
    value: torch.Tensor = torch.as_tensor(msg["value"])
    try:
        return value.expand(torch.broadcast_shapes(value.shape, batch + msg["fn"].event_shape))
    except RuntimeError:
        raise ValueError(
            f"the value for site {msg['name']!r} has shape {tuple(value.shape)}, which does not "
            f"broadcast to batch shape {batch} and event shape {tuple(msg['fn'].event_shape)}"
        ) from None


def _is_determined(msg: Any) -> bool:
    """Whether a site is a function of others, such as what a reparametriser leaves."""
    fn = msg["fn"]
    masked = isinstance(fn, MaskedDistribution) and fn._mask is False
    return bool(msg["infer"].get("_deterministic")) or (
        msg["is_observed"] and masked and isinstance(fn.base_dist, Delta)
    )


class _Condition(ConditionMessenger):
    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.data or not isinstance(msg["fn"], TorchDistributionMixin):
            return
        if _is_determined(msg):
            raise ValueError(
                f"site {msg['name']!r} is a function of other sites, perhaps by reparam, and "
                "cannot be observed; condition it first: reparam(condition(model, ...), ...)"
            )
        super()._pyro_sample(msg)
        if msg["value"] is not None:
            msg["value"] = _batched(msg)


class _Do(DoMessenger):
    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        super()._pyro_sample(msg)
        if msg["name"] != name:
            msg["value"] = _batched(msg)


class _Replay(ReplayMessenger):
    def _pyro_sample(self, msg: Any) -> None:
        given, infer = msg["value"], msg["infer"]
        super()._pyro_sample(msg)
        if msg["value"] is not given:
            # not done, so that plates still expand the distribution; what the recorded site says
            # of the inference that it came from is past
            msg["value"], msg["infer"], msg["done"] = _batched(msg), infer, False


class _Reparam(ReparamMessenger):
    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and self._loses_jacobian(msg):
            return
        super()._pyro_sample(msg)

    def _loses_jacobian(self, msg: Any) -> bool:
        one = self.config.get(msg["name"]) if isinstance(self.config, dict) else self.config(msg)
        return isinstance(one, (LocScaleReparam, TransformReparam))


class _Block(BlockMessenger):
    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "inspect":
            return
        super()._process_message(msg)
        if msg["stop"] and msg["type"] == "sample" and not site_is_subsample(msg):
            # hidden from the plates outside as well, but not one draw for all particles
            msg["cond_indep_stack"] = get_plates()
            BroadcastMessenger._pyro_sample(msg)


class _Parameters(Messenger):
    """Gives parameters the values of latents, and notes which were asked for."""

    def __init__(self, values: Mapping[str, torch.Tensor], found: set[str]) -> None:
        super().__init__()
        self.values, self.found = values, found

    def _pyro_param(self, msg: Any) -> None:
        name = params.user_param_name(msg["name"])
        if name in self.values:
            self.found.add(name)
            msg["value"], msg["done"], msg["stop"] = self.values[name], True, True


_ADAPTED: dict[type, Callable[[Any], Messenger]] = {
    BlockMessenger: lambda handler: _Block(hide_fn=handler.hide_fn),
    ConditionMessenger: lambda handler: _Condition(handler.data),
    DoMessenger: lambda handler: _Do(handler.data),
    ReparamMessenger: lambda handler: _Reparam(handler.config),
    ReplayMessenger: lambda handler: _Replay(handler.trace, handler.params),
}

_HANDLED: dict[type, Callable[[Any, Any], Handled]] = {
    LiftMessenger: Lifted,
    SeedMessenger: Seeded,
    TraceMessenger: Traced,
}
