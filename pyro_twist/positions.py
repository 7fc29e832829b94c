# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""How long the sequences of a transformers model may be."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["num_positions"]


def num_positions(model: Any) -> int | None:
    """
    The most tokens that a model has positions for.

    RoBERTa and its relatives count positions from behind the padding token, so that as many of the
    ``max_position_embeddings`` in their config are not for tokens.

    :param model: A model of transformers.
    :returns: The number; ``None`` if the model does not say.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    return positions - max((_offset(*named) for named in model.named_modules()), default=0)


def _offset(name: str, module: torch.nn.Module) -> int:
    """How many of a table of positions are in front of the first token's."""
    if not name.endswith("position_embeddings") or not isinstance(module, torch.nn.Embedding):
        return 0
    return 0 if module.padding_idx is None else module.padding_idx + 1
