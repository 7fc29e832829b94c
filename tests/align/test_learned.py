# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What the job shows and keeps of a twist that was learned."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_twist import align
from pyro_twist.algorithms.registry import _ALGORITHMS as _METHODS
from pyro_twist.align import AlignOptions, Outcome
from pyro_twist.align.learned import reuse_code, twist_file
from pyro_twist.align.methods import Method, Setting, register_method
from pyro_twist.infer import ImportanceSampling, SMCResult, TrustRegionTwist, TwistedSMC
from pyro_twist.twists import LearnedTwist, tilt
from pyro_twist.twists.summary import Direction, Panel

STEPS, SIZE = 6, 16


def run(tmp_path: Path, **options: Any) -> Outcome:
    given = {"model": "digits", "steps": STEPS, "particles": SIZE, "out": tmp_path}
    return align.run(AlignOptions(**{**given, "methods": ("fk", "tri-tsmc"), **options}))


def page(outcome: Outcome) -> str:
    return align.write_report(outcome).read_text(encoding="utf-8")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.*")}


class Mine(LearnedTwist):
    """A family of a user's own, whose push is the same everywhere."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def get_posterior(self, name: str, prior: Any) -> Any:
        return tilt(prior, self.shift)

    def summary(self, at: torch.Tensor | None = None) -> list[Panel]:
        assert at is not None
        push = torch.full_like(at, 0.5)
        return [Panel("My words", "It is brighter."), Direction("My push", "Up.", at, push)]


def make_mine(setting: Setting) -> TrustRegionTwist:
    options = {**setting.resampled, "num_particles": 4}
    return TrustRegionTwist(setting.model, Mine(setting.model), num_iterations=3, **options)


@pytest.fixture
def mine() -> Iterator[None]:
    register_method(Method("mine", "Mine", "Does it.", "samples of the tilted law", make_mine))
    yield
    del _METHODS["mine"]


def test_the_twist_is_kept_shown_and_saved(tmp_path: Path) -> None:
    outcome = run(tmp_path, classes=("3",))
    arm = outcome.arm("tri-tsmc")
    assert outcome.learned == {"tri-tsmc": arm.twist}
    assert 1 <= len(arm.iterations) <= 3
    text = page(outcome)
    assert "What TRI-TSMC has learned" in text and "What FK steering" not in text
    words = ("Where it pushes", "How hard it pushes", "How far an early look is trusted")
    assert all(word in text for word in (*words, "accepted step", "twist.safetensors"))
    assert {"push-tri-tsmc.png", "twist-tri-tsmc.png", "twist.safetensors"} <= files(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert [len(method["iterations"]) for method in found] == [0, len(arm.iterations)]
    assert found[1]["iterations"][0]["tau"] == arm.iterations[0].tau


@pytest.mark.parametrize("classes", [(), ("3",), ("3", "8")])
def test_the_lines_of_the_report_draw_with_the_same_twist(
    tmp_path: Path, classes: tuple[str, ...]
) -> None:
    outcome = run(tmp_path, classes=classes, methods=("tri-tsmc",))
    arm = outcome.arm("tri-tsmc")
    names: dict[str, Any] = {}
    exec(reuse_code(arm, outcome), names)
    ours, theirs = arm.twist.state_dict(), names["twist"].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    plate = (len(classes),) if len(classes) > 1 else ()
    assert names["samples"].shape == (64, *plate, 1, 8, 8)
    options = {"max_plate_nesting": len(plate), "seed": 1, "progress": False}
    options["population_plate"] = "classes" if plate else None
    pairs = [(arm.twist.model, arm.twist), (names["model"], names["twist"])]
    again = [TwistedSMC(*pair, 4, **options).run() for pair in pairs]
    assert torch.equal(again[0].log_weights, again[1].log_weights)


def test_the_push_of_brightness_brightens(tmp_path: Path) -> None:
    from PIL import Image

    page(run(tmp_path, classes=("3", "8"), particles=64))
    with Image.open(tmp_path / "push-tri-tsmc.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(float)
    # the last picture of each row: red where it brightens, which is everywhere but for noise
    red, blue = (pixels[..., 0] - pixels[..., 2] > 60), (pixels[..., 2] - pixels[..., 0] > 60)
    assert red.sum() > 10 * blue.sum() and red.sum() > 5000


def test_iterations_are_plotted(tmp_path: Path) -> None:
    page(run(tmp_path))
    assert (tmp_path / "iterations-tri-tsmc.png").stat().st_size > 5000


def test_methods_that_do_not_learn_have_no_page_of_it(tmp_path: Path) -> None:
    outcome = run(tmp_path, methods=("fk",))
    assert outcome.learned == {}
    assert twist_file(outcome.arm("fk"), outcome) is None
    assert "has learned" not in page(outcome)
    assert "twist.safetensors" not in files(tmp_path)


@pytest.mark.usefixtures("mine")
def test_a_family_of_ones_own_speaks_for_itself(tmp_path: Path) -> None:
    outcome = run(tmp_path, methods=("tri-tsmc", "mine"))
    text = page(outcome)
    assert "What Mine has learned" in text and "My words. It is brighter." in text
    assert "My push. Up." in text
    assert "twist-mine.safetensors, for the load method" in text
    found = files(tmp_path)
    assert {"push-mine.png", "twist-mine.safetensors", "twist.safetensors"} <= found
    page(run(tmp_path, methods=("base",)))
    assert files(tmp_path) == {
        *("report.html", "results.json", "grid.png", "rewards.png", "samples/base.npz")
    }


def test_what_is_no_image_is_told_in_words(tmp_path: Path, mine: None) -> None:
    outcome = run(tmp_path, methods=("mine",))
    outcome.arm("mine").twist.model.decode = lambda x: x.flatten(1)
    assert "My push. Up." in page(outcome)
    assert "push-mine.png" not in files(tmp_path)


def test_diagnostics_are_those_of_the_last_pass(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    for name, passes in (("tri-tsmc", 4), ("fk", 1)):
        arm = outcome.arm(name)
        assert (arm.passes, arm.last.num_particles) == (passes, SIZE // passes)
        assert arm.result.num_particles == SIZE
        assert arm.last.diagnostics is not None


def test_seconds_are_of_the_whole_run(tmp_path: Path) -> None:
    class Slow(ImportanceSampling):
        def run(self, *args: Any, **kwargs: Any) -> SMCResult:
            time.sleep(0.2)
            return super().run(*args, **kwargs)

    def make(setting: Setting) -> Slow:
        return Slow(setting.model, **setting.common)

    register_method(Method("slow", "Slow", "Waits.", "samples of the model", make))
    try:
        arm = run(tmp_path, methods=("slow",)).arm("slow")
    finally:
        del _METHODS["slow"]
    assert arm.seconds >= arm.result.seconds + 0.2


def test_tilted_model_is_that_of_the_job() -> None:
    options = AlignOptions(model="digits", rewards=("bright", "symmetric"), scales=(2.0, -1.0))
    model = align.tilted_model(options)
    assert model.scales == {"bright": 2.0, "symmetric": -1.0}
    assert len(model.timesteps) == 50
    derived = align.tilted_model(AlignOptions(model="digits", steps=3, strengths=(2.0,)))
    assert derived.scales["bright"] > 1
