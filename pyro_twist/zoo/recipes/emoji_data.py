# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Colour emoji, from the npm package ``emoji-datasource-google`` (images: Noto, Apache-2.0).

The archive is what ``npm pack emoji-datasource-google@16.0.0`` writes.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Flags",
)


@dataclass(frozen=True)
class EmojiData:
    """
    Emoji on a white ground.

    :param torch.Tensor images: uint8, of shape ``(number, 3, 64, 64)``.
    :param torch.Tensor labels: The index into :data:`GROUPS`, of shape ``(number,)``.
    :param torch.Tensor emoji: The index of the emoji that an image is a (skin tone) variant of.
    :param torch.Tensor held_out: Whether the image belongs to a held-out emoji.
    :param list names: The name of each image.
    """

    images: torch.Tensor
    labels: torch.Tensor
    emoji: torch.Tensor
    held_out: torch.Tensor
    names: list[str]

    def subset(self, keep: torch.Tensor) -> EmojiData:
        """The images at which the boolean tensor ``keep`` is true."""
        names = [name for name, kept in zip(self.names, keep.tolist()) if kept]
        images, labels = self.images[keep], self.labels[keep]
        return EmojiData(images, labels, self.emoji[keep], self.held_out[keep], names)

    def weights(self) -> torch.Tensor:
        """Sampling weights: groups by the square root of their size, variants share one emoji's."""
        _, index, variants = torch.unique(self.emoji, return_inverse=True, return_counts=True)
        share = 1.0 / variants[index].double()
        sizes = torch.zeros(len(GROUPS), dtype=torch.double).index_add_(0, self.labels, share)
        return share / sizes[self.labels].sqrt()


def _on_white(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(ground, image).convert("RGB"))


def _variants(entry: dict[str, Any]) -> list[str]:
    skins = entry.get("skin_variations", {}).values()
    return [entry["image"]] + [skin["image"] for skin in skins if skin["has_img_google"]]


def load_archive(path: str | Path) -> EmojiData:
    """
    Reads the archive written by ``npm pack emoji-datasource-google@16.0.0``.

    :param path: The ``.tgz`` file.
    :returns: Every emoji of the eight groups, one in ten of each group marked as held out.
    """
    with tarfile.open(path) as archive:
        files = {m.name: archive.extractfile(m) for m in archive if m.isfile()}
        members = {name: f.read() for name, f in files.items() if f is not None}
    table = json.loads(members["package/emoji.json"])
    table = [entry for entry in table if entry["category"] in GROUPS and entry["has_img_google"]]
    table.sort(key=lambda entry: entry["sort_order"])
    images, labels, emoji, held_out, names = [], [], [], [], []
    rng = np.random.default_rng(0)
    for index, entry in enumerate(table):
        out = rng.random() < 0.1
        for image in _variants(entry):
            images.append(_on_white(members[f"package/img/google/64/{image}"]))
            labels.append(GROUPS.index(entry["category"]))
            emoji.append(index)
            held_out.append(out)
            names.append(entry["name"] or entry["short_name"])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return EmojiData(
        pixels, torch.tensor(labels), torch.tensor(emoji), torch.tensor(held_out), names
    )


def augment(
    images: torch.Tensor, labels: torch.Tensor, size: int, generator: torch.Generator
) -> torch.Tensor:
    """
    Random mirror images (flags excepted) and shifts by up to two of 64 pixels, then area averaging.

    :param torch.Tensor images: uint8, of shape ``(batch, 3, 64, 64)``.
    :param torch.Tensor labels: Group indices, of shape ``(batch,)``.
    :param int size: The side of the result in pixels, a divisor of 64.
    :returns: Images in ``[-1, 1]``, of shape ``(batch, 3, size, size)``.
    """
    number = images.shape[0]
    flip = torch.rand(number, generator=generator) < 0.5
    flip &= labels != GROUPS.index("Flags")
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), value=255)
    dx, dy = torch.randint(0, 5, (2, number), generator=generator)
    rows = dy[:, None] + torch.arange(64)
    columns = dx[:, None] + torch.arange(64)
    batch = torch.arange(number)[:, None, None, None]
    channel = torch.arange(3)[None, :, None, None]
    moved = padded[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return shrink(moved, size)


def shrink(images: torch.Tensor, size: int) -> torch.Tensor:
    """Area averaging of uint8 images to ``size`` pixels a side, in ``[-1, 1]``."""
    pooled = torch.nn.functional.avg_pool2d(images.float(), images.shape[-1] // size)
    return pooled / 127.5 - 1.0
