"""Colour: three uncorrelated channels to RGB and back.

Optimising RGB directly spends the first steps on a property of all natural pictures: red, green and blue rise and fall
together (Olah et al. 2017). The matrix was measured over 1,000 natural photos by `bench/natural_statistics.py`: column
k is the RGB change of one standard deviation along the k-th principal colour (light, blue-yellow, green-magenta).
"""

import torch
from torch import Tensor

from phosphene.network.device_constant import DeviceConstant

UNCORRELATED_TO_RGB = (
    (0.5678, 0.2256, 0.0531),
    (0.5835, -0.0118, -0.1153),
    (0.5806, -0.2088, 0.0639),
)
MATRIX = DeviceConstant(torch.tensor(UNCORRELATED_TO_RGB, dtype=torch.float64))


def correlate(channels: Tensor) -> Tensor:
    """Return (n, 3, h, w) uncorrelated channels as RGB logits; any other number of channels stays as it is."""
    if channels.shape[1] != 3:
        return channels
    return torch.einsum("cd,ndhw->nchw", MATRIX.like(channels), channels)


def decorrelate(logits: Tensor) -> Tensor:
    """Undo `correlate`."""
    if logits.shape[1] != 3:
        return logits
    return torch.einsum("dc,nchw->ndhw", torch.linalg.inv(MATRIX.like(logits)), logits)
