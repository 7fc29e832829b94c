# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Inpainting, super-resolution and deblurring of digits, by several algorithms at one budget.

``python -m tests.perf.inverse`` runs what is missing in its file of rows and prints the tables,
some ten minutes of one core; ``--quick`` runs two arms with two seeds, to a file of its own.

Pictures that no training used tell how good reconstructions are; pictures drawn from the model
itself tell whether intervals hold what they promise, since there the prior is right.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_twist import zoo
from pyro_twist.algorithms import find_algorithm
from pyro_twist.algorithms.registry import Setting
from pyro_twist.algorithms.scored import Scored
from pyro_twist.infer import ImportanceSampling, SMCResult
from pyro_twist.inverse import AveragePooling, GaussianBlur, Mask, observed, psnr
from tests.perf.harness import Job, missing, read, run_all
from tests.perf.study import BENCHMARKS, rounded
from tests.perf.tables import Row, interval, number, sd, table, with_interval

STEPS, NOISE, BUDGET, SEEDS, LEVEL = 20, 0.3, 32, 5, 0.9
MANY = 256
PICTURES = 3
_POOLED = -1
ROWS, PAGE = BENCHMARKS / "inverse.jsonl", BENCHMARKS / "inverse.md"
QUICK = Path("results") / "inverse_quick.jsonl"

PROBLEMS: dict[str, Callable[[], Any]] = {
    "inpainting": lambda: Mask((torch.arange(8) < 4).expand(1, 8, 8)),
    "super-resolution": lambda: AveragePooling(2),
    "deblurring": lambda: GaussianBlur(1.0),
}
_SEEN = {
    "inpainting": "the left half",
    "super-resolution": "means of 2 x 2 pixels",
    "deblurring": "a blur of a width of 1 pixel",
}
ARMS = ("base", "best-of-n", "fk", "tds", "das", "urge", "tri-one-pass", "tri-tsmc")
#: The arm that also gets many particles.
_LARGE = "das"
KINDS = ("held out", "drawn")


@functools.cache
def digits() -> Any:
    """The prior."""
    return zoo.load("digits", num_inference_steps=STEPS)


@functools.cache
def truths(kind: str) -> Tensor:
    """Pictures in [-1, 1] that no training used, or those that the model draws."""
    if kind == "drawn":
        return ImportanceSampling(digits(), PICTURES, seed=77).run().state["x"]
    held_out = zoo.images("digits", held_out=True)
    first = [int((held_out.labels == label).nonzero()[0]) for label in (3, 5, 8)]
    return 2 * held_out.unit[first[:PICTURES]] - 1


def observation(problem: str, kind: str, picture: int) -> tuple[Any, Tensor]:
    """The model that has seen a picture, and the picture."""
    operator, truth = PROBLEMS[problem](), truths(kind)[picture]
    clean = operator(truth)
    seed = 100 * list(PROBLEMS).index(problem) + 10 * KINDS.index(kind) + picture
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return observed(digits(), operator, clean + NOISE * noise, NOISE), truth


# figures


def figures(x: Tensor, log_weights: Tensor, truth: Tensor) -> dict[str, float]:
    """Of weighted pictures: PSNR of their mean and of single ones, and the share of pixels held."""
    weights = log_weights.double().softmax(0)
    decode = digits().decode
    mean = decode((weights.reshape(-1, 1, 1, 1) * x.double()).sum(0))
    pixels, true = x.double().flatten(1), truth.double().flatten()
    ends = [quantile(pixels, weights, level) for level in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
    held = (ends[0] <= true) & (true <= ends[1])
    return {
        "mean": float(psnr(mean, decode(truth))),
        "sample": float((weights * psnr(decode(x), decode(truth))).sum()),
        "covered": float(held.double().mean()),
        "ess": float(1 / weights.square().sum()),
    }


def quantile(values: Tensor, weights: Tensor, level: float) -> Tensor:
    """Of each column, the first value with a weight of ``level`` up to there."""
    ordered, order = values.sort(0)
    reached = weights[order].cumsum(0) >= level - 1e-9
    return ordered.gather(0, reached.double().argmax(0, keepdim=True))[0]


def _weights(name: str, result: SMCResult) -> Tensor:
    return find_algorithm(name).log_weights(result)


def run(job: Job) -> list[Row]:
    """Of each arm a row for every seed, and one for the particles of all seeds pooled."""
    torch.set_num_threads(1)
    problem, kind, picture = job.task.split("/")
    model, truth = observation(problem, kind, int(picture))
    rows = []
    for name in job.arms:
        found = [_run(model, name, job.size, seed) for seed in range(SEEDS)]
        about = {"task": job.task, "size": job.size, "arm": name}
        for seed, (result, seconds) in enumerate(found):
            row: Row = {**about, "seed": seed, "seconds": round(seconds, 3)}
            row |= rounded(figures(result.state["x"], _weights(name, result), truth))
            if find_algorithm(name).weighted:
                row["log_z"] = round(float(result.log_normalizer), 4)
            rows.append(row | {"denoiser": result.counts["denoiser"]})
        x = torch.cat([result.state["x"] for result, _ in found])
        weights = torch.cat([_weights(name, result) for result, _ in found])
        rows.append({**about, "seed": _POOLED, **rounded(figures(x, weights, truth))})
    return rows


def _run(model: Any, name: str, size: int, seed: int) -> tuple[SMCResult, float]:
    start = time.process_time()
    result = find_algorithm(name).make(Setting(Scored(model), size, seed=seed)).run()
    return result, time.process_time() - start


def plan(quick: bool) -> list[Job]:
    """The jobs, pictures one after the other."""
    jobs = []
    for picture in range(1 if quick else PICTURES):
        for kind in KINDS:
            for problem in PROBLEMS:
                task = f"{problem}/{kind}/{picture}"
                jobs.append(Job(task, BUDGET, 0, ("fk", "das") if quick else ARMS))
                if kind == "drawn" and not quick:
                    jobs.append(Job(task, MANY, 0, (_LARGE,)))
    return jobs


# report


def report(rows: Sequence[Row]) -> str:
    """The tables, in Markdown."""
    parts = [_table(rows, problem) for problem in PROBLEMS]
    return "\n\n".join([*parts, _against(rows), _about(rows)])


def _by_seed(rows: Sequence[Row], wanted: tuple[str, str, int, str], name: str) -> list[float]:
    """A figure of every seed, as its mean over pictures."""
    problem, kind, size, arm = wanted
    found: dict[int, list[float]] = {}
    for row in rows:
        same = row["task"].startswith(f"{problem}/{kind}/") and row["seed"] != _POOLED
        if same and (row["size"], row["arm"]) == (size, arm) and name in row:
            found.setdefault(row["seed"], []).append(row[name])
    return [statistics.mean(values) for _, values in sorted(found.items())]


def _pooled(rows: Sequence[Row], problem: str, size: int, arm: str) -> float:
    found = [
        row["covered"]
        for row in rows
        if row["task"].startswith(f"{problem}/drawn/")
        and (row["size"], row["arm"], row["seed"]) == (size, arm, _POOLED)
    ]
    return statistics.mean(found) if found else math.nan


def _table(rows: Sequence[Row], problem: str) -> str:
    head = ["arm", "N", "PSNR of the mean", "of a sample", "log Z", "its sd", "ESS"]
    head += ["90 % hold", "pooled", "seconds"]
    body = []
    for arm, size in [*((name, BUDGET) for name in ARMS), (_LARGE, MANY)]:
        values = {
            kind: functools.partial(_by_seed, rows, (problem, kind, size, arm)) for kind in KINDS
        }
        held = values["held out"]
        some = held("mean") or values["drawn"]("mean")
        if not some:
            continue
        single = find_algorithm(arm).returns == "a maximiser"
        covered = [] if single else [100 * one for one in values["drawn"]("covered")]
        pooled = math.nan if single else 100 * _pooled(rows, problem, size, arm)
        log_z = _log_z(rows, problem, size, arm)
        cells = [interval(with_interval(held(name))) for name in ("mean", "sample")]
        cells += [interval(with_interval(held("log_z"))), number(log_z)]
        weighted = find_algorithm(arm).weighted
        cells.append(number(_average(held("ess") if weighted else []), 1))
        cells += [interval(with_interval(covered), 0), number(pooled, 0)]
        cells.append(number(_average(held("seconds") or values["drawn"]("seconds"))))
        body.append([arm, str(size), *cells])
    return f"### {problem.capitalize()}: {_SEEN[problem]}\n\n{table(head, body)}"


def _against(rows: Sequence[Row]) -> str:
    """Differences to Feynman-Kac steering, seed by seed."""
    shown = {"log_z": "log Z", "mean": "PSNR", "covered": "90 % hold"}
    body = []
    for arm in ARMS:
        if arm == "fk" or not find_algorithm(arm).weighted:
            continue
        cells = []
        for problem in PROBLEMS:
            for name in shown:
                kind = "drawn" if name == "covered" else "held out"
                own, fk = (_by_seed(rows, (problem, kind, BUDGET, a), name) for a in (arm, "fk"))
                factor = 100 if name == "covered" else 1
                less = [factor * (a - b) for a, b in zip(own, fk)]
                cells.append(interval(with_interval(less), 0 if name == "covered" else 2))
        body.append([arm, *cells])
    head = ["arm", *(f"{problem}: {name}" for problem in PROBLEMS for name in shown.values())]
    return f"### Figures less those of fk, seed by seed\n\n{table(head, body)}"


def _average(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else math.nan


def _log_z(rows: Sequence[Row], problem: str, size: int, arm: str) -> float:
    """The standard deviation of log Z over seeds, averaged over pictures."""
    spreads = []
    for picture in range(PICTURES):
        task = f"{problem}/held out/{picture}"
        wanted = (task, size, arm)
        found = [
            row["log_z"]
            for row in rows
            if (row["task"], row["size"], row["arm"]) == wanted and "log_z" in row
        ]
        spreads.append(sd(found))
    known = [one for one in spreads if math.isfinite(one)]
    return statistics.mean(known) if known else math.nan


def _about(rows: Sequence[Row]) -> str:
    seeds = len(_by_seed(rows, ("inpainting", "held out", BUDGET, "fk"), "mean"))
    return (
        f"{STEPS} steps, {BUDGET} trajectories ({MANY} where N says so), "
        f"noise of standard deviation {NOISE} for pixels in [-1, 1]. Figures are means over "
        f"{PICTURES} pictures; intervals are 95 % by Student's t over {seeds} seeds. PSNR, log Z "
        f"and ESS are of pictures held out, coverages of pictures that the model drew, in percent "
        f"of all pixels. Pooled are the particles of all seeds together, by their weights."
    )


def main() -> None:
    """Runs what is missing, prints the tables, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two arms, one picture of each kind")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only-report", action="store_true")
    options = parser.parse_args()
    path = options.rows or (QUICK if options.quick else ROWS)
    if not options.only_report:
        run_all(run, missing(plan(options.quick), read(path)), path, options.workers)
    text = report(read(path))
    print(text)
    out = options.out or (None if options.quick or options.rows else PAGE)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
