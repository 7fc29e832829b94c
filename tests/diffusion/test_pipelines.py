# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Models made from pipelines against the pipelines' own calls, with the same noise."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import diffusers
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_twist.diffusion import GaussianDiffusion, pipelines
from pyro_twist.diffusion.pipelines import Conditioning, PipelineAdapter, register_pipeline
from pyro_twist.infer.resampling import RESAMPLING
from pyro_twist.infer.twistedsmc import TwistedSMC
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import LookaheadTwist
from pyro_twist.wrapper import ModelWrapper
from tests.diffusion import pipes

STEPS = 3
ETA = {"eta": 1.0}
PROMPTS = ["a blue cat", "red fox on a mat"]
LATENTS = (4, 8, 8)
SHORT: dict[str, dict[str, Any]] = {
    "sd": {},
    "sdxl": {},
    "sd3": dict(max_sequence_length=8),
    "flux": dict(max_sequence_length=8),
    "pixart": dict(max_sequence_length=8, clean_caption=False, use_resolution_binning=False),
}


@pytest.fixture(scope="module", autouse=True)
def _silent() -> Iterator[None]:
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(level)


_MADE: dict[str, Any] = {}


def pipe_of(kind: str) -> Any:
    """A pipeline for all tests; none may change it."""
    if kind not in _MADE:
        _MADE[kind] = pipes.PIPES[kind]()
    return _MADE[kind]


class using:
    """A pipeline with another scheduler for a while."""

    def __init__(self, pipe: Any, scheduler: Any) -> None:
        self.pipe, self.scheduler, self.own = pipe, scheduler, pipe.scheduler

    def __enter__(self) -> Any:
        self.pipe.scheduler = self.scheduler
        return self.pipe

    def __exit__(self, *args: Any) -> None:
        self.pipe.scheduler = self.own


def theirs(pipe: Any, seed: int = 1, images: bool = False, **call: Any) -> Tensor:
    torch.manual_seed(seed)
    output_type = "pt" if images else "latent"
    found: Tensor = pipe(num_inference_steps=STEPS, output_type=output_type, **call).images
    return found


@torch.no_grad()
def ours(model: GaussianDiffusion, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return model()


def made(pipe: Any, prompt: Any = None, *args: Any, **options: Any) -> GaussianDiffusion:
    return GaussianDiffusion.from_pipeline(
        pipe, prompt, *args, **{"num_inference_steps": STEPS, **options}
    )


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    size = float(expected.abs().max())
    assert torch.isfinite(found).all() and size > 0.1
    assert float((found - expected).abs().max()) < tolerance * size


# Fidelity


def test_same_seed_same_pictures() -> None:
    """The five lines of the documentation: nothing is injected, the stream is the same."""
    pipe = pipe_of("sd")
    model = made(pipe, PROMPTS, eta=1.0)
    expected = theirs(pipe, prompt=PROMPTS, eta=1.0, images=True)
    images = model.decode(ours(model))
    assert_same(images, expected)
    other = model.decode(ours(model, seed=2))
    assert float((other - expected).abs().max()) > 1e-3


SCHEDULERS: dict[str, tuple[Callable[[], Any], float | None]] = {
    "ddim": (lambda: pipes.latent_scheduler(), 1.0),
    "ddim-v": (lambda: pipes.latent_scheduler(prediction_type="v_prediction"), 0.6),
    "ddpm": (
        lambda: diffusers.DDPMScheduler(clip_sample=False, beta_schedule="scaled_linear"),
        None,
    ),
    "ancestral": (
        lambda: diffusers.EulerAncestralDiscreteScheduler(
            beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
        ),
        None,
    ),
    "lcm": (lambda: diffusers.LCMScheduler(), None),
    "tcd": (lambda: diffusers.TCDScheduler(), 0.3),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of numpy, in EulerAncestral
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart"])
def test_diffusion_pipelines(kind: str, scheduler: str, scale: float) -> None:
    make, eta = SCHEDULERS[scheduler]
    options = {**SHORT[kind], "guidance_scale": scale}
    with using(pipe_of(kind), make()) as pipe:
        given = {} if eta is None else {"eta": eta}
        expected = theirs(pipe, prompt=PROMPTS, **given, **options)
        assert_same(ours(made(pipe, PROMPTS, eta=eta, **options)), expected)


def standard_deviations(scheduler: Any, eta: float) -> list[float]:
    """Of the start and each step, by the scheduler's own formula; 0 where it adds nothing."""
    scheduler.set_timesteps(STEPS)
    first = float(scheduler.init_noise_sigma)
    if hasattr(scheduler, "sigmas"):
        pairs = zip(scheduler.sigmas[:-1].double(), scheduler.sigmas[1:].double(), strict=True)
        return [first, *(float(low * (1 - (low / high) ** 2).sqrt()) for high, low in pairs)]
    times = [int(t) for t in scheduler.timesteps]
    if "eta" not in inspect.signature(scheduler.step).parameters:
        return [first, *(float(scheduler._get_variance(t)) ** 0.5 * (t > 0) for t in times)]
    stride = scheduler.config.num_train_timesteps // STEPS
    steps = [eta * float(scheduler._get_variance(t, t - stride)) ** 0.5 for t in times]
    return [first, *steps]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of numpy, in EulerAncestral
@pytest.mark.parametrize("scheduler", ["ddim", "ddim-v", "ddpm", "ancestral"])
def test_log_densities_are_those_of_the_noise_that_the_pipeline_draws(scheduler: str) -> None:
    make, eta = SCHEDULERS[scheduler]
    with using(pipe_of("sd"), make()) as pipe:
        model = made(pipe, PROMPTS, eta=eta, guidance_scale=3.0)
        levels = standard_deviations(make(), eta or 0.0)
    torch.manual_seed(1)
    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    torch.manual_seed(1)
    for t, level in zip(range(STEPS, -1, -1), levels, strict=True):
        found = trace.nodes[f"x_{t}"]["log_prob"]
        if level == 0:
            assert (found == 0).all()
            continue
        z = torch.randn(2, *LATENTS).double()
        expected = (-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - math.log(level)).sum((1, 2, 3))
        assert found.shape == (2,) and torch.allclose(found.double(), expected, atol=2e-2)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart", "sd3", "flux"])
def test_prompts_and_guidance_matter(kind: str) -> None:
    """Else the comparisons with the pipelines would say nothing about them."""
    pipe, options = pipe_of(kind), SHORT[kind]
    eta = 1e-7 if kind in ("sd3", "flux") else 1.0
    negative = dict(negative_prompt="bad photo", true_cfg_scale=3.0) if kind == "flux" else {}
    plain = ours(made(pipe, PROMPTS, eta=eta, **options))
    swapped = ours(made(pipe, PROMPTS[::-1], eta=eta, **options))
    scale = dict(guidance_scale=9.0) | negative
    guided = ours(made(pipe, PROMPTS, eta=eta, **{**options, **scale}))
    for other in (swapped, guided):
        assert float((other - plain).abs().max()) > 3e-4 * float(plain.abs().max())


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart"])
def test_negative_prompts_and_one_prompt(kind: str) -> None:
    pipe, options = pipe_of(kind), SHORT[kind]
    given = dict(guidance_scale=2.0, eta=1.0, **options)
    negatives = ["bad photo", "mat"] if kind != "pixart" else "bad photo"
    lists = theirs(pipe, prompt=PROMPTS, negative_prompt=negatives, **given)
    assert_same(ours(made(pipe, PROMPTS, negatives, **given)), lists)
    single = theirs(pipe, prompt=PROMPTS[0], negative_prompt="bad photo", **given)
    model = made(pipe, PROMPTS[0], "bad photo", **given)
    assert model.plate is None and model.prompts == (PROMPTS[0],)
    assert_same(ours(model), single[0])


TEXTS: dict[str, dict[str, Any]] = {
    "sdxl": dict(prompt_2="mat", negative_prompt_2="photo"),
    "sd3": dict(
        prompt_2="mat", prompt_3="a photo", negative_prompt_2="photo", negative_prompt_3="red"
    ),
    "flux": dict(prompt_2="mat", negative_prompt_2="photo", true_cfg_scale=2.0),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_the_other_encoders(kind: str) -> None:
    """Each reaches its own text encoder, as in the pipeline, and changes something."""
    pipe, flow = pipe_of(kind), kind != "sdxl"
    given = {**SHORT[kind], "guidance_scale": 3.0, **TEXTS[kind]}
    eta = 1e-7 if flow else 1.0
    call = given if flow else {**given, **ETA}
    expected = theirs(pipe, prompt=PROMPTS[0], negative_prompt="bad photo", **call)
    found = ours(made(pipe, PROMPTS[0], "bad photo", eta=eta, **given))
    assert_same(found, unpacked(pipe, kind, expected)[0])
    for name, text in TEXTS[kind].items():
        if isinstance(text, str):
            other = ours(made(pipe, PROMPTS[0], "bad photo", eta=eta, **{**given, name: "fox fox"}))
            assert float((other - found).abs().max()) > 1e-4 * float(found.abs().max()), name


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_flow_pipelines_in_the_deterministic_limit(kind: str, scale: float) -> None:
    pipe = pipe_of(kind)
    options = {**SHORT[kind], "guidance_scale": scale}
    if kind == "flux" and scale > 1:
        options |= dict(true_cfg_scale=2.0, negative_prompt="bad photo")
    if kind == "flux" and scale > 1:
        call = {**options, "negative_prompt": ["bad photo"] * 2}
    else:
        call = options
    expected = theirs(pipe, prompt=PROMPTS, **call)
    expected = unpacked(pipe, kind, expected)
    assert_same(ours(made(pipe, PROMPTS, eta=1e-7, **options)), expected)
    errors = [
        float((ours(made(pipe, PROMPTS, eta=eta, **options)) - expected).abs().max())
        for eta in (0.1, 0.01)
    ]
    assert 5 < errors[0] / errors[1] < 20  # of first order in the noise


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_flow_images(kind: str) -> None:
    pipe, options = pipe_of(kind), SHORT[kind]
    expected = theirs(pipe, prompt=PROMPTS, images=True, **options)
    model = made(pipe, PROMPTS, eta=1e-7, **options)
    assert_same(model.decode(ours(model)), expected)


def test_timesteps_shift_with_the_size() -> None:
    """The pipelines' dynamic shifting of the noise levels, also where the size is not usual."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for kind in ("sd3", "flux"):
        options = {**SHORT[kind], "height": 16, "width": 24}
        with using(pipe_of(kind), scheduler) as pipe:
            expected = theirs(pipe, prompt="red fox", images=True, **options)
            levels = [float(sigma) for sigma in pipe.scheduler.sigmas[:-1]]
            model = made(pipe, "red fox", eta=1e-7, **options)
            assert [step.sigma for step in model.schedule.steps] == pytest.approx(levels, abs=1e-6)
            assert_same(model.decode(ours(model)), expected[0])


def test_usual_sizes_of_pixart() -> None:
    pipe = pipe_of("pixart")
    own = pipe.transformer.config
    options = {**SHORT["pixart"], "use_resolution_binning": True}
    pipe.transformer.register_to_config(**{**own, "sample_size": 32})
    try:
        given = dict(eta=1.0, height=60, width=70, **options)
        model = made(pipe, "red fox", **given)
        assert model.event_shape[1:] == (120, 136)
        with torch.no_grad():
            assert model.decode(torch.randn(model.event_shape)).shape == (3, 60, 70)
    finally:
        pipe.transformer.register_to_config(**own)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_classes_of_dit(scale: float) -> None:
    with using(pipe_of("dit"), pipes.latent_scheduler()) as pipe:  # the pipeline runs eta = 0
        call = dict(class_labels=[1, 7], guidance_scale=scale)
        expected = theirs(pipe, images=True, **call)
        model = made(pipe, ["goldfish", 7], guidance_scale=scale, eta=1e-6)
        images = model.decode(ours(model))
        assert_same(images, expected.permute(0, 3, 1, 2) if expected.shape[-1] == 3 else expected)
    assert model.prompts == ("1", "7")


def test_dit_with_its_own_noise() -> None:
    pipe = pipe_of("dit")
    expected = theirs(pipe, images=True, class_labels=[1, 7], guidance_scale=1.0)
    model = made(pipe, [1, 7], guidance_scale=1.0)
    assert_same(model.decode(ours(model)), expected)


def test_learned_variance_of_dit() -> None:
    """The pipeline drops the variance; a scheduler that takes it gets it."""
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range")
    model = made(pipe_of("dit"), [1, 7], scheduler=scheduler)
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        model.init(state)
    assert state["std_hat"].shape == (2,) + LATENTS


@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline"])
def test_unconditional_pipelines(kind: str) -> None:
    scheduler = diffusers.DDPMScheduler if kind == "DDPMPipeline" else diffusers.DDIMScheduler
    pipe = pipes.ddpm(kind, scheduler=scheduler(prediction_type="sample"))
    given = {} if kind == "DDPMPipeline" else {"eta": 1.0}
    expected = theirs(pipe, batch_size=2, images=True, **given)
    model = made(pipe, **given)
    torch.manual_seed(1)
    with pyro.plate("particles", 2), torch.no_grad():
        images = model.decode(model())
    assert_same(images, expected)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart", "sd3", "flux"])
def test_bfloat16(kind: str, scale: float) -> None:
    """
    Along the pipeline's own states the network's outputs, the steps, and the images of the same
    latents agree with the pipeline's to the rounding of bfloat16.
    """
    pipe = pipes.PIPES[kind]().to(torch.bfloat16)
    flow = kind in ("sd3", "flux")
    given = dict(SHORT[kind], guidance_scale=scale)
    model = made(pipe, PROMPTS, eta=1e-7 if flow else 1.0, **given)
    outputs, states = recorded(pipe, kind)
    last = unpacked(pipe, kind, theirs(pipe, prompt=PROMPTS, **given, **({} if flow else ETA)))
    torch.manual_seed(1)
    noises = [torch.randn(last.shape, dtype=last.dtype) for _ in range(STEPS + 1)]
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for t, output, x, noise, following in zip(
            model.timesteps, outputs, states, noises[1:], [*states[1:], last], strict=True
        ):
            step = model.schedule[t]
            found = model.denoiser(x.float(), step.timestep, step.input_scale, {})
            assert_same(found, output.float(), 3e-2)
            model._write(state, t, x.float())
            law = model.kernel(state, t)
            assert law.mean.dtype == state["x0_hat"].dtype == torch.float32
            # the last step of flow matching is deterministic
            assert_same(law.mean + law.variance.sqrt() * noise, following.float(), 2e-2)
        images = model.decode(last.float())
        shift = pipe.vae.config.shift_factor if flow else 0.0
        expected = pipe.vae.decode(last / pipe.vae.config.scaling_factor + shift).sample
    assert images.dtype == torch.float32
    assert_same(images, (expected.float() / 2 + 0.5).clamp(0, 1), 2e-2)


def recorded(pipe: Any, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """What the scheduler's step will be given: the network's outputs, guided, and the states."""
    own, outputs, states = pipe.scheduler.step, list[Tensor](), list[Tensor]()

    def step(output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        outputs.append(unpacked(pipe, kind, output))
        states.append(unpacked(pipe, kind, sample))
        return own(output, timestep, sample, *args, **options)

    step.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    pipe.scheduler.step = step
    return outputs, states


def unpacked(pipe: Any, kind: str, latents: Tensor) -> Tensor:
    if kind != "flux" or latents.dim() == 4:
        return latents
    found: Tensor = pipe._unpack_latents(latents, 16, 16, pipe.vae_scale_factor)
    return found


# Starts from an image


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_image_to_image(kind: str, strength: float) -> None:
    name = pipe_of(kind).__class__.__name__.replace("Pipeline", "Img2ImgPipeline")
    pipe = pipes.PIPES[kind](name)
    pipe.image_processor.register_to_config(vae_latent_channels=4)
    flow = kind in ("sd3", "flux")
    image = torch.randn(2, *LATENTS)
    options = dict(SHORT[kind], strength=strength)
    call = dict(options, height=16, width=16) if flow else dict(options, eta=1.0)
    expected = theirs(pipe, prompt=PROMPTS, image=image, images=True, **call)
    model = made(pipe, PROMPTS, image=image, eta=1e-7 if flow else 1.0, **options)
    assert len(model.timesteps) == {0.5: 2 if flow else 1, 1.0: 3}[strength]
    assert_same(model.decode(ours(model)), expected)


@pytest.fixture
def certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE that returns its mean, so that pipelines draw nothing but the noise that is added."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Law

    monkeypatch.setattr(Law, "sample", lambda self, generator=None: self.mean)


MOMENTS = dict(latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[0.5, 2.0, 1.5, 0.7])


@pytest.mark.usefixtures("certain")
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_pixels_are_encoded_as_the_pipeline_does(kind: str) -> None:
    """With the VAE's scale and shift, and with the mean and scale by channel of SDXL's."""
    name = pipe_of(kind).__class__.__name__.replace("Pipeline", "Img2ImgPipeline")
    flow = kind in ("sd3", "flux")
    pipe = pipes.PIPES[kind](name, **({"vae": pipes.vae(**MOMENTS)} if kind == "sdxl" else {}))
    image = [torch.rand(3, 16, 16), torch.rand(3, 16, 16)]
    options = dict(SHORT[kind], strength=0.7)
    call = dict(options, height=16, width=16) if flow else dict(options, **ETA)
    expected = theirs(pipe, prompt=PROMPTS, image=torch.stack(image), images=True, **call)
    model = made(pipe, PROMPTS, image=image, eta=1e-7 if flow else 1.0, **options)
    assert float(torch.as_tensor(model.start_std).min()) > 0
    model.start_std = 0.0
    assert_same(model.decode(ours(model)), expected)


def test_image_to_image_of_pixels() -> None:
    """The VAE's own uncertainty is part of the law of the start, as in the pipeline."""
    pipe = pipes.stable_diffusion("StableDiffusionImg2ImgPipeline")
    image = torch.rand(1, 3, 16, 16)
    model = made(pipe, "red fox", image=image, strength=0.7, eta=1.0)
    law = model.initial().base_dist
    with torch.no_grad():
        coded = pipe.vae.encode(2 * image - 1).latent_dist
    first, scaling = model.schedule[2], pipe.vae.config.scaling_factor
    assert torch.allclose(law.loc, first.alpha * scaling * coded.mean[0], atol=1e-6)
    variance = (first.alpha * scaling * coded.std[0]) ** 2 + first.sigma**2
    assert torch.allclose(law.scale**2, variance, rtol=1e-5)
    timestep = torch.tensor([first.timestep])
    torch.manual_seed(0)
    draws = torch.cat(
        [
            pipe.prepare_latents(2 * image - 1, timestep, 1, 1, torch.float32, image.device)
            for _ in range(400)
        ]
    )
    standard = (draws - law.loc) / law.scale  # 102,400 draws: bounds of five standard errors
    assert standard.mean().abs() < 5 / 102_400**0.5
    assert (standard.var() - 1).abs() < 5 * (2 / 102_400) ** 0.5


def test_starts_from_an_image_without_latents() -> None:
    image = torch.rand(2, 3, 8, 8)
    pipe = pipe_of("ddpm")
    for given in (image[0], image[:1]):
        model = made(pipe, image=given, strength=0.7)
        law, first = model.initial(), model.schedule[2]
        assert len(model.timesteps) == 2 and law.event_shape == (3, 8, 8)
        assert torch.allclose(law.mean, first.alpha * (2 * image[0] - 1), atol=1e-6)
        assert torch.allclose(law.stddev, torch.tensor(first.sigma))
    with pytest.raises(ValueError, match="2 images for 1 prompts"):
        made(pipe, image=image)


@pytest.mark.usefixtures("certain")
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_inpainting(kind: str) -> None:
    name = pipe_of(kind).__class__.__name__.replace("Pipeline", "InpaintPipeline")
    added: dict[str, Any] = {}
    if kind == "sdxl":
        added = dict(
            cross_attention_dim=2 * pipes.WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + pipes.WIDTH,
        )
    pipe = pipes.PIPES[kind](name, unet=pipes.unet(9, **added))
    image, mask = torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    hidden = torch.randn(1, *LATENTS)
    given = dict(image=image, mask_image=mask, masked_image_latents=hidden, strength=1.0)
    expected = theirs(
        pipe, prompt=PROMPTS, eta=1.0, height=16, width=16, guidance_scale=2.0, **given
    )
    model = made(pipe, PROMPTS, eta=1.0, guidance_scale=2.0, **given)
    assert_same(ours(model), expected)
    # the rest of the image encoded, and a start from the image
    given = dict(image=image, mask_image=mask, strength=0.7, guidance_scale=2.0, eta=1.0)
    expected = theirs(pipe, prompt=PROMPTS, height=16, width=16, **given)
    model = made(pipe, PROMPTS, **given)
    assert len(model.timesteps) == 2
    model.start_std = 0.0
    assert_same(ours(model), expected)
    with pytest.raises(ValueError, match="give image and mask_image"):
        made(pipe, PROMPTS, eta=1.0)
    with pytest.raises(ValueError, match="does not take a mask"):
        made(pipe_of(kind), PROMPTS, eta=1.0, mask_image=mask, image=image)


# Schedulers


@pytest.mark.parametrize(
    "name, reason",
    [
        ("PNDMScheduler", "earlier network outputs"),
        ("EulerDiscreteScheduler", "deterministic"),
        ("DPMSolverMultistepScheduler", "earlier network outputs"),
    ],
)
def test_other_schedulers_are_replaced(name: str, reason: str) -> None:
    given = dict(
        beta_start=0.001, beta_end=0.02, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    scheduler = getattr(diffusers, name)(**given, prediction_type="v_prediction")
    with using(pipe_of("sd"), scheduler) as pipe:
        with pytest.warns(UserWarning, match=f"{name} is not used.*{reason}") as said:
            model = made(pipe, "red fox")
        assert len(said) == 1 and said[0].filename == __file__
        with pytest.raises(ValueError, match=f"keep.*{name}.*{reason}"):
            made(pipe, "red fox", scheduler="keep")
        expected = diffusers.DDIMScheduler(
            **given,
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=name != "PNDMScheduler",
        )
        other = made(pipe, "red fox", scheduler=expected, eta=1.0)
        assert model.schedule.steps == other.schedule.steps
        assert type(pipe.scheduler).__name__ == name


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of numpy, in Heun
@pytest.mark.parametrize(
    "name",
    ["HeunDiscreteScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"],
)
def test_replaced_schedulers_keep_the_noise_levels_of_their_defaults(name: str) -> None:
    """``from_config`` drops what was not said, and DDIM's own defaults are another process."""
    own = getattr(diffusers, name)()
    with using(pipe_of("sd"), own) as pipe, pytest.warns(UserWarning, match="DDIM made from"):
        model = made(pipe, "red fox")
    assert len(model.timesteps) == STEPS
    for step in model.schedule.steps:
        assert step.alpha**2 == pytest.approx(float(own.alphas_cumprod[step.timestep]), rel=1e-5)


def test_replaced_schedulers_step_from_timestep_to_timestep() -> None:
    """DDIM goes back by a fixed stride; with evenly spaced points from both ends it would miss."""
    own = diffusers.DPMSolverMultistepScheduler(timestep_spacing="linspace")
    with using(pipe_of("sd"), own) as pipe, pytest.warns(UserWarning, match="DDIM made from"):
        steps = made(pipe, "red fox", num_inference_steps=4).schedule.steps
    assert [step.timestep for step in steps] == [999, 749, 499, 249]
    for step, following in zip(steps, steps[1:], strict=False):
        # with eta = 1 the kernel's mean holds x_0 at the level that comes next
        reached = step.x0_coef + step.x_coef * step.alpha
        assert reached == pytest.approx(following.alpha, rel=1e-4)


@pytest.mark.parametrize(
    "name, options",
    [
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("IPNDMScheduler", {}),
        # told the logarithm of the noise level
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
    ],
)
def test_schedulers_that_nothing_stands_in_for_are_refused(
    name: str, options: dict[str, Any]
) -> None:
    """DDIM with its own default noise levels would be no scheduler of the network's."""
    with using(pipe_of("sd"), getattr(diffusers, name)(**options)) as pipe:
        with pytest.raises(ValueError, match=f"{name} cannot be used.*give scheduler="):
            made(pipe, "red fox")
        assert made(pipe, "red fox", scheduler=diffusers.DDPMScheduler()).timesteps == (3, 2, 1)


def test_tcd_without_noise() -> None:
    with using(pipe_of("sd"), diffusers.TCDScheduler()) as pipe:
        with pytest.warns(UserWarning, match="TCDScheduler is not used.*eta=0.*with eta=0.3"):
            model = made(pipe, "red fox")
        assert model.schedule.steps == made(pipe, "red fox", eta=0.3).schedule.steps


def test_schedulers_of_the_wrong_family_are_refused() -> None:
    for kind, scheduler in (
        ("sd", diffusers.FlowMatchEulerDiscreteScheduler()),
        ("sd3", diffusers.DDIMScheduler()),
    ):
        with pytest.raises(ValueError, match="one of them is of flow matching"):
            made(pipe_of(kind), "red fox", scheduler=scheduler, **SHORT[kind])
    with pytest.raises(ValueError, match="is no scheduler; give an instance"):
        made(pipe_of("sd"), "red fox", scheduler=diffusers.DDIMScheduler)


def test_solvers_of_flow_matching_are_replaced() -> None:
    solver = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
    )
    pipe = pipe_of("sd3")
    with using(pipe, solver), pytest.warns(UserWarning, match="UniPC.*same marginals"):
        model = made(pipe, "red fox", **SHORT["sd3"])
    expected = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    other = made(pipe, "red fox", scheduler=expected, **SHORT["sd3"])
    assert model.schedule.steps == other.schedule.steps


@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_a_variance_that_the_scheduler_does_not_take_is_dropped(kind: str) -> None:
    """Also where the config, made from another scheduler's, still speaks of it."""
    config = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False).config
    scheduler = diffusers.DDIMScheduler.from_config(config)
    options = SHORT.get(kind, {})
    prompt: Any = 1 if kind == "dit" else "red fox"
    model = made(pipe_of(kind), prompt, scheduler=scheduler, eta=1.0, **options)
    assert ours(model).shape == LATENTS


def test_timesteps_of_ones_own() -> None:
    """They take the place of the pipeline's list, of which there would be two otherwise."""
    levels = [0.9, 0.5, 0.2]
    for sigmas in (levels, torch.tensor(levels)):
        model = made(
            pipe_of("flux"), "a cat", eta=1.0, timestep_options={"sigmas": sigmas}, **SHORT["flux"]
        )
        expected = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        expected.set_timesteps(sigmas=levels, mu=model.denoiser.network.adapter.shift(expected))
        found = [step.sigma for step in model.schedule.steps]
        assert found == pytest.approx(expected.sigmas[:-1].tolist(), abs=1e-6)
    given = dict(timesteps=[800.0, 500.0, 100.0])
    model = made(pipe_of("flux"), "a cat", eta=1.0, timestep_options=given, **SHORT["flux"])
    expected.set_timesteps(timesteps=given["timesteps"], mu=0.459375)
    assert [step.timestep for step in model.schedule.steps] == given["timesteps"]
    found = [step.sigma for step in model.schedule.steps]
    assert found == pytest.approx(expected.sigmas[:-1].tolist(), abs=1e-6)
    model = made(pipe_of("ddpm"), timestep_options=dict(timesteps=torch.tensor([900, 500, 1])))
    assert [step.timestep for step in model.schedule.steps] == [900, 500, 1]


def test_flow_schedulers_are_made_stochastic() -> None:
    pipe = pipe_of("sd3")
    with pytest.warns(UserWarning, match="same marginals"):
        model = made(pipe, "red fox", **SHORT["sd3"])
    assert model.schedule[2].std > 0
    with pytest.raises(ValueError, match="keep.*deterministic"):
        made(pipe, "red fox", scheduler="keep", **SHORT["sd3"])
    heun = diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0)
    with using(pipe, heun), pytest.warns(UserWarning, match="Heun.*same marginals"):
        model = made(pipe, "red fox", **SHORT["sd3"])
    expected = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    other = made(pipe, "red fox", scheduler=expected, **SHORT["sd3"])
    assert model.schedule.steps == other.schedule.steps


def test_deterministic_ddim() -> None:
    pipe = pipe_of("sd")
    with pytest.warns(UserWarning, match="eta=0"):
        model = made(pipe, "red fox")
    assert model.schedule.steps == made(pipe, "red fox", eta=1.0).schedule.steps
    with pytest.raises(ValueError, match="keep.*eta=0"):
        made(pipe, "red fox", scheduler="keep")
    assert made(pipe, "red fox", scheduler="keep", eta=0.5).schedule[2].std > 0
    with pytest.raises(ValueError, match="scheduler='ddim'"):
        made(pipe, "red fox", scheduler="ddim")


def test_the_pipeline_is_not_changed() -> None:
    pipe = pipe_of("sd")
    before = pipe.scheduler
    timesteps = before.timesteps.clone()
    ours(made(pipe, PROMPTS, eta=1.0))
    assert pipe.scheduler is before and torch.equal(before.timesteps, timesteps)


# Many prompts


class Noise(Messenger):
    """Gives the sites of a path a value made from a table of noise."""

    def __init__(self, table: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.table = table

    def _pyro_sample(self, msg: Any) -> None:
        law = getattr(msg["fn"], "base_dist", None)
        if msg["name"] in self.table and isinstance(law, dist.Normal):
            msg["value"] = law.loc + law.scale * self.table[msg["name"]]


class WithNoise(ModelWrapper):
    """A model whose path is made from a table of noise."""

    def __init__(self, model: Any, table: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self.noise = Noise(table)

    def init(self, state: Any) -> None:
        with self.noise:
            self.model.init(state)

    def step(self, state: Any, t: int) -> None:
        with self.noise:
            self.model.step(state, t)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systematic resampling without chance, so that runs of one and many prompts can agree."""

    def scheme(probs: Tensor, size: int, generator: Any = None) -> Tensor:
        points = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        return torch.searchsorted(probs.double().cumsum(0), points).clamp(max=size - 1)

    monkeypatch.setitem(RESAMPLING, "fixed", scheme)


def brightness(images: Tensor) -> Tensor:
    return images.double().flatten(1).mean(1)


def run(model: Any, noise: Mapping[str, Tensor], **options: Any) -> Any:
    tilted = RewardTilted(WithNoise(model, noise), brightness, scale=1500.0)
    smc = TwistedSMC(
        tilted, LookaheadTwist(tilted), 4, ess_threshold=0.9, resampling="fixed", **options
    )
    return smc.run()


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("chunks", [{}, dict(chunk_size=5, decode_chunk_size=2)])
def test_prompts_run_as_they_would_alone(chunks: dict[str, int]) -> None:
    pipe = pipe_of("sdxl")
    prompts = [*PROMPTS, "bad photo"]
    scales = [1.5, 3.0, 5.0]
    generator = torch.Generator().manual_seed(3)
    shape = (4, len(prompts), *LATENTS)
    noise = {f"x_{t}": torch.randn(shape, generator=generator) for t in range(STEPS + 1)}
    together = run(
        made(pipe, prompts, eta=1.0, guidance_scale=scales, **chunks),
        noise,
        max_plate_nesting=1,
        population_plate="prompts",
    )
    assert together.log_weights.shape == (4, 3)
    for index, prompt in enumerate(prompts):
        alone = run(
            made(pipe, prompt, eta=1.0, guidance_scale=scales[index]),
            {name: value[:, index] for name, value in noise.items()},
        )
        assert torch.allclose(together.log_weights[:, index], alone.log_weights, atol=1e-3)
        assert_same(together.state["x"][:, index], alone.state["x"], 1e-4)
        assert torch.allclose(together.log_normalizer[index], alone.log_normalizer, atol=1e-3)
        assert alone.diagnostics.resampled.any()
    assert (together.log_weights.std(0) > 1e-2).all()


def test_without_reward_the_sampler_is_the_pipeline() -> None:
    """Nothing is resampled, and the stream of noise is the pipeline's own."""
    pipe = pipe_of("sd")
    model = RewardTilted(made(pipe, PROMPTS, eta=1.0), brightness, scale=0.0)
    smc = TwistedSMC(
        model, LookaheadTwist(model), 1, max_plate_nesting=1, population_plate="prompts"
    )
    torch.manual_seed(1)
    result = smc.run()
    assert_same(result.state["x"][0], theirs(pipe, prompt=PROMPTS, eta=1.0))
    assert torch.equal(result.log_normalizer, torch.zeros(2, dtype=torch.float64))
    expected = theirs(pipe, prompt=PROMPTS, eta=1.0, images=True)
    assert_same(model.decode(result.state["x"])[0], expected)


def test_counts_and_populations() -> None:
    model = made(pipe_of("sd"), PROMPTS, eta=1.0)
    assert model.plate == ("prompts", 2) and model.prompts == tuple(PROMPTS)
    smc = TwistedSMC(model, None, 3, max_plate_nesting=1, population_plate="prompts")
    result = smc.run()
    assert result.state["x"].shape == (3, 2, *LATENTS)
    assert model.counts["denoiser"] == 3 * 2 * STEPS


# Memory


class Small(torch.nn.Module):
    """A device with room for a few rows."""

    def __init__(self, room: int, error: Exception) -> None:
        super().__init__()
        self.room, self.error = room, error
        self.sizes: list[int] = []

    def forward(self, x: Tensor, timestep: Any = None) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise self.error
        return 0.5 * x


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
]


def small(network: Small, **options: Any) -> GaussianDiffusion:
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    return GaussianDiffusion(network, scheduler, (1, 2, 2), num_inference_steps=2, **options)


@pytest.mark.parametrize("error", FULL, ids=["cuda", "mps", "cpu", "cublas"])
def test_memory_that_runs_out(error: Exception) -> None:
    network = Small(3, error)
    model = small(network)
    reference = small(Small(100, error))
    with pyro.plate("particles", 13), torch.no_grad():
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="memory ran out with 13 rows.*chunk_size=6") as said:
            found = model()
        torch.manual_seed(0)
        expected = reference()
    assert len(said) == 1
    assert network.sizes == [13, 6, 3, 3, 3, 3, 1] + [3, 3, 3, 3, 1]
    assert model.denoiser.chunk_size == 3
    assert torch.allclose(found, expected, atol=1e-6)


def test_chunks_that_are_done_are_not_run_again() -> None:
    """Memory runs out in the middle of a batch, as when something else takes a part of it."""
    network = Small(4, FULL[0])
    model, reference = small(network, chunk_size=4), small(Small(100, FULL[0]))
    asked = network.forward

    def forward(x: Tensor, timestep: Any = None) -> Tensor:
        network.room = 2 if len(network.sizes) == 1 else network.room
        return asked(x, timestep)

    network.forward = forward  # type: ignore[method-assign]
    with pyro.plate("particles", 10), torch.no_grad():
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="memory ran out with 4 rows.*chunk_size=2"):
            found = model()
        torch.manual_seed(0)
        expected = reference()
    assert network.sizes == [4, 4, 2, 2, 2] + [2] * 5
    assert torch.equal(found, expected)


def test_memory_of_the_decoder() -> None:
    decoder = Small(4, FULL[0])
    model = small(Small(100, FULL[0]), decoder=decoder)
    x = torch.randn(2, 3, 1, 2, 2)
    with pytest.warns(UserWarning, match="decode_chunk_size=3") as said:
        first, second = model.decode(x), model.decode(x)
    assert len(said) == 1 and decoder.sizes == [6, 3, 3, 3, 3]
    assert torch.equal(first, 0.5 * x) and torch.equal(second, first)


def test_errors_that_are_not_of_memory() -> None:
    for network in (Small(3, RuntimeError("no kernel image")), Small(0, FULL[0])):
        model = small(network)
        with pyro.plate("particles", 4), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match="no kernel image|out of memory"):
                model()
    for size in (0, 1.5):
        with pytest.raises(ValueError, match=f"decode_chunk_size={size} is not"):
            small(Small(3, FULL[0]), decode_chunk_size=size)


def test_chunks_of_the_decoder_keep_gradients() -> None:
    pipe = pipe_of("sd")
    x = torch.randn(3, *LATENTS, requires_grad=True)
    grads = []
    for size in (None, 2):
        model = made(pipe, "red fox", eta=1.0, decode_chunk_size=size)
        (grad,) = torch.autograd.grad(model.decode(x).square().sum(), x)
        grads.append(grad)
    assert float(grads[0].abs().max()) > 1e-4 and torch.allclose(*grads, rtol=1e-3, atol=1e-6)


def test_networks_that_are_kept_elsewhere_or_smaller() -> None:
    """Computing happens on the device of an offloading hook, and not in eight bits."""
    pipe = pipes.stable_diffusion()
    network = made(pipe, "red fox", eta=1.0).denoiser.network
    assert network.placement == (torch.device("cpu"), torch.float32)
    pipe.unet._hf_hook = SimpleNamespace(execution_device="meta")
    assert network.placement[0] == torch.device("meta")
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert network.placement[1] == torch.bfloat16


# Half precision


class Shifted:
    """Proposes a little beside the model, which costs weight at every step."""

    shift = 0.02

    def __init__(self, model: Any) -> None:
        self.model = model

    def init(self, state: Any) -> None:
        pyro.sample(f"x_{STEPS}", self.model.initial())

    def step(self, state: Any, t: int) -> None:
        law = self.model.kernel(state, t).base_dist
        moved = dist.Normal(law.loc + self.shift * law.scale, law.scale).to_event(3)
        pyro.sample(f"x_{t - 1}", moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_a_half_precision_network(dtype: torch.dtype) -> None:
    """
    Log-weights against float64 arithmetic on what the network really returned: 4,096 latents,
    whose float32 log-densities are coarser than the bound.
    """
    pipe = pipes.stable_diffusion()
    pipe.unet.to(dtype)
    model = made(pipe, "red fox", eta=1.0, guidance_scale=2.0, height=64, width=64)
    outputs: list[Tensor] = []
    pipe.unet.register_forward_hook(lambda *args: outputs.append(args[-1][0]))
    smc = TwistedSMC(model, Shifted(model), 2, resampling="none", history="paths", seed=0)
    result = smc.run()
    assert outputs[0].dtype == dtype and result.log_weights.dtype == torch.float64
    assert len(outputs) == STEPS and result.samples is not None
    expected = torch.zeros(2, dtype=torch.float64)
    for t, output in zip(model.timesteps, outputs, strict=True):
        plain, text = output.double().chunk(2)
        step = model.schedule[t]
        x, following = (result.samples[f"x_{i}"].double() for i in (t, t - 1))
        noise = plain + 2.0 * (text - plain)
        x0_hat = step.x0_from[0] * x + step.x0_from[1] * noise
        mean = step.x0_coef * x0_hat + step.x_coef * x
        z = ((following - mean) / step.std).flatten(1)
        expected += (((z - Shifted.shift) ** 2 - z**2) / 2).sum(1)
    assert expected.abs().min() > 1
    assert torch.allclose(result.log_weights, expected, rtol=0, atol=1e-3)


def test_mean_and_scale_by_channel() -> None:
    """Some VAEs of SDXL have them in place of one scale."""
    pipe = pipes.stable_diffusion_xl(vae=pipes.vae(**MOMENTS))
    expected = theirs(pipe, prompt=PROMPTS, images=True, **ETA)
    model = made(pipe, PROMPTS, **ETA)
    assert_same(model.decode(ours(model)), expected)


def overflowing(force_upcast: bool) -> Any:
    """An SDXL pipeline whose VAE leaves the range of float16 inside, but not float32's."""
    pipe = pipes.stable_diffusion_xl(vae=pipes.vae(force_upcast=force_upcast))
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(1e5)
    return pipe.to(torch.float32)


def test_vae_that_overflows() -> None:
    x = torch.randn(2, *LATENTS)
    pipe = overflowing(force_upcast=True)
    expected = made(pipe, "red fox", eta=1.0).decode(x)
    pipe.vae.to(torch.float16)
    images = made(pipe, "red fox", eta=1.0).decode(x)
    assert pipe.vae.dtype == torch.float16 and images.dtype == torch.float32
    assert_same(images, expected, 5e-2)  # the weights were rounded to float16
    pipe = overflowing(force_upcast=False)
    pipe.vae.to(torch.float16)
    with pytest.raises(ValueError, match="float16 overflowed"):
        made(pipe, "red fox", eta=1.0).decode(x)


def test_vae_that_overflows_when_it_encodes() -> None:
    found = []
    options = dict(image=torch.rand(3, 16, 16), strength=0.7, eta=1.0)
    for force_upcast in (True, False):
        pipe = pipes.stable_diffusion_xl(
            "StableDiffusionXLImg2ImgPipeline", vae=pipes.vae(force_upcast=force_upcast)
        )
        with torch.no_grad():
            pipe.vae.encoder.conv_in.weight.mul_(1e5)
        found.append(made(pipe, "red fox", **options).initial().mean)
        pipe.vae.to(torch.float16)
        if force_upcast:
            found.append(made(pipe, "red fox", **options).initial().mean)
            assert pipe.vae.dtype == torch.float16
        else:
            with pytest.raises(ValueError, match="float16 overflowed"):
                made(pipe, "red fox", **options)
    assert_same(found[1], found[0], 5e-2)  # the weights were rounded to float16


# Micro-conditioning, guidance that is an input, kinds of one's own


def test_sizes_of_stable_diffusion_xl() -> None:
    pipe = pipe_of("sdxl")
    given = dict(
        original_size=(64, 32),
        crops_coords_top_left=(4, 2),
        target_size=(8, 8),
        negative_original_size=(3, 5),
        negative_target_size=(7, 9),
        prompt_2="mat",
        guidance_scale=2.0,
        eta=1.0,
    )
    # One prompt: in a batch the pipeline mixes up the sizes of the two evaluations.
    expected = theirs(pipe, prompt=PROMPTS[0], **given)
    found = ours(made(pipe, PROMPTS, **given))
    assert_same(ours(made(pipe, PROMPTS[0], **given)), expected[0])
    plain = ours(made(pipe, PROMPTS[0], eta=1.0, prompt_2="mat", guidance_scale=2.0))
    assert float((expected[0] - plain).abs().max()) > 1e-3
    assert found.shape == (2, *LATENTS)


def test_network_that_has_guidance_as_an_input() -> None:
    pipe = pipes.stable_diffusion(unet=pipes.unet(time_cond_proj_dim=6))
    expected = theirs(pipe, prompt=PROMPTS, guidance_scale=4.0, eta=1.0)
    model = made(pipe, PROMPTS, guidance_scale=4.0, eta=1.0)
    assert_same(ours(model), expected)
    assert model.counts["denoiser"] == 2 * STEPS
    with pytest.raises(ValueError, match="guidance-distilled.*no negative_prompt"):
        made(pipe, PROMPTS, "bad", eta=1.0)


def test_flux_without_guidance() -> None:
    pipe = pipes.flux(guidance_embeds=False)
    with pytest.raises(ValueError, match="distilled and takes no guidance"):
        made(pipe, "red fox", guidance_scale=3.5)
    options = {**SHORT["flux"], "guidance_scale": 0.0}
    expected = theirs(pipe, prompt="red fox", images=True, **options)
    model = made(pipe, "red fox", eta=1e-7, **options)
    assert_same(model.decode(ours(model)), expected[0])
    with pytest.raises(ValueError, match="true_cfg_scale=1.0"):
        made(pipe, "red fox", "bad")
    with pytest.raises(ValueError, match="true_cfg_scale=2.0"):
        made(pipe, "red fox", true_cfg_scale=2.0)


class MyPipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """A pipeline of one's own: a network that is told a number."""

    def __init__(self, net: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler)


class MyAdapter(PipelineAdapter):
    component = "net"

    def __init__(self, pipe: Any, *, level: float = 1.0) -> None:
        super().__init__(pipe)
        self.level = level

    def encode(self, prompts: list[Any], negatives: Any, guided: bool) -> Conditioning:
        return Conditioning({"length": torch.tensor([float(len(one)) for one in prompts])})

    def denoise(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        return self.level * inputs["length"][:, None, None, None] + 0 * x


def test_a_kind_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_twist.diffusion.pipelines import build

    monkeypatch.setattr(build, "_REGISTERED", {})
    pipe = MyPipeline(
        pipe_of("ddpm").unet, diffusers.DDPMScheduler(prediction_type="sample", clip_sample=False)
    )
    with pytest.raises(ValueError, match="MyPipeline, which is not known.*register_pipeline"):
        made(pipe, "ab")
    register_pipeline(MyPipeline, MyAdapter)
    model = made(pipe, ["ab", "abcd"], level=0.1)
    x = ours(model)
    assert torch.allclose(x[:, 0, 0, 0], torch.tensor([0.2, 0.4]))
    assert model.decode(x)[1].mean() == pytest.approx(0.7)
    with pytest.raises(ValueError, match="no option 'levels'.*level"):
        made(pipe, ["ab"], levels=0.1)
    with pytest.raises(ValueError, match="no start from an image"):
        made(pipe, "ab", image=torch.zeros(3, 8, 8))
    register_pipeline(MyPipeline, lambda pipe, **options: MyAdapter(pipe, **options))
    assert torch.allclose(ours(made(pipe, "ab", level=0.2))[0], torch.tensor(0.4))
    with pytest.raises(ValueError, match="adapter=3"):
        register_pipeline("Other", 3)  # type: ignore[arg-type]
    assert pipelines.register_pipeline is register_pipeline


# Errors


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("sd", dict(prompt=None), "prompt=None; .* takes a prompt or a list"),
        ("sd", dict(prompt=[]), r"prompt=\[\]"),
        ("sd", dict(prompt=["a", 3]), "not a string"),
        ("sd", dict(prompt=deque(["a", "b"])), "takes a prompt or a list"),
        ("sd", dict(negative_prompt=3), "negative_prompt=3; give a string"),
        ("sd", dict(num_inference_steps=2.5), "num_inference_steps=2.5 is not"),
        ("flux", dict(num_inference_steps=0), "num_inference_steps=0 is not"),
        ("sd", dict(height=0), "height=0 is not a positive integer"),
        ("sd", dict(width=16.0), "width=16.0 is not a positive integer"),
        ("sd", dict(guidance_scale="7.5"), "guidance_scale='7.5'; give a number"),
        ("sd", dict(guidance_scale=float("nan")), "guidance_scale=nan is not finite"),
        ("sd", dict(image=torch.zeros(5, 16, 16)), "image has 5 channels"),
        ("sd", dict(image=torch.full((3, 16, 16), 255.0)), "values from 509 to 509 .* give images"),
        ("sd", dict(image=torch.zeros(*LATENTS), strength="1"), r"outside \(0, 1\]"),
        ("sdxl", dict(original_size=16), "a size or a corner is 16"),
        ("sdxl", dict(negative_target_size=(4, 4)), "give both or neither"),
        ("dit", dict(prompt=True), "prompt=True is no class"),
        ("sd", dict(prompt=["a", "cat"], negative_prompt=["bad"]), "1 entries for 2 prompts"),
        ("sd", dict(height=15), "height=15 is not divisible by 2, .* try 14 or 16"),
        ("flux", dict(width=18), "width=18 is not divisible by 4"),
        ("flux", dict(true_cfg_scale=[2.0]), r"true_cfg_scale=\[2.0\]; give one number"),
        ("sd3", dict(height=18), "height=18 is not divisible by 4"),
        ("sd", dict(guidance=2.0), "no option 'guidance'.*clip_skip"),
        ("sd", dict(guidance_scale=[1.0, 2.0]), "guidance_scale has shape"),
        ("sd", dict(strength=0.5), "strength=0.5 is for a start"),
        ("sd", dict(image=torch.zeros(*LATENTS), strength=0.1), "of the 3 steps; try 0.34"),
        ("sd", dict(image=torch.zeros(*LATENTS), strength=1.5), r"outside \(0, 1\]"),
        ("sd", dict(image=torch.zeros(2, *LATENTS)), "2 images for 1 prompts"),
        ("sdxl", dict(prompt_2=["a", "b"]), "prompt_2 has 2 entries for 1 prompts"),
        ("dit", dict(prompt=1000), "no class.*0 to 999, or a name such as"),
        ("dit", dict(prompt=1, negative_prompt="bad"), "has none"),
        ("ddpm", dict(prompt="cat"), "has no prompts"),
        ("ddpm", dict(prompt=None, negative_prompt="cat"), "has no prompts"),
        ("ddpm", dict(prompt=None, guidance_scale=2.0), "unconditional"),
        ("ddpm", dict(prompt=None, height=16), "no option 'height'"),
        ("ddpm", dict(prompt=None, image=torch.zeros(3)), "image is not a tensor of shape"),
    ],
)
def test_errors(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(
            pipe_of(kind), **{"prompt": "a cat", "eta": None if kind == "ddpm" else 1.0, **options}
        )


def test_networks_that_are_not_understood() -> None:
    with pytest.raises(ValueError, match="6 channels for latents of 4"):
        made(pipes.stable_diffusion(unet=pipes.unet(6)), "a cat", eta=1.0)
    pipe = pipes.stable_diffusion_xl()
    pipe.unet.register_to_config(projection_class_embeddings_input_dim=5 * 4 + pipes.WIDTH)
    with pytest.raises(ValueError, match="refiner"):
        made(pipe, "a cat", eta=1.0)
    pipe = pipes.stable_diffusion()
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(ValueError, match="unload_ip_adapter"):
        made(pipe, "a cat", eta=1.0)
    pipe = pipes.stable_diffusion_3()
    pipe.text_encoder_3.train()
    with pytest.raises(ValueError, match="training mode"):
        made(pipe, "a cat", eta=1.0)


def test_chunks_bound_what_prompts_are_encoded_to() -> None:
    """Embeddings are kept once for each prompt; a call is given those of its rows, no more."""
    pipe = pipe_of("sd")
    seen: list[int] = []
    model = GaussianDiffusion.from_pipeline(
        pipe, ["a blue cat", "a red fox"], num_inference_steps=3, chunk_size=3, eta=1.0
    )
    inner, expanded = model.denoiser._call, model.denoiser._expand
    entries: list[int] = []

    def call(rows: Tensor, timestep: float, conditioning: dict[str, Any]) -> Tensor:
        seen.append(len(conditioning["encoder_hidden_states"]))
        return inner(rows, timestep, conditioning)

    def expand(values: Any, batch_shape: Any) -> dict[str, Any]:
        found = expanded(values, batch_shape)
        entries.append(len(found["encoder_hidden_states"].entries))
        return found

    model.denoiser._call, model.denoiser._expand = call, expand  # type: ignore[method-assign]
    with torch.no_grad(), pyro.plate("particles", 4, dim=-2):
        model.init({})
    assert sum(seen) == 16 and max(seen) == 3
    assert set(entries) == {2}
