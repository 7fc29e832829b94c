# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Models whose normaliser, tilted law and optimal twist are known exactly."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from pyro_twist.twists import Twist, tilt


class LinearGaussianChain:
    """
    ``x_T ~ N(0, 1)``, ``x_{t-1} ~ N(a x_t, s)``, and a factor ``k sum(x_0)`` at the end.

    :param int num_steps: The number of steps, ``T``.
    :param float k: Slope of the reward.
    :param int dim: The number of independent coordinates, an event dim; 0 for a scalar.
    :param replicates: The size of a plate of independent copies, each a population.
    """

    def __init__(
        self,
        num_steps: int = 4,
        k: float = 1.0,
        a: float = 0.9,
        s: float = 0.5,
        dim: int = 0,
        replicates: int | None = None,
    ) -> None:
        self.timesteps = tuple(range(num_steps, 0, -1))
        self.k, self.a, self.s, self.dim, self.replicates = k, a, s, dim, replicates
        self.plate = None if replicates is None else ("replicates", replicates)
        self.event_shape = (dim,) if dim else ()
        self.num_calls = 0

    @property
    def counts(self) -> dict[str, int]:
        return {"denoiser": self.num_calls}

    def copies(self) -> Any:
        return nullcontext() if self.plate is None else pyro.plate(*self.plate, dim=-1)

    def normal(self, loc: Any, scale: float) -> Any:
        if not self.dim:
            return dist.Normal(torch.as_tensor(loc), scale)
        return dist.Normal(torch.as_tensor(loc).expand(()), scale).expand([self.dim]).to_event(1)

    def init(self, state: Any) -> None:
        with self.copies():
            shape = (self.dim,) if self.dim else ()
            prior = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
            self.write(state, pyro.sample(f"x_{self.timesteps[0]}", prior), self.timesteps[0])

    def kernel(self, state: Any, t: int) -> Any:
        return dist.Normal(self.a * state["x"], self.s).to_event(1 if self.dim else 0)

    def step(self, state: Any, t: int) -> None:
        with self.copies():
            self.write(state, pyro.sample(f"x_{t - 1}", self.kernel(state, t)), t - 1)
            if t == 1:
                self.terminal(state, state["x"])
                state["reward"] = self.reward(state["x"])

    def write(self, state: Any, x: torch.Tensor, t: int) -> None:
        state["x"] = x
        state["x0_hat"] = self.a**t * x
        self.num_calls += x.numel() if t else 0

    def reward(self, x0: torch.Tensor) -> torch.Tensor:
        return x0.sum(-1) if self.dim else x0

    def terminal(self, state: Any, x0: torch.Tensor) -> None:
        """Called inside the plate by ``step``, and outside of it to look ahead."""
        pyro.factor("reward_factor", self.k * self.reward(x0))

    @property
    def variance(self) -> float:
        """The variance of a coordinate of ``x_0`` under the base law."""
        variance = 1.0
        for _ in self.timesteps:
            variance = self.a**2 * variance + self.s**2
        return variance

    @property
    def log_normalizer(self) -> float:
        return 0.5 * self.k**2 * self.variance * max(self.dim, 1)

    @property
    def tilted_mean(self) -> float:
        """The mean of a coordinate of ``x_0`` under the tilted law; its variance stays."""
        return self.k * self.variance


class ExactTwist(Twist):
    """The optimal twist of :class:`LinearGaussianChain`, or with ``strength < 1`` a part of it."""

    def __init__(self, model: LinearGaussianChain, strength: float = 1.0) -> None:
        super().__init__(model)
        self.strength = strength

    def slope(self, t: int) -> float:
        return self.strength * self.model.k * self.model.a**t

    def get_posterior(self, name: str, prior: Any) -> Any:
        return tilt(prior, torch.tensor(self.slope(int(name.removeprefix("x_")))))

    def log_twist(self, state: Any, t: int | None = None) -> torch.Tensor:
        now = self.model.timesteps[0] if t is None else t - 1
        value = self.slope(now) * self.model.reward(state["x"].double())
        spread = sum((self.slope(s) * self.model.s) ** 2 for s in range(now))
        return value + 0.5 * spread * max(self.model.dim, 1)


class ExactGuide:
    """The same proposal as :class:`ExactTwist`, as an explicit guide without a twist."""

    def __init__(self, model: LinearGaussianChain) -> None:
        self.model = model
        self.twist = ExactTwist(model)

    def init(self, state: Any) -> None:
        T = self.model.timesteps[0]
        with self.model.copies():
            pyro.sample(f"x_{T}", self.model.normal(self.twist.slope(T), 1.0))

    def step(self, state: Any, t: int) -> None:
        with self.model.copies():
            kernel = self.model.kernel(state, t)
            pyro.sample(f"x_{t - 1}", tilt(kernel, torch.tensor(self.twist.slope(t - 1))))
