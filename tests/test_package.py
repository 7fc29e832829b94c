# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What importing costs and loads, and what the package promises about its names and files."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import pytest

import pyro_twist

ROOT = Path(__file__).parents[1]
HEADER = (
    "# Copyright Contributors to the pyro_twist project.\n# SPDX-License-Identifier: Apache-2.0\n"
)
HEAVY = ("accelerate", "arviz", "diffusers", "matplotlib", "scipy", "sklearn", "transformers")
ALL_NAMES = "import pyro_twist as p; [getattr(p, name) for name in p.__all__]"
HELP = "import sys; sys.argv = ['pyro-twist', '--help']; from pyro_twist.cli import main; main()"

SOURCES = sorted(ROOT.glob("pyro_twist/**/*.py"))
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCES
    if "recipes" not in path.parts
]


def run(code: str) -> str:
    """Runs code in a fresh interpreter and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code: str) -> set[str]:
    """The top-level modules that are loaded after the code has run."""
    report = "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    return set(run(code + report).splitlines()[-1].split())


def share_of_names() -> float:
    """Processor time of the public names against Pyro's own, in one fresh interpreter."""
    clock = "from time import process_time as now; start = now()\n"
    timed = f"{clock}import pyro; between = now()\n{ALL_NAMES}\nend = now()\n"
    return float(run(timed + "print((end - between) / (between - start))").splitlines()[-1])


def test_import_loads_next_to_nothing() -> None:
    assert not {*HEAVY, "pyro", "torch", "numpy", "PIL"} & loaded_after("import pyro_twist")


def test_public_names_load_nothing_heavy() -> None:
    also_by_pyro = loaded_after("import pyro")
    assert not (set(HEAVY) - also_by_pyro) & loaded_after(ALL_NAMES)


def test_public_names_cost_little_more_than_pyro() -> None:
    # a ratio within one process, and the least of five: load on the machine weighs on both parts
    assert min(share_of_names() for _ in range(5)) < 0.25


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert "align" in run(HELP)
        seconds.append(time.perf_counter() - start)
    assert median(seconds) < 3.0


def test_public_names_are_listed_once() -> None:
    known = {"__version__", *pyro_twist._HOMES, *pyro_twist._HOME_OF}
    assert known == set(pyro_twist.__all__)
    assert len(known) == len(pyro_twist.__all__)
    assert known <= set(dir(pyro_twist))


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'TwistedSCM'"):
        _ = pyro_twist.TwistedSCM


def test_version_is_the_installed_one() -> None:
    try:
        installed = version("pyro-twist")
    except PackageNotFoundError:
        pytest.skip("pyro-twist is not installed")
    assert installed == pyro_twist.__version__


@pytest.mark.parametrize("name", MODULES)
def test_names_in_all_resolve(name: str) -> None:
    module = import_module(name)
    for public in getattr(module, "__all__", ()):
        assert getattr(module, public, None) is not None, f"{name}.{public}"


@pytest.mark.parametrize("folder", ["pyro_twist", "tests", "docs", "scripts"])
def test_sources_have_the_header(folder: str) -> None:
    paths = [path for path in (ROOT / folder).rglob("*.py") if "_build" not in path.parts]
    bare = [str(path.relative_to(ROOT)) for path in paths if not starts_well(path)]
    assert not bare


def starts_well(path: Path) -> bool:
    """Whether a file is empty or starts with the header."""
    text = path.read_text(encoding="utf-8")
    return not text or text.startswith(HEADER)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_module_has_a_docstring(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.removeprefix(HEADER).lstrip().startswith(('"""', 'r"""'))
