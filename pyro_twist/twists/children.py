# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""A proposal for masked models: the best of several children that cost one evaluation together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_twist.rewards.tilted import log_potential
from pyro_twist.twists.lookahead import check_tilted
from pyro_twist.twists.twist import Twist

__all__ = ["ChildrenTwist"]


class ChildrenTwist(Twist):
    r"""
    Draws several children of a partly masked sequence and continues as one of them [1].

    Children come from one kernel, that is from one evaluation of the network at their parent, and
    so do the tokens that each is completed by. With :math:`u_j` the exponential of the
    log-potential of the completion of child :math:`j`, one is chosen with probability
    :math:`u_j / \sum_k u_k`, and the log-ratio of model and proposal is

    .. math::

        \log \frac{1}{M} \sum_k u_k - \log u_j

    which is exact whatever the :math:`u`. It is a proposal; add a
    :class:`~pyro_twist.twists.LookaheadTwist` for the value. In a sum it belongs at the end: its
    children are drawn from what the parts before it have made of the kernel. A particle costs
    ``num_children`` reward calls in a step; a child that is completed to the same sequence as an
    earlier one costs none if the reward keeps what it has scored.

    :param model: A tilted masked model, such as ``RewardTilted(MaskedDiffusion(...), reward)``.
    :param int num_children: The number of children, :math:`M`.
    :param float strength: Multiplies the log-potentials by which children are chosen.
    :param float floor: How many nats below the best child one of potential zero counts.
    :raises ValueError: If the model is not masked or not tilted, or an option is out of range.

    **References**

    [1] `Discrete diffusion inference-time control with nested SMC`
        Yadala Chanchu, Hany Abdulsamad, Christian A. Naesseth (2026)
    """

    def __init__(
        self, model: Any, num_children: int = 4, *, strength: float = 1.0, floor: float = 3.0
    ) -> None:
        super().__init__(model)
        check_tilted(model, "judge children by")
        if not hasattr(model, "mask_token_id"):
            raise ValueError(
                f"{type(model).__name__} has no `mask_token_id`: ChildrenTwist completes masked "
                "sequences. For other models, try NestedSMC."
            )
        if not isinstance(num_children, int) or isinstance(num_children, bool) or num_children < 1:
            raise ValueError(f"num_children={num_children!r}; give a whole number, 1 or more")
        for name, number in (("strength", strength), ("floor", floor)):
            if not isinstance(number, (int, float)) or not 0 <= number < math.inf:
                raise ValueError(f"{name}={number!r}; give a finite number, 0 or more")
        self.num_children, self.strength, self.floor = num_children, strength, floor

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The law of the chosen child."""
        if not self.stepping or not name.startswith("x_") or self.num_children == 1:
            return prior
        state = self.args_kwargs[0][0]
        children = torch.stack([prior.sample() for _ in range(self.num_children)])
        return _Chosen(prior, children, lambda draws: self._scores(state, draws))

    def _scores(self, state: Any, children: Tensor) -> Tensor:
        """By what the children of each particle are chosen, in nats."""
        scores = torch.stack([self._score(state, child) for child in children])
        best = scores.amax(0, keepdim=True)
        best = torch.where(best == -math.inf, torch.zeros_like(best), best)
        return self.strength * scores.maximum(best - self.floor)

    def _score(self, state: Any, child: Tensor) -> Tensor:
        """The log-potential of a child, completed by tokens from the evaluation at its parent."""
        uniforms = torch.rand(child.shape, dtype=torch.float64, device=child.device)
        completed = self.model.complete(state, uniforms)
        filled = torch.where(child == self.model.mask_token_id, completed, child)
        return log_potential(self.model, state, filled)


class _Chosen(dist.TorchDistribution):
    """
    One of several draws from ``base``, chosen in proportion to the exponential of its score.

    :param base: What the draws are from.
    :param Tensor draws: Of shape ``(number,) + base.shape()``.
    :param callable score: Maps draws to scores, of shape ``(number,) + base.batch_shape``.
    :param int given: How many of the first particles have the first of their draws chosen.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self, base: Any, draws: Tensor, score: Callable[[Tensor], Tensor], given: int = 0
    ) -> None:
        self.base, self._draws, self._score = base, draws, score
        scores = score(draws)
        place = torch.distributions.Categorical(logits=scores.movedim(0, -1)).sample()
        place[:given] = 0
        index = place.reshape((1, *place.shape) + (1,) * (draws.dim() - 1 - place.dim()))
        self._value = draws.gather(0, index.expand((1, *draws.shape[1:])))[0]
        mean = scores.logsumexp(0) - math.log(len(scores))
        self._log_ratio = mean - scores.gather(0, place[None])[0]
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def with_first(self, value: Tensor) -> _Chosen:
        """
        The same, given that the first particle's choice was ``value``: one of its draws is that,
        and the others are as they were.
        """
        draws = self._draws.clone()
        draws[0, :1] = value.to(draws)
        return _Chosen(self.base, draws, self._score, given=1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self._value

    def log_prob(self, value: Tensor) -> Tensor:
        """Less that of the base is known of the draw alone: minus the log-ratio."""
        return self.base.log_prob(value).double() - self._log_ratio
