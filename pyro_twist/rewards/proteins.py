# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Rewards on proteins, given as a list of sequences in the one-letter code.

Those of physics need Biopython, the extra ``antibodies``; :func:`human_likeness` needs the weights
of Sapiens. A sequence with a letter that is no amino acid has the value minus infinity, or is an
error, by ``on_invalid``. :func:`protein_reward` makes them by name, for the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_twist.rewards.numbers import finite_number
from pyro_twist.rewards.registry import RewardRegistry
from pyro_twist.rewards.reward import Policy, Reward, per_sample

__all__ = [
    "AMINO_ACIDS",
    "aromaticity",
    "human_likeness",
    "hydropathy",
    "isoelectric_point",
    "net_charge",
    "protein_reward",
    "protein_rewards",
    "stability",
]

#: The twenty in the one-letter code.
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"

# The residues of one batch through the network.
_RESIDUES_AT_ONCE = 50_000


def isoelectric_point(target: float | None = None, *, on_invalid: Policy = "-inf") -> Reward:
    """
    The pH at which the protein has no net charge, or closeness to one.

    :param float target: The value wanted: the reward is then minus the absolute difference, at
        most 0. By default the reward is the pH itself.
    :param str on_invalid: What a string that is no sequence does: count as ``"-inf"``, or
        ``"raise"`` a :class:`~pyro_twist.rewards.RewardError`.
    :returns: The reward.
    :raises ImportError: If Biopython is not installed.

    Example::

        >>> acid, base = isoelectric_point()(["DDDD", "KKKK"])
        >>> bool(acid < 7 < base)
        True
    """
    return _near("isoelectric point", lambda one: one.isoelectric_point(), target, on_invalid)


def hydropathy(*, on_invalid: Policy = "-inf") -> Reward:
    """
    The grand average of hydropathy (GRAVY): above 0 is hydrophobic, -4.5 to 4.5 [1].

    :param str on_invalid: As for :func:`isoelectric_point`.
    :returns: The reward.
    :raises ImportError: If Biopython is not installed.

    **References**

    [1] `A simple method for displaying the hydropathic character of a protein`
        Jack Kyte, Russell F. Doolittle (1982), https://doi.org/10.1016/0022-2836(82)90515-0

    Example::

        >>> hydropathy()(["I", "R"]).tolist()
        [4.5, -4.5]
    """
    return _reward("hydropathy", lambda one: one.gravy(), on_invalid)


def stability(*, on_invalid: Policy = "-inf") -> Reward:
    """
    Minus the instability index; proteins above -40 are predicted to be stable [1].

    :param str on_invalid: As for :func:`isoelectric_point`.
    :returns: The reward.
    :raises ImportError: If Biopython is not installed.

    **References**

    [1] `Correlation between stability of a protein and its dipeptide composition`
        Kunchur Guruprasad, B.V. Bhasker Reddy, Madhusudan W. Pandit (1990),
        https://doi.org/10.1093/protein/4.2.155
    """
    return _reward("minus instability", lambda one: -one.instability_index(), on_invalid)


def aromaticity(*, on_invalid: Policy = "-inf") -> Reward:
    """
    The share of residues that are phenylalanine, tryptophan or tyrosine, from 0 to 1.

    :param str on_invalid: As for :func:`isoelectric_point`.
    :returns: The reward.
    :raises ImportError: If Biopython is not installed.

    Example::

        >>> aromaticity()(["FWYA"]).tolist()
        [0.75]
    """
    return _reward("aromaticity", lambda one: one.aromaticity(), on_invalid)


def net_charge(
    ph: float = 7.4, target: float | None = None, *, on_invalid: Policy = "-inf"
) -> Reward:
    """
    The net charge in elementary charges, or closeness to one.

    :param float ph: The pH.
    :param float target: As for :func:`isoelectric_point`.
    :param str on_invalid: As for :func:`isoelectric_point`.
    :returns: The reward.
    :raises ImportError: If Biopython is not installed.

    Example::

        >>> charges = net_charge()(["KKKK", "DDDD"])
        >>> charges.round().tolist()
        [4.0, -4.0]
    """
    acidity = finite_number("ph", ph, "such as 7.4")
    return _near("net charge", lambda one: one.charge_at_pH(acidity), target, on_invalid)


def human_likeness(
    chain: Literal["H", "L"] = "H", *, masked: bool = False, on_invalid: Policy = "-inf"
) -> Reward:
    """
    The mean log-probability per residue under Sapiens, a model of human antibodies, in nats [1].

    By default every residue is predicted from the whole sequence, itself included, in one pass of
    the network: Sapiens' own score, for which its last training was made, in which residues were
    left as they are or replaced by others, but not masked. With ``masked=True`` it is the
    pseudo-log-likelihood: every residue is predicted from the others, one pass for each.

    :param str chain: ``"H"`` for the heavy chain or ``"L"`` for the light one.
    :param bool masked: Whether to mask the residue that is predicted.
    :param str on_invalid: As for :func:`isoelectric_point`; longer sequences than Sapiens can read
        are invalid too.
    :returns: The reward, at most 0.
    :raises ImportError: If the weights of Sapiens are not installed.
    :raises ValueError: If ``chain`` is another.

    **References**

    [1] `BioPhi: A platform for antibody design, humanization, and humanness evaluation`
        David Prihoda and others (2022), https://doi.org/10.1080/19420862.2021.2020203
    """
    from pyro_twist.zoo.antibodies import load_model

    _check_policy(on_invalid)
    model = load_model("sapiens", chain)

    def score(sequences: list[str]) -> Tensor:
        valid = [_is_sequence(one) and len(one) <= model.max_length for one in sequences]
        if not all(valid) and on_invalid == "raise":
            wrong = sequences[valid.index(False)]
            raise ValueError(
                f"{wrong!r} is no sequence of at most {model.max_length} amino acids in the "
                "one-letter code"
            )
        values = torch.full((len(sequences),), -math.inf, dtype=torch.float64)
        for rows in _by_length(sequences, valid):
            log_probs = _log_probs(model, [sequences[row] for row in rows], masked)
            values[rows] = log_probs.mean(-1)
        return values

    name = "human-likeness" + (", masked" if masked else "")
    return Reward(score, name=name, input="list", differentiable=False)


def _by_length(sequences: Sequence[str], valid: Sequence[bool]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if valid[row]:
            groups.setdefault(len(sequence), []).append(row)
    return list(groups.values())


@torch.no_grad()
def _log_probs(model: Any, sequences: Sequence[str], masked: bool) -> Tensor:
    """The log-probability of each residue, float64, of shape ``(B, length)``."""
    tokens = model.encode(sequences)
    size, length = len(tokens), tokens.shape[1] - 2
    targets, places = tokens[:, 1:-1].reshape(-1), torch.arange(1, length + 1).repeat(size)
    at_once = max(1, _RESIDUES_AT_ONCE // length)
    # one pass for each residue, or one for all of a sequence
    parts = torch.arange(len(targets)).split(at_once if masked else at_once * length)
    found = []
    for part in parts:
        rows = tokens[part // length] if masked else tokens[part[::length] // length]
        if masked:
            rows = rows.scatter(1, places[part, None], model.mask_token_id)
        row = torch.arange(len(part)) // (1 if masked else length)
        logits = model.network(input_ids=rows).logits[row, places[part]].double()
        logits[:, list(model.forbidden_token_ids)] = -math.inf
        found.append(logits.log_softmax(-1).gather(1, targets[part, None])[:, 0])
    return torch.cat(found).reshape(size, length)


_REGISTRY = RewardRegistry(
    "protein",
    {
        "aromatic": (aromaticity, "share of aromatic residues, 0 to 1"),
        "charge": (net_charge, "net charge at ph=7.4, or minus the distance to target=..."),
        "human": (human_likeness, "mean log-probability per residue under Sapiens, nats"),
        "hydropathy": (hydropathy, "grand average of hydropathy (GRAVY), -4.5 to 4.5"),
        "pi": (isoelectric_point, "isoelectric point, or minus the distance to target=..."),
        "stable": (stability, "minus the instability index; above -40 is stable"),
    },
)


def protein_rewards() -> dict[str, str]:
    """
    Lists the named rewards on proteins.

    :returns: For every name one line that says what is measured, in which unit.
    """
    return _REGISTRY.descriptions()


def protein_reward(name: str, **options: Any) -> Reward:
    """
    Makes a reward on proteins by name.

    :param str name: One of :func:`protein_rewards`.
    :param options: The options of the function that makes it, such as ``target=9.0`` for ``"pi"``.
    :returns: The reward.
    :raises ValueError: If there is no such name or option.
    :raises ImportError: If what it needs is not installed.

    Example::

        >>> protein_reward("aromatic")(["FWYA"]).tolist()
        [0.75]
    """
    return _REGISTRY.make(name, **options)


def _near(
    name: str, value: Callable[[Any], float], target: float | None, on_invalid: Policy
) -> Reward:
    if target is None:
        return _reward(name, value, on_invalid)
    wanted = finite_number("target", target, f"the {name} wanted")
    return _reward(f"{name} near {wanted:g}", lambda one: -abs(value(one) - wanted), on_invalid)


def _reward(name: str, value: Callable[[Any], float], on_invalid: Policy) -> Reward:
    _check_policy(on_invalid)
    analysis = _analysis()

    def score(sequence: str) -> float:
        if _is_sequence(sequence):
            return float(value(analysis(sequence)))
        if on_invalid == "raise":
            raise ValueError(f"{sequence!r} is no sequence of amino acids in the one-letter code")
        return -math.inf

    return Reward(per_sample(score), name=name, input="list", differentiable=False)


def _is_sequence(text: str) -> bool:
    return bool(text) and set(text) <= set(AMINO_ACIDS)


def _check_policy(on_invalid: Policy) -> None:
    if on_invalid not in get_args(Policy):
        raise ValueError(f"on_invalid={on_invalid!r}; choose one of {get_args(Policy)}")


def _analysis() -> Any:
    try:
        from Bio.SeqUtils.ProtParam import ProteinAnalysis
    except ImportError as error:
        raise ImportError(
            "rewards on proteins need Biopython: pip install 'pyro-twist[antibodies]'"
        ) from error
    return ProteinAnalysis
