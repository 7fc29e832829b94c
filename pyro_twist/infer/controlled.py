# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Controlled SMC: a twist learnt backwards in time, by regression on the particles."""

from __future__ import annotations

from typing import Any

import torch

from pyro_twist.infer.trustregiontwist import TrustRegionTwist

__all__ = ["ControlledSMC", "too_large"]

# entries of a state, for a quadratic with cross terms
_MOST = 64


class ControlledSMC(TrustRegionTwist):
    """
    Controlled SMC [1], or the iterated auxiliary particle filter [2]: the twist is fitted step by
    step, from the end to the start, by approximate dynamic programming.

    The alternative to the likelihood of whole paths that
    :class:`~pyro_twist.infer.TrustRegionTwist` maximises. At every particle of a pass the backward
    recursion of the optimal twist is known in closed form if kernels are normal and the twist is
    the exponential of a quadratic; :class:`~pyro_twist.twists.BackwardTwist` is fitted to it.
    Nothing is tempered. Passes are pooled as there, so that the estimate of the normaliser is
    unbiased.

    For few dimensions: a quadratic of ``d`` dimensions has ``d (d + 3) / 2`` coefficients, to be
    told by ``num_particles`` particles.

    :param object model: A model with ``timesteps``, normal kernels and ``event_shape`` ``()`` or
        ``(d,)``.
    :param guide: Another twist that learns in its ``observe``.
    :param int num_particles: The number of particles in each pass.
    :param int max_plate_nesting: Bound on the number of nested plates in the model.
    :param int num_iterations: The number of passes that are followed by a fit.
    :param options: Further options of :class:`TrustRegionTwist`.
    :raises ValueError: If the state is no number or vector.

    **References**

    [1] `Controlled sequential Monte Carlo`
        Jeremy Heng, Adrian N. Bishop, George Deligiannidis, Arnaud Doucet (2020),
        https://arxiv.org/abs/1708.08396

    [2] `The iterated auxiliary particle filter`
        Pieralberto Guarniero, Adam M. Johansen, Anthony Lee (2017),
        https://arxiv.org/abs/1511.06286
    """

    def __init__(
        self,
        model: Any,
        guide: Any = None,
        num_particles: int = 16,
        max_plate_nesting: int = 0,
        **options: Any,
    ) -> None:
        if guide is None:
            guide = _backward(model)
        super().__init__(model, guide, num_particles, max_plate_nesting, **options)


def too_large(model: Any) -> bool:
    """
    Whether a model's states are not the numbers and vectors that a quadratic twist is for.

    :param model: The model.
    """
    shape = torch.Size(getattr(model, "event_shape", ()))
    return hasattr(model, "mask_token_id") or len(shape) > 1 or shape.numel() > _MOST


def _backward(model: Any) -> Any:
    from pyro_twist.twists.backward import BackwardTwist

    if too_large(model):
        raise ValueError(
            f"{type(model).__name__} has states of shape {tuple(model.event_shape)}; ControlledSMC "
            f"is for normal kernels of numbers and of vectors of at most {_MOST} entries. Try "
            "TrustRegionTwist."
        )
    return BackwardTwist(model)
