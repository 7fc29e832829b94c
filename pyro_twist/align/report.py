# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures, plots and the page of an outcome."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pyro_twist.align.files import save_results
from pyro_twist.align.outcome import Arm, Outcome, versions
from pyro_twist.align.table import CALLS, columns, number, summary_rows, table_rows
from pyro_twist.infer import get_resampling
from pyro_twist.infer.weights import effective_sample_size
from pyro_twist.viz import (
    Figure,
    Page,
    PictureRow,
    PictureSection,
    Section,
    Table,
    WeightedValues,
    picture_grid,
    plot_rewards,
)
from pyro_twist.viz.page import png_bytes

__all__ = ["draw_grid", "draw_rewards", "strength_sentences", "write_report"]

SHOWN = 8

_STEPS_TEXT = (
    "By step: the effective sample size before resampling; what the step adds to log Z; and who "
    "descends from whom, red the ancestors of the final particles. Few ancestors at the left mean "
    "that the final particles are close relatives."
)


def write_report(outcome: Outcome) -> Path:
    """
    Writes ``results.json``, ``grid.png``, the plots and ``report.html`` to the outcome's folder.

    Without matplotlib the plots are left out.

    :param Outcome outcome: What to report; may be of a job that ended early.
    :returns: The page.
    """
    folder = outcome.options.out
    save_results(outcome)
    pictures = _pictures(outcome)
    for name, figure in pictures.items():
        (folder / f"{name}.png").write_bytes(figure.content)
    path = folder / "report.html"
    path.write_text(_page(outcome, pictures).to_html(), encoding="utf-8")
    return path


def _pictures(outcome: Outcome) -> dict[str, Figure]:
    if not outcome.arms:
        return {}
    grid = Figure(png_bytes(draw_grid(outcome)), _grid_caption(outcome), "Samples of each method")
    pictures = {"grid": grid}
    try:
        caption = (
            "Every dot is a particle, its area the weight; the bar is the weighted mean, the "
            "dotted line that of the base model."
        )
        pictures["rewards"] = Figure(png_bytes(draw_rewards(outcome)), caption)
        for arm in outcome.arms:
            if arm.method.returns == "samples of the tilted law" and arm.result.diagnostics:
                pictures[f"steps-{arm.method.name}"] = _steps_figure(arm)
    except ImportError:
        pass
    return pictures


def _steps_figure(arm: Arm) -> Figure:
    from pyro_twist.infer.plots import plot_diagnostics

    plot = plot_diagnostics(arm.result)
    plot.suptitle(f"{arm.method.title} ({arm.method.name})", fontsize="medium", x=0.01, ha="left")
    return Figure(png_bytes(plot), alt=f"Diagnostics of {arm.method.name}")


# the grid


def draw_grid(outcome: Outcome) -> Any:
    """
    Draws samples of each method, class by class.

    Samplers are shown by equally weighted draws of their particles, maximisers by their ranking.

    :returns: The picture, a :class:`PIL.Image.Image`.
    """
    sections = [
        PictureSection([_row(outcome, arm, p) for arm in outcome.arms], outcome.heading(p))
        for p in range(len(outcome.labels))
    ]
    return picture_grid(sections)


def _row(outcome: Outcome, arm: Arm, p: int) -> PictureRow:
    maximiser = arm.method.returns == "a maximiser"
    index = torch.arange(min(SHOWN, len(arm.weights))) if maximiser else _draws(arm, p)
    name = outcome.single_reward
    values = arm.objective if name is None else arm.rewards[name]
    return PictureRow(
        label=arm.method.name,
        pictures=outcome.domain.pictures(arm.samples[index, p]),
        captions=[number(value) for value in values[index, p].tolist()],
        notes=_notes(outcome, arm, p),
        faded=len(index) - 1 if maximiser else 0,
    )


def _draws(arm: Arm, p: int) -> torch.Tensor:
    """Systematic draws, always the same, so that a report can be made again."""
    generator = torch.Generator(arm.weights.device).manual_seed(0)
    size = min(SHOWN, len(arm.weights))
    return get_resampling("systematic")(arm.weights[:, p], size, generator)


def _notes(outcome: Outcome, arm: Arm, p: int) -> list[str]:
    reward, _, judge, *_ = (column.shown(column.value(arm, p)) for column in columns(outcome))
    short = {"a maximiser": "the best, then runners-up"}
    name = "reward" if outcome.single_reward else "lambda * reward"
    return [short.get(arm.method.returns, arm.method.returns), f"{name} {reward}", f"judge {judge}"]


def _grid_caption(outcome: Outcome) -> str:
    name = outcome.single_reward
    unit = f"reward ({name})" if name else "sum of lambda * reward"
    return (
        f"Below each picture: its {unit}. Samplers are shown by {SHOWN} equally weighted draws, in "
        "which a heavy particle appears several times; a maximiser by the sample it returns, "
        "followed by the runners-up, pale."
    )


def draw_rewards(outcome: Outcome) -> Any:
    """
    Draws the rewards of all particles by method, a panel for each class.

    :returns: The figure, a :class:`matplotlib.figure.Figure`.
    """
    name = outcome.single_reward
    panels = {}
    for p in range(len(outcome.labels)):
        panels[outcome.heading(p)] = [
            WeightedValues(
                arm.method.name,
                (arm.objective if name is None else arm.rewards[name])[:, p].cpu().numpy(),
                arm.weights[:, p].cpu().numpy(),
                "maximiser" if arm.method.returns == "a maximiser" else "samples",
            )
            for arm in outcome.arms
        ]
    return plot_rewards(panels, unit=name or "sum of lambda * reward")


# the page


def _page(outcome: Outcome, pictures: dict[str, Figure]) -> Page:
    names = " + ".join(strength.name for strength in outcome.strengths) or "a reward"
    stacks = [figure for name, figure in pictures.items() if name.startswith("steps-")]
    sections = [
        *([Section("Samples", [pictures["grid"]])] if "grid" in pictures else []),
        *([Section("In numbers", list(_tables(outcome)))] if outcome.arms else []),
        Section("How strong the tilt is", list(strength_sentences(outcome))),
        *([Section("Rewards found", [pictures["rewards"]])] if "rewards" in pictures else []),
        Section("What each method returns", [_methods_table(outcome)]),
        *(
            [Section("Inside the samplers", [_STEPS_TEXT, *stacks], side_by_side=True)]
            if stacks
            else []
        ),
    ]
    return Page(
        title=f"Aligning {outcome.domain.name} to {names}",
        lead="Samples of p(x) exp(lambda * reward(x)), where p is the model: it is not retrained, "
        "and all methods may call its network equally often.",
        facts=_facts(outcome),
        sections=[section for section in sections if section.parts],
        warning=_warning(outcome),
        footer=_footer(outcome),
        code=outcome.options.command(),
    )


def _facts(outcome: Outcome) -> list[tuple[str, str]]:
    options = outcome.options
    scales = ", ".join(f"{strength.scale:g}" for strength in outcome.strengths)
    return [
        ("model", outcome.domain.name),
        ("class", ", ".join(outcome.labels) if outcome.labels != ("",) else "any"),
        ("reward", ", ".join(strength.name for strength in outcome.strengths) or ABSENT_YET),
        ("lambda", scales or ABSENT_YET),
        ("particles", str(options.particles)),
        ("steps", f"{options.steps}, {options.scheduler}"),
        ("guidance", f"{outcome.guidance:g}"),
        ("resampling", f"{options.resampling}, below {options.ess_threshold:g} N"),
        ("seed", str(options.seed)),
    ]


ABSENT_YET = "not reached"


def _tables(outcome: Outcome) -> Iterator[str | Table]:
    own = columns(outcome)
    headings = ["method", *(column.heading for column in own), *CALLS]
    told = ["As named by --method.", *(column.explanation for column in own), *CALLS.values()]
    if len(outcome.labels) > 1:
        yield "Means over the classes; of the best, the best of all. Calls and seconds are sums."
    yield Table(headings, summary_rows(outcome), told)
    if len(outcome.labels) > 1:
        for p in range(len(outcome.labels)):
            yield outcome.heading(p)
            yield Table(headings[: 1 + len(own)], table_rows(outcome, p))
    if outcome.single_reward is None:
        yield "Each reward in its own unit, means over the classes:"
        yield _reward_table(outcome)


def _reward_table(outcome: Outcome) -> Table:
    names = [strength.name for strength in outcome.strengths]
    rows = []
    for arm in outcome.arms:
        means = [[score.reward_mean[name] for score in arm.scores] for name in names]
        rows.append([arm.method.name, *(number(sum(one) / len(one)) for one in means)])
    return Table(["method", *(f"{name}, mean" for name in names)], rows)


def strength_sentences(outcome: Outcome) -> Iterator[str]:
    """Says what ``lambda`` is and where it comes from, reward by reward."""
    for strength in outcome.strengths:
        yield _strength_sentence(strength.name, strength)
    if outcome.calibration and outcome.strengths:
        denoiser, reward = (outcome.calibration.get(k, 0) for k in ("denoiser", "reward"))
        yield (
            "The samples for that came in part or wholly from a separate run of the model: "
            f"{denoiser:,} denoiser calls and {reward:,} reward calls beyond the table."
        )
    if outcome.strengths and outcome.arms and not outcome.arms[0].method.tilted:
        yield _severity(outcome)


def _strength_sentence(name: str, strength: Any) -> str:
    if strength.strength is None:
        text = f"{name}: lambda = {strength.scale:g}, as given by --scale."
        if strength.sd:
            text += (
                f" Under the model the reward has mean {number(strength.mean)} and standard "
                f"deviation (sd) {strength.sd:.3g}, so that this is "
                f"{strength.scale * strength.sd:.2g} / sd."
            )
        return text
    return (
        f"{name}: lambda = {strength.scale:g} = {strength.strength:g} / {strength.sd:.3g}. Under "
        f"the model the reward has mean {number(strength.mean)} and standard deviation "
        f"(sd) {strength.sd:.3g}; were it normal, the tilt would move its mean by "
        f"{strength.strength:g} sd (--strength). Set lambda itself with --scale."
    )


def _severity(outcome: Outcome) -> str:
    base = outcome.arms[0]
    ess = effective_sample_size(base.objective).mean().item()
    each = " of each class" if len(outcome.labels) > 1 else ""
    if ess == 0:
        return f"None of the {base.weights.shape[0]} base samples{each} has any weight."
    return (
        f"Merely reweighting the {base.weights.shape[0]} base samples{each} would leave an "
        f"effective sample size of {ess:.1f}: the nearer to 1, the more is left to the sampler."
    )


def _methods_table(outcome: Outcome) -> Table:
    rows = [[a.method.name, a.method.returns, a.method.description] for a in outcome.arms]
    return Table(["method", "returns", "what it does"], rows, prose=True)


def _warning(outcome: Outcome) -> str:
    told = [f"{name} failed: {reason}" for name, reason in outcome.failures.items()]
    if outcome.error:
        told.insert(0, f"The job ended early: {outcome.error}")
    return " ".join(told)


def _footer(outcome: Outcome) -> str:
    of = versions()
    return (
        f"{outcome.started}, {outcome.seconds:.0f} s in all, on {of['machine']}, threads: "
        f"{of['threads']}. pyro_twist {of['pyro_twist']}, Python {of['python']}, "
        f"torch {of['torch']}, Pyro {of['pyro-ppl']}, diffusers {of['diffusers']}. Every figure is "
        "in results.json, every sample in samples/."
    )
