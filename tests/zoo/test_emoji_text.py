# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

from pyro_twist import zoo
from pyro_twist.rewards import PickScore, RewardWarning
from pyro_twist.zoo.data import plain_prompt
from pyro_twist.zoo.judges import load_judge, pieces

NAME = "emoji-text"
FOLDER = zoo.entry(NAME).folder


@pytest.fixture(scope="module")
def reward() -> zoo.Fidelity:
    return zoo.scorer(NAME, prompt="tiger face")


@pytest.fixture(scope="module")
def judge() -> zoo.PromptJudge:
    return zoo.judge(NAME)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    for call in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, call, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def draw(number: int, **options: Any) -> torch.Tensor:
    model = zoo.load(NAME, num_inference_steps=3, **options)
    dim = -1 if model.plate is None else -2
    with torch.no_grad(), pyro.plate("samples", number, dim=dim):
        return model.decode(model())


def pictures(held_out: bool) -> tuple[torch.Tensor, list[str]]:
    shown = zoo.images(NAME, held_out=held_out).one_per_subject()
    return shown.unit, [plain_prompt(name) for name in shown.names]


def first(similarity: torch.Tensor, names: tuple[str, ...], prompts: list[str], most: int) -> float:
    """The share of pictures whose prompt is among the first of all names."""
    right = torch.tensor([names.index(prompt) for prompt in prompts])
    place = (similarity > similarity.gather(1, right[:, None])).sum(1)
    return float((place < most).double().mean())


# Files


def test_what_the_zoo_says() -> None:
    about = zoo.entry(NAME)
    assert about.kind == "text-to-image" and about.classes == ()
    assert about.event_shape == (3, 16, 16)
    assert about.num_inference_steps == 50 and about.guidance_scale > 1
    assert zoo.models()[NAME] == about.description


def test_files_are_small_and_in_half_precision() -> None:
    from safetensors.torch import load_file

    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 25e6
    for part in ("scorer", "judge"):
        files = (path for path in (FOLDER / part).iterdir() if path.is_file())
        assert sum(path.stat().st_size for path in files) < 3e6
    for path in FOLDER.rglob("*.safetensors"):
        kinds = {weight.dtype for weight in load_file(path).values()}
        assert kinds <= {torch.float16, torch.int64}, path


def test_scorer_knows_no_held_out_name_and_the_judge_all(
    reward: zoo.Fidelity, judge: zoo.PromptJudge
) -> None:
    _, training = pictures(held_out=False)
    _, held_out = pictures(held_out=True)
    assert set(reward.names) == set(training) and not set(reward.names) & set(held_out)
    assert set(judge.names) == {*training, *held_out}
    assert len(set(judge.names)) == len(judge.names)


def test_scorer_and_judge_have_nothing_in_common(
    reward: zoo.Fidelity, judge: zoo.PromptJudge
) -> None:
    from transformers import CLIPModel

    assert isinstance(reward.towers.model, CLIPModel) and not isinstance(judge, CLIPModel)
    kinds = [{type(part) for part in net.modules()} for net in (reward.towers.model, judge)]
    assert torch.nn.BatchNorm2d in kinds[1] - kinds[0] and torch.nn.LayerNorm in kinds[0] - kinds[1]
    files = [(FOLDER / part / "model.safetensors").read_bytes() for part in ("scorer", "judge")]
    assert files[0] != files[1]
    assert not (FOLDER / "judge" / "tokenizer.json").exists()


def test_notice_and_card_name_every_file() -> None:
    repository = Path(zoo.__file__).parents[2]
    if not (repository / "NOTICE").exists():
        pytest.skip("not a checkout")
    own = (FOLDER / "NOTICE.md").read_text().removeprefix("# Notice\n\n")
    assert f"pyro_twist/zoo/{NAME}\n\n{own}" in (repository / "NOTICE").read_text()
    card = (FOLDER / "MODEL_CARD.md").read_text()
    for file in {path.name for path in FOLDER.iterdir()} - {"MODEL_CARD.md"}:
        assert file in card, f"the model card does not mention {file}"


# The pipeline


def test_pipeline_is_one_of_diffusers() -> None:
    from diffusers import StableDiffusionPipeline

    pipe = zoo.pipeline(NAME)
    same = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    assert type(pipe) is type(same) and pipe.safety_checker is None
    for part in ("unet", "vae", "text_encoder"):
        own, other = getattr(pipe, part), getattr(same, part)
        assert not own.training and not any(p.requires_grad for p in own.parameters())
        for one, two in zip(own.parameters(), other.parameters(), strict=True):
            assert one.dtype == torch.float32 and torch.equal(one, two.float())
    prompt = "red apple"
    assert pipe.tokenizer(prompt).input_ids == same.tokenizer(prompt).input_ids


def test_loading_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    zoo.pipeline(NAME)
    zoo.scorer(NAME, prompt="red apple")
    zoo.judge(NAME)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_samples_are_pictures(scheduler: str) -> None:
    images = draw(2, prompt=["red apple", "tiger face", ""], scheduler=scheduler)
    assert images.shape == (2, 3, 3, 16, 16)
    assert 0.0 <= float(images.min()) <= float(images.max()) <= 1.0


def test_prompt_negative_prompt_and_guidance_matter() -> None:
    def one(**options: Any) -> torch.Tensor:
        pyro.set_rng_seed(1)
        return draw(2, **options)

    apple = one(prompt="red apple")
    assert torch.equal(
        apple, one(prompt="red apple", guidance_scale=zoo.entry(NAME).guidance_scale)
    )
    assert not torch.allclose(apple, one(prompt="tiger face"), atol=1e-3)
    assert not torch.allclose(apple, one(prompt="red apple", guidance_scale=1.0), atol=1e-3)
    assert not torch.allclose(apple, one(prompt="red apple", negative_prompt="flag"), atol=1e-3)
    assert torch.equal(one(), one(prompt="", guidance_scale=1.0))
    assert torch.allclose(apple, one(prompt=["red apple"])[:, 0], atol=1e-4)


def test_the_model_takes_prompts_and_no_labels() -> None:
    model = zoo.load(NAME, prompt="red apple")
    assert model.num_inference_steps == 50 and tuple(model.event_shape) == (3, 16, 16)
    assert model.prompts == ("red apple",)
    with pytest.raises(ValueError, match="label=3 is for models of classes.*give prompt"):
        zoo.load(NAME, label=3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="scheduler='pndm'.*try one of ddpm, ddim"):
        zoo.load(NAME, prompt="red apple", scheduler="pndm")  # type: ignore[call-overload]


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="'emoji' is a model of images; try a model of text-to"):
        zoo.pipeline("emoji")
    with pytest.raises(ValueError, match="'text' is a model of text; try a model of text-to-image"):
        zoo.scorer("text", prompt="good")
    with pytest.raises(ValueError, match="'emoji-text' is a model of text-to-image; try"):
        zoo.classifier(NAME)
    with pytest.raises(ValueError, match="'cats' is not in the zoo"):
        zoo.scorer("cats", prompt="cat")


def test_pictures_are_those_of_the_emoji() -> None:
    assert torch.equal(zoo.images(NAME).pixels, zoo.images("emoji").pixels)


# The scorer


def test_scorer_finds_the_names_of_pictures(reward: zoo.Fidelity, judge: zoo.PromptJudge) -> None:
    """About 0.94 of the pictures are found first; by chance 0.0006 would be."""
    images, prompts = pictures(held_out=False)
    assert first(reward.logits(images[::5], judge.names), judge.names, prompts[::5], 1) > 0.85
    images, prompts = pictures(held_out=True)
    # About 0.15; by chance 0.003.
    assert first(reward.logits(images, judge.names), judge.names, prompts, 5) > 0.08


def test_fidelity_is_the_weight_of_evidence_for_the_prompt(reward: zoo.Fidelity) -> None:
    images, prompts = pictures(held_out=False)
    # With the picture of the prompt, for which the prompt itself would be the strongest of names.
    images = images[[0, 1, prompts.index("tiger face")]]
    for prompt in ("tiger face", "green tiger"):
        others = [name for name in reward.names if name != prompt]
        p = reward.logits(images, [prompt, *others]).double().softmax(-1)
        odds = (p[:, 0] / p[:, 1:].sum(-1)).log()
        found = reward.with_prompt(prompt)(images)
        torch.testing.assert_close(found, odds + torch.tensor(len(others)).log(), atol=1e-3, rtol=0)


def test_fidelity_tells_the_picture_of_its_prompt(reward: zoo.Fidelity) -> None:
    images, prompts = pictures(held_out=False)
    values = reward(images)
    place = prompts.index("tiger face")
    assert values.shape == (len(images),) and values.dtype == torch.float64
    assert int((values > values[place]).sum()) < 10 and float(values[place]) > 2.0
    assert float(values.median()) < 0.0
    assert reward.name == "fidelity of 'tiger face'"


def test_another_prompt_shares_the_network(reward: zoo.Fidelity) -> None:
    images = torch.rand(3, 3, 16, 16)
    other = reward.with_prompt("red apple")
    assert other.towers is reward.towers and other.name == "fidelity of 'red apple'"
    assert torch.equal(other(images), zoo.scorer(NAME, prompt="red apple")(images))
    assert not torch.allclose(other(images), reward(images))
    torch.testing.assert_close(reward.with_prompt("Red Apple")(images), other(images))


def test_fidelity_rises_along_its_gradient(reward: zoo.Fidelity) -> None:
    assert reward.differentiable
    images = (0.3 + 0.4 * torch.rand(4, 3, 16, 16)).requires_grad_()
    before = reward(images)
    before.sum().backward()
    assert images.grad is not None and bool(images.grad.isfinite().all())
    size = images.grad.flatten(1).norm(dim=1)[:, None, None, None]
    assert float(size.min()) > 0
    after = reward((images + 0.05 * images.grad / size).detach())
    assert bool((after > before).all())


def test_unknown_words_are_guessed_and_long_prompts_cut(reward: zoo.Fidelity) -> None:
    images = torch.rand(2, 3, 16, 16)
    assert bool(reward.with_prompt("zorb ü")(images).isfinite().all())
    with pytest.warns(RewardWarning, match="the network reads the first 12"):
        reward.with_prompt("a very long prompt " * 8)(images)
    with pytest.raises(ValueError, match="prompt=int; give one string"):
        zoo.scorer(NAME, prompt=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        reward(2.0 * images)


def test_scorer_is_a_clip_that_other_rewards_take(reward: zoo.Fidelity) -> None:
    other = PickScore.from_pretrained("tiger face", str(FOLDER / "scorer"), local_files_only=True)
    images = torch.rand(3, 3, 16, 16)
    expected = reward.logits(images, ["tiger face"])[:, 0].double()
    torch.testing.assert_close(other(images), expected, atol=1e-3, rtol=0)
    larger = torch.nn.functional.interpolate(images, scale_factor=4)
    expected = reward.logits(larger, ["tiger face"])[:, 0].double()
    torch.testing.assert_close(other(larger), expected, atol=1e-3, rtol=0)


# The judge


def test_judge_finds_the_names_of_all_pictures(judge: zoo.PromptJudge) -> None:
    for held_out in (False, True):
        images, prompts = pictures(held_out)
        found = judge.log_probs(images[::3], judge.names)
        assert first(found, judge.names, prompts[::3], 1) > 0.85


def test_judge_is_a_distribution_over_prompts(judge: zoo.PromptJudge) -> None:
    images, prompts = pictures(held_out=True)
    found = judge.log_probs(images[:7], prompts[:5])
    assert found.shape == (7, 5)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(7))
    everything = judge.log_probs(images[:7], judge.names)
    index = judge.names.index(prompts[2])
    probability, rank = (f(images[:7], prompts[2]) for f in (judge.probability, judge.rank))
    torch.testing.assert_close(probability, everything[:, index].exp())
    assert rank.shape == (7,) and int(rank[2]) <= 50
    order = everything.argsort(-1, descending=True)
    assert rank.tolist() == [1 + row.tolist().index(index) for row in order]


def test_judge_adds_a_prompt_that_is_no_name(judge: zoo.PromptJudge) -> None:
    images, _ = pictures(held_out=True)
    prompt = "pink elephant on a mat"
    added = judge.log_probs(images[:4], [*judge.names, prompt])
    found = judge.probability(images[:4], prompt).log()
    torch.testing.assert_close(found, added[:, -1], atol=1e-3, rtol=0)
    assert (judge.rank(images[:4], prompt) >= 1).all()
    assert (judge.rank(images[:4], prompt) <= len(judge.names) + 1).all()
    name = judge.names[5]
    assert torch.equal(judge.rank(images, name.upper()), judge.rank(images, name))
    torch.testing.assert_close(judge.embed(["a-b C"]), judge.embed(["a b c"]))
    assert pieces("red car") == [
        "red",
        "car",
        "red car",
        "#<re",
        "#red",
        "#ed>",
        "#<ca",
        "#car",
        "#ar>",
    ]


def test_judge_survives_a_round_trip(judge: zoo.PromptJudge, tmp_path: Path) -> None:
    judge.save(tmp_path)
    again = load_judge(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    assert again.names == judge.names and not again.training
    assert torch.equal(again.logits(images, ["a"]), judge.logits(images, ["a"]))


@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (torch.rand(3, 16, 16), ["a"], "images are torch.float32 of shape"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["a"], "images are torch.uint8"),
        (torch.rand(1, 3, 16, 16), [], "give a list of one prompt or more"),
        (torch.rand(1, 3, 16, 16), "red apple", "give a list of one prompt or more"),
        (torch.rand(1, 3, 16, 16), ["red apple", " "], "a prompt is empty"),
    ],
)
def test_judge_refuses(judge: zoo.PromptJudge, images: Any, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge.log_probs(images, prompts)


# Recipes


def test_a_short_training_is_saved_and_read(tmp_path: Path) -> None:
    from pyro_twist.zoo.recipes import emoji_data, emoji_scorer
    from pyro_twist.zoo.recipes.emoji_text import make_tokenizer
    from pyro_twist.zoo.scorers import load_scorer

    names = ["RED APPLE", "RED APPLE", "FOX-FACE", "JAPAN FLAG"]
    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    held_out = torch.tensor([False, False, True, False])
    data = emoji_data.EmojiData(
        images, torch.tensor([3, 3, 2, 7]), torch.arange(4), held_out, names
    )
    task = emoji_scorer.Task.of(data)
    assert task.names == ("fox face", "japan flag", "red apple")
    assert task.which.tolist() == [2, 2, 0, 1]
    assert task.weights().tolist() == [0.5, 0.5, 1.0, 1.0]
    options = argparse.Namespace(steps=2, batch_size=6, lr=1e-3)
    make_tokenizer(list(task.names), tmp_path / "tokenizer")
    emoji_scorer.train_scorer(task, tmp_path / "tokenizer", tmp_path / "scorer", options)
    assert load_scorer(tmp_path / "scorer", "red apple").names == task.names
    emoji_scorer.train_judge(task, tmp_path / "judge", options)
    for part in ("scorer", "judge"):
        compare = emoji_scorer.load_compare(part, tmp_path / part)
        found = emoji_scorer.accuracy(compare, task)
        assert found["names"] == 3 and found["held_out_pictures"]["pictures"] == 1
        assert found["training_pictures"]["top5"] == 1.0


def test_contrastive_loss_counts_no_picture_of_the_same_name_as_wrong() -> None:
    from pyro_twist.zoo.recipes.emoji_scorer import contrastive_loss

    right = torch.tensor([0, 0, 1])
    perfect = torch.tensor([[40.0, 0.0], [40.0, 0.0], [0.0, 40.0]])
    # The name with two pictures can give each no more than one half.
    expected = 0.5 * (0.5 * torch.tensor(2.0).log())
    torch.testing.assert_close(contrastive_loss(perfect, right), expected)
    assert float(contrastive_loss(-perfect, right)) > 30.0


def test_look_aheads_are_pictures_and_white_stays_white() -> None:
    from pyro_twist.zoo.recipes.emoji_scorer import blur, look_ahead

    images, _ = pictures(held_out=True)
    changed = look_ahead(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert 0.0 <= float(changed.min()) <= float(changed.max()) <= 1.0
    width = torch.linspace(0.0, 3.0, len(images))
    torch.testing.assert_close(blur(torch.ones_like(images), width), torch.ones_like(images))
    torch.testing.assert_close(blur(images, 0.0 * width), images)
    dot = torch.ones(1, 3, 16, 16)
    dot[:, :, 8, 8] = 0.0
    blurred = 1.0 - blur(dot, torch.ones(1))
    torch.testing.assert_close(blurred.sum((-1, -2)), torch.ones(1, 3), atol=1e-3, rtol=0)
    assert float(blurred.max()) < 0.2


def test_accuracy_on_file_is_that_of_a_reader_of_names() -> None:
    for part in ("scorer", "judge"):
        found = json.loads((FOLDER / part / "accuracy.json").read_text())
        chance = found["chance"]
        assert found["names"] == len(zoo.judge(NAME).names)
        assert found["training_pictures"]["top1"] > 500 * chance["top1"]
        assert found["training_look_aheads"]["top1"] > 300 * chance["top1"]
        assert found["held_out_pictures"]["top5"] > 10 * chance["top5"]


def test_report_writes_its_table() -> None:
    from pyro_twist.zoo.recipes.emoji_text_report import SHOWN, Readers, figures

    readers = Readers(zoo.images(NAME, held_out=None).one_per_subject())
    assert set(SHOWN["trained on"]) | set(SHOWN["held out"]) <= set(readers.names)
    found = readers.ceiling(SHOWN["held out"])
    assert found["judge"]["top5"] > 0.5 and found["judge"]["pictures"] == len(SHOWN["held out"])
    level = {"1%": 0.1, "50%": 0.2}
    parts = ("scorer", "judge")
    accuracy = {p: json.loads((FOLDER / p / "accuracy.json").read_text()) for p in parts}
    part = {"samples": found, "pictures": found, "distance": level}
    report: dict[str, Any] = {
        "parameters": {"unet": 7},
        "training_log": {"steps": 3, "hours": 0.1, "loss": {"1": 0.5}},
        "names": 9,
        "samples_per_name": 1,
        "steps": 50,
        "scheduler": "ddpm",
        "guidance_scale": 4.0,
        "training": part,
        "held_out": part,
        "chance": {"top1": 0.1, "top5": 0.5, "median_rank": 5.0},
        "scale_steps": 25,
        "guidance": {"7.0": found},
        "distance_held_out_pictures": level,
        "accuracy": accuracy,
    }
    text = figures(report)
    assert (
        "guidance 4" in text
        and "| 7 | 6 | judge |" in text
        and "| any | chance |" in text
        and "training steps" in text
    )
