# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The judge of prompts: a convolutional network for pictures and a bag of pieces of words for prompts.

It shares nothing with the scorer that rewards are made of, neither architecture nor weights nor
the way of reading words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_twist.zoo.classifiers import ConvClassifier, write_halved
from pyro_twist.zoo.data import plain_prompt

__all__ = ["PromptJudge", "load_judge", "pieces"]


def pieces(prompt: str) -> list[str]:
    """
    Words, pairs of neighbouring words, and runs of three letters within words.

    :param str prompt: The prompt; capital letters, hyphens and colons do not matter.
    """
    words = plain_prompt(prompt).split()
    pairs = [f"{one} {other}" for one, other in zip(words, words[1:], strict=False)]
    marked = [f"<{word}>" for word in words]
    runs = [f"#{word[i : i + 3]}" for word in marked for i in range(len(word) - 2)]
    return [*words, *pairs, *runs]


class PromptJudge(nn.Module):
    """
    Which prompt a picture shows, by the cosine of two embeddings. Do not optimise it.

    Prompts are read as a bag of :func:`pieces`, each with an embedding at the place where its
    checksum puts it, so that any prompt can be judged; of unknown words it knows nothing.

    :param tuple names: All known prompts.
    :param int width: Length of the embeddings.
    :param tuple widths: Features of each pair of convolutions.
    :param int num_buckets: Number of embeddings of pieces.
    """

    def __init__(
        self,
        names: Sequence[str],
        width: int = 128,
        widths: Sequence[int] = (32, 64, 128),
        num_buckets: int = 6000,
    ) -> None:
        super().__init__()
        self.names: tuple[str, ...] = tuple(names)
        self.config = dict(width=width, widths=list(widths), num_buckets=num_buckets)
        directions = tuple(str(i) for i in range(width))
        self.image = ConvClassifier(directions, 3, tuple(widths), dropout=0.1)
        self.table = nn.EmbeddingBag(num_buckets, width, mode="mean")
        self.text = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(15.0)))

    def logits(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """
        Scaled cosines.

        :param torch.Tensor images: In ``[0, 1]``, of shape ``(B, 3, 16, 16)``.
        :param prompts: The prompts.
        :returns: Of shape ``(B, len(prompts))``.
        """
        shown = functional.normalize(self.image(_checked(images)), dim=-1)
        return self.log_scale.exp() * shown @ self.embed(prompts).T

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """
        Embeddings of prompts, of length one and shape ``(len(prompts), width)``.

        :param prompts: The prompts.
        """
        bags = [self._buckets(prompt) for prompt in prompts]
        offsets = torch.tensor([0, *map(len, bags)]).cumsum(0)[:-1]
        flat = torch.tensor([bucket for bag in bags for bucket in bag], dtype=torch.long)
        device = self.table.weight.device
        found = self.table(flat.to(device), offsets.to(device))
        return functional.normalize(found + self.text(found), dim=-1)

    @torch.no_grad()
    def log_probs(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """
        Log-probabilities of prompts, of which each picture shows one, any as likely beforehand.

        :param torch.Tensor images: In ``[0, 1]``, of shape ``(B, 3, 16, 16)``.
        :param prompts: The prompts, such as :attr:`names`.
        :returns: Of shape ``(B, len(prompts))``.
        :raises ValueError: If there are no prompts, or images of another shape.
        """
        return self.logits(images, _checked_prompts(prompts)).log_softmax(-1)

    def probability(self, images: Tensor, prompt: str) -> Tensor:
        """
        The probability of a prompt among all names, to which it is added where it is none of them.

        :param torch.Tensor images: In ``[0, 1]``, of shape ``(B, 3, 16, 16)``.
        :param str prompt: The prompt.
        :returns: Of shape ``(B,)``.
        """
        names, index = self._with(prompt)
        return self.log_probs(images, names)[:, index].exp()

    def rank(self, images: Tensor, prompt: str) -> Tensor:
        """
        The place of a prompt among all names, 1 for the most probable.

        :param torch.Tensor images: In ``[0, 1]``, of shape ``(B, 3, 16, 16)``.
        :param str prompt: The prompt; it is added to the names where it is none of them.
        :returns: Integers of shape ``(B,)``.
        """
        names, index = self._with(prompt)
        found = self.log_probs(images, names)
        return 1 + (found > found[:, index : index + 1]).sum(-1)

    def save(self, folder: Path) -> None:
        """
        Writes ``config.json``, ``names.json`` and the weights, in half precision.

        :param ~pathlib.Path folder: Where; it is made if need be.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        names = json.dumps(self.names, indent=0, ensure_ascii=False)
        (folder / "names.json").write_text(names + "\n", encoding="utf-8")
        write_halved(self, folder / "model.safetensors")

    def _with(self, prompt: str) -> tuple[tuple[str, ...], int]:
        prompt = plain_prompt(*_checked_prompts([prompt]))
        if prompt in self.names:
            return self.names, self.names.index(prompt)
        return (*self.names, prompt), len(self.names)

    def _buckets(self, prompt: str) -> list[int]:
        return [crc32(piece.encode()) % self.table.num_embeddings for piece in pieces(prompt)]


def load_judge(folder: Path) -> PromptJudge:
    """
    Reads what :meth:`PromptJudge.save` wrote, in float32, frozen and in evaluation mode.

    :param ~pathlib.Path folder: With ``config.json``, ``names.json`` and ``model.safetensors``.
    """
    from safetensors.torch import load_file

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    judge = PromptJudge(json.loads((folder / "names.json").read_text(encoding="utf-8")), **config)
    judge.load_state_dict(load_file(folder / "model.safetensors"))
    return judge.eval().requires_grad_(False)


def _checked(images: Tensor) -> Tensor:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; give floating point values "
            "in [0, 1] of shape (B, 3, H, W)"
        )
    return images


def _checked_prompts(prompts: Sequence[str]) -> Sequence[str]:
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompts={prompts!r}; give a list of one prompt or more")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty, which no picture shows; give words")
    return prompts
