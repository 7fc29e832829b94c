# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The image models: their classes, rewards, judge and pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_twist.align.domains import Judgement, ShippedDomain
from pyro_twist.align.options import AlignOptions, OptionError, unknown
from pyro_twist.align.pictures import Pictures
from pyro_twist.align.rewardoptions import image_reward_of, number_or_text

if TYPE_CHECKING:
    from pyro_twist.rewards import Reward
    from pyro_twist.zoo import Classifier, Entry

__all__ = ["ZooImages"]

_OF_COLOUR = ("blue", "colour", "colourful", "green", "red", "saturated")
_STEPS = 50


class ZooImages(Pictures, ShippedDomain):
    """
    The image models of :mod:`pyro_twist.zoo`.

    :param str name: One of :func:`pyro_twist.zoo.models`.
    """

    def __init__(self, name: str) -> None:
        from pyro_twist import zoo

        self.name = name
        self._entry: Entry = zoo.entry(name)
        self.description = self._entry.description
        self.classes = self._entry.classes
        self._grey = self._entry.event_shape[0] == 1
        self.default_reward = "bright" if self._grey else "red"

    def match_class(self, given: str | int) -> int:
        """
        The index of a class.

        :param given: Its index, its name in any case, a part of the name, or one with a typo that
            leaves no doubt.
        :raises OptionError: If it is none or several.
        """
        return _match(given, self.classes, self.name)

    def load(self, labels: Sequence[int], options: AlignOptions) -> Any:
        """
        Loads the model.

        :param labels: The indices of the classes; one opens no plate, several open the plate
            ``"classes"``, none samples without a class.
        :param AlignOptions options: Guidance, steps, scheduler and chunk size are used.
        """
        from pyro_twist import zoo

        scheduler = options.scheduler or "ddpm"
        if scheduler not in ("ddpm", "ddim"):
            raise unknown("scheduler", scheduler, ("ddpm", "ddim"))
        if options.prompt is not None:
            raise OptionError(f"--prompt is for models of sequences, which {self.name!r} is not")
        label = None if not labels else labels[0] if len(labels) == 1 else list(labels)
        return zoo.load(
            self.name,
            label,
            guidance_scale=options.guidance,
            num_inference_steps=options.steps or _STEPS,
            scheduler=scheduler,
            chunk_size=options.chunk_size,
        )

    def rewards(self) -> dict[str, str]:
        """The named image rewards that fit the images, and the log-probability of a class."""
        from pyro_twist.rewards import image_rewards

        hidden = _OF_COLOUR if self._grey else ()
        named = {name: line for name, line in image_rewards().items() if name not in hidden}
        told = {"class:NAME": "log-probability of a class of the model under its classifier, nats"}
        return {**named, **told}

    def reward(self, name: str, argument: str) -> Reward:
        """
        Makes a reward.

        :param str name: A name from :meth:`rewards`, without what is behind a colon.
        :param str argument: What is behind the colon: ``"option=value,..."``, the value of the
            only option, or the class.
        :raises OptionError: If there is no such reward, option or class.
        """
        if name == "class":
            return self._class_reward(argument)
        if self._grey and name in _OF_COLOUR:
            raise OptionError(
                f"--reward {name}: the samples of {self.name!r} are grey, so that colour has no "
                "meaning; 'pyro-twist rewards' lists what does"
            )
        if name not in self.rewards():
            raise unknown("reward", name, self.rewards())
        return image_reward_of(name, argument)

    def _class_reward(self, argument: str) -> Reward:
        from pyro_twist import zoo
        from pyro_twist.rewards import classifier_log_prob

        if not argument:
            raise OptionError(
                f"--reward class: needs a class of {self.name!r}, as in class:{self.classes[0]}"
            )
        label = self.match_class(argument)
        reward = classifier_log_prob(zoo.classifier(self.name), label)
        reward.name = f"class:{self.classes[label]}"
        return reward

    @cached_property
    def _judge(self) -> Classifier:
        from pyro_twist import zoo

        return zoo.judge(self.name)

    def judge(self, samples: Tensor, label: int | None) -> Judgement:
        """
        Judges images with a classifier built differently from the one that rewards may use.

        :param torch.Tensor samples: Images in [0, 1] of shape ``(B, C, H, W)``.
        :param int label: The class that was asked for, or ``None``.
        """
        log_probs = self._judge(samples.float()).double().log_softmax(-1)
        best, first = log_probs.max(-1)
        if label is None:
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            return Judgement(best.exp(), {"confidence": best.exp(), "entropy": entropy})
        log_prob = log_probs[:, label]
        accuracy = (first == label).double()
        details = {"probability": log_prob.exp(), "log_prob": log_prob, "accuracy": accuracy}
        return Judgement(log_prob.exp(), details)

    def judge_explained(self, with_class: bool) -> str:
        """What the judge's score is."""
        what = "the class asked for" if with_class else "the class it finds most likely"
        return (
            f"Mean probability that the judge, a classifier that no reward uses, gives to {what}; "
            "1 is best. Where it is lower than for the base model by several times the ± and the "
            "reward is higher, look for samples that exploit the reward; smaller differences of a "
            "single run may be chance."
        )

    def facts(self, options: AlignOptions, model: Any) -> list[tuple[str, str]]:
        """Scheduler and guidance."""
        scale = float(model.denoiser.guidance_scale)
        return [("scheduler", options.scheduler or "ddpm"), ("guidance", f"{scale:g}")]


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower().replace("&", " and ")).split())


def _match(given: str | int, classes: Sequence[str], model: str) -> int:
    names, wanted = [_plain(name) for name in classes], _plain(str(given))
    number = number_or_text(str(given).strip())
    found: list[int] = []
    if isinstance(number, int):
        if 0 <= number < len(names):
            return number
    elif wanted in names:
        return names.index(wanted)
    elif wanted:
        starts = [i for i, name in enumerate(names) if name.startswith(wanted)]
        inside = [i for i, name in enumerate(names) if f" {wanted}" in name]
        if len(found := starts or inside) == 1:
            return found[0]
    listed = [f"{name} ({i})" if name != str(i) else name for i, name in enumerate(classes)]
    if len(found) > 1:
        several = ", ".join(listed[i] for i in found)
        raise OptionError(f"several classes of {model!r} match {str(given)!r}: {several}")
    raise _unknown_class(given, model, names, listed)


def _unknown_class(
    given: str | int, model: str, names: Sequence[str], listed: Sequence[str]
) -> OptionError:
    import difflib

    words = {word: i for i, name in enumerate(names) for word in (*name.split(), name)}
    is_number = isinstance(number_or_text(str(given).strip()), (int, float))
    close = [] if is_number else difflib.get_close_matches(_plain(str(given)), words, 1)
    meant = f" (did you mean {listed[words[close[0]]]!r}?)" if close else ""
    return OptionError(f"{model!r} has no class {str(given)!r}{meant}; it has {', '.join(listed)}")
