# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Plain importance sampling and best-of-N, on the same model objects as everything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pyro_twist.infer.result import SMCResult
from pyro_twist.infer.twistedsmc import TwistedSMC

__all__ = ["BestOfN", "ImportanceSampling"]


class ImportanceSampling(TwistedSMC):
    """
    Draws whole trajectories from the model, or from a guide, and weights them; never resamples.

    :param object model: A model with ``init``, ``step`` and ``timesteps``.
    :param int num_particles: The number of trajectories.
    :param int max_plate_nesting: Bound on the number of nested plates in the model.
    :param object guide: A proposal; the model's own kernels by default.
    :param options: Further options of :class:`TwistedSMC`, except for resampling.
    """

    def __init__(
        self,
        model: Any,
        num_particles: int,
        max_plate_nesting: int = 0,
        *,
        guide: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(
            model, guide, num_particles, max_plate_nesting, resampling="none", **options
        )


class BestOfN(ImportanceSampling):
    """
    Draws trajectories from the model and keeps those of highest reward.

    This maximises, it does not sample the tilted law: the result has no normaliser (NaN) and
    equal weights. The law of the single best of :math:`N` is at most
    :math:`\\log N - (N - 1) / N` nats away from the model's.

    :param object model: A model that writes its reward to the state, such as
        :class:`~pyro_twist.rewards.RewardTilted`.
    :param int num_particles: The number of trajectories, :math:`N`.
    :param int max_plate_nesting: Bound on the number of nested plates in the model.
    :param int keep: How many to keep, of each population.
    :param str by: The entry of the state to rank by, highest first, whatever the scale.
    :param options: Further options of :class:`TwistedSMC`.
    """

    def __init__(
        self,
        model: Any,
        num_particles: int,
        max_plate_nesting: int = 0,
        *,
        keep: int = 1,
        by: str = "reward",
        **options: Any,
    ) -> None:
        if not 1 <= keep <= num_particles:
            raise ValueError(f"keep={keep}; give a number from 1 to num_particles={num_particles}")
        names = getattr(model, "reward_names", None)
        if names is not None and by == "reward" and by not in names:
            raise ValueError(f"by='reward', but the model's rewards are {names}; name one in by=")
        super().__init__(model, num_particles, max_plate_nesting, **options)
        self.keep = keep
        self.by = by

    def result(self) -> SMCResult:
        """The best trajectories so far."""
        everything = super().result()
        # every trajectory is a candidate, also one to which the tilted law gives no weight
        equal = torch.zeros_like(everything.log_weights)
        return replace(everything, log_weights=equal).best(self.keep, by=self.by)
