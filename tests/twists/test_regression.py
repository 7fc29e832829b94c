# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyro_twist.twists import KernelRidge

KINDS = ("linear", "diagonal", "quadratic", "kernel")
DIM = 5


def linear(x: torch.Tensor) -> torch.Tensor:
    return 2 * x[:, 0] - x[:, 1] + 3.0


def diagonal(x: torch.Tensor) -> torch.Tensor:
    return linear(x) + 0.5 * x[:, 2] ** 2 - x[:, 3] ** 2


def quadratic(x: torch.Tensor) -> torch.Tensor:
    return linear(x) + x[:, 0] * x[:, 3] - 0.5 * x[:, 2] ** 2


def smooth(x: torch.Tensor) -> torch.Tensor:
    return (0.5 * x[:, 0]).sin() + (-0.1 * x.square().sum(1)).exp()


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": linear,
    "diagonal": diagonal,
    "quadratic": quadratic,
    "kernel": smooth,
}


def points(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, DIM, generator=generator, dtype=torch.float64) + 0.5


def differences(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, step: float = 1e-5
) -> torch.Tensor:
    shifts = step * torch.eye(x.shape[1], dtype=torch.float64)
    ends = [(function(x + s) - function(x - s)) / (2 * step) for s in shifts]
    return torch.stack(ends, -1)


def value(fit: KernelRidge, x: torch.Tensor) -> torch.Tensor:
    """What the fit predicts, up to a constant."""
    return fit._gram((x - fit.centre) / fit.width, fit.points, fit.kind) @ fit.coefficients


@pytest.mark.parametrize("kind", KINDS)
def test_recovers_functions_of_its_class(kind: Any) -> None:
    x, function = points(400), FUNCTIONS[kind]
    fit = KernelRidge(kind).fit(x, function(x), torch.arange(400) // 3)
    assert fit.kind == kind and fit.score > 0.98
    new = points(200, seed=1)
    exact = differences(function, new)
    error = (fit.gradient(new) - exact).square().mean() / exact.square().mean()
    assert error < (0.1 if kind == "kernel" else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_differences(kind: Any) -> None:
    """Of the fitted function, whatever that is."""
    x = points(40)
    fit = KernelRidge(kind).fit(x, torch.randn(40), torch.arange(40))
    new = points(6, seed=1)
    found = fit.gradient(new.float())
    assert found.dtype == torch.float64
    assert torch.allclose(fit.gradient(new), differences(lambda p: value(fit, p), new), atol=1e-7)
    assert torch.allclose(found, fit.gradient(new), atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "diagonal", "quadratic"])
def test_choice_among_kinds(kind: Any) -> None:
    """The smallest class that holds a noisy function predicts best."""
    x = points(120)
    y = FUNCTIONS[kind](x) + 1.0 * torch.randn(120)
    assert (
        KernelRidge(("quadratic", "diagonal", "linear")).fit(x, y, torch.arange(120)).kind == kind
    )


def test_score_is_that_of_points_left_out() -> None:
    """By the definition, with the fit written out for the linear kernel and one ridge."""
    x, groups = points(60), torch.arange(60) // 3
    y = linear(x) + torch.randn(60)
    fit = KernelRidge("linear").fit(x, y, groups)
    z = (x - x.mean(0)) / (x - x.mean(0)).square().sum(1).mean().sqrt()
    fold = groups % 4
    errors = []
    for ridge in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        error = 0.0
        for k in range(4):
            z_in, y_in = z[fold != k], y[fold != k]
            # the dual ridge is in units of the mean diagonal of the kernel matrix
            scale = z_in.square().sum(1).mean()
            normal = z_in.T @ z_in + ridge * scale * torch.eye(DIM, dtype=torch.float64)
            slope = torch.linalg.solve(normal, z_in.T @ (y_in - y_in.mean()))
            error += float((y[fold == k] - y_in.mean() - z[fold == k] @ slope).square().sum())
        errors.append(error)
    expected = 1 - min(errors) / float((y - y.mean()).square().sum())
    assert fit.score.item() == pytest.approx(expected)


def test_points_of_a_group_are_never_split() -> None:
    """Targets that are noise, the same for all points of a group, cannot be predicted."""
    groups = torch.arange(200) // 10
    x = points(20)[groups] + 0.01 * torch.randn(200, DIM)
    y = torch.randn(20)[groups]
    assert KernelRidge("kernel").fit(x, y, groups).score < 0.1
    assert KernelRidge("kernel").fit(x, y, torch.arange(200)).score > 0.9  # the mistake


def cross_case(kind: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, groups = points(90), torch.arange(90) % 9
    return x, FUNCTIONS[kind](x) + 0.1 * torch.randn(90), groups


@pytest.mark.parametrize("kind", KINDS)
def test_cross_gradients_do_not_depend_on_the_own_group(kind: Any) -> None:
    x, y, groups = cross_case(kind)
    before = KernelRidge(kind).cross_fit(x, y, groups)
    changed = y.clone()
    changed[groups == 2] += 0.02  # too little to change the ridge
    after = KernelRidge(kind).cross_fit(x, changed, groups)
    own = groups == 2
    assert torch.allclose(after[own], before[own], rtol=1e-7, atol=1e-9)
    assert (after - before)[~own].abs().max() > 1e-5
    # the gradients of the whole fit do depend on it
    whole = [KernelRidge(kind).fit(x, target, groups).gradient(x[own]) for target in (y, changed)]
    assert (whole[0] - whole[1]).abs().max() > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_cross_fit_leaves_the_fit_to_all_points(kind: Any) -> None:
    x, y, groups = cross_case(kind)
    fit, crossed = KernelRidge(kind).fit(x, y, groups), KernelRidge(kind)
    gradients = crossed.cross_fit(x, y, groups)
    assert gradients.shape == x.shape and gradients.dtype == torch.float64
    for name, expected in fit.state_dict().items():
        assert torch.equal(crossed.state_dict()[name], expected)
    exact = differences(FUNCTIONS[kind], x)
    assert torch.cosine_similarity(gradients.flatten(), exact.flatten(), 0) > 0.85


@pytest.mark.parametrize("labels", [1, 2])
def test_few_groups(labels: int) -> None:
    """One group is split in halves: there is nothing else."""
    x = points(40)
    fit = KernelRidge(("linear", "quadratic"))
    gradients = fit.cross_fit(x, linear(x), torch.arange(40) % labels)
    assert fit.score > 0.9 and torch.isfinite(gradients).all()


def test_at_most_so_many_points() -> None:
    x = points(500)
    fit = KernelRidge("linear", max_points=50)
    gradients = fit.cross_fit(x, linear(x), torch.arange(500))
    assert len(fit.points) == 50 and gradients.shape == (500, DIM)
    expected = torch.tensor([2.0, -1, 0, 0, 0], dtype=torch.float64).expand(500, -1)
    assert torch.allclose(gradients, expected, atol=0.05)


def test_invariant_to_units() -> None:
    """Shifts and scales of points and targets change the gradient as they must, and no choice."""
    x, y, groups = cross_case("quadratic")
    plain = KernelRidge(KINDS[:3]).fit(x, y, groups)
    moved = KernelRidge(KINDS[:3]).fit(100 * x - 7, 3 * y + 1000, groups)
    assert moved.kind == plain.kind and moved.score.item() == pytest.approx(plain.score.item())
    gradient = moved.gradient(100 * x - 7)
    assert torch.allclose(gradient, 3 * plain.gradient(x) / 100, rtol=1e-6, atol=1e-9)


def test_knows_when_it_knows_nothing() -> None:
    x, groups = torch.randn(200, 50), torch.arange(200)
    fit = KernelRidge(KINDS).fit(x, torch.randn(200), groups)
    assert fit.score < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: Any, tmp_path: Path) -> None:
    x = points(60)
    fit = KernelRidge(kind).fit(x, FUNCTIONS[kind](x), torch.arange(60))
    save_file(fit.state_dict(), tmp_path / "fit.safetensors")
    other = KernelRidge(KINDS)
    assert not other.fitted
    other.load_state_dict(load_file(tmp_path / "fit.safetensors"))
    assert other.fitted and other.kind == kind and other.score == fit.score
    assert torch.equal(other.gradient(x), fit.gradient(x))


@pytest.mark.parametrize("kinds", ["cubic", (), ("linear", "cubic")])
def test_unknown_kinds(kinds: Any) -> None:
    with pytest.raises(ValueError, match=r"surrogate=.*choose one of \('linear'"):
        KernelRidge(kinds)
