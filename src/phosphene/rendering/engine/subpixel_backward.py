"""The gradient of a convolution with respect to an image of few channels, several pixels at a time.

The last step back to a picture makes three channels out of many, and the convolutions of a CPU fill their vectors with
channels: most lanes stay empty. So the pixels of a block are computed as additional channels, with a kernel that holds
the kernel of each pixel, and then laid out as pixels: the sub-pixel convolution of Shi et al. 2016 (arXiv:1609.05158).
The stride of the convolution, which otherwise leaves holes, is handled in the same way.
"""

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
    """Return the convolutions for which this is faster: on a CPU, of at most four input channels."""
    return [module for module in modules if type(module) is nn.Conv2d and has_few_channels(module)]


def has_few_channels(convolution: nn.Conv2d) -> bool:
    """Return whether `image_gradient` supports a convolution, and its `forward` is PyTorch's own."""
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
    """Have convolutions compute their gradients as sub-pixel convolutions inside, and restore them afterwards."""
    try:
        for convolution in convolutions:
            vars(convolution)["forward"] = partial(forward, convolution)  # comes before the class's; hooks still run
        yield
    finally:
        for convolution in convolutions:
            vars(convolution).pop("forward", None)


def forward(convolution: nn.Conv2d, input: Tensor) -> Tensor:
    """Return the convolution of images; `input` is the name in `nn.Conv2d`."""
    output: Tensor = SubpixelConv.apply(input, convolution.weight, convolution)
    return output


class SubpixelConv(torch.autograd.Function):
    """A convolution whose gradient, with respect to the image alone, is computed as a sub-pixel convolution."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, convolution: nn.Conv2d) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.convolution, ctx.shape, ctx.dtype = convolution, image.shape, image.dtype
        output: Tensor = convolution._conv_forward(image, weight, convolution.bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        stride, padding = ctx.convolution.stride[0], ctx.convolution.padding
        return image_gradient(grad_output, weight, stride, padding, ctx.shape[-2:]).to(ctx.dtype), None, None


def image_gradient(
    grad_output: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Return the gradient (b, c, h, w) with respect to an image of `size`, given that of a convolution's output.

    grad_output (b, out, oh, ow); weight (out, c, kh, kw).
    """
    block_size = stride * max(1, int(math.sqrt(LANES / weight.shape[1]) / stride))
    rows, columns = (
        block_taps(count, stride, pad, block_size) for count, pad in zip(weight.shape[-2:], padding, strict=True)
    )
    kernel = torch.einsum("rku,slv,ockl->crsouv", rows.matrix.to(weight), columns.matrix.to(weight), weight)
    kernel = kernel.flatten(0, 2).to(grad_output.dtype).contiguous(memory_format=torch.channels_last)
    before = [-rows.first, -columns.first]
    after = [rows.missing(size[0], grad_output.shape[-2]), columns.missing(size[1], grad_output.shape[-1])]
    if min(before) < 0 or after[0] > before[0] or after[1] > before[1]:  # a convolution pads both ends alike
        grad_output, before = F.pad(grad_output, [before[1], after[1], before[0], after[0]]), [0, 0]
    blocks = F.conv2d(grad_output, kernel, stride=block_size // stride, padding=before)
    return F.pixel_shuffle(blocks, block_size)[..., : size[0], : size[1]]


class BlockTaps(NamedTuple):
    """Which weights connect the pixels of a block with which outputs, along one axis; see `block_taps`."""

    matrix: Tensor
    first: int
    block_size: int
    step: int

    def missing(self, pixels: int, outputs: int) -> int:
        """Return how many outputs the last block lacks; their gradients are zero."""
        return (math.ceil(pixels / self.block_size) - 1) * self.step + self.first + self.matrix.shape[-1] - outputs


@cache
def block_taps(count: int, stride: int, padding: int, block_size: int) -> BlockTaps:
    """Return the taps of a block of `block_size` pixels, for `count` weights.

    Pixel r takes weight k from the output at (r + padding − k) / stride, counted from the block's own, where that is
    whole. The first of these outputs is `first`; `matrix` (block_size, count, reach) is 1 where pixel r takes weight k
    from an output. Blocks are `step` outputs apart.
    """
    taps = [(r, k, r + padding - k) for r in range(block_size) for k in range(count) if (r + padding - k) % stride == 0]
    outputs = [offset // stride for _, _, offset in taps]
    first = min(outputs)
    matrix = torch.zeros(block_size, count, max(outputs) - first + 1)
    for r, k, offset in taps:
        matrix[r, k, offset // stride - first] = 1
    return BlockTaps(matrix, first, block_size, block_size // stride)
