# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Training of small diffusers networks: resumable, with an exponential moving average of the weights
and a learning rate that warms up, stays, and is annealed to zero over the last steps.

The anneal is counted from the end, so a run may be stopped at any checkpoint and finished with a
smaller ``--steps``: the same command, resumed, anneals from where it stands.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

Batch = Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def add_training_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """
    Adds the options every training script shares.

    :param argparse.ArgumentParser parser: The script's parser.
    :param defaults: Values replacing the defaults below, by option name.
    """
    options: dict[str, Any] = dict(
        steps=20000, batch_size=32, lr=3e-4, warmup=500, anneal=2000, seed=0, threads=0
    )
    for name, value in {**options, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and log")


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """The learning rate at ``step``: warm-up, plateau, linear anneal to 0 at ``options.steps``."""
    rise = (step + 1) / options.warmup
    fall = (options.steps - step) / options.anneal
    return options.lr * min(1.0, rise, fall)


class Training:
    """
    A resumable training of a class-conditional denoiser.

    :param UNet2DModel model: The network, trained in place; index ``num_class_embeds - 1`` is the
        null class.
    :param DDPMScheduler scheduler: Defines the forward noising and the prediction type.
    :param batch: Draws ``(images, labels)``, images of shape ``(batch, channels, height, width)``
        in ``[-1, 1]``.
    :param options: The parsed options of :func:`add_training_arguments`.
    """

    def __init__(
        self,
        model: UNet2DModel,
        scheduler: DDPMScheduler,
        batch: Batch,
        options: argparse.Namespace,
    ) -> None:
        self.model, self.scheduler, self.batch, self.options = model, scheduler, batch, options
        self.ema = EMAModel(model.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.step, self.seconds = 0, 0.0
        self.checkpoint = options.work / "state.pt"
        self.log_path = options.work / "log.jsonl"
        options.work.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._load()

    def _load(self) -> None:
        saved = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.ema.load_state_dict(saved["ema"])
        self.generator.set_state(saved["generator"])
        self.step, self.seconds = saved["step"], saved["seconds"]

    def save(self) -> None:
        """Writes the whole training state, atomically."""
        saved = dict(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=self.ema.state_dict(),
            generator=self.generator.get_state(),
            step=self.step,
            seconds=self.seconds,
        )
        partial = self.checkpoint.with_suffix(".tmp")
        torch.save(saved, partial)
        partial.replace(self.checkpoint)

    def loss(self) -> torch.Tensor:
        """One draw of the denoising loss, with the class dropped one time in ten."""
        images, labels = self.batch(self.generator)
        size = images.shape[0]
        drop = torch.rand(size, generator=self.generator) < 0.1
        null = self.model.config.num_class_embeds - 1
        labels = torch.where(drop, torch.full_like(labels, null), labels)
        noise = torch.randn(images.shape, generator=self.generator)
        steps = self.scheduler.config.num_train_timesteps
        t = torch.randint(0, steps, (size,), generator=self.generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            noisy = self.scheduler.add_noise(images, noise, t)
            prediction = self.model(noisy, t, class_labels=labels).sample
        target = self.scheduler.get_velocity(images, noise, t)
        return (prediction.float() - target).square().mean()

    def advance(self) -> float:
        """One optimiser step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.options)
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.model.parameters())
        self.step += 1
        return float(loss.detach())

    def run(self, every: int = 250) -> None:
        """Trains up to ``options.steps``, logging and saving every ``every`` steps."""
        losses, start = [], time.time()
        while self.step < self.options.steps:
            losses.append(self.advance())
            if self.step % every == 0 or self.step == self.options.steps:
                self.seconds += time.time() - start
                start = time.time()
                self._log(sum(losses) / len(losses))
                losses = []
                self.save()

    def _log(self, loss: float) -> None:
        record = dict(
            step=self.step,
            loss=round(loss, 5),
            lr=learning_rate(self.step, self.options),
            seconds=round(self.seconds),
        )
        with self.log_path.open("a") as log:
            log.write(json.dumps(record) + "\n")
        print(record, flush=True)

    def export(self, folder: Path) -> None:
        """Writes the averaged weights in half precision and the scheduler, in diffusers' format."""
        self.ema.copy_to(self.model.parameters())
        self.model.half().save_pretrained(folder / "unet", safe_serialization=True)
        self.scheduler.save_pretrained(folder / "scheduler")
        (folder / "training_log.jsonl").write_text(self.log_path.read_text())
