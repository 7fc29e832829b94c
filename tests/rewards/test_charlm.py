# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pyro_twist.rewards.charlm import CharLM, char_lm
from pyro_twist.zoo.recipes import textgenrnn

# Bits per character from a separate port of the package's weights.
KNOWN = {
    "What is the best way to learn how to play the guitar?": 1.16,
    "My dog just learned how to open the door": 1.66,
    "The cat sat on the mat.": 2.47,
    "tac eht no tas tam ehT": 6.82,
    "asdkj qwpoe zxmnc qwe": 11.04,
}


def small(window: int = 5) -> CharLM:
    torch.manual_seed(0)
    return CharLM({"<s>": 1, "a": 2, "b": 3}, width=4, embedding=3, window=window).eval()


def next_log_probs(model: CharLM, before: str) -> torch.Tensor:
    """The conditional law of the next character, computed on its own."""
    codes = [1, *(model.characters.get(letter, 0) for letter in before)][-model.window :]
    window = torch.tensor([[0] * (model.window - len(codes)) + codes])
    with torch.no_grad():
        return model(window)[0].double().log_softmax(0)


def test_known_values() -> None:
    bits = char_lm().bits_per_character(list(KNOWN))
    assert bits.tolist() == pytest.approx(list(KNOWN.values()), abs=0.006)


def test_a_text_is_scored_character_by_character() -> None:
    model, text = small(), "abbaabab"
    expected = sum(
        float(next_log_probs(model, text[:k])[model.characters[letter]])
        for k, letter in enumerate([*text, "<s>"])
    )
    assert model.log_prob([text]).item() == pytest.approx(expected, rel=1e-6)
    assert model.mean_log_prob([text]).item() == pytest.approx(expected / 9, rel=1e-6)
    assert model.bits_per_character([text]).item() == pytest.approx(
        -expected / 9 / math.log(2), rel=1e-6
    )


def test_batches_chunks_and_empty_texts() -> None:
    model = small()
    texts = ["ab", "", "abba", "ab"]
    alone = torch.cat([model.log_prob([text]) for text in texts])
    assert torch.allclose(model.log_prob(texts), alone)
    assert torch.allclose(model.log_prob(texts, chunk_size=2), alone)
    assert model.log_prob([]).shape == (0,)
    assert alone[1] == pytest.approx(float(next_log_probs(model, "")[1]), rel=1e-6)


def test_an_unknown_character_has_a_fixed_value() -> None:
    model = small()
    expected = -15.0 + float(next_log_probs(model, "é")[1])
    assert model.log_prob(["é"]).item() == pytest.approx(expected, rel=1e-6)


def test_padding_has_no_weight_in_the_attention() -> None:
    model = small()
    window = torch.tensor([[0, 0, 0, 1, 2]])
    with torch.no_grad():
        before = model(window)
        model.attention.weight.zero_()
        uniform = model(window)
        embedded = model.embedding(window)
        first = model.rnn_1(embedded)[0]
        features = torch.cat([embedded, first, model.rnn_2(first)[0]], -1)
        expected = model.output(features[:, 3:].mean(1))
    assert torch.allclose(uniform, expected, atol=1e-6)
    assert not torch.allclose(before, uniform)


def test_the_recipe_writes_what_is_shipped(tmp_path: Path) -> None:
    import h5py

    shipped = Path(textgenrnn.FOLDER)
    state = load_file(shipped / "model.safetensors")
    weights = tmp_path / "textgenrnn_weights.hdf5"
    with h5py.File(weights, "w") as file:
        for name, value in hdf5_arrays(state).items():
            layer, _, last = name.partition("/")
            file[f"{layer}/{layer}/{last}:0"] = value
    (tmp_path / "textgenrnn_vocab.json").write_text((shipped / "characters.json").read_text())
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as archive:
        for name in ("textgenrnn_weights.hdf5", "textgenrnn_vocab.json"):
            archive.add(tmp_path / name, f"package/textgenrnn/{name}")
    arrays, characters = textgenrnn.read_archive(tmp_path / "package.tar.gz")
    assert characters == json.loads((shipped / "characters.json").read_text())
    again = textgenrnn.convert(arrays)
    assert set(again) == set(state)
    assert all(torch.equal(again[name], value) for name, value in state.items())


def hdf5_arrays(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The layout of the package's file, gate by gate."""
    arrays: dict[str, Any] = {
        "embedding/embeddings": state["embedding.weight"],
        "attention/attention_W": state["attention.weight"].T,
        "output/kernel": state["output.weight"].T,
        "output/bias": state["output.bias"],
    }
    for layer in ("rnn_1", "rnn_2"):
        kernel, recurrent = (
            state[f"{layer}.weight_{part}_l0"].numpy().reshape(4, 128, -1) for part in ("ih", "hh")
        )
        inputs = kernel.shape[-1]
        gates = [gate.reshape(inputs, 128) for gate in kernel]
        arrays[f"{layer}/kernel"] = np.concatenate(gates, 1)
        arrays[f"{layer}/recurrent_kernel"] = np.concatenate(list(recurrent), 1)
        arrays[f"{layer}/bias"] = torch.cat(
            [state[f"{layer}.bias_ih_l0"], state[f"{layer}.bias_hh_l0"]]
        )
    return {name: np.asarray(value) for name, value in arrays.items()}
