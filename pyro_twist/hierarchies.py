# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Hierarchies: sets of samples that share latents or rewards, and mixtures over what is unknown.

:class:`SetOf` makes one sample of several, so that one particle is a set of images. What is put
around the model *inside* it is for each image, what is put around the set is shared::

    each = RewardTilted(diffusion, image_reward("symmetric"), scale=10.0)  # of every image
    images = SetOf(each, 4)
    palette = WithLatents(images, draw_palette)  # one palette for the set
    model = RewardTilted(palette, {"variety": variety}, scale=5.0)  # a reward of the whole set

:func:`mixture` joins populations, say of different classes, or of different draws of an unknown
reward weight, to one law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_twist.wrapper import ModelWrapper, run_model

if TYPE_CHECKING:
    from pyro_twist.infer.result import SMCResult

__all__ = ["SetOf", "mixture", "over_set"]


class SetOf(ModelWrapper):
    """
    A model whose sample is a set of samples of another one.

    The entries of a set are drawn side by side by the same kernels; a site ``x_t`` holds all of
    them, of event shape ``(size,) + event_shape``, and a particle is a whole set. Latents,
    rewards and potentials of the inner model are for each entry, their log-probabilities are
    summed; those put around the set are shared by its entries, or are of all of them together: a
    reward around the set gets batches of sets, of shape ``(B, size, channels, height, width)`` for
    images. To condition each entry differently, name ``given``::

        SetOf(zoo.load("emoji", label="flags"), 3, given={"class_labels": torch.tensor([0, 1, 2])})

    Sets of independent samples are better run as populations of single ones, each with weights of
    its own: a set is for what its entries share, and needs more particles the larger it is.

    :param model: A model with ``init``, ``step`` and ``event_shape``, without a plate.
    :param int size: The number of entries.
    :param dict given: Entries of the state with a value for each entry of the set, of shape
        ``(size,)`` or ``(size,) + event``, such as classes.
    :param shared: The names of entries of the state that the set shares. By default those that the
        state has when ``init`` is called, such as latents of a
        :class:`~pyro_twist.latents.WithLatents` around the set.
    :raises ValueError: If the model has a plate or is handled, or a value does not fit.
    """

    def __init__(
        self,
        model: Any,
        size: int,
        *,
        given: Mapping[str, Any] | None = None,
        shared: Collection[str] | None = None,
    ) -> None:
        super().__init__(model)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size={size!r}; give a whole number, 1 or more")
        if isinstance(shared, str):
            raise ValueError(f"shared={shared!r}; give a collection of names, as in [{shared!r}]")
        _check_inner(model)
        self.size = size
        self.event_shape = torch.Size((size, *model.event_shape))
        self.given = {name: torch.as_tensor(value) for name, value in (given or {}).items()}
        for name, value in self.given.items():
            if value.shape[:1] != (size,):
                raise ValueError(
                    f"given[{name!r}] has shape {tuple(value.shape)}; its first dim is one value "
                    f"for each entry of the set, so of size {size}"
                )
        self._shared = None if shared is None else frozenset(shared)
        self._declared = self._shared is not None

    def __repr__(self) -> str:
        return f"SetOf({self.model!r}, {self.size})"

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name == "complete":
            raise ValueError(
                "look-aheads by completions take one sequence for each particle, not a set. Leave "
                "the look-ahead out, or run the sequences as populations of single ones."
            )
        return value

    # the contract of a model

    def init(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """
        Draws the start of every entry.

        :param dict state: The state, written to.
        """
        if not self._declared:
            self._shared = frozenset(state)
        inside = self._inside(state, _depth())
        for name, value in self.given.items():
            inside[name] = value.expand(_batch() + value.shape)
        with _AsEvent(self.size):
            self.model.init(inside, *args, **kwargs)

    def step(self, state: Any, t: int, *args: Any, **kwargs: Any) -> None:
        """
        Moves every entry.

        :param dict state: The state, read and written.
        :param int t: The time index.
        """
        with _AsEvent(self.size):
            self.model.step(self._inside(state, self._batch_dims(state)), t, *args, **kwargs)

    def kernel(self, state: Any, t: int) -> Any:
        """
        The law of the next set given the state.

        :param dict state: The state.
        :param int t: The time index.
        :returns: A distribution of event shape :attr:`event_shape`.
        """
        kernel = self.model.kernel(self._inside(state, self._batch_dims(state)), t)
        return _as_event(kernel, self.size, "kernel")

    def terminal(self, state: Any, x0: Tensor) -> None:
        """
        Emits the terminal factors and observations of every entry.

        :param dict state: The state, read only.
        :param torch.Tensor x0: Sets, or guesses of them, of shape ``batch_shape + event_shape``.
        """
        if hasattr(self.model, "terminal"):
            with _AsEvent(self.size):
                self.model.terminal(self._inside(state, x0.dim() - len(self.event_shape)), x0)

    def decode(self, x: Tensor) -> Tensor:
        """
        Maps sets to user space, entry by entry.

        :param torch.Tensor x: Of shape ``batch_shape + event_shape``.
        :returns: Of shape ``batch_shape + (size,)`` and the decoded shape of an entry.
        """
        decoded: Tensor = self.model.decode(x) if hasattr(self.model, "decode") else x
        return decoded

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a whole trajectory; see :class:`~pyro_twist.wrapper.ModelWrapper`."""
        return run_model(self, *args, **kwargs)

    # the state as an entry sees it

    def _inside(self, state: Any, depth: int) -> _Inside:
        return _Inside(state, self._shared, depth)

    def _batch_dims(self, state: Any) -> int:
        """The number of batch dims of the entries of a state."""
        if "x" in state:
            return int(state["x"].dim()) - len(self.event_shape)
        return _depth()


class _Inside(MutableMapping[Any, Any]):
    """A state as the model inside a set sees it: what the set shares has a dim for its entries."""

    def __init__(self, state: Any, shared: frozenset[str] | None, depth: int) -> None:
        self.state, self.shared, self.depth = state, shared, depth

    def __getitem__(self, key: Any) -> Any:
        value = self.state[key]
        if self.shared is None:
            raise ValueError(
                f"state[{key!r}] was made by another SetOf, so that it is unknown whether its "
                "entries share it; say so with SetOf(..., shared=[names])"
            )
        if key not in self.shared or not isinstance(value, Tensor) or value.dim() < self.depth:
            return value
        return value.unsqueeze(self.depth)

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.shared is not None and key in self.shared:
            raise ValueError(
                f"the model inside the set writes state[{key!r}], which the set shares; rename one "
                "of them"
            )
        self.state[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.state[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def __contains__(self, key: Any) -> bool:
        return key in self.state


class _AsEvent(Messenger):
    """Makes the last batch dim of every site an event dim: the entries of the set."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or not isinstance(msg["fn"], TorchDistributionMixin):
            return
        if msg["infer"].get("_deterministic") and not msg["fn"].batch_shape:
            return
        self._check(msg)
        fn = _as_event(msg["fn"], self.size, msg["name"])
        if msg["value"] is not None:
            value = torch.as_tensor(msg["value"])
            shape = torch.broadcast_shapes(value.shape, fn.event_shape)
            msg["value"] = value.expand(shape)
        msg["fn"] = fn

    def _check(self, msg: Any) -> None:
        plates = [plate.name for plate in msg["cond_indep_stack"] if plate.vectorized]
        if plates:
            raise ValueError(
                f"site {msg['name']!r} inside a SetOf is in the plate {plates[0]!r}, whose dim "
                "would be taken for the entries of the set. Declare the plate's dim as an event "
                "dim with .to_event(), or put the site around the set."
            )
        for what in ("scale", "mask"):
            value = msg[what]
            if isinstance(value, Tensor) and value.dim() > 0:
                raise ValueError(
                    f"site {msg['name']!r} inside a SetOf has a {what} of shape "
                    f"{tuple(value.shape)}; give a single one, or multiply the factor by it"
                )


def _as_event(fn: Any, size: int, name: str) -> Any:
    try:
        batch = torch.broadcast_shapes(fn.batch_shape, (size,))
    except RuntimeError:
        raise ValueError(
            f"site {name!r} inside a SetOf has batch shape {tuple(fn.batch_shape)}, whose last dim "
            f"should be that of the {size} entries of the set. Declare event dims with .to_event()."
        ) from None
    fn = fn if fn.batch_shape == batch else fn.expand(batch)
    return fn.to_event(1)


def _check_inner(model: Any) -> None:
    from pyro_twist.handlers import Handled

    if not hasattr(model, "event_shape"):
        raise ValueError(
            f"{type(model).__name__} has no `event_shape`; give it the shape of one sample"
        )
    if getattr(model, "plate", None) is not None:
        raise ValueError(
            f"the model has the plate {model.plate!r} already; leave it out, and condition the "
            "entries of the set with given={name: values}"
        )
    inner = model
    while isinstance(inner, ModelWrapper):
        if isinstance(inner, Handled):
            raise ValueError(
                f"the model inside the set is handled by {type(inner.handler).__name__}, which "
                "knows nothing of its entries; put the handler around the SetOf"
            )
        inner = inner.model


def _plates() -> dict[int, int]:
    return {plate.dim or 0: plate.size for plate in get_plates() if plate.vectorized}


def _depth() -> int:
    """The number of batch dims of the plates around."""
    return max((-dim for dim in _plates()), default=0)


def _batch() -> tuple[int, ...]:
    """The batch shape of the plates around."""
    plates = _plates()
    return tuple(plates.get(dim, 1) for dim in range(-_depth(), 0))


def over_set(
    reward: Callable[[Any], Any], reduce: Literal["sum", "mean", "min", "max"] = "sum"
) -> Callable[[Tensor], Tensor]:
    """
    A reward of sets from a reward of single samples.

    :param callable reward: A function of a batch of samples, or a
        :class:`~pyro_twist.rewards.Reward`.
    :param str reduce: ``"sum"``, ``"mean"``, ``"min"`` (every entry should be good) or ``"max"``
        (one of them should).
    :returns: A function of a batch of sets, of shape ``(B, size, ...)``, that returns ``B``
        numbers.
    :raises ValueError: If ``reduce`` is none of these.
    """
    if reduce not in _REDUCTIONS:
        raise ValueError(f"reduce={reduce!r}; choose one of {tuple(_REDUCTIONS)}")
    of_sets: Any = partial(_of_sets, reward, reduce)
    of_sets.__name__ = f"{reduce} of {getattr(reward, 'name', 'rewards')}"
    found: Callable[[Tensor], Tensor] = of_sets
    return found


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda values: values.sum(-1),
    "mean": lambda values: values.mean(-1),
    "min": lambda values: values.amin(-1),
    "max": lambda values: values.amax(-1),
}


def _of_sets(reward: Callable[[Any], Any], reduce: str, samples: Tensor) -> Tensor:
    number, size = samples.shape[:2]
    values = torch.as_tensor(reward(samples.flatten(0, 1)))
    if values.shape != (number * size,):
        raise ValueError(
            f"the reward returned shape {tuple(values.shape)} for {number} sets of {size}; return "
            f"one number for each of {number * size} samples"
        )
    return _REDUCTIONS[reduce](values.reshape(number, size))


def mixture(
    result: SMCResult, weights: Tensor | Literal["equal", "evidence"] = "equal"
) -> SMCResult:
    r"""
    One weighted set of particles from those of several populations.

    With :math:`\pi_k` the tilted law of population ``k`` and :math:`Z_k` its normaliser, the law is
    the mixture :math:`\sum_k w_k \pi_k`. Two choices of weights differ in what they say of whatever
    tells the populations apart, such as draws of a reward weight from its prior:

    - ``"equal"`` keeps it as it is: every draw counts the same, however well it can be satisfied;
    - ``"evidence"``, :math:`w_k \propto Z_k`, makes it a latent, whose posterior is the prior times
      :math:`Z_k`, so that it leans to wherever the reward gains most. A latent in a
      :class:`~pyro_twist.latents.WithLatents` has this law.

    :param SMCResult result: A result with a population for each entry of a plate.
    :param weights: One of these, or the weights, of shape ``(num_populations,)``.
    :returns: A result with ``num_particles * num_populations`` particles. Its normaliser is the
        mean of the populations' for ``"evidence"``, and NaN otherwise: mixtures of given weights
        have none.
    :raises ValueError: If there are no populations, or the weights do not fit.
    """
    if result.log_weights.dim() != 2:
        raise ValueError("the result has one population; run the model with population_plate=...")
    log_weights, log_z = _mixed(result, weights)
    state = {key: _joined(result, value) for key, value in result.state.items()}
    samples = None
    if result.samples is not None:
        samples = {key: _joined(result, value) for key, value in result.samples.items()}
    return replace(
        result,
        state=state,
        log_weights=log_weights.reshape(-1),
        log_normalizer=log_z,
        samples=samples,
        population_axis=1,
        diagnostics=None,
    )


def _mixed(result: SMCResult, weights: Any) -> tuple[Tensor, Tensor]:
    """Log-weights of all particles, and the log-normaliser."""
    number = result.log_weights.shape[1]
    if isinstance(weights, str) and weights == "evidence":
        log_z = result.log_normalizer.logsumexp(0) - math.log(number)
        return result.log_weights, log_z
    if isinstance(weights, str):
        if weights != "equal":
            raise ValueError(f"weights={weights!r}; give 'equal', 'evidence' or numbers")
        weights = torch.ones(number)
    share = torch.as_tensor(weights, dtype=torch.float64, device=result.log_weights.device)
    if share.shape != (number,) or not bool((share >= 0).all()) or not float(share.sum()) > 0:
        raise ValueError(
            f"weights have shape {tuple(share.shape)}; give one number for each of the {number} "
            "populations, none negative and not all zero"
        )
    own = result.log_weights - result.log_weights.logsumexp(0)
    log_weights = own + (share / share.sum()).log() + math.log(own.numel())
    return log_weights, torch.full((), math.nan, dtype=torch.float64)


def _joined(result: SMCResult, value: Tensor) -> Tensor:
    """Particles and populations as one dim."""
    value = value.movedim(result.population_axis, 1)
    number = result.log_weights.shape[1]
    return value.expand(len(value), number, *value.shape[2:]).flatten(0, 1)
