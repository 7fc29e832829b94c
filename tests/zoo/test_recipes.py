# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from pyro_twist import zoo


def options(work: Path, steps: int) -> argparse.Namespace:
    from pyro_twist.zoo.recipes.training import add_training_arguments

    parser = argparse.ArgumentParser()
    add_training_arguments(parser, steps=steps, batch_size=4, warmup=2, anneal=2)
    return parser.parse_args(["--work", str(work)])


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    from pyro_twist.zoo.recipes import digits
    from pyro_twist.zoo.recipes.training import Training

    images, labels, _ = digits.load_digits()

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.randint(0, len(labels), (4,), generator=generator)
        return digits.augment(images[index], generator), labels[index]

    def training(work: Path) -> Training:
        torch.manual_seed(0)
        return Training(digits.make_model(), digits.make_scheduler(), batch, options(work, 4))

    whole = training(tmp_path / "whole")
    whole.run(every=1)
    part = training(tmp_path / "parts")
    for _ in range(2):
        part.advance()
    part.save()
    part = training(tmp_path / "parts")
    part.run(every=1)
    for one, other in zip(whole.ema.shadow_params, part.ema.shadow_params, strict=True):
        torch.testing.assert_close(one, other)


def test_logged_loss_is_a_mean_over_the_steps_since_the_last_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyro_twist.zoo.recipes import digits
    from pyro_twist.zoo.recipes.training import Training

    def advance(self: Training) -> float:
        self.step += 1
        return 0.5

    monkeypatch.setattr(Training, "advance", advance)
    training = Training(
        digits.make_model(), digits.make_scheduler(), lambda _: (_, _), options(tmp_path, 5)
    )
    training.run(every=3)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(3, 0.5), (5, 0.5)]


def test_accuracy_is_that_of_the_saved_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyro_twist.zoo.recipes import classifiers

    trained = zoo.judge("digits")
    trained.coefficients, trained.bias = trained.coefficients * 1e-9, trained.bias * 0.0
    right = classifiers.accuracy(trained, "digits")["class_mean"]
    monkeypatch.setattr(classifiers, "ZOO", tmp_path)
    classifiers.finish(trained, "digits", "judge")
    written = json.loads((tmp_path / "digits" / "judge" / "accuracy.json").read_text())
    # In half precision the coefficients are zero, and every picture gets the same class.
    assert right > 0.9 and written["class_mean"] == pytest.approx(0.1)


def test_recipe_and_shipped_files_agree() -> None:
    from pyro_twist.zoo.recipes import digits, emoji, emoji_data

    assert zoo.entry("emoji").classes == emoji_data.GROUPS
    for name, network in (("digits", digits.make_model()), ("emoji", emoji.make_model(16))):
        about = zoo.entry(name)
        side = network.config.sample_size
        assert about.event_shape == (network.config.in_channels, side, side)
        assert network.config.num_class_embeds == len(about.classes) + 1


def test_held_out_digits_are_those_of_the_recipe() -> None:
    from pyro_twist.zoo.recipes import digits

    images, labels, held_out = digits.load_digits()
    shipped = zoo.images("digits", held_out=None)
    assert torch.equal(shipped.held_out, held_out) and torch.equal(shipped.labels, labels)
    assert torch.allclose(shipped.unit, images, atol=0.5 / 255.0 + 1e-6)


def test_nearest_picture_is_found_whatever_its_shift() -> None:
    from pyro_twist.zoo.recipes import report

    training = zoo.images("digits").unit[:40]
    copies = report.moved_copies(training, mirror=True)
    assert copies.shape == (40 * 18, 1, 8, 8)
    chosen = torch.tensor([3, 40 * 4 + 7, 40 * 17 + 21])
    distance, which = report.nearest(copies[chosen], training, mirror=True)
    assert which.tolist() == [3, 7, 21]
    assert float(distance.max()) < 1e-3
    far, _ = report.nearest(torch.rand(4, 1, 8, 8), training, mirror=True)
    assert float(far.min()) > 0.2


def test_model_card_figures_are_replaced(tmp_path: Path) -> None:
    from pyro_twist.zoo.recipes import report

    card = tmp_path / "MODEL_CARD.md"
    card.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    report.write_card(card, "new")
    assert card.read_text() == f"before\n{report.START}\nnew\n{report.END}\nafter\n"


@pytest.mark.parametrize("name", ["digits", "emoji"])
def test_model_cards_hold_figures(name: str) -> None:
    from pyro_twist.zoo.recipes import report

    folder = zoo.entry(name).folder
    if not (folder / "unet").is_dir():
        pytest.skip("the model has not been trained")
    card = (folder / "MODEL_CARD.md").read_text()
    figures = card.split(report.START)[1].split(report.END)[0]
    assert "held-out pictures" in figures and "training steps" in figures
