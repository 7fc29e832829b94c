# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Running a network over many rows, a chunk at a time, within the memory there is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Chunks", "checkpointed"]


def checkpointed(function: Callable[..., Tensor], rows: Tensor, *args: Any) -> Tensor:
    """
    Calls ``function(rows, *args)``; its graph is made again in the backward pass, not kept.

    :param callable function: Differentiable in its first argument.
    :param Tensor rows: The first argument.
    """
    if not (torch.is_grad_enabled() and rows.requires_grad):
        return function(rows, *args)
    from torch.utils.checkpoint import checkpoint

    output: Tensor = checkpoint(function, rows, *args, use_reentrant=False)
    return output


class Chunks:
    """
    Runs a function over rows a chunk at a time, in chunks half as large once memory runs out.

    Chunks that are done are kept. That memory ran out is said once, by a warning; the smaller size
    stays. A chunk of one row that does not fit is an error. A backward pass is not covered.

    :param int size: At most this many rows at once; ``None`` takes all at first.
    :param str name: What the user calls the size, for messages.
    """

    def __init__(self, size: int | None, name: str = "chunk_size") -> None:
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"{name}={size!r} is not a positive integer; try {name}=8")
        self.size, self.name = size, name
        self._said = False

    def __call__(self, function: Callable[[slice], Tensor], rows: int) -> Tensor:
        """
        Runs the function on all rows.

        :param callable function: Takes the slice of the rows it is to run on; returns a tensor with
            one entry for each.
        :param int rows: How many there are.
        :returns: What the function returned for all rows.
        :rtype: Tensor
        """
        done: list[Tensor] = []
        start = 0
        while start < rows or not done:
            size = min(self.size or rows, rows - start)
            output = self._attempt(function, slice(start, start + size), size)
            if output is not None:
                done.append(output)
                start += size
        return done[0] if len(done) == 1 else torch.cat(done)

    def _attempt(
        self, function: Callable[[slice], Tensor], part: slice, size: int
    ) -> Tensor | None:
        """What the function returns, or ``None`` if memory ran out and the size is now smaller."""
        try:
            return function(part)
        except RuntimeError as error:
            if size <= 1 or not _is_out_of_memory(error):
                raise
        # Outside of the handler: the error would keep the tensors of the failed call alive.
        self._halve(size)
        return None

    def _halve(self, size: int) -> None:
        self.size = size // 2
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if self._said:
            return
        self._said = True
        warnings.warn(
            f"memory ran out with {size} rows at once; going on with {self.name}={self.size}, or "
            f"less if that is still too much. Give {self.name} to start with a size that fits.",
            UserWarning,
            stacklevel=2,
        )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, on a device or, where torch says so in words only, anywhere."""
    words = str(error).lower()
    kinds = ("out of memory", "not enough memory", "can't allocate memory", "status_alloc_failed")
    return isinstance(error, torch.OutOfMemoryError) or any(kind in words for kind in kinds)
