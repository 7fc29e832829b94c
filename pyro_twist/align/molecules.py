# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The models of molecules: properties, a judge by structural alerts, and drawings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_twist.align.options import AlignOptions, OptionError
from pyro_twist.align.sequences import Strings, ZooSequences
from pyro_twist.align.shown import Shown, ShownRow, ShownSection
from pyro_twist.rewards.molecules import parse_smiles
from pyro_twist.rewards.registry import RewardRegistry

__all__ = ["ZooMolecules"]

_PROPERTIES = ("QED", "SA", "logP")


class ZooMolecules(ZooSequences):
    """
    A model of molecules.

    :param str name: One of :func:`pyro_twist.zoo.models`.
    """

    default_reward = "qed"
    packages: tuple[str, ...] = ("transformers", "rdkit", "selfies")
    noun, column = "molecule", "smiles"

    def registry(self) -> RewardRegistry:
        """The named rewards on molecules."""
        from pyro_twist.rewards.molecules import _REGISTRY

        return _REGISTRY

    def load(self, labels: Sequence[int], options: AlignOptions) -> Any:
        """
        Loads the model.

        :raises OptionError: If an option is not for molecules, or a package is missing.
        """
        if options.prompt is not None:
            raise OptionError(f"--prompt is for texts and antibodies, not for {self.name!r}")
        try:
            parse_smiles("C")
        except ImportError as error:
            raise OptionError(f"{self.name!r} cannot be decoded: {error}") from None
        return super().load(labels, options)

    def figures(self, samples: Sequence[str]) -> dict[str, Tensor]:
        """
        Whether molecules have no structural alert, and properties.

        :param samples: SMILES.
        """
        table = torch.tensor([_figures(smiles) for smiles in samples], dtype=torch.float64)
        return dict(zip(("no alert", *_PROPERTIES), table.T, strict=True))

    def judge_explained(self, with_class: bool) -> str:
        """What the judge's score is."""
        return (
            "Share of molecules without a group that medicinal chemists avoid (the 105 alerts of "
            "Brenk et al., 2008); 1 is best. No reward uses them, but QED counts alerts of its own "
            "list, which agrees with them on most molecules. Where it is lower than for the base "
            "model by several times the ± and the reward is higher, look for molecules that "
            "exploit the reward; smaller differences of a single run may be chance."
        )

    def distances(self, samples: Strings) -> Tensor:
        """
        Tanimoto distances of Morgan fingerprints.

        :param samples: SMILES.
        """
        from rdkit.DataStructs import BulkTanimotoSimilarity

        prints = [_fingerprint(str(smiles)) for smiles in samples]
        rows = [BulkTanimotoSimilarity(one, prints) for one in prints]
        return 1.0 - torch.tensor(rows, dtype=torch.float64).reshape(len(prints), len(prints))

    def distance_explained(self) -> str:
        """What the distance is."""
        return "one minus the Tanimoto similarity of Morgan fingerprints of radius 2"

    def show(self, sections: Sequence[ShownSection], caption: str) -> Shown:
        """
        Drawings of the molecules with their properties.

        :param sections: What to show.
        :param str caption: What to say of them.
        """
        from pyro_twist.viz import Gallery, PictureRow, PictureSection, molecule_picture
        from pyro_twist.viz import picture_grid as grid
        from pyro_twist.viz.page import png_bytes

        rows = [self._row(row, section) for section in sections for row in section.rows]
        pictures = [
            PictureSection(
                [
                    PictureRow(
                        row.label,
                        [molecule_picture(str(one), 160, 160) for one in row.samples],
                        row.captions,
                        row.notes,
                        row.faded,
                    )
                    for row in section.rows
                ],
                section.heading,
            )
            for section in sections
        ]
        caption = (
            f"Below each molecule: {caption} Then QED (drug-likeness, 0 to 1), SA (how hard it is "
            "to make, 1 to 10) and logP (how much it prefers oil to water)."
        )
        return Shown([Gallery(rows, caption)], {"grid.png": png_bytes(grid(pictures, cell=160))})

    def _row(self, row: ShownRow, section: ShownSection) -> Any:
        from pyro_twist.viz import GalleryCard, GalleryRow, molecule_svg

        cards = []
        for place, smiles in enumerate(map(str, row.samples)):
            qed, sa, logp = _figures(smiles)[1:]
            lines = [row.captions[place], f"QED {qed:.2f}  SA {sa:.1f}  logP {logp:.1f}"]
            faded = place >= len(row.samples) - row.faded
            title = smiles or "no molecule"
            cards.append(GalleryCard(molecule_svg(smiles), title, lines, faded))
        heading = section.heading if row is section.rows[0] else ""
        return GalleryRow(row.label, cards, row.notes, heading)


@functools.lru_cache(maxsize=2**14)
def _figures(smiles: str) -> tuple[float, float, float, float]:
    """Whether there is no alert, QED, SA and logP; NaN but for the first where no molecule is."""
    from rdkit.Chem import QED, rdMolDescriptors
    from rdkit.Contrib.SA_Score import sascorer

    molecule = parse_smiles(smiles)
    if molecule is None:
        return (0.0, float("nan"), float("nan"), float("nan"))
    fine = float(not _alerts().HasMatch(molecule))
    logp = rdMolDescriptors.CalcCrippenDescriptors(molecule)[0]
    return (fine, QED.qed(molecule), sascorer.calculateScore(molecule), logp)


@functools.cache
def _alerts() -> Any:
    from rdkit.Chem.FilterCatalog import FilterCatalog, FilterCatalogParams

    wanted = FilterCatalogParams()
    wanted.AddCatalog(FilterCatalogParams.FilterCatalogs.BRENK)
    return FilterCatalog(wanted)


def _fingerprint(smiles: str) -> Any:
    from rdkit.Chem import Mol, rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    return generator.GetFingerprint(parse_smiles(smiles) or Mol())
