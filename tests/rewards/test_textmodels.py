# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pyro_twist.rewards import RewardError
from pyro_twist.rewards.textmodels import CausalLMReward, SequenceClassifierReward

WORDS = ["[PAD]", "[UNK]", "[BOS]", "[SEP]", "the", "cat", "sat", "on", "mat", "dog"]
TEXTS = ["the cat sat on the mat", "dog", "the cat"]


def tokenizer(*, begins: bool = True, pads: bool = True, ends: bool = True) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: k for k, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        words.post_processor = processors.TemplateProcessing(
            single="$A [SEP]", special_tokens=[("[SEP]", ids["[SEP]"])]
        )
    special = {"unk_token": "[UNK]", "model_max_length": 12}
    special |= {"bos_token": "[BOS]"} if begins else {}
    special |= {"pad_token": "[PAD]"} if pads else {}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def classifier(**options: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        **{"id2label": {0: "bad", 1: "good", 2: "ugly"}, "label2id": {}, **options},
    )
    return BertForSequenceClassification(config).eval()


def language_model() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=12,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=2,
        eos_token_id=3,
    )
    return GPT2LMHeadModel(config).eval()


def logits_alone(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double()


def ids_of(one: str, *more: int) -> list[int]:
    return [WORDS.index(word) for word in one.split()] + list(more)


def test_the_log_probability_of_a_label() -> None:
    model = classifier()
    expected = [logits_alone(model, ids_of(one, 3)).log_softmax(0)[1] for one in TEXTS]
    for label in ("good", 1):
        values = SequenceClassifierReward(model, tokenizer(), label)(TEXTS)
        assert values.dtype == torch.float64
        assert torch.allclose(values, torch.stack(expected), atol=1e-6)
    total = sum(SequenceClassifierReward(model, tokenizer(), k)(TEXTS).exp() for k in range(3))
    assert torch.allclose(torch.as_tensor(total), torch.ones(3, dtype=torch.float64))


def test_labels_that_do_not_exclude_each_other() -> None:
    model = classifier(problem_type="multi_label_classification")
    expected = logits_alone(model, ids_of("dog", 3)).sigmoid().log()[2]
    value = SequenceClassifierReward(model, tokenizer(), "ugly")(["dog"])
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_model_with_one_output() -> None:
    model = classifier(id2label={0: "score"})
    expected = logits_alone(model, ids_of("dog", 3))[0]
    value = SequenceClassifierReward(model, tokenizer(), "score")(["dog"])
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("begins", [True, False])
def test_the_log_probability_per_token(begins: bool) -> None:
    model = language_model()
    reward = CausalLMReward(model, tokenizer(begins=begins))
    texts = TEXTS if begins else [TEXTS[0], TEXTS[2]]
    expected = []
    for one in texts:
        ids = [2, *ids_of(one)] if begins else ids_of(one)
        rows = logits_alone(model, ids).log_softmax(-1)
        scored = [rows[k, after] for k, after in enumerate(ids[1:])]
        expected.append(torch.stack(scored).mean())
    values = reward(texts)
    assert torch.allclose(values, torch.stack(expected), atol=1e-6)
    assert torch.allclose(reward.perplexity(texts), (-values).exp())


@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_chunks_and_padding_change_nothing(kind: str) -> None:
    def values(size: int) -> torch.Tensor:
        if kind == "classifier":
            return SequenceClassifierReward(classifier(), tokenizer(), 0, chunk_size=size)(TEXTS)
        return CausalLMReward(language_model(), tokenizer(pads=False), chunk_size=size)(TEXTS)

    assert torch.allclose(values(1), values(3), atol=1e-6)


def test_long_texts_are_cut_only_if_asked() -> None:
    long = "the cat sat on the mat the dog"
    with pytest.raises(RewardError, match="text 0 has 9 tokens, max_length is 4"):
        SequenceClassifierReward(classifier(), tokenizer(), 0, max_length=4)([long])
    with pytest.raises(RewardError, match="truncation=True"):
        CausalLMReward(language_model(), tokenizer(), max_length=4)([long])
    options: dict[str, Any] = {"max_length": 4, "truncation": True}
    cut = SequenceClassifierReward(classifier(), tokenizer(), 0, **options)([long])
    assert cut == SequenceClassifierReward(classifier(), tokenizer(), 0)(["the cat sat"])
    short = CausalLMReward(language_model(), tokenizer(), **options)([long])
    assert short == CausalLMReward(language_model(), tokenizer())(["the cat sat"])


def test_a_text_without_a_token_to_score_counts_as_minus_infinity() -> None:
    """Such texts are among the samples, and a run must not end at one."""
    reward = CausalLMReward(language_model(), tokenizer(begins=False))
    values = reward(["dog", "the cat", ""])
    assert (values[[0, 2]] == -torch.inf).all() and values[1] == reward(["the cat"])
    reward = CausalLMReward(language_model(), tokenizer())
    assert reward([""]).tolist() == [-torch.inf] and reward(["dog"]).isfinite()
    assert reward.perplexity([""]).tolist() == [torch.inf]


def test_padding_is_that_of_the_model() -> None:
    """A decoder finds the last token of a text by the padding that its config names."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=12,
        n_embd=8,
        n_layer=1,
        n_head=2,
        num_labels=3,
        pad_token_id=1,
    )
    model = GPT2ForSequenceClassification(config).eval()
    expected = [logits_alone(model, ids_of(one, 3)).log_softmax(0)[2] for one in TEXTS]
    values = SequenceClassifierReward(model, tokenizer(), 2)(TEXTS)
    assert torch.allclose(values, torch.stack(expected), atol=1e-6)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="set model.config.pad_token_id = 0, the tokenizer's"):
        SequenceClassifierReward(model, tokenizer(), 2)


def test_a_regression_with_several_outputs() -> None:
    model = classifier(problem_type="regression")
    expected = logits_alone(model, ids_of("dog", 3))[1]
    reward = SequenceClassifierReward(model, tokenizer(), "good")
    assert reward(["dog"]).item() == pytest.approx(expected.item(), abs=1e-6)
    assert reward.name == "output 'good'"


@pytest.mark.parametrize("kind", ["classifier", "language model", "roberta"])
def test_texts_are_no_longer_than_the_model_can_read(kind: str) -> None:
    """Tokenizers often do not say, or a number without meaning."""
    words = tokenizer()
    words.model_max_length = int(1e30)
    if kind == "language model":
        reward: Any = CausalLMReward(language_model(), words)
        most = 12
    elif kind == "classifier":
        reward, most = SequenceClassifierReward(classifier(), words, 0), 12
    else:
        config = RobertaConfig(
            vocab_size=len(WORDS),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=12,
            pad_token_id=1,
        )
        model = RobertaForSequenceClassification(config).eval()
        reward, most = SequenceClassifierReward(model, words, 0), 10
    assert reward(["dog " * (most - 1)]).isfinite()
    with pytest.raises(RewardError, match=f"text 0 has {most + 1} tokens, max_length is {most}"):
        reward(["dog " * most])
    with pytest.raises(ValueError, match=f"max_length=99; give .* from 1 to {most}"):
        type(reward)(reward.model, words, *([0] if kind != "language model" else []), max_length=99)


def test_wrong_models_and_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="the model's labels are bad, good, ugly"):
        SequenceClassifierReward(classifier(), tokenizer(), "nice")
    with pytest.raises(ValueError, match="label=3"):
        SequenceClassifierReward(classifier(), tokenizer(), 3)
    with pytest.raises(ValueError, match="label=True"):
        SequenceClassifierReward(classifier(), tokenizer(), True)
    with pytest.raises(ValueError, match="padding token"):
        SequenceClassifierReward(classifier(), tokenizer(pads=False), 0)
    with pytest.raises(ValueError, match="training mode"):
        CausalLMReward(language_model().train(), tokenizer())
    with pytest.raises(ValueError, match="max_length=-1"):
        CausalLMReward(language_model(), tokenizer(), max_length=-1)
    with pytest.raises(RewardError, match="decode the token ids"):
        CausalLMReward(language_model(), tokenizer())([torch.tensor([1])])


def test_loading_a_folder(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path / "classifier")
    language_model().save_pretrained(tmp_path / "lm")
    for name in ("classifier", "lm"):
        tokenizer().save_pretrained(tmp_path / name)
    loaded = SequenceClassifierReward.from_pretrained(
        str(tmp_path / "classifier"), "good", chunk_size=2
    )
    expected = SequenceClassifierReward(classifier(), tokenizer(), "good")(TEXTS)
    assert torch.allclose(loaded(TEXTS), expected, atol=1e-6)
    lm = CausalLMReward.from_pretrained(str(tmp_path / "lm"))
    expected = CausalLMReward(language_model(), tokenizer())(TEXTS)
    assert torch.allclose(lm(TEXTS), expected, atol=1e-6)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    model = language_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        CausalLMReward.from_pretrained(str(tmp_path))
