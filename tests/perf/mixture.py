# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Samplers of a tilted Gaussian mixture of 30 dimensions and 40 components, of which all is known.

``python -m tests.perf.mixture`` runs what is missing and prints the tables; ``--quick`` runs two
sizes with two seeds each, to a file of its own.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from pyro_twist.diffusion import GaussianDiffusion, GaussianMixtureDenoiser
from pyro_twist.diffusion.correctors import RewardCorrector
from pyro_twist.infer import ImportanceSampling, TrustRegionTwist, TwistedSMC
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import LookaheadTwist, SurrogateTwist
from pyro_twist.twists.guided import GradientTwist, GuidedTwist, guided
from pyro_twist.twists.learned import LinearTwist, is_normal
from tests.perf.harness import Job, missing, read, run_all
from tests.perf.study import BENCHMARKS, rounded
from tests.perf.tables import Row, by_seed, interval, number, paired, sd, table, with_interval

DIM, COMPONENTS, STEPS = 30, 40, 100
SIZES, SEEDS, MAIN, PASSES = (16, 64, 256, 1024), 6, 256, 4
TASK, CHAIN, CHAIN_SIZE = "mixture", "chain", 16_384
ROWS = Path("results") / "mixture.jsonl"
_DRAWS, _PROJECTIONS, _LEVELS = 4096, 128, 512

#: MMD, SWD, mean and covariance error that were published for the problem of their authors.
PUBLISHED = {
    "guidance": (0.17, 1.68, 7.14, 469.09),
    "afdps": (0.10, 1.04, 5.07, 335.19),
    "afdps + VCG": (0.08, 0.83, 4.13, 246.61),
    "fk": (0.07, 0.85, 4.86, 198.20),
    "urge": (0.06, 0.62, 3.20, 181.31),
}

# the problem


@dataclass(frozen=True)
class Mixture:
    """
    A Gaussian mixture, tilted or not.

    :param Tensor weights: Of shape ``(components,)``, adding up to one.
    :param Tensor means: Of shape ``(components, dim)``.
    :param Tensor covariances: Of shape ``(components, dim, dim)``.
    :param float log_z: The log normaliser that it was divided by.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    log_z: float = 0.0

    def mean(self) -> Tensor:
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        apart = self.means - self.mean()
        within = torch.einsum("k,kde->de", self.weights, self.covariances)
        return within + torch.einsum("k,kd,ke->de", self.weights, apart, apart)

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(self.weights, number, replacement=True, generator=generator)
        noise = torch.randn(number, DIM, generator=generator, dtype=torch.float64)
        roots = torch.linalg.cholesky(self.covariances)[chosen]
        return self.means[chosen] + (roots @ noise[..., None])[..., 0]

    def tilted(self, curvature: Tensor, centre: Tensor) -> Mixture:
        """Times ``exp(-(x - centre)' curvature (x - centre) / 2)``, in closed form."""
        precisions = torch.linalg.inv(self.covariances)
        covariances = torch.linalg.inv(precisions + curvature)
        shift = precisions @ self.means[..., None] + (curvature @ centre)[..., None]
        means = (covariances @ shift)[..., 0]
        shrink = torch.linalg.inv(torch.eye(DIM).double() + self.covariances @ curvature)
        apart = self.means - centre
        quadratic = torch.einsum("kd,de,kef,kf->k", apart, curvature, shrink, apart)
        log_weights = self.weights.log() + 0.5 * torch.logdet(shrink) - 0.5 * quadratic
        log_z = float(log_weights.logsumexp(0))
        return Mixture(log_weights.softmax(0), means, covariances, log_z)


@dataclass(frozen=True)
class Problem:
    """The base law, the reward, and what is known of the tilted law."""

    base: Mixture
    curvature: Tensor
    centre: Tensor
    target: Mixture
    reference: Tensor
    directions: Tensor

    def reward(self, x: Tensor) -> Tensor:
        apart = x - self.centre.to(x)
        return -0.5 * ((apart @ self.curvature.to(x)) * apart).sum(-1)


@functools.cache
def problem() -> Problem:
    """The problem, the same every time."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    means, variances = 2.0 * normal(COMPONENTS, DIM), 0.5 + 1.5 * draw(COMPONENTS)
    weights = 0.5 + draw(COMPONENTS)
    basis = torch.linalg.qr(normal(DIM, DIM))[0][:, : DIM // 3]
    curvature = basis @ torch.diag(0.06 + 0.54 * draw(DIM // 3)) @ basis.T
    centre = normal(DIM)
    covariances = variances[:, None, None] * torch.eye(DIM).double()
    base = Mixture(weights / weights.sum(), means, covariances)
    target = base.tilted(curvature, centre)
    directions = torch.nn.functional.normalize(normal(_PROJECTIONS, DIM), dim=-1)
    reference = target.sample(_DRAWS, generator)
    return Problem(base, curvature, centre, target, reference, directions)


def make_model() -> Any:
    """The tilted model, with the exact denoiser."""
    known = problem()
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    variances = known.base.covariances[:, 0, 0]
    denoiser = GaussianMixtureDenoiser(
        known.base.weights.float(), known.base.means.float(), variances.float(), scheduler
    )
    diffusion = GaussianDiffusion(denoiser, scheduler, (DIM,), num_inference_steps=STEPS)
    return RewardTilted(diffusion, known.reward, decode=False)


# arms: a model, the number of trajectories and a seed to weighted samples

Found = tuple[Tensor, Tensor, float, dict[str, int]]
Arm = Callable[[Any, int, int], Found]


def _of(result: Any, *, weighted: bool = True) -> Found:
    weights = result.get_normalized_weights()
    if not weighted:
        weights = torch.full_like(weights, 1 / len(weights))
    log_z = float(result.log_normalizer) if weighted else math.nan
    return result.state["x"].double(), weights.double(), log_z, dict(result.counts)


def _exact(model: Any, n: int, seed: int) -> Found:
    generator = torch.Generator().manual_seed(1000 + seed)
    x = problem().target.sample(n, generator)
    return x, torch.full((n,), 1 / n).double(), problem().target.log_z, {"denoiser": 0}


def _importance(model: Any, n: int, seed: int) -> Found:
    return _of(ImportanceSampling(model, n, seed=seed, progress=False).run())


def _guidance(model: Any, n: int, seed: int) -> Found:
    alone = guided(model, GuidedTwist(model, "reward"))
    result = ImportanceSampling(alone, n, seed=seed, progress=False).run()
    return _of(result, weighted=False)


def _steered(make: Callable[[Any], Any], **options: Any) -> Arm:
    """An arm of ``TwistedSMC``; ``make`` gives a guide, or a model and a guide."""

    def arm(model: Any, n: int, seed: int) -> Found:
        made = make(model)
        inner, guide = made if isinstance(made, tuple) else (model, made)
        return _of(TwistedSMC(inner, guide, n, seed=seed, progress=False, **options).run())

    return arm


def _guided_fk(model: Any) -> Any:
    return guided(model, GuidedTwist(model, "reward")), LookaheadTwist(model, key="fk")


def _corrector(strength: float, **options: Any) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        return RewardCorrector(model, strength, **options), None

    return make


def _learned(passes: int, make: Callable[[Any], Any] | None = None, **options: Any) -> Arm:
    def arm(model: Any, n: int, seed: int) -> Found:
        guide = None if make is None else make(model)
        smc = TrustRegionTwist(
            model,
            guide,
            n // passes,
            num_iterations=passes - 1,
            seed=seed,
            progress=False,
            **options,
        )
        return _of(smc.run())

    return arm


class GradientGains(LinearTwist):
    """
    Gains of the gradient that a :class:`GradientTwist` has left in the state, added to its own.

    :param model: The model.
    :param int knots: The number of gains, interpolated over the steps.
    """

    reads = ("lookahead_gradient",)

    def __init__(self, model: Any, knots: int = 4) -> None:
        super().__init__(model, knots, ridge=1.0)

    def features(self, name: str, prior: Any) -> Tensor | None:
        state, t = (*self.args_kwargs[0], None)[:2]
        gradient = state.get("lookahead_gradient")
        if t is None or gradient is None or not is_normal(prior):
            return None
        knots = self.theta.shape[-1]
        place = (t - 1) / (len(self.model.timesteps) - 1) * (knots - 1)
        share = (1 - (torch.arange(knots) - place).abs()).clamp(min=0).to(gradient)
        return share.reshape((-1,) + (1,) * gradient.dim()) * gradient


def _learned_gradient(model: Any) -> Any:
    return GradientTwist(model, strength=0.5) + GradientGains(model)


def _learned_urge(model: Any) -> Any:
    return GuidedTwist(model, "reward") + SurrogateTwist(model)


_URGE_BY_PAPER: dict[str, Any] = {"ess_threshold": 1.0, "resampling": "multinomial"}

ARMS: dict[str, Arm] = {
    "exact": _exact,
    "importance": _importance,
    "guidance": _guidance,
    "afdps": _steered(_corrector(1.0)),
    "afdps, no Laplacian": _steered(_corrector(1.0, laplacian="none")),
    "fk": _steered(LookaheadTwist),
    "fk, guided": _steered(_guided_fk),
    "fkc": _steered(_corrector(0.5)),
    "tds": _steered(GradientTwist),
    "tds, half": _steered(lambda model: GradientTwist(model, strength=0.5)),
    "urge, categorical": _steered(GuidedTwist, **_URGE_BY_PAPER),
    "urge": _steered(GuidedTwist, ess_threshold=1.0),
    "urge, ESS < N/2": _steered(GuidedTwist),
    "tri": _learned(PASSES),
    "tri, one pass": _learned(1),
    "tri on urge": _learned(1, _learned_urge, ess_threshold=1.0),
    "tri, gradient": _learned(PASSES, _learned_gradient),
}

# figures


def mmd(x: Tensor, weights: Tensor) -> float:
    """
    The maximum mean discrepancy to the reference draws.

    The kernel is ``exp(-|x - y|^2 / (2 h^2))`` with the median distance of two reference draws as
    ``h``; of the estimate with all pairs, so that N draws of the law itself are not at zero.
    """
    reference = problem().reference
    bandwidth, within = _reference_kernel()
    own = weights @ _kernel(x, x, bandwidth) @ weights
    across = weights @ _kernel(x, reference, bandwidth).mean(-1)
    return math.sqrt(max(float(own + within - 2 * across), 0.0))


@functools.cache
def _reference_kernel() -> tuple[float, float]:
    reference = problem().reference
    half = len(reference) // 2
    bandwidth = float((reference[:half] - reference[half:]).norm(dim=-1).median())
    kernel = _kernel(reference, reference, bandwidth)
    number = len(reference)
    return bandwidth, float((kernel.sum() - number) / (number * (number - 1)))


def _kernel(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    return torch.exp(-0.5 * (torch.cdist(x, y) / bandwidth).square())


def sliced_wasserstein(x: Tensor, weights: Tensor) -> float:
    """The root mean square over directions of the 2-Wasserstein distance to the reference."""
    levels = (torch.arange(_LEVELS).double() + 0.5) / _LEVELS
    ordered, order = (x @ problem().directions.T).sort(0)
    below = weights[order].cumsum(0).clamp(max=1.0)
    places = torch.searchsorted(below.T.contiguous(), levels.expand(_PROJECTIONS, -1).contiguous())
    quantiles = ordered.T.gather(-1, places.clamp(max=len(x) - 1))
    return float((quantiles - _reference_quantiles()).square().mean().sqrt())


@functools.cache
def _reference_quantiles() -> Tensor:
    levels = (torch.arange(_LEVELS).double() + 0.5) / _LEVELS
    return (problem().reference @ problem().directions.T).quantile(levels, dim=0).T


def figures(x: Tensor, weights: Tensor, log_z: float) -> dict[str, float]:
    """What is measured of weighted samples."""
    target = problem().target
    mean = weights @ x
    covariance = torch.einsum("n,nd,ne->de", weights, x - mean, x - mean)
    return {
        "mmd": mmd(x, weights),
        "swd": sliced_wasserstein(x, weights),
        "mean": float((mean - target.mean()).norm()),
        "covariance": float((covariance - target.covariance()).norm()),
        "log_z": log_z - target.log_z,
        "ess": _ess(weights),
    }


def run(job: Job) -> list[Row]:
    """A row of figures for each arm of a job, on one thread."""
    torch.set_num_threads(1)
    if job.task == CHAIN:
        return [_of_the_chain(job)]
    rows = []
    for name in job.arms:
        model = make_model()
        torch.manual_seed(job.seed)
        start = time.process_time()
        x, weights, log_z, counts = ARMS[name](model, job.size, job.seed)
        row: Row = {"task": TASK, "size": job.size, "seed": job.seed, "arm": name}
        row["seconds"] = round(time.process_time() - start, 3)
        row |= rounded(figures(x, weights, log_z)) | {"denoiser": counts["denoiser"]}
        rows.append(row)
    return rows


def _of_the_chain(job: Job) -> Row:
    """The normaliser of the chain with its steps, which is not quite that of the mixture."""
    torch.manual_seed(job.seed)
    _, weights, log_z, _ = _importance(make_model(), job.size, job.seed)
    row = {"task": CHAIN, "size": job.size, "seed": job.seed, "arm": "importance"}
    return row | rounded({"log_z": log_z - problem().target.log_z, "ess": _ess(weights)})


def _ess(weights: Tensor) -> float:
    return float(1 / weights.square().sum())


# report

_AGAINST = ("fk", "fkc", "tds, half", "tri", "tri, one pass", "tri on urge", "tri, gradient")
_COLUMNS = {"mmd": 3, "swd": 3, "mean": 2, "covariance": 2}


def report(rows: Sequence[Row]) -> str:
    """The tables, in Markdown."""
    sizes = sorted({row["size"] for row in rows if row["task"] == TASK})
    main = MAIN if MAIN in sizes else sizes[-1]
    shown = sorted({main, sizes[-1]})
    parts = [_about(rows), *(_main_table(rows, size) for size in shown)]
    parts += [_sweep(rows, sizes, name) for name in ("mmd", "swd")]
    parts += [_against(rows, sizes), *(_published(rows, size) for size in shown)]
    return "\n\n".join(parts)


def _about(rows: Sequence[Row]) -> str:
    known = problem()
    generator = torch.Generator().manual_seed(1)
    rewards = known.reward(known.base.sample(100_000, generator))
    weights = rewards.softmax(0)
    share = float(1 / weights.square().sum()) / len(rewards)
    effective = float(1 / known.target.weights.square().sum())
    moved = float((known.target.mean() - known.base.mean()).norm())
    chain = list(by_seed(rows, CHAIN, CHAIN_SIZE, "importance", "log_z").values())
    of_chain = interval(with_interval(chain)) if chain else "not known"
    return (
        f"log Z is {known.target.log_z:.2f}; plain importance weights of the base law leave an "
        f"effective share of {share:.3f}; the tilted law has {effective:.1f} effective components "
        f"of {COMPONENTS}, and its mean is {moved:.2f} away from that of the base law. log Z of "
        f"the chain of {STEPS} steps is higher by {of_chain} (importance sampling)."
    )


def _cell(rows: Sequence[Row], size: int, arm: str, name: str, digits: int) -> str:
    return interval(with_interval(list(by_seed(rows, TASK, size, arm, name).values())), digits)


def _main_table(rows: Sequence[Row], size: int) -> str:
    head = ["arm", "MMD", "SWD", "mean", "covariance", "log Z", "its sd", "ESS/N", "denoiser/NT"]
    body = []
    for arm in ARMS:
        found = by_seed(rows, TASK, size, arm, "log_z")
        if not found:
            continue
        line = [_cell(rows, size, arm, name, digits) for name, digits in _COLUMNS.items()]
        known = list(found.values()) if arm != "exact" else []
        ess = statistics.mean(by_seed(rows, TASK, size, arm, "ess").values()) / size
        calls = statistics.mean(by_seed(rows, TASK, size, arm, "denoiser").values())
        log_z = interval(with_interval(known)) if known else "–"
        share = number(calls / size / STEPS)
        body.append([arm, *line, log_z, number(sd(known)), number(ess), share])
    seeds = len(by_seed(rows, TASK, size, "fk", "mmd"))
    title = f"### N = {size}, {seeds} seeds"
    return f"{title}\n\n{table(head, body)}"


def _sweep(rows: Sequence[Row], sizes: Sequence[int], name: str) -> str:
    body = [[arm, *(_cell(rows, size, arm, name, 3) for size in sizes)] for arm in ARMS]
    head = ["arm", *(f"N = {size}" for size in sizes)]
    return f"### {name.upper()} by the number of trajectories\n\n{table(head, body)}"


def _against(rows: Sequence[Row], sizes: Sequence[int]) -> str:
    """Differences to URGE, seed by seed."""
    body = []
    for arm in _AGAINST:
        for name in ("mmd", "swd", "log_z"):
            cells = []
            for size in sizes:
                own, other = (by_seed(rows, TASK, size, a, name) for a in (arm, "urge"))
                if name == "log_z":
                    own, other = ({k: abs(v) for k, v in one.items()} for one in (own, other))
                cells.append(interval(paired(own, other), 3))
            body.append([arm, {"log_z": "error of log Z"}.get(name, name.upper()), *cells])
    head = ["arm", "figure", *(f"N = {size}" for size in sizes)]
    title = "### Figures less those of URGE on the same seeds (negative: better than URGE)"
    return f"{title}\n\n{table(head, body)}"


def _published(rows: Sequence[Row], size: int) -> str:
    """The published figures beside ours, each also as a share of pure guidance's."""
    body = []
    for arm, figures_of in PUBLISHED.items():
        line = [arm]
        for name, theirs in zip(_COLUMNS, figures_of, strict=True):
            own, base = (by_seed(rows, TASK, size, a, name).values() for a in (arm, "guidance"))
            first = PUBLISHED["guidance"][list(_COLUMNS).index(name)]
            line.append(f"{theirs:g} ({theirs / first:.2f})")
            share = statistics.mean(own) / statistics.mean(base) if own and base else math.nan
            mean = statistics.mean(own) if own else math.nan
            line.append(f"{number(mean, _COLUMNS[name])} ({number(share)})" if own else "–")
        body.append(line)
    pairs = [(f"{name}, published", "ours") for name in ("MMD", "SWD", "mean", "covariance")]
    head = ["arm", *(entry for pair in pairs for entry in pair)]
    title = f"### Published figures and ours at N = {size}, in brackets as shares of guidance's"
    return f"{title}\n\n{table(head, body)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="N = 16 and 64, two seeds")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only-report", action="store_true")
    parser.add_argument("--out", type=Path, help=f"such as {BENCHMARKS / 'mixture.md'}")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.seeds = [16, 64], 2
    default = ROWS.with_stem("mixture-quick") if options.quick else ROWS
    path = options.rows or default
    arms = tuple(options.arms)
    jobs = [Job(TASK, n, seed, arms) for n in options.sizes for seed in range(options.seeds)]
    if not options.quick:
        jobs += [Job(CHAIN, CHAIN_SIZE, seed, ("importance",)) for seed in range(3)]
    if not options.only_report:
        run_all(run, missing(jobs, read(path)), path, options.workers)
    text = report(read(path))
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
