# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Plots of a run's diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_twist.infer.result import Diagnostics, SMCResult
    from pyro_twist.infer.trustregiontwist import Iteration

__all__ = [
    "plot_diagnostics",
    "plot_ess",
    "plot_genealogy",
    "plot_increments",
    "plot_iterations",
]

INK, SOFT, ACCENT = "#1f2933", "#9aa5b1", "#d1495b"


def plot_diagnostics(result: SMCResult, *, max_lines: int = 400) -> Figure:
    """
    Effective sample size, log-normaliser increments and, if kept, the genealogy of a run.

    :param SMCResult result: The result of a run.
    :param int max_lines: Draw the genealogy of at most so many final particles.
    :returns: The figure.
    :raises ImportError: If matplotlib is not installed.
    :raises ValueError: If the result has no diagnostics.
    """
    diagnostics = _diagnostics(result)
    panels = 3 if diagnostics.ancestors is not None else 2
    figure, axes = _new_figure(panels)
    plot_ess(diagnostics, axes[0], result.num_particles)
    plot_increments(diagnostics, axes[1])
    if panels == 3:
        plot_genealogy(diagnostics, axes[2], max_lines=max_lines)
    axes[-1].set_xlabel("step")
    return figure


def _diagnostics(result: SMCResult) -> Diagnostics:
    if result.diagnostics is None:
        raise ValueError(
            "this result has no diagnostics to plot; those of pooled passes are with the single "
            "ones, as in TrustRegionTwist.last"
        )
    return result.diagnostics


def _new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'pyro-twist[plots]'") from error
    figure = Figure(figsize=(7, 2.1 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _columns(series: torch.Tensor) -> np.ndarray[Any, Any]:
    return series.reshape(len(series), -1).cpu().numpy()


def plot_ess(diagnostics: Diagnostics, axis: Axes, num_particles: int) -> None:
    """
    Effective sample sizes by step, a line for each population; dots where it resampled.

    :param Diagnostics diagnostics: The diagnostics of a run.
    :param axis: Where to draw.
    :param int num_particles: The number of particles, the top of the scale.
    """
    ess, resampled = _columns(diagnostics.ess), _columns(diagnostics.resampled)
    steps = np.arange(len(ess))
    for line, drawn in zip(ess.T, resampled.T, strict=True):
        axis.plot(steps, line, color=INK, linewidth=1.2)
        axis.plot(steps[drawn], line[drawn], "o", color=ACCENT, markersize=4)
    axis.plot([], [], "o", color=ACCENT, markersize=4, label="resampled")
    axis.set(ylim=(0, 1.05 * num_particles), ylabel="effective\nsample size")
    axis.legend(frameon=False, loc="lower left", fontsize="small")


def plot_increments(diagnostics: Diagnostics, axis: Axes) -> None:
    """Increments of the log-normaliser of the twisted targets; arguments as in :func:`plot_ess`."""
    increments = _columns(diagnostics.increments)
    steps = np.arange(len(increments))
    if increments.shape[1] == 1:
        axis.bar(steps, increments[:, 0], color=SOFT, width=0.8)
    else:
        axis.plot(steps, increments, color=INK, linewidth=1.0, alpha=0.7)
    total = increments.sum(0)
    text = (
        f"sum {total[0]:.2f}" if len(total) == 1 else f"sums {total.min():.2f} to {total.max():.2f}"
    )
    axis.axhline(0, color=INK, linewidth=0.6)
    axis.set(ylabel="log Z\nincrement", title=text)
    axis.title.set_fontsize("small")


def plot_genealogy(diagnostics: Diagnostics, axis: Axes, *, max_lines: int = 400) -> None:
    """
    The lineages of the final particles of the first population, of all other particles in grey.

    :param Diagnostics diagnostics: The diagnostics of a run that kept ancestors.
    :param axis: Where to draw.
    :param int max_lines: Draw at most so many lineages.
    """
    if diagnostics.ancestors is None:
        raise ValueError("this run kept no ancestors; run with history='ancestors'")
    first = (slice(None), slice(None)) + (0,) * (diagnostics.ancestors.dim() - 2)
    ancestors = diagnostics.ancestors[first].cpu().numpy()
    lineages = diagnostics.lineages()[first].cpu().numpy()
    size = ancestors.shape[1]
    shown = np.linspace(0, size - 1, min(size, max_lines)).round().astype(int)
    axis.plot(*_edges(ancestors[:, shown], shown), color=SOFT, linewidth=0.5, alpha=0.5)
    axis.plot(lineages[:, shown], color=ACCENT, linewidth=0.9, alpha=0.8)
    roots = len(np.unique(lineages[0]))
    axis.set(ylabel="particle", title=f"final particles descend from {roots} of {size}")
    axis.title.set_fontsize("small")


def _edges(
    ancestors: np.ndarray[Any, Any], shown: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """One line through all edges from a particle to its offspring, broken between them."""
    starts = ancestors[:-1].astype(float)
    ends = np.broadcast_to(shown, starts.shape)
    steps = np.broadcast_to(np.arange(len(starts))[:, None], starts.shape)
    breaks = np.full(starts.shape, np.nan)
    x = np.stack([steps, steps + 1, breaks], -1)
    return x.reshape(-1), np.stack([starts, ends, breaks], -1).reshape(-1)


def plot_iterations(
    iterations: Sequence[Iteration], *, log_normalizers: Sequence[float] | None = None
) -> Figure:
    """
    What learning a twist did: the way to the target, effective sample sizes, and log Z by pass.

    :param list iterations: The iterations of a :class:`~pyro_twist.infer.TrustRegionTwist`.
    :param list log_normalizers: The log-normaliser of every pass, those after the last iteration
        included; by default those that the iterations know.
    :returns: The figure.
    :raises ImportError: If matplotlib is not installed.
    :raises ValueError: If there is no iteration yet.
    """
    if not iterations:
        raise ValueError("there is no iteration to plot; call fit or run with num_iterations > 0")
    known = [one.log_normalizer for one in iterations]
    log_z = known if log_normalizers is None else list(log_normalizers)
    figure, axes = _new_figure(3)
    _plot_way(iterations, axes[0])
    _plot_shares(iterations, axes[1])
    _plot_log_z(log_z, axes[2])
    axes[-1].set_xlabel("pass")
    axes[-1].set_xticks(np.arange(1, max(len(log_z), len(iterations)) + 1))
    return figure


def _plot_way(iterations: Sequence[Iteration], axis: Axes) -> None:
    """How far along the way, the tempering exponent, and the accepted share of each fit."""
    passes = np.arange(1, len(iterations) + 1)
    axis.bar(passes, [one.step for one in iterations], color=SOFT, width=0.5, label="accepted step")
    axis.plot(passes, [one.tau for one in iterations], "o--", color=INK, label="tau")
    axis.plot(passes, [one.eta for one in iterations], "o-", color=ACCENT, label="eta")
    axis.set(ylim=(0, 1.08), ylabel="share of\nthe way")
    _legend_beside(axis)


def _plot_shares(iterations: Sequence[Iteration], axis: Axes) -> None:
    passes = np.arange(1, len(iterations) + 1)
    axis.plot(passes, [one.ess for one in iterations], "o--", color=INK, label="particles")
    axis.plot(passes, [one.path_ess for one in iterations], "o-", color=ACCENT, label="whole paths")
    axis.set(ylim=(0, 1.08), ylabel="effective\nshare of")
    _legend_beside(axis)


def _plot_log_z(log_z: Sequence[float], axis: Axes) -> None:
    axis.plot(np.arange(1, len(log_z) + 1), log_z, "o-", color=INK)
    axis.set_ylabel("log Z\nof the pass")


def _legend_beside(axis: Axes) -> None:
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
