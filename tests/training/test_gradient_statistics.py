"""Statistics of an epoch's gradients: worked out by hand, and independent of how the passes are divided."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from phosphene.training.gradient_statistics import (
    AccumulationTracker,
    RunningGradients,
    count_at_once,
    count_each,
    single_batch,
)


def counts(histogram: Tensor) -> dict[int, int]:
    """Return the bins that count anything, by exponent."""
    return {number - 127: int(count) for number, count in enumerate(histogram) if count}


def test_the_mean_norms_and_histogram_of_two_batches_by_hand() -> None:
    running = RunningGradients()
    running.add({"w": torch.tensor([3.0, -4.0]), "b": torch.tensor([0.5])})
    running.add({"w": torch.tensor([0.0, 1.0])})
    gradients = running.take()
    assert gradients["w"].mean.tolist() == [1.5, -1.5]
    assert gradients["w"].norm == (5 + 1) / 2
    assert gradients["w"].mean_abs == (3.5 + 0.5) / 2
    assert counts(gradients["w"].histogram) == {-127: 1, 0: 1, 1: 1, 2: 1}  # 0, 1, 3, 4
    assert (gradients["w"].batches, gradients["w"].nonfinite, gradients["w"].first_nonfinite) == (2, 0, None)
    assert (gradients["b"].batches, gradients["b"].mean.tolist(), gradients["b"].norm) == (1, [0.5], 0.5)
    assert running.take() == {}
    assert running.batches == 0


def test_what_is_not_finite_is_kept_as_such_and_its_first_batch_named() -> None:
    running = RunningGradients()
    for value in (1.0, math.nan, math.inf, 2.0):
        running.add({"w": torch.tensor([value, 1.0]), "v": torch.tensor([1.0])})
    gradients = running.take()
    assert (gradients["w"].nonfinite, gradients["w"].first_nonfinite, gradients["w"].batches) == (2, 1, 4)
    assert math.isnan(gradients["w"].mean[0])
    assert gradients["w"].mean[1] == 1
    assert math.isnan(gradients["w"].norm)
    assert counts(gradients["w"].histogram) == {0: 5, 1: 1, 128: 2}
    assert (gradients["v"].nonfinite, gradients["v"].mean.tolist()) == (0, [1.0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_histogram_counts_powers_of_two_in_every_dtype_and_order_of_memory(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(4, 3, 5, 5, generator=generator) * 0.01).to(dtype)
    expected: dict[int, int] = {}
    for value in values.double().flatten().tolist():
        exponent = math.frexp(value)[1] - 1 if value else -127
        expected[exponent] = expected.get(exponent, 0) + 1
    for laid in (values, values.to(memory_format=torch.channels_last), values.transpose(0, 3)):
        assert counts(single_batch(laid).histogram) == expected


def test_a_gpu_s_way_of_counting_gives_the_same() -> None:
    exponents = [torch.tensor(values, dtype=torch.int16) for values in ([0, 3, 3, 255], [255, 1], [3])]
    for at_once, each in zip(count_at_once(exponents), count_each(exponents), strict=True):
        assert at_once.tolist() == each.tolist()
    assert counts(count_each(exponents)[0]) == {-127: 1, -124: 2, 128: 1}


def test_a_scale_is_divided_out_and_low_precision_summed_in_float32() -> None:
    running = RunningGradients()
    for _ in range(300):
        running.add({"w": torch.tensor([1024.0], dtype=torch.bfloat16)}, scale=1024.0)
    gradient = running.take()["w"]
    assert gradient.mean.dtype == torch.float32
    assert gradient.mean.tolist() == [1.0]  # bfloat16 would have stopped at 256 of 300
    assert gradient.norm == 1


def test_sparse_gradients_are_taken_whole() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    torch.autograd.backward(table(torch.tensor([1, 1])).sum())
    assert table.weight.grad is not None
    assert single_batch(table.weight.grad).mean.tolist() == [[0, 0], [2, 2], [0, 0], [0, 0]]


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_each_pass_is_told_apart_where_gradients_accumulate(to_none: bool, clip: bool) -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer, tracker = torch.optim.SGD([weight], lr=0.5), AccumulationTracker()
    for step in range(3):
        optimizer.zero_grad(set_to_none=to_none)
        for part in range(3):
            gradient = torch.tensor([1.0 + step, 2.0**part], dtype=torch.float64)
            torch.autograd.backward((weight * gradient).sum())
            assert weight.grad is not None
            assert tracker.since_last({"w": weight.grad})["w"].tolist() == gradient.tolist()
        if clip:
            nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()


def test_a_weight_that_a_pass_did_not_reach_has_no_gradient_in_it() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    tracker = AccumulationTracker()
    torch.autograd.backward(first + second)
    assert set(tracker.since_last({"a": first.grad, "b": second.grad})) == {"a", "b"}  # type: ignore[dict-item]
    torch.autograd.backward(2 * first)
    added = tracker.since_last({"a": first.grad, "b": second.grad})  # type: ignore[dict-item]
    assert {name: value.tolist() for name, value in added.items()} == {"a": [2.0]}
