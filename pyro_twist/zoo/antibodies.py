# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Two pretrained language models of antibodies as masked diffusion.

The weights are those in the Python packages ``antiberty`` 0.1.3 [1] and ``sapiens`` 1.0.5 [2].
They are installed without what they depend on, and none of their code is run::

    pip install --no-deps antiberty==0.1.3 sapiens==1.0.5

**References**

[1] `Deciphering antibody affinity maturation with language models and weakly supervised learning`
    Jeffrey A. Ruffolo, Jeffrey J. Gray, Jeremias Sulam (2021), https://arxiv.org/abs/2112.07782
[2] `BioPhi: A platform for antibody design, humanization, and humanness evaluation`
    David Prihoda and others (2022), https://doi.org/10.1080/19420862.2021.2020203
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from pyro_twist.rewards.proteins import AMINO_ACIDS

if TYPE_CHECKING:
    from pyro_twist.diffusion import MaskedDiffusion

__all__ = ["AntibodyModel", "Chain", "antibodies", "load_antibodies", "load_model"]

Chain = Literal["H", "L"]

# what stands for a free position in a prompt, the first also in what is decoded
FREE = "?_"

_VERSIONS = {"antiberty": "0.1.3", "sapiens": "1.0.5"}
_ABOUT = {
    "antiberty": "antibody sequences, AntiBERTy, 26 M parameters; weights of antiberty 0.1.3",
    "sapiens": "human antibody sequences, Sapiens, 0.6 M parameters; weights of sapiens 1.0.5",
}
# The first framework to the last of a variable domain.
_USUAL_LENGTH = {"H": 121, "L": 107}
_SPECIAL = {
    "antiberty": ("[CLS]", "[SEP]", "[MASK]"),
    "sapiens": ("<s>", "</s>", "<mask>"),
}


def antibodies() -> dict[str, str]:
    """
    The antibody models.

    :returns: A description of one line for each name, whether the weights are installed or not.
    """
    return dict(_ABOUT)


@dataclass(frozen=True)
class AntibodyModel:
    """
    A language model of antibodies, and what its tokens mean.

    :param network: A masked language model of transformers, in evaluation mode and frozen.
    :param tuple vocabulary: The meaning of each token.
    :param str start: The token before a sequence.
    :param str end: The token behind it.
    :param str mask: The token at positions that are not known.
    :param int max_length: The most residues that it can read.
    """

    network: Any
    vocabulary: tuple[str, ...]
    start: str
    end: str
    mask: str
    max_length: int

    @property
    def mask_token_id(self) -> int:
        """The index of :attr:`mask`."""
        return self.vocabulary.index(self.mask)

    @property
    def forbidden_token_ids(self) -> tuple[int, ...]:
        """The indices of all tokens that are no amino acid."""
        return tuple(i for i, token in enumerate(self.vocabulary) if token not in AMINO_ACIDS)

    def encode(self, sequences: Sequence[str]) -> Tensor:
        """
        Sequences as tokens.

        :param sequences: ``B`` sequences of one length in the one-letter code, ``"?"`` or ``"_"``
            at positions that are not known.
        :returns: Of shape ``(B, length + 2)``, with the tokens of start and end.
        :raises ValueError: If the lengths differ or are too long, or a letter is no amino acid.
        """
        lengths = sorted({len(sequence) for sequence in sequences})
        if len(lengths) != 1 or not 0 < lengths[0] <= self.max_length:
            raise ValueError(
                f"the sequences have lengths {lengths}; give one length from 1 to {self.max_length}"
            )
        rows = [[self.start, *map(self._token, one), self.end] for one in sequences]
        places = {token: i for i, token in enumerate(self.vocabulary)}
        return torch.tensor([[places[token] for token in row] for row in rows])

    def decode(self, tokens: Tensor) -> list[str]:
        """
        Tokens as sequences.

        :param torch.Tensor tokens: Of shape ``(B, length + 2)``.
        :returns: ``B`` sequences; a position that is masked is a ``"?"``.
        """
        letters = [token if token in AMINO_ACIDS else FREE[0] for token in self.vocabulary]
        return ["".join(letters[i] for i in row[1:-1]) for row in tokens.tolist()]

    def _token(self, letter: str) -> str:
        if letter in FREE:
            return self.mask
        if letter not in AMINO_ACIDS:
            raise ValueError(
                f"{letter!r} is no amino acid; use the letters {AMINO_ACIDS}, and ? for a position "
                "that is free"
            )
        return letter


def load_antibodies(
    name: str,
    *,
    length: int | None = None,
    prompt: str | Sequence[str] | None = None,
    chain: Chain = "H",
    **options: Any,
) -> MaskedDiffusion:
    """
    A masked diffusion of antibody sequences, decoded to the one-letter code.

    AntiBERTy writes plausible sequences from nothing. Sapiens is small and best at filling in, up
    to about half of a sequence.

    :param str name: ``"antiberty"`` or ``"sapiens"``.
    :param int length: The number of residues; by default that of the prompt, or of a usual
        variable domain.
    :param prompt: What is known, ``"?"`` or ``"_"`` at free positions, as in ``"EVQL????SGG"``.
        Several of one length open the plate ``"prompts"`` with one population each.
    :param str chain: ``"H"`` for the heavy chain or ``"L"`` for the light one: which of Sapiens'
        two networks is used; for AntiBERTy only the usual length depends on it.
    :param options: More arguments of :class:`~pyro_twist.diffusion.MaskedDiffusion`;
        ``forbidden_token_ids`` are added to all that is no amino acid.
    :raises ImportError: If the package with the weights is not installed in the right version.
    :raises ValueError: If there is no such model, prompt, length and chain do not fit, or an option
        is one that the model says itself.
    """
    from pyro_twist.diffusion import MaskedDiffusion

    _check_name(name)
    for option in ("vocab_size", "mask_token_id", "denoiser"):
        if option in options:
            raise ValueError(f"{option}={options[option]!r}: the model has its own; leave it out")
    _check_chain(chain)
    prompts = _prompts(length, prompt, chain)
    model = load_model(name, chain)
    tokens = model.encode(prompts)
    if prompt is not None and not isinstance(prompt, str):
        options.setdefault("plate", ("prompts", len(prompts)))
    options.setdefault("decoder", model.decode)
    forbidden = (*model.forbidden_token_ids, *options.pop("forbidden_token_ids", ()))
    return MaskedDiffusion(
        model.network,
        tokens.shape[1],
        len(model.vocabulary),
        model.mask_token_id,
        prompt=tokens if "plate" in options else tokens[0],
        forbidden_token_ids=forbidden,
        **options,
    )


def _prompts(length: int | None, prompt: str | Sequence[str] | None, chain: Chain) -> list[str]:
    if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
        raise ValueError(f"length={length!r}; give a whole number of residues, such as 110")
    if prompt is None:
        return [FREE[0] * (_USUAL_LENGTH[chain] if length is None else length)]
    prompts = [prompt] if isinstance(prompt, str) else prompt
    texts = isinstance(prompts, Sequence) and all(isinstance(one, str) for one in prompts)
    if not texts or not len(prompts):
        raise ValueError(
            f"prompt={prompt!r}; give a sequence with ? at free positions, a list of at least one, "
            "or leave it out"
        )
    if length is not None and any(len(one) != length for one in prompts):
        lengths = ", ".join(str(len(one)) for one in prompts)
        raise ValueError(f"length={length}, but the prompt has {lengths} letters; leave out length")
    return list(prompts)


@cache
def load_model(name: str, chain: Chain = "H") -> AntibodyModel:
    """
    Reads a model from the package that ships it; the package's code is not run.

    :param str name: ``"antiberty"`` or ``"sapiens"``.
    :param str chain: ``"H"`` or ``"L"``; of no consequence for AntiBERTy.
    :raises ValueError: If there is no such model.
    :raises ImportError: If that package is not installed, or in a version without weights.
    """
    _check_name(name)
    _check_chain(chain)
    read = {"antiberty": _antiberty, "sapiens": _sapiens}
    network, vocabulary, max_length = read[name](_package(name), chain)
    network = network.float().eval().requires_grad_(False)
    return AntibodyModel(network, vocabulary, *_SPECIAL[name], max_length)


def _check_name(name: str) -> None:
    if name not in _ABOUT:
        raise ValueError(f"name={name!r}; choose one of {', '.join(map(repr, _ABOUT))}")


def _check_chain(chain: str) -> None:
    if chain not in get_args(Chain):
        raise ValueError(f"chain={chain!r}; choose 'H', the heavy one, or 'L', the light one")


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    wanted = f"{name}=={_VERSIONS[name]}"
    install = f"pip install --no-deps {wanted}"
    try:
        found = version(name)
    except PackageNotFoundError:
        raise ImportError(f"the weights come with the package {wanted}: {install}") from None
    spec = find_spec(name)
    if found != _VERSIONS[name] or spec is None or spec.origin is None:
        raise ImportError(
            f"{name} {found} is installed, whose weights, if it has any, are not known here: "
            f"{install}"
        )
    return Path(spec.origin).parent


# AntiBERTy

_BERT_SIZES = (
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "type_vocab_size",
    "vocab_size",
)
# The heads for species, chain and grafting, and what transformers keeps elsewhere today.
_NOT_USED = (
    "bert.pooler.",
    "bert.embeddings.position_ids",
    "cls.species",
    "cls.chain",
    "cls.graft",
)


def _antiberty(package: Path, chain: Chain) -> tuple[Any, tuple[str, ...], int]:
    from transformers import BertConfig, BertForMaskedLM

    folder = package / "trained_models"
    about = json.loads((folder / "AntiBERTy_md_smooth" / "config.json").read_text())
    network = BertForMaskedLM(BertConfig(**{size: about[size] for size in _BERT_SIZES}))
    file = folder / "AntiBERTy_md_smooth" / "pytorch_model.bin"
    weights = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict({k: v for k, v in weights.items() if not k.startswith(_NOT_USED)})
    vocabulary = tuple((folder / "vocab.txt").read_text().split())
    return network, vocabulary, about["max_position_embeddings"] - 2


# Sapiens

_FAIRSEQ = {
    "embed_tokens": "roberta.embeddings.word_embeddings",
    "embed_positions": "roberta.embeddings.position_embeddings",
    "emb_layer_norm": "roberta.embeddings.LayerNorm",
}
_FAIRSEQ_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}


def _sapiens(package: Path, chain: Chain) -> tuple[Any, tuple[str, ...], int]:
    from transformers import RobertaConfig, RobertaForMaskedLM

    folder = package / "models" / "v1"
    file = folder / f"checkpoint_v{chain.lower()}.pt"
    # the checkpoint also holds the options of its training
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(file, map_location="cpu", weights_only=True)
    letters = [line.split()[0] for line in (folder / "dict.txt").read_text().splitlines()]
    vocabulary = ("<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>")
    args = saved["args"]
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=args.encoder_embed_dim,
        num_hidden_layers=args.encoder_layers,
        num_attention_heads=args.encoder_attention_heads,
        intermediate_size=args.encoder_ffn_embed_dim,
        # positions are counted from behind the padding token
        max_position_embeddings=args.max_positions + 2,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    network = RobertaForMaskedLM(config)
    weights = dict(_renamed(saved["model"]))
    # fairseq has no types of tokens
    weights["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, config.hidden_size)
    network.load_state_dict(weights)
    return network, vocabulary, args.max_positions - 2


def _renamed(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights of fairseq's RoBERTa by the names of transformers' one."""
    for key, value in weights.items():
        name, _, kind = key.removeprefix("decoder.").rpartition(".")
        yield from ((f"{new}.{kind}", value) for new in _new_names(name, kind))


def _new_names(name: str, kind: str) -> Iterator[str]:
    name = name.removeprefix("sentence_encoder.")
    if name.startswith("layers."):
        _, layer, part = name.split(".", 2)
        yield f"roberta.encoder.layer.{layer}.{_FAIRSEQ_LAYER[part]}"
    elif name == "lm_head":
        yield "lm_head.decoder"
        if kind == "bias":
            yield "lm_head"
    else:
        yield _FAIRSEQ.get(name, name)
