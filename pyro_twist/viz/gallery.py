# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Labelled rows of drawings in SVG, for pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Gallery", "GalleryCard", "GalleryRow"]


@dataclass(frozen=True)
class GalleryCard:
    """
    A drawing with lines of text below.

    :param str svg: An ``<svg>`` element; empty for an empty box.
    :param str title: What a reader who cannot see it is told, shown on hovering too.
    :param lines: Lines below it, the first in bold.
    :param bool faded: Whether it is drawn pale, for what is shown but not meant.
    """

    svg: str
    title: str
    lines: Sequence[str] = ()
    faded: bool = False

    def to_html(self) -> str:
        """The drawing and its lines."""
        lines = "".join(f"<span>{escape(line)}</span>" for line in self.lines)
        kind = "card faded" if self.faded else "card"
        title = escape(self.title, quote=True)
        drawing = f'<div class="drawing" role="img" aria-label="{title}">{self.svg}</div>'
        return f'<div class="{kind}" title="{title}">{drawing}{lines}</div>'


@dataclass(frozen=True)
class GalleryRow:
    """
    A row of cards.

    :param str label: What the row is.
    :param cards: The cards.
    :param notes: Lines below the label.
    :param str heading: Shown above the row; empty for none.
    """

    label: str
    cards: Sequence[GalleryCard]
    notes: Sequence[str] = ()
    heading: str = ""

    def to_html(self) -> str:
        """The heading, if there is one, the label and the cards."""
        heading = f"<h3>{escape(self.heading)}</h3>" if self.heading else ""
        notes = "".join(f"<span>{escape(note)}</span>" for note in self.notes)
        cards = "".join(card.to_html() for card in self.cards)
        label = f'<div class="label"><b>{escape(self.label)}</b>{notes}</div>'
        return f'{heading}<div class="row">{label}<div class="cards">{cards}</div></div>'


@dataclass(frozen=True)
class Gallery:
    """
    Rows of cards with a caption, a part of a :class:`~pyro_twist.viz.Section`.

    :param rows: The rows from top to bottom.
    :param str caption: Plain text below them.
    """

    rows: Sequence[GalleryRow]
    caption: str = ""

    def to_html(self) -> str:
        """The rows and the caption."""
        rows = "".join(row.to_html() for row in self.rows)
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure class="gallery">{rows}{caption}</figure>'
