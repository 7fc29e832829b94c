# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Runs every method on one tilted model, with one budget."""

from __future__ import annotations

import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_twist.align.domains import Domain, find_domain
from pyro_twist.align.folder import prepare_folder
from pyro_twist.align.methods import Method, Setting, find_methods
from pyro_twist.align.options import AlignOptions, OptionError, unknown
from pyro_twist.align.outcome import Arm, Outcome, Strength, as_matrix, score_arm, sum_of
from pyro_twist.align.told import told
from pyro_twist.align.userrewards import make_rewards
from pyro_twist.infer import RESAMPLING, ImportanceSampling, SMCFailed, SMCResult
from pyro_twist.rewards import Reward, RewardTilted
from pyro_twist.twists.learned import learned_parts

__all__ = ["AlignmentFailed", "Progress", "ScoredModel", "run", "tilted_model"]

# The first batch of samples that lambda is measured on is what the base arm draws by default, which
# is then used; lambda depends neither on --seed nor on --particles.
PILOT_BATCH = 16
RESERVED = (
    "hidden",
    "log_potential",
    "logits",
    "lookahead",
    "lookahead_log_twist",
    "objective",
    "ranking",
)


class AlignmentFailed(RuntimeError):
    """
    The job ended early.

    :param str message: Why, in one sentence.
    :param Outcome outcome: What had finished before.
    """

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


class Progress:
    """What the job tells while it runs; subclass it to show that."""

    def begin(self, title: str, total: int) -> None:
        """A method begins that is to evaluate the denoiser ``total`` times."""

    def advance(self, done: int, ess: float, log_normalizer: float) -> None:
        """
        The denoiser has been evaluated ``done`` times; the others are means over classes, the last
        NaN for methods that estimate no normaliser.
        """

    def end(self) -> None:
        """The method has ended, or failed."""


class ScoredModel(RewardTilted):
    """
    A tilted model that ends with the sum of the scaled rewards in ``state["objective"]``, and what
    to rank by in ``state["ranking"]``: the same or, if every scale is zero, the rewards themselves.

    :param model: As for :class:`~pyro_twist.rewards.RewardTilted`, and so are ``reward``,
        ``scale`` and the options.
    """

    def __init__(self, model: Any, reward: Any, scale: Any = 1.0, **options: Any) -> None:
        super().__init__(model, reward, scale, **options)
        self.on_step: Callable[[], None] | None = None

    def step(self, state: Any, t: int, *args: Any, **kwargs: Any) -> None:
        """See :meth:`~pyro_twist.rewards.Tilted.step`."""
        super().step(state, t, *args, **kwargs)
        if t == self.timesteps[-1]:
            values = {name: state[name] for name in self.rewards}
            state["objective"] = objective(values, self.scales)
            switched_off = not any(self.scales.values())
            state["ranking"] = sum_of(values) if switched_off else state["objective"]
        if self.on_step is not None:
            self.on_step()


def objective(values: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """The sum of the scaled rewards; a scale of 0 switches a reward off, even minus infinity."""
    terms = [scales[name] * value for name, value in values.items() if scales[name] != 0]
    zero = torch.zeros_like(next(iter(values.values())))
    return sum(terms, start=zero)


def run(
    options: AlignOptions,
    *,
    progress: Progress | None = None,
    save: bool = True,
    domain: Domain | None = None,
    told_out: Path | None = None,
    begun: Callable[[], Any] | None = None,
) -> Outcome:
    """
    Runs the job.

    :param AlignOptions options: What to do.
    :param Progress progress: Is told how far the job is.
    :param bool save: Whether to write the samples and figures of each method to ``options.out``
        as soon as it has finished.
    :param Domain domain: The model and its surroundings, if they are at hand: several jobs then
        share what is loaded. By default that of ``options.model``.
    :param ~pathlib.Path told_out: The ``--out`` of the command that does the same, where it is not
        ``options.out``.
    :param callable begun: Is called when the options have been found to be possible, before
        anything is computed or replaced.
    :returns: What was found; :func:`~pyro_twist.align.write_report` makes pictures of it.
    :raises OptionError: If an option cannot be, before anything is computed.
    :raises AlignmentFailed: If a reward fails half-way; it has what was found before.
    """
    job = _Job(options, progress or Progress(), save, domain)
    if told_out is not None:
        job.outcome.command = replace(job.options, out=told_out).command()
    if begun is not None:
        begun()
    if save:
        prepare_folder(options.out)
    return job.run()


def tilted_model(options: AlignOptions) -> RewardTilted:
    """
    The model that the methods of a job sample, for runs of one's own, such as with a saved twist.

    Without ``scales``, lambda is what the job would derive from ``strengths``, on samples drawn for
    that.

    :param AlignOptions options: Of the job; those of methods are not used.
    :returns: The model, tilted by the rewards; its ``scales`` are lambda.
    :raises OptionError: If an option cannot be.
    """
    job = _Job(options, Progress(), False)
    job.outcome.strengths = job._strengths()
    return job._tilted(job._scales())


class _Job:
    def __init__(
        self, options: AlignOptions, progress: Progress, save: bool, domain: Domain | None = None
    ) -> None:
        self.progress, self.save = progress, save
        self.methods = find_methods(options.methods)
        if options.resampling not in (*RESAMPLING, "none"):
            raise unknown("resampling scheme", options.resampling, [*RESAMPLING, "none"])
        self.domain = (domain or find_domain(options.model)).prepared(options)
        options = replace(options, rewards=options.rewards or (self.domain.default_reward,))
        self.options = options
        self.indices = _class_indices(self.domain, options)
        self.rewards = make_rewards(self.domain, options.rewards)
        _check_names(self.rewards)
        self.model = self.domain.load(self.indices, options)
        names = tuple(self.domain.classes[i] for i in self.indices) or ("",)
        self.tilting = self.domain.tilting(options)
        tilted = self._tilted(0.0)
        _check_methods(self.methods, tilted, self.domain)
        steps, facts = len(self.model.timesteps), self.domain.facts(options, self.model)
        self.outcome = Outcome(options, self.domain, names, self.indices, steps, facts)
        self.outcome.command = options.command()
        self.outcome.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.doing = ""

    @property
    def has_plate(self) -> bool:
        return len(self.indices) > 1

    def run(self) -> Outcome:
        start = time.perf_counter()
        self._write()
        try:
            for method in sorted(self.methods, key=lambda method: method.tilted):
                if method.tilted and not self.outcome.strengths:
                    self.outcome.strengths = self._strengths()
                self._attempt(method)
        except ValueError as error:
            self.outcome.error = told(error, self.doing)
        except KeyboardInterrupt:
            self.outcome.error = "interrupted"
        self.outcome.seconds = time.perf_counter() - start
        self._finish()
        if self.outcome.error:
            raise AlignmentFailed(self.outcome.error, self.outcome)
        return self.outcome

    def _finish(self) -> None:
        """Only now is the strength known to the arms that ran before it."""
        if not self.outcome.strengths and self.outcome.arms and not self.outcome.error:
            self.outcome.strengths = self._strengths()
        self.outcome.finished = True
        scales = self._scales()
        for place, arm in enumerate(self.outcome.arms):
            if not arm.method.tilted and self.outcome.strengths:
                scored = replace(arm, objective=objective(arm.rewards, scales))
                scores = score_arm(scored, self.domain, self.outcome.labels, self.indices)
                self.outcome.arms[place] = replace(scored, scores=tuple(scores))
        self._write()

    def _attempt(self, method: Method) -> None:
        try:
            arm = self._arm(method)
        except SMCFailed as error:
            self.outcome.failures[method.name] = told(error)
            return
        self.outcome.arms.append(arm)
        self._write(arm)

    def _arm(self, method: Method) -> Arm:
        self.doing = method.name
        model = self._tilted(self._scales(method.tilted))
        stream = f"{self.options.seed}/{method.stream or method.name}"
        setting = self._setting(model, stream, self.options.particles)
        weighted = method.weighted
        engine, start = method.make(setting), time.perf_counter()
        result = self._run(engine, setting, method.title, weighted)
        arm = replace(
            self._read(method, result),
            seconds=time.perf_counter() - start,
            last=getattr(engine, "last", result),
            passes=max(1, len(getattr(engine, "passes", ()))),
            twist=getattr(engine, "guide", None),
            iterations=tuple(getattr(engine, "iterations", ())),
            learned_within=_learns_within(engine),
        )
        scores = score_arm(arm, self.domain, self.outcome.labels, self.indices)
        return replace(arm, scores=tuple(scores))

    def _tilted(self, scales: Any) -> ScoredModel:
        return ScoredModel(self.model, self.rewards, scales, **self.tilting)

    def _setting(self, model: Any, stream: str, num_particles: int) -> Setting:
        return Setting(
            model=model,
            num_particles=num_particles,
            max_plate_nesting=int(self.has_plate),
            population_plate="classes" if self.has_plate else None,
            # streams of their own, so that samplers are independent of what sets lambda
            seed=zlib.crc32(stream.encode()),
            resampling=self.options.resampling,
            ess_threshold=self.options.ess_threshold,
        )

    def _run(self, engine: Any, setting: Setting, title: str, weighted: bool) -> SMCResult:
        model = setting.model
        before = model.counts["denoiser"]
        size = setting.num_particles * len(self.outcome.labels)
        self.progress.begin(title, size * len(model.timesteps))

        def on_step() -> None:
            done = model.counts["denoiser"] - before
            log_z = engine.get_log_normalizer().mean().item() if weighted else math.nan
            self.progress.advance(done, engine.get_ESS().mean().item(), log_z)

        model.on_step = on_step if hasattr(engine, "get_ESS") else None
        try:
            result: SMCResult = engine.run()
            return result
        finally:
            self.progress.end()

    def _read(self, method: Method, result: SMCResult) -> Arm:
        plate = self.has_plate
        rewards = {name: as_matrix(result.state[name], plate) for name in self.rewards}
        weights = as_matrix(result.get_normalized_weights(), plate)
        log_weights = as_matrix(result.log_weights, plate)
        if method.returns == "a maximiser":
            weights = torch.zeros_like(weights)
            weights[0] = 1.0
            log_weights = weights.log()
        return Arm(
            method=method,
            samples=as_matrix(self.domain.decoded(self.model, result.state["x"]), plate),
            rewards=rewards,
            objective=objective(rewards, self._scales(method.tilted)),
            weights=weights,
            log_weights=log_weights,
            result=result,
            last=result,
        )

    # lambda

    def _scales(self, tilted: bool = True) -> dict[str, float]:
        if not tilted or not self.outcome.strengths:
            return dict.fromkeys(self.rewards, 0.0)
        return {strength.name: strength.scale for strength in self.outcome.strengths}

    def _strengths(self) -> list[Strength]:
        names, scales = tuple(self.rewards), self.options.scales
        if scales:
            known = self.outcome.base.rewards if self.outcome.base else {}
            given = scales * len(names) if len(scales) == 1 else scales
            return [
                Strength(name, scale, None, *_moments(known.get(name)))
                for name, scale in zip(names, given, strict=True)
            ]
        values = self._pilot()
        chosen = self.options.strengths
        chosen = chosen * len(names) if len(chosen) == 1 else chosen
        pairs = zip(names, chosen, strict=True)
        return [self._strength(name, strength, values[name]) for name, strength in pairs]

    def _strength(self, name: str, strength: float, values: Tensor) -> Strength:
        mean, sd, size, allowed = _moments(values)
        if sd is None or sd <= 1e-12 * max(1.0, abs(mean or 0.0)):
            reason = (
                f"is -inf on all but {allowed} of {size} samples"
                if 0 < allowed < size
                else f"is -inf on all {size} samples"
                if allowed == 0
                else f"does not vary over {size} samples"
            )
            raise OptionError(
                f"reward {name!r} {reason} of {self.domain.name!r}, so that no strength can be "
                "derived from it; set lambda with --scale, or choose another reward"
            )
        return Strength(name, _rounded(strength / sd), strength, mean, sd, size, allowed)

    def _pilot(self) -> dict[str, Tensor]:
        """Rewards of samples of the model: always the same ones, whatever the seed."""
        self.doing = "measuring the reward"
        base, options = self.outcome.base, self.options
        usable = base and options.seed == 0 and options.particles == PILOT_BATCH
        parts = [dict(base.rewards)] if base and usable else [self._draw("0/base", PILOT_BATCH)]
        missing = -(-self.domain.pilot_size // len(self.outcome.labels)) - PILOT_BATCH
        if missing > 0:
            parts.append(self._draw("0/pilot", missing))
        return {name: torch.cat([part[name] for part in parts]) for name in self.rewards}

    def _draw(self, stream: str, size: int) -> dict[str, Tensor]:
        setting = self._setting(self._tilted(0.0), stream, size)
        engine = ImportanceSampling(setting.model, **setting.common)
        drawn = self._run(engine, setting, "Measuring the reward", weighted=False)
        self.outcome.pilot += size * len(self.outcome.labels)
        self.outcome.calibration = dict(Counter(self.outcome.calibration) + Counter(drawn.counts))
        return {name: as_matrix(drawn.state[name], self.has_plate) for name in self.rewards}

    def _write(self, arm: Arm | None = None) -> None:
        if not self.save:
            return
        from pyro_twist.align.files import save_arm, save_results

        # first: it marks the folder as one of ours
        save_results(self.outcome)
        if arm is not None:
            save_arm(arm, self.outcome)


def _class_indices(domain: Domain, options: AlignOptions) -> list[int]:
    parts = [part.strip() for given in options.classes for part in str(given).split(",")]
    if [part.lower() for part in parts] == ["all"]:
        return list(range(len(domain.classes)))
    if "all" in map(str.lower, parts):
        raise OptionError("--class all has every class in it; give it alone")
    indices = [domain.match_class(part) for part in parts]
    repeated = [domain.classes[i] for i, count in Counter(indices).items() if count > 1]
    if repeated:
        raise OptionError(f"--class {repeated[0]!r} is given twice; name each class once")
    return indices


def _check_methods(methods: Sequence[Method], model: Any, domain: Domain) -> None:
    for method in methods:
        if reason := method.unmet(model):
            raise OptionError(f"--method {method.name} {reason}, which {domain.name!r} is not")


def _check_names(rewards: Mapping[str, Reward]) -> None:
    for name in rewards:
        if name in ("x", "x0_hat", *RESERVED) or name.startswith("x_"):
            raise OptionError(f"a reward cannot be called {name!r}; give the function another name")


def _moments(values: Tensor | None) -> tuple[float | None, float | None, int, int]:
    """Mean and standard deviation within populations of finite values, and how many of how many."""
    if values is None:
        return None, None, 0, 0
    allowed = int(values.isfinite().sum())
    columns = [column[column.isfinite()] for column in values.T]
    columns = [column for column in columns if len(column) > 1]
    if not columns:
        return None, None, values.numel(), allowed
    squares = sum(column.var(correction=0).item() * len(column) for column in columns)
    freedom = sum(len(column) - 1 for column in columns)
    mean = values[values.isfinite()].mean().item()
    return mean, math.sqrt(squares / freedom), values.numel(), allowed


def _rounded(value: float) -> float:
    """Three digits, so that the scale that is reported is the one that was used."""
    return float(f"{value:.3g}")


def _learns_within(engine: Any) -> bool:
    """Whether an engine has a twist that learns while a pass goes on."""
    if not getattr(engine, "within", False):
        return False
    return any(part.learns_within for part in learned_parts(engine.guide))
