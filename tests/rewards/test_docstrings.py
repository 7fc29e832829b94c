# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The examples in the docstrings."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest
import torch


@pytest.mark.parametrize("module", ["classifiers", "images", "reward", "samples", "tilted"])
def test_examples(module: str) -> None:
    found = import_module(f"pyro_twist.rewards.{module}")
    result = doctest.testmod(found, extraglobs={"torch": torch})
    assert result.failed == 0
