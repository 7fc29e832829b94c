# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The methods that the job can compare: the registered algorithms, by another name."""

from __future__ import annotations

from collections.abc import Sequence

from pyro_twist.algorithms import Algorithm as Method
from pyro_twist.algorithms import Setting, algorithms, default_algorithms
from pyro_twist.algorithms import register_algorithm as register_method
from pyro_twist.align.options import unknown

__all__ = ["Method", "Setting", "default_methods", "find_methods", "methods", "register_method"]

methods = algorithms
default_methods = default_algorithms


def find_methods(names: Sequence[str]) -> list[Method]:
    """
    Looks methods up.

    :param names: Their names; none for the default ones.
    :returns: Each once, in the order of registration.
    :raises OptionError: If there is none of that name.
    """
    known = methods()
    for name in names:
        if name not in known:
            raise unknown("method", name, known)
    wanted = set(names or default_methods())
    return [method for method in known.values() if method.name in wanted]
