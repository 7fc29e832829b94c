# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""A comparison of arms over tasks: how its jobs are run, and its command line."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_twist.infer import ImportanceSampling, SMCFailed, SMCResult
from pyro_twist.weights import effective_sample_size
from tests.perf.arms import LABELS, Arm
from tests.perf.harness import Job, missing, read, run_all

__all__ = ["BENCHMARKS", "Study", "common_figures", "objective", "rounded"]

_WARM: set[str] = set()
BENCHMARKS = Path(__file__).parents[2] / "docs" / "_static" / "benchmarks"


@dataclass(frozen=True)
class Study:
    """
    A comparison.

    :param dict tasks: By name; a task has ``name`` and ``zoo``, the model.
    :param dict arms: The arms that are compared.
    :param dict ablations: Arms that show what parts are worth.
    :param dict references: Long runs that the evidence is known from.
    :param callable make_model: Makes the tilted model of a task.
    :param callable figures: What is measured of a task, the name of an arm and its result.
    :param callable plan: The jobs for the options of the command line, the most telling first.
    :param callable report: Makes Markdown from rows.
    :param ~pathlib.Path rows: Where rows are appended by default.
    :param ~pathlib.Path known: The rows of references that are known already.
    :param tuple sizes: Particles in a pass.
    :param int seeds: The number of seeds.
    :param dict labels: What arms are reported as, where that is not their name alone.
    """

    tasks: Mapping[str, Any]
    arms: Mapping[str, Arm]
    ablations: Mapping[str, Arm]
    references: Mapping[str, Arm]
    make_model: Callable[[Any], Any]
    figures: Callable[[Any, str, SMCResult], dict[str, Any]]
    plan: Callable[[argparse.Namespace], Iterator[Job]]
    report: Callable[[list[dict[str, Any]]], str]
    rows: Path
    known: Path
    sizes: tuple[int, ...]
    seeds: int = 20
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: LABELS)

    def run(self, job: Job) -> list[dict[str, Any]]:
        """Runs a job on one thread; a row of figures for each arm."""
        torch.set_num_threads(1)
        return [row for name in job.arms for row in self._run_arm(job, name)]

    def _run_arm(self, job: Job, name: str) -> list[dict[str, Any]]:
        task = self.tasks[job.task]
        model = self._warm(task)
        torch.manual_seed(job.seed)  # for rewards that draw noise
        start, before = time.process_time(), dict(model.counts)
        try:
            found = self._find(name)(model, job.size, job.seed)
        except SMCFailed:  # a hard constraint that no particle meets: an estimate of zero
            spent = {key: value - before[key] for key, value in model.counts.items()}
            return [_failed(job, label, spent) for label in self.labels.get(name, (name,))]
        seconds = round(time.process_time() - start, 3)
        row = {"task": task.name, "size": job.size, "seed": job.seed, "seconds": seconds}
        return [
            {**row, "arm": label, **self.figures(task, label, result)}
            for label, result in found.items()
        ]

    def _find(self, name: str) -> Arm:
        return {**self.arms, **self.ablations, **self.references}[name]

    def _warm(self, task: Any) -> Any:
        """The model of a task, whose network and imports are no part of the time of an arm."""
        if task.name not in _WARM:
            with contextlib.suppress(SMCFailed):  # a hard constraint that neither particle meets
                ImportanceSampling(self.make_model(task), 2, seed=0, progress=False).run()
            _WARM.add(task.name)
        return self.make_model(task)

    def main(self, about: str, run: Callable[[Job], list[dict[str, Any]]]) -> None:
        """
        Runs what is missing and prints the report.

        :param str about: What the script does.
        :param callable run: :meth:`run`, as a function that other processes find by its name.
        """
        options = self._parser(about).parse_args()
        rows = read(options.rows)
        if not options.only_report:
            wanted = [job for job in self.plan(options) if self._is_wanted(job, options)]
            left = missing(wanted, rows + read(options.known))
            run_all(run, left, options.rows, options.workers)
            rows = read(options.rows)
        text = self.report(rows + read(options.known))
        print(text)
        if options.out:
            options.out.write_text(text + "\n", encoding="utf-8")

    def _parser(self, about: str) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(description=about)
        parser.add_argument("--full", action="store_true", help="what takes long, and ablations")
        parser.add_argument("--ablations", action="store_true", help="ablations as well")
        parser.add_argument("--references", action="store_true", help="long reference runs too")
        names = list(self.tasks)
        parser.add_argument("--tasks", nargs="*", choices=names, help="only these tasks")
        parser.add_argument("--seeds", type=int, default=self.seeds, help="only so many seeds")
        sizes = list(self.sizes)
        parser.add_argument("--sizes", type=int, nargs="*", default=sizes, help="per pass")
        parser.add_argument("--rows", type=Path, default=self.rows)
        parser.add_argument("--known", type=Path, default=self.known)
        parser.add_argument("--workers", type=int, default=2)
        parser.add_argument("--only-report", action="store_true")
        parser.add_argument("--out", type=Path, help="also write the report here")
        return parser

    def _is_wanted(self, job: Job, options: argparse.Namespace) -> bool:
        if options.tasks and job.task not in options.tasks:
            return False
        asked = job.seed < options.seeds and job.size in options.sizes
        return job.arms[0] in self.references or asked


def _failed(job: Job, label: str, counts: dict[str, int]) -> dict[str, Any]:
    """The row of an arm in which no particle had weight."""
    row = {"task": job.task, "size": job.size, "seed": job.seed, "arm": label, "seconds": 0.0}
    row |= dict.fromkeys(("log_z", "reward", "best", "judge", "diversity", "ess"))
    row["success"] = 0.0
    return {**row, "denoiser": counts["denoiser"], "reward_calls": counts["reward"]}


def objective(task: Any, result: SMCResult) -> Tensor:
    """The scaled rewards of the particles, summed, in nats."""
    return sum(
        (scale * result.state[name].double() for name, scale in task.scales.items()),
        start=torch.zeros(()),
    )


def common_figures(task: Any, label: str, result: SMCResult) -> tuple[dict[str, Any], Tensor]:
    """What is measured of any result, and the weights of its particles, dead ones left out."""
    score = objective(task, result)
    weights = result.get_normalized_weights()
    if label == "base":
        weights = torch.full_like(weights, 1 / len(weights))
    elif label == "best-of-n" or result.kind == "maximiser":
        weights = torch.nn.functional.one_hot(score.argmax(), len(score)).double()
    if label != "base":
        weights = torch.where(score == -math.inf, 0.0, weights)
    reward = (weights * score)[weights > 0]
    estimated = label not in ("base", "best-of-n")
    found = {
        "log_z": float(result.log_normalizer) if estimated else math.nan,
        "reward": float(reward.sum()) if len(reward) else -math.inf,
        "best": float(score.max()),
        "ess": float(effective_sample_size(result.log_weights)),
        "denoiser": result.counts["denoiser"],
        "reward_calls": result.counts["reward"],
    }
    return found, weights


def rounded(found: Mapping[str, Any]) -> dict[str, Any]:
    """Figures for a file: four digits, and nothing for what JSON has no number for."""
    return {
        key: (round(value, 4) if math.isfinite(value) else None)
        if isinstance(value, float)
        else value
        for key, value in found.items()
    }
