# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
What the job needs to know of a kind of sample: models, rewards, a judge, distances, and pictures.

Everything else in the job is the same for images, molecules and text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from pyro_twist.align.options import AlignOptions, unknown
from pyro_twist.align.shown import Shown, ShownSection

if TYPE_CHECKING:
    from pyro_twist.rewards import Reward
    from pyro_twist.rewards.samples import Input

__all__ = ["Domain", "Judgement", "domains", "find_domain"]


@dataclass(frozen=True)
class Judgement:
    """
    What a judge, which no method has seen, thinks of samples.

    :param torch.Tensor score: The figure of the table, one number per sample, higher is better.
    :param dict details: More figures of the same shape, by name.
    """

    score: Tensor
    details: Mapping[str, Tensor]


class Domain(Protocol):
    """
    A model with everything around it that the job uses. A batch of samples is a tensor, or an
    array of strings; particles are along dim 0.
    """

    name: str
    description: str
    classes: tuple[str, ...]
    default_reward: str
    #: What a function of the user's own is handed, see :class:`~pyro_twist.rewards.Reward`.
    input: Input
    #: Packages whose versions determine the numbers.
    packages: tuple[str, ...]

    def match_class(self, given: str | int) -> int:
        """The index of a class, from what a user would type."""

    def load(self, labels: Sequence[int], options: AlignOptions) -> Any:
        """The model: without class, of one class, or with a plate ``"classes"`` of several."""

    def facts(self, options: AlignOptions, model: Any) -> list[tuple[str, str]]:
        """Settings of the model that matter, by name, for the head of the page."""

    def rewards(self) -> dict[str, str]:
        """The named rewards, with a line on each."""

    def reward(self, name: str, argument: str) -> Reward:
        """The reward ``name``, or ``name:argument``."""

    def decoded(self, model: Any, x: Tensor) -> Any:
        """End states as a batch of samples."""

    def numbers(self, samples: Any) -> Any:
        """Samples as a tensor or an array that can be saved without pickling."""

    def properties(self, samples: Any) -> dict[str, Sequence[Any]]:
        """A table of samples, by column, one entry per sample; empty if there is no use in one."""

    def judge(self, samples: Any, label: int | None) -> Judgement:
        """Judges samples that should be of a class, or of any."""

    def judge_explained(self, with_class: bool) -> str:
        """What the judge's score is, in one sentence."""

    def distances(self, samples: Any) -> Tensor:
        """Distances between samples, of shape ``(B, B)``."""

    def distance_explained(self) -> str:
        """What the distance is, in a few words."""

    def show(self, sections: Sequence[ShownSection], caption: str) -> Shown:
        """Draws samples, each with its caption."""


def domains() -> dict[str, str]:
    """
    The models that the job can align.

    :returns: A description of one line for each name.
    """
    from pyro_twist import zoo

    return zoo.models()


def find_domain(name: str) -> Domain:
    """
    The domain of a model.

    :param str name: One of :func:`domains`.
    :raises OptionError: If there is none of this name.
    """
    from pyro_twist import zoo

    known = domains()
    if name not in known:
        raise unknown("model", name, known)
    return _of_kind(zoo.entry(name).kind, name)


def _of_kind(kind: str, name: str) -> Domain:
    if kind == "molecules":
        from pyro_twist.align.molecules import ZooMolecules

        return ZooMolecules(name)
    if kind == "text":
        from pyro_twist.align.texts import ZooTexts

        return ZooTexts(name)
    if kind == "antibodies":
        from pyro_twist.align.antibodies import ZooAntibodies

        return ZooAntibodies(name)
    from pyro_twist.align.images import ZooImages

    return ZooImages(name)
