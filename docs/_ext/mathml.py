# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Renders TeX to MathML when the pages are built, so that they need no script and no network."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx

logger = logging.getLogger(__name__)

# What latex2mathml leaves to be desired: TeX before, MathML after the conversion.
FUNCTION = "(<mi>(?:log|exp|max|min)</mi>)"
THIN = '<mspace width="0.17em" />'
BEFORE = ((r"(begin|end)\{aligned\}", r"\1{split}"),)
AFTER = (
    (
        r"<msup>(<mi>\w+</mi>)<mi>&#x02032;</mi></msup>",
        r'\1<mo lspace="0" rspace="0">&#x02032;</mo>',
    ),
    (r"<mo>([a-z]{2,})</mo>", r"<mi>\1</mi>"),
    # A thin space on either side of a function, unless a bracket or an operator is there.
    (rf"(?<!<msub>){FUNCTION}(?=<m[ifrsu]|<mover)", rf"\1{THIN}"),
    (rf"(<msub>{FUNCTION}(?:<mi>[^<]*</mi>|<mrow>(?:(?!<mrow>).)*?</mrow>)</msub>)", rf"\1{THIN}"),
    (rf"(</m(?:i|n|sub|sup|subsup|over|frac)>)(?=(?:<msub>)?{FUNCTION})", rf"\1{THIN}"),
)


def substitute(rules: tuple[tuple[str, str], ...], text: str) -> str:
    """Applies regular expressions one after the other."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def mathml(node: nodes.Element, display: str) -> str:
    """
    The MathML of a formula.

    :param ~docutils.nodes.Element node: A node whose text is TeX.
    :param str display: Either ``"inline"`` or ``"block"``.
    """
    tex = node.astext().strip()
    try:
        found = substitute(AFTER, convert(substitute(BEFORE, tex), display=display))
    except Exception as error:
        logger.warning("cannot render %r: %r", tex, error, location=node)
        return ""
    # What the converter does not know it passes on.
    if "\\" in found or "<mi>&" in re.sub("&#x?[0-9A-F]+;", "", found):
        logger.warning("a command in %r is not known to latex2mathml", tex, location=node)
    return found


def visit_inline(translator: Any, node: nodes.Element) -> None:
    """Writes a formula in a line."""
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.Element) -> None:
    """Writes a formula of its own, which scrolls where it is wider than the page."""
    translator.body.append(translator.starttag(node, "div", CLASS="math-block"))
    translator.body.append(mathml(node, "block"))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the renderer under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
