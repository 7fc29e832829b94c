# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
)

from pyro_twist import GaussianDiffusion, LookaheadTwist, RewardTilted, TwistedSMC
from pyro_twist.rewards import (
    Aesthetic,
    CLIPScore,
    HPSv2,
    ImageReward,
    ImageRewardNetwork,
    PickScore,
    Preprocessing,
    Reward,
    RewardError,
    RewardWarning,
    TinyDecoder,
    convert_checkpoint,
    ensemble,
    image_reward,
    log_potential,
    per_prompt,
    preference_reward,
    preference_rewards,
)
from pyro_twist.rewards.preference import PreferenceReward
from pyro_twist.rewards.samples import to_pil
from tests.diffusion import pipes
from tests.rewards import published
from tests.rewards.chain import Chain

PROMPT = "a red apple"
SIZES = [(16, 16), (20, 33), (64, 41), (9, 7), (16, 23), (19, 16)]
KINDS = ["clipscore", "pickscore", "hpsv2", "imagereward", "aesthetic"]
LEVEL = 1 / 255 / min(Preprocessing().std)


# Tiny networks


def clip_model() -> CLIPModel:
    torch.manual_seed(2)  # of the first seeds the one whose cosines are positive
    shape = {"num_hidden_layers": 2, "projection_dim": published.EMBEDDING}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, **shape}
    text |= {"vocab_size": published.VOCABULARY, "max_position_embeddings": published.LENGTH}
    text |= {"bos_token_id": 30, "eos_token_id": 31, "pad_token_id": 31}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, **shape}
    vision |= {"image_size": published.IMAGE, "patch_size": published.PATCH}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=published.EMBEDDING)
    return wide(CLIPModel(config))


def wide(network: Any) -> Any:
    """Weights large enough for scores that depend on the image."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.15 * torch.randn_like(parameter))
    return network.eval()


def clip_processor(**options: Any) -> CLIPProcessor:
    size = published.IMAGE
    defaults = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    images = CLIPImageProcessor(**{**defaults, **options})
    return CLIPProcessor(image_processor=images, tokenizer=published.clip_tokenizer())


def blip_network() -> ImageRewardNetwork:
    torch.manual_seed(0)
    text = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 40}
    text |= dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id"))
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    return wide(ImageRewardNetwork(BlipConfig(text_config=text, vision_config=vision)))


@functools.cache
def shared(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A network and what prepares its inputs, made once; not to be changed."""
    if kind == "imagereward":
        return blip_network().to(dtype), published.bert_tokenizer()
    return clip_model().to(dtype), clip_processor()


def make(kind: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> PreferenceReward:
    if kind == "imagereward":
        return ImageReward(*shared(kind, dtype), PROMPT, **options)
    model, processor = shared("clip", dtype)
    if kind == "aesthetic":
        weights = published.head_weights(published.EMBEDDING)
        return Aesthetic(model, processor, weights, **options)
    kinds: dict[str, Any] = {"clipscore": CLIPScore, "pickscore": PickScore, "hpsv2": HPSv2}
    return kinds[kind](model, processor, PROMPT, **options)


def images(number: int = 3, height: int = 20, width: int = 33, seed: int = 0) -> Tensor:
    """Smooth random images on 8-bit levels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = 0.2 * torch.rand(smooth.shape, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round() / 255


def pictures(batch: Tensor) -> list[Image.Image]:
    return to_pil((batch * 255).round().to(torch.uint8))


# Preprocessing


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["clip", "bilinear", "blip", "no crop", "as it is"])
def test_tensors_are_shown_as_the_processor_shows_pil_images(
    kind: str, size: tuple[int, int]
) -> None:
    processor: Any = {
        "clip": lambda: clip_processor().image_processor,
        "bilinear": lambda: clip_processor(resample=2).image_processor,
        "blip": lambda: BlipImageProcessor(size={"height": 16, "width": 12}),
        "no crop": lambda: clip_processor(do_center_crop=False).image_processor,
        "as it is": lambda: (
            clip_processor(
                do_resize=False, do_center_crop=False, do_normalize=False
            ).image_processor
        ),
    }[kind]()
    shown, batch = Preprocessing.from_processor(processor), images(2, *size)
    expected = processor(images=pictures(batch), return_tensors="pt")["pixel_values"]
    assert torch.equal(shown.pil(pictures(batch)), expected)
    apart = (shown.rounding(True)(batch) - expected).abs()
    # ties between two levels fall either way
    assert apart.max() < 1.01 * LEVEL
    assert (apart > 1e-5).float().mean() < (0.05 if kind == "bilinear" else 0.01)
    # unrounded: half a level from each of two passes, and what the filter's negative lobes add
    assert (shown(batch) - expected).abs().max() < 1.5 * LEVEL
    if kind == "as it is" or size == (16, 16) and kind != "blip":
        assert torch.allclose(shown(batch), expected, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_that_of_pillow(size: tuple[int, int]) -> None:
    """On floating point images, which Pillow does not round; the range keeps clear of clamps."""
    batch = 0.4 + 0.2 * images(1, *size)
    resized = Preprocessing(16, crop=None, mean=(0, 0, 0), std=(1, 1, 1))(batch)[0]
    for channel, found in zip(batch[0], resized):
        plane = Image.fromarray(channel.numpy())
        plane = plane.resize((found.shape[1], found.shape[0]), Image.Resampling.BICUBIC)
        assert torch.allclose(found, torch.from_numpy(np.array(plane)), atol=1e-5)


def test_overshoot_is_clamped_as_8_bits_do() -> None:
    """Bicubic filters leave [0, 1] at edges; processors cannot."""
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    plain = Preprocessing(16, crop=None, mean=(0, 0, 0), std=(1, 1, 1))
    assert plain(edge).min() == 0 and plain(edge).max() == 1
    published_alone = Preprocessing(16, crop=None, mean=(0, 0, 0), std=(1, 1, 1), eight_bit=False)
    assert published_alone(edge).min() < -0.01 and published_alone(edge).max() > 1.01


@pytest.mark.parametrize("width", range(16, 24))
def test_the_middle_is_that_of_torchvision_or_of_transformers(width: int) -> None:
    """They differ where the margin is odd: torchvision rounds half of it to even."""
    batch = torch.arange(width).float().expand(1, 3, 16, width) / width
    plain: dict[str, Any] = {"crop": (16, 16), "mean": (0, 0, 0), "std": (1, 1, 1)}
    for centred, start in ((True, int(round((width - 16) / 2.0))), (False, (width - 16) // 2)):
        found = Preprocessing(16, centred=centred, **plain)(batch)
        assert torch.equal(found, batch[..., start : start + 16])
    # what the two networks of this kind are shown
    assert make("imagereward").preprocessing.centred and not make("pickscore").preprocessing.centred


@pytest.mark.parametrize(("height", "width"), [(20, 32), (40, 10), (16, 16), (8, 16), (5, 12)])
def test_hpsv2_sees_the_whole_image_between_black_bars(height: int, width: int) -> None:
    """Not the middle, as the other networks do; black before normalising, not grey."""
    batch = 0.4 + 0.2 * images(1, height, width)
    scale = 16 / max(height, width)
    inner = round(height * scale), round(width * scale)
    plane = Image.fromarray(batch[0, 1].numpy()).resize(inner[::-1], Image.Resampling.BICUBIC)
    canvas = torch.zeros(16, 16)
    top, left = (16 - inner[0]) // 2, (16 - inner[1]) // 2
    canvas[top : top + inner[0], left : left + inner[1]] = torch.from_numpy(np.array(plane))
    found = make("hpsv2").preprocessing(batch)[0, 1]
    assert torch.allclose(found, (canvas - 0.4578275) / 0.26130258, atol=1e-4)


def test_hpsv2_does_not_round() -> None:
    """The published code makes tensors of images first, and resizes them then."""
    shown, batch = make("hpsv2").preprocessing, images(2)
    assert torch.equal(shown.pil(pictures(batch)), shown(batch))


def test_rounding_keeps_the_gradient() -> None:
    batch = images(1).double()
    weights = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    slopes = []
    for rounds in (False, True):
        x = batch.clone().requires_grad_()
        (weights * Preprocessing(16, crop=(16, 16), rounds=rounds)(x)).sum().backward()
        assert x.grad is not None
        slopes.append(x.grad)
    assert torch.allclose(slopes[0], slopes[1], atol=1e-9) and slopes[0].abs().max() > 0


def test_images_are_checked() -> None:
    shown = make("pickscore").preprocessing
    with pytest.raises(ValueError, match=r"values in \[0, 1\], got -1 to 1;"):
        shown(2 * torch.tensor([0.0, 1.0]).expand(1, 3, 2, 2) - 1)
    with pytest.raises(ValueError, match=r"shape \(B, C, H, W\)"):
        shown(images()[0])
    with pytest.raises(ValueError, match="smaller than the crop"):
        Preprocessing(8, crop=(16, 16))(images())
    grey = images()[:, :1]
    assert torch.equal(shown(grey), shown(grey.expand(-1, 3, -1, -1)))
    assert torch.allclose(shown((255 * images()).round().byte()), shown(images()), atol=1e-6)


def test_processors_that_do_something_else_are_refused() -> None:
    for options, match in (
        ({"do_rescale": False}, "rescale"),
        ({"resample": 0}, "resample=0"),
        ({"size": {"longest_edge": 16, "shortest_edge": 8}}, "shortest_edge, or height"),
    ):
        with pytest.raises(ValueError, match=match):
            Preprocessing.from_processor(clip_processor(**options).image_processor)


# Scores


def embeddings(model: Any, batch: Tensor, prompt: str) -> tuple[Tensor, Tensor]:
    """Image and text embeddings by the model's own methods."""
    ids = published.clip_tokenizer()(prompt, return_tensors="pt", truncation=True, max_length=32)
    found = model.get_image_features(pixel_values=batch), model.get_text_features(**ids)
    image, text = (getattr(one, "pooler_output", one) for one in found)
    return image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)


@torch.no_grad()
def by_hand(kind: str, batch: Tensor, prompt: str = PROMPT) -> Tensor:
    """The published definitions, from the outputs of the networks."""
    model, processor = shared("clip")
    pixels = processor(images=pictures(batch), return_tensors="pt")["pixel_values"]
    if kind == "pickscore":
        text = processor(text=prompt, return_tensors="pt", truncation=True, max_length=32)
        return model(pixel_values=pixels, **text).logits_per_text[0]
    if kind == "hpsv2":
        shown = make(kind).preprocessing.pil(pictures(batch))
        image, text = embeddings(model, shown, prompt)
        return (image @ text.T)[:, 0]
    if kind == "clipscore":
        image, text = embeddings(model, pixels, f"A photo depicts {prompt}")
        return 2.5 * (image @ text.T)[:, 0].clamp(min=0)
    if kind == "aesthetic":
        image, _ = embeddings(model, pixels, prompt)
        return published.head(published.head_weights(published.EMBEDDING), image)
    network, words = shared(kind)
    tokens = words(
        prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    shown = make(kind).preprocessing.pil(pictures(batch))
    seen = network.vision_model(shown).last_hidden_state
    read = network.text_encoder(
        tokens.input_ids.expand(len(batch), -1),
        attention_mask=tokens.attention_mask.expand(len(batch), -1),
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long),
        is_decoder=False,
    )
    raw = network.mlp(read.last_hidden_state[:, 0])[:, 0]
    return (raw - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_definition(kind: str) -> None:
    batch, expected = images(), by_hand(kind, images()).double()
    assert expected.std() > 1e-3, "the network does not look at the image"
    for options, given in (
        ({}, pictures(batch)),
        ({"input": "pil"}, batch),
        ({"rounds": True}, batch),
    ):
        values = make(kind, **options)(given)
        assert values.dtype == torch.float64 and values.shape == (3,)
        assert torch.allclose(values, expected, atol=1e-5)
    # without rounding, within what a grey level makes
    assert torch.allclose(make(kind)(batch), expected, atol=0.05 * float(expected.std()))
    if kind != "aesthetic":
        other = make(kind).with_prompt("a blue boat")(pictures(batch))
        assert torch.allclose(other, by_hand(kind, batch, "a blue boat").double(), atol=1e-5)
        assert (other - expected).abs().max() > 1e-4


def test_options_of_clipscore() -> None:
    batch = images()
    image, text = embeddings(clip_model(), make("clipscore").preprocessing(batch), PROMPT)
    cosine = (image @ text.T)[:, 0].detach().double()
    found = make("clipscore", weight=100.0, prefix="")(batch)
    assert torch.allclose(found, 100 * cosine.clamp(min=0), atol=1e-4)
    opposite = clip_model()
    opposite.text_projection.weight.data.neg_()
    assert (CLIPScore(opposite, clip_processor(), PROMPT)(batch) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_chunks_change_nothing(kind: str) -> None:
    batch = images(5)
    together = make(kind)(batch)
    one_by_one = torch.cat([make(kind)(one[None]) for one in batch])
    assert torch.allclose(together, one_by_one, atol=1e-5)
    assert torch.allclose(together, make(kind, chunk_size=2)(batch), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    reward = make(kind, dtype=torch.float64)
    batch = images(2, 20, 24).double() * 0.9 + 0.05
    x = batch.clone().requires_grad_()
    values = reward(x)
    (slope,) = torch.autograd.grad(values.sum(), x)
    assert slope.dtype == torch.float64
    place = (1, 2, 9, 11)
    step = 1e-5
    ends = []
    for sign in (1, -1):
        moved = batch.clone()
        moved[place] += sign * step
        ends.append(reward(moved)[1])
    expected = float(ends[0] - ends[1]) / (2 * step)
    assert abs(expected) > 1e-7
    assert float(slope[place]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_networks_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    """Scores are float32 arithmetic on what the network returns."""
    batch = images(4)
    exact, half = make(kind)(batch), make(kind, dtype=dtype)(batch)
    scale = {"pickscore": 14.0, "clipscore": 2.5}.get(kind, max(1.0, float(exact.abs().max())))
    assert half.dtype == torch.float64
    assert torch.allclose(half, exact, atol=0.03 * scale)
    assert len(half.unique()) == 4, "scores fell on the grid of half precision"
    x = batch.clone().requires_grad_()
    assert make(kind, dtype=dtype)(x).requires_grad
    assert make(kind, dtype=dtype)(batch.to(dtype)).isfinite().all()


def test_cosines_are_taken_in_float32() -> None:
    """Normalised in bfloat16, embeddings would have a length that is off by up to 0.4 %."""
    for dtype in (torch.bfloat16, torch.float16):
        towers: Any = make("hpsv2", dtype=dtype)
        pixels = towers.preprocessing(images())
        image, text = towers.towers.image(pixels), towers.towers.prompt(PROMPT)
        assert image.dtype == text.dtype == torch.float32
        assert torch.allclose(image.norm(dim=-1), torch.ones(3), atol=1e-6)


# Prompts


@pytest.mark.parametrize("kind", ["pickscore", "hpsv2", "imagereward"])
def test_long_prompts_are_cut_with_a_warning(kind: str) -> None:
    most = 35 if kind == "imagereward" else published.LENGTH
    word = "red" if kind == "imagereward" else "x"
    batch, fits = images(), " ".join([word] * (most - 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = make(kind).with_prompt(fits)(batch)
    longer = make(kind).with_prompt(f"{fits} {word} {word}")
    with pytest.warns(RewardWarning, match=f"has {most + 2} tokens, .* first {most};"):
        assert torch.equal(longer(batch), expected)
    longer(batch + 0.0)  # told once


def test_clip_reads_no_more_than_77_tokens() -> None:
    model = clip_model()
    model.config.text_config.max_position_embeddings = 200
    assert PickScore(model, clip_processor(), PROMPT).towers.prompt.max_length == 77
    assert make("pickscore").towers.prompt.max_length == published.LENGTH  # type: ignore[attr-defined]


def test_each_prompt_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoded = clip_model(), []
    forward = model.text_model.forward
    monkeypatch.setattr(model.text_model, "forward", lambda **k: encoded.append(1) or forward(**k))
    rewards = per_prompt(PickScore(model, clip_processor(), PROMPT), ["a boat", "an apple"])
    for _ in range(2):
        for one in rewards:
            one(images())
    assert len(encoded) == 2
    assert all(one.towers.model is model for one in rewards)


@pytest.mark.parametrize("kind", ["pickscore", "imagereward", "ensemble"])
def test_remembered_scores_are_those_of_their_prompt(kind: str) -> None:
    """Equal images under different prompts are different samples, also for a cache."""
    reward: Any = (
        ensemble([make("pickscore", cache=True), make("aesthetic")], cache=True)
        if kind == "ensemble"
        else make(kind, cache=True)
    )
    plain: Any = ensemble([make("pickscore"), make("aesthetic")]) if kind == "ensemble" else None
    plain, batch = plain or make(kind), images()
    reward(batch)
    rewards = [reward, *per_prompt(reward, ["a blue boat", "a photo"])]
    expected = [plain, *per_prompt(plain, ["a blue boat", "a photo"])]
    for _ in range(2):
        for one, other in zip(rewards, expected, strict=True):
            assert torch.allclose(one(batch), other(batch), atol=1e-6)
    assert [one.num_calls for one in rewards] == [3, 3, 3]
    assert len({round(float(one(batch)[0]), 5) for one in rewards}) == 3


def test_arguments_in_the_wrong_order_are_refused() -> None:
    model, processor = clip_model(), clip_processor()
    with pytest.raises(ValueError, match="CLIPProcessor has no .*vision_model.*first"):
        PickScore(processor, model, PROMPT)
    with pytest.raises(ValueError, match="prompt=list; give one string"):
        PickScore(model, processor, [PROMPT])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ImageRewardNetwork first"):
        ImageReward(published.bert_tokenizer(), blip_network(), PROMPT)
    with pytest.raises(ValueError, match="takes a tensor or an array .* got str"):
        PickScore(model, processor, PROMPT)(PROMPT)
    with pytest.raises(ValueError, match="no image_processor"):
        PickScore(model, published.clip_tokenizer(), PROMPT)
    with pytest.raises(ValueError, match="training mode"):
        PickScore(model.train(), processor, PROMPT)
    with pytest.raises(ValueError, match="input='numpy'"):
        make("pickscore", input="numpy")
    with pytest.raises(RewardError, match=r"values in \[0, 1\]"):
        make("pickscore")(2 * images())
    with pytest.raises(RewardError, match="holds a Tensor; give PIL images, or one tensor"):
        make("pickscore")(list(images()))


# Ensembles


def test_ensembles() -> None:
    batch, members = images(), [make("pickscore"), make("imagereward"), image_reward("red")]
    each = torch.stack([one(batch) for one in members])
    weights = [0.5, 2.0, 3.0]
    scaled = each * torch.tensor(weights).double()[:, None]
    assert torch.allclose(ensemble(members, weights)(batch), scaled.mean(0))
    assert torch.allclose(ensemble(members, weights, "min")(batch), scaled.amin(0))
    assert torch.allclose(ensemble(members)(batch), each.mean(0))
    x = batch.clone().requires_grad_()
    assert ensemble(members, weights)(x).requires_grad
    assert ensemble([*members, image_reward("compressible")]).differentiable is False
    only_networks = ensemble(members[:2])
    assert torch.allclose(only_networks(pictures(batch)), only_networks(batch), atol=0.05)
    nested = ensemble([ensemble(members[:2]), members[2]]).with_prompt("a blue boat")
    inner = torch.stack([one.with_prompt("a blue boat")(batch) for one in members[:2]]).mean(0)  # type: ignore[attr-defined]
    assert torch.allclose(nested(batch), (inner + each[2]) / 2)


def test_ensembles_that_make_no_sense_are_refused() -> None:
    one = image_reward("red")
    for rewards, options, match in (
        ([], {}, "0 weights for 0 rewards"),
        ([one], {"weights": [1, 2]}, "2 weights for 1"),
        ([one], {"weights": [-1]}, "positive"),
        ([one], {"reduce": "max"}, "reduce='max'"),
        ([one, Reward(len, input="list")], {}, "one kind"),
    ):
        with pytest.raises(ValueError, match=match):
            ensemble(rewards, **options)


# Populations


@pytest.mark.parametrize("kind", ["pickscore", "imagereward", "ensemble"])
def test_populations_never_mix(kind: str) -> None:
    """Entry ``k`` of the plate is scored for prompt ``k``, whatever is in the other entries."""
    prompts = ["a red apple", "a blue boat", "a photo"]
    reward: Any = (
        ensemble([make("pickscore"), make("aesthetic")]) if kind == "ensemble" else make(kind)
    )
    rewards = per_prompt(reward, prompts)
    model = RewardTilted(Chain((3, 16, 16), plate=("prompts", 3)), rewards)
    x = images(12, 16, 16).reshape(4, 3, 3, 16, 16)
    found = model.evaluate(x)["reward"]
    for k, prompt in enumerate(prompts):
        alone = reward.with_prompt(prompt)(x[:, k])
        assert torch.allclose(found[:, k], alone, atol=1e-5)
    changed = x.clone()
    changed[:, 1:] = images(8, 16, 16, seed=5).reshape(4, 2, 3, 16, 16)
    again = model.evaluate(changed)["reward"]
    assert torch.equal(again[:, 0], found[:, 0]) and (again[:, 1:] != found[:, 1:]).all()
    # one image for all prompts: equal bytes under different prompts are different samples
    same = x[:1, :1].expand(2, 3, 3, 16, 16)
    assert len(model.evaluate(same)["reward"][0].unique()) == 3


def test_a_run_with_one_prompt_per_population() -> None:
    prompts = ["a red apple", "a blue boat"]
    rewards = per_prompt(make("pickscore"), prompts)

    class Pictures(Chain):
        def decode(self, x: Tensor) -> Tensor:
            return x.sigmoid()

    base = Pictures((3, 16, 16), num_steps=2, plate=("prompts", 2))
    model = RewardTilted(base, rewards, scale=3.0)
    options: dict[str, Any] = {"max_plate_nesting": 1, "population_plate": "prompts"}
    result = TwistedSMC(model, LookaheadTwist(model), 4, seed=0, **options).run()
    x, values = result.state["x"], result.state["reward"]
    for k in range(2):
        assert torch.allclose(values[:, k], rewards[k](x[:, k].sigmoid()), atol=1e-5)


def test_gradients_of_populations_are_taken_in_chunks() -> None:
    """Else a gradient would hold the activations of all images at once."""
    from pyro_twist.twists.guided import _chunk_size

    base = Chain((3, 16, 16), plate=("prompts", 2))
    reward = ensemble([make("pickscore", chunk_size=3), make("aesthetic", chunk_size=5)])
    for one in (reward, per_prompt(reward, ["a boat", "a photo"])):
        assert _chunk_size(RewardTilted(base, one)) == 3


def test_rewards_without_prompts_are_refused() -> None:
    for reward in (make("aesthetic"), image_reward("red"), ensemble([make("aesthetic")])):
        with pytest.raises(ValueError, match="takes no prompt"):
            per_prompt(reward, ["a boat"])
    for prompts in ([], "a boat"):
        with pytest.raises(ValueError, match="list of one string or more"):
            per_prompt(make("pickscore"), prompts)


# Loading


def saved(folder: Path) -> Path:
    clip_model().save_pretrained(folder)
    clip_processor().save_pretrained(folder)
    return folder


def pickled(folder: Path) -> Path:
    saved(folder)
    (folder / "model.safetensors").unlink()
    torch.save(clip_model().state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("kind", [CLIPScore, PickScore, HPSv2])
def test_loading_a_folder(kind: Any, tmp_path: Path) -> None:
    folder = str(saved(tmp_path))
    loaded = kind.from_pretrained(PROMPT, folder)
    expected = kind(clip_model(), clip_processor(), PROMPT)(images())
    assert torch.allclose(loaded(images()), expected, atol=1e-5)
    half = kind.from_pretrained(PROMPT, folder, dtype=torch.bfloat16)
    assert half.towers.model.dtype == torch.bfloat16
    assert not any(one.requires_grad for one in half.towers.model.parameters())


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"(?s)safetensors.*local folder.*convert_checkpoint"):
        PickScore.from_pretrained(PROMPT, str(pickled(tmp_path)))
    with pytest.raises(ValueError, match="is no .safetensors file"):
        saved(tmp_path)
        Aesthetic.from_pretrained(tmp_path / "pytorch_model.bin", str(tmp_path))
    with pytest.raises(OSError, match=r"(?s)it has pytorch_model.bin, which is not read"):
        (tmp_path / "model.safetensors").unlink()
        ImageReward.from_pretrained(PROMPT, str(tmp_path))


def test_a_pickle_that_runs_code_does_not_run_even_when_converted(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"state_dict": {"a": Runs()}}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match="(?i)weights.only"):
        convert_checkpoint("aesthetic", tmp_path / "bad.pt", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_code_that_comes_with_a_model_does_not_run(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\nclass C: ...\nclass M: ..."
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        PickScore.from_pretrained(PROMPT, str(folder))
    assert not (folder / "ran").exists()


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")  # of diffusers, to the hub
def test_without_a_network_the_error_says_how_to_go_on() -> None:
    for load in (
        lambda: PickScore.from_pretrained(PROMPT, local_files_only=True),
        lambda: ImageReward.from_pretrained(PROMPT, "no/such-model", local_files_only=True),
        lambda: Aesthetic.from_pretrained("no/such-head", local_files_only=True),
        lambda: TinyDecoder.from_pretrained(local_files_only=True),
    ):
        with pytest.raises(OSError, match=r"(?s)give a local folder.*model='/path/to/folder'"):
            load()
    with pytest.raises(ValueError, match="published as a pickle only"):
        HPSv2.from_pretrained(PROMPT)


def test_rewards_by_name(tmp_path: Path) -> None:
    assert sorted(preference_rewards()) == sorted(KINDS)
    reward = preference_reward("pickscore", prompt=PROMPT, model=str(saved(tmp_path)))
    assert isinstance(reward, PickScore) and reward.name == "pickscore"
    with pytest.raises(ValueError, match="missing a required argument: 'prompt'"):
        preference_reward("pickscore")
    # before anything is loaded, for which there is nothing here
    for name, given in (("pickscore", {}), ("clipscore", {}), ("imagereward", {"model": "x/y"})):
        with pytest.raises(ValueError, match="no option 'chunk'; .* it has .*chunk_size"):
            preference_reward(name, prompt=PROMPT, chunk=3, **given)
    with pytest.raises(ValueError, match="no option 'chunk'"):
        preference_reward("aesthetic", head="x/y", chunk=3)
    assert (
        preference_reward(
            "clipscore", prompt=PROMPT, model=str(tmp_path), prefix="", chunk_size=2, cache=True
        )(images())
        .isfinite()
        .all()
    )


# Published checkpoints


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_converted_hpsv2_is_the_published_network(suffix: str, tmp_path: Path) -> None:
    weights = published.open_clip_weights()
    checkpoint = tmp_path / f"hps{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 1, "state_dict": weights}, checkpoint)
    else:
        save_file(weights, str(checkpoint))
    folder = convert_checkpoint(
        "hpsv2",
        checkpoint,
        tmp_path / "hps",
        tokenizer=published.clip_tokenizer(),
        heads=published.HEADS,
    )
    reward = HPSv2.from_pretrained(PROMPT, str(folder))
    batch = images()
    for prompt in (PROMPT, "x" * 8):
        ids = published.clip_tokenizer()(prompt, return_tensors="pt")["input_ids"]
        expected = published.open_clip_cosine(weights, reward.preprocessing(batch), ids)
        assert torch.allclose(reward.with_prompt(prompt)(batch), expected.double(), atol=1e-5)


def test_the_converted_imagereward_is_the_published_network(tmp_path: Path) -> None:
    weights = published.image_reward_weights()
    torch.save(weights, tmp_path / "ImageReward.pt")
    folder = convert_checkpoint(
        "image-reward",
        tmp_path / "ImageReward.pt",
        tmp_path / "folder",
        tokenizer=published.bert_tokenizer(),
        heads=published.HEADS,
    )
    reward = ImageReward.from_pretrained(PROMPT, str(folder))
    tokens = published.bert_tokenizer()(
        PROMPT, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    expected = published.image_reward(
        weights, reward.preprocessing(images()), tokens.input_ids, tokens.attention_mask
    )
    assert expected.std() > 1e-3
    assert torch.allclose(reward(images()), expected.double(), atol=1e-4)


def test_the_converted_head_is_the_published_one(tmp_path: Path) -> None:
    weights = published.head_weights(published.EMBEDDING)
    torch.save(weights, tmp_path / "head.pth")
    folder = convert_checkpoint("aesthetic", tmp_path / "head.pth", tmp_path / "head")
    saved(tmp_path / "clip")
    for head in (folder, folder / "aesthetic.safetensors"):
        reward = Aesthetic.from_pretrained(head, str(tmp_path / "clip"))
        assert torch.allclose(reward(images()), make("aesthetic")(images()), atol=1e-5)


def test_checkpoints_of_another_kind_are_refused(tmp_path: Path) -> None:
    torch.save(published.head_weights(8), tmp_path / "head.pth")
    words = published.clip_tokenizer()
    with pytest.raises(
        ValueError, match="no text_projection|no vision_model|is it of another kind"
    ):
        convert_checkpoint("hpsv2", tmp_path / "head.pth", tmp_path / "a", tokenizer=words)
    with pytest.raises(ValueError, match="is it of another kind"):
        convert_checkpoint("image-reward", tmp_path / "head.pth", tmp_path / "a", tokenizer=words)
    with pytest.raises(ValueError, match="needs tokenizer="):
        convert_checkpoint("hpsv2", tmp_path / "head.pth", tmp_path / "a")
    with pytest.raises(ValueError, match="kind='clip'"):
        convert_checkpoint("clip", tmp_path / "head.pth", tmp_path / "a")  # type: ignore[arg-type]
    torch.save(published.open_clip_weights(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="these are no weights of the aesthetic head"):
        convert_checkpoint("aesthetic", tmp_path / "clip.pt", tmp_path / "a")
    fewer = published.open_clip_weights()
    del fewer["ln_final.weight"]
    torch.save(fewer, tmp_path / "fewer.pt")
    with pytest.raises(ValueError, match="missing are .*final_layer_norm"):
        convert_checkpoint(
            "hpsv2", tmp_path / "fewer.pt", tmp_path / "a", tokenizer=words, heads=(4, 2)
        )


# Decoders for look-aheads


class Decoding(Chain):
    """A chain with a decoder that counts what it decodes."""

    decoded = 0

    def decode(self, x: Tensor) -> Tensor:
        self.decoded += len(x)
        return x.sigmoid()


def test_the_tiny_decoder_is_for_look_aheads_only() -> None:
    base, seen = Decoding((3, 4, 4), num_steps=4), []

    def cheap(x: Tensor) -> Tensor:
        seen.append(len(x))
        return torch.zeros_like(x)

    model = RewardTilted(base, image_reward("red"), scale=5.0, lookahead_decoder=cheap)
    result = TwistedSMC(model, LookaheadTwist(model), 6, seed=0).run()
    assert base.decoded == 6, "the decoder of the model is for the end alone"
    assert sum(seen) >= 6 * 3
    x = result.state["x"]
    assert torch.allclose(result.state["reward"], image_reward("red")(x.sigmoid()), atol=1e-6)
    # at the end state itself the potential is exact, whoever asks
    exact = log_potential(model, result.state, x)
    assert torch.allclose(exact, 5.0 * image_reward("red")(x.sigmoid()), atol=1e-5)
    assert torch.equal(log_potential(model, result.state, x + 1.0), torch.zeros(6).double())
    assert (model.evaluate(x)["reward"] != 0).all()


def test_the_law_does_not_depend_on_the_decoder_of_look_aheads() -> None:
    """
    The estimate of ``log Z`` is of the fully decoded reward, though look-aheads see the opposite.

    Of 60 runs the mean of ``Z`` estimates lies within 4.5 standard errors of the truth, beyond
    which a normal lies with probability 7e-6.
    """
    base = Chain((1,), num_steps=3)
    base.decode = lambda x: x  # type: ignore[method-assign]
    scale = 0.7
    model = RewardTilted(base, lambda x: x[:, 0], scale=scale, lookahead_decoder=lambda x: -0.5 * x)
    estimates = torch.tensor(
        [
            math.exp(
                float(TwistedSMC(model, LookaheadTwist(model), 256, seed=k).run().log_normalizer)
            )
            for k in range(60)
        ]
    )
    truth = math.exp(scale**2 * base.end_variance / 2)
    error = float(estimates.std()) / 60**0.5
    assert abs(float(estimates.mean()) - truth) < 4.5 * error
    assert error < 0.01 * truth


def test_a_decoder_of_look_aheads_needs_something_to_stand_in_for() -> None:
    with pytest.raises(ValueError, match="decode=False"):
        RewardTilted(Chain(), image_reward("red"), decode=False, lookahead_decoder=lambda x: x)


def tiny_autoencoder() -> Any:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


def test_a_pipeline_with_prompts_and_a_tiny_decoder() -> None:
    """What users do: a pipeline, one population per prompt, look-aheads by the tiny decoder."""
    prompts = ["a red apple", "a blue boat"]
    pipe = pipes.stable_diffusion()
    diffusion = GaussianDiffusion.from_pipeline(
        pipe, prompts, num_inference_steps=3, guidance_scale=2.0, eta=1.0
    )
    decoded = []
    pipe.vae.decoder.register_forward_hook(lambda *_, **__: decoded.append(1))
    rewards = per_prompt(make("pickscore", chunk_size=4), prompts)
    model = RewardTilted(
        diffusion, rewards, scale=5.0, lookahead_decoder=TinyDecoder(tiny_autoencoder())
    )
    options: dict[str, Any] = {"max_plate_nesting": 1, "population_plate": "prompts"}
    result = TwistedSMC(model, LookaheadTwist(model), 2, seed=0, **options).run()
    assert len(decoded) == 1, "one batch, of the final latents"
    x, values = result.state["x"], result.state["reward"]
    for k in range(2):
        assert torch.allclose(values[:, k], rewards[k](diffusion.decode(x[:, k])), atol=1e-4)


def test_the_tiny_decoder(tmp_path: Path) -> None:
    autoencoder, latents = tiny_autoencoder(), torch.randn(5, 4, 6, 6)
    with torch.no_grad():
        expected = (autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    found = TinyDecoder(autoencoder, chunk_size=2)(latents)
    assert torch.allclose(found, expected, atol=1e-6) and found.shape == (5, 3, 12, 12)
    autoencoder.save_pretrained(tmp_path)
    loaded = TinyDecoder.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert loaded(latents).dtype == torch.float32
    assert torch.allclose(loaded(latents), expected, atol=0.05)
    with pytest.raises(ValueError, match="training mode"):
        TinyDecoder(autoencoder.train())
    x = latents.clone().requires_grad_()
    assert TinyDecoder(autoencoder.eval())(x).requires_grad
    autoencoder.register_to_config(scaling_factor=2.0, shift_factor=0.5)
    with torch.no_grad():
        expected = (autoencoder.decode(latents / 2 + 0.5).sample / 2 + 0.5).clamp(0, 1)
        assert torch.allclose(TinyDecoder(autoencoder)(latents), expected, atol=1e-6)
