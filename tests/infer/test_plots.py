# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from pyro_twist.infer import TrustRegionTwist
from pyro_twist.infer.plots import plot_iterations
from pyro_twist.twists import ShiftTwist
from tests.oracles import LinearGaussianChain


def test_plot_of_iterations() -> None:
    chain = LinearGaussianChain(5, k=1.5, dim=1)
    smc = TrustRegionTwist(chain, ShiftTwist(chain), 40, num_iterations=3, seed=0)
    smc.fit()
    figure = plot_iterations(smc.iterations, log_normalizers=[1.0, 2.0, 3.0, 4.0])
    way, shares, log_z = figure.axes
    assert way.lines[0].get_ydata().tolist() == [one.tau for one in smc.iterations]
    assert way.lines[1].get_ydata().tolist() == [one.eta for one in smc.iterations]
    assert [bar.get_height() for bar in way.patches] == [one.step for one in smc.iterations]
    assert shares.lines[0].get_ydata().tolist() == [one.ess for one in smc.iterations]
    assert shares.lines[1].get_ydata().tolist() == [one.path_ess for one in smc.iterations]
    assert log_z.lines[0].get_ydata().tolist() == [1.0, 2.0, 3.0, 4.0]
    assert log_z.get_xticks().tolist() == [1, 2, 3, 4]
    own = plot_iterations(smc.iterations).axes[2].lines[0].get_ydata().tolist()
    assert own == [one.log_normalizer for one in smc.iterations]


def test_nothing_to_plot() -> None:
    with pytest.raises(ValueError, match="no iteration to plot"):
        plot_iterations([])
