# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What an algorithm is to those that run several, and the list of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from pyro_twist.infer import SMCResult
from pyro_twist.infer.controlled import too_large
from pyro_twist.potential import rewards_of

__all__ = [
    "Algorithm",
    "Returns",
    "Runnable",
    "Setting",
    "algorithms",
    "default_algorithms",
    "find_algorithm",
    "nearest",
    "register_algorithm",
]

Returns = Literal[
    "samples of the model",
    "samples of the tilted law",
    "samples of nearly the tilted law",
    "samples of another law",
    "a maximiser",
]
Need = Literal["masked", "gaussian", "gradient", "vector"]


@dataclass(frozen=True)
class Setting:
    """
    What an algorithm gets.

    :param model: The tilted model, which also writes ``"objective"``, its log-potential at the
        end, to the state, and ``"ranking"``, what the best are told by.
    :param int num_particles: The budget: so many trajectories of the denoiser per population, in
        all passes together.
    :param int max_plate_nesting: For the engine.
    :param str population_plate: For the engine.
    :param int seed: For the engine.
    :param str resampling: For the engine.
    :param float ess_threshold: For the engine.
    """

    model: Any
    num_particles: int
    max_plate_nesting: int = 0
    population_plate: str | None = None
    seed: int | None = None
    resampling: str = "systematic"
    ess_threshold: float = 0.5

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
    """What an algorithm makes: anything that runs and returns weighted particles."""

    def run(self) -> SMCResult:
        """Runs."""


@dataclass(frozen=True)
class Algorithm:
    """
    An algorithm with its settings, by a name.

    :param str name: What to write to get it.
    :param str title: What to write above a plot.
    :param str description: A sentence on what it does.
    :param str returns: ``"samples of the model"``, ``"samples of the tilted law"``, of ``"nearly
        the tilted law"``, which it comes to as steps get finer, or of ``"another law"``, or ``"a
        maximiser"``, whose particles are ranked: the first is what it returns.
    :param callable make: Makes the inference object from a :class:`Setting`.
    :param bool default: Whether it is run if none is named.
    :param tuple needs: What the model must have: ``"masked"`` tokens, ``"gaussian"`` kernels, a
        ``"gradient"`` of reward and denoiser, a ``"vector"`` of few dimensions as its state.
    :param str stream: The algorithm whose random stream it uses, so that both draw the same
        samples; by default its own.
    :param str costs: What it costs beyond its trajectories, in words.
    :param str reference: Where it is from.
    :raises ValueError: If there is no such ``returns`` or need.
    """

    name: str
    title: str
    description: str
    returns: Returns
    make: Callable[[Setting], Runnable]
    default: bool = False
    stream: str = ""
    needs: tuple[Need, ...] = ()
    costs: str = ""
    reference: str = ""

    def __post_init__(self) -> None:
        if self.returns not in get_args(Returns):
            raise ValueError(nearest("kind of result", self.returns, get_args(Returns)))
        for need in self.needs:
            if need not in get_args(Need):
                raise ValueError(nearest("need", need, get_args(Need)))

    @property
    def tilted(self) -> bool:
        """Whether the algorithm sees the reward at all."""
        return self.returns != "samples of the model"

    @property
    def weighted(self) -> bool:
        """Whether its particles have weights, and a normaliser."""
        return self.returns not in ("samples of the model", "a maximiser")

    def log_weights(self, result: SMCResult) -> Tensor:
        """
        What the particles of a result count: a maximiser returns the first, and those of the model
        as it is are alike.

        :param SMCResult result: Of a run of the algorithm.
        :returns: Of the shape of the result's own.
        :rtype: torch.Tensor
        """
        if self.returns == "a maximiser":
            alone = torch.full_like(result.log_weights, -torch.inf)
            alone[0] = 0.0
            return alone
        return result.log_weights if self.tilted else torch.zeros_like(result.log_weights)

    def unmet(self, model: Any) -> str:
        """
        What the model lacks.

        :param model: A tilted model.
        :returns: A clause that says it, or an empty string if nothing does.
        """
        return next((found for need in self.needs if (found := _MISSING[need](model))), "")


def _masked(model: Any) -> str:
    return "" if hasattr(model, "mask_token_id") else "is for models of sequences with a mask"


def _gaussian(model: Any) -> str:
    has = hasattr(model, "schedule") and not hasattr(model, "mask_token_id")
    return "" if has else "is for diffusion models with normal kernels"


def _gradient(model: Any) -> str:
    if lacks := _gaussian(model):
        return lacks
    found = rewards_of(model)
    black = [name for name, reward in found if getattr(reward, "differentiable", None) is False]
    return f"needs the gradient of the reward, and {black[0]!r} has none" if black else ""


def _vector(model: Any) -> str:
    return "is for numbers and vectors of at most 64 entries" if too_large(model) else ""


_MISSING: dict[Need, Callable[[Any], str]] = {
    "masked": _masked,
    "gaussian": _gaussian,
    "gradient": _gradient,
    "vector": _vector,
}
_ALGORITHMS: dict[str, Algorithm] = {}


def register_algorithm(algorithm: Algorithm) -> Algorithm:
    """
    Adds an algorithm, or replaces the one of the same name.

    :param Algorithm algorithm: The algorithm.
    :returns: The same.
    """
    _ALGORITHMS[algorithm.name] = algorithm
    return algorithm


def algorithms(model: Any = None) -> dict[str, Algorithm]:
    """
    The algorithms by name, in the order in which they are run.

    :param model: A tilted model, to leave out what it has not got what it takes for.
    """
    every = dict(_ALGORITHMS)
    return every if model is None else {n: one for n, one in every.items() if not one.unmet(model)}


def default_algorithms() -> tuple[str, ...]:
    """The names of the algorithms that are run if none is named."""
    return tuple(name for name, one in _ALGORITHMS.items() if one.default)


def find_algorithm(name: str) -> Algorithm:
    """
    Looks an algorithm up.

    :param str name: Its name.
    :raises ValueError: If there is none of that name.
    """
    if name not in _ALGORITHMS:
        raise ValueError(nearest("algorithm", name, _ALGORITHMS))
    return _ALGORITHMS[name]


def nearest(kind: str, value: Any, known: Iterable[str]) -> str:
    """
    What to say of a name that does not exist.

    :param str kind: What it should have been the name of.
    :param value: What was given.
    :param known: The names there are.
    :returns: A sentence that lists them, and the nearest.
    """
    names: Sequence[str] = list(known)
    lowered = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(value).lower(), lowered, 1)
    meant = f" (did you mean {lowered[close[0]]!r}?)" if close else ""
    return f"no {kind} {str(value)!r}{meant}; there are: {', '.join(names)}"
