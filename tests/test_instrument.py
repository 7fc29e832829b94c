# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""A diffusion prior in an inverse problem with an unknown instrument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from pyro_twist import AutoLatents, JointTwist, LookaheadTwist, WithLatents
from pyro_twist.diffusion import GaussianDenoiser, GaussianDiffusion
from pyro_twist.infer import ImportanceSampling, TrustRegionTwist, TwistedSMC
from tests.infer.composition import composes
from tests.instruments import Instrument, SpreadTwist, chain_moments, posterior_ranks
from tests.statistics import assert_frequencies, assert_tilted_mean, assert_unbiased

SIZE, STEPS, BINS = 4, 6, 8
MEASURED = "A prior in a measurement"
INSTRUMENT = Instrument(width=(1.0, 0.5), noise=(0.5, 0.4))


def lines(plate: int | None = None) -> GaussianDiffusion:
    """Correlated Gaussian lines of four pixels."""
    place = torch.arange(SIZE, dtype=torch.float32)
    cov = (-0.5 * ((place[:, None] - place) / 1.5).square()).exp() + 0.05 * torch.eye(SIZE)
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    denoiser = GaussianDenoiser(torch.linspace(-0.5, 0.5, SIZE), cov, scheduler)
    options: dict[str, Any] = {"plate": None if plate is None else ("data", plate)}
    return GaussianDiffusion(denoiser, scheduler, (SIZE,), num_inference_steps=STEPS, **options)


def observed(
    number: int, seed: int, instrument: Instrument = INSTRUMENT
) -> tuple[dict[str, Tensor], Tensor]:
    """Instruments and lines from the model itself, and what was observed of them."""
    model = WithLatents(lines(number), instrument.prior)
    truth = ImportanceSampling(model, 1, 1, population_plate="data", seed=seed).run().state
    state = {key: value[0] for key, value in truth.items()}
    torch.manual_seed(seed)
    return state, instrument.law(state, state["x"]).sample()


def quantities(state: Any) -> dict[str, Tensor]:
    """What is ranked: the instrument, and two numbers of the line."""
    x = state["x"]
    return {
        "width": state["width"],
        "noise": state["noise"],
        "mean": x.mean(-1),
        "edge": x[..., 1] - x[..., 0],
    }


def log_of(name: str) -> Any:
    return lambda state: state[name].double().log()


@composes(
    MEASURED,
    "blur width and noise level as latents in a `WithLatents`, the picture from a diffusion model, "
    "the observation in a `Tilted`",
    "evidence and joint posterior are those of quadrature, with the instrument proposed by its "
    "prior or by `AutoLatents`",
)
@pytest.mark.parametrize("guide", ["prior", "automatic"])
def test_joint_posterior_of_instrument_and_line(guide: str) -> None:
    """Evidence and posterior means of width and noise are those of quadrature."""
    replicates = 400
    _, data = observed(1, seed=4)
    diffusion = lines(replicates)
    log_z, width, noise = INSTRUMENT.log_evidence(*chain_moments(diffusion), data[0])
    assert abs(width) > 0.05 and abs(noise - torch.tensor(0.5).log()) > 0.05
    model = INSTRUMENT.observing(diffusion, data)
    twist: Any = SpreadTwist(model, INSTRUMENT, data, 1.0)
    if guide == "automatic":
        twist = JointTwist(twist, AutoLatents(model))
        TwistedSMC(model, twist, 2, 1).init()
        twist.parts()[1].modules_held[0].locs.width_unconstrained.data += 0.2
    smc = TwistedSMC(model, twist, 100, 1, population_plate="data", seed=0)
    result = smc.run()
    assert_unbiased(result.log_normalizer, log_z)
    for name, expected in (("width", width), ("noise", noise)):
        found = result.expectation(log_of(name))
        assert_tilted_mean(result.log_normalizer, found, log_z, expected)


@composes(
    MEASURED,
    "`TrustRegionTwist` with `AutoLatents` for the instrument",
    "fits the proposal of the instrument beside the twist; the estimates stay unbiased",
)
def test_learned_proposals_of_the_instrument() -> None:
    """`TrustRegionTwist` fits twist and `AutoLatents` together; its estimates stay unbiased."""
    _, data = observed(1, seed=4)
    model = INSTRUMENT.observing(lines(), data[0])
    log_z, width, _ = INSTRUMENT.log_evidence(*chain_moments(model), data[0])
    log_zs, means = [], []
    for seed in range(30):
        twist = SpreadTwist(model, INSTRUMENT, data[0], 1.0)
        guide = JointTwist(twist, AutoLatents(model))
        smc = TrustRegionTwist(model, guide, 200, num_iterations=1, guard=False, seed=seed)
        result = smc.run()
        log_zs.append(result.log_normalizer)
        means.append(result.expectation(log_of("width")))
    assert_unbiased(torch.stack(log_zs), log_z)
    assert_tilted_mean(torch.stack(log_zs), torch.stack(means), log_z, width)


def ranks(
    wrong: float = 1.0, instrument: Instrument = INSTRUMENT, *, plain: bool = False
) -> dict[str, Tensor]:
    """Simulation-based calibration: 200 instruments and lines, a posterior of each."""
    truth, data = observed(200, seed=1, instrument=instrument)
    model = instrument.observing(lines(200), data, wrong=wrong)
    twist = LookaheadTwist(model) if plain else SpreadTwist(model, instrument, data, 1.0)
    smc = TwistedSMC(model, twist, 600, 1, population_plate="data", seed=2)
    result = smc.run()
    weights, known = result.get_normalized_weights(), quantities(truth)
    found = quantities(result.state)
    return {k: posterior_ranks(found[k], weights, known[k]) for k in known}


def counts(found: Tensor) -> Tensor:
    return torch.histc(found, BINS, 0.0, 1.0)


@composes(
    MEASURED,
    "simulation-based calibration, with one population for each observation",
    "ranks of the true instrument and picture are uniform; a wrong likelihood is noticed",
)
def test_the_posterior_is_calibrated() -> None:
    """Ranks of the truth are uniform, by a chi-square test at 1e-6 for each quantity."""
    for name, found in ranks().items():
        assert found.std() > 0.2, name
        assert_frequencies(counts(found), torch.full((BINS,), 1 / BINS))


def test_calibration_notices_a_wrong_likelihood() -> None:
    """Noise believed to be half of what it is: the same test fails."""
    with pytest.raises(AssertionError, match="chi-square"):
        assert_frequencies(counts(ranks(0.5)["noise"]), torch.full((BINS,), 1 / BINS))


def test_calibration_notices_an_overconfident_look_ahead() -> None:
    """Little noise: at the prediction, which is too smooth, only much noise seems possible."""
    little = Instrument(noise=(0.3, 0.5))
    uniform = torch.full((BINS,), 1 / BINS)
    assert_frequencies(counts(ranks(instrument=little)["noise"]), uniform)
    with pytest.raises(AssertionError, match="chi-square"):
        assert_frequencies(counts(ranks(instrument=little, plain=True)["noise"]), uniform)
