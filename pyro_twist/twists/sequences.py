# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
A tilt of tokens learnt from every completion that was ever scored.

A look-ahead fills in the masks and scores the result at every step, so that a pass of a few
particles leaves hundreds of sequences with their log-potentials. A regression of the one on the
other says what a token is worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_twist.diffusion.unmasking import Unmasking
from pyro_twist.twists.completions import tilt_value
from pyro_twist.twists.events import Reveals, likely_tokens, reveals_of
from pyro_twist.twists.learned import FittedTwist, WeightedDigest
from pyro_twist.twists.paths import Pass, PathStep
from pyro_twist.twists.regression import KernelRidge
from pyro_twist.twists.surrogate import _hat, _roots, _time
from pyro_twist.twists.tilting import tilt
from pyro_twist.twists.tokens import check_counts, check_masked

__all__ = ["TokenSurrogate"]

_MAX_GAIN = 1.5
_POINTS = torch.linspace(0.0, _MAX_GAIN, 7, dtype=torch.float64)
_GRID = torch.linspace(0.0, _MAX_GAIN, 151, dtype=torch.float64)


class TokenSurrogate(FittedTwist):
    """
    Tilts tokens by what a regression says that they are worth, times a gain.

    A surrogate of the terminal log-potential, linear in how often each token occurs in a sequence,
    or in the mean of given embeddings of its tokens, is fitted to all sequences that were scored:
    completions and ends of paths. Its derivative by a token :math:`v` is :math:`\\beta_v`, and the
    tilt is :math:`\\eta_{tv} = \\gamma_t (\\beta_v - \\bar\\beta)`, clipped at ``cap``, where
    :math:`\\bar\\beta` is the average over those sequences. The gains :math:`\\gamma_t` are
    interpolated between ``knots`` values, the only parameters. They start at the share of variance
    that the surrogate explains on paths left out (0 if it explains none), and move on by weighted
    likelihood.

    :param model: A tilted :class:`~pyro_twist.diffusion.MaskedDiffusion`.
    :param Tensor embedding: Features of the tokens, of shape ``(vocab_size, num_features)``; by
        default every token is a feature of its own.
    :param int knots: The number of gains.
    :param float cap: The largest tilt at gain 1.
    :param float ridge: Prior precision of the gains.
    :param int max_tokens: The largest number of tokens to be tilted: those that occur most often.
    :param bool value: As for :class:`~pyro_twist.twists.TokenTilt`.
    :param str key: The entry of the state that holds the look-ahead, with completions.
    :raises ValueError: If the model is not a masked one, or an option is out of range.
    """

    theta: torch.nn.Parameter
    prior_mean: Tensor
    beta: Tensor
    embedding: Tensor | None

    def __init__(
        self,
        model: Any,
        *,
        embedding: Tensor | None = None,
        knots: int = 1,
        cap: float = 4.0,
        ridge: float = 2.0,
        max_tokens: int = 1024,
        value: bool = False,
        key: str = "lookahead",
    ) -> None:
        super().__init__(model)
        check_masked(model, type(self).__name__)
        check_counts(knots=knots, max_tokens=max_tokens)
        if not cap > 0 or not ridge >= 0:
            raise ValueError(
                f"cap={cap}, ridge={ridge}; give a positive cap, and a ridge of at least 0"
            )
        if embedding is not None and embedding.shape[:1] != (model.vocab_size,):
            raise ValueError(
                f"embedding has shape {tuple(embedding.shape)}; give one row for each of the "
                f"{model.vocab_size} tokens"
            )
        self.knots, self.cap, self.ridge = knots, cap, ridge
        self.max_tokens, self.value, self.key = max_tokens, value, key
        self.regression = KernelRidge("linear")
        self.theta = torch.nn.Parameter(torch.zeros(knots, dtype=torch.float64))
        self.register_buffer("prior_mean", torch.zeros(knots, dtype=torch.float64))
        self.register_buffer("beta", torch.zeros(1, model.vocab_size, dtype=torch.float64))
        self.register_buffer("embedding", None if embedding is None else embedding.double())

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The completions and their log-potentials."""
        return tuple(f"{self.key}_{name}" for name in ("completions", "potentials", "time"))

    @property
    def score(self) -> float:
        """Share of variance that the surrogate explains on paths left out."""
        return float(self.regression.score)

    # steering

    def eta(self, t: int) -> Tensor | None:
        """
        The tilt at a time, of shape ``(1, vocab_size)``.

        :param int t: The time index of a state.
        :returns: ``None`` if all of it is zero.
        """
        gain = self._shares(t) @ self.theta.detach()
        return gain * self.beta if float(gain) != 0 and self.beta.any() else None

    def _shares(self, t: int) -> Tensor:
        return _hat(t / self.model.timesteps[0], self.knots).to(self.theta)

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The prior with tilted tokens."""
        if not isinstance(prior, Unmasking):
            return prior
        eta = self.eta(self.time_after(*self.args_kwargs[0][1:]))
        return prior if eta is None else tilt(prior, eta.to(prior.tokens.device))

    def log_twist(self, state: Any, t: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`~pyro_twist.twists.Twist.log_twist`."""
        now = self.time_after(t)
        eta = self.eta(now) if self.value else None
        return 0.0 if eta is None else tilt_value(self.model.kernel(state, now), eta)

    # learning

    def observe(self, passes: Sequence[Pass]) -> None:
        """Fits the surrogate to all scored sequences, and sets the prior of the gains."""
        super().observe(passes)
        tokens, targets, groups = _distinct(list(self._scored(passes)))
        if len(targets) < 8 or float(targets.std()) < 1e-9:
            return
        counts = torch.bincount(tokens.flatten(), minlength=self.model.vocab_size)
        chosen = likely_tokens(counts, self.max_tokens)
        self.regression.fit(self._features(tokens, chosen), targets, groups)
        self._set_beta(chosen, counts)
        self.prior_mean.fill_(min(max(self.score, 0.0), 1.0))
        # the likelihood moves the gains from there, and only as far as it proves itself
        with torch.no_grad():
            self.theta.copy_(self.prior_mean)

    def _scored(self, passes: Sequence[Pass]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Sequences with their log-potentials, and the pass and first ancestor of each."""
        length = self.model.event_shape[0]
        for number, one in enumerate(passes):
            *roots, last = _roots_to_end(one)
            offset = number * one.log_path.numel()
            steps = [step for sites in one.steps for step in sites[:1]]
            for step, root in zip(steps, roots, strict=True):
                tokens = step.state.get(f"{self.key}_completions")
                if tokens is None or _time(step.state, self.key) != step.t:
                    continue
                potentials = step.state[f"{self.key}_potentials"].reshape(root.numel(), -1)
                group = (root.reshape(-1, 1) + offset).expand(potentials.shape)
                yield tokens.reshape(-1, length), potentials.flatten(), group.flatten()
            ends = one.state["x"].reshape(-1, length)
            yield ends, one.log_terminal.flatten(), (last + offset).flatten()

    def _features(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """What the surrogate is linear in, one row for each sequence."""
        if self.embedding is not None:
            return self.embedding[tokens].mean(1)
        place = torch.searchsorted(chosen, tokens).clamp(max=len(chosen) - 1)
        known = (chosen[place] == tokens).double()
        return torch.zeros(len(tokens), len(chosen)).double().scatter_add_(1, place, known)

    def _set_beta(self, chosen: Tensor, counts: Tensor) -> None:
        slope = self.regression.gradient(self.regression.centre[None])[0]
        if self.embedding is not None:
            slope = self.embedding[chosen] @ slope / self.model.event_shape[0]
        share = counts[chosen].double() / counts[chosen].sum()
        self.beta.zero_()
        self.beta[0, chosen] = (slope - share @ slope).clamp(-self.cap, self.cap)

    def digest(self, step: PathStep, kernel: Any) -> _Gains | None:
        """How likely the tokens revealed are at any gain."""
        if not isinstance(kernel, Unmasking) or step.t is None:
            return None
        reveals = reveals_of(step, kernel)
        beta = self.beta[0].to(step.value.device)
        curves = [_curve(chunk, beta) for _, chunk in kernel.chunks(reveals.which)]
        empty = torch.zeros(2, 0, len(_POINTS), dtype=torch.float64, device=beta.device)
        values, slopes = torch.cat([empty, *curves], 1)
        mean = slopes[:, 0]
        if step.posterior is not kernel and isinstance(step.posterior, Unmasking):
            laws = step.posterior.chunks(reveals.which)
            mean = torch.cat([mean[:0], *(chunk.exp() @ beta for _, chunk in laws)])
        shares = self._shares(step.t - 1)
        return _Gains(reveals, beta[reveals.token], mean, values, slopes, shares)

    def digest_log_prob(self, digest: _Gains) -> Tensor:
        """The tilts of the tokens revealed, less the log-normalisers."""
        gain = (digest.shares @ self.theta.detach()).to(digest.beta.device)
        normal = _interpolated(digest.values, digest.slopes, gain[None])[:, 0]
        return digest.reveals.summed(gain * digest.beta - normal)

    def solve(self, seen: Sequence[WeightedDigest], size: float) -> None:
        """One gain after the other, on a grid."""
        rows = [_weighted(one) for one in seen]
        shares = torch.stack([one.digest.shares.cpu() for one in seen])
        score, values, slopes = (torch.stack(column) for column in zip(*rows, strict=True))
        cost = _interpolated(values, slopes, _GRID)
        theta = self.theta.detach().cpu()
        for _ in range(20 if self.knots > 1 else 1):
            for k in range(self.knots):
                others = shares @ theta - shares[:, k] * theta[k]
                gains = others[:, None] + shares[:, k, None] * _GRID
                place = (gains / _GRID[1]).round().long().clamp(0, len(_GRID) - 1)
                fit = (gains * score[:, None] - cost.gather(1, place)).sum(0)
                missed = (_GRID - self.prior_mean[k].cpu()).square()
                theta[k] = _GRID[(fit - 0.5 * self.ridge / size * missed).argmax()]
        self.theta.copy_(theta)

    def constrain(self) -> None:
        """Gains are between 0 and 1.5."""
        self.theta.clamp_(0.0, _MAX_GAIN)


@dataclass(frozen=True)
class _Gains:
    """
    The reveals of a step, with the log-normalisers of the tilt at some gains.

    ``beta`` is the tilt at gain 1 of the token revealed, ``mean`` that expected by the law it was
    drawn from; ``values`` and ``slopes`` are the log-normaliser and its derivative at all points.
    """

    reveals: Reveals
    beta: Tensor
    mean: Tensor
    values: Tensor
    slopes: Tensor
    shares: Tensor


def _curve(log_probs: Tensor, beta: Tensor) -> Tensor:
    """The log-normaliser and its derivative at the gains of all points."""
    found = []
    for gain in _POINTS.tolist():
        tilted = log_probs + gain * beta
        value = tilted.logsumexp(1)
        found.append(torch.stack([value, (tilted - value[:, None]).exp() @ beta]))
    return torch.stack(found, -1)


def _interpolated(values: Tensor, slopes: Tensor, at: Tensor) -> Tensor:
    """Cubic interpolation of rows of values and slopes, of shape ``(num_rows, len(at))``."""
    width = float(_POINTS[1])
    left = (at.to(values) / width).floor().long().clamp(0, len(_POINTS) - 2)
    u = at.to(values) / width - left
    rise = values[:, left + 1] - values[:, left]
    start, end = width * slopes[:, left] - rise, rise - width * slopes[:, left + 1]
    return values[:, left] + u * rise + u * (1 - u) * ((1 - u) * start + u * end)


def _weighted(one: WeightedDigest) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over a step of what the likelihood of a gain consists of."""
    digest: _Gains = one.digest
    weights, base = (w[digest.reveals.particle] for w in (one.weights, one.base))
    score = weights @ digest.beta - base @ (digest.beta - digest.mean)
    return score.cpu(), (weights @ digest.values).cpu(), (weights @ digest.slopes).cpu()


def _roots_to_end(one: Pass) -> list[Tensor]:
    """For every step the first ancestor of each particle, and that of each final path last."""
    roots = _roots(one)
    last = roots[-1] if one.ancestors[-1] is None else roots[-1].gather(0, one.ancestors[-1])
    return [*roots, last]


def _distinct(found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Each sequence once, with the group that it was first seen in; lost ones a little below."""
    if not found:
        return torch.zeros(0, 1).long(), torch.zeros(0), torch.zeros(0).long()
    tokens, targets, groups = (torch.cat(column) for column in zip(*found, strict=True))
    kept, index = tokens.unique(dim=0, return_inverse=True)
    first = torch.full((len(kept),), len(index), device=index.device)
    order = torch.arange(len(index), device=index.device)
    first = first.scatter_reduce(0, index, order, "amin").sort().values
    targets = targets[first]
    alive = targets.isfinite()
    lowest = targets[alive].amin() if alive.any() else targets.new_zeros(())
    return tokens[first], torch.where(alive, targets, lowest - 3.0), groups[first]
