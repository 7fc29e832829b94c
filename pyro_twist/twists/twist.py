# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Twists: guides that look ahead.

A twist is a positive function :math:`\\psi_t(x_t)`, an approximation of the expected product of
all later factors given :math:`x_t`. It enters inference in two places: the proposal, by
:meth:`Twist.get_posterior`, and the weights, by :meth:`Twist.log_twist`.
"""

from __future__ import annotations

from abc import ABCMeta
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyro
import torch
from pyro.nn import PyroModule
from pyro.nn.module import _PyroModuleMeta
from pyro.poutine.guide import GuideMessenger

if TYPE_CHECKING:
    from pyro_twist.twists.summary import Panel

__all__ = ["SumTwist", "Twist", "Twisted"]


class _TwistMeta(ABCMeta, _PyroModuleMeta):
    pass


class Twist(GuideMessenger, PyroModule, metaclass=_TwistMeta):
    """
    Base class of twists, and the twist that is identically one.

    A twist overrides one or both of :meth:`get_posterior` and :meth:`log_twist`. Twists add:
    ``a + b`` multiplies the two functions and tilts the kernel by both.

    The model is kept out of the module, so that its networks are no parameters of the twist.

    :param model: The model that the twist looks ahead in, an object with ``init`` and ``step``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)

    #: Whether the engine is in a ``step``, not in ``init``; set by the engine.
    stepping: bool = True

    #: In a sum, the model's own kernel, before the parts that come first have tilted it.
    base_kernel: Any = None

    @property
    def model(self) -> Any:
        """The model, which is no submodule."""
        return self._model[0]

    @property
    def counts(self) -> dict[str, int]:
        """Evaluations that the twist makes beyond those of the model, by kind."""
        return {}

    def state_keys(self) -> tuple[str, ...]:
        """The entries that the twist writes to the state."""
        return ()

    def time_after(self, *args: Any) -> int:
        """
        The time index of the state that a step produces.

        :param args: The arguments of ``init`` or ``step`` after the state: none, or the time
            index ``t`` first. In :meth:`get_posterior` they are ``self.args_kwargs[0][1:]``.
        :returns: ``T`` for ``init``, ``t - 1`` for ``step``.
        """
        if not self.stepping or not args or args[0] is None:
            return int(self.model.timesteps[0])
        return int(args[0]) - 1

    def get_posterior(self, name: str, prior: Any) -> Any:
        """
        The proposal at a site; the state before the step is ``self.args_kwargs[0][0]``.

        :param str name: The name of the site, for a diffusion model ``x_{t-1}``.
        :param prior: The base kernel at the current particles.
        :type prior: ~pyro.distributions.Distribution
        :returns: The proposal. ``prior`` itself where the twist leaves the site alone.
        """
        return prior

    def log_twist(self, state: Any, *args: Any, **kwargs: Any) -> torch.Tensor | float:
        """
        :math:`\\log \\psi` at the state that ``init(*args)`` or ``step(*args)`` has just produced.

        Called once after every step but the last, where the engine takes 0. The twist may write
        entries of its own to ``state``: they follow their particle through every resampling.

        :param state: The state after the step.
        :returns: Of shape ``(num_particles,)``, ``(num_particles, num_populations)``, the batch
            shape of the sites, or a number; finite.
        :rtype: torch.Tensor
        """
        return 0.0

    def summary(self, at: torch.Tensor | None = None) -> list[Panel]:
        """
        What the twist has learned, for a report.

        A family of one's own overrides this and returns any of
        :class:`~pyro_twist.twists.summary.Panel`, words alone,
        :class:`~pyro_twist.twists.summary.Curve`, a number for each step,
        :class:`~pyro_twist.twists.summary.Direction`, a push of samples, and
        :class:`~pyro_twist.twists.summary.Ranking`, what is favoured and what is avoided.

        :param torch.Tensor at: Samples to describe a push at, such as the mean of each class, of
            shape ``(num_places,) + event_shape``; by default a place of the twist's own.
        :returns: Panels in the order to be shown; none if there is nothing to say.
        :rtype: list
        """
        from pyro_twist.twists.summary import summarise

        return summarise(self, at)

    def save(self, path: str | Path) -> None:
        """
        Writes parameters and buffers, those of all parts of a sum.

        :param path: A ``.safetensors`` file.
        """
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in self.state_dict().items()}, path)

    def load(self, path: str | Path) -> Self:
        """
        Reads what :meth:`save` wrote, into a twist made with the same arguments.

        :param path: A ``.safetensors`` file.
        :returns: The twist itself.
        """
        from safetensors.torch import load_file

        self.load_state_dict(load_file(path))
        return self

    def __add__(self, other: Twist) -> SumTwist:
        return SumTwist(self, other)

    def __radd__(self, other: Any) -> Twist:
        # so that sum([a, b]) works, which starts from 0
        return self if other == 0 else NotImplemented


class SumTwist(Twist):
    """
    The product of several twists: kernels are tilted by one after the other, log-twists add up.

    :param Twist twists: Two or more twists of one model.
    """

    def __init__(self, *twists: Twist) -> None:
        if len(twists) < 2:
            raise ValueError(f"SumTwist takes two or more twists, got {len(twists)}")
        super().__init__(twists[0].model)
        self.twists = torch.nn.ModuleList(twists)
        keys = [key for twist in twists for key in twist.state_keys()]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(
                    f"two of the twists write state[{key!r}]; give one of them another key="
                )

    def state_keys(self) -> tuple[str, ...]:
        """The keys of all parts."""
        return tuple(key for twist in self.parts() for key in twist.state_keys())

    @property
    def counts(self) -> dict[str, int]:
        """The evaluations of all parts."""
        return dict(sum((Counter(part.counts) for part in self.parts()), Counter()))

    def parts(self) -> list[Twist]:
        """The twists that are multiplied."""
        return [part for part in self.twists if isinstance(part, Twist)]

    def summary(self, at: torch.Tensor | None = None) -> list[Panel]:
        """The panels of all parts."""
        return [panel for twist in self.parts() for panel in twist.summary(at)]

    def get_posterior(self, name: str, prior: Any) -> Any:
        base = prior if self.base_kernel is None else self.base_kernel
        for twist in self.parts():
            twist.stepping, twist.args_kwargs = self.stepping, self.args_kwargs
            twist.base_kernel = base
            try:
                prior = twist.get_posterior(name, prior)
            finally:
                twist.base_kernel = None
                del twist.args_kwargs
        return prior

    def log_twist(self, state: Any, *args: Any, **kwargs: Any) -> torch.Tensor | float:
        for twist in self.parts():
            twist.stepping = self.stepping
        values = [twist.log_twist(state, *args, **kwargs) for twist in self.parts()]
        return sum(values[1:], start=values[0])


class Twisted:
    """
    A model whose successive targets are twisted: the log-twist as factors that telescope.

    This puts a twist into Pyro's own :class:`~pyro.infer.smcfilter.SMCFilter`::

        smc = SMCFilter(Twisted(model, twist), proposal, num_particles=100, max_plate_nesting=0)

    :class:`~pyro_twist.infer.TwistedSMC` does the same from ``log_twist`` by itself; giving it a
    ``Twisted`` model with the same twist would count the twist twice.

    :param model: A model with ``init``, ``step`` and ``timesteps``.
    :param twist: Any object with a ``log_twist`` method.
    """

    def __init__(self, model: Any, twist: Any) -> None:
        self.model = model
        self.twist = twist
        self.timesteps = model.timesteps

    def init(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """Runs the model's ``init`` and adds the first log-twist."""
        self.model.init(state, *args, **kwargs)
        state["log_twist"] = self._log_twist(state, *args, **kwargs)
        pyro.factor("log_twist_init", state["log_twist"])

    def step(self, state: Any, t: int, *args: Any, **kwargs: Any) -> None:
        """Runs the model's ``step`` and adds the difference of the log-twists."""
        before = state["log_twist"]
        self.model.step(state, t, *args, **kwargs)
        if t == self.timesteps[-1]:
            state["log_twist"] = torch.zeros_like(before)
        else:
            state["log_twist"] = self._log_twist(state, t, *args, **kwargs)
        pyro.factor(f"log_twist_{t - 1}", state["log_twist"] - before)

    def _log_twist(self, state: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        value = torch.as_tensor(self.twist.log_twist(state, *args, **kwargs))
        leading = next(iter(state.values())).shape[0]
        return value if value.dim() else value.expand(leading).clone()
