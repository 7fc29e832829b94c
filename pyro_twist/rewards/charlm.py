# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
A small character language model, shipped with the package: a measure of fluency without downloads.

The weights are those of textgenrnn 2.0.0 (Max Woolf, MIT licence), trained on posts to Reddit.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["CharLM", "char_lm"]

_UNKNOWN_LOG_PROB = -15.0
_START = "<s>"


class CharLM(torch.nn.Module):
    """
    Two LSTM layers and an attention over the last 40 characters.

    As in textgenrnn, but that the attention leaves out the padding in front of a text.

    :param dict characters: The index, from 1, of each known character, and of ``"<s>"``, which
        begins and ends a text. Index 0 is the padding in front.
    :param int width: The number of units of a layer.
    :param int embedding: The dimension of a character's embedding.
    :param int window: The number of characters the next one depends on.

    Example::

        >>> texts = ["The cat sat on the mat.", "tac eht no tas tam ehT"]
        >>> [round(bits, 1) for bits in char_lm().bits_per_character(texts).tolist()]
        [2.5, 6.8]
    """

    def __init__(
        self,
        characters: dict[str, int],
        width: int = 128,
        embedding: int = 100,
        window: int = 40,
    ) -> None:
        super().__init__()
        self.characters = characters
        self.window = window
        size = len(characters) + 1
        self.embedding = torch.nn.Embedding(size, embedding)
        self.rnn_1 = torch.nn.LSTM(embedding, width, batch_first=True)
        self.rnn_2 = torch.nn.LSTM(width, width, batch_first=True)
        self.attention = torch.nn.Linear(embedding + 2 * width, 1, bias=False)
        self.output = torch.nn.Linear(embedding + 2 * width, size)

    def forward(self, windows: Tensor) -> Tensor:
        """
        The logits of the next character.

        :param torch.Tensor windows: Indices of the characters before it, of shape ``(B, window)``,
            with 0 in front of the text's beginning.
        :returns: Of shape ``(B, number of characters + 1)``.
        """
        embedded = self.embedding(windows)
        first = self.rnn_1(embedded)[0]
        features = torch.cat([embedded, first, self.rnn_2(first)[0]], -1)
        scores = self.attention(features).masked_fill((windows == 0)[..., None], -math.inf)
        weights = scores.softmax(1)
        return self.output((weights * features).sum(1))

    @torch.no_grad()
    def log_prob(self, texts: Sequence[str], chunk_size: int = 4096) -> Tensor:
        """
        The log-probability of texts and of their ends, in nats.

        A character that the model does not know counts as -15.

        :param texts: ``B`` strings.
        :param int chunk_size: The most characters to score at a time.
        :returns: In float64, of shape ``(B,)``.
        """
        windows, targets, rows = self._windows(texts)
        values = torch.zeros(len(texts), dtype=torch.float64)
        parts = (windows.split(chunk_size), targets.split(chunk_size), rows.split(chunk_size))
        for window, target, row in zip(*parts, strict=True):
            log_probs = functional.log_softmax(self(window).double(), -1)
            scored = log_probs.gather(1, target[:, None])[:, 0]
            values.index_add_(0, row, scored.where(target > 0, _UNKNOWN_LOG_PROB))
        return values

    def mean_log_prob(self, texts: Sequence[str]) -> Tensor:
        """
        The log-probability per character, the end counted as one, in nats.

        :param texts: ``B`` strings.
        :returns: In float64, of shape ``(B,)``.
        """
        lengths = torch.tensor([len(text) + 1 for text in texts], dtype=torch.float64)
        return self.log_prob(texts) / lengths

    def bits_per_character(self, texts: Sequence[str]) -> Tensor:
        """
        Minus the log-probability per character, in bits.

        :param texts: ``B`` strings.
        :returns: In float64, of shape ``(B,)``.
        """
        return -self.mean_log_prob(texts) / math.log(2.0)

    def _windows(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """What stands before each character, the character, and the number of its text."""
        ends = self.characters[_START]
        coded = [[*(self.characters.get(letter, 0) for letter in text), ends] for text in texts]
        front = [0] * (self.window - 1) + [ends]
        windows = [torch.tensor(front + codes[:-1]).unfold(0, self.window, 1) for codes in coded]
        targets = torch.tensor([code for codes in coded for code in codes]).long()
        lengths = torch.tensor([len(codes) for codes in coded]).long()
        rows = torch.arange(len(texts)).repeat_interleave(lengths)
        empty = torch.empty(0, self.window, dtype=torch.long)
        return torch.cat([empty, *windows]), targets, rows


@functools.cache
def char_lm() -> CharLM:
    """
    The shipped model, loaded once.

    :returns: The model, in evaluation mode.
    """
    from safetensors.torch import load_file

    folder = Path(__file__).parents[1] / "zoo" / "charlm"
    model = CharLM(json.loads((folder / "characters.json").read_text(encoding="utf-8")))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
