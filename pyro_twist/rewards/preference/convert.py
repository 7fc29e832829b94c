# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Turns published checkpoints into folders of safetensors that the rewards load."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_twist.rewards.preference.loading import check_keys

__all__ = ["convert_checkpoint", "convert_image_reward", "convert_open_clip"]

Kind = Literal["hpsv2", "image-reward", "aesthetic"]
Weights = dict[str, Tensor]

_DROPPED = re.compile(r"position_ids$|attn_mask$|^(vision|text)_proj\.|^vision_proj|^text_proj\.")

_TOWER = (
    (r"\.resblocks\.(\d+)\.ln_(\d)\.", r".encoder.layers.\1.layer_norm\2."),
    (r"\.resblocks\.(\d+)\.attn\.out_proj\.", r".encoder.layers.\1.self_attn.out_proj."),
    (r"\.resblocks\.(\d+)\.mlp\.c_fc\.", r".encoder.layers.\1.mlp.fc1."),
    (r"\.resblocks\.(\d+)\.mlp\.c_proj\.", r".encoder.layers.\1.mlp.fc2."),
    (r"\.resblocks\.(\d+)\.attn\.in_proj_", r".encoder.layers.\1.self_attn.in_proj_"),
)
_OPEN_CLIP = (
    (r"^visual\.transformer", "vision_model"),
    (r"^transformer", "text_model"),
    *_TOWER,
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
)
_BLIP = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (
        r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.",
        r"vision_model.encoder.layers.\1.layer_norm\2.",
    ),
    (
        r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.",
        r"vision_model.encoder.layers.\1.self_attn.qkv.",
    ),
    (
        r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
        r"vision_model.encoder.layers.\1.self_attn.projection.",
    ),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
    (r"^mlp\.layers\.", "mlp."),
)


def convert_checkpoint(
    kind: Kind,
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    heads: tuple[int, int] | None = None,
) -> Path:
    """
    Turns a published checkpoint into a folder that ``from_pretrained`` of its reward loads.

    A pickled file is read by torch's reader of tensors alone (``weights_only=True``), which
    refuses anything that would run code. It is still the place to be careful: do it once, with a
    file that you trust, and use the folder from then on.

    :param str kind: ``"hpsv2"`` for ``HPS_v2.1_compressed.pt`` or ``HPS_v2_compressed.pt``,
        ``"image-reward"`` for ``ImageReward.pt``, ``"aesthetic"`` for
        ``sac+logos+ava1-l14-linearMSE.pth``.
    :param checkpoint: The published file, or a safetensors file with the same names.
    :param folder: The folder to write.
    :param tokenizer: The tokenizer, or a folder or name on the hub to load it from: for HPSv2 that
        of any CLIP model, for ImageReward that of ``"google-bert/bert-base-uncased"``. Not needed
        for the aesthetic head.
    :param tuple heads: The numbers of attention heads of vision and text encoder, which weights do
        not tell; by default those of the published networks.
    :returns: The folder.
    :raises ValueError: If there is no such kind, the tokenizer is missing, or the file holds
        something else.

    Example::

        convert_checkpoint("hpsv2", "HPS_v2.1_compressed.pt", "hpsv2.1",
                           tokenizer="openai/clip-vit-large-patch14")
        reward = HPSv2.from_pretrained("a red apple", "hpsv2.1")
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r}; choose one of {get_args(Kind)}")
    if kind != "aesthetic" and tokenizer is None:
        raise ValueError(f"kind={kind!r} needs tokenizer=..., a tokenizer or where to load it from")
    weights, folder = _read(Path(checkpoint)), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "aesthetic":
        _write_head(weights, folder)
        return folder
    words = _as_tokenizer(tokenizer)
    if kind == "hpsv2":
        _write_clip(convert_open_clip(weights), folder, heads or (16, 16), words)
    else:
        _write_image_reward(convert_image_reward(weights), folder, heads or (16, 12))
    words.save_pretrained(folder)
    return folder


def convert_open_clip(weights: Mapping[str, Tensor]) -> Weights:
    """
    Renames the weights of an open_clip model for transformers' ``CLIPModel``.

    :param weights: Tensors by open_clip's names.
    :returns: Tensors by transformers' names.
    """
    found: Weights = {}
    for name, value in _renamed(weights, _OPEN_CLIP).items():
        if "in_proj_" in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("in_proj_", f"{part}_proj.")] = rows.clone()
        else:
            turned = name in ("visual_projection.weight", "text_projection.weight")
            found[name] = value.T.contiguous() if turned else value
    return found


def convert_image_reward(weights: Mapping[str, Tensor]) -> Weights:
    """
    Renames ImageReward's weights for :class:`~pyro_twist.rewards.ImageRewardNetwork`.

    :param weights: Tensors by the published names.
    :returns: Tensors by the names of the network.
    """
    bare = {name.removeprefix("blip."): value for name, value in weights.items()}
    return _renamed(bare, _BLIP)


def _renamed(weights: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> Weights:
    found = {}
    for name, value in weights.items():
        if not _DROPPED.search(name):
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            found[name] = value.contiguous()
    return found


# Files


def _read(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(path))
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    loaded = loaded.get("state_dict", loaded)
    return {name.removeprefix("module."): value for name, value in loaded.items()}


def _as_tokenizer(tokenizer: Any) -> Any:
    if not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tokenizer))


def _write_head(weights: Weights, folder: Path) -> None:
    from safetensors.torch import save_file

    from pyro_twist.rewards.preference.clip import linear_head

    bare = {name.removeprefix("layers."): value for name, value in weights.items()}
    width = bare["0.weight"].shape[1] if "0.weight" in bare else 768
    check_keys("the aesthetic head", linear_head(width).state_dict(), bare)
    save_file(bare, str(folder / "aesthetic.safetensors"))


def _write_clip(weights: Weights, folder: Path, heads: tuple[int, int], words: Any) -> None:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config=_text_shape(weights, heads[1]) | _special_tokens(words),
        vision_config=_vision_shape(weights, heads[0]),
        projection_dim=len(_needed(weights, "text_projection.weight")),
    )
    model = CLIPModel(config)
    check_keys("an open_clip model", model.state_dict(), weights)
    model.load_state_dict(weights)
    model.save_pretrained(folder)


def _write_image_reward(weights: Weights, folder: Path, heads: tuple[int, int]) -> None:
    from safetensors.torch import save_file
    from transformers import BlipConfig

    from pyro_twist.rewards.preference.blip import ImageRewardNetwork

    config = BlipConfig(
        text_config=_blip_text_shape(weights, heads[1]),
        vision_config=_blip_vision_shape(weights, heads[0]),
    )
    check_keys("ImageReward", ImageRewardNetwork(config).state_dict(), weights)
    config.save_pretrained(folder)
    save_file(weights, str(folder / "model.safetensors"))


# Shapes


def _needed(weights: Weights, name: str) -> Tensor:
    if name not in weights:
        raise ValueError(f"the checkpoint has no {name}; is it of another kind?")
    return weights[name]


def _depth(weights: Weights, pattern: str) -> int:
    found = (re.match(pattern, name) for name in weights)
    return 1 + max(int(match.group(1)) for match in found if match)


def _text_shape(weights: Weights, heads: int) -> dict[str, Any]:
    words = _needed(weights, "text_model.embeddings.token_embedding.weight")
    return {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "intermediate_size": len(weights["text_model.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": _depth(weights, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "max_position_embeddings": len(weights["text_model.embeddings.position_embedding.weight"]),
        "hidden_act": "gelu",
        "projection_dim": len(weights["text_projection.weight"]),
    }


def _special_tokens(words: Any) -> dict[str, Any]:
    # the network reads a text off at its end token
    return {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def _vision_shape(weights: Weights, heads: int) -> dict[str, Any]:
    prefix = "vision_model.embeddings."
    patches = _needed(weights, f"{prefix}patch_embedding.weight")
    places = len(weights[f"{prefix}position_embedding.weight"])
    return {
        "hidden_size": patches.shape[0],
        "intermediate_size": len(weights["vision_model.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": _depth(weights, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "patch_size": patches.shape[-1],
        "image_size": patches.shape[-1] * round((places - 1) ** 0.5),
        "hidden_act": "gelu",
        "projection_dim": len(weights["visual_projection.weight"]),
    }


def _blip_vision_shape(weights: Weights, heads: int) -> dict[str, Any]:
    patches = _needed(weights, "vision_model.embeddings.patch_embedding.weight")
    places = weights["vision_model.embeddings.position_embedding"].shape[1]
    return {
        "hidden_size": patches.shape[0],
        "intermediate_size": len(weights["vision_model.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": _depth(weights, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "patch_size": patches.shape[-1],
        "image_size": patches.shape[-1] * round((places - 1) ** 0.5),
        "hidden_act": "gelu",
        # not the default of transformers: the published vision encoder has the smaller one
        "layer_norm_eps": 1e-6,
    }


def _blip_text_shape(weights: Weights, heads: int) -> dict[str, Any]:
    words = _needed(weights, "text_encoder.embeddings.word_embeddings.weight")
    return {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "encoder_hidden_size": len(weights["vision_model.post_layernorm.weight"]),
        "intermediate_size": len(weights["text_encoder.encoder.layer.0.intermediate.dense.weight"]),
        "num_hidden_layers": _depth(weights, r"text_encoder\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": heads,
        "max_position_embeddings": len(
            weights["text_encoder.embeddings.position_embeddings.weight"]
        ),
        "hidden_act": "gelu",
        "bos_token_id": None,
        "sep_token_id": None,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
