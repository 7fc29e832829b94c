# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Rewards on texts from Hugging Face models: classifiers, and causal language models for fluency.

Models are given, or loaded from a hub or a folder, from safetensors files only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyro_twist.positions import num_positions
from pyro_twist.rewards.reward import Reward
from pyro_twist.rewards.text import check_texts

__all__ = ["CausalLMReward", "SequenceClassifierReward"]


class SequenceClassifierReward(Reward):
    """
    The log-probability of a label of a text, in nats; at most 0.

    Of a model with one output, such as a reward model, or of a regression, it is that output.

    :param model: A transformers model for sequence classification, in evaluation mode.
    :param tokenizer: Its tokenizer, with a padding token.
    :param label: The label: a name in ``model.config.label2id``, or its number.
    :param int max_length: The most tokens of a text; by default what tokenizer and model can take.
    :param bool truncation: Whether longer texts are cut; otherwise they are an error.
    :param int chunk_size: The most texts per call of the model.
    :param options: Further options of :class:`~pyro_twist.rewards.Reward`, such as ``cache``.
    :raises ValueError: If there is no such label, the model is in training mode, or tokenizer or
        model do not say what the padding is, which some models look for to find the end of a text.

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
        one = self.model.config.num_labels == 1 or _is_regression(self.model.config)
        options.setdefault("name", f"{'output' if one else 'log-probability of'} {label!r}")
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
        if logits.shape[-1] > 1 and not _is_regression(self.model.config):
            several = self.model.config.problem_type == "multi_label_classification"
            logits = functional.logsigmoid(logits) if several else logits.log_softmax(-1)
        return logits[:, self.label].cpu()


class CausalLMReward(Reward):
    """
    The log-probability per token of a text under a causal language model, in nats; at most 0.

    A tokenizer with a token for the beginning of a text gets it put in front, and all tokens are
    scored; without one, all but the first. The end of the text is not scored. A text without a
    token to score, such as an empty one, counts as minus infinity.

    :param model: A transformers model for causal language modelling, in evaluation mode.
    :param tokenizer: Its tokenizer.
    :param int max_length: The most tokens of a text; by default what tokenizer and model can take.
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
        ids = self._reader.ids(texts)
        some = [place for place, row in enumerate(ids) if len(row) > 1]
        values = torch.full((len(texts),), -math.inf, dtype=torch.float64)
        if some:
            values[some] = self._means(self._reader.padded([ids[place] for place in some]))
        return values

    def _means(self, inputs: dict[str, Tensor]) -> Tensor:
        ids, scored = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].bool()
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
        self.padding = 0 if causal else _padding(model, tokenizer)
        self.max_length, self.truncation = _max_length(max_length, model, tokenizer), truncation

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        return self.padded(self.ids(texts))

    def ids(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts."""
        return [self._ids(text, place) for place, text in enumerate(check_texts(texts))]

    def padded(self, ids: list[list[int]]) -> dict[str, Tensor]:
        """What the model takes."""
        length = max(map(len, ids))
        padded = torch.tensor([row + [self.padding] * (length - len(row)) for row in ids])
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


def _padding(model: Any, tokenizer: Any) -> int:
    """The padding that the model knows: one of a decoder finds the end of a text by it."""
    found = getattr(model.config, "pad_token_id", None)
    if found is None:
        raise ValueError(
            f"the config of {type(model).__name__} does not say which token is the padding, by "
            "which it may find the end of a text; set model.config.pad_token_id = "
            f"{tokenizer.pad_token_id}, the tokenizer's"
        )
    return int(found)


def _max_length(given: Any, model: Any, tokenizer: Any) -> int:
    most = min(tokenizer.model_max_length, num_positions(model) or math.inf)
    if given is None:
        return int(most)
    if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= most:
        raise ValueError(
            f"max_length={given!r}; give a whole number of tokens from 1 to {most:g}, the most "
            "that tokenizer and model can take, or leave it out"
        )
    return given


def _is_regression(config: Any) -> bool:
    return bool(config.problem_type == "regression")


def _label_number(config: Any, label: str | int) -> int:
    names = {str(name): int(number) for number, name in config.id2label.items()}
    if isinstance(label, str) and label in names:
        return names[label]
    if type(label) is int and 0 <= label < config.num_labels:
        return label
    raise ValueError(f"label={label!r}; the model's labels are {', '.join(names)}")


def _load(
    auto: Any, name: str, revision: str, trust_remote_code: bool, device: str | torch.device
) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = auto.from_pretrained(name, use_safetensors=True, **shared)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name, **shared)
