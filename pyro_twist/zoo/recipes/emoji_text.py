# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Trains a text-to-image model of emoji by their names; writes a ``StableDiffusionPipeline``::

    npm pack emoji-datasource-google@16.0.0
    python -m pyro_twist.zoo.recipes.emoji_text --data emoji-datasource-google-16.0.0.tgz \\
        --work work --export emoji-text

Neither pictures nor names of the held-out emoji are seen.

The network starts from that of the class-conditional model of the zoo, whose residual blocks it
shares; a small text encoder is trained with it. The autoencoder keeps the size of a picture, and is
trained to have the picture itself as its latents.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pyro_twist.zoo.data import plain_prompt
from pyro_twist.zoo.recipes.emoji import make_scheduler
from pyro_twist.zoo.recipes.emoji_data import EmojiData, augment, load_archive
from pyro_twist.zoo.recipes.training import Training, add_training_arguments

WIDTH, LENGTH, VOCABULARY = 128, 12, 1600
SIZE = 16


def make_tokenizer(prompts: list[str], folder: Path) -> CLIPTokenizer:
    """A byte-pair tokenizer of the prompts, of the kind that CLIP has."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = [chr(code) for code in range(33, 127)]
    learned.train_from_iterator(
        prompts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
        ),
    )
    learned.model.save(str(folder))
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder: 0.7 M parameters."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_unet(start: UNet2DModel | None = None) -> UNet2DConditionModel:
    """
    The network, its residual blocks from a class-conditional one where there is one.

    :param UNet2DModel start: The network to start from; attention begins as no change at all.
    """
    unet = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
    )
    if start is not None:
        own, others = unet.state_dict(), start.state_dict()
        shared = {k: v for k, v in others.items() if k in own and own[k].shape == v.shape}
        unet.load_state_dict({**own, **shared})
        for name, parameter in unet.named_parameters():
            if "attentions" in name and ".proj_out." in name:
                torch.nn.init.zeros_(parameter)
    return unet


def make_vae() -> AutoencoderKL:
    """The untrained autoencoder, which keeps the size: 0.1 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(24,),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def train_vae(pictures: torch.Tensor, steps: int = 4000) -> AutoencoderKL:
    """
    Trains the autoencoder to have pictures as their own latents, and to read noisy ones.

    :param torch.Tensor pictures: In ``[-1, 1]``, of shape ``(number, 3, 16, 16)``.
    """
    vae = make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(pictures), (32,), generator=generator)
        clean = pictures[index]
        mean = vae.encode(clean).latent_dist.mean
        noise = 0.05 * torch.randn(clean.shape, generator=generator)
        read = vae.decode(clean + noise).sample
        loss = (mean - clean).square().mean() + (read - clean - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    return vae


class Painter(torch.nn.Module):
    """Network and text encoder, trained together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The network's output, for tokens of shape ``(batch, length)``."""
        told = self.text_encoder(tokens).last_hidden_state
        output: torch.Tensor = self.unet(x, t, encoder_hidden_states=told).sample
        return output


class TextTraining(Training):
    """
    A resumable training of a text-conditional denoiser; batches are of images and tokens.

    :param torch.Tensor nothing: The tokens of the empty prompt, which replace one in ten.
    """

    nothing: torch.Tensor

    def loss(self) -> torch.Tensor:
        """One draw of the denoising loss, with the prompt dropped one time in ten."""
        images, tokens = self.batch(self.generator)
        size = images.shape[0]
        drop = torch.rand(size, generator=self.generator) < 0.1
        tokens = torch.where(drop[:, None], self.nothing, tokens)
        noise = torch.randn(images.shape, generator=self.generator)
        t = torch.randint(0, 1000, (size,), generator=self.generator)
        noisy = self.scheduler.add_noise(images, noise, t)
        target = self.scheduler.get_velocity(images, noise, t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = self.model(noisy, t, tokens)
        return (prediction.float() - target).square().mean()


def batches(data: EmojiData, tokens: torch.Tensor, size: int) -> Any:
    """Draws images and the tokens of their names."""
    weights = data.weights()

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.multinomial(weights, size, True, generator=generator)
        images = augment(data.images[index], data.labels[index], SIZE, generator)
        return images, tokens[index]

    return batch


def export(training: TextTraining, tokenizer: CLIPTokenizer, vae: AutoencoderKL, out: Path) -> None:
    """Writes the averaged weights in half precision as a pipeline."""
    training.ema.copy_to(training.model.parameters())
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=training.model.text_encoder,
        tokenizer=tokenizer,
        unet=training.model.unet,
        scheduler=training.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    (out / "training_log.jsonl").write_text(training.log_path.read_text())
    for name in ("vocab.json", "merges.txt"):  # older releases of transformers read these
        shutil.copy(training.options.work / "tokenizer" / name, out / "tokenizer" / name)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)


def main() -> None:
    """Trains, and exports the pipeline once the last step is reached."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the npm archive")
    parser.add_argument("--start", type=Path, help="a network to start from; the zoo's by default")
    parser.add_argument("--export", type=Path, help="folder for the finished pipeline")
    add_training_arguments(parser, lr=4e-4)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    everything = load_archive(options.data)
    data = everything.subset(~everything.held_out)
    prompts = [plain_prompt(name) for name in data.names]
    tokenizer = make_tokenizer(sorted(set(prompts)), options.work / "tokenizer")
    padded: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    tokens = tokenizer(prompts, **padded).input_ids
    folder = options.start or Path(__file__).parents[1] / "emoji" / "unet"
    unet = make_unet(UNet2DModel.from_pretrained(folder, torch_dtype=torch.float32))
    painter = Painter(unet, make_text_encoder(tokenizer))
    draw = batches(data, tokens, options.batch_size)
    training = TextTraining(painter, make_scheduler(), draw, options)
    training.nothing = tokenizer([""], **padded).input_ids
    training.run()
    if options.export:
        from pyro_twist.zoo.recipes.emoji_data import shrink

        vae = train_vae(shrink(data.images, SIZE))
        export(training, tokenizer, vae, options.export)


if __name__ == "__main__":
    main()
