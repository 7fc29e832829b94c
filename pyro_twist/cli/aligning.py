# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""``pyro-twist align``: progress bars, the table, and how failures end."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from pyro_twist.align import (
    AlignmentFailed,
    AlignOptions,
    Domain,
    OptionError,
    Outcome,
    PipelineImages,
    Progress,
    PromptResult,
    find_domain,
    run,
    run_prompts,
    write_report,
)
from pyro_twist.align.prompts import summary_table
from pyro_twist.align.report import strength_sentences
from pyro_twist.align.table import CALLS, columns, remarks, summary_rows, table_rows
from pyro_twist.cli.app import FAILED, INTERRUPTED, WRONG_OPTION, complain
from pyro_twist.rewards import RewardWarning

__all__ = ["align_command", "print_outcome", "print_table"]

MAX_WARNINGS = 3


def align_command(model: str, given: dict[str, Any], prompts: tuple[str, ...], quiet: bool) -> int:
    """
    Runs the job, or one for each prompt of a pipeline, and prints what was found.

    :param str model: The model.
    :param dict given: The other fields of :class:`~pyro_twist.align.AlignOptions`.
    :param tuple prompts: The prompts.
    :param bool quiet: Whether to print only the last line.
    :returns: The exit code.
    """
    console = Console(highlight=False, quiet=quiet)
    try:
        domain = find_domain(model)
        if isinstance(domain, PipelineImages):
            given = {"out": Path("results") / _folder_name(model), **given}
            return _prompts(AlignOptions(model=model, **given), prompts, domain, console)
        if len(prompts) > 1:
            raise OptionError(f"--prompt: {model!r} takes one, got {len(prompts)}")
        options = AlignOptions(model=model, prompt=next(iter(prompts), None), **given)
        return _job(options, domain, console)
    except OptionError as error:
        complain(str(error))
        return WRONG_OPTION
    except OSError as error:
        complain(f"the results cannot be written: {error}")
        return FAILED


def _folder_name(model: str) -> str:
    """The name of a pipeline as that of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name) or "pipeline"


def _prompts(
    options: AlignOptions, prompts: tuple[str, ...], domain: PipelineImages, console: Console
) -> int:
    def tell(result: PromptResult) -> None:
        console.print(f"\n[bold]{escape(result.prompt or 'without a prompt')}[/bold]")
        if result.outcome is None:
            console.print(f"finished earlier, in {escape(str(result.folder))}", style="dim")
        else:
            print_outcome(result.outcome, console)

    try:
        with _bars(console) as progress, _short_warnings():
            done = run_prompts(options, prompts, progress=progress, tell=tell, domain=domain)
    except AlignmentFailed as failure:
        print_outcome(failure.outcome, console)
        complain(f"{failure}; prompts that are finished are kept, the same command goes on")
        return INTERRUPTED if failure.outcome.error == "interrupted" else FAILED
    if len(done) > 1:
        headings, rows = summary_table(done)
        console.print()
        print_table(console, "Means over the prompts", headings[1:], rows)
    print(f"Results are in {options.out}; open {options.out / 'index.html'}")
    failed = any(one.results["failed"] for one in done)
    return FAILED if failed else 0


def _job(options: AlignOptions, domain: Domain, console: Console) -> int:
    try:
        with _bars(console) as progress, _short_warnings():
            outcome, code = run(options, progress=progress, domain=domain), 0
    except AlignmentFailed as failure:
        outcome = failure.outcome
        code = INTERRUPTED if outcome.error == "interrupted" else FAILED
        complain(outcome.error)
    print_outcome(outcome, console)
    page = write_report(outcome)
    names = ", ".join(arm.method.name for arm in outcome.arms)
    what = "Results" if not code else f"Results of what had finished ({names})"
    if outcome.arms or not code:
        print(f"{what} are in {outcome.options.out}; open {page}")
    else:
        complain(f"no method had finished, so there are no results; {page} says so too")
    survived = any(arm.method.tilted for arm in outcome.arms)
    return code or (FAILED if outcome.failures and not survived else 0)


def print_outcome(outcome: Outcome, console: Console) -> None:
    """
    Prints the table and what is needed to read it.

    :param Outcome outcome: What the job found.
    :param console: Where to print.
    """
    console.print()
    for text in strength_sentences(outcome):
        console.print(text, style="dim")
    if outcome.arms:
        own = [column.heading for column in columns(outcome)]
        several = len(outcome.labels) > 1
        title = "Means over the classes" if several else ""
        print_table(console, title, [*own, *CALLS], summary_rows(outcome))
        for p in range(len(outcome.labels) if several else 0):
            print_table(console, outcome.heading(p), own, table_rows(outcome, p))
        for text in remarks(outcome):
            console.print(text, style="dim")
        returned = (f"{arm.method.name}: {arm.method.returns}" for arm in outcome.arms)
        console.print("Returned: " + "; ".join(returned) + ".", style="dim")
    for name, reason in outcome.failures.items():
        console.print(f"{name} failed: {reason}", style="red")


def print_table(console: Console, title: str, headings: list[str], rows: list[list[str]]) -> None:
    """
    Prints a table, as several where it is too wide, so that no digit is cut.

    :param console: Where to print.
    :param str title: Written above it; nothing if empty.
    :param list headings: Of all columns but the first, the method.
    :param list rows: The cells.
    """
    unlimited = console.options.update(width=10_000)
    start, end = 0, len(headings)
    while start < len(headings):
        cut = [[row[0], *row[1 + start : 1 + end]] for row in rows]
        table = _table(title, headings[start:end], cut)
        fits = console.measure(table, options=unlimited).maximum <= console.width
        if fits or end == start + 1:
            console.print(table)
            start, end = end, len(headings)
        else:
            end -= 1


def _table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("method", style="bold", no_wrap=True)
    for heading in headings:
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


class _BarProgress(Progress):
    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.task: Any = None

    def begin(self, title: str, total: int) -> None:
        self.task = self.bars.add_task(title, total=total, figures="")

    def advance(self, done: int, ess: float, log_normalizer: float) -> None:
        known = not math.isnan(log_normalizer)
        figures = f"ESS {ess:.1f}  log Z {log_normalizer:.2f}" if known else ""
        self.bars.update(self.task, completed=done, figures=figures)

    def end(self) -> None:
        self.bars.stop_task(self.task)


class _LineProgress(Progress):
    """A line for each method, where bars cannot move."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, title: str, total: int) -> None:
        self.console.print(f"{title}: {total:,} denoiser calls")


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    if not console.is_terminal or console.quiet:
        yield _LineProgress(console)
        return
    bars = Bars(
        TextColumn("{task.description:<30}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    )
    with bars:
        yield _BarProgress(bars)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Shows what a reward warns of without the place in our sources, and the first few times."""
    shown = 0

    def show(message: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal shown
        shown += 1
        if shown <= MAX_WARNINGS:
            print(f"warning: {message}", file=sys.stderr)
        elif shown == MAX_WARNINGS + 1:
            print("warning: further warnings are not shown", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", RewardWarning)
        warnings.showwarning = show
        yield
