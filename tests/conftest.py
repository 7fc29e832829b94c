# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_pyro() -> Iterator[None]:
    """Every test starts from one seed, an empty parameter store and validation on."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled():
        yield
    assert torch.get_default_dtype() == torch.float32, "a test left the default dtype changed"
