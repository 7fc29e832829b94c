# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The options of the job, and how wrong ones are answered."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pyro_twist.algorithms.registry import nearest

__all__ = ["AlignOptions", "OptionError", "unknown", "word"]

MAX_STEPS = 1000
MAX_SEED = 2**63 - 1


class OptionError(ValueError):
    """An option that cannot be; the message is one sentence that says what can."""


def unknown(kind: str, value: Any, known: Iterable[str]) -> OptionError:
    """
    The answer to a name that does not exist.

    :param str kind: What it should have been the name of.
    :param value: What was given.
    :param known: The names there are.
    :returns: An error that lists them, and the nearest.
    """
    return OptionError(nearest(kind, value, known))


@dataclass(frozen=True)
class AlignOptions:
    """
    What to align, to what, how strongly and with which means.

    Names are looked up when the job starts, numbers are checked at once. Where several values can
    be given, a single one will do.

    :param str model: The name of a model, such as ``"emoji"``, or a pipeline of diffusers: its
        folder, or its name on the hub.
    :param rewards: Rewards to combine: names, ``"name:option=value"``, ``"class:NAME"``,
        ``"module:function"`` or ``"file.py:function"``; from Python also callables and
        :class:`~pyro_twist.rewards.Reward` objects; none for the model's usual one.
    :param classes: The classes to sample, each a population of its own; none for samples of any
        class.
    :param methods: The names of the methods; none for the usual ones.
    :param strengths: How far to tilt, in standard deviations of the reward under the model: one
        number, or one for each reward.
    :param scales: Sets ``lambda`` directly instead, likewise.
    :param float guidance: The strength of classifier-free guidance; by default the model's own.
    :param int particles: The number of particles of each class and method.
    :param int steps: The number of steps of the reverse process; by default the model's usual one.
    :param str scheduler: ``"ddpm"`` or ``"ddim"``, for images; by default the first, and for
        pipelines their own, where it has noise.
    :param str prompt: What is given of a text or of an antibody, for models of these; for pipelines
        what to draw. For several see :func:`~pyro_twist.align.run_prompts`.
    :param int seed: The seed of everything random.
    :param str resampling: The resampling scheme of the samplers.
    :param float ess_threshold: Resample when the effective sample size is below this share.
    :param int chunk_size: The most samples for one call of the network; by default all.
    :param str negative_prompt: For pipelines, what guidance leads away from.
    :param int height: For pipelines, the height of the images in pixels.
    :param int width: Likewise their width.
    :param str judge: For pipelines, a reward that is not optimised but measured.
    :param str lookahead_decoder: For pipelines, the folder or name on the hub of a tiny autoencoder
        that stands in for theirs at look-aheads.
    :param str device: For pipelines, where they run; by default a GPU where there is one.
    :param str dtype: Likewise the precision of the network, ``"float32"``, ``"bfloat16"`` or
        ``"float16"``; by default bfloat16 on a GPU.
    :param ~pathlib.Path out: The folder of the results.
    :raises OptionError: If a number is out of range.
    """

    model: str = "emoji"
    rewards: tuple[str | Callable[..., Any], ...] = ()
    classes: tuple[str | int, ...] = ()
    methods: tuple[str, ...] = ()
    strengths: tuple[float, ...] = (3.0,)
    scales: tuple[float, ...] = ()
    guidance: float | None = None
    particles: int = 16
    steps: int | None = None
    scheduler: str | None = None
    prompt: str | None = None
    seed: int = 0
    resampling: str = "systematic"
    ess_threshold: float = 0.5
    chunk_size: int | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    judge: str | None = None
    lookahead_decoder: str | None = None
    device: str | None = None
    dtype: str | None = None
    out: Path = Path("results/align")

    def __post_init__(self) -> None:
        for name in ("rewards", "classes", "methods", "strengths", "scales"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        for name in ("strengths", "scales"):
            object.__setattr__(self, name, _as_floats(name, getattr(self, name)))
        object.__setattr__(self, "out", Path(self.out))
        self._check_range("particles", self.particles, 1, 1_000_000)
        if self.steps is not None:
            self._check_range("steps", self.steps, 1, MAX_STEPS)
        self._check_range("seed", self.seed, 0, MAX_SEED)
        self._check_range("ess-threshold", self.ess_threshold, 0, 1)
        if self.chunk_size is not None:
            self._check_range("chunk-size", self.chunk_size, 1, 1_000_000)
        if self.guidance is not None:
            self._check_range("guidance", self.guidance, -100, 100)
        for name in ("height", "width"):
            if (given := getattr(self, name)) is not None:
                self._check_range(name, given, 1, 16_384)
        self._check_numbers("strength", self.strengths)
        if self.scales:
            self._check_numbers("scale", self.scales)

    @staticmethod
    def _check_range(name: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:
            raise OptionError(f"--{name} is {value:g}; give a number from {low:,} to {high:,}")

    def _check_numbers(self, name: str, values: Sequence[float]) -> None:
        if not all(math.isfinite(value) for value in values):
            raise OptionError(f"--{name} must be finite, got {', '.join(map(str, values))}")
        if len(values) not in (1, max(1, len(self.rewards))):
            raise OptionError(
                f"--{name} is given {len(values)} times; give it once, or once for each --reward "
                "in the same order"
            )

    def check_for_no_pipeline(self) -> None:
        """
        Refuses what only pipelines have.

        :raises OptionError: If it is given.
        """
        for name in _FOR_PIPELINES:
            if getattr(self, name) is not None:
                raise OptionError(
                    f"--{_FLAGS[name]} is for pipelines of diffusers, which {self.model!r} is not; "
                    "leave it out"
                )

    def command(self) -> str:
        """The command line that does the same; options left at their defaults are left out."""
        words = ["pyro-twist", "align", self.model]
        for name in _FLAGS:
            value, default = getattr(self, name), _DEFAULTS[name]
            if value != default or name == "rewards":
                flag = "--" + _FLAGS[name]
                values = value if isinstance(value, tuple) else (value,)
                words += [text for one in values for text in (flag, word(one))]
        return shlex.join(words)


_FLAGS = {
    "rewards": "reward",
    "classes": "class",
    "methods": "method",
    "strengths": "strength",
    "scales": "scale",
    "guidance": "guidance",
    "particles": "particles",
    "steps": "steps",
    "scheduler": "scheduler",
    "prompt": "prompt",
    "seed": "seed",
    "resampling": "resampling",
    "ess_threshold": "ess-threshold",
    "chunk_size": "chunk-size",
    "negative_prompt": "negative-prompt",
    "height": "height",
    "width": "width",
    "judge": "judge",
    "lookahead_decoder": "lookahead-decoder",
    "device": "device",
    "dtype": "dtype",
    "out": "out",
}
_FOR_PIPELINES = (
    "negative_prompt",
    "height",
    "width",
    "judge",
    "lookahead_decoder",
    "device",
    "dtype",
)
_DEFAULTS = {field.name: field.default for field in fields(AlignOptions)}


def _as_tuple(value: Any) -> tuple[Any, ...]:
    single = isinstance(value, (str, int, float)) or callable(value)
    return (value,) if single else tuple(value)


def _as_floats(name: str, values: Sequence[Any]) -> tuple[float, ...]:
    try:
        return tuple(map(float, values))
    except (TypeError, ValueError):
        told = ", ".join(map(repr, values))
        raise OptionError(f"--{name.rstrip('s')} needs numbers, got {told}") from None


def word(value: Any) -> str:
    """
    What to type on the command line for a value.

    :param value: A number, a string, a path, or a function, for which the place it is imported from
        is given.
    """
    if isinstance(value, float):
        return repr(value)
    if callable(value):
        name = getattr(value, "__name__", None) or getattr(value, "name", "reward")
        return f"{getattr(value, '__module__', '?')}:{name}"
    return str(value)
