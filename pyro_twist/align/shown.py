# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Samples to be shown side by side, whatever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Shown", "ShownRow", "ShownSection"]


@dataclass(frozen=True)
class ShownRow:
    """
    Samples of one method.

    :param str label: The method.
    :param samples: A batch of samples.
    :param captions: A short text for each: its reward.
    :param judged: The judge's score of each.
    :param notes: Lines on the method.
    :param int faded: The last so many are shown but not what the method returns.
    """

    label: str
    samples: Any
    captions: Sequence[str]
    judged: Sequence[str]
    notes: Sequence[str] = ()
    faded: int = 0


@dataclass(frozen=True)
class ShownSection:
    """
    Rows of one class.

    :param rows: The rows.
    :param str heading: The class; empty for none.
    """

    rows: Sequence[ShownRow]
    heading: str = ""


@dataclass(frozen=True)
class Shown:
    """
    What was made of it.

    :param parts: Parts of a page.
    :param dict files: Pictures to write beside the page, by file name.
    """

    parts: Sequence[Any] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
