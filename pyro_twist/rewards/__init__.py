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
from pyro_twist.rewards.molecules import (
    logp,
    molecule_reward,
    molecule_rewards,
    qed,
    similarity,
    substructure,
    synthetic_accessibility,
)
from pyro_twist.rewards.proteins import protein_reward, protein_rewards
from pyro_twist.rewards.reward import (
    Reward,
    RewardError,
    RewardFunction,
    RewardWarning,
    per_sample,
)
from pyro_twist.rewards.text import (
    acceptability,
    distinct,
    fluency,
    sentiment,
    text_judge,
    text_judges,
    text_reward,
    text_rewards,
    toxicity,
)
from pyro_twist.rewards.textmodels import CausalLMReward, SequenceClassifierReward
from pyro_twist.rewards.tilted import RewardTilted, Tilted, log_potential

__all__ = [
    "CausalLMReward",
    "Reward",
    "RewardError",
    "RewardFunction",
    "RewardTilted",
    "RewardWarning",
    "SequenceClassifierReward",
    "Tilted",
    "acceptability",
    "brightness",
    "classifier_log_prob",
    "colour",
    "colourfulness",
    "contrast",
    "darkness",
    "distinct",
    "dominance",
    "fluency",
    "image_reward",
    "image_rewards",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "log_potential",
    "logp",
    "molecule_reward",
    "molecule_rewards",
    "per_sample",
    "protein_reward",
    "protein_rewards",
    "qed",
    "saturation",
    "sentiment",
    "similarity",
    "smoothness",
    "substructure",
    "symmetry",
    "synthetic_accessibility",
    "text_judge",
    "text_judges",
    "text_reward",
    "text_rewards",
    "toxicity",
]
