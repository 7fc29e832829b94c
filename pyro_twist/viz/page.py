# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Self-contained HTML pages: text, tables and pictures in one file that refers to nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Protocol

__all__ = ["Code", "Figure", "Page", "Part", "Section", "Table"]


class Part(Protocol):
    """Anything that can stand in a section."""

    def to_html(self) -> str:
        """Its HTML, which refers to nothing outside the page."""


@dataclass(frozen=True)
class Code:
    """
    Something to be typed as it is.

    :param str text: The lines.
    """

    text: str

    def to_html(self) -> str:
        """The lines in a box that scrolls sideways."""
        return f"<pre>{escape(self.text)}</pre>"


@dataclass(frozen=True)
class Figure:
    """
    A picture with a caption.

    :param content: A matplotlib figure, a PIL image, or the bytes of a PNG file.
    :param str caption: Plain text below it.
    :param str alt: What a reader who cannot see it is told; by default the caption.
    """

    content: Any
    caption: str = ""
    alt: str = ""

    def to_html(self) -> str:
        """The picture and its caption, the bytes inside."""
        data = base64.b64encode(png_bytes(self.content)).decode("ascii")
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        alt = escape(self.alt or self.caption, quote=True)
        return f'<figure><img src="data:image/png;base64,{data}" alt="{alt}">{caption}</figure>'


@dataclass(frozen=True)
class Table:
    """
    A table; numbers are right-aligned.

    :param columns: The headings.
    :param rows: The cells, already formatted.
    :param explanations: A sentence for each column, listed below the table and shown on hovering.
    :param bool prose: Whether the cells are text, to be left-aligned and wrapped.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    explanations: Sequence[str] = ()
    prose: bool = False

    def to_html(self) -> str:
        """The table, in a box that scrolls sideways on narrow screens."""
        told = self.explanations or [""] * len(self.columns)
        head = "".join(
            f'<th title="{escape(text, quote=True)}">{escape(name)}</th>'
            for name, text in zip(self.columns, told, strict=True)
        )
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        kind = ' class="prose"' if self.prose else ""
        table = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'<div class="scroll">{table}</div>{self._legend()}'

    def _legend(self) -> str:
        if not self.explanations:
            return ""
        pairs = zip(self.columns, self.explanations, strict=True)
        items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
        return f"<dl>{items}</dl>"


@dataclass(frozen=True)
class Section:
    """
    A heading and what is below it.

    :param str heading: The heading.
    :param parts: Strings, which become paragraphs, tables, figures, code and other
        parts, in order.
    :param bool side_by_side: Whether figures are put in two columns where there is room.
    """

    heading: str
    parts: Sequence[str | Part] = ()
    side_by_side: bool = False

    def to_html(self) -> str:
        """The section."""
        body = "".join(map(_part_to_html, self.parts))
        body = f'<div class="columns">{body}</div>' if self.side_by_side else body
        return f"<section><h2>{escape(self.heading)}</h2>{body}</section>"


def _part_to_html(part: str | Part) -> str:
    return f"<p>{escape(part)}</p>" if isinstance(part, str) else part.to_html()


@dataclass(frozen=True)
class Page:
    """
    A whole page.

    :param str title: Its title.
    :param str lead: A sentence or two below the title.
    :param facts: Pairs of a name and a value, shown as a strip at the top.
    :param sections: The sections.
    :param str warning: Shown in a box at the top, if there is one.
    :param str footer: The last line.
    :param str code: A command to show in the last section as it is typed.
    """

    title: str
    lead: str = ""
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = field(default_factory=tuple)
    warning: str = ""
    footer: str = ""
    code: str = ""

    def to_html(self) -> str:
        """
        The page as one HTML file without scripts, links or fonts of others.

        :returns: The text of the file.
        """
        facts = "".join(
            f"<div><span>{escape(name)}</span><b>{escape(value)}</b></div>"
            for name, value in self.facts
        )
        warning = f'<p class="warning" role="alert">{escape(self.warning)}</p>'
        parts = [
            f"<h1>{escape(self.title)}</h1>",
            f'<p class="lead">{escape(self.lead)}</p>' if self.lead else "",
            warning if self.warning else "",
            f'<div class="facts">{facts}</div>' if facts else "",
            *(section.to_html() for section in self.sections),
            Section("Run it again", [Code(self.code)]).to_html() if self.code else "",
            f"<footer>{escape(self.footer)}</footer>" if self.footer else "",
        ]
        return _FRAME.format(
            title=escape(self.title), style=_STYLE, body="\n".join(filter(None, parts))
        )


def png_bytes(content: Any) -> bytes:
    """
    A picture as the bytes of a PNG file.

    :param content: A matplotlib figure, a PIL image, or such bytes.
    """
    if isinstance(content, bytes):
        return content
    buffer = io.BytesIO()
    if hasattr(content, "savefig"):
        content.savefig(buffer, format="png", dpi=140)
    else:
        content.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --accent: #d1495b; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 0 0 12px; }
.lead { color: var(--soft); font-size: 1.08rem; margin: 0 0 20px; max-width: 62em; }
.warning { background: #fdecee; border-left: 4px solid var(--accent); padding: 12px 16px;
  border-radius: 6px; }
.facts { display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 24px; }
.facts div { background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 6px 14px; }
.facts span { display: block; font-size: .75rem; color: var(--soft); }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 22px 26px;
  margin-bottom: 20px; }
section p { max-width: 75em; }
figure { margin: 12px 0 4px; }
figure + figure { margin-top: 28px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 8px 28px; }
.columns > p { grid-column: 1 / -1; margin: 0; }
.columns figure { margin: 12px 0 4px; }
img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: 8px; max-width: 75em; }
.scroll { overflow-x: auto; margin: 8px 0 4px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-size: .82rem; color: var(--soft); font-weight: 600;
  vertical-align: bottom; }
td { text-align: right; white-space: nowrap; }
th, td { padding: 8px 10px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
td:first-child { font-weight: 600; }
.prose th, .prose td { text-align: left; }
.prose td:last-child { white-space: normal; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: .9rem;
  margin: 16px 0 0; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--soft); }
pre { background: #1f2933; color: #f5f7fa; border-radius: 8px; padding: 14px 16px; margin: 0;
  overflow-x: auto; font: .88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.gallery h3 { font-size: 1rem; margin: 18px 0 8px; }
.row { display: grid; grid-template-columns: 150px 1fr; gap: 6px 18px; padding: 12px 0;
  border-bottom: 1px solid var(--line); }
.label span, .card span { display: block; font-size: .8rem; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(178px, 1fr)); gap: 10px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 6px 8px; text-align: center; }
.card span:first-of-type { font-weight: 600; color: var(--ink); }
.card .drawing { aspect-ratio: 4 / 3; }
.card svg { width: 100%; height: 100%; display: block; }
.faded { opacity: .42; }
footer { color: var(--soft); font-size: .85rem; padding: 4px 2px; }
@media (max-width: 640px) { .row { grid-template-columns: 1fr; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; }
  section { padding: 16px; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
