# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Measures a model of molecules, finished or in training, against the test set of MOSES::

    pip install pyro-twist[molecules] && pip install --no-deps molsets==0.3.1 fcd-torch==1.0.7
    python -m pyro_twist.zoo.recipes.molecules_report work/ema --samples 1000 --out work/report

Writes ``report.json``, ``samples.smi`` and ``samples.png``. As many test molecules as there are
samples are measured in the same way: the Fréchet ChemNet distance of few molecules is biased
upwards, so it is to be compared with theirs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_twist.zoo.recipes.molecules import moses

PROPERTIES = ("qed", "sa", "logp", "heavy atoms")


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, number: int, seed: int = 0, temperature: float = 1.0
) -> Tensor:
    """
    Draws sequences by ancestral sampling, one uniformly chosen position after the other.

    :param model: The masked diffusion model, in float32.
    :param tokenizer: Its tokenizer; ``model_max_length`` is the length of a sequence.
    :param int number: How many.
    :param int seed: Seeds the draws.
    :param float temperature: Divides the logits; below 1, likely tokens become likelier.
    :returns: The ids, int64, of shape ``(number, length)``.
    """
    generator = torch.Generator().manual_seed(seed)
    length = tokenizer.model_max_length
    order = torch.rand(number, length, generator=generator).argsort(1)
    ids = torch.full((number, length), tokenizer.mask_token_id)
    for column in order.T:
        # float64: sampling with float32 uniforms truncates the tails
        logits = torch.cat([model(chunk).logits for chunk in ids.split(256)]).double()
        logits = logits[torch.arange(number), column] / temperature
        logits[:, tokenizer.mask_token_id] = -torch.inf
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids.scatter_(1, column[:, None], token)
    return ids


def to_smiles(tokenizer: Any, ids: Tensor) -> list[str]:
    """
    Decodes sequences, up to the end token.

    :param tokenizer: The tokenizer.
    :param torch.Tensor ids: Of shape ``(number, length)``.
    :returns: Canonical SMILES; ``""`` for what is no molecule.
    """
    import selfies

    special = torch.tensor(tokenizer.all_special_ids)
    lengths = torch.isin(ids, special).long().cumsum(1).eq(0).sum(1)
    texts = [tokenizer.decode(row[:n]) for row, n in zip(ids, lengths.tolist(), strict=True)]
    return [canonical(selfies.decoder(text)) for text in texts]


def canonical(smiles: str) -> str:
    """A molecule's canonical SMILES, or ``""`` if there is none."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return "" if molecule is None else str(Chem.MolToSmiles(molecule))


def properties(smiles: Sequence[str]) -> np.ndarray:
    """QED, synthetic accessibility, logP and heavy atoms, of shape ``(number, 4)``."""
    from rdkit import Chem
    from rdkit.Chem import QED
    from rdkit.Chem.rdMolDescriptors import CalcCrippenDescriptors
    from rdkit.Contrib.SA_Score import sascorer

    def row(molecule: Any) -> tuple[float, ...]:
        ease, size = sascorer.calculateScore(molecule), molecule.GetNumHeavyAtoms()
        return QED.qed(molecule), ease, CalcCrippenDescriptors(molecule)[0], size

    return np.array([row(Chem.MolFromSmiles(one)) for one in smiles])


def diversity(smiles: Sequence[str]) -> float:
    """One minus the mean Tanimoto similarity of two different molecules, Morgan fingerprints."""
    from rdkit import Chem, DataStructs
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    prints = [generator.GetFingerprint(Chem.MolFromSmiles(one)) for one in smiles[:1000]]
    rows = [DataStructs.BulkTanimotoSimilarity(one, prints) for one in prints]
    return 1.0 - float((np.sum(rows) - len(prints)) / (len(prints) * (len(prints) - 1)))


@torch.no_grad()
def activations(smiles: Sequence[str]) -> np.ndarray:
    """ChemNet's features of molecules, of shape ``(number, 512)``."""
    from fcd_torch import FCD
    from fcd_torch.utils import SmilesDataset

    model = FCD().model
    loader = torch.utils.data.DataLoader(SmilesDataset(list(smiles)), batch_size=128)
    return np.vstack([model(batch.transpose(1, 2).float()).numpy() for batch in loader])


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """The Fréchet distance of normal distributions fitted to two sets of features."""
    first, second = np.cov(one.T), np.cov(other.T)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0.0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0.0)).sum()
    shift = np.square(one.mean(0) - other.mean(0)).sum()
    return float(shift + np.trace(first) + np.trace(second) - 2.0 * cross)


def measure(smiles: Sequence[str], known: set[str], reference: np.ndarray) -> dict[str, Any]:
    """
    The figures of a set of molecules.

    :param smiles: Canonical SMILES, ``""`` for what is no molecule.
    :param set known: The SMILES of the training molecules.
    :param numpy.ndarray reference: ChemNet's features of test molecules.
    :returns: Validity; uniqueness of the valid; novelty of the unique; the Fréchet ChemNet distance
        to the reference; diversity; and the mean and standard deviation of each property.
    """
    valid = [one for one in smiles if one]
    unique = set(valid)
    values = properties(valid)
    return {
        "number": len(smiles),
        "valid": round(len(valid) / len(smiles), 4),
        "unique": round(len(unique) / len(valid), 4),
        "novel": round(len(unique - known) / len(unique), 4),
        "fcd": round(frechet(activations(valid), reference), 3),
        "diversity": round(diversity(valid), 4),
        "mean": dict(zip(PROPERTIES, values.mean(0).round(3).tolist(), strict=True)),
        "sd": dict(zip(PROPERTIES, values.std(0).round(3).tolist(), strict=True)),
    }


def draw(smiles: Sequence[str], path: Path, columns: int = 6) -> None:
    """Draws molecules in a grid, each with its QED."""
    from rdkit import Chem
    from rdkit.Chem import QED, Draw

    molecules = [Chem.MolFromSmiles(one) for one in smiles if one][: 4 * columns]
    legends = [f"QED {QED.qed(molecule):.2f}" for molecule in molecules]
    Draw.MolsToGridImage(molecules, columns, (220, 180), legends=legends).save(path)


def main() -> None:
    """Measures, and writes the figures."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the model and its tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--reference", type=int, default=5000, help="test molecules for the FCD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    model = AutoModelForMaskedLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = sample(model, tokenizer, options.samples, options.seed, options.temperature)
    smiles = to_smiles(tokenizer, ids)
    test = [canonical(one) for one in moses("test")[: options.reference + options.samples]]
    features, known = activations(test[options.samples :]), set(moses("train"))
    report = {
        "temperature": options.temperature,
        "samples": measure(smiles, known, features),
        "test": measure(test[: options.samples], known, features),
        "minutes": round((time.time() - start) / 60.0, 1),
    }
    print(json.dumps(report, indent=2))
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / "samples.smi").write_text("\n".join(smiles) + "\n")
    draw(smiles, options.out / "samples.png")


if __name__ == "__main__":
    main()
