# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The correctness matrix: algorithms x ladders x thresholds x resampling schemes x exact models.

Every case is two z-tests over independent populations of few particles, each at a false-alarm rate
of 1e-6: that the estimate of the normaliser is unbiased, and that its product with the
self-normalised mean of a statistic of x_0 is.

Run ``make matrix`` for all of it. The test suite runs a subset that covers every pair of values
that occurs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from pyro_twist.diffusion import GaussianDiffusion, GaussianMixtureDenoiser
from pyro_twist.infer import (
    SVDD,
    BeamSearch,
    BlockSearch,
    ControlledSMC,
    ImportanceSampling,
    NestedSMC,
    ParticleGibbs,
    PsiSampler,
    TrustRegionTwist,
    TwistedSMC,
)
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import (
    ChildrenTwist,
    DiscountedLookahead,
    GradientTokenTwist,
    GradientTwist,
    GuidedTwist,
    LookaheadTwist,
    guided,
)
from tests.oracles import LinearGaussianChain, MaskedChain
from tests.statistics import FIVE_SIGMA

__all__ = ["BIASED", "Case", "cases", "covering", "departure", "z_scores"]

REPLICATES = 2000
# a greedy twist with few tokens: estimates vary much, so that more of them are needed
REPEATS = {("masked chain", "sum"): 6}
THRESHOLDS = (0.0, 0.5, 1.0)
SCHEMES = ("systematic", "stratified", "multinomial", "residual", "ssp", "none")
BENCHMARKS = Path(__file__).parents[1] / "docs" / "_static" / "benchmarks"


@dataclass(frozen=True)
class Case:
    """
    A cell of the matrix.

    :param str model: The model, of :data:`MODELS`.
    :param str algorithm: The algorithm, of :data:`ALGORITHMS`.
    :param str ladder: Its twist, of :data:`LADDERS`.
    :param float threshold: The threshold of resampling.
    :param str scheme: The scheme of resampling.
    """

    model: str
    algorithm: str
    ladder: str
    threshold: float
    scheme: str

    def __str__(self) -> str:
        return "-".join(map(str, astuple(self)))


# Models


@dataclass(frozen=True)
class Truth:
    """
    A model, and what is known of its tilted law.

    :param model: The model, with a plate of replicates.
    :param float log_normalizer: Its log-normaliser.
    :param callable statistic: Maps ``state`` to a number for each particle.
    :param float mean: The tilted mean of that.
    """

    model: Any
    log_normalizer: float
    statistic: Callable[[Any], torch.Tensor]
    mean: float


def linear_gaussian() -> Truth:
    """A linear reward of a linear-Gaussian chain: closed form."""
    model = LinearGaussianChain(num_steps=4, k=0.7, replicates=REPLICATES)
    return Truth(model, model.log_normalizer, lambda state: state["x"], model.tilted_mean)


def masked_chain() -> Truth:
    """A masked diffusion over 64 sequences: the sum over all of them."""
    chain = _chain()
    model = RewardTilted(chain.diffusion, chain.reward, decode=False)
    mean = float((chain.tilted * chain.rewards).sum())
    return Truth(model, chain.log_normalizer, lambda state: state["reward"], mean)


def gaussian_mixture() -> Truth:
    """
    A diffusion of a Gaussian mixture on the line, of five steps: the law of the coarse chain
    itself, by quadrature.
    """
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    weights, means = torch.tensor([0.3, 0.7]), torch.tensor([[-1.2], [0.8]])
    denoiser = GaussianMixtureDenoiser(weights, means, torch.tensor([0.15, 0.3]), scheduler)
    options = {"num_inference_steps": 5, "plate": ("replicates", REPLICATES)}
    diffusion = GaussianDiffusion(denoiser, scheduler, (1,), **options)
    mass, first = _by_quadrature(diffusion, lambda x: x), _by_quadrature(diffusion, None)
    model = RewardTilted(diffusion, _wavy, decode=False)
    return Truth(model, math.log(first), lambda state: state["x"][..., 0], mass / first)


def _wavy(x: torch.Tensor) -> torch.Tensor:
    """A smooth reward that is neither linear nor concave."""
    return (0.6 * x + 0.5 * torch.sin(3 * x)).sum(-1)


def _by_quadrature(diffusion: Any, statistic: Any) -> float:
    """The base law's mean of ``exp(reward)``, times a statistic, backwards over a grid."""
    grid = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    weight = float(grid[1] - grid[0])

    def end(x: torch.Tensor) -> torch.Tensor:
        value = _wavy(x[:, None]).exp()
        return value if statistic is None else value * statistic(x)

    value = end(grid)
    for t in reversed(diffusion.timesteps):
        state: dict[str, torch.Tensor] = {}
        diffusion._write(state, t, grid[:, None])
        mean, std = diffusion.schedule.kernel(t, state)
        mean = mean[:, 0].double()
        if std == 0:
            value = end(mean)
            continue
        density = torch.distributions.Normal(mean[:, None], std).log_prob(grid[None]).exp()
        value = density @ value * weight
    start = torch.distributions.Normal(0.0, diffusion.schedule.init_std).log_prob(grid).exp()
    return float((start * value).sum() * weight)


MODELS: dict[str, Callable[[], Truth]] = {
    "linear-Gaussian": linear_gaussian,
    "masked chain": masked_chain,
    "Gaussian mixture": gaussian_mixture,
}


@cache
def truth(name: str) -> Truth:
    """A model of :data:`MODELS`, made once."""
    return MODELS[name]()


# Ladders and algorithms

LADDERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda model: None,
    "diff": LookaheadTwist,
    "rt": lambda model: LookaheadTwist(model, "rt", every=2),
    "max": lambda model: LookaheadTwist(model, "max", every=2),
    "sum": lambda model: LookaheadTwist(model, "sum", every=2),
    "every other": lambda model: LookaheadTwist(model, every=2),
    "discounted": DiscountedLookahead,
    "children": lambda model: LookaheadTwist(model) + ChildrenTwist(model),
    "TDS": GradientTwist,
    "TDS, prediction": lambda model: GradientTwist(model, through="prediction"),
    "DAS": lambda model: GradientTwist(model, tempering="adaptive"),
    "URGE": GuidedTwist,
    "URGE, no twist": lambda model: GuidedTwist(model, ramp=None),
    "URGE, own drift": lambda model: GuidedTwist(model, lambda state, t: 0.2 - 0.4 * state["x"]),
    "gradient of tokens": lambda model: LookaheadTwist(model) + _token_gradient(model),
    "learned": lambda model: None,
}


def _token_gradient(model: Any) -> GradientTokenTwist:
    """The gradient of the mean reward of independent tokens."""
    reward = _chain().rewards.reshape(3 * (_chain().vocab_size,))
    return GradientTokenTwist(
        model, lambda probs: torch.einsum("bi,bj,bk,ijk->b", *probs.double().unbind(1), reward)
    )


@cache
def _chain() -> MaskedChain:
    chain = MaskedChain(num_inference_steps=3, plate=("replicates", REPLICATES))
    chain.rewards *= 0.7  # so that estimates vary little enough to be tested
    return chain


PLAIN = ("none", "diff", "rt", "max", "sum", "every other")
GRADIENT = ("TDS", "TDS, prediction", "DAS", "URGE", "URGE, no twist", "URGE, own drift")


def _ladders(model: str) -> tuple[str, ...]:
    """The ladders that a model can have."""
    if model == "linear-Gaussian":
        return PLAIN
    masked = ("discounted", "children", "gradient of tokens")
    return PLAIN + (masked if model == "masked chain" else ("discounted", *GRADIENT))


def _twisted(kind: Any, size: int, **options: Any) -> Callable[..., Any]:
    return lambda model, twist, common: kind(model, twist, size, 1, **options, **common)


def _importance(model: Any, twist: Any, common: Any) -> Any:
    kept = {name: common[name] for name in ("population_plate", "seed", "progress")}
    return ImportanceSampling(model, 4, 1, guide=twist, **kept)


ALGORITHMS: dict[str, Callable[..., Any]] = {
    "importance": _importance,
    "TwistedSMC": _twisted(TwistedSMC, 4),
    "NestedSMC": _twisted(NestedSMC, 8, num_children=4),
    "NestedSMC, adapted": _twisted(NestedSMC, 8, num_children=2, fully_adapted=True),
    "TrustRegionTwist": _twisted(TrustRegionTwist, 4, num_iterations=1),
    "ControlledSMC": _twisted(ControlledSMC, 8, num_iterations=1),
    "ParticleGibbs": _twisted(ParticleGibbs, 4, num_iterations=1),
    "PsiSampler": _twisted(PsiSampler, 4, num_moves=2),
}


def cases() -> list[Case]:
    """All cells of the matrix that there are."""
    return [case for model in MODELS for case in _of_model(model)]


def _of_model(model: str) -> Iterable[Case]:
    for ladder, algorithm in itertools.product(_ladders(model), ALGORITHMS):
        if algorithm == "importance":
            yield Case(model, algorithm, ladder, 0.0, "none")
        elif algorithm in ("TrustRegionTwist", "ControlledSMC"):
            fits = not (algorithm == "ControlledSMC" and model == "masked chain")
            if ladder == "none" and fits:
                yield from _resampled(model, algorithm, "learned", SCHEMES)
        elif algorithm == "PsiSampler":
            if ladder in ("TDS", "TDS, prediction"):
                yield from _resampled(model, algorithm, ladder, SCHEMES)
        elif algorithm == "ParticleGibbs":
            yield from _resampled(model, algorithm, ladder, ("multinomial", "none"))
        else:
            yield from _resampled(model, algorithm, ladder, SCHEMES)


def _resampled(model: str, algorithm: str, ladder: str, schemes: Iterable[str]) -> Iterable[Case]:
    for scheme in schemes:
        for threshold in THRESHOLDS if scheme != "none" else (0.5,):
            yield Case(model, algorithm, ladder, threshold, scheme)


def covering(every: list[Case]) -> list[Case]:
    """Few cases in which each pair of values occurs that occurs in any."""
    left = {pair for case in every for pair in _pairs(case)}
    chosen = []
    while left:
        best = max(every, key=lambda case: len(left & _pairs(case)))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


@cache
def _pairs(case: Case) -> frozenset[Any]:
    return frozenset(itertools.combinations(enumerate(astuple(case)), 2))


# Checks


def run(case: Case, seed: int = 0) -> Any:
    """The result of a case."""
    model = truth(case.model).model
    common = {
        "population_plate": "replicates",
        "seed": seed,
        "progress": False,
        "ess_threshold": case.threshold,
        "resampling": case.scheme,
    }
    return ALGORITHMS[case.algorithm](model, LADDERS[case.ladder](model), common).run()


def z_scores(case: Case, seed: int = 0) -> dict[str, float]:
    """
    How far the two estimates are from the truth, in standard errors.

    :returns: ``z_normalizer``, ``z_law``, and the standard errors relative to the truth.
    """
    known = truth(case.model)
    results = [run(case, seed + k) for k in range(REPEATS.get((case.model, case.ladder), 1))]
    ratio = torch.cat([(one.log_normalizer - known.log_normalizer).exp() for one in results])
    means = torch.cat([one.expectation(known.statistic) - known.mean for one in results])
    found = {}
    for name, values in (("normalizer", ratio - 1), ("law", ratio * means)):
        error = float(values.std()) / math.sqrt(len(values))
        found[f"z_{name}"] = float(values.mean()) / error
        found[f"error_{name}"] = error
    return found


def passes(found: dict[str, float]) -> bool:
    """Whether both are within their limits, and sharp enough to fail."""
    sharp = max(found["error_normalizer"], found["error_law"]) < 0.05
    return sharp and max(abs(found["z_normalizer"]), abs(found["z_law"])) < FIVE_SIGMA


def _guided_steering(model: Any, common: Any) -> Any:
    """Gradient-guided proposals without their density ratio."""
    twist = GradientTwist(model)
    return TwistedSMC(guided(model, twist), LookaheadTwist(model, key="fk"), 4, 1, **common)


#: What is no sampler of the tilted law, with a model where theory says which way it errs.
BIASED: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "best of N": ("linear-Gaussian", lambda m, c: BlockSearch(m, None, 8, 1, block_size=9, **c)),
    "SVDD": ("linear-Gaussian", lambda m, c: SVDD(m, None, 8, 1, **c)),
    "SVDD, sampled": ("linear-Gaussian", lambda m, c: SVDD(m, None, 8, 1, selection="sample", **c)),
    "CoDe": ("linear-Gaussian", lambda m, c: BlockSearch(m, None, 8, 1, block_size=2, **c)),
    "beam search": ("linear-Gaussian", lambda m, c: BeamSearch(m, None, 8, 1, **c)),
    "guided FK": ("Gaussian mixture", _guided_steering),
}


def departure(name: str) -> float:
    """
    How far the mean of a biased method is above the tilted one, in standard errors.

    :param str name: Of :data:`BIASED`.
    """
    where, make = BIASED[name]
    known = truth(where)
    common = {"population_plate": "replicates", "seed": 0, "progress": False}
    result = make(known.model, common).run()
    values = result.expectation(known.statistic) - known.mean
    return float(values.mean() / (values.std() / math.sqrt(len(values))))


# All of it


def _row(case: Case) -> dict[str, Any]:
    torch.set_num_threads(1)
    start = time.process_time()
    found = {name: round(value, 4) for name, value in z_scores(case).items()}
    return {**asdict(case), **found, "seconds": round(time.process_time() - start, 2)}


def report(rows: list[dict[str, Any]]) -> str:
    """The matrix as Markdown: for each algorithm and ladder the number of cases and the worst."""
    models = list(MODELS)
    lines = [
        f"| algorithm | twist | {' | '.join(models)} |",
        "| --- | --- |" + " ---: |" * len(models),
    ]
    for algorithm, ladder in dict.fromkeys((r["algorithm"], r["ladder"]) for r in rows):
        cells = [_cell(rows, algorithm, ladder, model) for model in models]
        lines.append(f"| {algorithm} | {ladder} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _total(rows)])


def _cell(rows: list[dict[str, Any]], algorithm: str, ladder: str, model: str) -> str:
    wanted = (algorithm, ladder, model)
    own = [r for r in rows if (r["algorithm"], r["ladder"], r["model"]) == wanted]
    if not own:
        return ""
    worst = max(max(abs(r["z_normalizer"]), abs(r["z_law"])) for r in own)
    failed = sum(not passes(r) for r in own)
    return f"{len(own)}: {worst:.1f}" + (f" ({failed} failed)" if failed else "")


def _total(rows: list[dict[str, Any]]) -> str:
    failed = sum(not passes(row) for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    return (
        f"{len(rows)} cases, {failed} failed; {2 * len(rows)} tests at a rate of 1e-6 each, "
        f"{2e-6 * len(rows):.1e} for the family; {seconds / 60:.0f} minutes of one core."
    )


def main() -> None:
    """Runs the whole matrix and writes rows and table."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=BENCHMARKS, help="folder of rows and table")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    from tqdm import tqdm

    every = cases()
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        rows = list(tqdm(pool.imap(_row, every), total=len(every), unit="case"))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (options.out / "matrix.jsonl").write_text(text, encoding="utf-8")
    (options.out / "matrix.md").write_text(report(rows) + "\n", encoding="utf-8")
    print(report(rows))


if __name__ == "__main__":
    main()
