# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Trains the classifier (for rewards) and the judge (for measuring) of a model of the zoo::

    npm pack emoji-datasource-google@16.0.0
    python -m pyro_twist.zoo.recipes.pictures digits emoji \\
        --data emoji-datasource-google-16.0.0.tgz
    python -m pyro_twist.zoo.recipes.classifiers digits emoji --threads 1 \\
        --data emoji-datasource-google-16.0.0.tgz

Neither sees a held-out picture; the accuracy of the saved files on those, as they ship in
``images.npz``, is printed and written to their ``accuracy.json``.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from pyro_twist import zoo
from pyro_twist.zoo.classifiers import (
    Classifier,
    ConvClassifier,
    KernelClassifier,
    descriptors,
    load_classifier,
)
from pyro_twist.zoo.recipes import digits, emoji_data

ZOO = Path(__file__).parents[1]
KERNEL = {"digits": dict(views=4, num_components=100, num_landmarks=600), "emoji": dict(views=10)}
PARTS = ("classifier", "judge")


@dataclass(frozen=True)
class Task:
    """
    What to learn.

    :param torch.Tensor sources: Training pictures in ``[0, 1]``, of a multiple of ``size`` a side.
    :param torch.Tensor labels: Their classes.
    :param torch.Tensor weights: Their sampling weights.
    :param torch.Tensor first: The first picture of each subject.
    :param torch.Tensor mirror: Whether a mirror image of a picture is as good.
    :param tuple classes: The names of the classes.
    :param int size: Pixels a side of what is classified.
    :param float ground: The colour around the picture.
    """

    sources: Tensor
    labels: Tensor
    weights: Tensor
    first: Tensor
    mirror: Tensor
    classes: tuple[str, ...]
    size: int
    ground: float

    @property
    def channels(self) -> int:
        """Colour channels of a picture."""
        return self.sources.shape[1]


def digit_task() -> Task:
    """The digits of scikit-learn."""
    images, labels, out = digits.load_digits()
    number = int((~out).sum())
    return Task(
        images[~out],
        labels[~out],
        torch.ones(number).double(),
        torch.ones(number, dtype=torch.bool),
        torch.zeros(number, dtype=torch.bool),
        tuple(str(digit) for digit in range(10)),
        size=8,
        ground=0.0,
    )


def emoji_task(archive: Path, size: int = 16) -> Task:
    """The emoji of the npm archive; classes are drawn evenly, variants share one emoji's part."""
    data = emoji_data.load_archive(archive)
    first = torch.cat([torch.ones(1).bool(), data.emoji[1:] != data.emoji[:-1]])
    first = first[~data.held_out]
    data = data.subset(~data.held_out)
    _, subject, variants = torch.unique(data.emoji, return_inverse=True, return_counts=True)
    share = 1.0 / variants[subject].double()
    sizes = torch.zeros(len(emoji_data.GROUPS)).double().index_add_(0, data.labels, share)
    return Task(
        data.images / 255.0,
        data.labels,
        share / sizes[data.labels],
        first,
        data.labels != emoji_data.GROUPS.index("Flags"),
        emoji_data.GROUPS,
        size=size,
        ground=1.0,
    )


def distort(task: Task, index: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """
    Training pictures mirrored, turned, stretched and shifted, with colours and noise changed.

    :param torch.Tensor index: Which pictures, of shape ``(batch,)``.
    :param float strength: Size of the changes.
    :returns: In ``[0, 1]``, of shape ``(batch, channels, size, size)``.
    """
    number = len(index)
    mirror = (torch.rand(number, generator=generator) < 0.5) & task.mirror[index]
    sign = torch.where(mirror, -1.0, 1.0)
    angle, wide, narrow, dx, dy = strength * (torch.rand(5, number, generator=generator) * 2 - 1)
    angle = angle * math.radians(15.0) * torch.where(task.mirror[index], 1.0, 0.3)
    sx = torch.exp(0.15 * wide)
    sy = sx * torch.exp(0.07 * narrow)
    rows = [sign * sx * angle.cos(), -sx * angle.sin(), 0.1 * dx]
    rows += [sign * sy * angle.sin(), sy * angle.cos(), 0.1 * dy]
    ink = task.sources[index] - task.ground
    if ink.shape[-1] > 2 * task.size:
        ink = functional.avg_pool2d(ink, ink.shape[-1] // (2 * task.size))
    grid = functional.affine_grid(
        torch.stack(rows, -1).reshape(-1, 2, 3), list(ink.shape), align_corners=False
    )
    moved = functional.grid_sample(ink, grid, align_corners=False) + task.ground
    return recolour(functional.avg_pool2d(moved, moved.shape[-1] // task.size), strength, generator)


def recolour(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Random changes of saturation, contrast and tint, and white noise."""
    number, channels = images.shape[:2]

    def draw(*shape: int) -> Tensor:
        return strength * (torch.rand(number, *shape, generator=generator) * 2.0 - 1.0)

    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (1.0 + 0.3 * draw(1, 1, 1))
    images = 1.0 - (1.0 - images) * (1.0 + 0.15 * draw(1, 1, 1)) + 0.03 * draw(channels, 1, 1)
    level = 0.05 * strength * torch.rand(number, 1, 1, 1, generator=generator)
    return (images + level * torch.randn(images.shape, generator=generator)).clamp(0.0, 1.0)


def fit_convolutional(
    task: Task, steps: int, strength: float, generator: torch.Generator, batch_size: int = 64
) -> ConvClassifier:
    """AdamW with a one-cycle learning rate on distorted, mixed pictures and smoothed labels."""
    model = ConvClassifier(task.classes, task.channels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    targets = torch.eye(len(task.classes)) * 0.95 + 0.05 / len(task.classes)
    for _ in range(steps):
        index = torch.multinomial(task.weights, batch_size, True, generator=generator)
        other = torch.randperm(batch_size, generator=generator)
        images = distort(task, index, strength, generator)
        target = targets[task.labels[index]]
        # Minus a uniform draw to the fifth power: most batches are mixed little.
        share = 1.0 - 0.5 * torch.rand(batch_size, generator=generator) ** 5
        images = torch.lerp(images[other], images, share[:, None, None, None])
        target = torch.lerp(target[other], target, share[:, None])
        loss = -(target * model(images).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


def fit_kernel(
    task: Task,
    generator: torch.Generator,
    *,
    views: int = 10,
    num_components: int = 200,
    num_landmarks: int = 1600,
    strength: float = 0.8,
    gamma: float = 2.0,
    ridge: float = 3e-5,
) -> KernelClassifier:
    """
    Penalised likelihood by L-BFGS on the pictures and ``views - 1`` distorted copies of each, the
    classes weighted evenly; the landmarks are undistorted pictures.
    """
    plain = torch.nonzero(task.first)[:, 0]
    images = [functional.avg_pool2d(task.sources[plain], task.sources.shape[-1] // task.size)]
    images += [distort(task, plain, strength, generator) for _ in range(views - 1)]
    features = torch.cat([descriptors(view) for view in images])
    labels = task.labels[plain].repeat(views)
    mean, projection = _principal_directions(features, num_components)
    model = KernelClassifier(
        task.classes, features.shape[1], num_components, min(num_landmarks, len(plain)), gamma
    )
    model.mean, model.projection = mean, projection
    order = torch.randperm(len(plain), generator=generator)[:num_landmarks].sort().values
    projected = (features - mean) @ projection
    model.landmarks = projected[order]
    weights = 1.0 / torch.bincount(labels)[labels].float()
    _fit_logistic(model, projected, labels, weights / weights.sum(), ridge)
    return model


def _principal_directions(features: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The mean, and directions scaled by the inverse root of their standard deviation."""
    mean = features.mean(0)
    torch.manual_seed(0)
    _, size, directions = torch.pca_lowrank(features - mean, number, niter=3)
    projection = directions / (size / len(features) ** 0.5).sqrt()
    radius = ((features - mean) @ projection).square().sum(1).mean().sqrt()
    return mean, projection / radius


def _fit_logistic(
    model: KernelClassifier, projected: Tensor, labels: Tensor, weights: Tensor, ridge: float
) -> None:
    def kernel(points: Tensor) -> Tensor:
        return torch.exp(-model.gamma * torch.cdist(points, model.landmarks).square())

    gram, among = kernel(projected), kernel(model.landmarks)
    coefficients = torch.zeros_like(model.coefficients).requires_grad_()
    bias = torch.zeros_like(model.bias).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [coefficients, bias], max_iter=60, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = gram @ coefficients + bias
        loss = (weights * functional.cross_entropy(logits, labels, reduction="none")).sum()
        loss = loss + ridge * (coefficients * (among @ coefficients)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    model.coefficients, model.bias = coefficients.detach(), bias.detach()


@torch.no_grad()
def accuracy(model: Classifier, name: str) -> dict[str, object]:
    """
    How well a classifier does on the shipped held-out pictures, one a subject.

    :param Classifier model: The classifier.
    :param str name: The model of the zoo whose pictures are classified.
    :returns: Share of pictures classified rightly, its mean over the classes, and that of each.
    """
    images = zoo.images(name, held_out=True).one_per_subject()
    right = (model(images.unit).argmax(1) == images.labels).double()
    of_class = [float(right[images.labels == k].mean()) for k in range(len(model.classes))]
    return dict(
        pictures=len(images),
        accuracy=round(float(right.mean()), 4),
        class_mean=round(sum(of_class) / len(of_class), 4),
        by_class={name: round(x, 3) for name, x in zip(model.classes, of_class, strict=True)},
    )


def finish(model: Classifier, name: str, part: str) -> None:
    """Saves a trained classifier, with the accuracy of what was saved."""
    folder = ZOO / name / part
    model.save(folder)
    figures = accuracy(load_classifier(folder), name)
    print(name, part, figures, flush=True)
    (folder / "accuracy.json").write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    """Trains both for each named model, and saves them in its folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=("digits", "emoji"))
    parser.add_argument("--data", type=Path, help="the npm archive with the emoji")
    parser.add_argument("--steps", type=int, default=2500, help="of the convolutional network")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in options.names:
        task = digit_task() if name == "digits" else emoji_task(options.data)
        for part in options.parts:
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            if part == "classifier":
                finish(fit_convolutional(task, options.steps, 1.0, generator), name, part)
            else:
                finish(fit_kernel(task, generator, **KERNEL[name]), name, part)


if __name__ == "__main__":
    main()
