# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Trains the class-conditional emoji DDPM of the zoo::

    npm pack emoji-datasource-google@16.0.0
    python -m pyro_twist.zoo.recipes.emoji --data emoji-datasource-google-16.0.0.tgz --work work
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

from pyro_twist.zoo.recipes.emoji_data import GROUPS, augment, load_archive
from pyro_twist.zoo.recipes.training import Training, add_training_arguments


def make_model(size: int) -> UNet2DModel:
    """The untrained network: 5.2 M parameters, nine classes of which the last is "no class"."""
    return UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
        num_class_embeds=len(GROUPS) + 1,
    )


def make_scheduler() -> DDPMScheduler:
    """Cosine noise schedule with v-prediction."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
    )


def main() -> None:
    """Trains, and exports what the zoo ships once the last step is reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the npm archive")
    parser.add_argument("--size", type=int, default=16, help="pixels a side")
    parser.add_argument("--export", type=Path, help="folder for the finished model")
    add_training_arguments(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    archive = load_archive(options.data)
    data = archive.subset(~archive.held_out)
    weights = data.weights()

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.multinomial(weights, options.batch_size, True, generator=generator)
        labels = data.labels[index]
        return augment(data.images[index], labels, options.size, generator), labels

    training = Training(make_model(options.size), make_scheduler(), batch, options)
    training.run()
    if options.export:
        training.export(options.export)


if __name__ == "__main__":
    main()
