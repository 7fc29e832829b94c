# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Four particles on the zoo's image models: guidance, FK steering and URGE beside each other.

In the shape of the table that URGE was published with: rewards with a gradient, and a judge that
nothing optimises. Runs are appended to a file as they finish; a run that was killed goes on.

Run ``python -m tests.perf.few``.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pyro_twist import zoo
from pyro_twist.algorithms import Algorithm, Comparison, Setting, compare
from pyro_twist.infer import ImportanceSampling
from pyro_twist.twists import GradientTwist, guided
from tests.perf.study import BENCHMARKS
from tests.perf.tasks import TASKS, Task, base_model, make_model

__all__ = ["NAMES", "PICKED"]

BUDGET, SEEDS = 4, 20
PICKED = ("ink", "three", "mirror", "lopsided", "smooth", "green", "food")
NAMES = ("fk", "guided-fk", "tds", "urge", "tri-one-pass")


def _guidance(setting: Setting) -> Any:
    model = guided(setting.model, GradientTwist(setting.model, key="guidance"))
    return ImportanceSampling(model, **setting.common)


GUIDANCE = Algorithm("guidance", "Guidance", "No weights.", "samples of the model", _guidance)


@cache
def _judge(name: str) -> Any:
    return zoo.judge(name)


def _certainty(task: Task, state: Any) -> torch.Tensor:
    images = base_model(task.zoo).decode(state["x"])
    with torch.no_grad():
        return _judge(task.zoo)(images.float()).softmax(-1).amax(-1).double()


def found(task: Task, path: Path, seeds: int) -> Comparison:
    """All arms on a task."""
    measures = {"judge": lambda state: _certainty(task, state)}
    arms = ["base", GUIDANCE, *NAMES]
    options = {"budget": BUDGET, "seeds": seeds, "measures": measures}
    return compare(make_model(task), arms, path=path / f"{task.name}.jsonl", **options)


def report(comparisons: dict[str, Comparison]) -> str:
    """A table for each task, and one of differences to FK steering."""
    parts = [_differences(comparisons)]
    for name, one in comparisons.items():
        parts.append(f"**{name}** ({TASKS[name].zoo}, {TASKS[name].nature})\n\n{one.table()}")
    return "\n\n".join(parts)


def _differences(comparisons: dict[str, Comparison]) -> str:
    others = [GUIDANCE.name, *NAMES[1:]]
    head = ["task", *(f"{name}: E[reward], log Z" for name in others)]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * len(others)]
    for task, one in comparisons.items():
        cells = [_difference(one, name) for name in others]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "Less FK steering, seed by seed:\n\n" + "\n".join(lines)


def _difference(one: Comparison, name: str) -> str:
    figures = ("objective", "log_normalizer")
    return ", ".join(str(one.difference(name, "fk", figure)) for figure in figures)


def main() -> None:
    """Runs what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tasks", nargs="*", choices=PICKED, default=list(PICKED))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--rows", type=Path, default=BENCHMARKS / "few")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "few.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    comparisons = {n: found(TASKS[n], options.rows, options.seeds) for n in options.tasks}
    text = report(comparisons)
    print(text)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
