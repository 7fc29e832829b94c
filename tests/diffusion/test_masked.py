# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Masked diffusion as a Pyro model: its law by enumeration, sites, state, prompts, costs."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from pyro_twist import GaussianDenoiser, GaussianDiffusion, MaskedDiffusion
from pyro_twist.diffusion.masking import make_masking_schedule
from pyro_twist.diffusion.unmasking import AncestralUnmasking, GroupUnmasking
from tests.oracles import MaskedChain
from tests.statistics import assert_frequencies

CHAINS: dict[str, dict[str, Any]] = {
    "ancestral": {"num_inference_steps": 3},
    "cosine": {
        "num_inference_steps": 3,
        "schedule": lambda t: 1 - math.cos(math.pi / 2 * (1 - t)),
    },
    "not all masked": {"num_inference_steps": 2, "schedule": lambda t: 1 - 0.7 * t},
    "capped": {"num_inference_steps": 3, "remasking": ("capped", 0.4)},
    "rescaled": {"num_inference_steps": 3, "remasking": ("rescaled", 1.0)},
    "one": {"unmasking": "uniform"},
    "two": {"unmasking": "uniform", "group_size": 2},
    "all": {"unmasking": "uniform", "group_size": 9},
    "prompt": {"num_inference_steps": 3, "prompt": torch.tensor([3, 1, 3])},
    "remasked prompt": {
        "num_inference_steps": 3,
        "prompt": torch.tensor([3, 1, 3]),
        "remasking": ("rescaled", 0.7),
    },
    "group of prompt": {"unmasking": "uniform", "prompt": torch.tensor([0, 3, 3])},
    "warm": {"num_inference_steps": 2, "temperature": 2.5, "forbidden_token_ids": (0,)},
}


def sample_path(model: MaskedDiffusion, number: int) -> list[Tensor]:
    """The values of the sites ``x_{T-1}`` to ``x_0``."""
    with pyro.plate("particles", number), poutine.trace() as tracer:
        model()
    return [tracer.trace.nodes[f"x_{t - 1}"]["value"] for t in model.timesteps]


@pytest.mark.parametrize("name", CHAINS)
def test_law_of_the_path(name: str) -> None:
    """Chi-square tests of the whole path and of its end, rate 1e-6 each."""
    chain = MaskedChain(**CHAINS[name])
    path = [chain.index(x) for x in sample_path(chain.diffusion, 60_000)]
    joint = torch.zeros_like(path[0])
    for index in path:
        joint = joint * chain.size + index
    law = chain.path_law()
    assert_frequencies(torch.bincount(joint, minlength=law.numel()), law)
    assert_frequencies(torch.bincount(path[-1], minlength=chain.size), chain.laws()[-1])


@pytest.mark.parametrize("name", CHAINS)
def test_kernel_is_the_transition_of_the_table(name: str) -> None:
    """At every reachable sequence and time, to every other, in float64."""
    chain = MaskedChain(**CHAINS[name])
    sequences = torch.tensor(chain.sequences)
    for t, law in zip(chain.diffusion.timesteps, chain.laws()):
        where = law.nonzero()[:, 0]
        state: dict[str, Tensor] = {}
        chain.diffusion._write(state, t, sequences[where])
        kernel = chain.diffusion.kernel(state, t)
        found = kernel.log_prob(sequences[:, None].expand(-1, len(where), -1)).exp().T
        assert torch.allclose(found, chain.transition(t)[where], atol=1e-15, rtol=1e-12)


def test_remasking_keeps_the_share_of_masks() -> None:
    """Marginals of the number of masks are those of the schedule, with and without remasking."""
    for remasking in (None, ("capped", 0.3), ("rescaled", 1.0)):
        chain = MaskedChain(num_inference_steps=4, remasking=remasking)
        masks = torch.tensor([list(x).count(3) for x in chain.sequences]).double()
        shares = [1 - float(law @ masks) / 3 for law in chain.laws()]
        assert shares == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0], abs=1e-12)
        assert chain.diffusion.known_share().tolist() == pytest.approx(shares[::-1])


@pytest.mark.parametrize("length, vocab_size", [(1, 2), (3, 2), (1, 4)])
@pytest.mark.parametrize("unmasking", ["ancestral", "uniform"])
def test_smallest_cases(length: int, vocab_size: int, unmasking: str) -> None:
    steps = {"num_inference_steps": 2} if unmasking == "ancestral" else {}
    chain = MaskedChain(length, vocab_size, 0, unmasking=unmasking, **steps)
    path = sample_path(chain.diffusion, 20_000)
    assert (path[-1] != 0).all()
    counts = torch.bincount(chain.index(path[-1]), minlength=chain.size)
    assert_frequencies(counts, chain.laws()[-1])


def test_end_and_padding_are_tokens_like_others() -> None:
    """A token after the end token is drawn from the network, not overwritten."""
    chain = MaskedChain(num_inference_steps=3)
    drawn = sample_path(chain.diffusion, 20_000)[-1]
    after = drawn[(drawn[:, 0] == 0)][:, 1:]
    assert set(after.flatten().tolist()) == {0, 1, 2}


def test_trace_has_one_site_per_time() -> None:
    chain = MaskedChain(num_inference_steps=4)
    with pyro.plate("particles", 5):
        trace = poutine.trace(chain.diffusion).get_trace()
    trace.compute_log_prob()
    sites = [name for name, site in trace.nodes.items() if name.startswith("x_")]
    assert sites == ["x_4", "x_3", "x_2", "x_1", "x_0"]
    for name in sites:
        site = trace.nodes[name]
        assert site["value"].shape == (5, 3) and site["value"].dtype == torch.int64
        assert site["log_prob"].shape == (5,) and torch.isfinite(site["log_prob"]).all()
    assert isinstance(trace.nodes["x_4"]["fn"], dist.Delta)
    assert (trace.nodes["x_4"]["value"] == 3).all()
    expected = sum(trace.nodes[name]["log_prob"] for name in sites)
    path = torch.stack([chain.index(trace.nodes[name]["value"]) for name in sites[1:]], -1)
    law = chain.path_law()
    assert torch.allclose(expected, torch.stack([law[tuple(row)] for row in path]).log())


def test_runs_without_plates() -> None:
    assert MaskedChain(num_inference_steps=3).diffusion().shape == (3,)


@pytest.mark.parametrize("plate", [None, ("prompts", 2)])
def test_state(plate: tuple[str, int] | None) -> None:
    prompt = torch.tensor([[3, 3, 3], [1, 3, 3]])
    chain = MaskedChain(num_inference_steps=3)
    model = MaskedDiffusion(
        chain.denoiser,
        3,
        4,
        3,
        num_inference_steps=3,
        prompt=prompt if plate else None,
        plate=plate,
    )
    batch = (6, 2) if plate else (6,)
    state: dict[str, Tensor] = {}
    with pyro.plate("particles", 6, dim=-len(batch)):
        model.init(state)
        for t in model.timesteps:
            assert set(state) == {"x", "logits"}
            assert state["x"].shape == batch + (3,) and state["logits"].shape == batch + (3, 4)
            masked = (state["x"] == 3).any(-1)
            exact = chain.table[chain.index(state["x"])]
            assert torch.equal(state["logits"][masked], exact[masked])
            assert model.kernel(state, t).batch_shape == batch
            completed = model.complete(state)
            assert completed.shape == state["x"].shape and (completed != 3).all()
            model.step(state, t)
    assert set(state) == {"x", "x0_hat"} and state["x"] is state["x0_hat"]
    assert torch.equal(model.complete(state), state["x"])


def test_hidden_states_and_a_head() -> None:
    """Only hidden states are kept, and the law is that of head and network together."""
    chain = MaskedChain(num_inference_steps=3)
    inverse = torch.linalg.inv(torch.randn(4, 4, dtype=torch.float64))

    def network(tokens: Tensor) -> Tensor:
        return chain.denoiser(tokens).double() @ inverse

    model = MaskedDiffusion(
        network, 3, 4, 3, num_inference_steps=3, head=lambda h: h @ torch.linalg.inv(inverse)
    )
    state: dict[str, Tensor] = {}
    with pyro.plate("particles", 6):
        model.init(state)
        model.step(state, 3)
    assert set(state) == {"x", "hidden"}
    values = torch.tensor(chain.sequences)[:, None].expand(-1, 6, -1)
    found = model.kernel(state, 2).log_prob(values).exp().T
    assert torch.allclose(found, chain.transition(2)[chain.index(state["x"])], atol=1e-9)


@pytest.mark.parametrize("name", ["rescaled", "prompt", "remasked prompt", "group of prompt"])
def test_prompts_are_never_altered(name: str) -> None:
    chain = MaskedChain(**CHAINS[name])
    prompt = chain.diffusion.prompt
    fixed = prompt != 3
    for x in sample_path(chain.diffusion, 500):
        assert (x[:, fixed] == prompt[fixed]).all()
    state: dict[str, Tensor] = {}
    with pyro.plate("particles", 50):
        chain.diffusion.init(state)
        tilted = chain.diffusion.kernel(state, 2).tilted(torch.tensor([50.0, -50.0, 0.0, 0.0]))
    assert (tilted.sample()[:, fixed] == prompt[fixed]).all()
    assert (tilted.complete()[:, fixed] == prompt[fixed]).all()


def test_one_evaluation_for_every_new_sequence_with_masks() -> None:
    chain, seen = MaskedChain(num_inference_steps=9), []

    def network(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return chain.denoiser(tokens)

    model = MaskedDiffusion(network, 3, 4, 3, num_inference_steps=9, chunk_size=4)
    with pyro.plate("particles", 10):
        trace = poutine.trace(model).get_trace()
    path = [trace.nodes[f"x_{t}"]["value"] for t in range(9, -1, -1)]
    changed = sum(
        int((a != b).any(-1).logical_and((b == 3).any(-1)).sum()) for a, b in zip(path, path[1:])
    )
    assert model.counts == {"denoiser": 10 + changed} == {"denoiser": sum(map(len, seen))}
    assert all(len(rows) <= 4 and (rows == 3).any(-1).all() for rows in seen)


def test_nothing_is_evaluated_after_the_last_mask() -> None:
    chain = MaskedChain(unmasking="uniform", group_size=2)
    with pyro.plate("particles", 7):
        chain.diffusion()
    assert chain.diffusion.timesteps == (2, 1)
    assert chain.diffusion.counts == {"denoiser": 14}


def test_conditioning_by_entry_of_the_plate() -> None:
    def network(tokens: Tensor, labels: Tensor) -> Tensor:
        logits = torch.full(tokens.shape + (4,), -math.inf)
        return logits.scatter(-1, labels[:, None, None].expand(-1, tokens.shape[-1], 1), 0.0)

    model = MaskedDiffusion(
        network, 5, 4, 3, plate=("labels", 3), conditioning={"labels": torch.tensor([0, 1, 2])}
    )
    with pyro.plate("particles", 4, dim=-2):
        x = model()
    assert torch.equal(x, torch.tensor([0, 1, 2])[:, None].expand(4, 3, 5))


def test_conditioning_in_the_state_is_looked_up_at_every_step() -> None:
    """It may have been moved, so that a sequence that stayed as it was is evaluated again."""

    def network(tokens: Tensor, label: Tensor) -> Tensor:
        return label[:, None, None].float() * torch.ones(tokens.shape + (4,))

    model = MaskedDiffusion(network, 3, 4, 3, num_inference_steps=99, conditioning={"label": 0})
    state = {"label": torch.zeros(5)}
    with pyro.plate("particles", 5):
        model.init(state)
        state["label"] = torch.ones(5)
        model.step(state, 99)
    assert (state["logits"] == 1).all()


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_decode(batch: tuple[int, ...]) -> None:
    def words(rows: Tensor) -> list[str]:
        assert len(rows) <= 2
        return ["".join(map(str, row)) for row in rows.tolist()]

    model = MaskedDiffusion(MaskedChain(num_inference_steps=2).denoiser, 3, 4, 3, chunk_size=2)
    x = torch.randint(0, 3, batch + (3,))
    assert model.decode(x) is x
    model.decoder = words
    flat = ["".join(map(str, row)) for row in x.reshape(-1, 3).tolist()]
    expected: Any = {(): flat[0], (3,): flat, (2, 3): [flat[:3], flat[3:]]}[batch]
    assert model.decode(x) == expected
    model.decoder = lambda rows: rows.double() / 2
    assert torch.equal(model.decode(x), x.double() / 2)


def test_known_share() -> None:
    prompt = torch.tensor([[3, 3, 3, 3], [0, 0, 3, 3]])
    denoiser = MaskedChain(num_inference_steps=2).denoiser
    model = MaskedDiffusion(
        denoiser, 4, 4, 3, unmasking="uniform", group_size=2, prompt=prompt, plate=("prompts", 2)
    )
    # the second is known after one step of the two
    assert model.known_share().tolist() == [[1.0, 1.0], [0.5, 1.0], [0.0, 0.0]]
    alike = MaskedDiffusion(denoiser, 4, 4, 3, unmasking="uniform", group_size=3)
    assert alike.known_share().tolist() == [1.0, 0.75, 0.0]
    prompt[1] = 0
    share = MaskedDiffusion(
        denoiser, 4, 4, 3, unmasking="uniform", prompt=prompt, plate=("prompts", 2)
    ).known_share()
    assert share[:, 1].tolist() == [1.0] * 5, "nothing is to be found out of what is given"
    model = MaskedDiffusion(denoiser, 4, 4, 3, schedule="cosine", num_inference_steps=2)
    assert model.known_share().tolist() == pytest.approx([1.0, 1 - math.sqrt(0.5), 0.0])
    scheduler = DDPMScheduler()
    gauss = GaussianDiffusion(
        GaussianDenoiser(torch.zeros(2), torch.ones(2), scheduler),
        scheduler,
        (2,),
        num_inference_steps=4,
    )
    share = gauss.known_share(0.25)
    step = gauss.schedule[3]
    assert share.shape == (5,) and share[0] == 1 and share.dtype == torch.float64
    assert float(share[3]) == pytest.approx(
        0.25 * step.alpha**2 / (0.25 * step.alpha**2 + step.sigma**2)
    )
    assert (share.diff() < 0).all()


def test_named_schedules() -> None:
    assert make_masking_schedule("linear", 4).alphas == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert make_masking_schedule("log-linear", 2).alphas == pytest.approx((1.0, 0.5005, 0.001))
    cosine = make_masking_schedule("cosine", 3).alphas
    assert cosine == pytest.approx([1 - math.cos(math.pi / 2 * (1 - t / 3)) for t in range(4)])
    schedule = make_masking_schedule("linear", 4)
    assert math.exp(schedule.log_stay(3)) == pytest.approx((1 - 0.5) / (1 - 0.25))
    assert schedule.log_stay(1) == schedule.log_remask(2) == -math.inf


def test_kernels_by_name() -> None:
    denoiser = MaskedChain(num_inference_steps=2).denoiser
    for unmasking, kind in (("ancestral", AncestralUnmasking), ("uniform", GroupUnmasking)):
        model = MaskedDiffusion(denoiser, 3, 4, 3, unmasking=unmasking)
        state: dict[str, Tensor] = {}
        model.init(state)
        assert type(model.kernel(state, model.timesteps[0])) is kind


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mask_token_id": 4}, "mask_token_id=4 is no token: they are 0 to 3"),
    ({"mask_token_id": -1}, "mask_token_id=-1 is no token"),
    ({"length": 0}, "length=0 is not a positive integer"),
    ({"group_size": 0}, "group_size=0 is not a positive integer"),
    ({"chunk_size": -2}, "chunk_size=-2 is not a positive integer"),
    ({"num_inference_steps": 0}, "num_inference_steps=0"),
    ({"prompt": torch.tensor([3, 3])}, r"prompt has shape \(2,\).*expected .*shape \(3,\)"),
    ({"prompt": torch.tensor([[3, 3, 3]] * 2)}, r"pass plate=\('prompts', number\)"),
    ({"prompt": torch.tensor([0.0, 3.0, 3.0])}, "dtype torch.float32"),
    ({"prompt": torch.tensor([3, 9, 3])}, r"prompt\[1\] is the token 9, but tokens are 0 to 3"),
    ({"prompt": torch.tensor([0, 1, 2])}, "has the mask token 3 nowhere"),
    ({"schedule": lambda t: t}, r"alpha\(0\) = 0.0; it must be 1"),
    ({"schedule": lambda t: 1 - 4 * t * (1 - t)}, r"does not fall in t: alpha\(0.5\) = 0 and"),
    ({"schedule": lambda t: 1 - 2 * t}, "is negative"),
    ({"schedule": "geometric"}, "schedule='geometric'; choose linear, cosine, log-linear"),
    ({"temperature": 0.0}, "Greedy decoding is deterministic: copies of a particle would never"),
    ({"unmasking": "low_confidence"}, "by confidence.*are deterministic.*no transition density"),
    ({"remasking": "low_confidence"}, "low_confidence remasking picks the positions by a rule"),
    ({"remasking": "low_confidence", "unmasking": "uniform"}, "no transition density"),
    ({"remasking": ("capped", 2.0)}, r"remasking=\('capped', 2.0\)"),
    ({"remasking": ("loop", 0.1)}, "give .'capped', eta. or"),
    ({"remasking": ("capped", 0.1), "unmasking": "uniform"}, "goes with unmasking='ancestral'"),
    ({"forbidden_token_ids": (0, 7)}, "forbidden_token_ids has 7; tokens are 0 to 3"),
    ({"forbidden_token_ids": (0, 1, 2)}, "leave one that can be drawn"),
    ({"head": "decoder"}, "is no torch.nn.Module"),
    ({"forbidden_token_ids": 3}, "forbidden_token_ids=3; give a collection of tokens"),
    ({"mask_token_id": 3.0}, "mask_token_id=3.0 is no token"),
    ({"num_inference_steps": 4.5}, "num_inference_steps=4.5; give a whole number of steps"),
    ({"prompt": "hello"}, "prompt='hello' is no tensor of tokens; encode it with the model's"),
    ({"prompt": torch.ones(3, dtype=torch.bool)}, "dtype torch.bool"),
    ({"plate": "p"}, r"plate='p'; give name and size of a plate.*such as \('prompts', 8\)"),
    ({"plate": (3, "p")}, r"plate=\(3, 'p'\)"),
    ({"plate": ("p", 0)}, r"plate=\('p', 0\)"),
    ({"remasking": 0.1}, r"remasking=0.1; give \('capped', eta\) or"),
    ({"remasking": ("capped", "much")}, "give .'capped', eta. or"),
    ({"schedule": 3}, "schedule=3; choose linear, cosine, log-linear"),
    ({"temperature": "hot"}, "temperature='hot' is not a positive number"),
    # options that would be ignored
    ({"group_size": 2}, "group_size=2 goes with unmasking='uniform' only"),
    (
        {"unmasking": "uniform", "num_inference_steps": 8},
        "num_inference_steps=8 goes with unmasking='ancestral' only.*choose group_size",
    ),
    ({"unmasking": "uniform", "schedule": "cosine"}, "schedule='cosine' goes with"),
]


@pytest.mark.parametrize("value", [0, 1.5, True])
@pytest.mark.parametrize("name", ["length", "group_size", "chunk_size"])
def test_sizes_are_whole_numbers(name: str, value: Any) -> None:
    given: dict[str, Any] = {"length": 3, "vocab_size": 4, "mask_token_id": 3, name: value}
    with pytest.raises(ValueError, match=f"{name}={value}"):
        MaskedDiffusion(lambda tokens: torch.zeros(*tokens.shape, 4), **given)


@pytest.mark.parametrize("options, message", REFUSED)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    given = {"length": 3, "vocab_size": 4, "mask_token_id": 3, **options}
    with pytest.raises(ValueError, match=message):
        MaskedDiffusion(MaskedChain(num_inference_steps=1).denoiser, **given)


def test_the_number_of_steps_is_50_unless_given() -> None:
    denoiser = MaskedChain(num_inference_steps=1).denoiser
    assert MaskedDiffusion(denoiser, 3, 4, 3).num_inference_steps == 50
    assert MaskedDiffusion(denoiser, 3, 4, 3, unmasking="uniform").num_inference_steps == 3


def test_wrong_vocabulary_size_is_named() -> None:
    model = MaskedDiffusion(lambda x: torch.zeros(x.shape + (5,)), 3, 4, 3)
    with pytest.raises(ValueError, match=r"returned shape \(1, 3, 5\).*expected \(1, 3, 4\)"):
        model()
    model = MaskedDiffusion(lambda x: torch.zeros(len(x), 2, 4), 3, 4, 3)
    with pytest.raises(ValueError, match=r"returned shape \(1, 2, 4\) for 1 sequences of length 3"):
        model()
    model = MaskedDiffusion(lambda x: {"logits": 1}, 3, 4, 3)
    with pytest.raises(ValueError, match="the denoiser returned dict"):
        model()


def test_nan_logits_are_named() -> None:
    def network(tokens: Tensor) -> Tensor:
        logits = torch.zeros(tokens.shape + (4,))
        logits[2, 1] = math.nan
        return logits

    model = MaskedDiffusion(network, 3, 4, 3, num_inference_steps=1)
    with pytest.raises(ValueError, match=r"sequence \(2,\) at position 1 have the maximum nan"):
        with pyro.plate("particles", 5):
            model()
