"""Weights in bfloat16, converted once.

Under autocast, frozen weights are converted anew at every pass: for a layer of VGG's last block, that takes
4 % of the time.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from phosphene.network.batchnorm_folding import is_patched


class Bf16Weights:
    """The weights of plain convolutions in bfloat16, each kept until the original changes."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.convolutions = [module for module in modules if type(module) is nn.Conv2d and not is_patched(module)]
        self.cache: dict[nn.Module, tuple[Tensor, int, nn.Parameter]] = {}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Make the convolutions hold bfloat16 weights inside if autocast uses them, and restore them afterwards."""
        originals: list[tuple[nn.Module, nn.Parameter]] = []
        try:
            for convolution in self.convolutions:
                weight = convolution._parameters.get("weight")
                if weight is not None and autocast_converts(weight):
                    originals.append((convolution, weight))
                    convolution._parameters["weight"] = self.converted(convolution, weight)
            yield
        finally:
            for module, weight in originals:
                module._parameters["weight"] = weight

    def converted(self, convolution: nn.Module, weight: Tensor) -> nn.Parameter:
        """Return a weight in bfloat16, with the channels last in memory."""
        cached = self.cache.get(convolution)
        if cached is None or cached[0] is not weight or cached[1] != weight._version:
            bf16 = weight.detach().to(torch.bfloat16, memory_format=torch.channels_last)
            cached = weight, weight._version, nn.Parameter(bf16, requires_grad=False)
            self.cache[convolution] = cached
        return cached[2]


def autocast_converts(weight: Tensor) -> bool:
    """Return whether autocast is on and would convert a weight to bfloat16."""
    device = weight.device.type
    to_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    return to_bf16 and weight.dtype == torch.float32
