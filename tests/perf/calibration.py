# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Simulation-based calibration of the joint posterior of an instrument and a digit.

Run ``python -m tests.perf.calibration``, ten minutes on one core; it writes
``docs/calibration_table.md`` and ``docs/_static/benchmarks/calibration.json``. Instruments and
digits are drawn from the model itself, observations from them, and from each observation the
posterior. If that is right, the truth is below its quantile of level ``q`` in a share ``q`` of all
cases [1].

[1] S. Talts, M. Betancourt, D. Simpson, A. Vehtari, A. Gelman (2018), Validating Bayesian Inference
    Algorithms with Simulation-Based Calibration, https://arxiv.org/abs/1804.06788.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, tensor

from pyro_twist import LookaheadTwist, TwistedSMC, WithLatents, handlers, zoo
from pyro_twist.infer import ImportanceSampling, move_latents
from tests.instruments import Instrument, SpreadTwist, posterior_ranks
from tests.perf.timing import machine

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "calibration_table.md"
JSON = ROOT / "docs" / "_static" / "benchmarks" / "calibration.json"

INSTRUMENT = Instrument(width=(0.7, 0.4), noise=(1.0, 0.4), picture=True)
# of an entry of a digit, between -1 and 1
VARIANCE = 0.43
LEVELS = (0.5, 0.8, 0.95)
BINS = 8
NAMES = {
    "width": "blur width",
    "noise": "noise level",
    "ink": "mean of the digit",
    "tilt": "left half less right half",
}

_HEAD = """---
orphan: true
---

# Calibration

<!-- Written by `python -m tests.perf.calibration`. -->

<!-- table -->
"""


def digits(plate: int, steps: int) -> Any:
    """The digits model, with an observation of its own for each entry of a plate."""
    options: dict[str, Any] = {"plate": ("data", plate), "chunk_size": 512}
    return zoo.load("digits", num_inference_steps=steps, **options)


def observed(number: int, steps: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Instruments and digits of the model, and noisy blurred pictures of these."""
    model = WithLatents(digits(number, steps), INSTRUMENT.prior)
    truth = ImportanceSampling(model, 1, 1, population_plate="data", seed=seed).run().state
    state = {key: value[0] for key, value in truth.items()}
    torch.manual_seed(seed)
    return state, INSTRUMENT.law(state, state["x"]).sample()


def quantities(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is ranked, one number for each particle and observation."""
    x = state["x"]
    half = x.shape[-1] // 2
    tilt = x[..., :half].mean((-3, -2, -1)) - x[..., half:].mean((-3, -2, -1))
    found = {"width": state["width"], "noise": state["noise"]}
    return {**found, "ink": x.mean((-3, -2, -1)), "tilt": tilt}


def arms(y: Tensor, options: Any) -> dict[str, Any]:
    """By name: the model, its twist, the number of particles, and whether latents are moved."""
    model = INSTRUMENT.observing(digits(len(y), options.steps), y)
    spread = SpreadTwist(model, INSTRUMENT, y, VARIANCE)
    medians = {"width": INSTRUMENT.width[0], "noise": INSTRUMENT.noise[0]}
    taken = handlers.do(model, {name: tensor(value) for name, value in medians.items()})
    few, many = options.particles
    return {
        "joint, many": (model, spread, many),
        "joint, few": (model, spread, few),
        "plain look-ahead": (model, LookaheadTwist(model), few),
        "instrument taken for granted": (taken, SpreadTwist(taken, INSTRUMENT, y, VARIANCE), few),
    }


def figures(result: Any, truth: Mapping[str, Tensor]) -> dict[str, Any]:
    """Coverage, evenness of ranks, and how many values of the instrument there are."""
    weights, known = result.get_normalized_weights(), quantities(truth)
    found, rows = quantities(result.state), {}
    for name, values in found.items():
        ranks = posterior_ranks(values, weights, known[name])
        covered = [float(((ranks - 0.5).abs() < level / 2).double().mean()) for level in LEVELS]
        rows[name] = {"covered": covered, "p": evenness(ranks), "mean rank": float(ranks.mean())}
    distinct = [column.unique().numel() for column in result.state["width"].T]
    return {"rows": rows, "distinct": sorted(distinct)[len(distinct) // 2]}


def evenness(ranks: Tensor) -> float:
    """The p-value of a chi-square test of uniform ranks."""
    from scipy.stats import chi2

    counts = torch.histc(ranks, BINS, 0.0, 1.0)
    expected = len(ranks) / BINS
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), BINS - 1))


def measured(name: str, arm: Any, truth: Mapping[str, Tensor], options: Any) -> list[Any]:
    """The rows of an arm: as sampled, and with its latents moved."""
    model, twist, particles = arm
    start = time.perf_counter()
    smc = TwistedSMC(
        model, twist, particles, 1, population_plate="data", seed=options.seed, history="paths"
    )
    result, number = smc.run(), options.number
    about = {"arm": name, "particles": particles, "seconds": time.perf_counter() - start}
    about["denoiser"] = result.counts["denoiser"] // number
    rows = [{**about, "moves": 0, **figures(result, truth)}]
    if "granted" not in name:
        start = time.perf_counter()
        moved = move_latents(model, result, options.moves)
        about["seconds"] += time.perf_counter() - start
        rows.append({**about, "moves": options.moves, **figures(moved, truth)})
    return rows


def markdown(rows: list[Any], options: Any) -> str:
    """All arms as a table."""
    heads = ["", "particles", "moves", "values of the width", "of"]
    heads += [f"{100 * level:g} %" for level in LEVELS] + ["p"]
    lines = [
        "| " + " | ".join(heads) + " |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        names = [name for name in NAMES if "granted" not in row["arm"] or name in ("ink", "tilt")]
        for name in names:
            one = row["rows"][name]
            first = [row["arm"], row["particles"], row["moves"], row["distinct"]]
            cells = [str(cell) for cell in first] if name == names[0] else [""] * 4
            cells += [NAMES[name], *(f"{100 * share:.0f}" for share in one["covered"])]
            lines.append("| " + " | ".join([*cells, f"{one['p']:.2g}"]) + " |")
    errors = [100 * math.sqrt(level * (1 - level) / options.number) for level in LEVELS]
    said = ", ".join(f"{error:.1f}" for error in errors)
    last = f"{options.number} observations; the standard errors of right coverages are {said}."
    return "\n".join([*lines, "", last])


def main() -> None:
    """Runs all arms, prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=JSON)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--number", type=int, default=80)
    parser.add_argument("--particles", type=int, nargs=2, default=(48, 192))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--moves", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    truth, y = observed(options.number, options.steps, options.seed)
    rows: list[Any] = []
    for name, arm in arms(y, options).items():
        rows += measured(name, arm, truth, options)
        print(markdown(rows, options), "\n", flush=True)
    table = markdown(rows, options)
    options.page.write_text(_HEAD + "\n" + table + "\n", encoding="utf-8")
    settings = {key: str(value) for key, value in vars(options).items()}
    found = {"machine": machine(), "options": settings, "rows": rows, "markdown": table}
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {options.page} and {options.out}")


if __name__ == "__main__":
    main()
