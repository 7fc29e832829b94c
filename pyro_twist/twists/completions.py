# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Sampled completions: how a look-ahead sees the end of a sequence that is partly masked.

A masked position has no average token, so that there is no posterior mean to score. Instead the
masks are filled in, either by the likeliest tokens or by draws from the denoiser's token law. The
draws use random numbers that a particle is given once, at the start, and keeps: a completion then
changes from step to step only where a token was revealed or the denoiser changed its mind, and the
log-twist is a function of the particle and of what it carries.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_twist.diffusion.unmasking import Unmasking
from pyro_twist.rewards.tilted import log_potential

__all__ = [
    "Completions",
    "check_completions",
    "draw_uniforms",
    "only",
    "score_completions",
    "tilt_of",
    "tilt_value",
    "tilted_completions",
]

Completions = int | Literal["argmax"]

_MIX = 0x9E3779B97F4A7C15


def check_completions(completions: Completions | None, model: Any) -> Completions | None:
    """
    What a look-ahead scores: a number of sampled completions, ``"argmax"``, or predictions.

    :param completions: What was asked for; ``None`` for the default of the model.
    :param model: The model.
    :returns: ``None`` for a model that predicts its end state as ``state["x0_hat"]``.
    :raises ValueError: If the model cannot complete, or the number is out of range.
    """
    if not hasattr(model, "complete"):
        if completions is not None:
            raise ValueError(
                f"completions={completions!r}, but {type(model).__name__} has no method "
                "`complete`; it is for masked models. Leave it out to use the model's predictions."
            )
        return None
    if completions is None:
        return 1
    counted = isinstance(completions, int) and not isinstance(completions, bool)
    if completions != "argmax" and not (counted and int(completions) >= 1):
        raise ValueError(f"completions={completions!r}; give a number, 1 or more, or 'argmax'")
    return completions


def draw_uniforms(shape: tuple[int, ...], device: torch.device, key: str = "") -> Tensor:
    """
    Uniform numbers in float64 that leave the random stream where it is.

    They are those of a generator of their own, seeded from what the stream would draw next: a run
    with completions has the noise of a run without.

    :param tuple shape: The shape.
    :param torch.device device: Where to put them, and whose stream the seed is from.
    :param str key: Whom they are for: those of another key at the same point are independent.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        seed = int(torch.randint(2**62, (), device=device))
    # mixed, since from the same seed the generator would repeat the stream
    mixed = seed * _MIX + 1 + int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
    generator = torch.Generator().manual_seed(mixed % 2**63)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(device)


def score_completions(
    model: Any, state: Any, tokens: Tensor, known: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """
    The log-potentials of completions; those that a particle has had before are not scored again.

    :param model: A model with ``terminal``.
    :param dict state: The state.
    :param Tensor tokens: Of shape ``batch_shape + (num_completions, length)``.
    :param tuple known: Earlier completions of the same particles and their log-potentials.
    :returns: Of shape ``batch_shape + (num_completions,)``, in float64.
    :rtype: Tensor
    """
    values: list[Tensor] = []
    for x0 in tokens.unbind(-2):
        earlier = [(tokens[..., k, :], value) for k, value in enumerate(values)]
        if known is not None:
            earlier += list(zip(known[0].unbind(-2), known[1].unbind(-1), strict=True))
        values.append(_score(model, state, x0, earlier))
    return torch.stack(values, -1)


def _score(model: Any, state: Any, x0: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
    value = torch.zeros(x0.shape[:-1], dtype=torch.float64, device=x0.device)
    todo = torch.ones_like(value, dtype=torch.bool)
    for other, its_value in earlier:
        same = (x0 == other).all(-1)
        value, todo = torch.where(same, its_value, value), todo & ~same
    if not todo.any():
        return value
    return torch.where(todo, log_potential(model, state, only(x0, todo)), value)


def only(x0: Tensor, wanted: Tensor) -> Tensor:
    """
    Sequences with none but wanted ones, so that a reward, which scores copies once, does no more.

    :param Tensor x0: Of shape ``(num_particles,) + ... + (length,)``.
    :param Tensor wanted: Which of them, at least one, of shape ``(num_particles,) + ...``.
    :returns: Of the shape of ``x0``; a wanted one of the same entry of the plate, or else of any,
        takes the place of another.
    """
    first = wanted.long().argmax(0, keepdim=True)[..., None].expand_as(x0[:1])
    anywhere = x0.reshape(-1, x0.shape[-1])[wanted.reshape(-1).long().argmax()]
    filling = torch.where(wanted.any(0)[None, ..., None], x0.gather(0, first), anywhere)
    return torch.where(wanted[..., None], x0, filling)


def tilt_of(tokens: Tensor, eta: Tensor) -> Tensor:
    """
    The tilts of the tokens of sequences.

    :param Tensor tokens: Of shape ``batch_shape + (length,)``.
    :param Tensor eta: Of shape ``(1, vocab_size)`` or ``(length, vocab_size)``.
    :returns: Of the shape of ``tokens``.
    """
    eta = eta.to(tokens.device)
    position = torch.arange(tokens.shape[-1], device=tokens.device) % len(eta)
    return eta[position.expand(tokens.shape), tokens]


def tilted_completions(kernel: Unmasking, eta: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """
    Completions under a tilt and :func:`tilt_value`, from one application of the output layer.

    :param Unmasking kernel: The kernel at the current sequences, without a tilt.
    :param Tensor eta: As for :func:`tilt_of`.
    :param Tensor uniforms: As for :meth:`~pyro_twist.diffusion.unmasking.Unmasking.complete`.
    :returns: Sequences of the shape of ``uniforms``, and values of the batch shape of the kernel.
    """
    completed, normalizer = kernel.complete_tilted(eta.to(kernel.tokens.device), uniforms)
    return completed, _known_value(kernel, eta) + normalizer


def _known_value(kernel: Unmasking, eta: Tensor) -> Tensor:
    """The sum of the tilts of the tokens that are revealed."""
    tokens = kernel.tokens
    return torch.where(tokens == kernel.mask_token_id, 0.0, tilt_of(tokens, eta)).sum(-1)


def tilt_value(kernel: Unmasking, eta: Tensor) -> Tensor:
    """
    The log of the mean of ``exp`` of the summed tilts, given what is revealed.

    It is the optimal log-twist for a reward that is the sum of the tilts, if tokens are independent
    of each other.

    :param Unmasking kernel: The kernel at the current sequences, without a tilt.
    :param Tensor eta: As for :func:`tilt_of`.
    :returns: Of the batch shape of the kernel.
    """
    return _known_value(kernel, eta) + kernel.log_normalizer(eta.to(kernel.tokens.device))
