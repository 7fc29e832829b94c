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

from pyro_twist.twists import sequences
from pyro_twist.twists.families import ShiftTwist
from pyro_twist.twists.hidden import HiddenTilt
from pyro_twist.twists.ladder import CalibratedLookahead, DiscountedLookahead
from pyro_twist.twists.sequences import TokenSurrogate
from pyro_twist.twists.surrogate import _MAX_GAIN, SurrogateTwist, _hat
from pyro_twist.twists.tokens import TokenTilt

__all__ = ["Curve", "Direction", "Panel", "Ranking", "summarise"]

PUSH = 0.5
LISTED = 8


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
    :param reference: A value to compare with, such as that before learning, or one for each step.
    """

    steps: Sequence[int]
    values: Sequence[float]
    label: str
    reference: float | Sequence[float] | None = None


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


@dataclass(frozen=True, eq=False)
class Ranking(Panel):
    """
    What is favoured most and what is avoided most, the most favoured first.

    :param names: What is ranked, such as tokens.
    :param values: A number for each, falling.
    :param str kind: What the names are.
    :param str label: What the numbers are.
    """

    names: Sequence[str]
    values: Sequence[float]
    kind: str
    label: str


@singledispatch
def summarise(twist: Any, at: torch.Tensor | None = None) -> list[Panel]:
    """
    Panels of a twist by its class; none for classes that are not known.

    :param Twist twist: The twist.
    :param torch.Tensor at: See :meth:`~pyro_twist.twists.Twist.summary`.
    """
    return []


_SLOPE = (
    "Before a sample is finished, the reward of its predicted end is looked at. The slope says "
    "what a difference in that early value is worth: at 1 it is taken at face value, above 1 "
    "amplified, below 1 discounted, at 0 ignored."
)


@summarise.register
def _(twist: CalibratedLookahead, at: torch.Tensor | None = None) -> list[Panel]:
    return [_slopes(twist, f"{_SLOPE} Before learning it is 1.", torch.ones_like(twist.slopes))]


@summarise.register
def _(twist: DiscountedLookahead, at: torch.Tensor | None = None) -> list[Panel]:
    exponent, _ = twist.prior
    target = "next" if twist.completions is None else "end of its path"
    text = (
        f"{_SLOPE} It is the share of the end that is known, which grows step by step, to the "
        f"power of {float(twist.exponent):.2g}, an exponent found by how far each look carried "
        f"over to the {target}: 0 believes every look, and the larger it is, the less are early "
        f"looks believed. The line is the slope before learning, with the exponent {exponent:g}."
    )
    return [_slopes(twist, text, twist.slopes_before)]


def _slopes(twist: CalibratedLookahead, text: str, before: torch.Tensor) -> Curve:
    times = [t for t in twist.model.timesteps if t in twist.schedule]
    return Curve(
        "How far an early look is trusted",
        text,
        steps=[twist.model.timesteps[0] - t for t in times],
        # those of several prompts are about alike
        values=[float(twist.slopes[t].mean()) for t in times],
        label="slope",
        reference=[float(before[t].mean()) for t in times],
    )


@summarise.register
def _(twist: SurrogateTwist, at: torch.Tensor | None = None) -> list[Panel]:
    if not twist.regression.fitted:
        text = (
            "None: too few predicted ends have been scored, or all to the same value, so that "
            "nothing stands in for the reward."
        )
        return [Panel("Where it pushes", text)]
    places = _centre(twist) if at is None else at
    push = _unit(twist.full_tilt(places, _middle(twist)))
    change = PUSH * _spread(twist) * push
    direction = Direction("Where it pushes", _direction_text(twist), places, change.to(places))
    return [direction, _gains(twist)]


_KINDS = {
    "linear": "a straight line",
    "diagonal": "a curve for every frequency by itself",
    "quadratic": "a quadratic",
    "kernel": "a smooth function",
}


def _direction_text(twist: SurrogateTwist) -> str:
    # the score of a bad fit is negative, without bound
    share = max(0.0, twist.score)
    regression = twist.regression
    return (
        f"A regression on {len(regression.points)} predicted ends and their rewards, "
        f"{_KINDS[regression.kind]}, stands in for the reward. On predicted ends that it had not "
        f"seen it explains {share:.0%} of the differences. Samples are pushed along its slope, "
        "each spatial frequency as far as the predicted end follows a push in it: what is shown "
        "is the push in the middle of the run. Earlier it is coarser, later finer."
    )


def _gains(twist: SurrogateTwist) -> Curve:
    times = twist.model.timesteps
    theta = twist.theta.detach().double()[0]
    shares = [_hat((t - 1) / times[0], twist.knots).double() for t in times]
    return Curve(
        "How hard it pushes",
        "By how much the push is multiplied, from 0, none, over 1, as much as the regression asks "
        f"for, to {_MAX_GAIN:g}; at 1 the push is at most {twist.cap:g} standard deviations of a "
        "step's noise. It is 0 before learning, then what best explains how the value of a sample "
        "changed with the noise that it met, corrected by what the paths have shown.",
        steps=[times[0] - t + 1 for t in times],
        values=[float(theta @ share) for share in shares],
        label="gain",
        reference=0.0,
    )


def _centre(twist: SurrogateTwist) -> torch.Tensor:
    middle = twist.spectrum.inverse(twist.regression.centre[None])
    return middle.reshape((1, *twist.model.event_shape)).float()


def _middle(twist: SurrogateTwist) -> int:
    times = twist.model.timesteps
    return int(times[len(times) // 2])


def _spread(twist: SurrogateTwist) -> torch.Tensor:
    """The standard deviation of an entry of the predicted ends."""
    return twist.regression.width / len(twist.regression.centre) ** 0.5


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


# tilts of tokens

_TOKENS = "Which tokens it favours"
_NOTHING = "None: nothing has been learned yet, so that tokens are drawn as the network has them."
_ODDS = (
    "The odds of a token are multiplied by the number beside it, against those of a token that is "
    "left alone, wherever one is revealed. Those moved most:"
)


@summarise.register
def _(twist: TokenTilt, at: torch.Tensor | None = None) -> list[Panel]:
    return [_ranking(twist, twist.theta.detach(), f"It tilts {len(twist.tokens)} tokens. {_ODDS}")]


@summarise.register
def _(twist: TokenSurrogate, at: torch.Tensor | None = None) -> list[Panel]:
    eta = twist.beta * twist.theta.detach().mean().to(twist.beta)
    text = (
        "A regression on which tokens occur in what was scored stands in for the reward. On what "
        f"it had not seen it explains {max(0.0, twist.score):.0%} of the differences. {_ODDS}"
    )
    panels: list[Panel] = [_ranking(twist, eta, text)]
    if twist.beta.any() and twist.knots > 1:
        panels.append(_token_gains(twist))
    return panels


@summarise.register
def _(twist: HiddenTilt, at: torch.Tensor | None = None) -> list[Panel]:
    mean = torch.zeros(1, twist.model.vocab_size, dtype=torch.float64)
    theta, rows = twist.theta.detach().cpu(), twist.rows.cpu()
    mean[0, twist.tokens.cpu()] = rows[twist.tokens.cpu()] @ theta[-1]
    text = (
        "It depends on what the network knows of a place in the sequence; this is what it does "
        f"where that is the usual. {_ODDS}"
    )
    return [_ranking(twist, mean, text)]


def _token_gains(twist: TokenSurrogate) -> Curve:
    times = twist.model.timesteps
    return Curve(
        "How hard it pushes",
        "By how much the logarithms of these odds are multiplied, from 0, none, over 1, as much as "
        f"the regression asks for, to {sequences._MAX_GAIN:g}.",
        steps=[times[0] - t + 1 for t in times],
        values=[float(twist._shares(t - 1) @ twist.theta.detach()) for t in times],
        label="gain",
        reference=0.0,
    )


def _ranking(twist: Any, eta: torch.Tensor, text: str) -> Panel:
    """The largest and smallest tilts, of shape ``(1 or length, vocab_size)``, as odds."""
    eta = eta.detach().cpu().double()
    flat = eta.reshape(-1)
    order = flat.argsort(descending=True, stable=True)
    favoured = [int(i) for i in order[:LISTED] if flat[i] > 0]
    avoided = [int(i) for i in order[-LISTED:] if flat[i] < 0]
    if not favoured and not avoided:
        return Panel(_TOKENS, _NOTHING)
    names = _token_names(twist.model)
    places = favoured + avoided
    return Ranking(
        _TOKENS,
        text,
        names=[_place_name(i, eta.shape, names) for i in places],
        values=[float(flat[i].exp()) for i in places],
        kind="token" if len(eta) == 1 else "token and position",
        label="odds",
    )


def _place_name(place: int, shape: torch.Size, names: Any) -> str:
    position, token = divmod(place, shape[1])
    return str(names(token)) + ("" if shape[0] == 1 else f" at {position}")


def _token_names(model: Any) -> Any:
    """A function of a token to its name, from the tokenizer or vocabulary of the decoder."""
    decoder = getattr(model, "decoder", None)
    named = getattr(decoder, "token_name", None)
    if named is not None:
        return named
    convert = getattr(getattr(decoder, "tokenizer", None), "convert_ids_to_tokens", None)
    if convert is not None:
        return convert
    vocabulary = getattr(getattr(decoder, "__self__", None), "vocabulary", None)
    return (lambda token: f"token {token}") if vocabulary is None else vocabulary.__getitem__
