# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of the directions in which images are pushed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_twist.twists.summary import Direction
from pyro_twist.viz import Figure, PictureRow, PictureSection, change_pictures, picture_grid
from pyro_twist.viz.page import png_bytes

if TYPE_CHECKING:
    from pyro_twist.align.outcome import Outcome

__all__ = ["push_picture"]

_PUSH = (
    "The pictures: the mean of this run's samples, left of it the same pushed the other way, right "
    "of it pushed, each as far as shows well; then the push itself, {key}."
)
_KEYS = {
    1: "red where it brightens, blue where it darkens and white where it does nothing",
    3: "the light it adds and the light it takes away, black where it does nothing",
}


def push_picture(model: Any, outcome: Outcome, shown: list[Direction]) -> Figure:
    """
    Mean samples, pushed back and pushed, and the pushes themselves.

    :param model: Decodes to images of shape ``(B, C, H, W)``.
    :param Outcome outcome: The job, on images.
    :param shown: The directions.
    """
    from pyro_twist.align.learned import told_of

    sections = []
    for panel in shown:
        rows = [_push_row(model, panel, outcome, p) for p in range(len(panel.at))]
        sections.append(PictureSection(rows, panel.title if len(shown) > 1 else ""))
    key = _KEYS[model.decode(shown[0].at).shape[1]]
    caption = [*(told_of(panel) for panel in shown), _PUSH.format(key=key)]
    return Figure(png_bytes(picture_grid(sections)), " ".join(caption), "The learned push")


def _push_row(model: Any, panel: Direction, outcome: Outcome, p: int) -> PictureRow:
    at, change = panel.at[p], panel.change[p]
    samples = model.decode(torch.stack([at - change, at, at + change]))
    changes = change_pictures(_decoded(model, change).cpu().numpy())
    several, domain = len(panel.at) == len(outcome.labels), _images(outcome)
    return PictureRow(
        label=outcome.heading(p) if several else "",
        pictures=[*domain.pictures(samples), *changes.values()],
        captions=["pushed back", "mean sample", "pushed", *changes],
    )


def _images(outcome: Outcome) -> Any:
    """The domain, which is one of images."""
    return outcome.domain


def _decoded(model: Any, change: Tensor) -> Tensor:
    """A small change, decoded; around zero, where no pixel is clamped."""
    small = 0.5 * change / change.abs().max().clamp(min=1e-30)
    plus, minus = model.decode(torch.stack([small, -small]))
    return plus - minus
