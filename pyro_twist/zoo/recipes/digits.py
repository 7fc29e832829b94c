# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Trains the class-conditional DDPM of 8x8 digits of the zoo (about ten minutes of one core)::

    python -m pyro_twist.zoo.recipes.digits --work work --threads 1 --export digits
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

from pyro_twist.zoo.recipes.training import Training, add_training_arguments


def load_digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The digits of scikit-learn.

    :returns: Images in ``[0, 1]`` of shape ``(1797, 1, 8, 8)``, labels, and whether an image is
        held out (one in five).
    """
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.from_numpy(digits.images).float()[:, None] / 16.0
    draw = torch.rand(len(images), generator=torch.Generator().manual_seed(0))
    return images, torch.from_numpy(digits.target).long(), draw < 0.2


def make_model() -> UNet2DModel:
    """The untrained network: 0.17 M parameters, eleven classes of which the last is "no class"."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=11,
    )


def make_scheduler() -> DDPMScheduler:
    """Cosine noise schedule with v-prediction."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
    )


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Small rotations, scalings and shifts, and uniform noise that undoes the rounding of the data.

    :param torch.Tensor images: In ``[0, 1]``, of shape ``(batch, 1, 8, 8)``.
    :returns: Images in ``[-1, 1]``, of the same shape.
    """
    number = images.shape[0]
    angle, scale, dx, dy = torch.rand(4, number, generator=generator) * 2.0 - 1.0
    angle, scale = angle * math.radians(6.0), torch.exp(0.05 * scale)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cosine, -sine, 0.08 * dx, sine, cosine, 0.08 * dy], -1)
    functional = torch.nn.functional
    grid = functional.affine_grid(rows.reshape(-1, 2, 3), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    noise = torch.rand(images.shape, generator=generator) - 0.5
    return ((moved + noise / 16.0) * 2.0 - 1.0).clamp(-1.0, 1.0)


def main() -> None:
    """Trains, and exports what the zoo ships once the last step is reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export", type=Path, help="folder for the finished model")
    add_training_arguments(parser, steps=16000, batch_size=64, lr=2e-3, anneal=8000)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    images, labels, held_out = load_digits()
    images, labels = images[~held_out], labels[~held_out]

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.randint(0, len(labels), (options.batch_size,), generator=generator)
        return augment(images[index], generator), labels[index]

    training = Training(make_model(), make_scheduler(), batch, options)
    training.run()
    if options.export:
        training.export(options.export)


if __name__ == "__main__":
    main()
