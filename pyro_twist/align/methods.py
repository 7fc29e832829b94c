# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The methods that the job can compare; a new one is one :func:`register_method` away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pyro_twist.align.options import unknown
from pyro_twist.infer import (
    BestOfN,
    ImportanceSampling,
    SMCResult,
    TreeSearch,
    TrustRegionTwist,
    TwistedSMC,
)
from pyro_twist.twists import LookaheadTwist

__all__ = ["Method", "Setting", "default_methods", "find_methods", "methods", "register_method"]

Returns = Literal["samples of the model", "samples of the tilted law", "a maximiser"]


@dataclass(frozen=True)
class Setting:
    """
    What a method gets.

    :param model: The tilted model, which also writes ``"objective"``, the sum of the scaled
        rewards, to the state, and ``"ranking"``, the same or, where lambda is zero, the rewards.
    :param int num_particles: The budget: so many trajectories of the denoiser per population, in
        all passes together.
    :param int max_plate_nesting: For the engine.
    :param str population_plate: For the engine.
    :param int seed: For the engine; each method has its own, but for those that share a stream.
    :param str resampling: For the engine.
    :param float ess_threshold: For the engine.
    """

    model: Any
    num_particles: int
    max_plate_nesting: int
    population_plate: str | None
    seed: int
    resampling: str
    ess_threshold: float

    @property
    def common(self) -> dict[str, Any]:
        """The arguments that every inference class of the library takes."""
        return {
            "num_particles": self.num_particles,
            "max_plate_nesting": self.max_plate_nesting,
            "population_plate": self.population_plate,
            "seed": self.seed,
            "progress": False,
        }

    @property
    def resampled(self) -> dict[str, Any]:
        """Those and the options of classes that resample."""
        options = {"resampling": self.resampling, "ess_threshold": self.ess_threshold}
        return {**self.common, **options}


class Runnable(Protocol):
    """What a method makes: anything that runs and returns weighted particles."""

    def run(self) -> SMCResult:
        """Runs."""


@dataclass(frozen=True)
class Method:
    """
    A method of the comparison.

    :param str name: What to write on the command line.
    :param str title: What to write above a plot.
    :param str description: A sentence on what it does.
    :param str returns: ``"samples of the model"``, ``"samples of the tilted law"`` or ``"a
        maximiser"``. A maximiser's particles are ranked, the best first, and the first is what it
        returns.
    :param callable make: Makes the inference object from a :class:`Setting`.
    :param bool default: Whether it is run if no method is named.
    :param str needs: An attribute that the model must have, such as ``"mask_token_id"``.
    :param str stream: The method whose random stream it uses, so that both draw the same samples;
        by default its own.
    """

    name: str
    title: str
    description: str
    returns: Returns
    make: Callable[[Setting], Runnable]
    default: bool = False
    stream: str = ""
    needs: str = ""

    @property
    def tilted(self) -> bool:
        """Whether the method sees the reward at all."""
        return self.returns != "samples of the model"


_METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """
    Adds a method, or replaces the one of the same name.

    :param Method method: The method.
    :returns: The same.
    """
    _METHODS[method.name] = method
    return method


def methods() -> dict[str, Method]:
    """All methods by name, in the order in which they are run."""
    return dict(_METHODS)


def default_methods() -> tuple[str, ...]:
    """The names of the methods that are run if none is named."""
    return tuple(name for name, method in _METHODS.items() if method.default)


def find_methods(names: Sequence[str]) -> list[Method]:
    """
    Looks methods up.

    :param names: Their names; none for the default ones.
    :returns: Each once, in the order of registration.
    :raises OptionError: If there is none of that name.
    """
    for name in names:
        if name not in _METHODS:
            raise unknown("method", name, _METHODS)
    wanted = set(names or default_methods())
    return [method for method in _METHODS.values() if method.name in wanted]


def _best_of_n(setting: Setting) -> Runnable:
    return BestOfN(setting.model, keep=setting.num_particles, by="ranking", **setting.common)


def _steering(setting: Setting) -> Runnable:
    return TwistedSMC(setting.model, LookaheadTwist(setting.model), **setting.resampled)


def _steering_at_few(setting: Setting) -> Runnable:
    every = max(1, len(setting.model.timesteps) // 5)
    twist = LookaheadTwist(setting.model, every=every)
    return TwistedSMC(setting.model, twist, **setting.resampled)


def _tree_search(setting: Setting) -> Runnable:
    """A node for every particle, in as many steps."""
    size = math.ceil(setting.model.event_shape[0] / len(setting.model.timesteps))
    return TreeSearch(
        setting.model,
        setting.num_particles,
        group_size=size,
        seed=setting.seed,
        progress=False,
    )


def _trust_region(setting: Setting) -> Runnable:
    """
    As many passes as leave every one four particles, at most four, whose table the page shows
    (docs/decisions.md).
    """
    passes = max(1, min(4, setting.num_particles // 4))
    options = {**setting.resampled, "num_particles": setting.num_particles // passes}
    return TrustRegionTwist(setting.model, None, num_iterations=passes - 1, **options)


register_method(
    Method(
        "base",
        "Base model",
        "Samples of the model as it is; the reward is only measured.",
        "samples of the model",
        lambda setting: ImportanceSampling(setting.model, **setting.common),
        default=True,
    )
)
register_method(
    Method(
        "best-of-n",
        "Best of N",
        "Draws all samples from the model, the same ones as base, and returns the one of highest "
        "lambda * reward.",
        "a maximiser",
        _best_of_n,
        default=True,
        stream="base",
    )
)
register_method(
    Method(
        "importance",
        "Importance sampling",
        "Draws all samples from the model and weights them by exp(lambda * reward).",
        "samples of the tilted law",
        lambda setting: ImportanceSampling(setting.model, **setting.common),
    )
)
register_method(
    Method(
        "fk-few",
        "FK steering, five look-aheads",
        "Feynman-Kac steering that scores the predicted end state five times on the way, as usual "
        "where rewards are dear, and resamples on it.",
        "samples of the tilted law",
        _steering_at_few,
    )
)
register_method(
    Method(
        "fk",
        "FK steering",
        "Feynman-Kac steering that scores the predicted end state after every step and resamples "
        "on it.",
        "samples of the tilted law",
        _steering,
        default=True,
    )
)
register_method(
    Method(
        "tri-tsmc",
        "TRI-TSMC",
        "Splits the budget into up to four passes, learns from each how to steer the next "
        "(trust-region twisted SMC), and pools them.",
        "samples of the tilted law",
        _trust_region,
        default=True,
    )
)
register_method(
    Method(
        "tree-search",
        "Tree search (TReASURe)",
        "Keeps as many partial sequences as there are particles; reveals one position of each "
        "after the other, tries four tokens there, and keeps those whose likeliest completions "
        "have the highest lambda * reward.",
        "a maximiser",
        _tree_search,
        needs="mask_token_id",
    )
)
