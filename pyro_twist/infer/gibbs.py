# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Particle Gibbs: conditional sequential Monte Carlo around a path that is kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_twist import weights
from pyro_twist.infer.increments import latent_sites
from pyro_twist.infer.nested import check_whole
from pyro_twist.infer.particles import take_ancestors
from pyro_twist.infer.result import SMCResult
from pyro_twist.infer.trustregiontwist import pool
from pyro_twist.infer.twistedsmc import TwistedSMC

__all__ = ["ParticleGibbs"]


class ParticleGibbs(TwistedSMC):
    r"""
    Particle Gibbs [1]: passes that each keep one path of the pass before.

    The first pass is ordinary SMC. From its weighted paths one is drawn; the next pass is
    *conditional* SMC, in which particle 0 follows that path and is never lost; and so on. The path
    that is kept is a Markov chain whose invariant law is the tilted law of paths, for any number
    of particles from 2, and any twist: more passes make it better where more particles do not fit
    in memory. For masked diffusion this is PG-DLM [2].

    With ``ancestor_sampling`` [3] the path that is kept may, wherever particles are resampled,
    continue another particle's past, drawn in proportion to weight (twist divided out) times the
    model's density of the next value. It needs a model with ``kernel`` whose steps depend on the
    past through the state alone, and no latents beside the trajectory.

    The result has the final particles of all passes after ``burn_in``, each pass with the same
    total weight. Their scale is the estimate of the normaliser of the first pass, which alone is
    unbiased: later passes are conditioned on a path.

    :param object model: A model with ``timesteps``; see :class:`TwistedSMC`.
    :param object guide: The guide; see :class:`TwistedSMC`.
    :param int num_particles: The number of particles in a pass, 2 or more.
    :param int max_plate_nesting: Bound on the number of nested plates in the model.
    :param int num_iterations: The number of passes.
    :param int burn_in: How many of the first passes are left out of the result.
    :param bool ancestor_sampling: See above.
    :param options: Further options of :class:`TwistedSMC`. Resampling is multinomial.
    :raises ValueError: If an argument is out of range, or ancestors cannot be sampled.

    **References**

    [1] `Particle Markov chain Monte Carlo methods`
        Christophe Andrieu, Arnaud Doucet, Roman Holenstein (2010), JRSS B 72, 269-342

    [2] `Inference-Time Scaling of Diffusion Language Models via Trajectory Refinement`
        (2025), https://arxiv.org/abs/2507.08390

    [3] `Particle Gibbs with Ancestor Sampling`
        Fredrik Lindsten, Michael I. Jordan, Thomas B. Schon (2014), JMLR 15, 2145-2184
    """

    def __init__(
        self,
        model: Any,
        guide: Any = None,
        num_particles: int = 16,
        max_plate_nesting: int = 0,
        *,
        num_iterations: int = 4,
        burn_in: int = 0,
        ancestor_sampling: bool = False,
        **options: Any,
    ) -> None:
        _check(model, num_particles, num_iterations, burn_in, options)
        if ancestor_sampling:
            _check_kernel(model)
        options = {"resampling": "multinomial", **options, "history": "paths"}
        super().__init__(model, guide, num_particles, max_plate_nesting, **options)
        self.num_iterations, self.burn_in = num_iterations, burn_in
        self.ancestor_sampling = ancestor_sampling
        self._forget()

    def _forget(self) -> None:
        #: The results of the passes so far.
        self.passes: list[SMCResult] = []
        #: The values of the path that is kept, by site; empty in the first pass.
        self.kept: dict[str, Tensor] = {}

    # passes

    def run(self, *args: Any, **kwargs: Any) -> SMCResult:
        """
        Makes all passes.

        Any arguments are passed to ``init``.

        :returns: The particles of the passes, pooled.
        :rtype: SMCResult
        :raises SMCFailed: If no particle of the first pass has weight.
        """
        self._forget()
        self._stream.restart()
        self._arguments, self._num_steps = (args, kwargs), -1
        return self.resume()

    def resume(self) -> SMCResult:
        """Makes the passes that are left, after a failure or :meth:`load_state_dict`."""
        while len(self.passes) < self.num_iterations:
            result = super().resume()
            self.passes.append(result)
            self.kept = self._draw_path(result)
            self._num_steps = -1
        return self.pooled()

    def _restart_stream(self) -> None:
        """A pass goes on with the stream of the one before."""

    def pooled(self) -> SMCResult:
        """
        The particles of the passes so far, those of ``burn_in`` left out unless there are no more;
        diagnostics are those of single passes, as in :attr:`last`.

        :raises ValueError: If there is no pass yet.
        """
        if not self.passes:
            raise ValueError("there is no pass yet; call run")
        used = self.passes[self.burn_in :] or self.passes[-1:]
        scale = self.passes[0].log_normalizer
        return _joined(used, self.passes, scale)

    @property
    def last(self) -> SMCResult:
        """
        The result of the last pass alone, with its diagnostics.

        :raises ValueError: If there is no pass yet.
        """
        if not self.passes:
            raise ValueError("there is no pass yet; call run")
        return self.passes[-1]

    def _draw_path(self, result: SMCResult) -> dict[str, Tensor]:
        """One of the final paths, by its weight, of shape ``(1, ...)`` for each site."""
        drawn = self._one_of(result.get_normalized_weights())[None]
        samples = result.samples or {}
        axis = result.population_axis
        return {name: take_ancestors(value, drawn, axis) for name, value in samples.items()}

    def _one_of(self, probs: Tensor) -> Tensor:
        """A particle of each population, by its probability, of the populations' shape."""
        generator = self._generator()
        columns = probs.reshape(len(probs), -1).T.to(generator.device)
        drawn = torch.multinomial(columns, 1, generator=generator)
        return drawn.reshape(probs.shape[1:]).to(probs.device)

    # one conditional pass

    def _around_step(self) -> AbstractContextManager[Any]:
        return _Keep(self.kept)

    def _ancestors(self, chosen: Tensor) -> Tensor:
        """Multinomial ancestors, but for particle 0, whose past is that of the path kept."""
        index = super()._ancestors(chosen)
        if not self.kept:
            return index
        # the order of a scheme is not random: whoever is replaced by the path must be
        index = self._shuffled(index, chosen)
        first = self._past(chosen) if self.ancestor_sampling else torch.zeros_like(index[0])
        return torch.cat([first[None], index[1:]])

    def _shuffled(self, index: Tensor, chosen: Tensor) -> Tensor:
        """Multinomial ancestors are sorted; in random order they are independent draws."""
        generator = self._generator()
        order = torch.rand(index.shape, generator=generator, device=generator.device).argsort(dim=0)
        mixed = index.gather(0, order.to(index.device))
        return torch.where(chosen, mixed, index)

    def _past(self, chosen: Tensor) -> Tensor:
        """The ancestor of the path kept, drawn for each population that is resampled."""
        name = f"x_{self._time() - 1}"
        log_prob = self.model.kernel(self.state, self._time()).log_prob(self.kept[name])
        score = self.log_weights + self._reducer._reduce(name, log_prob)
        # a value without noise that was rounded otherwise fits no past, not even its own
        lost = score.amax(0) == -torch.inf
        score[0] = torch.where(lost, torch.zeros_like(score[0]), score[0])
        return torch.where(chosen, self._one_of(score.softmax(0)), 0)

    def _observe(
        self, trace: poutine.Trace, before: dict[Any, Any], args: Any, kwargs: Any
    ) -> None:
        super()._observe(trace, before, args, kwargs)
        if self.ancestor_sampling:
            _check_trajectory(trace)

    # going on later

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here, fit for ``torch.save``."""
        passes = {"passes": list(self.passes), "kept": dict(self.kept)}
        return {**super().state_dict(), **passes}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; see :meth:`TwistedSMC.load_state_dict`."""
        super().load_state_dict(saved)
        self.passes, self.kept = list(saved["passes"]), dict(saved["kept"])


class _Keep(Messenger):
    """Gives particle 0 the values of a path; the others draw from what the guide proposes."""

    def __init__(self, path: dict[str, Tensor]) -> None:
        super().__init__()
        self.path = path

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or msg["name"] not in self.path:
            return
        kept = self.path[msg["name"]]
        if hasattr(msg["fn"], "with_first"):  # a proposal with draws of its own
            msg["fn"] = msg["fn"].with_first(kept)
        drawn = msg["fn"](*msg["args"], **msg["kwargs"])
        msg["value"] = torch.cat([kept.to(drawn), drawn[1:]])


def _joined(used: Sequence[SMCResult], every: Sequence[SMCResult], scale: Tensor) -> SMCResult:
    """The particles of some passes, each pass with the same total weight; the costs of all."""
    counts = sum((Counter(one.counts) for one in every), Counter())
    whole = pool([_rescaled(one, scale) for one in used])
    return replace(whole, counts=dict(counts), seconds=sum(one.seconds for one in every))


def _rescaled(one: SMCResult, scale: Tensor) -> SMCResult:
    """The same particles, with weights whose mean is the given normaliser."""
    log_weights = weights.log_normalize(one.log_weights) + scale + math.log(one.num_particles)
    return replace(one, log_weights=log_weights, log_normalizer=scale)


def _check(
    model: Any, num_particles: int, num_iterations: int, burn_in: int, options: dict[str, Any]
) -> None:
    if not isinstance(num_particles, int) or num_particles < 2:
        raise ValueError(
            f"num_particles={num_particles!r}; give 2 or more: one of them follows the path kept"
        )
    check_whole(num_iterations=num_iterations)
    if not isinstance(burn_in, int) or not 0 <= burn_in < num_iterations:
        raise ValueError(f"burn_in={burn_in!r}; give a number from 0 to {num_iterations - 1}")
    if options.get("resampling", "multinomial") not in ("multinomial", "none"):
        raise ValueError(
            f"resampling={options['resampling']!r}: particle Gibbs resamples the others given one "
            "that stays, which is known here for 'multinomial' only"
        )
    if options.get("history", "paths") != "paths":
        raise ValueError("particle Gibbs keeps paths; leave history out")


def _check_trajectory(trace: poutine.Trace) -> None:
    """Refuses latents beside the trajectory: the kernel is then not all that follows."""
    for name, _ in latent_sites(trace, given=True):
        if not (name.startswith("x_") and name[2:].isdigit()):
            raise ValueError(
                f"the model draws {name!r} beside its trajectory, on which what follows depends as "
                "well; ancestor sampling weighs pasts by the next state alone. Leave "
                "ancestor_sampling out."
            )


def _check_kernel(model: Any) -> None:
    if not callable(getattr(model, "kernel", None)):
        raise ValueError(
            f"{type(model).__name__} has no method `kernel`, by which ancestor sampling weighs "
            "other pasts; give it one, or leave ancestor_sampling out"
        )
