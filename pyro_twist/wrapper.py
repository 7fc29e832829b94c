# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What all models share that are built around another model."""

from __future__ import annotations

from typing import Any

__all__ = ["ModelWrapper", "run_model"]


class ModelWrapper:
    """
    A model around another one; whatever it does not define itself is the inner model's.

    A derived class overrides :meth:`init` or :meth:`step`.

    :param model: A model with ``init`` and ``step``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        if name == "model" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.model, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r})"

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The base model's time indices ``(T, ..., 1)``."""
        return tuple(self.model.timesteps)

    @property
    def keep_graph(self) -> bool:
        """Whether the base model keeps the graph of one denoiser evaluation for gradient twists."""
        return bool(self.model.keep_graph)

    @keep_graph.setter
    def keep_graph(self, value: bool) -> None:
        self.model.keep_graph = value

    @property
    def counts(self) -> dict[str, int]:
        """The base model's evaluation counts."""
        return dict(getattr(self.model, "counts", {}))

    def init(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """
        Runs the base model's ``init``.

        :param dict state: The state, written to.
        """
        self.model.init(state, *args, **kwargs)

    def step(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """
        Runs the base model's ``step``.

        :param dict state: The state, written to.
        """
        self.model.step(state, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Runs a whole trajectory, for any Pyro tool that takes a callable.

        Any arguments are passed to ``init``.

        :returns: The end state, of shape ``batch_shape + event_shape``.
        """
        return run_model(self, *args, **kwargs)


def run_model(model: Any, *args: Any, **kwargs: Any) -> Any:
    """
    Runs a whole trajectory of a model from an empty state.

    :param model: A model with ``init``, ``step`` and ``timesteps``.
    :param args: Passed to ``init``.
    :returns: The entry ``x`` of the state at the end, or the state where there is none.
    """
    state: dict[Any, Any] = {}
    model.init(state, *args, **kwargs)
    for t in model.timesteps:
        model.step(state, t)
    return state.get("x", state)
