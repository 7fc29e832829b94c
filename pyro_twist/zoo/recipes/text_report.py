# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Measures a masked diffusion over short sentences, finished or in training::

    python -m pyro_twist.zoo.recipes.text_report work/ema --texts work --out report.json

Samples are drawn one position at a time in a random order, which is the law of the model without
an error of time steps. Fluency is measured by two language models that had no part in the
training: characters (shipped) and, with the extra ``text``, word trigrams.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_twist.rewards.charlm import char_lm
from pyro_twist.rewards.text import TrigramLM, distinct
from pyro_twist.zoo.recipes.masked_training import masked_logits, nelbo
from pyro_twist.zoo.recipes.text_data import LENGTH, encode

__all__ = ["main", "measure", "sample", "texts_of"]


@torch.no_grad()
def sample(
    model: Any, mask_token_id: int, number: int, seed: int = 0, temperature: float = 1.0
) -> Tensor:
    """
    Draws sequences from a masked diffusion, one position after the other in a random order.

    :param model: A transformers model for masked language modelling.
    :param int mask_token_id: The mask token, which is never drawn.
    :param int number: How many.
    :param int seed: Seeds the order and the tokens.
    :param float temperature: Divides the logits; below 1, likely tokens become likelier.
    :returns: Token ids, int64, of shape ``(number, 24)``.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((number, LENGTH), mask_token_id)
    order = torch.rand(number, LENGTH, generator=generator).argsort(1)
    for rows in torch.arange(number).split(256):
        for place in order[rows].T:
            chosen = torch.zeros(len(rows), LENGTH, dtype=torch.bool)
            chosen[torch.arange(len(rows)), place] = True
            logits = masked_logits(model, ids[rows], chosen).double() / temperature
            logits[:, mask_token_id] = -math.inf
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids[rows, place] = drawn[:, 0]
    return ids


def texts_of(tokenizer: Any, ids: Tensor) -> list[str]:
    """
    Decodes sequences up to their first ``[SEP]``.

    :param tokenizer: The model's tokenizer.
    :param torch.Tensor ids: Of shape ``(number, length)``.
    :returns: As many strings.
    """
    after = (ids == tokenizer.eos_token_id).cumsum(1) > 0
    kept = ids.masked_fill(after, tokenizer.pad_token_id)
    texts: list[str] = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return texts


def well_formed(tokenizer: Any, ids: Tensor) -> float:
    """The share of sequences with one ``[SEP]`` and ``[PAD]`` behind it and only there."""
    ends = ids == tokenizer.eos_token_id
    behind = ends.cumsum(1) - ends.long() > 0
    right = (behind == (ids == tokenizer.pad_token_id)).all(1) & (ends.sum(1) == 1)
    return float(right.double().mean())


def known_ngrams(texts: list[str], training: list[str], n: int = 4) -> float:
    """The share of the ``n``-grams of words that some training text has too."""

    def grams(text: str) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[k : k + n]) for k in range(len(words) - n + 1)]

    known = {gram for text in training for gram in grams(text)}
    found = [gram in known for text in texts for gram in grams(text)]
    return sum(found) / max(1, len(found))


def qualities(texts: list[str], training: list[str]) -> dict[str, Any]:
    """
    Fluency, diversity, length and copies of a set of texts.

    :param list texts: The texts.
    :param list training: What the model was trained on.
    :returns: The figures.
    """
    characters = torch.tensor([len(text) + 1 for text in texts])
    nats = -char_lm().log_prob(texts).sum() / characters.sum()
    words = [len(text.split()) for text in texts]
    copies = set(training)
    found = {
        "texts": len(texts),
        "bits_per_character": round(float(nats) / math.log(2.0), 3),
        **{f"dist_{n}": round(distinct(texts, n), 3) for n in (1, 2, 3)},
        "words": round(sum(words) / len(words), 2),
        "lengths": dict(sorted(Counter(words).items())),
        "copies": round(sum(text in copies for text in texts) / len(texts), 4),
        "known_4_grams": round(known_ngrams(texts, training), 4),
        "repeats": round(1 - len(set(texts)) / len(texts), 4),
    }
    try:
        found["trigram_perplexity"] = round(TrigramLM().perplexity(texts), 1)
    except ImportError as error:
        print(error)
    return found


def measure(
    folder: Path, data: Path, number: int, seed: int = 0, temperature: float = 1.0
) -> tuple[dict[str, Any], list[str]]:
    """
    Draws samples and compares them with as many held-out examples.

    :param ~pathlib.Path folder: The model.
    :param ~pathlib.Path data: Folder with ``examples.txt``, ``glosses.txt``, ``held_out.txt``.
    :param int number: How many samples.
    :param int seed: Seeds the samples.
    :param float temperature: Of the samples.
    :returns: The figures, and the samples.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    start = time.time()
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = {
        name: (data / f"{name}.txt").read_text().splitlines()
        for name in ("examples", "glosses", "held_out")
    }
    training = lines["examples"] + lines["glosses"]
    ids = sample(model, tokenizer.mask_token_id, number, seed, temperature)
    texts = texts_of(tokenizer, ids)
    held_out = lines["held_out"][:: max(1, len(lines["held_out"]) // number)][:number]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        bound = nelbo(model, encode(tokenizer, held_out), tokenizer.mask_token_id, generator)
    report: dict[str, Any] = {
        "temperature": temperature,
        "held_out_nats": round(float(bound.mean()), 2),
        "well_formed": round(well_formed(tokenizer, ids), 4),
        "unknown": round(float((ids == tokenizer.unk_token_id).double().mean()), 6),
        "samples": qualities(texts, training),
        "held_out": qualities(held_out, training),
    }
    report["ratios"] = ratios(report["samples"], report["held_out"])
    report["minutes"] = round((time.time() - start) / 60.0, 1)
    return report, texts


def ratios(samples: dict[str, Any], held_out: dict[str, Any]) -> dict[str, float]:
    """The perplexities of samples as multiples of those of held-out texts."""
    bits = samples["bits_per_character"] - held_out["bits_per_character"]
    found = {"per_character": round(2.0**bits, 3)}
    if "trigram_perplexity" in samples and "trigram_perplexity" in held_out:
        ratio = samples["trigram_perplexity"] / held_out["trigram_perplexity"]
        found["per_word"] = round(ratio, 3)
    return found


def main() -> None:
    """Measures, and prints some samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the model's folder")
    parser.add_argument("--texts", type=Path, required=True, help="folder with examples.txt etc.")
    parser.add_argument("--number", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--shown", type=int, default=20)
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report, texts = measure(
        options.model, options.texts, options.number, options.seed, options.temperature
    )
    print("\n".join(texts[: options.shown]))
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.write_text(json.dumps({**report, "texts": texts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
