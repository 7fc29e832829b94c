# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Batches of decoded samples: choosing rows, finding copies, converting to what a reward takes."""

from __future__ import annotations

import hashlib
import pickle
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Input", "as_batch", "convert", "digest", "finite_rows", "originals", "select", "to_pil"]

Input = Literal["tensor", "uint8", "numpy", "pil", "list"]

_RANGE_TOLERANCE = 1e-3
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MAX_KEY_LENGTH = 4096


def as_batch(samples: Any, name: str, kind: Input) -> Tensor | list[Any]:
    """
    Checks that ``samples`` is a batch of the declared kind.

    :param samples: A tensor or array whose first dim indexes samples, or, for ``kind="list"``,
        a sequence of Python objects.
    :param str name: The reward's name, for the error.
    :param str kind: The declared input.
    :returns: A tensor or a list.
    :raises ValueError: If ``samples`` is not such a batch.
    """
    if kind == "list":
        if isinstance(samples, (str, bytes)):
            raise ValueError(
                f"reward {name!r} takes a list of samples, got the {type(samples).__name__} "
                f"{samples[:40]!r}; put it in a list"
            )
        return list(samples)
    if not isinstance(samples, Tensor):
        if not hasattr(samples, "__array__"):
            raise ValueError(
                f"reward {name!r} (input={kind!r}) takes a tensor or an array whose first dim "
                f"indexes samples, got {type(samples).__name__}; for Python objects such as "
                'strings declare input="list"'
            )
        samples = torch.as_tensor(samples)
    if samples.dim() == 0:
        raise ValueError(
            f"reward {name!r} takes a batch, got a tensor of shape (); add a first dim"
        )
    return samples


def select(batch: Tensor | list[Any], rows: Tensor) -> Tensor | list[Any]:
    """
    Takes some rows of a batch.

    :param batch: A tensor of shape ``(B, ...)`` or a list of length ``B``.
    :param torch.Tensor rows: The rows' indices, of shape ``(K,)``.
    :returns: A tensor of shape ``(K, ...)`` or a list of length ``K``.
    """
    if isinstance(batch, Tensor):
        return batch if len(rows) == len(batch) and _is_range(rows) else batch[rows]
    return [batch[row] for row in rows.tolist()]


def originals(batch: Tensor | list[Any]) -> Tensor:
    """
    Finds the copies in a batch, by their bytes.

    :param batch: A tensor of shape ``(B, ...)`` or a list of length ``B``.
    :returns: Of shape ``(B,)``, for every row the first row that is equal to it.
    """
    if isinstance(batch, list):
        places: dict[bytes, int] = {}
        digests = (digest(sample) for sample in batch)
        return torch.tensor([places.setdefault(key, row) for row, key in enumerate(digests)]).long()
    rows = torch.arange(len(batch), device=batch.device)
    if batch.numel() == 0:
        return rows
    first = _first_with_key(_fingerprints(batch))
    copies = (first != rows).nonzero()[:, 0]
    return first if torch.equal(batch[copies], batch[first[copies]]) else rows


def digest(sample: Any) -> bytes:
    """
    Hashes one sample's type and bytes.

    :param sample: A tensor, a string, bytes or any picklable object.
    :returns: 16 bytes.
    """
    if isinstance(sample, Tensor):
        row = sample.detach().cpu().contiguous()
        head, body = f"{row.dtype}{tuple(row.shape)}", row.reshape(-1).view(torch.uint8).numpy()
        return hashlib.blake2b(body.tobytes(), digest_size=16, key=head.encode()[:64]).digest()
    return hashlib.blake2b(pickle.dumps(sample, protocol=4), digest_size=16).digest()


def finite_rows(batch: Tensor | list[Any]) -> Tensor:
    """
    Says which samples have only finite entries.

    :param batch: A tensor of shape ``(B, ...)`` or a list of length ``B``.
    :returns: Booleans of shape ``(B,)``; true for anything that is not floating point.
    """
    # A finite sum has finite terms; the sum is the cheaper test.
    if isinstance(batch, Tensor) and batch.is_floating_point() and not batch.sum().isfinite():
        finite = torch.isfinite(batch)
        return finite.flatten(1).all(-1) if batch.dim() > 1 else finite
    return torch.ones(len(batch), dtype=torch.bool, device=getattr(batch, "device", None))


def convert(batch: Tensor | list[Any], kind: Input, name: str) -> Any:
    """
    Converts decoded samples to what a reward declares to take.

    :param batch: A tensor of shape ``(K, ...)`` or, for ``kind="list"``, a list of length ``K``.
    :param str kind: ``"tensor"`` (as it is, in float32 or better), ``"numpy"`` (the same as an
        array), ``"uint8"`` (a tensor of 0 to 255), ``"pil"`` (a list of PIL images) or ``"list"``.
    :param str name: The reward's name, for the error.
    :returns: The converted samples.
    :raises ValueError: If ``"uint8"`` or ``"pil"`` gets values outside [0, 1].
    """
    if isinstance(batch, list):
        return batch
    if kind in ("tensor", "numpy"):
        batch = batch.float() if batch.dtype in (torch.float16, torch.bfloat16) else batch
        return batch.detach().cpu().numpy() if kind == "numpy" else batch
    pixels = _to_uint8(batch, kind, name)
    return pixels if kind == "uint8" else to_pil(pixels)


def to_pil(images: Tensor) -> list[Any]:
    """
    Turns 8-bit images into PIL images.

    :param torch.Tensor images: Uint8, of shape ``(B, C, H, W)`` with 1, 3 or 4 channels.
    :returns: A list of ``B`` PIL images of mode L, RGB or RGBA.
    :raises ValueError: If the shape is another.
    """
    from PIL import Image

    if images.dim() != 4 or images.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"PIL images need shape (B, C, H, W) with 1, 3 or 4 channels, got {tuple(images.shape)}"
        )
    arrays = images.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def _to_uint8(batch: Tensor, kind: str, name: str) -> Tensor:
    if batch.dtype == torch.uint8 or batch.numel() == 0:
        return batch.to(torch.uint8)
    low, high = batch.min().item(), batch.max().item()
    if low < -_RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
        raise ValueError(
            f"reward {name!r} (input={kind!r}) takes images in [0, 1], got values from {low:.3g} "
            f"to {high:.3g}; let model.decode return [0, 1] and keep decode=True"
        )
    return batch.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)


def _is_range(rows: Tensor) -> bool:
    return torch.equal(rows, torch.arange(len(rows), device=rows.device))


def _fingerprints(batch: Tensor) -> Tensor:
    # A part of a long row will do: rows with equal keys are compared in full.
    rows = batch.detach().flatten(1) if batch.dim() > 1 else batch.detach()[:, None]
    rows = rows[:, :: 1 + rows.shape[1] // _MAX_KEY_LENGTH].contiguous()
    bits = rows.view(_INTEGER_OF_SIZE.get(rows.element_size(), torch.uint8))
    return (bits.long() * _hash_weights(bits.shape[1], bits.device)).sum(-1)


def _hash_weights(length: int, device: torch.device) -> Tensor:
    # Odd pseudo-random 64-bit multipliers: their arithmetic wraps, which is what a hash wants.
    weights = torch.arange(1, length + 1, device=device) * -7046029254386353131
    weights = (weights ^ (weights >> 29)) * -4658895280553007687
    return (weights ^ (weights >> 32)) | 1


def _first_with_key(keys: Tensor) -> Tensor:
    unique, inverse = torch.unique(keys, return_inverse=True)
    rows = torch.arange(len(keys), device=keys.device)
    return rows.new_zeros(len(unique)).scatter_reduce(0, inverse, rows, "amin", include_self=False)[
        inverse
    ]
