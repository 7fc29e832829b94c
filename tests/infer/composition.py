# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The table of what composes, collected from the tests that prove it.

``python -m tests.infer.composition`` writes it to ``docs/composition_table.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["MODULES", "PAGE", "ROWS", "composes", "refuses", "table"]

#: The tests with rows, in the order of the page.
MODULES = (
    "tests.infer.test_handlers",
    "tests.test_hierarchies",
    "tests.test_preferences",
    "tests.diffusion.test_products",
    "tests.test_instrument",
    "tests.infer.test_evidence",
    "tests.infer.test_moves",
    "tests.infer.test_views",
    "tests.test_statespace",
)

PAGE = Path(__file__).parents[2] / "docs" / "composition_table.md"

_HEAD = """---
orphan: true
---

# What composes, how, and what does not

<!-- Written by `python -m tests.infer.composition`; change the tests instead. -->

<!-- table -->
"""

_Test = TypeVar("_Test", bound=Callable[..., Any])


@dataclass(frozen=True)
class Row:
    """What is put together, what that means, whether it is refused, and the test of it."""

    group: str
    what: str
    meaning: str
    refused: bool
    test: str
    module: str


ROWS: list[Row] = []


def composes(group: str, what: str, meaning: str) -> Callable[[_Test], _Test]:
    """Adds a row about something that works, tested exactly by the decorated function."""
    return _row(group, what, meaning, refused=False)


def refuses(group: str, what: str, meaning: str) -> Callable[[_Test], _Test]:
    """Adds a row about something that is refused, or does not reach, with what to do instead."""
    return _row(group, what, meaning, refused=True)


def _row(group: str, what: str, meaning: str, *, refused: bool) -> Callable[[_Test], _Test]:
    def registered(test: _Test) -> _Test:
        ROWS.append(Row(group, what, meaning, refused, test.__name__, test.__module__))
        return test

    return registered


def table() -> str:
    """The page, from the rows in the order of the tests."""
    for module in MODULES:
        import_module(module)
    groups = dict.fromkeys(row.group for row in _rows())
    return _HEAD + "".join(f"\n{_section(group)}" for group in groups)


def _rows() -> list[Row]:
    return sorted(ROWS, key=lambda row: MODULES.index(row.module))


def _section(group: str) -> str:
    lines = [f"**{group}**", "", "| what | | how | test |", "| --- | --- | --- | --- |"]
    for row in _rows():
        if row.group == group:
            sign = "no" if row.refused else "yes"
            lines.append(f"| {row.what} | {sign} | {row.meaning} | `{row.test}` |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page."""
    shared = import_module("tests.infer.composition")
    PAGE.write_text(shared.table(), encoding="utf-8")
    print(f"{len(shared.ROWS)} rows in {PAGE}")


if __name__ == "__main__":
    main()
