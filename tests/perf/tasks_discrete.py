# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The tasks of the comparison on sequences: molecules of the zoo, one position in a step, and texts,
two.

The strength of a task is the scale of its rewards in units of their standard deviation under the
base model, as for images; of fluency, whose lower tail is long, it is that of a normal law with
the same quantiles of 5 and 95 %. ``python -m tests.perf.tasks_discrete`` prints these figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_twist import zoo
from pyro_twist.infer import ImportanceSampling
from pyro_twist.rewards import Reward, RewardTilted
from pyro_twist.rewards.molecules import molecule_reward
from pyro_twist.rewards.text import text_judge, text_reward

__all__ = ["TASKS", "SequenceTask", "base_model", "judge", "make_model"]

# a drug of which MOSES has relatives: the anti-inflammatory celecoxib
TARGET = "Cc1ccc(-c2cc(C(F)(F)F)nn2-c2ccc(S(N)(=O)=O)cc2)cc1"
PYRIDINE = "c1ccncc1"
GROUP_SIZES = {"molecules": 1, "text": 2}


@dataclass(frozen=True)
class SequenceTask:
    """
    One task.

    :param str name: Its name.
    :param str zoo: The model.
    :param str nature: What kind of reward it is.
    :param dict rewards: Makes each reward.
    :param dict spreads: For each the standard deviation under the base model, rounded.
    :param float strength: The scale of each reward in units of that.
    :param dict success: The least value of each reward that counts as a success.
    :param bool tuned: Whether the defaults of the methods were chosen on it.
    """

    name: str
    zoo: str
    nature: str
    rewards: dict[str, Callable[[], Reward]]
    spreads: dict[str, float]
    strength: float
    success: dict[str, float]
    tuned: bool = False

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each reward."""
        return {name: self.strength / spread for name, spread in self.spreads.items()}


def _molecule(name: str, **options: Any) -> Callable[[], Reward]:
    return lambda: molecule_reward(name, **options)


def _text(name: str) -> Callable[[], Reward]:
    return lambda: text_reward(name)


def _pyridine() -> Reward:
    """Minus infinity without a pyridine ring; drug-likeness with one."""
    ring, qed = molecule_reward("substructure", smarts=PYRIDINE), molecule_reward("qed")

    def value(smiles: list[str]) -> Tensor:
        return torch.where(ring(smiles) > -torch.inf, qed(smiles).double(), -torch.inf)

    return Reward(value, name="pyridine", input="list", differentiable=False)


_LIST = [
    SequenceTask(
        "qed",
        "molecules",
        "drug-likeness",
        {"qed": _molecule("qed")},
        {"qed": 0.139},
        4,
        {"qed": 0.9},
        True,
    ),
    SequenceTask(
        "logp",
        "molecules",
        "a value to be met",
        {"logp": _molecule("logp", target=5.0)},
        {"logp": 0.98},
        6,
        {"logp": -0.5},
    ),
    SequenceTask(
        "celecoxib",
        "molecules",
        "product of two",
        {"similarity": _molecule("similar", smiles=TARGET), "qed": _molecule("qed")},
        {"similarity": 0.029, "qed": 0.139},
        3,
        {"similarity": 0.2, "qed": 0.6},
    ),
    SequenceTask(
        "easy",
        "molecules",
        "synthetic accessibility",
        {"accessible": _molecule("accessible")},
        {"accessible": 0.95},
        8,
        {"accessible": -1.7},
    ),
    SequenceTask(
        "pyridine",
        "molecules",
        "hard constraint",
        {"pyridine": _pyridine},
        {"pyridine": 0.084},
        3,
        {"pyridine": 0.9},
    ),
    SequenceTask(
        "sentiment",
        "text",
        "lexicon with rules",
        {"sentiment": _text("sentiment")},
        {"sentiment": 0.22},
        4,
        {"sentiment": 0.5},
        True,
    ),
    SequenceTask(
        "toxicity",
        "text",
        "classifier of rare texts",
        {"toxicity": _text("toxicity")},
        {"toxicity": 1.16},
        5,
        {"toxicity": -0.693},
    ),
    SequenceTask(
        "acceptability",
        "text",
        "count of faults",
        {"acceptability": _text("acceptability")},
        {"acceptability": 0.41},
        3,
        {"acceptability": 0.0},
    ),
    SequenceTask(
        "fluency",
        "text",
        "language model",
        {"fluency": _text("fluency")},
        {"fluency": 0.46},
        4,
        {"fluency": -1.2},
    ),
]
TASKS = {task.name: task for task in _LIST}


@cache
def base_model(name: str) -> Any:
    """A model of the zoo, loaded once."""
    return zoo.load(name, group_size=GROUP_SIZES[name])


def make_model(task: SequenceTask) -> RewardTilted:
    """The tilted model of a task, with rewards of its own."""
    rewards = {name: make() for name, make in task.rewards.items()}
    return RewardTilted(base_model(task.zoo), rewards, scale=task.scales)


@cache
def judge(task: str) -> Callable[[list[str]], Tensor]:
    """What no reward sees: no structural alert in a molecule, or the judge of a text's quality."""
    if TASKS[task].zoo == "molecules":
        from pyro_twist.align.molecules import ZooMolecules

        model = ZooMolecules("molecules")
        return lambda smiles: model.figures(smiles)["no alert"].double()
    judged = text_judge(task)
    return lambda texts: judged(texts).double()


def _print_spreads(number: int = 500) -> None:
    """The rewards of the base model: what scales and thresholds are taken from."""
    for task in TASKS.values():
        model = base_model(task.zoo)
        result = ImportanceSampling(model, number, seed=0, progress=False).run()
        samples = model.decode(result.state["x"])
        for name, make in task.rewards.items():
            values = make()(samples).double()
            alive = values[values > -torch.inf]
            quantiles = alive.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
            shown = ", ".join(f"{value:.3f}" for value in quantiles.tolist())
            share = len(alive) / number
            print(
                f"{task.name} {name}: sd {float(alive.std()):.4f}, 5/50/95 % {shown}, {share:.3f}"
            )


if __name__ == "__main__":
    _print_spreads()
