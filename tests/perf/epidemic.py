# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The likelihood of Pyro's SIR model by summing over all epidemics of a small population."""

from __future__ import annotations

from typing import Any

import torch
from pyro.contrib.epidemiology.distributions import infection_dist
from pyro.contrib.epidemiology.models import SimpleSIRModel
from pyro.distributions import Binomial, ExtendedBinomial
from torch import Tensor

__all__ = ["FixedSIR", "sir_log_likelihood", "sir_posterior", "simulated"]


class FixedSIR(SimpleSIRModel):  # type: ignore[misc]
    """Pyro's SIR model with known parameters."""

    def __init__(self, population: int, tau: float, data: Any, r0: float, rho: float) -> None:
        super().__init__(population, tau, data)
        self.r0, self.rho = torch.tensor(r0), torch.tensor(rho)

    def global_model(self) -> tuple[Tensor, float, Tensor]:
        return self.r0, self.recovery_time, self.rho


def simulated(
    population: int, tau: float, length: int, *, least: int, r0: float, rho: float
) -> Any:
    """Pyro's SIR model with observations of its own: the first outbreak that was seen often."""
    model = SimpleSIRModel(population, tau, [None] * length)
    with torch.random.fork_rng():
        for seed in range(1000):
            torch.manual_seed(seed)
            data = model.generate({"R0": torch.tensor(r0), "rho": torch.tensor(rho)})["obs"]
            if data.sum() >= least:
                return SimpleSIRModel(population, tau, data)
    raise ValueError(f"no outbreak of {least} cases; ask for fewer")


def _nodes(size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Points and weights for ``R0 ~ LogNormal(0, 1)`` and ``rho ~ Beta(10, 10)``."""
    from scipy.special import roots_sh_jacobi

    # the trapezoidal rule converges fast for what is smooth and vanishes at both ends
    z = torch.linspace(-4, 4, size[0], dtype=torch.float64)
    w = torch.softmax(-0.5 * z.square(), 0)
    rho, v = (torch.from_numpy(one) for one in roots_sh_jacobi(size[1], 19.0, 10.0))
    weights = torch.outer(w, v / v.sum()).reshape(-1)
    return z.exp().repeat_interleave(size[1]), rho.repeat(size[0]), weights


def _log_likelihoods(model: SimpleSIRModel, r0: Tensor, rho: Tensor) -> Tensor:
    """By a forward pass over all numbers of susceptible and infectious, for many parameters."""
    size = model.population
    counts = torch.arange(size + 1, dtype=torch.float64)
    recovery = ExtendedBinomial(counts[:, None], 1 / model.recovery_time).log_prob(counts).exp()
    p = infection_dist(
        individual_rate=(r0 / model.recovery_time)[:, None],
        num_infectious=counts,
        num_susceptible=counts,
        population=size,
    ).probs
    alpha = torch.zeros(len(r0), size + 1, size + 1, dtype=torch.float64)
    alpha[:, size - 1, 1] = 1.0
    total = torch.zeros(len(r0), dtype=torch.float64)
    for y in model.data.tolist():
        after = torch.zeros_like(alpha)
        for infectious in range(1, size + 1):
            # those who stay infectious, by how many recover
            staying = recovery[infectious, : infectious + 1].flip(0)
            for new in range(int(y), size - infectious + 1):
                seen = Binomial(float(new), rho).log_prob(torch.tensor(y)).exp()
                mass = alpha[:, new : size - infectious + 1, infectious] * seen[:, None]
                left = counts[new : size - infectious + 1]
                mass = (
                    mass
                    * Binomial(left, p[:, infectious, None])
                    .log_prob(torch.tensor(float(new), dtype=torch.float64))
                    .exp()
                )
                after[:, : len(left), new : new + infectious + 1] += mass[..., None] * staying
        if y == 0:
            # nobody is infectious any more
            after[:, :, 0] += alpha[:, :, 0]
        sums = after.sum((1, 2))
        total, alpha = total + sums.log(), after / sums[:, None, None].clamp(min=1e-300)
    return total


def sir_log_likelihood(model: SimpleSIRModel, size: tuple[int, int] = (64, 10)) -> float:
    """The log-likelihood of a model with its priors, or with the parameters that it fixes."""
    return sir_posterior(model, size)[0]


def sir_posterior(
    model: SimpleSIRModel, size: tuple[int, int] = (64, 10)
) -> tuple[float, float, float]:
    """Log-likelihood, and the posterior means of ``R0`` and ``rho``."""
    if isinstance(model, FixedSIR):
        r0, rho, weights = model.r0[None], model.rho[None], torch.ones(1)
    else:
        r0, rho, weights = _nodes(size)
    terms = weights.double().log() + _log_likelihoods(model, r0.double(), rho.double())
    posterior = terms.softmax(0)
    return (
        float(terms.logsumexp(0)),
        float(posterior @ r0.double()),
        float(posterior @ rho.double()),
    )
