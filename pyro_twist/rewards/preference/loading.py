# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Loading of published networks: from safetensors only, never from pickles."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["Source", "explained", "load_clip", "load_tokenizer", "load_weights", "placed"]

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Source:
    """
    Where networks come from, and under which conditions.

    :param str revision: The version on the hub.
    :param bool trust_remote_code: Whether to run code that comes with a model.
    :param bool local_files_only: Whether to look on this machine only.
    """

    revision: str = "main"
    trust_remote_code: bool = False
    local_files_only: bool = False

    def options(self) -> dict[str, Any]:
        """The options of transformers' loaders."""
        return asdict(self)

    def at_main(self) -> Self:
        """The same conditions for another name, whose versions are its own."""
        return replace(self, revision="main")


@contextmanager
def explained(what: str, model: str, files: str) -> Iterator[None]:
    """
    Says, when a file is not found, what a local folder needs to hold.

    :param str what: What is being loaded.
    :param str model: Where from.
    :param str files: The files that are needed.
    """
    try:
        yield
    except OSError as error:
        first = str(error).strip().partition("\n")[0]
        raise OSError(
            f"{what} could not be loaded from {model!r}: {first}\nWithout a network, give a local "
            f"folder, as in {what}.from_pretrained(..., model='/path/to/folder'). It needs "
            f"{files}. Only safetensors are read; a pickled checkpoint ({', '.join(_PICKLED)}) "
            "is turned into such a folder by pyro_twist.rewards.convert_checkpoint."
        ) from error


def load_clip(
    model: str, processor: str, source: Source, tokenizer_only: bool = False
) -> tuple[Any, Any]:
    """
    Loads a network with CLIP's two towers, and its processor.

    :param str model: A folder, or a name on the hub.
    :param str processor: The same for the processor.
    :param Source source: The conditions.
    :param bool tokenizer_only: Whether the tokenizer will do.
    :returns: Both.
    """
    from transformers import AutoModel, AutoProcessor

    network = AutoModel.from_pretrained(model, use_safetensors=True, **source.options())
    elsewhere = source if processor == model else source.at_main()
    if tokenizer_only:
        return network, load_tokenizer(processor, elsewhere)
    return network, AutoProcessor.from_pretrained(processor, **elsewhere.options())


def load_tokenizer(model: str, source: Source) -> Any:
    """
    Loads a tokenizer.

    :param str model: A folder, or a name on the hub.
    :param Source source: The conditions.
    :returns: The tokenizer.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, **source.options())


def load_weights(model: str | os.PathLike[str], file: str, source: Source) -> dict[str, Tensor]:
    """
    Loads weights from a safetensors file.

    :param str model: The file itself, a folder with it, or a name on the hub.
    :param str file: The file's name within folder or hub.
    :param Source source: The conditions.
    :returns: Tensors by name.
    :raises ValueError: If the file is no safetensors file.
    :raises OSError: If there is no such file.
    """
    from safetensors.torch import load_file

    path = Path(model)
    if path.is_file():
        return load_file(str(_refuse_pickles(path)))
    if path.is_dir():
        return load_file(str(_within(path, file)))
    from transformers.utils.hub import cached_file

    options = source.options()
    del options["trust_remote_code"]
    return load_file(str(cached_file(str(model), file, **options)))


def placed(network: Any, device: str | torch.device, dtype: torch.dtype) -> Any:
    """
    Puts a network where it runs, ready for use: in evaluation mode, without gradients of its own.

    :param network: The network.
    :param device: Where.
    :param torch.dtype dtype: The precision of its weights.
    :returns: The network.
    """
    return network.to(device=device, dtype=dtype).eval().requires_grad_(False)


def check_keys(what: str, needed: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """
    Checks that weights are exactly those that are needed.

    :param str what: What they are for.
    :param needed: The needed ones.
    :param given: The given ones.
    :raises ValueError: If some are missing or too many.
    """
    missing, other = sorted(set(needed) - set(given)), sorted(set(given) - set(needed))
    if missing or other:
        raise ValueError(
            f"these are no weights of {what}: missing are {missing[:4] or 'none'}, unknown are "
            f"{other[:4] or 'none'}. A published checkpoint needs convert_checkpoint first"
        )


def _refuse_pickles(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no .safetensors file. Pickles can run any code when they are read; turn "
            "one that you trust into safetensors by pyro_twist.rewards.convert_checkpoint"
        )
    return path


def _within(folder: Path, file: str) -> Path:
    path = folder / file
    if not path.is_file():
        pickled = sorted(one.name for one in folder.iterdir() if one.suffix in _PICKLED)
        told = f"; it has {', '.join(pickled)}, which is not read" if pickled else ""
        raise FileNotFoundError(f"no file {file} in the folder {str(folder)!r}{told}")
    return path
