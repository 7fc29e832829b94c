# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Tiny pipelines of diffusers, built from configs with random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "PIPES",
    "ddpm",
    "dit",
    "flux",
    "pixart_sigma",
    "quiet",
    "stable_diffusion",
    "stable_diffusion_3",
    "stable_diffusion_xl",
]

WORDS = ["a", "blue", "cat", "red", "fox", "on", "mat", "bad", "photo"]
WIDTH = 8


def quiet(pipe: Any) -> Any:
    """Ready to run: no dropout, no progress bar, no gradients of weights."""
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe


def clip_tokenizer(length: int = 16) -> Any:
    from transformers import CLIPTokenizer

    words = [f"{word}</w>" for word in WORDS]
    letters = sorted({letter for word in WORDS for letter in word})
    symbols = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *dict.fromkeys([*symbols, *words])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def clip_text(projected: bool = False, width: int = WIDTH) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("$A [EOS]", special_tokens=[("[EOS]", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        model_max_length=16,
    )


def t5(width: int = 2 * WIDTH) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=16, d_model=width, d_ff=width, d_kv=WIDTH, num_layers=1, num_heads=2)
    )


def vae(channels: int = 4, **config: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        **{"scaling_factor": 0.5, **config},
    )


def unet(channels: int = 4, **config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": channels,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": WIDTH,
            **config,
        }
    )


def latent_scheduler(**config: Any) -> Any:
    """Stable Diffusion's own, made stochastic."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "steps_offset": 1,
            "set_alpha_to_one": False,
            "clip_sample": False,
            **config,
        }
    )


def stable_diffusion(kind: str = "StableDiffusionPipeline", **components: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    made = dict(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=latent_scheduler(),
    )
    return quiet(
        getattr(diffusers, kind)(
            **{**made, **components},
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def stable_diffusion_xl(kind: str = "StableDiffusionXLPipeline", **components: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    made = dict(
        vae=vae(),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + WIDTH,
        ),
        scheduler=latent_scheduler(),
    )
    return quiet(getattr(diffusers, kind)(**{**made, **components}))


def stable_diffusion_3(kind: str = "StableDiffusion3Pipeline", **components: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    made = dict(
        vae=vae(shift_factor=0.1, latents_mean=None, latents_std=None),
        text_encoder=clip_text(projected=True),
        text_encoder_2=clip_text(projected=True),
        text_encoder_3=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=word_tokenizer(),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=8,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return quiet(getattr(diffusers, kind)(**{**made, **components}))


def flux(kind: str = "FluxPipeline", guidance_embeds: bool = True, **components: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    made = dict(
        vae=vae(shift_factor=0.1),
        text_encoder=clip_text(),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=word_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=guidance_embeds,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    pipe = quiet(getattr(diffusers, kind)(**{**made, **components}))
    pipe.default_sample_size = 8
    return pipe


def pixart_sigma(**components: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    made = dict(
        vae=vae(),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=4,
            num_attention_heads=2,
            caption_channels=2 * WIDTH,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=8,
            norm_type="ada_norm_single",
            use_additional_conditions=False,
        ),
        scheduler=latent_scheduler(),
    )
    return quiet(diffusers.PixArtSigmaPipeline(**{**made, **components}))


def dit(**components: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    made = dict(
        vae=vae(),
        transformer=diffusers.DiTTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=4,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ),
        scheduler=diffusers.DDPMScheduler(clip_sample=False),
        id2label={0: "tench, Tinca", 1: "goldfish"},
    )
    return quiet(diffusers.DiTPipeline(**{**made, **components}))


def ddpm(kind: str = "DDPMPipeline", **components: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    made = dict(unet=network, scheduler=diffusers.DDPMScheduler())
    return quiet(getattr(diffusers, kind)(**{**made, **components}))


PIPES: dict[str, Callable[..., Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "pixart": pixart_sigma,
    "dit": dit,
    "ddpm": ddpm,
}
