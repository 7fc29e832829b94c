# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Tables of the comparison on sequences, made from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tests.perf.comparison import Tables
from tests.perf.tables import Row, number, table

__all__ = ["SequenceTables"]

_SHOWN = (
    "base",
    "best-of-n",
    "importance",
    "tree",
    "tree, wide",
    "fk-pooled",
    "fk, 4 completions",
    "fk",
    "tri",
    "tri, one pass",
)
_COLUMNS = {
    "molecules": (("valid", 2), ("unique", 2), ("diversity", 2)),
    "text": (("fluency", 2), ("dist_1", 2), ("dist_2", 2), ("dist_3", 2)),
}


@dataclass(frozen=True)
class SequenceTables(Tables):
    """Tables whose tasks are molecules or texts; see :class:`tests.perf.comparison.Tables`."""

    fk: tuple[str, ...] = ("fk", "fk, 4 completions", "fk-pooled")
    shown: tuple[str, ...] = _SHOWN
    sampled: tuple[str, ...] = ("importance", *_SHOWN[5:])

    def rewards(self, rows: Sequence[Row], size: int) -> str:
        """A table for each kind of sequence, and what only all draws together show."""
        return "\n\n".join(
            part
            for kind in _COLUMNS
            for part in (self._of_kind(rows, size, kind), self._together(rows, size, kind))
            if part
        )

    def _tasks_of(self, kind: str) -> dict[str, Any]:
        return {name: task for name, task in self.tasks.items() if task.zoo == kind}

    def _of_kind(self, rows: Sequence[Row], size: int, kind: str) -> str:
        columns = (("reward", 2), ("best", 2), ("success", 2), ("judge", 2), *_COLUMNS[kind])
        tables = replace(self, tasks=self._tasks_of(kind), columns=columns)
        if not tables._names(rows, size):
            return ""
        text = super(SequenceTables, tables).rewards(rows, size)
        return text.replace(f"N = {size}", f"{kind}, N = {size}", 1)

    def _together(self, rows: Sequence[Row], size: int, kind: str) -> str:
        """Perplexity of texts, novelty and Fréchet distance of molecules, over all seeds."""
        names = self._names(rows, size)
        body = []
        for task in (name for name in self._tasks_of(kind) if name in names):
            title = task
            for arm in self.shown:
                drawn = _draws(rows, task, size, arm)
                if drawn:
                    body.append([title, arm, *_MEASURES[kind](drawn), str(len(drawn))])
                    title = ""
        head = ["task", "arm", *_HEADS[kind], "draws"]
        title = f"### Draws of all seeds together, {kind}, N = {size}"
        return f"{title}\n\n{table(head, body)}" if body else ""


def _draws(rows: Sequence[Row], task: str, size: int, arm: str) -> tuple[str, ...]:
    wanted = (task, size, arm)
    found = (row for row in rows if (row["task"], row["size"], row["arm"]) == wanted)
    return tuple(one for row in found for one in row.get("samples", ()))


_HEADS = {"molecules": ("unique", "novel", "FCD"), "text": ("perplexity", "unique")}


def _texts(draws: tuple[str, ...]) -> list[str]:
    """The perplexity per word under trigrams, and the share of different texts."""
    perplexity = _trigrams().perplexity(draws)
    return [number(perplexity, 0), number(len(set(draws)) / len(draws))]


@cache
def _trigrams() -> Any:
    from pyro_twist.rewards.text import TrigramLM

    return TrigramLM()


def _molecules(draws: tuple[str, ...]) -> list[str]:
    """Different ones, those of them that the training set has not, and the Fréchet distance."""
    unique = {one for one in draws if one}
    try:
        novel = number(len(unique - _training()) / len(unique))
        distance = number(_frechet(draws), 1)
    except ImportError:  # the data set and ChemNet are not installed
        novel = distance = "–"
    return [number(len(unique) / len(draws)), novel, distance]


@cache
def _training() -> frozenset[str]:
    from pyro_twist.zoo.recipes.molecules import moses

    return frozenset(moses("train"))


def _frechet(draws: tuple[str, ...]) -> float:
    from pyro_twist.zoo.recipes.molecules_report import activations, frechet

    return frechet(activations([one for one in draws if one]), _reference_features())


@cache
def _reference_features() -> Any:
    from pyro_twist.zoo.recipes.molecules import moses
    from pyro_twist.zoo.recipes.molecules_report import activations

    return activations(moses("test")[:3000])


_MEASURES = {"molecules": _molecules, "text": _texts}
