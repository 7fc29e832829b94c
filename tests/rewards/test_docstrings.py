# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The examples in the docstrings."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest
import torch

MODULES = ["charlm", "classifiers", "images", "molecules", "proteins", "reward", "samples"]
MODULES += ["preference.combine", "text", "textmodels", "tilted"]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: str) -> None:
    found = import_module(f"pyro_twist.rewards.{module}")
    result = doctest.testmod(found, extraglobs={"torch": torch})
    assert result.failed == 0
