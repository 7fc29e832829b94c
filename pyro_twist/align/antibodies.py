# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The antibody models: properties of proteins, and how human a sequence looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_twist.align.options import AlignOptions, OptionError
from pyro_twist.align.rewardoptions import parse_options
from pyro_twist.align.sequences import Strings, ZooSequences
from pyro_twist.rewards.proteins import human_likeness
from pyro_twist.rewards.registry import RewardRegistry

if TYPE_CHECKING:
    from pyro_twist.rewards import Reward

__all__ = ["ZooAntibodies"]


class ZooAntibodies(ZooSequences):
    """
    A model of antibody sequences, of heavy chains.

    :param str name: One of :func:`pyro_twist.zoo.models`.
    """

    default_reward = "human"
    _masked, _same = False, False
    _chain: Any = "H"
    packages: tuple[str, ...] = ("transformers", "biopython", "antiberty", "sapiens")
    noun, column = "sequence", "sequence"

    def registry(self) -> RewardRegistry:
        """The named rewards on proteins."""
        from pyro_twist.rewards.proteins import _REGISTRY

        return _REGISTRY

    def load(self, labels: Sequence[int], options: AlignOptions) -> Any:
        """
        Loads the model.

        :raises OptionError: If an option is not for antibodies, or weights are missing.
        """
        try:
            human_likeness()
        except ImportError as error:
            raise OptionError(f"sequences of {self.name!r} cannot be judged: {error}") from None
        return super().load(labels, options)

    def reward(self, name: str, argument: str) -> Reward:
        """
        Makes a reward; where it is ``"human"``, the judge is not the same score.

        See :meth:`ZooSequences.reward`.
        """
        if name == "human":
            options = parse_options(name, argument, human_likeness)
            self._masked, self._same = not options.get("masked", False), True
            self._chain = options.get("chain", "H")
        return super().reward(name, argument)

    def figures(self, samples: Sequence[str]) -> dict[str, Tensor]:
        """
        How human sequences are under Sapiens.

        :param samples: Sequences.
        """
        return {"judge": human_likeness(self._chain, masked=self._masked)(samples)}

    def judge_explained(self, with_class: bool) -> str:
        """What the judge's score is."""
        seen = (
            "each predicted from all others"
            if self._masked
            else "each seen by the network that predicts it"
        )
        seen += (
            ". The reward 'human' is the other of the two ways to ask the same network, so that "
            "this is no independent judge"
            if self._same
            else "; no reward uses it"
        )
        if self.name == "sapiens":
            seen += ". Sequences of Sapiens itself are judged by the network that drew them"
        return (
            "Mean log-probability of the residues under Sapiens, a model of human antibodies, in "
            f"nats, at most 0: {seen}."
        )

    def distances(self, samples: Strings) -> Tensor:
        """
        Shares of positions that differ.

        :param samples: Sequences, of one length.
        """
        codes = torch.tensor([[ord(letter) for letter in one] for one in samples])
        return (codes[:, None] != codes[None]).double().mean(-1)

    def distance_explained(self) -> str:
        """What the distance is."""
        return "the share of positions whose residues differ"
