"""The preprocessing of images that a network expects."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from phosphene.network.device_constant import DeviceConstant


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of an image in [0, 1]: (image - mean) / std per channel, and RGB as BGR if `bgr`."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    bgr: bool = False

    def __call__(self, image: Tensor) -> Tensor:
        mean, std = (constant.like(image) for constant in self._constants)
        ready = (image - mean) / std
        return ready.flip(1) if self.bgr else ready

    @cached_property
    def _constants(self) -> tuple[DeviceConstant, DeviceConstant]:
        """Mean and standard deviation, (c, 1, 1) or (1, 1, 1)."""
        mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (self.mean, self.std))
        return DeviceConstant(mean), DeviceConstant(std)
