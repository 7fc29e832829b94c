# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Rewards: functions that give each sample of a batch one number, often black boxes.

A plain function is a reward. :class:`Reward` wraps one: it converts the samples to what the
function takes, calls it on chunks, scores copies once, counts, and treats failures by a stated
policy.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from pyro_twist.rewards.samples import (
    Input,
    as_batch,
    convert,
    digest,
    finite_rows,
    originals,
    select,
)

__all__ = ["Policy", "Reward", "RewardError", "RewardFunction", "RewardWarning", "per_sample"]

Policy = Literal["raise", "-inf"]


class RewardFunction(Protocol):
    """
    What a reward is: a callable on a batch of ``B`` decoded samples that returns ``B`` numbers.

    Numbers may be minus infinity (a hard constraint), not plus infinity and not NaN.

    Example::

        def redness(images):                      # shape (B, 3, H, W), values in [0, 1]
            return images[:, 0].mean((-1, -2))    # shape (B,)
    """

    def __call__(self, samples: Any, /) -> Any:
        """Score a batch of samples."""


class RewardError(ValueError):
    """
    A reward failed on a sample, or returned what is not a reward.

    :param str message: What happened.
    :param int index: The sample's index in the batch that was given.
    :param torch.Tensor values: The float64 values known so far, of shape ``(B,)``, NaN where
        there is none. They are kept: the next call on the same batch does not score them again.

    Example::

        try:
            values = reward(images)
        except RewardError as error:
            print(f"image {error.index} failed: {error.__cause__}")
            values = reward(images)  # goes on from there
    """

    def __init__(self, message: str, index: int, values: Tensor) -> None:
        super().__init__(message)
        self.index = index
        self.values = values


class RewardWarning(UserWarning):
    """A reward failed or was NaN on some samples, and the policy gave them minus infinity."""


class Reward:
    """
    Wraps a function that scores batches of samples.

    Copies of a sample inside a batch, common after resampling, are scored once.
    If a call fails, everything it had computed is kept, and calling again on the same batch goes on
    from there. A sample with entries that are not finite is not handed to ``fn``; its value is NaN.

    :param callable fn: A function of a batch of samples that returns one number per sample, as a
        tensor or array of shape ``(B,)`` or a sequence of length ``B``.
    :param str name: A name for messages; by default that of ``fn``.
    :param str input: What ``fn`` takes: ``"tensor"`` of shape ``(B, ...)``, for images
        ``(B, C, H, W)`` in [0, 1], in float32 or better; ``"numpy"``, the same as an array;
        ``"uint8"``, a tensor of the same shape with values 0 to 255; ``"pil"``, a list of ``B``
        PIL images; or ``"list"``, a list of ``B`` Python objects such as strings.
    :param int chunk_size: The most samples per call of ``fn``; by default all.
    :param cache: The number of values to remember from earlier calls, by the bytes of the sample;
        ``True`` for no limit, ``False`` for none.
    :param str on_error: What an exception in ``fn`` does: ``"raise"`` a :class:`RewardError`, or
        count as ``"-inf"`` with a :class:`RewardWarning`.
    :param str on_nan: Likewise for NaN.
    :param bool noisy: Whether ``fn`` is random. Its first draw for a sample is then the value of
        that sample for good, as weights must be a function of the sample; the tilted law is that
        of the mean of ``exp(scale * reward)`` over the noise. Implies ``cache=True``;
        :meth:`clear` starts new draws.
    :param bool differentiable: Whether gradients flow through ``fn``. ``False`` makes the values
        constants; ``None`` lets autograd find out.
    :raises ValueError: If an option is not one of these.

    Example::

        >>> import torch
        >>> brightness = Reward(lambda images: images.mean((1, 2, 3)), name="brightness")
        >>> levels = torch.tensor([0.0, 0.5, 0.5, 1.0])
        >>> images = levels[:, None, None, None].expand(4, 3, 8, 8)
        >>> brightness(images).tolist()
        [0.0, 0.5, 0.5, 1.0]
        >>> brightness.num_calls  # the copy was scored once
        3
    """

    def __init__(
        self,
        fn: Callable[[Any], Any],
        *,
        name: str | None = None,
        input: Input = "tensor",
        chunk_size: int | None = None,
        cache: bool | int = False,
        on_error: Policy = "raise",
        on_nan: Policy = "raise",
        noisy: bool = False,
        differentiable: bool | None = None,
    ) -> None:
        self.fn = fn
        self.name = str(name or getattr(fn, "__name__", type(fn).__name__))
        self.input: Input = input
        self.chunk_size = chunk_size
        self.on_error = on_error
        self.on_nan = on_nan
        self.noisy = noisy
        self.differentiable = differentiable
        self.num_calls = 0
        self._limit = _cache_limit(cache or noisy)
        self._cache: OrderedDict[bytes, float] = OrderedDict()
        self._kept: dict[bytes, float] = {}
        self._check_options()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, input={self.input!r})"

    def clear(self) -> None:
        """Forgets all remembered values and sets :attr:`num_calls` to 0."""
        self.num_calls = 0
        self._cache.clear()
        self._kept.clear()

    def __call__(self, samples: Any) -> Tensor:
        """
        Scores a batch.

        :param samples: A tensor or array whose first dim, of size ``B``, indexes samples; a list
            for ``input="list"``.
        :returns: The values, in float64, of shape ``(B,)``.
        :raises RewardError: If ``fn`` fails, or returns NaN, plus infinity or a wrong shape.
        """
        batch = as_batch(samples, self.name, self.input)
        with_graph = self._has_graph(batch)
        with torch.set_grad_enabled(with_graph):
            return self._all_values(batch, with_graph)

    def _has_graph(self, batch: Tensor | list[Any]) -> bool:
        return (
            isinstance(batch, Tensor)
            and batch.requires_grad
            and torch.is_grad_enabled()
            and self.differentiable is not False
        )

    def _all_values(self, batch: Tensor | list[Any], with_graph: bool) -> Tensor:
        # The gradient of a copy would be lost, and a remembered value has none.
        source = _every_row(batch) if with_graph else originals(batch)
        rows = source.unique()
        values = _unknown(len(batch), source.device)
        if not with_graph:
            values[rows] = self._recall(batch, rows).to(values.device)
        todo = rows[values[rows].isnan()]
        try:
            for chunk in todo.split(self.chunk_size or max(1, len(todo))):
                for done, scored in self._scored(batch, chunk):
                    values = values.index_copy(0, done, scored)
        except BaseException as error:
            self._store(self._kept, batch, rows, values)
            if isinstance(error, _Failure):
                raise self._error(error, values.detach()[source]) from error.__cause__
            raise
        self._remember(batch, todo, values)
        return values[source]

    def _scored(self, batch: Tensor | list[Any], rows: Tensor) -> Iterator[_Part]:
        """Yields rows with their values as soon as they are known."""
        finite = finite_rows(select(batch, rows))
        if finite.any():
            yield from self._called(batch, rows[finite])
        if not finite.all():
            yield self._nan(rows[~finite], "the sample has entries that are not finite")

    def _called(self, batch: Tensor | list[Any], rows: Tensor) -> Iterator[_Part]:
        samples = convert(select(batch, rows), self.input, self.name)
        if isinstance(samples, Tensor) and not samples.requires_grad:
            # a function that works in place must not reach the particles
            samples = samples.clone()
        try:
            returned = self.fn(samples)
        except Exception as error:
            yield from self._excepted(batch, rows, error)
            return
        values = _as_values(returned, rows)
        self.num_calls += len(rows)
        good = values < torch.inf
        yield rows[good], values[good]
        if (values == torch.inf).any():
            raise _Failure("it returned +inf, which is no reward", rows[values == torch.inf])
        if not good.all():
            yield self._nan(rows[~good], "it returned NaN")

    def _excepted(
        self, batch: Tensor | list[Any], rows: Tensor, error: Exception
    ) -> Iterator[_Part]:
        told = f"{type(error).__name__}: {error}"
        if len(rows) > 1:
            for row in rows.split(1):
                yield from self._called(batch, row)
            self._warn(f"failed on {len(rows)} samples at once ({told}), then was called on each")
        elif self.on_error == "raise":
            raise _Failure(told, rows) from error
        else:
            self._warn(f"failed on sample {int(rows)} ({told}), which gets -inf")
            yield rows, _minus_inf(rows)

    def _nan(self, rows: Tensor, told: str) -> _Part:
        if self.on_nan == "raise":
            raise _Failure(told, rows)
        self._warn(f"is NaN on samples {rows.tolist()} ({told}), which get -inf")
        return rows, _minus_inf(rows)

    def _warn(self, told: str) -> None:
        warnings.warn(f"reward {self.name!r} {told}", RewardWarning, stacklevel=2)

    def _error(self, failure: _Failure, values: Tensor) -> RewardError:
        index, known = int(failure.rows[0]), int((~values.isnan()).sum())
        return RewardError(
            f"reward {self.name!r} failed on sample {index} of {len(values)}: {failure}. "
            f"{known} values are known and kept: scoring the same batch again goes on from there.",
            index,
            values,
        )

    def _recall(self, batch: Tensor | list[Any], rows: Tensor) -> Tensor:
        if not self._cache and not self._kept:
            return _unknown(len(rows), rows.device)
        known = [self._lookup(digest(batch[row])) for row in rows.tolist()]
        return torch.tensor(known, dtype=torch.float64)

    def _lookup(self, key: bytes) -> float:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        return self._kept.get(key, math.nan)

    def _remember(self, batch: Tensor | list[Any], rows: Tensor, values: Tensor) -> None:
        if self._limit:
            for key, value in self._kept.items():
                self._cache[key] = value
            self._store(self._cache, batch, rows, values)
        self._kept.clear()
        while len(self._cache) > self._limit:
            self._cache.popitem(last=False)

    def _store(
        self, place: dict[bytes, float], batch: Tensor | list[Any], rows: Tensor, values: Tensor
    ) -> None:
        for row, value in zip(rows.tolist(), values.detach()[rows].tolist(), strict=True):
            if not math.isnan(value):
                place[digest(batch[row])] = value

    def _check_options(self) -> None:
        if not callable(self.fn):
            raise ValueError(f"a reward is a callable on a batch of samples, got {self.fn!r}")
        for option, allowed in (("input", Input), ("on_error", Policy), ("on_nan", Policy)):
            value = getattr(self, option)
            if value not in get_args(allowed):
                raise ValueError(f"{option}={value!r}; choose one of {get_args(allowed)}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size}; give 1 or more, or None for no chunks")
        if self.differentiable and (self.input != "tensor" or self.noisy):
            raise ValueError(
                f"differentiable=True needs input='tensor' and noisy=False, got "
                f"input={self.input!r}, noisy={self.noisy}"
            )
        if self.input != "tensor" or self.noisy:
            self.differentiable = False


def per_sample(fn: Callable[[Any], float]) -> Callable[[Any], list[float]]:
    """
    Makes a reward of a function of one sample.

    :param callable fn: A function of one sample that returns a number.
    :returns: A function of a batch that returns a list of numbers.

    Example::

        >>> width = Reward(per_sample(lambda image: image.width), input="pil")
        >>> width(torch.zeros(2, 3, 8, 4)).tolist()
        [4.0, 4.0]
    """

    @functools.wraps(fn)
    def batched(samples: Any) -> list[float]:
        return [fn(sample) for sample in samples]

    return batched


_Part = tuple[Tensor, Tensor]


class _Failure(Exception):
    def __init__(self, message: str, rows: Tensor) -> None:
        super().__init__(message)
        self.rows = rows


def _every_row(batch: Tensor | list[Any]) -> Tensor:
    return torch.arange(len(batch), device=getattr(batch, "device", None))


def _unknown(size: int, device: torch.device) -> Tensor:
    return torch.full((size,), torch.nan, dtype=torch.float64, device=device)


def _minus_inf(rows: Tensor) -> Tensor:
    return torch.full(rows.shape, -torch.inf, dtype=torch.float64, device=rows.device)


def _cache_limit(cache: bool | int) -> float:
    limit = math.inf if cache is True else float(cache)
    if limit < 0:
        raise ValueError(f"cache={cache}; give a number of values, True for no limit, or False")
    return limit


def _as_values(returned: Any, rows: Tensor) -> Tensor:
    """Checks that ``returned`` is one number per row."""
    try:
        values = _as_tensor(returned).to(device=rows.device, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _Failure(
            f"it returned {type(returned).__name__}, not one number per sample ({error})", rows
        ) from error
    if values.shape != rows.shape:
        raise _Failure(
            f"it returned shape {tuple(values.shape)} for {len(rows)} samples; return one number "
            f"per sample, shape ({len(rows)},){_shape_hint(values, len(rows))}",
            rows,
        )
    return values


def _as_tensor(returned: Any) -> Tensor:
    if isinstance(returned, Tensor):
        return returned
    if isinstance(returned, (list, tuple)) and returned and isinstance(returned[0], Tensor):
        return torch.stack(list(returned))
    return torch.as_tensor(np.asarray(returned, dtype=np.float64))


def _shape_hint(values: Tensor, size: int) -> str:
    if values.numel() == size and values.dim() > 1:
        return ", here with .reshape(-1)"
    if values.dim() == 0:
        return "; wrap a function of one sample in per_sample(fn)"
    return ""
