# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The registry, and comparisons: one model, any algorithm, one result type, equal budgets."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from pyro_twist import compare, zoo
from pyro_twist.algorithms import Algorithm, Estimate, Scored, Setting, algorithms
from pyro_twist.algorithms.compare import FIGURES
from pyro_twist.diffusion import GaussianDenoiser, GaussianDiffusion
from pyro_twist.infer import ImportanceSampling, SMCResult
from pyro_twist.rewards import Reward, RewardTilted
from tests.algorithms.page import PAGE, table
from tests.oracles import LinearGaussianChain, MaskedChain
from tests.statistics import FIVE_SIGMA

STEPS = 4


def vector_model(**options: Any) -> RewardTilted:
    """A diffusion of Gaussian vectors with a linear reward, which every gradient exists of."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    denoiser = GaussianDenoiser(torch.zeros(2), 1.0, scheduler)
    diffusion = GaussianDiffusion(denoiser, scheduler, (2,), num_inference_steps=STEPS, **options)
    reward = Reward(lambda x: x.sum(-1), name="sum")
    return RewardTilted(diffusion, reward, 0.8, decode=False)


def masked_model() -> RewardTilted:
    chain = MaskedChain(unmasking="uniform")
    return RewardTilted(chain.diffusion, chain.reward, decode=False)


@pytest.mark.parametrize("make", [vector_model, masked_model, LinearGaussianChain])
@pytest.mark.parametrize("budget", [1, 2, 7, 16])
def test_every_algorithm_runs_on_any_budget(make: Any, budget: int) -> None:
    """The same result type, the same counters, and no more evaluations than the budget has."""
    model = make()
    for name, one in algorithms(model).items():
        setting = Setting(Scored(model), budget, seed=0)
        result = one.make(setting).run()
        assert isinstance(result, SMCResult), name
        assert result.counts["denoiser"] <= max(budget, 2) * len(model.timesteps), name
        if one.returns == "a maximiser":
            assert result.kind == "maximiser" and result.log_normalizer.isnan(), name
        elif one.tilted:
            assert result.kind == "tilted law" and result.log_normalizer.isfinite(), name


def test_what_fits_a_model() -> None:
    vector, masked = set(algorithms(vector_model())), set(algorithms(masked_model()))
    assert {"tds", "das", "urge", "psi-sampler", "controlled"} <= vector - masked
    assert {"tree-search", "children"} <= masked - vector
    assert {"fk", "tri-tsmc", "nested", "svdd", "code", "dsearch", "particle-gibbs"} <= (
        vector & masked
    )


def test_samplers_agree_on_the_evidence() -> None:
    """
    All of them on one model, 300 populations of 16 each: the mean of Z, a z-test at 1e-6 each.
    """
    model = vector_model(plate=("replicates", 300))
    exact = chain_evidence()
    options = {"max_plate_nesting": 1, "population_plate": "replicates"}
    for name, one in algorithms(model).items():
        if one.returns != "samples of the tilted law":
            continue
        result = one.make(Setting(model, 16, seed=1, **options)).run()
        ratio = (result.log_normalizer - exact).exp() - 1
        error = float(ratio.std()) / math.sqrt(len(ratio))
        assert error < 0.1, name
        assert abs(float(ratio.mean())) < FIVE_SIGMA * max(error, 1e-4), name


def chain_evidence() -> float:
    """log Z of the coarse chain, whose kernels are linear: its variance by two points."""
    one = vector_model().model
    variance = torch.ones(2)
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    for t in one.timesteps:
        state: dict[str, torch.Tensor] = {}
        one._write(state, t, points)
        kernel = one.kernel(state, t)
        slope = kernel.mean[1] - kernel.mean[0]
        variance = slope**2 * variance + kernel.variance[0]
    return float(0.5 * 0.8**2 * variance.sum())


def test_scores_are_those_of_the_factors() -> None:
    model = vector_model()
    before = model.counts["reward"]
    result = ImportanceSampling(Scored(model), 5, seed=0).run()
    assert torch.allclose(result.state["objective"], 0.8 * result.state["reward"])
    assert model.counts["reward"] - before == 5


def test_tables_and_intervals() -> None:
    found = compare(vector_model(), ["base", "fk", "svdd"], budget=8, seeds=4)
    assert found.names == ["base", "fk", "svdd"]
    assert len(found.rows) == 12 and set(FIGURES) <= set(found.rows[0])
    assert math.isnan(found.estimate("svdd", "log_normalizer").mean)
    by_hand = Estimate.of(list(found.values("fk", "objective").values()))
    assert found.estimate("fk", "objective") == by_hand
    gain = found.difference("svdd", "base", "objective")
    assert gain.size == 4 and gain.mean > 0
    lines = found.table().splitlines()
    assert len(lines) == 5 and "a maximiser" in lines[4]
    assert len(found.to_dataframe()) == 12


def test_intervals_are_students() -> None:
    estimate = Estimate.of([1.0, 2.0, 3.0, math.nan])
    assert estimate.size == 3 and estimate.mean == 2.0 and estimate.sd == 1.0
    assert estimate.error == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)


def test_equal_seeds_share_their_noise() -> None:
    found = compare(vector_model(), ["base", "importance"], budget=8, seeds=[3, 5])
    assert found.values("base", "best") == found.values("importance", "best")


def test_a_comparison_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    path, calls = tmp_path / "rows.jsonl", []

    def counted(setting: Setting) -> Any:
        calls.append(setting.seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ImportanceSampling(setting.model, **setting.common)

    mine = Algorithm("mine", "Mine", "Draws.", "samples of the tilted law", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(vector_model(), [mine], budget=4, seeds=4, path=path)
    assert len(path.read_text().splitlines()) == 2
    found = compare(vector_model(), [mine], budget=4, seeds=4, path=path)
    assert calls == [0, 1, 2, 2, 3] and len(found.rows) == 4
    compare(vector_model(), [mine], budget=5, seeds=1, path=path)  # another budget, another run
    assert [json.loads(line)["budget"] for line in path.read_text().splitlines()][-1] == 5


def test_runs_without_weight_are_counted() -> None:
    model = vector_model()
    hopeless = RewardTilted(model.model, lambda x: torch.full((len(x),), -torch.inf), decode=False)
    found = compare(hopeless, ["importance", "svdd"], budget=4, seeds=2)
    assert all(row["failed"] for row in found.rows)
    assert "(2 failed)" in found.table()


def test_plot() -> None:
    pytest.importorskip("matplotlib")
    figure = compare(vector_model(), ["base", "fk", "svdd"], budget=4, seeds=2).plot()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "base",
        "fk",
        "svdd",
    ]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"algorithms": ["tri-smc"]}, "did you mean 'tri-tsmc'"),
        ({"algorithms": ["tree-search"]}, "is for models of sequences"),
        ({"algorithms": []}, "algorithms is empty"),
        ({"budget": 0}, "budget=0"),
        ({"seeds": 0}, "seeds=0"),
        ({"seeds": ["a"]}, "seeds="),
    ],
)
def test_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compare(vector_model(), **options)


def test_black_boxes_have_no_gradient() -> None:
    model = vector_model()
    black = Reward(lambda x: x.sum(-1), name="score", differentiable=False)
    tilted = RewardTilted(model.model, black, decode=False)
    assert "tds" not in algorithms(tilted)
    with pytest.raises(ValueError, match="needs the gradient of the reward"):
        compare(tilted, ["tds"])


def test_algorithms_of_ones_own() -> None:
    fk = algorithms()["fk"]
    found = compare(vector_model(), [fk, replace(fk, name="twin")], budget=4, seeds=2)
    assert found.difference("twin", "fk", "objective").mean == 0


@pytest.mark.parametrize("name", ["digits", "molecules"])
def test_on_the_zoo(name: str) -> None:
    if name == "molecules":
        pytest.importorskip("rdkit")
        from pyro_twist.rewards import molecule_reward

        model = RewardTilted(zoo.load(name), molecule_reward("qed"), 10.0)
    else:
        from pyro_twist.rewards import image_reward

        model = RewardTilted(zoo.load(name, num_inference_steps=4), image_reward("bright"), 10.0)
    found = compare(model, ["fk", "nested", "code"], budget=4, seeds=1)
    assert not any(row["failed"] for row in found.rows)


def test_the_page_has_every_algorithm() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(), "run python -m tests.algorithms.page"


def _twice(state: Any) -> torch.Tensor:
    return state["reward"] * 2


def test_other_measures_are_weighted_means() -> None:
    measures = {
        "first": lambda state: state["x"][..., 0],
        "twice": lambda state: state["reward"] * 2,
    }
    found = compare(vector_model(), ["importance", "svdd"], budget=8, seeds=2, measures=measures)
    assert "first" in found.table().splitlines()[0]
    for name in found.names:
        for seed, value in found.values(name, "twice").items():
            assert value == pytest.approx(2 * found.values(name, "objective")[seed] / 0.8, rel=1e-4)
    with pytest.raises(ValueError, match="'ess' is a column already"):
        compare(vector_model(), ["fk"], measures={"ess": lambda state: state["x"]})
