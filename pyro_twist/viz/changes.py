# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of changes of an image, which have a sign."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["change_pictures"]

Pixels = np.ndarray[Any, Any]

BRIGHTER, DARKER = (178, 24, 43), (33, 102, 172)


def change_pictures(change: Pixels) -> dict[str, Pixels]:
    """
    Draws a change of an image, the largest entry at full strength.

    Grey images get one picture, red where the change brightens and blue where it darkens, white
    where it does nothing. Those of colour get two, on black: the light that is added, and the
    light that is taken away.

    :param change: Of shape ``(channels, height, width)`` with one channel or three; any unit.
    :returns: uint8 arrays of shape ``(height, width, 3)`` by a caption.
    :raises ValueError: If the number of channels is another.
    """
    change = np.asarray(change, dtype=float)
    if change.ndim != 3 or change.shape[0] not in (1, 3):
        raise ValueError(
            f"change has shape {change.shape}; give (channels, height, width) with 1 or 3 channels"
        )
    scaled = change / max(float(np.abs(change).max()), 1e-300)
    if len(scaled) == 1:
        return {"change": _diverging(scaled[0])}
    return {"adds": _light(scaled), "takes away": _light(-scaled)}


def _light(values: Pixels) -> Pixels:
    return np.round(255 * values.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)


def _diverging(values: Pixels) -> Pixels:
    end = np.where(values[..., None] > 0, BRIGHTER, DARKER)
    share = np.abs(values)[..., None]
    return np.round(255 * (1 - share) + end * share).astype(np.uint8)
