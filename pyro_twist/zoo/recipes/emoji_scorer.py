# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Trains the scorer and the judge of the text-to-image model of emoji::

    npm pack emoji-datasource-google@16.0.0
    python -m pyro_twist.zoo.recipes.emoji_scorer --data emoji-datasource-google-16.0.0.tgz \\
        --tokenizer work/tokenizer --out emoji-text

The scorer, a small CLIP, is what rewards are made of; neither pictures nor names of the held-out
emoji are seen in its training. The judge measures what a reward has led to; it is built differently
and is trained on all emoji, the held-out ones as well, so that it can judge their names.

Both see pictures blurred, noisy, faded and mixed with others, as a sampler's look-aheads are. How
often each finds the name of a picture among all names is written to its ``accuracy.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from pyro_twist.zoo.data import plain_prompt
from pyro_twist.zoo.judges import PromptJudge, load_judge
from pyro_twist.zoo.recipes import classifiers
from pyro_twist.zoo.recipes.emoji_data import GROUPS, EmojiData, augment, load_archive
from pyro_twist.zoo.recipes.emoji_text import LENGTH, SIZE
from pyro_twist.zoo.scorers import MEAN, STD, load_scorer

WIDTH, EMBEDDING = 128, 128
SEEDS = {"scorer": 0, "judge": 1}
STEPS = {"scorer": 2000, "judge": 1800}

# The scaled cosines of images, in [0, 1], and prompts, of shape (images, prompts).
Compare = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Task:
    """
    Pictures and their prompts.

    :param EmojiData data: The pictures.
    :param tuple names: All different prompts, in alphabetical order.
    :param torch.Tensor which: For each picture the place of its prompt in ``names``.
    """

    data: EmojiData
    names: tuple[str, ...]
    which: Tensor

    @classmethod
    def of(cls, data: EmojiData) -> Task:
        """The task that pictures and their names make."""
        prompts = [plain_prompt(name) for name in data.names]
        names = tuple(sorted(set(prompts)))
        places = {name: place for place, name in enumerate(names)}
        return cls(data, names, torch.tensor([places[prompt] for prompt in prompts]))

    def weights(self) -> Tensor:
        """Sampling weights: all prompts as often."""
        return 1.0 / torch.bincount(self.which)[self.which].double()

    def pictures(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures mirrored and shifted, in ``[0, 1]``, of shape ``(len(index), 3, 16, 16)``."""
        moved = augment(self.data.images[index], self.data.labels[index], SIZE, generator)
        return (moved + 1.0) / 2.0


def distorted(task: Task) -> classifiers.Task:
    """The pictures as the recipe of the classifiers turns, stretches and recolours them."""
    data, weights = task.data, task.weights()
    mirror = data.labels != GROUPS.index("Flags")
    everything = torch.ones(len(data.labels), dtype=torch.bool)
    sources = functional.avg_pool2d(data.images / 255.0, 2)
    return classifiers.Task(
        sources, data.labels, weights, everything, mirror, GROUPS, size=SIZE, ground=1.0
    )


def look_ahead(images: Tensor, generator: torch.Generator) -> Tensor:
    """
    Pictures as a sampler sees them on the way, from sharp ones to little more than a stain.

    :param torch.Tensor images: In ``[0, 1]``, of shape ``(batch, 3, side, side)``.
    """
    number = len(images)
    images = classifiers.recolour(images, 1.0, generator)
    blurred = blur(images, 2.5 * torch.rand(number, generator=generator) ** 2)
    some = torch.rand(number, generator=generator) < 0.5
    images = torch.where(some[:, None, None, None], blurred, images)
    share = 0.5 * torch.rand(number, generator=generator) ** 2
    share = share * (torch.rand(number, generator=generator) < 0.5)
    other = images[torch.randperm(number, generator=generator)]
    mean = images.mean(0, keepdim=True).expand_as(images)
    faded = torch.rand(number, 1, 1, 1, generator=generator) < 0.5
    images = torch.lerp(images, torch.where(faded, mean, other), share[:, None, None, None])
    level = 0.25 * torch.rand(number, 1, 1, 1, generator=generator) ** 3
    return (images + level * torch.randn(images.shape, generator=generator)).clamp(0.0, 1.0)


def blur(images: Tensor, width: Tensor) -> Tensor:
    """
    Gaussian blur, white around the picture.

    :param torch.Tensor images: Of shape ``(batch, 3, side, side)``.
    :param torch.Tensor width: The standard deviation for each in pixels, of shape ``(batch,)``.
    """
    place = torch.arange(images.shape[-1]).float()
    squared = (place[:, None] - place) ** 2 / (2.0 * width.clamp_min(0.05)[:, None, None] ** 2)
    # Weights that leave the picture fall on white.
    total = (2.0 * math.pi) ** 0.5 * width.clamp_min(0.05)[:, None, None]
    total = torch.maximum(total, (-squared).exp().sum(-1, keepdim=True))
    kernel = ((-squared).exp() / total)[:, None]
    return 1.0 - kernel @ (1.0 - images) @ kernel.mT


def make_scorer(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained scorer: 1.3 M parameters."""
    tower = dict(hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_attention_heads=4)
    text = dict(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.1,
        **tower,
    )
    vision = dict(image_size=SIZE, patch_size=4, num_hidden_layers=4, **tower)
    config = CLIPConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=EMBEDDING,
        logit_scale_init_value=math.log(15.0),
    )
    model = CLIPModel(config)
    # Of short sequences the plain one is the fastest to differentiate here, by far.
    model.set_attn_implementation("eager")
    return model


def compare_scorer(model: CLIPModel, tokenizer: CLIPTokenizer) -> Compare:
    """
    The scaled cosines of a scorer in training.

    :param CLIPModel model: The scorer.
    :param CLIPTokenizer tokenizer: Its tokenizer.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    padded: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}

    def compare(images: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(prompts), **padded).input_ids
        seen = model.vision_model(pixel_values=(images - mean) / std).pooler_output
        read = model.text_model(input_ids=tokens).pooler_output
        seen = functional.normalize(model.visual_projection(seen), dim=-1)
        read = functional.normalize(model.text_projection(read), dim=-1)
        similarity: Tensor = model.logit_scale.exp() * seen @ read.T
        return similarity

    return compare


def contrastive_loss(similarity: Tensor, right: Tensor) -> Tensor:
    """
    The mean of two cross-entropies: of the prompt of a picture, and of the pictures of a prompt.

    :param torch.Tensor similarity: Of shape ``(pictures, prompts)``, the prompts all different.
    :param torch.Tensor right: For each picture its column.
    """
    of_pictures = functional.cross_entropy(similarity, right)
    shown = functional.one_hot(right, similarity.shape[1]).float()
    shares = shown / shown.sum(0, keepdim=True)
    of_prompts = -(shares * similarity.log_softmax(0)).sum(0).mean()
    return 0.5 * (of_pictures + of_prompts)


def fit(
    model: nn.Module, compare: Compare, task: Task, options: argparse.Namespace, part: str
) -> None:
    """AdamW with a learning rate that warms up and falls as a cosine."""
    generator, steps = torch.Generator().manual_seed(SEEDS[part]), options.steps or STEPS[part]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.1)
    turned, start = distorted(task), time.time()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * _rate(step, steps)
        index = torch.multinomial(turned.weights, options.batch_size, True, generator=generator)
        loss = _loss(compare, task, index, _seen(task, turned, index, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(step, round(float(loss.detach()), 3), f"{time.time() - start:.0f} s", flush=True)
    model.eval()


def _rate(step: int, steps: int, warmup: int = 100) -> float:
    return min(1.0, (step + 1) / warmup) * (1.0 + math.cos(math.pi * step / steps)) / 2.0


def _seen(
    task: Task, turned: classifiers.Task, index: Tensor, generator: torch.Generator
) -> Tensor:
    """Pictures to train on, of which half are distorted."""
    plain, other = index.chunk(2)
    images = task.pictures(plain, generator)
    images = torch.cat([images, classifiers.distort(turned, other, 0.8, generator)])
    return look_ahead(images, generator)


def _loss(compare: Compare, task: Task, index: Tensor, images: Tensor) -> Tensor:
    prompts, right = task.which[index].unique(return_inverse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity = compare(images, [task.names[place] for place in prompts.tolist()])
    return contrastive_loss(similarity.float(), right)


@torch.no_grad()
def places(compare: Compare, task: Task, keep: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """
    The place of the right prompt among all prompts of a task, 1 for the first.

    :param torch.Tensor keep: The indices of the pictures to look at.
    :param callable draw: Makes pictures of shape ``(batch, 3, 16, 16)`` of indices.
    :returns: Of the shape of ``keep``.
    """
    found = [
        place_of(compare(draw(index), task.names), task.which[index]) for index in keep.split(256)
    ]
    return torch.cat(found)


def place_of(similarity: Tensor, right: Tensor) -> Tensor:
    """
    The place of the right prompt by similarity, 1 for the first.

    :param torch.Tensor similarity: Of shape ``(pictures, prompts)``.
    :param torch.Tensor right: For each picture the column of the right prompt.
    """
    return 1 + (similarity > similarity.gather(1, right[:, None])).sum(1)


def retrieval(place: Tensor) -> dict[str, float]:
    """Shares of pictures whose prompt is the first, and among the first five; the median place."""
    return {
        "pictures": len(place),
        "top1": round(float((place <= 1).double().mean()), 4),
        "top5": round(float((place <= 5).double().mean()), 4),
        "median_rank": float(place.double().quantile(0.5)),
    }


def accuracy(compare: Compare, task: Task, seed: int = 10) -> dict[str, Any]:
    """
    How often the prompt of a picture is found among all, on pictures drawn freshly.

    :param Task task: All pictures, the held-out ones as well; one of each prompt is looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack([(task.which == place).nonzero()[0, 0] for place in range(len(task.names))])
    out = task.data.held_out[first]
    number = len(task.names)
    report: dict[str, Any] = {
        "names": number,
        "chance": {"top1": round(1 / number, 5), "top5": round(5 / number, 5)},
    }

    def sharp(index: Tensor) -> Tensor:
        return task.pictures(index, generator)

    def ahead(index: Tensor) -> Tensor:
        return look_ahead(sharp(index), generator)

    for kind, draw in (("pictures", sharp), ("look_aheads", ahead)):
        for part, keep in (("training", first[~out]), ("held_out", first[out])):
            found = places(compare, task, keep[torch.randperm(len(keep))], draw)
            report[f"{part}_{kind}"] = retrieval(found)
    return report


@torch.no_grad()
def calibrate(judge: PromptJudge, task: Task, seed: int = 20) -> None:
    """Sets the judge's scale by the likelihood of pictures drawn freshly, half of them sharp."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(task.weights(), 2048, True, generator=generator)
    images = task.pictures(index, generator)
    images[1024:] = look_ahead(images[1024:], generator)
    similarity = torch.cat([judge.logits(part, task.names) for part in images.split(256)])
    factors = torch.logspace(-0.5, 0.5, 41)
    losses = [functional.cross_entropy(similarity * f, task.which[index]) for f in factors]
    best = factors[int(torch.stack(losses).argmin())]
    print(f"the scale {float(judge.log_scale.exp()):.1f} is multiplied by {float(best):.2f}")
    judge.log_scale.add_(best.log())


def train_scorer(task: Task, tokenizer: Path, folder: Path, options: argparse.Namespace) -> None:
    """
    Trains the scorer and saves it with its processor.

    :param Task task: The pictures that are not held out.
    :param ~pathlib.Path tokenizer: The folder with the pipeline's vocabulary.
    """
    from transformers import CLIPImageProcessor

    files = [str(tokenizer / name) for name in ("vocab.json", "merges.txt")]
    reader = CLIPTokenizer(*files, model_max_length=LENGTH)
    model = make_scorer(reader)
    fit(model, compare_scorer(model, reader), task, options, "scorer")
    shown = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=MEAN,
        image_std=STD,
    )
    model.half().save_pretrained(folder, safe_serialization=True)
    CLIPProcessor(shown, reader).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer / name, folder / name)
    names = json.dumps(task.names, indent=0, ensure_ascii=False)
    (folder / "names.json").write_text(names + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)


def train_judge(task: Task, folder: Path, options: argparse.Namespace) -> None:
    """
    Trains, calibrates and saves the judge.

    :param Task task: All pictures.
    """
    judge = PromptJudge(task.names)
    fit(judge, judge.logits, task, options, "judge")
    calibrate(judge, task)
    judge.save(folder)


def load_compare(part: str, folder: Path) -> Compare:
    """The scaled cosines of the saved scorer or judge."""
    if part == "judge":
        return load_judge(folder).logits
    return load_scorer(folder, "").logits


def main() -> None:
    """Trains both, and writes what the saved files achieve."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the npm archive")
    parser.add_argument("--tokenizer", type=Path, help="folder of vocab.json and merges.txt")
    parser.add_argument("--out", type=Path, required=True, help="the pipeline's folder")
    parser.add_argument("--parts", nargs="+", choices=sorted(SEEDS), default=list(SEEDS))
    parser.add_argument(
        "--steps", type=int, help="by default 2000 for the scorer, 1800 for the judge"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    everything = load_archive(options.data)
    task = Task.of(everything)
    for part in options.parts:
        folder = options.out / part
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEEDS[part])
        if part == "scorer":
            training = Task.of(everything.subset(~everything.held_out))
            train_scorer(training, options.tokenizer or folder, folder, options)
        else:
            train_judge(task, folder, options)
        figures = accuracy(load_compare(part, folder), task)
        print(part, json.dumps(figures, indent=2), flush=True)
        (folder / "accuracy.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
