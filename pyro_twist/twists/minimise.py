# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Minimising a loss, by L-BFGS or by an optimiser of one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler

__all__ = ["Minimiser", "OptimizerLike"]

#: What makes an optimiser of a list of parameters; one of Pyro; or ``None`` for L-BFGS.
OptimizerLike = Callable[[Any], torch.optim.Optimizer] | PyroOptim | None

_STEPS = 200


@dataclass(frozen=True)
class Minimiser:
    """
    Minimises losses, each by an optimiser that starts anew.

    :param optimizer: A function of a list of parameters that makes a torch optimiser, such as
        ``lambda parameters: torch.optim.Adam(parameters, lr=0.01)``; or an optimiser of Pyro, of
        which a copy without its state is used, its schedule, if it has one, moving with every step.
        By default L-BFGS with a line search.
    :param int num_steps: How often to call its ``step``; by default once for L-BFGS, which iterates
        by itself, and 200 times for others.
    :raises ValueError: If it is something else, for example bound to parameters already.
    """

    optimizer: OptimizerLike = None
    num_steps: int | None = None

    def __post_init__(self) -> None:
        given: Any = self.optimizer
        number = self.num_steps
        if isinstance(given, torch.optim.Optimizer):
            name = type(given).__name__
            raise ValueError(
                f"optimizer={name}(...) belongs to parameters already, but a fit starts anew every "
                f"time; give what makes one, such as lambda parameters: {name}(parameters, lr=0.01)"
            )
        if given is not None and not callable(given):
            raise ValueError(
                f"optimizer={given!r}; give a function of parameters that makes a torch optimiser, "
                "such as lambda parameters: torch.optim.Adam(parameters, lr=0.01), or an optimiser "
                'of Pyro, such as pyro.optim.Adam({"lr": 0.01})'
            )
        if number is not None and (type(number) is not int or number < 1):
            raise ValueError(f"optimizer_steps={number!r}; give a whole number, 1 or more")

    def __call__(
        self,
        loss: Callable[[], torch.Tensor],
        parameters: Sequence[torch.nn.Parameter | torch.Tensor],
        max_iterations: int,
    ) -> None:
        """
        Moves parameters to a smaller loss.

        :param callable loss: The loss at the parameters as they are, differentiable.
        :param parameters: The parameters, changed in place.
        :param int max_iterations: Of L-BFGS, where it is the default.
        """
        with torch.enable_grad():
            if isinstance(self.optimizer, PyroOptim):
                self._by_pyro(self.optimizer, loss, parameters)
            else:
                self._by_torch(loss, parameters, max_iterations)

    def _by_torch(self, loss: Any, parameters: Sequence[torch.Tensor], max_iterations: int) -> None:
        optimizer = self._made(list(parameters), max_iterations)

        def closure() -> Any:
            optimizer.zero_grad()
            value: torch.Tensor = loss()
            value.backward()
            return value

        once = isinstance(optimizer, torch.optim.LBFGS)
        for _ in range(self.num_steps or (1 if once else _STEPS)):
            optimizer.step(closure)

    def _made(self, parameters: list[torch.Tensor], max_iterations: int) -> torch.optim.Optimizer:
        if self.optimizer is None:
            return torch.optim.LBFGS(
                parameters,
                max_iter=max_iterations,
                line_search_fn="strong_wolfe",
                history_size=20,
            )
        made = self.optimizer(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer={self.optimizer!r} made {type(made).__name__} of the parameters; it is "
                "to make an optimiser of torch"
            )
        return made

    def _by_pyro(self, given: PyroOptim, loss: Any, parameters: Sequence[torch.Tensor]) -> None:
        optimizer = copy.copy(given)
        optimizer.optim_objs, optimizer.grad_clip = {}, {}
        for _ in range(self.num_steps or _STEPS):
            for one in parameters:
                one.grad = None
            loss().backward()
            optimizer([one for one in parameters if one.grad is not None])
            if isinstance(optimizer, PyroLRScheduler):
                optimizer.step()
