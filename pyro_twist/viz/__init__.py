# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Pictures of samples, plots of rewards and diagnostics, and self-contained HTML pages of them.

Nothing here knows how the samples came about; matplotlib and PIL are loaded on first use.
"""

from pyro_twist.viz.changes import change_pictures
from pyro_twist.viz.grid import PictureRow, PictureSection, picture_grid
from pyro_twist.viz.page import Code, Figure, Page, Section, Table
from pyro_twist.viz.plots import StepSeries, WeightedValues, plot_rewards, plot_series

__all__ = [
    "Code",
    "Figure",
    "Page",
    "PictureRow",
    "PictureSection",
    "Section",
    "StepSeries",
    "Table",
    "WeightedValues",
    "change_pictures",
    "picture_grid",
    "plot_rewards",
    "plot_series",
]
