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
from torch import Tensor, tensor

from pyro_twist.infer import ImportanceSampling, TwistedSMC, move_latents
from pyro_twist.latents import WithLatents
from pyro_twist.rewards import RewardTilted, Tilted
from tests.infer.composition import composes, refuses
from tests.infer.test_evidence import LEARNING
from tests.infer.test_handlers import guided_diffusion
from tests.oracles import LinearGaussianChain
from tests.statistics import assert_tilted_mean, assert_unbiased

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


def posterior(variance: float) -> tuple[float, float, float]:
    """Log evidence, posterior mean of the offset and of the kind, by quadrature."""
    z = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    offset = (-0.5 + 0.4 * z).exp()
    kinds = torch.stack([0 * offset, -offset], -1).log_softmax(-1)
    law = dist.Normal(offset[:, None], (variance + NOISES.double().square()).sqrt())
    log_joint = law.log_prob(tensor(OBSERVED).double()) + kinds
    joint = (log_joint + dist.Normal(0.0, 1.0).log_prob(z)[:, None]).exp()
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


def test_what_cannot_be_moved() -> None:
    model = measured(None)
    result = ImportanceSampling(model, 4, seed=0).run()
    with pytest.raises(ValueError, match="history='paths'"):
        move_latents(model, result)
    with pytest.raises(ValueError, match="no latents beside its trajectory"):
        move_latents(LinearGaussianChain(2), result)
