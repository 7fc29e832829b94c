# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Inference-time alignment of diffusion models, written as Pyro programs.

A pretrained reverse process is the prior, a reward is a factor, a twist is a guide, and an
inference class with the interface of Pyro's ``SMCFilter`` draws weighted samples of the tilted law.

Public names are imported on first use: ``import pyro_twist`` loads neither PyTorch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_twist import (
        algorithms,
        align,
        diffusion,
        handlers,
        hierarchies,
        infer,
        inverse,
        latents,
        preferences,
        rewards,
        statespace,
        twists,
        viz,
        zoo,
    )
    from pyro_twist.algorithms.compare import compare
    from pyro_twist.diffusion import (
        GaussianDenoiser,
        GaussianDiffusion,
        GaussianMixtureDenoiser,
        MaskedDiffusion,
        MixtureOfModels,
        ProductCorrector,
        ProductOfModels,
        RewardCorrector,
    )
    from pyro_twist.hierarchies import SetOf, mixture
    from pyro_twist.infer import (
        SVDD,
        BeamSearch,
        BestOfN,
        BlockSearch,
        ControlledSMC,
        EvidenceGradient,
        ImportanceSampling,
        NestedSMC,
        ParticleGibbs,
        PsiSampler,
        SMCResult,
        TreeSearch,
        TrustRegionTwist,
        TwistedSMC,
    )
    from pyro_twist.latents import AutoLatents, JointTwist, WithLatents
    from pyro_twist.preferences import Preferences
    from pyro_twist.rewards import (
        Reward,
        RewardError,
        RewardTilted,
        Tilted,
        image_reward,
        log_potential,
        molecule_reward,
        protein_reward,
        text_reward,
    )
    from pyro_twist.statespace import Compartmental, TimeSeries
    from pyro_twist.twists import (
        GradientTwist,
        GuidedTwist,
        LookaheadTwist,
        Twist,
        guided,
    )

__version__ = "0.1.0"

__all__ = [
    "AutoLatents",
    "BeamSearch",
    "BestOfN",
    "BlockSearch",
    "Compartmental",
    "ControlledSMC",
    "EvidenceGradient",
    "GaussianDenoiser",
    "GaussianDiffusion",
    "GaussianMixtureDenoiser",
    "GradientTwist",
    "GuidedTwist",
    "ImportanceSampling",
    "JointTwist",
    "LookaheadTwist",
    "MaskedDiffusion",
    "MixtureOfModels",
    "NestedSMC",
    "ParticleGibbs",
    "Preferences",
    "ProductCorrector",
    "ProductOfModels",
    "PsiSampler",
    "Reward",
    "RewardCorrector",
    "RewardError",
    "RewardTilted",
    "SMCResult",
    "SVDD",
    "SetOf",
    "Tilted",
    "TimeSeries",
    "TreeSearch",
    "TrustRegionTwist",
    "Twist",
    "TwistedSMC",
    "WithLatents",
    "__version__",
    "algorithms",
    "align",
    "compare",
    "diffusion",
    "guided",
    "handlers",
    "hierarchies",
    "image_reward",
    "infer",
    "inverse",
    "latents",
    "log_potential",
    "mixture",
    "molecule_reward",
    "preferences",
    "protein_reward",
    "rewards",
    "statespace",
    "text_reward",
    "twists",
    "viz",
    "zoo",
]

_HOMES = {
    "algorithms": ("compare",),
    "align": (),
    "diffusion": (
        "GaussianDenoiser",
        "GaussianDiffusion",
        "GaussianMixtureDenoiser",
        "MaskedDiffusion",
        "MixtureOfModels",
        "ProductCorrector",
        "ProductOfModels",
        "RewardCorrector",
    ),
    "handlers": (),
    "hierarchies": ("SetOf", "mixture"),
    "infer": (
        "BeamSearch",
        "BestOfN",
        "BlockSearch",
        "ControlledSMC",
        "EvidenceGradient",
        "ImportanceSampling",
        "NestedSMC",
        "ParticleGibbs",
        "PsiSampler",
        "SMCResult",
        "SVDD",
        "TreeSearch",
        "TrustRegionTwist",
        "TwistedSMC",
    ),
    "inverse": (),
    "latents": ("AutoLatents", "JointTwist", "WithLatents"),
    "preferences": ("Preferences",),
    "rewards": (
        "Reward",
        "RewardError",
        "RewardTilted",
        "Tilted",
        "image_reward",
        "log_potential",
        "molecule_reward",
        "protein_reward",
        "text_reward",
    ),
    "statespace": ("Compartmental", "TimeSeries"),
    "twists": (
        "GradientTwist",
        "GuidedTwist",
        "LookaheadTwist",
        "Twist",
        "guided",
    ),
    "viz": (),
    "zoo": (),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name, or a public package, the first time it is asked for."""
    if name in _HOMES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
