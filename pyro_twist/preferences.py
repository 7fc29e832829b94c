# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

r"""
Learning what somebody likes from the samples they pick, and aligning to it.

A person is shown a few samples and marks favourites, ranks them, or says which of two is better.
:class:`Preferences` collects this, fits a Bayesian model of the taste behind it, and gives a
reward for :class:`~pyro_twist.rewards.RewardTilted`. Then one draws samples by that reward, shows
them, and so on::

    taste = Preferences(["red", "bright", "symmetric"])
    taste.favourites(images, [2, 5])  # of those shown, the third and the sixth
    taste.fit(seed=0)
    model = RewardTilted(diffusion, taste.reward(), scale=3.0)

The choices are those of the Plackett-Luce model [1], which for two samples is that of Bradley and
Terry [2]: with utilities :math:`u_i`, the first choice is :math:`i` with probability
:math:`e^{u_i} / \sum_j e^{u_j}`, the second is made in the same way among the others, and so on.

**References**

[1] `Individual Choice Behavior: A Theoretical Analysis`
    R. Duncan Luce (1959)

[2] `Rank Analysis of Incomplete Block Designs: I. The Method of Paired Comparisons`
    Ralph Allan Bradley, Milton E. Terry (1952), https://doi.org/10.2307/2334029
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_sample
from pyro.optim import ClippedAdam
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import skip_init

from pyro_twist.infer.randomness import RandomStream
from pyro_twist.latents import WithLatents
from pyro_twist.rewards.images import image_reward
from pyro_twist.rewards.reward import Reward
from pyro_twist.rewards.samples import Input
from pyro_twist.rewards.tilted import Tilted

__all__ = ["Choice", "Favourites", "PlackettLuce", "Posterior", "Preferences", "SimulatedRater"]

Posterior = Literal["mean", "draw", "average"]

# the probability of a set of favourites is a sum over its subsets
_MOST_FAVOURITES = 8
_FULL_COVARIANCE = 60
_PREFIX = "taste_"


class PlackettLuce(dist.TorchDistribution):
    """
    The law of rankings: the best first, then the best of the others, and so on.

    :param Tensor utilities: The utilities of what is ranked, of shape ``batch_shape + (number,)``.
    :param int num_ranked: How many places are told; all of them by default. Values are indices, the
        best first, of shape ``batch_shape + (num_ranked,)``.
    """

    arg_constraints = {"utilities": dist.constraints.real_vector}
    support = dist.constraints.independent(dist.constraints.nonnegative_integer, 1)

    def __init__(
        self, utilities: Tensor, num_ranked: int | None = None, *, validate_args: Any = None
    ) -> None:
        number = utilities.shape[-1]
        num_ranked = number if num_ranked is None else num_ranked
        if not 1 <= num_ranked <= number:
            raise ValueError(f"num_ranked={num_ranked}; give a number from 1 to {number}")
        self.utilities, self.num_ranked = utilities, num_ranked
        event_shape = torch.Size((num_ranked,))
        super().__init__(utilities.shape[:-1], event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """See :meth:`torch.distributions.Distribution.expand`."""
        utilities = self.utilities.expand(tuple(batch_shape) + self.utilities.shape[-1:])
        return type(self)(utilities, self.num_ranked, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Ranks by utilities with Gumbel noise, which has this law."""
        utilities = self.utilities.detach().expand(tuple(sample_shape) + self.utilities.shape)
        noise = -torch.empty_like(utilities).exponential_().log()
        return (utilities + noise).topk(self.num_ranked, -1).indices

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of the places told."""
        utilities, value = _together(self.utilities, value)
        total = torch.zeros_like(utilities[..., 0])
        for place in range(self.num_ranked):
            here = value[..., place, None]
            total = total + utilities.gather(-1, here)[..., 0] - utilities.logsumexp(-1)
            utilities = utilities.scatter(-1, here, -math.inf)
        return total


class Favourites(PlackettLuce):
    """
    The law of the set of those in the first places of a ranking, whatever their order.

    :param Tensor utilities: As for :class:`PlackettLuce`.
    :param int num_ranked: The number of favourites, at most 8. Values are their indices, in any
        order.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of the favourites: the sum over all orders, place by place."""
        utilities, value = _together(self.utilities, value)
        chosen = utilities.gather(-1, value)
        rest = utilities.scatter(-1, value, -math.inf).logsumexp(-1)
        places = range(self.num_ranked)
        taken: dict[frozenset[int], Tensor] = {frozenset(): torch.zeros_like(rest)}
        for size in range(1, self.num_ranked + 1):
            for some in map(frozenset, combinations(places, size)):
                ways = [
                    taken[some - {one}]
                    + chosen[..., one]
                    - _left(chosen, rest, [i for i in places if i not in some or i == one])
                    for one in some
                ]
                taken[some] = torch.stack(ways).logsumexp(0)
        return taken[frozenset(places)]


def _left(chosen: Tensor, rest: Tensor, places: Sequence[int]) -> Tensor:
    """The log of the sum over those not taken yet."""
    left: Tensor = torch.cat([chosen[..., list(places)], rest[..., None]], -1).logsumexp(-1)
    return left


def _together(utilities: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Utilities and places, of one batch shape."""
    batch = torch.broadcast_shapes(utilities.shape[:-1], value.shape[:-1])
    return utilities.expand(batch + utilities.shape[-1:]), value.expand(batch + value.shape[-1:])


@dataclass(frozen=True)
class Choice:
    """
    What somebody chose among samples.

    :param Tensor features: The features of the samples shown, of shape ``(number, num_features)``.
    :param tuple chosen: The indices of those chosen.
    :param bool ordered: Whether the order of ``chosen`` is a ranking, best first.
    """

    features: Tensor
    chosen: tuple[int, ...]
    ordered: bool

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What tells which choices can be stacked."""
        return len(self.features), len(self.chosen), self.ordered


class Preferences:
    """
    A taste that is learnt from choices, with its uncertainty.

    The utility of a sample is linear in features of it, or a network of them, and its parameters
    have a normal prior. :meth:`fit` approximates their posterior by stochastic variational
    inference; :meth:`reward` is the utility by the posterior's mean or by all of it. Features are
    standardised, so that a weight is what a standard deviation more is worth, in nats of choice:
    utilities that differ by 1 are chosen between at odds of 2.7 to 1.

    :param features: What is told of samples: a list of names of
        :func:`~pyro_twist.rewards.image_reward`; a dict of functions or rewards by name, each of a
        batch of samples; or one function from a batch of ``B`` samples to a tensor of shape
        ``(B, num_features)``, such as an embedding.
    :param names: The names of the features, where ``features`` is one function.
    :param float prior_scale: The standard deviation of each weight under the prior.
    :param torch.nn.Module network: What makes utilities, of shape ``(..., 1)``, of standardised
        features, of shape ``(..., num_features)``, instead of a linear function. Its parameters'
        priors have the standard deviation ``prior_scale``, divided by the square root of the number
        of inputs for matrices. A copy of it, in evaluation mode, is used.
    :param guide: A class of Pyro's automatic guides, or another function from a model to a guide
        that returns a dict of the latents; by default ``AutoMultivariateNormal`` up to 60
        parameters, ``AutoNormal`` beyond.
    :param str input: What ``features`` take, as for :class:`~pyro_twist.rewards.Reward`.
    :raises ValueError: If an argument is out of range.

    Example::

        taste = Preferences(["red", "bright", "symmetric"])
        taste.standardise(images)  # by default, by the first samples that were shown
        taste.favourites(images[:6], [0, 3])
        taste.prefer(images[6], images[7])
        print(taste.fit(seed=0))
    """

    def __init__(
        self,
        features: Any,
        *,
        names: Sequence[str] | None = None,
        prior_scale: float = 1.0,
        network: torch.nn.Module | None = None,
        guide: Callable[..., Any] | None = None,
        input: Input = "tensor",
    ) -> None:
        if not 0 < prior_scale < math.inf:
            raise ValueError(f"prior_scale={prior_scale}; give a positive, finite number")
        if network is not None and not list(network.parameters()):
            raise ValueError(f"network={network!r} has no parameters to learn")
        self._functions, self._names = _feature_functions(features, names)
        self.prior_scale, self.input, self.guide = prior_scale, input, guide
        self.choices: list[Choice] = []
        #: The loss of every step of the last fit, minus the evidence lower bound.
        self.losses: list[float] = []
        self._given_network = network
        self._network: torch.nn.Module | None = None
        self._standard: tuple[Tensor, Tensor] | None = None
        self._draws: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        state = "not fitted" if self._draws is None else f"{self.num_draws} posterior draws"
        return f"Preferences({list(self.names)}, {len(self.choices)} choices, {state})"

    def __str__(self) -> str:
        return self.table() if self._is_linear and self._draws is not None else repr(self)

    # features

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the features; for a function without names, once it has been called."""
        return self._names or ()

    def features(self, samples: Any) -> Tensor:
        """
        The features of samples, not standardised.

        :param samples: A batch of ``B`` samples.
        :returns: Of shape ``(B, num_features)``, in float64.
        :raises ValueError: If a function returns another shape, or what is not finite.
        """
        columns = [torch.as_tensor(function(samples)) for function in self._functions]
        if len(columns) > 1 or columns[0].dim() == 1:
            self._check_columns(columns, len(samples))
            found = torch.stack([column.double() for column in columns], -1)
        else:
            found = columns[0].double()
        if found.dim() != 2 or len(found) != len(samples):
            raise ValueError(
                f"features returned shape {tuple(found.shape)} for {len(samples)} samples; return "
                f"({len(samples)}, number of features)"
            )
        self._names = self._names or tuple(f"feature_{i}" for i in range(found.shape[1]))
        if len(self._names) != found.shape[1]:
            raise ValueError(f"{found.shape[1]} features have the names {list(self._names)}")
        if not bool(found.detach().isfinite().all()):
            bad = self._names[int((~found.detach().isfinite()).any(0).nonzero()[0])]
            raise ValueError(f"feature {bad!r} is not finite for some of the samples")
        return found

    def _check_columns(self, columns: Sequence[Tensor], size: int) -> None:
        for name, column in zip(self._names or ("feature_0",), columns, strict=False):
            if column.shape != (size,):
                raise ValueError(
                    f"feature {name!r} has shape {tuple(column.shape)} for {size} samples; return "
                    "one number for each"
                )

    def standardise(self, samples: Any) -> Self:
        """
        Sets zero and unit of the features to mean and standard deviation over some samples.

        Without, the first samples shown do this. Weights are in these units.

        :param samples: A batch, best a few hundred samples of the model.
        :returns: Itself.
        :raises ValueError: If a feature is the same for all of them.
        """
        self._set_standard(self.features(samples).detach())
        return self

    def _set_standard(self, features: Tensor) -> None:
        centre, spread = features.mean(0), features.std(0, correction=0)
        if not bool((spread > 1e-12 * (1 + centre.abs())).all()):
            flat = self.names[int((spread <= 1e-12 * (1 + centre.abs())).nonzero()[0])]
            raise ValueError(
                f"feature {flat!r} is the same for all of {len(features)} samples; call "
                "standardise with more samples, or leave it out"
            )
        self._standard, self._draws = (centre, spread), None

    def _standardised(self, features: Tensor) -> Tensor:
        if self._standard is None:
            raise ValueError("features have no units yet; call standardise, or add choices first")
        centre, spread = (value.to(features) for value in self._standard)
        return (features - centre) / spread

    # choices

    def prefer(self, better: Any, worse: Any) -> Self:
        """
        Adds comparisons of two: each sample of one batch is liked better than that of the other.

        :param better: A batch of samples, or a single one, of shape ``event_shape``, beside a
            single ``worse``.
        :param worse: As many.
        :returns: Itself.
        """
        better, worse = (_batch_of(samples, self.input) for samples in (better, worse))
        _check_as_many(better=better, worse=worse)
        pairs = torch.stack([self.features(better).detach(), self.features(worse).detach()], 1)
        for pair in pairs:
            self._add(pair, (0,), ordered=True, standard=pairs.flatten(0, 1))
        return self

    def favourites(self, samples: Any, chosen: Sequence[int]) -> Self:
        """
        Adds a panel of which somebody has marked some, in no order.

        :param samples: What was shown, a batch.
        :param chosen: The indices of those marked, one to eight, and not all.
        :returns: Itself.
        """
        features = self.features(samples).detach()
        chosen = _indices("chosen", chosen, len(features))
        if len(chosen) == len(features):
            raise ValueError(f"all {len(chosen)} samples are chosen, which says nothing of taste")
        if len(chosen) > _MOST_FAVOURITES:
            raise ValueError(
                f"{len(chosen)} samples are chosen; mark at most {_MOST_FAVOURITES}, or rank them"
            )
        return self._add(features, chosen, ordered=len(chosen) == 1)

    def rank(self, samples: Any, order: Sequence[int]) -> Self:
        """
        Adds a panel that somebody has ranked, or the first places of which they have given.

        :param samples: What was shown, a batch.
        :param order: The indices of the samples, the best first; those left out come after.
        :returns: Itself.
        """
        features = self.features(samples).detach()
        return self._add(features, _indices("order", order, len(features)), ordered=True)

    def _add(
        self,
        features: Tensor,
        chosen: Sequence[int],
        *,
        ordered: bool,
        standard: Tensor | None = None,
    ) -> Self:
        if self._standard is None:
            self._set_standard(features if standard is None else standard)
        self.choices.append(Choice(features.cpu(), tuple(chosen), ordered))
        return self

    # the model

    @property
    def _is_linear(self) -> bool:
        return self._given_network is None

    def _made_network(self) -> torch.nn.Module:
        """The network, whose own parameters give nothing but shapes."""
        if self._network is None:
            linear = partial(skip_init, torch.nn.Linear, len(self.names), 1, bias=False)
            given = copy.deepcopy(self._given_network)
            self._network = (given or linear()).eval()
        return self._network

    def _parameters(self) -> Iterator[tuple[str, torch.Size, float]]:
        """Name of the site, shape and prior standard deviation of every parameter."""
        for name, value in self._made_network().named_parameters():
            inputs = value.shape[-1] if value.dim() > 1 and not self._is_linear else 1
            yield _PREFIX + name.replace(".", "__"), value.shape, self.prior_scale / inputs**0.5

    def model(self) -> dict[str, Tensor]:
        """
        The Pyro model of all choices, for any of Pyro's inference algorithms.

        :returns: The parameters drawn, by the names of their sites.
        """
        drawn = {
            name: pyro.sample(name, dist.Normal(torch.zeros(shape), scale).to_event(len(shape)))
            for name, shape, scale in self._parameters()
        }
        kinds = dict.fromkeys(choice.kind for choice in self.choices)
        for number, kind in enumerate(kinds):
            some = [choice for choice in self.choices if choice.kind == kind]
            features = self._standardised(torch.stack([choice.features for choice in some]))
            utilities = self._utilities(features, drawn)
            family = PlackettLuce if kind[2] else Favourites
            chosen = torch.tensor([choice.chosen for choice in some])
            with pyro.plate(f"choices_{number}", len(some), dim=-1):
                pyro.sample(f"chosen_{number}", family(utilities, kind[1]), obs=chosen)
        return drawn

    def _utilities(self, features: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        """Of shape ``batch + features.shape[:-1]``, where ``batch`` is that of the parameters."""
        network = self._made_network()
        names = {site: shape for site, shape, _ in self._parameters()}
        own = dict(zip(names, dict(network.named_parameters()), strict=True))
        first = next(iter(names))
        features = features.to(drawn[first].dtype)
        batch = drawn[first].shape[: drawn[first].dim() - len(names[first])]
        flat = {own[s]: drawn[s].reshape((-1,) + shape) for s, shape in names.items()}
        if self._is_linear:
            found = torch.einsum("...f,sf->s...", features, flat["weight"][:, 0])
        else:
            # one after the other: the first vmap of a process would take seconds to load
            ones = [{k: v[i] for k, v in flat.items()} for i in range(batch.numel())]
            found = torch.stack([functional_call(network, one, (features,)) for one in ones])
            _check_output(found.shape[1:], features.shape)
            found = found[..., 0]
        # a dim of one for the plate of choices is in the batch of vectorised draws
        return found.reshape(batch[:-1] + found.shape[1:] if batch else found.shape[1:])

    # fitting

    def fit(
        self,
        num_steps: int = 400,
        *,
        learning_rate: float = 0.05,
        num_particles: int = 8,
        num_draws: int = 200,
        seed: int | None = None,
    ) -> Self:
        """
        Approximates the posterior of the taste given all choices so far.

        Pyro's parameter store is left as it was, and handlers outside see nothing of the fit.

        :param int num_steps: Steps of the optimiser.
        :param float learning_rate: That of the first steps, for weights in units of ``prior_scale``
            where this is above one; it falls to a hundredth of it.
        :param int num_particles: Draws of the guide in each step.
        :param int num_draws: Draws of the posterior to keep.
        :param int seed: Makes the fit depend on nothing but the choices and this seed.
        :returns: Itself.
        :raises ValueError: If there are no choices, a number is not positive, or the fit diverges.
        """
        if not self.choices:
            raise ValueError("there are no choices to learn from; add some with favourites(...)")
        _check_counts(num_steps=num_steps, num_particles=num_particles, num_draws=num_draws)
        with RandomStream(seed)(), pyro.get_param_store().scope(), poutine.block():
            guide = self._made_guide()
            decay = 0.01 ** (1 / num_steps)
            # as wide a posterior of weights takes as long steps
            unit = max(1.0, self.prior_scale) if self._is_linear else 1.0
            optimizer = ClippedAdam({"lr": learning_rate * unit, "lrd": decay})
            elbo = Trace_ELBO(num_particles, max_plate_nesting=1, vectorize_particles=True)
            svi = SVI(self.model, guide, optimizer, elbo)
            self.losses = [float(svi.step()) for _ in range(num_steps)]
            with torch.no_grad():
                drawn = [guide() for _ in range(num_draws)]
        sites = [name for name, _, _ in self._parameters()]
        draws = {name: torch.stack([one[name] for one in drawn]).detach() for name in sites}
        if not all(bool(value.isfinite().all()) for value in draws.values()):
            raise ValueError(
                f"the fit diverged with learning_rate={learning_rate}; try a lower one"
            )
        self._draws = draws
        return self

    def _made_guide(self) -> Any:
        if self.guide is not None:
            return self.guide(self.model)
        size = sum(shape.numel() for _, shape, _ in self._parameters())
        kind = AutoMultivariateNormal if size <= _FULL_COVARIANCE else AutoNormal
        return kind(self.model, init_loc_fn=init_to_sample, init_scale=0.1 * self.prior_scale)

    # the posterior

    @property
    def draws(self) -> dict[str, Tensor]:
        """
        Draws of the posterior by the names of the parameters' sites, along dim 0.

        :raises ValueError: If there was no fit yet, or units have changed since.
        """
        if self._draws is None:
            raise ValueError("the taste is not fitted yet; call fit")
        return self._draws

    @property
    def num_draws(self) -> int:
        """The number of draws of the posterior."""
        return len(next(iter(self.draws.values())))

    @property
    def weights(self) -> Tensor:
        """
        Draws of the weights of the features, of shape ``(num_draws, num_features)``.

        :raises ValueError: If the utility is not linear.
        """
        if not self._is_linear:
            raise ValueError("a network has no weights of features; see draws")
        return self.draws[f"{_PREFIX}weight"][:, 0]

    def table(self, level: float = 0.9) -> str:
        """
        The weights with intervals, as text.

        :param float level: The posterior probability of an interval.
        :raises ValueError: If ``level`` is none, or the utility is not linear.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level}; give a probability between 0 and 1, such as 0.9")
        low, high = (self.weights.quantile(q, 0) for q in ((1 - level) / 2, (1 + level) / 2))
        width = max(len(name) for name in self.names)
        lines = [f"{'feature':<{width}}  weight  {100 * level:.0f} % interval"]
        for i, name in enumerate(self.names):
            mean = float(self.weights[:, i].mean())
            lines.append(f"{name:<{width}}  {mean:+6.2f}  {low[i]:+.2f} to {high[i]:+.2f}")
        return "\n".join(lines)

    def utilities(self, samples: Any) -> Tensor:
        """
        The utility of samples by every draw of the posterior.

        :param samples: A batch of ``B`` samples.
        :returns: Of shape ``(num_draws, B)``, in float64.
        """
        features = self._standardised(self.features(samples))
        # the dim of one stands for that of choices
        drawn = {name: value[:, None].to(features.device) for name, value in self.draws.items()}
        return self._utilities(features, drawn).double()

    def probability(self, first: Any, second: Any) -> Tensor:
        """
        The posterior probability that samples are preferred to others.

        :param first: A batch of ``B`` samples.
        :param second: As many.
        :returns: Of shape ``(B,)``.
        :raises ValueError: If there are not as many.
        """
        _check_as_many(first=first, second=second)
        return (self.utilities(first) - self.utilities(second)).sigmoid().mean(0)

    def suggest(self, samples: Any, size: int) -> list[int]:
        """
        Which samples to show next: those whose comparison would tell most.

        Chosen one after the other, each of largest posterior variance given the utilities of those
        chosen before, relative to the mean of the samples.

        :param samples: A batch to choose from.
        :param int size: How many to choose.
        :returns: Their indices.
        :raises ValueError: If there are not as many.
        """
        spread = self.utilities(samples).detach()
        if not 1 <= size <= spread.shape[1]:
            raise ValueError(f"size={size}; give a number from 1 to {spread.shape[1]}")
        spread = spread - spread.mean(1, keepdim=True)
        covariance = (spread - spread.mean(0)).T @ (spread - spread.mean(0)) / len(spread)
        chosen: list[int] = []
        for _ in range(size):
            variance = covariance.diagonal().clone()
            variance[chosen] = -math.inf
            best = int(variance.argmax())
            chosen.append(best)
            column = covariance[:, best]
            # a choice tells a utility up to noise of about one nat
            covariance = covariance - torch.outer(column, column) / (column[best] + 1.0)
        return chosen

    # rewards

    def reward(
        self,
        posterior: Posterior = "mean",
        *,
        caution: float = 0.0,
        scale: float | None = None,
        draw: int = 0,
    ) -> Reward:
        r"""
        The taste as a reward.

        With :math:`u_\theta` the utility, :math:`\theta` distributed as the posterior, and
        :math:`\lambda` the scale of the reward, a model :math:`p` is tilted to

        - ``"mean"``: :math:`p\, e^{\lambda\, \mathbb{E} u_\theta}`, what the taste is best guessed
          to be; with ``caution`` :math:`c`, to :math:`p\, e^{\lambda (\mathbb{E} u_\theta - c\,
          \mathrm{sd}\, u_\theta)}`, away from what is not known to be liked;
        - ``"draw"``: :math:`p\, e^{\lambda u_\theta}` for one draw, which explores: other draws,
          from round to round, are tried as often as they are credible;
        - ``"average"``: :math:`p\, \mathbb{E} e^{\lambda u_\theta}`, the law of the sample where
          the taste is a latent beside it; it leans to what might be liked very much.

        For a mixture of the laws of several draws, each counting the same, see :meth:`rewards`.

        :param str posterior: One of these.
        :param float caution: See above.
        :param float scale: The scale that the reward will be given, for ``"average"``.
        :param int draw: Which draw, for ``"draw"``.
        :returns: A reward, differentiable where the features are.
        :rtype: ~pyro_twist.rewards.Reward
        :raises ValueError: If there was no fit yet, or an option does not fit.
        """
        if posterior not in get_args(Posterior):
            raise ValueError(f"posterior={posterior!r}; choose one of {get_args(Posterior)}")
        if posterior == "average" and not (scale and math.isfinite(scale)):
            raise ValueError(
                f"scale={scale}: the average of exp(scale * utility) depends on the scale; give "
                "the one of the RewardTilted"
            )
        if caution and posterior != "mean":
            raise ValueError(f"caution={caution} is for posterior='mean', not {posterior!r}")
        if caution and self.num_draws < 2:
            raise ValueError(f"caution={caution} needs two or more draws; fit with num_draws=200")
        if posterior == "draw" and not 0 <= draw < self.num_draws:
            raise ValueError(f"draw={draw}; there are {self.num_draws}")
        frozen = self._frozen()
        summary: dict[str, Callable[[Tensor], Tensor]] = {
            "mean": lambda u: u.mean(0) - caution * u.std(0) if caution else u.mean(0),
            "draw": lambda u: u[draw],
            "average": lambda u: (
                ((scale or 1.0) * u).logsumexp(0).sub(math.log(len(u))) / (scale or 1.0)
            ),
        }
        chosen = summary[posterior]
        return Reward(
            lambda samples: chosen(frozen.utilities(samples)),
            name=f"taste ({posterior})",
            input=self.input,
        )

    def rewards(self, number: int) -> list[Reward]:
        """
        Rewards of several draws of the posterior, one for each entry of a model's plate.

        Run with ``population_plate`` and joined by :func:`~pyro_twist.hierarchies.mixture`, the law
        is the mixture of the tilted laws of the draws, all counting the same.

        :param int number: How many, spread over the draws.
        :returns: A list of rewards.
        """
        if not 1 <= number <= self.num_draws:
            raise ValueError(f"number={number}; give a number from 1 to {self.num_draws}")
        return [self.reward("draw", draw=k * self.num_draws // number) for k in range(number)]

    def latent(self, model: Any, scale: float = 1.0, *, name: str = "taste") -> Tilted:
        r"""
        A model with the taste as a latent beside the trajectory.

        The joint law of sample and taste is proportional to the posterior of the taste, times
        :math:`p\, e^{\lambda u_\theta}`. So the law of the taste is no longer its posterior: it
        leans to tastes that can be satisfied well. The law of the sample is that of ``"average"``.

        :param model: A model with ``event_shape``.
        :param float scale: The strength of the reward.
        :param str name: The name of the latent and of its entry in the state: the index of a draw.
        :returns: A model.
        :rtype: ~pyro_twist.rewards.Tilted
        """
        frozen, number = self._frozen(), self.num_draws

        def prior() -> dict[str, Tensor]:
            return {name: pyro.sample(name, dist.Categorical(torch.ones(number)))}

        def potential(state: Any, x0: Tensor) -> None:
            batch = x0.shape[: x0.dim() - len(model.event_shape)]
            samples = x0.reshape((-1,) + tuple(model.event_shape))
            samples = model.decode(samples) if hasattr(model, "decode") else samples
            draw = state[name].expand(batch).reshape(1, -1)
            utility = frozen.utilities(samples).gather(0, draw)[0]
            pyro.factor("preference", scale * utility.reshape(batch))

        return Tilted(WithLatents(model, prior), potential)

    def _frozen(self) -> Preferences:
        """This posterior as it is now: later choices and fits must not change a reward."""
        frozen = Preferences.__new__(Preferences)
        frozen.__dict__.update(self.__dict__)
        frozen._draws = {name: value.clone() for name, value in self.draws.items()}
        frozen.choices = []
        return frozen

    # files

    def save(self, path: str | Path) -> None:
        """
        Writes choices, units and posterior; not the features' functions and the network.

        :param path: A ``.safetensors`` file.
        """
        from safetensors.torch import save_file

        tensors = {f"choice_{i}": one.features for i, one in enumerate(self.choices)}
        tensors |= {f"draws/{name}": value for name, value in (self._draws or {}).items()}
        if self._standard is not None:
            tensors["centre"], tensors["spread"] = self._standard
        about = {
            "names": list(self.names),
            "prior_scale": self.prior_scale,
            "choices": [[list(one.chosen), one.ordered] for one in self.choices],
        }
        metadata = {"preferences": json.dumps(about)}
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path, features: Any, **options: Any) -> Self:
        """
        Reads what :meth:`save` wrote.

        :param path: The file.
        :param features: The same features as before.
        :param options: Other arguments of the class, such as the same ``network``.
        :raises ValueError: If the file is none of these, or its features have other names.
        """
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if "preferences" not in metadata:
            raise ValueError(f"{path} was not written by Preferences.save")
        about = json.loads(metadata["preferences"])
        options.setdefault("prior_scale", about["prior_scale"])
        taste = cls(features, **options)
        if taste.names and list(taste.names) != about["names"]:
            raise ValueError(
                f"the file's features are {about['names']}, these are {list(taste.names)}"
            )
        taste._names = tuple(about["names"]) or taste._names
        for i, (chosen, ordered) in enumerate(about["choices"]):
            taste.choices.append(Choice(tensors[f"choice_{i}"], tuple(chosen), ordered))
        if "centre" in tensors:
            taste._standard = (tensors["centre"], tensors["spread"])
        draws = {k.removeprefix("draws/"): v for k, v in tensors.items() if k.startswith("draws/")}
        taste._draws = draws or None
        return taste


class SimulatedRater:
    """
    Somebody whose taste is known, to try things out: chooses as the Plackett-Luce model has it.

    :param callable utility: A function of a batch of samples, such as a
        :class:`~pyro_twist.rewards.Reward`, that returns a number for each.
    :param int seed: Of the rater's own random numbers.
    """

    def __init__(self, utility: Callable[[Any], Any], seed: int = 0) -> None:
        self.utility = utility
        self._stream = RandomStream(seed)

    def rank(self, samples: Any, num_ranked: int | None = None) -> list[int]:
        """
        Ranks samples.

        :param samples: A batch.
        :param int num_ranked: How many places to give, all by default.
        :returns: Indices, the best first.
        :raises ValueError: If the utility is not one number for each sample.
        """
        utilities = torch.as_tensor(self.utility(samples)).detach().double().cpu()
        if utilities.shape != (len(samples),) or bool(utilities.isnan().any()):
            raise ValueError(
                f"utility returned {tuple(utilities.shape)} numbers for {len(samples)} samples, "
                f"{int(utilities.isnan().sum())} of them NaN; return one for each"
            )
        with self._stream():
            order: list[int] = PlackettLuce(utilities, num_ranked).sample().tolist()
        return order

    def favourites(self, samples: Any, number: int) -> list[int]:
        """
        Marks some samples, in no order.

        :param samples: A batch.
        :param int number: How many to mark.
        :returns: Their indices.
        """
        return sorted(self.rank(samples, number))


def _feature_functions(
    features: Any, names: Sequence[str] | None
) -> tuple[list[Callable[[Any], Any]], tuple[str, ...] | None]:
    if isinstance(features, Mapping):
        if names is not None or not features:
            raise ValueError("features is a dict, whose keys are the names; give one or more")
        return list(features.values()), tuple(features)
    if callable(features):
        return [features], None if names is None else tuple(names)
    if isinstance(features, str) or not isinstance(features, Sequence) or not features:
        raise ValueError(
            f"features={features!r}; give names of image rewards, such as ['red', 'bright'], a "
            "dict of functions by name, or a function of a batch of samples"
        )
    return [image_reward(name) for name in features], tuple(features)


def _indices(name: str, chosen: Any, size: int) -> tuple[int, ...]:
    """Indices of samples, of which there are ``size``; masks and fractions are none."""
    found = torch.as_tensor(chosen if isinstance(chosen, (Tensor, int)) else list(chosen))
    whole = not (found.is_floating_point() or found.dtype == torch.bool)
    indices = tuple(found.tolist()) if whole and found.dim() == 1 else ()
    valid = len(set(indices)) == len(indices) and all(0 <= index < size for index in indices)
    if not indices or not valid:
        raise ValueError(
            f"{name}={chosen}; give different indices from 0 to {size - 1} of the samples"
        )
    return indices


def _check_as_many(**batches: Any) -> None:
    (one, first), (other, second) = batches.items()
    if len(first) != len(second):
        raise ValueError(f"{one} has {len(first)} samples, {other} {len(second)}; give as many")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not value >= 1:
            raise ValueError(f"{name}={value}; give 1 or more")


def _check_output(found: torch.Size, features: torch.Size) -> None:
    if found != (*features[:-1], 1):
        raise ValueError(
            f"the network returned shape {tuple(found)} for features of shape {tuple(features)}; "
            f"return {(*features[:-1], 1)}"
        )


def _batch_of(samples: Any, kind: Input) -> Any:
    """A single sample as a batch of one: images have three dims, a batch of them four."""
    if kind != "list" and isinstance(samples, Tensor) and samples.dim() in (1, 3):
        return samples[None]
    return [samples] if isinstance(samples, str) else samples
