# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from pyro_twist.viz import Code, Figure, Page, Section, Table, WeightedValues, plot_rewards

VOID = {"meta", "img"}


class Checker(HTMLParser):
    """Notes unclosed tags and everything that a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page() -> Page:
    from PIL import Image

    table = Table(["a", "b <x>"], [["1", "2 & 3"]], ["first", 'the "second"'])
    figure = Figure(Image.new("RGB", (3, 2), "red"), "a <caption>")
    prose = Table(["x"], [["y"]], prose=True)
    code = Code("if a < b:\n    pass")
    sections = [Section("One", ["text <b>", table, prose, code]), Section("Two", [figure], True)]
    facts = [("model", "<emoji>")]
    return Page("T & U", "lead", facts, sections, "warning <i>", "footer", "run 'a' > b")


def test_page_is_well_formed_and_refers_to_nothing() -> None:
    html = page().to_html()
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.references
    assert all(source.startswith("data:image/png;base64,") for source in checker.references)
    assert not re.search(r"https?:|@import|url\(|<script|<link", html)


def test_text_is_escaped() -> None:
    checker = Checker()
    checker.feed(page().to_html())
    for text in (
        "T & U",
        "<emoji>",
        "b <x>",
        "2 & 3",
        "text <b>",
        "warning <i>",
        "run 'a' > b",
        "if a < b:\n",
    ):
        assert text in checker.text


def test_pictures_survive() -> None:
    from PIL import Image

    [data] = re.findall(r"base64,([^\"]+)", page().to_html())
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (3, 2)
    assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_empty_page() -> None:
    checker = Checker()
    checker.feed(Page("empty").to_html())
    assert checker.open == []


@pytest.mark.parametrize("panels", [1, 2, 3])
def test_rewards_can_be_plotted(panels: int) -> None:
    values = np.array([0.0, 1.0, -np.inf, 2.0])
    even = WeightedValues("base", values, np.full(4, 0.25))
    tilted = WeightedValues("fk", values, np.array([0.2, 0.3, 0.0, 0.5]))
    best = WeightedValues("best", values, np.array([0.0, 0.0, 0.0, 1.0]), "maximiser")
    figure = plot_rewards({f"class {p}": [even, tilted, best] for p in range(panels)})
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["base", "fk", "best"]
    assert Figure(figure).to_html().startswith("<figure><img")
