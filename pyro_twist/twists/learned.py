# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Twists with parameters, fitted by weighted maximum likelihood on recorded paths.

A family of one's own needs ``get_posterior`` with parameters in it and nothing else; the fit is
then done by an optimiser. :class:`LinearTwist` is for families that are linear in their
parameters: it asks for the features, and the fit is one linear solve. :class:`FittedTwist` is for
families that bring a fit of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_twist.twists.minimise import Minimiser
from pyro_twist.twists.paths import Pass, Paths, PathStep
from pyro_twist.twists.statistics import (
    Quadratic,
    Statistics,
    WeightedSums,
    linear_statistics,
)
from pyro_twist.twists.tilting import tilt
from pyro_twist.twists.twist import SumTwist, Twist

__all__ = [
    "FittedTwist",
    "LearnedTwist",
    "LinearTwist",
    "WeightedDigest",
    "add_pass",
    "entries_read",
    "fit_likelihood",
    "learned_parts",
    "linear_part",
    "log_likelihood",
    "optimised_parts",
    "trained_parts",
]


class LearnedTwist(Twist):
    """
    Base class of twists with parameters.

    A derived class makes its parameters in ``__init__`` such that the twist is identically one,
    and overrides :meth:`~pyro_twist.twists.Twist.get_posterior` with a proposal that is
    differentiable in them::

        class Drift(LearnedTwist):
            def __init__(self, model):
                super().__init__(model)
                self.speed = torch.nn.Parameter(torch.zeros(()))

            def get_posterior(self, name, prior):
                return tilt(prior, self.speed)

    A twist that was only a proposal needs no ``log_twist``; one that knows the value of its
    look-ahead returns it there.

    :param model: The model that the twist looks ahead in.
    """

    #: The entries of recorded states that fits read, in ``get_posterior``, ``features`` and
    #: ``observe``; all of them if ``None``. Others are not kept. It does not hold for derived
    #: classes that override one of these and do not say it again.
    reads: tuple[str, ...] | None = None

    #: The entries of the state right after each step, before resampling, that ``observe`` reads.
    follows: tuple[str, ...] = ()

    @property
    def learns_within(self) -> bool:
        """Whether ``observe`` learns from a pass that is still going on as well."""
        return False

    @property
    def needs_paths(self) -> bool:
        """Whether a fit reads the recorded steps, so that statistics of paths are not enough."""
        return True

    def observe(self, passes: Sequence[Pass]) -> None:
        """
        Learns from passes what is not learnt by likelihood; called before each fit.

        A family with :attr:`learns_within` is also called between the steps of a pass.

        :param list passes: All passes so far, the latest last.
        """

    def penalty(self) -> torch.Tensor:
        """
        Subtracted from the weighted log-likelihood of a path, in nats; differentiable.
        """
        return torch.zeros((), dtype=torch.float64)

    def constrain(self) -> None:
        """Puts the parameters back into their range after a fit."""


class LinearTwist(LearnedTwist):
    """
    Base class of tilts that are linear in their parameters, :math:`\\eta = \\sum_k \\theta_k f_k`.

    A derived class overrides :meth:`features` and, where different steps have parameters of their
    own, :meth:`block`. Sites must be normally distributed.

    The likelihood of a path depends on a few sums over its steps (:meth:`statistics`), and is a
    quadratic of the parameters. Fits compute the sums once; where features stay the same from pass
    to pass, they may be kept instead of paths.

    :param model: The model that the twist looks ahead in.
    :param int num_parameters: The number of parameters in a block, all zero at the start.
    :param int num_blocks: The number of blocks.
    :param float ridge: Prior precision of each parameter, in units of one path's information.
    """

    theta: torch.nn.Parameter
    prior_mean: torch.Tensor

    def __init__(
        self, model: Any, num_parameters: int, num_blocks: int = 1, *, ridge: float = 1e-3
    ) -> None:
        super().__init__(model)
        self.theta = torch.nn.Parameter(torch.zeros(num_blocks, num_parameters))
        self.register_buffer("prior_mean", torch.zeros(num_blocks, num_parameters))
        self.ridge = ridge

    def features(self, name: str, prior: Any) -> torch.Tensor | None:
        """
        The tilts of the single parameters; the state is ``self.args_kwargs[0][0]``.

        :param str name: The name of the site.
        :param prior: The base kernel.
        :returns: Of shape ``(num_parameters,) + batch_shape + event_shape``, or broadcastable to
            it; ``None`` where the twist leaves the site alone.
        """
        raise NotImplementedError

    def block(self) -> int:
        """The index of the block of parameters at the step in ``self.args_kwargs``."""
        return 0

    @property
    def needs_paths(self) -> bool:
        """Whether :meth:`observe` or the proposal are more than those of this class."""
        kind = type(self)
        return kind.observe is not LearnedTwist.observe or not self._is_linear()

    def _is_linear(self) -> bool:
        return type(self).get_posterior is LinearTwist.get_posterior

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The prior, tilted by the weighted sum of the features."""
        theta = self.theta[self.block()]
        if not torch.is_grad_enabled() and not theta.any():
            return prior
        # features are of the model's kernel, also where other parts have tilted it before
        base = prior if self.base_kernel is None else self.base_kernel
        features = self.features(name, base)
        if features is None:
            return prior
        return tilt(prior, torch.tensordot(theta.to(features.dtype), features, dims=1))

    def penalty(self) -> torch.Tensor:
        """The ridge, for fits beside other families; :meth:`solve` has it built in."""
        return 0.5 * self.ridge * (self.theta.double() - self.prior_mean.double()).square().sum()

    @torch.no_grad()
    def statistics(self, step: PathStep, kernel: Any = None) -> Statistics | None:
        """
        What a step says about the parameters.

        :param PathStep step: A step, weighted or not.
        :param kernel: What is tilted, if that is not the model's distribution: the proposal of
            the other parts of a sum.
        :returns: The statistics of each particle; ``None`` where the twist leaves the site alone.
        :rtype: Statistics
        """
        kernel = step.prior if kernel is None else kernel
        if not is_normal(kernel):
            return None
        self.args_kwargs, self.stepping = ((step.state, *step.args), step.kwargs), step.stepping
        try:
            features, block = self.features(step.name, step.prior), self.block()
        finally:
            del self.args_kwargs
        if features is None:
            return None
        proposal = _normal(kernel) if step.posterior is kernel else _normal(step.posterior)
        axis = step.population_axis
        return linear_statistics(features, step.value, _normal(kernel), proposal, axis, block)

    def solve(self, batches: Sequence[Quadratic]) -> torch.Tensor:
        """
        The parameters of highest weighted likelihood, in closed form.

        :param list batches: Weighted sums of statistics.
        :returns: Of shape ``(num_blocks, num_parameters)``.
        :rtype: torch.Tensor
        """
        blocks, size = self.theta.shape
        eye = torch.eye(size, dtype=torch.float64, device=self.theta.device)
        information = self.ridge * eye.repeat(blocks, 1, 1)
        score = self.ridge * self.prior_mean.double()
        for one in batches:
            information += one.information
            score += one.score - one.noise
        return torch.linalg.lstsq(information, score[..., None]).solution[..., 0]


@dataclass(frozen=True)
class WeightedDigest:
    """
    What a fit needs of a step, with weights for the particles, or particles and populations.

    :param digest: What :meth:`FittedTwist.digest` returned.
    :param torch.Tensor weights: Weights towards the law to fit, flattened.
    :param torch.Tensor base: Weights of the noise that centring subtracts, flattened.
    """

    digest: Any
    weights: torch.Tensor
    base: torch.Tensor


class FittedTwist(LearnedTwist):
    """
    Base class of twists that fit themselves, where an optimiser over all parameters is too slow.

    A derived class says what a fit needs to know of a step (:meth:`digest`), which is computed
    once for each step however often it is weighted anew, what the likelihood is
    (:meth:`digest_log_prob`), and how to maximise it (:meth:`solve`). Its proposal is the prior
    itself where all parameters are zero, as they are at the start.

    :param model: The model that the twist looks ahead in.
    """

    #: Whether :meth:`solve` uses :attr:`minimise`.
    optimises: bool = False

    #: What a fit that needs an optimiser calls, as the user of :func:`fit_likelihood` has chosen.
    minimise: Minimiser = Minimiser()

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        #: The digests of recorded steps by the values drawn, with the whole twist they are for.
        self.digests = WeakTensorKeyDictionary()

    def digest(self, step: PathStep, kernel: Any) -> Any:
        """
        What fits need of a step.

        :param PathStep step: A step without weights.
        :param kernel: What is tilted: the model's distribution, tilted by the other parts of a sum.
        :returns: Anything; ``None`` where the twist leaves the site alone.
        """
        raise NotImplementedError

    def digest_log_prob(self, digest: Any) -> torch.Tensor:
        """
        The log-density of the twist's proposal at the value drawn, relative to the kernel's.

        :returns: Of the particles, or particles and populations, flattened, in float64.
        """
        raise NotImplementedError

    def solve(self, seen: Sequence[WeightedDigest], size: float) -> None:
        """
        Sets the parameters to those of highest weighted likelihood, less a penalty.

        :param list seen: The digests of all steps, with weights that sum to one at each time.
        :param float size: The effective number of paths behind the weights.
        """
        raise NotImplementedError

    def observe(self, passes: Sequence[Pass]) -> None:
        """Drops the digests of earlier fits; a derived class that overrides it calls this one."""
        self.digests.clear()


def _normal(prior: Any) -> Any:
    return prior.base_dist if isinstance(prior, torch.distributions.Independent) else prior


def is_normal(prior: Any) -> bool:
    """Whether a distribution is normal, independent over its event dims."""
    return isinstance(_normal(prior), torch.distributions.Normal)


def loc_scale(prior: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of a normal distribution."""
    base = _normal(prior)
    return base.loc, base.scale


def learned_parts(twist: Any) -> list[LearnedTwist]:
    """The learned twists that a twist is a sum of."""
    if isinstance(twist, SumTwist):
        return [part for one in twist.parts() for part in learned_parts(one)]
    return [twist] if isinstance(twist, LearnedTwist) else []


def trained_parts(twist: Any) -> list[LearnedTwist]:
    """Those learned parts that have parameters to fit."""
    parts = learned_parts(twist)
    return [part for part in parts if any(p.requires_grad for p in part.parameters())]


def optimised_parts(twist: Any) -> list[LearnedTwist]:
    """Those trained parts that an optimiser is needed for."""
    parts = trained_parts(twist)
    if len(parts) == 1 and isinstance(parts[0], LinearTwist):
        return []
    return [part for part in parts if not isinstance(part, FittedTwist) or part.optimises]


def linear_part(twist: Any) -> LinearTwist | None:
    """The linear part of a twist that has no other part to fit; ``None`` if there is none."""
    trained = trained_parts(twist)
    if len(trained) == 1 and isinstance(trained[0], LinearTwist) and trained[0]._is_linear():
        return trained[0]
    return None


def entries_read(twist: Any) -> tuple[str, ...] | None:
    """The entries of recorded states that a fit reads; ``None`` if that may be any."""
    if isinstance(twist, LearnedTwist):
        return _declared(twist)
    if not isinstance(twist, SumTwist):
        fixed = isinstance(twist, Twist) and type(twist).get_posterior is Twist.get_posterior
        return () if fixed else None
    entries: tuple[str, ...] = ()
    for one in map(entries_read, twist.parts()):
        if one is None:
            return None
        entries += one
    return entries


def _declared(part: LearnedTwist) -> tuple[str, ...] | None:
    if "reads" in vars(part):
        return part.reads
    for kind in type(part).__mro__:
        if "reads" in vars(kind):
            return part.reads
        if not vars(kind).keys().isdisjoint({"get_posterior", "features", "observe"}):
            return None
    return None


@torch.no_grad()
def step_statistics(twist: Any, part: LinearTwist, step: PathStep) -> Statistics | None:
    """The statistics of a step for the linear part of a twist, relative to its other parts."""
    if twist is part:
        return part.statistics(step)
    return part.statistics(step, _kernel_without(twist, [part.theta], step))


@torch.no_grad()
def _kernel_without(twist: Any, parameters: Sequence[torch.nn.Parameter], step: PathStep) -> Any:
    """What a twist proposes with some of its parameters at zero."""
    kept = [one.detach().clone() for one in parameters]
    for one in parameters:
        one.zero_()
    try:
        return step.proposal(twist)
    finally:
        for one, value in zip(parameters, kept, strict=True):
            one.copy_(value)


def _fitted_part(twist: Any) -> FittedTwist | None:
    """The part of a twist that fits itself, if no other part has anything to fit."""
    trained = trained_parts(twist)
    return trained[0] if len(trained) == 1 and isinstance(trained[0], FittedTwist) else None


@torch.no_grad()
def _digest(twist: Any, part: FittedTwist, step: PathStep) -> Any:
    """The digest of a step, kept unless it may change in the course of a fit."""
    owner, found = part.digests.get(step.value, (None, None))
    if owner is not None and owner() is twist:
        return found
    restored = step.restored()
    if twist is part:
        kernel = restored.prior
    else:
        kernel = _kernel_without(twist, list(part.parameters()), restored)
    found = part.digest(restored, kernel)
    if _fitted_part(twist) is part:
        part.digests[step.value] = (weakref.ref(twist), found)
    return found


def _weighted_digests(twist: Any, part: FittedTwist, paths: Paths) -> Iterator[WeightedDigest]:
    for step in paths.steps:
        found = _digest(twist, part, step)
        if found is not None:
            assert step.weights is not None and step.base is not None
            device = step.value.device if step.device is None else step.device
            weights, base = (w.reshape(-1).to(device) for w in (step.weights, step.base))
            yield WeightedDigest(found, weights, paths.centring * base)


def _fit_itself(twist: Any, part: FittedTwist, batches: Sequence[Paths]) -> None:
    ends = [one.steps[-1].weights for one in batches if one.steps]
    final = torch.cat([w.reshape(-1).cpu() for w in ends if w is not None])
    size = final.sum().square() / final.square().sum().clamp(min=1e-300)
    seen = [one for paths in batches for one in _weighted_digests(twist, part, paths)]
    # without weight on any path there is nothing to learn
    if seen and float(size) > 0:
        with torch.no_grad():
            part.solve(seen, float(size))


def add_pass(
    sums: WeightedSums, twist: Any, part: LinearTwist, one: Pass, weights: Any, base: Any
) -> None:
    """
    Adds the final paths of a pass to weighted sums.

    :param WeightedSums sums: The sums for several sets of weights.
    :param Twist twist: The whole twist.
    :param LinearTwist part: Its linear part.
    :param Pass one: The pass.
    :param torch.Tensor weights: Weights of the final paths, of shape
        ``(num_sets,) + log_path.shape``.
    :param torch.Tensor base: Weights of the noise that centring subtracts, of the same shape.
    """
    if one.statistics is not None:
        for statistics in one.statistics:
            sums.add(statistics, weights, base)
        return
    pushed = one.pushed(torch.cat([weights, base]))
    for sites, both in zip(one.steps, pushed, strict=True):
        for step in sites:
            found = step_statistics(twist, part, step.restored())
            if found is not None:
                sums.add(found, *both.chunk(2))


def _quadratic(twist: Any, part: LinearTwist, paths: Paths | Quadratic) -> Quadratic:
    if isinstance(paths, Quadratic):
        return paths
    sums = WeightedSums(1, part.theta)
    for step in paths:
        found = step_statistics(twist, part, step)
        if found is not None:
            assert step.weights is not None and step.base is not None
            sums.add(found, step.weights[None], paths.centring * step.base[None])
    return sums[0]


def log_likelihood(twist: Any, batches: Sequence[Paths | Quadratic]) -> float:
    """
    The weighted log-likelihood of paths, up to a number that parameters do not change.

    :param Twist twist: The twist.
    :param list batches: Weighted paths, or for a twist with a :func:`linear_part` their sums.
    """
    part, fitted, total = linear_part(twist), _fitted_part(twist), 0.0
    with torch.no_grad():
        for one in batches:
            if isinstance(one, Quadratic):
                assert part is not None
                total += float(one.log_likelihood(part.theta))
            elif fitted is not None:
                for seen in _weighted_digests(twist, fitted, one):
                    total += float(seen.weights @ fitted.digest_log_prob(seen.digest))
            else:
                total += float(one.log_likelihood(twist))
    return total


def fit_likelihood(
    twist: Any,
    batches: Sequence[Paths | Quadratic],
    *,
    max_iterations: int = 60,
    minimise: Minimiser | None = None,
) -> None:
    """
    Moves the parameters of a twist to the highest weighted likelihood of whole paths.

    Neither model nor reward is evaluated. A single linear part is solved for, parts that fit
    themselves do so one after the other, and everything else is left to an optimiser.

    :param Twist twist: The twist, changed in place.
    :param list batches: Weighted paths, or for a twist with a :func:`linear_part` their sums.
    :param int max_iterations: Of L-BFGS.
    :param ~pyro_twist.twists.minimise.Minimiser minimise: The optimiser; by default L-BFGS.
    """
    minimise = minimise or Minimiser()
    trained = trained_parts(twist)
    if len(trained) == 1 and isinstance(trained[0], LinearTwist):
        linear = trained[0]
        with torch.no_grad():
            solved = linear.solve([_quadratic(twist, linear, one) for one in batches])
            linear.theta.copy_(solved)
    elif trained:
        paths = [one for one in batches if isinstance(one, Paths)]
        fitted = [part for part in trained if isinstance(part, FittedTwist)]
        for one in fitted:
            one.minimise = minimise
            _fit_itself(twist, one, paths)
        rest = [part for part in trained if not isinstance(part, FittedTwist)]
        if rest:
            _optimise(twist, rest, paths, minimise, max_iterations)
    for part in trained:
        with torch.no_grad():
            part.constrain()


def _optimise(
    twist: Any,
    parts: Sequence[LearnedTwist],
    batches: Sequence[Paths],
    minimise: Minimiser,
    max_iterations: int,
) -> None:
    parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
    start = parameters_to_vector(parameters).detach().clone()
    offset = _base_score(twist, parameters, batches)

    def loss() -> torch.Tensor:
        likelihood = sum(paths.log_likelihood(twist) for paths in batches)
        penalty = sum(part.penalty() for part in parts)
        moved = parameters_to_vector(parameters) - start
        value: torch.Tensor = penalty - likelihood + (offset * moved).sum()
        return value

    try:
        minimise(loss, parameters, max_iterations)
    except RuntimeError as error:
        # a likelihood without a maximum: a step beyond what the parameters' dtype can hold
        if "overflow" not in str(error):
            raise
        vector_to_parameters(start, parameters)
    if not torch.isfinite(parameters_to_vector(parameters)).all():
        vector_to_parameters(start, parameters)


def _base_score(
    twist: Any, parameters: Sequence[torch.nn.Parameter], batches: Sequence[Paths]
) -> torch.Tensor:
    """Centred part of the gradient: the score under the law the paths were drawn from."""
    with torch.enable_grad():
        total = sum(p.centring * p.log_likelihood(twist, "base") for p in batches)
        if not (isinstance(total, torch.Tensor) and total.requires_grad):
            return torch.zeros(())
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
    filled = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
    ]
    return parameters_to_vector(filled)
