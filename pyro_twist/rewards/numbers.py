# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Numbers that are options of rewards."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["finite_number"]


def finite_number(name: str, value: Any, hint: str) -> float:
    """
    Checks an option.

    :param str name: Its name.
    :param value: A number, or a string that is one.
    :param str hint: What to try.
    :returns: The number.
    :raises ValueError: If it is none, or not finite.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r}; give a finite number, {hint}")
    return number
