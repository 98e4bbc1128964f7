"""Class activation maps: each by hand on two channels of 2×2."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phosphene.inspection.attribution_methods import CAMS, eigencam, gradient, integrated_gradients, smoothgrad

ACTS = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]]], dtype=torch.float64)
GRADS = torch.tensor([[[[1.0, 0.0], [-1.0, 2.0]], [[-2.0, 1.0], [0.0, -1.0]]]], dtype=torch.float64)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradcam_by_hand() -> None:
    # mean gradients: (1 + 0 - 1 + 2) / 4 = 0.5 and (-2 + 1 + 0 - 1) / 4 = -0.5
    assert CAMS["gradcam"](ACTS, GRADS).tolist() == [[[0.5, 0.5], [1.0, 2.0]]]


def test_hirescam_by_hand() -> None:
    assert CAMS["hirescam"](ACTS, GRADS).tolist() == [[[1.0, 1.0], [-3.0, 8.0]]]


def test_layercam_by_hand() -> None:
    assert CAMS["layercam"](ACTS, GRADS).tolist() == [[[1.0, 1.0], [0.0, 8.0]]]


def test_xgradcam_by_hand() -> None:
    # weights: (1 + 0 - 3 + 8) / (1 + 2 + 3 + 4) = 0.6 and (0 + 1 + 0 + 0) / 2 = 0.5
    expected = torch.tensor([[[0.6, 1.7], [2.3, 2.4]]], dtype=torch.float64)
    torch.testing.assert_close(CAMS["xgradcam"](ACTS, GRADS), expected, rtol=0, atol=1e-15)


def test_gradcam_plus_plus_by_hand() -> None:
    # alpha = g² / (2 g² + g³ sum A), sums of A: 10 and 2; positive gradients: 1 and 2, and 1
    first, second = 1 / (2 + 10) * 1 + 4 / (8 + 80) * 2, 1 / (2 + 2) * 1
    expected = first * ACTS[:, 0] + second * ACTS[:, 1]
    torch.testing.assert_close(CAMS["gradcam++"](ACTS, GRADS), expected, rtol=0, atol=1e-15)


def test_eigencam_by_hand() -> None:
    # one channel twice the other: the first component is all there is, of length sqrt(1 + 4), with the channels' sign
    pattern = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64)
    for sign in (1, -1):
        acts = sign * torch.stack([pattern, 2 * pattern])[None]
        torch.testing.assert_close(eigencam(acts, GRADS), sign * 5**0.5 * pattern[None], rtol=1e-12, atol=1e-12)


def test_eigencam_is_the_best_single_map() -> None:
    acts = noise(1, 6, 4, 5)
    pattern = eigencam(acts, acts).flatten()
    pattern = pattern / pattern.norm()
    explained = (acts.flatten(2)[0] @ pattern).square().sum()
    greatest = torch.linalg.eigvalsh(acts.flatten(2)[0].T @ acts.flatten(2)[0])[-1]
    torch.testing.assert_close(explained, greatest, rtol=1e-12, atol=0)
    assert float((pattern * acts.sum(1).flatten()).sum()) >= 0


@pytest.mark.parametrize("name", CAMS)
def test_each_image_of_a_batch_has_its_own_map(name: str) -> None:
    acts, grads = noise(3, 4, 5, 6), noise(3, 4, 5, 6, seed=2)
    together = CAMS[name](acts, grads)
    alone = torch.cat([CAMS[name](acts[index : index + 1], grads[index : index + 1]) for index in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CAMS)
def test_channels_that_never_fire_and_no_gradient_give_zero(name: str) -> None:
    nothing = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    assert not CAMS[name](nothing, nothing).any()
    with_dead = CAMS[name](torch.cat([ACTS, ACTS * 0], 1), torch.cat([GRADS, GRADS * 0 + 1], 1))
    torch.testing.assert_close(with_dead, CAMS[name](ACTS, GRADS), rtol=1e-12, atol=1e-12)


def test_gradients_of_two_channels_are_summed_by_hand() -> None:
    image = torch.tensor([[[[0.5, 1.0]], [[0.25, 0.0]]]])

    def input_gradient(
        images: Tensor,
    ) -> Tensor:  # of the first channel's sum minus three times the second's
        return torch.tensor([1.0, -3.0]).view(1, 2, 1, 1).expand_as(images)

    assert gradient(input_gradient, image).tolist() == [[[-2.0, -2.0]]]
    assert smoothgrad(input_gradient, image).tolist() == [[[-2.0, -2.0]]]
    assert integrated_gradients(input_gradient, image).tolist() == [[[0.5 - 0.75, 1.0]]]


def test_integrated_gradients_sum_to_the_difference_of_scores() -> None:
    image, weights = noise(2, 3, 4, 4), noise(3, 4, 4, seed=2)
    maps = integrated_gradients(lambda images: 2 * images * weights, image, steps=3)  # of sum(weights · image²)
    torch.testing.assert_close(maps.sum((1, 2)), (weights * image**2).sum((1, 2, 3)), rtol=1e-12, atol=1e-12)


def test_smoothgrad_averages_over_noise_of_its_own() -> None:
    image = torch.tensor([[[[0.0, 1.0]]], [[[0.0, 2.0]]]], dtype=torch.float64)
    noises: list[Tensor] = []

    def input_gradient(images: Tensor) -> Tensor:
        noises.append(images - image)
        return images

    before = torch.get_rng_state()
    maps = smoothgrad(input_gradient, image, samples=2000, noise=0.1)
    assert torch.equal(before, torch.get_rng_state())
    drawn = torch.stack(noises)
    assert drawn[:, 0].std().item() == pytest.approx(0.1, rel=0.05)
    torch.testing.assert_close(drawn[:, 1], 2 * drawn[:, 0])  # the second image has twice the range
    torch.testing.assert_close(maps, (image + drawn.mean(0))[:, 0])
