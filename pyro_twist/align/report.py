# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures, plots and the page of an outcome."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pyro_twist.align.files import save_results
from pyro_twist.align.folder import prepare_folder, write_whole
from pyro_twist.align.learned import learned_pictures, learned_section
from pyro_twist.align.outcome import Arm, Outcome, Strength, rows_of, versions
from pyro_twist.align.shown import Shown, ShownRow, ShownSection
from pyro_twist.align.table import CALLS, columns, number, remarks, summary_rows, table_rows
from pyro_twist.infer import get_resampling
from pyro_twist.viz import (
    Figure,
    Page,
    Section,
    Table,
    WeightedValues,
    plot_rewards,
)
from pyro_twist.viz.page import Part, png_bytes
from pyro_twist.weights import effective_sample_size

__all__ = ["draw_rewards", "show_samples", "strength_sentences", "write_report"]

SHOWN = 8
# From so many samples on, a standard deviation is known to a tenth.
WELL_KNOWN = 50

_STEPS_TEXT = (
    "By step: the effective sample size before resampling; what the step adds to log Z; and who "
    "descends from whom, red the ancestors of the final particles. Few ancestors at the left mean "
    "that the final particles are close relatives."
)


def write_report(outcome: Outcome) -> Path:
    """
    Writes ``results.json``, the plots, ``report.html`` and, for what can be drawn, ``grid.png`` to
    the outcome's folder.

    Without matplotlib the plots are left out.

    :param Outcome outcome: What to report; may be of a job that ended early.
    :returns: The page.
    """
    folder = outcome.options.out
    if not (folder / "results.json").is_file():
        prepare_folder(folder)
    save_results(outcome)
    pictures, shown = _pictures(outcome), show_samples(outcome)
    files = {f"{name}.png": figure.content for name, figure in pictures.items()}
    for name, content in {**files, **shown.files}.items():
        (folder / name).write_bytes(content)
    return write_whole(folder / "report.html", _page(outcome, pictures, shown.parts).to_html())


def _pictures(outcome: Outcome) -> dict[str, Figure]:
    if not outcome.arms:
        return {}
    pictures: dict[str, Figure] = {}
    try:
        pictures["rewards"] = Figure(png_bytes(draw_rewards(outcome)), _rewards_caption(outcome))
        for arm in outcome.arms:
            if arm.method.weighted and arm.last.diagnostics:
                pictures[f"steps-{arm.method.name}"] = _steps_figure(arm)
    except ImportError:
        pass
    for arm in outcome.arms:
        pictures |= learned_pictures(arm, outcome) if arm.has_learned else {}
    return pictures


def _rewards_caption(outcome: Outcome) -> str:
    reference = outcome.arms[0].method.name
    return (
        "Every dot is a particle, its area the weight; a small grey cross is a particle without "
        "weight, such as the runners-up of a maximiser. The bar is the weighted mean, the dotted "
        f"line that of {reference}. What is -inf is not drawn."
    )


def _steps_figure(arm: Arm) -> Figure:
    from pyro_twist.infer.plots import plot_diagnostics

    plot = plot_diagnostics(arm.last)
    which = f", the last of {arm.passes} passes" if arm.passes > 1 else ""
    title = f"{arm.method.title} ({arm.method.name}){which}"
    plot.suptitle(title, fontsize="medium", x=0.01, ha="left")
    return Figure(png_bytes(plot), alt=f"Diagnostics of {arm.method.name}")


# the samples


def show_samples(outcome: Outcome) -> Shown:
    """
    Shows samples of each method, class by class.

    Samplers are shown by equally weighted draws of their particles, maximisers by their ranking.

    :param Outcome outcome: The job.
    :returns: Parts of the page, none if no method has finished, and pictures.
    """
    if not outcome.arms:
        return Shown()
    sections = [
        ShownSection([_row(outcome, arm, p) for arm in outcome.arms], outcome.heading(p))
        for p in range(len(outcome.labels))
    ]
    return outcome.domain.show(sections, _caption(outcome))


def _row(outcome: Outcome, arm: Arm, p: int) -> ShownRow:
    maximiser = arm.method.returns == "a maximiser"
    index = torch.arange(min(SHOWN, len(arm.weights))) if maximiser else _draws(arm, p)
    name = outcome.single_reward
    values = arm.ranking if name is None else arm.rewards[name]
    samples = rows_of(arm.samples[:, p], index)
    judged = outcome.domain.judge(samples, outcome.indices[p] if outcome.indices else None)
    return ShownRow(
        label=arm.method.name,
        samples=samples,
        captions=[number(value) for value in values[index, p].tolist()],
        judged=[number(value) for value in judged.score.tolist()] if judged else [],
        notes=_notes(outcome, arm, p),
        faded=len(index) - 1 if maximiser else 0,
    )


def _draws(arm: Arm, p: int) -> torch.Tensor:
    """Systematic draws, always the same, so that a report can be made again."""
    generator = torch.Generator(arm.weights.device).manual_seed(0)
    size = min(SHOWN, len(arm.weights))
    return get_resampling("systematic")(arm.weights[:, p], size, generator)


def _notes(outcome: Outcome, arm: Arm, p: int) -> list[str]:
    told = {c.heading: c.shown(c.value(arm, p)) for c in columns(outcome)}
    reward = next(iter(told.values()))
    judged = [f"judge {told['judge']}"] if "judge" in told else []
    short = {"a maximiser": "the best, others pale"}
    name = "reward" if outcome.single_reward else "lambda * reward"
    return [short.get(arm.method.returns, arm.method.returns), f"{name} {reward}", *judged]


def _caption(outcome: Outcome) -> str:
    name = outcome.single_reward
    unit = f"reward ({name})" if name else _sum_name(outcome)
    size = min(SHOWN, outcome.options.particles)
    draws = f"{size} equally weighted draws" if size > 1 else "one draw"
    return (
        f"its {unit}. Samplers are shown by {draws}, in which a heavy particle "
        "may appear several times; a maximiser by the sample it returns, followed by the next "
        "best, pale."
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
                (arm.ranking if name is None else arm.rewards[name])[:, p].cpu().numpy(),
                arm.weights[:, p].cpu().numpy(),
                "maximiser" if arm.method.returns == "a maximiser" else "samples",
            )
            for arm in outcome.arms
        ]
    return plot_rewards(panels, unit=name or _greek(_sum_name(outcome)))


def _sum_name(outcome: Outcome) -> str:
    tilted = any(strength.scale for strength in outcome.strengths)
    return "sum of lambda * reward" if tilted else "sum of the rewards"


# the page


def _page(outcome: Outcome, pictures: dict[str, Figure], samples: Sequence[str | Part]) -> Page:
    names = " + ".join(outcome.reward_names) or "a reward"
    stacks = [figure for name, figure in pictures.items() if name.startswith("steps-")]
    sections = [
        *([Section("In numbers", list(_tables(outcome)))] if outcome.arms else []),
        Section("Samples", samples),
        *([Section("Class by class", list(_class_tables(outcome)))] if outcome.arms else []),
        *(learned_section(arm, outcome, pictures) for arm in outcome.arms if arm.has_learned),
        Section("How strong the tilt is", list(strength_sentences(outcome))),
        *([Section("Rewards found", [pictures["rewards"]])] if "rewards" in pictures else []),
        Section("What each method returns", [_methods_table(outcome)]),
        *(
            [Section("Inside the samplers", [_STEPS_TEXT, *stacks], side_by_side=len(stacks) > 1)]
            if stacks
            else []
        ),
    ]
    sections = [replace(section, parts=[*map(_greek, section.parts)]) for section in sections]
    return Page(
        title=f"Aligning {outcome.domain.name} to {names}",
        lead="Samples of p(x) exp(λ * reward(x)), where p is the model: it is not retrained, and "
        "all methods may call its network equally often.",
        facts=_facts(outcome),
        sections=[section for section in sections if section.parts],
        warning=_warning(outcome),
        footer=_footer(outcome),
        code=outcome.command,
    )


def _facts(outcome: Outcome) -> list[tuple[str, str]]:
    options = outcome.options
    scales = ", ".join(f"{strength.scale:g}" for strength in outcome.strengths)
    return [
        ("model", outcome.domain.name),
        *([("class", _class_names(outcome))] if outcome.domain.classes else []),
        ("reward", ", ".join(outcome.reward_names) or ABSENT_YET),
        ("λ", scales or ABSENT_YET),
        ("particles", str(options.particles)),
        ("steps", str(outcome.num_steps)),
        *outcome.facts,
        ("resampling", f"{options.resampling}, below {options.ess_threshold:g} N"),
        ("seed", str(options.seed)),
    ]


def _class_names(outcome: Outcome) -> str:
    return ", ".join(outcome.labels) if outcome.labels != ("",) else "any"


ABSENT_YET = "not reached"


def _tables(outcome: Outcome) -> Iterator[str | Table]:
    own = columns(outcome)
    headings = ["method", *(column.heading for column in own), *CALLS]
    told = ["As named by --method.", *(column.explanation for column in own), *CALLS.values()]
    if len(outcome.labels) > 1:
        yield "Means over the classes; of the best, the best of all. Calls and seconds are sums."
    yield Table(headings, summary_rows(outcome), told)
    yield from remarks(outcome)
    if outcome.single_reward is None:
        yield "Each reward in its own unit, means over the classes:"
        yield _reward_table(outcome)


def _class_tables(outcome: Outcome) -> Iterator[str | Table]:
    headings = ["method", *(column.heading for column in columns(outcome))]
    for p in range(len(outcome.labels) if len(outcome.labels) > 1 else 0):
        yield outcome.heading(p)
        yield Table(headings, table_rows(outcome, p))


def _greek(part: str | Part) -> Any:
    """Writes lambda as a letter, except in code and in the names of functions."""
    if isinstance(part, str):
        return re.sub(r"(?<![<\w])lambda(?![>\w])", "λ", part)
    if isinstance(part, Figure):
        return replace(part, caption=_greek(part.caption), alt=_greek(part.alt))
    if not isinstance(part, Table):
        return part
    return replace(
        part,
        columns=[*map(_greek, part.columns)],
        rows=[[*map(_greek, row)] for row in part.rows],
        explanations=[*map(_greek, part.explanations)],
    )


def _reward_table(outcome: Outcome) -> Table:
    names = outcome.reward_names
    rows = []
    for arm in outcome.arms:
        means = [[score.reward_mean[name] for score in arm.scores] for name in names]
        rows.append([arm.method.name, *(number(sum(one) / len(one)) for one in means)])
    return Table(["method", *(f"{name}, mean" for name in names)], rows)


def strength_sentences(outcome: Outcome) -> Iterator[str]:
    """Says what ``lambda`` is and where it comes from, reward by reward."""
    for strength in outcome.strengths:
        yield _strength_sentence(strength, len(outcome.labels) > 1)
    if outcome.strengths and outcome.strengths[0].strength is not None:
        yield _where_measured(outcome, outcome.strengths[0].size)
    if outcome.strengths and outcome.base and outcome.base.weights.shape[0] > 1:
        yield _severity(outcome, outcome.base)


def _where_measured(outcome: Outcome, size: int) -> str:
    denoiser, reward = (outcome.calibration.get(kind, 0) for kind in ("denoiser", "reward"))
    drawn = outcome.pilot
    if drawn == 0:
        return "The samples for that are those of base."
    those = f"The {size} samples for that"
    if drawn < size:
        those = f"Of the {size} samples for that, {size - drawn} are those of base and {drawn}"
    return (
        f"{those} were drawn besides, with {denoiser:,} denoiser calls and {reward:,} reward calls "
        "that the table does not count; they are the same for every --seed."
    )


def _strength_sentence(strength: Strength, within: bool) -> str:
    lead = f"{strength.name}: lambda = {strength.scale:g}"
    if strength.strength is None:
        text = f"{lead}, as given by --scale."
        if strength.sd:
            this = f"{strength.scale * strength.sd:.2g} / sd"
            text += f" {_measured(strength, within)}, so that this is {this}."
        return text
    return (
        f"{lead} = {strength.strength:g} / {strength.sd:.3g}. {_measured(strength, within)}"
        f"{_precision(strength)}; were it normal, the tilt would move its mean by "
        f"{strength.strength:g} sd (--strength). Set lambda itself with --scale."
    )


def _measured(strength: Strength, within: bool) -> str:
    over = f"over {strength.size} samples"
    if strength.allowed < strength.size:
        over = f"over the {strength.allowed} of {strength.size} samples that are not -inf"
    classes = " within classes" if within else ""
    return (
        f"Under the model, measured {over}, the reward has mean {number(strength.mean)} and "
        f"standard deviation{classes} (sd) {strength.sd:.3g}"
    )


def _precision(strength: Strength) -> str:
    """How well a standard deviation from few samples is known, were the reward normal."""
    if strength.allowed >= WELL_KNOWN:
        return ""
    return f", known to about {100 / (2 * max(1, strength.allowed - 1)) ** 0.5:.0f} %"


def _severity(outcome: Outcome, base: Arm) -> str:
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
    of = versions(outcome.domain.packages)
    more = "".join(f", {name} {of[name]}" for name in outcome.domain.packages if name in of)
    return (
        f"{outcome.started}, {outcome.seconds:.0f} s in all, on {of['machine']}, threads: "
        f"{of['threads']}. pyro_twist {of['pyro_twist']}, Python {of['python']}, "
        f"torch {of['torch']}, Pyro {of['pyro-ppl']}{more}. Every figure is "
        "in results.json, every final particle with its reward and weight in samples/."
    )
