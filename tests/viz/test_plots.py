# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pyro_twist.viz import Figure, StepSeries, plot_series


def test_series_are_drawn_side_by_side() -> None:
    slopes = StepSeries("Slopes", [0, 1, 2], [1.0, 1.4, 0.5], "slope", 1.0)
    below = StepSeries("Below", [1], [-3.0], "gain")
    figure = plot_series([slopes, below], last=4)
    first, second = figure.axes
    assert first.get_lines()[0].get_ydata().tolist() == [1.0, 1.4, 0.5]
    assert len(first.get_lines()) == 2 and len(second.get_lines()) == 1
    assert first.get_xlim() == second.get_xlim() == (0, 4)
    assert first.get_ylim()[1] > 1.4 and second.get_ylim()[0] < -3.0
    assert (first.get_title(loc="left"), first.get_ylabel()) == ("Slopes", "slope")
    assert Figure(figure).to_html().startswith("<figure><img")


def test_a_reference_for_every_step() -> None:
    series = StepSeries("Slopes", [0, 1, 2], [0.2, 0.4, 0.5], "slope", [0.1, 1.2, 2.0])
    [axis] = plot_series([series]).axes
    drawn, dotted = axis.get_lines()
    assert drawn.get_ydata().tolist() == [0.2, 0.4, 0.5]
    assert dotted.get_xdata().tolist() == [0, 1, 2] and dotted.get_linestyle() == ":"
    assert dotted.get_ydata().tolist() == [0.1, 1.2, 2.0]
    assert axis.get_ylim()[1] > 2.0


def test_one_step() -> None:
    [axis] = plot_series([StepSeries("One", [0], [0.0], "x")]).axes
    assert axis.get_xlim() == (0, 1)
