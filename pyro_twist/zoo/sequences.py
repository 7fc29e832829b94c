# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Masked diffusion models of molecules and of texts, laid out as those of the zoo.

A folder holds ``info.json``, ``network/``, a masked language model as transformers saves it, and
``tokenizer/``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyro_twist.diffusion import MaskedDiffusion

__all__ = ["SequenceDecoder", "load_sequences", "selfies_to_smiles"]

_FREE = "[MASK]"
_FIXED = ("length", "tokenizer", "vocab_size", "mask_token_id", "denoiser")


def load_sequences(
    folder: Path,
    kind: str,
    *,
    prompt: str | Sequence[str] | Tensor | None = None,
    **options: Any,
) -> MaskedDiffusion:
    """
    Loads a masked diffusion model whose samples are strings, in float32.

    :param ~pathlib.Path folder: Its files.
    :param str kind: ``"molecules"``, decoded from SELFIES to SMILES, or ``"text"``.
    :param prompt: For texts the beginning of a text, with ``"_"`` for a word piece that is free,
        as in ``"the _ was very"``; what comes behind is free. Several open the plate ``"prompts"``
        with one population each. For both kinds also tokens, as
        :class:`~pyro_twist.diffusion.MaskedDiffusion` takes them.
    :param options: More arguments of :class:`~pyro_twist.diffusion.MaskedDiffusion`;
        ``forbidden_token_ids`` are added to those that are never drawn anyway.
    :raises ValueError: If a prompt is empty, does not fit, or has what the model does not know, or
        an option is one that the model says itself.
    """
    from transformers import AutoTokenizer

    from pyro_twist.diffusion import MaskedDiffusion

    for name in _FIXED:
        if name in options:
            raise ValueError(f"{name}={options[name]!r}: the model has its own; leave it out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    length = int(tokenizer.model_max_length)
    if prompt is not None and not isinstance(prompt, Tensor):
        prompts = _texts(prompt)
        tokens = torch.stack([_encoded(tokenizer, one, kind, length) for one in prompts])
        if isinstance(prompt, str):
            prompt = tokens[0]
        else:
            prompt = tokens
            options.setdefault("plate", ("prompts", len(prompts)))
    finish = selfies_to_smiles if kind == "molecules" else str.strip
    options.setdefault("decoder", SequenceDecoder(tokenizer, finish))
    options.setdefault("dtype", torch.float32)
    forbidden = (*_unknown(tokenizer), *options.pop("forbidden_token_ids", ()))
    with quietly():
        model = MaskedDiffusion.from_pretrained(
            folder / "network",
            length,
            tokenizer=tokenizer,
            prompt=prompt,
            forbidden_token_ids=forbidden,
            **options,
        )
    network: Any = model.denoiser.network
    network.requires_grad_(False)
    return model


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps transformers from showing how it reads a small file, and which packages it misses."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


class SequenceDecoder:
    """
    Tokens to strings: what stands before the first end or padding.

    :param tokenizer: A tokenizer of transformers.
    :param callable finish: What to make of each string.
    """

    def __init__(self, tokenizer: Any, finish: Callable[[str], str]) -> None:
        self.tokenizer, self.finish = tokenizer, finish
        self._special = torch.tensor(tokenizer.all_special_ids)

    def __call__(self, tokens: Tensor) -> list[str]:
        """
        Decodes.

        :param torch.Tensor tokens: Of shape ``(B, length)``.
        :returns: ``B`` strings.
        """
        special = torch.isin(tokens, self._special.to(tokens.device))
        lengths = special.long().cumsum(-1).eq(0).sum(-1).tolist()
        rows = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
        return [self.finish(text) for text in self.tokenizer.batch_decode(rows)]

    def token_name(self, token: int) -> str:
        """
        What a token stands for, as people read it.

        :param int token: The token.
        """
        return str(self.tokenizer.decode([token]))


@functools.lru_cache(maxsize=2**16)
def selfies_to_smiles(selfies: str) -> str:
    """
    The canonical SMILES string of a molecule.

    :param str selfies: The molecule as SELFIES.
    :returns: The string; empty if the molecule has no atoms.
    :raises ImportError: If selfies or RDKit is not installed.
    """
    try:
        import selfies as package
        from rdkit import Chem, rdBase
    except ImportError as error:
        raise ImportError(
            "molecules are decoded with selfies and RDKit: pip install 'pyro-twist[molecules]'"
        ) from error
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(package.decoder(selfies))
    return "" if molecule is None else str(Chem.MolToSmiles(molecule))


def _unknown(tokenizer: Any) -> tuple[int, ...]:
    """The token for what the tokenizer does not know, if there is one."""
    return () if tokenizer.unk_token_id is None else (int(tokenizer.unk_token_id),)


def _texts(prompt: Any) -> list[str]:
    """One prompt or several."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    texts = isinstance(prompts, Sequence) and all(isinstance(one, str) for one in prompts)
    if not texts or not len(prompts):
        raise ValueError(
            f"prompt={prompt!r}; give a text, a list of at least one, or tokens, or leave it out"
        )
    return list(prompts)


def _encoded(tokenizer: Any, prompt: str, kind: str, length: int) -> Tensor:
    if kind != "text":
        raise ValueError(
            f"prompt={prompt!r}: molecules are prompted with tokens, a tensor with the mask token "
            "at free positions"
        )
    marked = re.sub(r"(?<!\w)_(?!\w)", _FREE, prompt)
    if "_" in marked:
        raise ValueError(
            f"prompt={prompt!r} has '_' beside a letter or another; each is for a word piece, so "
            "put a space between them"
        )
    tokens = tokenizer(marked, add_special_tokens=False)["input_ids"]
    special = set(tokens) & set(tokenizer.all_special_ids)
    special -= {tokenizer.mask_token_id, tokenizer.unk_token_id}
    if special:
        names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(special)))
        raise ValueError(f"prompt={prompt!r} has {names}, with which a text ends; leave that out")
    if tokenizer.unk_token_id in tokens:
        raise ValueError(f"prompt={prompt!r} has a sign that the model does not know")
    if not 0 < len(tokens) < length:
        raise ValueError(f"prompt={prompt!r} has {len(tokens)} word pieces; give 1 to {length - 1}")
    return torch.tensor(tokens + [tokenizer.mask_token_id] * (length - len(tokens)))
