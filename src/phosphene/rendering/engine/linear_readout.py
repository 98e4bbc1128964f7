"""Reading one number of a convolution without running it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene.network.memory import channels_last_on_cpu
from phosphene.rendering.objectives import Address, ScalarRead, position_in

Position = tuple[int, int]  # row and column of a map


class LinearReadout:
    """The one number an item that an objective reads of a convolution, as a sum over what the convolution is given.

    Found for one batch after another: the gradients (b, c, h, w) of the number with respect to the input, and the
    numbers (b,) where the input is 0, which are the biases.
    """

    def __init__(self, convolution: nn.Conv2d, layer: Address, reads: ScalarRead) -> None:
        self.convolution, self.layer, self.reads = convolution, layer, reads
        self.items: Tensor | None = None
        self.known: tuple[torch.Size, torch.dtype, Position | None] | None = None
        self.gradients = self.slopes = self.offsets = torch.empty(0)

    def __call__(self, given: Tensor, items: Tensor, position: Position | None = None) -> Tensor:
        """Return the numbers (b,) for what the convolution is given, (b, c, h, w); at another position in a crop."""
        known = (given.shape, given.dtype, position)
        if self.items is not items or self.known != known:
            found = [self.of_channel(given[:1], self.reads.channels[item], position) for item in items.tolist()]
            self.gradients = channels_last_on_cpu(torch.cat([gradient for gradient, _ in found]))
            self.slopes = self.gradients.to(given.dtype)
            self.offsets = torch.stack([offset for _, offset in found])
            self.items, self.known = items, known
        found_sum: Tensor = RowwiseDot.apply(given, self.gradients, self.slopes)
        return found_sum + self.offsets

    def of_channel(self, like: Tensor, channel: int, position: Position | None) -> tuple[Tensor, Tensor]:
        """Return the gradient (1, c, h, w) of a channel's number with respect to the input, and the number at 0."""
        zero = torch.zeros_like(like, dtype=self.convolution.weight.dtype, memory_format=torch.contiguous_format)
        with torch.enable_grad(), torch.autocast(like.device.type, enabled=False):
            act = convolution_channel(self.convolution, zero.requires_grad_(), channel)
            if self.reads.mean:
                number = act.mean()
            else:
                row, column = position_in(act, self.layer, position or self.reads.position)
                number = act[0, 0, row, column]
            return torch.autograd.grad(number, zero)[0], number.detach()


def convolution_channel(convolution: nn.Conv2d, given: Tensor, channel: int) -> Tensor:
    """Return one channel (b, 1, h, w) of what a convolution makes of (b, c, h, w)."""
    group, width = channel * convolution.groups // convolution.out_channels, convolution.weight.shape[1]
    bias = None if convolution.bias is None else convolution.bias[channel : channel + 1]
    given = given[:, group * width : (group + 1) * width]
    if convolution.padding_mode != "zeros":
        given = F.pad(given, convolution._reversed_padding_repeated_twice, mode=convolution.padding_mode)
    padding: Any = convolution.padding if convolution.padding_mode == "zeros" else 0
    weight = convolution.weight[channel : channel + 1]
    return F.conv2d(given, weight, bias, convolution.stride, padding, convolution.dilation)


def dot_product(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of the products of two maps (c, h, w), in the number format of the other; no product is kept."""
    order = (1, 2, 0) if one.stride(0) == 1 else (0, 1, 2)  # as they lie in memory
    first, second = (values.permute(order).reshape(-1).to(other.dtype) for values in (one, other))
    return torch.dot(first, second)


class RowwiseDot(torch.autograd.Function):
    """The sum over (c, h, w) of input × gradients, row by row, so that a row's is the same in every batch.

    `slopes` are the gradients in the number format of the input: what goes back, as it is wherever the sums are summed.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor, gradients: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(slopes)
        return torch.stack([dot_product(one, gradient) for one, gradient in zip(given, gradients, strict=True)])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        summed = slope.device.type == "cpu" and bool((slope == 1).all())
        return (slopes if summed else (slope.view(-1, 1, 1, 1) * slopes).to(slopes.dtype)), None, None
