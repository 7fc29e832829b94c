# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Trains the masked diffusion model of molecules of the zoo (some hours of one core)::

    pip install pyro-twist[molecules] && pip install --no-deps molsets==0.3.1
    python -m pyro_twist.zoo.recipes.molecules --folder work --minutes 150

A file ``work/finish`` ends the training early; the same command goes on with an interrupted one.

The molecules are those of MOSES [1], written as SELFIES [2], of which every string is a molecule.
Tokens are byte-pair merges of SELFIES symbols, so that rings and common groups are one token each.
A sequence is the tokens of a molecule, one ``[END]``, and ``[PAD]`` up to the fixed length.

**References**

[1] `Molecular Sets (MOSES): A Benchmarking Platform for Molecular Generation Models`
    Daniil Polykovskiy, Alexander Zhebrak, Benjamin Sanchez-Lengeling and others (2020),
    https://doi.org/10.3389/fphar.2020.565644
[2] `Self-referencing embedded strings (SELFIES): A 100% robust molecular string representation`
    Mario Krenn, Florian Häse, AkshatKumar Nigam, Pascal Friederich, Alán Aspuru-Guzik (2020),
    https://doi.org/10.1088/2632-2153/aba947
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import math
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_twist.zoo.recipes.masked_training import shuffled_batches, train

VOCABULARY, LONGEST_MERGE = 2048, 16
SPECIAL = {"pad_token": "[PAD]", "mask_token": "[MASK]", "eos_token": "[END]"}


def moses(split: str) -> list[str]:
    """
    The SMILES strings of a split of MOSES, in a fixed random order.

    :param str split: ``"train"``, ``"test"`` or ``"test_scaffolds"``.
    :returns: The strings as the data set has them.
    """
    # the package cannot be imported without dependencies of which only its metrics have need
    package = importlib.util.find_spec("moses")
    if package is None or package.origin is None:
        raise ImportError("the molecules are not installed; pip install --no-deps molsets==0.3.1")
    path = Path(package.origin).parent / "dataset" / "data" / f"{split}.csv.gz"
    with gzip.open(path, "rt") as file:
        smiles = [line.split(",")[0].strip() for line in file][1:]
    random.Random(0).shuffle(smiles)
    return smiles


def as_selfies(smiles: Iterable[str], cache: Path) -> list[str]:
    """Molecules as SELFIES, remembered in a text file."""
    import selfies

    if not cache.exists():
        partial = cache.with_suffix(".partial")
        with partial.open("w") as file:
            for molecule in smiles:
                file.write(selfies.encoder(molecule, strict=False) + "\n")
        partial.replace(cache)
    return cache.read_text().split()


def make_tokenizer(selfies: Sequence[str], length: int | None = None) -> Any:
    """
    Learns byte-pair merges of SELFIES symbols.

    :param selfies: The strings to learn from.
    :param int length: The fixed length of a sequence, for ``padding="max_length"``.
    :returns: A ``PreTrainedTokenizerFast`` that maps SELFIES to ids, with the end token, and back.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted({symbol for text in selfies for symbol in re.findall(r"\[[^\]]*\]", text)})
    # merges are learnt over characters, so every symbol becomes one of the private use area
    private = {symbol: chr(0xE000 + place) for place, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(symbol, character) for symbol, character in private.items()]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Fuse()]
        + [decoders.Replace(character, symbol) for symbol, character in private.items()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        max_token_length=LONGEST_MERGE,
        show_progress=False,
    )
    tokenizer.train_from_iterator(selfies, trainer)
    end = SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids"],
        model_max_length=length,
        **SPECIAL,
    )


def tokenise(tokenizer: Any, selfies: Sequence[str]) -> list[list[int]]:
    """The ids of each string, with the end token."""
    ids: list[list[int]] = []
    for start in range(0, len(selfies), 10000):
        ids += tokenizer(list(selfies[start : start + 10000]))["input_ids"]
    return ids


def fixed_length(ids: Iterable[list[int]], length: int, pad_token_id: int) -> Tensor:
    """Sequences of at most ``length`` filled up with the pad token, int16; longer ones dropped."""
    kept = [row + [pad_token_id] * (length - len(row)) for row in ids if len(row) <= length]
    return torch.tensor(kept, dtype=torch.int16)


def make_model(vocabulary: int, molecules: Tensor) -> Any:
    """
    The untrained network: 4 M parameters, layer norms first, learnt positions.

    Positions must be absolute: with relative ones alone, all positions of a sequence of nothing but
    masks look the same.

    :param int vocabulary: The number of tokens.
    :param torch.Tensor molecules: The training sequences, of shape ``(number, length)``, whose
        statistics the embeddings start from.
    :returns: The model.
    """
    from transformers import MegatronBertConfig, MegatronBertForMaskedLM

    width = 256
    config = MegatronBertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=3 * width,
        max_position_embeddings=molecules.shape[1],
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=width**-0.5,
        # the model predicts and reads padding like any token, so its embedding must be learnt
        pad_token_id=None,
    )
    model = MegatronBertForMaskedLM(config)
    _initialise(model)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.copy_(
            token_vectors(molecules, vocabulary, width)
        )
        counts = torch.bincount(molecules[:200000].long().flatten(), minlength=vocabulary)
        model.cls.predictions.bias.copy_(((counts + 1.0) / counts.sum()).log())
    return model


def token_vectors(molecules: Tensor, vocabulary: int, width: int) -> Tensor:
    """
    Vectors of tokens from what stands next, and next but one, to them.

    A quarter of the dimensions each is a factor of the matrices of pointwise mutual information of
    a token and the one that follows, or the next but one: two for the earlier and two for the
    later token. From random vectors most of the training goes into finding these.

    :param torch.Tensor molecules: Of shape ``(number, length)``.
    :param int vocabulary: The number of tokens; the first two are padding and mask.
    :param int width: The number of dimensions.
    :returns: Of shape ``(vocabulary, width)``, with squared lengths near 1.
    """
    factors = []
    for offset in (1, 2):
        left, strength, right = torch.linalg.svd(_information(molecules, vocabulary, offset))
        root = strength[: width // 4].sqrt()
        factors += [left[:, : width // 4] * root, right.T[:, : width // 4] * root]
    vectors = torch.cat(factors, 1)
    vectors = vectors / vectors.square().sum(1).mean().sqrt()
    # turned at random, lest the factors fall on single waves of the positions
    turned = vectors @ torch.linalg.qr(torch.randn(width, width)).Q
    return turned + 0.3 * torch.randn(vocabulary, width) * width**-0.5


def _information(molecules: Tensor, vocabulary: int, offset: int) -> Tensor:
    """Smoothed pointwise mutual information of tokens ``offset`` apart, padding left out."""
    first, second = molecules[:, :-offset].long(), molecules[:, offset:].long()
    pairs = (first * vocabulary + second)[second > 0]
    counts = torch.bincount(pairs, minlength=vocabulary**2).float().reshape(vocabulary, vocabulary)
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    smoothing = 10.0
    return ((counts + smoothing) / (expected + smoothing)).log()


@torch.no_grad()
def _initialise(model: Any) -> None:
    """
    Sinusoids as positions, small outputs of the layers, and first heads that look at neighbours.

    From the default initialisation the loss stays long at that of tokens drawn independently.
    """
    bert, (length, width) = model.bert, model.bert.embeddings.position_embeddings.weight.shape
    for name, parameter in model.named_parameters():
        if name.endswith("output.dense.weight") and "layer.0." not in name:
            parameter.mul_(0.1)
    frequencies = math.pi * (torch.arange(width // 2) + 0.5) / (width // 2)
    angles = torch.arange(length)[:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    bert.embeddings.position_embeddings.weight.copy_(waves * (2.0 / width) ** 0.5)
    first = bert.encoder.layer[0].attention.self
    num_heads = first.num_attention_heads
    offsets = [sign * by for by in range(1, num_heads // 2 + 1) for sign in (-1, 1)]
    for head, offset in enumerate(offsets):
        chosen = torch.arange(head, width // 2, num_heads)
        rows = slice(head * first.attention_head_size, (head + 1) * first.attention_head_size)
        first.query.weight[rows] = _rotation(frequencies, chosen, float(offset))
        first.key.weight[rows] = _rotation(frequencies, chosen, 0.0)


def _rotation(frequencies: Tensor, chosen: Tensor, offset: float) -> Tensor:
    """Maps the waves of a position to the chosen waves of the position ``offset`` further on."""
    number = len(chosen)
    matrix = torch.zeros(2 * number, 2 * len(frequencies))
    cosine, sine = (offset * frequencies[chosen]).cos(), (offset * frequencies[chosen]).sin()
    row = torch.arange(number)
    matrix[row, chosen], matrix[row, chosen + len(frequencies)] = cosine, -sine
    matrix[row + number, chosen], matrix[row + number, chosen + len(frequencies)] = sine, cosine
    # so that a neighbour gets most of the attention
    return 1.7 * matrix


def load_data(work: Path) -> tuple[Any, Tensor, Tensor]:
    """
    The tokenizer, the training molecules and 1,024 test molecules; remembered in ``work``.

    :param ~pathlib.Path work: A folder, made if need be.
    :returns: The tokenizer, and two int16 tensors of shape ``(number, length)``.
    """
    from transformers import AutoTokenizer

    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokens.npz").exists():
        _prepare(work)
    arrays = np.load(work / "tokens.npz")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    return tokenizer, torch.from_numpy(arrays["train"]), torch.from_numpy(arrays["test"])


def _prepare(work: Path) -> None:
    molecules = as_selfies(moses("train"), work / "train.selfies.txt")
    held_out = as_selfies(moses("test")[:10000], work / "test.selfies.txt")
    tokenizer = make_tokenizer(molecules[:200000])
    ids = tokenise(tokenizer, molecules)
    length = int(np.quantile([len(row) for row in ids], 0.999))
    tokenizer.model_max_length = length
    tokenizer.save_pretrained(work / "tokenizer")
    arrays = {
        "train": fixed_length(ids, length, tokenizer.pad_token_id),
        "test": fixed_length(tokenise(tokenizer, held_out[:1100]), length, tokenizer.pad_token_id),
    }
    np.savez_compressed(work / "tokens.npz", train=arrays["train"], test=arrays["test"][:1024])


def main() -> None:
    """Trains; the averaged model and its tokenizer are in ``folder/ema``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and the model")
    parser.add_argument("--data", type=Path, help="for the tokenised data; by default the folder")
    parser.add_argument("--minutes", type=float, help="of training, earlier runs counted")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--decay-steps", type=int, default=2500)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer, molecules, held_out = load_data(options.data or options.folder)
    print(f"{len(molecules)} molecules of {molecules.shape[1]} tokens", flush=True)
    model = make_model(len(tokenizer), molecules)
    tokenizer.save_pretrained(options.folder / "ema")
    train(
        model,
        shuffled_batches(molecules, options.batch_size),
        options.folder,
        mask_token_id=tokenizer.mask_token_id,
        validation=held_out.long(),
        learning_rate=options.learning_rate,
        warmup=150,
        decay_steps=options.decay_steps,
        max_minutes=options.minutes,
    )


if __name__ == "__main__":
    main()
