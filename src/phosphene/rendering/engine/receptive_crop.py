"""Running a network on only the part of a picture that a single neuron sees."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from phosphene.network.device_constant import DeviceConstant
from phosphene.network.layers import Layer
from phosphene.rendering.engine.linear_readout import LinearReadout, Position, convolution_channel
from phosphene.rendering.objectives import Address, Objective, ScalarRead, pick, position_in

MAX_CROP_SHARE = 0.7  # of the picture's pixels; a larger crop saves too little


class Crop(NamedTuple):
    """The part of a picture that a neuron sees, and the neuron's position in the map of that part."""

    rows: slice
    columns: slice
    position: Position


class ReceptiveCrop:
    """Reads a neuron's value from the part of the picture that it sees.

    Attributes:
        layer: its address.
    """

    def __init__(
        self,
        layer: Layer,
        address: Address,
        scalar_read: ScalarRead,
        readout: LinearReadout | None,
        read: Callable[[Tensor], dict[Address, Tensor]],
    ) -> None:
        self.field, self.layer, self.scalar_read = layer.receptive_field, address, scalar_read
        self.readout, self.read, self.channels = readout, read, DeviceConstant(torch.tensor(scalar_read.channels))
        self.crops: dict[torch.Size, Crop | None] = {}

    def crop_for(self, image: Tensor) -> Crop | None:
        """Return the crop for pictures (b, c, h, w) of this size, or None if it would save little or be wrong."""
        if image.shape[1:] not in self.crops:
            self.crops[image.shape[1:]] = self.validated_crop(image)
        return self.crops[image.shape[1:]]

    def validated_crop(self, image: Tensor) -> Crop | None:
        """Return the crop for pictures of this size if on noise it gives the same value as the whole picture."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(1, *image.shape[1:], generator=generator, dtype=torch.float64).to(image)
        with torch.no_grad():
            whole = self.channel_maps(noise)
            row, column = position_in(whole, self.layer, self.scalar_read.position)
            vertical = self.crop_along_axis(0, row, image.shape[2])
            horizontal = self.crop_along_axis(1, column, image.shape[3])
            if vertical is None or horizontal is None:
                return None
            crop = Crop(vertical[0], horizontal[0], (vertical[1], horizontal[1]))
            cropped = noise[..., crop.rows, crop.columns]
            if cropped.numel() > MAX_CROP_SHARE * noise.numel():
                return None
            rtol, atol = (1e-9, 1e-12) if image.dtype == torch.float64 else (1e-3, 1e-5)
            try:
                values = self.channel_maps(cropped)[..., vertical[1], horizontal[1]]
                same = torch.allclose(values, whole[..., row, column], rtol, atol)
            except (RuntimeError, ValueError, IndexError):  # the network does not take so small a picture
                return None
        return crop if same else None

    def crop_along_axis(self, axis: int, index: int, length: int) -> tuple[slice, int] | None:
        """Return which rows (axis 0) or columns (1) the neuron at an index sees, and its index in the map of these.

        The crop begins at a whole number of strides, so that strided layers keep their grid.
        """
        assert self.field is not None
        size, stride, padding = (pair[axis] for pair in (self.field.size, self.field.stride, self.field.padding))
        if stride < 1:
            return None
        first = index * stride - padding
        skipped = max(0, first) // stride
        return slice(skipped * stride, min(length, first + size)), index - skipped

    def channel_maps(self, image: Tensor) -> Tensor:
        """Return the maps (1, n, h, w) of the channels that are read."""
        act = self.read(image)[self.layer]
        channels = list(dict.fromkeys(self.scalar_read.channels))
        if self.readout is None:
            return act[:, channels]
        return torch.cat([convolution_channel(self.readout.convolution, act, channel) for channel in channels], 1)

    def neuron_values(self, act: Tensor, items: Tensor, position: Position) -> Tensor:
        """Return the neurons' values (b,), from the convolution's input or the layer's output."""
        if self.readout is not None:
            return self.readout(act, items, position)
        row, column = position
        return pick(act[..., row, column], self.channels, items)


def receptive_crop_of(
    objective: Objective,
    layers: Mapping[Address, Layer],
    readouts: Mapping[Address, LinearReadout],
    read: Callable[[Tensor], dict[Address, Tensor]],
) -> ReceptiveCrop | None:
    """Return the crop for an objective that reads only single neurons of one of the layers, or None for any other."""
    if len(objective.layers) != 1 or objective.layers[0] not in layers:
        return None
    address = objective.layers[0]
    layer, scalar_read = layers[address], objective.scalar_reads[address]
    if scalar_read.mean or layer.receptive_field is None or not layer.is_map:
        return None
    return ReceptiveCrop(layer, address, scalar_read, readouts.get(address), read)
