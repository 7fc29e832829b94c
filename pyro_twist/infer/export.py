# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Export to ArviZ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from arviz import InferenceData

    from pyro_twist.infer.result import Diagnostics, SMCResult

__all__ = ["to_arviz"]


def to_arviz(result: SMCResult, num_samples: int | None = None) -> InferenceData:
    """
    A result as an ArviZ object.

    :param SMCResult result: The weighted particles.
    :param int num_samples: The number of equally weighted draws, ``num_particles`` by default.
    :returns: Group ``posterior`` with one chain of resampled draws, and group ``sample_stats``
        with the effective sample size and the log-normaliser after each step, which have the
        steps in place of draws.
    :raises ImportError: If ArviZ is not installed.
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs arviz: pip install 'pyro-twist[plots]'") from error
    drawn = result.resample(num_samples)
    posterior = {key: value.detach().cpu().numpy()[None] for key, value in drawn.state.items()}
    stats = None if result.diagnostics is None else _stats(result.diagnostics)
    data = arviz.from_dict(posterior=posterior, sample_stats=stats)
    data.posterior.attrs.update(inference_library="pyro_twist", kind=result.kind)
    return data


def _stats(diagnostics: Diagnostics) -> dict[str, np.ndarray[Any, Any]]:
    series = {"ess": diagnostics.ess, "log_normalizer": diagnostics.log_normalizer}
    return {name: value.cpu().numpy()[None] for name, value in series.items()}
