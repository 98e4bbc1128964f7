"""Scores and gradients with shortcuts held against those of the whole network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import phosphene as ph
from phosphene.rendering.engine.forward import SHORTCUTS, fast_forward_pass
from phosphene.rendering.objectives import Objective


def with_random_statistics(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a network in float64, seed 0, whose batch normalisations have statistics other than 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build()
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return network.double().eval()


def scores_and_gradient(
    model: ph.Model, objective: Objective, image: Tensor, shortcuts: tuple[str, ...]
) -> tuple[Any, ...]:
    """Return scores (n,), their gradient, and the shortcuts applied."""
    items = torch.arange(len(image))
    with fast_forward_pass(model, objective, shortcuts) as (read, applied_shortcuts):
        leaf = image.clone().requires_grad_()
        scores = objective.score(read(leaf, items), leaf, items)
        return scores.detach(), torch.autograd.grad(scores.sum(), leaf)[0], applied_shortcuts()


def assert_shortcuts_agree(
    model: ph.Model, objective: Objective, image: Tensor, expected_shortcuts: set[str] | None = None
) -> None:
    """Assert that scores and gradients with all shortcuts are those without any."""
    plain_scores, plain_gradient, no_shortcuts = scores_and_gradient(model, objective, image, ())
    assert no_shortcuts == ()
    scores, gradient, shortcuts = scores_and_gradient(model, objective, image, SHORTCUTS)
    torch.testing.assert_close(scores, plain_scores, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-9, atol=1e-9 * float(plain_gradient.abs().max()))
    if expected_shortcuts is not None:
        assert set(shortcuts) == expected_shortcuts
