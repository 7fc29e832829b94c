# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
What the job needs to know of a kind of sample: models, rewards, a judge, distances, and pictures.

Everything else in the job is the same for images, molecules and text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from torch import Tensor

from pyro_twist.align.options import AlignOptions, OptionError, unknown
from pyro_twist.align.shown import Shown, ShownSection

if TYPE_CHECKING:
    from pyro_twist.rewards import Reward
    from pyro_twist.rewards.samples import Input

__all__ = ["Domain", "Judgement", "ShippedDomain", "domains", "find_domain"]


@dataclass(frozen=True)
class Judgement:
    """
    What a judge, which no method has seen, thinks of samples.

    :param torch.Tensor score: The figure of the table, one number per sample, higher is better.
    :param dict details: More figures of the same shape, by name.
    """

    score: Tensor
    details: Mapping[str, Tensor] = field(default_factory=dict)


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
    #: How many samples of the model lambda is measured on.
    pilot_size: int

    def prepared(self, options: AlignOptions) -> Domain:
        """
        The domain for a job.

        :raises OptionError: If an option is for models of another kind.
        """

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

    def tilting(self, options: AlignOptions) -> dict[str, Any]:
        """More arguments of :class:`~pyro_twist.rewards.RewardTilted`."""

    def write(self, folder: Path, samples: Any, about: Sequence[Mapping[str, str]]) -> None:
        """Writes samples as files of their own, with what is known of each, if useful."""

    def decoded(self, model: Any, x: Tensor) -> Any:
        """End states as a batch of samples."""

    def numbers(self, samples: Any) -> Any:
        """Samples as a tensor or an array that can be saved without pickling."""

    def properties(self, samples: Any) -> dict[str, Sequence[Any]]:
        """A table of samples, by column, one entry per sample; empty if there is no use in one."""

    def judge(self, samples: Any, label: int | None) -> Judgement | None:
        """Judges samples that should be of a class, or of any; ``None`` where there is no judge."""

    def judge_explained(self, with_class: bool) -> str:
        """What the judge's score is, in one sentence; empty where there is no judge."""

    def distances(self, samples: Any) -> Tensor:
        """Distances between samples, of shape ``(B, B)``."""

    def distance_explained(self) -> str:
        """What the distance is, in a few words."""

    def show(self, sections: Sequence[ShownSection], caption: str) -> Shown:
        """Draws samples, each with its caption."""


class ShippedDomain:
    """What the models have in common that the package, or others for it, ship ready to use."""

    pilot_size = 64

    def prepared(self, options: AlignOptions) -> Self:
        """
        The domain itself.

        :raises OptionError: If an option is for pipelines.
        """
        options.check_for_no_pipeline()
        return self

    def tilting(self, options: AlignOptions) -> dict[str, Any]:
        """Nothing."""
        return {}

    def write(self, folder: Path, samples: Any, about: Sequence[Mapping[str, str]]) -> None:
        """Nothing: the file of all samples is enough."""


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

    :param str name: One of :func:`domains`; or a pipeline of diffusers, as its folder or as
        ``"owner/name"`` on the hub.
    :raises OptionError: If there is none of this name.
    """
    from pyro_twist import zoo

    known = domains()
    if name not in known:
        return _pipeline(name, known)
    return _of_kind(zoo.entry(name).kind, name)


def _pipeline(name: str, known: Iterable[str]) -> Domain:
    """A pipeline that is not shipped; nothing is read of it before it is used."""
    from pyro_twist.align.pipelines import PipelineImages

    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise OptionError(
                f"the folder {name!r} has no model_index.json, so it is no pipeline of diffusers; "
                "give the folder that pipe.save_pretrained wrote"
            )
        return PipelineImages(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return PipelineImages(name)
    told = str(unknown("model", name, known))
    raise OptionError(f"{told}; or give a pipeline's folder, or owner/name on the hub")


def _of_kind(kind: str, name: str) -> Domain:
    if kind == "molecules":
        from pyro_twist.align.molecules import ZooMolecules

        return ZooMolecules(name)
    if kind == "text":
        from pyro_twist.align.texts import ZooTexts

        return ZooTexts(name)
    if kind == "text-to-image":
        from pyro_twist.align.pipelines import ZooPipeline

        return ZooPipeline(name)
    if kind == "antibodies":
        from pyro_twist.align.antibodies import ZooAntibodies

        return ZooAntibodies(name)
    from pyro_twist.align.images import ZooImages

    return ZooImages(name)
