# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Measures a model of the zoo, finished or in training, and writes the figures of its model card::

    python -m pyro_twist.zoo.recipes.report emoji
    python -m pyro_twist.zoo.recipes.report emoji --checkpoint work/state.pt --out progress

The first writes ``report.json``, ``samples.png`` and ``neighbours.png`` beside the model and the
figures into its ``MODEL_CARD.md``; the second leaves the package alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyro
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pyro_twist import zoo
from pyro_twist.zoo.recipes import digits, emoji

ZOO = Path(__file__).parents[1]
START, END = "<!-- figures -->", "<!-- end of figures -->"
RECIPES: dict[str, tuple[Callable[[int], UNet2DModel], Callable[[], DDPMScheduler]]] = {
    "digits": (lambda size: digits.make_model(), digits.make_scheduler),
    "emoji": (emoji.make_model, emoji.make_scheduler),
}


def export_checkpoint(name: str, checkpoint: Path, folder: Path) -> None:
    """
    Lays out an unfinished training as the zoo lays out a finished one.

    :param str name: The model.
    :param ~pathlib.Path checkpoint: The ``state.pt`` of a training; its averaged weights are taken.
    :param ~pathlib.Path folder: Where to write.
    """
    make_model, make_scheduler = RECIPES[name]
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
    model = make_model(zoo.entry(name).event_shape[-1])
    average = EMAModel(model.parameters())
    average.load_state_dict(saved["ema"])
    average.copy_to(model.parameters())
    model.half().save_pretrained(folder / "unet", safe_serialization=True)
    make_scheduler().save_pretrained(folder / "scheduler")
    shutil.copy(ZOO / name / "info.json", folder / "info.json")
    log = checkpoint.with_name("log.jsonl")
    if log.exists():
        shutil.copy(log, folder / "training_log.jsonl")


@torch.no_grad()
def draw(folder: Path, number: int, options: argparse.Namespace, guidance_scale: float) -> Tensor:
    """Samples of every class in ``[0, 1]``, of shape ``(number, number of classes, ...)``."""
    pyro.set_rng_seed(options.seed)
    model = zoo.load_folder(
        folder,
        range(len(zoo.entry(options.name).classes)),
        guidance_scale=guidance_scale,
        num_inference_steps=options.num_inference_steps,
        scheduler=options.scheduler,
        chunk_size=128,
    )
    with pyro.plate("samples", number, dim=-2):
        return model.decode(model())


@torch.no_grad()
def recognised(classifier: zoo.Classifier, samples: Tensor) -> list[float]:
    """For each class, the share of its samples, of shape ``(number, classes, ...)``, recognised."""
    classes = torch.arange(samples.shape[1])
    guess = classifier(samples.flatten(0, 1)).argmax(1).reshape(samples.shape[:2])
    return [round(share, 3) for share in (guess == classes).double().mean(0).tolist()]


def accuracy(classifier: zoo.Classifier, images: zoo.Images) -> list[float]:
    """For each class, the share of its pictures recognised."""
    with torch.no_grad():
        right = (classifier(images.unit).argmax(1) == images.labels).double()
    shares = [float(right[images.labels == k].mean()) for k in range(len(images.classes))]
    return [round(share, 3) for share in shares]


def moved_copies(images: Tensor, mirror: bool) -> Tensor:
    """The pictures shifted by half a pixel each way and mirrored, as the training saw them."""
    copies = []
    for shown in (images, images.flip(-1)) if mirror else (images,):
        padded = functional.pad(shown, (1, 1, 1, 1), mode="replicate")
        for dx in (-0.5, 0.0, 0.5):
            for dy in (-0.5, 0.0, 0.5):
                copies.append(_shift(padded, dx, dy))
    return torch.cat(copies)


def _shift(padded: Tensor, dx: float, dy: float) -> Tensor:
    """Bilinear shift by at most one pixel of pictures with a border of one."""
    for dim, by in ((-1, dx), (-2, dy)):
        length = padded.shape[dim] - 2
        here, there = padded.narrow(dim, 1, length), padded.narrow(dim, 2 if by > 0 else 0, length)
        padded = torch.lerp(here, there, abs(by))
    return padded


def nearest(pictures: Tensor, training: Tensor, mirror: bool) -> tuple[Tensor, Tensor]:
    """
    The root mean squared distance per colour value to the nearest training picture.

    :param torch.Tensor pictures: In ``[0, 1]``, of shape ``(number, channels, height, width)``.
    :param torch.Tensor training: Likewise.
    :param bool mirror: Whether mirror images were trained on.
    :returns: Distances, and which training picture it is, both of shape ``(number,)``.
    """
    copies = moved_copies(training, mirror).flatten(1)
    flat = pictures.flatten(1)
    best, which = zip(*(torch.cdist(row, copies).min(1) for row in flat.split(64)), strict=True)
    return torch.cat(best) / flat.shape[1] ** 0.5, torch.cat(which) % len(training)


def quantiles(values: Tensor) -> dict[str, float]:
    """The 1 %, 5 %, 25 %, 50 % and 75 % quantiles."""
    levels = (0.01, 0.05, 0.25, 0.5, 0.75)
    found = torch.quantile(values.double(), torch.tensor(levels).double()).tolist()
    return {f"{level:.0%}": round(value, 4) for level, value in zip(levels, found, strict=True)}


def save_grid(rows: Tensor, path: Path, scale: int) -> None:
    """
    Writes a picture grid, each pixel enlarged to a square.

    :param torch.Tensor rows: In ``[0, 1]``, of shape ``(rows, columns, channels, height, width)``.
    :param int scale: Pixels a side of an enlarged pixel.
    """
    framed = functional.pad(rows.expand(-1, -1, 3, -1, -1), (1, 1, 1, 1), value=0.85)
    grid = framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    pixels = (grid * 255.0).round().byte().numpy()
    size = (pixels.shape[1] * scale, pixels.shape[0] * scale)
    Image.fromarray(pixels).quantize(255).resize(size, Image.Resampling.NEAREST).save(path)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a model."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def training_summary(folder: Path) -> dict[str, Any]:
    """The last line of the training log and the loss at a few points of it."""
    path = folder / "training_log.jsonl"
    if not path.exists():
        return {}
    log = [json.loads(line) for line in path.read_text().splitlines()]
    points = sorted({round(i * (len(log) - 1) / 5) for i in range(6)})
    return {
        "steps": log[-1]["step"],
        "hours": round(log[-1]["seconds"] / 3600.0, 2),
        "loss": {str(log[i]["step"]): log[i]["loss"] for i in points},
    }


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """
    Draws samples and compares them with the data; writes the picture grids.

    :param ~pathlib.Path folder: The model's files.
    :param options: The parsed options of this script.
    :returns: What ``report.json`` holds.
    """
    name, about, start = options.name, zoo.entry(options.name), time.time()
    training, held_out = zoo.images(name), zoo.images(name, held_out=True).one_per_subject()
    judge, classifier = zoo.judge(name), zoo.classifier(name)
    judged = accuracy(judge, held_out)
    report: dict[str, Any] = {
        "model": name,
        "parameters": _num_parameters(folder),
        "steps": options.num_inference_steps,
        "scheduler": options.scheduler,
        "samples_per_class": options.samples,
        "held_out": {
            "pictures": len(held_out),
            "judge": judged,
            "judge_mean": _mean(judged),
            "classifier_mean": _mean(accuracy(classifier, held_out)),
        },
        "guidance": {},
        "training": training_summary(folder),
    }
    distance, _ = nearest(held_out.unit, training.unit, options.mirror)
    report["distance_held_out"] = quantiles(distance)
    report["diversity_data"] = round(_diversity(_by_class(training.one_per_subject())), 4)
    near = torch.quantile(distance, 0.05)
    for scale in options.scales:
        samples = draw(folder, options.samples, options, scale)
        shares = recognised(judge, samples)
        apart, which = nearest(samples.flatten(0, 1), training.unit, options.mirror)
        report["guidance"][f"{scale:g}"] = {
            "judge": shares,
            "judge_mean": _mean(shares),
            "judge_relative": round(_mean(shares) / _mean(judged), 3),
            "classifier_mean": _mean(recognised(classifier, samples)),
            "distance": quantiles(apart),
            "nearer_than_5%_of_held_out": round(float((apart < near).double().mean()), 3),
            "diversity": round(_diversity(samples.unbind(1)), 4),
        }
        print(f"guidance {scale:g}", report["guidance"][f"{scale:g}"], flush=True)
        shown = samples[: options.columns].transpose(0, 1)
        if options.checkpoint:
            save_grid(shown, options.out / f"samples_{scale:g}.png", options.enlarge)
        if scale == about.guidance_scale:
            save_grid(shown, options.out / "samples.png", options.enlarge)
            found = training.unit[which.reshape(samples.shape[:2])][: options.columns // 2]
            pairs = torch.stack([samples[: options.columns // 2], found], 1).flatten(0, 1)
            save_grid(pairs.transpose(0, 1), options.out / "neighbours.png", options.enlarge)
    report["minutes"] = round((time.time() - start) / 60.0, 1)
    return report


def _num_parameters(folder: Path) -> int:
    from safetensors.torch import load_file

    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return sum(weight.numel() for weight in weights.values())


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 3)


def _by_class(images: zoo.Images) -> list[Tensor]:
    return [images.unit[images.labels == k] for k in range(len(images.classes))]


def _diversity(of_class: Iterable[Tensor]) -> float:
    """Root mean squared distance of two pictures of a class, classes weighted evenly."""
    squared = [torch.pdist(one.flatten(1)).square().mean() / one[0].numel() for one in of_class]
    return float(torch.stack(squared).mean().sqrt())


def figures(report: dict[str, Any], classes: tuple[str, ...]) -> str:
    """The figures of a report in Markdown."""
    held_out = report["held_out"]
    rows = [("held-out pictures", held_out["judge"], held_out["judge_mean"])]
    for scale, found in report["guidance"].items():
        rows.append((f"samples, guidance {scale}", found["judge"], found["judge_mean"]))
    judged = ["| what | " + " | ".join(classes) + " | mean |"]
    judged.append("| --- |" + " ---: |" * (len(classes) + 1))
    for what, shares, mean in rows:
        judged.append(f"| {what} | " + " | ".join(f"{x:.2f}" for x in (*shares, mean)) + " |")
    levels = list(report["distance_held_out"])
    apart = ["| what | " + " | ".join(levels) + " | nearer than 5 % of held-out | diversity |"]
    apart.append("| --- |" + " ---: |" * (len(levels) + 2))
    line = " | ".join(f"{x:.3f}" for x in report["distance_held_out"].values())
    spread = report["diversity_data"]
    apart.append(f"| held-out pictures | {line} | 0.050 | {spread:.3f} |")
    for scale, found in report["guidance"].items():
        line = " | ".join(f"{x:.3f}" for x in found["distance"].values())
        near, spread = found["nearer_than_5%_of_held_out"], found["diversity"]
        apart.append(f"| samples, guidance {scale} | {line} | {near:.3f} | {spread:.3f} |")
    training = report["training"]
    loss = ", ".join(f"{step}: {value:.3f}" for step, value in training["loss"].items())
    return "\n".join(
        [
            f"{report['parameters']:,} parameters. {training['steps']:,} training steps in "
            f"{training['hours']} h; loss by step: {loss}.",
            "",
            f"Share recognised by the judge ({report['samples_per_class']} samples a class, "
            f"{report['steps']} {report['scheduler'].upper()} steps; {held_out['pictures']} "
            "held-out pictures):",
            "",
            *judged,
            "",
            "Distance to the nearest training picture, shifts by half a pixel included (root mean "
            "squared difference of colour values in [0, 1]; quantiles), and diversity, the "
            "distance of two samples of a class (first row: of two training pictures):",
            "",
            *apart,
        ]
    )


def write_card(path: Path, text: str) -> None:
    """Replaces what stands between the two marks of a model card."""
    card = path.read_text(encoding="utf-8")
    before, rest = card.split(START)
    _, after = rest.split(END)
    path.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Measures, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--checkpoint", type=Path, help="an unfinished training's state.pt")
    parser.add_argument("--out", type=Path, help="folder for what is written")
    parser.add_argument("--samples", type=int, default=32, help="per class")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--scheduler", choices=("ddpm", "ddim"), default="ddpm")
    parser.add_argument("--columns", type=int, default=16, help="samples of a class in the grid")
    parser.add_argument("--enlarge", type=int, default=3, help="pixels a side of a pixel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.mirror = options.name == "emoji"
    shipped = options.checkpoint is None
    if options.out is None and not shipped:
        parser.error("--checkpoint needs --out")
    options.out = options.out or ZOO / options.name
    options.out.mkdir(parents=True, exist_ok=True)
    folder = ZOO / options.name if shipped else options.out / "model"
    if not shipped:
        export_checkpoint(options.name, options.checkpoint, folder)
    report = measure(folder, options)
    text = figures(report, zoo.entry(options.name).classes)
    print(text)
    if shipped and options.out == ZOO / options.name:
        write_card(folder / "MODEL_CARD.md", text)
    report["files"] = file_sizes(folder)
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
