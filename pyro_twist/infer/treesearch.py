# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Tree search over a masked diffusion model: a maximiser, not a sampler."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_twist.infer.particles import take_ancestors
from pyro_twist.infer.randomness import RandomStream
from pyro_twist.infer.result import SMCResult
from pyro_twist.rewards.samples import originals
from pyro_twist.rewards.tilted import log_potential
from pyro_twist.twists.completions import only
from pyro_twist.twists.lookahead import check_tilted

__all__ = ["Frontier", "SearchStep", "TreeSearch"]


@dataclass(frozen=True)
class Frontier:
    """
    Nodes of the tree, best first. Shapes begin with ``(num_nodes,)`` or
    ``(num_nodes, num_populations)``, here called the batch shape.

    :param torch.Tensor x: Partly masked sequences, of shape ``batch_shape + (length,)``.
    :param torch.Tensor proxy: The sequences that the nodes are judged by, all masks filled in.
    :param torch.Tensor score: The terminal log-potential of the proxies, float64.
    :param torch.Tensor masked_share: The share of masks that is left at the time of the last
        reveal, :math:`1 - \\alpha_t`, float64.
    :param torch.Tensor valid: Whether there is a node at all: populations may have fewer.
    """

    x: Tensor
    proxy: Tensor
    score: Tensor
    masked_share: Tensor
    valid: Tensor

    def take(self, index: Tensor) -> Frontier:
        """The nodes at ``index``, of shape ``(size,)`` or ``(size, num_populations)``."""
        return Frontier(*(take_ancestors(value, index) for value in vars(self).values()))


@dataclass(frozen=True)
class SearchStep:
    """
    What one step of the search did; the first two are summed over populations.

    :param int num_parents: The nodes that the network was evaluated at.
    :param int num_children: The different sequences that were scored.
    :param torch.Tensor best: The score of the best node kept, of shape ``()`` or
        ``(num_populations,)``.
    """

    num_parents: int
    num_children: int
    best: Tensor


class TreeSearch:
    r"""
    TReASURe [1]: a beam search over which token to reveal next, scored by arg-max completions.

    From every node of the frontier one evaluation of the network gives all that a step needs.
    *UnmaskBranch*: the next position to be revealed is drawn uniformly from the masked ones, as in
    first-hitting sampling, where of :math:`n` masks the next falls when the share of masks has
    shrunk by the factor :math:`U^{1/n}`, :math:`U` uniform; the node's children hold the
    ``branching`` most probable tokens there. *ResubstituteScore*: each child is completed by the
    most probable token of every position that is still masked, from the same evaluation, and
    scored by the model's terminal log-potential at that completion. The ``width`` best of all
    children are the next frontier.

    This is a search. The sequences found are no sample of the tilted law, there is no normaliser
    (NaN), and diversity is lost by design: all end in one tree.

    Choices that the paper leaves open: children that are equal, from parents that revealed the
    same tokens in another order, are kept once, as children of the better parent; ties go to the
    child of the better parent too, then to the more probable one; with ``group_size`` above 1 the
    children of a node are the most probable joint assignments of the positions of a group, taken
    as independent.

    Positions that the model's prompt has fixed are never changed. A model with a plate is searched
    for each of its entries separately, with ``width`` nodes each; entries with fewer free positions
    wait for the others.

    :param model: A tilted masked model, such as ``RewardTilted(MaskedDiffusion(...), reward)``. How
        many positions it reveals itself in a step does not matter here.
    :param int width: The number of nodes kept after each step, :math:`M`.
    :param int branching: The number of children of a node, :math:`K`.
    :param int group_size: The number of positions that are revealed in one step.
    :param int max_reward_calls: Ends the search before a step that might exceed this number of
        calls, one for each reward of the model and each sequence; the sequences found are scored
        once more at the end, which counts. The result then holds completions, as they were scored.
        A terminal potential that is no reward counts as one.
    :param int seed: The seed of the positions; by default they are drawn from torch's global
        stream. Nothing else is random.
    :param bool progress: Whether :meth:`run` shows a progress bar; by default on a terminal only.
    :raises ValueError: If an argument is out of range, or the model is not masked or not tilted.

    **References**

    [1] `Tree Reward-Aligned Search for TReASURe in Masked Diffusion Language Models`
        Zichao Yu, Ming Li, Wenyi Zhang, Weiguo Gao (2025), https://arxiv.org/abs/2509.23146

    Example::

        model = RewardTilted(zoo.load("text"), text_reward("sentiment"), scale=10.0)
        result = TreeSearch(model, width=4, branching=4).run()
        print(model.decode(result.best().state["x"]))
    """

    def __init__(
        self,
        model: Any,
        width: int = 4,
        branching: int = 4,
        *,
        group_size: int = 1,
        max_reward_calls: int | None = None,
        seed: int | None = None,
        progress: bool | None = None,
    ) -> None:
        given = {"width": width, "branching": branching, "group_size": group_size}
        if max_reward_calls is not None:
            given["max_reward_calls"] = max_reward_calls
        for name, number in given.items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name}={number!r}; give a whole number, 1 or more")
        _check_model(model)
        self.model = model
        self.width, self.branching, self.group_size = width, branching, group_size
        self.max_reward_calls = max_reward_calls
        self.progress = progress
        self.steps: list[SearchStep] = []
        self._num_scored = 0
        self._stream = RandomStream(seed)

    def run(self) -> SMCResult:
        """
        Searches.

        :returns: The nodes found, best first, as a result whose ``kind`` is ``"maximiser"``: their
            ``state`` is what the model writes at its last step, and ``log_potential``, their
            scores.
        :rtype: SMCResult
        """
        start, before = time.perf_counter(), Counter(self._model_counts())
        self.steps, self._num_scored = [], 0
        self._stream.restart()
        with self._stream(), torch.no_grad(), poutine.block():
            frontier = self._search(before)
            state = self._ended(frontier)
        spent = Counter(self._model_counts())
        spent.subtract(before)
        return SMCResult(
            state={**state, "log_potential": frontier.score},
            log_weights=torch.where(frontier.valid, 0.0, -torch.inf).double(),
            log_normalizer=torch.full(frontier.score.shape[1:], torch.nan, dtype=torch.float64),
            counts=dict(spent),
            seconds=time.perf_counter() - start,
            kind="maximiser",
        )

    def _search(self, before: Mapping[str, int]) -> Frontier:
        from tqdm import tqdm

        frontier = self._root()
        total = math.ceil(int(self._masked(frontier.x).sum(-1).max()) / self.group_size)
        disable = None if self.progress is None else not self.progress
        with tqdm(total=total, disable=disable, desc=type(self).__name__) as bar:
            while self._masked(frontier.x).any() and self._affordable(frontier, before):
                frontier = self._best(self.branch(frontier), int(frontier.valid.sum()))
                bar.set_postfix_str(f"best {self.steps[-1].best.mean():.3f}", refresh=False)
                bar.update()
        return self._distinct(frontier)

    # the tree

    def _root(self) -> Frontier:
        """The prompt alone; its score is never used."""
        x = self.model.initial().expand(self._batch_shape(1)).sample()
        score = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
        return Frontier(x, x, score, torch.ones_like(score), torch.ones_like(score).bool())

    def branch(self, frontier: Frontier) -> Frontier:
        """
        The children of all nodes, with their scores: one evaluation of the network for each node.

        :param Frontier frontier: The parents.
        :returns: ``branching`` times as many nodes, parent by parent, the more probable first;
            those that cannot be, or are equal to an earlier one, are not ``valid``.
        """
        kernel = self.model.kernel(self._predicted(frontier.x), self.model.timesteps[-1])
        positions, real, shrunk = self._drawn(frontier.x)
        tokens, possible = self._assignments(kernel, frontier.x, positions, real)
        x, proxy = (
            _children(sequences, positions, tokens) for sequences in (frontier.x, kernel.complete())
        )
        valid = (possible & frontier.valid[:, None]).flatten(0, 1)
        valid = valid & _first_of_equals(x, valid)
        share = (frontier.masked_share * shrunk)[:, None].expand(possible.shape).flatten(0, 1)
        # a node without masks is its own only child, with the score that it has
        known = ~self._masked(frontier.x).any(-1) & (frontier.masked_share < 1)
        score = frontier.score[:, None].expand(possible.shape).flatten(0, 1)
        ended = known[:, None].expand(possible.shape).flatten(0, 1)
        score = torch.where(ended & valid, score, self._scored(proxy, valid & ~ended))
        return Frontier(x, proxy, score, share, valid)

    def _drawn(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        The positions that each node reveals next, which of them are masked at all, and how much
        the share of masks shrinks until then.
        """
        shape = x.shape[:-1] + (x.shape[-1] + self.group_size,)
        # one tensor, so that the draws of the first nodes do not depend on how many there are
        uniforms = torch.rand(shape, dtype=torch.float64).to(x.device)
        masked = self._masked(x)
        keys = uniforms[..., : x.shape[-1]].masked_fill(~masked, 2.0)
        positions = keys.argsort(-1)[..., : self.group_size]
        real = masked.gather(-1, positions)
        number = masked.sum(-1, keepdim=True) - torch.arange(real.shape[-1], device=x.device)
        steps = uniforms[..., x.shape[-1] :][..., : real.shape[-1]].log() / number.clamp(min=1)
        return positions, real, torch.where(real, steps, 0.0).sum(-1).exp()

    def _assignments(
        self, kernel: Any, x: Tensor, positions: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        The most probable tokens at the positions, of shape ``(num_nodes, branching) + ... +
        (group_size,)``, and which of them have any probability.
        """
        log_probs, tokens = self._likeliest(kernel, x, positions, real)
        total = log_probs.new_zeros(positions.shape[:-1] + (1,))
        chosen = tokens.new_zeros(positions.shape[:-1] + (1, 0))
        for place in range(positions.shape[-1]):
            sums = (total[..., None] + log_probs[..., place, None, :]).flatten(-2)
            total, order = sums.sort(dim=-1, descending=True, stable=True)
            total, order = total[..., : self.branching], order[..., : self.branching]
            earlier = order.div(self.branching, rounding_mode="floor")
            token = tokens[..., place, :].gather(-1, order % self.branching)
            earlier = earlier[..., None].expand(earlier.shape + chosen.shape[-1:])
            chosen = torch.cat([chosen.gather(-2, earlier), token[..., None]], -1)
        return chosen.movedim(-2, 1), (total > -torch.inf).movedim(-1, 1)

    def _likeliest(
        self, kernel: Any, x: Tensor, positions: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Tokens by position, the most probable first, and their log-probabilities, of shape
        ``positions.shape + (branching,)``; where nothing is masked, the token that is there.
        """
        shape = positions.shape + (self.branching,)
        log_probs = torch.full(shape, -torch.inf, dtype=torch.float64, device=x.device)
        log_probs[..., 0] = 0.0
        tokens = x.gather(-1, positions)[..., None].expand(shape).clone()
        starts = torch.arange(x.shape[:-1].numel(), device=x.device).reshape(x.shape[:-1])
        flat = (starts[..., None] * x.shape[-1] + positions)[real]
        which = torch.searchsorted(kernel.rows, flat)
        found = [_most_probable(part, self.branching) for _, part in kernel.chunks(which)]
        log_probs[real] = torch.cat([log_probs[real][:0], *(one for one, _ in found)])
        tokens[real] = torch.cat([tokens[real][:0], *(one for _, one in found)])
        return log_probs, tokens

    def _scored(self, proxy: Tensor, valid: Tensor) -> Tensor:
        """Log-potentials of the proxies of valid nodes, minus infinity elsewhere."""
        if not valid.any():
            return torch.full(valid.shape, -torch.inf, dtype=torch.float64, device=valid.device)
        filled = only(proxy, valid)
        self._num_scored += len(filled.reshape(-1, filled.shape[-1]).unique(dim=0))
        score = log_potential(self.model, {"x": filled}, filled)
        return torch.where(valid, score, -torch.inf)

    def _best(self, children: Frontier, num_parents: int) -> Frontier:
        """The best nodes; ties go to the earlier."""
        possible = children.valid.long().argsort(dim=0, descending=True, stable=True)
        score = take_ancestors(children.score, possible)
        order = take_ancestors(possible, score.argsort(dim=0, descending=True, stable=True))
        most = int(children.valid.sum(0).max())
        kept = children.take(order[: min(self.width, most)])
        number = int(children.valid.sum())
        self.steps.append(SearchStep(num_parents, number, kept.score[0]))
        return kept

    def _distinct(self, frontier: Frontier) -> Frontier:
        """The proxies of the frontier, each once."""
        valid = frontier.valid & _first_of_equals(frontier.proxy, frontier.valid)
        order = valid.long().argsort(dim=0, descending=True, stable=True)
        found = Frontier(
            frontier.proxy, frontier.proxy, frontier.score, frontier.masked_share, valid
        )
        return found.take(order[: int(valid.sum(0).max())])

    # the model

    def _masked(self, x: Tensor) -> Tensor:
        return x == self.model.mask_token_id

    def _batch_shape(self, num_nodes: int) -> tuple[int, ...]:
        plate = getattr(self.model, "plate", None)
        return (num_nodes,) if plate is None else (num_nodes, plate[1])

    def _particles(self, num_nodes: int) -> Any:
        return pyro.plate("nodes", num_nodes, dim=-len(self._batch_shape(num_nodes)))

    def _predicted(self, x: Tensor) -> dict[str, Tensor]:
        """The state of the model at sequences: its first step, at them instead of the prompt."""
        state: dict[str, Tensor] = {}
        name = f"x_{len(self.model.timesteps)}"
        init = poutine.condition(self.model.init, data={name: x})
        with self._particles(len(x)), poutine.trace() as tracer:
            init(state)
        for latent in tracer.trace.stochastic_nodes:
            raise ValueError(
                f"the model draws {latent!r} besides its sequences; a search is over sequences "
                "alone, so condition the model on the others"
            )
        return state

    def _ended(self, frontier: Frontier) -> dict[str, Tensor]:
        """The state after the model's last step, at the sequences found."""
        t = self.model.timesteps[-1]
        state = self._predicted(frontier.x)
        step = poutine.condition(self.model.step, data={f"x_{t - 1}": frontier.x})
        with self._particles(len(frontier.x)):
            step(state, t)
        return state

    def _model_counts(self) -> dict[str, int]:
        return dict(getattr(self.model, "counts", {}))

    def _affordable(self, frontier: Frontier, before: Mapping[str, int]) -> bool:
        """Whether the next step and the end surely fit into the budget."""
        if self.max_reward_calls is None:
            return True
        masked = frontier.valid & self._masked(frontier.x).any(-1)
        # a reward of each entry is also asked where nothing is left to reveal
        next_ones = int(masked.sum()) * self.branching + int((~masked.any(0)).sum())
        least = self._num_rewards() * (next_ones + self.width * frontier.score[0].numel())
        fits = self._spent(before) + least <= self.max_reward_calls
        if not fits and not self.steps:
            raise ValueError(
                f"max_reward_calls={self.max_reward_calls} is too few for one step, which may "
                f"take {least} with what is scored at the end; give more, or a lower width"
            )
        return fits

    def _spent(self, before: Mapping[str, int]) -> int:
        """Calls of rewards so far; of other potentials, the sequences that they were asked for."""
        counts = self._model_counts()
        if "reward" not in counts:
            return self._num_scored
        return counts["reward"] - before.get("reward", 0)

    def _num_rewards(self) -> int:
        return max(1, len(getattr(self.model, "reward_names", ())))


def _check_model(model: Any) -> None:
    for name in ("mask_token_id", "kernel", "complete", "initial", "timesteps"):
        if not hasattr(model, name):
            raise ValueError(
                f"{type(model).__name__} has no `{name}`; a tree search is over sequences of a "
                "masked model, such as RewardTilted(MaskedDiffusion(...), reward)"
            )
    check_tilted(model, "search for")


def _children(sequences: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """
    Sequences with tokens put in, the children of one parent together.

    :param Tensor sequences: Of shape ``(num_nodes,) + ... + (length,)``.
    :param Tensor positions: Of shape ``(num_nodes,) + ... + (group_size,)``.
    :param Tensor tokens: Of shape ``(num_nodes, branching) + ... + (group_size,)``.
    """
    shape = tokens.shape[:-1] + sequences.shape[-1:]
    places = positions[:, None].expand(tokens.shape)
    return sequences[:, None].expand(shape).scatter(-1, places, tokens).flatten(0, 1)


def _first_of_equals(x: Tensor, valid: Tensor) -> Tensor:
    """Which valid nodes are equal to no valid one before them, in each population."""
    columns = x.reshape(len(x), -1, x.shape[-1])
    alive = valid.reshape(len(x), -1)
    kept = torch.zeros_like(alive)
    for p in range(alive.shape[1]):
        rows = alive[:, p].nonzero()[:, 0]
        first = originals(columns[rows, p])
        kept[rows[first.unique()], p] = True
    return kept.reshape(valid.shape)


def _most_probable(log_probs: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The highest log-probabilities of each row and their tokens; filled up with minus infinity."""
    kept = min(number, log_probs.shape[-1])
    found, tokens = _highest(log_probs, kept)
    found = torch.nn.functional.pad(found, (0, number - kept), value=-torch.inf)
    return found, torch.nn.functional.pad(tokens, (0, number - kept))


def _highest(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The highest of each row and their places, of equal ones the first, without sorting all."""
    found, places = values.topk(number)
    # which of equal ones are found, and in which order, is left open
    places, order = places.sort(-1)
    found, order = found.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    places = places.gather(-1, order)
    tied = (values >= found[:, -1:]).sum(-1) > number
    if tied.any():
        sorted_, all_places = values[tied].sort(dim=-1, descending=True, stable=True)
        found[tied], places[tied] = sorted_[:, :number], all_places[:, :number]
    return found, places
