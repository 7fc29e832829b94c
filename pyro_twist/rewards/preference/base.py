# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What rewards of images have in common that networks give, most of them for a prompt."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_twist.rewards.preference.preprocess import Preprocessing
from pyro_twist.rewards.reward import Reward, RewardWarning

__all__ = ["ImageScore", "PreferenceReward", "Prompts", "normalised", "tokenizer_of"]


class ImageScore(Reward):
    """
    A reward of images, as tensors or as PIL images.

    :param callable fn: See :class:`~pyro_twist.rewards.Reward`.
    :param options: Likewise.
    """

    def __call__(self, samples: Any) -> Tensor:
        """
        Scores a batch.

        :param samples: A tensor of shape ``(B, C, H, W)`` in [0, 1], or a list of PIL images.
        :returns: The values, in float64, of shape ``(B,)``.
        """
        if not isinstance(samples, (list, tuple)):
            return super().__call__(samples)
        with torch.no_grad():
            return self._all_values(list(samples), False)

    def fresh(self) -> Self:
        """A copy that shares the networks, and has counted and remembers nothing."""
        other = copy.copy(self)
        other.num_calls, other._cache, other._kept = 0, OrderedDict(), {}
        other.fn = getattr(other, "_values", other.fn)
        return other


class PreferenceReward(ImageScore):
    """
    A reward of images for a prompt.

    :param preprocessing: What the network is shown of an image.
    :param str prompt: The prompt, of which each reward has one; ``None`` if it takes none.
    :param str title: What the reward is called.
    :param str input: ``"tensor"``, differentiable, or ``"pil"``: samples are rounded to 8 bits and
        go through the processor that the network was published with, for the published number.
    :param bool rounds: Whether tensors are rounded wherever the processor rounds; see
        :class:`~pyro_twist.rewards.Preprocessing`.
    :param int chunk_size: The most images per call of the network.
    :param options: Further options of :class:`~pyro_twist.rewards.Reward`, such as ``cache``.
    :raises ValueError: If the prompt is not a string.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        prompt: str | None,
        title: str,
        *,
        input: Literal["tensor", "pil"] = "tensor",
        rounds: bool = False,
        chunk_size: int | None = 16,
        **options: Any,
    ) -> None:
        if input not in ("tensor", "pil"):
            raise ValueError(f"input={input!r}; choose 'tensor' or 'pil'")
        self.preprocessing = preprocessing.rounding(rounds)
        self.title, self.prompt = title, prompt
        if prompt is not None:
            _check_prompt(prompt)
            options.setdefault("name", f"{title} of {prompt!r}")
        options.setdefault("name", title)
        differentiable = input == "tensor" and not options.get("noisy")
        options.setdefault("differentiable", differentiable)
        super().__init__(self._values, input=input, chunk_size=chunk_size, **options)

    def with_prompt(self, prompt: str) -> Self:
        """
        The same reward for another prompt, with the same network, which is not copied.

        :param str prompt: The prompt.
        :returns: The reward.
        """
        other = self.fresh()
        if self.prompt is not None:
            other.prompt, other.name = _check_prompt(prompt), f"{self.title} of {prompt!r}"
        return other

    def _values(self, samples: Any) -> Tensor:
        """Scores what :class:`~pyro_twist.rewards.Reward` hands over."""
        pil = isinstance(samples, list)
        pixels = self.preprocessing.pil(samples) if pil else self.preprocessing(samples)
        return self._score(pixels)

    def _score(self, pixels: Tensor) -> Tensor:
        """Scores preprocessed images of shape ``(B, 3, h, w)``, in float32 or float64."""
        raise NotImplementedError


class Prompts:
    """
    Encodes each prompt once.

    :param tokenizer: A transformers tokenizer.
    :param int max_length: The most tokens; the rest is cut off, with a warning.
    :param callable encode: Maps token ids and attention mask, of shape ``(1, length)``, to what
        is kept.
    :param padding: Whether all prompts are filled up to the most tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        encode: Callable[[Tensor, Tensor], Any],
        padding: bool = False,
    ) -> None:
        self.tokenizer, self.max_length, self.padding = tokenizer, max_length, padding
        self.encode = encode
        self._known: dict[str, Any] = {}

    def __call__(self, prompt: str) -> Any:
        """
        What is kept of a prompt.

        :param str prompt: The prompt.
        """
        if prompt not in self._known:
            with torch.no_grad():
                self._known[prompt] = self.encode(*self._tokens(prompt))
        return self._known[prompt]

    def _tokens(self, prompt: str) -> tuple[Tensor, Tensor]:
        whole = len(self.tokenizer(prompt, verbose=False)["input_ids"])
        if whole > self.max_length:
            warnings.warn(
                f"the prompt {prompt[:40]!r}... has {whole} tokens, of which the network reads "
                f"the first {self.max_length}; what comes after them is not rewarded",
                RewardWarning,
                stacklevel=2,
            )
        found = self.tokenizer(
            prompt,
            padding="max_length" if self.padding else False,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return found["input_ids"], found["attention_mask"]


def normalised(embeddings: Tensor) -> Tensor:
    """
    Scales embeddings to length one, in float32 or better.

    :param torch.Tensor embeddings: Of shape ``(B, D)``.
    """
    return functional.normalize(at_least_float(embeddings), dim=-1)


def at_least_float(values: Tensor) -> Tensor:
    """
    Half precision as float32, all else as it is.

    :param torch.Tensor values: Floating point values.
    """
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def tokenizer_of(processor: Any) -> Any:
    """
    The tokenizer of a processor, or a tokenizer itself.

    :param processor: Either.
    """
    return getattr(processor, "tokenizer", processor)


def check_options(cls: type, options: Mapping[str, Any]) -> None:
    """
    Checks the names of options before anything is loaded.

    :param type cls: The class that takes them.
    :param options: The options.
    :raises ValueError: If there is one that it does not take.
    """
    makers = [vars(base)["__init__"] for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    known = [
        name
        for maker in makers
        for name, one in inspect.signature(maker).parameters.items()
        if one.kind is one.KEYWORD_ONLY
    ]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no option {', '.join(map(repr, unknown))}; beside those of "
            f"from_pretrained it has {', '.join(dict.fromkeys(known))}"
        )


def check_evaluating(network: nn.Module) -> None:
    """
    Checks that a network is in evaluation mode.

    :param network: The network.
    :raises ValueError: If it is in training mode.
    """
    if network.training:
        raise ValueError("the model is in training mode; call model.eval() first")


def _check_prompt(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise ValueError(
            f"prompt={type(prompt).__name__}; give one string. The images come when the reward is "
            "called, and per_prompt(reward, prompts) takes several prompts"
        )
    return prompt
