# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""``pyro-twist compare``: the table of a comparison, and the files that it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from pyro_twist.algorithms import Comparison, compare, find_algorithm
from pyro_twist.align import AlignOptions, OptionError
from pyro_twist.align.job import tilted_model
from pyro_twist.cli.aligning import print_table
from pyro_twist.cli.app import INTERRUPTED, WRONG_OPTION, complain

__all__ = ["compare_command"]

_SHORT = {
    "samples of the model": "model",
    "samples of the tilted law": "tilted law",
    "samples of nearly the tilted law": "nearly that",
    "samples of another law": "another law",
    "a maximiser": "maximiser",
}


def compare_command(
    model: str, given: dict[str, Any], methods: tuple[str, ...], budget: int, seeds: int
) -> int:
    """
    Runs the comparison and prints what it found.

    :param str model: The model.
    :param dict given: Fields of :class:`~pyro_twist.align.AlignOptions`.
    :param tuple methods: Names of algorithms; none for all that fit.
    :param int budget: The number of trajectories.
    :param int seeds: The number of seeds.
    :returns: The exit code.
    """
    try:
        for name in methods:
            find_algorithm(name)
        if budget < 1 or seeds < 1:
            raise OptionError(f"--budget {budget} --seeds {seeds}: give numbers of at least 1")
        options = AlignOptions(model=model, **given)
        tilted = tilted_model(options)
        rows = _rows_file(options, tilted.scales, budget)
        numbers = {"budget": budget, "seeds": seeds, **_populations(tilted)}
        found = compare(tilted, methods or None, path=rows, **numbers)
    except (OptionError, ValueError) as error:
        complain(str(error))
        return WRONG_OPTION
    except KeyboardInterrupt:
        complain("interrupted; finished runs are kept, and the same command goes on from there")
        return INTERRUPTED
    _print(found, tilted.scales)
    _write(found, options.out)
    return 0


def _populations(tilted: Any) -> dict[str, Any]:
    """Several classes are populations of their own, over which figures are averaged."""
    if tilted.plate is None:
        return {}
    return {"max_plate_nesting": 1, "population_plate": tilted.plate[0]}


def _rows_file(options: AlignOptions, scales: dict[str, float], budget: int) -> Path:
    """The file of rows; one of another model, reward, lambda or budget is refused."""
    told = {
        "model": options.model,
        "rewards": list(options.rewards),
        "classes": list(options.classes),
        "lambda": dict(scales),
        **({} if options.prompt is None else {"prompt": options.prompt}),
        "steps": options.steps,
        "budget": budget,
    }
    note = options.out / "comparison.json"
    rows = options.out / "rows.jsonl"
    # without a finished run there is nothing that could be lost
    if rows.exists() and json.loads(note.read_text(encoding="utf-8")) != told:
        raise OptionError(f"{options.out} has another comparison; give another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return rows


def _print(found: Comparison, scales: dict[str, float]) -> None:
    console = Console(highlight=False)
    lambdas = ", ".join(f"{name} {scale:g}" for name, scale in scales.items())
    console.print(f"lambda: {lambdas}; rewards are times lambda, in nats", style="dim")
    headings = ["returns", "log Z", "reward", "best", "ESS", "denoiser calls", "reward calls", "s"]
    print_table(console, "", headings, [_cells(found, name) for name in found.names])


def _cells(found: Comparison, name: str) -> list[str]:
    estimates = [found.estimate(name, f) for f in ("log_normalizer", "objective", "best", "ess")]
    counts = [f"{found.estimate(name, kind).mean:,.0f}" for kind in ("denoiser", "reward")]
    seconds = f"{found.estimate(name, 'seconds').mean:.1f}"
    return [name, _SHORT[found.returns(name)], *map(str, estimates), *counts, seconds]


def _write(found: Comparison, folder: Path) -> None:
    (folder / "table.md").write_text(found.table() + "\n", encoding="utf-8")
    try:
        found.plot().savefig(folder / "comparison.png", dpi=150)
        print(f"The table and the plot are in {folder}")
    except ImportError as error:
        print(f"The table is in {folder}; {error}")
