# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Rewards by name, for the command line."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pyro_twist.rewards.reward import Reward

__all__ = ["RewardRegistry"]


class RewardRegistry:
    """
    Makes rewards of one domain by name.

    :param str domain: What the rewards are on, for messages, for example ``"molecule"``.
    :param rewards: For every name the function that makes the reward, and one line that says
        what is measured, in which unit.
    """

    def __init__(
        self, domain: str, rewards: Mapping[str, tuple[Callable[..., Reward], str]]
    ) -> None:
        self.domain = domain
        self.rewards = dict(rewards)

    def descriptions(self) -> dict[str, str]:
        """
        Lists the rewards.

        :returns: For every name its line.
        """
        return {name: description for name, (_, description) in self.rewards.items()}

    def make(self, name: str, **options: Any) -> Reward:
        """
        Makes a reward.

        :param str name: Its name.
        :param options: The options of the function that makes it.
        :returns: The reward.
        :raises ValueError: If there is no such name or option, or an option is missing.
        """
        make = self._find(name)
        try:
            inspect.signature(make).bind(**options)
        except TypeError as error:
            known = ", ".join(inspect.signature(make).parameters) or "none"
            raise ValueError(
                f"{self.domain} reward {name!r}: {error}; its options are: {known}"
            ) from None
        reward = make(**options)
        reward.name = name
        return reward

    def _find(self, name: str) -> Callable[..., Reward]:
        if name not in self.rewards:
            close = difflib.get_close_matches(name, self.rewards, 1)
            meant = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(
                f"no {self.domain} reward {name!r}{meant} There are: {', '.join(self.rewards)}."
            )
        return self.rewards[name][0]
