# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Inference classes with the interface of Pyro's ``SMCFilter``, and what they return."""

from pyro_twist.infer.baselines import BestOfN, ImportanceSampling
from pyro_twist.infer.resampling import RESAMPLING, get_resampling, register_resampling
from pyro_twist.infer.result import Diagnostics, SMCResult
from pyro_twist.infer.twistedsmc import SMCFailed, TwistedSMC

__all__ = [
    "RESAMPLING",
    "BestOfN",
    "Diagnostics",
    "ImportanceSampling",
    "SMCFailed",
    "SMCResult",
    "TwistedSMC",
    "get_resampling",
    "register_resampling",
]
