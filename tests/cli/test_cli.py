# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest

import pyro_twist
from pyro_twist.cli import main

SMALL = ["align", "digits", "--steps", "3", "--particles", "4"]


def call(args: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    return int(stopped.value.code or 0)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"]) == 0
    assert capsys.readouterr().out == f"pyro-twist {pyro_twist.__version__}\n"


@pytest.mark.parametrize("command", [[], ["align"], ["models"], ["rewards"], ["methods"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call([*command, "--help"]) == 0
    assert "Usage: pyro-twist" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("models", ["digits", "emoji", "Food &"]),
        ("rewards", ["red", "compressible", "class:NAME", "file.py:function"]),
        ("methods", ["base", "best-of-n", "fk", "a maximiser"]),
    ],
)
def test_lists(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call([command]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)


def test_align_prints_a_table_and_says_where_the_results_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call([*SMALL, "--class", "3", "--out", str(tmp_path / "new" / "folder")]) == 0
    printed = capsys.readouterr().out.splitlines()
    page = tmp_path / "new" / "folder" / "report.html"
    assert printed[-1] == f"Results are in {page.parent}; open {page}"
    assert page.exists()
    first_words = [line.split()[0] for line in printed if line.split()]
    assert all(name in first_words for name in ("base", "best-of-n", "fk"))
    assert max(map(len, printed[:-1])) <= 80
    assert not any("…" in line for line in printed)


def test_quiet_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call([*SMALL, "--class", "3,4", "-q", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"Results are in {tmp_path}; open {tmp_path / 'report.html'}\n"
    assert captured.err == ""


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["algn"], "align"),
        (["align", "emojis"], "did you mean 'emoji'"),
        (["align", "digits", "--rewrad", "red"], "--reward"),
        (["align", "digits", "--reward", "reed"], "did you mean 'red'"),
        (["align", "digits", "--class", "eleven"], "0, 1, 2"),
        (["align", "digits", "--method", "fkk"], "did you mean 'fk'"),
        (["align", "digits", "--particles", "0"], "--particles is 0"),
        (["align", "digits", "--particles", "many"], "--particles"),
        (["align", "digits", "--steps", "1001"], "1 to 1,000"),
        (["align", "digits", "--scale", "1", "--strength", "2"], "only one"),
        (["align", "digits", "--out", __file__], "cannot be written"),
        (["align", "digits", "--reward", "nowhere:function"], "No module named 'nowhere'"),
        (["rewards", "emojis"], "did you mean 'emoji'"),
    ],
)
def test_wrong_options_get_one_sentence(
    wrong: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(wrong) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("pyro-twist: ")
    assert told in line


def test_reward_that_fails_half_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (
        "calls = []\n\n\ndef score(images):\n    calls.append(1)\n"
        "    if len(calls) > 2:\n        raise OSError('out of tokens')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    (tmp_path / "leaves.py").write_text(source)
    out = tmp_path / "out"
    assert call([*SMALL, "--reward", f"{tmp_path}/leaves.py:score", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert line.endswith("OSError: out of tokens")
    last = captured.out.splitlines()[-1]
    assert last.startswith(f"Results of what had finished (base) are in {out}")
    assert (out / "samples" / "base.npz").exists()


def test_reward_that_fails_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.py").write_text("def score(images):\n    return 1 / 0\n")
    out = tmp_path / "out"
    assert call([*SMALL, "--reward", f"{tmp_path}/broken.py:score", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert "no method had finished" in captured.err


def test_warnings_of_rewards_are_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (
        "from pyro_twist import Reward\n\n"
        "score = Reward(lambda images: images.mean((1, 2, 3)).where(images[:, 0, 3, 3] > .2, "
        "float('nan')), name='score', on_nan='-inf')\n"
    )
    (tmp_path / "unsure.py").write_text(source)
    reward = f"{tmp_path}/unsure.py:score"
    args = [*SMALL, "--reward", reward, "--scale", "3", "--out", str(tmp_path / "out")]
    assert call(args) == 0
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 4
    assert all(line.startswith("warning: reward 'score' is NaN") for line in lines[:3])
