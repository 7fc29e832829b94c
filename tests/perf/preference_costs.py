# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
What the networks of preference rewards cost: weights, and arithmetic per image and per prompt.

Run ``python -m tests.perf.preference_costs``. Networks of the published shapes are built without
memory behind them, on torch's meta device, and operations are counted. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pyro_twist.rewards import ImageRewardNetwork
from pyro_twist.rewards.preference.clip import linear_head

CLIP_TEXT = {
    "B/32": {"hidden_size": 512, "num_attention_heads": 8},
    "L/14": {"hidden_size": 768, "num_attention_heads": 12},
    "H/14": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24},
}
CLIP_VISION = {
    "B/32": {"hidden_size": 768, "num_attention_heads": 12, "patch_size": 32},
    "L/14": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24},
    "H/14": {"hidden_size": 1280, "num_attention_heads": 16, "num_hidden_layers": 32},
}
PROJECTION = {"B/32": 512, "L/14": 768, "H/14": 1024}
ROWS = {
    "`CLIPScore`, ViT-B/32": "B/32",
    "`CLIPScore`, ViT-L/14": "L/14",
    "`Aesthetic`, ViT-L/14": "L/14",
    "`PickScore`, `HPSv2`, ViT-H/14": "H/14",
}


def clip(name: str) -> Any:
    """A CLIP model of a published shape, without weights."""
    from transformers import CLIPConfig, CLIPModel

    text = {**CLIP_TEXT[name]}
    vision = {"patch_size": 14, **CLIP_VISION[name]}
    for tower in (text, vision):
        tower["intermediate_size"] = 4 * tower["hidden_size"]
        tower["projection_dim"] = PROJECTION[name]
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION[name])
    return empty(CLIPModel, config)


def empty(kind: Any, config: Any) -> Any:
    """A network without weights, whose masks need no look at values."""
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = "eager"
    with torch.device("meta"):
        return kind(config).eval()


def image_reward() -> Any:
    """ImageReward in its published shape, without weights."""
    from transformers import BlipConfig

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": 224, "patch_size": 16}
    config = BlipConfig(text_config={**text, "num_hidden_layers": 12}, vision_config=vision)
    return empty(ImageRewardNetwork, config)


def blip(network: Any, pixels: torch.Tensor, ids: torch.Tensor) -> Any:
    """Both encoders, without masks, the making of which looks at values."""
    image = network.vision_model(pixel_values=pixels).last_hidden_state
    return network.text_encoder(input_ids=ids, encoder_hidden_states=image, is_decoder=False)


def operations(call: Callable[[], Any]) -> float:
    """Billions of multiplications and additions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 1e9


def row(name: str, model: Any, per_image: float, per_prompt: float) -> str:
    """One line of the table."""
    weights = sum(one.numel() for one in model.parameters()) / 1e6
    prompt = f"{per_prompt:.0f}" if per_prompt else "in the image's"
    return f"| {name} | {weights:.0f} | {weights * 2 / 1e3:.1f} | {per_image:.0f} | {prompt} |"


def main() -> None:
    """Prints the table."""
    print("| reward | weights, million | GB in half precision | GFLOP per image | per prompt |")
    print("| --- | --- | --- | --- | --- |")
    pixels = torch.empty(1, 3, 224, 224, device="meta")
    ids, short = (torch.ones(1, n, dtype=torch.long, device="meta") for n in (77, 35))
    for name, shape in ROWS.items():
        model = clip(shape)
        seen = operations(lambda model=model: model.vision_model(pixel_values=pixels))
        read = operations(lambda model=model: model.text_model(input_ids=ids))
        print(row(name, model, seen, read))
    network = image_reward()
    print(row("`ImageReward`", network, operations(lambda: blip(network, pixels, short)), 0.0))
    head = sum(one.numel() for one in linear_head(768).parameters()) / 1e6
    print(f"\nThe head of `Aesthetic` and `ImageReward`: {head:.1f} million weights.")


if __name__ == "__main__":
    main()
