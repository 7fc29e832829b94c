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

import argparse
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_twist import zoo
from pyro_twist.infer import (
    ImportanceSampling,
    SMCFailed,
    SMCResult,
    TrustRegionTwist,
    TwistedSMC,
    pool,
)
from pyro_twist.infer.weights import effective_sample_size
from pyro_twist.twists import DiscountedLookahead, LookaheadTwist, SurrogateTwist
from tests.perf.harness import Job, missing, read, run_all
from tests.perf.tasks import TASKS, Task, base_model, make_model

__all__ = ["ABLATIONS", "ARMS", "main"]

PASSES = 4
_WARM: set[str] = set()
SEEDS = 20
FOLDER = Path(__file__).parents[2] / "docs" / "_static" / "benchmarks"
REFERENCE_PARTICLES = {"digits": 10_000, "emoji": 1_000}
# where runs of that size were too far apart
MORE_PARTICLES = {"three": 2, "lopsided": 4, "file": 2, "dense": 2, "dark-eight": 4, "green": 4}

Results = dict[str, SMCResult]
Arm = Callable[[Any, int, int], Results]


def _options(seed: int) -> dict[str, Any]:
    return {"seed": seed, "progress": False}


def _importance(model: Any, n: int, seed: int) -> Results:
    result = ImportanceSampling(model, PASSES * n, **_options(seed)).run()
    return {"importance": result, "best-of-n": result}


def _steering(model: Any, n: int, seed: int) -> Results:
    smc = TwistedSMC(model, LookaheadTwist(model), PASSES * n, **_options(seed))
    return {"fk": smc.run()}


def _few(model: Any, n: int, seed: int) -> Results:
    twist = LookaheadTwist(model, every=max(1, len(model.timesteps) // 5))
    return {"fk-few": TwistedSMC(model, twist, PASSES * n, **_options(seed)).run()}


def _pooled(model: Any, n: int, seed: int) -> Results:
    found, before = [], Counter(model.counts)
    for k in range(PASSES):
        options = _options(10_000 + PASSES * seed + k)
        with contextlib.suppress(SMCFailed):  # an estimate of zero
            found.append(TwistedSMC(model, LookaheadTwist(model), n, **options).run())
    if not found:
        raise SMCFailed("no particle of any run has weight")
    pooled, share = pool(found), math.log(len(found) / PASSES)
    log_weights, log_normalizer = pooled.log_weights + share, pooled.log_normalizer + share
    counts = dict(Counter(model.counts) - before)
    pooled = replace(pooled, log_weights=log_weights, log_normalizer=log_normalizer, counts=counts)
    return {"fk-pooled": pooled}


def _learned(name: str, make: Callable[[Any], Any] | None = None, **options: Any) -> Arm:
    def arm(model: Any, n: int, seed: int) -> Results:
        guide = None if make is None else make(model)
        smc = TrustRegionTwist(
            model, guide, n, num_iterations=PASSES - 1, **options, **_options(seed)
        )
        found = {name: smc.run()}
        if name == "tri":
            found["tri, last pass"] = smc.last
        return found

    return arm


def _one_pass(model: Any, n: int, seed: int) -> Results:
    """The same trajectories in a single pass, from which the twist learns while it goes on."""
    smc = TrustRegionTwist(model, None, PASSES * n, num_iterations=0, **_options(seed))
    return {"tri, one pass": smc.run()}


def _isotropic(model: Any) -> Any:
    twist = SurrogateTwist(model, surrogate="linear", spectral=False, gain=1.0, fitted=False)
    return LookaheadTwist(model) + twist


def _unfitted(model: Any) -> Any:
    return DiscountedLookahead(model) + SurrogateTwist(model, fitted=False)


ARMS: dict[str, Arm] = {
    "importance": _importance,
    "fk": _steering,
    "fk-few": _few,
    "fk-pooled": _pooled,
    "tri": _learned("tri"),
    "tri, one pass": _one_pass,
}
ABLATIONS: dict[str, Arm] = {
    "tri, frozen passes": _learned("tri, frozen passes", within=False),
    "tri, tau = 1": _learned("tri, tau = 1", kl_budget=1e9),
    "tri, no centring": _learned("tri, no centring", centring=0.0),
    "tri, no guard": _learned("tri, no guard", guard=False),
    "tri, likelihood off": _learned("tri, likelihood off", _unfitted),
    "tri, ladder only": _learned("tri, ladder only", lambda model: DiscountedLookahead(model)),
    "tri, isotropic gain 1": _learned("tri, isotropic gain 1", _isotropic),
}


def _long_steering(model: Any, n: int, seed: int) -> Results:
    return {"reference fk": TwistedSMC(model, LookaheadTwist(model), n, **_options(seed)).run()}


def _long_learned(model: Any, n: int, seed: int) -> Results:
    twist = DiscountedLookahead(model) + SurrogateTwist(model)
    TrustRegionTwist(model, twist, 64, **_options(seed)).fit(2)
    return {"reference tri": TwistedSMC(model, twist, n, **_options(seed + 1)).run()}


# what an arm is reported as, where that is not its name alone
LABELS = {"importance": ("importance", "best-of-n"), "tri": ("tri", "tri, last pass")}
REFERENCES = {"reference fk": _long_steering, "reference tri": _long_learned}


def run(job: Job) -> list[dict[str, Any]]:
    """Runs a job on one thread; a row of figures for each arm."""
    torch.set_num_threads(1)
    task, rows = TASKS[job.task], []
    for name in job.arms:
        arm = {**ARMS, **ABLATIONS, **REFERENCES}[name]
        torch.manual_seed(job.seed)  # for rewards that draw noise
        model = _warm(task)
        start = time.perf_counter()
        before = dict(model.counts)
        try:
            found = arm(model, job.size, job.seed)
        except SMCFailed:  # a hard constraint that no particle meets: an estimate of zero
            spent = {key: value - before[key] for key, value in model.counts.items()}
            rows += [failed(job, label, spent) for label in LABELS.get(name, (name,))]
            continue
        seconds = round(time.perf_counter() - start, 3)
        for label, result in found.items():
            row = {"task": task.name, "size": job.size, "seed": job.seed, "arm": label}
            rows.append({**row, "seconds": seconds, **figures(task, label, result)})
    return rows


def _warm(task: Task) -> Any:
    """The model of a task, whose network and imports are no part of the time of an arm."""
    model = make_model(task)
    if task.zoo not in _WARM:
        ImportanceSampling(model, 2, seed=0, progress=False).run()
        _WARM.add(task.zoo)
    return make_model(task)


def failed(job: Job, label: str, counts: dict[str, int]) -> dict[str, Any]:
    """The row of an arm in which no particle had weight."""
    row = {"task": job.task, "size": job.size, "seed": job.seed, "arm": label, "seconds": 0.0}
    row |= dict.fromkeys(("log_z", "reward", "best", "judge", "diversity", "ess"))
    return {**row, "denoiser": counts["denoiser"], "reward_calls": counts["reward"]}


def figures(task: Task, label: str, result: SMCResult) -> dict[str, Any]:
    """What is measured of a result."""
    score = objective(task, result)
    weights = result.get_normalized_weights()
    if label == "best-of-n":
        weights = torch.nn.functional.one_hot(score.argmax(), len(score)).double()
    weights = torch.where(score == -math.inf, 0.0, weights)
    finite = torch.where(score == -math.inf, 0.0, score)
    images = base_model(task.zoo).decode(result.state["x"])
    counts = result.counts
    found = {
        "log_z": math.nan if label == "best-of-n" else float(result.log_normalizer),
        "reward": float((weights * finite).sum()) if weights.sum() > 0 else -math.inf,
        "best": float(score.max()),
        "judge": float((weights * _certainty(task.zoo, images)).sum()),
        "diversity": _spread(images, weights) / _base_spread(task.zoo),
        "ess": float(effective_sample_size(result.log_weights)),
    }
    calls = {"denoiser": counts["denoiser"], "reward_calls": counts["reward"]}
    # JSON has no infinities
    rounded = {k: round(v, 4) if math.isfinite(v) else None for k, v in found.items()}
    return {**rounded, **calls}


def objective(task: Task, result: SMCResult) -> Tensor:
    """The scaled rewards of the particles, summed, in nats."""
    return sum(
        (scale * result.state[name].double() for name, scale in task.scales.items()),
        start=torch.zeros(()),
    )


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


def plan(full: bool, ablations: bool, references: bool) -> Iterator[Job]:
    """The jobs, the most telling first."""
    for seed in range(SEEDS):
        for task in TASKS.values():
            yield Job(task.name, 4, seed, tuple(ARMS))
    if references:
        yield from _reference_jobs()
    for seed in range(SEEDS):
        for task in TASKS.values():
            if full or task.zoo == "digits":
                yield Job(task.name, 16, seed, tuple(ARMS))
    if ablations or full:
        for seed in range(SEEDS):
            for task in TASKS.values():
                if task.zoo == "digits":
                    yield Job(task.name, 4, seed, tuple(ABLATIONS))


def _reference_jobs() -> Iterator[Job]:
    for seed, arm in [(0, "reference fk"), (0, "reference tri"), (10, "reference tri")]:
        for task in TASKS.values():
            size = REFERENCE_PARTICLES[task.zoo] * MORE_PARTICLES.get(task.name, 1)
            yield Job(task.name, size, seed, (arm,))


def main() -> None:
    """Runs what is missing and prints the report."""
    from tests.perf.comparison import report

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="emoji at N = 16, and ablations")
    parser.add_argument("--ablations", action="store_true", help="ablations on digits")
    parser.add_argument("--references", action="store_true", help="long reference runs too")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), help="only these tasks")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="only so many seeds")
    parser.add_argument("--sizes", type=int, nargs="*", default=[4, 16], help="particles in a pass")
    parser.add_argument("--rows", type=Path, default=Path("results/compare/rows.jsonl"))
    parser.add_argument("--known", type=Path, default=FOLDER / "references.jsonl")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only-report", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the report here")
    options = parser.parse_args()
    rows = read(options.rows)
    if not options.only_report:
        jobs = plan(options.full, options.ablations, options.references)
        wanted = [j for j in jobs if not options.tasks or j.task in options.tasks]
        wanted = [j for j in wanted if j.arms[0] in REFERENCES or _is_chosen(j, options)]
        left = missing(wanted, rows + read(options.known))
        run_all(run, left, options.rows, options.workers)
        rows = read(options.rows)
    text = report(rows + read(options.known))
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def _is_chosen(job: Job, options: argparse.Namespace) -> bool:
    return job.seed < options.seeds and job.size in options.sizes


if __name__ == "__main__":
    main()
