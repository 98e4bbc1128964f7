"""Networks of a convolution and a batch normalisation: one pair that can be folded, and many that cannot."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


def with_statistics(net: nn.Module) -> nn.Module:
    """Give every normalisation statistics and weights that matter, from seed 0, and return the network."""
    generator = torch.Generator().manual_seed(0)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_(0, 0.3, generator=generator)
            norm.running_var.uniform_(0.2, 1.5, generator=generator)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(norm.bias, 0, 0.2, generator=generator)
    return net.double().eval()


class Net(nn.Module):
    """A convolution and a normalisation, which each subclass uses in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)


class Plain(Net):
    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)).relu().mean((2, 3))


class ReadTwice(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return (self.norm(x) + x).mean((2, 3))


class ReadByAView(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        first = x[:, :1]
        return (self.norm(x) * first).mean((2, 3))


class ReadAfterwards(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return self.norm(x).mean((2, 3)) + x.detach().amax((2, 3))


class NormOfAView(Net):
    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)[:, :, 1:]).mean((2, 3))


class ChangedBefore(Net):
    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x).relu_()).mean((2, 3))


class ConvolutionTwice(Net):
    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(self.conv(x))).mean((2, 3))


class NormTwice(Net):
    def forward(self, x: Tensor) -> Any:
        return (self.norm(self.conv(x)) + self.norm(x)).mean((2, 3))


class WeightElsewhere(Net):
    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)).mean((2, 3)) + self.conv.weight.sum()


class AroundTheModule(Net):
    def forward(self, x: Tensor) -> Any:
        return self.norm(F.conv2d(x, self.conv.weight, self.conv.bias)).mean((2, 3))


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.first.weight = self.conv.weight

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(self.first(x))).mean((2, 3))


class OwnStatistics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2, track_running_stats=False)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)).mean((2, 3))


class Normalised(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm(self.conv)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)).mean((2, 3))


class MindsItsValues(Net):
    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)).mean((2, 3)) * (2 if x.amax() > 0.9 else 1)


class NormWithMore(nn.BatchNorm2d):
    """Applies its activation itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


class Fused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = NormWithMore(2)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)).mean((2, 3))


UNFOLDABLE = (
    ReadTwice,
    ReadByAView,
    ReadAfterwards,
    NormOfAView,
    ChangedBefore,
    ConvolutionTwice,
    NormTwice,
    WeightElsewhere,
    AroundTheModule,
    Tied,
    OwnStatistics,
    Normalised,
    MindsItsValues,
    Fused,
)
