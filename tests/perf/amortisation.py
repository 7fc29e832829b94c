# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
A twist fitted once, and used again: other seeds, more particles, other classes.

Run ``python -m tests.perf.amortisation --out docs/_static/benchmarks/amortisation.json``. On the
digits model, a twist is fitted to one class in three passes of 16 particles and then frozen.
It is compared with Feynman-Kac steering at equal numbers of particles, on the same noise. The
runs of one row are populations of one batch.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_twist import LookaheadTwist, RewardTilted, TrustRegionTwist, TwistedSMC, zoo
from pyro_twist.infer.trustregiontwist import default_twist
from pyro_twist.rewards import classifier_log_prob, image_reward
from tests.perf.timing import machine

FITTED_ON, OTHERS = 3, (0, 7)
PARTICLES = (4, 16, 64)
FIT_SEED = 10_000


def tasks() -> dict[str, tuple[Any, float]]:
    """By name a reward and its strength, some four standard deviations of a class."""
    eight = classifier_log_prob(zoo.classifier("digits"), 8)
    return {"brightness": (image_reward("bright"), 150.0), "log-probability of an 8": (eight, 7.0)}


def tilted(task: tuple[Any, float], labels: Any, steps: int) -> RewardTilted:
    """The digits of one class, or of a list with a population each, tilted."""
    reward, scale = task
    diffusion = zoo.load("digits", label=labels, num_inference_steps=steps)
    return RewardTilted(diffusion, reward, scale=scale)


def fitted(task: tuple[Any, float], steps: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a twist after three passes, and what they cost."""
    model = tilted(task, FITTED_ON, steps)
    start, sampler = time.perf_counter(), TrustRegionTwist(model, None, 16, seed=FIT_SEED)
    sampler.fit(3)
    cost = {"denoiser": 3 * 16 * steps, "seconds": time.perf_counter() - start}
    return sampler.guide.state_dict(), cost | {"table": sampler.table()}


def runs(model: RewardTilted, twist: Any, particles: int) -> dict[str, Any]:
    """Log-normaliser and mean reward of every population, and the cost of one."""
    smc = TwistedSMC(model, twist, particles, 1, population_plate="classes", seed=particles)
    result = smc.run()
    seeds = result.log_weights.shape[1]
    return {
        "log_z": result.log_normalizer,
        "reward": result.expectation("reward"),
        "best": result.best(1).state["reward"].reshape(-1).double(),
        "denoiser": result.counts["denoiser"] // seeds,
        "seconds": result.seconds / seeds,
    }


def interval(values: Tensor) -> list[float]:
    """The mean, and the ends of its 95 % interval under normality."""
    from scipy import stats

    n, mean = len(values), float(values.mean())
    half = float(stats.t.ppf(0.975, n - 1)) * float(values.std()) / math.sqrt(n)
    return [mean, mean - half, mean + half]


def compared(task: tuple[Any, float], label: int, particles: int, options: Any) -> dict[str, Any]:
    """One row: steering and the fitted twist on one class."""
    model = tilted(task, [label] * options.seeds, options.steps)
    again = default_twist(model)
    again.load_state_dict(options.state)
    found = {
        "FK": runs(model, LookaheadTwist(model), particles),
        "reused": runs(model, again, particles),
    }
    row: dict[str, Any] = {"label": label, "particles": particles}
    for name, one in found.items():
        row[name] = {
            "log_z": interval(one["log_z"]),
            "log_z_sd": float(one["log_z"].std()),
            "reward": interval(one["reward"]),
            "best": interval(one["best"]),
            "denoiser": one["denoiser"],
            "seconds": one["seconds"],
        }
    for key in ("log_z", "reward", "best"):
        row[f"{key}_gain"] = interval(found["reused"][key] - found["FK"][key])
    return row


def rows(task: tuple[Any, float], options: Any) -> list[dict[str, Any]]:
    """The class of the fit with several numbers of particles, then other classes."""
    cases = [(FITTED_ON, n) for n in PARTICLES] + [(label, 16) for label in OTHERS]
    return [compared(task, label, particles, options) for label, particles in cases]


def markdown(title: str, found: dict[str, Any]) -> str:
    """A task's rows as a table."""
    fit = found["fit"]
    lines = [
        f"### {title}, strength {found['scale']:g}",
        "",
        f"Fitted once on class {FITTED_ON}: {fit['denoiser']:,} denoiser calls, "
        f"{fit['seconds']:.1f} s.",
        "",
        "| class | particles | denoiser calls, with the fit | log Z: FK (sd) | reused (sd) "
        "| gain | E[r]: FK | reused | gain |",
        "| ---: | ---: | ---: | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        steering, twist = row["FK"], row["reused"]
        calls = f"{twist['denoiser']:,}, {twist['denoiser'] + fit['denoiser']:,}"
        cells = [str(row["label"]), str(row["particles"]), calls]
        cells += [f"{one['log_z'][0]:.2f} ({one['log_z_sd']:.2f})" for one in (steering, twist)]
        cells += [_signed(row["log_z_gain"], 2)]
        cells += [f"{one['reward'][0]:.4g}" for one in (steering, twist)]
        cells += [_signed(row["reward_gain"], 3)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _signed(values: list[float], digits: int) -> str:
    mean, low, high = (f"{value:+.{digits}f}" for value in values)
    return f"{mean} ({low} to {high})"


def main() -> None:
    """Runs all tasks, prints the tables, and writes JSON with the tables in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/amortisation.json"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine(), "seeds": options.seeds, "tasks": {}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for title, task in tasks().items():
        options.state, fit = fitted(task, options.steps)
        found = {"scale": task[1], "steps": options.steps, "fit": fit, "rows": rows(task, options)}
        results["tasks"][title] = found | {"markdown": markdown(title, found)}
        print("\n" + results["tasks"][title]["markdown"], flush=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
