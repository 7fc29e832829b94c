# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Pipelines of diffusers, the user's own or shipped: prompts, preference rewards, PNG files."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor
from torch.nn import Module

from pyro_twist.align.domains import Judgement
from pyro_twist.align.loading import find_device, find_dtype, load_pipeline, make_scheduler
from pyro_twist.align.options import AlignOptions, OptionError, unknown, word
from pyro_twist.align.pictures import Pictures
from pyro_twist.align.rewardoptions import image_reward_of, parse_options

if TYPE_CHECKING:
    from pyro_twist.rewards import Reward

__all__ = ["PipelineImages", "ZooPipeline"]

_STEPS = 50
# A decoder needs more memory for an image than the network for its latents.
_DECODED_AT_ONCE = 4


class PipelineImages(Pictures):
    """
    A pipeline of diffusers with a prompt.

    What is loaded is shared by all that :meth:`prepared` returns.

    :param str name: A folder, or ``"owner/name"`` on the hub.
    """

    classes: tuple[str, ...] = ()
    default_reward = "pickscore"
    description = "a pipeline of diffusers"
    packages: tuple[str, ...] = ("diffusers", "transformers")
    #: Fewer than for other models: each prompt has its own, as dear as a method's run.
    pilot_size = 16
    cell = 128

    def __init__(self, name: str) -> None:
        self.name = name
        self.prompt: str | None = None
        self._options = AlignOptions(model=name)
        self._loaded: dict[str, Any] = {}

    def prepared(self, options: AlignOptions) -> Self:
        """
        The same pipeline for the prompt of a job.

        :param AlignOptions options: The options of the job.
        """
        other = copy.copy(self)
        other.prompt, other._options = options.prompt, options
        vars(other).pop("_judge", None)
        return other

    def match_class(self, given: str | int) -> int:
        """
        Refuses: classes are prompts.

        :raises OptionError: Always.
        """
        raise OptionError(f"--class {given}: {self.name!r} has prompts instead; use --prompt")

    def read(self, options: AlignOptions) -> Any:
        """Loads the pipeline."""
        return load_pipeline(self.name, options)

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        key = f"pipe {find_device(self._options)} {find_dtype(self._options)}"
        return self._once(key, lambda: self.read(self._options))

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._loaded:
            self._loaded[key] = make()
        return self._loaded[key]

    def load(self, labels: Sequence[int], options: AlignOptions) -> Any:
        """
        The model.

        :param labels: None: there are no classes.
        :param AlignOptions options: Prompts, guidance, steps, scheduler, size and chunk size are
            used.
        :raises OptionError: If the pipeline cannot be loaded, or does not take an option.
        """
        from pyro_twist.diffusion import GaussianDiffusion

        _ = self._judge  # wrong options are to be found before anything is computed
        self._check_prompt(options.prompt)
        try:
            return GaussianDiffusion.from_pipeline(
                self.pipe,
                self._prompt(options.prompt),
                options.negative_prompt,
                guidance_scale=self._guidance(options),
                num_inference_steps=options.steps or _STEPS,
                scheduler=make_scheduler(options.scheduler, self.pipe),
                height=options.height,
                width=options.width,
                chunk_size=options.chunk_size,
                decode_chunk_size=options.chunk_size or _DECODED_AT_ONCE,
            )
        except OptionError:
            raise
        except ValueError as error:
            raise OptionError(f"{self.name!r}: {error}") from None

    def _check_prompt(self, prompt: str | None) -> None:
        takes = "prompt" in inspect.signature(type(self.pipe).__call__).parameters
        if takes and prompt is None:
            raise OptionError(f"{type(self.pipe).__name__} needs a prompt; give --prompt TEXT")

    def _prompt(self, prompt: str | None) -> Any:
        """A class's index, for pipelines that have classes, or the prompt."""
        is_index = hasattr(self.pipe, "labels") and prompt is not None and prompt.isdigit()
        return int(prompt) if is_index and prompt else prompt

    def _guidance(self, options: AlignOptions) -> float | None:
        return options.guidance

    def facts(self, options: AlignOptions, model: Any) -> list[tuple[str, str]]:
        """The prompt, the pipeline, and how it is run."""
        given = {"prompt": options.prompt, "negative prompt": options.negative_prompt}
        size = f"{options.width or 'usual'} x {options.height or 'usual'}"
        return [
            *((name, text) for name, text in given.items() if text is not None),
            *([("width x height", size)] if options.width or options.height else []),
            ("pipeline", type(self.pipe).__name__),
            ("scheduler", self._scheduler_told(options)),
            ("guidance", f"{float(model.denoiser.guidance_scale):g}"),
            ("precision", str(self.pipe.dtype).removeprefix("torch.")),
        ]

    def _scheduler_told(self, options: AlignOptions) -> str:
        own = type(self.pipe.scheduler).__name__
        used = type(make_scheduler(options.scheduler, self.pipe)).__name__
        return used if used == own else f"{used} for {own}"

    # rewards

    def rewards(self) -> dict[str, str]:
        """Preference rewards, which are loaded from the hub or a folder, and those of pixels."""
        from pyro_twist.rewards import image_rewards, preference_rewards

        return {**preference_rewards(), **image_rewards()}

    def reward(self, name: str, argument: str) -> Reward:
        """
        Makes a reward, for the prompt if it takes one.

        :param str name: A name from :meth:`rewards`.
        :param str argument: What is behind the colon, as in ``"clipscore:model=folder"``.
        :raises OptionError: If there is no such reward or option, or it cannot be loaded.
        """
        from pyro_twist.rewards import image_rewards, preference_rewards

        if name in image_rewards():
            return image_reward_of(name, argument)
        if name not in preference_rewards():
            raise unknown("reward", name, self.rewards())
        key = f"reward {name}:{argument} {find_device(self._options)}"
        shared = self._once(key, lambda: self._preference(name, argument))
        reward = self.for_prompt(shared)
        reward.name = f"{name}:{argument}" if argument else name
        return reward

    def for_prompt(self, reward: Any) -> Any:
        """
        A reward for the prompt of the job, if it takes prompts.

        :param reward: The reward.
        """
        takes = hasattr(reward, "with_prompt") and self.prompt is not None
        return reward.with_prompt(self.prompt) if takes else reward

    def _preference(self, name: str, argument: str) -> Reward:
        from pyro_twist.rewards.preference import REGISTRY, preference_reward

        make = REGISTRY.rewards[name][0]
        given = parse_options(name, argument, _for_the_line(make))
        if "prompt" in inspect.signature(make).parameters:
            given["prompt"] = self.prompt or ""
        try:
            return preference_reward(name, device=find_device(self._options), **given)
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise OptionError(f"--reward {name}: {' '.join(str(error).split())[:700]}") from None

    def tilting(self, options: AlignOptions) -> dict[str, Any]:
        """The decoder of look-aheads, if there is one."""
        if options.lookahead_decoder is None:
            return {}
        key = f"decoder {options.lookahead_decoder} {find_device(options)}"
        return {"lookahead_decoder": self._once(key, self._tiny_decoder)}

    def _tiny_decoder(self) -> Any:
        from pyro_twist.rewards.preference import TinyDecoder

        name = str(self._options.lookahead_decoder)
        try:
            return TinyDecoder.from_pretrained(name, device=find_device(self._options))
        except (OSError, ValueError) as error:
            told = " ".join(str(error).split())[:300]
            raise OptionError(f"--lookahead-decoder {name}: {told}") from None

    # the judge

    @cached_property
    def _judge(self) -> Reward | None:
        from pyro_twist.align.userrewards import make_rewards

        given = self._options.judge
        if given is None:
            return None
        if given.strip() in (word(reward) for reward in self._options.rewards):
            raise OptionError(
                f"--judge {given}: it is a --reward too, so that it judges itself; name another"
            )
        try:
            return next(iter(make_rewards(self, [given]).values()))
        except OptionError as error:
            raise OptionError(str(error).replace("--reward", "--judge", 1)) from None

    def judge(self, samples: Tensor, label: int | None) -> Judgement | None:
        """
        Judges images by the reward of ``--judge``, if there is one.

        :param torch.Tensor samples: Images in [0, 1] of shape ``(B, C, H, W)``.
        :param int label: Not used.
        """
        return None if self._judge is None else Judgement(self._judge(samples))

    def judge_explained(self, with_class: bool) -> str:
        """What the judge's score is."""
        if self._options.judge is None:
            return ""
        return (
            f"Mean of {self._options.judge}, which no method has seen. Where the reward is higher "
            "than for the base model and this is lower by several times the ±, look for samples "
            "that exploit the reward."
        )

    # samples

    def numbers(self, samples: Tensor) -> Tensor:
        """The pixels in 8 bits, as they are in the PNG files."""
        return (samples.clamp(0, 1) * 255).round().byte()

    def write(self, folder: Path, samples: Tensor, about: Sequence[Mapping[str, str]]) -> None:
        """
        Writes a PNG file for each sample, with what is known of it inside.

        :param ~pathlib.Path folder: Where; made if it is not there.
        :param torch.Tensor samples: Images in [0, 1] of shape ``(B, C, H, W)``.
        :param about: Text by name, for each sample.
        """
        folder.mkdir(parents=True, exist_ok=True)
        digits = len(str(len(samples) - 1))
        for place, pixels in enumerate(self.pictures(samples)):
            path = folder / f"{place:0{digits}}.png"
            _save_png(pixels, about[place], path)


class ZooPipeline(PipelineImages):
    """
    A text-to-image model of :mod:`pyro_twist.zoo`, with a scorer and a judge of its own.

    :param str name: One of :func:`pyro_twist.zoo.models`.
    """

    default_reward = "fidelity"
    cell = 96

    def __init__(self, name: str) -> None:
        from pyro_twist import zoo

        super().__init__(name)
        self._entry = zoo.entry(name)
        self.description = self._entry.description

    def read(self, options: AlignOptions) -> Any:
        """Loads the pipeline from the files of the package."""
        from pyro_twist import zoo

        pipe = zoo.pipeline(self.name).to(find_device(options))
        for network in pipe.components.values():
            if isinstance(network, Module):
                # not the method of diffusers, which warns of parts that these networks lack
                Module.to(network, find_dtype(options))
        return pipe

    def _guidance(self, options: AlignOptions) -> float | None:
        return self._entry.guidance_scale if options.guidance is None else options.guidance

    def rewards(self) -> dict[str, str]:
        """The scorer's, those of pixels, and preference rewards."""
        line = "how well the prompt is followed, by the model's own scorer, in nats"
        return {"fidelity": line, **super().rewards()}

    def reward(self, name: str, argument: str) -> Reward:
        """
        Makes a reward; ``"fidelity"`` is the scorer's.

        :param str name: A name from :meth:`rewards`.
        :param str argument: What is behind the colon.
        :raises OptionError: If there is no such reward or option.
        """
        if name != "fidelity":
            return super().reward(name, argument)
        from pyro_twist import zoo

        wanted = argument or (self.prompt or "").strip()
        if not wanted:
            raise OptionError("--reward fidelity: needs a --prompt, or one of its own behind ':'")
        device = find_device(self._options)
        shared = self._once(
            f"scorer {device}", lambda: zoo.scorer(self.name, prompt=wanted, device=device)
        )
        reward: Reward = shared.with_prompt(wanted)
        reward.name = f"fidelity:{argument}" if argument else "fidelity"
        return reward

    def judge(self, samples: Tensor, label: int | None) -> Judgement | None:
        """
        Judges images by the probability that the model's judge gives to the prompt.

        :param torch.Tensor samples: Images in [0, 1] of shape ``(B, C, H, W)``.
        :param int label: Not used.
        """
        if not self._has_own_judge:
            return super().judge(samples, label)
        assert self.prompt is not None
        judge = self._once(f"judge {samples.device}", lambda: self._own_judge().to(samples.device))
        rank = judge.rank(samples, self.prompt).double()
        probability = judge.probability(samples, self.prompt).double()
        return Judgement(probability, {"rank": rank, "first": (rank == 1).double()})

    @property
    def _has_own_judge(self) -> bool:
        """Whether there is something to judge by, and no other judge is wanted."""
        return self._options.judge is None and bool((self.prompt or "").strip())

    def _own_judge(self) -> Any:
        from pyro_twist import zoo

        return zoo.judge(self.name)

    def judge_explained(self, with_class: bool) -> str:
        """What the judge's score is."""
        if not self._has_own_judge:
            return super().judge_explained(with_class)
        return (
            "Mean probability that the judge, a network that no reward uses, gives to the prompt "
            "among all names that it knows; 1 is best. Where the reward is higher than for the "
            "base model and this is not, look for samples that exploit the reward."
        )


def _for_the_line(make: Callable[..., Any]) -> Callable[..., Any]:
    """Stands in for a reward's maker, with the options that can be typed behind the colon."""
    hidden = ("prompt", "dtype", "device", "options", "trust_remote_code")
    of_class = inspect.signature(make.__self__).parameters  # type: ignore[attr-defined]
    own = {n: p for n, p in of_class.items() if p.kind is p.KEYWORD_ONLY and n != "preprocessing"}
    found = {**inspect.signature(make).parameters, **own}
    kept = [parameter for name, parameter in found.items() if name not in hidden]

    def stands_in(**options: Any) -> None:
        """Never called."""

    # keyword-only throughout, since required options may follow others
    signature = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in kept]
    stands_in.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    return stands_in


def _save_png(pixels: Any, about: Mapping[str, str], path: Path) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in about.items():
        # iTXt, which holds any character; keys of PNG have at most 79 Latin ones
        info.add_itxt(re.sub(r"[^\x20-\x7e]", "?", key)[:79], value)
    Image.fromarray(pixels).save(path, pnginfo=info)
