# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The benchmark of algorithms on prompts: its prompts, its judge, and its tables."""

from __future__ import annotations

import json

import pytest
import torch

from pyro_twist import zoo
from tests.perf import prompts
from tests.perf.study import BENCHMARKS


def test_the_sets_of_prompts_are_what_they_say() -> None:
    trained, held_out = (prompts.draw_prompts(which) for which in prompts.SETS)
    seen, known = set(zoo.scorer(prompts.MODEL, "").names), set(zoo.judge(prompts.MODEL).names)
    assert set(trained) <= seen and not set(held_out) & seen
    assert set(held_out) <= known and len({*trained, *held_out}) == 2 * prompts.PROMPTS
    assert trained == prompts.draw_prompts("trained")


def test_the_judge_sees_each_population_with_its_own_prompt() -> None:
    names = prompts.draw_prompts("trained", 3)
    model = prompts.make_model(names)
    x = torch.rand((2, 3, 3, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    judged = prompts.Judged(model, names)
    found, first = judged.probability({"x": x}), judged.first({"x": x})
    images = model.decode(x[1, 2][None]).float()
    alone = judged.judge.probability(images, names[2])
    assert found.shape == first.shape == (2, 3)
    assert float(found[1, 2]) == pytest.approx(float(alone[0]), rel=1e-4)
    values = model.evaluate(x)["fidelity"]
    assert float(values[1, 2]) == pytest.approx(
        float(zoo.scorer(prompts.MODEL, names[2])(images)[0]), abs=1e-3
    )


@pytest.mark.parametrize("which", prompts.SETS)
def test_the_rows_are_at_equal_calls(which: str) -> None:
    path = BENCHMARKS / "prompts" / f"{which}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {row["algorithm"] for row in rows} == set(prompts.ARMS)
    assert {row["denoiser"] for row in rows} == {prompts.BUDGET * prompts.PROMPTS * 50}
    steered = {"fk", "urge", "tri-one-pass"}
    calls = {row["reward"] for row in rows if row["algorithm"] in steered}
    # copies that the last step leaves as they are are scored once
    assert 0.99 * max(calls) < min(calls)
    assert len({row["seed"] for row in rows}) == prompts.SEEDS
