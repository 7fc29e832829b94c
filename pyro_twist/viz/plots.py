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

__all__ = ["StepSeries", "WeightedValues", "plot_rewards", "plot_series"]

INK, SOFT, ACCENT = "#1f2933", "#9aa5b1", "#d1495b"

Panels = Mapping[str, Sequence["WeightedValues"]]


@dataclass(frozen=True)
class StepSeries:
    """
    A number for every step.

    :param str title: What is shown.
    :param steps: The steps.
    :param values: A number for each.
    :param str label: The label of the axis of values.
    :param reference: Where to draw a dotted line: a number, or one for each step.
    """

    title: str
    steps: Sequence[int]
    values: Sequence[float]
    label: str
    reference: float | Sequence[float] | None = None

    @property
    def references(self) -> Sequence[float]:
        """The reference for every step; empty if there is none."""
        if self.reference is None or isinstance(self.reference, Sequence):
            return self.reference or ()
        return [self.reference] * len(self.steps)


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
    columns = 1 if len(panels) == 1 else 2
    lines = -(-len(panels) // columns)
    tallest = max(len(methods) for methods in panels.values())
    figure = new_figure(8.5, lines * (0.55 * tallest + 0.9))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, methods) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, methods)
        axis.set_title(title, fontsize="medium", loc="left", color=INK)
        axis.set_xlabel(unit)
        axis.xaxis.set_tick_params(labelbottom=True)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """
    An empty figure that no window is opened for.

    :param float width: In inches, as the height.
    :param float height: The height.
    :raises ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'pyro-twist[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_series(series: Sequence[StepSeries], *, last: int | None = None) -> Figure:
    """
    Numbers by step, a panel for each series, side by side.

    :param series: What to draw.
    :param int last: The last step of the axis; by default the last of any series.
    :returns: The figure.
    :rtype: ~matplotlib.figure.Figure
    :raises ImportError: If matplotlib is not installed.
    """
    end = max(max(one.steps) for one in series) if last is None else last
    figure = new_figure(4.25 * max(2, len(series)), 2.6)
    axes = figure.subplots(1, len(series), squeeze=False)[0]
    for axis, one in zip(axes, series, strict=True):
        _draw_series(axis, one, end)
    return figure


def _draw_series(axis: Axes, series: StepSeries, end: int) -> None:
    known = [0.0, 1.0, *series.references]
    style: dict[str, Any] = {"color": SOFT, "linewidth": 0.9, "linestyle": ":"}
    top = max(*known, *series.values)
    axis.plot(series.steps, series.values, color=ACCENT, linewidth=1.8)
    if isinstance(series.reference, Sequence):
        axis.plot(series.steps, series.reference, **style, zorder=0)
    elif series.reference is not None:
        axis.axhline(series.reference, **style, zorder=0)
    # a margin, so that lines at the edge of the range can be seen
    axis.set(xlim=(0, max(end, 1)), ylim=(min(*known, *series.values) - 0.04 * top, 1.08 * top))
    axis.set(xlabel="step, from noise to sample", ylabel=series.label)
    axis.set_title(series.title, fontsize="medium", loc="left", color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e4e7eb", linewidth=0.6)
    axis.set_axisbelow(True)


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
