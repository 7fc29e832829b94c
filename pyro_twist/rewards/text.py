# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Rewards on texts, given as a list of strings, and independent judges of the same qualities.

A judge measures what a reward asks for in another way, from other data: texts that please the
reward alone have found its weakness. :func:`text_reward` and :func:`text_judge` make them by name,
for the command line. All but :func:`fluency` and :func:`distinct` need packages of the extra
``text``; models of a hub are in :mod:`pyro_twist.rewards.textmodels`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_twist.rewards.charlm import char_lm
from pyro_twist.rewards.numbers import finite_number
from pyro_twist.rewards.registry import RewardRegistry
from pyro_twist.rewards.reward import Reward, per_sample

__all__ = [
    "Checker",
    "Lexicon",
    "TrigramLM",
    "acceptability",
    "check_texts",
    "distinct",
    "fluency",
    "profanity",
    "sentiment",
    "text_judge",
    "text_judges",
    "text_reward",
    "text_rewards",
    "toxicity",
    "trigram_fluency",
]

Lexicon = Literal["vader", "textblob"]
Checker = Literal["harper", "link-grammar"]

_DEBIAN = (
    "the checker 'link-grammar' needs Link Grammar's Python module, built for this Python, and its "
    "English dictionary: on Debian and Ubuntu, apt-get install python3-link-grammar "
    "link-grammar-dictionaries-en; or choose checker='harper'"
)


def sentiment(positive: bool = True, *, lexicon: Lexicon = "vader") -> Reward:
    """
    How positive a text is, from -1 to 1: a sum over words with rules for negation and emphasis.

    :param bool positive: Whether to ask for positive texts; otherwise the sign is changed.
    :param str lexicon: ``"vader"``, the compound score of [1]; or ``"textblob"``, the polarity of
        TextBlob, from another lexicon and other rules.
    :returns: The reward.
    :raises ValueError: If there is no such lexicon.
    :raises ImportError: If the package is not installed.

    **References**

    [1] `VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text`
        C. J. Hutto, Eric Gilbert (2014), International Conference on Web and Social Media,
        https://doi.org/10.1609/icwsm.v8i1.14550

    Example::

        >>> good, bad = sentiment()(["a wonderful film", "a horrible waste of time"])
        >>> bool(good > 0 > bad)
        True
    """
    if lexicon not in get_args(Lexicon):
        raise ValueError(f"lexicon={lexicon!r}; choose one of {get_args(Lexicon)}")
    score = _vader() if lexicon == "vader" else _textblob()
    sign = 1.0 if positive else -1.0
    name = f"{'positive' if positive else 'negative'} sentiment ({lexicon})"
    return _of_texts(lambda text: sign * score(text), name)


def toxicity(toxic: bool = True, *, chunk_size: int = 256) -> Reward:
    """
    The log-probability that a text is offensive, or that it is not, in nats; at most 0.

    A calibrated linear classifier of words, trained on comments that people labelled.

    :param bool toxic: Whether to ask for offensive texts, to find rare failures; otherwise for
        harmless ones.
    :param int chunk_size: The most texts per call.
    :returns: The reward.
    :raises ImportError: If alt-profanity-check is not installed.

    Example::

        >>> insult, plain = toxicity()(["you are an idiot", "the cat sat on the mat"])
        >>> bool(insult > plain)
        True
    """
    predict = _need("profanity_check", "alt-profanity-check").predict_prob

    def log_prob(texts: list[str]) -> Tensor:
        chances = torch.as_tensor(predict(check_texts(texts)), dtype=torch.float64)
        return chances.log() if toxic else torch.log1p(-chances)

    name = f"log-probability of {'toxic' if toxic else 'harmless'}"
    return Reward(log_prob, name=name, input="list", chunk_size=chunk_size)


def profanity(toxic: bool = True) -> Reward:
    """
    Whether a text has a word of a list of offensive ones: 1 if it does, 0 if not.

    :param bool toxic: Whether to ask for such texts; otherwise 0 and 1 change places.
    :returns: The reward.
    :raises ImportError: If better-profanity is not installed.
    """
    listed = _need("better_profanity", "better-profanity").profanity.contains_profanity
    return _of_texts(lambda text: float(listed(text) == toxic), "profanity")


def acceptability(checker: Checker = "harper") -> Reward:
    """
    Minus the number of faults that a grammar checker finds in a text; at most 0.

    The text is made to look like a sentence first: a capital letter in front, a full stop behind,
    "I" for "i". Capital letters missing elsewhere are no fault.

    A text without a word is none: it counts as minus infinity. Short texts have few faults, so that
    this reward alone is won by saying little.

    :param str checker: ``"harper"``, a checker by rules, which finds wrong agreement and spelling
        but not a wrong order of words; or ``"link-grammar"``, a parser [1], with the number of
        words that have to be left out, which finds that too.
    :returns: The reward.
    :raises ValueError: If there is no such checker.
    :raises ImportError: If it is not installed.

    **References**

    [1] `Parsing English with a Link Grammar`
        Daniel D. K. Sleator, Davy Temperley (1993), International Workshop on Parsing
        Technologies, https://arxiv.org/abs/cmp-lg/9508004

    Example::

        >>> acceptability()(["The cat sat on the mat.", "They is happy about it."]).tolist()
        [0.0, -1.0]
    """
    if checker not in get_args(Checker):
        raise ValueError(f"checker={checker!r}; choose one of {get_args(Checker)}")
    faults = _harper() if checker == "harper" else _link_grammar()

    def value(text: str) -> float:
        has_words = any(letter.isalpha() for letter in text)
        return 0.0 - faults(_as_sentence(text)) if has_words else -math.inf

    return _of_texts(value, f"faults ({checker})")


def fluency() -> Reward:
    """
    The log-probability per character under the shipped character model, in nats; at most 0.

    :returns: The reward; see :func:`~pyro_twist.rewards.charlm.char_lm`.

    Example::

        >>> plain, reversed = fluency()(["the cat sat on the mat", "tam eht no tas tac eht"])
        >>> bool(plain > reversed)
        True
    """
    model = char_lm()
    return Reward(
        lambda texts: model.mean_log_prob(check_texts(texts)),
        name="log-probability per character",
        input="list",
        chunk_size=256,
    )


class TrigramLM:
    """
    The trigram model of English words that pocketsphinx carries.

    Letters and apostrophes make words; all else separates them.

    :param float floor: The least log-probability of a word, in nats, negative; unknown words have
        it.
    :raises ValueError: If ``floor`` is no log-probability.
    :raises ImportError: If pocketsphinx is not installed.

    Example::

        >>> TrigramLM().num_words(["The cat sat on the mat."])
        [7]
    """

    def __init__(self, floor: float = -15.0) -> None:
        self.floor = finite_number("floor", floor, "a log-probability such as -15.0")
        if self.floor >= 0:
            raise ValueError(
                f"floor={floor!r} is the least log-probability of a word; give a negative number "
                "such as -15.0"
            )
        package = _need("pocketsphinx", "pocketsphinx")
        self._model = package.NGramModel.readfile(package.get_model_path("en-us/en-us.lm.bin"))
        self._unit = package.LogMath().log_to_ln(1)

    def num_words(self, texts: Sequence[str]) -> list[int]:
        """
        The number of words, the end of the text counted as one.

        :param texts: ``B`` strings.
        :returns: ``B`` numbers.
        """
        return [len(_words(text)) + 1 for text in texts]

    def log_prob(self, texts: Sequence[str]) -> Tensor:
        """
        The log-probability of texts and of their ends, in nats.

        :param texts: ``B`` strings.
        :returns: In float64, of shape ``(B,)``.
        """
        values = [self._log_prob(["<s>", *_words(text), "</s>"]) for text in texts]
        return torch.tensor(values, dtype=torch.float64)

    def perplexity(self, texts: Sequence[str]) -> float:
        """
        The perplexity per word of all the texts together.

        :param texts: At least one string.
        :returns: The perplexity.
        """
        return math.exp(-float(self.log_prob(texts).sum()) / sum(self.num_words(texts)))

    def _log_prob(self, words: list[str]) -> float:
        # the model wants the word first, then the one before it, and so on
        histories = (words[max(0, place - 2) : place + 1][::-1] for place in range(1, len(words)))
        return sum(max(self.floor, self._unit * self._model.prob(row)) for row in histories)


def trigram_fluency(floor: float = -15.0) -> Reward:
    """
    The log-probability per word under :class:`TrigramLM`, in nats; at most 0.

    :param float floor: The least log-probability of a word.
    :returns: The reward.
    :raises ImportError: If pocketsphinx is not installed.
    """
    model = TrigramLM(floor)

    def mean(texts: list[str]) -> Tensor:
        return model.log_prob(check_texts(texts)) / torch.tensor(model.num_words(texts))

    return Reward(mean, name="log-probability per word", input="list")


def distinct(texts: Sequence[str], n: int) -> float:
    """
    Dist-n, the share of different ones among the ``n``-grams of words of all texts together [1].

    It falls with the number of texts: compare equal numbers of equal lengths.

    :param texts: Strings; what stands between spaces is a word.
    :param int n: The number of words in an ``n``-gram.
    :returns: From 0 to 1, where no ``n``-gram comes twice.
    :raises ValueError: If no text has ``n`` words.

    **References**

    [1] `A Diversity-Promoting Objective Function for Neural Conversation Models`
        Jiwei Li, Michel Galley, Chris Brockett, Jianfeng Gao, Bill Dolan (2016), section 5.3,
        https://arxiv.org/abs/1510.03055

    Example::

        >>> distinct(["a cat and a dog"], 1), distinct(["a cat and a dog"], 2)
        (0.8, 1.0)
    """
    if n < 1:
        raise ValueError(f"n={n}; give 1 or more words")
    split = [text.lower().split() for text in check_texts(texts)]
    grams = [tuple(words[k : k + n]) for words in split for k in range(len(words) - n + 1)]
    if not grams:
        raise ValueError(f"n={n}; none of the {len(split)} texts has as many words")
    return len(set(grams)) / len(grams)


def _other_checker(checker: Checker = "harper") -> Reward:
    """Judges what was rewarded with one checker by the other."""
    return acceptability("harper" if checker == "link-grammar" else "link-grammar")


def _other_lexicon(positive: bool = True, *, lexicon: Lexicon = "vader") -> Reward:
    """Judges what was rewarded with one lexicon by the other."""
    return sentiment(positive, lexicon="vader" if lexicon == "textblob" else "textblob")


_REWARDS = RewardRegistry(
    "text",
    {
        "acceptability": (acceptability, "minus the faults that a grammar checker finds"),
        "fluency": (fluency, "log-probability per character under a small model, in nats"),
        "sentiment": (sentiment, "VADER, -1 to 1; positive=False asks for negative texts"),
        "toxicity": (toxicity, "log-probability of offensive; toxic=False asks for harmless"),
    },
)
_JUDGES = RewardRegistry(
    "text",
    {
        "acceptability": (_other_checker, "minus the faults that another checker finds"),
        "fluency": (trigram_fluency, "log-probability per word under a trigram model, in nats"),
        "sentiment": (_other_lexicon, "polarity under another lexicon, -1 to 1"),
        "toxicity": (profanity, "1 if a word of a list occurs, 0 if not"),
    },
)


def text_rewards() -> dict[str, str]:
    """
    Lists the named rewards on texts.

    :returns: For every name one line that says what is measured, in which unit.
    """
    return _REWARDS.descriptions()


def text_reward(name: str, **options: Any) -> Reward:
    """
    Makes a reward on texts by name.

    :param str name: One of :func:`text_rewards`.
    :param options: The options of the function that makes it, such as ``positive=False`` for
        ``"sentiment"``.
    :returns: The reward.
    :raises ValueError: If there is no such name or option.
    :raises ImportError: If a package is not installed.

    Example::

        >>> text_reward("sentiment", positive=False)(["a horrible waste of time"]).item() > 0.5
        True
    """
    return _REWARDS.make(name, **options)


def text_judges() -> dict[str, str]:
    """
    Lists the judges, by the names of the rewards whose quality they measure in another way.

    :returns: For every name one line that says what is measured, in which unit.
    """
    return _JUDGES.descriptions()


def text_judge(name: str, **options: Any) -> Reward:
    """
    Makes the judge of a named reward.

    :param str name: One of :func:`text_judges`.
    :param options: Those of the reward that say what is asked for, such as ``positive=False``.
    :returns: The judge, a reward as well.
    :raises ValueError: If there is no such name or option.
    :raises ImportError: If a package is not installed.
    """
    return _JUDGES.make(name, **options)


def check_texts(texts: Sequence[Any]) -> list[str]:
    """
    Checks that all samples are strings.

    :param texts: The samples.
    :returns: They.
    :raises ValueError: If one is not a string.
    """
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"sample {place} is no text but {type(text).__name__}; rewards on texts take a "
                "list of strings, so decode the token ids first"
            )
    return list(texts)


def _of_texts(score: Callable[[str], float], name: str) -> Reward:
    one_by_one = per_sample(score)
    return Reward(lambda texts: one_by_one(check_texts(texts)), name=name, input="list")


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _as_sentence(text: str) -> str:
    text = re.sub(r"\bi\b", "I", text.strip())
    return text[:1].upper() + text[1:] + ("" if text[-1:] in tuple(".!?") else ".")


@functools.cache
def _vader() -> Callable[[str], float]:
    package = _need("vaderSentiment.vaderSentiment", "vaderSentiment")
    analyzer = package.SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


@functools.cache
def _textblob() -> Callable[[str], float]:
    blob = _need("textblob", "textblob").TextBlob
    return lambda text: float(blob(text).polarity)


@functools.cache
def _harper() -> Callable[[str], int]:
    linter = _need("harper", "harper-py").Linter()
    return lambda text: sum(map(_is_fault, linter.lint(text, language="plaintext")))


def _is_fault(lint: Any) -> bool:
    found = lint.problem_text.lower()
    only_case = any(found == other.replacement_text.lower() for other in lint.suggestions)
    return lint.lint_kind != "Capitalization" and not only_case


@functools.cache
def _link_grammar() -> Callable[[str], int]:
    linkgrammar = _import_link_grammar()
    linkgrammar.LG_Error.set_handler(None)
    dictionary = linkgrammar.Dictionary("en")
    # no limit of time, which would make the value depend on the machine's load
    options = linkgrammar.ParseOptions(verbosity=0, max_null_count=250, linkage_limit=10)

    def words_left_out(text: str) -> int:
        sentence = linkgrammar.Sentence(text, dictionary, options)
        sentence.parse()
        return int(sentence.null_count())

    return words_left_out


def _import_link_grammar() -> Any:
    try:
        return importlib.import_module("linkgrammar")
    except ImportError:
        # a virtual environment does not look where the system's packages are
        folder = Path("/usr/lib/python3/dist-packages/linkgrammar")
        spec = importlib.util.spec_from_file_location(
            "linkgrammar", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
    if spec is None or spec.loader is None:
        raise ImportError(_DEBIAN)
    try:
        module = sys.modules["linkgrammar"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        sys.modules.pop("linkgrammar", None)
        raise ImportError(_DEBIAN) from error
    return module


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this reward needs the package {package}: pip install 'pyro-twist[text]'"
        ) from error
