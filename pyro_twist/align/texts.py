# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The models of texts: rewards, an independent judge of what is asked for, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_twist.align.rewardoptions import parse_options
from pyro_twist.align.sequences import Strings, ZooSequences, jaccard_distances, parts_of
from pyro_twist.rewards.registry import RewardRegistry

if TYPE_CHECKING:
    from pyro_twist.rewards import Reward

__all__ = ["ZooTexts"]

_FLUENCY = "log-probability per character under a small language model, in nats"


class ZooTexts(ZooSequences):
    """
    A model of texts. The judge is the one that belongs to the first named reward, if it has one
    and its package is installed, and a language model otherwise.

    :param str name: One of :func:`pyro_twist.zoo.models`.
    """

    default_reward = "sentiment"
    noun, column = "text", "text"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._judge: Reward | None = None
        self._judged = _FLUENCY
        self._asked: list[str] = []

    def registry(self) -> RewardRegistry:
        """The named rewards on texts."""
        from pyro_twist.rewards.text import _REWARDS

        return _REWARDS

    def reward(self, name: str, argument: str) -> Reward:
        """
        Makes a reward, and the judge of the same quality if it is the first.

        See :meth:`ZooSequences.reward`.
        """
        reward = super().reward(name, argument)
        self._asked.append(name)
        if len(self._asked) == 1:
            self._find_judge(name, argument)
        return reward

    def _find_judge(self, name: str, argument: str) -> None:
        from pyro_twist.rewards.text import text_judge, text_judges

        options = parse_options(name, argument, self.registry().rewards[name][0])
        try:
            self._judge = text_judge(name, **options)
            self._judged = text_judges()[name]
        except (ImportError, ValueError, TypeError):
            # the options may choose what the judge is there to check, or a package is missing
            self._judge, self._judged = None, _FLUENCY

    def figures(self, samples: Sequence[str]) -> dict[str, Tensor]:
        """
        The quality that is asked for, judged by other means, and how fluent texts are.

        :param samples: Texts.
        """
        from pyro_twist.rewards.charlm import char_lm

        fluency = char_lm().mean_log_prob(samples)
        score = fluency if self._judge is None else self._judge(samples)
        words = torch.tensor([float(len(text.split())) for text in samples])
        return {"judge": score, "fluency": fluency, "words": words}

    def judge_explained(self, with_class: bool) -> str:
        """What the judge's score is."""
        same = self._judge is None and "fluency" in self._asked
        which = "the reward itself, for want of another judge" if same else "a judge no reward uses"
        return (
            f"Mean of {which}: {self._judged}; higher is better. Where it does "
            "not rise with the reward, look for texts that exploit the reward; small differences "
            "of a single run may be chance. The log-probability per character of each text is in "
            "samples/."
        )

    def distances(self, samples: Strings) -> Tensor:
        """
        Jaccard distances of words and pairs of words.

        :param samples: Texts.
        """
        return jaccard_distances([parts_of(str(text), r"[\w']+") for text in samples])

    def distance_explained(self) -> str:
        """What the distance is."""
        return "one minus the share of words and pairs of words in common"
