# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The networks that preference rewards were published with, tiny and with random weights.

Written from the papers' descriptions with the names of the published weights, in plain functions of
a dict of weights, so that conversion and transformers' own classes can be held against them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]

WIDTHS = (32, 16)
HEADS = (4, 2)
IMAGE, PATCH, LENGTH, VOCABULARY, EMBEDDING = 16, 4, 32, 32, 24


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention with several heads, of inputs that are projected already."""
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def patches(w: Weights, name: str, x: Tensor) -> Tensor:
    out = functional.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride=PATCH)
    return out.flatten(2).transpose(1, 2)


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


# open_clip


def open_clip_weights(layers: int = 2) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()}
    for prefix, width in (("visual.", WIDTHS[0]), ("", WIDTHS[1])):
        for k in range(layers):
            block = f"{prefix}transformer.resblocks.{k}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width)}
            shapes |= {f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= _pair(f"{block}.attn.out_proj", width, width)
            shapes |= _pair(f"{block}.ln_1", width) | _pair(f"{block}.ln_2", width)
            shapes |= _pair(f"{block}.mlp.c_fc", 4 * width, width)
            shapes |= _pair(f"{block}.mlp.c_proj", width, 4 * width)
    vision, text = WIDTHS
    places = 1 + (IMAGE // PATCH) ** 2
    shapes |= {"visual.class_embedding": (vision,), "visual.proj": (vision, EMBEDDING)}
    shapes |= {"visual.positional_embedding": (places, vision)}
    shapes |= {"visual.conv1.weight": (vision, 3, PATCH, PATCH)}
    shapes |= _pair("visual.ln_pre", vision) | _pair("visual.ln_post", vision)
    shapes |= {"token_embedding.weight": (VOCABULARY, text), "text_projection": (text, EMBEDDING)}
    shapes |= {"positional_embedding": (LENGTH, text)} | _pair("ln_final", text)
    return random_weights(shapes)


def _blocks(w: Weights, prefix: str, x: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    for k in range(2):
        block = f"{prefix}transformer.resblocks.{k}"
        y = norm(w, f"{block}.ln_1", x, 1e-5)
        y = y @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
        x = x + linear(w, f"{block}.attn.out_proj", attention(*y.chunk(3, -1), heads, mask))
        y = linear(w, f"{block}.mlp.c_fc", norm(w, f"{block}.ln_2", x, 1e-5))
        x = x + linear(w, f"{block}.mlp.c_proj", functional.gelu(y))
    return x


def open_clip_cosine(w: Weights, pixels: Tensor, ids: Tensor) -> Tensor:
    """The cosine of images of shape ``(B, 3, 16, 16)`` and token ids of shape ``(1, length)``."""
    x = patches(w, "visual.conv1", pixels)
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(w, "visual.ln_pre", x + w["visual.positional_embedding"], 1e-5)
    x = norm(w, "visual.ln_post", _blocks(w, "visual.", x, HEADS[0])[:, 0], 1e-5)
    y = w["token_embedding.weight"][ids] + w["positional_embedding"][: ids.shape[1]]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    y = norm(w, "ln_final", _blocks(w, "", y, HEADS[1], causal), 1e-5)
    text = y[torch.arange(len(y)), ids.argmax(-1)] @ w["text_projection"]
    return functional.cosine_similarity(x @ w["visual.proj"], text)


# ImageReward


def image_reward_weights(layers: int = 2) -> Weights:
    vision, text = WIDTHS
    places = 1 + (IMAGE // PATCH) ** 2
    v, t = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, tuple[int, ...]] = {f"{v}.cls_token": (1, 1, vision)}
    shapes |= {f"{v}.pos_embed": (1, places, vision)} | _pair(f"{v}.norm", vision)
    shapes |= _pair(f"{v}.patch_embed.proj", vision, 3, PATCH, PATCH)
    shapes[f"{v}.patch_embed.proj.bias"] = (vision,)
    for k in range(layers):
        shapes |= _pair(f"{v}.blocks.{k}.norm1", vision) | _pair(f"{v}.blocks.{k}.norm2", vision)
        shapes |= _pair(f"{v}.blocks.{k}.attn.qkv", 3 * vision, vision)
        shapes |= _pair(f"{v}.blocks.{k}.attn.proj", vision, vision)
        shapes |= _pair(f"{v}.blocks.{k}.mlp.fc1", 4 * vision, vision)
        shapes |= _pair(f"{v}.blocks.{k}.mlp.fc2", vision, 4 * vision)
        layer = f"{t}.encoder.layer.{k}"
        for kind, width in (("attention", text), ("crossattention", vision)):
            shapes |= _pair(f"{layer}.{kind}.self.query", text, text)
            shapes |= _pair(f"{layer}.{kind}.self.key", text, width)
            shapes |= _pair(f"{layer}.{kind}.self.value", text, width)
            shapes |= _pair(f"{layer}.{kind}.output.dense", text, text)
            shapes |= _pair(f"{layer}.{kind}.output.LayerNorm", text)
        shapes |= _pair(f"{layer}.intermediate.dense", 4 * text, text)
        shapes |= _pair(f"{layer}.output.dense", text, 4 * text)
        shapes |= _pair(f"{layer}.output.LayerNorm", text)
    shapes |= {f"{t}.embeddings.word_embeddings.weight": (VOCABULARY, text)}
    shapes |= {f"{t}.embeddings.position_embeddings.weight": (40, text)}
    shapes |= _pair(f"{t}.embeddings.LayerNorm", text)
    # what the published file also has, and nothing reads
    shapes |= _pair("blip.vision_proj", 4, vision) | {f"{t}.embeddings.position_ids": (1, 40)}
    weights = random_weights(shapes)
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        weights[f"{v}.{name}"] *= 0.003  # small, so that what layer norms add counts
    return weights | {f"mlp.{k}": v for k, v in head_weights(text).items()}


def head_weights(width: int) -> Weights:
    sizes = (width, 1024, 128, 64, 16, 1)
    shapes: dict[str, tuple[int, ...]] = {}
    for place, before, after in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        shapes |= _pair(f"layers.{place}", after, before)
    return random_weights(shapes, seed=1)


def head(w: Weights, x: Tensor, prefix: str = "") -> Tensor:
    for place in (0, 2, 4, 6, 7):
        x = linear(w, f"{prefix}layers.{place}", x)
    return x[:, 0]


def image_reward(w: Weights, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """ImageReward of images of shape ``(B, 3, 16, 16)`` and one tokenized prompt."""
    v, t = "blip.visual_encoder", "blip.text_encoder"
    x = patches(w, f"{v}.patch_embed.proj", pixels)
    x = torch.cat([w[f"{v}.cls_token"].expand(len(x), -1, -1), x], 1) + w[f"{v}.pos_embed"]
    for k in range(2):
        block = f"{v}.blocks.{k}"
        y = linear(w, f"{block}.attn.qkv", norm(w, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(w, f"{block}.attn.proj", attention(*y, HEADS[0]))
        y = linear(w, f"{block}.mlp.fc1", norm(w, f"{block}.norm2", x, 1e-6))
        x = x + linear(w, f"{block}.mlp.fc2", functional.gelu(y))
    x = norm(w, f"{v}.norm", x, 1e-6)
    y = w[f"{t}.embeddings.word_embeddings.weight"][ids]
    y = y + w[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(w, f"{t}.embeddings.LayerNorm", y, 1e-12).expand(len(x), -1, -1)
    for k in range(2):
        layer = f"{t}.encoder.layer.{k}"
        y = _attended(w, f"{layer}.attention", y, y, mask[:, None, None].bool())
        y = _attended(w, f"{layer}.crossattention", y, x, None)
        z = functional.gelu(linear(w, f"{layer}.intermediate.dense", y))
        y = norm(w, f"{layer}.output.LayerNorm", linear(w, f"{layer}.output.dense", z) + y, 1e-12)
    return (head(w, y[:, 0], "mlp.") - 0.16717362830052426) / 1.0333394966054072


def _attended(w: Weights, name: str, x: Tensor, to: Tensor, mask: Tensor | None) -> Tensor:
    q = linear(w, f"{name}.self.query", x)
    k, v = linear(w, f"{name}.self.key", to), linear(w, f"{name}.self.value", to)
    y = linear(w, f"{name}.output.dense", attention(q, k, v, HEADS[1], mask))
    return norm(w, f"{name}.output.LayerNorm", y + x, 1e-12)


# Words


WORDS = ["a", "red", "blue", "apple", "boat", "photo", "depicts"]


def clip_tokenizer() -> Any:
    """CLIP's tokenizer with a vocabulary of a few letters and words."""
    from transformers import CLIPTokenizer

    letters = sorted(set("".join(WORDS)) | {"x"})
    tokens = [*letters, *(f"{one}</w>" for one in letters)]
    vocabulary = {one: k for k, one in enumerate(tokens)}
    vocabulary |= {"<|startoftext|>": len(tokens), "<|endoftext|>": len(tokens) + 1}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def bert_tokenizer() -> Any:
    """BERT's tokenizer with a vocabulary of a few words."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={one: k for k, one in enumerate(words)}, model_max_length=40)
