# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""How the failures of rewards, which are code of the user's own, are told."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

from pyro_twist.rewards import RewardError

__all__ = ["told"]

_NOT_OURS_TO_BLAME = (
    str(Path(__file__).parents[1]),
    *(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")),
    "<",
)


def told(error: Exception, doing: str = "") -> str:
    """
    The message on one line, without the advice on scoring again, which is for programs.

    :param Exception error: What went wrong.
    :param str doing: The method that was run.
    :returns: The message; for a reward's own failure also in which line it was, and when.
    """
    text, _, _ = " ".join(str(error).split()).partition(" values are known and kept")
    text = re.sub(r"\. \d+$", "", text).rstrip(".")
    if not isinstance(error, RewardError):
        return text
    again = " (the batch had failed as a whole, then each sample was scored alone)"
    text += _place(error.__cause__) + (again if _was_retried(error.__cause__) else "")
    return f"{doing}: {text}" if doing else text


def _place(cause: BaseException | None) -> str:
    """The innermost line that is neither of this library nor of one that is installed."""
    frames = traceback.extract_tb(cause.__traceback__) if cause else []
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_OURS_TO_BLAME)]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def _was_retried(cause: BaseException | None) -> bool:
    """Whether the failure came while another one, of the whole batch, was being handled."""
    earlier = cause.__context__ if cause else None
    frames = traceback.extract_tb(earlier.__traceback__) if earlier else []
    return any(frame.name == "_called" for frame in frames[:1])
