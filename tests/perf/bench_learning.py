# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
What learning a twist costs beyond sampling: memory of a recorded pass, and CPU seconds of fitting.

Run ``make bench``, or ``python -m tests.perf.bench_learning --out results/learning.json``. Every
figure is taken in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from pyro_twist.infer import TrustRegionTwist, TwistedSMC
from pyro_twist.twists import LinearTwist, ShiftTwist, low_frequencies
from tests.perf.bench_engine import high_water
from tests.perf.timing import machine


class Images:
    """A Gaussian chain of images, tilted by the brightness of the last."""

    event_shape = (3, 16, 16)

    def __init__(self, num_steps: int) -> None:
        self.timesteps = tuple(range(num_steps, 0, -1))

    def init(self, state: Any) -> None:
        prior = dist.Normal(torch.zeros(self.event_shape), 1.0).to_event(3)
        state["x"] = pyro.sample(f"x_{self.timesteps[0]}", prior)

    def step(self, state: Any, t: int) -> None:
        kernel = dist.Normal(0.98 * state["x"], 0.2).to_event(3)
        state["x"] = pyro.sample(f"x_{t - 1}", kernel)
        if t == 1:
            pyro.factor("brightness", 40 * state["x"].mean((-3, -2, -1)))


class Brightness(LinearTwist):
    """Makes images brighter: one parameter for each of three channels, shared by all steps."""

    reads = ()

    def __init__(self, model: Any) -> None:
        super().__init__(model, 3)

    def features(self, name: str, prior: Any) -> torch.Tensor:
        batch = (1,) * len(prior.batch_shape)
        return torch.eye(3).reshape((3, *batch, 3, 1, 1)) / 256


def family(name: str, model: Images) -> LinearTwist:
    """A twist that is not one, so that there are proposals to record."""
    twist: LinearTwist = Brightness(model)
    if name == "12 per step":
        twist = ShiftTwist(model, basis=low_frequencies(model.event_shape, 2), value=False)
    with torch.no_grad():
        twist.theta.fill_(0.01)
    return twist


def learning(record: Any, name: str, size: int, steps: int) -> dict[str, float]:
    """A pass and, where it is recorded, a fit; in this process."""
    model = Images(steps)
    options: dict[str, Any] = {"seed": 0, "progress": False}
    if record is None:
        smc = TwistedSMC(model, family(name, model), size, **options)
    else:
        smc = TrustRegionTwist(model, family(name, model), size, record=record, **options)
    reset()
    before, start = high_water(), time.process_time()
    smc.sample() if isinstance(smc, TrustRegionTwist) else smc.run()
    found = {"pass_s": time.process_time() - start, "pass_mib": high_water() - before}
    if isinstance(smc, TrustRegionTwist):
        reset()
        start = time.process_time()
        smc.update()
        found |= {"fit_s": time.process_time() - start, "with_fit_mib": high_water() - before}
    return found


def reset() -> None:
    """Sets the high-water mark back to the present size; Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def emoji() -> dict[str, float]:
    """Four passes of four particles over the emoji network, with the default twist."""
    from pyro_twist import RewardTilted, image_reward, zoo

    diffusion = zoo.load("emoji", label=3, num_inference_steps=20)
    model = RewardTilted(diffusion, image_reward("green"), scale=60.0)
    smc = TrustRegionTwist(model, None, 4, seed=0, progress=False)
    update, spent = smc.update, [0.0]

    def timed() -> Any:
        start = time.process_time()
        done = update()
        spent[0] += time.process_time() - start
        return done

    smc.update = timed  # type: ignore[method-assign]
    start = time.process_time()
    smc.run()
    total = time.process_time() - start
    return {"sampling_s": total - spent[0], "fitting_s": spent[0]}


def apart(call: str, options: Any, **environment: str) -> dict[str, float]:
    """Medians over processes of their own, each of which runs ``call`` once before it counts."""
    code = (
        "import json, torch, pyro; from tests.perf.bench_learning import *; "
        f"torch.set_num_threads({options.threads}); pyro.enable_validation(False); "
        f"{call.format(size=4, steps=3)}; print(json.dumps({call.format(size=1000, steps=100)}))"
    )
    runs = []
    for _ in range(options.rounds):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        runs.append(json.loads(done.stdout))
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}


def images(options: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """Both families, with every record."""
    for name in ("3 for all steps", "12 per step"):
        for record in (None, "statistics", "paths"):
            call = f"learning({record!r}, {name!r}, {{size}}, {{steps}})"
            yield f"{name}, {record or 'TwistedSMC'}", apart(call, options)
        # glibc then gives large tensors back to the system, instead of keeping gaps between them
        found = apart(call, options, MALLOC_MMAP_THRESHOLD_="131072")
        yield f"{name}, paths, no gaps", found


def main() -> None:
    """Runs all benchmarks, prints them, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/learning.json"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"machine": machine()}
    for title, row in images(options):
        results[title] = row
        show(title, row)
    title = "emoji, 4 passes of 4 particles"
    results[title] = apart("emoji()", options)
    show(title, results[title])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwritten to {options.out}")


def show(title: str, row: dict[str, float]) -> None:
    """Prints a row."""
    print(
        f"{title:32} " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True
    )


if __name__ == "__main__":
    main()
