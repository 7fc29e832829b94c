# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Paired timing: variants take turns, so that a drifting machine does not favour one of them."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["machine", "paired"]


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def paired(
    variants: Mapping[str, Callable[[], int]], *, rounds: int = 9, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """
    Times variants in turns.

    :param dict variants: By name, functions that run something and return how many steps it had.
        The first is the baseline.
    :param int rounds: How many turns count.
    :param int warmup: How many turns go before.
    :returns: For each name the median milliseconds per step, and median, minimum and maximum over
        the rounds of the ratio to the baseline of the same round.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            steps = run()
            elapsed = 1e3 * (time.perf_counter() - start) / steps
            if turn >= warmup:
                times[name].append(elapsed)
    baseline = next(iter(times.values()))
    return {name: _summary(values, baseline) for name, values in times.items()}


def _summary(values: list[float], baseline: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(values, baseline, strict=True)]
    return {
        "ms_per_step": round(statistics.median(values), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
    }
