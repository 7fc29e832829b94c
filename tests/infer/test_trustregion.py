# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch

from pyro_twist.infer.trustregion import dual_temper, kl_divergence, temper


def paths(size: int = 50, scale: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    log_path = scale * torch.randn(size, dtype=torch.float64) + 7.0
    return log_path, 0.3 * torch.randn(size, dtype=torch.float64)


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [4, 50, 1000])
def test_bisection_and_dual_agree(budget: float, size: int) -> None:
    log_path, log_base = paths(size)
    found = temper(log_path, log_base, budget)
    assert found.tau == pytest.approx(dual_temper(log_path, log_base, budget), abs=1e-6)
    if found.tau < 1:
        assert found.kl == pytest.approx(budget, abs=1e-9)
    assert found.kl <= budget + 1e-9


def test_solves_the_constrained_problem() -> None:
    """No law within the budget is nearer to the target than the tempered one."""
    log_path, log_base = paths(20)
    found = temper(log_path, log_base, 0.5)
    base = log_base.softmax(0)
    target = (log_base + log_path).softmax(0)

    def divergence(q: torch.Tensor, p: torch.Tensor) -> float:
        return float((q * (q / p).log()).sum())

    nearest = divergence(found.weights, target)
    torch.manual_seed(1)
    for _ in range(300):
        other = (found.weights.log() + 0.2 * torch.randn(20, dtype=torch.float64)).softmax(0)
        if divergence(other, base) <= 0.5:
            assert divergence(other, target) > nearest - 1e-12


def test_divergence_is_zero_at_zero_and_increases() -> None:
    log_path, log_base = paths()
    log_base = log_base.log_softmax(0)
    values = [kl_divergence(tau, log_path, log_base) for tau in (0.0, 0.1, 0.3, 0.7, 1.0)]
    assert values[0] == pytest.approx(0.0, abs=1e-12)
    assert values == sorted(values) and values[-1] > 0.5


def test_scale_does_not_matter() -> None:
    log_path, log_base = paths()
    one, other = temper(log_path, log_base, 0.3), temper(log_path + 100, log_base - 5, 0.3)
    assert one.tau == pytest.approx(other.tau) and torch.allclose(one.weights, other.weights)
    assert one.chi_square == pytest.approx(other.chi_square)


def test_gaussian_weights() -> None:
    """For log-weights of variance s^2 the divergence is tau^2 s^2 / 2; within 3 %."""
    torch.manual_seed(0)
    log_path = 1.5 * torch.randn(200_000, dtype=torch.float64)
    found = temper(log_path, torch.zeros_like(log_path), 0.2)
    assert found.tau == pytest.approx(math.sqrt(2 * 0.2) / 1.5, rel=0.03)


def test_equal_weights_and_few_paths() -> None:
    for size in (1, 2, 4):
        found = temper(torch.full((size,), 3.0).double(), torch.zeros(size).double(), 0.1)
        assert found.tau == 1.0 and found.kl == pytest.approx(0.0, abs=1e-12)
        assert found.chi_square == pytest.approx(0.0, abs=1e-12)
    # with four paths no law is further than log 4 from the uniform one
    log_path = torch.tensor([0.0, -50.0, -60.0, -70.0]).double()
    assert temper(log_path, torch.zeros(4).double(), math.log(4) + 1e-6).tau == 1.0


def test_dead_paths_are_left_out() -> None:
    log_path, log_base = paths(10)
    dead = log_path.clone()
    dead[[2, 5]] = -math.inf
    kept = torch.tensor([i for i in range(10) if i not in (2, 5)])
    found = temper(dead, log_base, 0.3)
    expected = temper(log_path[kept], log_base[kept], 0.3)
    assert found.tau == pytest.approx(expected.tau)
    assert torch.allclose(found.weights[kept], expected.weights)
    assert found.weights[[2, 5]].sum() == 0
    with pytest.raises(ValueError, match="none of the 3 paths has weight"):
        temper(torch.full((3,), -math.inf).double(), torch.zeros(3).double(), 0.3)
