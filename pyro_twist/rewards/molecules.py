# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Rewards on molecules, given as a list of SMILES strings; they need the extra ``molecules``.

A string that is no molecule has the value minus infinity, or is an error, by ``on_invalid``.
:func:`molecule_reward` makes them by name, for the command line; profiles of several properties
are dicts of rewards in :class:`~pyro_twist.rewards.RewardTilted`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

from pyro_twist.rewards.numbers import finite_number
from pyro_twist.rewards.registry import RewardRegistry
from pyro_twist.rewards.reward import Policy, Reward, per_sample

__all__ = [
    "logp",
    "molecule_reward",
    "molecule_rewards",
    "parse_smiles",
    "qed",
    "similarity",
    "substructure",
    "synthetic_accessibility",
]

_MISSING = "rewards on molecules need RDKit: pip install 'pyro-twist[molecules]'"


def qed(*, on_invalid: Policy = "-inf") -> Reward:
    """
    The quantitative estimate of drug-likeness of a molecule, from 0 to 1 [1].

    :param str on_invalid: What a string that is no molecule does: count as ``"-inf"``, or
        ``"raise"`` a :class:`~pyro_twist.rewards.RewardError`.
    :returns: The reward.
    :raises ImportError: If RDKit is not installed.

    **References**

    [1] `Quantifying the chemical beauty of drugs`
        G. Richard Bickerton, Gaia V. Paolini, Jérémy Besnard, Sorel Muresan, Andrew L. Hopkins
        (2012), Nature Chemistry 4, equation 1, https://doi.org/10.1038/nchem.1243

    Example::

        >>> aspirin, octane = qed()(["CC(=O)Oc1ccccc1C(=O)O", "CCCCCCCC"])
        >>> bool(aspirin > octane)
        True
    """
    _rdkit()
    from rdkit.Chem import QED

    return _reward("QED", QED.qed, on_invalid)


def synthetic_accessibility(*, on_invalid: Policy = "-inf") -> Reward:
    """
    Minus the synthetic accessibility score, from -10 (hard to make) to -1 (easy) [1].

    :param str on_invalid: As for :func:`qed`.
    :returns: The reward.
    :raises ImportError: If RDKit is not installed.

    **References**

    [1] `Estimation of synthetic accessibility score of drug-like molecules`
        Peter Ertl, Ansgar Schuffenhauer (2009), Journal of Cheminformatics 1:8,
        https://doi.org/10.1186/1758-2946-1-8
    """
    _rdkit()
    from rdkit.Contrib.SA_Score import sascorer

    return _reward("minus SA", lambda molecule: -sascorer.calculateScore(molecule), on_invalid)


def logp(target: float | None = None, *, on_invalid: Policy = "-inf") -> Reward:
    """
    The octanol-water partition coefficient after Crippen, as a logarithm, or closeness to one [1].

    :param float target: The value wanted: the reward is then minus the absolute difference, at
        most 0. By default the reward is the coefficient itself.
    :param str on_invalid: As for :func:`qed`.
    :returns: The reward.
    :raises ValueError: If ``target`` is not finite.
    :raises ImportError: If RDKit is not installed.

    **References**

    [1] `Prediction of physicochemical parameters by atomic contributions`
        Scott A. Wildman, Gordon M. Crippen (1999), Journal of Chemical Information and Computer
        Sciences 39, https://doi.org/10.1021/ci990307l
    """
    _rdkit()
    from rdkit.Chem.rdMolDescriptors import CalcCrippenDescriptors

    def coefficient(molecule: Any) -> float:
        return float(CalcCrippenDescriptors(molecule)[0])

    if target is None:
        return _reward("logP", coefficient, on_invalid)
    wanted = finite_number("target", target, "a logP; that of most drugs is between 0 and 5")
    return _reward(
        f"logP near {wanted:g}", lambda molecule: -abs(coefficient(molecule) - wanted), on_invalid
    )


def similarity(
    smiles: str, *, radius: int = 2, num_bits: int = 2048, on_invalid: Policy = "-inf"
) -> Reward:
    """
    The Tanimoto similarity of Morgan fingerprints to those of a given molecule, from 0 to 1 [1].

    :param str smiles: The molecule to be similar to.
    :param int radius: The fingerprint's radius, in bonds; 2 makes it ECFP4.
    :param int num_bits: The fingerprint's size.
    :param str on_invalid: As for :func:`qed`.
    :returns: The reward; 1 for the molecule itself, and for the few that share its fingerprint.
    :raises ValueError: If ``smiles`` is no molecule, ``radius`` negative or ``num_bits`` not
        positive.
    :raises ImportError: If RDKit is not installed.

    **References**

    [1] `Extended-connectivity fingerprints`
        David Rogers, Mathew Hahn (2010), Journal of Chemical Information and Modeling 50,
        https://doi.org/10.1021/ci100050t
    """
    _rdkit()
    from rdkit.Chem import rdFingerprintGenerator
    from rdkit.DataStructs import TanimotoSimilarity

    if radius < 0 or num_bits < 1:
        raise ValueError(f"radius={radius}, num_bits={num_bits}; give 0 or more, and 1 or more")
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=num_bits)
    target = generator.GetFingerprint(_required(smiles))

    def tanimoto(molecule: Any) -> float:
        return float(TanimotoSimilarity(target, generator.GetFingerprint(molecule)))

    return _reward(f"similarity to {smiles}", tanimoto, on_invalid)


def substructure(smarts: str, *, count: bool = False, on_invalid: Policy = "-inf") -> Reward:
    """
    Whether a molecule contains a substructure: 0 if it does, minus infinity if not.

    Most samplers do better with ``count=True``, which prefers without forbidding.

    :param str smarts: The substructure, as SMARTS, for example ``"c1ccncc1"``.
    :param bool count: Whether to return how often it occurs instead, each set of atoms once.
    :param str on_invalid: As for :func:`qed`.
    :returns: The reward.
    :raises ValueError: If ``smarts`` is no SMARTS.
    :raises ImportError: If RDKit is not installed.

    Example::

        >>> substructure("C(=O)[OH]", count=True)(["CC(=O)O", "CCO"]).tolist()
        [1.0, 0.0]
        >>> substructure("C(=O)[OH]")(["CC(=O)O", "CCO"]).tolist()
        [0.0, -inf]
    """
    chem = _rdkit()
    with _quiet():
        pattern = chem.MolFromSmarts(smarts)
    if pattern is None or not pattern.GetNumAtoms():
        raise ValueError(f"smarts={smarts!r} is no SMARTS; a SMILES string of a part is one")

    def occurrences(molecule: Any) -> float:
        return float(len(molecule.GetSubstructMatches(pattern)))

    def constraint(molecule: Any) -> float:
        return 0.0 if molecule.HasSubstructMatch(pattern) else -math.inf

    name = f"{'number of' if count else 'has'} {smarts}"
    return _reward(name, occurrences if count else constraint, on_invalid)


_REGISTRY = RewardRegistry(
    "molecule",
    {
        "accessible": (synthetic_accessibility, "minus the synthetic accessibility, -10 to -1"),
        "logp": (logp, "logP, or minus the distance to target=..."),
        "qed": (qed, "drug-likeness QED, 0 to 1"),
        "similar": (similarity, "Tanimoto similarity to smiles=..., 0 to 1"),
        "substructure": (substructure, "0 if smarts=... occurs, else -inf; count=True counts"),
    },
)


def molecule_rewards() -> dict[str, str]:
    """
    Lists the named rewards on molecules.

    :returns: For every name one line that says what is measured, in which unit.
    """
    return _REGISTRY.descriptions()


def molecule_reward(name: str, **options: Any) -> Reward:
    """
    Makes a reward on molecules by name.

    :param str name: One of :func:`molecule_rewards`.
    :param options: The options of the function that makes it, such as ``target=2.5`` for
        ``"logp"``.
    :returns: The reward.
    :raises ValueError: If there is no such name or option.
    :raises ImportError: If RDKit is not installed.

    Example::

        >>> molecule_reward("substructure", smarts="O", count=True)(["OCCO"]).tolist()
        [2.0]
    """
    return _REGISTRY.make(name, **options)


def parse_smiles(smiles: str) -> Any:
    """
    Reads a SMILES string, without RDKit's messages.

    :param str smiles: The string.
    :returns: The RDKit molecule, or ``None`` if there is none or it has no atoms.
    :raises ImportError: If RDKit is not installed.
    """
    chem = _rdkit()
    with _quiet():
        molecule = chem.MolFromSmiles(smiles)
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def _reward(name: str, value: Callable[[Any], float], on_invalid: Policy) -> Reward:
    if on_invalid not in get_args(Policy):
        raise ValueError(f"on_invalid={on_invalid!r}; choose one of {get_args(Policy)}")

    def score(smiles: str) -> float:
        molecule = parse_smiles(smiles) if on_invalid == "-inf" else _required(smiles)
        return -math.inf if molecule is None else value(molecule)

    return Reward(per_sample(score), name=name, input="list", differentiable=False)


def _required(smiles: str) -> Any:
    molecule = parse_smiles(smiles)
    if molecule is None:
        raise ValueError(f"{smiles!r} is no molecule; give a SMILES string such as 'CCO'")
    return molecule


def _rdkit() -> Any:
    try:
        from rdkit import Chem
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return Chem


def _quiet() -> Any:
    from rdkit import rdBase

    return rdBase.BlockLogs()
