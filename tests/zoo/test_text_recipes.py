# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from pyro_twist.zoo.recipes import text, text_data, text_report
from tests.statistics import assert_frequencies

ENTRIES = {
    "noun": [
        '  1 a licence | "a line of the licence is no example"',
        'x | a small thing that is used (by some) to open doors; a tool; "she lost the old key"; '
        "\"a key\"; \"'this,' he said, 'is the key'\"",
        'x | any of several plants of the family Rosaceae; "roses are red and fair"- a poet',
    ],
    "verb": ['x | go on foot at a moderate pace; "They don\'t walk home."; "they walk  home!"'],
    "adj": ['x | of a colour like that of blood; "she lost the old key"'],
    "adv": ["x | quickly"],
}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + sorted(
    set("she lost the old key they don ' t walk home !".split())
)


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    for part, lines in ENTRIES.items():
        (tmp_path / f"data.{part}").write_text("\n".join(lines) + "\n", encoding="latin-1")
    return tmp_path


def tokenizer_file(folder: Path) -> Path:
    text_data.cut_tokenizer(PIECES).backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_what_is_taken_from_wordnet(wordnet: Path) -> None:
    assert text_data.examples(wordnet) == ["she lost the old key", "they don't walk home"]
    assert text_data.glosses(wordnet) == [
        "a small thing that is used to open doors",
        "go on foot at a moderate pace",
        "of a colour like that of blood",
    ]


def test_corpus_and_vocabulary(wordnet: Path) -> None:
    found = text_data.corpus(wordnet, tokenizer_file(wordnet), size=100, held_out=1)
    assert sorted(found.examples + found.held_out) == [
        "she lost the old key",
        "they don't walk home",
    ]
    assert found.glosses == []  # their words are not in the vocabulary
    assert found.vocabulary[:4] == list(text_data.SPECIAL)
    assert set(found.vocabulary[4:]) <= set(PIECES)
    smaller = text_data.corpus(wordnet, tokenizer_file(wordnet), size=12, held_out=0)
    assert len(smaller.vocabulary) == 12
    assert len(smaller.examples) == 1


def test_texts_survive_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    words = "don ' t walk a well - known way , please ! 7".split()
    tokenizer = text_data.cut_tokenizer([*text_data.SPECIAL, *dict.fromkeys(words), "##ing"])
    tokenizer.save_pretrained(tmp_path)
    texts = ["don't walk a well-known way, please!", "walking 7"]
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = text_data.encode(one, texts)
        assert ids.shape == (2, text_data.LENGTH)
        assert ids[1, 3:].tolist() == [2] + [0] * (text_data.LENGTH - 4)
        assert text_report.texts_of(one, ids) == texts
        assert text_report.well_formed(one, ids) == 1.0


def test_what_stands_behind_the_end_is_not_read() -> None:
    tokenizer = text_data.cut_tokenizer([*text_data.SPECIAL, "a", "b"])
    ids = torch.tensor([[4, 2, 5, 0], [4, 0, 5, 2], [4, 5, 4, 5], [4, 5, 2, 0]])
    assert text_report.texts_of(tokenizer, ids) == ["a", "a b", "a b a b", "a b"]
    assert text_report.well_formed(tokenizer, ids) == 0.25


def test_batches_depend_on_the_step_alone() -> None:
    examples, glosses = torch.zeros(50, 2).long(), torch.ones(70, 2).long()
    batches = text.mixed_batches(examples, glosses, 8, share=0.5, steps=10)
    run = list(itertools.islice(batches(0), 12))
    assert all(torch.equal(a, b) for a, b in zip(run[7:], batches(7), strict=False))
    shares = [batch.double().mean().item() for batch in run]
    assert shares[0] == 0.5
    assert shares[10:] == [0.0, 0.0]
    assert shares == sorted(shares, reverse=True)
    numbers = torch.arange(50)[:, None].expand(50, 2)
    seeds = [next(text.mixed_batches(numbers, glosses, 8, 0.0, 1, seed)(0)) for seed in (0, 1)]
    assert not torch.equal(*seeds)


def test_the_head_begins_as_the_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = text.make_config(len(PIECES))
    config.update({"max_position_embeddings": 40, "type_vocab_size": 2})
    original = BertModel(config, add_pooling_layer=False).eval()
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    kept = [*text_data.SPECIAL, "key", "old"]
    frequencies = torch.tensor([4.0, 0.0, 2.0, 0.0, 1.0, 1.0])
    model = text.make_model(tmp_path, kept, frequencies).eval()
    ids = torch.tensor([[4, 5, 3, 2, 0]])
    places = torch.tensor([[PIECES.index(kept[k]) for k in ids[0].tolist()]])
    with torch.no_grad():
        hidden = original(input_ids=places, position_ids=torch.arange(1, 6)[None])[0]
        normal = 0.3 * torch.nn.functional.layer_norm(hidden, (384,))
        words = original.embeddings.word_embeddings.weight[[PIECES.index(one) for one in kept]]
        expected = normal @ words.T + (frequencies.clamp_min(0.5) / 8.0).log()
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=2e-3)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def tiny_model() -> Any:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=4,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=2,
        initializer_range=1.0,
    )
    return BertForMaskedLM(config).eval()


def test_samples_follow_the_law_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The false-alarm rate is 1e-6; without the order's average it fails."""
    monkeypatch.setattr(text_report, "LENGTH", 2)
    model, mask = tiny_model(), 3
    chances = torch.zeros(4, 4, dtype=torch.float64)
    for first in (0, 1):
        with torch.no_grad():
            blank = model(input_ids=torch.full((1, 2), mask)).logits[0, first].double()
        blank[mask] = -math.inf
        for token in range(3):
            ids = torch.full((1, 2), mask)
            ids[0, first] = token
            with torch.no_grad():
                rest = model(input_ids=ids).logits[0, 1 - first].double()
            rest[mask] = -math.inf
            law = 0.5 * blank.softmax(0)[token] * rest.softmax(0)
            if first == 0:
                chances[token] += law
            else:
                chances[:, token] += law
    drawn = text_report.sample(model, mask, 4000)
    counts = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16).double()
    assert_frequencies(counts, chances)


def test_qualities_of_texts() -> None:
    training = ["the cat sat on the mat", "a dog"]
    found = text_report.qualities(["the cat sat on a mat", "a dog", "a dog"], training)
    assert found["texts"] == 3
    assert found["copies"] == round(2 / 3, 4)
    assert found["repeats"] == round(1 / 3, 4)
    assert found["known_4_grams"] == round(1 / 3, 4)
    assert found["lengths"] == {2: 2, 6: 1}
    assert found["words"] == round(10 / 3, 2)
    assert text_report.ratios(
        {"bits_per_character": 3.0, "trigram_perplexity": 30.0},
        {"bits_per_character": 2.0, "trigram_perplexity": 20.0},
    ) == {"per_character": 2.0, "per_word": 1.5}


def test_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = [*text_data.SPECIAL, "the", "cat", "sat", "dog", "ran"]
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=text_data.LENGTH,
        )
    )
    model.half().save_pretrained(tmp_path)
    text_data.cut_tokenizer(vocabulary).save_pretrained(tmp_path)
    for name in ("examples", "glosses", "held_out"):
        (tmp_path / f"{name}.txt").write_text("the cat sat the dog ran\nthe dog sat the cat\n")
    report, texts = text_report.measure(tmp_path, tmp_path, 2, seed=0)
    assert len(texts) == 2
    assert report["held_out"]["copies"] == 1.0
    assert report["held_out_nats"] > 0
    assert 0.0 <= report["well_formed"] <= 1.0
