# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Calling a denoising network on a batch of any shape: conditioning, guidance, chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_twist.diffusion.chunks import Chunks, checkpointed

__all__ = ["BatchedDenoiser", "Rows"]


class BatchedDenoiser:
    r"""
    A network evaluated row by row on states of any batch shape.

    With a guidance scale :math:`w \ne 1` the output is :math:`u + w (c - u)` for the unconditional
    output :math:`u` and the conditional :math:`c`, computed in one batch in this order (J. Ho,
    T. Salimans 2022, Classifier-Free Diffusion Guidance, https://arxiv.org/abs/2207.12598).

    :param callable network: ``network(x, timestep, **conditioning)`` with ``x`` of shape ``(rows,)
        + event_shape`` and ``timestep`` of shape ``(rows,)``; returns a tensor, an object with
        the tensor as ``.sample``, or a tuple that starts with it.
    :param tuple event_shape: Shape of one state.
    :param dict conditioning: Keyword arguments of the network. Numbers and tensors are broadcast to
        the batch shape and become one entry per row; anything else is passed as it is. An entry of
        the same name in the state takes precedence.
    :param dict null_conditioning: What replaces entries of ``conditioning`` in the unconditional
        evaluation.
    :param guidance_scale: A number or a tensor broadcastable to the batch shape; an entry
        ``guidance_scale`` in the state takes precedence.
    :param dict event_dims: Number of event dimensions of a conditioning tensor, by name; 0 where
        nothing is said.
    :param int chunk_size: At most this many rows per call of the network; half of it, and so on,
        once memory runs out.
    :param bool doubled: Whether the output has twice the channels (a learned variance), of which
        only the first half is guided.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        event_shape: torch.Size,
        *,
        conditioning: Mapping[str, Any],
        null_conditioning: Mapping[str, Any] | None = None,
        guidance_scale: float | Tensor = 1.0,
        event_dims: Mapping[str, int] | None = None,
        chunk_size: int | None = None,
        doubled: bool = False,
    ) -> None:
        self.network = network
        self.event_shape = event_shape
        self.output_shape = event_shape
        if doubled:
            self.output_shape = torch.Size((2 * event_shape[0],) + tuple(event_shape[1:]))
        self.event_dims = dict(event_dims or {})
        self.conditioning = {name: _as_tensor(value) for name, value in conditioning.items()}
        self.null_conditioning = None
        if null_conditioning is not None:
            self.null_conditioning = {k: _as_tensor(v) for k, v in null_conditioning.items()}
        self.guidance_scale = guidance_scale
        self._chunks = Chunks(chunk_size)
        self.num_rows = 0

    @property
    def chunk_size(self) -> int | None:
        """At most this many rows per call of the network; smaller once memory has run out."""
        return self._chunks.size

    @property
    def device(self) -> torch.device:
        """Where the network computes; torch's default if it has no parameters."""
        placement = self._placement()
        return torch.get_default_device() if placement is None else placement[0]

    def __call__(
        self, x: Tensor, timestep: float, input_scale: float, state: Mapping[Any, Any]
    ) -> Tensor:
        """
        Evaluates the network at ``x``.

        :param Tensor x: States of shape ``batch_shape + event_shape``.
        :param float timestep: The scheduler's timestep, the same for all.
        :param float input_scale: Factor between ``x`` and the network's input.
        :param state: Where entries that take precedence over the conditioning are looked up.
        :returns: The output of shape ``(rows,) + event_shape`` (twice the channels for a learned
            variance), in the dtype of ``x``.
        :rtype: Tensor
        """
        batch_shape = x.shape[: x.dim() - len(self.event_shape)]
        rows = x.reshape((-1,) + self.event_shape)
        if input_scale != 1:
            rows = rows * input_scale
        given = {name: state.get(name, value) for name, value in self.conditioning.items()}
        scale = state.get("guidance_scale", self.guidance_scale)
        if not isinstance(scale, Tensor) and scale == 1:
            output = self._evaluate(rows, timestep, self._expand(given, batch_shape))
        else:
            output = self._guided(rows, timestep, given, scale, batch_shape)
        self.num_rows += len(rows)
        return output

    def _guided(
        self,
        rows: Tensor,
        timestep: float,
        given: dict[str, Any],
        scale: float | Tensor,
        batch_shape: torch.Size,
    ) -> Tensor:
        if self.null_conditioning is None:
            raise ValueError(
                "a guidance scale other than 1 needs null_conditioning, for example "
                "null_conditioning={'class_labels': num_classes}"
            )
        null = self._expand({**given, **self.null_conditioning}, batch_shape)
        both = {
            name: null[name].joined(value) if isinstance(value, Rows) else value
            for name, value in self._expand(given, batch_shape).items()
        }
        output = self._evaluate(torch.cat([rows, rows]), timestep, both)
        unconditional, conditional = output.chunk(2)
        weight = self._expand_one("guidance_scale", _as_tensor(scale), batch_shape).all()
        weight = weight.to(output).reshape((-1,) + (1,) * len(self.event_shape))
        channels = self.event_shape[0]
        guided = torch.lerp(unconditional[:, :channels], conditional[:, :channels], weight)
        if self.output_shape == self.event_shape:
            return guided
        return torch.cat([guided, conditional[:, channels:]], dim=1)

    def _expand(self, values: Mapping[str, Any], batch_shape: torch.Size) -> dict[str, Any]:
        """One entry per row of every tensor."""
        return {name: self._expand_one(name, v, batch_shape) for name, v in values.items()}

    def _expand_one(self, name: str, value: Any, batch_shape: torch.Size) -> Any:
        if not isinstance(value, Tensor):
            return value
        split = value.dim() - self.event_dims.get(name, 0)
        event = value.shape[split:]
        try:
            return Rows.of(value, split, batch_shape)
        except RuntimeError as error:
            raise ValueError(
                f"conditioning '{name}' of shape {tuple(value.shape)} with {len(event)} event "
                f"dimensions does not broadcast to the batch shape {tuple(batch_shape)}; give it "
                "one entry per class of plate=(name, size), or say its event dimensions with "
                "conditioning_event_dims"
            ) from error

    def _evaluate(self, rows: Tensor, timestep: float, conditioning: dict[str, Any]) -> Tensor:
        """The network's output, a chunk at a time."""

        def evaluate(part: slice) -> Tensor:
            if part == slice(0, len(rows)):
                every = {k: v.all() if isinstance(v, Rows) else v for k, v in conditioning.items()}
                return self._call(rows, timestep, every)
            some = {k: v[part] if isinstance(v, Rows) else v for k, v in conditioning.items()}
            return checkpointed(self._call, rows[part], timestep, some)

        return self._chunks(evaluate, len(rows))

    def _call(self, rows: Tensor, timestep: float, conditioning: dict[str, Any]) -> Tensor:
        device, dtype = self._placement() or (rows.device, rows.dtype)
        time = torch.full((len(rows),), timestep, device=device)
        inputs = {name: _to(value, device, dtype) for name, value in conditioning.items()}
        output = self.network(rows.to(device, dtype), time, **inputs)
        output = _tensor_of(output)
        expected = (len(rows),) + tuple(self.output_shape)
        if tuple(output.shape) != expected:
            raise ValueError(
                f"the denoiser returned shape {tuple(output.shape)} for {len(rows)} states of "
                f"shape {tuple(self.event_shape)}; expected {expected} "
                "(a learned variance needs twice the channels, a fixed one must not have them)"
            )
        return output.to(rows.device, rows.dtype)

    def _placement(self) -> tuple[torch.device, torch.dtype] | None:
        """Where and in which type the network computes: what it says, or its first parameter's."""
        if not isinstance(self.network, torch.nn.Module):
            return None
        said: tuple[torch.device, torch.dtype] | None = getattr(self.network, "placement", None)
        if said is not None:
            return said
        parameters = (p for p in self.network.parameters() if p.is_floating_point())
        first = next(parameters, None)
        return None if first is None else (first.device, first.dtype)


@dataclass(frozen=True)
class Rows:
    """
    An entry for each row, where equal ones are kept once: embeddings of texts take megabytes each.

    :param Tensor entries: The entries.
    :param Tensor index: Which of them each row has, of shape ``(rows,)``.
    :param bool one_each: Whether they are the rows as they are.
    """

    entries: Tensor
    index: Tensor
    one_each: bool = False

    @staticmethod
    def of(value: Tensor, split: int, batch_shape: torch.Size) -> Rows:
        """
        Broadcasts a tensor to a batch.

        :param Tensor value: The tensor.
        :param int split: The number of its batch dims.
        :param batch_shape: The batch.
        """
        own, event = value.shape[:split], value.shape[split:]
        entries = value.reshape((-1,) + event)
        index = torch.arange(len(entries), device=value.device).reshape(own)
        index = index.expand(batch_shape).reshape(-1)
        return Rows(entries, index, len(index) == len(entries))

    def joined(self, other: Rows) -> Rows:
        """These rows, then others."""
        index = torch.cat([self.index, other.index + len(self.entries)])
        entries = torch.cat([self.entries, other.entries])
        return Rows(entries, index, self.one_each and other.one_each)

    def at(self, index: Tensor) -> Rows:
        """
        Some of these rows.

        :param Tensor index: Which.
        """
        return Rows(self.entries, self.index[index])

    def __getitem__(self, part: slice) -> Tensor:
        return self.entries[self.index[part]]

    def all(self) -> Tensor:
        """All rows; without a copy where none is there twice."""
        return self.entries if self.one_each else self.entries[self.index]


def _as_tensor(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return torch.as_tensor(value) if is_number or isinstance(value, (list, tuple)) else value


def _to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _tensor_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the denoiser returned {type(output).__name__}; expected a tensor, an object with the "
            "tensor as .sample, or a tuple that starts with it"
        )
    return found
