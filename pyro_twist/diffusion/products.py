# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

r"""
Several diffusion models at once, as one Pyro model: products and mixtures.

Models :math:`p_1, \dots, p_K` share their noise levels. A mixture draws which of them a particle
follows, and then follows it: that is exact for any models. A product, of exponents :math:`\beta_k`
with the sum :math:`\beta > 0`, has the kernel that Gaussians multiply to,

.. math::

    \prod_k N(x; m_k, s^2)^{\beta_k} \propto N(x; \bar m, s^2 / \beta) \,
    \exp\Bigl(-\frac1{2 s^2} \sum_k \beta_k \lVert m_k - \bar m \rVert^2\Bigr),
    \qquad \bar m = \frac1\beta \sum_k \beta_k m_k

and the exponential, which depends on where the step began, goes into the weights. To leave it out,
as adding up predictions does, is to sample another law [1, 2].

**References**

[1] N. Liu, S. Li, Y. Du, A. Torralba, J. Tenenbaum (2022), Compositional Visual Generation with
    Composable Diffusion Models, https://arxiv.org/abs/2206.01714.

[2] Y. Du, C. Durkan, R. Strudel, J. Tenenbaum, S. Dieleman, R. Fergus, J. Sohl-Dickstein,
    A. Doucet, W. Grathwohl (2023), Reduce, Reuse, Recycle: Compositional Generation with
    Energy-Based Diffusion Models and MCMC, https://arxiv.org/abs/2302.11552.

[3] M. Skreta, T. Akhound-Sadegh, V. Ohanesian, R. Bondesan, A. Aspuru-Guzik, A. Doucet,
    R. Brekelmans, A. Tong, K. Neklyudov (2025), Feynman-Kac Correctors in Diffusion,
    https://arxiv.org/abs/2503.02819.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_twist.diffusion.gaussian import GaussianDiffusion
from pyro_twist.diffusion.kernels import GaussianSchedule, GaussianStep

__all__ = ["CombinedModels", "MixtureOfModels", "ProductOfModels", "conditioned"]

Target = Literal["paths", "marginals"]
Reads = Sequence[Mapping[str, str]]

_WRITTEN = ("x", "x0_hat", "eps_hat")
_SHARED = ("alpha", "sigma", "x0_coef", "x_coef", "eps_coef", "std")


class CombinedModels(GaussianDiffusion):
    """
    What products and mixtures share: models of the same noise levels, and what each of them sees.

    :param list models: The models.
    :param list reads: For each model, entries of the state by the names of its conditioning.
    """

    def __init__(self, models: Sequence[GaussianDiffusion], reads: Reads | None) -> None:
        _check_models(models)
        # all that is no network is the same for all of them
        self.__dict__.update(vars(models[0]))
        self.models = tuple(models)
        self.reads = _check_reads(models, reads)
        self.keep_graph = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.models)} models, {len(self.schedule)} steps)"

    @property
    def counts(self) -> dict[str, int]:
        """Evaluations of all denoisers so far, per sample."""
        distinct = {id(model.denoiser): model.denoiser for model in self.models}
        return {"denoiser": sum(one.num_rows for one in distinct.values())}

    def _batch_shape(self, x: Tensor) -> torch.Size:
        return x.shape[: x.dim() - len(self.event_shape)]


class ProductOfModels(CombinedModels):
    r"""
    The product of diffusion models, :math:`\prod_k p_k^{\beta_k}`, as a Pyro model.

    All factors are in the weights, so that the law is that of the target for any twist and any
    reward on top. Which law that is, is chosen by ``target``:

    ``"paths"``
        The product of the models' laws of whole paths, each raised to its exponent. It needs
        denoisers only and is exact for the chains as they are, with these steps. Its end has the
        law :math:`\prod_k p_k(x_0)^{\beta_k}` where each chain is the exact reversal of the noising
        process. Chains have Gaussian kernels and are not, but for exponents with sum one, such as
        those of :meth:`of_conditions`, what is left vanishes as the steps get finer. For another
        sum it does not: the kernels' fixed variance leaves a factor of
        :math:`\exp(\tfrac{1 - \beta}{2\beta} \int g^2 \sum_k \beta_k \Delta \log p_k \, dt)` out,
        which is a constant for Gaussian data and not otherwise (see [3] for the time integral).

    ``"marginals"``
        The product of the laws of the data, :math:`\prod_k p_k(x_0)^{\beta_k} / Z`, exactly and for
        any number of steps. It needs the densities of the noised data, that is networks with
        ``log_prob(x, timestep)``, where ``timestep`` is ``None`` for the data itself, such as
        :class:`~pyro_twist.diffusion.GaussianMixtureDenoiser`. The path in between goes through
        :math:`\prod_k p_{k,t}(x_t)^{\beta_k}`.

    For both, the proposal averages predictions with weights :math:`\beta_k / \beta`, and divides
    the noise by :math:`\sqrt\beta`. For ``"marginals"`` kernels are no more than a proposal, with
    the variance of a step back from data of variance one, whatever the scheduler says: a proposal
    had better be too wide than too narrow. The normaliser is that
    of :math:`\prod_k p_k(x_0)^{\beta_k}` for ``"marginals"``. For ``"paths"`` it is that of the
    exponentials above, which is :math:`\int \prod_k p_k(x_{0:T})^{\beta_k}` if the exponents have
    sum one, and 1 where all models are the same.

    The last step of a scheduler has no noise, or next to none, and so no density to multiply. Here
    each model's has the standard deviation ``last_std``, and the site ``x_0`` is drawn like any
    other::

        both = ProductOfModels([zoo.load("digits", 3), zoo.load("digits", 8)])
        result = TwistedSMC(both, None, num_particles=64).run()

    :param list models: :class:`~pyro_twist.diffusion.GaussianDiffusion` models with the same noise
        levels and kernels, of fixed variance.
    :param list exponents: One for each model, 1 by default. Some may be negative; the sum must be
        positive.
    :param str target: ``"paths"`` or ``"marginals"``.
    :param float last_std: The standard deviation of each model's last step; by default that of the
        last noise level, :math:`\sigma_1 / \alpha_1`, as the reversal of the noising has it where
        the data are smooth on that scale.
    :param list reads: For each model a dict from the names of its conditioning to entries of the
        state, such as ``[{"class_labels": "first"}, {}]`` with the latent ``first``. Entries that
        are not named are not seen by the models.
    :raises ValueError: If models do not fit together, or an exponent does not fit.
    """

    def __init__(
        self,
        models: Sequence[GaussianDiffusion],
        exponents: Sequence[float] | None = None,
        *,
        target: Target = "paths",
        last_std: float | None = None,
        reads: Reads | None = None,
    ) -> None:
        super().__init__(models, reads)
        self.exponents = _check_exponents(models, exponents)
        if target not in get_args(Target):
            raise ValueError(f"target={target!r}; choose one of {get_args(Target)}")
        self.target: Target = target
        schedule = self.schedule if target == "paths" else _widened(self.schedule)
        self._experts = _with_last_std(schedule, last_std)
        self.schedule = _cooled(self._experts, sum(self.exponents))
        self._log_agreement = torch.zeros(())
        if target == "marginals":
            for model in models:
                _check_density(model)

    @classmethod
    def of_conditions(
        cls,
        model: GaussianDiffusion,
        conditions: Sequence[Mapping[str, Any]],
        strength: float | Sequence[float] = 1.0,
        **options: Any,
    ) -> ProductOfModels:
        r"""
        Several conditions at once, from one conditional model with its null condition.

        Where the conditions are independent given :math:`x_0`,

        .. math::

            p(x_0 \mid c_1, \dots, c_n) \propto
            p(x_0) \prod_i \Bigl(\frac{p(x_0 \mid c_i)}{p(x_0)}\Bigr)^{w_i}

        with all :math:`w_i = 1`: a product whose exponents have sum one. A single condition with
        :math:`w > 1` is classifier-free guidance with weights, of which guidance alone is the
        proposal. Each state takes one evaluation for each condition and one without::

            ProductOfModels.of_conditions(zoo.load("digits"), [{"class_labels": k} for k in (3, 8)])

        :param GaussianDiffusion model: A model with ``null_conditioning``.
        :param list conditions: The conditioning of each, such as ``[{"class_labels": 3}]``.
        :param strength: The :math:`w_i`, one for all or one for each.
        :param options: Further options of the class.
        """
        null = model.denoiser.null_conditioning
        if null is None:
            raise ValueError(
                "the model has no null_conditioning, so its law without a condition is not known; "
                "give it one, such as null_conditioning={'class_labels': num_classes}"
            )
        given = [strength] * len(conditions) if isinstance(strength, (int, float)) else strength
        exponents = [float(one) for one in given]
        if not conditions or len(exponents) != len(conditions):
            raise ValueError(
                f"{len(exponents)} strengths for {len(conditions)} conditions; give one for each"
            )
        models = [conditioned(model, one) for one in conditions]
        rest = 1.0 - sum(exponents)
        if abs(rest) < 1e-12:
            return cls(models, exponents, **options)
        return cls([*models, conditioned(model, null)], [*exponents, rest], **options)

    def init(self, state: MutableMapping[Any, Tensor]) -> None:
        """
        Samples :math:`x_T`, predicts :math:`x_0` from it, and weighs it.

        :param dict state: Written: ``x``, ``x0_hat`` and what else the next kernel needs.
        """
        super().init(state)
        if self.target == "marginals":
            log_density = self._log_density(state["x"], len(self.schedule))
            base = self.initial().log_prob(state["x"]).double()
            self._emit(state, len(self.schedule), log_density - base, log_density)
        else:
            self._emit(state, len(self.schedule), self._log_agreement)

    def step(self, state: MutableMapping[Any, Tensor], t: int) -> None:
        """
        Samples :math:`x_{t-1}` and weighs it.

        :param dict state: Read and written.
        :param int t: Time index of the state, one of :attr:`timesteps`.
        """
        if self.target == "paths":
            super().step(state, t)
            if t > 1:
                self._emit(state, t - 1, self._log_agreement)
            return
        before, kernel = dict(state), self.kernel(state, t)
        super().step(state, t)
        log_density = self._log_density(state["x"], t - 1)
        forward = self._log_forward(before["x"], state["x"], t) - before["log_density"]
        backward = kernel.log_prob(state["x"]).double()
        self._emit(state, t - 1, log_density + forward - backward, log_density)

    def _emit(
        self,
        state: MutableMapping[Any, Tensor],
        t: int,
        factor: Tensor,
        log_density: Tensor | None = None,
    ) -> None:
        with self._plate:
            pyro.factor(f"agreement_{t}", factor)
        if log_density is not None:
            state["log_density"] = log_density

    def _predict(self, state: Mapping[Any, Tensor], t: int) -> dict[str, Tensor]:
        """The average prediction; notes how far the models disagree."""
        found = [
            model._predict(_view(state, read), t)
            for model, read in zip(self.models, self.reads, strict=True)
        ]
        total = sum(self.exponents)
        shares = [exponent / total for exponent in self.exponents]
        average = {key: _weighted(shares, [one[key] for one in found]) for key in found[0]}
        if self.target == "paths":
            agreement = self._agreement(t, found, average)
            self._log_agreement = agreement.reshape(self._batch_shape(state["x"]))
        return average

    def _agreement(
        self, t: int, found: Sequence[Mapping[str, Tensor]], average: Mapping[str, Tensor]
    ) -> Tensor:
        """What the kernels' product has besides a Gaussian, as a log, one number for each row."""
        step, squares = self._experts[t], []
        for one in found:
            apart = step.x0_coef * (one["x0_hat"] - average["x0_hat"])
            if step.eps_coef:
                apart = apart + step.eps_coef * (one["eps_hat"] - average["eps_hat"])
            squares.append((apart.double() / step.std).square().flatten(1).sum(-1))
        return -0.5 * _weighted(self.exponents, squares)

    def _log_density(self, x: Tensor, t: int) -> Tensor:
        """The log of the product of densities at time index ``t``, in float64."""
        rows = x.reshape((-1,) + self.event_shape).double()
        values = [_log_prob(model, rows, t) for model in self.models]
        return _weighted(self.exponents, values).reshape(self._batch_shape(x))

    def _log_forward(self, x: Tensor, end: Tensor, t: int) -> Tensor:
        """The log-density of noising ``end``, of time index ``t - 1``, to ``x``."""
        ratio, variance = _noising(self.schedule, t)
        noise = dist.Normal(ratio * end.double(), math.sqrt(variance / sum(self.exponents)))
        log_prob: Tensor = noise.to_event(len(self.event_shape)).log_prob(x.double())
        return log_prob


class MixtureOfModels(CombinedModels):
    """
    A mixture of diffusion models: each particle follows one of them, drawn at the start.

    Which one is a latent like any other: it follows its particle through resampling, can be
    conditioned on, and is proposed by a guide in a :class:`~pyro_twist.latents.JointTwist`. Its
    posterior is that over models, given factors and observations: model averaging. A state is
    evaluated by its own model alone, so that a mixture costs what one model costs::

        either = MixtureOfModels([one, other], weights=torch.tensor([0.8, 0.2]))
        result = TwistedSMC(Tilted(either, likelihood), None, num_particles=64).run()
        result.expectation(lambda state: one_hot(state["component"], 2))

    :param list models: :class:`~pyro_twist.diffusion.GaussianDiffusion` models with the same noise
        levels and kernels; what differs are networks, what they predict, clipping and conditioning.
    :param weights: The prior of each model, of shape ``(len(models),)``, equal by default; or a
        function that returns a distribution of indices, for weights that are themselves drawn or
        learned.
    :param str name: The name of the latent, and of its entry in the state.
    :param list reads: As for :class:`ProductOfModels`.
    :raises ValueError: If models or weights do not fit.
    """

    def __init__(
        self,
        models: Sequence[GaussianDiffusion],
        weights: Tensor | Sequence[float] | Callable[[], Any] | None = None,
        *,
        name: str = "component",
        reads: Reads | None = None,
    ) -> None:
        super().__init__(models, reads)
        for model in models:
            _check_shared_conditioning(model)
        if name in _WRITTEN:
            raise ValueError(f"name={name!r} is an entry that the models write; choose another")
        self.name = name
        self._prior = weights if callable(weights) else _fixed_weights(models, weights)

    def init(self, state: MutableMapping[Any, Tensor]) -> None:
        """
        Draws the model that each particle follows, samples :math:`x_T` and predicts :math:`x_0`.

        :param dict state: Written: the index of the model, ``x`` and ``x0_hat``.
        """
        with self._plate:
            state[self.name] = pyro.sample(self.name, self._prior())
        super().init(state)

    def _predict(self, state: Mapping[Any, Tensor], t: int) -> dict[str, Tensor]:
        batch = self._batch_shape(state["x"])
        chosen = state[self.name].expand(batch).reshape(-1)
        if not bool(((chosen >= 0) & (chosen < len(self.models))).all()):
            raise ValueError(
                f"{self.name!r} is {chosen.max().item()}; give an index below {len(self.models)}"
            )
        places = [(chosen == k).nonzero()[:, 0] for k in range(len(self.models))]
        found = [self._rows(k, state, batch, t, rows) for k, rows in enumerate(places) if len(rows)]
        order = torch.cat(places).argsort()
        return {key: torch.cat([one[key] for one in found])[order] for key in found[0]}

    def _rows(
        self, k: int, state: Mapping[Any, Tensor], batch: torch.Size, t: int, rows: Tensor
    ) -> dict[str, Tensor]:
        """The prediction of one model at its own rows of the batch."""
        model, view = self.models[k], _view(state, self.reads[k])
        dims = {**model.denoiser.event_dims, "x": len(self.event_shape)}
        taken = {}
        for key, value in view.items():
            event = value.shape[value.dim() - dims.get(key, 0) :]
            taken[key] = value.expand(batch + event).reshape((-1,) + event)[rows]
        return model._predict(taken, t)


def conditioned(model: GaussianDiffusion, conditioning: Mapping[str, Any]) -> GaussianDiffusion:
    """
    The same model with another conditioning and no guidance; the network is shared.

    :param GaussianDiffusion model: A model.
    :param dict conditioning: What replaces entries of its conditioning.
    :returns: A model that counts its own evaluations.
    :raises ValueError: If an entry is none of the model's conditioning.
    """
    known = model.denoiser.conditioning
    unknown = sorted(set(conditioning) - set(known))
    if unknown:
        raise ValueError(f"{unknown} is no conditioning of the model, which has {sorted(known)}")
    other, denoiser = copy.copy(model), copy.copy(model.denoiser)
    values = {name: _as_entry(value) for name, value in conditioning.items()}
    denoiser.conditioning = {**known, **values}
    denoiser.guidance_scale, denoiser.num_rows = 1.0, 0
    other.denoiser = denoiser
    other._check_conditioning()
    return other


def _as_entry(value: Any) -> Any:
    return torch.as_tensor(value) if isinstance(value, (int, float, list, tuple)) else value


def _weighted(shares: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    total = shares[0] * values[0]
    for share, value in zip(shares[1:], values[1:], strict=True):
        total = torch.add(total, value, alpha=share)
    return total


def _view(state: Mapping[Any, Tensor], read: Mapping[str, str]) -> dict[str, Tensor]:
    """What one model sees of the state."""
    for key in read.values():
        if key not in state:
            raise ValueError(
                f"reads names state[{key!r}], but the state has only {list(state)}; draw it in "
                "init, for example with WithLatents"
            )
    return {"x": state["x"], **{name: state[key] for name, key in read.items()}}


def _log_prob(model: GaussianDiffusion, rows: Tensor, t: int) -> Tensor:
    network: Any = model.denoiser.network
    if t == 0:
        data: Tensor = network.log_prob(rows, None)
        return data
    step = model.schedule[t]
    noised: Tensor = network.log_prob(rows * step.input_scale, torch.tensor(step.timestep))
    return noised


# Schedules


def _with_last_std(schedule: GaussianSchedule, last_std: float | None) -> GaussianSchedule:
    """The models' own kernels, the last of which has noise."""
    if last_std is not None and not last_std > 0:
        raise ValueError(
            f"last_std={last_std}; give a positive number, without which the last "
            "steps of two models are never the same"
        )
    silent = [step.timestep for step in schedule.steps[:-1] if step.std == 0]
    if silent:
        raise ValueError(f"the steps at timesteps {silent} have no noise, and so no density")
    last = schedule[1]
    last = replace(last, std=last_std or last.sigma / last.alpha)
    return replace(schedule, steps=(*schedule.steps[:-1], last))


def _before(schedule: GaussianSchedule, t: int) -> tuple[float, float]:
    """Signal and noise levels of :math:`x_{t-1}`."""
    return (schedule[t - 1].alpha, schedule[t - 1].sigma) if t > 1 else (1.0, 0.0)


def _noising(schedule: GaussianSchedule, t: int) -> tuple[float, float]:
    """Coefficient and variance of the noising from :math:`x_{t-1}` to :math:`x_t`."""
    alpha, sigma = _before(schedule, t)
    ratio = schedule[t].alpha / alpha
    return ratio, schedule[t].sigma ** 2 - (ratio * sigma) ** 2


def _widened(schedule: GaussianSchedule) -> GaussianSchedule:
    """Kernels with the variance of :math:`x_{t-1}` given :math:`x_t` for data of variance one."""
    steps = []
    for t in range(len(schedule), 0, -1):
        (alpha, sigma), (ratio, noise) = _before(schedule, t), _noising(schedule, t)
        precision = 1 / (alpha**2 + sigma**2) + ratio**2 / noise
        steps.append(replace(schedule[t], std=precision**-0.5))
    return replace(schedule, steps=tuple(steps))


def _cooled(schedule: GaussianSchedule, total: float) -> GaussianSchedule:
    """The kernels of the product: the noise divided by the root of the sum of the exponents."""
    root = math.sqrt(total)
    steps = tuple(replace(step, std=step.std / root) for step in schedule.steps)
    return replace(schedule, steps=steps, init_std=schedule.init_std / root)


# Checks


def _check_models(models: Sequence[GaussianDiffusion]) -> None:
    if not models:
        raise ValueError("models is empty; give at least one")
    for k, model in enumerate(models):
        if not isinstance(model, GaussianDiffusion) or isinstance(model, CombinedModels):
            raise ValueError(
                f"model {k} is a {type(model).__name__}; give plain GaussianDiffusion models, and "
                "put latents, rewards and handlers around the combination"
            )
        _check_alike(k, model, models[0])


def _check_alike(k: int, model: GaussianDiffusion, first: GaussianDiffusion) -> None:
    if model.event_shape != first.event_shape or model.plate != first.plate:
        raise ValueError(
            f"model {k} has event shape {tuple(model.event_shape)} and plate {model.plate}, the "
            f"first {tuple(first.event_shape)} and {first.plate}; they must be the same"
        )
    one, other = model.schedule, first.schedule
    if one.learned_variance is not None:
        raise ValueError(f"model {k} has a learned variance; give models with a fixed one")
    same = len(one) == len(other) and math.isclose(one.init_std, other.init_std, rel_tol=1e-6)
    if not same or not all(_alike(*pair) for pair in zip(one.steps, other.steps, strict=True)):
        raise ValueError(
            f"the kernels of model {k} are not those of the first; give both the same scheduler "
            "(noise levels, timesteps, eta, clipping) and number of steps"
        )


def _alike(one: GaussianStep, other: GaussianStep) -> bool:
    pairs = ((getattr(one, key), getattr(other, key)) for key in _SHARED)
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs)


def _check_reads(models: Sequence[GaussianDiffusion], reads: Reads | None) -> Reads:
    reads = [{}] * len(models) if reads is None else list(reads)
    if len(reads) != len(models):
        raise ValueError(f"reads has {len(reads)} entries for {len(models)} models")
    for k, (model, read) in enumerate(zip(models, reads, strict=True)):
        unknown = sorted(set(read) - set(model.denoiser.conditioning) - {"guidance_scale"})
        if unknown:
            raise ValueError(
                f"reads names {unknown}, which is no conditioning of model {k}; it has "
                f"{sorted(model.denoiser.conditioning)}"
            )
    return reads


def _check_exponents(
    models: Sequence[GaussianDiffusion], exponents: Sequence[float] | None
) -> tuple[float, ...]:
    found = (1.0,) * len(models) if exponents is None else tuple(float(one) for one in exponents)
    if len(found) != len(models):
        raise ValueError(f"{len(found)} exponents for {len(models)} models; give one for each")
    if 0.0 in found or not all(map(math.isfinite, found)) or not sum(found) > 1e-9:
        raise ValueError(
            f"exponents={found}; give finite numbers other than 0 whose sum is positive, since "
            "the product could not be normalised otherwise"
        )
    return found


def _check_density(model: GaussianDiffusion) -> None:
    denoiser = model.denoiser
    if not callable(getattr(denoiser.network, "log_prob", None)) or denoiser.conditioning:
        raise ValueError(
            "target='marginals' needs the densities of the noised data: networks with "
            "log_prob(x, timestep) and no conditioning, such as GaussianMixtureDenoiser. Where "
            "only denoisers are known, take target='paths'."
        )


def _check_shared_conditioning(model: GaussianDiffusion) -> None:
    denoiser = model.denoiser
    named = {**denoiser.conditioning, "guidance_scale": denoiser.guidance_scale}
    for name, value in named.items():
        if isinstance(value, Tensor):
            shape = value.shape[: value.dim() - denoiser.event_dims.get(name, 0)]
            if shape.numel() != 1:
                raise ValueError(
                    f"{name!r} has one entry for each of a plate, but the rows of a batch are "
                    "divided between the models; draw it in a WithLatents and name it in reads="
                )


def _fixed_weights(
    models: Sequence[GaussianDiffusion], weights: Tensor | Sequence[float] | None
) -> Callable[[], Any]:
    probs = torch.ones(len(models)) if weights is None else torch.as_tensor(weights).float()
    valid = probs.isfinite() & (probs >= 0)
    if probs.shape != (len(models),) or not bool(valid.all()) or not float(probs.sum()) > 0:
        raise ValueError(
            f"weights={weights} for {len(models)} models; give a finite number for each, none "
            "negative and not all zero"
        )
    return lambda: dist.Categorical(probs)
