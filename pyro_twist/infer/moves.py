# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Moves of particles that leave their law as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import biject_to

from pyro_twist.infer.increments import latent_sites, sample_sites
from pyro_twist.infer.randomness import RandomStream
from pyro_twist.infer.result import SMCResult

__all__ = ["move_latents"]

_SCALES = (0.02, 2.0)
_DRAWS = 512

Values = dict[str, Tensor]
Prior = Callable[[Any], Mapping[str, Tensor]]


def move_latents(
    model: Any, result: SMCResult, num_moves: int = 50, *, seed: int | None = None
) -> SMCResult:
    r"""
    Metropolis-Hastings moves of the latents beside a trajectory, given its end.

    A latent that is drawn once is never drawn again, so that resampling leaves few values of it.
    Where latents reach nothing but the potential at the end, as an instrument that has taken a
    picture does, they are independent of the path given :math:`x_0`, and moves with the invariant
    law :math:`p(\text{latents}) \exp(\text{potential}(\text{latents}, x_0))` leave the law of the
    weighted particles as it is [1]. They cost evaluations of the potential, and none of a network.
    Handlers around the model count: a scale is a power of both factors, what is conditioned on
    stays.

    One latent is proposed at a time: a continuous one by a random walk in unconstrained space,
    whose scale is drawn anew between 0.02 and 2 times the prior's, a discrete one from its prior.

    :param model: The model of the run, which has latents from a
        :class:`~pyro_twist.latents.WithLatents` whose support is fixed, and a terminal potential.
    :param SMCResult result: The result of a run with ``history="paths"``.
    :param int num_moves: How many moves of each latent.
    :param int seed: Makes the moves depend on nothing but the result and this seed.
    :returns: The result with other latents; weights and the rest stay.
    :rtype: SMCResult
    :raises ValueError: If the model has no such latents, the run kept no paths, or a denoiser or
        ``kernel`` reads a latent. What a model with neither reads in its steps is not known.

    **References**

    [1] `Following a moving target - Monte Carlo inference for dynamic Bayesian models`
        Walter Gilks, Carlo Berzuini (2001), JRSS B 63, 127-146
    """
    if num_moves < 0:
        raise ValueError(f"num_moves={num_moves}; give 0 or more")
    target = _Target(model, result)
    if result.samples is None:
        raise ValueError("the run kept no values of its latents; run it with history='paths'")
    with RandomStream(seed)(), torch.no_grad(), poutine.block():
        spreads = _spreads(model, target, result.samples)
        values = {name: result.samples[name] for name in spreads}
        _check_unread(model, target.state, set(target.entries(values)))
        for _ in range(num_moves):
            for name, spread in spreads.items():
                values = target.moved(values, name, spread)
        state = {**result.state, **target.entries(values)}
    return replace(result, state=state, samples={**result.samples, **values})


def _wrappers(model: Any) -> tuple[list[Any], Any]:
    """The models around the latents, from the outside in, and the latents' own."""
    from pyro_twist.hierarchies import SetOf
    from pyro_twist.latents import WithLatents

    around, inner = [], model
    while not isinstance(inner, WithLatents):
        around.append(inner)
        inner = vars(inner).get("model") if hasattr(inner, "__dict__") else None
        if inner is None or isinstance(around[-1], SetOf):
            raise ValueError(
                f"{type(model).__name__} has no latents beside its trajectory, or has them inside "
                "a SetOf; draw them in a WithLatents around it"
            )
    return around, inner


def _handled_prior(model: Any) -> Prior:
    """What draws the latents, as a function of the state, inside the handlers around it."""
    from pyro_twist.handlers import Handled

    around, inner = _wrappers(model)

    def drawn(state: Any) -> Mapping[str, Tensor]:
        latents: Mapping[str, Tensor] = inner.prior()
        return latents

    prior: Prior = drawn
    for wrapper in reversed(around):
        prior = wrapper._around(prior) if isinstance(wrapper, Handled) else prior
    return prior


def _check_seen(model: Any, trace: poutine.Trace) -> None:
    """Refuses latents that a handler hides: they could not be held where they are."""
    with poutine.trace() as tracer, torch.random.fork_rng(devices=[]):
        _wrappers(model)[1].prior()
    hidden = [name for name, _ in sample_sites(tracer.trace) if name not in trace]
    if hidden:
        raise ValueError(
            f"a handler hides the latents {hidden}, so that they cannot be moved; block sites "
            "inside the WithLatents, or take no moves"
        )


class _Reads(dict[Any, Any]):
    """A state that remembers what was read."""

    def __init__(self, state: Mapping[Any, Any]) -> None:
        super().__init__(state)
        self.read: set[Any] = set()

    def __getitem__(self, key: Any) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """As of any dict."""
        return self[key] if key in self else default


def _check_unread(model: Any, state: Mapping[Any, Tensor], entries: set[str]) -> None:
    """Refuses latents on which the path depends."""
    denoiser, state = getattr(model, "denoiser", None), _Reads(state)
    if denoiser is not None:
        state.read |= {*denoiser.conditioning, "guidance_scale"}
        # what the parts of a product or a mixture read
        state.read.update(key for one in getattr(model, "reads", ()) for key in one.values())
    elif hasattr(model, "kernel"):
        model.kernel(state, model.timesteps[0])
    if state.read & entries:
        reader = "kernel" if denoiser is None else "denoiser"
        raise ValueError(
            f"the {reader} reads {sorted(state.read & entries)}, so that the path depends on these "
            "latents; only what reaches nothing but the potential at the end can be moved given "
            "that end"
        )


def _spreads(
    model: Any, target: _Target, samples: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """
    Standard deviations under the prior, in unconstrained space; ``None`` for discrete sites.

    Of the latents that can be moved: those that a handler, or a point mass, determines cannot.
    """
    with poutine.trace() as tracer, pyro.plate("draws", _DRAWS, dim=-4):
        target.prior(target.state)
    _check_seen(model, tracer.trace)
    found: dict[str, Tensor | None] = {}
    for name, site in latent_sites(tracer.trace):
        drawn, support = site["value"], site["fn"].support
        if name in samples and bool((drawn != drawn[:1]).any()):
            discrete = support.is_discrete
            found[name] = None if discrete else biject_to(support).inv(drawn).flatten(0, 3).std(0)
    return found


class _Target:
    """The law of the latents given the end of each path, unnormalised."""

    def __init__(self, model: Any, result: SMCResult) -> None:
        self.model, self.prior, self.state = model, _handled_prior(model), dict(result.state)

    def _drawn(self, values: Values) -> tuple[dict[str, Tensor], poutine.Trace]:
        """What latents of these values are in the state, and their sites."""
        with poutine.trace() as tracer, poutine.condition(data=values):
            drawn = self.prior(self.state)
        return {k: v.expand(self.state[k].shape) for k, v in drawn.items()}, tracer.trace

    def entries(self, values: Values) -> dict[str, Tensor]:
        """What latents of these values are in the state."""
        return self._drawn(values)[0]

    def terms(self, values: Values) -> tuple[list[Tensor], poutine.Trace]:
        """The terms of the log-density, each of its own batch shape, and the sites."""
        from pyro_twist.rewards import log_potential

        entries, trace = self._drawn(values)
        terms = [log_potential(self.model, {**self.state, **entries}, self.state["x"])]
        for name, site in sample_sites(trace):
            if site["is_observed"] and not site["infer"].get("_deterministic"):
                # a latent has a density where a mask takes observations away
                mask = None if name in values else site["mask"]
                value = site["fn"].log_prob(site["value"])
                terms.append(scale_and_mask(value, site["scale"], mask).double())
        return terms, trace

    def moved(self, values: Values, name: str, spread: Tensor | None) -> Values:
        """The latents after a proposal of one of them."""
        (before, trace), old = self.terms(values), values[name]
        fn: Any = trace.nodes[name]["fn"]
        batch = old.shape[: old.dim() - fn.event_dim]
        new, gain = _drawn_anew(fn, old) if spread is None else _walked(fn, old, spread)
        after, _ = self.terms({**values, name: new})
        for one, other in zip(after, before, strict=True):
            gain = gain + _reduced(name, one - other, batch)
        accepted = torch.rand_like(gain).log() < gain
        accepted = accepted.reshape(batch + (1,) * fn.event_dim)
        return {**values, name: torch.where(accepted, new, old)}


def _drawn_anew(fn: Any, old: Tensor) -> tuple[Tensor, Tensor]:
    """A draw from the prior, and the log of what its density is less than the old one's."""
    new: Tensor = fn.expand(old.shape[: old.dim() - fn.event_dim]).sample()
    return new, fn.log_prob(old).double() - fn.log_prob(new).double()


def _walked(fn: Any, old: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """A random walk in unconstrained space, and the log of the change of volume."""
    transform, batch = biject_to(fn.support), old.shape[: old.dim() - fn.event_dim]
    low, high = (math.log(one) for one in _SCALES)
    scale = (low + (high - low) * torch.rand(batch, device=old.device)).exp()
    free = transform.inv(old)
    scale = scale.reshape(batch + (1,) * (free.dim() - len(batch)))
    there = free + scale * spread * torch.randn_like(free)
    new: Tensor = transform(there)
    volumes = [
        _summed(transform.log_abs_det_jacobian(u, v), batch) for u, v in ((there, new), (free, old))
    ]
    return new, volumes[0] - volumes[1]


def _summed(value: Tensor, batch: torch.Size) -> Tensor:
    """Sums over event dims, in float64."""
    rest = value.dim() - len(batch)
    return value.double().flatten(-rest).sum(-1) if rest > 0 else value.double()


def _reduced(name: str, value: Tensor, batch: torch.Size) -> Tensor:
    """Sums over the entries of a plate that share a latent, which has a dim of one there."""
    shared = [k for k in range(-min(value.dim(), len(batch)), 0) if batch[k] == 1]
    value = value.sum(shared, keepdim=True) if shared else value
    if torch.broadcast_shapes(value.shape, batch) != batch:
        raise ValueError(
            f"the latent {name!r} has batch shape {tuple(batch)}, but what depends on it has "
            f"{tuple(value.shape)}; declare the dim of a plate in the prior as an event dim, with "
            ".to_event()"
        )
    return value
