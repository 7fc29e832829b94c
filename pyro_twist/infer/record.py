# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What a run remembers of its steps."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine

from pyro_twist.infer.increments import latent_sites
from pyro_twist.infer.particles import take_ancestors
from pyro_twist.infer.result import Diagnostics

__all__ = ["Record"]

_SERIES = ("ess", "log_normalizer", "increments", "resampled")


class Series:
    """
    A growing tensor of one entry per step.

    Not a list of small tensors: those, kept between the large ones that come and go with every
    step, fragment the heap until memory grows with the steps.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, value: torch.Tensor) -> None:
        """Adds an entry, of the same shape and dtype as all before."""
        if self._buffer is None:
            self._buffer = value.new_empty((64, *value.shape))
        elif self._size == len(self._buffer):
            self._buffer = torch.cat([self._buffer, torch.empty_like(self._buffer)])
        self._buffer[self._size] = value
        self._size += 1

    def last(self) -> torch.Tensor:
        """The latest entry."""
        assert self._buffer is not None, "the series is empty"
        return self._buffer[self._size - 1]

    def tensor(self) -> torch.Tensor:
        """All entries, as a copy."""
        if self._buffer is None:
            return torch.empty(0, dtype=torch.float64)
        return self._buffer[: self._size].clone()

    @staticmethod
    def of(values: torch.Tensor) -> Series:
        """The series with the given entries."""
        series = Series()
        for value in values:
            series.append(value)
        return series


class Record:
    """
    Per-step diagnostics and, on request, ancestors and the values of latent sites.

    :param str history: ``"off"``, ``"ancestors"`` or ``"paths"``.
    """

    def __init__(self, history: str) -> None:
        self.history = history
        self.ess = Series()
        self.log_normalizer = Series()
        self.increments = Series()
        self.resampled = Series()
        self.ancestors: list[torch.Tensor | None] = []
        self.sites: list[dict[str, torch.Tensor]] = []
        self._pending: dict[str, torch.Tensor] = {}

    def keep_sites(self, trace: poutine.Trace) -> None:
        """Remembers the latent values of a step that is under way."""
        if self.history == "paths":
            sites = latent_sites(trace, given=True)
            self._pending = {name: site["value"] for name, site in sites}

    def add(
        self,
        ess: torch.Tensor,
        log_normalizer: torch.Tensor,
        increment: torch.Tensor,
        resampled: torch.Tensor,
        ancestors: torch.Tensor | None,
    ) -> None:
        """Closes a step; ``ancestors`` is ``None`` where nothing was resampled."""
        self.ess.append(ess)
        self.log_normalizer.append(log_normalizer)
        self.increments.append(increment)
        self.resampled.append(resampled)
        if self.history != "off":
            self.ancestors.append(None if ancestors is None else ancestors.int())
        if self.history == "paths":
            self.sites.append(self._pending)

    def last(self) -> tuple[float, float]:
        """The effective sample size and log-normaliser after the last step, averaged."""
        return float(self.ess.last().mean()), float(self.log_normalizer.last().mean())

    def diagnostics(self, log_weights: torch.Tensor) -> Diagnostics | None:
        """The finished diagnostics; ``log_weights`` tells the shape of the ancestors."""
        if not len(self.ess):
            return None
        ancestors = None
        if self.history != "off":
            ancestors = self._all_ancestors(log_weights)
        return Diagnostics(
            ess=self.ess.tensor(),
            log_normalizer=self.log_normalizer.tensor(),
            increments=self.increments.tensor(),
            resampled=self.resampled.tensor(),
            ancestors=ancestors,
        )

    def _all_ancestors(self, like: torch.Tensor) -> torch.Tensor:
        same = torch.arange(like.shape[0], device=like.device)
        same = same.reshape((-1,) + (1,) * (like.dim() - 1)).expand(like.shape)
        return torch.stack([same if index is None else index.long() for index in self.ancestors])

    def samples(self, axis: int) -> dict[str, torch.Tensor] | None:
        """The value of every latent site along the lineages of the present particles."""
        if self.history != "paths":
            return None
        paths: dict[str, torch.Tensor] = {}
        lineage: torch.Tensor | None = None
        steps = zip(reversed(self.sites), reversed(self.ancestors), strict=True)
        for sites, ancestors in steps:
            lineage = _compose(None if ancestors is None else ancestors.long(), lineage)
            for name, value in sites.items():
                followed = value if lineage is None else take_ancestors(value, lineage, axis)
                paths.setdefault(name, followed)
        return dict(reversed(paths.items()))

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, fit for ``torch.save``."""
        series = {name: getattr(self, name).tensor() for name in _SERIES}
        kept = {"ancestors": list(self.ancestors), "sites": list(self.sites)}
        return {**series, **kept, "history": self.history}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """
        Restores what :meth:`state_dict` returned.

        :raises ValueError: If another history was kept.
        """
        if saved["history"] != self.history:
            raise ValueError(
                f"the saved run kept history={saved['history']!r}, this one {self.history!r}"
            )
        for name in _SERIES:
            setattr(self, name, Series.of(saved[name]))
        self.ancestors, self.sites = list(saved["ancestors"]), list(saved["sites"])


def _compose(ancestors: torch.Tensor | None, lineage: torch.Tensor | None) -> torch.Tensor | None:
    if ancestors is None or lineage is None:
        return ancestors if lineage is None else lineage
    return take_ancestors(ancestors, lineage)
