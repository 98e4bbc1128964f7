"""Parameterizations: what tensors stand for which images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.rendering.colour import decorrelate
from phosphene.rendering.parameterizations import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PARAMETERIZATIONS,
    Parameterization,
    disc,
    fourier,
    frequencies,
    maco,
    merge_mirrored_columns,
    natural_magnitude,
    natural_spectrum,
    offset_and_factor,
    pixels,
    spread,
)
from phosphene.rendering.transforms import RandomDraws

LIKE = torch.empty(0, dtype=torch.float64)
SHAPES = [(2, 3, 16, 16), (2, 1, 17, 15), (1, 7, 12, 21), (1, 3, 15, 10)]


def photo_like(channels: int, height: int, width: int) -> Tensor:
    """Return a smooth image with edges, (1, c, h, w) in 0.05..0.95."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    planes = []
    for channel in range(channels):
        smooth = 0.5 + 0.25 * torch.sin(3 * x + channel) * torch.cos(2 * y - channel)
        disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06).double()
        stripe = (x + 0.3 * y > 0.8).double()
        planes.append(smooth + 0.2 * disc - 0.2 * stripe)
    return torch.stack(planes)[None].double().clamp(0.05, 0.95)


def logits(image: Tensor) -> Tensor:
    """Return what an image is made of before the sigmoid, in uncorrelated channels."""
    return decorrelate(image.logit())


# --- pixels


@pytest.mark.parametrize(("low", "high"), [(128 / 255, 129 / 255), (0.2, 0.7)])
def test_pixels_start_uniform(low: float, high: float) -> None:
    image = pixels((2, 3, 40, 40), RandomDraws([1, 2]), LIKE, low, high).image()
    assert low <= image.min().item() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < image.max().item() < high
    assert image.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    assert not torch.equal(image[0], image[1])


def test_pixels_can_start_from_whole_bytes() -> None:
    image = pixels((1, 3, 60, 60), RandomDraws([1]), LIKE, 150 / 255, 180 / 255, "imagenet", whole=True).image() * 255
    assert (image - image.round()).abs().max().item() < 1e-12 * 255
    assert set(image.round().flatten().tolist()) == set(range(150, 180))


def test_the_units_of_pixels_by_hand() -> None:
    byte = pixels((1, 3, 1, 1), torch.tensor([[[[0.0]], [[0.5]], [[1.0]]]]), LIKE, unit="byte")
    assert byte.tensor.flatten().tolist() == pytest.approx([0.0, 127.5, 255.0])
    imagenet = pixels((1, 3, 1, 1), torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64), LIKE, unit="imagenet")
    expected = [(0.5 - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    assert imagenet.tensor.flatten().tolist() == pytest.approx(expected)
    one = pixels((1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.25, dtype=torch.float64), LIKE, unit="one")
    assert one.tensor.item() == 0.25
    grey = pixels((1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.75, dtype=torch.float64), LIKE, unit="imagenet")
    assert grey.tensor.item() == 1.0  # 0.5 ± 0.25 where there are no three colours
    with torch.no_grad():
        byte.tensor.add_(51.0)
        imagenet.tensor.add_(1.0)
    assert byte.image().flatten().tolist() == pytest.approx([0.2, 0.7, 1.2])  # not held inside 0..1
    assert imagenet.image().flatten().tolist() == pytest.approx([0.5 + std for std in IMAGENET_STD])


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="byte, imagenet or one, not 'bit'"):
        offset_and_factor("bit", 3)


@pytest.mark.parametrize("unit", ["byte", "imagenet", "one"])
def test_pixels_give_back_the_image_they_start_from(unit: str) -> None:
    image = photo_like(3, 9, 14)
    before = image.clone()
    start = pixels((1, 3, 9, 14), image, LIKE, unit=unit)
    assert torch.allclose(start.image(), image, rtol=0, atol=1e-15)
    with torch.no_grad():
        start.tensor.add_(1.0)
    assert torch.equal(image, before)  # the photo is not written to
    # on whole bytes, as a photo has them, in the network's float32 too
    photo = (torch.arange(256, dtype=torch.float32) / 255).view(1, 1, 16, 16)
    back = pixels((1, 1, 16, 16), photo, torch.empty(0), unit=unit).image()
    assert torch.equal((back * 255).round(), (photo * 255).round())


# --- fourier


def test_frequencies_by_hand() -> None:
    assert frequencies(4, 5).tolist() == [
        pytest.approx([math.hypot(down, right) for right in (0, 0.2, 0.4)]) for down in (0, 0.25, -0.5, -0.25)
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_fourier_starts_almost_grey_and_stays_in_range(shape: tuple[int, int, int, int]) -> None:
    start = fourier(shape, RandomDraws(range(shape[0])), LIKE)
    image = start.image()
    assert image.shape == shape
    assert (image - 0.5).abs().max().item() < 0.1
    assert image.std().item() > 1e-4
    with torch.no_grad():
        start.tensor.mul_(3000)
    assert start.image().min().item() >= 0
    assert start.image().max().item() <= 1
    assert start.image().std().item() > 0.3


@pytest.mark.parametrize("size", [16, 15])
def test_a_frequency_moves_the_picture_by_one_over_itself(size: int) -> None:
    start = fourier((1, 1, size, size), torch.full((1, 1, size, size), 0.5, dtype=torch.float64), LIKE)

    def amplitude(down: int, right: int) -> float:
        with torch.no_grad():
            start.tensor.zero_()
            start.tensor[0, 0, down, right, 0] = 1.0
        waves = start.image().detach().logit()
        # a coefficient inside the half spectrum stands for itself and its mirror image: twice a cosine
        x = torch.arange(size, dtype=torch.float64)
        cosine = torch.cos(2 * math.pi * (down * x[:, None] + right * x[None]) / size)
        factor = (waves * cosine).sum() / (cosine * cosine).sum()
        assert torch.allclose(waves[0, 0], factor * cosine, atol=1e-12)
        return float(factor)

    # 2 (mirror image) / 4 (to the sigmoid's range) · size (spectrum to picture) / size² (inverse transform) / frequency
    for down, right in ((0, 1), (0, 2), (3, 4), (2, 5)):
        assert amplitude(down, right) == pytest.approx(0.5 / size / (math.hypot(down, right) / size))


@pytest.mark.parametrize("shape", SHAPES)
def test_fourier_gives_back_the_image_it_starts_from(shape: tuple[int, int, int, int]) -> None:
    image = photo_like(*shape[1:]).expand(shape)
    assert (fourier(shape, image, LIKE).image() - image).abs().max().item() < 1e-12
    # black and white are out of a sigmoid's reach, by 0.2 %
    harsh = (image > 0.5).double()
    assert (fourier(shape, harsh, LIKE).image() - harsh).abs().max().item() == pytest.approx(0.002, abs=1e-9)


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (3, 33, 31), (1, 32, 31), (7, 31, 32)])
def test_fourier_can_fit_a_photo(channels: int, height: int, width: int) -> None:
    target = photo_like(channels, height, width)
    start = fourier(target.shape, RandomDraws([0]), LIKE)  # type: ignore[arg-type]
    optimiser = torch.optim.Adam([start.tensor], lr=0.1)

    def loss() -> Tensor:
        return (start.image() - target).square().mean()

    before = loss().item()
    for _ in range(120):
        optimiser.zero_grad()
        start.tensor.grad = torch.autograd.grad(loss(), start.tensor)[0]
        optimiser.step()
    assert loss().item() < before / 100


# --- maco


def test_the_spectrum_ships_with_the_package() -> None:
    spectrum = natural_spectrum()
    assert spectrum.shape == (3, 128, 65)
    assert spectrum.dtype == torch.float64
    light = spectrum[0]
    assert spectrum[:, 0, 0].tolist() == [0.0] * 3
    assert int((spectrum > 0).sum()) == 3 * (128 * 65 - 1)
    # natural pictures: amplitude falls about as 1 / frequency, and light varies more than colour
    for slow, fast in ((4, 8), (8, 16), (16, 32)):
        assert 1.5 < (light[0, slow] / light[0, fast]).item() < 3.5
        assert 1.5 < (light[slow, 0] / light[fast, 0]).item() < 3.5
    assert bool((light[1:40, 1:40].mean() > spectrum[1:, 1:40, 1:40].mean((1, 2))).all())


def test_the_magnitude_at_its_own_size_is_the_spectrum_itself() -> None:
    magnitude = natural_magnitude(3, 128, 128)
    assert magnitude[:, 0, 0].tolist() == [0.0] * 3
    inside = (slice(None), slice(1, None), slice(1, 64))
    assert torch.allclose(magnitude[inside], natural_spectrum()[inside], rtol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (256, 256), (64, 256), (96, 60)])
def test_a_frequency_has_the_same_magnitude_at_every_size(height: int, width: int) -> None:
    spectrum, magnitude = natural_spectrum(), natural_magnitude(3, height, width)
    for down, right in ((0.25, 0.125), (0.125, 0.25), (-0.25, 0.375), (0.25, 0.25)):
        scaled = (int(down * height) % height, int(right * width))
        stored = (int(down * 128) % 128, int(right * 128))
        if down * height == int(down * height) and right * width == int(right * width):
            assert magnitude[:, *scaled].tolist() == pytest.approx(spectrum[:, *stored].tolist(), rel=1e-9)


def test_waves_slower_than_the_stored_ones_are_not_weaker() -> None:
    magnitude, spectrum = natural_magnitude(1, 256, 256)[0], natural_spectrum()[0]
    slowest = sorted((spectrum[0, 1].item(), spectrum[1, 0].item()))
    assert slowest[0] <= magnitude[0, 1].item() <= slowest[1]  # one wave in 256 px; the file knows one in 128
    assert slowest[0] <= magnitude[1, 0].item() <= slowest[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_maco_keeps_the_magnitude_exactly_while_phases_change(shape: tuple[int, int, int, int]) -> None:
    start = maco(shape, RandomDraws(range(shape[0])), LIKE)
    magnitude = natural_magnitude(*shape[1:])

    def spectrum(image: Tensor) -> Tensor:
        coefficients: Tensor = torch.fft.rfft2(logits(image), norm="ortho")
        return coefficients

    first = spectrum(start.image())
    gradient = torch.autograd.grad(start.image().square().sum(), start.tensor)[0]
    with torch.no_grad():
        start.tensor.add_(3.0 * gradient / gradient.abs().amax())
    second = spectrum(start.image())
    assert (first.abs() - magnitude).abs().max().item() < 1e-9
    assert (second.abs() - magnitude).abs().max().item() < 1e-9
    assert (first - second).abs().max().item() > 0.1
    assert start.image().min().item() > 0
    assert start.image().max().item() < 1


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 1, 17, 15)])
def test_maco_takes_the_phases_of_the_image_it_starts_from(shape: tuple[int, int, int, int]) -> None:
    photo = photo_like(*shape[1:])
    wanted = torch.fft.rfft2(logits(photo), norm="ortho")
    coefficients = torch.fft.rfft2(logits(maco(shape, photo, LIKE).image()), norm="ortho")
    inside = (..., slice(None), slice(1, (shape[3] - 1) // 2 + 1))
    difference = (coefficients[inside] / coefficients[inside].abs()) - (wanted[inside] / wanted[inside].abs())
    assert difference.abs().max().item() < 1e-7


def test_the_edges_of_a_real_spectrum_hold_everything_twice() -> None:
    # rows 0, 1, 2 of three: row 0 is its own mirror image, rows 1 and 2 are each other's
    spectrum = torch.tensor([[1.0, 5.0, 7.0], [2.0, 5.0, 8.0], [4.0, 5.0, 10.0]])
    even = merge_mirrored_columns(spectrum, 4, lambda edge, mirrored: (edge - mirrored) / 2)
    assert even.tolist() == [[0.0, 5.0, 0.0], [-1.0, 5.0, -1.0], [1.0, 5.0, 1.0]]
    odd = merge_mirrored_columns(spectrum, 5, lambda edge, mirrored: (edge + mirrored) / 2)
    assert odd.tolist() == [[1.0, 5.0, 7.0], [3.0, 5.0, 8.0], [3.0, 5.0, 10.0]]


# --- all of them


def build(name: str, shape: tuple[int, int, int, int], start: Tensor | RandomDraws) -> Parameterization:
    return PARAMETERIZATIONS[name](shape, start, LIKE)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("size", [(16, 16), (15, 22)])
def test_an_image_of_a_batch_is_the_image_alone(name: str, size: tuple[int, int]) -> None:
    together = build(name, (3, 3, *size), RandomDraws([4, 5, 6]))
    alone = build(name, (1, 3, *size), RandomDraws([5]))
    assert torch.equal(alone.tensor[0], together.tensor[1])
    assert torch.allclose(alone.image()[0], together.image()[1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_tensor_is_a_leaf_of_the_networks_kind(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        for start in (RandomDraws([0]), photo_like(3, 8, 8)):
            made = PARAMETERIZATIONS[name]((1, 3, 8, 8), start, torch.empty(0, dtype=dtype))
            assert made.tensor.is_leaf
            assert made.tensor.requires_grad
            assert made.tensor.dtype == made.image().dtype == dtype


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("shape", [(1, 3, 6, 6), (1, 2, 5, 7)])
def test_gradients_agree_with_finite_differences(name: str, shape: tuple[int, int, int, int]) -> None:
    made = build(name, shape, RandomDraws([3]))
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = torch.autograd.grad((made.image() * weights).sum(), made.tensor)[0]
    direction = torch.randn(made.tensor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = []
    for side in (1e-5, -1e-5):
        with torch.no_grad():
            made.tensor.add_(side * direction)
            values.append((made.image() * weights).sum().item())
            made.tensor.sub_(side * direction)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


# --- the window and the contrast of a Fourier picture


@pytest.mark.parametrize("shape", SHAPES)
def test_a_windowed_picture_is_the_other_one_faded_to_its_mean_colour(shape: tuple[int, int, int, int]) -> None:
    height, width = shape[-2:]
    seeds = list(range(shape[0]))
    free = fourier(shape, RandomDraws(seeds), LIKE, deviation=2.0).image()
    windowed = fourier(shape, RandomDraws(seeds), LIKE, deviation=2.0, window=0.8).image()
    expected = torch.empty_like(windowed)
    for row in range(height):
        for column in range(width):
            down, right = (row + 0.5) * 2 / height - 1, (column + 0.5) * 2 / width - 1
            weight = 1 / (1 + math.exp(-(0.8 - math.hypot(down, right)) / 0.075))
            mean = free.logit().mean((-2, -1))
            expected[..., row, column] = (mean + weight * (free.logit()[..., row, column] - mean)).sigmoid()
    assert torch.allclose(windowed, expected, atol=1e-9)
    assert float((windowed[..., 0, 0] - free.logit().mean((-2, -1)).sigmoid()).abs().max()) < 2e-3


def test_the_contrast_is_brought_to_its_share_and_the_mean_colour_is_kept() -> None:
    parameterization = fourier((3, 3, 32, 32), RandomDraws([1, 2, 3]), LIKE, decay=1.3, window=0.9, contrast=0.25)
    inside = disc(32, 32, 0.9)
    before = parameterization.tensor[..., 0, 0, 0].clone()
    for progress in (0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0):
        with torch.no_grad():
            parameterization.project(progress)
    assert torch.equal(parameterization.tensor[..., 0, 0, 0], before)
    assert spread(parameterization.image(), inside).tolist() == pytest.approx([0.25] * 3, rel=0.02)
    with torch.no_grad():
        parameterization.project(0.1)
        parameterization.project(0.1)
    # far from saturation a step brings it there
    assert spread(parameterization.image(), inside).tolist() == pytest.approx([0.025] * 3, rel=0.2)


def test_the_spread_is_the_weighted_standard_deviation() -> None:
    image = torch.tensor([[[[0.0, 1.0, 0.5]], [[1.0, 1.0, 0.0]]]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 3.0, 0.0]], dtype=torch.float64)
    # values 0, 1, 1, 1, 1, 1, 1, 1 of equal weight
    assert spread(image, weight).tolist() == pytest.approx([math.sqrt(7 / 8 * 1 / 8)])


def test_a_photo_keeps_its_border_and_its_contrast() -> None:
    photo = photo_like(3, 24, 24)
    parameterization = fourier((1, 3, 24, 24), photo, LIKE, window=0.5, contrast=0.01)
    with torch.no_grad():
        parameterization.project(1.0)
    assert torch.allclose(parameterization.image(), photo, atol=1e-9)


def test_without_window_and_contrast_nothing_is_changed() -> None:
    shape = (2, 3, 16, 16)
    free = fourier(shape, RandomDraws([1, 2]), LIKE)
    tensor = free.tensor.clone()
    with torch.no_grad():
        free.project(0.5)
    assert torch.equal(free.tensor, tensor)
