"""Networks and images whose gradients cannot cancel, for holding receptive fields against."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def positive(module: nn.Module) -> nn.Module:
    """Return a module in float64 and evaluation mode, weights random and positive, so that no gradient cancels."""
    module = module.double().eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in module.parameters():
            scale = 1 / parameter[0].numel() if parameter.dim() > 1 else 0.2  # small, for activations that saturate
            parameter.copy_((torch.rand_like(parameter) + 0.5) * scale)
    return module


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
