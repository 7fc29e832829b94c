# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Inference classes with the interface of Pyro's ``SMCFilter``, and what they return."""

from pyro_twist.infer.baselines import BestOfN, ImportanceSampling
from pyro_twist.infer.controlled import ControlledSMC
from pyro_twist.infer.evidence import EvidenceGradient
from pyro_twist.infer.gibbs import ParticleGibbs
from pyro_twist.infer.initial import PsiSampler
from pyro_twist.infer.moves import move_latents
from pyro_twist.infer.nested import NestedSMC
from pyro_twist.infer.posterior import ParticlePosterior
from pyro_twist.infer.resampling import RESAMPLING, get_resampling, register_resampling
from pyro_twist.infer.result import Diagnostics, SMCResult
from pyro_twist.infer.search import SVDD, BeamSearch, BlockSearch, Search
from pyro_twist.infer.treesearch import Frontier, SearchStep, TreeSearch
from pyro_twist.infer.trustregion import Tempering, dual_temper, temper
from pyro_twist.infer.trustregiontwist import Iteration, TrustRegionTwist, default_twist, pool
from pyro_twist.infer.twistedsmc import SMCFailed, TwistedSMC

__all__ = [
    "BeamSearch",
    "BestOfN",
    "BlockSearch",
    "ControlledSMC",
    "Diagnostics",
    "EvidenceGradient",
    "Frontier",
    "ImportanceSampling",
    "Iteration",
    "NestedSMC",
    "ParticleGibbs",
    "ParticlePosterior",
    "PsiSampler",
    "RESAMPLING",
    "SMCFailed",
    "SMCResult",
    "SVDD",
    "Search",
    "SearchStep",
    "Tempering",
    "TreeSearch",
    "TrustRegionTwist",
    "TwistedSMC",
    "default_twist",
    "dual_temper",
    "get_resampling",
    "move_latents",
    "pool",
    "register_resampling",
    "temper",
]
