# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Pictures of samples, plots of rewards and diagnostics, and self-contained HTML pages of them.

Nothing here knows how the samples came about. Modules are imported on first use, so that a page of
texts loads nothing that is for pictures.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_twist.viz.changes import change_pictures
    from pyro_twist.viz.gallery import Gallery, GalleryCard, GalleryRow
    from pyro_twist.viz.grid import PictureRow, PictureSection, picture_grid
    from pyro_twist.viz.molecules import molecule_picture, molecule_svg
    from pyro_twist.viz.page import Code, Figure, Page, Part, Section, Table
    from pyro_twist.viz.plots import StepSeries, WeightedValues, plot_rewards, plot_series

__all__ = [
    "Code",
    "Figure",
    "Gallery",
    "GalleryCard",
    "GalleryRow",
    "Page",
    "Part",
    "PictureRow",
    "PictureSection",
    "Section",
    "StepSeries",
    "Table",
    "WeightedValues",
    "change_pictures",
    "molecule_picture",
    "molecule_svg",
    "picture_grid",
    "plot_rewards",
    "plot_series",
]

_HOMES = {
    "changes": ("change_pictures",),
    "gallery": ("Gallery", "GalleryCard", "GalleryRow"),
    "grid": ("PictureRow", "PictureSection", "picture_grid"),
    "molecules": ("molecule_picture", "molecule_svg"),
    "page": ("Code", "Figure", "Page", "Part", "Section", "Table"),
    "plots": ("StepSeries", "WeightedValues", "plot_rewards", "plot_series"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name the first time it is asked for."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
