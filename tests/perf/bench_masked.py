# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
What masked diffusion with a large vocabulary costs beyond the network, in memory and time.

The network is a stub that returns random hidden states, since its own cost is not the question;
the output layer is a real one, of the model's size, and counts as part of the model. Every case
runs in a process of its own, and its peak is that of the resident memory above what the process
had with the output layer loaded; Linux. Run ``make bench``, or
``python -m tests.perf.bench_masked --out results/bench_masked.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_twist.diffusion import MaskedDiffusion
from pyro_twist.infer import TwistedSMC
from pyro_twist.twists import Twist, tilt
from tests.perf.bench_engine import high_water
from tests.perf.timing import machine

#: Vocabulary, length, particles and width of the case that counts: GPT-2's tokenizer.
LARGE = (50_257, 128, 64, 768)
STEPS = 50


class Hidden:
    """A network that returns random hidden states, a function of nothing but the generator."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.randn(*tokens.shape, self.width)


class Tilted(Twist):
    """A tilt by one number for each token."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.eta = torch.randn(model.vocab_size)

    def get_posterior(self, name: str, prior: Any) -> Any:
        return tilt(prior, self.eta) if self.stepping else prior


class Looking(Tilted):
    """The same, and a completion of every particle after every step, as a look-ahead needs it."""

    def log_twist(self, state: Any, *args: Any, **kwargs: Any) -> Tensor:
        uniforms = torch.rand(state["x"].shape, dtype=torch.float64)
        return self.model.complete(state, uniforms).double().mean(-1)


GUIDES: dict[str, Callable[[Any], Any]] = {
    "no twist": lambda model: None,
    "token tilt": Tilted,
    "token tilt, a completion": Looking,
}


class Head:
    """An output layer that counts the positions it is applied to."""

    def __init__(self, vocabulary: int, width: int) -> None:
        self.layer = torch.nn.Linear(width, vocabulary).requires_grad_(False)
        self.num_rows = 0

    def __call__(self, hidden: Tensor) -> Tensor:
        self.num_rows += len(hidden)
        logits: Tensor = self.layer(hidden)
        return logits

    def seconds(self, rows: int) -> float:
        """How long it takes for so many positions, a chunk at a time; from some hundreds."""
        hidden = torch.randn(min(rows, 400), self.layer.in_features)
        start = time.perf_counter()
        for part in hidden.split(2**21 // self.layer.out_features):
            self.layer(part)
        return (time.perf_counter() - start) * rows / len(hidden)


def run_case(name: str, vocabulary: int, length: int, particles: int, width: int) -> None:
    """Prints the figures of a case in this process."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    head = Head(vocabulary, width)
    # a small run loads what is loaded once
    measure(MaskedDiffusion(Hidden(width), 4, vocabulary, 0, head=head), name, 2, 3)
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    model = MaskedDiffusion(
        Hidden(width), length, vocabulary, 0, head=head, num_inference_steps=STEPS
    )
    figures = measure(model, name, particles, 3)
    figures["peak_mib"] = round(high_water() - before, 1)
    figures["head_ms"] = round(1e3 * head.seconds(figures["rows_per_step"]), 1)
    print(json.dumps(figures))


def measure(model: MaskedDiffusion, name: str, particles: int, steps: int) -> dict[str, Any]:
    """The state and the time of a step, resampling at each; few steps, since all cost the same."""
    smc = TwistedSMC(model, GUIDES[name](model), particles, ess_threshold=1.0, history="off")
    smc.init()
    before = model.head.num_rows
    start = time.perf_counter()
    for t in model.timesteps[:steps]:
        smc.step(t)
    seconds = time.perf_counter() - start
    state = sum(value.nbytes for value in smc.state.values()) / 2**20
    return {
        "ms_per_step": round(1e3 * seconds / steps, 1),
        "state_mib": round(state, 1),
        "rows_per_step": (model.head.num_rows - before) // steps,
    }


def case(name: str, size: tuple[int, int, int, int]) -> dict[str, Any]:
    """A case in a process of its own."""
    code = f"from tests.perf.bench_masked import *; run_case({name!r}, *{size})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    keys = ("vocabulary", "length", "particles", "width")
    return {"case": name, **dict(zip(keys, size)), **json.loads(done.stdout)}


def dense_mib(size: tuple[int, int, int, int]) -> float:
    """What float32 logits of all positions would take."""
    vocabulary, length, particles, _ = size
    return round(4 * vocabulary * length * particles / 2**20, 1)


def main() -> None:
    """Runs all cases, prints them as a table, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench_masked.json"))
    options = parser.parse_args()
    sizes = [(12_000, 32, 64, 384), LARGE]
    print(
        f"{'':26} {'V':>7} {'L':>4} {'N':>4} {'H':>4} {'state':>9} {'peak':>9} "
        f"{'a step':>10} {'its head':>10}"
    )
    rows = []
    for size in sizes:
        for name in GUIDES:
            row = case(name, size)
            rows.append(row)
            v, length, n, h = size
            print(
                f"{name:26} {v:7,} {length:4} {n:4} {h:4} {row['state_mib']:5.1f} MiB "
                f"{row['peak_mib']:5.1f} MiB {row['ms_per_step']:7.0f} ms {row['head_ms']:7.0f} ms"
            )
    print(f"float32 logits of all positions in the largest case: {dense_mib(LARGE):,} MiB")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), "cases": rows, "dense_mib": dense_mib(LARGE)}
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
