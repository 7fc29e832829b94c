# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Weighted particles as what Pyro's own tools call a posterior."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.infer.abstract_infer import TracePosterior

from pyro_twist.infer.result import SMCResult

__all__ = ["ParticlePosterior"]


class ParticlePosterior(TracePosterior):
    """
    A result as a :class:`~pyro.infer.abstract_infer.TracePosterior`: one trace for each particle.

    It has the latent sites, if the run kept paths, the entries of the state under their names where
    no site has the same, and ``"_RETURN"``, the end state. It is what
    :class:`~pyro.infer.abstract_infer.EmpiricalMarginal` and its ``marginal`` take::

        result = TwistedSMC(model, twist, 64, history="paths").run()
        posterior = ParticlePosterior(result).run()
        EmpiricalMarginal(posterior, "x_0").variance

    There is one Python object for each particle and site; for expectations alone use
    ``result.expectation``.

    :param SMCResult result: The particles of one population.
    :raises ValueError: If there are several populations.
    """

    def __init__(self, result: SMCResult) -> None:
        if result.log_weights.dim() != 1:
            raise ValueError(
                f"the result has {result.log_weights.shape[1]} populations, each with a posterior "
                "of its own; run them one by one, or use result.expectation"
            )
        super().__init__(num_chains=1)
        self.result = result

    def _traces(self, *args: Any, **kwargs: Any) -> Iterator[tuple[poutine.Trace, torch.Tensor]]:
        result = self.result
        named = {**result.state, **(result.samples or {})}
        log_weights = result.get_normalized_weights(log_scale=True)
        for i, log_weight in enumerate(log_weights):
            trace = poutine.Trace()
            for name, value in named.items():
                trace.add_node(name, name=name, type="sample", value=value[i], is_observed=False)
            if "x" in result.state:
                value = result.state["x"][i]
                trace.add_node("_RETURN", name="_RETURN", type="return", value=value)
            yield trace, log_weight
