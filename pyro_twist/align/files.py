# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The files of a job that hold numbers: samples as ``.npz`` and everything else as JSON."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyro_twist.align.folder import write_whole
from pyro_twist.align.learned import save_twist
from pyro_twist.align.methods import find_methods
from pyro_twist.align.options import AlignOptions, word
from pyro_twist.align.outcome import Arm, Outcome, versions
from pyro_twist.align.userrewards import code_of

__all__ = ["options_as_dict", "save_arm", "save_results"]


def save_arm(arm: Arm, outcome: Outcome) -> Path:
    """
    Writes the samples of a method, their rewards and weights, to ``samples/<method>.npz``, and the
    twist that it has learned, if it has.

    Arrays are ``samples``, ``log_weights`` and ``weights`` and, for each reward, ``reward:<name>``,
    all of shape ``(num_particles, num_populations)`` with the sample's shape behind; ``about`` is
    JSON.

    Samples that are strings are also in ``samples/<method>.csv``, a line each, with what is known
    of them.

    A maximiser's particles are all there too, best first; the best has weight one.

    :returns: The file of the samples.
    """
    save_twist(arm, outcome)
    folder = outcome.options.out / "samples"
    folder.mkdir(exist_ok=True)
    about = {
        "method": arm.method.name,
        "returns": arm.method.returns,
        "classes": outcome.labels,
        "scales": {strength.name: strength.scale for strength in outcome.strengths},
        "command": outcome.command,
    }
    path = folder / f"{arm.method.name}.npz"
    tensors = {"samples": outcome.domain.numbers(arm.samples), "weights": arm.weights}
    tensors["log_weights"] = arm.log_weights
    tensors |= {f"reward:{name}": values for name, values in arm.rewards.items()}
    arrays: dict[str, Any] = {
        name: value.cpu().numpy() if isinstance(value, Tensor) else value
        for name, value in tensors.items()
    }
    _save_table(arm, outcome, path.with_suffix(".csv"))
    for p, label in enumerate(outcome.labels):
        place = folder / arm.method.name / _file_name(label)
        outcome.domain.write(place, arm.samples[:, p], _told_of(arm, outcome, p))
    np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)
    return path


def _file_name(label: str) -> str:
    """A folder for each class; none where no class was asked for."""
    return re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")


def _told_of(arm: Arm, outcome: Outcome, p: int) -> list[dict[str, str]]:
    """What a file of its own says of each sample: how it was made, and what it is worth."""
    lambdas = {f"lambda:{strength.name}": f"{strength.scale:g}" for strength in outcome.strengths}
    run = {
        "Software": f"pyro_twist {versions()['pyro_twist']}",
        "model": outcome.domain.name,
        **dict(outcome.facts),
        "method": arm.method.name,
        "returns": arm.method.returns,
        "seed": str(outcome.options.seed),
        "steps": str(outcome.num_steps),
        "particles": str(outcome.options.particles),
        **lambdas,
        "command": outcome.command,
    }
    rewards = {f"reward:{name}": values[:, p].tolist() for name, values in arm.rewards.items()}
    weights = arm.weights[:, p].tolist()
    return [
        {
            **run,
            "particle": str(place),
            "weight": f"{weight:.6g}",
            **{name: f"{values[place]:.6g}" for name, values in rewards.items()},
        }
        for place, weight in enumerate(weights)
    ]


def _save_table(arm: Arm, outcome: Outcome, path: Path) -> None:
    """Writes a line for each sample, if the domain has a table of them."""
    columns: dict[str, list[Any]] = {}
    for p, label in enumerate(outcome.labels):
        properties = outcome.domain.properties(arm.samples[:, p])
        if not properties:
            return
        known: dict[str, Any] = {"class": [label] * len(arm.weights)} if label else {}
        rewards = {f"reward:{n}": v[:, p].tolist() for n, v in arm.rewards.items()}
        known |= {**properties, **rewards, "weight": arm.weights[:, p].tolist()}
        for name, values in known.items():
            columns.setdefault(name, []).extend(values)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def save_results(outcome: Outcome) -> Path:
    """
    Writes ``results.json``: options, strengths, and every figure of every method.

    :returns: The file.
    """
    path = outcome.options.out / "results.json"
    text = json.dumps(_finite(_as_dict(outcome)), indent=2, ensure_ascii=False, allow_nan=False)
    return write_whole(path, text + "\n")


def options_as_dict(options: AlignOptions) -> dict[str, Any]:
    """
    The options as ``results.json`` has them.

    :param AlignOptions options: The options.
    """
    # not asdict, which copies the networks of rewards
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    for name in ("classes", "strengths", "scales"):
        given[name] = list(given[name])
    given["rewards"] = [word(reward) for reward in options.rewards]
    given["methods"] = [method.name for method in find_methods(options.methods)]
    return {**given, "out": str(options.out)}


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    return {
        "command": outcome.command,
        "started": outcome.started,
        "seconds": round(outcome.seconds, 3),
        "finished": outcome.finished,
        "error": outcome.error or None,
        "options": options_as_dict(outcome.options),
        "reward_code": code_of(outcome.options.rewards),
        "model": {"name": outcome.domain.name, "description": outcome.domain.description},
        "classes": [label for label in outcome.labels if label],
        "steps": outcome.num_steps,
        "facts": dict(outcome.facts),
        "rewards": [asdict(strength) for strength in outcome.strengths],
        "calibration_calls": dict(outcome.calibration),
        "methods": [_arm_as_dict(arm, outcome) for arm in outcome.arms],
        "failed": outcome.failures,
        "versions": versions(outcome.domain.packages),
    }


def _arm_as_dict(arm: Arm, outcome: Outcome) -> dict[str, Any]:
    scores = [
        {**asdict(score), "relative_diversity": outcome.relative_diversity(arm, place)}
        for place, score in enumerate(arm.scores)
    ]
    return {
        "name": arm.method.name,
        "title": arm.method.title,
        "returns": arm.method.returns,
        "calls": dict(arm.counts),
        "seconds": round(arm.seconds, 3),
        "scores": scores,
        "iterations": [asdict(one) for one in arm.iterations],
        "steps": _steps(arm),
    }


def _steps(arm: Arm) -> dict[str, Any] | None:
    diagnostics = arm.last.diagnostics
    if diagnostics is None or not arm.method.tilted or arm.method.returns == "a maximiser":
        return None
    series = {
        "ess": diagnostics.ess,
        "log_normalizer": diagnostics.log_normalizer,
        "increments": diagnostics.increments,
    }
    steps: dict[str, Any] = {name: value.tolist() for name, value in series.items()}
    return {**steps, "resampled": diagnostics.resampled.tolist()}


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN; the first become strings, the last ``null``."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
