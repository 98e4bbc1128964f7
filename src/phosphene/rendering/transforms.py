"""Random transforms of an image while it is optimised: `transform(image, draws) -> image`.

An image that keeps its score under small shifts, turns and scalings shows what the filter responds to, rather than a
fragile pattern of pixels (Olah et al., "Feature Visualization", Distill 2017). Every image of a batch has its own
random generator, so that its random numbers do not depend on the rest of the batch.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Transform = Callable[[Tensor, "RandomDraws"], Tensor]


class RandomDraws:
    """Random numbers for a batch of images, each image from its own generator."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()) -> Tensor:
        """Return (n, *shape) numbers uniform in [low, high), float64 on the CPU."""
        rows = [torch.rand(shape, generator=generator, dtype=torch.float64) for generator in self.generators]
        return torch.stack(rows) * (high - low) + low

    def signed_uniform(self, limit: float, least: float = 0.0) -> Tensor:
        """Return (n,) numbers of either sign whose size is uniform in [`least` · `limit`, `limit`]."""
        number = self.uniform(-1, 1)
        return limit * number.sign() * (least + (1 - least) * number.abs())

    def normal(self, shape: tuple[int, ...] = ()) -> Tensor:
        """Return (n, *shape) standard normal numbers, float64 on the CPU."""
        rows = [torch.randn(shape, generator=generator, dtype=torch.float64) for generator in self.generators]
        return torch.stack(rows)


def resample(image: Tensor, shift: Tensor, degrees: Tensor, scale: Tensor, padding: str = "reflection") -> Tensor:
    """Return the images shifted, turned about their centre and scaled, in one bilinear resampling.

    image (n, c, h, w); shift (n, 2) in pixels, down and right; degrees (n,) counter-clockwise; scale (n,), above 1
    enlarges. By default the image is mirrored at its border.
    """
    height, width = image.shape[-2:]
    angle = degrees * (math.pi / 180)
    # affine_grid maps output positions to input positions, in coordinates that run from -1 to 1 along each side
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    right, down = -2 * shift[:, 1] / width, -2 * shift[:, 0] / height
    rows = [
        torch.stack([cos, -sin * height / width, cos * right - sin * down * height / width], -1),
        torch.stack([sin * width / height, cos, sin * right * width / height + cos * down], -1),
    ]
    theta = torch.stack(rows, 1).to(image)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def affine(pixels: float = 0.0, degrees: float = 0.0, scale: float = 0.0, least: float = 0.0) -> Transform:
    """Return a transform that shifts by up to ±`pixels`, turns by up to ±`degrees`, scales by 1 ± `scale`, at once.

    Turns and scalings have at least the share `least` of their full size, so that every step resamples the image:
    otherwise the ascent exploits sharp pixel patterns, which are lost as soon as they move.
    """

    def transform(image: Tensor, draws: RandomDraws) -> Tensor:
        shift = draws.uniform(-pixels, pixels, (2,))
        turn = draws.signed_uniform(degrees, least)
        return resample(image, shift, turn, 1 + draws.signed_uniform(scale, least))

    return transform


def jitter(pixels: int = 8) -> Transform:
    """Return a transform that moves each image by whole pixels, up to ±`pixels` down and right, wrapping around."""

    def transform(image: Tensor, draws: RandomDraws) -> Tensor:
        moves = draws.uniform(-pixels, pixels + 1, (2,)).floor().long().to(image.device)
        for axis in (-2, -1):
            indices = torch.arange(image.shape[axis], device=image.device) - moves[:, axis, None]
            indices = indices.remainder(image.shape[axis])[:, None]  # (n, 1, h) or (n, 1, w)
            image = image.gather(axis, indices.unsqueeze(-1 if axis == -2 else -2).expand_as(image))
        return image

    return transform


def scale(low: float = 0.9, high: float = 1.1) -> Transform:
    """Return a transform that scales each image about its centre by a factor uniform in [low, high)."""

    def transform(image: Tensor, draws: RandomDraws) -> Tensor:
        factor = draws.uniform(low, high)
        zero = torch.zeros_like(factor)
        return resample(image, torch.stack([zero, zero], 1), zero, factor)

    return transform


def rotate(degrees: float = 10.0) -> Transform:
    """Return a transform that turns each image about its centre by up to ±`degrees`."""
    return affine(degrees=degrees)


def pad(pixels: int = 12, value: float = 0.5) -> Transform:
    """Return a transform that puts `pixels` of a constant `value` around each image."""
    return lambda image, draws: F.pad(image, [pixels] * 4, value=value)


def blur(sigma: float = 1.0) -> Transform:
    """Return a Gaussian blur of standard deviation `sigma` pixels, mirrored at the border."""
    radius = max(1, math.ceil(3 * sigma))

    def transform(image: Tensor, draws: RandomDraws) -> Tensor:
        offsets = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
        kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
        kernel = kernel / kernel.sum()
        channels = image.shape[1]
        vertical = kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
        padded = F.pad(image, [radius] * 4, mode="reflect")
        return F.conv2d(F.conv2d(padded, vertical, groups=channels), vertical.transpose(2, 3), groups=channels)

    return transform


TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "affine": affine,
    "jitter": jitter,
    "scale": scale,
    "rotate": rotate,
    "pad": pad,
    "blur": blur,
}
