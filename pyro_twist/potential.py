# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The log-potential of a model's end: the sum of the factors and observations that it emits there.

A model with a method ``terminal(state, x0)``, which emits them, can be asked what any guess of its
end state is worth. This module knows neither what rewards are, nor of what kind the model is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = [
    "batch_shape_of",
    "inside",
    "log_potential",
    "plate_of",
    "rewards_of",
    "sum_of_factors",
]


def log_potential(model: Any, state: Any, x0: Tensor) -> Tensor:
    """
    Evaluates the terminal log-potential of a model at a guess of its end state.

    Sums all factors and observations that ``model.terminal(state, x0)`` emits, scales and masks
    honoured, over the plates opened inside it, except the model's own ``plate``. Nothing reaches
    handlers outside. Gradients flow to ``x0`` where the factors have them.

    :param model: A model with ``terminal`` and, unless there is one batch dim only,
        ``event_shape``.
    :param dict state: The state, not written to.
    :param torch.Tensor x0: The guess, of shape ``batch_shape + event_shape``.
    :returns: The log-potential, float64, of shape ``batch_shape``; may be minus infinity.
    :raises ValueError: If the model has no ``terminal``, or a site is latent, of a shape that
        fits no plate, NaN or plus infinity.

    Example::

        >>> import torch
        >>> from types import SimpleNamespace
        >>> from pyro_twist import Tilted
        >>> base = SimpleNamespace(timesteps=(1,), event_shape=(2,))
        >>> tilted = Tilted(base, lambda state, x0: pyro.factor("sum", x0.sum(-1)))
        >>> log_potential(tilted, {}, torch.ones(3, 2)).tolist()
        [2.0, 2.0, 2.0]
    """
    if not hasattr(model, "terminal"):
        raise ValueError(
            f"{type(model).__name__} has no method `terminal`, so it has no terminal potential. "
            "Wrap it: RewardTilted(model, reward), or Tilted(model, potential)."
        )
    batch_shape = batch_shape_of(model, x0)
    with poutine.block(), _reserved(model, batch_shape), poutine.trace() as tracer:
        model.terminal(state, x0)
    for name, site in tracer.trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            _check_site(name, site)
    return sum_of_factors(tracer.trace, batch_shape, x0.device)


def _check_site(name: str, site: Mapping[str, Any]) -> None:
    if not site["is_observed"]:
        raise ValueError(
            f"terminal draws the latent site {name!r}; it may only emit factors and observations. "
            "Draw it in init and read it from the state."
        )


def sum_of_factors(
    trace: poutine.Trace, batch_shape: torch.Size, device: torch.device | None = None
) -> Tensor:
    """
    The sum of the factors and observations of a trace, scales and masks honoured.

    Over the plates that are not among the batch dims, as in :func:`log_potential`.

    :param trace: What was traced; latent sites do not count.
    :param torch.Size batch_shape: That of the particles.
    :param torch.device device: Where the sum is wanted.
    :returns: Of shape ``batch_shape``, in float64.
    :rtype: torch.Tensor
    :raises ValueError: If a site is of a shape that fits no plate, NaN or plus infinity.
    """
    total = torch.zeros(batch_shape, dtype=torch.float64, device=device)
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site) and _counts(site):
            total = total + _site_log_prob(name, site, batch_shape).to(total.device)
    return total


def _counts(site: Mapping[str, Any]) -> bool:
    """Whether a site is a factor or an observation."""
    return site["is_observed"] and not site["infer"].get("_deterministic")


def _site_log_prob(name: str, site: Mapping[str, Any], batch_shape: torch.Size) -> Tensor:
    value = _log_prob(site)
    if value.isnan().any() or (value == math.inf).any():
        raise ValueError(
            f"site {name!r} is {'NaN' if value.isnan().any() else '+inf'}; "
            "log-potentials must be finite or -inf"
        )
    return _summed(name, site, value, batch_shape)


def _log_prob(site: Mapping[str, Any]) -> Tensor:
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    scaled: Tensor = scale_and_mask(value.double(), site["scale"], site["mask"])
    return scaled


def _summed(name: str, site: Mapping[str, Any], value: Tensor, batch_shape: torch.Size) -> Tensor:
    """Sums over the dims of plates opened inside ``terminal``, keeping those of the batch."""
    plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    value = value.reshape((1,) * (len(batch_shape) - value.dim()) + value.shape)
    for dim in range(-value.dim(), 0):
        size = batch_shape[dim] if -dim <= len(batch_shape) else 1
        if value.shape[dim] == size and (size > 1 or dim not in plates):
            continue
        if not (dim in plates if size == 1 else dim in _taken_dims() and value.shape[dim] == 1):
            raise ValueError(
                f"site {name!r} has log-probability of shape {tuple(value.shape)} for the batch "
                f"shape {tuple(batch_shape)}, and dim {dim} is in no plate. Declare event dims "
                "with .to_event(), open a pyro.plate around the site, or give the model the "
                "attribute `event_shape`, and `plate` if it has one."
            )
        value = value.sum(dim, keepdim=True)
    return value.reshape(value.shape[value.dim() - len(batch_shape) :])


def batch_shape_of(model: Any, x0: Tensor) -> torch.Size:
    """
    The batch dims of states of a model, all but those of its ``event_shape``.

    :param model: The model; all dims but the first are the event's where it does not say.
    :param torch.Tensor x0: States.
    :raises ValueError: If ``x0`` does not end in the event's shape.
    """
    event_shape = getattr(model, "event_shape", None)
    if event_shape is None:
        return x0.shape[:1]
    event_shape = tuple(event_shape)
    split = x0.dim() - len(event_shape)
    if split < 0 or tuple(x0.shape[split:]) != event_shape:
        raise ValueError(
            f"x0 has shape {tuple(x0.shape)}, which does not end in the model's event_shape "
            f"{event_shape}"
        )
    return x0.shape[:split]


def rewards_of(model: Any) -> Iterator[tuple[str, Any]]:
    """
    The rewards of a model and of those that it is built around, by name.

    :param model: A model; those it is built around are its ``model``, their ``model``, and so on.
    """
    inner = model
    while inner is not None and hasattr(inner, "__dict__"):
        for name, reward in (vars(inner).get("rewards") or {}).items():
            for one in getattr(reward, "rewards", [reward]):
                yield name, one
        inner = vars(inner).get("model")


# Plates


def plate_of(model: Any) -> Any:
    """The plate of a model, which declares it as a plate or as its name and size."""
    plate = getattr(model, "plate", None)
    if not isinstance(plate, tuple):
        return plate
    name, size = plate
    return _new_plate(name, size, -1)


def _new_plate(name: str, size: int, dim: int) -> Any:
    # Creating a plate emits a site, which must be in no trace twice.
    with poutine.block():
        return pyro.plate(name, size, dim=dim)


def _taken_dims() -> dict[int, str]:
    stack = enumerate(_DIM_ALLOCATOR._stack)
    return {-1 - place: name for place, name in stack if name is not None}


def inside(plate: Any) -> AbstractContextManager[Any]:
    """Enters a plate unless that has been done."""
    if plate is None or plate.name in _taken_dims().values():
        return nullcontext()
    context: AbstractContextManager[Any] = plate
    return context


@contextmanager
def _reserved(model: Any, batch_shape: torch.Size) -> Iterator[None]:
    """Keeps the particle dim from plates inside, as an engine's particle plate would."""
    dim, plate = -len(batch_shape), plate_of(model)
    free = dim < 0 and dim not in _taken_dims() and (plate is None or plate.dim != dim)
    with ExitStack() as stack:
        if free:
            stack.enter_context(_new_plate("_log_potential_particles", batch_shape[0], dim))
        yield
