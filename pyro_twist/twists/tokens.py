# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""A tilt of tokens: the log-odds of each in what is worth more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_twist.diffusion.unmasking import Unmasking
from pyro_twist.twists.completions import tilt_value
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

__all__ = ["TokenTilt", "check_counts", "check_masked"]

Per = Literal["token", "position"]

_SWEEPS = 200


class TokenTilt(FittedTwist):
    """
    Makes some tokens likelier than the denoiser says, whenever a position is revealed.

    The kernels of a masked model are tilted by a number :math:`\\eta_v` for every token, or
    :math:`\\eta_{iv}` for every position and token. For tokens that are independent of each other
    and a reward that is a sum over them this is the optimal twist.

    The fit maximises the weighted likelihood of the tokens that were revealed, with a prior that is
    worth :math:`a` reveals of each token that went as expected. One sweep of iterative scaling is

    .. math::

        \\eta_v \\leftarrow \\eta_v + \\log \\frac{C_v + a}{E_v + a e^{\\eta_v}}

    with :math:`C_v` the weighted number of reveals of :math:`v`, and :math:`E_v` the number that
    the proposal expects: from 0, the log-odds with pseudo-counts.

    :param model: A tilted :class:`~pyro_twist.diffusion.MaskedDiffusion`.
    :param str per: ``"token"``, or ``"position"`` for every position and token.
    :param float pseudo_count: How many reveals the prior of a token is worth, one for each path of
        equal weight.
    :param int max_tokens: The largest number of tokens to be tilted: those that were revealed most
        often.
    :param bool value: Whether the twist also enters the weights: by the tilts of the tokens that
        are revealed, and the expected ones of those that are not. Without, it is a proposal only,
        for use beside a look-ahead.
    :raises ValueError: If the model is not a masked one, or an option is out of range.
    """

    reads = ()
    theta: torch.nn.Parameter
    tokens: Tensor

    def __init__(
        self,
        model: Any,
        *,
        per: Per = "token",
        pseudo_count: float = 2.0,
        max_tokens: int = 1024,
        value: bool = False,
    ) -> None:
        super().__init__(model)
        check_masked(model, type(self).__name__)
        check_counts(max_tokens=max_tokens)
        if per not in get_args(Per) or not pseudo_count > 0:
            raise ValueError(
                f"per={per!r}, pseudo_count={pseudo_count}; give one of {get_args(Per)}, and a "
                "positive number"
            )
        self.per, self.pseudo_count = per, pseudo_count
        self.max_tokens, self.value = max_tokens, value
        length = model.event_shape[0] if per == "position" else 1
        zeros = torch.zeros(length, model.vocab_size, dtype=torch.float64)
        self.theta = torch.nn.Parameter(zeros)
        self.register_buffer("tokens", torch.arange(min(max_tokens, model.vocab_size)))

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The prior with tilted tokens."""
        if not isinstance(prior, Unmasking):
            return prior
        if not torch.is_grad_enabled() and not self.theta.any():
            return prior
        return tilt(prior, self.theta.to(prior.tokens.device))

    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`~pyro_twist.twists.Twist.log_twist`."""
        now = self.time_after(t)
        eta = self.eta(now) if self.value else None
        return 0.0 if eta is None else tilt_value(self.model.kernel(state, now), eta)

    def eta(self, t: int) -> Tensor | None:
        """
        The tilt at a time, of shape ``(1, vocab_size)`` or ``(length, vocab_size)``.

        :param int t: The time index of a state.
        :returns: ``None`` if all of it is zero.
        """
        return self.theta.detach() if self.theta.any() else None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # the number of tokens is that of the saved fit
        if prefix + "tokens" in state_dict:
            self.tokens = torch.empty_like(state_dict[prefix + "tokens"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    # learning

    def observe(self, passes: Sequence[Pass]) -> None:
        """Chooses the tokens to be tilted."""
        super().observe(passes)
        if self.max_tokens < self.model.vocab_size:
            counts = token_counts(passes, self.model.vocab_size)
            self.tokens = likely_tokens(counts, self.max_tokens).to(self.tokens.device)
            # what is not tilted any more must not be proposed as if it were
            others = torch.ones(self.model.vocab_size, dtype=torch.bool, device=self.theta.device)
            others[self.tokens] = False
            with torch.no_grad():
                self.theta[:, others] = 0.0

    def digest(self, step: PathStep, kernel: Any) -> TokenTable | None:
        """The probabilities of the tilted tokens at all reveals."""
        return token_table(step, kernel, self.tokens.to(step.value.device))

    def digest_log_prob(self, digest: TokenTable) -> Tensor:
        """The tilts of the tokens revealed, less the log-normalisers."""
        eta = self.theta.detach()[:, self.tokens].to(digest.probs.device)
        return digest.log_prob(eta[self._group(digest.reveals.position)])

    def _group(self, position: Tensor) -> Tensor:
        return position if self.per == "position" else torch.zeros_like(position)

    def solve(self, seen: Sequence[WeightedDigest], size: float) -> None:
        """Iterative scaling, to its end."""
        table = joined(seen)
        eta = self.theta[:, self.tokens].to(table.probs.device)
        group, prior = self._group(table.position), self.pseudo_count / size
        counts = torch.zeros_like(eta).index_add_(0, group, table.score)
        counts = (counts + prior).clamp(min=0.1 * prior)
        for _ in range(_SWEEPS):
            expected = _expected(table, group, eta)
            change = (counts / (expected + prior * eta.exp())).log()
            eta = eta + change
            if float(change.abs().max()) < 1e-7:
                break
        self.theta[:, self.tokens] = eta.to(self.theta)


def _expected(table: JoinedTables, group: Tensor, eta: Tensor) -> Tensor:
    """How often the tilted law expects each token, of the shape of ``eta``."""
    if len(eta) == 1:
        total = 1 + table.probs @ torch.expm1(eta[0])
        return eta.exp() * ((table.weights / total) @ table.probs)
    total = 1 + (table.probs * torch.expm1(eta)[group]).sum(1)
    terms = (table.weights / total)[:, None] * table.probs
    return eta.exp() * torch.zeros_like(eta).index_add_(0, group, terms)


def check_counts(**given: Any) -> None:
    """Refuses what is no whole number of at least 1, by name."""
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}; give a whole number, 1 or more")


def check_masked(model: Any, name: str) -> None:
    """Refuses models that are not masked ones."""
    if not all(hasattr(model, one) for one in ("mask_token_id", "vocab_size", "complete")):
        raise ValueError(
            f"{name} is for masked models, such as MaskedDiffusion; {type(model).__name__} is "
            "none. Try SurrogateTwist for diffusion models, or QuadraticTwist."
        )
