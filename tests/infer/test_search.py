# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Searches: what they select, what they cost, and that they are no samplers of the tilted law."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pyro_twist.infer import SVDD, BeamSearch, BestOfN, BlockSearch
from pyro_twist.twists import LookaheadTwist
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
        (SVDD, {"resampling": "systematic"}, "selects by its own rule"),
    ],
)
def test_options(kind: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        kind(LinearGaussianChain(num_steps=6), None, 16, **options)
