# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The job on pipelines of diffusers: prompts, folders, PNG files, what goes on after a stop."""

import gc
import json
import re
import shlex
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_twist import align
from pyro_twist.align import AlignmentFailed, AlignOptions, OptionError, run_prompts
from pyro_twist.align.domains import find_domain
from pyro_twist.align.folder import alone_in, write_whole
from pyro_twist.align.loading import find_dtype, make_scheduler
from pyro_twist.align.pipelines import PipelineImages
from pyro_twist.align.prompts import prompt_folder, summary_table
from pyro_twist.align.report import strength_sentences
from pyro_twist.cli.app import main
from pyro_twist.rewards import Reward
from pyro_twist.rewards.preference import ensemble
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
    assert not again[0].fresh and again[0].results == first[0].results
    assert again[1].fresh
    assert reward.batches == 2 * batches


def test_other_options_run_it_again(options: AlignOptions) -> None:
    run_prompts(options, PROMPTS[:1])
    [again] = run_prompts(replace(options, seed=1), PROMPTS[:1])
    assert again.fresh and again.results["options"]["seed"] == 1


@pytest.mark.filterwarnings("ignore:reward 'counting' failed")
def test_a_failing_reward_loses_no_finished_prompt(options: AlignOptions, tmp_path: Path) -> None:
    counted = Counting()
    run_prompts(replace(options, rewards=(counted,), out=tmp_path / "x"), PROMPTS[:1])
    failing = replace(options, rewards=(Counting(fails_at=counted.batches + 2),))
    with pytest.raises(AlignmentFailed, match="the scorer is gone"):
        run_prompts(failing, PROMPTS)
    assert "1 of 2 prompts are finished" in (options.out / "index.html").read_text()
    done = run_prompts(replace(options, rewards=(Counting(),)), PROMPTS)
    assert [one.fresh for one in done] == [False, True]


def test_a_run_that_was_interrupted_goes_on(options: AlignOptions) -> None:
    class Interrupting(Counting):
        def _brightness(self, images: torch.Tensor) -> torch.Tensor:
            if self.batches == 2:
                raise KeyboardInterrupt
            return super()._brightness(images)

    with pytest.raises(AlignmentFailed, match="interrupted"):
        run_prompts(replace(options, rewards=(Interrupting(),)), PROMPTS[:1])
    [one] = run_prompts(replace(options, rewards=(Counting(),)), PROMPTS[:1])
    assert one.fresh and one.results["finished"] and not one.results["error"]


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches a killed process."""


class Prompted(Reward):
    """The mean of a channel, which the prompt's length chooses; holds what cannot be copied."""

    def __init__(self, prompt: str, calls: list[str], killed_at: int | None = None) -> None:
        self.prompt, self.calls, self.killed_at = prompt, calls, killed_at
        super().__init__(self._channel, name=f"channel of {prompt!r}")
        self.title = "channel"

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("networks are not to be copied")

    def with_prompt(self, prompt: str) -> "Prompted":
        return Prompted(prompt, self.calls, self.killed_at)

    def _channel(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append(self.prompt)
        if len(self.calls) == self.killed_at:
            raise Killed
        return images[:, len(self.prompt) % 3].double().mean((1, 2))


def index_of(options: AlignOptions) -> tuple[str, list[str]]:
    """The page of all prompts, and the folders that it leads to."""
    page = (options.out / "index.html").read_text()
    links = list(dict.fromkeys(re.findall(r'href="([^"]*)"', page)))
    assert all((options.out / link).is_file() for link in links)
    return page, [link.partition("/")[0] for link in links]


def test_a_killed_run_goes_on(options: AlignOptions) -> None:
    calls: list[str] = []
    run_prompts(replace(options, rewards=(Prompted("", calls),)), PROMPTS)
    killed = replace(options, rewards=(Prompted("", [], len(calls) - 2),), out=options.out / "k")
    with pytest.raises(Killed):
        run_prompts(killed, PROMPTS)
    page, folders = index_of(killed)
    assert "1 of 2 prompts are finished." in page and folders == ["a-blue-cat"]
    done = run_prompts(replace(killed, rewards=(Prompted("", []),)), PROMPTS)
    assert [one.fresh for one in done] == [False, True]
    page, folders = index_of(killed)
    assert "prompts are finished." not in page and folders == ["a-blue-cat", "a-red-fox"]


def test_the_index_does_not_show_what_is_being_replaced(options: AlignOptions) -> None:
    run_prompts(options, PROMPTS)
    killed = replace(options, rewards=(Prompted("", [], 2),))
    with pytest.raises(Killed):
        run_prompts(killed, PROMPTS[:1])
    page, folders = index_of(options)
    assert "0 of 1 prompts are finished." in page and folders == ["a-red-fox"]
    assert "with other options" in page


def test_the_index_keeps_earlier_prompts(options: AlignOptions) -> None:
    run_prompts(options, PROMPTS[:1])
    run_prompts(options, PROMPTS[1:])
    page, folders = index_of(options)
    assert folders == ["a-red-fox", "a-blue-cat"]
    assert "Means over the prompts" in page and "with other options" not in page
    run_prompts(replace(options, seed=1), PROMPTS[1:])
    page, folders = index_of(options)
    assert folders == ["a-red-fox", "a-blue-cat"] and "with other options" in page
    assert "one standard error between prompts" not in page, "means over one prompt"


def test_a_wrong_option_changes_nothing(options: AlignOptions) -> None:
    run_prompts(options, PROMPTS)
    before = {path: path.read_bytes() for path in options.out.rglob("*") if path.is_file()}
    with pytest.raises(OptionError, match="did you mean|there are"):
        run_prompts(replace(options, scheduler="dpm"), PROMPTS)
    assert {path: path.read_bytes() for path in options.out.rglob("*") if path.is_file()} == before


def test_the_usual_reward_goes_on_too(
    options: AlignOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PipelineImages, "default_reward", "red")
    run_prompts(replace(options, rewards=()), PROMPTS[:1])
    assert not run_prompts(replace(options, rewards=()), PROMPTS[:1])[0].fresh
    assert not run_prompts(options, PROMPTS[:1])[0].fresh


def test_a_folder_that_was_moved_goes_on(options: AlignOptions, tmp_path: Path) -> None:
    run_prompts(options, PROMPTS[:1])
    moved = replace(options, out=options.out.rename(tmp_path / "moved"))
    assert not run_prompts(moved, PROMPTS[:1])[0].fresh
    assert index_of(moved)[1] == ["a-blue-cat"]


def test_the_command_that_is_told_goes_on(
    options: AlignOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    [one] = run_prompts(options, PROMPTS[:1])
    words = shlex.split(one.results["command"])
    assert words[0] == "pyro-twist"
    with pytest.raises(SystemExit) as caught:
        main(words[1:])
    assert caught.value.code == 0
    assert f"finished earlier, in {one.folder}" in capsys.readouterr().out.replace("\n", "")


def test_a_function_that_has_changed_is_run_again(options: AlignOptions, tmp_path: Path) -> None:
    file = tmp_path / "scores.py"
    code = "def score(images):\n    return images[:, {}].mean((1, 2))\n"
    scored = replace(options, rewards=(f"{file}:score",))
    fresh = []
    for channel in (0, 0, 1):
        file.write_text(code.format(channel))
        fresh.append(run_prompts(scored, PROMPTS[:1])[0].fresh)
    assert fresh == [True, False, True]


def test_two_rewards_of_python_are_not_taken_for_one(options: AlignOptions) -> None:
    one = Reward(lambda images: images.mean((1, 2, 3)), name="one")
    other = Reward(lambda images: -images.mean((1, 2, 3)), name="other")
    assert run_prompts(replace(options, rewards=(one,)), PROMPTS[:1])[0].fresh
    assert not run_prompts(replace(options, rewards=(one,)), PROMPTS[:1])[0].fresh
    assert run_prompts(replace(options, rewards=(other,)), PROMPTS[:1])[0].fresh


def test_without_its_page_a_prompt_is_not_finished(options: AlignOptions) -> None:
    [one] = run_prompts(options, PROMPTS[:1])
    (one.folder / "report.html").unlink()
    assert run_prompts(options, PROMPTS[:1])[0].fresh


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_whole(tmp_path / "page", "first")

    def killed(*args: Any) -> None:
        raise Killed

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        write_whole(path, "second")
    assert path.read_text() == "first"
    assert [one.name for one in tmp_path.iterdir() if not one.name.startswith(".")] == ["page"]


def test_two_processes_do_not_write_to_one_folder(options: AlignOptions) -> None:
    pytest.importorskip("fcntl")
    run_prompts(options, PROMPTS[:1])
    with alone_in(options.out / "a-red-fox"):
        with pytest.raises(OptionError, match=r"another process is writing to .*a-red-fox"):
            run_prompts(options, PROMPTS)
    assert all(one.results["finished"] for one in run_prompts(options, PROMPTS))
    assert not list(options.out.rglob(".running"))


def test_samples_of_finished_prompts_are_let_go(options: AlignOptions) -> None:
    outcomes: list[weakref.ref[Any]] = []
    done = run_prompts(options, PROMPTS, tell=lambda one: outcomes.append(weakref.ref(one.outcome)))
    gc.collect()
    assert [outcome() for outcome in outcomes] == [None, None]
    assert all(one.fresh and one.outcome is None for one in done)


def test_rewards_of_python_take_each_prompt(options: AlignOptions) -> None:
    calls: list[str] = []
    both = ensemble([Prompted("", calls), Reward(lambda images: images[:, 0, 0, 0], name="corner")])
    done = run_prompts(replace(options, rewards=(Prompted("", calls), both)), PROMPTS)
    assert set(calls) == set(PROMPTS)
    headings, rows = summary_table(done)
    assert headings[1:3] == ["channel, mean", "mean of channel, corner, mean"]
    assert [row[0] for row in rows] == list(METHODS)
    # the sign that says that both prompts are in the mean
    assert all("±" in row[1] for row in rows)


def test_a_method_that_failed_for_a_prompt_is_averaged_over_the_others(
    options: AlignOptions,
) -> None:
    done = run_prompts(options, PROMPTS)
    base, _ = done[0].results["methods"]
    done[0].results["methods"] = [base]
    done[0].results["failed"] = {"fk": "all weights are zero"}
    headings, rows = summary_table(done)
    assert [row[0] for row in rows] == ["base", "fk"]
    assert "±" in rows[0][1] and "±" not in rows[1][1]
    assert summary_table([])[1] == []


def test_networks_are_shared_only_where_they_are_the_same(options: AlignOptions) -> None:
    domain = find_domain(options.model)
    [full] = run_prompts(options, PROMPTS[:1], domain=domain)
    [half] = run_prompts(replace(options, dtype="bfloat16"), PROMPTS[:1], domain=domain)
    assert full.results["facts"]["precision"] == "float32"
    assert half.results["facts"]["precision"] == "bfloat16"


def test_the_lines_for_a_saved_twist_name_the_model(options: AlignOptions) -> None:
    given = replace(options, methods=("tri-tsmc",), particles=8, negative_prompt="bad", height=16)
    [one] = run_prompts(given, PROMPTS[:1])
    page = (one.folder / "report.html").read_text()
    assert "negative_prompt=&#x27;bad&#x27;" in page and "height=16" in page


def test_how_well_lambda_is_known_is_said(options: AlignOptions) -> None:
    outcome = align.run(replace(options, prompt="a blue cat"), save=False)
    told = " ".join(strength_sentences(outcome))
    assert "measured over 16 samples" in told and "known to about 18 %" in told


def test_a_shipped_pipeline(tmp_path: Path) -> None:
    options = AlignOptions(
        model="emoji-text",
        rewards=("red",),
        methods=("base",),
        particles=2,
        steps=2,
        dtype="bfloat16",
        out=tmp_path,
    )
    words, blank = run_prompts(options, ["red apple", " "])
    assert words.results["facts"]["precision"] == "bfloat16"
    judged = [one.results["methods"][0]["scores"][0]["judge"] for one in (words, blank)]
    assert 0 <= judged[0] <= 1 and judged[1] is None
    with pytest.raises(OptionError, match="needs a --prompt"):
        run_prompts(replace(options, rewards=("fidelity",)), ["  "])


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
        ({"judge": "red:3"}, "--judge red: it has no options"),
        ({"judge": "red"}, "judges itself"),
        ({"rewards": ("aesthetic",)}, "say which head"),
        ({"rewards": ("clipscore:model=/nowhere",)}, "could not be loaded"),
        ({"rewards": ("clipscore:weights=3",)}, "clipscore"),
        ({"rewards": ("clipscore:modle=here",)}, "no option in 'modle=here'"),
        ({"lookahead_decoder": "/nowhere"}, "--lookahead-decoder /nowhere"),
    ],
)
def test_wrong_options(
    options: AlignOptions, given: dict[str, object], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OptionError, match=told):
        run_prompts(replace(options, **{"prompt": "a blue cat", **given}))  # type: ignore[arg-type]
    assert not options.out.exists()


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
