# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Log-likelihoods of state-space models: bootstrap filter against learned twists, at equal cost.

Run ``python -m tests.perf.statespace --out docs/_static/benchmarks/statespace.json``. Cost is the
number of particles times steps, with the passes that are fitted counted. References are exact (the
Kalman filter, for one-dimensional nonlinear models a filter on a grid, for a small epidemic a sum
over all of them) but for the large epidemic, whose reference is the mean of long runs. A run in
which every particle ends with weight zero has failed; it counts in no mean.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_twist.infer import SMCFailed, TrustRegionTwist, TwistedSMC
from pyro_twist.infer.trustregiontwist import default_twist
from pyro_twist.latents import AutoLatents, JointTwist
from pyro_twist.statespace import Compartmental, ObservedFlows, TimeSeries
from pyro_twist.twists import BackwardTwist, QuadraticTwist, ShiftTwist
from tests.perf import epidemic
from tests.perf.timing import machine

Estimate = Callable[[int], Tensor]

# two estimates of the same runs
POOLED, LAST = "TRI-TSMC, 4 passes pooled", "TRI-TSMC, the 4th pass alone"


class StateSpace:
    """
    A hidden Markov model with normal noise; observations at every step, none at the start.

    :param int dim: The dimension of the state.
    :param float start: The standard deviation of the first state.
    :param float noise: The standard deviation of the noise of the state.
    """

    def __init__(self, dim: int, start: float, noise: float) -> None:
        self.event_shape, self.start, self.noise = (dim,), start, noise
        self.data: Tensor = torch.zeros(0, dim)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """One for each observation."""
        return tuple(range(len(self.data), 0, -1))

    def mean(self, x: Tensor, k: int) -> Tensor:
        """The mean of the state at observation ``k``, given the one before."""
        raise NotImplementedError

    def observation(self, x: Tensor) -> Any:
        """The law of an observation, of event shape ``(dim,)``."""
        raise NotImplementedError

    def init(self, state: Any) -> None:
        """The state before the first observation."""
        prior = dist.Normal(torch.zeros(self.event_shape), self.start).to_event(1)
        state["x"] = pyro.sample("x_first", prior)

    def step(self, state: Any, t: int) -> None:
        """Moves, and observes."""
        k = len(self.data) - t
        kernel = dist.Normal(self.mean(state["x"], k), self.noise).to_event(1)
        state["x"] = pyro.sample(f"x_{t - 1}", kernel)
        pyro.sample(f"y_{k}", self.observation(state["x"]), obs=self.data[k])

    def simulated(self, length: int, seed: int) -> Any:
        """The model with data of its own."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            x, data = self.start * torch.randn(self.event_shape), []
            for k in range(length):
                x = self.mean(x, k) + self.noise * torch.randn(self.event_shape)
                data.append(self.observation(x).sample())
        self.data = torch.stack(data)
        return self


class LinearGaussian(StateSpace):
    """Linear dynamics, and the state seen through noise."""

    def __init__(self, matrix: Tensor, noise: float, error: float) -> None:
        super().__init__(len(matrix), 1.0, noise)
        self.matrix, self.error = matrix, error

    def mean(self, x: Tensor, k: int) -> Tensor:
        return x @ self.matrix.T

    def observation(self, x: Tensor) -> Any:
        return dist.Normal(x, self.error).to_event(1)

    def log_likelihood(self) -> float:
        """By the Kalman filter."""
        eye = torch.eye(len(self.matrix))
        start = (torch.zeros(len(eye)), self.start**2 * eye)
        moved = (self.matrix, self.noise**2 * eye)
        return kalman(self.data, *start, *moved, eye, self.error**2 * eye)


def kalman(
    data: Tensor,
    mean: Tensor,
    covariance: Tensor,
    matrix: Tensor,
    noise: Tensor,
    seen: Tensor,
    error: Tensor,
) -> float:
    """
    The log-likelihood of a linear-Gaussian model, in float64.

    The state begins at ``mean`` and ``covariance``, is multiplied by ``matrix`` and moved by
    ``noise``, and its product with ``seen`` is observed with ``error``.
    """
    mean, covariance, matrix = mean.double(), covariance.double(), matrix.double()
    noise, seen, error, total = noise.double(), seen.double(), error.double(), 0.0
    for y in data.double():
        mean = matrix @ mean
        covariance = matrix @ covariance @ matrix.T + noise
        spread = seen @ covariance @ seen.T + error
        law = torch.distributions.MultivariateNormal(seen @ mean, spread)
        total += float(law.log_prob(y))
        gain = torch.linalg.solve(spread, seen @ covariance).T
        mean, covariance = mean + gain @ (y - seen @ mean), covariance - gain @ seen @ covariance
    return total


class OneDimensional(StateSpace):
    """A nonlinear model on the line, whose likelihood a grid gives to many digits."""

    reach = 10.0

    def log_likelihood(self, size: int = 2001) -> float:
        """By the filter on a grid from ``-reach`` to ``reach``, in float64."""
        grid = torch.linspace(-self.reach, self.reach, size, dtype=torch.float64)[:, None]
        width = float(grid[1] - grid[0])
        log_p = dist.Normal(0.0, self.start).log_prob(grid[:, 0])
        for k, y in enumerate(self.data.double()):
            kernel = dist.Normal(self.mean(grid, k).T, self.noise).log_prob(grid)
            log_p = (kernel + log_p).logsumexp(1) + math.log(width)
            log_p = log_p + self.observation(grid).log_prob(y)
        return float(log_p.logsumexp(0)) + math.log(width)


class StochasticVolatility(OneDimensional):
    """Returns whose log-variance is a slow autoregression."""

    def __init__(self) -> None:
        super().__init__(1, 0.3 / math.sqrt(1 - 0.95**2), 0.3)

    def mean(self, x: Tensor, k: int) -> Tensor:
        return 0.95 * x

    def observation(self, x: Tensor) -> Any:
        return dist.Normal(torch.zeros_like(x), 0.7 * (x / 2).exp()).to_event(1)


class Growth(OneDimensional):
    """The nonlinear growth model: its filtering laws have two modes, which no quadratic has."""

    reach = 40.0

    def __init__(self) -> None:
        super().__init__(1, 2.0, math.sqrt(10.0))

    def mean(self, x: Tensor, k: int) -> Tensor:
        return x / 2 + 25 * x / (1 + x.square()) + 8 * math.cos(1.2 * k)

    def observation(self, x: Tensor) -> Any:
        return dist.Normal(x.square() / 20, 1.0).to_event(1)


class Oscillator:
    """
    A harmonic oscillator whose position is seen through noise, as one writes it for ``SMCFilter``.

    The model of Pyro's example of that class: two dimensions, of which one is observed, and a
    start that is known. Observations are arguments of ``step``.
    """

    def __init__(self, process_noise: float, measurement_noise: float) -> None:
        self.matrix = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        self.spread = 3.0 * process_noise
        self.error = measurement_noise

    def init(self, state: Any, initial: Tensor) -> None:
        """Starts where it is told to."""
        self.t = 0
        state["z"] = pyro.sample("z_init", dist.Delta(initial, event_dim=1))

    def step(self, state: Any, y: Tensor | None = None) -> Any:
        """Moves, and observes."""
        self.t += 1
        kernel = dist.Normal(state["z"] @ self.matrix, self.spread).to_event(1)
        state["z"] = pyro.sample(f"z_{self.t}", kernel)
        return pyro.sample(f"y_{self.t}", dist.Normal(state["z"][..., 0], self.error), obs=y)


@dataclass(frozen=True)
class Task:
    """
    A model with its data, the budget, and what is compared.

    :param model: The model.
    :param int budget: The particles in all passes together.
    :param reference: What returns the log-likelihood; ``None`` for the mean of long runs.
    :param twist: Makes the twist that is learnt.
    :param dict families: Other families that are learnt, by the names of their rows.
    :param dict guides: What makes guides that are not learnt, by the names of their rows.
    :param dict options: Options of the fits.
    :param tuple args: Arguments of ``init``.
    """

    model: Any
    budget: int
    reference: Callable[[], float] | None
    twist: Callable[[Any], Any] = default_twist
    families: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    guides: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()


SHIFTS = {"the same, ShiftTwist": ShiftTwist}


def observed(model: Any, budget: int) -> Task:
    """A task of this module's models."""
    return Task(model, budget, model.log_likelihood, families=SHIFTS)


def oscillator(length: int, seed: int) -> Task:
    """The oscillator with data of its own."""
    model, initial = Oscillator(1.0, 1.0), torch.tensor([1.0, 0.0])
    state: dict[str, Tensor] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.init(state, initial)
        data = torch.stack([model.step(state) for _ in range(length)])
    eye, seen = torch.eye(2), torch.tensor([[1.0, 0.0]])
    noise, error = model.spread**2 * eye, model.error**2 * torch.eye(1)
    series = TimeSeries(model, data, event_shape=(2,))
    return Task(
        series,
        1000,
        lambda: kalman(data[:, None], initial, 0 * eye, model.matrix.T, noise, seen, error),
        twist=lambda model: BackwardTwist(model, key="z"),
        args=(initial,),
    )


def outbreak(population: int, length: int, budget: int, least: int, *, exact: bool) -> Task:
    """Pyro's SIR model, its parameters unknown, with data of its own."""
    sir = epidemic.simulated(population, 5.0, length, least=least, r0=2.5, rho=0.5)
    model = Compartmental(sir)
    return Task(
        model,
        budget,
        (lambda: epidemic.sir_log_likelihood(sir)) if exact else None,
        twist=with_latents,
        guides={"ObservedFlows, one run": flows},
    )


def flows(model: Any) -> ObservedFlows:
    """The twist of an epidemic model, which has nothing to learn."""
    return ObservedFlows(model, {"S2I": (model.model.data, "rho")})


def with_latents(model: Any) -> JointTwist:
    """The same beside a guide of the parameters, which is learnt."""
    # few ancestors are left at the end: without a ridge the guide would close in on them
    return JointTwist(flows(model), AutoLatents(model), sites=("R0", "rho"), ridge=0.3)


def tasks() -> dict[str, Task]:
    """All models by name."""
    index = torch.arange(5)
    coupled = 0.42 ** ((index[:, None] - index).abs() + 1.0)
    plain = LinearGaussian(torch.tensor([[0.95]]), 0.6, 0.2).simulated(50, 0)
    return {
        "linear-Gaussian, 1-D, T=50": observed(plain, 1000),
        "linear-Gaussian, 5-D, T=30": observed(
            LinearGaussian(coupled, 1.0, 0.5).simulated(30, 0), 1600
        ),
        "stochastic volatility, T=100": observed(StochasticVolatility().simulated(100, 0), 1000),
        "nonlinear growth, T=50": observed(Growth().simulated(50, 3), 1000),
        "harmonic oscillator, 2-D, T=50": oscillator(50, 0),
        "SIR epidemic, population 30, T=15": outbreak(30, 15, 1000, 10, exact=True),
        "SIR epidemic, population 1000, T=30": outbreak(1000, 30, 1000, 200, exact=False),
    }


def arms(task: Task, slow: bool) -> dict[str, tuple[Estimate, int]]:
    """By name an estimate of the log-likelihood from a seed, and the particles it takes."""
    model, part, args = task.model, task.budget // 4, task.args

    def one_run(guide: Any, size: int) -> Estimate:
        def estimate(seed: int) -> Tensor:
            try:
                return TwistedSMC(model, guide, size, seed=seed).run(*args).log_normalizer
            except SMCFailed:
                return torch.tensor(-math.inf, dtype=torch.float64)

        return estimate

    def pooled(seed: int) -> Tensor:
        runs = [one_run(None, part)(4 * seed + k) for k in range(4)]
        return torch.stack(runs).logsumexp(0) - math.log(4)

    def learned(family: Callable[[Any], Any], **options: Any) -> TrustRegionTwist:
        return TrustRegionTwist(model, family(model), part, **{**task.options, **options})

    @cache
    def passes(seed: int) -> tuple[Tensor, Tensor]:
        sampler = learned(task.twist, seed=seed)
        return sampler.run(*args).log_normalizer, sampler.last.log_normalizer

    def last(family: Callable[[Any], Any], **options: Any) -> Estimate:
        def estimate(seed: int) -> Tensor:
            sampler = learned(family, seed=seed, **options).fit(3, *args)
            return sampler.sample(*args).log_normalizer

        return estimate

    found: dict[str, tuple[Estimate, int]] = {
        "bootstrap, one run": (one_run(None, task.budget), task.budget),
        "bootstrap, 4 runs pooled": (pooled, task.budget),
    }
    for name, guide in task.guides.items():
        found[name] = (one_run(guide(model), task.budget), task.budget)
    found[POOLED] = (lambda seed: passes(seed)[0], task.budget)
    found[LAST] = (lambda seed: passes(seed)[1], task.budget)
    for name, family in task.families.items():
        found[name] = (last(family), task.budget)
    if slow:
        found["the same, QuadraticTwist"] = (last(QuadraticTwist, guard=False), task.budget)
    twist = learned(task.twist, seed=10_000).fit(3, *args).guide
    found["bootstrap, a quarter"] = (one_run(None, part), part)
    found["fitted twist reused, a quarter"] = (one_run(twist, part), part)
    return found


def summary(values: Tensor, reference: float) -> dict[str, Any]:
    """Bias and standard deviation of estimates above zero, 95 % intervals under normality."""
    from scipy import stats

    failed = int((values == -math.inf).sum())
    values = values[values > -math.inf].double()
    n = len(values)
    sd, bias = float(values.std()), float(values.mean()) - reference
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    low, high = (sd * math.sqrt((n - 1) / stats.chi2.ppf(p, n - 1)) for p in (0.975, 0.025))
    return {"bias": bias, "bias_interval": [bias - half, bias + half], "sd": sd,
            "sd_interval": [low, high], "failed": failed}  # fmt: skip


def measured(task: Task, seeds: int, slow: bool) -> dict[str, Any]:
    """All arms of one model."""
    long = checks(task)
    reference = long["twist, 5,000"][0] if task.reference is None else task.reference()
    rows = {}
    for name, (estimate, size) in arms(task, slow).items():
        start = time.perf_counter()
        values = torch.stack([estimate(seed) for seed in range(seeds)])
        seconds = (time.perf_counter() - start) / seeds
        steps = size * (len(task.model.timesteps) + 1)
        rows[name] = {
            **summary(values, reference),
            "particle_steps": steps,
            "seconds": seconds,
        }
    rows[LAST]["seconds"] = rows[POOLED]["seconds"]
    exact = task.reference is not None
    return {"reference": reference, "exact": exact, "checks": long, "arms": rows}


def checks(task: Task) -> dict[str, list[float]]:
    """Long runs that the reference should agree with: mean and standard error."""
    twist, options = task.twist(task.model), dict(task.options)
    TrustRegionTwist(task.model, twist, 1000, seed=20_000, **options).fit(4, *task.args)
    long = {"bootstrap, 50,000 particles": (None, 50_000), "twist, 5,000": (twist, 5_000)}
    found = {}
    for name, (guide, size) in long.items():
        runs = [TwistedSMC(task.model, guide, size, seed=s).run(*task.args) for s in range(4)]
        values = torch.stack([run.log_normalizer for run in runs])
        found[name] = [float(values.mean()), float(values.std()) / 2]
    return found


def show(title: str, found: dict[str, Any]) -> None:
    """Prints a model's results as a Markdown table."""
    known = "log-likelihood" if found["exact"] else "log-likelihood of the second of the long runs"
    print(f"\n### {title}\n\n{known} {found['reference']:.3f}; long runs: ", end="")
    print("; ".join(f"{k} {m:.3f} (± {e:.3f})" for k, (m, e) in found["checks"].items()))
    print("\n| | particle-steps | bias | sd | seconds |\n| --- | ---: | --- | --- | ---: |")
    for name, row in found["arms"].items():
        bias, (low, high) = row["bias"], row["bias_interval"]
        name += f" ({row['failed']} runs failed)" if row["failed"] else ""
        spread = f"{row['sd']:.2g} ({row['sd_interval'][0]:.2g} to {row['sd_interval'][1]:.2g})"
        print(
            f"| {name} | {row['particle_steps']:,} | {bias:+.2g} ({low:+.2g} to {high:+.2g}) "
            f"| {spread} | {row['seconds']:.2f} |"
        )


def main() -> None:
    """Runs all models, prints tables, and writes JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/statespace.json"))
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--only", default="", help="models whose title has these words in it")
    parser.add_argument(
        "--slow",
        action="store_true",
        help="also QuadraticTwist, fitted by L-BFGS, on the first model",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    results: dict[str, Any] = {"machine": machine(), "seeds": options.seeds, "models": {}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for title, task in tasks().items():
        if options.only not in title:
            continue
        found = measured(task, options.seeds, options.slow and "linear-Gaussian, 1-D" in title)
        results["models"][title] = found
        show(title, found)
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
