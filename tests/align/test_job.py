# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The main job, called from Python on the smallest model of the zoo."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_twist import align
from pyro_twist.algorithms.registry import _ALGORITHMS as _METHODS
from pyro_twist.align import AlignmentFailed, AlignOptions, OptionError, Outcome
from pyro_twist.align.methods import Method, Setting, register_method
from pyro_twist.align.outcome import standard_error
from pyro_twist.align.table import columns, remarks, summary_rows
from pyro_twist.infer import ImportanceSampling
from pyro_twist.rewards import Reward

STEPS, SIZE = 4, 16
ALL = tuple(name for name, method in align.methods().items() if not method.needs)


def run(tmp_path: Path, **options: Any) -> Outcome:
    given = {"model": "digits", "steps": STEPS, "particles": SIZE, "out": tmp_path, **options}
    return align.run(AlignOptions(**given))


def bright(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def test_budget_is_equal(tmp_path: Path) -> None:
    outcome = run(tmp_path, classes=("3",), methods=ALL)
    assert [arm.method.name for arm in outcome.arms] == list(ALL)
    assert {arm.counts["denoiser"] for arm in outcome.arms} == {STEPS * SIZE}
    calls = {arm.method.name: arm.counts["reward"] for arm in outcome.arms}
    assert calls["base"] == calls["best-of-n"] == calls["importance"] == SIZE
    assert SIZE < calls["fk"] <= SIZE * (STEPS + 1)
    assert outcome.calibration == {"denoiser": 48 * STEPS, "reward": 48}


def test_strength_is_in_standard_deviations_of_the_base_samples(tmp_path: Path) -> None:
    outcome = run(tmp_path, strengths=(2.0,), classes=tuple(range(4)))
    [strength] = outcome.strengths
    values = outcome.arm("base").rewards["bright"]
    assert outcome.calibration == {}
    assert strength.size == strength.allowed == 4 * SIZE
    squares = (values - values.mean(0)).square().sum() / (4 * SIZE - 4)
    assert strength.sd == pytest.approx(squares.sqrt().item())
    assert strength.mean == pytest.approx(values.mean().item())
    assert strength.scale * strength.sd == pytest.approx(2.0, rel=0.005)


def test_lambda_is_a_property_of_the_model(tmp_path: Path) -> None:
    usual = run(tmp_path)
    assert usual.calibration == {"denoiser": 48 * STEPS, "reward": 48}
    for options in ({"seed": 1}, {"particles": 3}, {"methods": ("fk",)}):
        other = run(tmp_path, **options)
        assert other.strengths == usual.strengths
        assert other.calibration == {"denoiser": 64 * STEPS, "reward": 64}
    assert usual.strengths[0].size == 64
    text = align.write_report(usual).read_text(encoding="utf-8")
    assert "measured over 64 samples" in text
    assert "Of the 64 samples for that, 16 are those of base and 48 were drawn besides" in text


def test_scale_sets_lambda(tmp_path: Path) -> None:
    outcome = run(tmp_path, scales=(7.5,), methods=("fk",))
    assert outcome.strengths[0].scale == 7.5
    assert outcome.calibration == {}


def test_importance_sampling_says_what_its_samples_say(tmp_path: Path) -> None:
    outcome = run(tmp_path, scales=(20.0,), methods=("importance",))
    arm = outcome.arm("importance")
    log_weights = 20.0 * arm.rewards["bright"][:, 0]
    log_z = log_weights.logsumexp(0) - math.log(SIZE)
    [score] = arm.scores
    assert score.log_normalizer == pytest.approx(log_z.item())
    mean = (log_weights.softmax(0) * arm.rewards["bright"][:, 0]).sum()
    assert score.reward_mean["bright"] == pytest.approx(mean.item())
    assert score.ess == pytest.approx(1 / log_weights.softmax(0).square().sum().item())


def test_base_is_not_tilted(tmp_path: Path) -> None:
    weak, strong = (run(tmp_path, scales=(scale,), methods=("base",)) for scale in (0.1, 90.0))
    assert torch.equal(weak.arm("base").samples, strong.arm("base").samples)
    assert torch.equal(strong.arm("base").weights, torch.full((SIZE, 1), 1 / SIZE).double())
    assert strong.arm("base").scores[0].log_normalizer is None


def test_best_of_n_returns_its_best(tmp_path: Path) -> None:
    arm = run(tmp_path, methods=("base", "best-of-n")).arm("best-of-n")
    values = arm.rewards["bright"][:, 0]
    assert torch.equal(values, values.sort(descending=True).values)
    [score] = arm.scores
    assert score.reward_mean["bright"] == score.reward_best["bright"] == values.max()
    assert score.ess is score.log_normalizer is score.diversity is None


def test_steering_raises_the_reward(tmp_path: Path) -> None:
    outcome = run(tmp_path, steps=10)
    means = {arm.method.name: arm.scores[0].reward_mean["bright"] for arm in outcome.arms}
    assert means["fk"] > means["base"] + outcome.strengths[0].sd


def test_a_seed_fixes_every_method_on_its_own(tmp_path: Path) -> None:
    together = run(tmp_path, scales=(30.0,), seed=3)
    alone = run(tmp_path, scales=(30.0,), seed=3, methods=("fk",))
    other = run(tmp_path, scales=(30.0,), seed=4, methods=("fk",))
    assert torch.equal(together.arm("fk").samples, alone.arm("fk").samples)
    assert not torch.equal(other.arm("fk").samples, alone.arm("fk").samples)


def test_classes_are_populations(tmp_path: Path) -> None:
    outcome = run(tmp_path, classes=("3,8", "0"), methods=ALL)
    assert outcome.labels == ("3", "8", "0")
    for arm in outcome.arms:
        assert arm.samples.shape[1:] == (3, 1, 8, 8)
        assert arm.samples.shape[0] == SIZE or arm.method.returns == "a maximiser"
        assert arm.counts["denoiser"] == 3 * SIZE * STEPS
        assert len(arm.scores) == 3
        assert all(0 <= score.judge <= 1 for score in arm.scores)
    page = align.write_report(outcome).read_text(encoding="utf-8")
    assert all(f"class {label}" in page for label in outcome.labels)


def test_all_classes(tmp_path: Path) -> None:
    assert len(run(tmp_path, classes=("all",), particles=2, methods=("base",)).labels) == 10


def test_rewards_add_up(tmp_path: Path) -> None:
    outcome = run(tmp_path, rewards=("bright", "symmetric"), scales=(5.0, -2.0), methods=ALL)
    for arm in outcome.arms:
        total = 5.0 * arm.rewards["bright"] - 2.0 * arm.rewards["symmetric"]
        assert torch.allclose(arm.objective, total)
    best = outcome.arm("best-of-n").objective[:, 0]
    assert torch.equal(best, best.sort(descending=True).values)
    assert outcome.single_reward is None
    assert "λ * reward" in align.write_report(outcome).read_text(encoding="utf-8")


def test_diversity_counts_copies_as_nothing(tmp_path: Path) -> None:
    from pyro_twist.align.outcome import _diversity

    distances = 1 - torch.eye(4).double()
    assert _diversity(distances, torch.full((4,), 0.25).double()) == pytest.approx(1.0)
    assert _diversity(distances, torch.tensor([1.0, 0, 0, 0]).double()) == 0.0
    outcome = run(tmp_path, methods=("base",))
    assert outcome.relative_diversity(outcome.arm("base"), 0) == 1.0


@pytest.mark.parametrize("particles", [1, 2])
def test_hardly_any_particles(tmp_path: Path, particles: int) -> None:
    outcome = run(tmp_path, particles=particles, methods=ALL)
    align.write_report(outcome)
    json.loads((tmp_path / "results.json").read_text())


def test_one_step(tmp_path: Path) -> None:
    assert len(run(tmp_path, steps=1).arms) == len(align.default_methods())


def test_files(tmp_path: Path) -> None:
    outcome = run(tmp_path, classes=(3,))
    page = align.write_report(outcome)
    assert page == tmp_path / "report.html"
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    plots = {"grid.png", "rewards.png", "steps-fk.png", "steps-tri-tsmc.png"}
    learned = {f"{kind}-tri-tsmc.png" for kind in ("push", "twist", "iterations")}
    arms = {f"samples/{name}.npz" for name in ("base", "best-of-n", "fk", "tri-tsmc")}
    assert names == {"report.html", "results.json", "twist.safetensors", *plots, *learned, *arms}
    text = page.read_text(encoding="utf-8")
    assert "http" not in text
    assert all(word in text for word in ("λ = ", "best-of-n", "log Z", "pyro-twist align"))


def test_saved_samples_are_those_of_the_run(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    arm = outcome.arm("fk")
    with np.load(tmp_path / "samples/fk.npz", allow_pickle=False) as saved:
        assert np.array_equal(saved["samples"], arm.samples.numpy())
        assert np.array_equal(saved["log_weights"], arm.log_weights.numpy())
        assert np.array_equal(saved["reward:bright"], arm.rewards["bright"].numpy())
        assert json.loads(str(saved["about"]))["scales"] == {"bright": outcome.strengths[0].scale}


def test_results_are_strict_json(tmp_path: Path) -> None:
    def limited(images: Tensor) -> Tensor:
        return torch.where(images[:, 0, 3, 3] > 0.5, bright(images), -torch.inf)

    outcome = run(tmp_path, rewards=(limited,), strengths=(1.0,))

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert found["error"] is None
    assert [method["name"] for method in found["methods"]] == [
        "base",
        "best-of-n",
        "fk",
        "tri-tsmc",
    ]
    assert found["methods"][0]["scores"][0]["reward_mean"]["limited"] == "-inf"
    assert found["options"]["particles"] == SIZE
    assert found["rewards"][0]["scale"] == outcome.strengths[0].scale
    assert found["versions"]["torch"]
    align.write_report(outcome)


def test_what_had_finished_is_kept_when_a_reward_fails(tmp_path: Path) -> None:
    calls = []

    def leaves(images: Tensor) -> Tensor:
        calls.append(len(images))
        if sum(calls) > SIZE:
            raise ConnectionError("the server is gone")
        return bright(images)

    with pytest.raises(AlignmentFailed, match="'leaves' failed .* the server is gone") as caught:
        run(tmp_path, rewards=(leaves,))
    outcome = caught.value.outcome
    assert [arm.method.name for arm in outcome.arms] == ["base"]
    assert (tmp_path / "samples/base.npz").exists()
    found = json.loads((tmp_path / "results.json").read_text())
    assert "the server is gone" in found["error"]
    assert "ended early" in align.write_report(outcome).read_text(encoding="utf-8")


def test_a_method_that_loses_all_particles_does_not_end_the_job(tmp_path: Path) -> None:
    def impossible(images: Tensor) -> Tensor:
        return torch.full((len(images),), -torch.inf)

    outcome = run(tmp_path, rewards=(impossible,), scales=(1.0,))
    assert [arm.method.name for arm in outcome.arms] == ["base"]
    assert set(outcome.failures) == {"best-of-n", "fk", "tri-tsmc"}
    assert "fk failed" in align.write_report(outcome).read_text(encoding="utf-8")


def test_constant_reward_has_no_strength(tmp_path: Path) -> None:
    def constant(images: Tensor) -> Tensor:
        return torch.ones(len(images))

    with pytest.raises(AlignmentFailed, match="'constant' does not vary over 64") as caught:
        run(tmp_path, rewards=(constant,))
    [row] = summary_rows(caught.value.outcome)
    assert row[1].startswith("1.000")
    outcome = run(tmp_path, rewards=(constant,), scales=(1.0,))
    assert outcome.arm("fk").scores[0].reward_mean == {"constant": 1.0}


@pytest.mark.parametrize(("allowed", "told"), [(0, "all 64 samples"), (1, "all but 1 of 64")])
def test_reward_that_forbids_everything(tmp_path: Path, allowed: int, told: str) -> None:
    left = [allowed]

    def forbids(images: Tensor) -> Tensor:
        values = torch.full((len(images),), -torch.inf)
        values[: left[0]], left[0] = 1.0, 0
        return values

    with pytest.raises(AlignmentFailed, match=f"'forbids' is -inf on {told}"):
        run(tmp_path, rewards=(forbids,))


def test_a_method_is_added_by_one_entry(tmp_path: Path) -> None:
    def make(setting: Setting) -> ImportanceSampling:
        return ImportanceSampling(setting.model, **setting.common)

    register_method(Method("mine", "Mine", "Does it.", "samples of the tilted law", make, True))
    try:
        outcome = run(tmp_path)
        assert outcome.arms[-1].method.name == "mine"
        assert "mine" in align.write_report(outcome).read_text(encoding="utf-8")
    finally:
        del _METHODS["mine"]


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    options = AlignOptions(model="digits", steps=2, particles=2, out=folder)
    align.run(options, save=False)
    assert not folder.exists()


def test_reward_objects_are_used_as_they_are(tmp_path: Path) -> None:
    reward = Reward(bright, name="mine", chunk_size=2)
    outcome = run(tmp_path, rewards=(reward, "symmetric"))
    assert set(outcome.arm("fk").rewards) == {"mine", "symmetric"}
    assert reward.num_calls > SIZE


@pytest.mark.parametrize("name", ["x", "x_1", "objective", "lookahead"])
def test_rewards_may_not_hide_the_state(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=name):
        run(tmp_path, rewards=(Reward(bright, name=name),))


def test_progress_adds_up(tmp_path: Path) -> None:
    class Recorder(align.Progress):
        def __init__(self) -> None:
            self.seen: list[tuple[str, int]] = []
            self.done: list[int] = []

        def begin(self, title: str, total: int) -> None:
            self.seen.append((title, total))

        def advance(self, done: int, ess: float, log_normalizer: float) -> None:
            assert 0 < ess <= 48 + 1e-6
            weighted = self.seen[-1][0] in ("FK steering", "TRI-TSMC")
            assert math.isnan(log_normalizer) != weighted
            self.done.append(done)

    recorder = Recorder()
    options = AlignOptions(model="digits", steps=STEPS, particles=SIZE, out=tmp_path)
    align.run(options, progress=recorder, save=False)
    titles = ("Base model", "Measuring the reward", "Best of N", "FK steering", "TRI-TSMC")
    sizes = (SIZE, 48, SIZE, SIZE, SIZE)
    assert recorder.seen == [(t, STEPS * n) for t, n in zip(titles, sizes, strict=True)]
    assert recorder.done.count(STEPS * SIZE) >= 4


def test_ancestors_are_counted(tmp_path: Path) -> None:
    outcome = run(tmp_path, methods=ALL, classes=("3", "8"))
    diagnostics = outcome.arm("fk").result.diagnostics
    assert diagnostics is not None
    first = diagnostics.lineages()[0].reshape(SIZE, 2)
    for p, score in enumerate(outcome.arm("fk").scores):
        assert score.ancestors == len(first[:, p].unique()) < SIZE
        assert score.ess_min == diagnostics.ess.reshape(-1, 2)[:, p].min()
        assert score.distinct <= SIZE
        assert outcome.arm("base").scores[p].ancestors == SIZE
        assert outcome.arm("best-of-n").scores[p].ancestors is None
        assert outcome.arm("tri-tsmc").scores[p].ancestors is None
    assert "tri-tsmc pools several passes or" in " ".join(remarks(outcome))
    text = align.write_report(outcome).read_text(encoding="utf-8")
    assert "final ESS" in text and "ancestors" in text
    found = json.loads((tmp_path / "results.json").read_text())
    assert {"ancestors", "ess_min", "distinct", "judge_error"} <= set(
        found["methods"][0]["scores"][0]
    )


def test_standard_errors(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    values = outcome.arm("base").rewards["bright"][:, 0]
    [score] = outcome.arm("base").scores
    assert score.reward_error["bright"] == pytest.approx(values.std().item() / SIZE**0.5)
    assert outcome.arm("best-of-n").scores[0].reward_error == {"bright": None}
    row = summary_rows(outcome)[0]
    assert row[1].endswith(f" ±{score.reward_error['bright']:.3f}")
    values, weights = torch.arange(8.0), torch.full((8,), 1 / 8).double()
    families = torch.tensor([7, 7, 0, 0, 3, 3, 5, 5])
    means = torch.tensor([0.5, 2.5, 4.5, 6.5])
    expected = means.std().item() / 2
    assert standard_error(values, weights, families) == pytest.approx(expected)
    assert standard_error(values, weights, families.clamp(max=4)) is None
    assert standard_error(values, weights, None) is None
    assert standard_error(values.log(), weights, torch.arange(8)) is None


def test_best_of_n_has_the_best_of_base(tmp_path: Path) -> None:
    outcome = run(tmp_path, seed=5)
    base, best = outcome.arm("base"), outcome.arm("best-of-n")
    order = base.rewards["bright"][:, 0].argsort(descending=True)
    assert torch.equal(best.samples, base.samples[order])
    assert best.scores[0].reward_best == base.scores[0].reward_best
    assert "same samples as base" in align.write_report(outcome).read_text(encoding="utf-8")


@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_best_without_and_against_the_reward(tmp_path: Path, scale: float) -> None:
    outcome = run(tmp_path, scales=(scale,), methods=("base", "best-of-n"))
    values = outcome.arm("base").rewards["bright"]
    expected = values.min() if scale < 0 else values.max()
    for arm in outcome.arms:
        assert arm.scores[0].reward_best["bright"] == expected
    several = run(tmp_path, scales=(scale,), methods=("base",), classes=("3", "8"))
    bests = [score.reward_best["bright"] for score in several.arm("base").scores]
    shown = min(bests) if scale < 0 else max(bests)
    assert float(summary_rows(several)[0][2]) == pytest.approx(shown, abs=1e-3)


def test_saved_weights_of_a_maximiser_agree(tmp_path: Path) -> None:
    run(tmp_path)
    with np.load(tmp_path / "samples/best-of-n.npz") as saved:
        assert saved["samples"].shape[:2] == (SIZE, 1)
        assert np.array_equal(np.exp(saved["log_weights"]), saved["weights"])
        assert saved["weights"][:, 0].tolist() == [1.0] + [0.0] * (SIZE - 1)


def test_forbidden_samples_are_told(tmp_path: Path) -> None:
    def limited(images: Tensor) -> Tensor:
        return torch.where(images[:, 0, 3, 3] > 0.5, bright(images), -torch.inf)

    outcome = run(tmp_path, rewards=(limited,), strengths=(1.0,))
    [strength] = outcome.strengths
    assert 1 < strength.allowed < strength.size == 64
    text = align.write_report(outcome).read_text(encoding="utf-8")
    assert f"over the {strength.allowed} of 64 samples that are not -inf" in text


def test_captions_count(tmp_path: Path) -> None:
    few = run(tmp_path, particles=4, classes=("3", "8"))
    text = align.write_report(few).read_text(encoding="utf-8")
    assert "4 equally weighted draws" in text and "small grey cross" in text
    assert "deviation within classes" in text
    assert text.index("In numbers") < text.index("<h2>Samples") < text.index("Class by class")
    one = run(tmp_path, particles=1)
    assert "1 base samples" not in align.write_report(one).read_text(encoding="utf-8")


def test_one_method_alone_misses_its_reference(tmp_path: Path) -> None:
    outcome = run(tmp_path, methods=("fk",))
    assert "add --method base" in " ".join(remarks(outcome))


def test_results_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    align.write_report(run(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "samples" / "own.npz").write_text("mine")

    def broken(images: Tensor) -> Tensor:
        raise OSError("gone")

    with pytest.raises(AlignmentFailed):
        run(tmp_path, rewards=(broken,), methods=("base",))
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert names == {"results.json", "notes.txt", "samples/own.npz"}


@pytest.mark.parametrize("name", ["report.html", "results.json"])
def test_files_of_others_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(OptionError, match="holds files that are no results"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_wrong_options_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        run(tmp_path / "new", rewards=("nope",))
    assert not (tmp_path / "new").exists()


def test_reward_without_return(tmp_path: Path) -> None:
    def forgetful(images: Tensor) -> None:
        images.mean()

    with pytest.raises(AlignmentFailed, match="base: .*forgetful returned None; it may lack"):
        run(tmp_path, rewards=(forgetful,))


def test_several_rewards_are_headed_as_their_sum(tmp_path: Path) -> None:
    outcome = run(tmp_path, rewards=("bright", "symmetric"), methods=("base",))
    assert [column.heading for column in columns(outcome)][0] == "lambda * reward"
    assert ">λ * reward<" in align.write_report(outcome).read_text(encoding="utf-8")
