# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What all models of images have in common: distances of pixels, and grids of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_twist.align.shown import Shown, ShownSection

if TYPE_CHECKING:
    from pyro_twist.rewards.samples import Input

__all__ = ["Pictures"]


class Pictures:
    """The part of a :class:`~pyro_twist.align.Domain` that is about pictures."""

    input: Input = "tensor"
    packages: tuple[str, ...] = ("diffusers",)
    #: The side of a picture on the grid, in pixels.
    cell = 96

    def distances(self, samples: Tensor) -> Tensor:
        """
        Root mean squared differences of pixels.

        :param torch.Tensor samples: Images in [0, 1] of shape ``(B, C, H, W)``.
        :returns: Of shape ``(B, B)``.
        """
        rows = samples.flatten(1).double()
        # by differences: the expanded square would not give exact zeros for copies
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(rows, rows, compute_mode=exact) / rows.shape[1] ** 0.5

    def distance_explained(self) -> str:
        """What the distance is."""
        return "the root mean squared difference of pixels in [0, 1]"

    def decoded(self, model: Any, x: Tensor) -> Tensor:
        """
        The images, as the model decodes them.

        :param model: The model.
        :param torch.Tensor x: Its end states.
        """
        images: Tensor = model.decode(x)
        return images

    def numbers(self, samples: Tensor) -> Tensor:
        """The pixels, in float32."""
        return samples.float()

    def properties(self, samples: Tensor) -> dict[str, Sequence[Any]]:
        """None: pixels are in no table."""
        return {}

    def show(self, sections: Sequence[ShownSection], caption: str) -> Shown:
        """
        A grid of pictures.

        :param sections: What to show.
        :param str caption: What to say of it.
        """
        from pyro_twist.viz import Figure, PictureRow, PictureSection, picture_grid
        from pyro_twist.viz.page import png_bytes

        drawn = [
            PictureSection(
                [
                    PictureRow(r.label, self.pictures(r.samples), r.captions, r.notes, r.faded)
                    for r in section.rows
                ],
                section.heading,
            )
            for section in sections
        ]
        content = png_bytes(picture_grid(drawn, cell=self.cell))
        figure = Figure(content, f"Below each picture: {caption}", "Samples of each method")
        return Shown([figure], {"grid.png": content})

    def pictures(self, samples: Tensor) -> list[np.ndarray[Any, Any]]:
        """
        Images as arrays.

        :param torch.Tensor samples: Images in [0, 1] of shape ``(B, C, H, W)``.
        """
        rgb = (samples.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return list(rgb.permute(0, 2, 3, 1).contiguous().cpu().numpy())
