# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""One job for each of several prompts, in a folder that a stopped run goes on with."""

from __future__ import annotations

import json
import re
import shlex
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from pyro_twist.align.domains import Domain, find_domain
from pyro_twist.align.files import options_as_dict
from pyro_twist.align.folder import alone_in, write_whole
from pyro_twist.align.job import AlignmentFailed, Progress, run
from pyro_twist.align.options import AlignOptions, OptionError, word
from pyro_twist.align.outcome import Outcome
from pyro_twist.align.report import write_report
from pyro_twist.align.table import CALLS, number
from pyro_twist.align.userrewards import code_of
from pyro_twist.viz import Code, Page, Section, Table

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
    :param bool fresh: Whether the job was run now; ``False`` if an earlier run had finished it.
    :param Outcome outcome: The job, if it was run now, for ``tell`` only: it holds samples and
        twists, which would not fit into memory for many prompts.
    """

    prompt: str | None
    folder: Path
    results: dict[str, Any]
    fresh: bool = False
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
    was killed goes on where it was: with the prompt that it had not finished. Rewards are the same
    if they have the same name and, for functions, the same code.

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
    if repeated := [one for one in given if given.count(one) > 1]:
        raise OptionError(f"--prompt {repeated[0]!r} is given twice; give each once")
    domain = domain or find_domain(options.model)
    # the usual reward is to be the same whether it was named or not
    options = replace(options, rewards=options.rewards or (domain.default_reward,))
    prepare(options.out)
    index = partial(write_index, options, given)
    done: list[PromptResult] = []
    try:
        for prompt in given:
            result = _one(options, prompt, progress, domain, index)
            if result.fresh:
                index()
            if tell is not None:
                tell(result)
            done.append(replace(result, outcome=None))
    except OptionError:
        _leave(options.out)
        raise
    index()
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
    return out / f"{words or 'prompt'}-{zlib.crc32(prompt.encode()):08x}"


def _one(
    options: AlignOptions,
    prompt: str | None,
    progress: Progress | None,
    domain: Domain,
    begun: Callable[[], Any],
) -> PromptResult:
    folder = prompt_folder(options.out, prompt)
    own = replace(options, prompt=prompt, out=folder)
    found = _read(folder / "results.json")
    if _came_to_its_end(found, folder) and _is_of(own, found):
        return PromptResult(prompt, folder, found)
    with alone_in(folder):
        try:
            outcome = run(own, progress=progress, domain=domain, told_out=options.out, begun=begun)
        except AlignmentFailed as failure:
            write_report(failure.outcome)
            raise
        write_report(outcome)
    return PromptResult(prompt, folder, _read(folder / "results.json"), True, outcome)


def _came_to_its_end(found: dict[str, Any], folder: Path) -> bool:
    whole = found.get("finished") and not found.get("error") and not found.get("failed")
    # the page is written last
    return bool(whole) and (folder / "report.html").is_file()


def _is_of(options: AlignOptions, found: dict[str, Any], *, but: Sequence[str] = ()) -> bool:
    """Whether results are of these options, wherever their folder was, or is now."""
    mine, theirs = options_as_dict(options), dict(found.get("options", {}))
    for name in ("out", *but):
        mine.pop(name)
        theirs.pop(name, None)
    return mine == theirs and found.get("reward_code") == code_of(options.rewards)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
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
            write_whole(folder / _INDEX, '{"prompts": {}}\n')
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OptionError(
            f"--out {str(folder)!r} cannot be written to ({reason}); choose another folder"
        ) from None


def _leave(folder: Path) -> None:
    """Removes the folder again if nothing has come of it."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [_INDEX]:
            (folder / _INDEX).unlink()
            folder.rmdir()


# What was found for all


def write_index(options: AlignOptions, given: Sequence[str | None]) -> Path:
    """
    Writes ``prompts.json``, which names the folder of each prompt, and ``index.html``, of all that
    has been finished in the folder, by this run or others.

    :param AlignOptions options: The options of all.
    :param given: The prompts of this run.
    :returns: The page.
    """
    place = {prompt: number for number, prompt in enumerate(given)}
    found = sorted(_finished(options.out), key=lambda one: place.get(one.prompt, len(place)))
    done = [one for one in found if _is_of(options, one.results, but=["prompt"])]
    # what is of other options and this run is about to replace is not shown
    others = [one for one in found if one not in done and one.prompt not in place]
    folders = {one.prompt or "": one.folder.name for one in (*done, *others)}
    text = json.dumps({"prompts": folders, "asked": len(given)}, indent=2, ensure_ascii=False)
    write_whole(options.out / _INDEX, text + "\n")
    ready = sum(one.prompt in place for one in done)
    unfinished = f"{ready} of {len(given)} prompts are finished." if ready < len(given) else ""
    page = Page(
        title=f"Aligning {options.model}, prompt by prompt",
        lead="Each prompt was run by itself: λ is its own, and no weight crosses prompts. Pictures "
        "lead to the pages of the prompts.",
        facts=_facts(options, len(done)),
        sections=[
            *([Section("Means over the prompts", _means(done))] if done else []),
            *(Section(_named(one), [_Linked(one), _lambdas(one)]) for one in done),
            *(
                [Section("Finished earlier with other options", [*_listed(others)])]
                if others
                else []
            ),
        ],
        warning=unfinished,
        code=_command(options, given),
    )
    return write_whole(options.out / "index.html", page.to_html())


def _finished(out: Path) -> list[PromptResult]:
    """What is finished in the folder."""
    found = [(path.parent, _read(path)) for path in sorted(out.glob("*/results.json"))]
    return [
        PromptResult(results["options"].get("prompt"), folder, results)
        for folder, results in found
        if _came_to_its_end(results, folder)
    ]


def _facts(options: AlignOptions, size: int) -> list[tuple[str, str]]:
    return [
        ("model", options.model),
        ("reward", ", ".join(map(word, options.rewards))),
        ("particles", str(options.particles)),
        ("seed", str(options.seed)),
        ("prompts", str(size)),
    ]


def _command(options: AlignOptions, given: Sequence[str | None]) -> str:
    prompts = [shlex.join(["--prompt", one]) for one in given if one is not None]
    return " ".join([replace(options, prompt=None).command(), *prompts])


def _named(one: PromptResult) -> str:
    return one.prompt or "without a prompt"


def _lambdas(one: PromptResult) -> str:
    return "; ".join(f"{r['name']}: λ = {r['scale']:g}" for r in one.results["rewards"])


def _listed(others: Sequence[PromptResult]) -> Iterator[Any]:
    for one in others:
        yield _Linked(one, pictures=False)
        yield Code(one.results["command"])


@dataclass(frozen=True)
class _Linked:
    """A link to the page of a prompt, and its pictures, which are a file beside that page."""

    one: PromptResult
    pictures: bool = True

    def to_html(self) -> str:
        """The HTML."""
        folder, name = self.one.folder.name, escape(_named(self.one), quote=True)
        link = f'<a href="{folder}/report.html">'
        if not self.pictures:
            return f"<p>{link}{name}</a></p>"
        image = f'<img src="{folder}/grid.png" loading="lazy" alt="Samples of {name}">'
        return f"<figure>{link}{image}</a></figure><p>{link}Every figure</a></p>"


def _means(done: Sequence[PromptResult]) -> list[Any]:
    headings, rows = summary_table(done)
    told = "± is one standard error between prompts."
    return [Table(headings, rows), *([told] if len(done) > 1 else [])]


def summary_table(done: Sequence[PromptResult]) -> tuple[list[str], list[list[str]]]:
    """
    Means over the prompts for each method; calls and seconds are sums.

    :param done: What was found. A method that failed for a prompt is averaged over the others.
    :returns: The headings and the rows.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for one in done:
        for method in one.results["methods"]:
            found.setdefault(method["name"], []).append(method)
    figures = {name: [_figures(one) for one in ones] for name, ones in found.items()}
    every = [one for ones in figures.values() for one in ones]
    headings = list(dict.fromkeys(h for one in every for h in one if one[h] is not None))
    rows = [
        [name, *(_average([one.get(heading) for one in figures[name]]) for heading in headings)]
        + _costs(found[name])
        for name in found
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
