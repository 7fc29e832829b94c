# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from pyro_twist.viz import (
    Gallery,
    GalleryCard,
    GalleryRow,
    Page,
    Section,
    molecule_picture,
    molecule_svg,
)
from tests.viz.test_page import Checker


def test_galleries_are_well_formed_and_escaped() -> None:
    cards = [
        GalleryCard("<svg viewBox='0 0 1 1'></svg>", 'a "<title>"', ["1 < 2", "x"]),
        GalleryCard("", "empty", faded=True),
    ]
    gallery = Gallery([GalleryRow("fk <1>", cards, ["note & more"], "class <3>")], "a <caption>")
    html = Page("t", sections=[Section("Samples", [gallery])]).to_html()
    checker = Checker()
    checker.feed(html)
    assert checker.open == [] and checker.references == []
    for text in ("1 < 2", "fk <1>", "note & more", "class <3>", "a <caption>"):
        assert text in checker.text
    assert html.count('class="card faded"') == 1
    assert "&quot;&lt;title&gt;&quot;" in html


def test_molecules_are_drawn() -> None:
    pytest.importorskip("rdkit")
    drawn = molecule_svg("c1ccncc1CO", 120, 90)
    checker = Checker()
    checker.feed(drawn)
    assert checker.open == []
    assert drawn.startswith('<svg viewBox="0 0 120 90">') and drawn.count("<path") > 8
    assert not re.search(r"https?:|xmlns|<\?xml|class=|<script|<image", drawn)
    assert molecule_svg("") == molecule_svg("C(((") == ""


def test_molecules_are_pictures_too() -> None:
    pytest.importorskip("rdkit")
    pixels = molecule_picture("c1ccncc1CO", 120, 90)
    assert pixels.shape == (90, 120, 3) and pixels.dtype == np.uint8
    dark = (pixels < 128).any(-1).mean()
    assert 0.01 < dark < 0.3
    assert (molecule_picture("", 20, 10) == 255).all()


def test_names_are_imported_on_first_use() -> None:
    code = (
        "import sys, pyro_twist.viz as viz\nviz.Page, viz.Table\n"
        "print([name for name in sys.modules if name.startswith('pyro_twist.viz.')])\n"
        "print(set(viz.__all__) <= set(dir(viz)), all(hasattr(viz, n) for n in viz.__all__))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["['pyro_twist.viz.page']", "True True"]
    import pyro_twist.viz

    with pytest.raises(AttributeError, match="has no attribute 'picture'"):
        pyro_twist.viz.picture  # noqa: B018
