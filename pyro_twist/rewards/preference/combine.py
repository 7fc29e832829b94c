# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Ensembles of rewards, and one reward for many prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from pyro_twist.rewards.preference.base import ImageScore
from pyro_twist.rewards.reward import Reward

__all__ = ["Ensemble", "ensemble", "per_prompt"]

Reduction = Literal["mean", "min"]


class Ensemble(ImageScore):
    """
    The mean or the least of several rewards, each times its weight; see :func:`ensemble`.

    :param rewards: The rewards.
    :param weights: One positive number for each.
    :param str reduce: ``"mean"`` or ``"min"``.
    :param options: The options of :class:`~pyro_twist.rewards.Reward`.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float],
        reduce: Reduction,
        **options: Any,
    ) -> None:
        self.rewards, self.weights, self.reduce = tuple(rewards), tuple(weights), reduce
        options.setdefault("name", self._named_by("name"))
        sizes = [one.chunk_size for one in self.rewards if one.chunk_size is not None]
        options.setdefault("chunk_size", min(sizes, default=None))
        options.setdefault("input", _common_input(self.rewards))
        options.setdefault("differentiable", _differentiable(self.rewards, options))
        super().__init__(self._values, **options)

    def with_prompt(self, prompt: str) -> Self:
        """
        The same ensemble with every member that takes a prompt at another one.

        :param str prompt: The prompt.
        :returns: The ensemble, which shares all networks.
        :raises ValueError: If no member takes a prompt.
        """
        _check_takes_prompts(self)
        other = self.fresh()
        other.rewards = tuple(
            one.with_prompt(prompt) if hasattr(one, "with_prompt") else one for one in self.rewards
        )
        other.name = other._named_by("name")
        return other

    @property
    def title(self) -> str:
        """What the ensemble is called, without prompts."""
        return self._named_by("title")

    def _named_by(self, by: str) -> str:
        return f"{self.reduce} of {', '.join(getattr(one, by, one.name) for one in self.rewards)}"

    def _values(self, samples: Any) -> Tensor:
        weighted = [
            weight * one(samples) for weight, one in zip(self.weights, self.rewards, strict=True)
        ]
        every = torch.stack(weighted)
        return every.amin(0) if self.reduce == "min" else every.mean(0)


def ensemble(
    rewards: Sequence[Any],
    weights: Sequence[float] | None = None,
    reduce: Reduction = "mean",
    **options: Any,
) -> Ensemble:
    """
    The mean, or the least, of several rewards, each times its weight.

    The least is a cautious choice: a sample that deceives one network has to please the others as
    well. Rewards of different units need weights, such as one over the standard deviation of each
    over samples of the model. For rewards with a scale each, give
    :class:`~pyro_twist.rewards.RewardTilted` a dict instead.

    :param rewards: Rewards, or functions of a batch of samples.
    :param weights: One positive number for each; by default 1.
    :param str reduce: ``"mean"`` or ``"min"``.
    :param options: The options of :class:`~pyro_twist.rewards.Reward`; caches of the members stay
        their own, and by default chunks are the smallest of theirs.
    :returns: The reward, differentiable where all members are.
    :raises ValueError: If there are no rewards, or the weights do not fit.

    Example::

        >>> from pyro_twist.rewards import image_reward
        >>> both = ensemble([image_reward("red"), image_reward("bright")], [1.0, 2.0], "min")
        >>> both(torch.ones(1, 3, 4, 4)).tolist()
        [0.0]
    """
    members = [one if isinstance(one, Reward) else Reward(one) for one in rewards]
    weights = [1.0] * len(members) if weights is None else [float(one) for one in weights]
    if not members or len(weights) != len(members):
        raise ValueError(f"{len(weights)} weights for {len(members)} rewards; give one for each")
    if not all(0 < one < math.inf for one in weights):
        raise ValueError(f"weights={weights}; give positive numbers, and negate a reward instead")
    if reduce not in get_args(Reduction):
        raise ValueError(f"reduce={reduce!r}; choose one of {get_args(Reduction)}")
    return Ensemble(members, weights, reduce, **options)


def per_prompt(reward: Any, prompts: Sequence[str]) -> list[Any]:
    """
    One reward for each prompt, which all share one network.

    Given to :class:`~pyro_twist.rewards.RewardTilted`, entry ``k`` of the model's plate is scored
    for prompt ``k``.

    :param reward: A :class:`~pyro_twist.rewards.PreferenceReward` for any prompt, or
        an :func:`ensemble` with one.
    :param prompts: The prompts, in the order of the plate's entries.
    :returns: The rewards.
    :raises ValueError: If there are no prompts, or the reward takes none.

    Example::

        reward = PickScore.from_pretrained("")
        model = RewardTilted(diffusion, per_prompt(reward, ["a red apple", "a blue boat"]))
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts={prompts!r}; give a list of one string or more")
    _check_takes_prompts(reward)
    return [reward.with_prompt(prompt) for prompt in prompts]


def _check_takes_prompts(reward: Any) -> None:
    members = getattr(reward, "rewards", (reward,))
    if not any(getattr(one, "prompt", None) is not None for one in _flat(members)):
        raise ValueError(
            f"{reward!r} takes no prompt; give a reward such as PickScore, or one function per "
            "prompt to RewardTilted itself"
        )


def _flat(rewards: Sequence[Any]) -> list[Any]:
    return [leaf for one in rewards for leaf in _flat(getattr(one, "rewards", ())) or [one]]


def _common_input(rewards: Sequence[Reward]) -> str:
    lists = {one.input == "list" for one in rewards}
    if len(lists) > 1:
        raise ValueError(
            "some of the rewards take lists of Python objects and others tensors; an ensemble "
            "needs one kind"
        )
    return "list" if lists == {True} else "tensor"


def _differentiable(rewards: Sequence[Reward], options: dict[str, Any]) -> bool | None:
    if options["input"] != "tensor" or options.get("noisy"):
        return False
    each = [one.differentiable for one in rewards]
    return False if False in each else True if all(each) else None
