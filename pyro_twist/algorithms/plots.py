# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""A picture of a comparison: each algorithm a row, each seed a dot, the mean with its interval."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_twist.algorithms.compare import Comparison

__all__ = ["plot_comparison"]

INK, SOFT, ACCENT = "#1f2933", "#9aa5b1", "#d1495b"
_PANELS = {"objective": "mean reward, in nats", "log_normalizer": "log Z"}


def plot_comparison(
    comparison: Comparison, *, figures: tuple[str, ...] = ("objective", "log_normalizer")
) -> Figure:
    """
    Draws figures of a comparison side by side.

    Samplers of the tilted law are filled, everything else is hollow: a maximiser's reward is no
    expectation.

    :param Comparison comparison: The comparison.
    :param tuple figures: Which figures, one panel each.
    :returns: The figure.
    :raises ImportError: If matplotlib is not installed.
    """
    plt = _pyplot()
    names = comparison.names
    size = (4.2 * len(figures) + 1.6, 0.32 * len(names) + 1.1)
    options = {"sharey": True, "squeeze": False, "layout": "constrained"}
    canvas, axes = plt.subplots(1, len(figures), figsize=size, **options)
    for panel, figure in zip(axes[0], figures, strict=True):
        _draw(panel, comparison, names, figure)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    return canvas


def _draw(axes: Axes, comparison: Comparison, names: list[str], figure: str) -> None:
    for row, name in enumerate(names):
        values = [v for v in comparison.values(name, figure).values() if math.isfinite(v)]
        if not values:
            continue
        estimate = comparison.estimate(name, figure)
        error = 0.0 if math.isnan(estimate.error) else estimate.error
        exact = comparison.returns(name) == "samples of the tilted law"
        face = ACCENT if exact else "white"
        axes.plot(values, [row] * len(values), "|", color=SOFT, markersize=7)
        style: dict[str, Any] = {
            "color": ACCENT,
            "markerfacecolor": face,
            "capsize": 2,
            "markersize": 5,
        }
        axes.errorbar(estimate.mean, row, xerr=error, fmt="o", **style)
    axes.set_xlabel(_PANELS.get(figure, figure))
    axes.grid(axis="x", color=SOFT, alpha=0.3, linewidth=0.6)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install pyro-twist[plots]") from error
    return plt
