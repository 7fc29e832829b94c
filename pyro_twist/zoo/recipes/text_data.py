# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Short English sentences: the example phrases and definitions of WordNet 3.0, cleaned, and a
WordPiece tokenizer with the vocabulary they need.

The examples are what the model is to imitate; the definitions are further English to learn from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LENGTH",
    "SPECIAL",
    "Corpus",
    "corpus",
    "cut_tokenizer",
    "encode",
    "examples",
    "glosses",
]

LENGTH = 24
SPECIAL = ("[PAD]", "[UNK]", "[SEP]", "[MASK]")

# Words with hyphens and apostrophes inside; no quotations, no dashes.
_PLAIN = re.compile(r"[a-z0-9]+(?:(?:[,.?!;]? |[-'])[a-z0-9]+)*[?!]?")
# Lists of plants and animals, and words about words, are not what a reader would call sentences.
_DULL = re.compile(r"\b(genus|famil(y|ies)|species|any of|order|native|suborder|class|used of)\b")


@dataclass(frozen=True)
class Corpus:
    """
    The texts of a training, lower-case, without repeats.

    :param list examples: Examples to train on.
    :param list glosses: Definitions to train on.
    :param list held_out: Examples kept apart.
    :param list vocabulary: The word pieces of all three, special ones first.
    """

    examples: list[str]
    glosses: list[str]
    held_out: list[str]
    vocabulary: list[str]


def examples(folder: Path) -> list[str]:
    """
    The quoted examples of WordNet that are sentences or phrases of 4 to 20 words.

    Quotations with a named author are left out.

    :param ~pathlib.Path folder: The folder with ``data.noun``, ``data.verb`` and so on.
    :returns: The examples, in the order of the files.
    """
    found = (
        match.group(1)
        for line in _lines(folder)
        for match in re.finditer(r'"([^"]+)"(?!\s*-)', line)
    )
    return _tidy(found, 4, 20)


def glosses(folder: Path) -> list[str]:
    """
    The first definition of each entry of WordNet, if it has 5 to 16 words.

    :param ~pathlib.Path folder: The folder with ``data.noun``, ``data.verb`` and so on.
    :returns: The definitions, in the order of the files.
    """
    first = (re.sub(r"\([^)]*\)", "", line.split('"')[0]).split(";")[0] for line in _lines(folder))
    return [text for text in _tidy(first, 5, 16) if not _DULL.search(text)]


def _lines(folder: Path) -> Iterator[str]:
    """What stands behind the bar of each entry."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):
                yield line.split("|", 1)[1]


def _tidy(texts: Iterable[str], least: int, most: int) -> list[str]:
    plain = (re.sub(r"\s+", " ", text.replace("`", "'")).strip(" ;:,.").lower() for text in texts)
    return list(
        dict.fromkeys(
            text for text in plain if _PLAIN.fullmatch(text) and least <= len(text.split()) <= most
        )
    )


def corpus(folder: Path, tokenizer: Path, size: int = 12000, held_out: int = 2000) -> Corpus:
    """
    Reads WordNet and chooses the vocabulary.

    A text is kept if it fits, at most one of its words is cut, into at most three pieces, and all
    pieces are in the vocabulary: the ``size`` most frequent, examples counting three times.

    :param ~pathlib.Path folder: WordNet's folder.
    :param ~pathlib.Path tokenizer: The ``tokenizer.json`` of an uncased WordPiece tokenizer.
    :param int size: The vocabulary's size, special tokens included.
    :param int held_out: How many examples to keep apart.
    :returns: The corpus.
    """
    from tokenizers import Tokenizer

    pieces = Tokenizer.from_file(str(tokenizer))
    pieces.no_padding()
    pieces.no_truncation()
    first, second = (_cut(pieces, texts) for texts in (examples(folder), glosses(folder)))
    counts = Counter(piece for cut in first.values() for piece in cut * 3)
    counts.update(piece for cut in second.values() for piece in cut)
    chosen = [piece for piece, _ in counts.most_common(size - len(SPECIAL))]
    known = set(chosen)
    kept = [text for text, cut in first.items() if known.issuperset(cut)]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0)).tolist()
    return Corpus(
        sorted(kept[k] for k in order[held_out:]),
        sorted(text for text, cut in second.items() if known.issuperset(cut)),
        sorted(kept[k] for k in order[:held_out]),
        [*SPECIAL, *chosen],
    )


def _cut(pieces: Any, texts: list[str]) -> dict[str, list[str]]:
    """The word pieces of the texts that fit and have at most one cut word."""
    found = {}
    for text, encoding in zip(
        texts, pieces.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        cut = encoding.tokens
        tails = [k for k, piece in enumerate(cut) if piece.startswith("##")]
        one_word = not tails or (len(tails) <= 2 and tails[-1] - tails[0] == len(tails) - 1)
        if one_word and len(cut) < LENGTH and not set(cut) & {"[UNK]"}:
            found[text] = cut
    return found


def cut_tokenizer(vocabulary: list[str]) -> Any:
    """
    An uncased WordPiece tokenizer that ends texts with ``[SEP]`` and restores spacing exactly.

    :param list vocabulary: The word pieces, in the order of their ids.
    :returns: A ``PreTrainedTokenizerFast``.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {piece: k for k, piece in enumerate(vocabulary)}
    pieces = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", ids["[SEP]"])]
    )
    joined = [decoders.Replace(f" {mark}", mark) for mark in ",.?!;"]
    joined += [decoders.Replace(f" {mark} ", mark) for mark in "'-"]
    pieces.decoder = decoders.Sequence(
        [decoders.WordPiece(cleanup=False), decoders.Fuse(), *joined]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, texts: list[str]) -> Tensor:
    """
    Texts as token ids, ended with ``[SEP]`` and filled up with ``[PAD]``.

    :param tokenizer: The tokenizer of :func:`cut_tokenizer`.
    :param list texts: The texts.
    :returns: Of shape ``(number, 24)``, int64.
    """
    cut = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    return cut.input_ids
