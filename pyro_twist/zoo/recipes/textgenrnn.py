# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Converts the character model that the package textgenrnn carries to what ``charlm`` ships::

    pip download --no-deps --no-binary :all: textgenrnn==2.0.0
    python -m pyro_twist.zoo.recipes.textgenrnn textgenrnn-2.0.0.tar.gz

Needs h5py.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "charlm"


def read_archive(path: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """
    Reads the source distribution of textgenrnn.

    :param ~pathlib.Path path: The file ``textgenrnn-2.0.0.tar.gz``.
    :returns: The arrays by name, and the index of each character.
    """
    import h5py

    with tarfile.open(path) as archive:
        found = {Path(member.name).name: member for member in archive if member.isfile()}
        files = {
            name: archive.extractfile(found[f"textgenrnn_{name}"])
            for name in ("weights.hdf5", "vocab.json")
        }
        data = {name: file.read() for name, file in files.items() if file is not None}
    arrays: dict[str, np.ndarray] = {}

    def collect(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            layer, _, last = name.partition("/")
            arrays[f"{layer}.{last.rpartition('/')[2].removesuffix(':0')}"] = item[()]

    with h5py.File(io.BytesIO(data["weights.hdf5"])) as weights:
        weights.visititems(collect)
    return arrays, json.loads(data["vocab.json"])


def lstm_weights(arrays: dict[str, np.ndarray], layer: str) -> list[Tensor]:
    """
    The weights of one LSTM layer in the order of torch; the file has them in that of cuDNN.

    :param dict arrays: The arrays by name.
    :param str layer: The layer's name in the file.
    :returns: Input and recurrent weights, input and recurrent biases.
    """
    kernel, recurrent = arrays[f"{layer}.kernel"], arrays[f"{layer}.recurrent_kernel"]
    inputs, size = kernel.shape[0], recurrent.shape[0]
    # each gate's input weights were written transposed, without a change of shape
    gates = [gate.reshape(size, inputs) for gate in np.split(kernel, 4, axis=1)]
    arranged = [
        np.concatenate(gates),
        np.concatenate(np.split(recurrent, 4, axis=1)),
        *np.split(arrays[f"{layer}.bias"], 2),
    ]
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arranged]


def convert(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """
    Names the weights as :class:`~pyro_twist.rewards.charlm.CharLM` does.

    :param dict arrays: The arrays by name.
    :returns: The state dict, in float32.
    """
    state = {
        "embedding.weight": torch.from_numpy(arrays["embedding.embeddings"]),
        "attention.weight": torch.from_numpy(arrays["attention.attention_W"]).T,
        "output.weight": torch.from_numpy(arrays["output.kernel"]).T,
        "output.bias": torch.from_numpy(arrays["output.bias"]),
    }
    for layer in ("rnn_1", "rnn_2"):
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        for name, value in zip(names, lstm_weights(arrays, layer), strict=True):
            state[f"{layer}.{name}"] = value
    return {name: value.float().contiguous() for name, value in state.items()}


def main() -> None:
    """Converts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path, help="textgenrnn-2.0.0.tar.gz")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    arrays, characters = read_archive(options.archive)
    options.out.mkdir(exist_ok=True)
    save_file(convert(arrays), options.out / "model.safetensors")
    text = json.dumps(dict(sorted(characters.items(), key=lambda item: item[1])), indent=0)
    (options.out / "characters.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
