# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Plots that compare samplers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["WeightedValues", "plot_rewards"]

INK, SOFT, ACCENT = "#1f2933", "#9aa5b1", "#d1495b"

Panels = Mapping[str, Sequence["WeightedValues"]]


@dataclass(frozen=True)
class WeightedValues:
    """
    The rewards that one method found.

    :param str label: The name of the method.
    :param values: One number per particle; minus infinity is not drawn.
    :param weights: One weight per particle, summing to one.
    :param str kind: ``"samples"``, or ``"maximiser"``, which is drawn in another colour.
    """

    label: str
    values: np.ndarray[Any, Any]
    weights: np.ndarray[Any, Any]
    kind: str = "samples"


def plot_rewards(panels: Panels, *, unit: str = "reward") -> Figure:
    """
    Rewards of every particle, a line for each method, the area of a dot its weight.

    The bar is the weighted mean. Particles without weight are shown as small crosses. A vertical
    line continues the mean of the first method, the reference.

    :param panels: For each panel, by its title, the methods from top to bottom.
    :param str unit: The label of the axis of rewards.
    :returns: The figure.
    :rtype: ~matplotlib.figure.Figure
    :raises ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'pyro-twist[plots]'") from error
    columns = 1 if len(panels) == 1 else 2
    lines = -(-len(panels) // columns)
    tallest = max(len(methods) for methods in panels.values())
    height = lines * (0.55 * tallest + 0.9)
    figure = Figure(figsize=(8.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, methods) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, methods)
        axis.set_title(title, fontsize="medium", loc="left", color=INK)
        axis.set_xlabel(unit)
        axis.xaxis.set_tick_params(labelbottom=True)
    return figure


def _draw_panel(axis: Axes, methods: Sequence[WeightedValues]) -> None:
    for place, method in enumerate(methods):
        _draw_method(axis, place, method)
    if methods and np.isfinite(_mean(methods[0])):
        axis.axvline(_mean(methods[0]), color=SOFT, linewidth=0.8, linestyle=":", zorder=0)
    axis.set_yticks(range(len(methods)), [method.label for method in methods])
    axis.set_ylim(len(methods) - 0.4, -0.6)
    axis.tick_params(length=0)
    axis.locator_params(axis="x", nbins=6)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="#e4e7eb", linewidth=0.6)
    axis.set_axisbelow(True)


def _draw_method(axis: Axes, place: int, method: WeightedValues) -> None:
    colour = ACCENT if method.kind == "maximiser" else INK
    finite = np.isfinite(method.values)
    alive = finite & (method.weights > 1e-4)
    values, weights = method.values[alive], method.weights[alive]
    # one particle with all the weight would cover its neighbours
    areas = np.clip(60.0 * weights * len(method.values), 4.0, 160.0)
    heights = np.full(len(values), float(place))
    axis.scatter(values, heights, areas, color=colour, alpha=0.45, linewidth=0)
    dead = method.values[finite & ~alive]
    axis.plot(dead, np.full(len(dead), float(place)), "x", color=SOFT, markersize=4)
    mean = _mean(method)
    if np.isfinite(mean):
        axis.plot([mean, mean], [place - 0.3, place + 0.3], color=colour, linewidth=2)


def _mean(method: WeightedValues) -> float:
    counted = method.weights > 0
    return float(np.dot(method.weights[counted], method.values[counted]))
