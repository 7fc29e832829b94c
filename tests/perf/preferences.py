# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Rounds of showing, choosing, fitting and aligning, with raters whose taste is known.

Run ``python -m tests.perf.preferences --out docs/_static/benchmarks/preferences.json``. Every seed
is a rater with weights drawn from the prior. In each round 30 pictures of the emoji model are shown
in five panels of six, of each of which two are marked; the taste is fitted to all choices so far,
and the model aligned to its mean. What the aligned samples are worth is told by the rater's true
utility, in standard deviations over the model's training pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_twist import LookaheadTwist, RewardTilted, TwistedSMC, zoo
from pyro_twist.preferences import Preferences, SimulatedRater
from tests.perf.timing import machine

FEATURES = ("red", "blue", "bright", "saturated", "symmetric", "smooth")
PANELS, SHOWN, MARKED, PARTICLES = 5, 6, 2, 32
LEVEL = 0.9
COLUMNS = ("agreement", "width", "utility")


class Study:
    """
    One rater.

    :param int seed: Of the rater, its taste, and all noise.
    :param int steps: Steps of the diffusion model.
    :param float scale: The strength of the reward.
    """

    def __init__(self, seed: int, steps: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.true = torch.randn(len(FEATURES), generator=generator)
        self.seed, self.scale = seed, scale
        pictures = zoo.images("emoji").pixels
        chosen = torch.randperm(len(pictures), generator=generator)[:800]
        self.pictures = pictures[chosen].float() / 255
        self.taste = Preferences(list(FEATURES)).standardise(self.pictures[:400])
        self.diffusion = zoo.load("emoji", num_inference_steps=steps)
        self.spread = float(self.utility(self.pictures).std())
        self.rater = SimulatedRater(self.utility, seed)

    def utility(self, images: Tensor) -> Tensor:
        """The rater's utility, linear in standardised features."""
        return self.taste._standardised(self.taste.features(images)) @ self.true.double()

    def aligned(self, reward: Any, number: int) -> Any:
        """Samples of a round."""
        if reward is None:
            return TwistedSMC(self.diffusion, None, PARTICLES, seed=1000 * self.seed).run()
        model = RewardTilted(self.diffusion, reward, scale=self.scale)
        twist = LookaheadTwist(model)
        return TwistedSMC(model, twist, PARTICLES, seed=1000 * self.seed + number).run()

    def gained(self, result: Any) -> float:
        """The mean true utility of weighted samples, in standard deviations."""
        utilities = self.utility(self.diffusion.decode(result.state["x"]))
        mean = float(self.utility(self.pictures).mean())
        weights = result.get_normalized_weights()
        return (float(weights @ utilities) - mean) / self.spread

    def choose(self, result: Any) -> None:
        """Shows the particles as they are, and adds the rater's choices."""
        images = self.diffusion.decode(result.state["x"])
        for panel in images[: PANELS * SHOWN].split(SHOWN):
            self.taste.favourites(panel, self.rater.favourites(panel, MARKED))

    def told(self) -> dict[str, Any]:
        """What is known of the taste: agreement on other pictures, and intervals."""
        weights, held_out = self.taste.weights, self.pictures[400:]
        ends = [weights.quantile(q, 0) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
        both = torch.stack([self.taste.reward()(held_out), self.utility(held_out)])
        return {
            "agreement": float(torch.corrcoef(both)[0, 1]),
            "covered": int(((ends[0] < self.true) & (self.true < ends[1])).sum()),
            "width": float((ends[1] - ends[0]).mean()),
        }

    def rounds(self, number: int) -> list[dict[str, Any]]:
        """Untouched samples, as many rounds, and samples of the true taste."""
        result = self.aligned(None, 0)
        found: list[dict[str, Any]] = [{"utility": self.gained(result)}]
        for k in range(1, number + 1):
            self.choose(result)
            self.taste.fit(seed=self.seed)
            result = self.aligned(self.taste.reward(), k)
            found.append({**self.told(), "utility": self.gained(result)})
        found.append({"utility": self.gained(self.aligned(self.utility, number + 1))})
        return found


def interval(values: Tensor) -> list[float]:
    """The mean, and the ends of its 95 % interval under normality."""
    from scipy import stats

    n, mean = len(values), float(values.mean())
    half = float(stats.t.ppf(0.975, n - 1)) * float(values.std()) / math.sqrt(n)
    return [mean, mean - half, mean + half]


def share(covered: int, total: int) -> list[float]:
    """A share, and its exact 95 % interval."""
    from scipy.stats import binomtest

    found = binomtest(covered, total).proportion_ci(0.95)
    return [covered / total, float(found.low), float(found.high)]


def row(name: str, ones: list[dict[str, Any]]) -> dict[str, Any]:
    """A round over all raters."""
    found: dict[str, Any] = {"name": name}
    for column in COLUMNS:
        if column in ones[0]:
            found[column] = interval(torch.tensor([one[column] for one in ones]).double())
    if "covered" in ones[0]:
        found["covered"] = share(sum(one["covered"] for one in ones), len(ones) * len(FEATURES))
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    columns = ("agreement", "covered", "width", "utility")
    head = ("", "agreement", f"{100 * LEVEL:.0f} % intervals that hold", "their width", "utility")
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- | --- |"]
    for one in rows:
        cells = [_cell(one.get(column)) for column in columns]
        lines.append(f"| {one['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float] | None) -> str:
    return "" if values is None else f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def main() -> None:
    """Runs all raters, prints the table, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/preferences.json"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    start = time.process_time()
    found = []
    for seed in range(options.seeds):
        found.append(Study(seed, options.steps, options.scale).rounds(options.rounds))
        print(f"rater {seed}: {time.process_time() - start:.0f} s of processor time", flush=True)
    choices = [f"after {k * PANELS} panels" for k in range(1, options.rounds + 1)]
    names = ["before", *choices, "the true taste"]
    rows = [
        row(name, list(ones)) for name, ones in zip(names, zip(*found, strict=True), strict=True)
    ]
    results = {
        "machine": machine(),
        "seeds": options.seeds,
        "steps": options.steps,
        "scale": options.scale,
        "processor_seconds": time.process_time() - start,
        "raters": found,
        "rows": rows,
        "markdown": markdown(rows),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{results['markdown']}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
