"""Reading one number of a convolution without running it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene.network.memory import channels_last_on_cpu
from phosphene.rendering.objectives import Address, ScalarRead, position_in

Position = tuple[int, int]  # row and column of a map


class LinearReadout:
    """The one number per item that an objective reads from a convolution, as a sum over the convolution's input.

    Computed once for each batch: the gradients (b, c, h, w) of the number with respect to the input, and the numbers
    (b,) for an input of 0, which are the biases.
    """

    def __init__(self, convolution: nn.Conv2d, layer: Address, scalar_read: ScalarRead) -> None:
        self.convolution, self.layer, self.scalar_read = convolution, layer, scalar_read
        self.items: Tensor | None = None
        self.key: tuple[torch.Size, torch.dtype, Position | None] | None = None
        self.gradients = self.cast_gradients = self.offsets = torch.empty(0)

    def __call__(self, conv_input: Tensor, items: Tensor, position: Position | None = None) -> Tensor:
        """Return the numbers (b,) for an input (b, c, h, w); a crop gives the position in its own map."""
        key = (conv_input.shape, conv_input.dtype, position)
        if self.items is not items or self.key != key:
            channels = [self.scalar_read.channels[item] for item in items.tolist()]
            readouts = [self.readout_of_channel(conv_input[:1], channel, position) for channel in channels]
            self.gradients = channels_last_on_cpu(torch.cat([gradient for gradient, _ in readouts]))
            self.cast_gradients = self.gradients.to(conv_input.dtype)
            self.offsets = torch.stack([offset for _, offset in readouts])
            self.items, self.key = items, key
        products: Tensor = RowwiseDot.apply(conv_input, self.gradients, self.cast_gradients)
        return products + self.offsets

    def readout_of_channel(self, like: Tensor, channel: int, position: Position | None) -> tuple[Tensor, Tensor]:
        """Return the gradient (1, c, h, w) of a channel's number with respect to the input, and the number at 0."""
        zero = torch.zeros_like(like, dtype=self.convolution.weight.dtype, memory_format=torch.contiguous_format)
        with torch.enable_grad(), torch.autocast(like.device.type, enabled=False):
            act = convolution_channel(self.convolution, zero.requires_grad_(), channel)
            if self.scalar_read.mean:
                number = act.mean()
            else:
                row, column = position_in(act, self.layer, position or self.scalar_read.position)
                number = act[0, 0, row, column]
            return torch.autograd.grad(number, zero)[0], number.detach()


def convolution_channel(convolution: nn.Conv2d, conv_input: Tensor, channel: int) -> Tensor:
    """Return one channel (b, 1, h, w) of a convolution's output for an input (b, c, h, w)."""
    group, width = channel * convolution.groups // convolution.out_channels, convolution.weight.shape[1]
    bias = None if convolution.bias is None else convolution.bias[channel : channel + 1]
    group_input = conv_input[:, group * width : (group + 1) * width]
    if convolution.padding_mode != "zeros":
        group_input = F.pad(group_input, convolution._reversed_padding_repeated_twice, mode=convolution.padding_mode)
    padding: Any = convolution.padding if convolution.padding_mode == "zeros" else 0
    weight = convolution.weight[channel : channel + 1]
    return F.conv2d(group_input, weight, bias, convolution.stride, padding, convolution.dilation)


def dot_product(act: Tensor, gradient: Tensor) -> Tensor:
    """Return the sum of the products of two maps (c, h, w), in the dtype of `gradient`, without storing products."""
    order = (1, 2, 0) if act.stride(0) == 1 else (0, 1, 2)  # as they lie in memory
    left, right = (values.permute(order).reshape(-1).to(gradient.dtype) for values in (act, gradient))
    return torch.dot(left, right)


class RowwiseDot(torch.autograd.Function):
    """The sum over (c, h, w) of input × gradients, row by row, so that a row's sum is the same in every batch.

    `cast_gradients` are the gradients in the number format of the input: they are what the backward pass returns,
    unscaled if all incoming gradients are 1, as for a sum of scores.
    """

    @staticmethod
    def forward(ctx: Any, conv_input: Tensor, gradients: Tensor, cast_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(cast_gradients)
        rows = zip(conv_input, gradients, strict=True)
        return torch.stack([dot_product(act, gradient) for act, gradient in rows])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        if grad_output.device.type == "cpu" and bool((grad_output == 1).all()):
            return gradients, None, None
        return (grad_output.view(-1, 1, 1, 1) * gradients).to(gradients.dtype), None, None
