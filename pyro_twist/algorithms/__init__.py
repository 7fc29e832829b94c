# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Every algorithm over one model: a registry of them, and a comparison at equal budget."""

from pyro_twist.algorithms import catalogue as _catalogue  # noqa: F401  (fills the registry)
from pyro_twist.algorithms.compare import Comparison, Estimate, compare
from pyro_twist.algorithms.registry import (
    Algorithm,
    Runnable,
    Setting,
    algorithms,
    default_algorithms,
    find_algorithm,
    register_algorithm,
)
from pyro_twist.algorithms.scored import Scored

__all__ = [
    "Algorithm",
    "Comparison",
    "Estimate",
    "Runnable",
    "Scored",
    "Setting",
    "algorithms",
    "compare",
    "default_algorithms",
    "find_algorithm",
    "register_algorithm",
]
