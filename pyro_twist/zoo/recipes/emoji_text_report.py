# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Measures the text-to-image model of the zoo, and writes the figures of its model card::

    python -m pyro_twist.zoo.recipes.emoji_text_report

writes ``report.json`` and ``samples.png`` beside the model and the figures into its
``MODEL_CARD.md``; with ``--out`` all but the card is written elsewhere.

Samples are drawn for names that the model was trained on and for all that were held out. Judge and
scorer put all names in order for each sample; the figures say where its own prompt stands.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_twist import zoo
from pyro_twist.zoo.data import plain_prompt
from pyro_twist.zoo.recipes.emoji_scorer import Compare, place_of, retrieval
from pyro_twist.zoo.recipes.report import (
    file_sizes,
    nearest,
    quantiles,
    training_summary,
    write_card,
)

NAME = "emoji-text"
PARTS = ("training", "held_out")
_TITLES = ("trained on", "held out")
# What samples.png shows: names of the training, held-out names, and names of no emoji.
SHOWN = {
    "trained on": (
        "red apple",
        "tiger face",
        "slice of pizza",
        "green heart",
        "airplane",
        "cactus",
        "snowman",
        "octopus",
        "italy flag",
        "japan flag",
        "smiling face with sunglasses",
        "guitar",
    ),
    "held out": (
        "fire",
        "hamburger",
        "purple heart",
        "palm tree",
        "crying face",
        "switzerland flag",
    ),
    "of no emoji": (
        "blue apple",
        "pink elephant",
        "yellow tiger face",
        "red car",
        "purple umbrella",
        "green face",
    ),
}


class Readers:
    """
    Judge and scorer, with the names that both put in order.

    :param zoo.Images pictures: All pictures, one of each emoji.
    """

    def __init__(self, pictures: zoo.Images) -> None:
        judge, scorer = zoo.judge(NAME), zoo.scorer(NAME, "")
        self.names, self.pictures = judge.names, pictures
        self.compare: dict[str, Compare] = {"judge": judge.logits, "scorer": scorer.logits}

    def read(self, images: Tensor, prompts: Sequence[str]) -> dict[str, dict[str, float]]:
        """
        Where the prompts of images stand among all names.

        :param torch.Tensor images: In ``[0, 1]``, of shape ``(number, 3, 16, 16)``.
        :param prompts: One for each image.
        """
        right = torch.tensor([self.names.index(prompt) for prompt in prompts])
        with torch.no_grad():
            orders = {who: compare(images, self.names) for who, compare in self.compare.items()}
        return {who: retrieval(place_of(order, right)) for who, order in orders.items()}

    def ceiling(self, prompts: Sequence[str]) -> dict[str, dict[str, float]]:
        """The same for the pictures of the data that have these names."""
        named = [plain_prompt(name) for name in self.pictures.names]
        index = torch.tensor([named.index(prompt) for prompt in prompts])
        return self.read(self.pictures.unit[index], prompts)


@torch.no_grad()
def draw(
    prompts: Sequence[str],
    number: int,
    options: argparse.Namespace,
    scale: float,
    steps: int | None = None,
) -> Tensor:
    """
    Samples of prompts in ``[0, 1]``.

    :returns: Of shape ``(number, prompts, 3, 16, 16)``.
    """
    pyro.set_rng_seed(options.seed)
    model = zoo.load(
        NAME,
        prompt=list(prompts),
        guidance_scale=scale,
        num_inference_steps=steps or options.num_inference_steps,
        scheduler=options.scheduler,
        chunk_size=128,
        decode_chunk_size=128,
    )
    with pyro.plate("samples", number, dim=-2):
        return model.decode(model())


def chosen_names(options: argparse.Namespace) -> dict[str, list[str]]:
    """Names of the training, drawn at random, and the held-out ones."""
    generator = torch.Generator().manual_seed(options.seed)
    found = {}
    for part, most in zip(PARTS, (options.training_names, options.held_out_names), strict=True):
        shown = zoo.images(NAME, held_out=part == "held_out").names
        names = sorted({plain_prompt(name) for name in shown})
        keep = torch.randperm(len(names), generator=generator)[:most]
        found[part] = [names[i] for i in keep.tolist()]
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """
    Draws samples and has them read; writes the picture grid.

    :param options: The parsed options of this script.
    :returns: What ``report.json`` holds.
    """
    about, start = zoo.entry(NAME), time.time()
    training = zoo.images(NAME)
    readers = Readers(zoo.images(NAME, held_out=None).one_per_subject())
    chosen, number = chosen_names(options), len(readers.names)
    scale = options.guidance_scale or about.guidance_scale
    report: dict[str, Any] = {
        "model": NAME,
        "parameters": _num_parameters(about.folder),
        "steps": options.num_inference_steps,
        "scale_steps": options.scale_steps,
        "scheduler": options.scheduler,
        "guidance_scale": scale,
        "samples_per_name": options.samples,
        "names": number,
        "chance": {"top1": 1 / number, "top5": 5 / number, "median_rank": (number + 1) / 2},
        "accuracy": {who: _accuracy(about.folder / who) for who in readers.compare},
    }
    for part, names in chosen.items():
        samples = draw(names, options.samples, options, scale).flatten(0, 1)
        distance, _ = nearest(samples, training.unit, mirror=True)
        report[part] = {
            "samples": readers.read(samples, names * options.samples),
            "pictures": readers.ceiling(names),
            "distance": quantiles(distance),
        }
        _say(part, report[part]["samples"], start)
    held_out = zoo.images(NAME, held_out=True).one_per_subject()
    report["distance_held_out_pictures"] = quantiles(
        nearest(held_out.unit, training.unit, mirror=True)[0]
    )
    report["guidance"] = {}
    names = chosen["training"][: options.scale_names]
    for other in options.scales:
        samples = draw(names, 1, options, other, options.scale_steps).flatten(0, 1)
        report["guidance"][str(other)] = readers.read(samples, names)
        _say(f"guidance {other:g}", report["guidance"][str(other)], start)
    save_samples(options.out / "samples.png", options, scale)
    report["training_log"] = training_summary(about.folder)
    report["minutes"] = round((time.time() - start) / 60.0, 1)
    return report


def save_samples(path: Path, options: argparse.Namespace, scale: float) -> None:
    """Writes two samples of each prompt of ``SHOWN``, with the prompts above them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [(kind, prompt) for kind, prompts in SHOWN.items() for prompt in prompts]
    pairs = draw([prompt for _, prompt in groups], 2, options, scale)
    white = torch.ones(len(groups), 3, 16, 1)
    pictures = torch.cat([pairs[0], white, pairs[1]], -1).permute(0, 2, 3, 1)
    figure, axes = pyplot.subplots(4, 6, figsize=(11.0, 5.2), layout="constrained")
    for axis, picture, (kind, prompt) in zip(axes.flat, pictures, groups, strict=True):
        axis.imshow(picture.numpy(), interpolation="nearest")
        axis.set_title(f"{prompt}\n({kind})", fontsize=7)
        axis.set_axis_off()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def figures(report: dict[str, Any]) -> str:
    """The figures of a report in Markdown."""
    lines = [_of_training(report), "", _intro(report), "", *_table(report), ""]
    lines += _guidance(report)
    return "\n".join([*lines, "", *_distances(report), "", *_accuracies(report)])


def _of_training(report: dict[str, Any]) -> str:
    training, sizes = report["training_log"], report["parameters"]
    loss = ", ".join(f"{step}: {value:.3f}" for step, value in training["loss"].items())
    parts = ", ".join(f"{number:,} {part}" for part, number in sizes.items())
    return (
        f"Parameters: {parts}. {training['steps']:,} training steps in {training['hours']} h; loss "
        f"by step: {loss}."
    )


def _intro(report: dict[str, Any]) -> str:
    return (
        f"Share of samples whose own prompt comes first, or among the first five, of all "
        f"{report['names']:,} names, and its median place ({report['samples_per_name']} a name, "
        f"{report['steps']} {report['scheduler'].upper()} steps, guidance "
        f"{report['guidance_scale']:g}), and the same for the pictures of the data with these "
        "names:"
    )


def _table(report: dict[str, Any]) -> list[str]:
    lines = ["| names | of | number | read by | first | first five | median place |"]
    lines.append("| --- | --- | ---: | --- | ---: | ---: | ---: |")
    for part, title in zip(PARTS, _TITLES, strict=True):
        for kind in ("samples", "pictures"):
            for who, found in report[part][kind].items():
                lines.append(
                    f"| {title} | {kind} | {found['pictures']} | {who} | {found['top1']:.2f} | "
                    f"{found['top5']:.2f} | {found['median_rank']:g} |"
                )
    chance = report["chance"]
    last = f"{chance['top1']:.4f} | {chance['top5']:.4f} | {chance['median_rank']:g}"
    return [*lines, f"| any | chance |  |  | {last} |"]


def _guidance(report: dict[str, Any]) -> list[str]:
    lines = [
        f"The same by guidance, for fewer names that were trained on, one sample each, "
        f"{report['scale_steps']} steps:",
        "",
        "| guidance | number | read by | first | first five | median place |",
        "| ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for scale, readings in report["guidance"].items():
        for who, found in readings.items():
            lines.append(
                f"| {float(scale):g} | {found['pictures']} | {who} | {found['top1']:.2f} | "
                f"{found['top5']:.2f} | {found['median_rank']:g} |"
            )
    return lines


def _distances(report: dict[str, Any]) -> list[str]:
    rows = {
        "samples, names trained on": report["training"]["distance"],
        "samples, names held out": report["held_out"]["distance"],
        "held-out pictures": report["distance_held_out_pictures"],
    }
    levels = list(report["distance_held_out_pictures"])
    lines = [
        "Distance to the nearest training picture, shifts by half a pixel included (root mean "
        "squared difference of colour values in [0, 1]; quantiles):",
        "",
        "| what | " + " | ".join(levels) + " |",
        "| --- |" + " ---: |" * len(levels),
    ]
    for what, found in rows.items():
        lines.append(f"| {what} | " + " | ".join(f"{x:.3f}" for x in found.values()) + " |")
    return lines


def _accuracies(report: dict[str, Any]) -> list[str]:
    lines = [
        "Share of pictures of the data, drawn with other shifts than in training, whose name comes "
        "first of all, or among the first five (from `accuracy.json` of both; the judge was "
        "trained on the held-out names too):",
        "",
        "| read by | names | pictures | first | first five | median place |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for who, found in report["accuracy"].items():
        for part, title in zip(PARTS, _TITLES, strict=True):
            for kind, called in (("pictures", "sharp"), ("look_aheads", "blurred, noisy, faded")):
                shares = found[f"{part}_{kind}"]
                lines.append(
                    f"| {who} | {title} | {called} | {shares['top1']:.2f} | {shares['top5']:.2f} "
                    f"| {shares['median_rank']:g} |"
                )
    return lines


def _accuracy(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "accuracy.json").read_text())
    return found


def _num_parameters(folder: Path) -> dict[str, int]:
    from safetensors.torch import load_file

    found = {}
    for part in ("unet", "text_encoder", "vae"):
        (path,) = (folder / part).glob("*.safetensors")
        found[part.replace("_", " ")] = sum(w.numel() for w in load_file(path).values())
    return found


def _say(what: str, found: dict[str, Any], start: float) -> None:
    print(what, json.dumps(found), f"{time.time() - start:.0f} s", flush=True)


def main() -> None:
    """Measures, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for what is written")
    parser.add_argument("--samples", type=int, default=1, help="of each name")
    parser.add_argument("--training-names", type=int, default=180, help="names trained on")
    parser.add_argument("--held-out-names", type=int, default=200, help="at most so many")
    parser.add_argument("--guidance-scale", type=float, help="the model's own by default")
    parser.add_argument("--scales", type=float, nargs="*", default=[1.0, 2.0, 4.0, 7.0])
    parser.add_argument("--scale-names", type=int, default=40, help="names for the scales")
    parser.add_argument("--scale-steps", type=int, default=25, help="steps for the scales")
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--scheduler", choices=("ddpm", "ddim"), default="ddpm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shipped = options.out is None
    options.out = options.out or zoo.entry(NAME).folder
    options.out.mkdir(parents=True, exist_ok=True)
    report = measure(options)
    text = figures(report)
    print(text)
    if shipped:
        write_card(options.out / "MODEL_CARD.md", text)
    report["files"] = file_sizes(zoo.entry(NAME).folder)
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
