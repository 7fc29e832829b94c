# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Which models the zoo holds, and reading them from the package's own files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from pyro_twist.zoo.classifiers import Classifier, load_classifier
from pyro_twist.zoo.data import Images, load_images

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from pyro_twist.diffusion import GaussianDiffusion, MaskedDiffusion
    from pyro_twist.zoo.judges import PromptJudge
    from pyro_twist.zoo.scorers import Fidelity

__all__ = [
    "Entry",
    "classifier",
    "entry",
    "images",
    "judge",
    "load",
    "load_folder",
    "models",
    "pipeline",
    "scorer",
]

ROOT = Path(__file__).parent

Label = str | int
Kind = Literal["images", "text-to-image", "molecules", "text", "antibodies"]

_STEPS = 50
_OF_STEPS = ("images", "text-to-image")
# Whose pictures a model was trained on, where they are those of another one.
_PICTURES = {"emoji-text": "emoji"}


@dataclass(frozen=True)
class Entry:
    """
    What the zoo says about a model.

    :param ~pathlib.Path folder: Its files; the package itself for weights that come with others.
    :param str description: One line.
    :param tuple classes: The names of the classes; the index after the last is "no class". Empty
        for models without.
    :param tuple event_shape: Shape of a sample: channels, height, width of images; empty for
        sequences.
    :param float guidance_scale: The guidance that gives the best samples of a class or a prompt.
    :param str kind: What the samples are: ``"images"``, ``"text-to-image"`` for images of a
        prompt, ``"molecules"``, ``"text"`` or ``"antibodies"``.
    :param int num_inference_steps: The usual number of steps; ``None`` for one position in a step.
    :param float temperature: The temperature of tokens that gives the best samples; for masked
        models.
    """

    folder: Path
    description: str
    classes: tuple[str, ...] = ()
    event_shape: tuple[int, ...] = ()
    guidance_scale: float = 1.0
    kind: Kind = "images"
    num_inference_steps: int | None = _STEPS
    temperature: float = 1.0

    def index(self, label: Label) -> int:
        """
        The index of a class.

        :param label: Its name, in any case, a unique beginning of it, or its index.
        :raises ValueError: If there is no such class, or several.
        """
        if isinstance(label, int) and not isinstance(label, bool):
            if 0 <= label < len(self.classes):
                return label
            found = []
        else:
            start = str(label).strip().lower()
            names = [name.lower() for name in self.classes]
            found = [i for i, name in enumerate(names) if name.startswith(start)]
            found = [names.index(start)] if start in names else found
        if len(found) != 1 or label == "":
            raise ValueError(
                f"label={label!r} names {'no class' if not found else 'several classes'} of "
                f"{self.folder.name!r}; try one of {', '.join(map(repr, self.classes))} or an "
                f"index from 0 to {len(self.classes) - 1}"
            )
        return found[0]


def models() -> dict[str, str]:
    """
    The models of the zoo.

    :returns: A description of one line for each name. The antibody models, whose weights come with
        other packages, are last.
    """
    from pyro_twist.zoo.antibodies import antibodies

    shipped = {name: entry(name).description for name in _shipped()}
    return {**shipped, **antibodies()}


def _shipped() -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob("*/info.json"))


def entry(name: str) -> Entry:
    """
    What the zoo says about a model.

    :param str name: One of :func:`models`.
    :raises ValueError: If the zoo has no such model.
    """
    if name in _shipped():
        return _read_entry(ROOT / name)
    known = models()
    if name not in known:
        raise ValueError(f"name={name!r} is not in the zoo; try one of {', '.join(known)}")
    return Entry(ROOT, known[name], kind="antibodies", num_inference_steps=32)


@overload
def load(
    name: Literal["digits", "emoji"],
    label: Label | Sequence[Label] | None = None,
    *,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    scheduler: Literal["ddpm", "ddim"] = "ddpm",
    **options: Any,
) -> GaussianDiffusion: ...
@overload
def load(
    name: Literal["emoji-text"],
    *,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    scheduler: Literal["ddpm", "ddim"] = "ddpm",
    **options: Any,
) -> GaussianDiffusion: ...
@overload
def load(
    name: Literal["molecules", "text", "antiberty", "sapiens"],
    *,
    num_inference_steps: int | None = None,
    **options: Any,
) -> MaskedDiffusion: ...
@overload
def load(
    name: str,
    label: Label | Sequence[Label] | None = None,
    *,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    scheduler: str = "ddpm",
    **options: Any,
) -> Any: ...


def load(
    name: str,
    label: Label | Sequence[Label] | None = None,
    *,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    scheduler: str = "ddpm",
    **options: Any,
) -> Any:
    """
    Loads a model from the files of the package, in float32; nothing is downloaded.

    Images are a :class:`~pyro_twist.diffusion.GaussianDiffusion`. Molecules, texts and antibodies
    are a :class:`~pyro_twist.diffusion.MaskedDiffusion` that decodes to strings; label, guidance
    and scheduler are for images only. A ``prompt`` says what an image shows, or fixes a part of a
    text or an antibody::

        zoo.load("emoji", label="Food & Drink")
        zoo.load("emoji-text", prompt="red apple")
        zoo.load("text", prompt="the film was")
        zoo.load("antiberty", prompt="EVQLVESGGG____PGGSLRLSC", num_inference_steps=16)

    :param str name: One of :func:`models`.
    :param label: The class to sample, by name or index; a list of classes opens the plate
        ``"classes"`` with one population each; ``None`` samples without a class.
    :param float guidance_scale: Strength of classifier-free guidance; by default the one the
        model card recommends if there is a label, and 1, which is none, if there is not.
    :param int num_inference_steps: Number of steps of the reverse process; by default the usual
        one of the model, 50 for images. Molecules and texts reveal one position in a step by
        default, chosen uniformly; a number makes the unmasking ancestral, which reveals several
        positions in a step independently.
    :param str scheduler: ``"ddpm"``, or ``"ddim"`` with ``eta=1``.
    :param options: More arguments of the model's class; for molecules and texts also those of
        :func:`~pyro_twist.zoo.sequences.load_sequences`, for antibodies those of
        :func:`~pyro_twist.zoo.antibodies.load_antibodies`. For text-to-image ``prompt``, a list of
        which opens the plate ``"prompts"``, ``negative_prompt``, and the other options of
        :meth:`GaussianDiffusion.from_pipeline
        <pyro_twist.diffusion.GaussianDiffusion.from_pipeline>`; without a prompt the samples are of
        no prompt. Words that a model never saw are read in pieces of words: no error is raised,
        and what the sample shows is the model's guess.
    :raises ValueError: If there is no such model, class or scheduler.
    :raises ImportError: If the model's weights or its decoder are not installed.
    """
    about = entry(name)
    steps = num_inference_steps
    if steps is None and options.get("unmasking") != "uniform":
        steps = about.num_inference_steps
    if about.kind == "text-to-image":
        if label is not None:
            raise ValueError(
                f"label={label!r} is for models of classes, which {name!r} is not; give prompt"
            )
        return _load_text_to_image(
            about,
            guidance_scale=guidance_scale,
            num_inference_steps=steps or _STEPS,
            scheduler=scheduler,
            **options,
        )
    if about.kind != "images":
        _check_for_images_only(name, label, guidance_scale, scheduler)
        return _load_sequences(name, about, num_inference_steps=steps, **options)
    return load_folder(
        ROOT / name,
        label,
        guidance_scale=guidance_scale,
        num_inference_steps=steps or _STEPS,
        scheduler=scheduler,  # type: ignore[arg-type]
        **options,
    )


def _load_text_to_image(
    about: Entry,
    *,
    prompt: str | Sequence[str] | None = None,
    guidance_scale: float | None,
    scheduler: str,
    **options: Any,
) -> GaussianDiffusion:
    from pyro_twist.diffusion import GaussianDiffusion

    if guidance_scale is None:
        guidance_scale = 1.0 if prompt is None else about.guidance_scale
    return GaussianDiffusion.from_pipeline(
        _load_pipeline(about.folder),
        "" if prompt is None else prompt,
        guidance_scale=guidance_scale,
        scheduler=_load_scheduler(about.folder / "scheduler", scheduler),
        **options,
    )


def pipeline(name: str) -> StableDiffusionPipeline:
    """
    The diffusers pipeline of a text-to-image model, in float32; nothing is downloaded.

    :param str name: One of :func:`models`.
    :raises ValueError: If it is no text-to-image model.
    """
    return _load_pipeline(_of_prompts(name).folder)


def _check_for_images_only(name: str, label: Any, guidance_scale: Any, scheduler: str) -> None:
    for option, given in (
        ("label", label is not None),
        ("guidance_scale", guidance_scale is not None),
        ("scheduler", scheduler != "ddpm"),
    ):
        if given:
            raise ValueError(f"{option} is for models of images, which {name!r} is not; leave it")


def _load_sequences(name: str, about: Entry, **options: Any) -> MaskedDiffusion:
    if about.kind == "antibodies":
        from pyro_twist.zoo.antibodies import load_antibodies

        return load_antibodies(name, **options)
    from pyro_twist.zoo.sequences import load_sequences

    if options["num_inference_steps"] is None:
        # the law of the network itself, without an error from positions revealed together
        options = {"unmasking": "uniform", **options}
        del options["num_inference_steps"]
    options = {"temperature": about.temperature, **options}
    return load_sequences(about.folder, about.kind, **options)


def load_folder(
    folder: Path,
    label: Label | Sequence[Label] | None = None,
    *,
    guidance_scale: float | None = None,
    num_inference_steps: int = 50,
    scheduler: Literal["ddpm", "ddim"] = "ddpm",
    **options: Any,
) -> GaussianDiffusion:
    """
    Loads a model laid out as those of the zoo: ``info.json``, ``unet/``, ``scheduler/``.

    :param ~pathlib.Path folder: Its files.

    The other arguments are those of :func:`load`.
    """
    from diffusers import UNet2DModel

    from pyro_twist.diffusion import GaussianDiffusion

    about = _read_entry(folder)
    if label is None:
        labels = torch.tensor(len(about.classes))
    elif isinstance(label, (str, int)):
        labels = torch.tensor(about.index(label))
    else:
        labels = torch.tensor([about.index(one) for one in label])
        options.setdefault("plate", ("classes", len(labels)))
    if guidance_scale is None:
        guidance_scale = 1.0 if label is None else about.guidance_scale
    return GaussianDiffusion(
        _load_network(folder / "unet", UNet2DModel),
        _load_scheduler(folder / "scheduler", scheduler),
        about.event_shape,
        num_inference_steps=num_inference_steps,
        conditioning={"class_labels": labels},
        null_conditioning={"class_labels": torch.tensor(len(about.classes))},
        guidance_scale=guidance_scale,
        **options,
    )


def classifier(name: str) -> Classifier:
    """
    The classifier to build rewards from, frozen: pictures in ``[0, 1]`` of shape ``(batch,
    channels, height, width)`` to logits of shape ``(batch, number of classes)``.

    :param str name: One of :func:`models`.
    """
    return load_classifier(_of_images(name).folder / "classifier")


def scorer(name: str, prompt: str, **options: Any) -> Fidelity:
    """
    The reward of a text-to-image model: how well a picture fits its prompt, in nats.

    Another prompt for the same network is ``reward.with_prompt(prompt)``.

    :param str name: One of :func:`models`.
    :param str prompt: The prompt.
    :param options: ``device``, and the options of :class:`~pyro_twist.zoo.Fidelity`.
    :raises ValueError: If it is no text-to-image model.

    Example::

        reward = zoo.scorer("emoji-text", prompt="red apple")
        reward(zoo.images("emoji").unit)
    """
    from pyro_twist.zoo.scorers import load_scorer

    return load_scorer(_of_prompts(name).folder / "scorer", prompt, **options)


@overload
def judge(name: Literal["digits", "emoji"]) -> Classifier: ...
@overload
def judge(name: Literal["emoji-text"]) -> PromptJudge: ...
@overload
def judge(name: str) -> Any: ...


def judge(name: str) -> Any:
    """
    What measures the result of a reward, built differently from what rewards are made of. Do not
    optimise it.

    Of images it is a classifier with the interface of :func:`classifier`; of text-to-image a
    :class:`~pyro_twist.zoo.PromptJudge`, which knows the names of held-out pictures as well.

    :param str name: One of :func:`models`.
    """
    about = entry(name)
    if about.kind == "text-to-image":
        from pyro_twist.zoo.judges import load_judge

        return load_judge(about.folder / "judge")
    return load_classifier(_of_images(name).folder / "judge")


def images(name: str, held_out: bool | None = False) -> Images:
    """
    The pictures a model was trained on, or those kept from all training.

    :param str name: One of :func:`models`.
    :param bool held_out: Whether to return the held-out pictures; ``None`` returns all.
    """
    everything = load_images(_of_images(_PICTURES.get(name, name)).folder / "images.npz")
    if held_out is None:
        return everything
    return everything.subset(everything.held_out == held_out)


def _read_entry(folder: Path) -> Entry:
    about = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    kind = about.get("kind", "images")
    return Entry(
        folder,
        about["description"],
        tuple(about.get("classes", ())),
        tuple(about.get("event_shape", ())),
        about.get("guidance_scale", 1.0),
        kind,
        about.get("num_inference_steps", _STEPS if kind in _OF_STEPS else None),
        about.get("temperature", 1.0),
    )


def _of_images(name: str) -> Entry:
    about = entry(name)
    if about.kind != "images":
        raise ValueError(f"name={name!r} is a model of {about.kind}; try a model of images")
    return about


def _of_prompts(name: str) -> Entry:
    about = entry(name)
    if about.kind != "text-to-image":
        raise ValueError(
            f"name={name!r} is a model of {about.kind}; try a model of text-to-image, such as "
            "'emoji-text'"
        )
    return about


def _load_pipeline(folder: Path) -> StableDiffusionPipeline:
    from pyro_twist.zoo.sequences import quietly

    with quietly():
        from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    pipe = StableDiffusionPipeline(
        vae=_load_network(folder / "vae", AutoencoderKL),
        text_encoder=text_encoder.float().eval().requires_grad_(False),
        tokenizer=tokenizer,
        unet=_load_network(folder / "unet", UNet2DConditionModel),
        scheduler=_load_scheduler(folder / "scheduler", "ddpm"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _load_network(folder: Path, kind: Any) -> torch.nn.Module:
    from safetensors.torch import load_file

    # Not from_pretrained: it would need accelerate, and asks the hub about names that are no path.
    network: torch.nn.Module = kind.from_config(kind.load_config(folder, local_files_only=True))
    network.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return network.float().eval().requires_grad_(False)


def _load_scheduler(folder: Path, name: str) -> Any:
    from diffusers import DDIMScheduler, DDPMScheduler

    kinds = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}
    if name not in kinds:
        raise ValueError(f"scheduler={name!r} is not offered; try one of {', '.join(kinds)}")
    config = kinds[name].load_config(folder, local_files_only=True)
    # Trailing starts from pure noise, which "leading", the default, does not.
    return kinds[name].from_config(config, timestep_spacing="trailing")
