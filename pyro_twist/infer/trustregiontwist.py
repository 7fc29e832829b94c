# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Trust-region iterated twisted sequential Monte Carlo: twists learnt while sampling."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from pyro import poutine
from torch.nn.utils import parameters_to_vector

from pyro_twist import weights
from pyro_twist.infer.increments import Increment, latent_sites, sample_sites
from pyro_twist.infer.particles import take_ancestors
from pyro_twist.infer.result import SMCResult
from pyro_twist.infer.trustregion import Tempering, temper, tempered
from pyro_twist.infer.twistedsmc import SMCFailed, TwistedSMC
from pyro_twist.latents import own_passes, recorded_steps, separate, upstream_entries
from pyro_twist.twists.learned import (
    LinearTwist,
    add_pass,
    entries_read,
    fit_likelihood,
    learned_parts,
    linear_part,
    log_likelihood,
    optimised_parts,
    step_statistics,
    trained_parts,
)
from pyro_twist.twists.minimise import Minimiser, OptimizerLike
from pyro_twist.twists.paths import Pass, Paths, PathStep
from pyro_twist.twists.statistics import PathSums, Quadratic, WeightedSums

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Iteration", "Recording", "TrustRegionTwist", "default_twist"]

Recording = Literal["paths", "statistics"]

_STEPS = (1.0, 0.5, 0.25, 0.1)
_FOLDS = 4

# the shares of the steps of a pass after which twists learn from it while it goes on
_WITHIN = (0.08, 0.16, 0.24, 0.36, 0.48, 0.64, 0.8)

# weighted paths, or their sums, for a fold (None is all of them) or all but that fold
_Evidence = Callable[[int | None, bool], Sequence[Paths | Quadratic]]
# by pass, weights of its final paths towards a law, and back to the law they were drawn from
_Weights = dict[int, tuple[torch.Tensor, torch.Tensor]]


def default_twist(model: Any) -> Any:
    """
    The twist that :class:`TrustRegionTwist` learns if it is given none.

    For diffusion models with a terminal potential a discounted look-ahead and a surrogate
    direction; for masked ones a discounted look-ahead and a tilt of tokens; for other models a
    quadratic twist, learnt backwards in time up to 16 dimensions.

    :param model: A model with ``timesteps``.
    :returns: A twist that is, at the start, a look-ahead or identically one.
    """
    from pyro_twist.twists import (
        BackwardTwist,
        DiscountedLookahead,
        QuadraticTwist,
        SurrogateTwist,
        TokenTilt,
    )

    if hasattr(model, "complete") and hasattr(model, "terminal"):
        return DiscountedLookahead(model) + TokenTilt(model)
    if hasattr(model, "schedule") and hasattr(model, "terminal"):
        return DiscountedLookahead(model) + SurrogateTwist(model)
    if len(model.event_shape) < 2 and torch.Size(model.event_shape).numel() <= 16:
        return BackwardTwist(model)
    return QuadraticTwist(model)


@dataclass(frozen=True)
class Iteration:
    """
    One trust-region step, averaged over populations.

    :param float tau: The tempering exponent.
    :param float kl: The divergence of the tempered law from the current one, in nats.
    :param float eta: How far along the way to the target the accepted steps have come, from 0 to 1.
    :param float ess: Effective sample size of the pass, as a share of its particles.
    :param float path_ess: The same for the weights of whole paths.
    :param float chi_square: Estimated chi-square divergence of the target from the current law.
    :param float log_normalizer: The pass's estimate.
    :param float step: The share of the fitted step that was accepted on held-out paths; 0 where
        the parameters stayed.
    """

    tau: float
    kl: float
    eta: float
    ess: float
    path_ess: float
    chi_square: float
    log_normalizer: float
    step: float


class TrustRegionTwist(TwistedSMC):
    """
    Twisted SMC that learns its twist in trust-region iterations [1]: TRI-TSMC.

    An iteration is a pass with the twist as it is, a tempered reweighting of its paths, no further
    than ``kl_budget`` nats from the law they were drawn from, and a fit of the twist to them by
    weighted maximum likelihood. Fitting evaluates neither model nor reward, and needs no gradient
    of either. A fit never changes the target: weights are exact for any twist.

    :meth:`run` makes ``num_iterations`` passes that are fitted and a last one, and returns the
    particles of all of them, weighted such that the pooled estimate of the normaliser is
    unbiased: the number of passes and their sizes are fixed before, none is dropped on its outcome,
    and what is proposed depends on the past alone.

    Parameters that are fitted by likelihood are accepted only so far as they raise that of paths
    left out of their fit. What a twist learns in its ``observe`` is not guarded; those that ship
    choose it by cross-validation. Those that can do so also between the steps of a pass, so that
    ``num_iterations=0``, a single pass with all particles, learns as well.

    :param object model: A model with ``timesteps``; see :class:`TwistedSMC`.
    :param guide: A twist, learned in part or whole; :func:`default_twist` if ``None``.
    :param int num_particles: The number of particles in each pass.
    :param int max_plate_nesting: Bound on the number of nested plates in the model.
    :param int num_iterations: The number of passes that are followed by a fit.
    :param int final_particles: The number of particles in the last pass, which follows the fits;
        ``num_particles`` if ``None``. A budget spent mostly on the last pass selects more sharply,
        one spread evenly learns more.
    :param float kl_budget: The trust region in nats; by default a quarter of
        ``log(num_particles)``, at least 0.1.
    :param centring: The share of the score under the current law that is subtracted, which has
        mean zero: a number from 0, plain maximum likelihood, to 1, or ``"ess"``, the effective
        share of paths that still follow that law.
    :param bool reuse: Whether a fit uses the paths of all passes so far, not only the last.
    :param bool within: Whether twists that can (``learns_within``) learn from a pass while it goes
        on, a few times between its steps. It changes what is proposed next, and costs no
        evaluation.
    :param bool guard: Whether to accept parameters on held-out paths only.
    :param optimizer: For families that are fitted by an optimiser, such as
        :class:`~pyro_twist.twists.NeuralTwist` or one of your own: a function of a list of
        parameters that makes a torch optimiser, such as
        ``lambda parameters: torch.optim.Adam(parameters, lr=0.01)``, or an optimiser of Pyro, such
        as ``pyro.optim.Adam({"lr": 0.01})``. Every fit starts it anew. By default L-BFGS with a
        line search, which needs no learning rate.
    :param int optimizer_steps: How often to call its ``step`` in a fit; by default once for L-BFGS,
        which iterates by itself, and 200 times for others.
    :param float stop_ess: Stop fitting (not sampling) once the trust region is inactive and the
        path weights' effective sample size is above this share.
    :param str record: What is kept of a pass until it is fitted. ``"paths"`` is every step, for
        any twist. ``"statistics"`` is a few sums along each path, for a twist with one
        :class:`~pyro_twist.twists.LinearTwist` to fit whose features stay the same; the fit is
        the same.
    :param record_device: The device to keep recorded passes on, such as ``"cpu"``; by default
        they stay where they were drawn. Fits take the likelihood step by step on the device of
        the particles; what a twist's ``observe`` does is done where the passes are.
    :param options: Further options of :class:`TwistedSMC`.
    :raises ValueError: If an argument is out of range, or ``guide`` has no part to learn, or not
        what ``record`` or ``optimizer`` asks for.

    **Memory**

    With :math:`N` particles (times populations), :math:`T` steps and values of :math:`D` entries of
    :math:`b` bytes each, a pass that is kept takes about

    - ``"paths"``: :math:`N T D b (2 + q + r)` bytes, for the value, the kernel's mean, the
      proposal's (:math:`q = 1` where the twist tilts), and :math:`r` entries of the state that
      fits read: those that the twist's ``reads`` names, all where it does not say, and, wherever
      something was resampled, those of its ``follows``;
    - ``"statistics"``: :math:`8 B (2 N K + N' K^2)` bytes, for :math:`K` parameters in each of
      :math:`B` blocks, where :math:`N' = 1` if features and scale of the kernel are the same for
      all particles, and :math:`N` otherwise; briefly twice that while resampling. The number of
      steps is in it only where every step has a block of its own.

    **References**

    [1] `Trust-Region Iterated Twisted Sequential Monte Carlo for diffusion alignment`
        Weixin Wang, Yu Yang, Wei Deng, Pan Xu (2026), https://arxiv.org/abs/2605.25123
    """

    def __init__(
        self,
        model: Any,
        guide: Any = None,
        num_particles: int = 16,
        max_plate_nesting: int = 0,
        *,
        num_iterations: int = 3,
        final_particles: int | None = None,
        kl_budget: float | None = None,
        centring: float | Literal["ess"] = "ess",
        reuse: bool = True,
        within: bool = True,
        guard: bool = True,
        optimizer: OptimizerLike = None,
        optimizer_steps: int | None = None,
        stop_ess: float = 0.95,
        record: Recording = "paths",
        record_device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        _check_size("num_particles", num_particles)
        guide = default_twist(model) if guide is None else guide
        _check_options(guide, num_iterations, kl_budget, centring)
        final_particles = num_particles if final_particles is None else final_particles
        _check_size("final_particles", final_particles)
        if not _in_range(stop_ess, 0, 1):
            raise ValueError(f"stop_ess={stop_ess!r}; give a share above 0 and at most 1")
        self._sizes = (num_particles, final_particles)
        _check_record(guide, record)
        self._minimise = _minimiser(guide, optimizer, optimizer_steps)
        if options.get("history") == "off":
            raise ValueError("history='off': fitting needs the ancestors; leave history out")
        self.num_iterations = num_iterations
        self.kl_budget = kl_budget or max(0.25 * math.log(num_particles), 0.1)
        self.centring, self.reuse, self.guard = centring, reuse, guard
        self.within = within
        self.stop_ess = stop_ess
        self.record: Recording = record
        self.record_device = _device(record_device)
        self._reads = entries_read(guide)
        self._follows = {key for part in learned_parts(guide) for key in part.follows}
        self._part = linear_part(guide) if record == "statistics" else None
        self.passes: list[Pass] = []
        self.iterations: list[Iteration] = []
        self._results: list[SMCResult] = []
        self._etas: list[float] = []
        self._tempered: list[list[Tempering]] = []
        self._folds: list[torch.Tensor] = []
        self._goal = _Goal()
        self._steps: list[list[PathStep]] = []
        self._stopped = False
        self._open = False
        self._lost: list[tuple[int, Counter[str]]] = []
        self._gap = False
        self._next_size = num_particles
        super().__init__(model, guide, num_particles, max_plate_nesting, **options)

    # passes

    def run(self, *args: Any, **kwargs: Any) -> SMCResult:
        """
        Runs all passes and fits.

        Learning starts from the twist as it is, so that a second run goes on learning. A pass in
        which every particle ends with weight zero counts as an estimate of zero, and nothing is
        learnt from it.

        :returns: The particles of all passes, pooled.
        :rtype: SMCResult
        :raises SMCFailed: If no particle of any pass has weight.
        """
        self._forget()
        self._stream.restart()
        self._arguments, self._goal = (args, kwargs), _Goal(self.num_iterations, run=True)
        return self._go_on()

    def _forget(self) -> None:
        self.passes, self._results, self.iterations, self._lost = [], [], [], []
        self._etas, self._tempered, self._folds = [], [], []
        self._stopped = False

    def fit(self, num_iterations: int | None = None, *args: Any, **kwargs: Any) -> TrustRegionTwist:
        """
        Makes passes, each followed by :meth:`update`, and none after them.

        :param int num_iterations: How many, :attr:`num_iterations` by default.
        :returns: Itself, with :attr:`iterations` to look at.
        :raises SMCFailed: If no particle of a pass has weight; the pass counts as an estimate of
            zero in :meth:`pooled`.
        """
        wanted = self.num_iterations if num_iterations is None else num_iterations
        if type(wanted) is not int or wanted < 0:
            raise ValueError(f"num_iterations={wanted!r}; give a whole number, 0 or more")
        self._arguments, self._goal = (args, kwargs), _Goal(wanted)
        self._fit_on()
        return self

    def _fit_on(self) -> None:
        args, kwargs = self._arguments
        while self._goal.fits:
            self._make_pass(args, kwargs)
            self.update()
            self._goal = replace(self._goal, fits=self._goal.fits - 1)

    def sample(self, *args: Any, **kwargs: Any) -> SMCResult:
        """One pass with the twist as it is, kept for the next :meth:`update`; its own result."""
        self._goal = _Goal()
        return self._make_pass(args, kwargs)

    def _make_pass(self, args: Any, kwargs: Any, *, final: bool = False) -> SMCResult:
        self._arguments = (args, kwargs)
        self._next_size = self._sizes[final]
        self._num_steps, self._open = -1, True
        return self._finish_pass()

    def _finish_pass(self) -> SMCResult:
        """The rest of a pass; one without weight counts as an estimate of zero."""
        try:
            self._keep_pass(super().resume())
        except SMCFailed:
            # of several populations one may have failed, and the others not
            if self.state._log_weights.dim() == 1:
                self._lost.append((self.num_particles, self._counts))
                self._open = False
            raise
        return self._results[-1]

    def resume(self) -> SMCResult:
        """
        Goes on after a failure: finishes the pass, and what :meth:`run` or :meth:`fit` had to do.
        """
        running, lost = self._goal.run, len(self._lost)
        if self._open:  # a pass that was finished must not be counted twice
            try:
                self._finish_pass()
            except SMCFailed:
                # a pass may be counted as lost, but not be replaced by another
                if len(self._lost) == lost or not running:
                    raise
        if running:
            return self._go_on()
        if self._goal.fits:
            if len(self.iterations) < len(self.passes):
                self.update()
                self._goal = replace(self._goal, fits=self._goal.fits - 1)
            self._fit_on()
        return self.pooled()

    def _go_on(self) -> SMCResult:
        args, kwargs = self._arguments
        self._update_if_due()
        while self._passes_made <= self.num_iterations:
            final = self._passes_made == self.num_iterations
            try:
                self._make_pass(args, kwargs, final=final)
            except SMCFailed:
                if self._open or (final and not self._results):
                    raise
            self._update_if_due()
        return self.pooled()

    def init(self, *args: Any, **kwargs: Any) -> None:
        """Starts a pass; see :meth:`TwistedSMC.init`."""
        self.num_particles, self._next_size = self._next_size, self._sizes[0]
        super().init(*args, **kwargs)

    @property
    def _passes_made(self) -> int:
        return len(self.passes) + len(self._lost)

    def _update_if_due(self) -> None:
        due = len(self.iterations) < len(self.passes) <= self._passes_made <= self.num_iterations
        if due and not self._stopped:
            self.update()

    def _pass_so_far(self) -> Pass:
        return Pass(
            steps=self._steps,
            ancestors=[a if a is None else a.long() for a in self._record.ancestors],
            log_path=self._memory["log_path"],
            log_base=self._memory["log_base"],
            log_terminal=self._memory["log_terminal"],
            state=dict(self.state),
            statistics=None if self._sums is None else self._sums.statistics(),
            gap=self._gap,
        )

    def _keep_pass(self, result: SMCResult) -> None:
        ess = None if result.diagnostics is None else result.diagnostics.ess
        one = replace(self._pass_so_far(), ess=ess)
        self.passes.append(one.kept(self.record_device))
        self._open = False
        self._results.append(result)
        self._etas.append(self.iterations[-1].eta if self.iterations else 0.0)
        self._folds.append(_folds(one).to(self.record_device))
        self._tempered.append(_temper_columns(one, self.kl_budget))

    @property
    def last(self) -> SMCResult:
        """
        The result of the last pass alone.

        :raises ValueError: If there is no pass yet.
        """
        if not self._results:
            raise ValueError("there is no pass yet; call run, fit or sample")
        return self._results[-1]

    def pooled(self) -> SMCResult:
        """
        The particles of all passes so far; diagnostics are those of single passes, as in
        :attr:`last`.

        Their log-weights share one scale, so that their mean is the pooled estimate of the
        normaliser; expectations are self-normalised.
        """
        if not self._results:
            raise ValueError("there is no pass yet; call run, fit or sample")
        pooled = pool(self._results)
        return self._with_lost(pooled) if self._lost else pooled

    def _with_lost(self, pooled: SMCResult) -> SMCResult:
        """Particles of weight zero are left out, but count in the mean."""
        lost = sum(size for size, _ in self._lost)
        share = len(pooled.log_weights) / (len(pooled.log_weights) + lost)
        counts = sum((spent for _, spent in self._lost), Counter(pooled.counts))
        return replace(
            pooled,
            log_weights=pooled.log_weights + math.log(share),
            log_normalizer=pooled.log_normalizer + math.log(share),
            counts=dict(counts),
        )

    def _restart_stream(self) -> None:
        """Passes follow one another on one stream."""

    def _reset(self) -> None:
        super()._reset()
        self._steps, self._gap = [], False
        self._sums: PathSums | None = None

    def _allocate(self, trace: poutine.Trace) -> None:
        super()._allocate(trace)
        for key in ("log_path", "log_base", "log_terminal"):
            self._memory[key] = torch.zeros_like(self.state._log_weights)
        if self._part is not None:
            shape, parameters = self._reducer.shape, tuple(self._part.theta.shape)
            self._sums = PathSums.empty(shape, parameters, self._reducer.device)

    def _observe(
        self, trace: poutine.Trace, before: dict[Any, Any], args: Any, kwargs: Any
    ) -> None:
        super()._observe(trace, before, args, kwargs)
        self._observed = {name for name, site in sample_sites(trace) if site["is_observed"]}
        populations = self.state._log_weights.dim() > 1
        upstream: dict[str, torch.Tensor] = {}
        steps, reads = [], self._reads
        latents = {name for name, _ in latent_sites(trace)}
        for name, site in sample_sites(trace):
            step = PathStep(
                name=name,
                args=args,
                kwargs=kwargs,
                state={**before, **upstream_entries(upstream)},
                prior=_without_inverses(site["infer"].get("prior", site["fn"])),
                posterior=_without_inverses(site["fn"]),
                value=site["value"],
                stepping=self._num_steps >= 0,
                population_axis=self.state.population_axis if populations else None,
            )
            upstream[name] = site["value"]
            if name in latents:
                steps.append(step)
        steps = recorded_steps(self.guide, steps)
        if reads is not None:
            reads += tuple(upstream_entries(upstream))
        if self._sums is not None and self._part is not None:
            for step in steps:
                found = step_statistics(self.guide, self._part, step)
                self._sums = self._sums if found is None else self._sums + found
        else:
            self._pending = [step.kept(reads, self.record_device) for step in steps]

    def _reweight(
        self, increments: list[Increment], log_twist: Any, method: str, args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        returned = super()._reweight(increments, log_twist, method, args)
        zero = torch.zeros_like(self.state._log_weights)
        path = sum((i.value for i in increments), start=zero)
        terminal = sum((i.value for i in increments if i.name in self._observed), start=zero)
        self._memory["log_path"] = self._memory["log_path"] + path
        self._memory["log_terminal"] = self._memory["log_terminal"] + terminal
        if self.record == "paths":
            after = {key: self.state[key] for key in self._follows if key in self.state}
            device = self.record_device
            self._pending = [step.followed(terminal, after, device) for step in self._pending]
        return returned

    def _move(self, method: str, args: Any, kwargs: Any, *, resample: bool = True) -> None:
        super()._move(method, args, kwargs, resample=resample)
        # only now: a step that fails is taken again
        if self.record == "paths":
            self._steps.append(self._pending)
            if self.within and self._num_steps in self._times_within():
                self._learn_within()

    def _times_within(self) -> set[int]:
        """After how many steps of a pass its twists learn from it."""
        steps = len(getattr(self.model, "timesteps", ()))
        return {math.ceil(share * steps) for share in _WITHIN} - {steps}

    def _learn_within(self) -> None:
        # weights are exact whatever is proposed next, as long as it depends on the past alone
        parts = [part for part in learned_parts(self.guide) if part.learns_within]
        if parts and not self._stopped:
            passes = [*self.passes, self._pass_so_far().kept(self.record_device)]
            for part in parts:
                part.observe(own_passes(self.guide, part, passes))

    def _resample(self, index: torch.Tensor, chosen: torch.Tensor) -> None:
        # offspring number N p_a on average, so each stands for 1 / (N p_a) of its ancestor's law
        offspring = self.state._log_weights + math.log(self.num_particles)
        self._memory["log_base"] = self._memory["log_base"] - torch.where(chosen, offspring, 0.0)
        self._gap = self._gap or bool(((offspring == -math.inf) & chosen).any())
        super()._resample(index, chosen)
        if self._sums is not None:
            self._sums = self._sums.take(lambda value: take_ancestors(value, index))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        sums = self._sums
        try:
            with super()._transaction():
                yield
        except BaseException:
            self._sums = sums
            raise

    # fitting

    def update(self) -> Iteration:
        """
        One trust-region step of the twist's parameters, from the passes so far.

        :returns: What happened; also the last of :attr:`iterations`.
        :rtype: Iteration
        :raises ValueError: If there is no pass to learn from.
        """
        if not self.passes:
            raise ValueError("there is no pass to learn from; call sample, fit or run")
        columns, tau = self._tempered[-1], self._tempered[-1][0].tau
        here = self._etas[-1]
        ahead = here + (1 - here) * tau
        for part in learned_parts(self.guide):
            part.observe(own_passes(self.guide, part, self.passes))
        step = self._fit(ahead)
        self.iterations.append(self._report_iteration(columns, here, tau, step))
        # after resampling, paths may be alike because they share ancestors
        resampled = any(index is not None for index in self.passes[-1].ancestors)
        path_ess = self.iterations[-1].path_ess
        self._stopped = tau == 1.0 and path_ess > self.stop_ess and not resampled
        return self.iterations[-1]

    def _report_iteration(
        self, columns: Sequence[Tempering], here: float, tau: float, step: float
    ) -> Iteration:
        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        result = self._results[-1]
        return Iteration(
            tau=tau,
            kl=mean([c.kl for c in columns]),
            eta=here + (1 - here) * tau * step,
            ess=float(result.get_ESS().mean()) / result.num_particles,
            path_ess=mean([1 / (1 + c.chi_square) for c in columns]),
            chi_square=mean([c.chi_square for c in columns]),
            log_normalizer=float(result.log_normalizer.mean()),
            step=step,
        )

    def _fit(self, ahead: float) -> float:
        """Fits to the law ``ahead`` on the way to the target; returns the accepted step."""
        parameters = [p for p in self.guide.parameters() if p.requires_grad]
        if not parameters:
            return 1.0
        old = parameters_to_vector(parameters).detach().clone()
        evidence = self._evidence(ahead)
        step = self._accepted(evidence, parameters, old) if self.guard else 1.0
        if step:
            _fitted(self.guide, parameters, old, evidence(None, True), self._minimise)
            new = parameters_to_vector(parameters).detach().clone()
            _assign(self.guide, parameters, old + step * (new - old))
        return step

    def _accepted(self, evidence: _Evidence, parameters: Any, old: torch.Tensor) -> float:
        """The step that raises the likelihood of held-out paths most; 0 if none does."""
        gains = dict.fromkeys(_STEPS, 0.0)
        for fold in range(_FOLDS):
            held_out = evidence(fold, True)
            _assign(self.guide, parameters, old)
            before = log_likelihood(self.guide, held_out)
            _fitted(self.guide, parameters, old, evidence(fold, False), self._minimise)
            new = parameters_to_vector(parameters).detach().clone()
            for step in _STEPS:
                _assign(self.guide, parameters, old + step * (new - old))
                gains[step] += log_likelihood(self.guide, held_out) - before
        _assign(self.guide, parameters, old)
        best = max(_STEPS, key=gains.__getitem__)
        return best if gains[best] > 0 else 0.0

    def _evidence(self, ahead: float) -> _Evidence:
        """Paths weighted towards the law ``ahead``, or what a linear fit needs of them."""
        part = linear_part(self.guide)
        if part is None:
            return lambda fold, keep: self._batches(ahead, fold, keep=keep)
        sets: list[tuple[int | None, bool]] = [(None, True)]
        if self.guard:
            sets += [(fold, keep) for fold in range(_FOLDS) for keep in (True, False)]
        sums = self._weighted_sums(part, [self._weights(ahead, *one) for one in sets])
        return lambda fold, keep: [sums[sets.index((fold, keep))]]

    def _weighted_sums(self, part: LinearTwist, sets: Sequence[_Weights]) -> WeightedSums:
        """The sums over the paths of all passes, for several sets of weights at once."""
        sums = WeightedSums(len(sets), part.theta)
        for k in sets[0]:
            towards = torch.stack([one[k][0] for one in sets])
            base = self._centring_of(k) * torch.stack([one[k][1] for one in sets])
            add_pass(sums, self.guide, part, self.passes[k], towards, base)
        return sums

    def _batches(self, ahead: float, fold: int | None = None, *, keep: bool = True) -> list[Paths]:
        """Paths weighted towards the law ``ahead``: all, those of a fold, or all but those."""
        return [
            self.passes[k].paths(towards, base, self._centring_of(k))
            for k, (towards, base) in self._weights(ahead, fold, keep).items()
        ]

    def _weights(self, ahead: float, fold: int | None, keep: bool) -> _Weights:
        """Weights of final paths towards the law ``ahead`` and back, by pass."""
        latest = len(self.passes) - 1
        found = {}
        for k in range(0 if self.reuse else latest, latest + 1):
            chosen = _in_fold(self._folds[k], fold, keep)
            found[k] = _weighted(self.passes[k], self._tau_towards(ahead, k), chosen)
        total = max(sum(size for *_, size in found.values()), 1e-300)
        return {
            k: (size / total * towards, size / total * base)
            for k, (towards, base, size) in found.items()
        }

    def _tau_towards(self, ahead: float, k: int) -> float:
        """How far to temper a pass towards the law ``ahead``, inside its own trust region."""
        here, own = self._etas[k], self._tempered[k][0].tau
        return own if here >= 1 else min(own, (ahead - here) / (1 - here))

    def _centring_of(self, k: int) -> float:
        one = self.passes[k]
        # dead paths that were resampled away leave a gap that the base weights cannot fill
        if one.gap:
            return 0.0
        if self.centring == "ess":
            size = one.log_base.shape[0]
            return float(weights.effective_sample_size(one.log_base).mean()) / size
        return float(self.centring)

    # reading

    def state_dict(self) -> dict[str, Any]:
        """
        Refused: recorded paths hold distributions, which cannot be saved safely.

        :raises ValueError: Always; says what to save instead.
        """
        raise ValueError(
            "TrustRegionTwist cannot be saved in the middle of a pass; save the fitted twist "
            "with guide.save(path) and run it with TwistedSMC, which can"
        )

    def plot(self) -> Figure:
        """
        Draws the iterations: tempering, effective sample sizes, estimates and accepted steps.

        :returns: A matplotlib figure.
        """
        from pyro_twist.infer.plots import plot_iterations

        log_normalizers = [float(one.log_normalizer.mean()) for one in self._results]
        return plot_iterations(self.iterations, log_normalizers=log_normalizers)

    def table(self) -> str:
        """The iterations as a table of text, one line each."""
        names = list(Iteration.__dataclass_fields__)
        rows = [[f"{getattr(one, name):.3g}" for name in names] for one in self.iterations]
        widths = [max(len(row[i]) for row in [names, *rows]) for i in range(len(names))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in [names, *rows]
        ]
        return "\n".join(lines)


def pool(results: Sequence[SMCResult]) -> SMCResult:
    """
    Concatenates the particles of independent or adaptive passes of one model.

    :param list results: Results whose number and sizes were fixed beforehand.
    :returns: A result with all particles; its normaliser is the mean of theirs, weighted by size.
    :rtype: SMCResult
    """
    last = results[-1]
    if len(results) == 1:
        return last
    log_weights = torch.cat([one.log_weights for one in results])
    keys = [key for key in last.state if all(key in one.state for one in results)]
    state = {key: torch.cat([one.state[key] for one in results]) for key in keys}
    counts: Counter[str] = Counter()
    for one in results:
        counts.update(one.counts)
    samples = None
    if last.samples is not None and all(one.samples is not None for one in results):
        paths = [dict(one.samples or {}) for one in results]
        samples = {name: torch.cat([path[name] for path in paths]) for name in paths[-1]}
    return replace(
        last,
        state=state,
        log_weights=log_weights,
        log_normalizer=weights.log_mean_exp(log_weights),
        counts=dict(counts),
        seconds=sum(one.seconds for one in results),
        samples=samples,
        diagnostics=None,
    )


@dataclass(frozen=True)
class _Goal:
    """What is left to do: fits, and whether a run is to end with a pass after them."""

    fits: int = 0
    run: bool = False


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}; give a whole number, 1 or more")


def _check_options(guide: Any, num_iterations: int, kl_budget: Any, centring: Any) -> None:
    if not learned_parts(guide):
        raise ValueError(
            f"guide={type(guide).__name__} has no part to learn; use TwistedSMC for fixed guides, "
            "or a LearnedTwist such as SurrogateTwist or ShiftTwist"
        )
    if type(num_iterations) is not int or num_iterations < 0:
        raise ValueError(f"num_iterations={num_iterations!r}; give a whole number, 0 or more")
    if kl_budget is not None and not _in_range(kl_budget, 0, math.inf):
        raise ValueError(f"kl_budget={kl_budget!r}; give a positive number of nats")
    if centring != "ess" and centring != 0 and not _in_range(centring, 0, 1):
        raise ValueError(f"centring={centring!r}; give 'ess' or a number from 0 to 1")


def _in_range(value: Any, low: float, high: float) -> bool:
    """Whether it is a number above one bound and not above the other."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low < value <= high


def _check_record(guide: Any, record: str) -> None:
    if record not in get_args(Recording):
        raise ValueError(f"record={record!r}; choose one of {get_args(Recording)}")
    if record == "paths":
        return
    for part in learned_parts(guide):
        if part.needs_paths:
            raise ValueError(
                f"record='statistics' keeps no paths, but {type(part).__name__} learns from them; "
                "use record='paths', or a LinearTwist whose features stay the same"
            )
    trained = [type(part).__name__ for part in trained_parts(guide)]
    if len(trained) != 1:
        raise ValueError(
            f"record='statistics' fits one LinearTwist, but the guide has {len(trained)} with "
            f"parameters to fit ({', '.join(trained) or 'none'}). Use record='paths', or one "
            "LinearTwist with all features."
        )


def _minimiser(guide: Any, optimizer: Any, steps: Any) -> Minimiser:
    minimise = Minimiser(optimizer, steps)
    if minimise != Minimiser() and not optimised_parts(guide):
        parts = ", ".join(type(part).__name__ for part in learned_parts(guide))
        raise ValueError(
            f"optimizer={optimizer!r}, optimizer_steps={steps!r}: no part of the guide ({parts}) "
            "is fitted by an optimiser, since all have a fit of their own; leave them out"
        )
    return minimise


def _device(given: torch.device | str | None) -> torch.device | None:
    try:
        return None if given is None else torch.device(given)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"record_device={given!r} is no device ({reason}); try 'cpu'") from None


def _temper_columns(one: Pass, kl_budget: float) -> list[Tempering]:
    """The trust-region step of the population that allows least, taken by every population."""
    size = one.log_path.shape[0]
    columns = zip(one.log_path.reshape(size, -1).T, one.log_base.reshape(size, -1).T, strict=True)
    pairs = list(columns)
    tau = min(temper(*pair, kl_budget).tau for pair in pairs)
    return [tempered(tau, *pair) for pair in pairs]


def _folds(one: Pass) -> torch.Tensor:
    """
    To which of the folds each final path belongs, shaped like the weights.

    Paths that share an ancestor share most of their steps, and a fold with one of them would know
    the others: they are told apart by their first ancestors, or as early as there are two.
    """
    size = one.log_path.shape[0]
    lineages = [lineage.reshape(size, -1) for lineage in one.lineages()]
    columns = torch.arange(one.log_path[0].numel())
    return torch.stack([_told_apart(lineages, int(j)) for j in columns], 1).reshape(
        one.log_path.shape
    )


def _told_apart(lineages: Sequence[torch.Tensor], column: int) -> torch.Tensor:
    for lineage in lineages:
        labels, index = lineage[:, column].unique(return_inverse=True)
        if len(labels) > 1:
            return index % _FOLDS
    return torch.arange(len(lineages[-1]), device=lineages[-1].device) % _FOLDS


def _in_fold(folds: torch.Tensor, fold: int | None, keep: bool) -> torch.Tensor:
    """Whether a final path is in a fold, or, without ``keep``, in another."""
    return torch.ones_like(folds, dtype=torch.bool) if fold is None else (folds == fold) == keep


def _weighted(
    one: Pass, tau: float, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Weights of the chosen final paths tempered by ``tau``, and back; their effective size."""
    alive = torch.isfinite(one.log_path)
    log_base = torch.where(chosen, one.log_base, -math.inf)
    towards = torch.where(alive, log_base + tau * torch.where(alive, one.log_path, 0.0), -math.inf)
    ess = weights.effective_sample_size(towards)
    empty = weights.log_sum_exp(towards) == -math.inf
    share = torch.where(empty, 0.0, 1.0) / empty.numel()
    normal = torch.where(empty, -math.inf, towards - weights.log_sum_exp(towards)).exp() * share
    # dead paths count here: the score has mean zero over all paths of the law they were drawn from
    base = torch.where(empty, -math.inf, log_base - weights.log_sum_exp(log_base)).exp() * share
    return normal, base, float(ess.mean())


def _without_inverses(kernel: Any) -> Any:
    """A distribution whose transforms have forgotten their inverses, which refer back to them."""
    transforms = list(getattr(kernel, "transforms", ()))
    for one in transforms:
        one._inv = None
        transforms.extend(getattr(one, "parts", ()))
    if hasattr(kernel, "base_dist"):
        _without_inverses(kernel.base_dist)
    return kernel


def _assign(twist: Any, parameters: Any, vector: torch.Tensor) -> None:
    _put(vector, parameters)
    with torch.no_grad():
        for part in learned_parts(twist):
            part.constrain()


def _fitted(
    twist: Any,
    parameters: Any,
    start: torch.Tensor,
    batches: Sequence[Paths | Quadratic],
    minimise: Minimiser,
) -> None:
    _put(start, parameters)
    for part, some in separate(twist, batches):
        fit_likelihood(part, some, minimise=minimise)


def _put(vector: torch.Tensor, parameters: Any) -> None:
    """Copies a vector into parameters, each of which keeps its dtype."""
    with torch.no_grad():
        parts = vector.split([one.numel() for one in parameters])
        for one, part in zip(parameters, parts, strict=True):
            one.copy_(part.reshape(one.shape))
