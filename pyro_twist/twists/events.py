# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
What fits of masked models look at: the events that a position is revealed.

A tilt of tokens changes no probability but that of the token given a reveal, so that the
likelihood of a path is a product over its reveals, one for each position unless it is masked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_twist.diffusion.unmasking import Unmasking
from pyro_twist.twists.learned import WeightedDigest
from pyro_twist.twists.paths import Pass, PathStep

__all__ = ["Reveals", "TokenTable", "likely_tokens", "reveals_of", "token_counts", "token_table"]


@dataclass(frozen=True)
class Reveals:
    """
    The reveals of a step.

    :param Tensor which: Indices into the kernel's ``rows``, of shape ``(num_reveals,)``.
    :param Tensor particle: The particle, or particle and population, flattened, of each.
    :param Tensor position: The position in the sequence.
    :param Tensor token: The token.
    :param int num_particles: The number of particles times populations.
    """

    which: Tensor
    particle: Tensor
    position: Tensor
    token: Tensor
    num_particles: int

    def summed(self, terms: Tensor) -> Tensor:
        """Sums of terms at the reveals over each particle."""
        return terms.new_zeros(self.num_particles).index_add(0, self.particle, terms)


def reveals_of(step: PathStep, kernel: Unmasking) -> Reveals:
    """
    The reveals of a step.

    :param PathStep step: The step.
    :param Unmasking kernel: Its kernel, tilted or not.
    """
    which = kernel.reveals(step.value)
    rows, length = kernel.rows[which], step.value.shape[-1]
    place = torch.unravel_index(rows // length, kernel.batch_shape)
    particle, size = place[0], kernel.batch_shape[0]
    if step.population_axis is not None:
        populations = kernel.batch_shape[step.population_axis]
        particle = particle * populations + place[step.population_axis]
        size = size * populations
    return Reveals(which, particle, rows % length, step.value.reshape(-1)[rows], size)


@dataclass(frozen=True)
class TokenTable:
    """
    The reveals of a step with the probabilities of some of the tokens.

    :param Reveals reveals: The reveals.
    :param Tensor column: The column of the token revealed, -1 if it has none.
    :param Tensor probs: The kernel's probabilities, of shape ``(num_reveals, num_columns)``.
    :param Tensor drawn: Those of the law the tokens were drawn from; the same tensor if that is
        the kernel.
    """

    reveals: Reveals
    column: Tensor
    probs: Tensor
    drawn: Tensor

    @property
    def indicator(self) -> Tensor:
        """Which token was revealed, of the shape of ``probs``."""
        found = torch.zeros_like(self.probs)
        known = (self.column >= 0).nonzero()[:, 0]
        found[known, self.column[known]] = 1.0
        return found

    def log_prob(self, eta: Tensor) -> Tensor:
        """
        The log-probability of each particle's reveals with a tilt of the columns' tokens.

        :param Tensor eta: Of the shape of ``probs``, or broadcastable to it.
        :returns: Relative to the kernel, of shape ``(num_particles,)``.
        """
        eta = eta.expand(self.probs.shape)
        # the other tokens have the tilt 0; log1p of the change, which is exact where there is none
        change = (self.probs * torch.expm1(eta)).sum(1)
        chosen = eta.gather(1, self.column.clamp(min=0)[:, None])[:, 0]
        terms = torch.where(self.column >= 0, chosen, 0.0) - torch.log1p(change)
        return self.reveals.summed(terms)


def token_table(step: PathStep, kernel: Any, tokens: Tensor) -> TokenTable | None:
    """
    The table of a step.

    :param PathStep step: The step.
    :param kernel: What is tilted.
    :param Tensor tokens: The tokens to have columns, in increasing order.
    :returns: ``None`` if the kernel reveals nothing.
    """
    if not isinstance(kernel, Unmasking):
        return None
    reveals = reveals_of(step, kernel)
    place = torch.searchsorted(tokens, reveals.token).clamp(max=len(tokens) - 1)
    column = torch.where(tokens[place] == reveals.token, place, -1)
    probs = _columns(kernel, reveals.which, tokens)
    return TokenTable(reveals, column, probs, _drawn(step, kernel, reveals, tokens, probs))


def _drawn(
    step: PathStep, kernel: Unmasking, reveals: Reveals, tokens: Tensor, probs: Tensor
) -> Tensor:
    posterior = step.posterior
    if posterior is kernel or not isinstance(posterior, Unmasking):
        return probs
    if kernel is step.prior and kernel.eta is None and posterior.eta is not None:
        # the same law, from what is remembered of the kernel
        posterior = kernel.tilted(posterior.eta)
    return _columns(posterior, reveals.which, tokens)


def _columns(kernel: Unmasking, which: Tensor, tokens: Tensor) -> Tensor:
    empty = torch.zeros(0, len(tokens), dtype=torch.float64, device=tokens.device)
    return torch.cat([empty, *(chunk[:, tokens].exp() for _, chunk in kernel.chunks(which))])


def token_counts(passes: Sequence[Pass], vocab_size: int) -> Tensor:
    """How often each token was revealed in any pass, of shape ``(vocab_size,)``."""
    counts = torch.zeros(vocab_size)
    for step in (step for one in passes for sites in one.steps for step in sites):
        if isinstance(step.prior, Unmasking):
            tokens = step.value.reshape(-1)[step.prior.rows[step.prior.reveals(step.value)]]
            counts += torch.bincount(tokens.cpu(), minlength=vocab_size)
    return counts


def likely_tokens(counts: Tensor, size: int) -> Tensor:
    """At most ``size`` tokens that were revealed, the most frequent, in increasing order."""
    order = counts.argsort(descending=True, stable=True)[:size]
    return order[counts[order] > 0].sort().values


@dataclass(frozen=True)
class JoinedTables:
    """
    Tables of several steps, one below the other, with weights.

    :param Tensor position: The position of each reveal, of shape ``(num_reveals,)``.
    :param Tensor probs: The kernel's probabilities, of shape ``(num_reveals, num_columns)``.
    :param Tensor weights: The weight of each reveal.
    :param Tensor score: Which token was revealed, weighted, less what centring subtracts, of the
        shape of ``probs``.
    """

    position: Tensor
    probs: Tensor
    weights: Tensor
    score: Tensor


def joined(seen: Sequence[WeightedDigest]) -> JoinedTables:
    """
    Tables of several steps in one.

    :param list seen: Steps with weights, their digests :class:`TokenTable`.
    """
    tables: list[TokenTable] = [one.digest for one in seen]
    weights = torch.cat([one.weights[one.digest.reveals.particle] for one in seen])
    base = torch.cat([one.base[one.digest.reveals.particle] for one in seen])
    indicator = torch.cat([table.indicator for table in tables])
    score = weights[:, None] * indicator
    if base.any():
        drawn = torch.cat([table.drawn for table in tables])
        score = score - base[:, None] * (indicator - drawn)
    position = torch.cat([table.reveals.position for table in tables])
    return JoinedTables(position, torch.cat([table.probs for table in tables]), weights, score)
