# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Searches over trajectories: they maximise a look-ahead, and do not sample the tilted law.

Between selections particles move by the guide's proposals; at a selection the best go on, each as
several copies. Particles are scored by the factors of the model so far and by their twist, at the
end by the factors alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from pyro import poutine
from torch import Tensor

from pyro_twist import weights
from pyro_twist.infer.increments import Increment, sample_sites
from pyro_twist.infer.nested import check_groups, check_whole, draw_within
from pyro_twist.infer.particles import take_ancestors
from pyro_twist.infer.result import SMCResult
from pyro_twist.infer.twistedsmc import TwistedSMC
from pyro_twist.twists.lookahead import LookaheadTwist

__all__ = ["SVDD", "BeamSearch", "BlockSearch", "Search", "Selection", "Width"]

Selection = Literal["argmax", "sample"]
Width = int | tuple[int, int] | Callable[[int], int]


class Search(TwistedSMC):
    """
    What searches share: weights are scores, and the result ranks.

    A score is what the model's factors have come to so far, and the twist. How likely a proposal
    was does not enter it, so that guides that propose are not held back. A derived class says when
    to select, and who goes on.
    """

    #: How many of the final particles the result has.
    keep: int

    def __init__(
        self, model: Any, guide: Any, num_particles: int, max_plate_nesting: int, options: Any
    ) -> None:
        for name in ("ess_threshold", "resampling", "resample_at"):
            if name in options:
                raise ValueError(f"{name}={options[name]!r}: a search selects by its own rule")
        super().__init__(model, guide, num_particles, max_plate_nesting, **options)

    @abstractmethod
    def _selects(self, now: int) -> bool:
        """Whether to select at the state ``now``."""

    @abstractmethod
    def _chosen(self, score: Tensor) -> Tensor:
        """The particles that go on, as many as there are, from their scores."""

    def _propagate(self, method: str, args: Any, kwargs: Any) -> list[Increment]:
        found = super()._propagate(method, args, kwargs)
        return [increment for increment in found if increment.name in self._factors]

    def _observe(
        self, trace: poutine.Trace, before: dict[Any, Any], args: Any, kwargs: Any
    ) -> None:
        super()._observe(trace, before, args, kwargs)
        own = [(n, s) for n, s in sample_sites(trace) if not s["infer"].get("_from_guide")]
        self._factors = {name for name, site in own if site["is_observed"]}

    def _maybe_resample(self, ess: Tensor, allowed: bool) -> tuple[Tensor | None, Tensor]:
        selects = allowed and bool(self.state) and self._selects(self._time())
        flags = torch.full(ess.shape, selects, device=ess.device)
        if not selects:
            return None, flags
        if self._log_twist is None:
            raise ValueError(
                f"the guide {type(self.guide).__name__} has no log-twist at x_{self._time()}, by "
                "which a search selects there; give it a look-ahead"
            )
        index = self._chosen(self.state._log_weights)
        self._follow(index)
        score = take_ancestors(self.state._log_weights, index)
        self.state._log_weights = weights.log_normalize(score)
        return index, flags

    def _report(self, bar: Any) -> None:
        bar.update()

    def get_log_normalizer(self) -> Tensor:
        """NaN: a search estimates none."""
        return torch.full_like(self._log_normalizer, torch.nan)

    def result(self) -> SMCResult:
        """The best particles so far, best first; of weight zero where the model's factors are."""
        everything, score = super().result(), self.state._log_weights
        index = self._best(score)
        dead = take_ancestors(score, index) == -torch.inf
        equal = torch.zeros_like(score[: len(index)]).masked_fill(dead, -torch.inf)
        return replace(everything.select(index), log_weights=equal, kind="maximiser")

    def _best(self, score: Tensor) -> Tensor:
        return score.topk(self.keep, dim=0).indices


class BlockSearch(Search):
    """
    CoDe [1]: blockwise best-of-N along the trajectory. A maximiser.

    Each of ``num_particles / num_children`` samples goes through blocks of ``block_size`` steps; in
    each, ``num_children`` copies move on their own, and the one with the highest look-ahead goes
    on. With a single block this is best-of-N, with ``block_size=1`` :class:`SVDD`.

    :param object model: A tilted model, such as :class:`~pyro_twist.rewards.RewardTilted`.
    :param object guide: A twist that scores and may propose; a
        :class:`~pyro_twist.twists.LookaheadTwist` at the ends of blocks if ``None``.
    :param int num_particles: The number of copies in all, a multiple of ``num_children``.
    :param int max_plate_nesting: Bound on the number of nested plates in the model.
    :param int num_children: The number of copies of a sample.
    :param int block_size: The number of steps in a block; the last may be shorter.
    :param str selection: ``"argmax"``, or ``"sample"`` with probability proportional to the twist,
        which is not exact either: the weight of the sample is left out.
    :param options: Further options of :class:`TwistedSMC`, except for resampling.
    :raises ValueError: If an argument is out of range.

    **References**

    [1] `CoDe: Blockwise Control for Denoising Diffusion Models`
        Anuj Singh, Sayak Mukherjee, Ahmad Beirami, Hadi Jamali-Rad (2025),
        https://arxiv.org/abs/2502.00968
    """

    def __init__(
        self,
        model: Any,
        guide: Any = None,
        num_particles: int = 16,
        max_plate_nesting: int = 0,
        *,
        num_children: int = 4,
        block_size: int = 5,
        selection: Selection = "argmax",
        **options: Any,
    ) -> None:
        check_groups(num_particles, num_children)
        check_whole(block_size=block_size)
        if selection not in get_args(Selection):
            raise ValueError(f"selection={selection!r}; choose one of {get_args(Selection)}")
        self.num_children, self.block_size, self.selection = num_children, block_size, selection
        self.keep = num_particles // num_children
        #: The states at the ends of blocks, but for the last block.
        self.ends = frozenset(_timesteps(model)[block_size::block_size])
        if guide is None and self.ends:
            guide = LookaheadTwist(model, schedule=self.ends)
        super().__init__(model, guide, num_particles, max_plate_nesting, options)

    def _selects(self, now: int) -> bool:
        return now in self.ends

    def _chosen(self, score: Tensor) -> Tensor:
        return self._heirs(score).repeat_interleave(self.num_children, 0)

    def _heirs(self, score: Tensor) -> Tensor:
        """The chosen particle of each group."""
        groups = score.unflatten(0, (self.keep, self.num_children))
        place = groups.argmax(1) if self.selection == "argmax" else self._drawn(groups)
        first = torch.arange(0, self.num_particles, self.num_children, device=score.device)
        return first.reshape((-1,) + (1,) * (place.dim() - 1)) + place

    def _drawn(self, groups: Tensor) -> Tensor:
        return draw_within(groups, self._generator())

    def _best(self, score: Tensor) -> Tensor:
        heirs = self._heirs(score)
        order = take_ancestors(score, heirs).argsort(dim=0, descending=True, stable=True)
        return take_ancestors(heirs, order)


class SVDD(BlockSearch):
    """
    Soft value-based decoding [1], which selects among the children of a sample after every step.

    As in the authors' code the best child goes on, a maximiser. With ``selection="sample"`` it is
    drawn in proportion to its twist, as in the paper; that draws from no law that is known, since
    the mean of a parent's children does not enter a weight.
    :class:`~pyro_twist.infer.NestedSMC` is the same with that weight, and exact.

    :param object model: A tilted model, such as :class:`~pyro_twist.rewards.RewardTilted`.
    :param object guide: A twist that scores and may propose; a
        :class:`~pyro_twist.twists.LookaheadTwist` if ``None``.
    :param int num_particles: The number of children in all, a multiple of ``num_children``.
    :param int max_plate_nesting: Bound on the number of nested plates in the model.
    :param int num_children: The number of children of a sample.
    :param str selection: ``"argmax"`` or ``"sample"``.
    :param options: Further options of :class:`TwistedSMC`, except for resampling.

    **References**

    [1] `Derivative-Free Guidance in Continuous and Discrete Diffusion Models`
        (with Soft Value-Based Decoding)
        Xiner Li, Yulai Zhao, Chenyu Wang, Gabriele Scalia, Gokcen Eraslan, Surag Nair,
        Tommaso Biancalani, Shuiwang Ji, Aviv Regev, Sergey Levine, Masatoshi Uehara (2024),
        https://arxiv.org/abs/2408.08252
    """

    def __init__(
        self,
        model: Any,
        guide: Any = None,
        num_particles: int = 16,
        max_plate_nesting: int = 0,
        *,
        num_children: int = 4,
        selection: Selection = "argmax",
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            guide,
            num_particles,
            max_plate_nesting,
            num_children=num_children,
            block_size=1,
            selection=selection,
            **options,
        )


class BeamSearch(Search):
    """
    A beam search over trajectories, with look-ahead, as in DSearch [1]. A maximiser.

    After a step the best ``width`` of all particles go on, each as an equal number of copies (the
    better ones get what is left over), so that every step costs ``num_particles`` evaluations
    whatever the width: a narrow beam is a broad tree. The width may change with the noise.

    :param object model: A tilted model, such as :class:`~pyro_twist.rewards.RewardTilted`.
    :param object guide: A twist that scores and may propose; a
        :class:`~pyro_twist.twists.LookaheadTwist` if ``None``.
    :param int num_particles: The number of copies in all.
    :param int max_plate_nesting: Bound on the number of nested plates in the model.
    :param width: How many go on: a number, a pair for the first state and the last, between which
        it changes linearly, or a function of the time index of the state; a quarter of the
        particles if ``None``.
    :param int every: Select after every so many steps.
    :param int keep: How many to return, of each population.
    :param options: Further options of :class:`TwistedSMC`, except for resampling.
    :raises ValueError: If an argument is out of range.

    **References**

    [1] `Dynamic Search for Inference-Time Alignment in Diffusion Models`
        Xiner Li, Masatoshi Uehara, Xingyu Su, Gabriele Scalia, Tommaso Biancalani, Aviv Regev,
        Sergey Levine, Shuiwang Ji (2025), https://arxiv.org/abs/2503.02039
    """

    def __init__(
        self,
        model: Any,
        guide: Any = None,
        num_particles: int = 16,
        max_plate_nesting: int = 0,
        *,
        width: Width | None = None,
        every: int = 1,
        keep: int = 1,
        **options: Any,
    ) -> None:
        check_whole(num_particles=num_particles, every=every, keep=keep)
        if keep > num_particles:
            raise ValueError(f"keep={keep} is more than num_particles={num_particles}")
        self.keep = keep
        self.widths = _widths(width, _timesteps(model), num_particles)
        self._selected = frozenset(_timesteps(model)[::every])
        if guide is None:
            guide = LookaheadTwist(model, schedule=self._selected)
        super().__init__(model, guide, num_particles, max_plate_nesting, options)

    def _selects(self, now: int) -> bool:
        return now in self._selected

    def _chosen(self, score: Tensor) -> Tensor:
        width = self.widths[self._time()]
        best = score.topk(width, dim=0).indices
        dead = take_ancestors(score, best) == -torch.inf
        best = torch.where(dead, best[:1], best)
        copies = torch.full((width,), self.num_particles // width, device=score.device)
        copies[: self.num_particles % width] += 1
        return best.repeat_interleave(copies, 0)


def _widths(width: Width | None, timesteps: tuple[int, ...], size: int) -> dict[int, int]:
    """The width of the beam at each state."""
    if width is None:
        width = max(1, size // 4)
    found = {t: _width_at(width, t, timesteps[0]) for t in timesteps}
    for t, one in found.items():
        if not isinstance(one, int) or isinstance(one, bool) or not 1 <= one <= size:
            raise ValueError(
                f"width={width!r} is {one!r} at state {t}; give whole numbers from 1 to "
                f"num_particles={size}"
            )
    return found


def _width_at(width: Width, t: int, first: int) -> Any:
    if callable(width):
        return width(t)
    if isinstance(width, tuple) and len(width) == 2:
        start, end = width
        return round(end + (start - end) * (t - 1) / max(first - 1, 1))
    return width


def _timesteps(model: Any) -> tuple[int, ...]:
    timesteps = tuple(getattr(model, "timesteps", ()))
    if not timesteps:
        raise ValueError(
            f"{type(model).__name__} has no `timesteps`, so a search does not know its end; give "
            "it the attribute timesteps = (T, ..., 1)"
        )
    return timesteps
