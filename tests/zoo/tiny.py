# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Untrained models of molecules and of texts, in folders laid out as those of the zoo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SELFIES = ("[C][C][O]", "[C][=C][C][=C][C][=C][Ring1][=Branch1]", "[C][N][C][=Branch1][C][=O][C]")
WORDS = "a the film book was is very good bad great awful not and never i love hate it , . ? ' - s"
LENGTH = {"molecules": 10, "text": 8}


def write_tiny(root: Path, kind: str, **about: Any) -> Path:
    """A folder with a model of random weights, so that all tokens are about as likely."""
    folder = root / kind
    tokenizer = _selfies_tokenizer() if kind == "molecules" else _text_tokenizer()
    tokenizer.model_max_length = LENGTH[kind]
    tokenizer.save_pretrained(folder / "tokenizer")
    _network(len(tokenizer), LENGTH[kind]).save_pretrained(folder / "network")
    info = {"description": f"tiny {kind}", "kind": kind, "temperature": 0.5, **about}
    (folder / "info.json").write_text(json.dumps(info))
    return folder


def _selfies_tokenizer() -> Any:
    from pyro_twist.zoo.recipes.molecules import make_tokenizer

    return make_tokenizer(SELFIES, LENGTH["molecules"])


def _text_tokenizer() -> Any:
    from pyro_twist.zoo.recipes.text_data import SPECIAL, cut_tokenizer

    return cut_tokenizer([*SPECIAL, *WORDS.split()])


def _network(vocabulary: int, length: int) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=vocabulary,
        intermediate_size=16,
        max_position_embeddings=length,
        **sizes,
    )
    return BertForMaskedLM(config).half()
