# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The reward that says how well a picture fits its prompt, by a small CLIP of the zoo."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_twist.rewards.preference import CLIPReward, Preprocessing
from pyro_twist.rewards.preference.base import normalised
from pyro_twist.zoo.data import plain_prompt

__all__ = ["Fidelity", "load_scorer"]

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

_TITLE = "fidelity"
# The network is small: more images at once are faster.
_CHUNK = 256


class Fidelity(CLIPReward):
    r"""
    The weight of evidence that a picture was made for its prompt and for no other name, in nats.

    .. math:: \log\frac{p(y\mid x)}{1-p(y\mid x)} - \log\frac{p(y)}{1-p(y)}
        = s\cos(x, y) - \log\frac{1}{N}\sum_{n=1}^{N}\exp(s\cos(x, y_n))

    for a picture :math:`x`, its prompt :math:`y`, the names :math:`y_n` other than the prompt, and
    the network's logit scale :math:`s` [1]. Zero says that the picture tells nothing about the
    prompt; one more is odds of ``e``. It is bounded by twice the scale only, and differentiable.
    A name that means much the same as the prompt is another name all the same.

    :param model: A transformers ``CLIPModel`` in evaluation mode.
    :param processor: Its ``CLIPProcessor``, or its tokenizer where ``preprocessing`` is given.
    :param str prompt: The prompt. Words that the network never saw are read in pieces of words:
        the value is then a guess, and no error is raised.
    :param tuple names: What a picture could be of otherwise, in small letters.
    :param preprocessing: In place of what the processor says.
    :param options: The options of :class:`~pyro_twist.rewards.PreferenceReward`.

    **References**

    [1] `Weight of evidence: a brief survey`
        I. J. Good (1985), Bayesian Statistics 2, 249-270
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompt: str,
        names: Sequence[str],
        *,
        preprocessing: Preprocessing | None = None,
        **options: Any,
    ) -> None:
        options = {"name": f"{_TITLE} of {prompt!r}", "chunk_size": _CHUNK, **options}
        super().__init__(model, processor, prompt, preprocessing=preprocessing, **options)
        self.title, self.names = _TITLE, tuple(names)
        self._embedded = self._embed(self.names)

    @torch.no_grad()
    def logits(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """
        Scaled cosines with many prompts, for comparisons; they are not differentiable.

        :param torch.Tensor images: In ``[0, 1]``, of shape ``(B, 3, 16, 16)``.
        :param prompts: The prompts, cut off without a warning where they are too long.
        :returns: Of shape ``(B, len(prompts))``.
        """
        image = self.towers.image(self.preprocessing(images))
        return self.towers.logit_scale().to(image) * image @ self._embed(prompts).to(image).T

    def _score(self, pixels: Tensor) -> Tensor:
        assert self.prompt is not None
        image = self.towers.image(pixels)
        scale = self.towers.logit_scale().to(image)
        others = scale * image @ self._others().to(image).T
        own = scale * (image @ self.towers.prompt(self.prompt).to(image))
        return own - others.logsumexp(1) + math.log(others.shape[1])

    def _others(self) -> Tensor:
        """Embeddings of the names other than the prompt, of shape ``(N, D)``."""
        own = plain_prompt(self.prompt or "")
        return self._embedded[[name != own for name in self.names]]

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of many prompts at once, of shape ``(len(prompts), D)``."""
        read, model = self.towers.prompt, self.towers.model
        found = read.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=read.max_length,
            return_tensors="pt",
        ).to(model.device)
        pooled = model.text_model(**found).pooler_output
        return normalised(model.text_projection(pooled))


def load_scorer(
    folder: Path, prompt: str, *, device: str | torch.device = "cpu", **options: Any
) -> Fidelity:
    """
    Reads the scorer of a model of the zoo, in float32.

    :param ~pathlib.Path folder: With a ``CLIPModel``, its tokenizer and ``names.json``.
    :param str prompt: The prompt.
    :param device: Where the network runs.
    :param options: The options of :class:`Fidelity`.
    """
    from transformers import CLIPModel, CLIPTokenizer

    from pyro_twist.zoo.sequences import quietly

    with quietly():
        model = CLIPModel.from_pretrained(folder, local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    side = int(model.config.vision_config.image_size)
    shown = Preprocessing(side, "shortest", (side, side), mean=MEAN, std=STD)
    network = model.float().to(device).eval().requires_grad_(False)
    return Fidelity(network, tokenizer, prompt, names, **{"preprocessing": shown, **options})
