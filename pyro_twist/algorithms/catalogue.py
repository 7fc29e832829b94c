# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The algorithms that ship, each with the settings of its authors where they fit a small budget.

``num_particles`` is a budget of trajectories: an algorithm that makes several passes, or more
evaluations in a step, gets by with fewer particles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pyro_twist.algorithms.registry import Algorithm, Returns, Runnable, Setting, register_algorithm
from pyro_twist.diffusion import RewardCorrector
from pyro_twist.infer import (
    SVDD,
    BeamSearch,
    BestOfN,
    BlockSearch,
    ControlledSMC,
    ImportanceSampling,
    NestedSMC,
    ParticleGibbs,
    PsiSampler,
    TreeSearch,
    TrustRegionTwist,
    TwistedSMC,
)
from pyro_twist.twists import (
    ChildrenTwist,
    GradientTwist,
    GuidedTwist,
    LookaheadTwist,
    guided,
)

__all__: list[str] = []

LAW: Returns = "samples of the tilted law"
CLOSE: Returns = "samples of nearly the tilted law"
OTHER: Returns = "samples of another law"
BEST: Returns = "a maximiser"


def _steered(make_twist: Callable[[Any], Any], **options: Any) -> Callable[[Setting], Runnable]:
    """Twisted SMC with the twist that ``make_twist`` makes from the model."""

    def make(setting: Setting) -> Runnable:
        twist = make_twist(setting.model)
        return TwistedSMC(setting.model, twist, **{**setting.resampled, **options})

    return make


def _few_looks(model: Any) -> LookaheadTwist:
    return LookaheadTwist(model, every=max(1, len(model.timesteps) // 5))


def _best_of_n(setting: Setting) -> Runnable:
    return BestOfN(setting.model, keep=setting.num_particles, by="ranking", **setting.common)


def _passes(setting: Setting) -> tuple[int, dict[str, Any]]:
    """As many passes as leave each four particles, at most four, and the options of one."""
    passes = max(1, min(4, setting.num_particles // 4))
    return passes, {**setting.resampled, "num_particles": setting.num_particles // passes}


def _trust_region(setting: Setting) -> Runnable:
    passes, options = _passes(setting)
    return TrustRegionTwist(setting.model, None, num_iterations=passes - 1, **options)


def _one_pass(setting: Setting) -> Runnable:
    return TrustRegionTwist(setting.model, None, num_iterations=0, **setting.resampled)


def _controlled(setting: Setting) -> Runnable:
    passes, options = _passes(setting)
    return ControlledSMC(setting.model, None, num_iterations=passes - 1, **options)


def _gibbs(setting: Setting) -> Runnable:
    passes, options = _passes(setting)
    options, twist = {**options, "resampling": "multinomial"}, LookaheadTwist(setting.model)
    if setting.num_particles == 1:  # the first pass is ordinary, and there is no other
        return TwistedSMC(setting.model, twist, **options)
    return ParticleGibbs(setting.model, twist, num_iterations=passes, **options)


def _families(options: dict[str, Any]) -> dict[str, Any]:
    """
    The options with numbers of children: the largest divisor up to four that leaves two parents.

    Where there is none but one, some of the budget is left over, for there to be children at all.
    """
    size = options["num_particles"]
    most = min(4, max(1, size // 2))
    children = next(m for m in range(most, 0, -1) if size % m == 0)
    children = most if children == 1 else children
    return {**options, "num_children": children, "num_particles": size - size % children}


def _nested(**options: Any) -> Callable[[Setting], Runnable]:
    def make(setting: Setting) -> Runnable:
        twist = LookaheadTwist(setting.model)
        return NestedSMC(setting.model, twist, **options, **_families(setting.resampled))

    return make


def _psi(setting: Setting) -> Runnable:
    """Half of the budget for the moves, as its authors have it."""
    steps, size = len(setting.model.timesteps), max(1, setting.num_particles // 2)
    spare = setting.num_particles * steps - size * steps
    options = {**setting.resampled, "num_particles": size, "num_moves": spare // size}
    return PsiSampler(setting.model, GradientTwist(setting.model), **options)


def _corrected(strength: float, **options: Any) -> Callable[[Setting], Runnable]:
    """Marginals tilted at every time, with particle weights."""

    def make(setting: Setting) -> Runnable:
        model = RewardCorrector(setting.model, strength, **options)
        return TwistedSMC(model, None, **setting.resampled)

    return make


def _uncorrected(setting: Setting) -> Runnable:
    """The proposals of TDS as if they were the model's own."""
    model = guided(setting.model, GradientTwist(setting.model, key="guidance"))
    return TwistedSMC(model, LookaheadTwist(model), **setting.resampled)


def _children(setting: Setting) -> Runnable:
    twist = LookaheadTwist(setting.model) + ChildrenTwist(setting.model)
    return TwistedSMC(setting.model, twist, **setting.resampled)


def _svdd(setting: Setting) -> Runnable:
    return SVDD(setting.model, **_families(setting.common))


def _blocks(setting: Setting) -> Runnable:
    size = max(1, math.ceil(len(setting.model.timesteps) / 5))
    return BlockSearch(setting.model, block_size=size, **_families(setting.common))


def _beam(setting: Setting) -> Runnable:
    """Broad where the noise is strong, narrow at the end."""
    widths = (max(1, setting.num_particles // 2), max(1, setting.num_particles // 8))
    return BeamSearch(setting.model, width=widths, keep=1, **setting.common)


def _tree_search(setting: Setting) -> Runnable:
    """A node for every particle, in as many steps."""
    size = math.ceil(setting.model.event_shape[0] / len(setting.model.timesteps))
    return TreeSearch(
        setting.model,
        setting.num_particles,
        group_size=size,
        seed=setting.seed,
        progress=False,
    )


_LIST = [
    Algorithm(
        "base",
        "Base model",
        "Samples of the model as it is; the reward is only measured.",
        "samples of the model",
        lambda setting: ImportanceSampling(setting.model, **setting.common),
        default=True,
    ),
    Algorithm(
        "best-of-n",
        "Best of N",
        "Draws all samples from the model, the same ones as base, and returns the one of highest "
        "lambda * reward.",
        BEST,
        _best_of_n,
        default=True,
        stream="base",
    ),
    Algorithm(
        "importance",
        "Importance sampling",
        "Draws all samples from the model and weights them by exp(lambda * reward).",
        LAW,
        lambda setting: ImportanceSampling(setting.model, **setting.common),
    ),
    Algorithm(
        "fk-few",
        "FK steering, five look-aheads",
        "Feynman-Kac steering that scores the predicted end state five times on the way, as usual "
        "where rewards are dear, and resamples on it.",
        LAW,
        _steered(_few_looks),
        reference="https://arxiv.org/abs/2501.06848",
    ),
    Algorithm(
        "fk",
        "FK steering",
        "Feynman-Kac steering that scores the predicted end state after every step and resamples "
        "on it.",
        LAW,
        _steered(LookaheadTwist),
        default=True,
        costs="a reward call a step",
        reference="https://arxiv.org/abs/2501.06848",
    ),
    Algorithm(
        "tri-tsmc",
        "TRI-TSMC",
        "Splits the budget into up to four passes, learns from each how to steer the next "
        "(trust-region twisted SMC), and pools them.",
        LAW,
        _trust_region,
        default=True,
        costs="a reward call a step, and the fits",
        reference="https://arxiv.org/abs/2605.25123",
    ),
    Algorithm(
        "tri-one-pass",
        "TRI-TSMC, one pass",
        "TRI-TSMC with all particles in one pass, from which the twist learns while it goes on.",
        LAW,
        _one_pass,
        costs="a reward call a step, and the fits",
        reference="https://arxiv.org/abs/2605.25123",
    ),
    Algorithm(
        "tds",
        "TDS",
        "FK steering whose proposals follow the gradient of the look-ahead, through the denoiser.",
        LAW,
        _steered(GradientTwist),
        needs=("gradient",),
        costs="a reward call a step, and gradients of reward and denoiser",
        reference="https://arxiv.org/abs/2306.17775",
    ),
    Algorithm(
        "das",
        "DAS",
        "TDS whose reward is switched on step by step, as fast as the effective sample size "
        "allows.",
        LAW,
        _steered(lambda model: GradientTwist(model, tempering="adaptive"), resampling="ssp"),
        needs=("gradient",),
        costs="a reward call a step, and gradients of reward and denoiser",
        reference="https://arxiv.org/abs/2501.05803",
    ),
    Algorithm(
        "urge",
        "URGE",
        "Proposals guided by the gradient of the reward, corrected by Girsanov's term, resampled "
        "after every step.",
        LAW,
        _steered(GuidedTwist, ess_threshold=1.0, resampling="multinomial"),
        needs=("gradient",),
        costs="a reward call a step, and gradients of reward and denoiser",
        reference="https://arxiv.org/abs/2605.17850",
    ),
    Algorithm(
        "psi-sampler",
        "Psi-Sampler",
        "Spends half of the budget on moves of the initial particles to where the reward is, then "
        "runs TDS.",
        LAW,
        _psi,
        needs=("gradient",),
        costs="a reward call for each step and move, and gradients of reward and denoiser",
        reference="https://arxiv.org/abs/2506.01320",
    ),
    Algorithm(
        "fkc",
        "Feynman-Kac corrector",
        "Half of the reward's gradient in the drift, at the state itself, and weights that correct "
        "for the rest; right as the steps get finer.",
        CLOSE,
        _corrected(0.5),
        needs=("gradient",),
        costs="a reward call a step, and its gradient",
        reference="https://arxiv.org/abs/2503.02819",
    ),
    Algorithm(
        "afdps",
        "AFDPS",
        "The whole of the reward's gradient in the drift, and weights with its Laplacian, "
        "estimated from four probes; right as the steps get finer.",
        CLOSE,
        _corrected(1.0, laplacian=4),
        needs=("gradient",),
        costs="a reward call a step, its gradient, and four products with its Hessian",
        reference="https://arxiv.org/abs/2506.03979",
    ),
    Algorithm(
        "guided-fk",
        "FK steering, guided, uncorrected",
        "FK steering with the proposals of TDS and no density ratio: the reward counts twice.",
        OTHER,
        _uncorrected,
        needs=("gradient",),
        costs="two reward calls a step, and gradients of reward and denoiser",
    ),
    Algorithm(
        "controlled",
        "Controlled SMC",
        "Splits the budget into up to four passes, after each of which a quadratic twist is fitted "
        "backwards in time by regression.",
        LAW,
        _controlled,
        needs=("vector",),
        costs="the fits",
        reference="https://arxiv.org/abs/1708.08396",
    ),
    Algorithm(
        "nested",
        "Nested SMC",
        "Every parent draws several children, continues as one of them, and is weighted by their "
        "mean.",
        LAW,
        _nested(),
        costs="a reward call a step",
        reference="https://arxiv.org/abs/1502.02536",
    ),
    Algorithm(
        "nested-adapted",
        "Nested SMC, fully adapted",
        "Nested SMC that resamples parents before it chooses their children.",
        LAW,
        _nested(fully_adapted=True),
        costs="a reward call a step",
        reference="https://arxiv.org/abs/1502.02536",
    ),
    Algorithm(
        "children",
        "FK steering with children",
        "FK steering whose particles choose among four children that share one evaluation of the "
        "network.",
        LAW,
        _children,
        needs=("masked",),
        costs="five reward calls a step",
    ),
    Algorithm(
        "particle-gibbs",
        "Particle Gibbs",
        "Splits the budget into up to four passes of FK steering, each of which keeps a path of "
        "the one before.",
        LAW,
        _gibbs,
        costs="a reward call a step",
        reference="https://arxiv.org/abs/2507.08390",
    ),
    Algorithm(
        "svdd",
        "SVDD",
        "Every sample draws several children in each step and goes on as the one with the best "
        "look-ahead.",
        BEST,
        _svdd,
        costs="a reward call a step",
        reference="https://arxiv.org/abs/2408.08252",
    ),
    Algorithm(
        "code",
        "CoDe",
        "Blockwise best-of-N: copies of a sample run for a fifth of the steps, and the best of "
        "them goes on.",
        BEST,
        _blocks,
        reference="https://arxiv.org/abs/2502.00968",
    ),
    Algorithm(
        "dsearch",
        "Beam search",
        "Keeps the trajectories with the best look-ahead after every step, fewer as the noise goes "
        "down.",
        BEST,
        _beam,
        costs="a reward call a step",
        reference="https://arxiv.org/abs/2503.02039",
    ),
    Algorithm(
        "tree-search",
        "Tree search (TReASURe)",
        "Keeps as many partial sequences as there are particles; reveals one position of each "
        "after the other, tries four tokens there, and keeps those whose likeliest completions "
        "have the highest lambda * reward.",
        BEST,
        _tree_search,
        needs=("masked",),
        costs="four reward calls a step",
        reference="https://arxiv.org/abs/2509.23146",
    ),
]
for _one in _LIST:
    register_algorithm(_one)
