# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_twist.infer import TrustRegionTwist
from pyro_twist.twists import LinearTwist, ShiftTwist, Twist, fit_likelihood, tilt
from pyro_twist.twists.learned import linear_part, log_likelihood, step_statistics
from pyro_twist.twists.statistics import (
    PathSums,
    Statistics,
    WeightedSums,
    linear_statistics,
)
from tests.oracles import LinearGaussianChain


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Pull(LinearTwist):
    """Features that differ by particle, and share their blocks between steps."""

    def __init__(self, model: Any, ridge: float = 1e-3) -> None:
        super().__init__(model, 2, 2, ridge=ridge)

    def block(self) -> int:
        return int(self.time_after(*self.args_kwargs[0][1:]) < 2)

    def features(self, name: str, prior: Any) -> torch.Tensor | None:
        state = self.args_kwargs[0][0]
        if "x" not in state:
            return None
        return torch.stack([torch.ones_like(state["x"]), state["x"].cos()])


class Even(LinearTwist):
    """Features that all particles share, over steps of different scale."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, 1)

    def features(self, name: str, prior: Any) -> torch.Tensor | None:
        return torch.ones((1,) * (1 + prior.mean.dim()))


class Drift(Twist):
    """A fixed tilt beside the one that is fitted."""

    def get_posterior(self, name: str, prior: Any) -> Any:
        return tilt(prior, torch.tensor(0.8))


class Ahead(Twist):
    """Makes passes resample."""

    def log_twist(self, state: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = state["x"]
        return x.sum(-1) if self.model.event_shape else x


class Crossed:
    """A chain in two plates, the inner of them the populations."""

    event_shape = (2,)
    timesteps = (3, 2, 1)

    @contextmanager
    def plates(self) -> Iterator[None]:
        with pyro.plate("copies", 4, dim=-2), pyro.plate("prompts", 3, dim=-1):
            yield

    def init(self, state: Any) -> None:
        with self.plates():
            state["x"] = pyro.sample("x_3", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def step(self, state: Any, t: int) -> None:
        with self.plates():
            kernel = dist.Normal(0.9 * state["x"], 0.5).to_event(1)
            state["x"] = pyro.sample(f"x_{t - 1}", kernel)
            if t == 1:
                pyro.factor("reward", 0.3 * state["x"].sum(-1))


def sampled(twist: Any, particles: int = 30, **options: Any) -> TrustRegionTwist:
    settings: dict[str, Any] = {"seed": 0, "ess_threshold": 1.0, "kl_budget": 0.4, **options}
    smc = TrustRegionTwist(twist.model, twist, particles, **settings)
    smc.sample()
    return smc


REPLICATED: dict[str, Any] = {"max_plate_nesting": 1, "population_plate": "replicates"}
CROSSED: dict[str, Any] = {"max_plate_nesting": 2, "population_plate": "prompts"}


def chain(**options: Any) -> LinearGaussianChain:
    return LinearGaussianChain(4, **{"dim": 2, **options})


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "shift": (lambda: ShiftTwist(chain()), {}),
    "scalar": (lambda: ShiftTwist(chain(dim=0)), {}),
    "even": (lambda: Even(chain()), {}),
    "even, populations": (lambda: Even(chain(replicates=3)), REPLICATED),
    "pull": (lambda: Pull(chain()), {}),
    "beside a fixed drift": (lambda: Drift(one := chain()) + Pull(one), {}),
    "shift, populations": (lambda: ShiftTwist(chain(replicates=3)), REPLICATED),
    "pull, populations": (lambda: Pull(chain(replicates=3)), REPLICATED),
    "pull, plate": (lambda: Pull(chain(replicates=3)), {"max_plate_nesting": 1}),
    "shift, two plates": (lambda: ShiftTwist(Crossed()), CROSSED),
    "pull, two plates": (lambda: Pull(Crossed()), CROSSED),
}


def made(case: str) -> tuple[Any, LinearTwist, dict[str, Any]]:
    make, options = CASES[case]
    twist = make()
    twist = Ahead(twist.model) + twist
    part = linear_part(twist)
    assert part is not None
    return twist, part, options


@pytest.mark.parametrize("case", CASES)
def test_likelihood_is_the_quadratic(case: str) -> None:
    """Against the log-density of the tilted kernels themselves, at any parameters."""
    twist, part, options = made(case)
    smc = sampled(twist, **options)
    assert any(a is not None for a in smc.passes[0].ancestors)
    paths, (sums,) = smc._batches(0.5)[0], smc._evidence(0.5)(None, True)
    found, expected = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            part.theta.normal_()
        found.append(log_likelihood(twist, [sums]))
        expected.append(log_likelihood(twist, [paths]))
    for k in (1, 2):  # up to a number that does not depend on the parameters
        assert found[k] - found[0] == pytest.approx(expected[k] - expected[0], rel=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_solution_is_the_maximum(case: str) -> None:
    """The gradient of the likelihood of whole paths is zero, beside fixed drifts as well."""
    twist, part, options = made(case)
    smc = sampled(twist, centring=0.0, **options)
    part.ridge = 0.0
    fit_likelihood(twist, smc._evidence(0.5)(None, True))
    likelihood = smc._batches(0.5)[0].log_likelihood(twist)
    (gradient,) = torch.autograd.grad(likelihood, [part.theta])
    assert gradient.abs().max() < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_noise_is_what_the_proposal_does_not_explain(case: str) -> None:
    twist, part, options = made(case)
    with torch.no_grad():
        part.theta.normal_()
    smc = sampled(twist, **options)
    for sites in smc.passes[0].steps:
        found = step_statistics(twist, part, sites[0])
        if found is None:
            continue
        noise = sites[0].value - sites[0].posterior.mean
        part.args_kwargs, part.stepping = ((sites[0].state, *sites[0].args), {}), sites[0].stepping
        features = part.features(sites[0].name, sites[0].prior)
        assert features is not None
        products = features * noise
        axis = sites[0].population_axis
        keep = {0, 1} if axis is None else {0, 1, 1 + axis}
        rest = [dim for dim in range(products.dim()) if dim not in keep]
        summed = (products.sum(rest) if rest else products).movedim(0, -1)
        assert torch.allclose(found.score - found.drift, summed, atol=1e-12)


def test_what_particles_share_is_kept_once() -> None:
    torch.manual_seed(0)
    loc = torch.randn(5, 3)
    value, shared, single = torch.randn(5, 3), torch.randn(2, 1, 3), torch.randn(2, 5, 3)
    for features, scale, rows in [
        (shared, torch.tensor(0.5), 1),
        (shared.expand(2, 5, 3), torch.tensor(0.5), 1),
        (single, torch.tensor(0.5), 5),
        (shared, torch.rand(5, 3) + 0.1, 5),
    ]:
        kernel = dist.Normal(loc, scale)
        found = linear_statistics(features, value, kernel, kernel)
        expected = torch.einsum("knm,lnm,nm->nkl", *2 * [features.expand(2, 5, 3)], kernel.variance)
        assert found.information.shape == (rows, 2, 2)
        assert torch.allclose(found.information.expand(5, 2, 2), expected)
        assert torch.allclose(found.score, (features * (value - loc)).sum(-1).T)
        assert not found.drift.any()


def test_sums_along_paths_leave_earlier_ones_alone() -> None:
    torch.manual_seed(0)

    def step(block: int, rows: int) -> Statistics:
        shapes = (3, 2), (3, 2), (rows, 2, 2)
        score, drift, information = (torch.randn(shape) for shape in shapes)
        return Statistics(score, drift, information, block)

    first, again, other = step(1, 1), step(1, 3), step(0, 1)
    sums = [PathSums.empty((3,), (4, 2), torch.device("cpu"))]
    for one in (first, again, other):
        sums.append(sums[-1] + one)
    assert [len(one.statistics()) for one in sums] == [0, 1, 1, 2]
    (before,), (after,) = sums[1].statistics(), sums[2].statistics()
    for name in ("score", "drift", "information"):
        assert torch.equal(getattr(before, name), getattr(first, name))
        assert torch.allclose(getattr(after, name), getattr(first, name) + getattr(again, name))
        last = getattr(sums[3].statistics()[0], name)
        assert torch.equal(last, getattr(other, name).expand_as(last))
    flipped = sums[1].take(lambda value: value.flip(0)).statistics()[0]
    assert torch.equal(flipped.score, first.score.flip(0))
    assert torch.equal(flipped.information, first.information)


def test_sums_for_several_sets_of_weights() -> None:
    torch.manual_seed(0)
    smc, theta = sampled(Pull(LinearGaussianChain(4, dim=2))), torch.zeros(2, 2)
    weights, base = torch.rand(2, 3, 30)
    together, single = WeightedSums(3, theta), [WeightedSums(1, theta) for _ in range(3)]
    for sites in smc.passes[0].steps:
        found = step_statistics(smc.guide, smc.guide, sites[0])
        if found is not None:
            together.add(found, weights, base)
            for k in range(3):
                single[k].add(found, weights[k : k + 1], base[k : k + 1])
    for k in range(3):
        for name in ("score", "noise", "information"):
            assert torch.allclose(getattr(together[k], name), getattr(single[k][0], name))


def test_sites_that_are_left_alone() -> None:
    """A site without noise, and one that has no features."""
    chain = LinearGaussianChain(2, dim=2)
    twist = Pull(chain)
    first, second, _ = (sites[0] for sites in sampled(twist).passes[0].steps)
    assert twist.statistics(first) is None and twist.statistics(second) is not None
    point = dist.Delta(second.value, event_dim=1)
    assert twist.statistics(second, point) is None
