# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Training of masked diffusion models: resumable, and to be ended at any time by a file.

The loss is the negative evidence lower bound (NELBO) of masked diffusion in continuous time with
the linear schedule and the "subs" parameterisation [1], in nats per sequence. It depends on the
time through the number of masked positions only, so that number is drawn uniformly instead of the
time, which leaves the mean as it is and lowers the variance.

The learning rate warms up, stays, and falls to 0 over the last ``decay_steps`` steps. These begin
when the given steps or minutes ask for it, or as soon as a file ``finish`` lies in the folder.

**References**

[1] `Simple and Effective Masked Diffusion Language Models`
    Subham Sekhar Sahoo, Marianne Arriola, Yair Schiff, Aaron Gokaslan, Edgar Marroquin,
    Justin T Chiu, Alexander Rush, Volodymyr Kuleshov (2024), equation 10,
    https://arxiv.org/abs/2406.07524
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Batches", "MaskedTraining", "masked_logits", "nelbo", "shuffled_batches", "train"]

Batches = Callable[[int], Iterator[Tensor]]


def shuffled_batches(ids: Tensor, batch_size: int, seed: int = 0) -> Batches:
    """
    Batches of a data set that is shuffled anew for every pass.

    :param torch.Tensor ids: The sequences, of any integer type, of shape ``(number, length)``.
    :param int batch_size: The number of sequences in a batch.
    :param int seed: Seeds the order.
    :returns: A function of the step to begin with, which returns an endless iterator of int64
        batches of shape ``(batch_size, length)``.
    """
    per_pass = len(ids) // batch_size

    def batches(step: int) -> Iterator[Tensor]:
        while True:
            generator = torch.Generator().manual_seed(1000 * seed + step // per_pass)
            order = torch.randperm(len(ids), generator=generator)
            for place in range(step % per_pass, per_pass):
                yield ids[order[place * batch_size : (place + 1) * batch_size]].long()
                step += 1

    return batches


def masked_logits(model: Any, inputs: Tensor, masked: Tensor) -> Tensor:
    """
    The logits at the masked positions; the head is not applied to the others.

    :param model: A transformers model for masked language modelling.
    :param torch.Tensor inputs: Of shape ``(batch, length)``, with the mask token in place.
    :param torch.Tensor masked: Which positions to return, of the same shape.
    :returns: Of shape ``(number masked, vocabulary)``, in float32.
    """
    hidden = model.base_model(input_ids=inputs)[0][masked]
    for head in ("cls", "lm_head"):
        if hasattr(model, head):
            return getattr(model, head)(hidden).float()
    if hasattr(model, "head") and hasattr(model, "decoder"):
        return model.decoder(model.head(hidden)).float()
    raise ValueError(f"{type(model).__name__} has none of the heads known here; add its name")


def nelbo(model: Any, ids: Tensor, mask_token_id: int, generator: torch.Generator) -> Tensor:
    """
    An unbiased estimate of the NELBO of each sequence, in nats.

    The numbers of masked positions are uniform on ``1 ... length``, and stratified over the batch.

    :param model: A transformers model for masked language modelling.
    :param torch.Tensor ids: The sequences, int64, of shape ``(batch, length)``.
    :param int mask_token_id: The mask token, to which no probability is given.
    :param torch.Generator generator: Draws the masks.
    :returns: Of shape ``(batch,)``.
    """
    batch, length = ids.shape
    strata = torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
    number = (strata * (length / batch)).long().clamp(max=length - 1) + 1
    ranks = torch.rand(batch, length, generator=generator).argsort(1)
    masked = ranks < number[:, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = masked_logits(model, ids.masked_fill(masked, mask_token_id), masked)
    forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool)
    forbidden[mask_token_id] = True
    logits = logits.masked_fill(forbidden, -math.inf)
    losses = functional.cross_entropy(logits, ids[masked], reduction="none")
    rows = masked.nonzero()[:, 0]
    weight = length / number.to(losses.dtype)
    return torch.zeros(batch).index_add(0, rows, losses * weight[rows])


class MaskedTraining:
    """
    A resumable training; see :func:`train` for the parameters.

    The folder gets ``state.pt``, the whole state; ``plateau.pt``, the same where the learning rate
    began to fall, from which a finished training goes on; ``ema``, the averaged model in half
    precision; and ``training_log.jsonl``.
    """

    def __init__(self, model: Any, folder: Path, mask_token_id: int, **options: Any) -> None:
        self.model, self.folder, self.mask_token_id = model, Path(folder), mask_token_id
        self.options = options
        self.average = [parameter.detach().clone() for parameter in model.parameters()]
        self.optimizer = self._make_optimizer()
        self.step, self.seconds, self.decay_start = 0, 0.0, -1
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "state.pt").exists():
            self._load(self.folder / "state.pt")
            if self.finished and not self._asked_to_finish(0.0):
                self._load(self.folder / "plateau.pt")
                self.decay_start = -1

    def _make_optimizer(self) -> torch.optim.Optimizer:
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.options["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)

    @property
    def finished(self) -> bool:
        """Whether the learning rate has reached 0."""
        return 0 <= self.decay_start <= self.step - self.options["decay_steps"]

    def learning_rate(self) -> float:
        """The learning rate of the coming step."""
        rate: float = self.options["learning_rate"] * min(
            1.0, (self.step + 1) / self.options["warmup"]
        )
        if self.decay_start >= 0:
            rate *= 1.0 - (self.step - self.decay_start) / self.options["decay_steps"]
        return rate

    def _asked_to_finish(self, seconds_per_step: float) -> bool:
        decay, steps = self.options["decay_steps"], self.options["max_steps"]
        minutes = self.options["max_minutes"]
        return (
            (self.folder / "finish").exists()
            or (steps is not None and self.step >= steps - decay)
            or (minutes is not None and self.seconds + decay * seconds_per_step >= 60 * minutes)
        )

    def _load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average = saved["average"]
        torch.set_rng_state(saved["rng"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.decay_start = saved["decay_start"]

    def save(self, name: str = "state.pt") -> None:
        """Writes the whole state, atomically."""
        saved = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "decay_start": self.decay_start,
        }
        torch.save(saved, self.folder / "partial.pt")
        os.replace(self.folder / "partial.pt", self.folder / name)

    def averaged(self) -> Any:
        """A copy of the model with the averaged weights, in evaluation mode."""
        model = copy.deepcopy(self.model).eval()
        for parameter, value in zip(model.parameters(), self.average, strict=True):
            parameter.data.copy_(value)
        return model

    def export(self) -> None:
        """Writes the averaged model in half precision into ``ema``, file by file atomically."""
        partial, final = self.folder / "ema.partial", self.folder / "ema"
        self.averaged().half().save_pretrained(partial)
        final.mkdir(exist_ok=True)
        for path in partial.iterdir():
            os.replace(path, final / path.name)
        partial.rmdir()

    def advance(self, ids: Tensor) -> float:
        """One optimiser step on a batch; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        generator = torch.Generator().manual_seed(self.step)
        loss = nelbo(self.model, ids, self.mask_token_id, generator).mean()
        self.optimizer.zero_grad()
        # per position, so that clipping means the same for every length
        (loss / ids.shape[1]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.options["ema"], (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            self.average, [p.detach() for p in self.model.parameters()], 1.0 - decay
        )
        return loss.item()

    @torch.no_grad()
    def validate(self, validation: Tensor) -> float:
        """The NELBO of the averaged model on fixed sequences with fixed masks, in nats."""
        generator = torch.Generator().manual_seed(0)
        model = self.averaged()
        chunks = validation.split(256)
        losses = [nelbo(model, ids, self.mask_token_id, generator) for ids in chunks]
        return float(torch.cat(losses).mean())

    def run(self, batches: Batches, validation: Tensor) -> None:
        """Trains until the learning rate has reached 0."""
        self.model.train()
        losses: list[float] = []
        begun, saved = time.time() - self.seconds, time.time()
        first_step, first_time = self.step, time.time()
        stream = batches(self.step)
        while not self.finished:
            losses.append(self.advance(next(stream)))
            self.seconds = time.time() - begun
            per_step = (time.time() - first_time) / (self.step - first_step)
            if self.decay_start < 0 and self._asked_to_finish(per_step):
                self.decay_start = self.step
                self.save("plateau.pt")
            if self.step % self.options["log_every"] == 0 or self.finished:
                due = self.finished or self.step % (10 * self.options["log_every"]) == 0
                self._log(losses, self.validate(validation) if due else None)
                losses = []
            if time.time() - saved > 60 * self.options["checkpoint_minutes"] or self.finished:
                self.save()
                self.export()
                saved = time.time()

    def _log(self, losses: list[float], validation: float | None) -> None:
        record = {"step": self.step, "loss": round(sum(losses) / len(losses), 3)}
        if validation is not None:
            record["validation"] = round(validation, 3)
        record["learning_rate"] = round(self.learning_rate(), 7)
        record["seconds"] = round(self.seconds)
        with (self.folder / "training_log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        print(record, flush=True)


def train(
    model: Any,
    batches: Batches,
    folder: Path,
    *,
    mask_token_id: int,
    validation: Tensor,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: int = 300,
    ema: float = 0.999,
    decay_steps: int = 1500,
    max_steps: int | None = None,
    max_minutes: float | None = None,
    log_every: int = 50,
    checkpoint_minutes: float = 3.0,
) -> Any:
    """
    Trains a masked diffusion model, or goes on with a training that was interrupted.

    A training that has finished goes on from where its learning rate began to fall, if the file
    ``finish`` is gone and more steps or minutes are given.

    :param model: A transformers model for masked language modelling, trained in place.
    :param callable batches: A function of the step to begin with that returns an endless iterator
        of int64 sequences of shape ``(batch, length)``; see :func:`shuffled_batches`.
    :param ~pathlib.Path folder: Where the state, the log and the averaged model are written.
    :param int mask_token_id: The mask token.
    :param torch.Tensor validation: Sequences for the validation loss, of shape ``(number,
        length)``.
    :param float learning_rate: The rate between warm-up and decay.
    :param float weight_decay: AdamW's weight decay, of matrices only.
    :param int warmup: The number of steps over which the rate rises.
    :param float ema: The decay of the average of the weights, per step.
    :param int decay_steps: The number of steps over which the rate falls to 0.
    :param int max_steps: The number of steps in all; by default no limit.
    :param float max_minutes: The minutes in all, earlier runs counted; by default no limit.
    :param int log_every: Steps between two lines of the log; every tenth has the validation loss.
    :param float checkpoint_minutes: Minutes between two checkpoints.
    :returns: The averaged model, in float32 and evaluation mode.
    """
    training = MaskedTraining(
        model,
        folder,
        mask_token_id,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        ema=ema,
        decay_steps=decay_steps,
        max_steps=max_steps,
        max_minutes=max_minutes,
        log_every=log_every,
        checkpoint_minutes=checkpoint_minutes,
    )
    training.run(batches, validation)
    return training.averaged()
