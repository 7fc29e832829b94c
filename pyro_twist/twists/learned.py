# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Twists with parameters, fitted by weighted maximum likelihood on recorded paths.

A family of one's own needs ``get_posterior`` with parameters in it and nothing else; the fit is
then done by an optimiser. :class:`LinearTwist` is for families that are linear in their
parameters: it asks for the features, and the fit is one linear solve.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pyro_twist.twists.paths import Pass, Paths, PathStep
from pyro_twist.twists.tilting import tilt
from pyro_twist.twists.twist import SumTwist, Twist

__all__ = ["LearnedTwist", "LinearTwist", "fit_likelihood", "learned_parts"]


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

    def observe(self, passes: Sequence[Pass]) -> None:
        """
        Learns from finished passes what is not learnt by likelihood; called before each fit.

        :param list passes: All passes so far, the latest last.
        """

    def penalty(self) -> torch.Tensor:
        """
        Subtracted from the weighted log-likelihood of a path, in nats; differentiable.
        """
        return torch.zeros((), dtype=torch.float64)

    def constrain(self) -> None:
        """Puts the parameters back into their range after a fit."""

    def save(self, path: str | Path) -> None:
        """
        Writes parameters and buffers.

        :param path: A ``.safetensors`` file.
        """
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in self.state_dict().items()}, path)

    def load(self, path: str | Path) -> LearnedTwist:
        """
        Reads what :meth:`save` wrote, into a twist made with the same arguments.

        :param path: A ``.safetensors`` file.
        :returns: The twist itself.
        """
        from safetensors.torch import load_file

        self.load_state_dict(load_file(path))
        return self


class LinearTwist(LearnedTwist):
    """
    Base class of tilts that are linear in their parameters, :math:`\\eta = \\sum_k \\theta_k f_k`.

    A derived class overrides :meth:`features` and, where different steps have parameters of their
    own, :meth:`block`. Sites must be normally distributed.

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

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The prior, tilted by the weighted sum of the features."""
        theta = self.theta[self.block()]
        if not torch.is_grad_enabled() and not theta.any():
            return prior
        features = self.features(name, prior)
        if features is None:
            return prior
        return tilt(prior, torch.tensordot(theta.to(features.dtype), features, dims=1))

    def solve(self, batches: Sequence[Paths]) -> torch.Tensor:
        """
        The parameters of highest weighted likelihood, in closed form.

        :param list batches: Weighted paths.
        :returns: Of shape ``(num_blocks, num_parameters)``.
        :rtype: torch.Tensor
        """
        blocks, size = self.theta.shape
        information = self.ridge * torch.eye(size, dtype=torch.float64).repeat(blocks, 1, 1)
        score = self.ridge * self.prior_mean.double().clone()
        for paths in batches:
            for step in paths:
                self._add_terms(step, paths.centring, information, score)
        return torch.linalg.lstsq(information, score[..., None]).solution[..., 0]

    def _add_terms(
        self, step: PathStep, centring: float, information: torch.Tensor, score: torch.Tensor
    ) -> None:
        """Adds the weighted information and score of one step to those of its block."""
        self.args_kwargs, self.stepping = ((step.state, *step.args), step.kwargs), step.stepping
        features = self.features(step.name, step.prior)
        if features is None or not is_normal(step.prior):
            return
        assert step.weights is not None and step.base is not None
        loc, scale = loc_scale(step.prior)
        rows = (step.weights.numel(), -1)
        flat = features.double().expand(features.shape[:1] + loc.shape)
        flat = flat.reshape(features.shape[0], *rows)
        variance = scale.double().square().expand(loc.shape).reshape(rows)
        moved = (step.value.double() - loc.double()).reshape(rows)
        noise = (step.value.double() - loc_scale(step.posterior)[0].double()).reshape(rows)
        weights, base = step.weights.reshape(-1, 1), step.base.reshape(-1, 1)
        block = self.block()
        spread = (flat * (variance * weights)).reshape(len(flat), -1)
        information[block] += spread @ flat.reshape(len(flat), -1).T
        score[block] += (flat * (weights * moved - centring * base * noise)).sum((1, 2))


def is_normal(prior: Any) -> bool:
    """Whether a distribution is normal, independent over its event dims."""
    base = prior.base_dist if isinstance(prior, torch.distributions.Independent) else prior
    return isinstance(base, torch.distributions.Normal)


def loc_scale(prior: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of a normal distribution."""
    base = prior.base_dist if isinstance(prior, torch.distributions.Independent) else prior
    return base.loc, base.scale


def learned_parts(twist: Any) -> list[LearnedTwist]:
    """The learned twists that a twist is a sum of."""
    if isinstance(twist, SumTwist):
        return [part for one in twist.parts() for part in learned_parts(one)]
    return [twist] if isinstance(twist, LearnedTwist) else []


def fit_likelihood(twist: Any, batches: Sequence[Paths], *, max_iterations: int = 60) -> None:
    """
    Moves the parameters of a twist to the highest weighted likelihood of whole paths.

    Neither model nor reward is evaluated. A single linear part is solved for; everything else is
    left to L-BFGS.

    :param Twist twist: The twist, changed in place.
    :param list batches: Weighted paths.
    :param int max_iterations: Of the optimiser.
    """
    parts = learned_parts(twist)
    trained = [part for part in parts if any(True for _ in part.parameters())]
    if len(trained) == 1 and isinstance(trained[0], LinearTwist):
        with torch.no_grad():
            trained[0].theta.copy_(trained[0].solve(batches))
    elif trained:
        _optimise(twist, trained, batches, max_iterations)
    for part in trained:
        with torch.no_grad():
            part.constrain()


def _optimise(
    twist: Any, parts: Sequence[LearnedTwist], batches: Sequence[Paths], max_iterations: int
) -> None:
    parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
    start = parameters_to_vector(parameters).detach().clone()
    offset = _base_score(twist, parameters, batches)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=max_iterations, line_search_fn="strong_wolfe", history_size=20
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        likelihood = sum(paths.log_likelihood(twist) for paths in batches)
        penalty = sum(part.penalty() for part in parts)
        moved = parameters_to_vector(parameters) - start
        loss = penalty - likelihood + (offset * moved).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
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
