# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Where an inference run takes its random numbers from, and how a failed step gives them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["RandomStream"]


_MIX = 0x9E3779B97F4A7C15


def _get_states() -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


class RandomStream:
    """
    The global random stream of torch, or one private to a run.

    A private stream depends on nothing but its seed and disturbs nothing outside: torch's global
    state is swapped for the stream's own while a step runs. A step that fails leaves either stream
    where it was, so that repeating the step repeats its draws.

    :param int seed: The seed of a private stream; ``None`` for the global one.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._states: dict[str, Any] | None = None
        self._generator: torch.Generator | None = None

    def restart(self) -> None:
        """Puts a private stream back to its seed."""
        self._states = None
        self._generator = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Draws inside the context come from this stream."""
        outside = _get_states()
        self._enter()
        try:
            yield
        except BaseException:
            _set_states(outside)
            raise
        if self.seed is not None:
            self._states = _get_states()
            _set_states(outside)

    def _enter(self) -> None:
        if self.seed is None:
            return
        if self._states is None:
            torch.manual_seed(self.seed)
        else:
            _set_states(self._states)

    def generator(self) -> torch.Generator:
        """
        A generator of its own for resampling, made at the first call.

        It is seeded from the stream only when something is resampled, so that a run that never
        resamples leaves the base sampler's draws as they are.
        """
        if self._generator is None:
            # a seed of its own: from the noise's seed, the generator would repeat the noise
            own = self.seed is not None and (self.seed * _MIX + 1) % 2**63
            seed = own or int(torch.randint(2**62, ()))
            self._generator = torch.Generator().manual_seed(seed)
        return self._generator

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on drawing the same numbers."""
        return {
            "seed": self.seed,
            "states": _get_states() if self.seed is None else self._states,
            "generator": None if self._generator is None else self._generator.get_state(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores the stream; a global one by setting torch's global state."""
        self.seed = saved["seed"]
        self._generator = None
        if saved["generator"] is not None:
            self._generator = torch.Generator()
            self._generator.set_state(saved["generator"])
        if self.seed is None:
            _set_states(saved["states"])
        else:
            self._states = saved["states"]
