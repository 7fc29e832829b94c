# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""A model that writes down what it was worth."""

from __future__ import annotations

from typing import Any

from pyro import poutine

from pyro_twist.potential import batch_shape_of, sum_of_factors
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
        batch_shape = batch_shape_of(self.model, state["x"])
        total = sum_of_factors(tracer.trace, batch_shape, state["x"].device)
        state["objective"] = state["ranking"] = total
