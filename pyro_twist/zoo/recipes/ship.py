# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Puts a trained masked model where the zoo finds it.

``python -m pyro_twist.zoo.recipes.ship RUN FOLDER --kind molecules --description ...``
copies network and tokenizer from the folder of a finished training, and writes ``info.json``.
Model card, notice and report are written beside it by hand and by the reports.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

_NETWORK = ("config.json", "model.safetensors")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def ship(run: Path, folder: Path, info: dict[str, object]) -> None:
    """
    Copies a model.

    :param ~pathlib.Path run: The folder of the training, with ``ema/`` and the log in it.
    :param ~pathlib.Path folder: The model's folder in the zoo.
    :param dict info: What ``info.json`` says.
    """
    for part, names in (("network", _NETWORK), ("tokenizer", _TOKENIZER)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            # the content alone: transformers writes weights that only their owner may read
            shutil.copyfile(run / "ema" / name, folder / part / name)
    _keep_class(folder / "tokenizer" / "tokenizer_config.json")
    shutil.copyfile(run / "training_log.jsonl", folder / "training_log.jsonl")
    (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def _keep_class(path: Path) -> None:
    """Names a tokenizer class that transformers of version 4 know as well."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Copies, as the command says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", required=True, choices=["molecules", "text"])
    parser.add_argument("--temperature", type=float, default=1.0, help="recommended")
    parser.add_argument("--description", required=True)
    options = parser.parse_args()
    given = vars(options)
    info = {name: given[name] for name in ("description", "kind", "temperature")}
    ship(options.run, options.folder, info)


if __name__ == "__main__":
    main()
