# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
TRI-TSMC, Feynman-Kac steering and best-of-N at equal denoiser calls and equal reward calls.

Every arm has the same number of trajectories, four times the particles of a pass, those that
TRI-TSMC learns from included. The figure that decides is the evidence: by how much the mean of
``log Z`` falls short of a long reference run, and its spread over seeds.

Run ``make compare``, or with ``make compare-full`` all of it. Runs are appended to a file as they
finish, and those that are in it are not repeated: a run that was killed goes on. The report is
made from that file.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_twist import zoo
from pyro_twist.infer import ImportanceSampling, SMCResult
from pyro_twist.twists import DiscountedLookahead, LookaheadTwist, SurrogateTwist
from tests.perf.arms import ABLATIONS as COMMON_ABLATIONS
from tests.perf.arms import (
    Arm,
    importance,
    learned,
    long_learned,
    long_steering,
    one_pass,
    pooled,
    steering,
)
from tests.perf.comparison import Tables
from tests.perf.harness import Job
from tests.perf.study import BENCHMARKS, Study, common_figures, rounded
from tests.perf.tasks import TASKS, Task, base_model, make_model

__all__ = ["ABLATIONS", "ARMS", "STUDY"]

SEEDS = 20
REFERENCE_PARTICLES = {"digits": 10_000, "emoji": 1_000}
# where runs of that size were too far apart
MORE_PARTICLES = {"three": 2, "lopsided": 4, "file": 2, "dense": 2, "dark-eight": 4, "green": 4}


def _isotropic(model: Any) -> Any:
    twist = SurrogateTwist(model, surrogate="linear", spectral=False, gain=1.0, fitted=False)
    return LookaheadTwist(model) + twist


def _unfitted(model: Any) -> Any:
    return DiscountedLookahead(model) + SurrogateTwist(model, fitted=False)


ARMS: dict[str, Arm] = {
    "importance": importance,
    "fk": steering("fk"),
    "fk-few": steering("fk-few", shots=5),
    "fk-pooled": pooled,
    "tri": learned("tri"),
    "tri, one pass": one_pass,
}
ABLATIONS: dict[str, Arm] = {
    **COMMON_ABLATIONS,
    "tri, likelihood off": learned("tri, likelihood off", _unfitted),
    "tri, isotropic gain 1": learned("tri, isotropic gain 1", _isotropic),
}
REFERENCES: dict[str, Arm] = {"reference fk": long_steering, "reference tri": long_learned}


def figures(task: Task, label: str, result: SMCResult) -> dict[str, Any]:
    """What is measured of a result."""
    found, weights = common_figures(task, label, result)
    images = base_model(task.zoo).decode(result.state["x"])
    found["judge"] = float((weights * _certainty(task.zoo, images)).sum())
    found["diversity"] = _spread(images, weights) / _base_spread(task.zoo)
    return rounded(found)


def _certainty(name: str, images: Tensor) -> Tensor:
    """How sure the judge is of its own opinion: low for pictures unlike any class."""
    with torch.no_grad():
        return _judge(name)(images.float()).softmax(-1).amax(-1).double()


@cache
def _judge(name: str) -> Any:
    return zoo.judge(name)


def _spread(images: Tensor, weights: Tensor) -> float:
    """Mean distance of two draws."""
    distance = torch.cdist(images.flatten(1).double(), images.flatten(1).double())
    return float(weights @ distance @ weights)


@cache
def _base_spread(name: str) -> float:
    state = ImportanceSampling(base_model(name), 256, seed=0, progress=False).run().state
    distance = torch.pdist(base_model(name).decode(state["x"]).flatten(1).double())
    return float(distance.mean())


def plan(options: Namespace) -> Iterator[Job]:
    """The jobs, the most telling first."""
    for seed in range(SEEDS):
        for task in TASKS.values():
            yield Job(task.name, 4, seed, tuple(ARMS))
    if options.references:
        yield from _reference_jobs()
    for seed in range(SEEDS):
        for task in TASKS.values():
            if options.full or task.zoo == "digits":
                yield Job(task.name, 16, seed, tuple(ARMS))
    if options.ablations or options.full:
        for seed in range(SEEDS):
            for task in TASKS.values():
                if task.zoo == "digits":
                    yield Job(task.name, 4, seed, tuple(ABLATIONS))


def _reference_jobs() -> Iterator[Job]:
    for seed, arm in [(0, "reference fk"), (0, "reference tri"), (10, "reference tri")]:
        for task in TASKS.values():
            size = REFERENCE_PARTICLES[task.zoo] * MORE_PARTICLES.get(task.name, 1)
            yield Job(task.name, size, seed, (arm,))


def run(job: Job) -> list[dict[str, Any]]:
    """Runs a job of the study."""
    return STUDY.run(job)


STUDY = Study(
    tasks=TASKS,
    arms=ARMS,
    ablations=ABLATIONS,
    references=REFERENCES,
    make_model=make_model,
    figures=figures,
    plan=plan,
    report=Tables(TASKS).report,
    rows=Path("results/compare/rows.jsonl"),
    known=BENCHMARKS / "references.jsonl",
    sizes=(4, 16),
    seeds=SEEDS,
)


if __name__ == "__main__":
    STUDY.main(__doc__.split("\n\n")[0], run)
