# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What models of molecules, texts and antibodies have in common: their samples are strings."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_twist.align.domains import Judgement, ShippedDomain
from pyro_twist.align.options import AlignOptions, OptionError, unknown
from pyro_twist.align.rewardoptions import parse_options
from pyro_twist.align.shown import Shown, ShownSection
from pyro_twist.rewards.registry import RewardRegistry

if TYPE_CHECKING:
    from pyro_twist.rewards import Reward
    from pyro_twist.rewards.samples import Input
    from pyro_twist.zoo import Entry

__all__ = ["Strings", "ZooSequences"]

Strings = np.ndarray[Any, Any]


class ZooSequences(ShippedDomain):
    """
    A masked model of :mod:`pyro_twist.zoo`; derived classes know what its strings are.

    :param str name: One of :func:`pyro_twist.zoo.models`.
    """

    default_reward = ""
    packages: tuple[str, ...] = ("transformers",)
    input: Input = "list"
    classes: tuple[str, ...] = ()
    #: What one sample is called, and the column of its string in tables.
    noun, column = "sample", "sample"

    def __init__(self, name: str) -> None:
        from pyro_twist import zoo

        self.name = name
        self._entry: Entry = zoo.entry(name)
        self.description = self._entry.description
        self._known: dict[str, tuple[float, ...]] = {}
        self._names: tuple[str, ...] = ()

    @abstractmethod
    def registry(self) -> RewardRegistry:
        """The named rewards."""

    @abstractmethod
    def figures(self, samples: Sequence[str]) -> dict[str, Tensor]:
        """What is known of strings, by name; the first is the judge's score."""

    @abstractmethod
    def judge_explained(self, with_class: bool) -> str:
        """What the judge's score is."""

    @abstractmethod
    def distances(self, samples: Strings) -> Tensor:
        """Distances between strings, of shape ``(B, B)``."""

    @abstractmethod
    def distance_explained(self) -> str:
        """What the distance is."""

    def match_class(self, given: str | int) -> int:
        """
        Refuses: there are no classes.

        :raises OptionError: Always.
        """
        raise OptionError(f"--class {given}: {self.name!r} has no classes; leave it out")

    def load(self, labels: Sequence[int], options: AlignOptions) -> Any:
        """
        Loads the model.

        :param labels: Not used: there are no classes.
        :param AlignOptions options: Steps, prompt and chunk size are used.
        :raises OptionError: If an option is for images, or the model cannot be loaded.
        """
        from pyro_twist import zoo

        for flag, value in (("guidance", options.guidance), ("scheduler", options.scheduler)):
            if value is not None:
                raise OptionError(
                    f"--{flag} is for models of images, which {self.name!r} is not; leave it out"
                )
        given: dict[str, Any] = {"num_inference_steps": options.steps}
        given["chunk_size"] = options.chunk_size
        if options.prompt is not None:
            given["prompt"] = options.prompt
        try:
            return zoo.load(self.name, **given)
        except ImportError as error:
            raise OptionError(f"{self.name!r} cannot be loaded: {error}") from None
        except ValueError as error:
            if options.prompt is None:
                raise
            raise OptionError(f"--prompt: {error}") from None

    def facts(self, options: AlignOptions, model: Any) -> list[tuple[str, str]]:
        """The prompt, if there is one, and the number of positions."""
        prompt = [] if options.prompt is None else [("prompt", options.prompt)]
        return [*prompt, ("positions", str(model.event_shape[0]))]

    def rewards(self) -> dict[str, str]:
        """The named rewards."""
        return self.registry().descriptions()

    def reward(self, name: str, argument: str) -> Reward:
        """
        Makes a reward.

        :param str name: A name from :meth:`rewards`.
        :param str argument: ``"option=value,..."``, the first option's name may be left out.
        :raises OptionError: If there is no such reward or option, or a package is missing.
        """
        registry = self.registry()
        if name not in registry.rewards:
            raise unknown("reward", name, registry.rewards)
        options = parse_options(name, argument, registry.rewards[name][0])
        try:
            reward = registry.make(name, **options)
        except (ImportError, TypeError, ValueError) as error:
            raise OptionError(f"--reward {name}: {error}") from None
        reward.name = f"{name}:{argument}" if argument else name
        return reward

    def decoded(self, model: Any, x: Tensor) -> Strings:
        """
        The strings, in an array of the batch shape.

        :param model: The model.
        :param torch.Tensor x: Its end states.
        """
        flat = model.decode(x.reshape((-1,) + tuple(model.event_shape)))
        strings = np.empty(len(flat), dtype=object)
        strings[:] = flat
        return strings.reshape(tuple(x.shape[:-1]))

    def numbers(self, samples: Strings) -> Strings:
        """The strings, as an array of characters."""
        return samples.astype(str)

    def judge(self, samples: Strings, label: int | None) -> Judgement:
        """
        Judges strings, each once.

        :param samples: Strings.
        :param int label: Not used.
        """
        texts = [str(one) for one in samples]
        new = [one for one in dict.fromkeys(texts) if one not in self._known]
        if new:
            found = self.figures(new)
            self._names = tuple(found)
            rows = zip(*(value.tolist() for value in found.values()), strict=True)
            self._known.update(zip(new, rows, strict=True))
        table = torch.tensor([self._known[one] for one in texts], dtype=torch.float64)
        columns = table.reshape(len(texts), -1).T
        return Judgement(columns[0], dict(zip(self._names[1:], columns[1:], strict=True)))

    def properties(self, samples: Strings) -> dict[str, Sequence[Any]]:
        """The strings, and the judge's figures."""
        judged = self.judge(samples, None)
        figures = {"judge": judged.score, **judged.details}
        return {self.column: list(samples), **{k: v.tolist() for k, v in figures.items()}}

    def show(self, sections: Sequence[ShownSection], caption: str) -> Shown:
        """
        A table of strings, equal ones of a method together.

        :param sections: What to show.
        :param str caption: What to say of it.
        """
        from pyro_twist.viz import Table

        several = any(section.heading for section in sections)
        rows = [
            [*([section.heading] if several else []), *cells]
            for section in sections
            for row in section.rows
            for cells in _rows(row)
        ]
        headings = ["method", "drawn", "reward", "judge", self.noun]
        table = Table([*(["class"] if several else []), *headings], rows, prose=True)
        return Shown([table, f"Beside each {self.noun}: {caption}"])


def _rows(row: Any) -> list[list[str]]:
    """A line for each different string; the method is named in the first."""
    lines: dict[tuple[str, bool], list[Any]] = {}
    returned = len(row.samples) - row.faded
    for place, text in enumerate(row.samples):
        key = (str(text), place >= returned)
        figures = [0, row.captions[place], row.judged[place], str(text)]
        lines.setdefault(key, figures)[0] += 1
    cells: list[list[str]] = []
    for (_, faded), (count, *rest) in lines.items():
        drawn = "next best" if faded else "the best" if row.faded else f"{count} of {returned}"
        cells.append(["" if cells else row.label, drawn, *rest])
    return cells


def jaccard_distances(sets: Sequence[frozenset[Any]]) -> Tensor:
    """
    One minus the size of the intersection over that of the union; 0 for two empty sets.

    :param sets: ``B`` sets.
    :returns: Of shape ``(B, B)``.
    """
    rows = [[1 - len(a & b) / max(1, len(a | b)) if a != b else 0.0 for b in sets] for a in sets]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(sets), len(sets))


def parts_of(text: str, pattern: str) -> frozenset[Any]:
    """
    What a text is made of: its parts, and pairs of parts that follow each other.

    :param str text: The text.
    :param str pattern: A regular expression for one part.
    """
    parts = re.findall(pattern, text)
    return frozenset(parts) | frozenset(zip(parts, parts[1:], strict=False))
