# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Four particles on the zoo's text-to-image model: FK steering, URGE and TRI-TSMC beside each other.

In the shape of the tables that the literature has for Stable Diffusion: each prompt has four
trajectories, the reward is the scorer's, and a judge that nothing optimises says whether the prompt
is followed. Prompts are drawn at random, once for the names that the model was trained on and once
for those that it was not. Runs are appended to a file as they finish; a run that was killed goes
on.

Run ``python -m tests.perf.prompts``.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch

from pyro_twist import RewardTilted, zoo
from pyro_twist.algorithms import Comparison, compare
from pyro_twist.rewards import per_prompt
from tests.perf.study import BENCHMARKS

__all__ = ["ARMS", "SETS", "draw_prompts"]

MODEL, BUDGET, SEEDS, PROMPTS, SCALE = "emoji-text", 4, 4, 12, 1.0
SETS = ("trained", "held-out")


ARMS = ("base", "best-of-n", "fk", "urge", "tri-one-pass")


def draw_prompts(which: str, number: int = PROMPTS) -> list[str]:
    """
    Names drawn at random, always the same.

    :param str which: ``"trained"``, or ``"held-out"`` for names that the model has not seen.
    :param int number: How many.
    """
    seen = set(zoo.scorer(MODEL, "").names)
    names = [name for name in zoo.judge(MODEL).names if (name in seen) == (which == "trained")]
    return random.Random(0).sample(sorted(names), number)


def make_model(prompts: list[str]) -> RewardTilted:
    """The model with a population for each prompt, and the scorer's reward for each."""
    rewards = per_prompt(zoo.scorer(MODEL, prompts[0]), prompts)
    return RewardTilted(zoo.load(MODEL, prompt=prompts), {"fidelity": rewards}, scale=SCALE)


class Judged:
    """
    What the judge thinks of the final particles.

    :param model: The model.
    :param list prompts: Its prompts.
    """

    def __init__(self, model: Any, prompts: list[str]) -> None:
        self.model, self.prompts, self.judge = model, prompts, zoo.judge(MODEL)

    def probability(self, state: Any) -> torch.Tensor:
        """The probability of the prompt, of shape ``(num_particles, number of prompts)``."""
        return self._each(state, self.judge.probability)

    def first(self, state: Any) -> torch.Tensor:
        """Whether the prompt is the most probable name, likewise."""
        return self._each(state, lambda images, prompt: self.judge.rank(images, prompt) == 1)

    def _each(self, state: Any, figure: Any) -> torch.Tensor:
        x = state["x"]
        flat = self.model.decode(x.reshape((-1,) + tuple(self.model.event_shape)))
        images = flat.float().reshape(tuple(x.shape[:2]) + tuple(flat.shape[1:]))
        found = [figure(images[:, k], prompt).double() for k, prompt in enumerate(self.prompts)]
        return torch.stack(found, -1)


def found(which: str, path: Path, seeds: int) -> Comparison:
    """All arms on a set of prompts; figures are means over the prompts."""
    prompts = draw_prompts(which)
    model = make_model(prompts)
    judged = Judged(model, prompts)
    measures = {"judge": judged.probability, "judge's first": judged.first}
    return compare(
        model,
        ARMS,
        budget=BUDGET,
        seeds=seeds,
        max_plate_nesting=1,
        population_plate="prompts",
        measures=measures,
        path=path / f"{which}.jsonl",
    )


def report(comparisons: dict[str, Comparison]) -> str:
    """A table for each set of prompts, and the differences to FK steering."""
    parts = []
    for which, one in comparisons.items():
        listed = ", ".join(draw_prompts(which))
        parts.append(f"**{which} names**: {listed}\n\n{_table(one)}")
    return "\n\n".join(parts)


def _table(one: Comparison) -> str:
    figures = {
        "E[fidelity], nats": "objective",
        "best of four": "best",
        "judge": "judge",
        "judge's first": "judge's first",
        "log Z": "log_normalizer",
    }
    head = ["algorithm", *figures, "less FK: E[fidelity]", "judge", "log Z", "denoiser calls"]
    head += ["reward calls", "seconds"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in one.names:
        cells = [str(one.estimate(name, figure)) for figure in figures.values()]
        cells += [_less_fk(one, name, f) for f in ("objective", "judge", "log_normalizer")]
        cells += [f"{one.estimate(name, kind).mean:,.0f}" for kind in ("denoiser", "reward")]
        cells += [f"{one.estimate(name, 'seconds').mean:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _less_fk(one: Comparison, name: str, figure: str) -> str:
    return "–" if name == "fk" else str(one.difference(name, "fk", figure))


def main() -> None:
    """Runs what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--rows", type=Path, default=BENCHMARKS / "prompts")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "prompts.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    comparisons = {which: found(which, options.rows, options.seeds) for which in options.sets}
    text = report(comparisons)
    print(text)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
