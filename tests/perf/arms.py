# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Arms that comparisons have in common.

An arm takes a model, the number of particles in a pass and a seed, and returns a result for each
name that it is reported as. Every arm has ``PASSES`` times as many trajectories as a pass has.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyro_twist.infer import (
    ImportanceSampling,
    SMCFailed,
    SMCResult,
    TrustRegionTwist,
    TwistedSMC,
    pool,
)
from pyro_twist.twists import DiscountedLookahead, LookaheadTwist

__all__ = [
    "ABLATIONS",
    "LABELS",
    "PASSES",
    "Arm",
    "Results",
    "importance",
    "learned",
    "long_learned",
    "long_steering",
    "one_pass",
    "options_of",
    "pooled",
    "steering",
]

PASSES = 4

Results = dict[str, SMCResult]
Arm = Callable[[Any, int, int], Results]

# what an arm is reported as, where that is not its name alone
LABELS = {"importance": ("importance", "best-of-n"), "tri": ("tri", "tri, last pass")}


def options_of(seed: int) -> dict[str, Any]:
    """The options that all have in common."""
    return {"seed": seed, "progress": False}


def importance(model: Any, n: int, seed: int) -> Results:
    """Samples of the base model: weighted, and the best one alone."""
    result = ImportanceSampling(model, PASSES * n, **options_of(seed)).run()
    return {"importance": result, "best-of-n": result}


def steering(name: str, **options: Any) -> Arm:
    """
    Feynman-Kac steering in one run.

    :param str name: What the arm is reported as.
    :param options: Of :class:`~pyro_twist.twists.LookaheadTwist`; ``shots=5`` spreads as many
        look-aheads over the steps.
    """
    shots = options.pop("shots", None)

    def arm(model: Any, n: int, seed: int) -> Results:
        every = {"every": max(1, len(model.timesteps) // shots)} if shots else {}
        twist = LookaheadTwist(model, **options, **every)
        return {name: TwistedSMC(model, twist, PASSES * n, **options_of(seed)).run()}

    return arm


def pooled(model: Any, n: int, seed: int) -> Results:
    """Feynman-Kac steering in as many runs as there are passes."""
    found, before = [], Counter(model.counts)
    for k in range(PASSES):
        options = options_of(10_000 + PASSES * seed + k)
        with contextlib.suppress(SMCFailed):  # an estimate of zero
            found.append(TwistedSMC(model, LookaheadTwist(model), n, **options).run())
    if not found:
        raise SMCFailed("no particle of any run has weight")
    whole, share = pool(found), math.log(len(found) / PASSES)
    log_weights, log_normalizer = whole.log_weights + share, whole.log_normalizer + share
    counts = dict(Counter(model.counts) - before)
    whole = replace(whole, log_weights=log_weights, log_normalizer=log_normalizer, counts=counts)
    return {"fk-pooled": whole}


def learned(name: str, make: Callable[[Any], Any] | None = None, **options: Any) -> Arm:
    """
    TRI-TSMC in ``PASSES`` passes.

    :param str name: What the arm is reported as.
    :param callable make: Makes the twist from the model; by default the library's choice.
    :param options: Of :class:`~pyro_twist.infer.TrustRegionTwist`.
    """

    def arm(model: Any, n: int, seed: int) -> Results:
        guide = None if make is None else make(model)
        smc = TrustRegionTwist(
            model, guide, n, num_iterations=PASSES - 1, **options, **options_of(seed)
        )
        found = {name: smc.run()}
        if name == "tri":
            found["tri, last pass"] = smc.last
        return found

    return arm


def one_pass(model: Any, n: int, seed: int) -> Results:
    """The same trajectories in a single pass, from which the twist learns while it goes on."""
    smc = TrustRegionTwist(model, None, PASSES * n, num_iterations=0, **options_of(seed))
    return {"tri, one pass": smc.run()}


# what TRI-TSMC is made of, each left out in turn, whatever the twist
ABLATIONS: dict[str, Arm] = {
    "tri, frozen passes": learned("tri, frozen passes", within=False),
    "tri, tau = 1": learned("tri, tau = 1", kl_budget=1e9),
    "tri, no centring": learned("tri, no centring", centring=0.0),
    "tri, no guard": learned("tri, no guard", guard=False),
    "tri, ladder only": learned("tri, ladder only", lambda model: DiscountedLookahead(model)),
}


def long_steering(model: Any, n: int, seed: int) -> Results:
    """A reference run of Feynman-Kac steering."""
    twist = LookaheadTwist(model)
    return {"reference fk": TwistedSMC(model, twist, n, **options_of(seed)).run()}


def long_learned(model: Any, n: int, seed: int, pilot: int = 64) -> Results:
    """A reference run with a twist that is learnt beforehand and then left alone."""
    smc = TrustRegionTwist(model, None, pilot, **options_of(seed))
    smc.fit(2)
    return {"reference tri": TwistedSMC(model, smc.guide, n, **options_of(seed + 1)).run()}
