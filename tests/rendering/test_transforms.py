"""Transforms, measured: what an image of coordinates becomes tells where every pixel was taken from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene.rendering.transforms import TRANSFORMS, RandomDraws, affine, blur, jitter, pad, resample, rotate, scale


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def moved(image: Tensor, down: float = 0, right: float = 0, degrees: float = 0, factor: float = 1) -> Tensor:
    return resample(image, numbers(down, right)[None], numbers(degrees), numbers(factor))


def coordinates(count: int, height: int, width: int) -> Tensor:
    """Return images of two channels, (y, x) of each pixel from the centre; linear, so bilinear sampling is exact."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) - (height - 1) / 2,
        torch.arange(width, dtype=torch.float64) - (width - 1) / 2,
        indexing="ij",
    )
    return torch.stack([y, x])[None].repeat(count, 1, 1, 1)


def measured(transformed: Tensor) -> list[tuple[float, float, float, float]]:
    """Return (down, right, degrees, factor) of each transformed coordinate image, from its middle third."""
    height, width = transformed.shape[-2:]
    to = coordinates(1, height, width)[0]
    middle = (slice(height // 3, height - height // 3), slice(width // 3, width - width // 3))
    measurements = []
    for image in transformed:
        design = torch.stack([*(axis[middle].flatten() for axis in to), torch.ones_like(to[0][middle].flatten())], 1)
        sources = torch.stack([axis[middle].flatten() for axis in image], 1)
        solved = torch.linalg.lstsq(design, sources)
        assert float((design @ solved.solution - sources).abs().max()) < 1e-9  # it is an affine map
        back, offset = solved.solution[:2].T, solved.solution[2]
        forth = torch.linalg.inv(back)  # (y, x) of a pixel -> where it went
        down, right = (-forth @ offset).tolist()
        (yy, yx), (xy, xx) = forth.tolist()
        assert (yy, yx) == (pytest.approx(xx), pytest.approx(-xy))  # a turn and a scaling, no shear
        measurements.append((down, right, math.degrees(math.atan2(xy, xx)), math.hypot(xx, xy)))
    return measurements


def test_a_shift_by_whole_pixels_moves_down_and_right_and_mirrors_the_rest_in() -> None:
    image = noise(1, 2, 6, 9)
    out = moved(image, down=2, right=-3)
    assert torch.allclose(out[..., 2:, :6], image[..., :4, 3:], atol=1e-12)
    assert torch.allclose(out[..., 0, :6], image[..., 1, 3:], atol=1e-12)  # above the top edge: row 1, then row 0
    assert torch.allclose(out[..., 1, :6], image[..., 0, 3:], atol=1e-12)
    assert torch.allclose(out[..., 2:, 6], image[..., :4, 8], atol=1e-12)


def test_half_a_pixel_is_the_mean_of_two() -> None:
    image = noise(1, 1, 4, 6)
    assert torch.allclose(moved(image, right=0.5)[..., 1:], (image[..., 1:] + image[..., :-1]) / 2, atol=1e-12)


@pytest.mark.parametrize("size", [6, 7])
def test_a_quarter_turn_of_a_square_is_counter_clockwise(size: int) -> None:
    image = noise(2, 3, size, size)
    both = resample(image, torch.zeros(2, 2, dtype=torch.float64), numbers(90, -90), numbers(1, 1))
    assert torch.allclose(both[0], torch.rot90(image[0], 1, (-2, -1)), atol=1e-12)
    assert torch.allclose(both[1], torch.rot90(image[1], -1, (-2, -1)), atol=1e-12)
    marked = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    marked[0, 0, 2, 4] = 1.0  # right of the centre, which goes to the top
    assert moved(marked, degrees=90)[0, 0, 0, 2].item() == pytest.approx(1.0)


@pytest.mark.parametrize(("height", "width"), [(6, 10), (9, 5)])
def test_an_oblong_image_turns_without_being_squashed(height: int, width: int) -> None:
    image = noise(1, 1, height, width)
    assert torch.allclose(moved(image, degrees=180), image.flip(-1, -2), atol=1e-12)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = (..., slice(top, top + side), slice(left, left + side))
    turned = moved(image, degrees=90)[square]
    assert torch.allclose(turned, torch.rot90(image[square], 1, (-2, -1)), atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (12, 4)])
def test_a_scaling_by_two_is_the_middle_of_the_enlarged_image(height: int, width: int) -> None:
    image = noise(1, 3, height, width)
    enlarged = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
    middle = enlarged[..., height // 2 : -height // 2, width // 2 : -width // 2]
    assert torch.allclose(moved(image, factor=2), middle, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(30, 30), (24, 40), (41, 27)])
def test_shift_turn_and_scaling_together_on_any_shape(height: int, width: int) -> None:
    wanted = [(1.5, -2.25, 12.0, 1.1), (-0.5, 0.75, -33.0, 0.9), (0.0, 3.0, 0.0, 1.0)]
    down, right, degrees, factor = (numbers(*column) for column in zip(*wanted, strict=True))
    out = resample(coordinates(3, height, width), torch.stack([down, right], 1), degrees, factor)
    assert np.array(measured(out)) == pytest.approx(np.array(wanted), abs=1e-9)


def test_affine_draws_within_its_limits_and_all_of_them() -> None:
    out = affine(pixels=3.0, degrees=10.0, scale=0.1)(coordinates(200, 30, 36), RandomDraws(range(200)))
    moves = np.array(measured(out))
    for column, low, high in zip(moves.T, (-3, -3, -10, 0.9), (3, 3, 10, 1.1), strict=True):
        span = high - low
        assert low <= column.min() < low + 0.05 * span
        assert high - 0.05 * span < column.max() <= high
        assert abs(column.mean() - (low + high) / 2) < 0.1 * span
    assert abs(np.corrcoef(moves.T) - np.eye(4)).max() < 0.25  # drawn independently of each other


def test_affine_moves_at_least_by_the_share_it_is_told() -> None:
    transform = affine(pixels=3.0, degrees=8.0, scale=0.1, least=0.5)
    shift, turn, factor = np.split(
        np.array(measured(transform(coordinates(400, 30, 36), RandomDraws(range(400))))), [2, 3], 1
    )
    assert abs(shift).min() < 0.1  # shifts are of any size
    for values, most in ((turn, 8.0), (factor - 1, 0.1)):
        size, positive = abs(values), float((values > 0).mean())
        assert 0.5 * most <= size.min() < 0.52 * most
        assert 0.98 * most < size.max() <= most
        assert size.mean() == pytest.approx(0.75 * most, rel=0.02)
        assert positive == pytest.approx(0.5, abs=0.1)


def test_scale_and_rotate_do_what_they_say_alone() -> None:
    scaled = np.array(measured(scale(0.8, 1.3)(coordinates(50, 30, 24), RandomDraws(range(50)))))
    assert abs(scaled[:, :3]).max() < 1e-9
    assert 0.8 <= scaled[:, 3].min() < 0.85
    assert 1.25 < scaled[:, 3].max() < 1.3
    turned = np.array(measured(rotate(20.0)(coordinates(50, 30, 24), RandomDraws(range(50)))))
    assert abs(turned[:, [0, 1]]).max() < 1e-9
    assert turned[:, 3] == pytest.approx(np.ones(50))
    assert -20 <= turned[:, 2].min() < -17
    assert 17 < turned[:, 2].max() <= 20


def test_jitter_rolls_by_whole_pixels() -> None:
    image = noise(1, 2, 7, 9).expand(300, -1, -1, -1)
    out = jitter(2)(image, RandomDraws(range(300)))
    moves = set()
    for picture in out:
        fitting = [
            (down, right)
            for down in range(-3, 4)
            for right in range(-3, 4)
            if torch.equal(picture, image[0].roll((down, right), (-2, -1)))
        ]
        assert len(fitting) == 1
        moves.add(fitting[0])
    assert moves == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


def test_pad_puts_a_constant_around() -> None:
    image = noise(2, 3, 4, 5)
    out = pad(3, 0.25)(image, RandomDraws([0, 1]))
    assert out.shape == (2, 3, 10, 11)
    assert torch.equal(out[..., 3:7, 3:8], image)
    assert out.sum().item() == pytest.approx(image.sum().item() + 0.25 * 2 * 3 * (10 * 11 - 4 * 5))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_a_convolution_with_the_bell_curve(sigma: float) -> None:
    image = noise(2, 3, 13, 11)
    out = blur(sigma)(image, RandomDraws([0, 1]))
    radius = math.ceil(3 * sigma)
    at = np.arange(-radius, radius + 1)
    bell = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * sigma**2))
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (radius, radius), (radius, radius)), "reflect")
    expected = np.zeros(image.shape)
    for down, row in enumerate(bell / bell.sum()):
        for right, weight in enumerate(row):
            expected += weight * padded[..., down : down + 13, right : right + 11]
    assert out.numpy() == pytest.approx(expected, abs=1e-12)
    flat = torch.full((1, 1, 13, 11), 0.3, dtype=torch.float64)
    assert torch.allclose(blur(sigma)(flat, RandomDraws([0])), flat, atol=1e-14)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_drawn_for_an_image_does_not_depend_on_its_batch(name: str) -> None:
    options = {"affine": {"pixels": 2.0, "degrees": 10.0, "scale": 0.1}}.get(name, {})
    transform = TRANSFORMS[name](**options)
    images, draws = noise(3, 3, 16, 16), RandomDraws([5, 6, 7])
    together = [transform(images, draws), transform(images, draws)]
    alone_draws = RandomDraws([6])
    for both in together:  # the second time too
        assert torch.equal(transform(images[1:2], alone_draws), both[1:2])
    if name not in ("pad", "blur"):
        assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_flow_through(name: str) -> None:
    options = {"affine": {"pixels": 2.0, "degrees": 10.0, "scale": 0.1}}.get(name, {})
    transform = TRANSFORMS[name](**options)
    image = noise(1, 1, 8, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda image: transform(image, RandomDraws([3])), image)


def test_draws_are_what_their_seed_says_and_of_the_wanted_spread() -> None:
    draws = RandomDraws([11, 12])
    first = draws.uniform(-2, 3, (1000,))
    assert first.shape == (2, 1000)
    alone = torch.rand(1000, generator=torch.Generator().manual_seed(12), dtype=torch.float64) * 5 - 2
    assert torch.equal(first[1], alone)
    assert -2 <= float(first.min()) < -1.95
    assert 2.95 < float(first.max()) < 3
    normal = draws.normal((1000,))
    assert abs(normal.mean().item()) < 0.1
    assert normal.std().item() == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(normal, draws.normal((1000,)))


def test_a_number_of_either_sign_by_hand() -> None:
    drawn, generator = RandomDraws([11]), torch.Generator().manual_seed(11)
    for least in (0.0, 0.25, 1.0):
        share = 2 * torch.rand((), generator=generator, dtype=torch.float64).item() - 1
        expected = math.copysign(6 * (least + (1 - least) * abs(share)), share)
        assert drawn.signed_uniform(6.0, least).tolist() == pytest.approx([expected])
