# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Moves leave laws alone and make values differ; z-tests fail by chance once in a million."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.reparam import TransformReparam
from torch import Tensor, tensor

from pyro_twist import handlers
from pyro_twist.diffusion import ProductOfModels
from pyro_twist.hierarchies import SetOf
from pyro_twist.infer import ImportanceSampling, TwistedSMC, move_latents
from pyro_twist.latents import WithLatents
from pyro_twist.rewards import RewardTilted, Tilted
from tests.diffusion.test_products import classes
from tests.infer.composition import composes, refuses
from tests.infer.test_evidence import LEARNING
from tests.infer.test_handlers import guided_diffusion, law_of
from tests.oracles import LinearGaussianChain
from tests.statistics import assert_mean, assert_tilted_mean, assert_unbiased

REPLICATES, OBSERVED = 800, 1.2
NOISES = tensor([0.4, 1.5])


def instrument() -> dict[str, Tensor]:
    """An offset with a prior, and one of two detectors, which depends on it."""
    offset = pyro.sample("offset", dist.LogNormal(-0.5, 0.4))
    kind = pyro.sample("kind", dist.Categorical(logits=torch.stack([0 * offset, -offset], -1)))
    return {"offset": offset, "noise": NOISES[kind], "kind": kind}


def likelihood(state: Any, x0: Tensor) -> None:
    pyro.sample("y", dist.Normal(x0 + state["offset"], state["noise"]), obs=tensor(OBSERVED))


def measured(replicates: int | None = REPLICATES) -> Any:
    chain = LinearGaussianChain(3, k=0.0, replicates=replicates)
    return Tilted(WithLatents(chain, instrument), likelihood)


def posterior(
    variance: float, power: float = 1.0, kind: int | None = None
) -> tuple[float, float, float]:
    """
    Log evidence, posterior mean of the offset and of the kind, by quadrature.

    Of the joint density to a power, but for that of the path; a normal density to a power is one of
    a smaller variance, and a constant. With ``kind`` the detector is observed.
    """
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    offset, variances = (-0.5 + 0.4 * z).exp(), NOISES.double().square()
    kinds = torch.stack([0 * offset, -offset], -1).log_softmax(-1)
    law = dist.Normal(offset[:, None], ((variance + variances) / power).sqrt())
    constant = 0.5 * (1 - power) * (2 * math.pi * variances).log() - 0.5 * math.log(power)
    log_joint = law.log_prob(tensor(OBSERVED).double()) + constant + power * kinds
    # the prior's density is in the offset, whose element of volume is 0.4 offset dz
    prior = dist.LogNormal(-0.5, 0.4).log_prob(offset) * power + (0.4 * offset).log()
    joint = (log_joint + prior[:, None]).exp()
    joint = joint if kind is None else joint * (torch.arange(2) == kind)
    total = joint.sum()
    mean = float((joint.sum(1) @ offset) / total)
    return math.log(float(total * (z[1] - z[0]))), mean, float(joint[:, 1].sum() / total)


@composes(
    LEARNING,
    "`move_latents(model, result)`",
    "Metropolis-Hastings moves of latents that only the potential reads, given the end of each "
    "path: the law stays, and what resampling has made equal becomes different",
)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_moves_leave_the_law(threshold: float) -> None:
    pyro.set_rng_seed(0)
    model = measured()
    options: dict[str, Any] = {"population_plate": "replicates", "history": "paths", "seed": 0}
    result = TwistedSMC(model, None, 24, 1, ess_threshold=threshold, **options).run()
    moved = move_latents(model, result, 3)
    log_z, offset, kind = posterior(LinearGaussianChain(3).variance)
    assert torch.equal(moved.log_weights, result.log_weights)
    assert_unbiased(moved.log_normalizer, log_z)
    assert_tilted_mean(moved.log_normalizer, moved.expectation("offset"), log_z, offset)
    share = moved.expectation(lambda state: state["kind"].double())
    assert_tilted_mean(moved.log_normalizer, share, log_z, kind)
    changed = (moved.state["offset"] != result.state["offset"]).double().mean()
    assert changed > 0.5 and (moved.state["kind"] != result.state["kind"]).any()
    assert torch.equal(moved.state["offset"], moved.samples["offset"])
    assert torch.equal(moved.state["noise"], NOISES[moved.state["kind"]])


@composes(
    LEARNING,
    "`move_latents` of a handled model",
    "a scale is a power of the density of latents as of the potential; what is conditioned on, or "
    "set by `do`, stays; after `reparam` the auxiliary site moves",
)
@pytest.mark.parametrize("how", ["scale", "condition", "do", "reparam", "plate"])
def test_moves_inside_handlers(how: str) -> None:
    """Ten moves from weighted particles of the law itself, so that another law would show."""
    model, chain = measured(), LinearGaussianChain(3)
    log_z, offset, kind = posterior(chain.variance)
    handled: Any = handlers.handle(measured(None), pyro.plate("replicates", REPLICATES, dim=-1))
    if how == "scale":
        handled = handlers.scale(model, 0.7)
        log_z, offset, kind = posterior(chain.variance, 0.7)
        log_z += law_of(chain).power(0.7).log_z
    elif how == "condition":
        handled = handlers.condition(model, {"kind": tensor(1)})
        log_z, offset, kind = posterior(chain.variance, kind=1)
    elif how == "do":
        handled = handlers.do(model, {"offset": tensor(0.8)})
        log_z, offset, kind = known_offset(chain.variance, 0.8)
    elif how == "reparam":
        handled = handlers.reparam(model, {"offset": TransformReparam()})
    options: dict[str, Any] = {"population_plate": "replicates", "history": "paths", "seed": 0}
    result = TwistedSMC(handled, None, 24, 1, ess_threshold=0.5, **options).run()
    moved = move_latents(handled, result, 10, seed=1)
    assert_unbiased(moved.log_normalizer, log_z)
    if how == "do":
        assert bool((moved.state["offset"] == 0.8).all())
    else:
        assert_tilted_mean(moved.log_normalizer, moved.expectation("offset"), log_z, offset)
    share = moved.expectation(lambda state: state["kind"].double())
    assert_tilted_mean(moved.log_normalizer, share, log_z, kind)
    changed = (moved.state["offset"] != result.state["offset"]).any()
    assert bool(changed) == (how != "do")


def known_offset(variance: float, offset: float) -> tuple[float, float, float]:
    """The same where the offset is known."""
    kinds = tensor([0.0, -offset], dtype=torch.float64).log_softmax(-1)
    law = dist.Normal(offset, (variance + NOISES.double().square()).sqrt())
    joint = law.log_prob(tensor(OBSERVED).double()) + kinds
    return float(joint.logsumexp(0)), offset, float(joint.softmax(0)[1])


@composes(
    LEARNING,
    "`move_latents` of what the entries of a plate share",
    "one proposal for all entries, accepted by the sum of their potentials",
)
def test_moves_of_shared_latents() -> None:
    """Three readings of a shared offset, of which the prior itself observes one."""
    pyro.set_rng_seed(0)
    chain, y = LinearGaussianChain(3, k=0.0, replicates=3), tensor([0.4, 1.0, -0.1])

    def prior() -> dict[str, Tensor]:
        shared = pyro.sample("shared", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("told", dist.Normal(shared, 0.8), obs=tensor(0.9))
        return {"shared": shared}

    def readings(state: Any, x0: Tensor) -> None:
        pyro.sample("y", dist.Normal(x0 + state["shared"], 0.7), obs=y)

    model = Tilted(WithLatents(chain, prior, shared=True), readings)
    smc = TwistedSMC(model, None, 20_000, 1, seed=0, resampling="none", history="paths")
    result = smc.run()
    moved = move_latents(model, result, 10)
    assert moved.state["shared"].shape == (20_000, 1)
    variances = tensor([0.64, *[chain.variance + 0.49] * 3]).double()
    seen = torch.cat([tensor([0.9]), y]).double()
    covariance = variances.diag() + 1.0
    law = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance)
    log_z, mean = float(law.log_prob(seen)), float(torch.linalg.solve(covariance, seen).sum())
    terms = (result.log_weights - log_z).exp()
    assert_mean(terms, 1.0)
    shared = moved.state["shared"][:, 0].double()
    assert_mean(terms * shared, mean)
    spread = float(1 - torch.linalg.solve(covariance, torch.ones(4).double()).sum())
    assert_mean(terms * (shared - mean).square(), spread)


@pytest.mark.parametrize("shape", [(3, 1), (1,), (2,)])
def test_moves_of_latents_with_event_dims(shape: tuple[int, ...]) -> None:
    """Their sum is seen: normal, with as large a variance as there are entries."""
    chain, number = LinearGaussianChain(3, k=0.0), math.prod(shape)

    def prior() -> dict[str, Tensor]:
        law = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
        return {"parts": pyro.sample("parts", law)}

    def seen(state: Any, x0: Tensor) -> None:
        total = state["parts"].flatten(1).sum(-1)
        pyro.sample("y", dist.Normal(x0 + total, 0.6), obs=tensor(0.9))

    model = Tilted(WithLatents(chain, prior), seen)
    smc = TwistedSMC(model, None, 20_000, seed=0, resampling="none", history="paths")
    result = smc.run()
    moved = move_latents(model, result, 10, seed=2)
    assert moved.state["parts"].shape == (20_000, *shape)
    variance = chain.variance + 0.36 + number
    log_z = float(dist.Normal(0.0, math.sqrt(variance)).log_prob(tensor(0.9)))
    total = moved.state["parts"].double().flatten(1).sum(-1)
    assert_mean((result.log_weights - log_z).exp() * total, 0.9 * number / variance)


def test_moves_depend_on_their_seed_alone() -> None:
    model = measured(None)
    result = ImportanceSampling(model, 8, seed=0, history="paths").run()
    before = torch.get_rng_state()
    one, again, other = (move_latents(model, result, 3, seed=s).state["offset"] for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(move_latents(model, result, 0).state["offset"], result.state["offset"])


def test_moves_find_the_law_from_one_value() -> None:
    """All particles with one offset, as after much resampling: many moves forget it."""
    pyro.set_rng_seed(0)
    model = measured(None)
    result = ImportanceSampling(model, 4000, seed=0, history="paths").run()
    drawn = result.resample()
    one = torch.full_like(drawn.samples["offset"], 1.5)
    stuck = {**drawn.samples, "offset": one}
    found = move_latents(model, type(drawn)(**{**vars(drawn), "samples": stuck}), 60)
    _, offset, _ = posterior(LinearGaussianChain(3).variance)
    # five standard errors of a mean of draws that share some of their ends
    assert float(found.expectation("offset")) == pytest.approx(offset, abs=0.03)


@refuses(
    LEARNING,
    "`move_latents` of what a denoiser reads, such as a class",
    "error: given its end, a path still depends on it",
)
def test_moves_of_what_the_path_depends_on() -> None:
    diffusion = guided_diffusion()

    def prior() -> dict[str, Tensor]:
        return {"class_labels": pyro.sample("label", dist.Categorical(torch.ones(2)))}

    model = RewardTilted(WithLatents(diffusion, prior), lambda x: x[:, 0], decode=False)
    options: dict[str, Any] = {"population_plate": "replicates", "history": "paths"}
    result = TwistedSMC(model, None, 2, 1, **options).run()
    with pytest.raises(ValueError, match=r"the denoiser reads \['class_labels'\]"):
        move_latents(model, result)

    both = ProductOfModels([classes(None)], reads=[{"class_labels": "which"}])
    drawn = WithLatents(both, lambda: {"which": pyro.sample("u", dist.Categorical(torch.ones(2)))})
    named = Tilted(drawn, lambda state, x0: pyro.factor("f", x0[..., 0]))
    result = ImportanceSampling(named, 4, history="paths").run()
    with pytest.raises(ValueError, match=r"the denoiser reads \['which'\]"):
        move_latents(named, result)

    class Drifting(LinearGaussianChain):
        def kernel(self, state: Any, t: int) -> Any:
            return dist.Normal(self.a * state["x"] + state["noise"], self.s)

    drifting = Tilted(WithLatents(Drifting(3), instrument), likelihood)
    result = ImportanceSampling(drifting, 4, history="paths").run()
    with pytest.raises(ValueError, match=r"the kernel reads \['noise'\]"):
        move_latents(drifting, result)


def test_what_cannot_be_moved() -> None:
    model = measured(None)
    result = ImportanceSampling(model, 4, seed=0).run()
    with pytest.raises(ValueError, match="history='paths'"):
        move_latents(model, result)
    for other in (
        LinearGaussianChain(2),
        SetOf(WithLatents(LinearGaussianChain(2), instrument), 2),
    ):
        with pytest.raises(ValueError, match="no latents beside its trajectory"):
            move_latents(other, result)
    with pytest.raises(ValueError, match="num_moves=-1"):
        move_latents(model, result, -1)
    hidden = handlers.block(model, hide=["kind"])
    result = ImportanceSampling(hidden, 4, seed=0, history="paths").run()
    with pytest.raises(ValueError, match=r"hides the latents \['kind'\]"):
        move_latents(hidden, result)


def test_what_depends_on_one_latent_in_a_plate_of_its_own() -> None:
    def prior() -> dict[str, Tensor]:
        shared = pyro.sample("shared", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("parts", 3, dim=-1):
            pyro.sample("part", dist.Normal(shared, 1.0))
        return {"shared": shared}

    def seen(state: Any, x0: Tensor) -> None:
        pyro.factor("seen", state["shared"] * x0)

    model = Tilted(WithLatents(LinearGaussianChain(2), prior), seen)
    result = TwistedSMC(model, None, 4, 1, seed=0, history="paths").run()
    moved = move_latents(model, result, 2, seed=0)
    assert moved.state["shared"].shape == (4, 1) and moved.samples["part"].shape == (4, 3)
