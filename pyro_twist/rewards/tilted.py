# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Models tilted by a potential of their end state.

A base model, say a reverse diffusion process, gives the prior of a path; a tilted model is the same
process with factors or observations on its end ``x_0`` added. It is a Pyro model again, so tilts
nest. The factors are emitted by ``terminal(state, x0)``, which :func:`log_potential` evaluates at
any guess of ``x_0``: that is how a twist sees the reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_twist.potential import batch_shape_of, inside, log_potential, plate_of
from pyro_twist.rewards.reward import Reward, RewardError
from pyro_twist.wrapper import ModelWrapper

__all__ = ["RewardTilted", "Tilted", "log_potential"]

_RESERVED_NAMES = ("x", "x0_hat")


class Tilted(ModelWrapper):
    """
    A model times a potential of its end state.

    Has the base model's ``init`` and ``step``; after the last step ``potential`` is run as well.
    Everything else, such as ``kernel`` or ``decode``, is the base model's. If the base model has a
    ``plate``, the potential runs inside it.

    :param model: A model with ``init``, ``step`` and ``timesteps``; its ``state["x"]`` after the
        last step is the end state.
    :param callable potential: A Pyro function ``potential(state, x0)`` that emits factors and
        observations, one per particle, and draws nothing. ``x0`` has the batch dims of the sites on
        the left, ``(num_particles,)`` or ``(num_particles, plate_size)``, then the event dims. It
        must not write to ``state``.
    :raises ValueError: If ``model`` has no ``timesteps``, so no known last step.

    Example, an inverse problem: the left half of the image was observed with noise::

        def likelihood(state, x0):
            left = x0[..., : x0.shape[-1] // 2]
            pyro.sample("y", dist.Normal(left, 0.1).to_event(3), obs=y)

        model = Tilted(diffusion, likelihood)
    """

    def __init__(self, model: Any, potential: Callable[[Any, Tensor], Any]) -> None:
        if not getattr(model, "timesteps", None):
            raise ValueError(
                f"{type(model).__name__} has no `timesteps`, so its last step is unknown; "
                "give it the attribute timesteps = (T, ..., 1)"
            )
        if not callable(potential):
            raise ValueError(f"potential must be a function of (state, x0), got {potential!r}")
        super().__init__(model)
        self.potential = potential
        self._plate = plate_of(model)

    def step(self, state: Any, t: int, *args: Any, **kwargs: Any) -> None:
        """
        Runs the base model's ``step`` and, if it was the last, the potential at its end state.

        :param dict state: The state, written to.
        :param int t: The time index; the step goes from ``x_t`` to ``x_{t-1}``.
        """
        self.model.step(state, t, *args, **kwargs)
        if t == self.timesteps[-1]:
            with inside(self._plate):
                self._end(state)

    def terminal(self, state: Any, x0: Tensor) -> None:
        """
        Emits every terminal factor and observation, the base model's first.

        :param dict state: The state, read only.
        :param torch.Tensor x0: The end state or a guess of it, of shape ``batch_shape +
            event_shape``.
        """
        if hasattr(self.model, "terminal"):
            self.model.terminal(state, x0)
        with inside(self._plate):
            self.potential(state, x0)

    def _end(self, state: Any) -> None:
        self.potential(state, state["x"])


class RewardTilted(Tilted):
    """
    A model tilted by one or several rewards: ``p(x_0) exp(scale * reward(x_0))``.

    Every reward is a :func:`pyro.factor` of its name. The last step also writes the values without
    ``scale`` to ``state`` under the same names, in float64 and of the batch shape.

    :param model: A model as for :class:`Tilted`, with ``event_shape``, the shape of one sample.
    :param reward: A function of a batch of samples or a :class:`~pyro_twist.rewards.Reward`, named
        ``"reward"``; or a dict of them by name. Instead of one function, a sequence of ``P``
        gives each entry of the base model's plate of size ``P`` its own, for example one per
        prompt.
    :param scale: The strength ``lambda``: a number, a tensor that broadcasts to the batch shape,
        the name of an entry of the state, such as a latent drawn in ``init``, or a dict of them by
        the rewards' names. A scale of 0 gives the factor 0, also where the reward is minus
        infinity.
    :param bool decode: Whether rewards get ``model.decode(x0)``, images in [0, 1] of shape
        ``(B, C, H, W)``, or ``x0`` itself, of shape ``(B,) + event_shape``; all batch dims are
        flattened to one.
    :param callable lookahead_decoder: A cheaper decoder for guesses of ``x_0``, such as
        :class:`~pyro_twist.rewards.TinyDecoder`, of the same form as ``model.decode``. End states
        are still decoded by the model, so that the law does not depend on it.
    :raises ValueError: If names or scales do not fit, ``model`` has no ``event_shape``, or there
        is a ``lookahead_decoder`` and nothing to decode.

    Example::

        model = RewardTilted(
            diffusion,
            {"small": image_reward("compressible"), "red": image_reward("red")},
            scale={"small": 5.0, "red": 20.0},
        )
    """

    def __init__(
        self,
        model: Any,
        reward: Any,
        scale: Any = 1.0,
        *,
        decode: bool = True,
        lookahead_decoder: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__(model, self._emit)
        if not hasattr(model, "event_shape"):
            raise ValueError(
                f"{type(model).__name__} has no `event_shape`; give it the shape of one sample, "
                "for example event_shape = (3, 32, 32), so that batch dims can be told apart"
            )
        self.rewards = _named_rewards(reward)
        self.scales = _named_scales(scale, tuple(self.rewards))
        self.decode_samples = decode
        self.lookahead_decoder = lookahead_decoder
        self._check_names()
        self._check_decoder()

    def __repr__(self) -> str:
        return f"RewardTilted({self.model!r}, {self.rewards}, scale={self.scales})"

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The names of all rewards, those of a base model that is itself tilted first."""
        return (*getattr(self.model, "reward_names", ()), *self.rewards)

    @property
    def counts(self) -> dict[str, int]:
        """The base model's evaluation counts and, under ``"reward"``, the samples scored."""
        counts = super().counts
        distinct = {id(reward): reward for reward in self.rewards.values()}
        scored = sum(reward.num_calls for reward in distinct.values())
        return {**counts, "reward": counts.get("reward", 0) + scored}

    def evaluate(self, x0: Tensor, *, guess: bool = False) -> dict[str, Tensor]:
        """
        Scores end states, without the scale.

        :param torch.Tensor x0: Of shape ``batch_shape + event_shape``.
        :param bool guess: Whether ``x0`` is a guess, for which the ``lookahead_decoder`` will do.
        :returns: For every reward of this wrapper its values, float64, of shape ``batch_shape``.
        :raises RewardError: If a reward fails; ``index`` counts the flattened batch.
        """
        batch_shape = batch_shape_of(self.model, x0)
        _check_entries(self.rewards, batch_shape)
        samples: Any = x0.reshape((-1,) + tuple(self.model.event_shape))
        if self.decode_samples and hasattr(self.model, "decode"):
            cheap = self.lookahead_decoder if guess else None
            samples = (cheap or self.model.decode)(samples)
        return {name: reward(samples).reshape(batch_shape) for name, reward in self.rewards.items()}

    def _emit(self, state: Any, x0: Tensor) -> None:
        self._factors(state, self.evaluate(x0, guess=not _is_in(state, x0)))

    def _end(self, state: Any) -> None:
        values = self.evaluate(state["x"])
        for name, value in values.items():
            state[name] = value.detach()
        self._factors(state, values)

    def _factors(self, state: Any, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            scale = self.scales[name]
            if isinstance(scale, str):
                scale = _entry(state, name, scale)
            pyro.factor(name, _scaled(name, scale, value))

    def _check_decoder(self) -> None:
        decodes = self.decode_samples and hasattr(self.model, "decode")
        if self.lookahead_decoder is not None and not decodes:
            raise ValueError(
                "lookahead_decoder stands in for model.decode, which is not called here: "
                + ("decode=False" if not self.decode_samples else "the model has none")
            )

    def _check_names(self) -> None:
        for name, scale in self.scales.items():
            if isinstance(scale, str) and scale in self.reward_names:
                raise ValueError(
                    f"scale of {name!r} is state[{scale!r}], where the reward of that name is "
                    "written; give the latent or the reward another name"
                )
        for name in self.rewards:
            if name in getattr(self.model, "reward_names", ()):
                raise ValueError(
                    f"the model has a reward {name!r} already; give this one another name, "
                    'as in RewardTilted(model, {"another": reward})'
                )
            if name in _RESERVED_NAMES or name.startswith("x_"):
                raise ValueError(
                    f"a reward cannot be named {name!r}, which the diffusion state uses"
                )


def _is_in(state: Any, x0: Tensor) -> bool:
    """Whether ``x0`` is the state's own ``x``, so a sample and no guess."""
    x = state.get("x")
    return isinstance(x, Tensor) and x.shape == x0.shape and x.data_ptr() == x0.data_ptr()


# Rewards and scales


class _PerEntry:
    """One reward per entry of the plate at the last batch dim."""

    def __init__(self, rewards: Sequence[Any]) -> None:
        self.rewards = [_as_reward(reward) for reward in rewards]

    @property
    def num_calls(self) -> int:
        return sum(reward.num_calls for reward in set(self.rewards))

    def __call__(self, samples: Any) -> Tensor:
        entries = range(len(self.rewards))
        return torch.stack([self._entry(samples, entry) for entry in entries], -1).reshape(-1)

    def _entry(self, samples: Any, entry: int) -> Tensor:
        size = len(self.rewards)
        try:
            return self.rewards[entry](samples[entry::size])
        except RewardError as error:
            values = error.values.new_full((len(samples),), math.nan)
            values[entry::size] = error.values
            raise RewardError(
                f"entry {entry}: {error}", error.index * size + entry, values
            ) from error


def _as_reward(reward: Any) -> Any:
    if isinstance(reward, (Reward, _PerEntry)):
        return reward
    if isinstance(reward, Sequence) and not isinstance(reward, str):
        return _PerEntry(reward)
    return Reward(reward)


def _named_rewards(reward: Any) -> dict[str, Any]:
    named = dict(reward) if isinstance(reward, Mapping) else {"reward": reward}
    if not named:
        raise ValueError("reward is an empty dict; give at least one reward")
    return {name: _as_reward(function) for name, function in named.items()}


def _check_entries(rewards: Mapping[str, Any], batch_shape: torch.Size) -> None:
    for name, reward in rewards.items():
        if isinstance(reward, _PerEntry) and batch_shape[-1:] != (len(reward.rewards),):
            raise ValueError(
                f"{name!r} has {len(reward.rewards)} rewards, but the batch shape is "
                f"{tuple(batch_shape)}; give one per entry of the model's plate, the last batch dim"
            )


def _named_scales(scale: Any, names: tuple[str, ...]) -> dict[str, Any]:
    scales = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(names, scale)
    if set(scales) != set(names):
        raise ValueError(f"scale has the names {sorted(scales)}, the rewards {sorted(names)}")
    for name, value in scales.items():
        if not isinstance(value, str) and not torch.isfinite(torch.as_tensor(value)).all():
            raise ValueError(f"scale of {name!r} is {value}; give finite numbers")
    return scales


def _entry(state: Any, name: str, key: str) -> Tensor:
    if key not in state:
        raise ValueError(
            f"scale of {name!r} is state[{key!r}], but the state has only {list(state)}; draw it "
            "in init, for example with WithLatents"
        )
    value: Tensor = state[key]
    return value


def _scaled(name: str, scale: Any, values: Tensor) -> Tensor:
    scale = _expanded(name, torch.as_tensor(scale).to(values.device, torch.float64), values)
    if ((values == -math.inf) & (scale < 0)).any():
        raise ValueError(
            f"reward {name!r} is -inf and its scale negative, which makes +inf; "
            "negate the reward instead"
        )
    return torch.where(scale == 0, torch.zeros_like(values), scale * values)


def _expanded(name: str, scale: Tensor, values: Tensor) -> Tensor:
    try:
        return scale.expand(values.shape)
    except RuntimeError:
        raise ValueError(
            f"scale of {name!r} has shape {tuple(scale.shape)}, which does not broadcast to the "
            f"batch shape {tuple(values.shape)}"
        ) from None
