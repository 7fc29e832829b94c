# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Rewards on texts from Hugging Face models: classifiers, and causal language models for fluency.

Models are given, or loaded from a hub or a folder, from safetensors files only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyro_twist.rewards.reward import Reward
from pyro_twist.rewards.text import check_texts

__all__ = ["CausalLMReward", "SequenceClassifierReward"]


class SequenceClassifierReward(Reward):
    """
    The log-probability of a label of a text, in nats; at most 0.

    Of a model with one output, such as a reward model or a regression, it is that output.

    :param model: A transformers model for sequence classification, in evaluation mode.
    :param tokenizer: Its tokenizer, with a padding token.
    :param label: The label: a name in ``model.config.label2id``, or its number.
    :param int max_length: The most tokens of a text; by default what the tokenizer says.
    :param bool truncation: Whether longer texts are cut; otherwise they are an error.
    :param int chunk_size: The most texts per call of the model.
    :param options: Further options of :class:`~pyro_twist.rewards.Reward`, such as ``cache``.
    :raises ValueError: If there is no such label, the model is in training mode or the tokenizer
        cannot pad.

    Example::

        reward = SequenceClassifierReward.from_pretrained(
            "distilbert/distilbert-base-uncased-finetuned-sst-2-english", "POSITIVE"
        )
        reward(["a wonderful film", "a horrible waste of time"])
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        label: str | int,
        *,
        max_length: int | None = None,
        truncation: bool = False,
        chunk_size: int = 32,
        **options: Any,
    ) -> None:
        self._reader = _Reader(model, tokenizer, max_length, truncation)
        self.model = model
        self.label = _label_number(model.config, label)
        options.setdefault("name", f"log-probability of {label!r}")
        super().__init__(self._values, input="list", chunk_size=chunk_size, **options)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        label: str | int,
        *,
        revision: str = "main",
        trust_remote_code: bool = False,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> SequenceClassifierReward:
        """
        Loads the model and its tokenizer.

        :param str name: A folder, or the name of a model on the hub.
        :param label: The label.
        :param str revision: The model's version on the hub.
        :param bool trust_remote_code: Whether to run code that comes with the model.
        :param device: Where the model runs.
        :param options: The options of the class.
        :returns: The reward.
        """
        from transformers import AutoModelForSequenceClassification

        found = _load(AutoModelForSequenceClassification, name, revision, trust_remote_code, device)
        return cls(*found, label, **options)

    @torch.no_grad()
    def _values(self, texts: list[str]) -> Tensor:
        logits = self.model(**self._reader(texts)).logits.double()
        if logits.shape[-1] > 1:
            several = self.model.config.problem_type == "multi_label_classification"
            logits = functional.logsigmoid(logits) if several else logits.log_softmax(-1)
        return logits[:, self.label].cpu()


class CausalLMReward(Reward):
    """
    The log-probability per token of a text under a causal language model, in nats; at most 0.

    A tokenizer with a token for the beginning of a text gets it put in front, and all tokens are
    scored; without one, all but the first. The end of the text is not scored.

    :param model: A transformers model for causal language modelling, in evaluation mode.
    :param tokenizer: Its tokenizer.
    :param int max_length: The most tokens of a text; by default what the tokenizer says.
    :param bool truncation: Whether longer texts are cut; otherwise they are an error.
    :param int chunk_size: The most texts per call of the model.
    :param options: Further options of :class:`~pyro_twist.rewards.Reward`, such as ``cache``.
    :raises ValueError: If the model is in training mode.

    Example::

        reward = CausalLMReward.from_pretrained("openai-community/gpt2")
        reward.perplexity(["the cat sat on the mat", "mat the on sat cat the"])
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        truncation: bool = False,
        chunk_size: int = 32,
        **options: Any,
    ) -> None:
        self._reader = _Reader(model, tokenizer, max_length, truncation, causal=True)
        self.model = model
        options.setdefault("name", "log-probability per token")
        super().__init__(self._values, input="list", chunk_size=chunk_size, **options)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str = "main",
        trust_remote_code: bool = False,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> CausalLMReward:
        """
        Loads the model and its tokenizer.

        :param str name: A folder, or the name of a model on the hub.
        :param str revision: The model's version on the hub.
        :param bool trust_remote_code: Whether to run code that comes with the model.
        :param device: Where the model runs.
        :param options: The options of the class.
        :returns: The reward.
        """
        from transformers import AutoModelForCausalLM

        found = _load(AutoModelForCausalLM, name, revision, trust_remote_code, device)
        return cls(*found, **options)

    def perplexity(self, texts: Sequence[str]) -> Tensor:
        """
        The perplexity per token of each text.

        :param texts: ``B`` strings.
        :returns: In float64, of shape ``(B,)``.
        """
        return (-self(list(texts))).exp()

    @torch.no_grad()
    def _values(self, texts: list[str]) -> Tensor:
        inputs = self._reader(texts)
        ids, scored = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].bool()
        empty = (~scored.any(1)).nonzero()[:, 0]
        if len(empty):
            raise ValueError(
                f"text {int(empty[0])}, {texts[int(empty[0])]!r}, has no token to score; leave "
                "out texts that are empty, or of one token where the tokenizer has no token for "
                "the beginning"
            )
        logits = self.model(**inputs).logits[:, :-1].double()
        log_probs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        return (log_probs.where(scored, 0.0).sum(1) / scored.sum(1)).cpu()


class _Reader:
    """Tokenizes texts for a model, and refuses what does not fit."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_length: int | None,
        truncation: bool,
        causal: bool = False,
    ) -> None:
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() first")
        if not causal and tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token")
        self.model, self.tokenizer, self.causal = model, tokenizer, causal
        self.max_length, self.truncation = max_length or tokenizer.model_max_length, truncation
        if self.max_length < 1:
            raise ValueError(f"max_length={max_length}; give 1 or more tokens")

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        ids = [self._ids(text, place) for place, text in enumerate(check_texts(texts))]
        length = max(map(len, ids))
        # what stands in the padding is never looked at
        padding = self.tokenizer.pad_token_id or 0
        padded = torch.tensor([row + [padding] * (length - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
        device = self.model.device
        return {"input_ids": padded.to(device), "attention_mask": mask.to(device)}

    def _ids(self, text: str, place: int) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=not self.causal)["input_ids"]
        begins = self.tokenizer.bos_token_id
        if self.causal and begins is not None:
            ids = [begins, *ids]
        if len(ids) <= self.max_length:
            return ids
        if not self.truncation:
            raise ValueError(
                f"text {place} has {len(ids)} tokens, max_length is {self.max_length}; give "
                "truncation=True to cut it"
            )
        return self._cut(text, ids)

    def _cut(self, text: str, ids: list[int]) -> list[int]:
        if self.causal:
            return ids[: self.max_length]
        cut: list[int] = self.tokenizer(text, truncation=True, max_length=self.max_length)[
            "input_ids"
        ]
        return cut


def _label_number(config: Any, label: str | int) -> int:
    names = {str(name): int(number) for number, name in config.id2label.items()}
    if label in names:
        return names[str(label)]
    if isinstance(label, int) and 0 <= label < config.num_labels:
        return label
    raise ValueError(f"label={label!r}; the model's labels are {', '.join(names)}")


def _load(
    auto: Any, name: str, revision: str, trust_remote_code: bool, device: str | torch.device
) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = auto.from_pretrained(name, use_safetensors=True, **shared)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name, **shared)
