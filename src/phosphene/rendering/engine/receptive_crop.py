"""Running no more of a picture through a network than a single neuron sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from phosphene.network.device_constant import DeviceConstant
from phosphene.network.layers import Layer
from phosphene.rendering.engine.linear_readout import LinearReadout, Position, convolution_channel
from phosphene.rendering.objectives import Address, Objective, ScalarRead, pick, position_in

MAX_CROP_SHARE = 0.7  # of the picture's pixels that a crop may keep at most: a larger one saves too little


class Crop(NamedTuple):
    """The part of a picture that a neuron sees, and where the neuron is in the map of that part."""

    rows: slice
    columns: slice
    position: Position


class ReceptiveCrop:
    """What gives a neuron's value from the part of the picture that it sees.

    Attributes:
        layer: its address.
    """

    def __init__(
        self,
        layer: Layer,
        address: Address,
        reads: ScalarRead,
        functional: LinearReadout | None,
        read: Callable[[Tensor], dict[Address, Tensor]],
    ) -> None:
        self.field, self.layer, self.reads = layer.receptive_field, address, reads
        self.functional, self.read, self.channels = functional, read, DeviceConstant(torch.tensor(reads.channels))
        self.crops: dict[torch.Size, Crop | None] = {}

    def of(self, image: Tensor) -> Crop | None:
        """Return the crop for pictures (b, c, h, w) of a size, None where it saves little, or would not be right."""
        if image.shape[1:] not in self.crops:
            self.crops[image.shape[1:]] = self.tried(image)
        return self.crops[image.shape[1:]]

    def tried(self, image: Tensor) -> Crop | None:
        """Return the crop for pictures of this size if it gives what the whole picture gives, on noise."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(1, *image.shape[1:], generator=generator, dtype=torch.float64).to(image)
        with torch.no_grad():
            whole = self.values(noise)
            row, column = position_in(whole, self.layer, self.reads.position)
            down, right = (self.side(which, place, image.shape[2 + which]) for which, place in enumerate((row, column)))
            if down is None or right is None:
                return None
            crop = Crop(down[0], right[0], (down[1], right[1]))
            part = noise[..., crop.rows, crop.columns]
            if part.numel() > MAX_CROP_SHARE * noise.numel():
                return None
            try:
                cut = self.values(part)
                same = torch.allclose(cut[..., down[1], right[1]], whole[..., row, column], *tolerance(image.dtype))
            except (RuntimeError, ValueError, IndexError):  # the network does not take so small a picture
                return None
        return crop if same else None

    def side(self, which: int, place: int, length: int) -> tuple[slice, int] | None:
        """Return of rows (0) or columns (1) the part that a place of the map sees, and the place in its map.

        It begins at a whole number of strides, so that what is strided inside keeps its grid.
        """
        assert self.field is not None
        size, stride, padding = (pair[which] for pair in (self.field.size, self.field.stride, self.field.padding))
        if stride < 1:
            return None
        first = place * stride - padding
        skipped = max(0, first) // stride
        return slice(skipped * stride, min(length, first + size)), place - skipped

    def values(self, image: Tensor) -> Tensor:
        """Return the maps (1, n, h, w) of the channels that are read."""
        act = self.read(image)[self.layer]
        chosen = list(dict.fromkeys(self.reads.channels))
        if self.functional is None:
            return act[:, chosen]
        return torch.cat([convolution_channel(self.functional.convolution, act, one) for one in chosen], 1)

    def numbers(self, act: Tensor, items: Tensor, position: Position) -> Tensor:
        """Return the neurons' values (b,), from what the convolution is given or what the layer returned."""
        if self.functional is not None:
            return self.functional(act, items, position)
        row, column = position
        return pick(act[..., row, column], self.channels, items)


def receptive_crop_of(
    objective: Objective,
    layers: Mapping[Address, Layer],
    functionals: Mapping[Address, LinearReadout],
    read: Callable[[Tensor], dict[Address, Tensor]],
) -> ReceptiveCrop | None:
    """Return what crops for an objective that reads single neurons of one of the layers alone, None for any other."""
    if len(objective.layers) != 1 or objective.layers[0] not in layers:
        return None
    address = objective.layers[0]
    layer, reads = layers[address], objective.reads[address]
    if reads.mean or layer.receptive_field is None or not layer.is_map:
        return None
    return ReceptiveCrop(layer, address, reads, functionals.get(address), read)


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """Return by how much a crop's values may differ by rounding, relative and absolute."""
    return (1e-9, 1e-12) if dtype == torch.float64 else (1e-3, 1e-5)
