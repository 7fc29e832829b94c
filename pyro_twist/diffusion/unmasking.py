# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The kernels of masked diffusion: one step reveals some of the masked positions of a sequence.

Which positions are revealed does not depend on the tokens, and given that a position is revealed,
its token is drawn from the network's prediction. A kernel is thus two laws: that of the events
(who is revealed, who is masked again), in closed form, and that of the tokens, which takes the
output layer of the network. The latter is applied to chunks of positions, so that the logits of
all positions never exist at once; where a vocabulary is large, that is what memory would go into.

All probabilities are float64, and tokens are drawn by inverting the distribution function with
float64 uniforms: a float32 Gumbel or uniform number has too few digits for the tail of a large
vocabulary.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["AncestralUnmasking", "GroupUnmasking", "TokenLogits", "Unmasking"]

# Log-probabilities in a chunk: 16 MB in float64, of which about four are alive at a time.
_ENTRIES = 2**21
# Those of revealed positions, which recorded paths keep for fits: 4 MB for each step.
_KEPT_ENTRIES = 2**19


class TokenLogits:
    """
    What a network predicts for every position: logits, or hidden states and the layer after them.

    :param Tensor logits: Of shape ``batch_shape + (length, vocab_size)``.
    :param Tensor hidden: Instead, hidden states of shape ``batch_shape + (length, width)``.
    :param callable head: Maps hidden states of shape ``(rows, width)`` to logits of shape
        ``(rows, vocab_size)``.
    :param int vocab_size: The number of tokens, needed with ``hidden``.
    :param float temperature: Logits are divided by it.
    :param forbidden: Tokens that are never drawn.
    :raises ValueError: If there are not either logits or hidden states with a head.
    """

    def __init__(
        self,
        logits: Tensor | None = None,
        *,
        hidden: Tensor | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        forbidden: Collection[int] = (),
    ) -> None:
        values = hidden if logits is None else logits
        size = vocab_size if logits is None else logits.shape[-1]
        complete = head is not None and size is not None
        if values is None or (hidden is not None and (logits is not None or not complete)):
            raise ValueError("give either logits=, or hidden= with head= and vocab_size=")
        assert size is not None
        self.values, self.vocab_size = values, size
        self.head = head if logits is None else None
        self.temperature, self.forbidden = temperature, tuple(forbidden)

    def having(self, values: Tensor) -> TokenLogits:
        """The same with other logits or hidden states."""
        clone = copy.copy(self)
        clone.values = values
        return clone

    def at(self, rows: Tensor) -> Tensor:
        """
        Logits at some positions, temperature and forbidden tokens in.

        :param Tensor rows: Indices into the flattened positions of all sequences.
        :returns: Of shape ``(len(rows), vocab_size)``, in float64.
        :rtype: Tensor
        :raises ValueError: If the head returns another size, or a row has no normaliser.
        """
        index = torch.unravel_index(rows, self.values.shape[:-1])
        logits = self._headed(self.values[index]).double()
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.forbidden:
            tokens = torch.tensor(self.forbidden, device=logits.device)
            logits = logits.index_fill_(-1, tokens, -math.inf)
        self._check(logits, rows)
        return logits

    def _headed(self, values: Tensor) -> Tensor:
        if self.head is None:
            return values
        logits = self.head(values)
        if tuple(logits.shape) != (len(values), self.vocab_size):
            raise ValueError(
                f"the head returned shape {tuple(logits.shape)} for {len(values)} hidden states; "
                f"expected {(len(values), self.vocab_size)}; is vocab_size={self.vocab_size} right?"
            )
        return logits

    def _check(self, logits: Tensor, rows: Tensor) -> None:
        """Refuses what has no normaliser: NaN, plus infinity, or nothing but minus infinity."""
        highest = logits.detach().amax(-1)
        bad = ~highest.isfinite()
        if not bad.any():
            return
        place = torch.unravel_index(rows[bad][0], self.values.shape[:-1])
        *batch, position = (int(i) for i in place)
        raise ValueError(
            f"the logits of sequence {tuple(batch)} at position {position} have the maximum "
            f"{float(highest[bad][0])}, so they are no distribution over tokens; check the "
            "denoiser's output, in half precision for overflow"
        )


class Unmasking(TorchDistribution):
    """
    Base class of kernels that reveal masked positions of sequences.

    A value is the next sequence: the same tokens, but for some masked positions that now hold a
    token and, with remasking, some revealed ones that are masked again. :attr:`rows` counts the
    masked positions of all sequences, flattened.

    :param Tensor tokens: The sequences, int64, of shape ``batch_shape + (length,)``.
    :param int mask_token_id: The mask token.
    :param TokenLogits logits: What the network predicts at ``tokens``. No probability is given to
        the mask token, whatever its logit.
    :param Tensor frozen: The positions that never change, bool, broadcastable to ``tokens``.

    Log-probabilities and log-ratios are float64, of shape ``batch_shape``.
    """

    # What can be computed again is in no copy or pickle: it is not in ``__dict__``.
    __slots__ = ("_memory",)
    arg_constraints: dict[str, Any] = {}
    has_enumerate_support = False

    def __init__(
        self,
        tokens: Tensor,
        mask_token_id: int,
        logits: TokenLogits,
        *,
        frozen: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if tuple(logits.values.shape[:-1]) != tuple(tokens.shape):
            raise ValueError(
                f"logits are for sequences of shape {tuple(logits.values.shape[:-1])}, tokens have "
                f"shape {tuple(tokens.shape)}"
            )
        self.tokens = tokens
        self.mask_token_id = mask_token_id
        self.frozen = None if frozen is None else frozen.expand(tokens.shape)
        self.eta: Tensor | None = None
        # Tensors are attributes of their own, so that whatever moves or copies them finds them.
        self._values = logits.values
        self._logits = logits.having(logits.values.new_empty(0))
        self._logits.forbidden = tuple({*logits.forbidden, mask_token_id})
        super().__init__(tokens.shape[:-1], tokens.shape[-1:], validate_args=validate_args)

    @abstractmethod
    def _draw_events(self, uniforms: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which positions are revealed and which are masked again (``None``: none is)."""

    @abstractmethod
    def _log_events(self, revealed: Tensor, remasked: Tensor) -> Tensor:
        """The log-probability of the events, of the batch shape."""

    @abstractmethod
    def _same_events(self, other: Unmasking) -> bool:
        """Whether another kernel of the same sequences has the same law of the events."""

    # shapes and copies

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    @property
    def logits(self) -> TokenLogits:
        """What the network predicts, without the tilt."""
        return self._logits.having(self._values)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, that of the mask included."""
        return self._logits.vocab_size

    @property
    def support(self) -> Any:
        """Sequences of tokens; most of them have probability 0."""
        return constraints.independent(constraints.integer_interval(0, self.vocab_size - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """See :meth:`torch.distributions.Distribution.expand`."""
        batch_shape = torch.Size(batch_shape)
        clone = copy.copy(self)
        shape = batch_shape + self.event_shape
        clone.tokens = self.tokens.expand(shape)
        clone.frozen = None if self.frozen is None else self.frozen.expand(shape)
        clone._values = self._values.expand(shape + self._values.shape[-1:])
        clone._batch_shape = batch_shape
        return clone

    def tilted(self, eta: Tensor) -> Self:
        """
        The kernel whose tokens are tilted: given a reveal, proportional to ``exp(eta[token])``.

        Which positions are revealed stays as it is. That is the exact exponential tilt whose value
        for "stays masked" is the log-normaliser of the position: it is about what the position
        will be worth when it is revealed later. Tilts add.

        :param Tensor eta: Broadcastable to ``batch_shape + (length, vocab_size)``; kept as it is.
            Values at positions that are not masked do not matter.
        :returns: A kernel of the same class, differentiable in ``eta``.
        :raises ValueError: If the shape of ``eta`` does not fit.
        """
        target = tuple(self.tokens.shape) + (self.vocab_size,)
        if not _broadcasts(eta.shape, target):
            raise ValueError(
                f"eta has shape {tuple(eta.shape)}, which does not broadcast to {target}: one "
                "number for every token, or for every position and token"
            )
        eta = eta.expand(eta.shape[:-1] + (self.vocab_size,))
        clone = copy.copy(self)
        clone.eta = eta if self.eta is None else self.eta + eta
        clone._memory = self._remembered()
        return clone

    # masked positions

    def _remembered(self) -> dict[str, Any]:
        """What has been computed before; shared with tilts of the same kernel."""
        if not hasattr(self, "_memory"):
            self._memory: dict[str, Any] = {}
        return self._memory

    def _masked(self) -> Tensor:
        masked = self.tokens == self.mask_token_id
        return masked if self.frozen is None else masked & ~self.frozen

    def _remaskable(self) -> Tensor:
        revealed = self.tokens != self.mask_token_id
        return revealed if self.frozen is None else revealed & ~self.frozen

    @property
    def rows(self) -> Tensor:
        """The masked positions, as increasing indices into ``tokens.flatten()``."""
        memory = self._remembered()
        if "rows" not in memory:
            memory["rows"] = self._masked().reshape(-1).nonzero()[:, 0]
        rows: Tensor = memory["rows"]
        return rows

    def reveals(self, value: Tensor) -> Tensor:
        """
        Which masked positions a value reveals.

        :param Tensor value: Of shape ``batch_shape + (length,)``.
        :returns: Increasing indices into :attr:`rows`.
        :rtype: Tensor
        """
        return (value.reshape(-1)[self.rows] != self.mask_token_id).nonzero()[:, 0]

    # tokens

    def chunks(self, which: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """
        Log-probabilities of the tokens given a reveal, tilt included, a chunk at a time.

        :param Tensor which: Indices into :attr:`rows`; all of them if ``None``.
        :returns: Pairs of a slice of ``which`` (of :attr:`rows` if ``None``), and for its positions
            a tensor of shape ``(size of the slice, vocab_size)``, float64, not to be changed.
        """
        rows = self.rows if which is None else self.rows[which]
        for part, base in self._base(which):
            yield part, self._normalized(base, rows[part])

    def _base(self, which: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """The same without the tilt; remembered if there is but one chunk."""
        rows = self.rows if which is None else self.rows[which]
        known = self._recall(which)
        if known is not None:
            yield slice(0, len(rows)), known
            return
        parts = self._parts(len(rows))
        for part in parts:
            base = torch.log_softmax(self._evaluate(rows[part]), -1)
            if len(parts) == 1:
                self._remember(which, base)
            yield part, base

    def _scores(self) -> Iterator[tuple[slice, Tensor]]:
        """For all masked positions, the same up to a number for each: no normaliser is needed."""
        rows, memory = self.rows, self._remembered()
        known = memory.get("all", memory.get("raw"))
        if known is not None:
            yield slice(0, len(rows)), known
            return
        parts = self._parts(len(rows))
        for part in parts:
            scores = self._evaluate(rows[part])
            if len(parts) == 1 and not self._values.requires_grad:
                memory["raw"] = scores
            yield part, scores

    def _parts(self, number: int) -> list[slice]:
        size = max(1, _ENTRIES // self.vocab_size)
        return [slice(start, min(start + size, number)) for start in range(0, number, size)]

    def _evaluate(self, rows: Tensor) -> Tensor:
        # a fit differentiates the tilt, never the parameters of the head
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._values.requires_grad):
            return self.logits.at(rows)

    def _recall(self, which: Tensor | None) -> Tensor | None:
        memory = self._remembered()
        if "raw" in memory and which is None:
            memory["all"] = torch.log_softmax(memory.pop("raw"), -1)
        if "all" in memory:
            base: Tensor = memory["all"]
            return base if which is None else base[which]
        known, base = memory.get("some", (None, None))
        if which is not None and known is not None and torch.equal(known, which):
            return base
        if which is None or "raw" not in memory:
            return None
        base = torch.log_softmax(memory["raw"][which], -1)
        self._remember(which, base)
        return base

    def _remember(self, which: Tensor | None, base: Tensor) -> None:
        if self._values.requires_grad:
            return
        if which is None:
            self._remembered()["all"] = base
        elif base.numel() <= _KEPT_ENTRIES:
            self._remembered()["some"] = (which, base)

    def _normalized(self, base: Tensor, rows: Tensor) -> Tensor:
        if self.eta is None:
            return base
        tilted = torch.log_softmax(base + self._eta_at(rows), -1)
        self._check_tilt(tilted.detach().amax(-1), rows)
        return tilted

    def _log_sum(self, tilted: Tensor, rows: Tensor) -> Tensor:
        value = tilted.logsumexp(-1)
        self._check_tilt(value.detach(), rows)
        return value

    def _check_tilt(self, value: Tensor, rows: Tensor) -> None:
        """Refuses a tilt without normaliser; an optimiser may try any, and turns back by itself."""
        if torch.is_grad_enabled() or value.isfinite().all():
            return
        sequence, position = divmod(int(rows[~value.isfinite()][0]), self.tokens.shape[-1])
        raise ValueError(
            f"the tilt eta leaves no distribution over the tokens at position {position} of "
            f"sequence {sequence}: its normaliser is not finite. Give finite numbers."
        )

    def _eta_at(self, rows: Tensor) -> Tensor:
        """The tilt at positions, with one row if it is the same for all."""
        assert self.eta is not None
        shape = self.tokens.shape
        eta = self.eta.reshape((1,) * (len(shape) + 1 - self.eta.dim()) + self.eta.shape)
        if eta.shape[:-1].numel() == 1:
            return eta.reshape(1, -1).double()
        index = torch.unravel_index(rows, shape)
        sizes = eta.shape[:-1]
        return eta[tuple(i if n > 1 else i * 0 for i, n in zip(index, sizes, strict=True))].double()

    def log_normalizer(self, eta: Tensor) -> Tensor:
        """
        The log-normaliser of a further tilt, summed over the masked positions.

        It is the log of the mean, under this kernel, of the product over the masked positions of
        ``exp(eta[token])`` where one is revealed and of its own mean where it stays masked.

        :param Tensor eta: As in :meth:`tilted`.
        :returns: Of the batch shape.
        :rtype: Tensor
        """
        further = self.tilted(eta)
        terms = self._zeros(0)
        for part, base in self._base(None):
            rows = self.rows[part]
            value = self._log_sum(base + further._eta_at(rows), rows)
            if self.eta is not None:
                value = value - self._log_sum(base + self._eta_at(rows), rows)
            terms = torch.cat([terms, value])
        return self._summed(terms, self.rows)

    def token_log_prob(self, value: Tensor) -> Tensor:
        """
        Log-probabilities of the tokens that a value reveals.

        :param Tensor value: Of shape ``batch_shape + (length,)``.
        :returns: One for each of :meth:`reveals`, float64.
        :rtype: Tensor
        """
        which = self.reveals(value)
        tokens = self._tokens_of(value, which)
        found = [_pick(log_probs, tokens[part]) for part, log_probs in self.chunks(which)]
        return torch.cat([self._zeros(0), *found])

    def _tokens_of(self, value: Tensor, which: Tensor) -> Tensor:
        # what is no token at all is given probability 0 elsewhere
        return value.reshape(-1)[self.rows[which]].clamp(0, self.vocab_size - 1)

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=self.tokens.device)

    def _summed(self, terms: Tensor, rows: Tensor) -> Tensor:
        """Sums of terms at positions over each sequence."""
        sequences = rows // self.tokens.shape[-1]
        total = self._zeros(self.batch_shape.numel())
        return total.index_add(0, sequences, terms).reshape(self.batch_shape)

    # the distribution

    def log_prob(self, value: Tensor) -> Tensor:
        """
        The log-probability of the next sequences; minus infinity where they cannot be reached.

        :param Tensor value: Of shape ``batch_shape + (length,)``, or with more dims on the left.
        :returns: In float64, of the batch shape of ``value``.
        :rtype: Tensor
        """
        if self._validate_args:
            self._validate_sample(value)
        kernel, value = self._fitted(value)
        was, now = kernel._masked(), value == self.mask_token_id
        remasked = kernel._remaskable() & now
        known = (value >= 0) & (value < self.vocab_size)
        legal = (was | remasked | (value == kernel.tokens)) & known
        total = kernel._log_events(was & ~now, remasked)
        rows = kernel.rows[kernel.reveals(value)]
        total = total + kernel._summed(kernel.token_log_prob(value), rows)
        return total.masked_fill(~legal.all(-1), -math.inf)

    def _fitted(self, value: Tensor) -> tuple[Self, Tensor]:
        """Kernel and value of a common batch shape."""
        shape = torch.broadcast_shapes(value.shape, self.tokens.shape)
        kernel = self if shape == self.tokens.shape else self.expand(shape[:-1])
        return kernel, value.expand(shape)

    def log_ratio(self, other: Unmasking, value: Tensor) -> Tensor:
        """
        ``self.log_prob(value) - other.log_prob(value)`` for a value in the support of both.

        For two kernels of the same sequences and events only the tokens of revealed positions
        count, and where both tilt the same prediction, only the tilts.

        :param Unmasking other: A kernel of the same sequences.
        :param Tensor value: As in :meth:`log_prob`.
        :returns: In float64, of the batch shape of ``value``.
        :rtype: Tensor
        """
        if not self._same_events(other):
            return self.log_prob(value) - other.log_prob(value)
        p, q = self._fitted(value)[0], other._fitted(value)[0]
        value = value.expand(p.tokens.shape)
        which = p.reveals(value)
        if self._values is not other._values or self._logits is not other._logits:
            terms = p.token_log_prob(value) - q.token_log_prob(value)
        else:
            terms = p._gains(q, which, p._tokens_of(value, which))
        return p._summed(terms, p.rows[which])

    def _gains(self, other: Unmasking, which: Tensor, tokens: Tensor) -> Tensor:
        """Log-ratios of the tokens, from the difference of the tilts."""
        rows, found = self.rows[which], [self._zeros(0)]
        for part, base in self._base(which):
            gain = self._gain(base, rows[part], tokens[part])
            found.append(gain - other._gain(base, rows[part], tokens[part]))
        return torch.cat(found)

    def _gain(self, base: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """What the tilt adds to the log-probability of tokens."""
        if self.eta is None:
            return self._zeros(len(rows))
        eta = self._eta_at(rows)
        log_sum = self._log_sum(base + eta, rows)
        return _pick(eta.expand(len(rows), -1), tokens) - log_sum

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """
        Draws the next sequences. The number of uniforms used does not depend on ``tokens``.

        :returns: int64, of shape ``sample_shape + batch_shape + (length,)``.
        :rtype: Tensor
        """
        sample_shape = torch.Size(sample_shape)
        draws = [self._draw() for _ in range(sample_shape.numel())]
        shape = sample_shape + self.tokens.shape
        return torch.stack(draws).reshape(shape) if draws else self.tokens.new_empty(shape)

    def _draw(self) -> Tensor:
        uniforms = self._zeros(2, *self.tokens.shape).uniform_()
        revealed, remasked = self._draw_events(uniforms[0])
        which = revealed.reshape(-1)[self.rows].nonzero()[:, 0]
        value = self.tokens.reshape(-1).clone()
        rows, numbers = self.rows[which], uniforms[1].reshape(-1)
        for part, log_probs in self.chunks(which):
            places = rows[part]
            value[places] = _inverse_cdf(log_probs, numbers[places, None])[:, 0]
        value = value.reshape(self.tokens.shape)
        return value if remasked is None else value.masked_fill(remasked, self.mask_token_id)

    @torch.no_grad()
    def complete(self, uniforms: Tensor | None = None) -> Tensor:
        """
        Fills all masked positions from the law of their tokens, independently of each other.

        :param Tensor uniforms: Numbers in [0, 1), float64, of shape ``batch_shape + (length,)``,
            or with more dims on the left for several completions; the token is the inverse of the
            distribution function at them. Without them it is the most probable one.
        :returns: Sequences of the shape of ``uniforms``, or of ``tokens``.
        :rtype: Tensor
        """
        shape = self.tokens.shape
        if uniforms is not None:
            return self._filled(uniforms, lambda rows, scores, total: None)
        filled = self.tokens.reshape(-1).clone()
        for part, scores in self._scores():
            rows = self.rows[part]
            peak, filled[rows] = self._tilted_scores(scores, rows).max(-1)
            self._check_tilt(peak, rows)
        return filled.reshape(shape)

    @torch.no_grad()
    def complete_tilted(self, eta: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """
        ``tilted(eta).complete(uniforms)`` and ``log_normalizer(eta)``, applying the head once.

        :param Tensor eta: As in :meth:`tilted`.
        :param Tensor uniforms: As in :meth:`complete`.
        :returns: Sequences of the shape of ``uniforms``, and numbers of the batch shape, float64.
        :rtype: tuple
        """
        terms = [self._zeros(0)]

        def keep(rows: Tensor, scores: Tensor, log_total: Tensor) -> None:
            terms.append(log_total - self._tilted_scores(scores, rows).logsumexp(-1))

        filled = self.tilted(eta)._filled(uniforms, keep)
        return filled, self._summed(torch.cat(terms), self.rows)

    def _filled(self, uniforms: Tensor, keep: Callable[[Tensor, Tensor, Tensor], None]) -> Tensor:
        """
        Completions; ``keep`` is told positions, their scores, and the log-normalisers tilted.
        """
        shape = self.tokens.shape
        if uniforms.shape[uniforms.dim() - len(shape) :] != shape:
            raise ValueError(
                f"uniforms have shape {tuple(uniforms.shape)}, which does not end in "
                f"{tuple(shape)}, the shape of the tokens"
            )
        filled = self.tokens.expand(uniforms.shape).reshape(-1, shape.numel()).clone()
        numbers = uniforms.reshape(-1, shape.numel())
        for part, scores in self._scores():
            rows = self.rows[part]
            tilted = self._tilted_scores(scores, rows)
            peak = tilted.amax(-1, keepdim=True)
            self._check_tilt(peak[:, 0], rows)
            cumulative = (tilted - peak).exp_().cumsum_(-1)
            filled[:, rows] = _passed(cumulative, numbers[:, rows].T).T
            keep(rows, scores, peak[:, 0] + cumulative[:, -1].log())
        return filled.reshape(uniforms.shape)

    def _tilted_scores(self, scores: Tensor, rows: Tensor) -> Tensor:
        return scores if self.eta is None else scores + self._eta_at(rows)


class AncestralUnmasking(Unmasking):
    """
    Every masked position is revealed with the same probability, independently of the others.

    With a share :math:`\\alpha_t` of revealed positions at time t and a probability
    :math:`\\sigma_t` that a revealed one is masked again, a masked position stays masked in the
    step to time s with probability :math:`(1 - \\alpha_s - \\sigma_t \\alpha_t) / (1 - \\alpha_t)`
    ([1], equation 6, and [2] with remasking).

    :param Tensor tokens: See :class:`Unmasking`.
    :param int mask_token_id: See :class:`Unmasking`.
    :param TokenLogits logits: See :class:`Unmasking`.
    :param float log_stay: The log-probability that a masked position stays masked.
    :param float log_remask: The log-probability that a revealed position is masked again.
    :param Tensor frozen: See :class:`Unmasking`.
    :raises ValueError: If one of the numbers is no log-probability.

    **References**

    [1] `Simple and Effective Masked Diffusion Language Models`
        Subham Sekhar Sahoo, Marianne Arriola, Yair Schiff, Aaron Gokaslan, Edgar Marroquin,
        Justin T Chiu, Alexander Rush, Volodymyr Kuleshov (2024), https://arxiv.org/abs/2406.07524

    [2] `Remasking Discrete Diffusion Models with Inference-Time Scaling`
        Guanghan Wang, Yair Schiff, Subham Sekhar Sahoo, Volodymyr Kuleshov (2025),
        https://arxiv.org/abs/2503.00307
    """

    def __init__(
        self,
        tokens: Tensor,
        mask_token_id: int,
        logits: TokenLogits,
        log_stay: float,
        log_remask: float = -math.inf,
        *,
        frozen: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        for name, number in (("log_stay", log_stay), ("log_remask", log_remask)):
            if not number <= 0:
                raise ValueError(f"{name}={number} is no log-probability; it is at most 0")
        self.log_stay, self.log_remask = log_stay, log_remask
        super().__init__(tokens, mask_token_id, logits, frozen=frozen, validate_args=validate_args)

    def _draw_events(self, uniforms: Tensor) -> tuple[Tensor, Tensor | None]:
        revealed = self._masked() & (uniforms >= math.exp(self.log_stay))
        if self.log_remask == -math.inf:
            return revealed, None
        return revealed, self._remaskable() & (uniforms < math.exp(self.log_remask))

    def _log_events(self, revealed: Tensor, remasked: Tensor) -> Tensor:
        return (
            _times((self._masked() & ~revealed).sum(-1), self.log_stay)
            + _times(revealed.sum(-1), _log_not(self.log_stay))
            + _times(remasked.sum(-1), self.log_remask)
            + _times((self._remaskable() & ~remasked).sum(-1), _log_not(self.log_remask))
        )

    def _same_events(self, other: Unmasking) -> bool:
        return (
            isinstance(other, AncestralUnmasking)
            and self.log_stay == other.log_stay
            and self.log_remask == other.log_remask
        )


class GroupUnmasking(Unmasking):
    """
    A uniformly chosen group of the masked positions of each sequence is revealed.

    One position a step is first-hitting sampling [1] for a network that is not told the time; more
    are LLaDA's random remasking [2]. A group is smaller where fewer positions are masked.

    :param Tensor tokens: See :class:`Unmasking`.
    :param int mask_token_id: See :class:`Unmasking`.
    :param TokenLogits logits: See :class:`Unmasking`.
    :param int size: The number of positions in a group.
    :param Tensor frozen: See :class:`Unmasking`.
    :raises ValueError: If ``size`` is not positive.

    **References**

    [1] `Masked Diffusion Models are Secretly Time-Agnostic Masked Models`, section 4
        Kaiwen Zheng, Yongxin Chen, Hanzi Mao, Ming-Yu Liu, Jun Zhu, Qinsheng Zhang (2024),
        https://arxiv.org/abs/2409.02908

    [2] `Large Language Diffusion Models`
        Shen Nie, Fengqi Zhu, Zebin You, Xiaolu Zhang, Jingyang Ou, Jun Hu, Jun Zhou, Yankai Lin,
        Ji-Rong Wen, Chongxuan Li (2025), https://arxiv.org/abs/2502.09992
    """

    def __init__(
        self,
        tokens: Tensor,
        mask_token_id: int,
        logits: TokenLogits,
        size: int,
        *,
        frozen: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size={size!r} is not a positive number of positions; try size=1")
        self.size = size
        super().__init__(tokens, mask_token_id, logits, frozen=frozen, validate_args=validate_args)

    def _draw_events(self, uniforms: Tensor) -> tuple[Tensor, Tensor | None]:
        masked = self._masked()
        # masked positions come first, in random order
        ranks = uniforms.masked_fill(~masked, 2.0).argsort(-1).argsort(-1)
        return masked & (ranks < self.size), None

    def _log_events(self, revealed: Tensor, remasked: Tensor) -> Tensor:
        total, number = self._masked().sum(-1), revealed.sum(-1)
        possible = (number == total.clamp(max=self.size)) & ~remasked.any(-1)
        n, k = total.double(), number.double()
        log_ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
        return (-log_ways).masked_fill(~possible, -math.inf)

    def _same_events(self, other: Unmasking) -> bool:
        return isinstance(other, GroupUnmasking) and self.size == other.size


def _broadcasts(shape: Any, target: tuple[int, ...]) -> bool:
    try:
        return tuple(torch.broadcast_shapes(tuple(shape), target)) == target
    except RuntimeError:
        return False


def _pick(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens[:, None])[:, 0]


def _times(count: Tensor, log_prob: float) -> Tensor:
    """The log-probability of so many events; 0 for none, also of impossible ones."""
    return torch.where(count == 0, 0.0, count.double() * log_prob)


def _log_not(log_prob: float) -> float:
    """The log-probability of the opposite event."""
    return math.log(-math.expm1(log_prob)) if log_prob < 0 else -math.inf


def _inverse_cdf(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """
    Tokens at which the distribution function passes uniform numbers.

    :param Tensor log_probs: Of shape ``(rows, vocab_size)``, float64.
    :param Tensor uniforms: Of shape ``(rows, draws)``, float64.
    :returns: Of the shape of ``uniforms``; tokens of probability 0 never.
    """
    return _passed(log_probs.exp().cumsum_(-1), uniforms)


def _passed(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """The same from cumulative sums, which need not end at one."""
    total = cumulative[:, -1:]
    # below the total, so that rounding cannot lead past the last token that has any probability
    targets = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets.contiguous(), right=True)
