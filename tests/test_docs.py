# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The Python examples of the README and of the documentation's pages run, in the order written."""

from __future__ import annotations

import ast
import re
from html import unescape
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from pyro_twist import (
    GaussianDenoiser,
    GaussianDiffusion,
    ImportanceSampling,
    zoo,
)
from pyro_twist.algorithms import registry

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/index.md",
    "docs/algorithms.md",
    "docs/combining.md",
    "docs/composition.md",
    "docs/hierarchies.md",
    "docs/preferences.md",
    "docs/instrument.md",
    "docs/inverse.md",
    "docs/learning.md",
    "docs/pipelines.md",
    "docs/statespace.md",
    "docs/api/pyro_twist.md",
    "docs/extending/model.md",
    "docs/extending/pipeline.md",
    "docs/extending/reward.md",
    "docs/extending/twist.md",
    "docs/extending/learned.md",
]
# these load networks from the hub
WITH_WEIGHTS = ["docs/rewards_preference.md"]
SHAPE = (3, 16, 16)


def examples(page: str) -> list[str]:
    """The Python blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def small_diffusion(*args: Any, **kwargs: Any) -> GaussianDiffusion:
    """Stands in for every pretrained model: independent Gaussian pixels, four steps."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler()
    exact = GaussianDenoiser(torch.zeros(SHAPE), torch.full(SHAPE, 0.1), scheduler)

    def denoiser(x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> Any:
        return exact(x, timestep)

    return GaussianDiffusion(
        denoiser,
        scheduler,
        SHAPE,
        num_inference_steps=4,
        conditioning={"class_labels": 0},
        null_conditioning={"class_labels": 8},
    )


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small models for what the pages load, and an empty folder for what they write."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DModel

    from pyro_twist.diffusion.pipelines import build
    from tests.diffusion.pipes import stable_diffusion

    scheduler = DDPMScheduler(clip_sample=False, steps_offset=1)
    monkeypatch.setattr(
        StableDiffusionPipeline,
        "from_pretrained",
        lambda path: stable_diffusion(scheduler=scheduler),
    )
    monkeypatch.setattr(build, "_REGISTERED", {})
    monkeypatch.setattr(zoo, "load", small_diffusion)
    monkeypatch.setattr(UNet2DModel, "from_pretrained", lambda path: lambda x, timestep: x)
    monkeypatch.setattr(registry, "_ALGORITHMS", registry.algorithms())  # a copy to add to
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("page", PAGES)
def test_examples_run_as_written(page: str) -> None:
    found = examples(page)
    assert found
    # Nothing is given: a page has to import and define whatever it uses.
    names: dict[str, Any] = {"__name__": "__main__"}
    for code in found:
        exec(compile(code, page, "exec"), names)
    if "model" in names:
        result = ImportanceSampling(names["model"], 3).run()
        assert torch.isfinite(result.log_normalizer)


def test_every_page_with_examples_is_run() -> None:
    pages = [
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/api/*.md"),
        *ROOT.glob("docs/extending/*.md"),
    ]
    found = {page.relative_to(ROOT).as_posix() for page in pages if "```python" in page.read_text()}
    assert found <= {*PAGES, *WITH_WEIGHTS}


@pytest.mark.parametrize("page", WITH_WEIGHTS)
def test_examples_with_published_weights_import_what_there_is(page: str) -> None:
    """They cannot be run without the weights, but what they import is there."""
    for code in examples(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pyro_twist"):
                module = import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names)


def test_every_public_name_is_on_its_page() -> None:
    import pyro_twist

    page = (ROOT / "docs/api/pyro_twist.md").read_text(encoding="utf-8")
    missing = {name for name in pyro_twist.__all__ if f"`{name}`" not in page}
    assert missing <= {"__version__"}


def test_the_reward_file_that_the_readme_names_works(tmp_path: Path) -> None:
    from pyro_twist.align.userrewards import load_function

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "rewards.py:green_sky" in readme and "docs/extending/reward.md" in readme
    file = tmp_path / "rewards.py"
    file.write_text(examples("docs/extending/reward.md")[0], encoding="utf-8")
    score = load_function(f"{file}:green_sky")
    green = torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(SHAPE)
    assert score(torch.stack([green, 1.0 - green])).tolist() == pytest.approx([1.0, -1.0])


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/extending/model.md"])
def test_files_that_a_page_links_to_exist(page: str) -> None:
    folder = (ROOT / page).parent
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        # The documentation is built from a copy of the tutorials in its own folder.
        places = (folder / target, ROOT / target)
        assert any(place.exists() for place in places), f"{page} links to {target}"


FORMULAS = {
    r"\log p_t": 'log</mi><mspace width="0.17em" /><msub>',
    r"\lambda \max_{s \ge t} r_s": 'λ</mi><mspace width="0.17em" /><msub><mi>max</mi><mrow>',
    r"\begin{aligned} a &= b \\ c &= d \end{aligned}": "<mtable",
    r"\operatorname{logsumexp}(L)": "<mi>logsumexp</mi>",
}


@pytest.mark.parametrize("tex", FORMULAS)
def test_formulas_become_mathml(tex: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from docutils import nodes

    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    found = import_module("mathml").mathml(nodes.math(tex, tex), "block")
    children = dict(msub=2, msup=2, mover=2, munder=2, mfrac=2, msubsup=3, munderover=3)
    for element in ElementTree.fromstring(found).iter():
        name = element.tag.rpartition("}")[2]
        assert len(element) == children.get(name, len(element))
    assert FORMULAS[tex] in unescape(found)


def test_an_unknown_command_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from docutils import nodes

    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    mathml = import_module("mathml")
    told: list[Any] = []
    monkeypatch.setattr(mathml.logger, "warning", lambda *args, **kwargs: told.append(args))
    mathml.mathml(nodes.math("", r"a \nosuchcommand b"), "inline")
    mathml.mathml(nodes.math("", r"a \le b"), "inline")
    assert len(told) == 1
