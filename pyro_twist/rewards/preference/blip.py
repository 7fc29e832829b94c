# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""ImageReward: BLIP's image and text encoders with cross attention, and a linear head."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from pyro_twist.rewards.preference.base import (
    PreferenceReward,
    Prompts,
    at_least_float,
    check_evaluating,
    check_options,
    tokenizer_of,
)
from pyro_twist.rewards.preference.clip import linear_head
from pyro_twist.rewards.preference.loading import (
    Source,
    check_keys,
    explained,
    load_tokenizer,
    load_weights,
    placed,
)
from pyro_twist.rewards.preference.preprocess import Preprocessing

__all__ = ["ImageReward", "ImageRewardNetwork"]

_MOST_TOKENS = 35
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072


class ImageRewardNetwork(nn.Module):
    """
    The network of ImageReward, of transformers' own BLIP classes.

    :param config: A ``BlipConfig``. The published network has a vision encoder of width 1024 with
        24 layers of 16 heads on 224 pixels in patches of 16, with ``layer_norm_eps=1e-6``, and a
        text encoder of width 768 with 12 layers of 12 heads.
    """

    def __init__(self, config: Any) -> None:
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        self.config = config
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.mlp = linear_head(config.text_config.hidden_size)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """
        The reward before normalisation.

        :param torch.Tensor pixels: Preprocessed images, of shape ``(B, 3, h, w)``.
        :param torch.Tensor ids: Token ids of one prompt, of shape ``(1, length)``.
        :param torch.Tensor mask: Their attention mask, of the same shape.
        :returns: In float32 or better, of shape ``(B,)``.
        """
        image = self.vision_model(pixel_values=pixels).last_hidden_state
        text = self.text_encoder(
            input_ids=ids.expand(len(image), -1),
            attention_mask=mask.expand(len(image), -1),
            encoder_hidden_states=image,
            encoder_attention_mask=mask.new_ones(image.shape[:2]),
            is_decoder=False,
        ).last_hidden_state[:, 0]
        values: Tensor = self.mlp(at_least_float(text))[:, 0]
        return values

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves and casts; the head stays in float32 or better, as published."""
        super().to(*args, **kwargs)
        if next(self.mlp.parameters()).dtype in (torch.float16, torch.bfloat16):
            self.mlp.float()
        return self


class ImageReward(PreferenceReward):
    """
    ImageReward: how much people would like an image for a prompt, normalised [1].

    Mean 0 and standard deviation 1 over the images that it was trained with; about -2 to 2.
    Differentiable.

    :param ImageRewardNetwork model: The network, in evaluation mode.
    :param tokenizer: Its tokenizer, that of ``"google-bert/bert-base-uncased"``, or a processor
        with one.
    :param str prompt: The prompt. Of more than 35 tokens the rest is cut off, with a warning.
    :param int max_length: The most tokens; published is 35.
    :param preprocessing: In place of what the published code does.
    :param options: The options of :class:`~pyro_twist.rewards.PreferenceReward`.

    **References**

    [1] `ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation`
        Jiazheng Xu, Xiao Liu, Yuchen Wu, Yuxuan Tong, Qinkai Li, Ming Ding, Jie Tang, Yuxiao Dong
        (2023), https://arxiv.org/abs/2304.05977
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: str,
        *,
        max_length: int = _MOST_TOKENS,
        preprocessing: Preprocessing | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, ImageRewardNetwork):
            raise ValueError(
                f"model={type(model).__name__}; give an ImageRewardNetwork first, its tokenizer "
                "second and the prompt third"
            )
        check_evaluating(model)
        self.model = model
        positions = model.config.text_config.max_position_embeddings
        length = min(max_length, positions)
        self.tokens = Prompts(tokenizer_of(tokenizer), length, _as_they_are, padding=True)
        super().__init__(preprocessing or _published(model), prompt, "ImageReward", **options)

    @classmethod
    def from_pretrained(
        cls,
        prompt: str,
        model: str,
        *,
        tokenizer: str | None = None,
        revision: str = "main",
        local_files_only: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> Self:
        """
        Loads the network and its tokenizer.

        :param str prompt: The prompt.
        :param str model: A folder that :func:`~pyro_twist.rewards.convert_checkpoint` made of the
            published file, or the name of a model on the hub with such files.
        :param str tokenizer: The same for the tokenizer, if it is elsewhere.
        :param str revision: The model's version on the hub.
        :param bool local_files_only: Whether to look on this machine only.
        :param torch.dtype dtype: The precision of the encoders; scores are in float32 and better.
        :param device: Where the network runs.
        :param options: The options of the class.
        :returns: The reward.
        :raises OSError: If something is not found; the message says what a local folder needs.
        """
        from transformers import BlipConfig

        check_options(cls, options)
        source = Source(revision, False, local_files_only)
        files = "config.json (a BlipConfig), model.safetensors and the tokenizer's files"
        with explained(cls.__name__, model, files):
            weights = load_weights(model, "model.safetensors", source)
            config = BlipConfig.from_pretrained(
                model, revision=revision, local_files_only=local_files_only
            )
            found = load_tokenizer(tokenizer or model, source.at_main() if tokenizer else source)
        network = ImageRewardNetwork(config)
        check_keys("ImageReward", network.state_dict(), weights)
        network.load_state_dict(weights)
        return cls(placed(network, device, dtype), found, prompt, **options)

    def _score(self, pixels: Tensor) -> Tensor:
        weight = next(self.model.vision_model.parameters())
        ids, mask = (each.to(weight.device) for each in self.tokens(str(self.prompt)))
        raw = self.model(pixels.to(weight), ids, mask)
        return (raw - _MEAN) / _STD


def _published(model: ImageRewardNetwork) -> Preprocessing:
    size = int(model.config.vision_config.image_size)
    return Preprocessing(size, "shortest", (size, size), centred=True)


def _as_they_are(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return ids, mask
