# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import builtins
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyro_twist.rewards import Reward, RewardError, RewardTilted
from pyro_twist.rewards.molecules import (
    logp,
    molecule_reward,
    molecule_rewards,
    parse_smiles,
    qed,
    similarity,
    substructure,
    synthetic_accessibility,
)

ASPIRIN, CAFFEINE, OCTANE = "CC(=O)Oc1ccccc1C(=O)O", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "CCCCCCCC"
INVALID = ("", "CC(", "c1cccc1C(C)(C)(C)C", "no molecule", "C(C)(C)(C)(C)C")
OPTIONS: dict[str, dict[str, Any]] = {
    "similar": {"smiles": ASPIRIN},
    "substructure": {"smarts": "c1ccccc1"},
}


def make(name: str, **options: Any) -> Reward:
    return molecule_reward(name, **OPTIONS.get(name, {}), **options)


# Values, against published ones


def test_drug_likeness_has_its_published_values() -> None:
    # RDKit documentation of the QED module, for its default weights.
    values = qed()(["N=C(CCSCc1csc(N=C(N)N)n1)NS(N)(=O)=O", "CNC(=NCCSCc1nc[nH]c1C)NC#N"])
    assert values.tolist() == pytest.approx([0.253, 0.234], abs=2e-3)
    drug, alkane = qed()([ASPIRIN, OCTANE])
    assert drug > alkane


def test_synthetic_accessibility_orders_molecules_by_difficulty() -> None:
    morphine = "CN1CCC23C4Oc5c3c(CC1C2C=CC4O)ccc5O"
    easy, middle, hard = synthetic_accessibility()([OCTANE, ASPIRIN, morphine])
    assert -1.0 >= easy > hard >= -10.0
    assert -1.0 >= middle > hard


def test_logp_is_the_sum_of_crippens_contributions() -> None:
    # Wildman and Crippen, table 1: C1 0.1441 and H1 0.1230; methane is one C1 and four H1.
    assert logp()(["C"]).item() == pytest.approx(0.1441 + 4 * 0.1230, abs=1e-6)
    assert logp()([OCTANE]) > logp()([CAFFEINE])


def test_logp_with_a_target_is_minus_the_distance() -> None:
    plain = logp()([OCTANE, CAFFEINE, ASPIRIN])
    assert torch.equal(logp(1.5)([OCTANE, CAFFEINE, ASPIRIN]), -(plain - 1.5).abs())


def test_similarity_is_one_for_the_molecule_however_it_is_written() -> None:
    written = ["OC(=O)c1ccccc1OC(C)=O", ASPIRIN, "OC(=O)c1ccccc1O", OCTANE]
    same, itself, salicylic, octane = similarity(ASPIRIN)(written).tolist()
    assert same == itself == 1.0
    assert 1.0 > salicylic > octane >= 0.0


def test_similarity_is_tanimotos_ratio_of_shared_bits() -> None:
    # radius 0 sees the kinds of atoms only: of CO {CH3, OH}, of CCO {CH3, CH2, OH}
    assert similarity("CO", radius=0)(["CCO"]).item() == pytest.approx(2 / 3)


def test_substructure_is_a_hard_constraint_or_a_count() -> None:
    acids = ["OC(=O)CC(=O)O", ASPIRIN, OCTANE]
    assert substructure("C(=O)[OH]")(acids).tolist() == [0.0, 0.0, -math.inf]
    assert substructure("C(=O)[OH]", count=True)(acids).tolist() == [2.0, 1.0, 0.0]


# What is no molecule


@pytest.mark.parametrize("name", molecule_rewards())
def test_what_is_no_molecule_has_minus_infinity_and_is_silent(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    values = make(name)([INVALID[0], ASPIRIN, *INVALID[1:]])
    assert values.isneginf().tolist() == [True, False, True, True, True, True]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", molecule_rewards())
def test_what_is_no_molecule_is_an_error_if_that_is_wanted(name: str) -> None:
    reward = make(name, on_invalid="raise")
    with pytest.raises(RewardError, match="'CC[(]' is no molecule") as told:
        reward([ASPIRIN, "CC("])
    assert told.value.index == 1
    assert told.value.values[0].isfinite()


def test_rdkits_messages_come_back_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    from rdkit import Chem

    assert parse_smiles("CC(") is None
    assert capfd.readouterr().err == ""
    assert Chem.MolFromSmiles("CC(") is None
    assert "CC(" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: similarity("CC("), "no molecule"),
        (lambda: similarity(ASPIRIN, radius=-1), "radius=-1"),
        (lambda: similarity(ASPIRIN, num_bits=0), "num_bits=0"),
        (lambda: substructure("C(("), "no SMARTS"),
        (lambda: substructure(""), "no SMARTS"),
        (lambda: logp(math.nan), "target=nan"),
        (lambda: logp("high"), "target='high'; give a finite number, a logP"),  # type: ignore[arg-type]
        (lambda: qed(on_invalid="ignore"), "on_invalid='ignore'"),  # type: ignore[arg-type]
        (lambda: molecule_reward("qedd"), "did you mean 'qed'"),
        (lambda: molecule_reward("similar"), "its options are: smiles"),
        (lambda: molecule_reward("logp", goal=1.0), "its options are: target"),
    ],
)
def test_wrong_options_are_told(wrong: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        wrong()


def test_a_missing_rdkit_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_rdkit(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "rdkit":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rdkit)
    for name in molecule_rewards():
        with pytest.raises(ImportError, match=r"pyro-twist\[molecules\]"):
            make(name)


# Names, and use in a model


@pytest.mark.parametrize("name", molecule_rewards())
def test_every_named_reward_scores_molecules_and_has_a_description(name: str) -> None:
    reward = make(name)
    assert reward.name == name
    assert molecule_rewards()[name]
    values = reward([ASPIRIN, CAFFEINE, ASPIRIN])
    assert values.dtype == torch.float64
    assert values.shape == (3,)
    assert reward.num_calls == 2


def test_a_profile_of_rewards_tilts_a_model_that_decodes_to_strings() -> None:
    molecules = [ASPIRIN, CAFFEINE, OCTANE, "CC("]
    base = SimpleNamespace(
        timesteps=(1,),
        event_shape=(1,),
        decode=lambda ids: [molecules[place] for place in ids[:, 0].tolist()],
    )
    model = RewardTilted(
        base,
        {"drug": qed(), "greasy": logp()},
        scale={"drug": 5.0, "greasy": 0.5},
    )
    ids = torch.tensor([[[0], [1]], [[2], [3]]])
    values = model.evaluate(ids)
    assert values["drug"].shape == (2, 2)
    assert values["drug"].flatten().tolist() == qed()(molecules).tolist()
    assert values["greasy"].flatten().tolist() == logp()(molecules).tolist()
