# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
What a pipeline costs as a model: time per denoiser call against the pipeline's own loop, the shares
of VAE and reward in a run with a look-ahead at every step, and peak memory.

Run ``make bench``, or ``python -m tests.perf.bench_pipeline --out results/pipeline.json``. On a
GPU::

    python -m tests.perf.bench_pipeline --device cuda --cases sd15,sdxl --out results/gpu.json

measures networks of the size of Stable Diffusion 1.5 and XL in bfloat16, from their configs with
random weights. With ``--pipeline FOLDER --prompt "a blue cat"`` a pipeline of yours is measured.
Every case runs in a process of its own. Time is processor time on a CPU, which other processes
disturb less, and wall time on a GPU. ``outside_ms`` is what a step takes outside of the network, on
a CPU, where the time of the network itself varies more than that.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_twist.diffusion import GaussianDiffusion
from pyro_twist.infer import TwistedSMC
from pyro_twist.rewards import Reward, RewardTilted
from pyro_twist.twists import LookaheadTwist
from tests.diffusion import pipes
from tests.perf.bench_engine import high_water
from tests.perf.timing import machine

PROMPTS = ["a blue cat", "red fox on a mat"]


def small(name: str) -> Callable[[], Any]:
    """The tiny pipelines with networks wide enough to take most of the time."""
    if name == "sd":
        return lambda: pipes.stable_diffusion(
            unet=pipes.unet(
                sample_size=32,
                block_out_channels=(32, 64),
                attention_head_dim=8,
                norm_num_groups=8,
            )
        )
    return lambda: pipes.stable_diffusion_xl(
        unet=pipes.unet(
            sample_size=32,
            block_out_channels=(32, 64),
            attention_head_dim=8,
            norm_num_groups=8,
            cross_attention_dim=2 * pipes.WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + pipes.WIDTH,
        )
    )


def full_vae(scale: float) -> Any:
    """The VAE of Stable Diffusion, with random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=scale,
    )


def sd15() -> Any:
    """Stable Diffusion 1.5 at 512 pixels; the text encoder, which runs once, is small."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    return pipes.stable_diffusion(
        unet=unet, vae=full_vae(0.18215), text_encoder=pipes.clip_text(width=768)
    )


def sdxl() -> Any:
    """Stable Diffusion XL at 1024 pixels; the text encoders, which run once, are small."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return pipes.stable_diffusion_xl(
        unet=unet,
        vae=full_vae(0.13025),
        text_encoder=pipes.clip_text(width=768),
        text_encoder_2=pipes.clip_text(projected=True, width=1280),
    )


CASES: dict[str, Callable[[], Any]] = {
    **{f"tiny {name}": make for name, make in pipes.PIPES.items()},
    "small sd": small("sd"),
    "small sdxl": small("sdxl"),
    "sd15": sd15,
    "sdxl": sdxl,
}
ON_CPU = [name for name in CASES if name.startswith(("tiny", "small"))]


class Clock:
    """Processor time on a CPU; wall time, with what is queued finished, on a GPU."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")

    def __call__(self) -> float:
        if not self.on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


class Timed:
    """A function and how long its calls took."""

    def __init__(self, function: Callable[..., Any], clock: Clock) -> None:
        self.function, self.clock, self.seconds = function, clock, 0.0

    def __call__(self, *args: Any) -> Any:
        start = self.clock()
        value = self.function(*args)
        self.seconds += self.clock() - start
        return value


class Outside:
    """A loop, and how long its steps take outside of the network."""

    def __init__(self, network: Any, clock: Clock) -> None:
        self.network, self.clock = network, clock

    def __call__(self, loop: Callable[[], float]) -> tuple[float, float]:
        if self.clock.on_gpu:  # a clock at every call would make the GPU wait
            return loop(), 0.0
        inside: list[float] = []
        hooks = [
            self.network.register_forward_pre_hook(lambda *args: inside.append(-self.clock())),
            self.network.register_forward_hook(lambda *args: inside.append(self.clock())),
        ]
        try:
            seconds = loop()
        finally:
            for hook in hooks:
                hook.remove()
        counted = inside[2:]  # both loops are timed from the end of the first evaluation on
        return seconds, seconds - sum(counted) / (len(counted) / 2)


def brightness(images: Tensor) -> Tensor:
    return images.double().flatten(1).mean(1)


def prompts_of(pipe: Any, prompts: list[str]) -> Any:
    kind = type(pipe).__name__
    if kind.startswith("DiT"):
        return list(range(len(prompts)))
    return None if kind.startswith("DD") else prompts


def call_of(pipe: Any, prompts: list[str], particles: int, steps: int) -> dict[str, Any]:
    """The arguments of the pipeline's own call at the same batch."""
    given = prompts_of(pipe, prompts)
    call: dict[str, Any] = dict(num_inference_steps=steps, output_type="pt")
    known = inspect.signature(type(pipe).__call__).parameters
    if given is None:
        call["batch_size"] = particles
    else:
        call["class_labels" if "class_labels" in known else "prompt"] = given * particles
    options = dict(eta=1.0, output_type="latent" if given is not None else "pt")
    options |= {"use_resolution_binning": False, "clean_caption": False}
    return call | {name: value for name, value in options.items() if name in known}


def their_loop(pipe: Any, call: dict[str, Any], clock: Clock) -> float:
    """Seconds between the first and the last step of the pipeline's own loop, per step."""
    own, moments, count = pipe.scheduler.step, [], 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        found = own(*args, **kwargs)
        if count in (1, call["num_inference_steps"]):
            moments.append(clock())
        return found

    pipe.scheduler.step = step
    try:
        pipe(**call)
    finally:
        del pipe.scheduler.step
    return (moments[-1] - moments[0]) / (call["num_inference_steps"] - 1)


def our_loop(model: GaussianDiffusion, particles: int, clock: Clock) -> float:
    """Seconds from the first prediction to the last, per step."""
    smc = make(model, None, particles)
    smc.init()
    start = clock()
    for t in model.timesteps[:-1]:
        smc.step(t)
    return (clock() - start) / (len(model.timesteps) - 1)


def make(model: Any, guide: Any, particles: int) -> TwistedSMC:
    nested = model.plate is not None
    return TwistedSMC(
        model,
        guide,
        particles,
        max_plate_nesting=int(nested),
        population_plate="prompts" if nested else None,
        history="off",
        progress=False,
    )


def shares(model: GaussianDiffusion, particles: int, clock: Clock) -> dict[str, Any]:
    """A run with a look-ahead at every step: where its time goes, and what it calls."""
    calls = 0

    def count(*args: Any) -> None:
        nonlocal calls
        calls += 1

    hook = model.denoiser.network.network.register_forward_hook(count)
    decoder = Timed(model.decoder, clock)
    reward = Timed(brightness, clock)
    model.decoder = decoder
    before = model.counts["denoiser"]
    tilted = RewardTilted(model, Reward(reward, name="brightness"), scale=10.0)
    start = clock()
    result = make(tilted, LookaheadTwist(tilted), particles).run()
    total = clock() - start
    hook.remove()
    model.decoder = decoder.function
    return {
        "denoiser_rows": model.counts["denoiser"] - before,
        "network_calls": calls,
        "reward_rows": result.counts["reward"],
        "seconds": round(total, 3),
        "vae_share": round(decoder.seconds / total, 3),
        "reward_share": round(reward.seconds / total, 3),
    }


def run_case(name: str, settings: dict[str, Any]) -> None:
    """Prints the figures of a case in this process."""
    warnings.simplefilter("ignore")
    pyro.enable_validation(False)
    torch.set_num_threads(settings["threads"])
    device, dtype = settings["device"], getattr(torch, settings["dtype"])
    pipe = load(name).to(device, dtype)
    particles, steps, clock = settings["particles"], settings["steps"], Clock(device)
    prompts = settings["prompts"] or PROMPTS
    call = call_of(pipe, prompts, particles, steps)
    known = {"use_resolution_binning", "clean_caption"} & set(call)
    with torch.no_grad():
        model = GaussianDiffusion.from_pipeline(
            pipe,
            prompts_of(pipe, prompts),
            num_inference_steps=steps,
            chunk_size=settings["chunk_size"],
            decode_chunk_size=settings["decode_chunk_size"],
            **{option: call[option] for option in known},
        )
        times = []
        outside = Outside(model.denoiser.network.network, clock)
        for turn in range(settings["rounds"] + 1):
            pair = (
                outside(lambda: their_loop(pipe, call, clock)),
                outside(lambda: our_loop(model, particles, clock)),
            )
            times += [pair] if turn else []
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        found = shares(model, particles, clock)
    found |= summary(times)
    found["rows"] = particles * (1 if model.plate is None else model.plate[1])
    found["parameters"] = sum(p.numel() for p in model.denoiser.network.parameters())
    on_gpu = device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else high_water()
    found["peak_mib"] = round(peak, 1)
    found["device"] = torch.cuda.get_device_name() if on_gpu else "cpu"
    print(json.dumps(found))


def load(name: str) -> Any:
    from diffusers import DiffusionPipeline, logging

    logging.set_verbosity_error()
    if name in CASES:
        return CASES[name]()
    return pipes.quiet(DiffusionPipeline.from_pretrained(name))


def summary(times: list[Any]) -> dict[str, float]:
    """Medians over rounds; the ratio is that of each round."""
    theirs, ours = zip(*times, strict=True)
    ratios = [b[0] / a[0] for a, b in times]
    figures = {
        "pipeline_ms": 1e3 * statistics.median(loop for loop, _ in theirs),
        "ms": 1e3 * statistics.median(loop for loop, _ in ours),
        "pipeline_outside_ms": 1e3 * statistics.median(outside for _, outside in theirs),
        "outside_ms": 1e3 * statistics.median(outside for _, outside in ours),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def case(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A case in a process of its own."""
    module = "tests.perf.bench_pipeline"
    code = f"import sys, json; from {module} import run_case; run_case(*json.loads(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([name, settings])], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {"case": name, **json.loads(done.stdout.splitlines()[-1])}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench_pipeline.json"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--cases", help="names, separated by commas: " + ", ".join(CASES))
    parser.add_argument("--pipeline", help="a folder with a pipeline, instead of the cases")
    parser.add_argument("--prompt", action="append", help="once for each prompt")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk-size", type=int)
    parser.add_argument("--decode-chunk-size", type=int)
    return parser.parse_args()


def main() -> None:
    """Runs the cases, prints them as a table, and writes JSON."""
    given = options()
    torch.set_num_threads(given.threads)
    names = [given.pipeline] if given.pipeline else (given.cases or ",".join(ON_CPU)).split(",")
    settings = {
        "device": given.device,
        "dtype": given.dtype or ("float32" if given.device == "cpu" else "bfloat16"),
        "prompts": given.prompt,
        **{
            name: getattr(given, name)
            for name in (
                "particles", "steps", "rounds", "threads", "chunk_size", "decode_chunk_size"
            )
        },
    }  # fmt: skip
    print(
        f"{'':12} {'rows':>5} {'pipeline':>10} {'ours':>10} {'ratio':>24} {'outside':>12} "
        f"{'calls':>6} {'VAE':>6} {'reward':>6} {'peak':>10}"
    )
    rows = []
    for name in names:
        row = case(name, settings)
        rows.append(row)
        spread = f"({row['ratio_min']:.3f} to {row['ratio_max']:.3f})"
        print(
            f"{name:12} {row['rows']:5} {row['pipeline_ms']:7.1f} ms {row['ms']:7.1f} ms "
            f"{row['ratio']:.3f} {spread} "
            f"{row['pipeline_outside_ms']:5.1f} {row['outside_ms']:5.1f} "
            f"{row['network_calls']:6} {row['vae_share']:6.1%} {row['reward_share']:6.1%} "
            f"{row['peak_mib']:6.0f} MiB  {row['device']}",
            flush=True,
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), "settings": settings, "cases": rows}
    given.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
