# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Guides that look ahead, and the tilting of distributions they are made of."""

from pyro_twist.twists.backward import BackwardTwist
from pyro_twist.twists.children import ChildrenTwist
from pyro_twist.twists.families import NeuralTwist, QuadraticTwist, ShiftTwist, low_frequencies
from pyro_twist.twists.gradienttokens import GradientTokenTwist
from pyro_twist.twists.guided import CFGGuidance, GradientTwist, GuidedModel, GuidedTwist, guided
from pyro_twist.twists.hidden import HiddenTilt
from pyro_twist.twists.ladder import CalibratedLookahead, DiscountedLookahead
from pyro_twist.twists.learned import (
    FittedTwist,
    LearnedTwist,
    LinearTwist,
    WeightedDigest,
    fit_likelihood,
    learned_parts,
)
from pyro_twist.twists.lookahead import LookaheadTwist
from pyro_twist.twists.paths import Pass, Paths, PathStep
from pyro_twist.twists.regression import KernelRidge
from pyro_twist.twists.sequences import TokenSurrogate
from pyro_twist.twists.statistics import Quadratic, Statistics
from pyro_twist.twists.surrogate import SurrogateTwist
from pyro_twist.twists.tempering import AdaptiveTempering, TemperedLookahead
from pyro_twist.twists.tilting import (
    log_normalizer,
    log_ratio,
    register_log_ratio,
    register_tilt,
    tilt,
)
from pyro_twist.twists.tokens import TokenTilt
from pyro_twist.twists.twist import SumTwist, Twist, Twisted

__all__ = [
    "AdaptiveTempering",
    "BackwardTwist",
    "CFGGuidance",
    "CalibratedLookahead",
    "ChildrenTwist",
    "DiscountedLookahead",
    "FittedTwist",
    "GradientTokenTwist",
    "GradientTwist",
    "GuidedModel",
    "GuidedTwist",
    "HiddenTilt",
    "KernelRidge",
    "LearnedTwist",
    "LinearTwist",
    "LookaheadTwist",
    "NeuralTwist",
    "Pass",
    "PathStep",
    "Paths",
    "Quadratic",
    "QuadraticTwist",
    "ShiftTwist",
    "Statistics",
    "SumTwist",
    "SurrogateTwist",
    "TemperedLookahead",
    "TokenSurrogate",
    "TokenTilt",
    "Twist",
    "Twisted",
    "WeightedDigest",
    "fit_likelihood",
    "guided",
    "learned_parts",
    "log_normalizer",
    "log_ratio",
    "low_frequencies",
    "register_log_ratio",
    "register_tilt",
    "tilt",
]
