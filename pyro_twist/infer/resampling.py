# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Resampling schemes: functions of one signature, found by name.

Each takes the normalised weights of one population, the number of ancestors to draw and a
generator, and returns the ancestors in increasing order. Each is unbiased: a particle of weight
:math:`w` has :math:`w M` offspring of :math:`M` on average; one of weight zero never has any. The
arithmetic is float64 throughout, since a float32 cumulative sum can end below the last uniform.

**References**

[1] `Comparison of resampling schemes for particle filtering`
    Randal Douc, Olivier Cappe, Eric Moulines (2005), https://arxiv.org/abs/cs/0507025
[2] `Negative association, ordering and convergence of resampling methods`
    Mathieu Gerber, Nicolas Chopin, Nick Whiteley (2019), https://arxiv.org/abs/1707.01845
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["RESAMPLING", "get_resampling", "register_resampling"]

Resampling = Callable[[torch.Tensor, int, "torch.Generator | None"], torch.Tensor]

#: The schemes by name. ``"none"`` is known to the engine, which then never resamples.
RESAMPLING: dict[str, Resampling] = {}


def register_resampling(name: str) -> Callable[[Resampling], Resampling]:
    """
    Decorator that makes a resampling scheme known by ``name``.

    :param str name: The name to give as ``resampling=`` to an inference class.
    """

    def decorate(scheme: Resampling) -> Resampling:
        RESAMPLING[name] = scheme
        return scheme

    return decorate


def get_resampling(name: str) -> Resampling:
    """
    Looks a scheme up by name.

    :raises ValueError: If there is none of that name.
    """
    if name not in RESAMPLING:
        known = ", ".join(repr(key) for key in [*RESAMPLING, "none"])
        raise ValueError(f"unknown resampling scheme {name!r}; choose one of {known}")
    return RESAMPLING[name]


def _uniform(probs: torch.Tensor, size: int, generator: torch.Generator | None) -> torch.Tensor:
    device = generator.device if generator is not None else probs.device
    draw = torch.rand(size, dtype=torch.float64, device=device, generator=generator)
    return draw.to(probs.device)


def _invert(probs: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The particle in whose share of the unit interval each point lies."""
    cumulative = probs.double().cumsum(0)
    index = torch.searchsorted(cumulative, points * cumulative[-1], right=True)
    last_alive = probs.nonzero().max()
    return index.clamp_(max=last_alive)


def _invert_strata(probs: torch.Tensor, size: int, uniforms: torch.Tensor) -> torch.Tensor:
    """The same for one point in each of ``size`` strata, in linear time."""
    cumulative = probs.double().cumsum(0)
    # dividing first makes the edge of the last live particle, and of all after it, exactly `size`
    edges = cumulative.div_(cumulative[-1].clone()).mul_(size)
    whole = edges.floor().clamp_(max=size - 1)
    in_stratum = uniforms if uniforms.shape[0] == 1 else uniforms[whole.long()]
    below = (whole + (in_stratum < edges - whole)).long()
    # the ancestor of slot j is the number of particles whose offspring end at or before j
    return torch.bincount(below[:-1], minlength=size + 1)[:size].cumsum(0)


@register_resampling("systematic")
def systematic(
    probs: torch.Tensor, size: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    One uniform for all strata; the default, and Pyro's own scheme.

    :param torch.Tensor probs: Normalised weights of shape ``(num_particles,)``.
    :param int size: Number of ancestors to draw.
    :param torch.Generator generator: Source of randomness, the global one if ``None``.
    :returns: Ancestor indices of shape ``(size,)``.
    :rtype: torch.Tensor
    """
    return _invert_strata(probs, size, _uniform(probs, 1, generator))


@register_resampling("stratified")
def stratified(
    probs: torch.Tensor, size: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One uniform in each stratum; arguments as in :func:`systematic`."""
    return _invert_strata(probs, size, _uniform(probs, size, generator))


@register_resampling("multinomial")
def multinomial(
    probs: torch.Tensor, size: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Independent draws; arguments as in :func:`systematic`."""
    return _invert(probs, _uniform(probs, size, generator).sort().values)


def _expand(counts: torch.Tensor) -> torch.Tensor:
    index = torch.arange(counts.shape[0], device=counts.device)
    return torch.repeat_interleave(index, counts)


@register_resampling("residual")
def residual(
    probs: torch.Tensor, size: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The whole part of each expected count, the rest multinomial; as in :func:`systematic`."""
    expected = probs.double() * size
    counts = expected.floor()
    rest = size - int(counts.sum())
    counts = counts.long()
    if rest > 0:
        drawn = multinomial((expected - counts) / rest, rest, generator)
        counts += torch.bincount(drawn, minlength=counts.shape[0])
    return _expand(counts)


def _settle(a: float, b: float, uniform: float) -> tuple[float, float]:
    """Moves mass between two fractions, keeping their means, until one of them is 0 or 1."""
    total = a + b
    if a == 0 or b == 0:  # rounding must not give offspring to a particle without weight
        return a, b
    if total < 1:
        return (total, 0.0) if uniform * total < a else (0.0, total)
    return (1.0, total - 1) if uniform * (2 - total) < 1 - b else (total - 1, 1.0)


@register_resampling("ssp")
def ssp(probs: torch.Tensor, size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Srinivasan's sampling process [2]: counts round the expected ones up or down, at random.

    Arguments as in :func:`systematic`. Sequential in the number of particles.
    """
    expected = probs.double() * size
    counts = expected.floor()
    fractions = (expected - counts).tolist()
    uniforms = _uniform(probs, len(fractions), generator).tolist()
    pending = 0
    for i in range(1, len(fractions)):
        a, b = _settle(fractions[pending], fractions[i], uniforms[i])
        fractions[pending], fractions[i] = a, b
        pending = i if a in (0.0, 1.0) else pending
    rounded = torch.tensor(fractions, dtype=torch.float64, device=probs.device).round()
    return _expand((counts + rounded).long())
