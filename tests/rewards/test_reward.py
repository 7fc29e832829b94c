# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pyro_twist.rewards import Reward, RewardError, RewardWarning, per_sample
from pyro_twist.rewards.samples import digest, originals


class Recorder:
    """A reward that keeps what it was given, and fails on chosen samples while ``broken``."""

    def __init__(self, fails_on: tuple[float, ...] = ()) -> None:
        self.fails_on = fails_on
        self.seen: list[list[float]] = []

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        values = samples[:, 0].tolist()
        self.seen.append(values)
        for value in values:
            if value in self.fails_on:
                raise RuntimeError(f"no score for {value}")
        return 10 * samples[:, 0]


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


# Values and shapes


@pytest.mark.parametrize(
    "returned",
    [
        lambda x: x.sum(-1),
        lambda x: x.sum(-1).numpy(),
        lambda x: x.sum(-1).tolist(),
        lambda x: tuple(x.sum(-1)),
        lambda x: x.sum(-1).half(),
        lambda x: [float(row.sum()) for row in x],
    ],
)
def test_values_are_float64_whatever_the_function_returns(returned: Any) -> None:
    values = Reward(returned)(column(0.5, 1.0, 2.0))
    assert values.dtype == torch.float64
    assert values.tolist() == [0.5, 1.0, 2.0]


def test_booleans_and_integers_are_numbers() -> None:
    assert Reward(lambda x: x[:, 0] > 0)(column(-1.0, 1.0)).tolist() == [0.0, 1.0]
    assert Reward(lambda x: np.arange(len(x)))(column(5.0, 6.0)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: x, r"shape \(3, 1\) for 3 samples.*\(3,\), here with .reshape"),
        (lambda x: x.mean(), r"shape \(\) for 3 samples.*per_sample"),
        (lambda x: x[:2, 0], r"shape \(2,\) for 3 samples"),
        (lambda x: x[:, 0, None] * x[None, :, 0], r"shape \(3, 3\)"),
        (lambda x: None, "NoneType, not one number per sample|shape"),
        (lambda x: ["a", "b", "c"], "list, not one number per sample"),
        (lambda x: [[1.0], [2.0, 3.0], []], "list, not one number per sample"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "-inf"])
def test_wrong_shapes_are_named_whatever_the_policy(
    returned: Any, message: str, on_error: Any
) -> None:
    with pytest.raises(RewardError, match=message):
        Reward(returned, on_error=on_error)(column(1.0, 2.0, 3.0))


def test_an_empty_batch_calls_nothing() -> None:
    reward = Reward(Recorder(), chunk_size=2)
    assert reward(torch.zeros(0, 1)).shape == (0,)
    assert reward(torch.zeros(0)).shape == (0,)
    assert reward(torch.zeros(0, 3, 8, 8)).dtype == torch.float64
    assert Reward(len, input="list")([]).shape == (0,)
    assert Reward(len, input="pil")(torch.zeros(0, 3, 8, 8)).shape == (0,)
    assert reward.num_calls == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_reach_the_function_in_float32(dtype: torch.dtype) -> None:
    dtypes = []
    Reward(lambda x: dtypes.append(x.dtype) or x[:, 0])(column(0.5).to(dtype))
    Reward(lambda x: dtypes.append(x.dtype) or x[:, 0], input="numpy")(column(0.5).to(dtype))
    assert dtypes == [torch.float32, np.float32]
    assert Reward(lambda x: x[:, 0])(column(0.1).double()).item() == column(0.1).double().item()


def test_minus_infinity_is_a_reward() -> None:
    constraint = Reward(lambda x: torch.where(x[:, 0] > 0, 0.0, -math.inf))
    assert constraint(column(-1.0, 1.0)).tolist() == [-math.inf, 0.0]


# What the function takes


def test_uint8_and_pil_round_to_the_nearest_level() -> None:
    image = torch.tensor([0.0, 0.1, 0.5, 1.0]).reshape(1, 1, 2, 2).expand(2, 3, 2, 2)
    seen: list[Any] = []
    Reward(lambda x: seen.append(x) or [0.0], input="uint8")(image)
    Reward(lambda x: seen.append(x) or [0.0], input="pil")(image)
    assert seen[0].dtype == torch.uint8
    assert seen[0][0, 0].flatten().tolist() == [0, 26, 128, 255]
    assert seen[1][0].mode == "RGB" and seen[1][0].size == (2, 2)
    np.testing.assert_array_equal(np.asarray(seen[1][0])[..., 0].ravel(), [0, 26, 128, 255])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_modes(channels: int, mode: str) -> None:
    reward = Reward(per_sample(lambda image: 1.0 * (image.mode == mode)), input="pil")
    assert reward(torch.rand(2, channels, 4, 6)).tolist() == [1.0, 1.0]


def test_pil_refuses_what_is_no_image() -> None:
    with pytest.raises(ValueError, match=r"\(B, C, H, W\) with 1, 3 or 4 channels, got \(2, 5\)"):
        Reward(len, input="pil")(torch.rand(2, 5))


@pytest.mark.parametrize("kind", ["uint8", "pil"])
def test_images_outside_the_unit_range_are_refused_not_clamped(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"images in \[0, 1\], got values from -1 to 0.5"):
        Reward(len, input=kind)(torch.tensor([-1.0, 0.5]).reshape(1, 1, 1, 2))
    Reward(lambda x: [0.0], input=kind)(torch.full((1, 3, 2, 2), 1.0005))


def test_lists_of_objects() -> None:
    reward = Reward(lambda texts: [len(text) for text in texts], input="list")
    assert reward(["a", "bcd", "a"]).tolist() == [1.0, 3.0, 1.0]
    assert reward.num_calls == 2
    with pytest.raises(ValueError, match='declare input="list"'):
        Reward(len)(["a"])


def test_numpy_samples_and_scalars() -> None:
    assert Reward(lambda x: x[:, 0])(np.ones((2, 1), np.float32)).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="takes a batch"):
        Reward(len)(torch.tensor(1.0))


# Chunks, copies, cache, counts


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 7, None])
def test_chunks_keep_the_order(chunk_size: int | None) -> None:
    recorder = Recorder()
    samples = column(3.0, 1.0, 2.0, 5.0, 4.0)
    values = Reward(recorder, chunk_size=chunk_size)(samples)
    assert values.tolist() == [30.0, 10.0, 20.0, 50.0, 40.0]
    assert sum(recorder.seen, []) == [3.0, 1.0, 2.0, 5.0, 4.0]
    assert max(map(len, recorder.seen)) == min(chunk_size or 5, 5)


def test_copies_in_a_batch_are_scored_once() -> None:
    recorder = Recorder()
    reward = Reward(recorder, chunk_size=2)
    values = reward(column(2.0, 1.0, 2.0, 2.0, 3.0, 1.0))
    assert values.tolist() == [20.0, 10.0, 20.0, 20.0, 30.0, 10.0]
    assert recorder.seen == [[2.0, 1.0], [3.0]]
    assert reward.num_calls == 3


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.long]
)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 8, 8), (20_000,)])
def test_originals_find_exactly_the_copies(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    pool = torch.arange(1, 6).reshape((5,) + (1,) * len(shape)).expand((5,) + shape).to(dtype)
    order = torch.tensor([3, 1, 3, 0, 1, 4, 3, 2])
    assert originals(pool[order]).tolist() == [0, 1, 0, 3, 1, 5, 0, 7]


def test_originals_never_merge_different_rows() -> None:
    # Rows that differ only where the key of a long row does not look.
    rows = torch.zeros(4, 50_000)
    rows[1, 1] = rows[3, 2] = 1.0
    assert originals(rows).tolist() == [0, 1, 2, 3] or originals(rows).tolist() == [0, 1, 0, 3]
    values = Reward(lambda x: x[:, 1] + 2 * x[:, 2])(rows)
    assert values.tolist() == [0.0, 1.0, 0.0, 2.0]
    nearly = torch.ones(2, 3)
    nearly[1, 2] += 1e-7
    assert originals(nearly).tolist() == [0, 1]


def test_digests_tell_type_shape_and_content_apart() -> None:
    samples = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.ones(4),
        torch.zeros(()),
        "a",
        b"a",
    ]
    assert len({digest(sample) for sample in samples}) == len(samples)
    assert digest(torch.zeros(4)) == digest(torch.zeros(8)[::2])


def test_no_cache_by_default_between_calls() -> None:
    reward = Reward(Recorder())
    reward(column(1.0))
    reward(column(1.0))
    assert reward.num_calls == 2


def test_the_cache_serves_earlier_samples_and_forgets_the_oldest() -> None:
    recorder = Recorder()
    reward = Reward(recorder, cache=2)
    reward(column(1.0, 2.0))
    assert reward(column(1.0, 2.0)).tolist() == [10.0, 20.0]
    assert recorder.seen == [[1.0, 2.0]]
    reward(column(1.0))
    reward(column(3.0))
    assert recorder.seen == [[1.0, 2.0], [3.0]]
    assert reward(column(1.0, 2.0)).tolist() == [10.0, 20.0]
    assert recorder.seen[2:] == [[2.0]], "1 was used after 2, so 2 had to go"
    reward.clear()
    assert reward.num_calls == 0
    reward(column(2.0))
    assert reward.num_calls == 1


def test_a_cache_smaller_than_the_batch_is_still_right() -> None:
    reward = Reward(Recorder(), cache=1)
    for _ in range(2):
        assert reward(column(1.0, 2.0, 3.0)).tolist() == [10.0, 20.0, 30.0]


def test_a_noisy_reward_is_drawn_once_per_sample() -> None:
    reward = Reward(lambda x: x[:, 0] + torch.randn(len(x)), noisy=True)
    samples = torch.arange(50.0)[:, None]
    first = reward(samples)
    assert torch.equal(reward(samples), first)
    assert torch.equal(reward(samples.flip(0)), first.flip(0))
    assert len(reward(torch.zeros(10, 1)).unique()) == 1
    assert reward.num_calls == 50
    reward.clear()
    assert not torch.equal(reward(samples), first)


def test_a_noisy_reward_is_constant_under_gradients() -> None:
    reward = Reward(lambda x: x[:, 0] + torch.randn(len(x)), noisy=True)
    samples = column(1.0, 2.0).requires_grad_()
    first = reward(samples)
    assert not first.requires_grad
    assert torch.equal(reward(samples), first)


# Failures


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_what_is_no_reward_is_raised_with_its_index(bad: float, chunk_size: int | None) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, 0] == 3.0, bad, x[:, 0])

    with pytest.raises(RewardError, match=r"'fn' failed on sample 3 of 5.*(NaN|\+inf)") as caught:
        Reward(fn, chunk_size=chunk_size)(torch.arange(5.0)[:, None])
    assert caught.value.index == 3
    last = math.nan if chunk_size else 4.0
    np.testing.assert_array_equal(caught.value.values, [0.0, 1.0, 2.0, math.nan, last])


def test_an_exception_names_the_sample_and_loses_nothing() -> None:
    recorder = Recorder(fails_on=(3.0,))
    reward = Reward(recorder, name="grader", chunk_size=2)
    samples = column(0.0, 1.0, 2.0, 3.0, 4.0)
    with pytest.raises(RewardError, match="'grader' failed on sample 3 of 5.*no score") as caught:
        reward(samples)
    assert caught.value.index == 3
    np.testing.assert_array_equal(caught.value.values, [0.0, 10.0, 20.0, math.nan, math.nan])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert recorder.seen == [[0.0, 1.0], [2.0, 3.0], [2.0], [3.0]]

    recorder.fails_on, recorder.seen = (), []
    assert reward(samples).tolist() == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert recorder.seen == [[3.0, 4.0]], "finished samples must not be scored again"
    assert reward.num_calls == 5
    recorder.seen = []
    reward(samples)
    assert sum(recorder.seen, []) == [0.0, 1.0, 2.0, 3.0, 4.0], "without cache, kept only to retry"


def test_a_second_failure_keeps_what_the_first_kept() -> None:
    recorder = Recorder(fails_on=(2.0,))
    reward = Reward(recorder, chunk_size=1)
    samples = column(0.0, 1.0, 2.0, 3.0, 4.0)
    for fails_on in ((2.0,), (4.0,)):
        recorder.fails_on = fails_on
        with pytest.raises(RewardError):
            reward(samples)
    recorder.fails_on = ()
    assert reward(samples).tolist() == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert recorder.seen == [[0.0], [1.0], [2.0], [2.0], [3.0], [4.0], [4.0]]


def test_an_interrupt_loses_nothing() -> None:
    seen = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        seen.extend(x[:, 0].tolist())
        if seen == [0.0, 1.0]:
            raise KeyboardInterrupt
        return x[:, 0]

    reward = Reward(fn, chunk_size=1)
    with pytest.raises(KeyboardInterrupt):
        reward(column(0.0, 1.0, 2.0))
    assert reward(column(0.0, 1.0, 2.0)).tolist() == [0.0, 1.0, 2.0]
    assert seen == [0.0, 1.0, 1.0, 2.0]


def test_the_index_is_that_of_the_given_batch_not_of_its_distinct_rows() -> None:
    with pytest.raises(RewardError) as caught:
        Reward(Recorder(fails_on=(3.0,)))(column(1.0, 1.0, 1.0, 3.0, 3.0))
    assert caught.value.index == 3
    np.testing.assert_array_equal(caught.value.values, [10.0, 10.0, 10.0, math.nan, math.nan])


def test_errors_become_minus_infinity_by_policy_and_loudly() -> None:
    reward = Reward(Recorder(fails_on=(1.0, 3.0)), on_error="-inf")
    with pytest.warns(RewardWarning) as warned:
        values = reward(torch.arange(5.0)[:, None])
    assert values.tolist() == [0.0, -math.inf, 20.0, -math.inf, 40.0]
    text = " ".join(str(warning.message) for warning in warned)
    assert "sample 1" in text and "sample 3" in text and "no score for 1.0" in text


def test_nan_becomes_minus_infinity_by_policy_and_loudly() -> None:
    reward = Reward(lambda x: x[:, 0].log(), on_nan="-inf", name="log")
    with pytest.warns(RewardWarning, match=r"'log' is NaN on samples \[1\]"):
        values = reward(column(1.0, -1.0, 0.0))
    assert values.tolist() == [0.0, -math.inf, -math.inf]


def test_a_chunk_that_fails_only_as_a_whole_is_scored_singly_and_loudly() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            raise MemoryError("too many")
        return x[:, 0]

    with pytest.warns(RewardWarning, match="failed on 3 samples at once.*too many"):
        assert Reward(fn)(column(1.0, 2.0, 3.0)).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("kind", ["tensor", "numpy", "uint8", "pil"])
def test_samples_that_are_not_finite_are_not_scored(kind: Any) -> None:
    images = torch.full((3, 3, 4, 4), 0.5)
    images[1, 0, 0, 0] = math.nan
    images[2] = 0.25
    reward = Reward(lambda x: [1.0] * len(x), input=kind)
    with pytest.raises(RewardError, match="sample 1 of 3.*entries that are not finite") as caught:
        reward(images)
    assert caught.value.index == 1
    assert caught.value.values[[0, 2]].tolist() == [1.0, 1.0]


# Gradients


def test_gradients_flow_also_for_copies_and_chunks() -> None:
    samples = column(1.0, 2.0, 1.0).requires_grad_()
    reward = Reward(lambda x: x[:, 0] ** 2, chunk_size=2, cache=True)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(reward(samples).sum(), samples)
        assert gradient[:, 0].tolist() == [2.0, 4.0, 2.0]


def test_no_graph_is_kept_where_none_is_wanted() -> None:
    weight = torch.ones(1, requires_grad=True)
    reward = Reward(lambda x: x[:, 0] * weight)
    assert not reward(column(1.0)).requires_grad
    with torch.no_grad():
        assert not reward(column(1.0).requires_grad_()).requires_grad
    constant = Reward(lambda x: x.numpy()[:, 0], differentiable=False)
    assert not constant(column(1.0).requires_grad_()).requires_grad


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": "jpeg"}, "input='jpeg'; choose one of"),
        ({"on_error": "ignore"}, "on_error='ignore'; choose one of"),
        ({"on_nan": "0"}, "on_nan='0'; choose one of"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"cache": -1}, "cache=-1"),
        ({"differentiable": True, "input": "pil"}, "differentiable=True needs"),
        ({"differentiable": True, "noisy": True}, "differentiable=True needs"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reward(len, **options)


def test_a_reward_must_be_callable() -> None:
    with pytest.raises(ValueError, match="a reward is a callable"):
        Reward(3.0)  # type: ignore[arg-type]


def test_names_and_declared_differentiability() -> None:
    def grader(x: torch.Tensor) -> torch.Tensor:
        return x[:, 0]

    assert Reward(grader).name == "grader"
    assert Reward(per_sample(grader)).name == "grader"
    assert Reward(Recorder()).name == "Recorder"
    assert Reward(grader).differentiable is None
    assert Reward(grader, input="pil").differentiable is False


def test_scoring_leaves_the_random_stream_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Reward(lambda x: x[:, 0], cache=True)(column(1.0, 2.0))
    assert torch.equal(torch.rand(2), expected)
