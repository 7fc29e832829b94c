# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""A tilt of tokens that depends on what the network knows at a position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_twist.diffusion.unmasking import Unmasking
from pyro_twist.twists.events import (
    JoinedTables,
    TokenTable,
    joined,
    likely_tokens,
    token_counts,
    token_table,
)
from pyro_twist.twists.learned import FittedTwist, WeightedDigest
from pyro_twist.twists.paths import Pass, PathStep
from pyro_twist.twists.tilting import tilt
from pyro_twist.twists.tokens import check_counts, check_masked

__all__ = ["HiddenTilt"]


class HiddenTilt(FittedTwist):
    """
    A small head on the hidden states: a bilinear tilt of low rank.

    With :math:`h_i` the hidden state of the network at position i and :math:`e_v` the row of its
    output layer for token v, both in a few principal directions, the tilt is
    :math:`\\eta_{iv} = (h_i, 1)^\\top \\Theta e_v`. A network without an output layer of its own
    has its logits for hidden states and a fixed random projection for the rows.

    The fit maximises the weighted likelihood of the tokens revealed, which is concave in
    :math:`\\Theta`, with a normal prior. The directions of the hidden states are those of the first
    fit.

    The tilt has a number for every position and token of every particle, kept with every recorded
    step: 4 bytes times particles, positions and tokens. For large vocabularies use
    :class:`~pyro_twist.twists.TokenTilt`.

    :param model: A tilted :class:`~pyro_twist.diffusion.MaskedDiffusion`.
    :param int rank: The number of directions.
    :param float ridge: Prior precision of each entry of :math:`\\Theta`.
    :param int max_tokens: The largest number of tokens to be tilted: those that were revealed most
        often.
    :raises ValueError: If the model is not a masked one, or an option is out of range.
    """

    reads = ("hidden", "logits")
    optimises = True
    theta: torch.nn.Parameter
    tokens: Tensor
    centre: Tensor
    directions: Tensor
    rows: Tensor

    def __init__(
        self, model: Any, *, rank: int = 8, ridge: float = 10.0, max_tokens: int = 512
    ) -> None:
        super().__init__(model)
        check_masked(model, type(self).__name__)
        check_counts(rank=rank, max_tokens=max_tokens)
        if not ridge > 0:
            raise ValueError(f"ridge={ridge}; give a positive number")
        self.rank, self.ridge, self.max_tokens = rank, ridge, max_tokens
        self.theta = torch.nn.Parameter(torch.zeros(rank + 1, rank, dtype=torch.float64))
        self.register_buffer("tokens", torch.arange(min(max_tokens, model.vocab_size)))
        self.register_buffer("centre", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("directions", torch.zeros(0, rank, dtype=torch.float64))
        self.register_buffer("rows", _principal_rows(model, rank))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # the width of the hidden states and the number of tokens are those of the saved fit
        for name in ("centre", "directions", "tokens"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The prior with tilted tokens."""
        if not isinstance(prior, Unmasking) or not len(self.centre):
            return prior
        if not torch.is_grad_enabled() and not self.theta.any():
            return prior
        hidden = _hidden(self.args_kwargs[0][0])
        if hidden is None:
            return prior
        weights = self._features(hidden) @ self.theta.to(hidden.device)
        rows = torch.zeros_like(self.rows).index_copy(0, self.tokens, self.rows[self.tokens])
        return tilt(prior, weights.float() @ rows.float().T.to(hidden.device))

    def _features(self, hidden: Tensor) -> Tensor:
        """Hidden states in the principal directions, and a one."""
        centred = hidden.double() - self.centre.to(hidden.device)
        found = centred @ self.directions.to(hidden.device)
        return torch.cat([found, torch.ones_like(found[..., :1])], -1)

    # learning

    def observe(self, passes: Sequence[Pass]) -> None:
        """Chooses the tokens to be tilted and, the first time, the directions."""
        super().observe(passes)
        if self.max_tokens < self.model.vocab_size:
            counts = token_counts(passes, self.model.vocab_size)
            self.tokens = likely_tokens(counts, self.max_tokens).to(self.tokens.device)
        if not len(self.centre):
            steps = (step.restored() for one in passes for sites in one.steps for step in sites)
            self._set_directions([h for step in steps for h in _at_reveals(step)])

    def _set_directions(self, hidden: Sequence[Tensor]) -> None:
        seen = torch.cat(list(hidden)).double() if hidden else torch.zeros(0, 1)
        if len(seen) < 2:
            return
        self.centre = seen.mean(0)
        _, scales, directions = torch.linalg.svd(seen - self.centre, full_matrices=False)
        scales = (scales / len(seen) ** 0.5)[: self.rank]
        kept = int((scales > 1e-6 * scales[0].clamp(min=1e-300)).sum())
        whitened = directions[:kept].T / scales[:kept]
        self.directions = torch.nn.functional.pad(whitened, (0, self.rank - kept))

    def digest(self, step: PathStep, kernel: Any) -> _HiddenTable | None:
        """The probabilities of the tilted tokens and the hidden states at all reveals."""
        table = token_table(step, kernel, self.tokens.to(step.value.device))
        found = list(_at_reveals(step))
        if table is None or not found or not len(self.centre):
            return None
        return _HiddenTable(table, self._features(found[0]))

    def digest_log_prob(self, digest: _HiddenTable) -> Tensor:
        """The tilts of the tokens revealed, less the log-normalisers."""
        theta, rows = (one.detach().to(digest.features) for one in (self.theta, self.rows))
        return digest.table.log_prob(digest.features @ theta @ rows[self.tokens].T)

    def solve(self, seen: Sequence[WeightedDigest], size: float) -> None:
        """Maximises the likelihood by an optimiser."""
        table = joined([replace(one, digest=one.digest.table) for one in seen])
        features = torch.cat([one.digest.features for one in seen])
        rows = self.rows[self.tokens].to(features)
        theta = self.theta.detach().clone().to(features).requires_grad_()

        def loss() -> Tensor:
            prior = 0.5 * self.ridge / size * theta.square().sum()
            return prior - _likelihood(table, features @ theta @ rows.T)

        self.minimise(loss, [theta], max_iterations=40)
        if theta.isfinite().all():
            self.theta.copy_(theta.detach())


@dataclass(frozen=True)
class _HiddenTable:
    """The reveals of a step with probabilities of tokens, and features of the hidden states."""

    table: TokenTable
    features: Tensor


def _likelihood(table: JoinedTables, eta: Tensor) -> Tensor:
    normal = torch.log1p((table.probs * torch.expm1(eta)).sum(1))
    return (table.score * eta).sum() - table.weights @ normal


def _hidden(state: Any) -> Tensor | None:
    """What the network knows, of shape ``batch_shape + (length, width)``."""
    found: Tensor | None = state.get("hidden", state.get("logits"))
    return found


def _at_reveals(step: PathStep) -> list[Tensor]:
    """The hidden states at the positions that a step reveals."""
    kernel, hidden = step.prior, _hidden(step.state)
    if not isinstance(kernel, Unmasking) or hidden is None:
        return []
    rows = kernel.rows[kernel.reveals(step.value)]
    return [hidden.reshape(-1, hidden.shape[-1])[rows]]


def _principal_rows(model: Any, rank: int) -> Tensor:
    """A few features of every token, from the output layer or at random, of unit variance."""
    weight = getattr(getattr(model, "head", None), "weight", None)
    if weight is None or weight.shape[:1] != (model.vocab_size,):
        generator = torch.Generator().manual_seed(0)
        size = (model.vocab_size, rank)
        return torch.randn(size, generator=generator, dtype=torch.float64)
    centred = weight.detach().cpu().double()
    left = torch.linalg.svd(centred - centred.mean(0), full_matrices=False)[0][:, :rank]
    rows = left * len(left) ** 0.5
    return torch.nn.functional.pad(rows, (0, rank - rows.shape[1]))
