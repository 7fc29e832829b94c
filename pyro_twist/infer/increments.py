# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The log-weight increments of one step, site by site.

A latent site contributes the log-ratio of model kernel and proposal; an observation or a factor of
the model its log-probability; a factor or an auxiliary site of the guide minus its own. A latent
site that the guide does not propose is drawn from the model and contributes nothing.

Handlers around the model enter as follows. The scale of a site is a power of the model's density,
at latent sites too: ``s log p - log q``, where ``q`` is what was drawn from, and has no scale. A
mask takes factors and observations away; a latent site keeps its law. A latent site whose value a
handler has set already, or that an intervention has left without use, is no business of a guide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.infer_config_messenger import InferConfigMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from pyro.poutine.util import site_is_subsample

from pyro_twist.twists.tilting import log_ratio

__all__ = [
    "Increment",
    "LogProbReducer",
    "effect_increments",
    "explicit_increments",
    "latent_sites",
    "sample_sites",
]

Site = Any


@dataclass(frozen=True)
class Increment:
    """
    A contribution to the log-weights.

    :param str name: The site it comes from.
    :param torch.Tensor value: Its log-probability, of the batch shape of the site.
    :param tuple plates: The plates the site is in.
    """

    name: str
    value: torch.Tensor
    plates: tuple[Any, ...] = ()


def sample_sites(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    """The sample sites of a trace by name, those of plates left out."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


def latent_sites(trace: poutine.Trace, *, given: bool = False) -> Iterator[tuple[str, Site]]:
    """
    The latent sites of a trace that were drawn and whose values the model uses.

    :param bool given: Whether those count that a handler has given a value instead.
    """
    for name, site in sample_sites(trace):
        how = site.get("_left_alone")
        if not site["is_observed"] and (how is None or (given and how == "given")):
            yield name, site


def _increment(name: str, site: Site, value: torch.Tensor) -> Increment:
    return Increment(name, value, tuple(site["cond_indep_stack"]))


def _log_prob(name: str, site: Site) -> torch.Tensor:
    _refuse_subsample(name, site)
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(value, site["scale"], site["mask"])


def _is_deterministic(site: Site) -> bool:
    return bool(site["infer"].get("_deterministic", False))


def _draw_log_prob(site: Site) -> torch.Tensor:
    """The log-density that a value was drawn from, which no scale or mask changes."""
    value: torch.Tensor = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return value


def _latent(name: str, site: Site, p: Any, q: Any) -> Iterator[Increment]:
    """What a latent site adds that was drawn from ``q``: nothing if that is the model's ``p``."""
    _refuse_subsample(name, site)
    if p is not q:
        yield _increment(name, site, log_ratio(p, q, site["value"]))
    scale = site["scale"]
    if isinstance(scale, torch.Tensor) or scale != 1.0:
        power = p.log_prob(site["value"]).double() * (scale - 1.0)
        yield _increment(name, site, power)


def _refuse_subsample(name: str, site: Site) -> None:
    reason = (
        "the exponential of a subsampled log-probability is no unbiased estimate of a weight. "
        "Observe the whole plate"
        if site["is_observed"]
        else "particles cannot be weighted by a part of their latents. Draw the whole plate"
    )
    kind = "observation or factor" if site["is_observed"] else "latent site"
    for plate in site["cond_indep_stack"]:
        if plate.full_size not in (None, plate.size):
            raise ValueError(
                f"the {kind} {name!r} is in the plate {plate.name!r}, of which {plate.size} "
                f"of {plate.full_size} entries are drawn; {reason}."
            )


class _Watch(Messenger):
    """Sees what the handlers around a model have made of its sites, before any guide does."""

    def __init__(self) -> None:
        super().__init__()
        self.left_alone: set[str] = set()
        self.parameters: set[str] = set()

    def _pyro_sample(self, msg: Site) -> None:
        unused = msg.get("_intervener_id") is not None
        if site_is_subsample(msg) or msg["is_observed"] or not (unused or msg["value"] is not None):
            return
        msg["_left_alone"] = "unused" if unused else "given"
        self.left_alone.add(msg["name"])

    def _pyro_param(self, msg: Site) -> None:
        self.parameters.add(msg["name"])

    def without_parameters(self, trace: poutine.Trace) -> poutine.Trace:
        """Drops parameters that a handler around the run has made a site of the outer program."""
        for name in self.parameters & set(trace.nodes):
            if trace.nodes[name]["type"] == "sample":
                trace.remove_node(name)
        return trace


def effect_increments(
    run: Callable[..., Any],
    guide: GuideMessenger | None,
    plate: Any,
    state: Any,
    args: Any,
    kwargs: Any,
) -> tuple[poutine.Trace, list[Increment]]:
    """
    Runs the model once, its sites redirected by an effect-based guide, if there is one.

    :param callable run: The ``init`` or ``step`` of the model.
    :param GuideMessenger guide: The guide, or ``None`` for the model's own kernels.
    :param plate: The particle plate.
    :param state: The state, first argument of ``run``.
    :returns: The trace, and the increments of all sites that have one.
    :rtype: tuple
    """
    watch = _Watch()
    if guide is None:
        with poutine.trace() as tracer, plate, watch:
            run(state, *args, **kwargs)
        trace = watch.without_parameters(tracer.trace)
        return trace, list(_effects(trace))
    with _called(guide, ((state, *args), kwargs), watch.left_alone), guide, plate, watch:
        if isinstance(guide, AutoMessenger):
            # what its own __call__ would do: parameters are not batched over particles
            object.__setattr__(guide, "_outer_plates", get_plates())
        run(state, *args, **kwargs)
    trace, guide.trace = watch.without_parameters(guide.trace), poutine.Trace()
    return trace, list(_effects(trace))


@contextmanager
def _called(guide: GuideMessenger, args_kwargs: Any, left_alone: set[str]) -> Iterator[None]:
    """Tells the guide its arguments, and marks the sites that it emits itself."""
    original = guide.get_posterior
    mark: Any = {"_from_guide": True}

    def marked(name: str, prior: Any) -> Any:
        if name in left_alone:
            return prior
        with InferConfigMessenger(lambda site: mark):
            return original(name, prior)

    guide.args_kwargs = args_kwargs
    object.__setattr__(guide, "get_posterior", marked)
    try:
        yield
    finally:
        object.__delattr__(guide, "get_posterior")
        del guide.args_kwargs
        guide.__dict__.pop("_outer_plates", None)


def _effects(trace: poutine.Trace) -> Iterator[Increment]:
    for name, site in sample_sites(trace):
        if site["infer"].get("_from_guide"):
            if not _is_deterministic(site):
                yield _increment(name, site, -_guide_log_prob(name, site))
        elif site["is_observed"]:
            if not _is_deterministic(site):
                yield _increment(name, site, _log_prob(name, site))
        elif "_left_alone" not in site:
            yield from _latent(name, site, site["infer"].get("prior", site["fn"]), site["fn"])


def _guide_log_prob(name: str, site: Site) -> torch.Tensor:
    """A factor as it is handled, or the density that an auxiliary value was drawn from."""
    return _log_prob(name, site) if site["is_observed"] else _draw_log_prob(site)


def explicit_increments(
    run: Callable[..., Any],
    guide: Callable[..., Any],
    plate: Any,
    state: Any,
    args: Any,
    kwargs: Any,
) -> tuple[poutine.Trace, list[Increment]]:
    """
    Runs the guide, then the model replayed against it.

    :param callable run: The ``init`` or ``step`` of the model.
    :param callable guide: The ``init`` or ``step`` of the guide, which may not write the state.
    :returns: The trace of the model, and the increments of all sites that have one.
    :rtype: tuple
    :raises ValueError: If the guide samples a site that the model lacks, or repeats a factor.
    """
    lock = state._lock() if hasattr(state, "_lock") else nullcontext()
    guide_watch = _Watch()
    with poutine.trace() as guide_tracer, lock, plate, guide_watch:
        guide(state, *args, **kwargs)
    guide_trace, watch = guide_watch.without_parameters(guide_tracer.trace), _Watch()
    with poutine.trace() as tracer, poutine.replay(trace=guide_trace), plate, watch:
        run(state, *args, **kwargs)
    trace = watch.without_parameters(tracer.trace)
    return trace, list(_replayed(trace, guide_trace))


def _replayed(trace: poutine.Trace, guide_trace: poutine.Trace) -> Iterator[Increment]:
    for name, site in sample_sites(guide_trace):
        if _is_deterministic(site):
            continue
        model_site = trace.nodes.get(name)
        if model_site is None or model_site["type"] != "sample":
            _check_extra(name, site, trace)
            yield _increment(name, site, -_guide_log_prob(name, site))
        else:
            _check_shared(name, model_site, site)
            yield from _latent(name, model_site, model_site["fn"], site["fn"])
    for name, site in sample_sites(trace):
        if site["is_observed"]:
            if not _is_deterministic(site):
                yield _increment(name, site, _log_prob(name, site))
        elif name not in guide_trace and "_left_alone" not in site:
            yield from _latent(name, site, site["fn"], site["fn"])


def _check_shared(name: str, model_site: Site, site: Site) -> None:
    if site["is_observed"]:
        raise ValueError(
            f"the guide's factor or observation {name!r} has a namesake in the model, which "
            "would count it twice. Rename the one in the guide."
        )
    if model_site["is_observed"] or model_site.get("_left_alone") == "given":
        how = "observes" if model_site["is_observed"] else "has been given a value for"
        raise ValueError(
            f"the guide samples {name!r}, which the model {how}. Take it out of the guide, "
            "for example with pyro_twist.handlers.block(guide, hide=...)."
        )
    p, q = model_site["fn"], site["fn"]
    if p.event_dim != q.event_dim:
        raise ValueError(
            f"site {name!r} has event_dim {p.event_dim} in the model and {q.event_dim} in the "
            "guide; declare the same with .to_event() in both"
        )


def _check_extra(name: str, site: Site, trace: poutine.Trace) -> None:
    if site["is_observed"] or site["infer"].get("is_auxiliary"):
        return
    known = ", ".join(repr(known) for known, _ in sample_sites(trace)) or "none"
    raise ValueError(
        f"the guide samples {name!r}, but the model has no such site (it has {known}). Rename it, "
        "or mark it infer={'is_auxiliary': True}."
    )


class LogProbReducer:
    """
    Sums log-probabilities over everything but particles and populations.

    :param int num_particles: The size of the particle plate.
    :param int max_plate_nesting: The number of dims right of the particles.
    :param str population_plate: The name of the plate of populations, or ``None``.
    """

    def __init__(
        self, num_particles: int, max_plate_nesting: int, population_plate: str | None
    ) -> None:
        self.num_particles = num_particles
        self.max_plate_nesting = max_plate_nesting
        self.population_plate = population_plate
        self.population_axis = 1
        self.shape: tuple[int, ...] = (num_particles,)
        self.device = torch.device("cpu")

    def find_populations(self, trace: poutine.Trace) -> None:
        """Learns the device and, from the named plate, number and dim of the populations."""
        devices = [site["value"].device for _, site in sample_sites(trace)]
        # an index drawn on the CPU must not hold the weights of particles on a GPU there
        self.device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        if self.population_plate is None:
            return
        frames = [f for _, site in sample_sites(trace) for f in site["cond_indep_stack"]]
        named = [f for f in frames if f.name == self.population_plate]
        if not named:
            known = sorted({f.name for f in frames} - {"particles"})
            raise ValueError(
                f"population_plate={self.population_plate!r}: no site of the model's init is in "
                f"such a plate; its plates are {known}"
            )
        self.population_axis = self.max_plate_nesting + 1 + named[0].dim
        self.shape = (self.num_particles, named[0].size)

    def __call__(self, increment: Increment) -> Increment:
        """Reduces an increment to the shape of the log-weights, in float64."""
        self._check_dims(increment)
        self._check_population(increment)
        return replace(increment, value=self._reduce(increment.name, increment.value))

    def check_latents(self, trace: poutine.Trace) -> None:
        """Refuses latents that all populations would share."""
        for name, site in sample_sites(trace):
            if self.population_plate is not None and not site["is_observed"]:
                self._check_population(_increment(name, site, site["value"]))

    def _check_dims(self, increment: Increment) -> None:
        """Refuses batch dims that are no plate's: they would mix the particles."""
        plates = {plate.dim: plate.size for plate in increment.plates if plate.vectorized}
        sizes = enumerate(reversed(increment.value.shape), start=1)
        stray = [-k for k, size in sizes if size > 1 and plates.get(-k) != size]
        if stray:
            raise ValueError(
                f"site {increment.name!r} has a log-probability of shape "
                f"{tuple(increment.value.shape)}, but dim {stray[0]} is in no plate. Try one of "
                "the following fixes: declare event dims with .to_event(); open a pyro.plate; "
                "return one number per particle, of the batch shape "
                f"{(self.num_particles,) + (1,) * self.max_plate_nesting}, from a reward; raise "
                "max_plate_nesting."
            )

    def _check_population(self, increment: Increment) -> None:
        if self.population_plate is None:
            return
        if all(plate.name != self.population_plate for plate in increment.plates):
            raise ValueError(
                f"site {increment.name!r} is outside the plate {self.population_plate!r}, so its "
                "weight would be shared between populations that are resampled separately. Move "
                "it into the plate."
            )

    def _reduce(self, name: str, value: torch.Tensor) -> torch.Tensor:
        dims = self.max_plate_nesting + 1
        if value.dim() != dims or value.shape[0] != self.num_particles:
            raise ValueError(
                f"site {name!r} has a log-probability of shape {tuple(value.shape)}; expected "
                f"{dims} dims, the first of size {self.num_particles} for the particles "
                f"(max_plate_nesting={self.max_plate_nesting}). Try one of the following fixes: "
                "raise max_plate_nesting; declare event dims with .to_event(); return one number "
                "per particle from a reward."
            )
        keep = {0, self.population_axis} if len(self.shape) == 2 else {0}
        rest = [dim for dim in range(dims) if dim not in keep]
        value = value.to(self.device, torch.float64)
        return value.sum(rest) if rest else value

    def check_log_twist(self, value: torch.Tensor | float, step: str) -> torch.Tensor:
        """
        Brings a log-twist to the shape of the log-weights.

        :raises ValueError: If its shape fits neither them nor the batch shape, or it is not finite.
        """
        value = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        if value.dim() == 0:
            value = value.expand(self.shape)
        if value.shape != self.shape:
            value = self._reduce("log_twist", value)
        if not torch.isfinite(value).all():
            raise ValueError(
                f"log_twist after {step} is not finite: {value[~torch.isfinite(value)][0].item()}. "
                "A twist must be positive; put a floor under it."
            )
        return value

    def state_dict(self) -> dict[str, Any]:
        """What was learnt from the first trace."""
        return {"axis": self.population_axis, "shape": self.shape}

    def load_state_dict(self, saved: dict[str, Any], device: torch.device) -> None:
        """Restores what :meth:`state_dict` returned, for weights on a device."""
        self.population_axis, self.shape = saved["axis"], tuple(saved["shape"])
        self.device = device
