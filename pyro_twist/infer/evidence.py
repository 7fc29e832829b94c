# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

r"""
Learning parameters through the evidence.

For a density :math:`\gamma_\theta` of everything that a model draws, factors and observations
included, Fisher's identity says

.. math::

    \nabla_\theta \log Z_\theta
    = \mathbb{E}_{\pi_\theta}\bigl[\nabla_\theta \log \gamma_\theta(x_{0:T})\bigr]

where :math:`\pi_\theta` is the law that particles with their weights and ancestors are drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.elbo import ELBO
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger

from pyro_twist.infer.increments import Increment, sample_sites
from pyro_twist.infer.result import SMCResult
from pyro_twist.infer.twistedsmc import TwistedSMC
from pyro_twist.wrapper import ModelWrapper

__all__ = ["EvidenceGradient"]


class EvidenceGradient(ELBO):
    r"""
    The negative log evidence as a loss for :class:`~pyro.infer.svi.SVI`, with its gradient by
    Fisher's identity on weighted particles.

    ``pyro.param`` statements of the model are parameters :math:`\theta`, wherever they are: in
    rewards and likelihoods, in priors of latents, in kernels. Every call is one run of
    :class:`~pyro_twist.infer.TwistedSMC`, of which the gradient is

    .. math::

        \sum_i w_i \nabla_\theta \log \gamma_\theta(x^i_{0:T})

    along the lineages of the final particles. Times :math:`\hat Z` it is unbiased for
    :math:`\nabla Z`, for any number of particles; by itself its bias is that of a self-normalised
    estimate, of order one over their number. Parameters of the guide get the gradient of
    :math:`-\sum_i w_i \log q(x^i_{0:T})`, as in reweighted wake-sleep [1]: both at once are its
    two wake phases. Values are never differentiated through, so that rewards, networks and discrete
    sites need no gradient, and a state takes no more evaluations of the denoiser than in a run::

        def likelihood(state, x0):
            noise = pyro.param("noise", torch.tensor(1.0), constraint=positive)
            pyro.sample("y", dist.Normal(x0, noise).to_event(1), obs=y)

        model = Tilted(diffusion, likelihood)
        svi = SVI(model, LookaheadTwist(model), Adam({"lr": 0.05}), EvidenceGradient(64))
        for _ in range(100):
            loss = svi.step()

    The guide is anything that :class:`~pyro_twist.infer.TwistedSMC` takes, ``None`` included.
    Parameters that are not ``pyro.param`` statements, such as those of a
    :class:`~pyro_twist.twists.ShiftTwist`, are left to :class:`~pyro_twist.infer.TrustRegionTwist`:
    ``fit`` it now and then, and give its ``guide`` to this class.

    With a ``population_plate`` the loss is the sum over populations, each with an evidence of its
    own, such as observations that share their parameters.

    Where a parameter reaches the denoiser, say as a guidance scale in the state, the graphs of all
    evaluations of a lineage are kept. A site hidden from the run by ``handlers.block`` is
    differentiated through if it has ``rsample``; otherwise parameters of its law get no gradient
    from it.

    :param int num_particles: The number of particles in each population.
    :param int max_plate_nesting: Bound on the number of nested plates in the model.
    :param options: Further options of :class:`~pyro_twist.infer.TwistedSMC`. A ``seed`` makes all
        runs share their noise.

    **References**

    [1] `Reweighted Wake-Sleep`
        Joerg Bornschein, Yoshua Bengio (2015), https://arxiv.org/abs/1406.2751
    """

    def __init__(self, num_particles: int = 16, max_plate_nesting: int = 0, **options: Any) -> None:
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=False,
        )
        self.options = options
        #: The result of the latest run, without graphs; ``None`` before the first.
        self.result: SMCResult | None = None

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        The negative log of the estimated evidence.

        Any further arguments are passed to ``init``.

        :returns: The sum over populations.
        :rtype: float
        """
        smc = TwistedSMC(
            model, guide, self.num_particles, self.max_plate_nesting, **self._settings()
        )
        self.result = smc.run(*args, **kwargs)
        return float(-self.result.log_normalizer.sum())

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        The loss; adds the gradient to that of all parameters, in unconstrained space.

        :returns: As :meth:`loss`.
        :rtype: float
        :raises ValueError: If a gradient is not finite.
        """
        with _Found() as found:
            smc = self._run(model, guide, args, kwargs)
        _add_gradient(smc.surrogate("log p"), found.of_model)
        _add_gradient(smc.surrogate("log q"), found.of_guide)
        assert self.result is not None
        return float(-self.result.log_normalizer.sum())

    def differentiable_loss(
        self, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        The loss as a tensor whose gradient is that of the model's parameters.

        The guide's parameters have no part in it.

        :returns: Of shape ``()``.
        :rtype: torch.Tensor
        """
        smc = self._run(model, guide, args, kwargs)
        assert self.result is not None
        surrogate = smc.surrogate("log p")
        return surrogate - surrogate.detach() - self.result.log_normalizer.sum()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("particles are resampled between steps: they have no one trace")

    def _run(self, model: Any, guide: Any, args: Any, kwargs: Any) -> _ScoredSMC:
        smc = _ScoredSMC(
            model, guide, self.num_particles, self.max_plate_nesting, **self._settings()
        )
        result = smc.run(*args, **kwargs)
        state = {key: value.detach() for key, value in result.state.items()}
        self.result = replace(result, state=state)
        return smc

    def _settings(self) -> dict[str, Any]:
        return {"progress": False, **self.options}


class _ScoredSMC(TwistedSMC):
    """A run that carries, for each particle, the log-densities of its path with their graphs."""

    def __init__(self, model: Any, guide: Any, *args: Any, **options: Any) -> None:
        if guide is not None and not isinstance(guide, GuideMessenger):
            if callable(getattr(guide, "init", None)) and callable(getattr(guide, "step", None)):
                guide = _Recorded(guide)
        super().__init__(_Scored(model), guide, *args, **options)

    def surrogate(self, name: str) -> torch.Tensor:
        """Minus the weighted sum of log-densities, summed over populations."""
        carried = self._memory[name]
        terms = self.get_normalized_weights().detach() * carried
        return -torch.where(carried == -torch.inf, torch.zeros_like(terms), terms).sum()

    def _propagate(self, method: str, args: Any, kwargs: Any) -> list[Increment]:
        with torch.enable_grad():
            found = super()._propagate(method, args, kwargs)
        return [replace(one, value=one.value.detach()) for one in found]

    def _look_ahead(self, method: str, args: Any, kwargs: Any) -> torch.Tensor | None:
        value = super()._look_ahead(method, args, kwargs)
        # what a twist remembers is no business of the model, whose denoiser looks for gradients
        written: Callable[[], Sequence[str]] = getattr(self.guide, "state_keys", tuple)
        for key in written():
            if key in self.state and self.state[key].requires_grad:
                self.state[key] = self.state[key].detach()
        return value

    def _observe(
        self, trace: poutine.Trace, before: dict[Any, Any], args: Any, kwargs: Any
    ) -> None:
        super()._observe(trace, before, args, kwargs)
        for name, terms in (("log p", self._scores(trace)), ("log q", self._proposals(trace))):
            total = self._memory.get(name, torch.zeros_like(self.state._log_weights))
            for increment in terms:
                # a site that no parameter reaches has no gradient to carry
                if increment.value.requires_grad:
                    total = total + self._reducer(increment).value
            self._memory[name] = total

    def _scores(self, trace: poutine.Trace) -> Iterator[Increment]:
        """The log-densities of the model's sites, as they enter the target."""
        for name, site in sample_sites(trace):
            plates = tuple(site["cond_indep_stack"])
            if site["infer"].get("_deterministic") or site["infer"].get("_from_guide"):
                continue
            if site["is_observed"]:
                value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
                yield Increment(name, scale_and_mask(value, site["scale"], site["mask"]), plates)
            elif "_left_alone" not in site:
                prior = site["infer"].get("prior", site["fn"])
                log_prob = prior.log_prob(site["value"].detach())
                yield Increment(name, log_prob * site["scale"], plates)

    def _proposals(self, trace: poutine.Trace) -> Iterator[Increment]:
        """The log-densities that the guide drew its sites from."""
        if isinstance(self.guide, _Recorded):
            trace = self.guide.trace
        elif self.guide is None:
            return
        for name, site in sample_sites(trace):
            own = isinstance(self.guide, _Recorded) or site["infer"].get("_from_guide")
            drawn = own or site["infer"].get("prior", site["fn"]) is not site["fn"]
            if drawn and not site["is_observed"] and "_left_alone" not in site:
                log_prob = site["fn"].log_prob(site["value"].detach())
                yield Increment(name, log_prob, tuple(site["cond_indep_stack"]))


class _Detached(Messenger):
    """Keeps gradients out of the values that are drawn: they belong to the densities."""

    def _pyro_post_sample(self, msg: Any) -> None:
        determined = msg["is_observed"] or msg["infer"].get("_deterministic")
        if not determined and isinstance(msg["value"], torch.Tensor):
            msg["value"] = msg["value"].detach()


class _Scored(ModelWrapper):
    """A model or an explicit guide that gradients do not pass through by its draws."""

    def init(self, state: Any, *args: Any, **kwargs: Any) -> None:
        with _Detached():
            super().init(state, *args, **kwargs)

    def step(self, state: Any, *args: Any, **kwargs: Any) -> None:
        with _Detached():
            super().step(state, *args, **kwargs)


class _Recorded(_Scored):
    """An explicit guide that also remembers its latest sites, and marks its parameters."""

    def __init__(self, guide: Any) -> None:
        super().__init__(guide)
        self.trace = poutine.Trace()

    def init(self, state: Any, *args: Any, **kwargs: Any) -> None:
        with self._recorded():
            super().init(state, *args, **kwargs)

    def step(self, state: Any, *args: Any, **kwargs: Any) -> None:
        with self._recorded():
            super().step(state, *args, **kwargs)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        with poutine.infer_config(config_fn=_mark_parameter), poutine.trace() as tracer:
            yield
        self.trace = tracer.trace


def _mark_parameter(site: Any) -> Any:
    return {"_from_guide": True} if site["type"] == "param" else {}


class _Found(Messenger):
    """Collects parameters, those of the model and those of the guide."""

    def __init__(self) -> None:
        super().__init__()
        self.of_model: dict[str, torch.Tensor] = {}
        self.of_guide: dict[str, torch.Tensor] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        found = self.of_guide if msg["infer"].get("_from_guide") else self.of_model
        if hasattr(msg["value"], "unconstrained"):
            found[msg["name"]] = msg["value"].unconstrained()


def _add_gradient(loss: torch.Tensor, parameters: dict[str, torch.Tensor]) -> None:
    names = [name for name, one in parameters.items() if one.requires_grad]
    wanted = [parameters[name] for name in names]
    if not wanted or not loss.requires_grad:
        return
    found = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    for name, parameter, gradient in zip(names, wanted, found, strict=True):
        if gradient is not None:
            _check_gradient(name, gradient)
            before = parameter.grad
            parameter.grad = gradient if before is None else before + gradient


def _check_gradient(name: str, gradient: torch.Tensor) -> None:
    if not bool(gradient.isfinite().all()):
        raise ValueError(
            f"the gradient of the parameter {name!r} is not finite: a log-density has no finite "
            "derivative at some particle, perhaps at one of weight zero, as (a * x).log() has none "
            "at x = 0. Keep such x out, as in torch.where(x > 0, (a * x.clamp(min=1e-6)).log(), "
            "-math.inf)."
        )
