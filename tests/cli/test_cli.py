# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import subprocess
import sys
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
        ("models", ["digits", "emoji", "Food &", "sapiens"]),
        ("rewards", ["red", "compressible", "class:NAME", "file.py:function"]),
        ("methods", ["base", "best-of-n", "fk", "tree-search", "a maximiser"]),
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
        (["align", "emoji", "--reward", "reed"], "did you mean 'red'"),
        (["align", "digits", "--class", "eleven"], "0, 1, 2"),
        (["align", "digits", "--method", "fkk"], "did you mean 'fk'"),
        (["align", "digits", "--particles", "0"], "--particles is 0"),
        (["align", "digits", "--particles", "many"], "--particles"),
        (["align", "digits", "--steps", "1001"], "1 to 1,000"),
        (["align", "digits", "--scale", "1", "--strength", "2"], "only one"),
        (["align", "digits", "--out", __file__], "cannot be written"),
        (["align", "digits", "--reward", "nowhere:function"], "No module named 'nowhere'"),
        (["align", "digits", "--reward", "red"], "are grey"),
        (["align", "digits", "--class", "all,3"], "give it alone"),
        (["rewards", "emojis"], "did you mean 'emoji'"),
        (["align", "digits", "--prompt", "3"], "--prompt is for models of sequences"),
        (["align", "digits", "--method", "tree-search"], "is for models of sequences"),
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
        "    if len(calls) > 3:\n        raise OSError('out of tokens')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    (tmp_path / "leaves.py").write_text(source)
    out = tmp_path / "out"
    assert call([*SMALL, "--reward", f"{tmp_path}/leaves.py:score", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert "best-of-n: reward 'score' failed" in line
    assert "OSError: out of tokens (leaves.py:7)" in line
    assert line.endswith("(the batch had failed as a whole, then each sample was scored alone)")
    assert "failed on sample" in (out / "report.html").read_text(encoding="utf-8")
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


@pytest.mark.parametrize("width", [30, 60, 200])
def test_no_digit_is_cut(
    width: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert call([*SMALL, "--scale", "3", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any("…" in line for line in lines)
    assert max(map(len, lines[:-1])) <= width
    words = " ".join(lines).split()
    assert all(word in words for word in ("judge", "ancestors", "seconds", "12"))


def test_bars_say_nothing_that_has_no_meaning() -> None:
    from rich.progress import Progress as Bars

    from pyro_twist.cli.aligning import _BarProgress

    bars = Bars(disable=True)
    progress = _BarProgress(bars)
    progress.begin("Base model", 4)
    progress.advance(2, 4.0, float("nan"))
    assert bars.tasks[0].fields["figures"] == ""
    progress.advance(3, 4.0, 1.5)
    assert bars.tasks[0].fields["figures"] == "ESS 4.0  log Z 1.50"


def test_failure_leaves_a_page_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("def score(images):\n    return 1 / 0\n")
    out = tmp_path / "out"
    assert call([*SMALL, "--out", str(out)]) == 0
    assert (out / "grid.png").exists()
    assert call([*SMALL, "--reward", f"{tmp_path}/broken.py:score", "--out", str(out)]) == 1
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "division by zero (broken.py:2)" in text
    assert not (out / "grid.png").exists()


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "pyro_twist", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown == f"pyro-twist {pyro_twist.__version__}\n"


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong option costs nothing and blocks nothing; a second call repeats no run."""
    small = ["compare", "digits", "-r", "bright", "--scale", "3", "--steps", "3", "-n", "4"]
    common = [*small, "--seeds", "2", "-o", str(tmp_path / "out")]
    for wrong, message in (
        (["-m", "fkk"], "did you mean 'fk'"),
        (["-m", "tree-search"], "sequences with a mask"),
        (["--seeds", "0"], "at least 1"),
    ):
        assert call([*common, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert call([*common, "-m", "fk", "-m", "svdd"]) == 0
    assert "tilted law" in capsys.readouterr().out
    rows = (tmp_path / "out" / "rows.jsonl").read_text()
    assert len(rows.splitlines()) == 4
    assert call([*common, "-m", "fk", "-m", "svdd"]) == 0
    assert (tmp_path / "out" / "rows.jsonl").read_text() == rows
    assert {"table.md", "comparison.png"} <= {one.name for one in (tmp_path / "out").iterdir()}
    classes = [*small, "-c", "3,8", "--seeds", "1", "-m", "fk", "-o", str(tmp_path / "classes")]
    assert call(classes) == 0
    assert capsys.readouterr().out
    assert call([*common, "-m", "fk", "-n", "5"]) == 2
    assert "another comparison" in capsys.readouterr().err
