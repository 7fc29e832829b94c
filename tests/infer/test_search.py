# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Searches: what they select, what they cost, and that they are no samplers of the tilted law."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_twist.infer import SVDD, BeamSearch, BestOfN, BlockSearch, NestedSMC
from pyro_twist.twists import LookaheadTwist, Twist
from tests.oracles import LinearGaussianChain
from tests.statistics import FIVE_SIGMA

COMMON: dict[str, Any] = {"max_plate_nesting": 1, "population_plate": "replicates", "seed": 0}


def searched(kind: Any, **options: Any) -> Any:
    model = LinearGaussianChain(num_steps=6, replicates=2000)
    return kind(model, None, 16, **COMMON, **options).run()


@pytest.mark.parametrize("kind", [SVDD, BlockSearch, BeamSearch])
def test_results_are_of_maximisers(kind: Any) -> None:
    result = searched(kind)
    assert result.kind == "maximiser" and result.log_normalizer.isnan().all()
    assert (result.log_weights == 0).all()
    assert (result.state["x"].diff(dim=0) <= 0).all()
    assert result.counts["denoiser"] == 16 * 6 * 2000


def test_one_block_is_best_of_n() -> None:
    """Equal noise, so equal samples."""
    model = LinearGaussianChain(num_steps=6, replicates=50)
    block = BlockSearch(model, None, 16, num_children=16, block_size=6, **COMMON).run()
    best = BestOfN(model, 16, **COMMON).run()
    assert torch.equal(block.state["x"], best.state["x"])


def test_blocks_by_hand() -> None:
    """SVDD on the chain: each step goes to the largest of M draws, whose mean is known."""
    model = LinearGaussianChain(num_steps=6, replicates=4000)
    result = SVDD(model, None, 8, num_children=8, **COMMON).run()
    draws = torch.randn(400_000, 8, generator=torch.Generator().manual_seed(1)).amax(1)
    largest = float(draws.double().mean())
    # the first choice is among states that differ in x_T as well
    first = math.hypot(model.a, model.s) * model.a**5
    expected = largest * (first + sum(model.s * model.a**k for k in range(5)))
    values = result.state["x"][0].double()
    error = float(values.std()) / math.sqrt(4000) + 20 * float(draws.std()) / math.sqrt(400_000)
    assert abs(float(values.mean()) - expected) < FIVE_SIGMA * error


def test_choosing_in_proportion_without_a_weight_is_biased() -> None:
    """What the mean of a parent's children would mend: the mean falls short of the tilted one."""
    model = LinearGaussianChain(num_steps=6, replicates=4000)
    result = SVDD(model, None, 16, selection="sample", **COMMON).run()
    values = result.state["x"].double().mean(0)
    error = float(values.std()) / math.sqrt(len(values))
    assert float(values.mean()) < model.tilted_mean - 10 * error


def test_the_beam_narrows() -> None:
    model = LinearGaussianChain(num_steps=6)
    search = BeamSearch(model, None, 16, width=(8, 2), seed=0)
    assert search.widths == {6: 8, 5: 7, 4: 6, 3: 4, 2: 3, 1: 2}
    result = search.run()
    kept = [len(set(row.tolist())) for row in result.diagnostics.ancestors]
    assert kept[:6] == [8, 7, 6, 4, 3, 2]


def test_a_beam_of_everything_drops_nobody() -> None:
    model = LinearGaussianChain(num_steps=6)
    result = BeamSearch(model, None, 16, width=16, keep=16, seed=0).run()
    assert all(sorted(row.tolist()) == list(range(16)) for row in result.diagnostics.ancestors)


def test_guides_may_propose_and_score() -> None:
    model = LinearGaussianChain(num_steps=6)
    search = BeamSearch(model, LookaheadTwist(model, every=2), 8, seed=0).run()
    assert search.state["x"].shape == (1,)


class Drift(Twist):
    """Look-ahead with proposals that are far from the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.look = LookaheadTwist(model)

    def get_posterior(self, name: str, prior: Any) -> Any:
        return dist.Normal(prior.mean + 3.0 * prior.stddev, prior.stddev)

    def log_twist(self, state: Any, t: Any = None, *args: Any, **kwargs: Any) -> Any:
        return self.look.log_twist(state, t, *args, **kwargs)


@pytest.mark.parametrize("kind", [SVDD, BlockSearch, BeamSearch])
def test_proposals_do_not_count_against_a_particle(kind: Any) -> None:
    """The order is that of the reward, however unlikely under the model the path was."""
    model = LinearGaussianChain(num_steps=6, replicates=50)
    options: dict[str, Any] = {"keep": 16, "width": 4} if kind is BeamSearch else {}
    result = kind(model, Drift(model), 16, **COMMON, **options).run()
    assert (result.state["x"].diff(dim=0) <= 0).all()
    plain = kind(model, None, 16, **COMMON, **options).run()
    assert float(result.state["x"][0].mean()) > float(plain.state["x"][0].mean()) + 3


def test_a_search_estimates_no_normaliser() -> None:
    search = SVDD(LinearGaussianChain(num_steps=3), None, 8, seed=0)
    result = search.run()
    assert search.get_log_normalizer().isnan()
    assert result.diagnostics is not None and result.diagnostics.log_normalizer.isnan().all()


class Forbidding(LinearGaussianChain):
    """What ends below zero is impossible."""

    def step(self, state: Any, t: int) -> None:
        super().step(state, t)
        if t == 1:
            pyro.factor("positive", torch.where(state["x"] > 0, 0.0, -math.inf))


@pytest.mark.parametrize("kind", [BlockSearch, BeamSearch])
def test_what_is_impossible_has_no_weight(kind: Any) -> None:
    """A whole group may end in what the model forbids; it comes last, without weight."""
    options: dict[str, Any] = {"keep": 8, "width": 16} if kind is BeamSearch else {}
    options |= {} if kind is BeamSearch else {"num_children": 2, "block_size": 9}
    result = kind(Forbidding(num_steps=2), None, 16, seed=1, **options).run()
    alive = result.state["x"] > 0
    assert alive[0] and torch.equal(result.log_weights == 0, alive)
    assert kind is BeamSearch or not alive.all()


class Mortal(LinearGaussianChain):
    """What is below a bound at state 3 is impossible from then on."""

    def step(self, state: Any, t: int) -> None:
        super().step(state, t)
        if t == 4:
            pyro.factor("alive", torch.where(state["x"] > 1.0, 0.0, -math.inf))


def test_a_beam_drops_the_dead() -> None:
    search = BeamSearch(Mortal(num_steps=6), None, 16, width=16, keep=16, seed=0)
    result = search.run()
    assert result.diagnostics is not None
    assert (result.log_weights == 0).all(), "the dead of the step after were copied"


def test_a_search_needs_something_to_select_by() -> None:
    class Proposal:
        def init(self, state: Any) -> None: ...

        def step(self, state: Any, t: int) -> None: ...

    with pytest.raises(ValueError, match="Proposal has no log-twist at x_5"):
        SVDD(LinearGaussianChain(num_steps=6), Proposal(), 8, seed=0).run()


def test_a_run_goes_on_after_a_failure() -> None:
    """Nested SMC and searches: the same particles as without it, also from a saved state."""
    for kind in (NestedSMC, SVDD, BeamSearch):
        whole = kind(LinearGaussianChain(num_steps=4), _looking(), 8, seed=3).run()
        first = kind(LinearGaussianChain(num_steps=4), _looking(), 8, seed=3)
        first.init()
        first._move("step", (4,), {})
        second = kind(LinearGaussianChain(num_steps=4), _looking(), 8, seed=3)
        second.load_state_dict(first.state_dict())
        for engine in (first, second):
            assert torch.equal(engine.resume().state["x"], whole.state["x"]), kind


def _looking() -> LookaheadTwist:
    return LookaheadTwist(LinearGaussianChain(num_steps=4))


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (BlockSearch, {"block_size": 0}, "block_size=0"),
        (BlockSearch, {"num_children": 5}, "num_children=5"),
        (SVDD, {"selection": "best"}, "selection='best'"),
        (BeamSearch, {"width": 17}, "width=17"),
        (BeamSearch, {"width": lambda t: 0}, "at state 6"),
        (BeamSearch, {"keep": 20}, "keep=20"),
        (BeamSearch, {"every": 0}, "every=0"),
        (BeamSearch, {"num_particles": "16"}, "num_particles='16'"),
        (BeamSearch, {"width": (1, 2, 3)}, r"width=\(1, 2, 3\)"),
        (BlockSearch, {"num_particles": "16"}, "num_particles='16'"),
        (SVDD, {"resampling": "systematic"}, "selects by its own rule"),
    ],
)
def test_options(kind: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        kind(LinearGaussianChain(num_steps=6), None, **{"num_particles": 16, **options})
