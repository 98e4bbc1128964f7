"""Fixed numbers on a device: brought there once, so that no step of a loop has to wait for them."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceConstant:
    """A tensor that never changes, and its copies on other devices and in other number formats."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.known: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Return it on a device, by default in its own number format; nobody may write into what is returned."""
        key = device, dtype or self.values.dtype
        if key not in self.known:
            with torch.inference_mode(False):  # autograd could not use it later
                self.known[key] = self.values.to(*key)
        return self.known[key]

    def like(self, tensor: Tensor) -> Tensor:
        """Return it on the device and in the number format of a tensor."""
        return self.on(tensor.device, tensor.dtype)
