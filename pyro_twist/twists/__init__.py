# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Guides that look ahead, and the tilting of distributions they are made of."""

from pyro_twist.twists.lookahead import LookaheadTwist
from pyro_twist.twists.tilting import log_normalizer, log_ratio, register_tilt, tilt
from pyro_twist.twists.twist import SumTwist, Twist, Twisted

__all__ = [
    "LookaheadTwist",
    "SumTwist",
    "Twist",
    "Twisted",
    "log_normalizer",
    "log_ratio",
    "register_tilt",
    "tilt",
]
