# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_twist.infer import TwistedSMC
from pyro_twist.twists import LookaheadTwist, SumTwist, Twist
from tests.oracles import ExactTwist, LinearGaussianChain


def test_the_base_twist_is_one() -> None:
    chain = LinearGaussianChain(4)
    with_twist = TwistedSMC(chain, Twist(chain), 20, seed=0).run()
    without = TwistedSMC(chain, None, 20, seed=0).run()
    assert torch.equal(with_twist.state["x"], without.state["x"])
    assert torch.equal(with_twist.log_weights, without.log_weights)


def test_the_model_is_no_submodule() -> None:
    class Network(LinearGaussianChain, torch.nn.Module):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.layer = torch.nn.Linear(2, 2)

    twist = Twist(Network())
    assert list(twist.parameters()) == [] and not list(twist.children())


def test_sums_of_twists() -> None:
    """Two halves of the optimal twist make the whole: zero variance."""
    chain = LinearGaussianChain(6, k=1.5)
    both = ExactTwist(chain, 0.3) + ExactTwist(chain, 0.7)
    assert isinstance(both, SumTwist)
    kernel = dist.Normal(torch.zeros(5), 0.5)
    both.args_kwargs = (({"x": torch.zeros(5)}, 3), {})
    assert torch.allclose(both.get_posterior("x_2", kernel).loc, 0.25 * torch.tensor(1.5 * 0.81))
    whole = TwistedSMC(chain, ExactTwist(chain), 16, seed=0).run()
    summed = TwistedSMC(chain, both, 16, seed=0).run()
    assert torch.allclose(whole.state["x"], summed.state["x"], atol=1e-5)
    three = both + Twist(chain)
    assert len(list(three.modules())) == 7
    # constants of the log-twist are no functions of the state: the law is what matters
    spread = summed.log_weights - summed.log_weights.mean()
    assert spread.abs().max() < 1e-4
    with pytest.raises(ValueError, match="two or more"):
        SumTwist(Twist(chain))


def test_the_twist_runs_as_a_pyro_guide() -> None:
    """Called, it runs the whole trajectory, as any effect-based guide of Pyro."""

    class Called(LinearGaussianChain):
        def __call__(self) -> torch.Tensor:
            state: dict[str, torch.Tensor] = {}
            self.init(state)
            for t in self.timesteps:
                self.step(state, t)
            return state["x"]

    model = Called(3, k=1.0)

    class Named(ExactTwist):
        pass

    with pyro.plate("particles", 7):
        values = Named(model)()
    assert {"x_3", "x_2", "x_1", "x_0"} <= set(values) and values["x_0"].shape == (7,)


class Watched(LinearGaussianChain):
    """Counts reward evaluations and can make look-ahead impossible."""

    looks = 0

    def terminal(self, state: Any, x0: torch.Tensor) -> None:
        self.looks += 1
        super().terminal(state, x0)


@pytest.mark.parametrize(
    "options, looks",
    [({}, 7), ({"every": 2}, 4), ({"every": 100}, 2), ({"schedule": (5, 2)}, 3)],
)
def test_schedule_costs_what_it_says(options: dict[str, Any], looks: int) -> None:
    """Six steps: seven states, of which the last always is scored."""
    chain = Watched(6)
    TwistedSMC(chain, LookaheadTwist(chain, **options), 8, seed=0).run()
    assert chain.looks == looks


def test_potentials_by_hand() -> None:
    chain = LinearGaussianChain(3, k=1.0, a=1.0)
    states = [torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0]), torch.tensor([3.0, 1.0])]
    expected = {
        "diff": [[1, -1], [0.5, 2], [3, 1]],
        "rt": [[1, -1], [1.5, 1], [4.5, 2]],
        "max": [[1, -1], [2, 1], [5, 3]],
        "sum": [[1, -1], [2.5, 0], [7, 2]],
    }
    for potential, rows in expected.items():
        twist, state = LookaheadTwist(chain, potential), {}  # type: ignore[arg-type, var-annotated]
        for t, x, row in zip((None, 3, 2), states, rows, strict=True):
            state["x0_hat"] = x
            assert twist.log_twist(state, t).tolist() == pytest.approx(row), potential


def test_unscheduled_steps_leave_the_twist_as_it_was() -> None:
    chain = LinearGaussianChain(3)
    twist, state = LookaheadTwist(chain, schedule=(2,)), {"x0_hat": torch.tensor([1.0, 2.0])}
    assert twist.log_twist(state) == 0.0
    assert twist.log_twist(state, 3).tolist() == [1.0, 2.0]
    state["x0_hat"] = torch.tensor([7.0, 7.0])
    assert twist.log_twist(state, 2).tolist() == [1.0, 2.0]


def test_floor_of_impossible_look_aheads() -> None:
    class Positive(LinearGaussianChain):
        def terminal(self, state: Any, x0: torch.Tensor) -> None:
            pyro.factor("positive", torch.where(x0 > 0, x0, -torch.inf))

    twist = LookaheadTwist(Positive(3), floor=2.0)
    # a hair below, so that no reward of whole numbers is taken for an impossible one
    value = twist.log_twist({"x0_hat": torch.tensor([1.0, -1.0])})
    assert value.tolist() == pytest.approx([1.0, -1.0], abs=1e-12) and value[1] < -1.0
    value = twist.log_twist({"x0_hat": torch.tensor([-1.0, -1.0])})
    assert value.tolist() == pytest.approx([-2.0, -2.0], abs=1e-12)


def test_wrong_options() -> None:
    chain = LinearGaussianChain(3)
    with pytest.raises(ValueError, match="potential='mean'.*'diff'"):
        LookaheadTwist(chain, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every=0"):
        LookaheadTwist(chain, every=0)
    with pytest.raises(ValueError, match=r"states \[0, 9\]; the model's are 3.*to 1"):
        LookaheadTwist(chain, schedule=(9, 2, 0))
    with pytest.raises(ValueError, match="no method `terminal`.*RewardTilted"):
        LookaheadTwist(object())
