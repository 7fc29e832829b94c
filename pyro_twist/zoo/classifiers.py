# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The classifiers of the zoo: a convolutional network to be used in rewards, and a kernel machine on
fixed descriptors to judge the outcome. They are built differently on purpose: what a sampler gains
by exploiting the one is unlikely to deceive the other.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Classifier", "ConvClassifier", "KernelClassifier", "descriptors", "load_classifier"]


class Classifier(nn.Module):
    """
    Base of the classifiers: pictures in ``[0, 1]`` of shape ``(batch, channels, height, width)`` to
    logits of shape ``(batch, number of classes)``.

    :param config: Whatever is needed to build the same, untrained classifier again; the entry
        ``classes`` names the classes.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config
        self.classes: tuple[str, ...] = tuple(config["classes"])

    def save(self, folder: Path) -> None:
        """
        Writes ``config.json`` and the weights, in half precision.

        :param ~pathlib.Path folder: Where; it is made if need be.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = {"type": type(self).__name__, **self.config}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_halved(self, folder / "model.safetensors")


class ConvClassifier(Classifier):
    """
    Pairs of 3x3 convolutions with batch normalisation, halved in resolution after each pair but the
    last, then averaged over the picture.

    :param tuple classes: The names of the classes.
    :param int channels: Colour channels of a picture.
    :param tuple widths: Features of each pair of convolutions.
    :param float dropout: Share of features dropped in training before the last layer.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        channels: int,
        widths: tuple[int, ...] = (32, 64, 96),
        dropout: float = 0.3,
    ) -> None:
        super().__init__(classes=classes, channels=channels, widths=widths, dropout=dropout)
        layers: list[nn.Module] = []
        for before, after in zip((channels, *widths[:-1]), widths, strict=True):
            layers += [*_convolution(before, after), *_convolution(after, after), nn.MaxPool2d(2)]
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers[:-1], *head, nn.Linear(widths[-1], len(classes)))

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        return self.layers(images * 2.0 - 1.0)


class KernelClassifier(Classifier):
    """
    Logistic regression on Gaussian kernels between the :func:`descriptors` of a picture, projected
    on principal directions, and those of landmark pictures.

    :param tuple classes: The names of the classes.
    :param int num_descriptors: Length of the descriptor of a picture.
    :param int num_components: Number of principal directions.
    :param int num_landmarks: Number of landmark pictures.
    :param float gamma: The kernel is ``exp(-gamma * squared distance)``.
    """

    mean: Tensor
    projection: Tensor
    landmarks: Tensor
    coefficients: Tensor
    bias: Tensor

    def __init__(
        self,
        classes: tuple[str, ...],
        num_descriptors: int,
        num_components: int,
        num_landmarks: int,
        gamma: float = 1.0,
    ) -> None:
        super().__init__(
            classes=classes,
            num_descriptors=num_descriptors,
            num_components=num_components,
            num_landmarks=num_landmarks,
            gamma=gamma,
        )
        self.gamma = gamma
        self.register_buffer("mean", torch.zeros(num_descriptors))
        self.register_buffer("projection", torch.zeros(num_descriptors, num_components))
        self.register_buffer("landmarks", torch.zeros(num_landmarks, num_components))
        self.register_buffer("coefficients", torch.zeros(num_landmarks, len(classes)))
        self.register_buffer("bias", torch.zeros(len(classes)))

    def kernel(self, images: Tensor) -> Tensor:
        """Kernels between pictures and landmarks, of shape ``(batch, num_landmarks)``."""
        projected = (descriptors(images) - self.mean) @ self.projection
        return torch.exp(-self.gamma * torch.cdist(projected, self.landmarks).square())

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        return self.kernel(images) @ self.coefficients + self.bias


def descriptors(images: Tensor) -> Tensor:
    """
    Histograms of edge directions in three sizes of cell, mean colours and histograms of colour.

    Edge histograms follow Dalal and Triggs, "Histograms of oriented gradients for human detection"
    (2005), with smooth bins.

    :param torch.Tensor images: In ``[0, 1]``, of shape ``(batch, channels, side, side)``, the side
        a multiple of eight.
    :returns: Of shape ``(batch, number of descriptors)``.
    """
    side = images.shape[-1]
    edges = _edge_directions(images)
    colours = _colour_membership(images)
    pool = nn.functional.avg_pool2d
    parts = [_contrast_normalised(pool(edges, side // cells)) for cells in (2, 4)]
    parts += [pool(edges, side // 8), pool(images, side // 4), 0.5 * pool(images, side // 8)]
    parts += [_root(pool(colours, side // 2)), 2.0 * _root(pool(colours, side))]
    return torch.cat([part.flatten(1) for part in parts], 1)


def load_classifier(folder: Path) -> Classifier:
    """
    Reads what :meth:`Classifier.save` wrote, in float32, frozen and in evaluation mode.

    :param ~pathlib.Path folder: With ``config.json`` and ``model.safetensors``.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    kinds = {kind.__name__: kind for kind in (ConvClassifier, KernelClassifier)}
    classifier = kinds[config.pop("type")](**config)
    classifier.load_state_dict(load_file(folder / "model.safetensors"))
    return classifier.eval().requires_grad_(False)


def write_halved(module: nn.Module, path: Path) -> None:
    """
    Writes the weights of a network in half precision.

    :param torch.nn.Module module: The network.
    :param ~pathlib.Path path: A safetensors file.
    """
    from safetensors.torch import save_file

    save_file({name: _halved(value) for name, value in module.state_dict().items()}, path)
    path.chmod(0o644)


def _halved(value: Tensor) -> Tensor:
    return value.half().contiguous() if value.is_floating_point() else value.contiguous()


def _convolution(before: int, after: int) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.SiLU()]


def _edge_directions(images: Tensor, number: int = 9) -> Tensor:
    """Strength of the strongest channel's gradient in ``number`` smooth bins of direction."""
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    # The offset keeps the square root and the angle differentiable where the picture is flat.
    strength = (across.square() + down.square() + 1e-8).sqrt()
    strongest = strength.argmax(1, keepdim=True)
    across, down, strength = (x.gather(1, strongest) for x in (across, down, strength))
    angles = torch.arange(number, device=images.device)[:, None, None] * (math.pi / number)
    cosine = (across * angles.cos() + down * angles.sin()) / strength
    return cosine.abs().pow(6.0) * strength


def _root(share: Tensor) -> Tensor:
    # The offset keeps the root differentiable where a colour does not occur.
    return (share + 1e-6).sqrt()


def _contrast_normalised(edges: Tensor) -> Tensor:
    return edges / (edges.square().sum(1, keepdim=True) + 0.02).sqrt()


def _colour_membership(images: Tensor, levels: int = 4) -> Tensor:
    """Soft assignment of each pixel to the points of a regular grid of colours."""
    axis = torch.linspace(0.0, 1.0, levels, device=images.device)
    grid = torch.cartesian_prod(*[axis] * images.shape[1]).reshape(-1, images.shape[1], 1, 1)
    distance = (images[:, None] - grid).square().sum(2)
    return torch.softmax(-distance / 0.02, 1)
