"""Weights in bfloat16, converted once.

Under autocast, weights that are frozen are converted anew at every pass: at the depth of VGG's last block that is one
step in twenty-five.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from phosphene.network.batchnorm_folding import is_patched


class Bf16Weights:
    """The weights of plain convolutions in bfloat16, each kept as long as the one it was made from is there."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.convolutions = [one for one in modules if type(one) is nn.Conv2d and not is_patched(one)]
        self.known: dict[nn.Module, tuple[Tensor, int, nn.Parameter]] = {}

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Have the convolutions hold bfloat16 inside, if autocast asks for that, and leave them as they were."""
        before: list[tuple[nn.Module, nn.Parameter]] = []
        try:
            for one in self.convolutions:
                weight = one._parameters.get("weight")
                if weight is not None and is_converted(weight):
                    before.append((one, weight))
                    one._parameters["weight"] = self.low(one, weight)
            yield
        finally:
            for module, weight in before:
                module._parameters["weight"] = weight

    def low(self, convolution: nn.Module, weight: Tensor) -> nn.Parameter:
        """Return a weight in bfloat16, as its device's convolutions want it in memory."""
        known = self.known.get(convolution)
        if known is None or known[0] is not weight or known[1] != weight._version:
            low = weight.detach().to(torch.bfloat16, memory_format=torch.channels_last)
            known = weight, weight._version, nn.Parameter(low, requires_grad=False)
            self.known[convolution] = known
        return known[2]


def is_converted(weight: Tensor) -> bool:
    """Return whether autocast would bring a weight down to bfloat16 now."""
    device = weight.device.type
    asked = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    return asked and weight.dtype == torch.float32
