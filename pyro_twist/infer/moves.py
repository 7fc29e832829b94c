# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Moves of particles that leave their law as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_twist.infer.increments import latent_sites
from pyro_twist.infer.result import SMCResult

__all__ = ["move_latents"]

_SCALES = (0.02, 2.0)
_DRAWS = 512

Values = dict[str, Tensor]


def move_latents(model: Any, result: SMCResult, num_moves: int = 50) -> SMCResult:
    r"""
    Metropolis-Hastings moves of the latents beside a trajectory, given its end.

    A latent that is drawn once is never drawn again, so that resampling leaves few values of it.
    Where latents reach nothing but the potential at the end, as an instrument that has taken a
    picture does, they are independent of the path given :math:`x_0`, and moves with the invariant
    law :math:`p(\text{latents}) \exp(\text{potential}(\text{latents}, x_0))` leave the law of the
    weighted particles as it is [1]. They cost evaluations of the potential, and none of a network.

    One latent is proposed at a time: a continuous one by a random walk in unconstrained space,
    whose scale is drawn anew between 0.02 and 2 times the prior's, a discrete one from its prior.

    :param model: The model of the run, which has latents from a
        :class:`~pyro_twist.latents.WithLatents` whose support is fixed, and a terminal potential.
    :param SMCResult result: The result of a run with ``history="paths"``.
    :param int num_moves: How many moves of each latent.
    :returns: The result with other latents; weights and the rest stay.
    :rtype: SMCResult
    :raises ValueError: If the model has no such latents, the run kept no paths, or a denoiser
        reads a latent.

    **References**

    [1] `Following a moving target - Monte Carlo inference for dynamic Bayesian models`
        Walter Gilks, Carlo Berzuini (2001), JRSS B 63, 127-146
    """
    latents = _with_latents(model)
    if result.samples is None:
        raise ValueError("the run kept no values of its latents; run it with history='paths'")
    with torch.no_grad(), poutine.block():
        spreads = _spreads(latents.prior)
        target = _Target(model, latents.prior, result)
        values = {name: result.samples[name] for name in spreads}
        _check_unread(model, target.entries(values))
        for _ in range(num_moves):
            for name, spread in spreads.items():
                values = target.moved(values, name, spread)
        state = {**result.state, **target.entries(values)}
    return replace(result, state=state, samples={**result.samples, **values})


def _with_latents(model: Any) -> Any:
    from pyro_twist.latents import WithLatents

    inner = model
    while not isinstance(inner, WithLatents):
        inner = vars(inner).get("model") if hasattr(inner, "__dict__") else None
        if inner is None:
            raise ValueError(
                f"{type(model).__name__} has no latents beside its trajectory; draw them in a "
                "WithLatents"
            )
    return inner


def _check_unread(model: Any, entries: Mapping[str, Tensor]) -> None:
    denoiser = getattr(model, "denoiser", None)
    read = {*getattr(denoiser, "conditioning", {}), "guidance_scale"} & set(entries)
    if denoiser is not None and read:
        raise ValueError(
            f"the denoiser reads {sorted(read)}, so that the path depends on these latents; only "
            "what reaches nothing but the potential at the end can be moved given that end"
        )


def _spreads(prior: Any) -> dict[str, Tensor | None]:
    """Standard deviations under the prior, in unconstrained space; ``None`` for discrete sites."""
    with poutine.trace() as tracer, pyro.plate("draws", _DRAWS, dim=-4):
        prior()
    found: dict[str, Tensor | None] = {}
    for name, site in latent_sites(tracer.trace):
        found[name] = None
        if not site["fn"].support.is_discrete:
            free = biject_to(site["fn"].support).inv(site["value"])
            found[name] = free.std(0).squeeze()
    return found


class _Target:
    """The law of the latents given the end of each path, unnormalised."""

    def __init__(self, model: Any, prior: Any, result: SMCResult) -> None:
        self.model, self.prior, self.state = model, prior, dict(result.state)
        self.event_dim = len(model.event_shape)
        self.batch = result.state["x"].shape[: result.state["x"].dim() - self.event_dim]

    def entries(self, values: Values) -> dict[str, Tensor]:
        """What the latents are in the state."""
        with poutine.condition(data=values):
            drawn: dict[str, Tensor] = dict(self.prior())
        return drawn

    def _at(self, values: Values) -> tuple[Tensor, poutine.Trace]:
        from pyro_twist.rewards import log_potential

        with poutine.trace() as tracer, poutine.condition(data=values):
            entries = dict(self.prior())
        total = log_potential(self.model, {**self.state, **entries}, self.state["x"])
        for name in values:
            total = total + _law(tracer.trace, name).log_prob(values[name]).double()
        return total.expand(self.batch), tracer.trace

    def moved(self, values: Values, name: str, spread: Tensor | None) -> Values:
        """The latents after a proposal of one of them."""
        before, trace = self._at(values)
        fn, old = _law(trace, name), values[name]
        if spread is None:
            new = fn.expand(self.batch).sample()
            proposed = {**values, name: new}
            jacobian = fn.log_prob(old).double() - fn.log_prob(new).double()
        else:
            new, jacobian = self._walk(fn, old, spread)
            proposed = {**values, name: new}
        gain = self._at(proposed)[0] - before + jacobian
        accepted = torch.rand_like(gain).log() < gain
        shape = accepted.shape + (1,) * (new.dim() - accepted.dim())
        return {**values, name: torch.where(accepted.reshape(shape), new, old)}

    def _walk(self, fn: Any, old: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """A random walk in unconstrained space, and the log of the change of volume."""
        transform = biject_to(fn.support)
        low, high = (math.log(one) for one in _SCALES)
        scale = (low + (high - low) * torch.rand(self.batch, device=old.device)).exp()
        free = transform.inv(old)
        scale = scale.reshape(self.batch + (1,) * (free.dim() - len(self.batch)))
        there = free + scale * spread * torch.randn_like(free)
        new: Tensor = transform(there)
        volumes = [
            _summed(transform.log_abs_det_jacobian(u, v), self.batch)
            for u, v in ((there, new), (free, old))
        ]
        return new, volumes[0] - volumes[1]


def _law(trace: poutine.Trace, name: str) -> Any:
    return trace.nodes[name]["fn"]


def _summed(value: Tensor, batch: torch.Size) -> Tensor:
    """Sums over event dims, in float64."""
    rest = value.dim() - len(batch)
    return value.double().flatten(-rest).sum(-1) if rest > 0 else value.double()
