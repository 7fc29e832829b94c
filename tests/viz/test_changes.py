# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest

from pyro_twist.viz import change_pictures


def test_grey_changes_have_a_sign() -> None:
    [picture] = change_pictures(np.array([[[4.0, -2.0, 0.0]]])).values()
    bright, dark, none = picture[0].astype(int)
    assert bright[0] > bright[2] + 100
    assert dark[2] > dark[0] + 50
    assert none.tolist() == [255, 255, 255]
    # half the change is half the distance from white
    [stronger] = change_pictures(np.array([[[4.0, -4.0, 0.0]]])).values()
    assert np.allclose(255 - dark, (255 - stronger[0, 1].astype(int)) / 2, atol=1)


def test_coloured_changes_are_light_added_and_taken() -> None:
    change = np.zeros((3, 1, 2))
    change[1, 0, 0], change[0, 0, 1] = 0.1, -0.05
    adds, takes = change_pictures(change).values()
    assert adds.tolist() == [[[0, 255, 0], [0, 0, 0]]]
    assert takes.tolist() == [[[0, 0, 0], [128, 0, 0]]]


def test_no_change_at_all() -> None:
    [picture] = change_pictures(np.zeros((1, 2, 2))).values()
    assert (picture == 255).all()


@pytest.mark.parametrize("shape", [(8, 8), (2, 8, 8)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="1 or 3 channels"):
        change_pictures(np.zeros(shape))
