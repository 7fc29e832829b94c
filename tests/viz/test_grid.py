# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest

from pyro_twist.viz import PictureRow, PictureSection, picture_grid


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, *channels)).astype(np.uint8)


def contains(image: np.ndarray, part: np.ndarray) -> bool:
    """Whether a picture occurs somewhere in another, pixel by pixel."""
    height, width = part.shape[:2]
    places = np.argwhere((image == part[0, 0]).all(-1))
    return any(np.array_equal(image[y : y + height, x : x + width], part) for y, x in places)


@pytest.mark.parametrize("side", [8, 16, 32, 96])
def test_pictures_are_enlarged_without_smoothing(side: int) -> None:
    pixels = noise(side, side, 3)
    grid = np.asarray(picture_grid([PictureSection([PictureRow("base", [pixels])])], cell=96))
    factor = 96 // side
    assert contains(grid, pixels.repeat(factor, 0).repeat(factor, 1))


@pytest.mark.parametrize("shape", [(8, 8), (8, 12, 3), (200, 100, 3)])
def test_any_shape_can_be_drawn(shape: tuple[int, ...]) -> None:
    row = PictureRow("a", [noise(*shape)] * 3, captions=["1", "2", "3"], notes=["n"], faded=1)
    sections = [PictureSection([row, PictureRow("b", [noise(*shape)])], "one")] * 2
    grid = picture_grid(sections)
    assert grid.mode == "RGB"
    assert grid.width > 3 * 96
    assert np.asarray(grid).min() < 100


def test_faded_pictures_are_paler() -> None:
    black = np.zeros((8, 8, 3), np.uint8)
    grid = picture_grid([PictureSection([PictureRow("", [black, black], faded=1)])])
    means = np.asarray(grid).mean((0, 2))
    columns = np.flatnonzero(means < 250)
    assert means[columns[10]] < means[columns[-10]]


def test_captions_must_fit() -> None:
    row = PictureRow("base", [noise(8, 8)], captions=["1", "2"])
    with pytest.raises(ValueError, match="'base' has 2 captions for 1 pictures"):
        picture_grid([PictureSection([row])])


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        picture_grid([PictureSection([PictureRow("base", [])])])
