# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Log-likelihoods of state-space models: bootstrap filter against learned twists, at equal cost.

Run ``python -m tests.perf.statespace --out docs/_static/benchmarks/statespace.json``. Cost is the
number of particles times steps, with the passes that are fitted counted. References are exact: the
Kalman filter, and for one-dimensional nonlinear models a filter on a grid.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_twist.infer import TrustRegionTwist, TwistedSMC, pool
from pyro_twist.infer.trustregiontwist import default_twist
from pyro_twist.twists import QuadraticTwist, ShiftTwist
from tests.perf.timing import machine

Estimate = Callable[[int], Tensor]


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
        """By the Kalman filter, in float64."""
        size = len(self.matrix)
        mean, covariance = torch.zeros(size).double(), self.start**2 * torch.eye(size).double()
        matrix, eye, total = self.matrix.double(), torch.eye(size).double(), 0.0
        for y in self.data.double():
            mean = matrix @ mean
            covariance = matrix @ covariance @ matrix.T + self.noise**2 * eye
            spread = covariance + self.error**2 * eye
            total += float(torch.distributions.MultivariateNormal(mean, spread).log_prob(y))
            gain = torch.linalg.solve(spread, covariance).T
            mean, covariance = mean + gain @ (y - mean), covariance - gain @ covariance
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


def models() -> dict[str, tuple[Any, int]]:
    """By name the model with its data, and the budget: particles in all passes together."""
    index = torch.arange(5)
    coupled = 0.42 ** ((index[:, None] - index).abs() + 1.0)
    return {
        "linear-Gaussian, 1-D, T=50": (
            LinearGaussian(torch.tensor([[0.95]]), 0.6, 0.2).simulated(50, 0),
            1000,
        ),
        "linear-Gaussian, 5-D, T=30": (LinearGaussian(coupled, 1.0, 0.5).simulated(30, 0), 1600),
        "stochastic volatility, T=100": (StochasticVolatility().simulated(100, 0), 1000),
        "nonlinear growth, T=50": (Growth().simulated(50, 3), 1000),
    }


def arms(model: Any, budget: int, slow: bool) -> dict[str, tuple[Estimate, int]]:
    """By name an estimate of the log-likelihood from a seed, and the particles it takes."""
    part = budget // 4

    def bootstrap(size: int) -> Estimate:
        return lambda seed: TwistedSMC(model, None, size, seed=seed).run().log_normalizer

    def pooled(seed: int) -> Tensor:
        runs = [TwistedSMC(model, None, part, seed=4 * seed + k).run() for k in range(4)]
        return pool(runs).log_normalizer

    def learned(family: Callable[[Any], Any], **options: Any) -> TrustRegionTwist:
        return TrustRegionTwist(model, family(model), part, **options)

    def whole(family: Callable[[Any], Any], **options: Any) -> Estimate:
        return lambda seed: learned(family, seed=seed, **options).run().log_normalizer

    def last(family: Callable[[Any], Any], **options: Any) -> Estimate:
        return lambda seed: learned(family, seed=seed, **options).fit(3).sample().log_normalizer

    found: dict[str, tuple[Estimate, int]] = {
        "bootstrap, one run": (bootstrap(budget), budget),
        "bootstrap, 4 runs pooled": (pooled, budget),
        "TRI-TSMC, 4 passes pooled": (whole(default_twist), budget),
        "TRI-TSMC, the 4th pass alone": (last(default_twist), budget),
        "the same, ShiftTwist": (last(ShiftTwist), budget),
    }
    if slow:
        found["the same, QuadraticTwist"] = (last(QuadraticTwist, guard=False), budget)
    twist = learned(default_twist, seed=10_000).fit(3).guide
    reused = lambda seed: TwistedSMC(model, twist, part, seed=seed).run().log_normalizer  # noqa: E731
    found["bootstrap, a quarter"] = (bootstrap(part), part)
    found["fitted twist reused, a quarter"] = (reused, part)
    return found


def summary(values: Tensor, reference: float) -> dict[str, Any]:
    """Bias and standard deviation of estimates, with 95 % intervals under normality."""
    from scipy import stats

    n, values = len(values), values.double()
    sd, bias = float(values.std()), float(values.mean()) - reference
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    low, high = (sd * math.sqrt((n - 1) / stats.chi2.ppf(p, n - 1)) for p in (0.975, 0.025))
    return {"bias": bias, "bias_interval": [bias - half, bias + half], "sd": sd,
            "sd_interval": [low, high]}  # fmt: skip


def measured(model: Any, budget: int, seeds: int, slow: bool) -> dict[str, Any]:
    """All arms of one model."""
    reference = model.log_likelihood()
    rows = {}
    for name, (estimate, size) in arms(model, budget, slow).items():
        start = time.perf_counter()
        values = torch.stack([estimate(seed) for seed in range(seeds)])
        seconds = (time.perf_counter() - start) / seeds
        steps = size * (len(model.data) + 1)
        rows[name] = {
            **summary(values, reference),
            "particle_steps": steps,
            "seconds": seconds,
            "mean_squared_error": float((values - reference).square().mean()),
        }
    return {"reference": reference, "checks": checks(model), "arms": rows}


def checks(model: Any) -> dict[str, list[float]]:
    """Long runs that the reference should agree with: mean and standard error."""
    twist = TrustRegionTwist(model, default_twist(model), 1000, seed=20_000).fit(4).guide
    long = {"bootstrap, 50,000 particles": (None, 50_000), "twist, 5,000": (twist, 5_000)}
    found = {}
    for name, (guide, size) in long.items():
        runs = [TwistedSMC(model, guide, size, seed=s).run() for s in range(4)]
        values = torch.stack([run.log_normalizer for run in runs])
        found[name] = [float(values.mean()), float(values.std()) / 2]
    return found


def show(title: str, found: dict[str, Any]) -> None:
    """Prints a model's results as a Markdown table."""
    print(f"\n### {title}\n\nlog-likelihood {found['reference']:.3f}; long runs: ", end="")
    print("; ".join(f"{k} {m:.3f} (± {e:.3f})" for k, (m, e) in found["checks"].items()))
    print("\n| | particle-steps | bias | sd | seconds |\n| --- | ---: | --- | --- | ---: |")
    for name, row in found["arms"].items():
        bias, (low, high) = row["bias"], row["bias_interval"]
        spread = f"{row['sd']:.2g} ({row['sd_interval'][0]:.2g} to {row['sd_interval'][1]:.2g})"
        print(
            f"| {name} | {row['particle_steps']:,} | {bias:+.2g} ({low:+.2g} to {high:+.2g}) "
            f"| {spread} | {row['seconds']:.2f} |"
        )


def main() -> None:
    """Runs all models, prints tables, and writes JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/statespace.json"))
    parser.add_argument("--seeds", type=int, default=40)
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
    for title, (model, budget) in models().items():
        found = measured(
            model, budget, options.seeds, options.slow and "linear-Gaussian, 1-D" in title
        )
        results["models"][title] = found
        show(title, found)
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
