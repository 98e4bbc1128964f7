"""A small PyTorch network and its training, for tests of what a Recorder makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene.training.recorder import Recorder

Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    """Return a small version of the network of R2.3: 16 trainable tensors, dropout, seed 0, float64, to be trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [
            layer
            for into, out in ((3, 4), (4, 6), (6, 4))
            for layer in (
                nn.Conv2d(into, out, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(out),
            )
        ]
        head = [nn.Flatten(), nn.Dropout(0.25), nn.Linear(4 * 4 * 4, 5), nn.ReLU(), nn.Linear(5, 3)]
        return nn.Sequential(*blocks, *head).double().train()


def samples(count: int = 20, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 32, 32, dtype=torch.float64, generator=generator)
    return images, torch.randint(3, (count,), generator=generator)


def backward(net: nn.Module, data: Batch) -> None:
    loss: Any = F.cross_entropy(net(data[0]), data[1])
    loss.backward()


def pieces(data: Batch, size: int = 8) -> list[Batch]:
    images, classes = data
    return [(images[start : start + size], classes[start : start + size]) for start in range(0, len(images), size)]


def train(
    net: nn.Module, recorder: Recorder | None, epochs: int = 2, after: Callable[[], None] = lambda: None, first: int = 0
) -> None:
    """Train by Adam on three batches an epoch; `after` is called after each backward pass."""
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for epoch in range(first, first + epochs):
        for images, classes in pieces(samples()):
            optimizer.zero_grad()
            loss: Any = F.cross_entropy(net(images), classes)
            loss.backward()
            after()
            if recorder:
                recorder.after_backward()
            optimizer.step()
        if recorder:
            recorder.end_epoch(epoch, loss=float(loss.detach()))
