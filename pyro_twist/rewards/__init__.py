# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Rewards, and models tilted by them."""

from pyro_twist.rewards.classifiers import classifier_log_prob
from pyro_twist.rewards.images import (
    brightness,
    colour,
    colourfulness,
    contrast,
    darkness,
    dominance,
    image_reward,
    image_rewards,
    jpeg_compressibility,
    jpeg_incompressibility,
    saturation,
    smoothness,
    symmetry,
)
from pyro_twist.rewards.reward import (
    Reward,
    RewardError,
    RewardFunction,
    RewardWarning,
    per_sample,
)
from pyro_twist.rewards.tilted import RewardTilted, Tilted, log_potential

__all__ = [
    "Reward",
    "RewardError",
    "RewardFunction",
    "RewardTilted",
    "RewardWarning",
    "Tilted",
    "brightness",
    "classifier_log_prob",
    "colour",
    "colourfulness",
    "contrast",
    "darkness",
    "dominance",
    "image_reward",
    "image_rewards",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "log_potential",
    "per_sample",
    "saturation",
    "smoothness",
    "symmetry",
]
