# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What the methods that learn a twist have learned: its pictures, its words and its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_twist.align.options import AlignOptions, word
from pyro_twist.align.outcome import Arm, Outcome
from pyro_twist.align.table import number
from pyro_twist.infer import default_twist
from pyro_twist.infer.plots import plot_iterations
from pyro_twist.twists.summary import Curve, Direction, Panel, Ranking
from pyro_twist.viz import (
    Code,
    Figure,
    Section,
    StepSeries,
    Table,
    plot_series,
)
from pyro_twist.viz.page import png_bytes

__all__ = [
    "KINDS",
    "learned_pictures",
    "learned_section",
    "reuse_code",
    "save_twist",
    "told_of",
    "twist_file",
]

_OF_THE_MODEL = (
    "classes",
    "guidance",
    "steps",
    "scheduler",
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "lookahead_decoder",
    "chunk_size",
    "device",
    "dtype",
)

#: The pictures that there may be; a file's name is that and the method's.
KINDS = ("push", "twist", "iterations")

Part = str | Code | Table | Figure

_ABOUT = (
    "A twist is what a sampler knows about where its samples are going. {title} learns it from the "
    "paths drawn so far, while a pass goes on and after each pass but the last: where to push "
    "them, and how far to trust an early look at the reward. The model is "
    "not retrained, no gradient of the reward is needed, and whatever is learned, the weights make "
    "up for it: a bad twist makes the estimates noisier, not wrong."
)
_COLUMNS = {
    "pass": "The pass that was learned from. The last is not, nor are those after learning ended.",
    "tau": "How far towards the target the fit went from this pass, as a power of the weights of "
    "its paths: 1 is all the way, less is as far as the trust region allows.",
    "KL": "How far that is from the law the pass was drawn from, in nats.",
    "eta": "How much of the whole way to the target is made after the fit, from 0 to 1.",
    "ESS": "Final effective sample size of the pass, as a share of its particles.",
    "path ESS": "The same if whole paths are weighted, as if nothing had been resampled.",
    "log Z": "The estimate of the pass alone.",
    "accepted step": "The share of the fitted correction that is made, the one that most raises "
    "the likelihood of paths left out of the fit; 0: none did, and nothing is corrected.",
}
_FIELDS = {"log Z": "log_normalizer", "accepted step": "step"}


def panels(arm: Arm) -> list[Panel]:
    """What the arm's twist says of itself, at the mean sample of each class."""
    return list(arm.twist.summary(_mean_samples(arm)))


def _mean_samples(arm: Arm) -> Tensor | None:
    x = arm.result.state.get("x")
    if x is None or not x.is_floating_point():
        return None
    return x.reshape(arm.weights.shape + x.shape[arm.result.log_weights.dim() :]).mean(0)


# pictures


def learned_pictures(arm: Arm, outcome: Outcome) -> dict[str, Figure]:
    """
    Pictures of what a method has learned; without matplotlib only those of directions.

    :param Arm arm: The method's run.
    :param Outcome outcome: The job.
    :returns: By file name without ending, those of :data:`KINDS` that there are.
    """
    found, model = panels(arm), arm.twist.model
    shown = [p for p in found if isinstance(p, Direction) and _of_images(model, p)]
    pictures = {}
    if shown:
        from pyro_twist.align.push import push_picture

        pictures["push"] = push_picture(model, outcome, shown)
    try:
        pictures |= _plots(arm, [panel for panel in found if isinstance(panel, Curve)])
    except ImportError:
        pass
    return {f"{kind}-{arm.method.name}": figure for kind, figure in pictures.items()}


def told_of(panel: Panel) -> str:
    """The words of a panel."""
    return f"{panel.title}. {panel.text}"


def _of_images(model: Any, panel: Direction) -> bool:
    decoded = model.decode(panel.at) if hasattr(model, "decode") else panel.at
    return isinstance(decoded, Tensor) and decoded.dim() == 4 and decoded.shape[1] in (1, 3)


def _plots(arm: Arm, curves: list[Curve]) -> dict[str, Figure]:
    plots = {}
    if curves:
        series = [StepSeries(c.title, c.steps, c.values, c.label, c.reference) for c in curves]
        last = None if arm.last.diagnostics is None else len(arm.last.diagnostics.ess) - 1
        text = " ".join(map(told_of, curves))
        plots["twist"] = Figure(png_bytes(plot_series(series, last=last)), text)
    if arm.iterations:
        drawn = plot_iterations(arm.iterations)
        plots["iterations"] = Figure(png_bytes(drawn), alt="The passes that were learned from")
    return plots


# the page


def learned_section(arm: Arm, outcome: Outcome, pictures: Mapping[str, Figure]) -> Section:
    """
    What to write about it.

    :param Arm arm: The method's run.
    :param Outcome outcome: The job.
    :param dict pictures: Those of :func:`learned_pictures`, perhaps among others.
    """
    words: list[Part] = []
    for panel in panels(arm):
        if not _is_drawn(panel, arm.twist.model):
            words += [told_of(panel), *_listed(panel)]
    names = [f"{kind}-{arm.method.name}" for kind in KINDS]
    shown = [pictures[name] for name in names if name in pictures]
    parts: list[Part] = [_ABOUT.format(title=arm.method.title), *words, *shown]
    parts += [_iterations_table(arm)] if arm.iterations else []
    parts += _reuse(arm, outcome)
    return Section(f"What {arm.method.title} has learned", parts)


def _listed(panel: Panel) -> list[Part]:
    """The table of a panel that has one."""
    if not isinstance(panel, Ranking):
        return []
    rows = [[name, number(value)] for name, value in zip(panel.names, panel.values, strict=True)]
    return [Table([panel.kind, panel.label], rows)]


def _is_drawn(panel: Panel, model: Any) -> bool:
    """Whether the words are below a picture."""
    return isinstance(panel, Curve) or (isinstance(panel, Direction) and _of_images(model, panel))


def _iterations_table(arm: Arm) -> Table:
    names = [_FIELDS.get(name, name.lower().replace(" ", "_")) for name in list(_COLUMNS)[1:]]
    rows = [
        [str(place), *(number(float(getattr(one, name))) for name in names)]
        for place, one in enumerate(arm.iterations, 1)
    ]
    return Table(list(_COLUMNS), rows, list(_COLUMNS.values()))


def _reuse(arm: Arm, outcome: Outcome) -> Iterator[Part]:
    file = twist_file(arm, outcome)
    if file is None:
        return
    fits = (
        "it fits the model, the classes, the rewards and the number of steps that it was learned "
        "with."
    )
    if _is_default(arm.twist):
        yield (
            f"The twist is saved in {file.name}. These lines draw new samples with it, as many as "
            f"wanted, and spend nothing on learning; {fits}"
        )
        yield Code(reuse_code(arm, outcome))
    else:
        yield f"The twist is saved in {file.name}, for the load method of one of its kind; {fits}"


def _is_default(twist: Any) -> bool:
    usual = default_twist(twist.model).state_dict()
    return usual.keys() == twist.state_dict().keys()


# the file


def twist_file(arm: Arm, outcome: Outcome) -> Path | None:
    """
    Where the twist of a method belongs.

    :param Arm arm: The method's run.
    :param Outcome outcome: The job.
    :returns: ``twist.safetensors`` for the first method that learns, with the method's name for
        others; ``None`` if nothing was learned.
    """
    if not arm.has_learned or not arm.twist.state_dict():
        return None
    first = next((one.method.name for one in outcome.arms if one.has_learned), arm.method.name)
    name = "twist" if arm.method.name == first else f"twist-{arm.method.name}"
    return outcome.options.out / f"{name}.safetensors"


def save_twist(arm: Arm, outcome: Outcome) -> Path | None:
    """
    Writes the twist of a method, if it has learned one.

    :param Arm arm: The method's run.
    :param Outcome outcome: The job.
    :returns: The file.
    """
    file = twist_file(arm, outcome)
    if file is not None:
        arm.twist.save(file)
    return file


def reuse_code(arm: Arm, outcome: Outcome) -> str:
    """
    Lines of Python that draw samples with the twist that was saved.

    :param Arm arm: The method's run.
    :param Outcome outcome: The job.
    :returns: The lines; they make the twist as :func:`~pyro_twist.infer.default_twist` does.
    """
    plate = ', max_plate_nesting=1, population_plate="classes"' if len(outcome.labels) > 1 else ""
    options = ",\n".join(f"    {name}={value!r}" for name, value in _options(outcome))
    return _CODE.format(options=options, file=str(twist_file(arm, outcome)), plate=plate)


_CODE = """\
from pyro_twist import TwistedSMC, align
from pyro_twist.infer import default_twist

options = align.AlignOptions(
{options},
)
model = align.tilted_model(options)
twist = default_twist(model).load({file!r})
result = TwistedSMC(model, twist, num_particles=64{plate}).run()
samples = model.decode(result.resample().state["x"])
"""


def _options(outcome: Outcome) -> Iterator[tuple[str, Any]]:
    given, usual = outcome.options, AlignOptions()
    yield "model", given.model
    yield "rewards", tuple(map(word, given.rewards))
    yield "scales", tuple(strength.scale for strength in outcome.strengths)
    for name in _OF_THE_MODEL:
        if getattr(given, name) != getattr(usual, name):
            yield name, getattr(given, name)
