# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The registry, and comparisons: one model, any algorithm, one result type, equal budgets."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from diffusers import DDIMScheduler
from pyro import poutine

from pyro_twist import compare, zoo
from pyro_twist.algorithms import Algorithm, Estimate, Scored, Setting, algorithms
from pyro_twist.algorithms.compare import FIGURES
from pyro_twist.diffusion import GaussianDenoiser, GaussianDiffusion, RewardCorrector
from pyro_twist.infer import ImportanceSampling, SMCResult
from pyro_twist.rewards import Reward, RewardError, RewardTilted, Tilted
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
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7, 16])
def test_every_algorithm_runs_on_any_budget(make: Any, budget: int) -> None:
    """The same result type, the same counters, and no more evaluations than the budget has."""
    model = make()
    for name, one in algorithms(model).items():
        setting = Setting(Scored(model), budget, seed=0)
        result = one.make(setting).run()
        assert isinstance(result, SMCResult), name
        assert result.counts["denoiser"] <= budget * len(model.timesteps), name
        if one.returns == "a maximiser":
            assert result.kind == "maximiser" and result.log_normalizer.isnan(), name
        elif one.tilted:
            assert result.kind == "tilted law" and result.log_normalizer.isfinite(), name


@pytest.mark.parametrize(
    ("budget", "children", "used"), [(1, 1, 1), (4, 2, 4), (7, 3, 6), (16, 4, 16)]
)
def test_there_are_children_on_any_budget(budget: int, children: int, used: int) -> None:
    """A prime number of trajectories has no other divisors; one is then left over."""
    for name in ("nested", "nested-adapted", "svdd", "code"):
        made: Any = algorithms()[name].make(Setting(Scored(vector_model()), budget, seed=0))
        assert (made.num_children, made.num_particles) == (children, used), name


def several(state: Any, x0: torch.Tensor) -> None:
    """A likelihood with a plate of its own."""
    with pyro.plate("measured", 3, dim=-1), poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(x0[..., 0], 0.5), obs=torch.tensor([0.1, 0.2, 0.3]))


def test_plates_inside_the_potential() -> None:
    """Likelihoods instead of rewards: the score is the sum over the plate, scaled."""
    model = Tilted(vector_model().model, several)
    result = ImportanceSampling(Scored(model), 5, 1, seed=0).run()
    x = result.state["x"][..., 0].double()
    data = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    expected = 0.5 * dist.Normal(x, 0.5).log_prob(data).sum(-1)
    assert torch.allclose(result.state["objective"][:, 0], expected, atol=1e-5)
    found = compare(model, budget=4, seeds=1, max_plate_nesting=1)
    assert not any(row["failed"] for row in found.rows)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "rows.jsonl", vector_model()
    compare(model, "base", budget=4, seeds=1, path=path)
    other = RewardTilted(model.model, model.rewards, 0.9, decode=False)
    with pytest.raises(ValueError, match="rows of another model, .* 0.8"):
        compare(other, "base", budget=4, seeds=1, path=path)
    measures = {"twice": _twice}
    with pytest.raises(ValueError, match="without the measure 'twice'"):
        compare(model, "base", budget=4, seeds=1, path=path, measures=measures)
    row = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in row.items() if k != "model"}) + "\n")
    compare(model, "base", budget=4, seeds=1, path=path)
    assert len(path.read_text().splitlines()) == 1  # rows of before there was a name are kept


def test_half_a_line_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    compare(vector_model(), "base", budget=4, seeds=2, path=path)
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[0][:30])
    found = compare(vector_model(), "base", budget=4, seeds=3, path=path)
    assert len(found.rows) == 3 and len(path.read_text().splitlines()) == 3


def test_the_global_stream_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    compare(vector_model(), "fk", budget=2, seeds=2)
    assert torch.equal(before, torch.get_rng_state())


def test_of_a_failure_it_is_known_where() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no connection")

    model = RewardTilted(vector_model().model, broken, decode=False)
    with pytest.raises(RewardError) as failure:
        compare(model, ["fk"], budget=2, seeds=[7])
    assert "in 'fk' with seed 7" in failure.value.__notes__[0]


def _sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1)


def test_everything_can_be_pickled() -> None:
    """Inference objects of every algorithm, for other processes, and what they find."""
    model = RewardTilted(vector_model().model, _sum, decode=False)
    for name, one in algorithms(model).items():
        made = one.make(Setting(Scored(model), 4, seed=0))
        copy = pickle.loads(pickle.dumps(made))
        assert torch.equal(copy.run().state["x"], made.run().state["x"]), name
    found = compare(model, ["fk", "svdd"], budget=2, seeds=1)
    assert pickle.loads(pickle.dumps(found)) == found


def test_a_maximiser_returns_its_first() -> None:
    found = compare(vector_model(), ["best-of-n", "base"], budget=16, seeds=3)
    best = found.values("best-of-n", "best")
    assert found.values("best-of-n", "objective") == best
    for seed, value in found.values("base", "objective").items():
        assert value < best[seed]


def test_the_mean_of_the_base_model_has_no_weights() -> None:
    model = vector_model()
    found = compare(model, ["base"], budget=8, seeds=[4])
    state = ImportanceSampling(Scored(model), 8, seed=4).run().state
    expected = float(state["objective"].mean())
    assert found.values("base", "objective")[4] == pytest.approx(expected)


def test_black_boxes_among_rewards_have_no_corrector() -> None:
    rewards = {
        "a": vector_model().rewards["reward"],
        "b": Reward(lambda x: x[:, 0], differentiable=False),
    }
    model = RewardTilted(vector_model().model, rewards, decode=False)
    with pytest.raises(ValueError, match="'b' is a black box"):
        RewardCorrector(model)


def test_what_an_algorithm_says_of_itself_is_checked() -> None:
    with pytest.raises(ValueError, match="did you mean 'a maximiser'"):
        replace(algorithms()["svdd"], returns="a maximizer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean 'gradient'"):
        replace(algorithms()["svdd"], needs=("gradients",))  # type: ignore[arg-type]


def test_unknown_figures() -> None:
    found = compare(vector_model(), "base", budget=2, seeds=1)
    with pytest.raises(ValueError, match="no figure 'log_z'"):
        found.estimate("base", "log_z")
    with pytest.raises(ValueError, match="no algorithm 'fk'"):
        found.estimate("fk", "ess")


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
        ({"seeds": [True]}, "seeds="),
        ({"algorithms": ["fk", "fk"]}, "'fk' is there twice"),
        ({"measures": {"a": 3}}, "measure 'a' is 3"),
        ({"measures": {"a": lambda state: state["x"]}}, r"returned \(16, 2\) for 16 particles"),
        ({"measures": {"a": lambda state: 1.0}}, "returned float"),
    ],
)
def test_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compare(vector_model(), **options)


def test_models_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="GaussianDiffusion has no reward"):
        compare(vector_model().model, ["fk"])
    with pytest.raises(ValueError, match="the plate 'pair'; name it population_plate"):
        compare(vector_model(plate=("pair", 2)), ["fk"], max_plate_nesting=1)


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
