# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The job on pipelines of diffusers: prompts, folders, PNG files, what goes on after a stop."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_twist import align
from pyro_twist.align import AlignmentFailed, AlignOptions, OptionError, run_prompts
from pyro_twist.align.loading import find_dtype, make_scheduler
from pyro_twist.align.prompts import prompt_folder
from pyro_twist.rewards import Reward
from tests.diffusion.pipes import PIPES

PROMPTS = ("a blue cat", "a red fox")
METHODS = ("base", "fk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pipes") / "sd"
    PIPES["sd"]().save_pretrained(path)
    return path


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> AlignOptions:
    return AlignOptions(
        model=str(folder),
        rewards=("red",),
        methods=METHODS,
        particles=3,
        steps=3,
        out=tmp_path / "out",
    )


class Counting(Reward):
    """Brightness, which can be told to fail from a call on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.batches, self.fails_at = 0, fails_at
        super().__init__(self._brightness, name="counting")

    def _brightness(self, images: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        if self.fails_at is not None and self.batches >= self.fails_at:
            raise RuntimeError("the scorer is gone")
        return images.double().mean((1, 2, 3))


def test_each_prompt_has_its_own_folder(options: AlignOptions) -> None:
    done = run_prompts(options, PROMPTS)
    assert [one.prompt for one in done] == list(PROMPTS)
    assert [one.folder.name for one in done] == ["a-blue-cat", "a-red-fox"]
    for one in done:
        assert {"results.json", "report.html", "grid.png"} <= {p.name for p in one.folder.iterdir()}
        assert one.results["finished"] and one.results["options"]["prompt"] == one.prompt
    index = (options.out / "index.html").read_text()
    assert all(prompt in index for prompt in PROMPTS)
    known = json.loads((options.out / "prompts.json").read_text())["prompts"]
    assert known == {"a blue cat": "a-blue-cat", "a red fox": "a-red-fox"}


def test_a_prompt_does_not_depend_on_the_others(options: AlignOptions, tmp_path: Path) -> None:
    _, both = run_prompts(options, PROMPTS)
    [alone] = run_prompts(replace(options, out=tmp_path / "alone"), PROMPTS[1:])
    assert both.results["methods"][1]["scores"] == alone.results["methods"][1]["scores"]


def test_what_is_finished_is_not_run_again(options: AlignOptions) -> None:
    reward = Counting()
    first = run_prompts(replace(options, rewards=(reward,)), PROMPTS[:1])
    batches = reward.batches
    again = run_prompts(replace(options, rewards=(reward,)), PROMPTS)
    assert again[0].outcome is None and again[0].results == first[0].results
    assert again[1].outcome is not None
    assert reward.batches == 2 * batches


def test_other_options_run_it_again(options: AlignOptions) -> None:
    run_prompts(options, PROMPTS[:1])
    [again] = run_prompts(replace(options, seed=1), PROMPTS[:1])
    assert again.outcome is not None and again.results["options"]["seed"] == 1


@pytest.mark.filterwarnings("ignore:reward 'counting' failed")
def test_a_failing_reward_loses_no_finished_prompt(options: AlignOptions, tmp_path: Path) -> None:
    counted = Counting()
    run_prompts(replace(options, rewards=(counted,), out=tmp_path / "x"), PROMPTS[:1])
    failing = replace(options, rewards=(Counting(fails_at=counted.batches + 2),))
    with pytest.raises(AlignmentFailed, match="the scorer is gone"):
        run_prompts(failing, PROMPTS)
    assert "1 of 2 prompts are finished" in (options.out / "index.html").read_text()
    done = run_prompts(replace(options, rewards=(Counting(),)), PROMPTS)
    assert [one.outcome is None for one in done] == [True, False]


def test_a_run_that_was_interrupted_goes_on(options: AlignOptions) -> None:
    class Interrupting(Counting):
        def _brightness(self, images: torch.Tensor) -> torch.Tensor:
            if self.batches == 2:
                raise KeyboardInterrupt
            return super()._brightness(images)

    with pytest.raises(AlignmentFailed, match="interrupted"):
        run_prompts(replace(options, rewards=(Interrupting(),)), PROMPTS[:1])
    [one] = run_prompts(replace(options, rewards=(Counting(),)), PROMPTS[:1])
    assert one.outcome is not None and one.results["finished"] and not one.results["error"]


def test_a_png_says_how_it_was_made(options: AlignOptions) -> None:
    [one] = run_prompts(replace(options, negative_prompt="bad photo"), ["a blue cat"])
    paths = sorted((one.folder / "samples" / "fk").glob("*.png"))
    assert [path.name for path in paths] == ["0.png", "1.png", "2.png"]
    saved = np.load(one.folder / "samples" / "fk.npz")
    for place, path in enumerate(paths):
        image = Image.open(path)
        pixels = np.asarray(image).transpose(2, 0, 1)
        assert (pixels == saved["samples"][place, 0]).all()
        said = image.text  # type: ignore[attr-defined]
        assert said["prompt"] == "a blue cat" and said["negative prompt"] == "bad photo"
        assert said["seed"] == "0" and said["particle"] == str(place) and said["method"] == "fk"
        assert float(said["reward:red"]) == pytest.approx(saved["reward:red"][place, 0], rel=1e-4)
        assert float(said["weight"]) == pytest.approx(saved["weights"][place, 0], rel=1e-4)
        # the reward that is written is that of the pixels that are, up to their rounding
        red = pixels[0] / 255 - pixels[1:].mean(0) / 255
        assert float(said["reward:red"]) == pytest.approx(red.mean(), abs=0.005)
        assert said["command"].startswith("pyro-twist align")


def test_samples_are_the_pipelines_law_without_reward(options: AlignOptions) -> None:
    """With lambda = 0 every method returns what the model draws, whatever the reward."""
    outcome = align.run(replace(options, prompt="a blue cat", scales=(0.0,)), save=False)
    for arm in outcome.arms:
        assert torch.allclose(arm.weights, torch.full_like(arm.weights, 1 / 3))


def test_prompts_that_look_alike_have_different_folders() -> None:
    out = Path("out")
    texts = [
        "red apple",
        "Red apple",
        "red  apple",
        "red apple!",
        "äpfel",
        "",
        "x" * 200,
        "x" * 201,
    ]
    folders = [prompt_folder(out, text) for text in texts]
    assert len(set(folders)) == len(texts)
    assert folders[0] == out / "red-apple"
    assert all(folder.parent == out for folder in folders)
    assert max(len(folder.name) for folder in folders) <= 57
    assert prompt_folder(out, None) != prompt_folder(out, "unconditional")


def test_the_prompt_reaches_functions_and_rewards(options: AlignOptions) -> None:
    seen = set()

    def scored(images: torch.Tensor, prompt: str) -> torch.Tensor:
        seen.add(prompt)
        return images.mean((1, 2, 3))

    run_prompts(replace(options, rewards=(scored,)), PROMPTS)
    assert seen == set(PROMPTS)


def test_a_judge_is_measured_and_not_optimised(options: AlignOptions, tmp_path: Path) -> None:
    [plain] = run_prompts(options, PROMPTS[:1])
    [judged] = run_prompts(replace(options, judge="bright", out=tmp_path / "j"), PROMPTS[:1])
    without, with_one = plain.results["methods"][1], judged.results["methods"][1]
    assert without["scores"][0]["judge"] is None
    assert 0 < with_one["scores"][0]["judge"] < 1
    assert without["scores"][0]["reward_mean"] == with_one["scores"][0]["reward_mean"]
    assert without["calls"] == with_one["calls"]
    assert "<dt>judge</dt>" not in (plain.folder / "report.html").read_text()
    assert "<dt>judge</dt>" in (judged.folder / "report.html").read_text()


def test_a_folder_with_other_files_is_left_alone(options: AlignOptions) -> None:
    options.out.mkdir()
    (options.out / "thesis.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"holds files .* such as 'thesis\.txt'"):
        run_prompts(options, PROMPTS)
    assert [path.name for path in options.out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("kind", ["sd3", "dit", "ddpm"])
def test_other_kinds(kind: str, options: AlignOptions, tmp_path: Path) -> None:
    torch.manual_seed(0)
    PIPES[kind]().save_pretrained(tmp_path / kind)
    prompt = {"sd3": ["a cat"], "dit": ["3"], "ddpm": []}[kind]
    [one] = run_prompts(replace(options, model=str(tmp_path / kind)), prompt)
    assert one.results["methods"][1]["scores"][0]["log_normalizer"] is not None
    assert one.folder.name == {"sd3": "a-cat", "dit": "3", "ddpm": "unconditional"}[kind]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompt": None}, "needs a prompt"),
        ({"classes": ("3",)}, "has prompts instead"),
        ({"height": 13}, "try 12 or 14"),
        ({"scheduler": "pndm"}, "no scheduler 'pndm'; there are: ddpm, ddim, euler-ancestral"),
        ({"dtype": "int8"}, "no precision 'int8'"),
        ({"device": "tpu"}, "--device tpu"),
        ({"judge": "nice"}, "no reward 'nice'"),
        ({"rewards": ("aesthetic",)}, "say which head"),
        ({"rewards": ("clipscore:model=/nowhere",)}, "could not be loaded"),
        ({"rewards": ("clipscore:weights=3",)}, "clipscore"),
        ({"lookahead_decoder": "/nowhere"}, "--lookahead-decoder /nowhere"),
    ],
)
def test_wrong_options(
    options: AlignOptions, given: dict[str, object], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OptionError, match=told):
        run_prompts(replace(options, **{"prompt": "a blue cat", **given}))  # type: ignore[arg-type]


def test_wrong_models(options: AlignOptions, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no model_index\.json"):
        run_prompts(replace(options, model=str(tmp_path)), PROMPTS)
    with pytest.raises(OptionError, match="or give a pipeline's folder, or owner/name"):
        run_prompts(replace(options, model="emojis"), PROMPTS)
    with pytest.raises(OptionError, match="given twice"):
        run_prompts(options, ["a cat", "a cat"])
    with pytest.raises(OptionError, match="--width is for pipelines"):
        align.run(AlignOptions(model="emoji", width=32), save=False)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of numpy, in EulerAncestral
def test_defaults_of_precision_and_scheduler(options: AlignOptions) -> None:
    assert find_dtype(replace(options, device="cpu")) is torch.float32
    assert find_dtype(replace(options, dtype="bfloat16")) is torch.bfloat16
    pipe = PIPES["sd"]()
    usual = make_scheduler(None, pipe)
    assert type(usual).__name__ in ("DDIMScheduler", "DDPMScheduler")
    ancestral = make_scheduler("euler-ancestral", pipe)
    assert ancestral.config.beta_start == pipe.scheduler.config.beta_start
    with pytest.raises(OptionError, match="was trained for FlowMatch"):
        make_scheduler("ddpm", PIPES["sd3"]())
