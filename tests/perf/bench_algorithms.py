# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
What each algorithm takes beyond the calls that it must make, in time and memory.

On the emoji model, with a reward that is cheap. The floor of an algorithm is the time that is spent
inside the denoiser, the reward, and the gradients through them; everything else is overhead.
Seconds are of CPU time on one thread; every figure is taken in a process of its own.

Run ``make bench``, or ``python -m tests.perf.bench_algorithms``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyro_twist import zoo
from pyro_twist.algorithms import Scored, Setting, algorithms, find_algorithm
from pyro_twist.rewards import Reward, RewardTilted, image_reward
from tests.perf.bench_engine import high_water
from tests.perf.timing import machine

BUDGET, STEPS = 16, 25


class Clock:
    """Adds up the time inside what it wraps; calls inside calls count once."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.process_time() - start

        return timed


def model(clock: Clock) -> RewardTilted:
    """The emoji model, its reward and its network timed."""
    diffusion = zoo.load("emoji", label="Flags", num_inference_steps=STEPS)
    network = diffusion.denoiser.network
    network.forward = clock.around(network.forward)
    green = image_reward("green")
    reward = Reward(clock.around(green.fn), name="green", differentiable=True)
    return RewardTilted(diffusion, reward, 20.0)


def measure(name: str) -> dict[str, Any]:
    """One run of an algorithm, in this process."""
    torch.set_num_threads(1)
    clock = Clock()
    tilted = model(clock)
    one = find_algorithm(name)
    one.make(Setting(Scored(tilted), 4, seed=1)).run()  # imports, caches
    before, clock.seconds = high_water(), 0.0
    torch.autograd.grad = clock.around(torch.autograd.grad)
    start = time.process_time()
    result = one.make(Setting(Scored(tilted), BUDGET, seed=0)).run()
    total = time.process_time() - start
    return {
        "algorithm": name,
        "seconds": round(total, 3),
        "floor": round(clock.seconds, 3),
        "overhead": round(total / clock.seconds - 1, 4),
        "mib": round(high_water() - before, 1),
        "denoiser": result.counts["denoiser"],
        "reward": result.counts["reward"],
    }


def in_process(name: str) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tests.perf.bench_algorithms", "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of medians."""
    numbers = [key for key in rows[0] if key != "algorithm"]
    return {
        "algorithm": rows[0]["algorithm"],
        **{key: statistics.median(row[key] for row in rows) for key in numbers},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = "| algorithm | seconds | inside the calls | overhead | MiB | denoiser | reward |"
    lines = [head, "| --- |" + " ---: |" * 6]
    lines += [
        f"| `{r['algorithm']}` | {r['seconds']:.2f} | {r['floor']:.2f} | {r['overhead']:.1%} "
        f"| {r['mib']:.0f} | {r['denoiser']:,.0f} | {r['reward']:,.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures all algorithms that fit, each a few times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--one", help="a single run of this algorithm, here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    names = algorithms(model(Clock()))
    rows = [median([in_process(name) for _ in range(options.rounds)]) for name in names]
    print(table(rows))
    if options.out:
        found = {"machine": machine(), "budget": BUDGET, "steps": STEPS, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
