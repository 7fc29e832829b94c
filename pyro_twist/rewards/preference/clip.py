# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Rewards that compare CLIP embeddings of image and prompt, or read one of the image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pyro_twist.rewards.preference.base import (
    PreferenceReward,
    Prompts,
    at_least_float,
    check_evaluating,
    check_options,
    normalised,
    tokenizer_of,
)
from pyro_twist.rewards.preference.loading import (
    Source,
    check_keys,
    explained,
    load_clip,
    load_weights,
    placed,
)
from pyro_twist.rewards.preference.preprocess import Preprocessing

__all__ = ["Aesthetic", "CLIPReward", "CLIPScore", "HPSv2", "PickScore", "linear_head"]

_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_CLIP_L = "openai/clip-vit-large-patch14"
_FILES = "config.json, model.safetensors, and the files of tokenizer and image processor"
_PARTS = ("text_model", "vision_model", "text_projection", "visual_projection", "logit_scale")
_MOST_TOKENS = 77


class _Towers:
    """CLIP's two networks, with each prompt encoded once."""

    def __init__(self, model: Any, processor: Any) -> None:
        missing = [part for part in _PARTS if not hasattr(model, part)]
        if missing:
            raise ValueError(
                f"{type(model).__name__} has no {', '.join(missing)}; give a transformers "
                "CLIPModel, first, and its processor second"
            )
        check_evaluating(model)
        self.model = model
        positions = model.config.text_config.max_position_embeddings
        length = min(_MOST_TOKENS, positions)
        self.prompt = Prompts(tokenizer_of(processor), length, self._text)

    def image(self, pixels: Tensor) -> Tensor:
        """Embeddings of images, of length one."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return normalised(self.model.visual_projection(pooled))

    def cosine(self, pixels: Tensor, prompt: str) -> Tensor:
        """The cosine of the angle between images and a prompt."""
        image = self.image(pixels)
        return image @ self.prompt(prompt).to(image)

    def logit_scale(self) -> Tensor:
        """What CLIP multiplies cosines by."""
        return at_least_float(self.model.logit_scale.detach()).exp()

    def _text(self, ids: Tensor, mask: Tensor) -> Tensor:
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return normalised(self.model.text_projection(pooled))[0]


class CLIPReward(PreferenceReward):
    """
    A reward that needs CLIP's two towers; see those that are derived from it.

    :param model: A transformers ``CLIPModel`` in evaluation mode.
    :param processor: Its ``CLIPProcessor``.
    :param str prompt: The prompt.
    :param preprocessing: In place of what the processor says.
    :param options: The options of :class:`~pyro_twist.rewards.PreferenceReward`.
    """

    default: str | None = None
    default_processor: str | None = None
    tokenizer_only = False

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompt: str,
        *,
        preprocessing: Preprocessing | None = None,
        **options: Any,
    ) -> None:
        self.towers = _Towers(model, processor)
        shown = preprocessing or self._preprocessing(processor)
        super().__init__(shown, prompt, type(self).__name__, **options)

    @classmethod
    def from_pretrained(
        cls,
        prompt: str,
        model: str | None = None,
        *,
        processor: str | None = None,
        revision: str = "main",
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> Self:
        """
        Loads the network and its processor.

        :param str prompt: The prompt.
        :param str model: A folder, or the name of a model on the hub; by default the published
            one, where it is on the hub in a safe format.
        :param str processor: The same for tokenizer and image processor, if they are elsewhere.
        :param str revision: The model's version on the hub.
        :param bool trust_remote_code: Whether to run code that comes with the model.
        :param bool local_files_only: Whether to look on this machine only.
        :param torch.dtype dtype: The precision of the network; scores are in float32 and better.
        :param device: Where the network runs.
        :param options: The options of the class.
        :returns: The reward.
        :raises OSError: If something is not found; the message says what a local folder needs.
        """
        check_options(cls, options)
        model = _given(cls, model)
        beside = model if Path(model).is_dir() else cls.default_processor or model
        source = Source(revision, trust_remote_code, local_files_only)
        with explained(cls.__name__, model, _FILES):
            network, found = load_clip(model, processor or beside, source, cls.tokenizer_only)
        return cls(placed(network, device, dtype), found, prompt, **options)

    def _preprocessing(self, processor: Any) -> Preprocessing:
        return _processor_preprocessing(processor)


class CLIPScore(CLIPReward):
    """
    CLIPScore: ``weight * max(cosine, 0)`` between image and ``prefix + prompt`` [1].

    Differentiable. The paper's network is ``"openai/clip-vit-base-patch32"``.

    :param model: A transformers ``CLIPModel`` in evaluation mode.
    :param processor: Its ``CLIPProcessor``.
    :param str prompt: The prompt. Of more than 77 tokens the rest is cut off, with a warning.
    :param float weight: The paper's factor of 2.5; 100 is common as well.
    :param str prefix: What the paper puts in front of the prompt, which others leave out.
    :param preprocessing: In place of what the processor says.
    :param options: The options of :class:`~pyro_twist.rewards.PreferenceReward`.

    Example::

        reward = CLIPScore.from_pretrained("a red apple")
        reward(images)

    **References**

    [1] `CLIPScore: A Reference-free Evaluation Metric for Image Captioning`
        Jack Hessel, Ari Holtzman, Maxwell Forbes, Ronan Le Bras, Yejin Choi (2021),
        https://arxiv.org/abs/2104.08718
    """

    default = _CLIP_L

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompt: str,
        *,
        weight: float = 2.5,
        prefix: str = "A photo depicts ",
        **options: Any,
    ) -> None:
        self.weight, self.prefix = float(weight), str(prefix)
        super().__init__(model, processor, prompt, **options)

    def _score(self, pixels: Tensor) -> Tensor:
        return self.weight * self.towers.cosine(pixels, f"{self.prefix}{self.prompt}").clamp_min(0)


class PickScore(CLIPReward):
    """
    PickScore: the cosine between image and prompt times the network's logit scale [1].

    About 17 to 24 for images of generators; by its model of choices, a difference of 1 is odds of
    ``e`` that the one is picked. Differentiable.

    :param model: A transformers ``CLIPModel`` in evaluation mode.
    :param processor: Its ``CLIPProcessor``.
    :param str prompt: The prompt. Of more than 77 tokens the rest is cut off, with a warning.
    :param preprocessing: In place of what the processor says.
    :param options: The options of :class:`~pyro_twist.rewards.PreferenceReward`.

    **References**

    [1] `Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation`
        Yuval Kirstain, Adam Polyak, Uriel Singer, Shahbuland Matiana, Joe Penna, Omer Levy (2023),
        https://arxiv.org/abs/2305.01569
    """

    default = "yuvalkirstain/PickScore_v1"
    default_processor = _CLIP_H

    def _score(self, pixels: Tensor) -> Tensor:
        assert self.prompt is not None
        cosine = self.towers.cosine(pixels, self.prompt)
        return cosine * self.towers.logit_scale().to(cosine)


class HPSv2(CLIPReward):
    """
    Human Preference Score v2 and v2.1: the cosine between image and prompt, without a scale [1].

    About 0.2 to 0.35. Networks were trained with cosines times their logit scale, about 100, so
    that 0.01 is odds of about ``e``. The published code puts whole images into a square, with black
    bars, and resizes without rounding to 8 bits. Differentiable.

    :param model: A transformers ``CLIPModel`` in evaluation mode, as
        :func:`~pyro_twist.rewards.convert_checkpoint` makes it of the published file.
    :param processor: Its tokenizer, or a processor with one.
    :param str prompt: The prompt. Of more than 77 tokens the rest is cut off, with a warning.
    :param preprocessing: In place of what the published code does.
    :param options: The options of :class:`~pyro_twist.rewards.PreferenceReward`.

    **References**

    [1] `Human Preference Score v2`
        A Solid Benchmark for Evaluating Human Preferences of Text-to-Image Synthesis.
        Xiaoshi Wu, Yiming Hao, Keqiang Sun, Yixiong Chen, Feng Zhu, Rui Zhao, Hongsheng Li (2023),
        https://arxiv.org/abs/2306.09341
    """

    tokenizer_only = True

    def _preprocessing(self, processor: Any) -> Preprocessing:
        size = int(self.towers.model.config.vision_config.image_size)
        return Preprocessing(size, "longest", None, eight_bit=False)

    def _score(self, pixels: Tensor) -> Tensor:
        assert self.prompt is not None
        return self.towers.cosine(pixels, self.prompt)


class Aesthetic(PreferenceReward):
    """
    LAION's aesthetic score, version 2: a rating from 1 to 10 of the image alone [1].

    A linear head on the image's embedding of length one. Differentiable.

    :param model: A transformers ``CLIPModel`` in evaluation mode; published for that of
        ``"openai/clip-vit-large-patch14"``.
    :param processor: Its ``CLIPProcessor``.
    :param head: The head, a network or its weights, as published in
        ``sac+logos+ava1-l14-linearMSE.pth``, by name.
    :param preprocessing: In place of what the processor says.
    :param options: The options of :class:`~pyro_twist.rewards.PreferenceReward`.

    **References**

    [1] `LAION-Aesthetics V2`
        Christoph Schuhmann (2022), https://laion.ai/blog/laion-aesthetics/
    """

    default = _CLIP_L

    def __init__(
        self,
        model: Any,
        processor: Any,
        head: Any,
        *,
        preprocessing: Preprocessing | None = None,
        **options: Any,
    ) -> None:
        self.towers = _Towers(model, processor)
        self.head = _as_head(head, model)
        shown = preprocessing or _processor_preprocessing(processor)
        super().__init__(shown, None, "aesthetic score", **options)

    @classmethod
    def from_pretrained(
        cls,
        head: str | os.PathLike[str],
        model: str | None = None,
        *,
        revision: str = "main",
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> Self:
        """
        Loads CLIP and the head.

        :param head: A safetensors file with the head's weights, or a folder or name on the hub
            with the file ``aesthetic.safetensors``, as
            :func:`~pyro_twist.rewards.convert_checkpoint` makes it of the published one.
        :param str model: A folder, or the name of a CLIP model on the hub.
        :param str revision: The CLIP model's version on the hub.
        :param bool trust_remote_code: Whether to run code that comes with the CLIP model.
        :param bool local_files_only: Whether to look on this machine only.
        :param torch.dtype dtype: The precision of CLIP; the head is in float32 or better.
        :param device: Where the networks run.
        :param options: The options of the class.
        :returns: The reward.
        :raises OSError: If something is not found; the message says what a local folder needs.
        """
        check_options(cls, options)
        model = _given(cls, model)
        source = Source(revision, trust_remote_code, local_files_only)
        with explained(cls.__name__, model, _FILES):
            network, processor = load_clip(model, model, source)
        with explained(cls.__name__, str(head), "aesthetic.safetensors, given as head="):
            weights = load_weights(head, "aesthetic.safetensors", source.at_main())
        return cls(placed(network, device, dtype), processor, weights, **options)

    def _score(self, pixels: Tensor) -> Tensor:
        weight = next(self.head.parameters())
        return self.head(self.towers.image(pixels).to(weight))[:, 0]


def linear_head(width: int) -> nn.Sequential:
    """
    The head of LAION's aesthetic score and of ImageReward: five linear layers and nothing between.

    :param int width: The size of the embedding.
    :returns: The network, with layers numbered as in the published weights.
    """
    sizes, dropouts = (width, 1024, 128, 64, 16, 1), (0.2, 0.2, 0.1)
    layers: list[nn.Module] = []
    for place, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers.append(nn.Linear(before, after))
        layers.extend(nn.Dropout(one) for one in dropouts[place : place + 1])
    return nn.Sequential(*layers).eval()


def _as_head(head: Any, model: Any) -> nn.Module:
    if not isinstance(head, nn.Module):
        weights = {name.removeprefix("layers."): value for name, value in dict(head).items()}
        head = linear_head(model.visual_projection.out_features)
        check_keys("the aesthetic head", head.state_dict(), weights)
        head.load_state_dict(weights)
    check_evaluating(head)
    half = model.dtype in (torch.float16, torch.bfloat16)
    head = head.to(model.device, torch.float32 if half else model.dtype)
    evaluated: nn.Module = head.requires_grad_(False)
    return evaluated


def _given(cls: Any, model: str | None) -> str:
    found = model or cls.default
    if found is None:
        raise ValueError(
            f"{cls.__name__} is published as a pickle only, so there is no default model. Make a "
            "folder of it once, by pyro_twist.rewards.convert_checkpoint, and give model=folder"
        )
    return str(found)


def _processor_preprocessing(processor: Any) -> Preprocessing:
    if not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{type(processor).__name__} has no image_processor; give the model's processor, such "
            "as a CLIPProcessor, or preprocessing=Preprocessing(...)"
        )
    return Preprocessing.from_processor(processor.image_processor)
