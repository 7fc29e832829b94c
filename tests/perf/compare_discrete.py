# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
TRI-TSMC, FK steering, TReASURe and best-of-N on molecules and texts, at equal calls.

Every arm has the same number of trajectories, four times N, those that TRI-TSMC learns from
included. Arms of FK steering and of TRI-TSMC also have the same number of reward calls: one for
each particle and step, or four for every fourth step. A tree search cannot have both: ``tree`` has
as many reward calls, ``tree, wide`` as many denoiser calls and four times the reward calls.

Run ``make compare-discrete``, or with ``make compare-discrete-full`` all of it. Runs are appended
to a file as they finish, and those that are in it are not repeated.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_twist.infer import ImportanceSampling, SMCResult, TreeSearch
from pyro_twist.rewards.charlm import char_lm
from pyro_twist.rewards.text import distinct
from pyro_twist.twists import DiscountedLookahead, TokenTilt
from tests.perf.arms import ABLATIONS as COMMON_ABLATIONS
from tests.perf.arms import (
    LABELS,
    PASSES,
    Arm,
    Results,
    importance,
    learned,
    long_learned,
    one_pass,
    options_of,
    pooled,
    steering,
)
from tests.perf.comparison_discrete import SequenceTables
from tests.perf.harness import Job
from tests.perf.study import BENCHMARKS, Study, common_figures, rounded
from tests.perf.tasks_discrete import TASKS, SequenceTask, base_model, judge, make_model

__all__ = ["ABLATIONS", "ARMS", "STUDY"]

SEEDS = 20
# particles in a pass, and the seeds that are run unless all are asked for
FEW_SEEDS = {4: 10, 16: 4, 8: 4}
# samples of the base model; a fifth as many particles with a twist that was learnt beforehand
REFERENCE_PARTICLES = {"molecules": 12_000, "text": 4_000}


def tree(name: str, share: float) -> Arm:
    """
    TReASURe with four children of a node.

    :param str name: What the arm is reported as.
    :param float share: The nodes that are kept, as a share of the trajectories of other arms.
    """

    def arm(model: Any, n: int, seed: int) -> Results:
        width, group = int(share * PASSES * n), model.group_size
        search = TreeSearch(model, width, 4, group_size=group, seed=seed, progress=False)
        return {name: search.run()}

    return arm


def _several_completions(model: Any) -> Any:
    return DiscountedLookahead(model, completions=4, every=4) + TokenTilt(model)


def _base(model: Any, n: int, seed: int) -> Results:
    found = importance(model, n, seed)
    return {**found, "base": found["importance"]}


ARMS: dict[str, Arm] = {
    "importance": _base,
    "fk": steering("fk"),
    "fk, 4 completions": steering("fk, 4 completions", completions=4, every=4),
    "fk-pooled": pooled,
    "tree": tree("tree", 0.25),
    "tree, wide": tree("tree, wide", 1.0),
    "tri": learned("tri"),
    "tri, one pass": one_pass,
}
ABLATIONS: dict[str, Arm] = {
    **COMMON_ABLATIONS,
    "tri, 4 completions": learned("tri, 4 completions", _several_completions),
}


@cache
def _base_samples(kind: str, number: int, seed: int) -> SMCResult:
    return ImportanceSampling(base_model(kind), number, **options_of(seed)).run()


def long_importance(model: Any, n: int, seed: int) -> Results:
    """A reference run of importance sampling; all tasks weight the same samples."""
    kind = "molecules" if model.model is base_model("molecules") else "text"
    result = _base_samples(kind, n, seed)
    samples = model.decode(result.state["x"])
    values = {name: reward(samples).double() for name, reward in model.rewards.items()}
    log_weights = sum(model.scales[name] * value for name, value in values.items())
    log_normalizer = log_weights.logsumexp(0) - math.log(n)
    state = {**result.state, **values}
    counts = {**result.counts, "reward": n}
    found = replace(result, state=state, log_weights=log_weights, counts=counts)
    return {"reference importance": replace(found, log_normalizer=log_normalizer)}


REFERENCES: dict[str, Arm] = {
    "reference importance": long_importance,
    "reference tri": lambda model, n, seed: long_learned(model, n // 5, seed),
}


def figures(task: SequenceTask, label: str, result: SMCResult) -> dict[str, Any]:
    """What is measured of a result."""
    found, weights = common_figures(task, label, result)
    if label.startswith("reference"):
        return rounded(found)
    samples = base_model(task.zoo).decode(result.state["x"])
    found["success"] = float((weights * _successes(task, result)).sum())
    found["judge"] = float((weights * judge(task.name)(samples)).sum())
    found["samples"] = _drawn(samples, weights)
    return rounded({**found, **_quality(task.zoo, found["samples"])})


def _successes(task: SequenceTask, result: SMCResult) -> Tensor:
    """Whether all rewards are as high as they should be."""
    met = [result.state[name].double() >= least for name, least in task.success.items()]
    return torch.stack(met).all(0).double()


def _drawn(samples: Sequence[str], weights: Tensor) -> list[str]:
    """As many draws as there are particles, from their weights."""
    if not weights.sum() > 0:
        return []
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(weights, len(samples), True, generator=generator)
    return [samples[place] for place in chosen.tolist()]


def _quality(kind: str, samples: list[str]) -> dict[str, Any]:
    """Fluency and Dist-n of texts; validity, uniqueness and diversity of molecules."""
    if not samples:
        return {}
    if kind == "text":
        fluency = float(char_lm().mean_log_prob(samples).mean())
        return {"fluency": fluency, **{f"dist_{n}": _distinct(samples, n) for n in (1, 2, 3)}}
    distances = _molecules().distances(samples)
    return {
        "valid": sum(map(bool, samples)) / len(samples),
        "unique": len(set(samples)) / len(samples),
        "diversity": float(distances.sum()) / (len(samples) * (len(samples) - 1)),
    }


def _distinct(samples: list[str], n: int) -> float:
    try:
        return distinct(samples, n)
    except ValueError:  # no text has as many words
        return float("nan")


@cache
def _molecules() -> Any:
    from pyro_twist.align.molecules import ZooMolecules

    return ZooMolecules("molecules")


def plan(options: Namespace) -> Iterator[Job]:
    """The jobs, the most telling first."""
    for size, few in FEW_SEEDS.items():
        for seed in range(SEEDS if options.full else few):
            for task in TASKS.values():
                yield Job(task.name, size, seed, tuple(ARMS))
    if options.references:
        yield from _reference_jobs()
    if options.ablations or options.full:
        for seed in range(SEEDS):
            for task in TASKS.values():
                yield Job(task.name, 4, seed, tuple(ABLATIONS))


def _reference_jobs() -> Iterator[Job]:
    for seed, arm in [(0, "reference importance"), (0, "reference tri"), (1, "reference tri")]:
        for task in TASKS.values():
            yield Job(task.name, REFERENCE_PARTICLES[task.zoo], seed, (arm,))


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
    report=SequenceTables(TASKS).report,
    rows=Path("results/compare_discrete/rows.jsonl"),
    known=BENCHMARKS / "references_discrete.jsonl",
    sizes=tuple(FEW_SEEDS),
    seeds=SEEDS,
    labels={**LABELS, "importance": (*LABELS["importance"], "base")},
)


if __name__ == "__main__":
    STUDY.main(__doc__.split("\n\n")[0], run)
