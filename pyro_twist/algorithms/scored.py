# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""A model that writes down what it was worth."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_twist.infer.increments import sample_sites
from pyro_twist.wrapper import ModelWrapper

__all__ = ["Scored"]


class Scored(ModelWrapper):
    """
    A tilted model that ends with its log-potential in ``state["objective"]``.

    It is the sum of all factors and observations of the last step, as they were evaluated, so that
    it costs no further reward call. ``state["ranking"]`` is the same, for those that rank.

    :param model: A model with ``timesteps`` whose potential is at its end.
    """

    def step(self, state: Any, t: int, *args: Any, **kwargs: Any) -> None:
        """See the base model; the last step also writes ``objective`` and ``ranking``."""
        if t != self.timesteps[-1]:
            self.model.step(state, t, *args, **kwargs)
            return
        with poutine.trace() as tracer:
            self.model.step(state, t, *args, **kwargs)
        state["objective"] = state["ranking"] = self._total(tracer.trace, state)

    def _total(self, trace: poutine.Trace, state: Any) -> Tensor:
        event_dims = len(getattr(self.model, "event_shape", state["x"].shape[1:]))
        batch = state["x"].shape[: state["x"].dim() - event_dims]
        total = torch.zeros(batch, dtype=torch.float64, device=state["x"].device)
        for _, site in sample_sites(trace):
            if site["is_observed"] and not site["infer"].get("_deterministic"):
                value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
                value = scale_and_mask(value.double(), site["scale"], site["mask"])
                total = total + _summed_to(value, batch)
        return total


def _summed_to(value: Tensor, batch: torch.Size) -> Tensor:
    """Sums over dims of plates that the end state is not in."""
    extra = max(value.dim() - len(batch), 0)
    value = value.flatten(len(batch)).sum(-1) if extra else value
    return value.expand(batch)
