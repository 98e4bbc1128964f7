"""The gradient of a convolution with respect to an image of few channels, several pixels at a time.

The last step back to a picture makes three channels out of many, and the convolutions of a CPU fill their vectors with
channels: most lanes stay empty. So a block of neighbouring pixels is computed as so many more channels, with a kernel
that holds the kernel of each, and then laid out as pixels: the sub-pixel convolution of Shi et al. 2016
(arXiv:1609.05158). The stride of the convolution, which otherwise leaves holes, is a part of that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene.network.batchnorm_folding import is_patched

LANES = 16  # channels that a vector holds in float32


def few_channel_convolutions(modules: Iterable[nn.Module]) -> list[nn.Conv2d]:
    """Return the convolutions among modules whose gradient is found faster so: on a CPU, of at most four channels."""
    return [one for one in modules if type(one) is nn.Conv2d and has_few_channels(one)]


def has_few_channels(convolution: nn.Conv2d) -> bool:
    """Return whether a convolution is of the kind that `gradient_kernel` knows, and nobody has changed it."""
    return (
        convolution.in_channels <= 4
        and convolution.groups == 1
        and set(convolution.dilation) == {1}
        and convolution.stride[0] == convolution.stride[1] <= 4
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and convolution.weight.device.type == "cpu"
        and not is_patched(convolution)
    )


@contextmanager
def subpixel(convolutions: Collection[nn.Conv2d]) -> Iterator[None]:
    """Have convolutions find gradients so inside, and leave them as they were."""
    try:
        for one in convolutions:
            vars(one)["forward"] = partial(forward, one)  # found before the class's own; hooks still run
        yield
    finally:
        for one in convolutions:
            vars(one).pop("forward", None)


def forward(convolution: nn.Conv2d, input: Tensor) -> Tensor:
    """Return what the convolution makes of images; the second name is what `nn.Conv2d` calls them."""
    found: Tensor = SubpixelConv.apply(input, convolution.weight, convolution)
    return found


class SubpixelConv(torch.autograd.Function):
    """A convolution, whose gradient with respect to the image alone is found as a sub-pixel convolution."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, convolution: nn.Conv2d) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.convolution, ctx.shape, ctx.dtype = convolution, image.shape, image.dtype
        made: Tensor = convolution._conv_forward(image, weight, convolution.bias)
        return made

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        found = gradient(slope, weight, ctx.convolution.stride[0], ctx.convolution.padding, ctx.shape[-2:])
        return found.to(ctx.dtype), None, None


def gradient(slope: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the gradient (b, c, h, w) with respect to an image of `size`, given that of what a convolution returned.

    slope (b, out, oh, ow); weight (out, c, kh, kw).
    """
    side = stride * max(1, int(math.sqrt(LANES / weight.shape[1]) / stride))
    rows, columns = (taps(count, stride, pad, side) for count, pad in zip(weight.shape[-2:], padding, strict=True))
    kernel = torch.einsum("rku,slv,ockl->crsouv", rows.matrix.to(weight), columns.matrix.to(weight), weight)
    kernel = kernel.flatten(0, 2).to(slope.dtype).contiguous(memory_format=torch.channels_last)
    before = [-rows.first, -columns.first]
    after = [
        one.missing(*known)
        for one, known in zip((rows, columns), zip(size, slope.shape[-2:], strict=True), strict=True)
    ]
    if min(before) < 0 or after[0] > before[0] or after[1] > before[1]:  # a convolution pads both ends alike
        slope, before = F.pad(slope, [before[1], after[1], before[0], after[0]]), [0, 0]
    blocks = F.conv2d(slope, kernel, stride=side // stride, padding=before)
    return F.pixel_shuffle(blocks, side)[..., : size[0], : size[1]]


class Taps(NamedTuple):
    """Along one axis, which weights reach which pixels of a block, and from which slopes; see `taps`."""

    matrix: Tensor
    first: int
    side: int
    step: int

    def missing(self, pixels: int, slopes: int) -> int:
        """Return how many slopes the last block lacks, which are zero."""
        return (math.ceil(pixels / self.side) - 1) * self.step + self.first + self.matrix.shape[-1] - slopes


@cache
def taps(count: int, stride: int, padding: int, side: int) -> Taps:
    """Return the taps of a block of `side` pixels, for `count` weights.

    Pixel r takes weight k from the slope at (r + padding − k) / stride, counted from the block's own, where that is
    whole. The first of these slopes is `first`; `matrix` (side, count, reach) is 1 where r, k and the slope belong
    together. Blocks are `step` slopes apart.
    """
    found = [(r, k, r + padding - k) for r in range(side) for k in range(count) if (r + padding - k) % stride == 0]
    first, last = (pick(at // stride for _, _, at in found) for pick in (min, max))
    matrix = torch.zeros(side, count, last - first + 1)
    for r, k, at in found:
        matrix[r, k, at // stride - first] = 1
    return Taps(matrix, first, side, side // stride)
