# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Rewards trained on what people prefer: CLIPScore, PickScore, HPSv2, ImageReward, aesthetic.

Networks are given, or loaded from a hub or a folder, from safetensors files only. Tensors in [0, 1]
are scored differentiably; PIL images go through the processor that a network was published with.
"""

from __future__ import annotations

from typing import Any

from pyro_twist.rewards.preference.base import ImageScore, PreferenceReward
from pyro_twist.rewards.preference.blip import ImageReward, ImageRewardNetwork
from pyro_twist.rewards.preference.clip import Aesthetic, CLIPReward, CLIPScore, HPSv2, PickScore
from pyro_twist.rewards.preference.combine import Ensemble, ensemble, per_prompt
from pyro_twist.rewards.preference.convert import convert_checkpoint
from pyro_twist.rewards.preference.decoders import TinyDecoder
from pyro_twist.rewards.preference.preprocess import Preprocessing
from pyro_twist.rewards.registry import RewardRegistry

__all__ = [
    "Aesthetic",
    "CLIPReward",
    "CLIPScore",
    "Ensemble",
    "HPSv2",
    "ImageReward",
    "ImageRewardNetwork",
    "ImageScore",
    "PickScore",
    "PreferenceReward",
    "Preprocessing",
    "TinyDecoder",
    "convert_checkpoint",
    "ensemble",
    "per_prompt",
    "preference_reward",
    "preference_rewards",
]

#: The named rewards, and how each is loaded.
REGISTRY = RewardRegistry(
    "preference",
    {
        "aesthetic": (Aesthetic.from_pretrained, "LAION aesthetic rating, 1 to 10; no prompt"),
        "clipscore": (CLIPScore.from_pretrained, "2.5 times CLIP's cosine, 0 to 2.5"),
        "hpsv2": (HPSv2.from_pretrained, "cosine of Human Preference Score v2, about 0.2 to 0.35"),
        "imagereward": (ImageReward.from_pretrained, "ImageReward, normalised, about -2 to 2"),
        "pickscore": (PickScore.from_pretrained, "PickScore, a scaled cosine, about 17 to 24"),
    },
)


def preference_rewards() -> dict[str, str]:
    """
    Lists the named preference rewards.

    :returns: For every name one line that says what is measured, in which unit.
    """
    return REGISTRY.descriptions()


def preference_reward(name: str, **options: Any) -> PreferenceReward:
    """
    Loads a preference reward by name.

    :param str name: One of :func:`preference_rewards`.
    :param options: The options of its ``from_pretrained``, such as ``prompt`` and ``model``.
    :returns: The reward.
    :raises ValueError: If there is no such name or option.

    Example::

        reward = preference_reward("pickscore", prompt="a red apple", device="cuda")
    """
    reward = REGISTRY.make(name, **options)
    assert isinstance(reward, PreferenceReward)
    return reward
