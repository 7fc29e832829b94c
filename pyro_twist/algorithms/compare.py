# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Several algorithms on one model, at one budget, over seeds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_twist.algorithms.registry import (
    Algorithm,
    Setting,
    algorithms,
    find_algorithm,
    nearest,
)
from pyro_twist.algorithms.scored import Scored
from pyro_twist.infer import SMCFailed, SMCResult
from pyro_twist.infer.randomness import RandomStream
from pyro_twist.potential import log_potential, plate_of, rewards_of
from pyro_twist.twists.lookahead import check_tilted
from pyro_twist.weights import weighted_mean
from pyro_twist.wrapper import ModelWrapper

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["FIGURES", "Comparison", "Estimate", "compare"]

#: What is measured of a run, and how it is written above a column.
FIGURES = {
    "log_normalizer": "log Z",
    "objective": "E[reward]",
    "best": "best",
    "ess": "ESS",
    "denoiser": "denoiser calls",
    "reward": "reward calls",
    "seconds": "seconds",
}
Row = dict[str, Any]
Measure = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Estimate:
    """
    A mean over seeds.

    :param float mean: The mean; NaN if no run has the figure.
    :param float error: Half the width of its 95 % interval by Student's t; NaN for one run.
    :param float sd: The standard deviation over seeds; NaN for one run.
    :param int size: The number of runs.
    """

    mean: float
    error: float
    sd: float
    size: int

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """The estimate from the runs that have a finite value."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return Estimate(math.nan, math.nan, math.nan, 0)
        mean = sum(finite) / len(finite)
        if len(finite) == 1:
            return Estimate(mean, math.nan, math.nan, 1)
        sd = math.sqrt(sum((v - mean) ** 2 for v in finite) / (len(finite) - 1))
        from scipy.stats import t

        error = float(t.ppf(0.975, len(finite) - 1)) * sd / math.sqrt(len(finite))
        return Estimate(mean, error, sd, len(finite))

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–"
        error = "" if math.isnan(self.error) else f" ± {self.error:.2f}"
        return f"{self.mean:.2f}{error}"


@dataclass(frozen=True)
class Comparison:
    """
    What several algorithms found on one model.

    :param list rows: For each run its ``algorithm``, ``seed`` and the figures of :data:`FIGURES`;
        ``None`` where there is none. The rewards are log-potentials, in nats: ``objective`` is
        their weighted mean, for a maximiser that of the first particle, which it returns; ``best``
        is the highest of any particle, whatever its weight. Those of minus infinity are left out
        of means. ``model`` says what was run, as far as it can be told.
    :param int budget: The trajectories that each had.
    :param tuple measures: The names of what else was measured.
    """

    rows: list[Row]
    budget: int
    measures: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The algorithms, in the order in which they were asked for."""
        return list(dict.fromkeys(row["algorithm"] for row in self.rows))

    def returns(self, name: str) -> str:
        """What an algorithm returns, such as ``"samples of the tilted law"``."""
        return str(next(row["returns"] for row in self.rows if row["algorithm"] == name))

    def values(self, name: str, figure: str) -> dict[int, float]:
        """A figure of an algorithm by seed; NaN where a run has none."""
        if name not in self.names:
            raise ValueError(nearest("algorithm", name, self.names))
        known = (*FIGURES, *self.measures)
        if figure not in known:
            raise ValueError(nearest("figure", figure, known))
        rows = [row for row in self.rows if row["algorithm"] == name]
        return {r["seed"]: math.nan if r[figure] is None else float(r[figure]) for r in rows}

    def estimate(self, name: str, figure: str) -> Estimate:
        """
        The mean of a figure over seeds.

        :param str name: The algorithm.
        :param str figure: One of :data:`FIGURES`.
        """
        return Estimate.of(list(self.values(name, figure).values()))

    def difference(self, name: str, other: str, figure: str) -> Estimate:
        """
        By how much one algorithm's figure is above another's, seed by seed.

        :param str name: The one.
        :param str other: The other.
        :param str figure: One of :data:`FIGURES`.
        """
        first, second = self.values(name, figure), self.values(other, figure)
        return Estimate.of([first[seed] - second[seed] for seed in first if seed in second])

    def table(self) -> str:
        """Means and intervals, as Markdown."""
        shown = ("log_normalizer", "objective", "best", *self.measures, "ess")
        head = ["algorithm", "returns", "log Z", "sd of log Z"]
        head += [FIGURES.get(figure, figure) for figure in shown[1:]]
        head += ["denoiser calls", "reward calls", "seconds"]
        lines = [f"| {' | '.join(head)} |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
        lines += [f"| {' | '.join(self._line(name, shown))} |" for name in self.names]
        return "\n".join(lines)

    def _line(self, name: str, shown: Sequence[str]) -> list[str]:
        estimates = [self.estimate(name, figure) for figure in shown]
        sd = "–" if math.isnan(estimates[0].sd) else f"{estimates[0].sd:.2f}"
        cells = [str(estimates[0]), sd, *map(str, estimates[1:])]
        calls = [f"{self.estimate(name, kind).mean:,.0f}" for kind in ("denoiser", "reward")]
        failed = sum(row["failed"] for row in self.rows if row["algorithm"] == name)
        mark = f" ({failed} failed)" if failed else ""
        return [
            name + mark,
            self.returns(name),
            *cells,
            *calls,
            f"{self.estimate(name, 'seconds').mean:.1f}",
        ]

    def __str__(self) -> str:
        return self.table()

    def to_dataframe(self) -> DataFrame:
        """The rows as a pandas ``DataFrame``; needs pandas."""
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ImportError(
                "to_dataframe needs pandas, as in pip install pandas; .rows has the same as a list"
            ) from error
        return DataFrame(self.rows)

    def plot(self, **options: Any) -> Figure:
        """
        Draws log Z and rewards with their intervals; needs the extra ``plots``.

        :param options: Passed to :func:`pyro_twist.algorithms.plots.plot_comparison`.
        """
        from pyro_twist.algorithms.plots import plot_comparison

        return plot_comparison(self, **options)


def compare(
    model: Any,
    algorithms: Sequence[str | Algorithm] | None = None,
    *,
    budget: int = 16,
    seeds: int | Sequence[int] = 5,
    max_plate_nesting: int = 0,
    population_plate: str | None = None,
    measures: Mapping[str, Measure] | None = None,
    path: str | Path | None = None,
    progress: bool | None = None,
) -> Comparison:
    """
    Runs several algorithms on one model, with the same number of trajectories and the same seeds.

    Every algorithm has ``budget`` trajectories of the denoiser, the passes that it learns from
    included. How many reward calls it makes of them is its own affair, and a column of the table.

    :param model: A tilted model, such as :class:`~pyro_twist.rewards.RewardTilted`.
    :param algorithms: Names, see :func:`pyro_twist.algorithms.algorithms`, or
        :class:`~pyro_twist.algorithms.Algorithm` objects of your own; all that fit the model if
        ``None``.
    :param int budget: The number of trajectories.
    :param seeds: The number of seeds, or the seeds.
    :param int max_plate_nesting: Bound on the number of nested plates in the model.
    :param str population_plate: The plate whose entries are separate populations, over which the
        figures are averaged.
    :param dict measures: What else to measure, by name: functions of the final state that return
        a number for each particle, such as the opinion of a judge, of which the weighted mean is
        taken.
    :param path: A file that finished runs are appended to, one JSON object a line; those that are
        in it already are not repeated, so that a run that was killed goes on. One with rows of
        another model is refused, as far as steps, shapes, rewards and scales tell.
    :param bool progress: Whether to show a progress bar; by default on a terminal only.
    :returns: Tables, intervals and plots of what was found.
    :rtype: Comparison
    :raises ValueError: If a name is unknown, an algorithm does not fit the model, a number is out
        of range, or the file has rows of something else.

    Example::

        comparison = pyro_twist.compare(model, ["best-of-n", "fk", "tri-tsmc"], budget=16, seeds=10)
        print(comparison)
        print(comparison.difference("tri-tsmc", "fk", "log_normalizer"))
    """
    check_tilted(model, "compare algorithms by")
    chosen, measures, numbers = _chosen(model, algorithms), measures or {}, _seeds(seeds)
    _check_measures(measures)
    _check_plate(model, population_plate)
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise ValueError(f"budget={budget!r}; give a whole number of trajectories, 1 or more")
    setting = Setting(Scored(model), budget, max_plate_nesting, population_plate)
    file = _File(path, budget, _told(model), measures)
    jobs = [(seed, one) for seed in numbers for one in chosen]
    for seed, one in _bar(jobs, progress):
        if file.find(one.name, seed) is None:
            file.add(_run(one, replace(setting, seed=seed), measures))
    rows = [row for one in chosen for seed in numbers if (row := file.find(one.name, seed))]
    return Comparison(rows, budget, tuple(measures))


def _chosen(model: Any, wanted: Sequence[str | Algorithm] | None) -> list[Algorithm]:
    if isinstance(wanted, (str, Algorithm)):
        wanted = [wanted]
    if wanted is None:
        return list(algorithms(model).values())
    found = [one if isinstance(one, Algorithm) else find_algorithm(one) for one in wanted]
    names = [one.name for one in found]
    if not found:
        raise ValueError("algorithms is empty; name at least one, or leave it out for all")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"algorithm {twice[0]!r} is there twice; give one of them another name")
    for one in found:
        if reason := one.unmet(model):
            raise ValueError(
                f"algorithm {one.name!r} {reason}, so that it does not fit {type(model).__name__}"
            )
    return found


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds >= 1:
        return list(range(seeds))
    listed = list(seeds) if isinstance(seeds, Sequence) else []
    if listed and all(isinstance(one, int) and not isinstance(one, bool) for one in listed):
        return list(dict.fromkeys(listed))
    raise ValueError(f"seeds={seeds!r}; give a number of seeds, 1 or more, or a list of them")


def _check_measures(measures: Mapping[str, Any]) -> None:
    columns = {*FIGURES, "algorithm", "returns", "seed", "failed", "budget", "model"}
    if taken := set(measures) & columns:
        raise ValueError(f"measures={sorted(measures)}: {min(taken)!r} is a column already")
    for name, measure in measures.items():
        if not callable(measure):
            raise ValueError(
                f"the measure {name!r} is {measure!r}; give a function of the final state that "
                "returns a number for each particle"
            )


def _check_plate(model: Any, population_plate: str | None) -> None:
    plate = plate_of(model)
    if plate is not None and population_plate is None:
        raise ValueError(
            f"the model has the plate {plate.name!r}; name it population_plate, so that figures "
            "are of each entry, averaged"
        )


def _told(model: Any) -> str:
    """What can be said of a model in a line, to tell it from another."""
    parts = []
    rewards = [str(getattr(one, "name", name)) for name, one in rewards_of(model)]
    steps = len(model.timesteps)
    while isinstance(model, ModelWrapper):
        scales = [f"{one:g}" for one in vars(model).get("scales", {}).values() if _number(one)]
        potential = getattr(vars(model).get("potential"), "__qualname__", "")
        parts.append(" ".join([type(model).__name__, potential, *scales]))
        model = model.model
    shape = tuple(getattr(model, "event_shape", ()))
    given = getattr(getattr(model, "denoiser", None), "conditioning", None) or {}
    told = [f"{name}={value}" for name, value in given.items() if _number(value)]
    return ", ".join([*rewards, *parts, f"{type(model).__name__} {shape}", f"{steps} steps", *told])


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _bar(jobs: list[tuple[int, Algorithm]], progress: bool | None) -> Iterator[Any]:
    from tqdm import tqdm

    disable = None if progress is None else not progress
    with tqdm(jobs, disable=disable, desc="compare", unit="run") as bar:
        for seed, one in bar:
            bar.set_postfix_str(f"{one.name}, seed {seed}")
            yield seed, one


def _run(one: Algorithm, setting: Setting, measures: Mapping[str, Measure]) -> Row:
    """One run's row; one in which no particle has weight is a row without figures."""
    head = {"algorithm": one.name, "returns": one.returns, "seed": setting.seed}
    start = time.perf_counter()
    try:
        with RandomStream(setting.seed)():  # what a run draws outside of its own stream
            result = one.make(setting).run()
            found = figures(result, one, setting.model, measures)
    except SMCFailed:
        nothing = dict.fromkeys((*FIGURES, *measures))
        return {**head, **nothing, "failed": True, "budget": setting.num_particles}
    except Exception as error:
        error.add_note(f"in {one.name!r} with seed {setting.seed}; rows of finished runs are kept")
        raise
    found["seconds"] = round(time.perf_counter() - start, 3)
    return {**head, **found, "failed": False, "budget": setting.num_particles}


def figures(
    result: SMCResult, one: Algorithm, model: Any, measures: Mapping[str, Measure] | None = None
) -> Row:
    """
    What is measured of a result, averaged over populations.

    :param SMCResult result: The result of a run.
    :param Algorithm one: The algorithm.
    :param model: The model, which writes its ``"objective"`` or can say what it is.
    :param dict measures: What else to measure, as for :func:`compare`.
    """
    score = result._by_population(_objective(result, model)).reshape(result.log_weights.shape)
    alive = torch.where(score == -torch.inf, -torch.inf, one.log_weights(result))
    found = {
        "log_normalizer": float(result.log_normalizer.mean()) if one.weighted else math.nan,
        "objective": float(weighted_mean(score, alive).mean()),
        "best": float(score.amax(0).mean()),
        "ess": float(result.get_ESS().mean()) if one.weighted else math.nan,
    }
    for name, measure in (measures or {}).items():
        values = _measured(result, name, measure(result.state))
        found[name] = float(weighted_mean(values, alive).mean())
    counts = {kind: result.counts.get(kind, 0) for kind in ("denoiser", "reward")}
    return {k: v if math.isfinite(v) else None for k, v in found.items()} | counts


def _measured(result: SMCResult, name: str, values: Any) -> torch.Tensor:
    size = result.log_weights.numel()
    if not isinstance(values, torch.Tensor) or values.numel() != size:
        shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"the measure {name!r} returned {shape} for {size} particles")
    return result._by_population(values).reshape(result.log_weights.shape)


def _objective(result: SMCResult, model: Any) -> torch.Tensor:
    """The log-potential of the particles; models of another law do not end as the tilted one."""
    if "objective" in result.state:
        return result.state["objective"]
    return log_potential(model, result.state, result.state["x"])


class _File:
    """The rows of finished runs, kept in a file if there is one."""

    def __init__(
        self, path: str | Path | None, budget: int, model: str, measures: Collection[str]
    ) -> None:
        self.path, self.budget = None if path is None else Path(path), budget
        self.model, self.measures = model, measures
        self.rows: dict[tuple[str, int], Row] = {}
        if self.path is not None and self.path.exists():
            for row in _read(self.path):
                self._keep(row)

    def _keep(self, row: Mapping[str, Any]) -> None:
        if row["budget"] != self.budget:
            return
        if row.get("model", self.model) != self.model:
            raise ValueError(
                f"{self.path} has rows of another model, {row['model']}; this one is {self.model}. "
                "Give another path."
            )
        if missing := [name for name in self.measures if name not in row]:
            raise ValueError(
                f"{self.path} has rows without the measure {missing[0]!r}; give another path"
            )
        self.rows[row["algorithm"], row["seed"]] = dict(row)

    def find(self, name: str, seed: int) -> Row | None:
        return self.rows.get((name, seed))

    def add(self, row: Row) -> None:
        row = {**row, "model": self.model}
        self._keep(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _read(path: Path) -> Iterator[Row]:
    """The rows of a file; half a line, which a run that was killed has left, is taken away."""
    text = path.read_text(encoding="utf-8")
    if whole := text[: text.rfind("\n") + 1]:
        yield from map(json.loads, whole.splitlines())
    if whole != text:
        path.write_text(whole, encoding="utf-8")
