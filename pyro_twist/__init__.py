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
        align,
        diffusion,
        handlers,
        hierarchies,
        infer,
        latents,
        preferences,
        rewards,
        statespace,
        twists,
        viz,
        zoo,
    )
    from pyro_twist.diffusion import (
        GaussianDenoiser,
        GaussianDiffusion,
        GaussianMixtureDenoiser,
        MaskedDiffusion,
        MixtureOfModels,
        ProductOfModels,
    )
    from pyro_twist.hierarchies import SetOf, mixture
    from pyro_twist.infer import (
        BestOfN,
        EvidenceGradient,
        ImportanceSampling,
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
    from pyro_twist.twists import LookaheadTwist, Twist

__version__ = "0.1.0"

__all__ = [
    "AutoLatents",
    "BestOfN",
    "Compartmental",
    "EvidenceGradient",
    "GaussianDenoiser",
    "GaussianDiffusion",
    "GaussianMixtureDenoiser",
    "ImportanceSampling",
    "JointTwist",
    "LookaheadTwist",
    "MaskedDiffusion",
    "MixtureOfModels",
    "Preferences",
    "ProductOfModels",
    "Reward",
    "RewardError",
    "RewardTilted",
    "SMCResult",
    "SetOf",
    "Tilted",
    "TimeSeries",
    "TreeSearch",
    "TrustRegionTwist",
    "Twist",
    "TwistedSMC",
    "WithLatents",
    "__version__",
    "align",
    "diffusion",
    "handlers",
    "hierarchies",
    "image_reward",
    "infer",
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
    "align": (),
    "diffusion": (
        "GaussianDenoiser",
        "GaussianDiffusion",
        "GaussianMixtureDenoiser",
        "MaskedDiffusion",
        "MixtureOfModels",
        "ProductOfModels",
    ),
    "handlers": (),
    "hierarchies": ("SetOf", "mixture"),
    "infer": (
        "BestOfN",
        "EvidenceGradient",
        "ImportanceSampling",
        "SMCResult",
        "TreeSearch",
        "TrustRegionTwist",
        "TwistedSMC",
    ),
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
    "twists": ("LookaheadTwist", "Twist"),
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
