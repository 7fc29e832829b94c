# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_twist.zoo.recipes.masked_training import MaskedTraining, nelbo, shuffled_batches, train

MASK, VOCABULARY, LENGTH = 0, 4, 3
DATA = torch.tensor([[1, 2, 3], [2, 2, 3], [1, 1, 1], [3, 2, 1]] * 8)


def make_model() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.5,
            pad_token_id=None,
        )
    )


@torch.no_grad()
def exact_nelbo(model: Any, ids: Tensor) -> float:
    """The mean over orders of revealing of minus the log-probability, by enumeration."""
    total = 0.0
    for order in itertools.permutations(range(LENGTH)):
        for number in range(LENGTH):
            inputs = ids.clone()
            inputs[list(order[number:])] = MASK
            logits = model(inputs[None]).logits[0, order[number]].double()
            logits[MASK] = -math.inf
            total -= float(logits.log_softmax(-1)[ids[order[number]]])
    return total / math.factorial(LENGTH)


def test_the_estimate_is_unbiased_for_the_mean_over_orders_of_revealing() -> None:
    model = make_model().eval()
    ids = torch.tensor([2, 3, 1])
    draws = nelbo(model, ids.expand(8000, -1), MASK, torch.Generator().manual_seed(0)).double()
    exact = exact_nelbo(model, ids)
    # 4.5 standard errors, which strata make smaller, and what bfloat16 rounds
    assert abs(draws.mean() - exact) < 4.5 * draws.std() / len(draws) ** 0.5 + 0.005 * exact


def test_batches_are_permutations_of_the_data_and_go_on_at_a_step() -> None:
    data = torch.arange(10, dtype=torch.int16)[:, None]
    batches = shuffled_batches(data, 3, seed=1)
    drawn = list(itertools.islice(batches(0), 8))
    assert all(batch.dtype == torch.int64 for batch in drawn)
    for one_pass in (drawn[:3], drawn[3:6]):
        assert len(set(torch.cat(one_pass).flatten().tolist())) == 9
    assert not torch.equal(torch.cat(drawn[:3]), torch.cat(drawn[3:6]))
    for place, batch in enumerate(itertools.islice(batches(4), 4)):
        assert torch.equal(batch, drawn[4 + place])


def run(folder: Path, **options: Any) -> Any:
    return train(
        make_model(),
        shuffled_batches(DATA, 8),
        folder,
        mask_token_id=MASK,
        validation=DATA,
        **{"warmup": 2, "decay_steps": 5, "log_every": 10, "ema": 0.9, **options},
    )


def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "whole", max_steps=20)
    advance = MaskedTraining.advance

    def interrupted(self: MaskedTraining, ids: Tensor) -> float:
        if self.step == 12:
            raise KeyboardInterrupt
        return advance(self, ids)

    monkeypatch.setattr(MaskedTraining, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", max_steps=20, checkpoint_minutes=0.0)
    monkeypatch.undo()
    model = run(tmp_path / "parts", max_steps=20)
    for one, other in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_file_ends_a_training_and_without_it_the_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "finish").touch()
    run(tmp_path)
    assert last_step(tmp_path) == 6
    run(tmp_path)
    assert last_step(tmp_path) == 6
    (tmp_path / "finish").unlink()
    run(tmp_path, max_steps=20)
    assert last_step(tmp_path) == 20


def last_step(folder: Path) -> int:
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    return int(json.loads(lines[-1])["step"])


def test_the_averaged_model_is_written_in_half_precision(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    expected = run(tmp_path, max_steps=40)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "ema")
    assert model.dtype == torch.float16
    for one, other in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(one.half(), other)
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["learning_rate"] == 0.0
    assert log[-1]["validation"] < LENGTH * math.log(VOCABULARY)
