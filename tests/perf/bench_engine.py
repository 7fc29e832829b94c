# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
What the engine costs beyond the network it drives, against Pyro's ``SMCFilter``, and in memory.

Run ``make bench``, or ``python -m tests.perf.bench_engine --out results/bench.json``. Figures of
``particles`` (PyPI) are added where it is installed:
``pip install --no-deps particles==0.4 && pip install numba joblib``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SMCFilter

from pyro_twist.infer import TwistedSMC
from pyro_twist.twists import Twist, tilt
from tests.perf.timing import machine, paired

OBSERVATION = torch.tensor(0.3)


class Chain:
    """A linear-Gaussian state-space model without a known end."""

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return 0.9 * x

    def init(self, state: Any) -> None:
        state["x"] = pyro.sample("x", dist.Normal(0.0, 1.0))

    def step(self, state: Any) -> None:
        state["x"] = pyro.sample("x", dist.Normal(self.mean(state["x"]), 0.5))
        pyro.sample("y", dist.Normal(state["x"], 1.0), obs=OBSERVATION)


class CostlyChain(Chain):
    """The same with a mean that takes a small network."""

    def __init__(self) -> None:
        self.network = torch.nn.Sequential(
            torch.nn.Linear(1, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1)
        )

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return 0.9 * x + 0.01 * self.network(x[:, None])[:, 0]


class Guide:
    """The model's kernel, shifted, as an explicit guide."""

    def __init__(self, model: Chain) -> None:
        self.model = model

    def init(self, state: Any) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    def step(self, state: Any) -> None:
        pyro.sample("x", dist.Normal(self.model.mean(state["x"]) + 0.05, 0.5))


class Shift(Twist):
    """The same shift as an effect-based guide."""

    def get_posterior(self, name: str, prior: Any) -> Any:
        return tilt(prior, torch.tensor(0.2))


def stepping(make: Callable[[], Any], steps: int) -> Callable[[], int]:
    """A function that runs a fresh filter for so many steps."""

    def run() -> int:
        smc = make()
        smc.init()
        for _ in range(steps):
            smc.step()
        return steps

    return run


class SafeSMCFilter(SMCFilter):
    """Pyro's filter; a run in which its float32 index overflows is taken up again."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().step(*args, **kwargs)
        except IndexError:
            self.state._log_weights.fill_(0.0)


def engine(size: int, rounds: int) -> dict[str, Any]:
    """Cost per step of stock filter, ours with the same guide, and ours without one."""
    chain, steps = Chain(), 50
    options: dict[str, Any] = {"history": "off"}
    return paired(
        {
            "SMCFilter": stepping(lambda: SafeSMCFilter(chain, Guide(chain), size, 0), steps),
            "TwistedSMC, same guide": stepping(
                lambda: TwistedSMC(chain, Guide(chain), size, 0, **options), steps
            ),
            "TwistedSMC, effect-based": stepping(
                lambda: TwistedSMC(chain, Shift(chain), size, 0, **options), steps
            ),
            "TwistedSMC, no guide": stepping(
                lambda: TwistedSMC(chain, None, size, 0, **options), steps
            ),
            **particles_variant(size, steps),
        },
        rounds=rounds,
    )


def particles_variant(size: int, steps: int) -> dict[str, Callable[[], int]]:
    """The bootstrap filter of PyPI's ``particles``, where installed."""
    try:
        import particles
        from particles import distributions, state_space_models
    except ImportError:
        return {}

    class Model(state_space_models.StateSpaceModel):  # type: ignore[misc]
        def PX0(self) -> Any:
            return distributions.Normal()

        def PX(self, t: int, xp: Any) -> Any:
            return distributions.Normal(loc=0.9 * xp, scale=0.5)

        def PY(self, t: int, xp: Any, x: Any) -> Any:
            return distributions.Normal(loc=x)

    def run() -> int:
        model = state_space_models.Bootstrap(ssm=Model(), data=[0.3] * steps)
        particles.SMC(fk=model, N=size, ESSrmin=0.5).run()
        return steps

    return {"particles, bootstrap": run}


def costly(size: int, rounds: int) -> dict[str, Any]:
    """A costly kernel mean: an explicit guide pays for it twice."""
    chain = CostlyChain()
    return paired(
        {
            "SMCFilter": stepping(lambda: SafeSMCFilter(chain, Guide(chain), size, 0), 20),
            "TwistedSMC, effect-based": stepping(
                lambda: TwistedSMC(chain, Shift(chain), size, 0), 20
            ),
        },
        rounds=rounds,
    )


def image(particles: int, steps: int, rounds: int) -> dict[str, Any]:
    """A bare torch loop over the emoji network, and ``TwistedSMC`` over the same."""
    from pyro_twist import zoo

    model = zoo.load("emoji", num_inference_steps=steps)
    network = model.denoiser.network

    def bare() -> int:
        x = torch.randn(particles, *model.event_shape)
        labels = torch.full((particles,), 8)
        with torch.no_grad():
            for t in model.timesteps:
                output = network(x, model.schedule[t].timestep, class_labels=labels).sample
                step = model.schedule[t]
                x0 = (step.alpha * x - step.sigma * output).clamp(-1, 1)
                x = step.x0_coef * x0 + step.x_coef * x + step.std * torch.randn_like(x)
        return steps

    def smc() -> int:
        TwistedSMC(model, None, particles).run()
        return steps

    return paired({"bare loop": bare, "TwistedSMC": smc}, rounds=rounds)


def peak_memory(size: int, steps: int, history: str) -> float:
    """Peak resident MiB of a run in a process of its own, beyond what it had before; Linux."""
    code = f"from tests.perf.bench_engine import *; print_peak({size}, {steps}, {history!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(size: int, steps: int, history: Any) -> None:
    """Prints the peak of :func:`peak_memory` for this process."""
    torch.set_num_threads(1)
    chain = Chain()
    stepping(lambda: TwistedSMC(chain, None, 10, 0), 2)()
    # writing 5 sets the high-water mark back to the present size
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    stepping(lambda: TwistedSMC(chain, None, size, 0, history=history), steps)()
    print(high_water() - before)


def high_water() -> float:
    """The high-water mark of the resident memory of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def memory() -> list[dict[str, Any]]:
    """Peak memory against particles and steps."""
    cases = [
        (size, steps, history)
        for history in ("off", "ancestors", "paths")
        for size, steps in ((10_000, 50), (100_000, 50), (100_000, 500))
    ]
    return [
        {"particles": n, "steps": t, "history": h, "peak_mib": round(peak_memory(n, t, h), 1)}
        for n, t, h in cases
    ]


def main() -> None:
    """Runs all benchmarks, prints them, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    rounds = options.rounds
    results: dict[str, Any] = {"machine": machine()}
    sections: dict[str, Callable[[], Any]] = {
        "emoji network, 16 particles, 20 steps": lambda: image(16, 20, rounds),
        "linear-Gaussian chain, 1,000 particles": lambda: engine(1_000, rounds),
        "linear-Gaussian chain, 100,000 particles": lambda: engine(100_000, rounds),
        "costly mean, 1,000 particles": lambda: costly(1_000, rounds),
        "peak memory": memory,
    }
    for title, run in sections.items():
        results[title] = run()
        print(f"\n{title}")
        show(results[title])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwritten to {options.out}")


def show(section: Any) -> None:
    """Prints a section as a table."""
    if isinstance(section, list):
        for row in section:
            print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
        return
    for name, row in section.items():
        spread = f"{row['ratio_min']:.3f} to {row['ratio_max']:.3f}"
        print(f"  {name:28} {row['ms_per_step']:9.3f} ms  x {row['ratio']:.3f} ({spread})")


if __name__ == "__main__":
    main()
