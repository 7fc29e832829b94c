# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Latents beside the trajectory: a class, a guidance scale, the temperature of a reward, a style.

:class:`WithLatents` draws them before the trajectory and keeps them in the state, where networks
and rewards find them, and where they follow their particle. :class:`JointTwist` puts an ordinary
Pyro guide for them beside the twist of the trajectory; both are fitted together.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from operator import attrgetter
from typing import Any, Self

import torch
from pyro import poutine
from pyro.distributions import Bernoulli, Categorical, Delta, OneHotCategorical
from pyro.infer.autoguide.effect import AutoMessenger, AutoRegressiveMessenger
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.infer.autoguide.utils import deep_setattr
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from torch.distributions import transform_to
from torch.distributions.constraints import real

from pyro_twist.potential import inside, plate_of
from pyro_twist.twists.learned import LearnedTwist
from pyro_twist.twists.paths import Pass, Paths, PathStep
from pyro_twist.twists.statistics import Quadratic
from pyro_twist.twists.tilting import log_ratio
from pyro_twist.twists.twist import SumTwist, Twist
from pyro_twist.wrapper import ModelWrapper

__all__ = ["AutoLatents", "JointTwist", "WithLatents"]

_TRAJECTORY = re.compile(r"x_\d+")
_UPSTREAM = "upstream: "
_RATIO = "latents_log_ratio"


class WithLatents(ModelWrapper):
    """
    A model whose trajectory depends on latents that are drawn before it.

    Each latent is written to the state, where a denoiser finds its conditioning and its
    ``guidance_scale``, a :class:`~pyro_twist.rewards.RewardTilted` its ``scale``, and any other
    potential what it likes. It follows its particle through every resampling, and its posterior is
    read from a result as that of ``"x"`` is::

        def prior():
            label = pyro.sample("label", dist.Categorical(torch.ones(8)))
            strength = pyro.sample("strength", dist.LogNormal(0.0, 0.5))
            return {"class_labels": label, "guidance_scale": strength}

        model = RewardTilted(WithLatents(diffusion, prior), reward, scale=5.0)
        result = TwistedSMC(model, LookaheadTwist(model), 64).run()
        result.expectation("guidance_scale")

    :param model: A model with ``init`` and ``step``.
    :param callable prior: A Pyro function without arguments that draws the latents and returns
        what goes into the state, a dict from names to tensors of the batch shape and any event
        shape.
    :param bool shared: Where the model has a ``plate``: whether its entries share the latents;
        otherwise each entry has its own.
    """

    def __init__(
        self, model: Any, prior: Callable[[], Mapping[str, torch.Tensor]], *, shared: bool = False
    ) -> None:
        super().__init__(model)
        if not callable(prior):
            raise ValueError(f"prior must be a function that draws the latents, got {prior!r}")
        self.prior = prior
        self.shared = shared

    def init(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """
        Draws the latents, then runs the base model's ``init``.

        :param dict state: The state, written to.
        """
        with nullcontext() if self.shared else inside(plate_of(self.model)):
            drawn = self.prior()
        if not isinstance(drawn, Mapping):
            raise ValueError(
                f"prior returned {type(drawn).__name__}; return a dict from names in the state to "
                "the latents drawn"
            )
        for name, value in drawn.items():
            state[name] = value
        self.model.init(state, *args, **kwargs)
        _check_kept(state, drawn)


def _check_kept(state: Any, drawn: Mapping[str, Any]) -> None:
    """A latent that the model overwrites would be drawn, weighed and never seen."""
    for name, value in drawn.items():
        if state[name] is not value:
            raise ValueError(
                f"the model writes state[{name!r}], where the latent of that name was put; return "
                "it from the prior under another name"
            )


class AutoLatents(AutoRegressiveMessenger):
    """
    A guide for latents of any kind that begins at their prior.

    Continuous latents are moved and stretched in unconstrained space, as by Pyro's
    :class:`~pyro.infer.autoguide.effect.AutoRegressiveMessenger`; those with logits
    (``Categorical``, ``OneHotCategorical``, ``Bernoulli``) have theirs shifted, for each entry of
    an event and of the model's plates by itself; other discrete ones are left to the prior. Latents
    are independent except for what the prior says.

    :param model: The model.
    """

    def __init__(self, model: Any) -> None:
        # at a scale of one the start is zero wherever it is looked for, if only it is finite
        super().__init__(model, init_loc_fn=init_to_feasible, init_scale=1.0)

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The prior with its parameters moved."""
        base = prior.base_dist if isinstance(prior, torch.distributions.Independent) else prior
        if isinstance(base, (Bernoulli, Categorical, OneHotCategorical)):
            return self._shifted(name, prior, base)
        return prior if prior.support.is_discrete else super().get_posterior(name, prior)

    def _shifted(self, name: str, prior: Any, base: Any) -> Any:
        classes = base.param_shape[-1:] if isinstance(base, Categorical) else ()
        shift = self._shift(name, prior.batch_shape, prior.event_shape + classes)
        moved = type(base)(logits=base.logits + shift)
        return moved.to_event(prior.event_dim - base.event_dim)

    def _shift(self, name: str, batch: torch.Size, event: torch.Size) -> torch.Tensor:
        try:
            shift: torch.Tensor = attrgetter(name)(self.shifts)
        except AttributeError:
            zeros = self._adjust_plates(torch.zeros(batch + event), len(event))
            deep_setattr(self, f"shifts.{name}", torch.nn.Parameter(zeros))
            shift = attrgetter(name)(self.shifts)
        return shift


class JointTwist(SumTwist):
    """
    A twist for the trajectory, and an ordinary Pyro guide for the latents beside it.

    The guide is one of

    - an effect-based guide: :class:`AutoLatents`, which begins at the prior, one of Pyro's, such as
      ``AutoNormalMessenger(model, init_scale=1.0)`` for continuous latents (the default
      ``init_scale`` of 0.1 is meant for SVI, and far too narrow for importance weights), or a
      :class:`~pyro.poutine.guide.GuideMessenger` of one's own;
    - an object with ``init(state)``, or a function, that samples the latents in the order in which
      the model does, each from a distribution it names;
    - ``None``: latents come from their prior.

    Parameters of the guide, those that it makes by ``pyro.param`` included, are parameters of this
    twist, so that :class:`~pyro_twist.infer.TrustRegionTwist` fits them by weighted likelihood of
    the latents, beside the twist's own fit on the trajectory::

        guide = JointTwist(LookaheadTwist(model), AutoLatents(model))
        result = TrustRegionTwist(model, guide, 64).run()

    :param Twist twist: The twist of the trajectory.
    :param guide: The guide of the latents.
    :param sites: The names of the latents that the guide proposes, or a function from a name to
        whether it does; by default all but ``x_0``, ``x_1``, ...
    :param reads: The entries of the state that the guide reads besides latents of the same step,
        which are none where latents are drawn in ``init``; see
        :class:`~pyro_twist.twists.LearnedTwist`.
    :param bool value: Whether the guide enters the weights as well, as its density over the prior's
        to the power ``t / T``. Without, particles whose latents the guide prefers have low weights
        until the twist makes up for it. A look-ahead does, at once; give ``True`` beside a twist
        of ``x`` alone, such as :class:`~pyro_twist.twists.ShiftTwist`. The law is the same.
    :param float ridge: A penalty on how far the guide's parameters move, in units of one path's
        information. It keeps classes that a pass has lost from being lost for good.
    :raises ValueError: If ``guide`` is none of these.
    """

    def __init__(
        self,
        twist: Twist,
        guide: Any = None,
        sites: Collection[str] | Callable[[str], bool] | None = None,
        *,
        value: bool = False,
        reads: tuple[str, ...] | None = (),
        ridge: float = 1e-2,
    ) -> None:
        if not isinstance(twist, Twist):
            raise ValueError(
                f"twist={twist!r} is no Twist; for a proposal of the latents alone give "
                "JointTwist(Twist(model), guide)"
            )
        latents = Twist(twist.model) if guide is None else _Latents(twist.model, guide, ridge)
        if isinstance(latents, _Latents):
            latents.reads = reads
        super().__init__(twist, latents)
        self._is_latent = _chooser(sites)
        self.value = value
        self._ratios: list[torch.Tensor] = []

    def proposes(self, name: str) -> bool:
        """Whether a site is a latent beside the trajectory."""
        return self._is_latent(name)

    def fits(self, name: str) -> bool:
        """Whether a fit has a use for a site: those of a guide without parameters have none."""
        part = self.parts()[1]
        return not self.proposes(name) or any(p.requires_grad for p in part.parameters())

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The proposal of the guide for latents, of the twist for all other sites."""
        part = self.parts()[self.proposes(name)]
        part.stepping, part.args_kwargs = self.stepping, self.args_kwargs
        part.trace = self.trace
        try:
            return part.get_posterior(name, prior)
        finally:
            del part.args_kwargs
            part.trace = poutine.Trace()

    def __enter__(self) -> Self:
        self._ratios = []
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        super()._pyro_post_sample(msg)
        prior = msg["infer"].get("prior")
        if self.value and not self.stepping and prior is not None and prior is not msg["fn"]:
            if self.proposes(msg["name"]):
                self._ratios.append(-log_ratio(prior, msg["fn"], msg["value"]))

    def state_keys(self) -> tuple[str, ...]:
        """Those of the twist, and the log-density of the latents over the prior's."""
        return (*super().state_keys(), *((_RATIO,) if self.value else ()))

    def log_twist(self, state: Any, *args: Any, **kwargs: Any) -> torch.Tensor | float:
        """See :meth:`~pyro_twist.twists.Twist.log_twist`."""
        total = super().log_twist(state, *args, **kwargs)
        if not self.stepping and self._ratios:
            state[_RATIO] = sum(self._ratios[1:], start=self._ratios[0])
        if _RATIO not in state:
            return total
        return total + state[_RATIO] * (self.time_after(*args) / self.model.timesteps[0])

    def separate(
        self, batches: Sequence[Paths | Quadratic]
    ) -> list[tuple[Twist, Sequence[Paths | Quadratic]]]:
        """
        Twist and guide, each with the paths of its own sites.

        :param list batches: Weighted paths.
        """
        twist, latents = self.parts()
        if any(isinstance(one, Quadratic) for one in batches):
            return [(twist, batches)]
        paths = [one for one in batches if isinstance(one, Paths)]
        return [(twist, self._part_of(paths, False)), (latents, self._part_of(paths, True))]

    def _part_of(self, batches: Sequence[Paths], latent: bool) -> list[Paths]:
        return [
            replace(one, steps=tuple(s for s in one.steps if self.proposes(s.name) == latent))
            for one in batches
        ]


class _Latents(LearnedTwist):
    """A Pyro guide as a twist that proposes and has no value."""

    def __init__(self, model: Any, guide: Any, ridge: float) -> None:
        super().__init__(model)
        effect = isinstance(guide, GuideMessenger)
        if not effect and not callable(getattr(guide, "init", guide)):
            raise ValueError(
                f"guide={guide!r} is none of: an effect-based guide, an object with init(state), "
                "a function that samples the latents, None"
            )
        # a module of torch in between keeps the guide's names its own
        modules = [guide] if isinstance(guide, torch.nn.Module) else []
        self.modules_held = torch.nn.ModuleList(modules)
        self.own = torch.nn.ParameterDict()
        self._constraints: dict[str, Any] = {}
        self._guide, self.ridge = (guide,), ridge
        self._start: dict[str, torch.Tensor] = {}

    def get_posterior(self, name: str, prior: Any) -> Any:
        """What the guide proposes at a site."""
        guide, upstream = self._guide[0], self._upstream(name)
        with _OwnParameters(self.own, self._constraints):
            if isinstance(guide, GuideMessenger):
                posterior = self._by_effect(guide, upstream, name, prior)
            else:
                posterior = _by_replay(self._call, upstream, name)
        if isinstance(posterior, torch.Tensor):
            posterior = Delta(posterior, event_dim=prior.event_dim)
        return posterior

    def _by_effect(
        self, guide: GuideMessenger, upstream: dict[str, Any], name: str, prior: Any
    ) -> Any:
        guide.args_kwargs, guide.trace = self.args_kwargs, _trace_of(upstream)
        if isinstance(guide, AutoMessenger):
            particles = tuple(plate for plate in get_plates() if plate.name == "particles")
            object.__setattr__(guide, "_outer_plates", particles)
        try:
            return guide.get_posterior(name, prior)
        finally:
            del guide.args_kwargs
            guide.__dict__.pop("_outer_plates", None)

    def _call(self) -> None:
        guide, (args, kwargs) = self._guide[0], self.args_kwargs
        if hasattr(guide, "init"):
            method = guide.step if self.stepping else guide.init
            method(*args, **kwargs)
        else:
            guide(*args[1:], **kwargs)

    def _upstream(self, name: str) -> dict[str, Any]:
        """The values of sites before this one in the same step: recorded ones, or those so far."""
        state = self.args_kwargs[0][0]
        recorded = {
            key.removeprefix(_UPSTREAM): value
            for key, value in state.items()
            if isinstance(key, str) and key.startswith(_UPSTREAM)
        }
        sites = ((key, site) for key, site in self.trace.nodes.items() if key != name)
        drawn = {key: site["value"] for key, site in sites if site["type"] == "sample"}
        return recorded or drawn

    def observe(self, passes: Sequence[Pass]) -> None:
        """Remembers where the parameters started."""
        for key, value in self.named_parameters():
            self._start.setdefault(key, value.detach().clone())

    def penalty(self) -> torch.Tensor:
        """A ridge towards where the parameters started."""
        total = super().penalty()
        for key, value in self.named_parameters():
            moved = value - self._start.get(key, value.detach())
            total = total + 0.5 * self.ridge * moved.square().sum()
        return total


def upstream_entries(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    What a recorded step keeps of the sites before it in the same ``init`` or ``step``.

    :param dict values: Their values by name.
    :returns: Entries for the recorded state.
    """
    return {_UPSTREAM + name: value for name, value in values.items()}


def separate(
    twist: Any, batches: Sequence[Paths | Quadratic]
) -> Sequence[tuple[Any, Sequence[Paths | Quadratic]]]:
    """The parts of a twist that are fitted on sites of their own, with the paths of these sites."""
    return twist.separate(batches) if isinstance(twist, JointTwist) else [(twist, batches)]


def own_passes(twist: Any, part: Any, passes: Sequence[Pass]) -> Sequence[Pass]:
    """The passes as a part of a twist is to see them: latents are the business of their guide."""
    if not isinstance(twist, JointTwist) or isinstance(part, _Latents):
        return passes
    return [
        replace(one, steps=[[s for s in step if not twist.proposes(s.name)] for step in one.steps])
        for one in passes
    ]


def recorded_steps(twist: Any, steps: Sequence[PathStep]) -> list[PathStep]:
    """Those latent sites of a step that fits have a use for."""
    if not isinstance(twist, JointTwist):
        return list(steps)
    return [
        # what latents were drawn from is not asked again
        replace(step, posterior=step.prior) if twist.proposes(step.name) else step
        for step in steps
        if twist.fits(step.name)
    ]


def _chooser(sites: Collection[str] | Callable[[str], bool] | None) -> Callable[[str], bool]:
    if sites is None:
        return _is_beside
    if callable(sites):
        return sites
    if isinstance(sites, str):
        raise ValueError(f"sites={sites!r}; give a collection of names, as in sites=[{sites!r}]")
    return frozenset(sites).__contains__


def _is_beside(name: str) -> bool:
    return _TRAJECTORY.fullmatch(name) is None


def _trace_of(values: Mapping[str, torch.Tensor]) -> poutine.Trace:
    trace = poutine.Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", value=value, is_observed=True)
    return trace


def _by_replay(call: Callable[[], None], upstream: dict[str, Any], name: str) -> Any:
    """The distribution of a site in an explicit guide, given the values of those before it."""
    # the plates of the model's site are expanded over later, from the distribution
    hidden = poutine.block(hide_types=["sample", "observe"])
    with hidden, poutine.trace() as tracer, poutine.condition(data=upstream):
        call()
    for other, site in tracer.trace.nodes.items():
        if site["type"] != "sample":
            continue
        if other == name:
            _check_site(name, site)
            return site["fn"]
        if not site["is_observed"]:
            raise ValueError(
                f"the guide draws {other!r} before {name!r}, the model does not; draw latents in "
                "the model's order, and no auxiliary ones. Of Pyro's automatic guides take those "
                "in pyro.infer.autoguide.effect."
            )
    raise ValueError(
        f"the guide does not draw the latent {name!r}; add it, or name those it draws in sites="
    )


def _check_site(name: str, site: Any) -> None:
    if site["is_observed"] or isinstance(site["fn"], Delta):
        raise ValueError(
            f"the guide gives {name!r} a value instead of drawing it from a distribution, which "
            "leaves nothing to weigh"
        )


class _OwnParameters(Messenger):
    """Keeps parameters that a guide makes by ``pyro.param`` in a module, out of the store."""

    def __init__(self, own: torch.nn.ParameterDict, constraints: dict[str, Any]) -> None:
        super().__init__()
        self.own, self.constraints = own, constraints

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"].replace(".", "/")
        if name not in self.own and not self._make(name, *msg["args"][1:], **msg["kwargs"]):
            return
        value = transform_to(self.constraints[name])(self.own[name])
        # what Pyro's own parameters have, for handlers outside
        value.unconstrained = weakref.ref(self.own[name])
        msg["value"] = value

    def _make(self, name: str, start: Any = None, constraint: Any = real, **_: Any) -> bool:
        """Makes a parameter, unless it belongs to a module already."""
        if start is None or isinstance(start, torch.nn.Parameter):
            return False
        start = (start() if callable(start) else start).detach()
        self.own[name] = torch.nn.Parameter(transform_to(constraint).inv(start).clone())
        self.constraints[name] = constraint
        return True
