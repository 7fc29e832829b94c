# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Reverse processes of diffusion models as Pyro models."""

from pyro_twist.diffusion.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from pyro_twist.diffusion.correctors import ProductCorrector, RewardCorrector
from pyro_twist.diffusion.gaussian import GaussianDiffusion
from pyro_twist.diffusion.kernels import GaussianSchedule, GaussianStep
from pyro_twist.diffusion.masked import MaskedDiffusion
from pyro_twist.diffusion.products import MixtureOfModels, ProductOfModels, conditioned
from pyro_twist.diffusion.schedules import make_schedule

__all__ = [
    "GaussianDenoiser",
    "GaussianDiffusion",
    "GaussianMixtureDenoiser",
    "GaussianSchedule",
    "GaussianStep",
    "MaskedDiffusion",
    "MixtureOfModels",
    "ProductCorrector",
    "ProductOfModels",
    "RewardCorrector",
    "conditioned",
    "make_schedule",
]
