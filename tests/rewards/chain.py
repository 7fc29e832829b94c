# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""A linear-Gaussian reverse process that stands in for a diffusion model."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine


class Chain:
    """
    ``x_T ~ N(0, 1)`` and ``x_{t-1} ~ N(a x_t, s)``, in every coordinate of ``event_shape``.

    :param plate: name and size of a plate at dim -1 around every site, or ``None``.
    """

    a, s = 0.8, 0.5

    def __init__(
        self,
        event_shape: tuple[int, ...] = (2,),
        num_steps: int = 3,
        plate: tuple[str, int] | None = None,
    ) -> None:
        self.event_shape = event_shape
        self.timesteps = tuple(range(num_steps, 0, -1))
        self.plate = plate
        # Creating a plate emits a site, which a trace of several steps can only hold once.
        with poutine.block():
            self._plate = nullcontext() if plate is None else pyro.plate(*plate, dim=-1)
        self.keep_graph = False
        self.counts = {"denoiser": 0}

    def __call__(self) -> torch.Tensor:
        state: dict[str, Any] = {}
        self.init(state)
        for t in self.timesteps:
            self.step(state, t)
        return state["x"]

    def init(self, state: Any) -> None:
        zeros = torch.zeros(self.event_shape)
        self._sample(state, len(self.timesteps), dist.Normal(zeros, 1.0).to_event())

    def step(self, state: Any, t: int) -> None:
        self._sample(state, t - 1, self.kernel(state, t))

    def kernel(self, state: Any, t: int) -> Any:
        return dist.Normal(self.a * state["x"], self.s).to_event(len(self.event_shape))

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def terminal(self, state: Any, x0: torch.Tensor) -> None:
        pass

    def _sample(self, state: Any, t: int, fn: Any) -> None:
        with self._plate:
            x = pyro.sample(f"x_{t}", fn)
        rows = x.numel() // math.prod(self.event_shape)
        self.counts["denoiser"] += rows if t else 0
        state["x"] = x
        state["x0_hat"] = self.a**t * x

    @property
    def end_variance(self) -> float:
        variance = 1.0
        for _ in self.timesteps:
            variance = self.a**2 * variance + self.s**2
        return variance


class Prior:
    """The base chain as a guide, which may not write the state."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def init(self, state: Any) -> None:
        self.chain.init({})

    def step(self, state: Any, t: int) -> None:
        self.chain.step(dict(state), t)
