# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""One job for each of several prompts, in a folder that a stopped run goes on with."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyro_twist.align.domains import Domain, find_domain
from pyro_twist.align.job import AlignmentFailed, Progress, run
from pyro_twist.align.options import AlignOptions, OptionError
from pyro_twist.align.outcome import Outcome
from pyro_twist.align.report import write_report
from pyro_twist.align.table import CALLS, number
from pyro_twist.viz import Figure, Page, Section, Table

__all__ = ["PromptResult", "prompt_folder", "run_prompts", "summary_table"]

_INDEX = "prompts.json"
_LONGEST = 48


@dataclass(frozen=True)
class PromptResult:
    """
    What was found for a prompt.

    :param str prompt: The prompt; ``None`` for a pipeline without.
    :param ~pathlib.Path folder: Where its files are.
    :param dict results: What is in its ``results.json``.
    :param Outcome outcome: The job, if it was run now; ``None`` if an earlier run had finished it.
    """

    prompt: str | None
    folder: Path
    results: dict[str, Any]
    outcome: Outcome | None = None


def run_prompts(
    options: AlignOptions,
    prompts: Sequence[str] = (),
    *,
    progress: Progress | None = None,
    tell: Callable[[PromptResult], None] | None = None,
    domain: Domain | None = None,
) -> list[PromptResult]:
    """
    Runs the job for each prompt, with one pipeline.

    Every prompt has a folder of its own below ``options.out``, which gets an ``index.html`` of them
    all. What an earlier run with the same options has finished is not run again, so that a run that
    was killed goes on where it was: with the prompt that it had not finished.

    :param AlignOptions options: What to do; its ``prompt`` stands for the prompts if there are
        none.
    :param prompts: The prompts.
    :param Progress progress: Is told how far the job of a prompt is.
    :param callable tell: Is given the result of each prompt as soon as there is one.
    :param Domain domain: The model, if it is at hand.
    :returns: The results, in the order of the prompts.
    :raises OptionError: If an option cannot be.
    :raises AlignmentFailed: If a job ends early; those before it are kept.
    """
    given: list[str | None] = [*prompts] or [options.prompt]
    if len(set(given)) < len(given):
        raise OptionError("--prompt: a prompt is given twice; give each once")
    domain = domain or find_domain(options.model)
    prepare(options.out)
    done: list[PromptResult] = []
    try:
        for prompt in given:
            done.append(_one(options, prompt, progress, domain))
            if tell is not None:
                tell(done[-1])
    finally:
        write_index(options, done, len(given))
    return done


def prompt_folder(out: Path, prompt: str | None) -> Path:
    """
    The folder of a prompt, which its words name, and a checksum where they do not tell all.

    :param ~pathlib.Path out: The folder of all.
    :param str prompt: The prompt.
    """
    if prompt is None:
        return out / "unconditional"
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_LONGEST].strip("-")
    if words and words.replace("-", " ") == prompt and words != "unconditional":
        return out / words
    return out / "-".join(filter(None, [words, f"{zlib.crc32(prompt.encode()):08x}"]))


def _one(
    options: AlignOptions, prompt: str | None, progress: Progress | None, domain: Domain
) -> PromptResult:
    folder = prompt_folder(options.out, prompt)
    own = replace(options, prompt=prompt, out=folder)
    found = _finished(own)
    if found is not None:
        return PromptResult(prompt, folder, found)
    try:
        outcome = run(own, progress=progress, domain=domain)
    except AlignmentFailed as failure:
        write_report(failure.outcome)
        raise
    write_report(outcome)
    return PromptResult(prompt, folder, _read(folder / "results.json"), outcome)


def _finished(options: AlignOptions) -> dict[str, Any] | None:
    """The results of an earlier run with these options that came to its end."""
    found = _read(options.out / "results.json")
    whole = found.get("finished") and not found.get("error") and not found.get("failed")
    same = found.get("command") == options.command()
    return found if whole and same and (options.out / "report.html").is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (FileNotFoundError, ValueError):
        return {}


def prepare(folder: Path) -> None:
    """
    Makes the folder of all prompts.

    :param ~pathlib.Path folder: The folder.
    :raises OptionError: If nothing can be written there, or it holds other files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others and not (folder / _INDEX).is_file():
            raise OptionError(
                f"--out {str(folder)!r} holds files that are no prompts' results, such as "
                f"{sorted(others)[0]!r}; choose another folder, or empty this one"
            )
        if not others:
            (folder / _INDEX).write_text('{"prompts": {}}\n', encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OptionError(
            f"--out {str(folder)!r} cannot be written to ({reason}); choose another folder"
        ) from None


# What was found for all


def write_index(options: AlignOptions, done: Sequence[PromptResult], number_of: int) -> Path:
    """
    Writes ``prompts.json``, which names the folder of each prompt, and ``index.html``.

    :param AlignOptions options: The options of all.
    :param done: What has been found.
    :param int number_of: How many prompts there are to be.
    :returns: The page.
    """
    folders = {one.prompt or "": one.folder.name for one in done}
    text = json.dumps({"prompts": folders, "asked": number_of}, indent=2, ensure_ascii=False)
    (options.out / _INDEX).write_text(text + "\n", encoding="utf-8")
    unfinished = (
        f"{len(done)} of {number_of} prompts are finished." if number_of > len(done) else ""
    )
    page = Page(
        title=f"Aligning {options.model}, prompt by prompt",
        lead="Each prompt was run by itself: lambda is its own, and no weight crosses prompts. Its "
        "page with every figure is report.html in its folder.",
        facts=[("model", options.model), ("prompts", str(number_of))],
        sections=[
            *([Section("Means over the prompts", _means(done))] if done else []),
            *(Section(one.prompt or "without a prompt", [*_shown(one)]) for one in done),
        ],
        warning=unfinished,
    )
    path = options.out / "index.html"
    path.write_text(page.to_html(), encoding="utf-8")
    return path


def _means(done: Sequence[PromptResult]) -> list[Any]:
    headings, rows = summary_table(done)
    told = "± is one standard error between prompts."
    return [Table(headings, rows), *([told] if len(done) > 1 else [])]


def summary_table(done: Sequence[PromptResult]) -> tuple[list[str], list[list[str]]]:
    """
    Means over the prompts for each method; calls and seconds are sums.

    :param done: What was found.
    :returns: The headings and the rows.
    """
    names = [one["name"] for one in done[0].results["methods"]]
    found = {name: [_method(one.results, name) for one in done] for name in names}
    figures = {name: [_figures(one) for one in ones] for name, ones in found.items()}
    headings = [
        heading
        for heading in next(iter(figures.values()))[0]
        if any(one[heading] is not None for ones in figures.values() for one in ones)
    ]
    rows = [
        [name, *(_average([one[heading] for one in figures[name]]) for heading in headings)]
        + _costs(found[name])
        for name in names
    ]
    return ["method", *headings, *CALLS], rows


def _figures(method: dict[str, Any]) -> dict[str, Any]:
    """The figures of a method on a prompt, by heading; ``None`` where there is none."""
    [score] = method["scores"]
    return {
        **{f"{name}, mean": value for name, value in score["reward_mean"].items()},
        **{f"{name}, best": value for name, value in score["reward_best"].items()},
        "judge": score["judge"],
        "diversity": score["relative_diversity"],
        "log Z": score["log_normalizer"],
    }


def _costs(found: Sequence[dict[str, Any]]) -> list[str]:
    calls = (sum(one["calls"].get(kind, 0) for one in found) for kind in ("denoiser", "reward"))
    return [*(f"{count:,}" for count in calls), f"{sum(one['seconds'] for one in found):.1f}"]


def _method(results: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in results["methods"] if one["name"] == name)
    return found


def _average(values: Sequence[Any]) -> str:
    """The mean and, of several, its standard error; what is not finite is text in the file."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return number(None)
    mean = sum(known) / len(known)
    if len(known) < 2:
        return number(mean)
    spread = (sum((v - mean) ** 2 for v in known) / (len(known) - 1) / len(known)) ** 0.5
    return f"{number(mean)} ±{number(spread)}"


def _shown(one: PromptResult) -> Iterator[Any]:
    grid = one.folder / "grid.png"
    if grid.is_file():
        yield Figure(
            grid.read_bytes(), f"{one.folder.name}/report.html", f"Samples of {one.prompt}"
        )
    yield "; ".join(f"{r['name']}: lambda = {r['scale']:g}" for r in one.results["rewards"])
