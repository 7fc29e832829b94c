# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What users may type, and the answers to what they may not."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_twist import align
from pyro_twist.align import AlignOptions, OptionError, find_domain
from pyro_twist.align.methods import find_methods
from pyro_twist.align.userrewards import load_function, make_rewards
from pyro_twist.cli import app


@pytest.mark.parametrize(
    ("given", "index"),
    [
        ("Food & Drink", 3),
        ("food", 3),
        ("FOOD", 3),
        ("drink", 3),
        ("food and drink", 3),
        ("3", 3),
        (3, 3),
        ("flags", 7),
        ("flag", 7),
        ("emotion", 0),
    ],
)
def test_classes_are_matched_tolerantly(given: str | int, index: int) -> None:
    assert find_domain("emoji").match_class(given) == index


@pytest.mark.parametrize("given", ["", "9", "-1", "fodo"])
def test_classes_are_not_guessed(given: str) -> None:
    with pytest.raises(OptionError, match=r"Food & Drink \(3\)"):
        find_domain("emoji").match_class(given)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("red", "red"),
        ("colour:orange", "colour:orange"),
        ("colour:#ff8800", "colour:#ff8800"),
        ("colour:#112233", "colour:#112233"),
        ("colour:rgb=112233", "colour:rgb=112233"),
        ("colour:rgb=0.2,0.3,0.4", "colour:rgb=0.2,0.3,0.4"),
        ("colour:0,0,1", "colour:0,0,1"),
        ("compressible:quality=50", "compressible:quality=50"),
        ("symmetric:top-bottom", "symmetric:top-bottom"),
        ("class:food", "class:Food & Drink"),
    ],
)
def test_rewards_by_name(given: str, name: str) -> None:
    [(made, reward)] = make_rewards(find_domain("emoji"), [given]).items()
    assert made == reward.name == name
    assert reward(torch.rand(2, 3, 16, 16)).shape == (2,)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("reed", "did you mean 'red'"),
        ("class:", "needs a class"),
        ("class:fodo", "did you mean 'Food & Drink"),
        ("compressible:qualty=3", "its options are: quality"),
        ("colour", "as in colour:orange"),
        ("colour:0.2,0.3", "no colour"),
        ("compressible:quality=abc", "quality is 'abc'; give a whole number"),
        ("compressible:quality=99", "from 1 to 95"),
        ("bright:3", "it has no options; leave out '3'"),
        ("r.py:", "as in r.py:score"),
        ("colour:reddish", "no colour"),
        ("no_such_module:function", "No module named"),
        ("no/such/file.py:function", "there is no file"),
        ("math:no_such", "has no 'no_such'"),
        ("math:pi", "no function but float"),
    ],
)
def test_rewards_that_do_not_exist(given: str, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        make_rewards(find_domain("emoji"), [given])


def test_rewards_may_not_repeat() -> None:
    with pytest.raises(OptionError, match="given twice"):
        make_rewards(find_domain("digits"), ["bright", "bright"])


def test_own_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def score(images):\n    return images.mean((1, 2, 3))\n\nclass A:\n    b = score\n"
    (tmp_path / "own_reward.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    paths = ["own_reward:score", "own_reward.py:score", f"{tmp_path}/own_reward.py:A.b"]
    for path in paths:
        assert load_function(path)(torch.ones(2, 1, 8, 8)).tolist() == [1.0, 1.0]
    assert list(make_rewards(find_domain("digits"), [paths[1]])) == ["score"]


def test_modules_that_fail_to_import(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(OptionError, match="ZeroDivisionError: division by zero"):
        load_function(f"{tmp_path}/bad.py:score")


def test_methods_keep_their_order() -> None:
    names = [method.name for method in find_methods(["fk", "base", "fk"])]
    assert names == ["base", "fk"]
    assert {"base", "best-of-n", "fk"} <= set(align.default_methods())
    with pytest.raises(OptionError, match="did you mean 'best-of-n'"):
        find_methods(["best_of_n"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"particles": 0},
        {"steps": 0},
        {"steps": 1001},
        {"seed": -1},
        {"ess_threshold": 1.5},
        {"ess_threshold": float("nan")},
        {"guidance": float("inf")},
        {"chunk_size": 0},
        {"scales": (float("nan"),)},
        {"strengths": ()},
        {"rewards": ("red", "blue"), "scales": (1.0, 2.0, 3.0)},
    ],
)
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    name = list(wrong)[-1].rstrip("s").split("_")[0]
    with pytest.raises(OptionError, match=f"--{name}"):
        AlignOptions(**wrong)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"model": "emojis"}, "did you mean 'emoji'"),
        ({"classes": ("food", 3)}, "given twice"),
        ({"scheduler": "euler"}, "ddpm, ddim"),
        ({"resampling": "stratifed"}, "did you mean 'stratified'"),
    ],
)
def test_names_that_do_not_exist(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        align.run(AlignOptions(**wrong), save=False)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be written to"):
        align.run(AlignOptions(out=tmp_path / "file"))


def test_values_may_come_alone() -> None:
    options = AlignOptions("digits", "bright", 3, "fk", 2, 3.0, out="results")  # type: ignore
    assert (options.rewards, options.classes, options.methods) == (("bright",), (3,), ("fk",))
    assert (options.strengths, options.scales, options.out) == ((2.0,), (3.0,), Path("results"))
    assert AlignOptions(rewards=["red", "blue"]).rewards == ("red", "blue")  # type: ignore
    assert AlignOptions(classes="3").classes == ("3",)  # type: ignore
    with pytest.raises(OptionError, match="--scale needs numbers, got 'much'"):
        AlignOptions(scales="much")  # type: ignore


def test_command_keeps_every_digit() -> None:
    words = shlex.split(AlignOptions(scales=(34.123456789,), ess_threshold=1 / 3).command())
    assert float(words[words.index("--scale") + 1]) == 34.123456789
    assert float(words[words.index("--ess-threshold") + 1]) == 1 / 3


def test_several_classes_that_match_are_named() -> None:
    with pytest.raises(OptionError, match=r"several classes .* match 'a': Animals & Nature \(2\)"):
        find_domain("emoji").match_class("a")


def test_numbers_are_not_likened_to_classes() -> None:
    with pytest.raises(OptionError) as caught:
        find_domain("digits").match_class("12")
    assert "did you mean" not in str(caught.value)


def test_colour_is_not_offered_for_grey_samples() -> None:
    assert not {"red", "colour", "saturated"} & set(find_domain("digits").rewards())
    assert {"red", "colour", "saturated"} <= set(find_domain("emoji").rewards())


def test_colour_of_three_numbers() -> None:
    given = ["colour:rgb=0.2,0.4,0.6", "colour:#336699"]
    by_numbers, by_hex = make_rewards(find_domain("emoji"), given).values()
    images = torch.rand(3, 3, 8, 8)
    assert torch.allclose(by_numbers(images), by_hex(images))


def test_command_reproduces_the_options() -> None:
    import typer

    options = AlignOptions(
        "digits", ("bright", "class:3"), ("3", "8"), ("fk",), scales=(2.0, 0.5), seed=7, steps=9
    )
    words = shlex.split(options.command())
    assert words[:3] == ["pyro-twist", "align", "digits"]
    command = typer.main.get_command(app).commands["align"]  # type: ignore[attr-defined]
    given = command.make_context("align", words[2:]).params
    assert given["reward"] == ["bright", "class:3"]
    assert (given["classes"], given["method"], given["scale"]) == (["3", "8"], ["fk"], [2.0, 0.5])
    assert (given["seed"], given["steps"], given["particles"]) == (7, 9, 16)
