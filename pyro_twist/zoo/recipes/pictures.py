# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Writes the pictures that ship beside the models::

    npm pack emoji-datasource-google@16.0.0
    python -m pyro_twist.zoo.recipes.pictures digits emoji --data emoji-datasource-google-16.0.0.tgz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pyro_twist.zoo.data import Images
from pyro_twist.zoo.recipes import digits, emoji_data

ZOO = Path(__file__).parents[1]


def digit_images() -> Images:
    """The digits of scikit-learn, held-out ones marked."""
    pixels, labels, held_out = digits.load_digits()
    number = torch.arange(len(labels))
    names = tuple(f"digit {label}, number {i}" for i, label in enumerate(labels.tolist()))
    classes = tuple(str(digit) for digit in range(10))
    return Images((pixels * 255.0).round().byte(), labels, number, held_out, names, classes)


def emoji_images(archive: Path, size: int) -> Images:
    """The emoji at ``size`` pixels a side, held-out ones marked."""
    data = emoji_data.load_archive(archive)
    pixels = (emoji_data.shrink(data.images, size) + 1.0) * 127.5
    pixels = pixels.round().clamp(0.0, 255.0).byte()
    names, classes = tuple(data.names), emoji_data.GROUPS
    return Images(pixels, data.labels, data.emoji, data.held_out, names, classes)


def main() -> None:
    """Writes ``images.npz`` into the folder of each named model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=("digits", "emoji"))
    parser.add_argument("--data", type=Path, help="the npm archive with the emoji")
    parser.add_argument("--size", type=int, default=16, help="pixels a side of an emoji")
    options = parser.parse_args()
    for name in options.names:
        folder = ZOO / name
        folder.mkdir(exist_ok=True)
        images = digit_images() if name == "digits" else emoji_images(options.data, options.size)
        images.save(folder / "images.npz")


if __name__ == "__main__":
    main()
