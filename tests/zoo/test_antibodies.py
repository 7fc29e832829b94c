# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Antibody models whose weights come with other packages, and the rewards on what they write."""

from __future__ import annotations

import builtins
import importlib.metadata
import sys
from typing import Any

import pyro
import pytest
import torch

from pyro_twist import zoo
from pyro_twist.rewards import RewardError
from pyro_twist.rewards.proteins import (
    AMINO_ACIDS,
    human_likeness,
    isoelectric_point,
    net_charge,
    protein_reward,
)
from pyro_twist.zoo.antibodies import AntibodyModel, load_antibodies, load_model

# A human heavy chain from the germline segments IGHV3-23 and IGHJ6, and the heavy and light chains
# of a murine antibody, muromonab.
HUMAN = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYC"
    "AKDRGYTSGYYYGMDVWGQGTTVTVSS"
)
MOUSE = (
    "QVQLQQSGAELARPGASVKMSCKASGYTFTRYTMHWVKQRPGQGLEWIGYINPSRGYTNYNQKFKDKATLTTDKSSSTAYMQLSSLTSEDSAVYYC"
    "ARYYDDHYCLDYWGQGTTLTVSS"
)
LIGHT = (
    "QIVLTQSPAIMSASPGEKVTMTCSASSSVSYMNWYQQKSGTSPKRWIYDTSKLASGVPAHFRGSGSGTSYSLTISGMEAEDAATYYCQQWSSNPFT"
    "FGSGTKLEIN"
)
VERSIONS = {"antiberty": "0.1.3", "sapiens": "1.0.5"}


def installed(name: str) -> bool:
    try:
        return importlib.metadata.version(name) == VERSIONS[name]
    except importlib.metadata.PackageNotFoundError:
        return False


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if not installed(name)]
    return pytest.mark.skipif(bool(missing), reason=f"no weights: {', '.join(missing)}")


BOTH = [pytest.param(name, marks=needs(name)) for name in VERSIONS]


def accuracy(model: AntibodyModel, rate: float) -> float:
    """The share of masked residues of one human sequence that are predicted, 8 random masks."""
    tokens = model.encode([HUMAN]).repeat(8, 1)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(8, len(HUMAN), generator=generator).argsort(1)
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[:, 1:-1] = order < round(rate * len(HUMAN))
    with torch.no_grad():
        logits = model.network(tokens.masked_fill(masked, model.mask_token_id)).logits
    logits[..., list(model.forbidden_token_ids)] = -torch.inf
    return (logits.argmax(-1) == tokens)[masked].double().mean().item()


@pytest.mark.parametrize("name", BOTH)
def test_masked_residues_are_predicted(name: str) -> None:
    """
    Weights in the wrong places leave about the accuracy of the most frequent residue, 0.15.
    """
    model = load_model(name)
    assert accuracy(model, 0.15) > 0.88
    assert accuracy(model, 0.5) > 0.75
    assert accuracy(model, 0.9) > (0.6 if name == "antiberty" else 0.35)
    assert not model.network.training
    assert all(not parameter.requires_grad for parameter in model.network.parameters())


@needs("sapiens")
def test_the_networks_of_the_chains_differ() -> None:
    heavy, light = (human_likeness(chain)([HUMAN, LIGHT]) for chain in ("H", "L"))
    assert heavy[0] > heavy[1] and light[1] > light[0]


@pytest.mark.parametrize("name", BOTH)
def test_letters_are_tokens(name: str) -> None:
    model = load_model(name)
    tokens = model.encode([HUMAN[:5] + "?_" + HUMAN[7:]])
    assert tokens.shape == (1, len(HUMAN) + 2)
    assert (tokens == model.mask_token_id).sum() == 2
    assert model.decode(tokens) == [HUMAN[:5] + "??" + HUMAN[7:]]
    allowed = set(range(len(model.vocabulary))) - set(model.forbidden_token_ids)
    assert {model.vocabulary[i] for i in allowed} == set(AMINO_ACIDS)
    for wrong in ([HUMAN, MOUSE], [""], ["A" * 600]):
        with pytest.raises(ValueError, match="give one length from 1 to"):
            model.encode(wrong)
    with pytest.raises(ValueError, match="'B' is no amino acid; use the letters ACDEF"):
        model.encode(["ABC"])


@pytest.mark.parametrize("name", BOTH)
def test_masked_residues_are_filled_in(name: str) -> None:
    """The framework around a short gap is nearly certain; seven residues are drawn twice."""
    gap = HUMAN[:3] + "???" + HUMAN[6:60] + "____" + HUMAN[64:]
    model = zoo.load(name, prompt=gap, num_inference_steps=4)
    with torch.no_grad(), pyro.plate("samples", 8):
        sequences = model.decode(model())
    assert len(sequences) == 8
    right = 0
    for sequence in sequences:
        pairs = list(zip(sequence, gap, HUMAN, strict=True))
        assert all(one == known for one, known, _ in pairs if known not in "?_")
        assert set(sequence) <= set(AMINO_ACIDS)
        right += sum(one == true for one, known, true in pairs if known in "?_")
    assert right / (7 * 8) > 0.6


@needs("antiberty")
def test_antibodies_from_nothing() -> None:
    model = zoo.load("antiberty", length=110, num_inference_steps=16)
    with torch.no_grad(), pyro.plate("samples", 2):
        sequences = model.decode(model())
    assert [len(sequence) for sequence in sequences] == [110, 110]
    assert model.counts["denoiser"] <= 2 * 16
    if installed("sapiens"):
        # the letters of such sequences in random order have about -4
        assert human_likeness()(sequences).min() > -2.5


@needs("sapiens")
def test_prompts_are_populations() -> None:
    prompts = [HUMAN[:50] + "?" * 10 + HUMAN[60:], "?" * 10 + HUMAN[10:]]
    model = zoo.load("sapiens", prompt=prompts, num_inference_steps=3)
    assert model.plate == ("prompts", 2)
    with torch.no_grad(), pyro.plate("samples", 3, dim=-2):
        x = model()
    assert x.shape == (3, 2, len(HUMAN) + 2)
    for row in model.decode(x[:, 1]):
        assert row[10:] == HUMAN[10:]


@needs("sapiens")
def test_wrong_options_of_antibodies() -> None:
    with pytest.raises(ValueError, match="chain='K'; choose 'H'"):
        zoo.load("sapiens", chain="K")
    with pytest.raises(ValueError, match="length=4, but the prompt has 3 letters"):
        zoo.load("sapiens", length=4, prompt="AC?")
    with pytest.raises(ValueError, match="give one length from 1 to 142"):
        zoo.load("sapiens", length=143)
    with pytest.raises(ValueError, match="label"):
        zoo.load("sapiens", "H")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "Sapiens"}, "name='Sapiens'; choose one of 'antiberty', 'sapiens'"),
    ({"prompt": []}, r"prompt=\[\]; give a sequence with"),
    ({"prompt": 5}, "prompt=5; give a sequence with"),
    ({"length": 8.0}, "length=8.0; give a whole number of residues"),
    ({"vocab_size": 3}, "vocab_size=3: the model has its own"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_antibodies(**{"name": "sapiens", **options})
    if "name" in options:
        with pytest.raises(ValueError, match=message):
            load_model(**options)


@needs("sapiens")
def test_options_that_the_loader_sets_itself() -> None:
    model = load_antibodies("sapiens", prompt="EV?L", forbidden_token_ids=[4], decoder=None)
    assert 4 in model.forbidden and set(load_model("sapiens").forbidden_token_ids) < set(
        model.forbidden
    )
    assert model.decoder is None
    assert zoo.load("sapiens", prompt="EV??L", unmasking="uniform").num_inference_steps == 2


@needs("sapiens")
def test_masked_scores_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than some rows are in memory at a time, and the values are the same."""
    from pyro_twist.rewards import proteins

    sequences = [HUMAN[:20], MOUSE[:20], LIGHT[:20]]
    expected = {masked: human_likeness(masked=masked)(sequences) for masked in (False, True)}
    network, rows = load_model("sapiens", "H").network, []
    monkeypatch.setattr(proteins, "_RESIDUES_AT_ONCE", 40)
    handle = network.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        for masked, values in expected.items():
            found = human_likeness(masked=masked)(sequences)
            assert torch.allclose(found, values, atol=1e-6)
    finally:
        handle.remove()
    assert max(rows) == 2 and sum(rows) == 3 + 3 * 20


@pytest.mark.parametrize(("name", "version"), [("antiberty", "1.0.0"), ("sapiens", "1.1.0")])
def test_versions_without_weights_are_refused(
    name: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    told = f"{name} {version} is installed.*pip install --no-deps {name}=={VERSIONS[name]}"
    with pytest.raises(ImportError, match=told):
        zoo.load(name)


@pytest.mark.parametrize("name", list(VERSIONS))
def test_missing_packages_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    load_model.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=f"pip install --no-deps {name}=={VERSIONS[name]}"):
        zoo.load(name)


@needs("antiberty", "sapiens")
def test_no_code_of_the_packages_is_run() -> None:
    load_model.cache_clear()
    for name in VERSIONS:
        load_model(name)
        assert name not in sys.modules


# Rewards


@needs("sapiens")
@pytest.mark.parametrize("masked", [False, True])
def test_human_sequences_are_more_human_than_murine_ones(masked: bool) -> None:
    reward = human_likeness(masked=masked)
    shuffled = "".join(sorted(HUMAN))
    human, mouse, nonsense, empty, wrong = reward([HUMAN, MOUSE, shuffled, "", "EVQX"]).tolist()
    assert 0 > human > mouse + 0.3 > nonsense
    assert empty == wrong == -torch.inf
    strict = human_likeness(masked=masked, on_invalid="raise")
    with pytest.raises(RewardError, match="'EVQX' is no sequence of at most 142"):
        strict([HUMAN, "EVQX"])


@needs("sapiens")
def test_masked_and_plain_scores_are_what_they_say() -> None:
    model, short = load_model("sapiens"), HUMAN[:20]
    tokens = model.encode([short])
    plain = model.network(tokens).logits.double()
    values = []
    for place in range(1, 21):
        row = tokens.clone()
        row[0, place] = model.mask_token_id
        values.append(model.network(row).logits.double()[0, place])
    for logits, masked in ((plain[0, 1:-1], False), (torch.stack(values), True)):
        logits[:, list(model.forbidden_token_ids)] = -torch.inf
        expected = logits.log_softmax(-1)[torch.arange(20), tokens[0, 1:-1]].mean()
        [value] = human_likeness(masked=masked)([short])
        assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    several = human_likeness()([HUMAN[:30], short, HUMAN[:30]])
    assert several[1].item() == pytest.approx(human_likeness()([short]).item(), abs=1e-5)


def test_descriptors_of_proteins() -> None:
    values = {
        name: protein_reward(name)([HUMAN]).item()
        for name in ("aromatic", "charge", "hydropathy", "pi", "stable")
    }
    counts = {letter: HUMAN.count(letter) for letter in AMINO_ACIDS}
    aromatic = sum(counts[letter] for letter in "FWY") / len(HUMAN)
    assert values["aromatic"] == pytest.approx(aromatic)
    # half a charge for what is between, such as histidine and the two ends
    assert abs(values["charge"] - (counts["K"] + counts["R"] - counts["D"] - counts["E"])) < 1.5
    assert protein_reward("hydropathy")(["I", "R"]).tolist() == [4.5, -4.5]
    assert 7.5 < values["pi"] < 8.5 and values["stable"] > -40
    assert net_charge(values["pi"])([HUMAN]).item() == pytest.approx(0.0, abs=0.01)
    near = protein_reward("pi", target=5.0)([HUMAN]).item()
    assert near == pytest.approx(-(values["pi"] - 5.0))


def test_what_is_no_sequence() -> None:
    assert protein_reward("pi")(["", "EVB", "ev"]).tolist() == [-torch.inf] * 3
    with pytest.raises(RewardError, match="'EVB' is no sequence"):
        protein_reward("pi", on_invalid="raise")(["EVQ", "EVB"])
    with pytest.raises(ValueError, match="on_invalid='zero'"):
        protein_reward("pi", on_invalid="zero")
    with pytest.raises(ValueError, match="did you mean 'stable'"):
        protein_reward("stabel")
    with pytest.raises(ValueError, match="ph=nan"):
        protein_reward("charge", ph=float("nan"))
    with pytest.raises(ValueError, match="target=inf"):
        protein_reward("pi", target=float("inf"))
    with pytest.raises(ValueError, match="target='a'; give a finite number, the isoelectric poi"):
        isoelectric_point("a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ph='acid'; give a finite number, such as 7.4"):
        net_charge(ph="acid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ph=True"):
        net_charge(ph=True)
    assert torch.equal(net_charge(ph="7")([HUMAN]), net_charge(7.0)([HUMAN]))  # type: ignore[arg-type]


def test_missing_biopython_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("Bio"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'pyro-twist\[antibodies\]'"):
        protein_reward("pi")
