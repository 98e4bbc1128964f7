"""Constants on a device: copied there once, so that no step of a loop has to wait for them."""

import torch
from torch import Tensor


class DeviceConstant:
    """A tensor that never changes, and its copies on other devices and in other dtypes."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Return it on a device, by default in its own dtype; the result must not be written to."""
        key = device, dtype or self.values.dtype
        if key not in self.copies:
            with torch.inference_mode(False):  # autograd could not use it later
                self.copies[key] = self.values.to(*key)
        return self.copies[key]

    def like(self, tensor: Tensor) -> Tensor:
        """Return it on the device and in the dtype of a tensor."""
        return self.to(tensor.device, tensor.dtype)
