# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The pictures the models of the zoo were trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

__all__ = ["Images", "load_images", "plain_prompt"]


def plain_prompt(text: str) -> str:
    """
    A prompt or a name in small letters, without hyphens and colons, one space between words.

    :param str text: As typed.
    """
    return " ".join(text.lower().replace("-", " ").replace(":", "").split())


@dataclass(frozen=True)
class Images:
    """
    Labelled pictures.

    :param torch.Tensor pixels: uint8, of shape ``(number, channels, height, width)``.
    :param torch.Tensor labels: The index into :attr:`classes`, of shape ``(number,)``.
    :param torch.Tensor subjects: Pictures of one subject (an emoji in several skin tones) share a
        number here; of shape ``(number,)``.
    :param torch.Tensor held_out: Whether no training used the picture, of shape ``(number,)``.
    :param tuple names: A name of each picture.
    :param tuple classes: The name of each class.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    subjects: torch.Tensor
    held_out: torch.Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def unit(self) -> torch.Tensor:
        """The pictures in ``[0, 1]``, in the form rewards and classifiers take."""
        return self.pixels.float() / 255.0

    def subset(self, keep: torch.Tensor) -> Images:
        """The pictures at which the boolean tensor ``keep`` of shape ``(number,)`` is true."""
        names = tuple(name for name, kept in zip(self.names, keep.tolist(), strict=True) if kept)
        pixels, labels = self.pixels[keep], self.labels[keep]
        subjects, held_out = self.subjects[keep], self.held_out[keep]
        return Images(pixels, labels, subjects, held_out, names, self.classes)

    def one_per_subject(self) -> Images:
        """The first picture of each subject."""
        numbers = self.subjects.tolist()
        first = [numbers.index(number) == i for i, number in enumerate(numbers)]
        return self.subset(torch.tensor(first, dtype=torch.bool))

    def save(self, path: Path) -> None:
        """Writes a compressed ``.npz``, which :func:`numpy.load` reads as well."""
        # numpy's own writer only deflates; LZMA saves a quarter here, and numpy reads it.
        from zipfile import ZIP_LZMA, ZipFile, ZipInfo

        tensors = {k: getattr(self, k) for k in ("pixels", "labels", "subjects", "held_out")}
        arrays = {k: v.numpy() for k, v in tensors.items()}
        arrays["labels"] = arrays["labels"].astype(np.uint8)
        arrays["subjects"] = arrays["subjects"].astype(np.uint16)
        arrays["names"], arrays["classes"] = np.array(self.names), np.array(self.classes)
        with ZipFile(path, "w", ZIP_LZMA) as archive:
            for name, array in arrays.items():
                entry = ZipInfo(f"{name}.npy")
                entry.compress_type = ZIP_LZMA
                with archive.open(entry, "w") as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)


def load_images(path: Path) -> Images:
    """
    Reads what :meth:`Images.save` wrote.

    :param ~pathlib.Path path: The ``.npz`` file.
    """
    with np.load(path, allow_pickle=False) as arrays:
        return Images(
            pixels=torch.from_numpy(arrays["pixels"]),
            labels=torch.from_numpy(arrays["labels"].astype(np.int64)),
            subjects=torch.from_numpy(arrays["subjects"].astype(np.int64)),
            held_out=torch.from_numpy(arrays["held_out"]),
            names=tuple(arrays["names"].tolist()),
            classes=tuple(arrays["classes"].tolist()),
        )
