# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
import math
import sys
from typing import Any

import pytest
import torch

from pyro_twist.rewards import Reward, RewardError, text

PACKAGES = {
    "acceptability": "harper",
    "fluency": "torch",
    "sentiment": "vaderSentiment",
    "toxicity": "profanity_check",
}
JUDGES = {
    "acceptability": "linkgrammar",
    "fluency": "pocketsphinx",
    "sentiment": "textblob",
    "toxicity": "better_profanity",
}
# From worse to better, for the reward and for its judge alike.
LADDERS = {
    "acceptability": ("They is happy about it and he go home.", "They are happy about it."),
    "fluency": ("mat the on sat cat the", "the cat sat on the mat"),
    "sentiment": ("a horrible waste of time", "i love this wonderful film"),
    "toxicity": ("the cat sat on the mat", "what a load of shit, you stupid bitch"),
}


def has_link_grammar() -> bool:
    try:
        text.acceptability("link-grammar")
    except ImportError:
        return False
    return True


needs_parser = pytest.mark.skipif(not has_link_grammar(), reason="Link Grammar is not installed")


def make(kind: str, name: str, **options: Any) -> Reward:
    package = (PACKAGES if kind == "reward" else JUDGES)[name]
    if package == "linkgrammar" and not has_link_grammar():
        pytest.skip("Link Grammar is not installed")
    return (text.text_reward if kind == "reward" else text.text_judge)(name, **options)


def test_every_reward_has_a_judge_and_a_ladder() -> None:
    assert set(text.text_rewards()) == set(text.text_judges()) == set(LADDERS)


@pytest.mark.parametrize("kind", ["reward", "judge"])
@pytest.mark.parametrize("name", sorted(LADDERS))
def test_the_better_text_has_the_higher_value(kind: str, name: str) -> None:
    reward = make(kind, name)
    worse, better = reward(list(LADDERS[name]))
    assert worse < better
    assert reward.name == name
    assert reward([]).shape == (0,)
    swapped = reward(list(LADDERS[name])[::-1])
    assert swapped.tolist() == [better, worse]


@pytest.mark.parametrize("kind", ["reward", "judge"])
@pytest.mark.parametrize(("name", "option"), [("sentiment", "positive"), ("toxicity", "toxic")])
def test_the_opposite_reverses_the_order(kind: str, name: str, option: str) -> None:
    worse, better = make(kind, name, **{option: False})(list(LADDERS[name]))
    assert worse > better


def test_the_chances_of_toxic_and_harmless_add_up_to_one() -> None:
    texts = [one for pair in LADDERS.values() for one in pair]
    total = text.toxicity()(texts).exp() + text.toxicity(toxic=False)(texts).exp()
    assert torch.allclose(total, torch.ones(len(texts), dtype=torch.float64))


def test_known_values_of_sentiment() -> None:
    texts = ["I absolutely love this wonderful film!", "a horrible waste of time"]
    assert text.sentiment()(texts).tolist() == pytest.approx([0.888, -0.743], abs=6e-4)
    assert text.sentiment(positive=False)(texts).tolist() == pytest.approx(
        [-0.888, 0.743], abs=6e-4
    )
    assert text.sentiment(lexicon="textblob")(texts[1:]).tolist() == pytest.approx([-0.6])


def test_lower_case_alone_is_no_fault() -> None:
    texts = ["i flew to london", "i flew to london and i is happy"]
    assert text.acceptability()(texts).tolist() == [0.0, -1.0]


@needs_parser
def test_the_parser_finds_what_the_rules_miss() -> None:
    shuffled = ["cat the mat sat the on"]
    assert text.acceptability()(shuffled).item() == 0.0
    assert text.acceptability("link-grammar")(shuffled).item() < 0.0
    assert text.acceptability("link-grammar")(["the cat sat on the mat"]).item() == 0.0


def test_fluency_is_the_mean_of_the_character_model() -> None:
    texts = ["The cat sat on the mat.", "a dog"]
    expected = text.char_lm().mean_log_prob(texts)
    assert torch.allclose(text.fluency()(texts), expected)
    assert -expected[0].item() / math.log(2) == pytest.approx(2.47, abs=0.006)


def test_known_perplexities_of_the_trigram_model() -> None:
    model = text.TrigramLM()
    known = {
        "The cat sat on the mat.": 102,
        "he went to school yesterday and bought an apple": 112,
        "He go to school yesterday and buyed a apple.": 503,
    }
    for one, perplexity in known.items():
        assert model.perplexity([one]) == pytest.approx(perplexity, abs=0.6)
    total = model.log_prob(list(known)).sum().item()
    words = sum(model.num_words(list(known)))
    assert words == 7 + 10 + 10
    assert model.perplexity(list(known)) == pytest.approx(math.exp(-total / words))
    judge = text.trigram_fluency()(["The cat sat on the mat."])
    assert judge.item() == pytest.approx(-math.log(101.68), abs=1e-4)


def test_an_unknown_word_has_the_floor() -> None:
    values = [text.TrigramLM(floor).log_prob(["zzyx"]).item() for floor in (-15.0, -10.0)]
    assert values[1] - values[0] == pytest.approx(5.0)


def test_distinct() -> None:
    texts = ["a b a b", "A b"]
    assert text.distinct(texts, 1) == 2 / 6
    assert text.distinct(texts, 2) == 2 / 4
    assert text.distinct(texts, 3) == 1.0
    with pytest.raises(ValueError, match="none of the 2 texts"):
        text.distinct(texts, 5)
    with pytest.raises(ValueError, match="n=0"):
        text.distinct(texts, 0)


def test_token_ids_are_refused() -> None:
    with pytest.raises(RewardError, match="decode the token ids"):
        text.fluency()([torch.tensor([1, 2])])
    with pytest.raises(ValueError, match="sample 1 is no text"):
        text.distinct(["a", 3], 1)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("make_one", "missing", "told"),
    [
        (text.sentiment, "vaderSentiment", r"pyro-twist\[text\]"),
        (lambda: text.sentiment(lexicon="textblob"), "textblob", r"pyro-twist\[text\]"),
        (text.toxicity, "profanity_check", "alt-profanity-check"),
        (text.profanity, "better_profanity", "better-profanity"),
        (text.acceptability, "harper", "harper-py"),
        (lambda: text.acceptability("link-grammar"), "linkgrammar", "apt-get install"),
        (text.TrigramLM, "pocketsphinx", r"pyro-twist\[text\]"),
    ],
)
def test_a_missing_package_is_named(
    make_one: Any, missing: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    for cached in (text._vader, text._textblob, text._harper, text._link_grammar):
        cached.cache_clear()
    real = importlib.import_module

    def refuse(name: str) -> Any:
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(importlib.util, "spec_from_file_location", lambda *a, **k: None)
    with pytest.raises(ImportError, match=told):
        make_one()


def test_wrong_names_and_options() -> None:
    with pytest.raises(ValueError, match="did you mean 'sentiment'"):
        text.text_reward("sentimental")
    with pytest.raises(ValueError, match="its options are"):
        text.text_reward("fluency", strength=2)
    with pytest.raises(ValueError, match="lexicon='afinn'"):
        text.sentiment(lexicon="afinn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checker='cola'"):
        text.acceptability("cola")  # type: ignore[arg-type]


def test_no_judge_is_the_reward_that_it_judges() -> None:
    """Whatever lexicon or checker is rewarded, the judge asks the other."""
    texts = ["a wonderful film", "it was not bad at all", "they is happy about it"]
    for lexicon in ("vader", "textblob"):
        reward = text.text_reward("sentiment", lexicon=lexicon)(texts)
        assert not torch.equal(reward, text.text_judge("sentiment", lexicon=lexicon)(texts))
    if importlib.util.find_spec("linkgrammar") is not None:
        shuffled = ["cat the mat sat the on"]  # which only a parser minds
        assert text.text_judge("acceptability")(shuffled) < 0
        assert text.text_judge("acceptability", checker="link-grammar")(shuffled) == 0


def test_a_text_without_words_is_not_acceptable() -> None:
    assert text.acceptability()(["", " . ", "a cat"]).tolist()[:2] == [-math.inf] * 2


def test_a_string_is_no_list_of_texts() -> None:
    with pytest.raises(ValueError, match="put it in a list"):
        text.sentiment()("a wonderful film")


def test_the_least_log_probability_is_negative() -> None:
    for wrong in (1, 0.0, math.nan, "low"):
        with pytest.raises(ValueError, match=f"floor={wrong!r}"):
            text.TrigramLM(wrong)  # type: ignore[arg-type]
