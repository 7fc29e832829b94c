# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Models whose normaliser, tilted law and optimal twist are known exactly."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from pyro_twist.diffusion import MaskedDiffusion
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


class MaskedChain:
    """
    Masked diffusion with a table as its denoiser, and its exact laws by summing over all sequences.

    The table has arbitrary logits for every partially masked sequence, so that the model is no
    product over positions, and what the kernels are is written down here a second time. A sequence
    is known by its index, its digits to base ``vocab_size``.

    :param int length: The length L.
    :param int vocab_size: The number of tokens V with the mask, so that there are V^L sequences.
    :param int mask_token_id: The mask.
    :param bool product: Whether the prediction depends on nothing but the position.
    :param options: Options of :class:`~pyro_twist.diffusion.MaskedDiffusion`.
    """

    def __init__(
        self,
        length: int = 3,
        vocab_size: int = 4,
        mask_token_id: int = 3,
        *,
        seed: int = 0,
        product: bool = False,
        **options: Any,
    ) -> None:
        self.length, self.vocab_size, self.mask = length, vocab_size, mask_token_id
        generator = torch.Generator().manual_seed(seed)
        self.size = vocab_size**length
        shape = (1 if product else self.size, length, vocab_size)
        self.table = torch.randn(shape, generator=generator).expand(self.size, -1, -1)
        self.sequences = list(itertools.product(range(vocab_size), repeat=length))
        self.options = options
        self.diffusion = MaskedDiffusion(
            self.denoiser, length, vocab_size, mask_token_id, **options
        )
        #: A reward of every sequence without masks.
        self.rewards = torch.randn(self.size, generator=generator, dtype=torch.float64)

    def index(self, tokens: torch.Tensor) -> torch.Tensor:
        powers = self.vocab_size ** torch.arange(self.length - 1, -1, -1)
        return (tokens * powers).sum(-1)

    def denoiser(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[self.index(tokens)]

    def reward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.rewards[self.index(tokens)]

    def token_probs(self, x: int) -> torch.Tensor:
        """What the denoiser gives each token at each position of a sequence."""
        logits = self.table[x].double() / self.options.get("temperature", 1.0)
        logits = logits.clone()
        logits[:, [self.mask, *self.options.get("forbidden_token_ids", ())]] = -math.inf
        return logits.softmax(-1)

    def transition(self, t: int) -> torch.Tensor:
        """Probabilities of ``x_{t-1}`` (columns) given ``x_t`` (rows)."""
        step = self._group if self.options.get("unmasking") == "uniform" else self._ancestral
        return torch.stack([step(x, t) for x in range(self.size)])

    def _fixed(self, position: int) -> bool:
        prompt = self.options.get("prompt")
        return prompt is not None and int(prompt[position]) != self.mask

    def _ancestral(self, x: int, t: int) -> torch.Tensor:
        alpha = self.options.get("schedule", lambda time: 1.0 - time)
        steps = self.options["num_inference_steps"]
        now, later = alpha(t / steps), alpha((t - 1) / steps)
        kind, eta = self.options.get("remasking") or ("capped", 0.0)
        most = min(1.0, (1 - later) / now) if now > 0 else 1.0
        remask = min(eta, most) if kind == "capped" else eta * most
        stay = (1 - later - remask * now) / (1 - now)
        row, probs = torch.ones((), dtype=torch.float64), self.token_probs(x)
        for position, token in enumerate(self.sequences[x]):
            one = torch.zeros(self.vocab_size, dtype=torch.float64)
            if token == self.mask:
                one = (1 - stay) * probs[position]
                one[self.mask] = stay
            elif self._fixed(position):
                one[token] = 1.0
            else:
                one[token], one[self.mask] = 1 - remask, remask
            row = (row[..., None] * one).reshape(-1)
        return row

    def _group(self, x: int, t: int) -> torch.Tensor:
        tokens, probs = self.sequences[x], self.token_probs(x)
        masked = [i for i, token in enumerate(tokens) if token == self.mask]
        size = min(self.options.get("group_size", 1), len(masked))
        groups = list(itertools.combinations(masked, size))
        total = torch.zeros(self.size, dtype=torch.float64)
        for group in groups:
            row = torch.ones((), dtype=torch.float64)
            for position, token in enumerate(tokens):
                one = torch.zeros(self.vocab_size, dtype=torch.float64)
                one[token] = 1.0
                row = (row[..., None] * (probs[position] if position in group else one)).reshape(-1)
            total += row / len(groups)
        return total

    def laws(self) -> list[torch.Tensor]:
        """The laws of ``x_T`` to ``x_0``."""
        start = torch.zeros(self.size, dtype=torch.float64)
        start[int(self.index(self.diffusion.prompt))] = 1.0
        laws = [start]
        for t in self.diffusion.timesteps:
            laws.append(laws[-1] @ self.transition(t))
        return laws

    def path_law(self) -> torch.Tensor:
        """The joint law of ``x_{T-1}`` to ``x_0``, one dim each."""
        first, *rest = self.diffusion.timesteps
        law = self.transition(first)[int(self.index(self.diffusion.prompt))]
        for t in rest:
            law = law[..., None] * self.transition(t)
        return law

    def psi(self) -> list[torch.Tensor]:
        """The exact optimal twist of :attr:`rewards`, at times 0 to T."""
        psi = [self.rewards.exp()]
        for t in reversed(self.diffusion.timesteps):
            psi.append(self.transition(t) @ psi[-1])
        return psi

    @property
    def log_normalizer(self) -> float:
        return float((self.laws()[-1] @ self.rewards.exp()).log())

    @property
    def tilted(self) -> torch.Tensor:
        """The law of ``x_0``, tilted by the reward."""
        weights = self.laws()[-1] * self.rewards.exp()
        return weights / weights.sum()


class TableKernel(dist.TorchDistribution):
    """A law over all sequences of a :class:`MaskedChain`, given by its log-probabilities."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, chain: MaskedChain, log_probs: torch.Tensor) -> None:
        self.chain, self.log_probs = chain, log_probs
        self.values = torch.tensor(chain.sequences)
        super().__init__(log_probs.shape[:-1], (chain.length,), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        rows = self.log_probs.exp().reshape(-1, self.chain.size)
        drawn = torch.multinomial(rows, 1)[:, 0].reshape(self.batch_shape)
        return self.values[drawn]

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return self.log_probs.gather(-1, self.chain.index(value)[..., None])[..., 0]


class ExactMaskedTwist(Twist):
    """The optimal twist and proposal of a :class:`MaskedChain`."""

    def __init__(self, model: Any, chain: MaskedChain) -> None:
        super().__init__(model)
        self.chain, self.psi = chain, chain.psi()
        self.kernels = {t: chain.transition(t) for t in chain.diffusion.timesteps}

    def get_posterior(self, name: str, prior: Any) -> Any:
        if not self.stepping:
            return prior
        state, t = self.args_kwargs[0]
        weights = self.kernels[t] * self.psi[t - 1] / self.psi[t][:, None]
        return TableKernel(self.chain, weights[self.chain.index(state["x"])].log())

    def log_twist(self, state: Any, t: int | None = None) -> torch.Tensor:
        now = self.chain.diffusion.timesteps[0] if t is None else t - 1
        return self.psi[now][self.chain.index(state["x"])].log()
