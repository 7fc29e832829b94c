# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
What a twist has learned, as numbers with plain words; whoever writes a report makes pictures.

:meth:`Twist.summary <pyro_twist.twists.Twist.summary>` returns panels. A family of one's own
overrides it; those that ship are described here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch

from pyro_twist.twists.families import ShiftTwist
from pyro_twist.twists.ladder import CalibratedLookahead
from pyro_twist.twists.surrogate import SurrogateTwist, _hat

__all__ = ["Curve", "Direction", "Panel", "summarise"]

PUSH = 0.5


@dataclass(frozen=True, eq=False)
class Panel:
    """
    Something that a twist has learned, in words alone; derived classes add numbers.

    :param str title: A few words.
    :param str text: A sentence or two for readers who do not know what a twist is.
    """

    title: str
    text: str


@dataclass(frozen=True, eq=False)
class Curve(Panel):
    """
    A number for every step.

    :param steps: The steps, counted from 0, the initial draw, in the order they are taken.
    :param values: A number for each.
    :param str label: What the number is.
    :param float reference: A value to compare with, such as that before learning.
    """

    steps: Sequence[int]
    values: Sequence[float]
    label: str
    reference: float | None = None


@dataclass(frozen=True, eq=False)
class Direction(Panel):
    """
    Which way samples are pushed.

    :param torch.Tensor at: Where, in the space of the model's ``x``, of shape
        ``(num_places,) + event_shape``.
    :param torch.Tensor change: A push that can be seen when added there, of the same shape.
    """

    at: torch.Tensor
    change: torch.Tensor


@singledispatch
def summarise(twist: Any, at: torch.Tensor | None = None) -> list[Panel]:
    """
    Panels of a twist by its class; none for classes that are not known.

    :param Twist twist: The twist.
    :param torch.Tensor at: See :meth:`~pyro_twist.twists.Twist.summary`.
    """
    return []


@summarise.register
def _(twist: CalibratedLookahead, at: torch.Tensor | None = None) -> list[Panel]:
    times = [t for t in twist.model.timesteps if t in twist.schedule]
    curve = Curve(
        "How far an early look is trusted",
        "Before a sample is finished, the reward of its predicted end is looked at. The slope says "
        "what a difference in that early value has been worth at the end: at 1 it is taken at face "
        "value, above 1 amplified, below 1 discounted, at 0 ignored. Before learning it is 1.",
        steps=[twist.model.timesteps[0] - t for t in times],
        values=[float(twist.slopes[t]) for t in times],
        label="slope",
        reference=1.0,
    )
    return [curve]


@summarise.register
def _(twist: SurrogateTwist, at: torch.Tensor | None = None) -> list[Panel]:
    if not twist.regression.fitted:
        text = (
            "None: too few predicted ends have been scored, or all to the same value, so that "
            "nothing stands in for the reward."
        )
        return [Panel("Where it pushes", text)]
    places = _centre(twist) if at is None else at
    slope = twist.regression.gradient(places.reshape(len(places), -1)).reshape(places.shape)
    change = PUSH * twist.data_variance.sqrt() * _unit(slope)
    direction = Direction("Where it pushes", _direction_text(twist), places, change.to(places))
    return [direction, _gains(twist)]


def _direction_text(twist: SurrogateTwist) -> str:
    # the score of a bad fit is negative, without bound
    share = max(0.0, twist.score)
    text = (
        f"A regression on {len(twist.regression.points)} predicted ends and their rewards stands "
        "in for the reward, and samples are pushed along its slope. On predicted ends that it had "
        f"not seen it explains {share:.0%} of the differences."
    )
    if share > twist.gate:
        return text
    return f"{text} Below {twist.gate:.0%} only paths that bear it out can raise the push above 0."


def _gains(twist: SurrogateTwist) -> Curve:
    times = twist.model.timesteps
    theta = twist.theta.detach().double()[0]
    shares = [_hat((t - 1) / times[0], twist.knots).double() for t in times]
    return Curve(
        "How hard it pushes",
        "The share of the push that is applied: 0 is none, 1 as much as the regression asks for, "
        f"at most {twist.cap:g} standard deviations of a step's noise. It is 0 before learning, "
        "then the share of differences that the regression explains, corrected by what the paths "
        "have shown.",
        steps=[times[0] - t + 1 for t in times],
        values=[float(theta @ share) for share in shares],
        label="gain",
        reference=0.0,
    )


def _centre(twist: SurrogateTwist) -> torch.Tensor:
    return twist.regression.centre.reshape((1, *twist.model.event_shape)).float()


def _unit(slope: torch.Tensor) -> torch.Tensor:
    """Scales each place to a root mean square of 1."""
    size = slope.flatten(1).square().mean(1).sqrt().clamp(min=1e-300)
    return slope / size.reshape((-1,) + (1,) * (slope.dim() - 1))


@summarise.register
def _(twist: ShiftTwist, at: torch.Tensor | None = None) -> list[Panel]:
    pushes = torch.tensordot(twist.theta.detach(), twist.basis, dims=1)
    times = twist.model.timesteps
    curve = Curve(
        "How hard it pushes",
        "The length of the push at each step. Before learning it is 0.",
        steps=[times[0] - t + 1 for t in times],
        values=[float(pushes[t - 1].norm()) for t in times],
        label="push",
        reference=0.0,
    )
    return [curve]
