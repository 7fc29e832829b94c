# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The reverse process of a masked diffusion model as a Pyro model."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Mapping, MutableMapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_twist.diffusion.maskedlm import (
    OutputLayerError,
    SplitNetwork,
    TokenDenoiser,
    load_masked_lm,
    split_network,
)
from pyro_twist.diffusion.masking import Remasking, check_remasking, make_masking_schedule
from pyro_twist.diffusion.unmasking import (
    AncestralUnmasking,
    GroupUnmasking,
    TokenLogits,
    Unmasking,
)

__all__ = ["MaskedDiffusion"]

_STEPS = 50


class MaskedDiffusion:
    r"""
    The reverse process of a masked diffusion model over sequences of tokens.

    Time is counted down: ``init`` samples the site ``x_T``, the prompt with masks at all free
    positions, ``step(state, t)`` samples ``x_{t-1}``, in which some masks have become tokens.
    Between sites the state holds

    - ``x``, the current sequences, int64, of shape ``batch_shape + (length,)``;
    - ``hidden``, the hidden states before the output layer, of shape
      ``batch_shape + (length, width)`` in the network's dtype, or ``logits`` for a denoiser that
      is not split; gone after the last step, when ``x0_hat`` is ``x``.

    The batch shape is that of the plates around the model. The network is evaluated for sequences
    that still have masks, and not again for one that a step left as it was: a masked diffusion
    model is not told the time, so its prediction is a function of the sequence.

    The kernels are exact, so that importance weights are: see
    :class:`~pyro_twist.diffusion.unmasking.AncestralUnmasking` and
    :class:`~pyro_twist.diffusion.unmasking.GroupUnmasking`. All positions are attended to; end and
    padding tokens are tokens like others::

        model = MaskedDiffusion.from_pretrained("path/to/model", length=32)
        with pyro.plate("particles", 16):
            sentences = model.decode(model())

    :param callable denoiser: A transformers model for masked language modelling, or any callable
        ``denoiser(tokens, **conditioning)`` with ``tokens`` of shape ``(rows, length)`` that
        returns logits of shape ``(rows, length, vocab_size)``, or an object that has them as
        ``.logits``; with ``head``, hidden states of shape ``(rows, length, width)``. A transformers
        model is split in front of its output layer by itself if its logits are what that layer
        returns, which is tried on one sequence. An argument ``timesteps`` is given zeros. Modules
        should be in evaluation mode.
    :param int length: The number of positions of a sequence.
    :param int vocab_size: The number of tokens, that of the mask included.
    :param int mask_token_id: The mask token.
    :param int num_inference_steps: Number of steps T of ancestral unmasking, 50 by default.
    :param schedule: The share of revealed positions as a function of time in ancestral unmasking:
        ``"linear"``, the default, ``"cosine"``, ``"log-linear"`` or a function; see
        :mod:`pyro_twist.diffusion.masking`.
    :param str unmasking: ``"ancestral"``, each position by itself, or ``"uniform"``, in groups of
        ``group_size`` that are chosen uniformly; then T follows from the number of positions.
    :param int group_size: The number of positions revealed in a step of ``"uniform"``, 1 by
        default.
    :param tuple remasking: ``("capped", eta)`` or ``("rescaled", eta)`` with ``"ancestral"``:
        revealed positions may be masked again, so that a token can still change.
    :param Tensor prompt: Fixed tokens, with the mask token at free positions, of shape
        ``(length,)``, or ``(size, length)`` with a plate.
    :param tuple plate: Name and size of a plate, such as ``("prompts", 8)``, opened at dim -1
        around every site; inference needs ``max_plate_nesting=1``.
    :param float temperature: The logits are divided by it; positive.
    :param forbidden_token_ids: Tokens that are never drawn. The mask token is always one of them.
    :param head: The output layer of a denoiser that returns hidden states, or the name of the
        submodule of the denoiser that is its output layer, in front of which it is split.
    :param int chunk_size: At most this many sequences per call of the network and the decoder.
    :param callable decoder: Maps sequences of shape ``(rows, length)`` to user space: a tensor with
        one entry per row, or a list, such as one of strings.
    :param dict conditioning: Keyword arguments of the denoiser, as for
        :class:`~pyro_twist.diffusion.GaussianDiffusion`.
    :raises ValueError: If an argument is out of range, or decoding would be deterministic.

    **References**

    [1] `Simple and Effective Masked Diffusion Language Models`
        Subham Sekhar Sahoo, Marianne Arriola, Yair Schiff, Aaron Gokaslan, Edgar Marroquin,
        Justin T Chiu, Alexander Rush, Volodymyr Kuleshov (2024), https://arxiv.org/abs/2406.07524
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        length: int,
        vocab_size: int,
        mask_token_id: int,
        *,
        num_inference_steps: int | None = None,
        schedule: str | Callable[[float], float] | None = None,
        unmasking: str = "ancestral",
        group_size: int | None = None,
        remasking: Remasking | None = None,
        prompt: Tensor | None = None,
        plate: tuple[str, int] | None = None,
        temperature: float = 1.0,
        forbidden_token_ids: Collection[int] = (),
        head: Callable[[Tensor], Tensor] | str | None = None,
        chunk_size: int | None = None,
        decoder: Callable[[Tensor], Any] | None = None,
        conditioning: Mapping[str, Any] | None = None,
    ) -> None:
        group_size, steps = _or(group_size, 1), _or(num_inference_steps, _STEPS)
        _check_sizes(length, vocab_size, mask_token_id, group_size, chunk_size)
        _check_unmasking(unmasking, remasking, temperature)
        _check_used(unmasking, num_inference_steps, schedule, group_size)
        _check_plate(plate)
        self.event_shape = torch.Size((length,))
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self.temperature = temperature
        self.forbidden = _forbidden(forbidden_token_ids, vocab_size, mask_token_id)
        self.unmasking, self.group_size = unmasking, group_size
        self.plate = plate
        self._plate: AbstractContextManager[Any] = contextlib.nullcontext()
        if plate is not None:
            # Creating a plate emits a site, which must be in no trace twice: once, and hidden.
            with poutine.block():
                self._plate = pyro.plate(plate[0], plate[1], dim=-1)
        self.decoder = decoder
        self.keep_graph = False
        network, self.head = split_network(denoiser, head)
        self.denoiser = TokenDenoiser(
            network,
            self.event_shape,
            vocab_size=vocab_size if self.head is None else None,
            conditioning=conditioning or {},
            chunk_size=chunk_size,
        )
        self.prompt = self._checked_prompt(prompt).to(self.denoiser.device)
        self.frozen = self.prompt != mask_token_id
        if isinstance(network, SplitNetwork):
            self._check_split(network, head)
        self.schedule = make_masking_schedule(_or(schedule, "linear"), steps, remasking)
        self.timesteps = tuple(range(self._num_steps(), 0, -1))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        length: int | None = None,
        *,
        tokenizer: Any = None,
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """
        Loads a pretrained model and its tokenizer, from a folder or from the Hugging Face hub.

        Every model that transformers loads as ``AutoModelForMaskedLM`` will do, and models with
        code of their own that predict the token of every masked position: of MDLM's kind, whose
        argument ``timesteps`` is given zeros, or of LLaDA's, which are loaded by ``AutoModel`` and
        decoded with ``unmasking="uniform"`` unless ``options`` say otherwise, or have a number of
        steps or a schedule, which are those of ancestral unmasking. Weights are read from
        safetensors files only.

        A model that was trained on sequences between special tokens, such as ``[CLS]`` and
        ``[SEP]``, wants them there: put them into ``prompt``, since none is added, and forbid them
        elsewhere. ESM is such a one, and with its ``token_dropout`` it also scales embeddings by
        the share of positions that are not masked, so that a sequence of nothing but masks has no
        prediction at all::

            frame = torch.full((102,), tokenizer.mask_token_id)
            frame[0], frame[-1] = tokenizer.cls_token_id, tokenizer.eos_token_id
            special = set(tokenizer.all_special_ids)
            model = MaskedDiffusion.from_pretrained(
                "facebook/esm2_t6_8M_UR50D", prompt=frame, forbidden_token_ids=special
            )

        :param str path: A folder, or the name of a model on the hub.
        :param int length: The number of positions; by default that of the prompt, or else the most
            that model and tokenizer can take.
        :param tokenizer: The tokenizer, if it is not the one saved with the model.
        :param bool trust_remote_code: Whether code that comes with the model may be run. Read it
            first.
        :param torch.dtype dtype: The dtype to compute in; by default that of the weights.
        :param options: Options of :class:`MaskedDiffusion`; ``mask_token_id``, ``vocab_size`` and
            ``decoder`` are those of the tokenizer and the model by default, and
            ``forbidden_token_ids`` those that no text has: the one for what is unknown, and those
            beyond the tokenizer.
        :returns: The model, in evaluation mode.
        :raises ValueError: If the model predicts no masked tokens, or something is not known.
        """
        found = load_masked_lm(path, tokenizer, trust_remote_code, dtype, length, options)
        return cls(**found)

    @property
    def counts(self) -> dict[str, int]:
        """Sequences that the denoiser was evaluated for so far."""
        return {"denoiser": self.denoiser.num_rows}

    @property
    def num_inference_steps(self) -> int:
        """Number of steps T of the reverse process."""
        return len(self.timesteps)

    def __call__(self) -> Tensor:
        """
        Samples a whole trajectory, under any Pyro handler.

        :returns: The sequences :math:`x_0`, of shape ``batch_shape + (length,)``.
        :rtype: Tensor
        """
        state: dict[str, Tensor] = {}
        self.init(state)
        for t in self.timesteps:
            self.step(state, t)
        return state["x"]

    def init(self, state: MutableMapping[Any, Tensor]) -> None:
        """
        Puts :math:`x_T` down, masks at all free positions, and evaluates the network at it.

        :param dict state: Written: ``x``, and ``hidden`` or ``logits``.
        """
        with self._plate:
            x = pyro.sample(f"x_{self.num_inference_steps}", self.initial())
        self._write(state, self.num_inference_steps, x)

    def step(self, state: MutableMapping[Any, Tensor], t: int) -> None:
        """
        Samples :math:`x_{t-1}` and, unless it is :math:`x_0`, evaluates the network at it.

        :param dict state: Read and written.
        :param int t: Time index of the state, one of :attr:`timesteps`.
        """
        with self._plate:
            x = pyro.sample(f"x_{t - 1}", self.kernel(state, t))
        self._write(state, t - 1, x)

    def initial(self) -> dist.TorchDistribution:
        """The law of :math:`x_T`: the prompt; of empty batch shape, or that of the plate."""
        return dist.Delta(self.prompt, event_dim=1)

    def kernel(self, state: Mapping[Any, Tensor], t: int) -> Unmasking:
        """
        The law of :math:`x_{t-1}` given the state; the denoiser is not evaluated.

        :param dict state: What :meth:`init` or :meth:`step` has written.
        :param int t: Time index of the state, one of :attr:`timesteps`.
        :returns: A kernel of the state's batch shape and of event shape :attr:`event_shape`.
        :rtype: ~pyro_twist.diffusion.unmasking.Unmasking
        """
        where = (state["x"], self.mask_token_id, self._logits(state))
        if self.unmasking == "uniform":
            return GroupUnmasking(*where, self.group_size, frozen=self.frozen)
        log_stay, log_remask = self.schedule.log_stay(t), self.schedule.log_remask(t)
        return AncestralUnmasking(*where, log_stay, log_remask, frozen=self.frozen)

    def complete(self, state: Mapping[Any, Tensor], uniforms: Tensor | None = None) -> Tensor:
        """
        Fills all masks of the current sequences from the network's prediction, which is not
        evaluated again.

        :param dict state: A state.
        :param Tensor uniforms: See :meth:`~pyro_twist.diffusion.unmasking.Unmasking.complete`; the
            most probable tokens without them.
        :returns: Sequences of the shape of ``uniforms``, or of ``state["x"]``.
        :rtype: Tensor
        """
        return self.kernel(state, self.timesteps[-1]).complete(uniforms)

    def known_share(self) -> Tensor:
        """
        The share of the free positions that is revealed at each time index, on average.

        :returns: Of shape ``(T + 1,)``, float64, from 1 at index 0; of shape ``(T + 1, size)`` if
            groups are revealed and the entries of the plate have different numbers of free
            positions.
        :rtype: Tensor
        """
        if self.unmasking == "ancestral":
            return torch.tensor(self.schedule.alphas, dtype=torch.float64)
        free = self._num_free().double().cpu().reshape(1, -1)
        steps = torch.arange(self.num_inference_steps, -1, -1)[:, None]
        share = (steps * self.group_size / free.clamp(min=1)).clamp(max=1.0)
        share = torch.where(free == 0, 1.0, share)
        return share[:, 0] if (free == free[0, 0]).all() else share

    def terminal(self, state: Mapping[Any, Tensor], x0: Tensor) -> None:
        """
        The factors and observations at the end of a trajectory: none.

        :param dict state: A state.
        :param Tensor x0: Sequences of shape ``batch_shape + (length,)``.
        """

    def decode(self, x: Tensor) -> Any:
        """
        Maps sequences to user space; without a decoder they are returned as they are.

        :param Tensor x: Sequences of shape ``batch_shape + (length,)``.
        :returns: What the decoder makes of them: a tensor of shape ``batch_shape`` and the decoded
            shape, or lists of lists of the shape ``batch_shape``.
        """
        if self.decoder is None:
            return x
        rows = x.reshape((-1,) + self.event_shape)
        parts = [self.decoder(rows_) for rows_ in rows.split(self.denoiser.chunk_size or len(rows))]
        if isinstance(parts[0], Tensor):
            decoded = torch.cat(parts)
            return decoded.reshape(x.shape[:-1] + decoded.shape[1:])
        return _nested([one for part in parts for one in part], tuple(x.shape[:-1]))

    # the network's predictions

    @property
    def _key(self) -> str:
        return "logits" if self.head is None else "hidden"

    def _logits(self, state: Mapping[Any, Tensor]) -> TokenLogits:
        options: dict[str, Any] = {"temperature": self.temperature, "forbidden": self.forbidden}
        if self._key not in state:
            # nothing is masked, so that this is never read
            nothing = torch.zeros((), device=state["x"].device)
            return TokenLogits(nothing.expand(state["x"].shape + (self.vocab_size,)), **options)
        if self.head is None:
            return TokenLogits(state["logits"], **options)
        options.update(head=self.head, vocab_size=self.vocab_size)
        return TokenLogits(hidden=state["hidden"], **options)

    def _write(self, state: MutableMapping[Any, Tensor], t: int, x: Tensor) -> None:
        """Stores ``x``, which has time index ``t``, and the prediction made from it."""
        if t == 0:
            state["x"] = state["x0_hat"] = x
            state.pop(self._key, None)
            return
        wanted = torch.is_grad_enabled() and any(_has_gradient(v) for v in state.values())
        with torch.set_grad_enabled(self.keep_graph or wanted):
            prediction = self._predict(state, x)
        state["x"] = x
        if prediction is not None:
            state[self._key] = prediction

    def _predict(self, state: Mapping[Any, Tensor], x: Tensor) -> Tensor | None:
        """The prediction at ``x``, evaluated where it is not known; ``None`` if it stays."""
        needed = (x == self.mask_token_id).any(-1)
        known = self._known(state, x)
        if known is not None:
            needed = needed & (x != state["x"]).any(-1)
        index = needed.reshape(-1).nonzero()[:, 0]
        if len(index) == 0:
            return None
        found = self.denoiser.evaluate(x, index, state)
        if len(index) == needed.numel():
            return found.reshape(x.shape + found.shape[-1:])
        shape = (needed.numel(),) + tuple(found.shape[1:])
        rows = found.new_zeros(shape) if known is None else known.reshape(shape)
        return rows.index_copy(0, index, found).reshape(x.shape + found.shape[-1:])

    def _known(self, state: Mapping[Any, Tensor], x: Tensor) -> Tensor | None:
        """The prediction in the state, if it holds for sequences that stay as they are."""
        known = state.get(self._key)
        moving = any(name in state for name in self.denoiser.conditioning)
        if known is None or known.shape[:-1] != x.shape or moving or self.keep_graph:
            return None
        return known

    def _check_split(self, network: SplitNetwork, head: Any) -> None:
        """
        Takes a split back that changes the logits, as it does where more than the layer makes them.
        """
        whole = copy.copy(self.denoiser)
        whole.network, whole.vocab_size = network.network, self.vocab_size
        exact = self._split_is_exact(whole)
        self.denoiser.num_rows = whole.num_rows = 0
        if not exact and head is not None:
            raise ValueError(
                f"the denoiser's logits are not those of its submodule head={head!r}: it does not "
                "call it exactly once, changes what it returns, or is not in evaluation mode. "
                "Leave head out to keep all logits, or call eval()."
            )
        if not exact:
            self.denoiser, self.head = whole, None

    @torch.no_grad()
    def _split_is_exact(self, whole: TokenDenoiser) -> bool:
        """Whether hidden states and head give the logits of one sequence."""
        size = () if self.plate is None else (self.plate[1],)
        tokens = self.prompt.expand(size + tuple(self.event_shape))
        first = torch.zeros(1, dtype=torch.long, device=tokens.device)
        expected = whole.evaluate(tokens, first, {})
        try:
            hidden = self.denoiser.evaluate(tokens, first, {})
        except OutputLayerError:
            return False
        assert self.head is not None
        found = self.head(hidden)
        return found.shape == expected.shape and torch.allclose(found, expected, 1e-3, 1e-3)

    # arguments

    def _checked_prompt(self, prompt: Tensor | None) -> Tensor:
        length, size = self.event_shape[0], 1 if self.plate is None else self.plate[1]
        if prompt is None:
            return torch.full((length,), self.mask_token_id)
        try:
            prompt = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"prompt={prompt!r} is no tensor of tokens; encode it with the model's tokenizer, "
                f"with the mask token {self.mask_token_id} at free positions, {length} in all"
            ) from None
        if (
            prompt.dtype == torch.bool
            or prompt.is_floating_point()
            or tuple(prompt.shape) not in ((length,), (size, length))
        ):
            raise ValueError(
                f"prompt has shape {tuple(prompt.shape)} and dtype {prompt.dtype}; expected "
                f"integer tokens of shape ({length},)"
                + (f" or {(size, length)}" if self.plate else "")
                + f", with the mask token {self.mask_token_id} at free positions. For one "
                "population per prompt pass plate=('prompts', number)."
            )
        return self._checked_tokens(prompt.long().reshape(prompt.shape))

    def _checked_tokens(self, prompt: Tensor) -> Tensor:
        unknown = (prompt < 0) | (prompt >= self.vocab_size)
        if unknown.any():
            place = tuple(int(i) for i in unknown.nonzero()[0])
            raise ValueError(
                f"prompt{list(place)} is the token {int(prompt[place])}, but tokens are 0 to "
                f"{self.vocab_size - 1}; was it made with another tokenizer?"
            )
        if not (prompt == self.mask_token_id).any():
            raise ValueError(
                f"prompt has the mask token {self.mask_token_id} nowhere, so nothing is free to "
                "be drawn; put it at free positions"
            )
        return prompt

    def _num_free(self) -> Tensor:
        return (~self.frozen).sum(-1)

    def _num_steps(self) -> int:
        if self.unmasking == "ancestral":
            return len(self.schedule)
        return math.ceil(int(self._num_free().max()) / self.group_size)


def _check_sizes(
    length: int, vocab_size: int, mask_token_id: int, group_size: int, chunk_size: int | None
) -> None:
    named = {"length": length, "vocab_size": vocab_size, "group_size": group_size}
    if chunk_size is not None:
        named["chunk_size"] = chunk_size
    for name, value in named.items():
        if not _is_whole(value) or value < 1:
            raise ValueError(f"{name}={value!r} is not a positive integer; try {name}=1 or more")
    if not _is_whole(mask_token_id) or not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"mask_token_id={mask_token_id!r} is no token: they are 0 to {vocab_size - 1}. The "
            "vocabulary must hold the mask; try the tokenizer's mask_token_id, and vocab_size as "
            "the number of logits."
        )


def _check_unmasking(unmasking: str, remasking: Any, temperature: float) -> None:
    if unmasking not in ("ancestral", "uniform"):
        raise ValueError(
            f"unmasking={unmasking!r}; choose 'ancestral' or 'uniform'. Rules that pick positions "
            "by confidence, entropy or margin are deterministic: copies of a particle would never "
            "separate, and a step has no transition density for the weights."
        )
    if remasking is not None and check_remasking(remasking) and unmasking == "uniform":
        raise ValueError(f"remasking={remasking!r} goes with unmasking='ancestral' only")
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not (number and 0 < temperature < math.inf):
        raise ValueError(
            f"temperature={temperature!r} is not a positive number. Greedy decoding is "
            "deterministic: copies of a particle would never separate, and a step has no "
            "transition density for the weights. Try temperature=1.0."
        )


def _check_used(unmasking: str, steps: Any, schedule: Any, group_size: int) -> None:
    """Refuses options that would be ignored."""
    if unmasking == "ancestral" and group_size != 1:
        raise ValueError(
            f"group_size={group_size} goes with unmasking='uniform' only; in ancestral unmasking "
            "num_inference_steps and schedule say how many positions a step reveals"
        )
    for name, value in (("num_inference_steps", steps), ("schedule", schedule)):
        if unmasking == "uniform" and value is not None:
            raise ValueError(
                f"{name}={value!r} goes with unmasking='ancestral' only; with 'uniform' there is a "
                "step for every group of positions, so choose group_size"
            )


def _check_plate(plate: Any) -> None:
    pair = isinstance(plate, tuple) and len(plate) == 2
    if plate is None or (pair and isinstance(plate[0], str) and _is_whole(plate[1], 1)):
        return
    raise ValueError(
        f"plate={plate!r}; give name and size of a plate, in this order, such as ('prompts', 8)"
    )


def _is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _forbidden(tokens: Collection[int], vocab_size: int, mask_token_id: int) -> tuple[int, ...]:
    try:
        forbidden = {int(token) for token in tokens}
    except (TypeError, ValueError):
        raise ValueError(
            f"forbidden_token_ids={tokens!r}; give a collection of tokens, numbers from 0 to "
            f"{vocab_size - 1}"
        ) from None
    for token in forbidden:
        if not 0 <= token < vocab_size:
            raise ValueError(f"forbidden_token_ids has {token}; tokens are 0 to {vocab_size - 1}")
    if len(forbidden | {mask_token_id}) == vocab_size:
        raise ValueError(
            f"mask and forbidden tokens are all {vocab_size} tokens; leave one that can be drawn"
        )
    return tuple(sorted(forbidden | {mask_token_id}))


def _nested(flat: list[Any], shape: tuple[int, ...]) -> Any:
    """Lists of lists of a shape."""
    if not shape:
        return flat[0]
    if len(shape) == 1:
        return flat
    size = len(flat) // shape[0] if shape[0] else 0
    return [_nested(flat[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def _has_gradient(value: Any) -> bool:
    return bool(getattr(value, "requires_grad", False))
