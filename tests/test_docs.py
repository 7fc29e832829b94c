# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The Python examples of the README and of the documentation's pages run, in the order written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_twist import (
    GaussianDenoiser,
    GaussianDiffusion,
    ImportanceSampling,
    RewardTilted,
    image_reward,
    zoo,
)

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/index.md",
    "docs/extending/model.md",
    "docs/extending/reward.md",
    "docs/extending/twist.md",
]
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

    labels = {"class_labels": 0}
    return GaussianDiffusion(denoiser, scheduler, SHAPE, num_inference_steps=4, conditioning=labels)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take as given."""
    from diffusers import UNet2DModel

    monkeypatch.setattr(zoo, "load", small_diffusion)
    monkeypatch.setattr(UNet2DModel, "from_pretrained", lambda path: lambda x, timestep: x)
    diffusion = small_diffusion()
    return {
        "diffusion": diffusion,
        "model": RewardTilted(diffusion, image_reward("red")),
        "observed": torch.zeros(3, 16, 8),
        "direction": torch.zeros(SHAPE),
        "image_reward": image_reward,
        "score_with_external_program": lambda images: [0.0 for _ in images],
    }


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, names: dict[str, Any]) -> None:
    found = examples(page)
    assert found
    for code in found:
        exec(compile(code, page, "exec"), names)
    result = ImportanceSampling(names["model"], 3).run()
    assert torch.isfinite(result.log_normalizer)
