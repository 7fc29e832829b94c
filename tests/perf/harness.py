# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Resumable comparisons: jobs, and the file that their rows are appended to."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Job", "missing", "read", "run_all"]


@dataclass(frozen=True)
class Job:
    """
    Some arms of one task with one seed.

    :param str task: The task.
    :param int size: Particles in a pass; in all for references.
    :param int seed: The seed.
    :param tuple arms: The arms to run.
    """

    task: str
    size: int
    seed: int
    arms: tuple[str, ...]


Run = Callable[[Job], list[dict[str, Any]]]


def missing(jobs: Iterable[Job], rows: list[dict[str, Any]]) -> list[Job]:
    """What is not in the file yet."""
    done = {(row["task"], row["size"], row["seed"], row["arm"]) for row in rows}
    left = []
    for job in jobs:
        arms = tuple(a for a in job.arms if (job.task, job.size, job.seed, a) not in done)
        if arms:
            left.append(Job(job.task, job.size, job.seed, arms))
    return left


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def run_all(run: Run, jobs: list[Job], path: Path, workers: int) -> None:
    """Runs jobs in processes of their own and appends their rows to a file as they come."""
    from tqdm import tqdm

    if not jobs:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as processes, path.open("a", encoding="utf-8") as file:
        for rows in tqdm(processes.imap_unordered(run, jobs), total=len(jobs), unit="job"):
            for row in rows:
                file.write(json.dumps(row) + "\n")
            file.flush()
