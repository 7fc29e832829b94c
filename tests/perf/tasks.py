# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The tasks of the comparison: a model of the zoo and a reward of known strength.

The strength is the scale of the reward in units of its standard deviation under the base model, so
that 1 is mild and 5 is far outside what the model draws by itself. Whether a task is severe is
measured, not declared: plain importance sampling with the whole budget then has an effective
sample size below 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_twist import zoo
from pyro_twist.rewards import Reward, RewardTilted, classifier_log_prob, image_reward

__all__ = ["TASKS", "Task", "make_model", "base_model"]

STEPS = 25
INK_LEVEL = 0.329
NOISY_SPREAD = 0.0275


@dataclass(frozen=True)
class Task:
    """
    One task.

    :param str name: Its name.
    :param str zoo: The model.
    :param str nature: What kind of reward it is.
    :param dict rewards: Makes each reward.
    :param dict spreads: For each the standard deviation under the base model, rounded.
    :param float strength: The scale of each reward in units of that.
    :param bool tuned: Whether the defaults of the methods were chosen on it.
    :param label: The class to sample, if any.
    """

    name: str
    zoo: str
    nature: str
    rewards: dict[str, Callable[[], Reward]]
    spreads: dict[str, float]
    strength: float
    tuned: bool = False
    label: str | None = None

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each reward."""
        return {name: self.strength / spread for name, spread in self.spreads.items()}


def _digit(label: int) -> Reward:
    return classifier_log_prob(zoo.classifier("digits"), label)


def _emoji_class(label: str) -> Reward:
    return classifier_log_prob(zoo.classifier("emoji"), zoo.entry("emoji").index(label))


def _halves(images: Tensor) -> Tensor:
    """Mean ink of the left half less that of the right."""
    left, right = images.float().chunk(2, -1)
    return left.mean((-1, -2, -3)) - right.mean((-1, -2, -3))


def _lopsided() -> Reward:
    """High for ink on the left alone and for ink on the right alone: two modes."""
    return Reward(lambda images: _halves(images).abs(), name="lopsided", differentiable=True)


def _either() -> Reward:
    """The larger of two log-probabilities: two modes."""
    one, other = _digit(1), _digit(0)
    return Reward(lambda images: torch.maximum(one(images), other(images)), name="1 or 0")


def _dense() -> Reward:
    """Minus infinity below a level of ink that one base sample in five reaches; smoother above."""
    ink, smooth = image_reward("bright"), image_reward("smooth")

    def value(images: Tensor) -> Tensor:
        return torch.where(ink(images) >= INK_LEVEL, smooth(images), -torch.inf)

    return Reward(value, name="dense", differentiable=False)


def _noisy() -> Reward:
    """Contrast with noise of half its own standard deviation: one draw per sample."""
    contrast = image_reward("contrast")

    def value(images: Tensor) -> Tensor:
        values = contrast(images)
        return values + 0.5 * NOISY_SPREAD * torch.randn(values.shape)

    return Reward(value, name="noisy contrast", noisy=True, differentiable=False)


def _enlarged(factor: int = 4) -> Reward:
    """Size as a JPEG file, of the picture enlarged."""
    jpeg = image_reward("compressible", quality=75)

    def value(images: Tensor) -> Tensor:
        return jpeg(images.repeat_interleave(factor, -1).repeat_interleave(factor, -2))

    return Reward(value, name="compressible", differentiable=False)


def _named(name: str) -> Callable[[], Reward]:
    return lambda: image_reward(name)


_LIST = [
    Task("ink", "digits", "smooth, linear", {"ink": _named("bright")}, {"ink": 0.0343}, 5, True),
    Task("three", "digits", "classifier", {"three": lambda: _digit(3)}, {"three": 1.645}, 3, True),
    Task(
        "mirror", "digits", "symmetry", {"mirror": _named("symmetric")}, {"mirror": 0.0596}, 5, True
    ),
    Task(
        "lopsided", "digits", "multimodal", {"lopsided": _lopsided}, {"lopsided": 0.0765}, 4, True
    ),
    Task("either", "digits", "multimodal classifier", {"either": _either}, {"either": 1.921}, 1.5),
    Task(
        "smooth",
        "digits",
        "smooth, bent",
        {"smooth": _named("smooth")},
        {"smooth": 0.01996},
        5,
        True,
    ),
    Task("file", "digits", "compressibility", {"file": _enlarged}, {"file": 0.02839}, 4, True),
    Task("dense", "digits", "hard constraint", {"dense": _dense}, {"dense": 0.0234}, 3, True),
    Task(
        "dark-eight",
        "digits",
        "product of two",
        {"eight": lambda: _digit(8), "ink": _named("dark")},
        {"eight": 1.588, "ink": 0.0343},
        4,
    ),
    Task("noisy", "digits", "noisy", {"noisy": _noisy}, {"noisy": 0.0275}, 2, True),
    Task("green", "emoji", "smooth, linear", {"green": _named("green")}, {"green": 0.0607}, 5),
    Task(
        "jpeg", "emoji", "compressibility", {"jpeg": _named("compressible")}, {"jpeg": 0.02746}, 4
    ),
    Task("food", "emoji", "classifier", {"food": lambda: _emoji_class("food")}, {"food": 1.663}, 2),
]
TASKS = {task.name: task for task in _LIST}


@cache
def base_model(name: str, label: str | None = None) -> Any:
    """A model of the zoo, loaded once."""
    # larger batches than this leave the cache and are slower
    return zoo.load(name, label, num_inference_steps=STEPS, chunk_size=128)


def make_model(task: Task) -> RewardTilted:
    """The tilted model of a task, with rewards of its own."""
    rewards = {name: make() for name, make in task.rewards.items()}
    return RewardTilted(base_model(task.zoo, task.label), rewards, scale=task.scales)
