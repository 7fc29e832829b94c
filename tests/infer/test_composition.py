# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Guides of Pyro's own, odd plates, several objects at once: what users bring to the engine."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger
from pyro.poutine.guide import GuideMessenger

from pyro_twist.infer import BestOfN, ImportanceSampling, TwistedSMC
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import LookaheadTwist, Twist
from tests.oracles import ExactTwist, LinearGaussianChain
from tests.statistics import assert_unbiased

REPLICATES = 1500


def run(chain: LinearGaussianChain, guide: Any, **options: Any) -> Any:
    options = {"population_plate": "replicates", "seed": 0, **options}
    return TwistedSMC(chain, guide, 32, 1, **options).run()


def test_undeclared_batch_dims_are_refused() -> None:
    """A factor of shape (N,) where (N, 1) is meant would mix the particles."""

    class Flat(LinearGaussianChain):
        def terminal(self, state: Any, x0: torch.Tensor) -> None:
            pyro.factor("flat", x0[:, 0])

    with pytest.raises(ValueError, match=r"'flat'.*shape \(6, 6\).*in no plate.*\(6, 1\)"):
        TwistedSMC(Flat(2), None, 6, 1).run()


def test_undeclared_batch_dims_are_refused_in_a_plate_of_one() -> None:
    """One prompt: the undeclared dim lands on its plate, whose size it does not have."""

    class Flat(LinearGaussianChain):
        def terminal(self, state: Any, x0: torch.Tensor) -> None:
            pyro.factor("flat", x0[:, 0])

    with pytest.raises(ValueError, match=r"Shape mismatch.*'replicates'.*flat dim -1, 1 vs 6"):
        run_one = TwistedSMC(Flat(2, replicates=1), None, 6, 1, population_plate="replicates")
        run_one.run()


@pytest.mark.parametrize("guide", [None, Twist])
def test_auxiliary_sites_of_the_model_are_plain_latents(guide: Any) -> None:
    class Auxiliary(LinearGaussianChain):
        def kernel(self, state: Any, t: int) -> Any:
            base = dist.Normal(torch.zeros_like(state["x"]), self.s)
            noise = pyro.sample(f"noise_{t}", base, infer={"is_auxiliary": True})
            return dist.Delta(self.a * state["x"] + noise)

    chain = Auxiliary(3, k=0.7, replicates=REPLICATES)
    assert_unbiased(run(chain, guide and guide(chain)).log_normalizer, chain.log_normalizer)


def test_sites_inside_get_posterior_belong_to_the_guide() -> None:
    """An auxiliary draw and an unnormalised factor of the guide both enter log q."""
    chain = LinearGaussianChain(1, k=0.7, replicates=REPLICATES)

    class Auxiliary(GuideMessenger):
        def get_posterior(self, name: str, prior: Any) -> Any:
            if name != "x_0":
                return prior
            pyro.factor("guide_factor", torch.full(prior.batch_shape, 0.4), has_rsample=False)
            base = dist.Normal(torch.zeros(prior.batch_shape), 1.0)
            u = pyro.sample("u", base, infer={"is_auxiliary": True})
            jacobian = torch.full_like(u, -torch.tensor(0.6).log())
            return dist.Delta(0.9 * self.args_kwargs[0][0]["x"] + 0.6 * u, log_density=jacobian)

    result = run(chain, Auxiliary(chain.step))
    assert_unbiased(result.log_normalizer + 0.4, chain.log_normalizer)


def test_autoguide_messenger() -> None:
    """Pyro's own effect-based guide proposes; its parameters are not batched over particles."""
    chain = LinearGaussianChain(1, k=0.5, dim=2)
    guide = AutoNormalMessenger(lambda: None, init_scale=1.2)
    estimates = []
    for seed in range(300):
        smc = TwistedSMC(chain, guide, 20 + seed % 2, seed=seed, resampling="none")
        estimates.append(smc.run().log_normalizer)
    shapes = {name: tuple(value.shape) for name, value in guide.named_parameters()}
    assert shapes and set(shapes.values()) == {(2,)}
    # a poor proposal: its mean is right all the same, within five standard errors
    ratio = (torch.stack(estimates) - chain.log_normalizer).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / 300**0.5


@pytest.mark.parametrize("guide", [AutoNormal, 3, ExactTwist])
def test_what_is_no_guide_is_refused(guide: Any) -> None:
    guide = AutoNormal(lambda: None) if guide is AutoNormal else guide
    with pytest.raises(ValueError, match="is none of: None, an effect-based guide"):
        TwistedSMC(LinearGaussianChain(2), guide, 4)


def test_guide_that_samples_an_observation() -> None:
    class Guide:
        def init(self, state: Any) -> None:
            pass

        def step(self, state: Any, t: int) -> None:
            pyro.sample("y", dist.Normal(torch.zeros(4), 1.0))

    class Observed(LinearGaussianChain):
        def step(self, state: Any, t: int) -> None:
            super().step(state, t)
            pyro.sample("y", dist.Normal(state["x"], 1.0), obs=torch.tensor(0.2))

    with pytest.raises(ValueError, match="samples 'y', which the model observes"):
        TwistedSMC(Observed(2), Guide(), 4).run()


def test_latents_outside_the_population_plate_are_refused() -> None:
    class Shared(LinearGaussianChain):
        def init(self, state: Any) -> None:
            pyro.sample("shared", dist.Normal(0.0, 1.0))
            super().init(state)

    with pytest.raises(ValueError, match="'shared' is outside the plate 'replicates'"):
        run(Shared(2, replicates=3), None)


def test_counts_are_those_of_the_run() -> None:
    chain = LinearGaussianChain(3)
    one, other = TwistedSMC(chain, None, 4), TwistedSMC(chain, None, 10)
    one.init()
    other.init()
    for t in chain.timesteps:
        one.step(t)
        other.step(t)
    assert one.result().counts == {"denoiser": 12} and other.result().counts == {"denoiser": 30}
    other.run()
    assert one.result().counts == {"denoiser": 12}


def test_two_look_aheads_need_two_keys() -> None:
    chain = LinearGaussianChain(3, k=0.3, replicates=REPLICATES)
    with pytest.raises(ValueError, match=r"write state\['lookahead'\].*another key="):
        LookaheadTwist(chain) + LookaheadTwist(chain, "rt")
    both = LookaheadTwist(chain) + LookaheadTwist(chain, "rt", key="second")
    result = run(chain, both, ess_threshold=1.0)
    assert_unbiased(result.log_normalizer, chain.log_normalizer)
    state = {"x0_hat": torch.tensor([1.0])}
    assert float(both.log_twist(state)) == pytest.approx(0.6)
    assert float(both.log_twist(state, 3)) == pytest.approx(0.9)


def test_sum_of_a_list() -> None:
    chain = LinearGaussianChain(3)
    whole = sum([ExactTwist(chain, 0.5), ExactTwist(chain, 0.5)])
    assert len(whole.parts()) == 2


class Prompted(LinearGaussianChain):
    """Its init takes an argument, here a number that could be mistaken for a time."""

    def init(self, state: Any, offset: float = 0.0) -> None:
        if offset < 0:
            raise RuntimeError("the prompt encoder is down")
        super().init(state)
        state["offset"] = torch.full_like(state["x"], offset)


def test_arguments_of_init_are_no_times() -> None:
    chain = Prompted(3, k=1.0)
    twist = LookaheadTwist(chain, schedule=(3, 1))
    plain = TwistedSMC(chain, twist, 16, seed=0, ess_threshold=1.0).run()
    prompted = TwistedSMC(chain, twist, 16, seed=0, ess_threshold=1.0).run(2)
    assert torch.equal(plain.log_weights, prompted.log_weights)
    text = TwistedSMC(chain, ExactTwist(chain), 16, seed=0)
    assert text.run(3).log_normalizer.item() == pytest.approx(chain.log_normalizer, abs=1e-4)


def test_resume_after_a_failed_init_keeps_the_arguments() -> None:
    chain = Prompted(3)
    smc = TwistedSMC(chain, None, 4)
    with pytest.raises(RuntimeError, match="encoder is down"):
        smc.run(-1.0)
    with pytest.raises(RuntimeError, match="encoder is down"):
        smc.resume()


def test_maximisers_can_be_resampled() -> None:
    chain = LinearGaussianChain(3, k=1.0)
    best = BestOfN(chain, 8, keep=4, seed=0).run()
    drawn = best.resample(40).resample(40)
    assert drawn.expectation("x").item() == pytest.approx(best.expectation("x").item(), abs=0.2)
    with pytest.raises(ValueError, match="num_samples=0"):
        best.resample(0)


def test_best_needs_one_number_per_weight() -> None:
    plated = ImportanceSampling(LinearGaussianChain(3, replicates=3), 20, 1, seed=0).run()
    with pytest.raises(ValueError, match=r"by='reward' has shape \(20, 3\).*\(20,\)"):
        plated.best()


def test_best_of_n_checks_reward_names_before_it_runs() -> None:
    model = RewardTilted(LinearGaussianChain(2, dim=1), {"red": lambda x: x[:, 0]}, decode=False)
    with pytest.raises(ValueError, match=r"by='reward'.*\('red',\)"):
        BestOfN(model, 4)


def test_rewards_that_work_in_place_reach_nothing() -> None:
    chain = LinearGaussianChain(2, dim=2)
    rewards = {"a": lambda x: x.sub_(5.0).sum(-1), "b": lambda x: x.sum(-1)}
    result = ImportanceSampling(RewardTilted(chain, rewards, decode=False), 6, seed=0).run()
    assert torch.allclose(result.state["b"], result.state["x"].sum(-1).double())
    assert torch.allclose(result.state["a"] + 10, result.state["b"], atol=1e-5)


def test_one_reward_under_two_names_is_counted_once() -> None:
    from pyro_twist.rewards import Reward

    reward = Reward(lambda x: x.sum(-1))
    model = RewardTilted(LinearGaussianChain(2, dim=2), {"a": reward, "b": reward}, decode=False)
    assert ImportanceSampling(model, 6, seed=0).run().counts["reward"] == reward.num_calls


def test_times_must_count_down_to_one() -> None:
    chain = LinearGaussianChain(4)
    chain.timesteps = (40, 30, 20, 10)
    with pytest.raises(ValueError, match="count down from the number of steps to 1"):
        TwistedSMC(chain, None, 4).run()


@pytest.mark.parametrize("history", ["off", "paths"])
def test_checkpoints_do_not_fit_another_run(history: Any) -> None:
    smc = TwistedSMC(LinearGaussianChain(3), None, 4)
    smc.init()
    saved = smc.state_dict()
    with pytest.raises(ValueError, match=f"history='ancestors', this one '{history}'"):
        TwistedSMC(LinearGaussianChain(3), None, 4, history=history).load_state_dict(saved)
    with pytest.raises(ValueError, match="timesteps"):
        TwistedSMC(LinearGaussianChain(5), None, 4).load_state_dict(saved)


def test_checkpoint_with_a_given_generator() -> None:
    def fresh(seed: int) -> TwistedSMC:
        generator = torch.Generator().manual_seed(seed)
        chain = LinearGaussianChain(5, k=2.0)
        options: dict[str, Any] = {"ess_threshold": 1.0, "seed": 3, "generator": generator}
        return TwistedSMC(chain, LookaheadTwist(chain), 16, **options)

    smc = fresh(0)
    smc.init()
    smc.step(5)
    saved = smc.state_dict()
    expected = smc.resume()
    other = fresh(9)
    other.load_state_dict(saved)
    assert torch.equal(other.resume().state["x"], expected.state["x"])


def test_progress_bar_of_a_second_run(capsys: pytest.CaptureFixture[str]) -> None:
    smc = TwistedSMC(LinearGaussianChain(3), None, 4, progress=True)
    smc.run()
    capsys.readouterr()
    smc.run()
    err = capsys.readouterr().err
    assert "0/4" in err and "4/4" in err and "5/4" not in err


def test_ess_goes_with_the_weights_beside_it() -> None:
    chain = LinearGaussianChain(4, k=2.0)
    smc = TwistedSMC(chain, ExactTwist(chain, 0.5), 32, seed=0, resampling="none")
    smc.init()
    weights = smc.get_normalized_weights()
    assert smc.get_ESS().item() == pytest.approx(float(1 / weights.square().sum()))
    assert smc.twisted_ess.item() == pytest.approx(smc.result().diagnostics.ess[-1].item())
