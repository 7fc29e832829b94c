# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Drawings of molecules; they need RDKit, the extra ``molecules``."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np

__all__ = ["molecule_picture", "molecule_svg"]


def molecule_svg(smiles: str, width: int = 200, height: int = 150) -> str:
    """
    Draws a molecule as an ``<svg>`` element for a page, which refers to nothing.

    :param str smiles: The molecule.
    :param int width: In pixels, as the height; the element scales to the room it gets.
    :param int height: The height.
    :returns: The element; empty if the string is no molecule.
    :raises ImportError: If RDKit is not installed.
    """
    from rdkit.Chem.Draw import rdMolDraw2D

    drawn = _drawn(rdMolDraw2D.MolDraw2DSVG(width, height), smiles)
    if not drawn:
        return ""
    shapes = drawn[drawn.index("<!-- END OF HEADER -->") :]
    # inside a page an element needs no namespaces, and classes would meet those of others
    shapes = re.sub(r"<!--.*?-->| class='[^']*'|<rect [^>]*>\s*</rect>", "", shapes)
    return f'<svg viewBox="0 0 {width} {height}">{"".join(shapes.splitlines())}'


def molecule_picture(smiles: str, width: int = 200, height: int = 150) -> np.ndarray[Any, Any]:
    """
    Draws a molecule as pixels.

    :param str smiles: The molecule.
    :param int width: In pixels, as the height.
    :param int height: The height.
    :returns: uint8, of shape ``(height, width, 3)``; white if the string is no molecule.
    :raises ImportError: If RDKit is not installed.
    """
    from PIL import Image
    from rdkit.Chem.Draw import rdMolDraw2D

    drawn = _drawn(rdMolDraw2D.MolDraw2DCairo(width, height), smiles)
    if not drawn:
        return np.full((height, width, 3), 255, dtype=np.uint8)
    return np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB"))


def _drawn(canvas: Any, smiles: str) -> Any:
    """What RDKit's canvas holds of a molecule; nothing if it is none."""
    from pyro_twist.rewards.molecules import parse_smiles

    molecule = parse_smiles(smiles)
    if molecule is None:
        return None
    canvas.drawOptions().padding = 0.06
    canvas.DrawMolecule(molecule)
    canvas.FinishDrawing()
    return canvas.GetDrawingText()
