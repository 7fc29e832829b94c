# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from pyro_twist import rewards
from pyro_twist.rewards import image_reward, image_rewards


def flat(*rgb: float, size: int = 16) -> torch.Tensor:
    return torch.tensor(rgb)[:, None, None].expand(len(rgb), size, size).clone()


def blend(one: torch.Tensor, other: torch.Tensor, levels: int = 5) -> torch.Tensor:
    """From ``one`` to ``other`` in equal steps, of shape ``(levels, C, H, W)``."""
    weight = torch.linspace(0, 1, levels)[:, None, None, None]
    return (1 - weight) * one + weight * other


def halves(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.cat([left[..., :8], right[..., :8]], -1)


NOISE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
BLACK, WHITE, GREY = flat(0.0, 0.0, 0.0), flat(1.0, 1.0, 1.0), flat(0.5, 0.5, 0.5)
RED, GREEN, BLUE = flat(1.0, 0.0, 0.0), flat(0.0, 1.0, 0.0), flat(0.0, 0.0, 1.0)
CHECKERS = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float().expand(3, 16, 16)

# From the image with the lower to that with the higher value, and both values where they are exact.
LADDERS: dict[str, tuple[torch.Tensor, torch.Tensor, float | None, float | None]] = {
    "compressible": (NOISE, GREY, None, None),
    "incompressible": (GREY, NOISE, None, None),
    "red": (flat(0.0, 1.0, 1.0), RED, -1.0, 1.0),
    "green": (flat(1.0, 0.0, 1.0), GREEN, -1.0, 1.0),
    "blue": (flat(1.0, 1.0, 0.0), BLUE, -1.0, 1.0),
    "bright": (BLACK, WHITE, 0.0, 1.0),
    "dark": (WHITE, BLACK, 0.0, 1.0),
    "contrast": (GREY, halves(BLACK, WHITE), 0.0, 0.5),
    "colourful": (GREY, halves(RED, BLUE), 0.0, None),
    "saturated": (GREY, RED, 0.0, 1.0),
    "smooth": (CHECKERS, GREY, -1.0, 0.0),
    "symmetric": (halves(BLACK, WHITE), GREY, 0.0, 1.0),
    "colour": (WHITE, BLACK, 0.0, 1.0),
}
OPTIONS: dict[str, dict[str, Any]] = {"colour": {"rgb": (0.0, 0.0, 0.0)}}
CONSTANT = ("compressible", "incompressible")


def make(name: str) -> rewards.Reward:
    return image_reward(name, **OPTIONS.get(name, {}))


def test_every_named_reward_has_a_ladder_and_a_description() -> None:
    assert set(LADDERS) == set(image_rewards())
    assert all("\n" not in text and text for text in image_rewards().values())


@pytest.mark.parametrize("name", LADDERS)
def test_named_rewards_rise_along_their_ladder(name: str) -> None:
    low, high, least, most = LADDERS[name]
    values = make(name)(blend(low, high))
    assert (values.diff() > 0).all(), values
    if least is not None:
        assert values[0].item() == pytest.approx(least, abs=1e-6)
    if most is not None:
        assert values[-1].item() == pytest.approx(most, abs=1e-6)


@pytest.mark.parametrize("name", LADDERS)
def test_samples_are_scored_independently_in_any_precision(name: str) -> None:
    images = torch.rand(4, 3, 8, 8)
    together = make(name)(images)
    singly = torch.cat([make(name)(image[None]) for image in images])
    torch.testing.assert_close(together, singly, rtol=0, atol=1e-6)
    half = make(name)(images.half())
    torch.testing.assert_close(half, together, rtol=0, atol=2e-2)
    assert together.dtype == half.dtype == torch.float64


@pytest.mark.parametrize("name", LADDERS)
def test_differentiability_is_as_declared(name: str) -> None:
    reward = make(name)
    assert reward.differentiable is (name not in CONSTANT)
    images = torch.rand(2, 3, 6, 6, dtype=torch.float64).requires_grad_()
    values = reward(images)
    assert values.requires_grad is reward.differentiable
    if reward.differentiable:
        assert torch.autograd.gradcheck(reward, images, eps=1e-7, atol=1e-5)
        (gradient,) = torch.autograd.grad(values.sum(), images)
        assert (gradient != 0).any()


@pytest.mark.parametrize("name", sorted(set(LADDERS) - set(CONSTANT)))
@pytest.mark.parametrize("image", [BLACK, WHITE, GREY, RED], ids=["black", "white", "grey", "red"])
def test_gradients_are_finite_on_flat_images(name: str, image: torch.Tensor) -> None:
    images = image[None].clone().requires_grad_()
    make(name)(images).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()


@pytest.mark.parametrize("name", LADDERS)
def test_grey_channel_images_count_as_grey(name: str) -> None:
    one = torch.rand(3, 1, 16, 16)
    values, expected = make(name)(one), make(name)(one.expand(-1, 3, -1, -1))
    if name not in CONSTANT:
        torch.testing.assert_close(values, expected)


def test_jpeg_sizes_are_those_of_the_files() -> None:
    from PIL import Image

    pixels = (NOISE * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    for quality in (20, 95):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
        size = len(file.getvalue()) / 1000
        assert rewards.jpeg_incompressibility(quality)(NOISE[None]).item() == size
        assert rewards.jpeg_compressibility(quality)(NOISE[None]).item() == -size
    with pytest.raises(ValueError, match="quality=100"):
        rewards.jpeg_compressibility(100)


def test_brightness_weighs_channels_as_the_eye_does() -> None:
    values = rewards.brightness()(torch.stack([RED, GREEN, BLUE]))
    np.testing.assert_allclose(values, [0.299, 0.587, 0.114], atol=1e-6)


def test_colour_distances() -> None:
    corners = torch.stack([RED, WHITE, BLACK, flat(0.0, 1.0, 1.0)])
    np.testing.assert_allclose(
        rewards.colour("red")(corners),
        [1.0, 1 - (2 / 3) ** 0.5, 1 - (1 / 3) ** 0.5, 0.0],
        atol=1e-6,
    )
    for same in ("#ff8000", (1.0, 128 / 255, 0.0)):
        assert rewards.colour(same)(flat(1.0, 128 / 255, 0.0)[None]).item() == pytest.approx(1.0)


def test_colourfulness_matches_the_published_formula_in_numpy() -> None:
    red, green, blue = (NOISE.double().numpy() * 255).reshape(3, -1)
    first, second = red - green, (red + green) / 2 - blue
    expected = np.hypot(first.std(), second.std()) + 0.3 * np.hypot(first.mean(), second.mean())
    assert rewards.colourfulness()(NOISE[None]).item() == pytest.approx(expected / 255, rel=1e-5)


def test_symmetry_axes() -> None:
    left_right = torch.cat([NOISE, NOISE.flip(-1)], -1)[None]
    assert rewards.symmetry()(left_right).item() == 1.0
    assert rewards.symmetry("top-bottom")(left_right).item() < 0.9
    assert rewards.symmetry("top-bottom")(left_right.transpose(-1, -2)).item() == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: image_reward("redd"), "no image reward 'redd'; did you mean 'red'.*compressible"),
        (lambda: image_reward("zzz"), "no image reward 'zzz'. There are"),
        (lambda: image_reward("compressible", size=3), "unexpected.*options are: quality"),
        (lambda: image_reward("red", quality=3), "options are: none"),
        (lambda: image_reward("colour"), "missing.*rgb"),
        (lambda: rewards.colour("mauve"), "rgb='mauve' is no colour.*orange"),
        (lambda: rewards.colour((2.0, 0.0, 0.0)), "is no colour"),
        (lambda: rewards.colour((1.0, 0.0)), "is no colour"),
        (lambda: rewards.colour("#12"), "is no colour"),
        (lambda: rewards.dominance("mauve"), "channel='mauve'"),  # type: ignore[arg-type]
        (lambda: rewards.symmetry("diagonal"), "axis='diagonal'"),  # type: ignore[arg-type]
        (lambda: image_reward("red")(torch.rand(2, 5)), r"\(B, C, H, W\).*got \(1, 5\)"),
        (lambda: image_reward("red")(torch.rand(2, 2, 4, 4)), r"1 or 3 channels"),
    ],
)
def test_wrong_use_answers_in_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
