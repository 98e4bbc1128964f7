"""Step rules: numbers by hand, torch's Adam as an oracle, and that images of a batch know nothing of each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.rendering.step_rules import (
    STEP_RULES,
    State,
    StepRule,
    adam,
    image_mean,
    max_step,
    momentum,
    normalised_adam,
    rms_step,
    std_step,
)

GRADIENT = torch.tensor([[[[4.0, -2.0], [0.0, -6.0]]], [[[-1.0, -3.0], [-2.0, -2.0]]]], dtype=torch.float64)


def updates(rule: StepRule, gradients: list[Tensor]) -> list[Tensor]:
    """Return what a rule makes of gradients that come one after the other."""
    state: State = None
    outputs = []
    for gradient in gradients:
        update, state = rule(gradient, state)
        outputs.append(update)
    return outputs


def test_max_divides_by_the_signed_maximum() -> None:
    update, state = max_step(2.0)(GRADIENT, None)
    assert state is None
    assert update[0].flatten().tolist() == pytest.approx([2.0, -1.0, 0.0, -3.0], rel=1e-8)
    # where every entry is negative the maximum is too, and the step turns round: so it is in the original
    assert update[1].flatten().tolist() == pytest.approx([2.0, 6.0, 4.0, 4.0], rel=1e-7)
    assert max_step(2.0, epsilon=4.0)(GRADIENT, None)[0][0].flatten().tolist() == [1.0, -0.5, 0.0, -1.5]


def test_std_divides_by_the_standard_deviation_of_the_population() -> None:
    update, _ = std_step(3.0)(GRADIENT, None)
    # mean -1, squared deviations 25, 1, 1, 25; then mean -2, squared deviations 1, 1, 0, 0
    assert update[0].flatten().tolist() == pytest.approx([3 * g / math.sqrt(13) for g in (4, -2, 0, -6)], rel=1e-7)
    assert update[1].flatten().tolist() == pytest.approx([3 * g / math.sqrt(0.5) for g in (-1, -3, -2, -2)], rel=1e-7)


def test_rms_divides_by_the_root_mean_square() -> None:
    update, _ = rms_step(1.0)(GRADIENT, None)
    assert update[0].flatten().tolist() == pytest.approx([g / (math.sqrt(14) + 1e-5) for g in (4, -2, 0, -6)])
    assert update[1].flatten().tolist() == pytest.approx([g / (math.sqrt(4.5) + 1e-5) for g in (-1, -3, -2, -2)])


def test_momentum_keeps_a_part_of_the_last_step() -> None:
    first, second = updates(momentum(10.0, keep=0.75), [GRADIENT[:1], 5 * GRADIENT[:1].flip(-1)])
    root = math.sqrt(14)
    assert first.flatten().tolist() == pytest.approx([2.5 * g / root for g in (4, -2, 0, -6)])
    # 0.75 of the first velocity, and a quarter of the new direction, however long the gradient is
    expected = [
        0.75 * 2.5 * old / root + 2.5 * new / root for old, new in zip((4, -2, 0, -6), (-2, 4, -6, 0), strict=True)
    ]
    assert second.flatten().tolist() == pytest.approx(expected)


def random_gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    scales = [10.0**k for k in range(-6, -6 + count)]
    return [scale * torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64) for scale in scales]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_adam_is_torchs_adam_climbing(betas: tuple[float, float]) -> None:
    gradients = random_gradients(8)
    parameter = torch.zeros(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([parameter], lr=0.07, betas=betas, maximize=True)
    at = torch.zeros_like(parameter)
    for update, gradient in zip(updates(adam(0.07, betas), gradients), gradients, strict=True):
        parameter.grad = gradient
        optimiser.step()
        at = at + update
        assert torch.allclose(at, parameter, rtol=1e-12, atol=1e-15)


def test_normalised_adam_is_adam_of_each_images_gradient_at_unit_size() -> None:
    gradients = random_gradients(5)
    unit = [torch.stack([image / image.square().mean().sqrt() for image in gradient]) for gradient in gradients]
    ours = updates(normalised_adam(0.05), gradients)
    expected = updates(adam(0.05, (0.5, 0.9)), unit)
    assert all(
        torch.allclose(update, expected_update, rtol=1e-10, atol=0)
        for update, expected_update in zip(ours, expected, strict=True)
    )


@pytest.mark.parametrize("shape", [(2, 3, 6, 4, 2), (2, 3, 6, 4), (1, 2, 1, 2)])
def test_adam_with_a_window_divides_by_what_is_typical_around(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(5)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    mean, square = np.zeros(shape), np.zeros(shape)
    for count, (gradient, update) in enumerate(
        zip(gradients, updates(adam(0.3, (0.5, 0.8), window=3), gradients), strict=True), start=1
    ):
        mean = 0.5 * mean + 0.5 * gradient.numpy()
        square = 0.8 * square + 0.2 * gradient.numpy() ** 2
        mean_square = square / (1 - 0.8**count)
        for place in np.ndindex(*shape):
            image, channel, row, column = place[:4]
            around = mean_square[image, channel, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].mean()
            typical = (mean_square[place] * around) ** 0.25
            expected = 0.3 * mean[place] / (1 - 0.5**count) / (typical + 1e-8)
            assert update[place].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("window", [0, 2, -3])
def test_a_window_is_an_odd_number(window: int) -> None:
    with pytest.raises(InvalidRequest, match=f"an odd number of entries, not {window}"):
        normalised_adam(0.1, window=window)


@pytest.mark.parametrize("name", [*STEP_RULES, "windowed"])
@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (5, 3, 17, 9, 2), (5, 3, 150, 150)])
def test_an_image_steps_alone_exactly_as_in_a_batch(name: str, shape: tuple[int, ...]) -> None:
    rule = normalised_adam(0.3, window=5) if name == "windowed" else STEP_RULES[name](rate=0.3)
    generator = torch.Generator().manual_seed(9)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    together = updates(rule, gradients)
    for rows in (slice(0, 1), slice(3, 4), slice(1, 3)):
        alone = updates(rule, [gradient[rows] for gradient in gradients])
        assert all(
            torch.equal(update, batch_update[rows]) for update, batch_update in zip(alone, together, strict=True)
        )


@pytest.mark.parametrize("name", STEP_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_means_no_step(name: str, dtype: torch.dtype) -> None:
    windowed = [normalised_adam(2.0, window=3)] if name == "normalised-adam" else []
    for rule in (STEP_RULES[name](rate=2.0), *windowed):
        for update in updates(rule, [torch.zeros(2, 3, 4, 4, dtype=dtype)] * 2):
            assert not update.any()


def test_the_mean_of_each_image() -> None:
    assert image_mean(GRADIENT).tolist() == [[[[-1.0]]], [[[-2.0]]]]
