"""What several test files use: small networks, and a guard that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from phosphene import progress
from phosphene.progress import Bar, Screen


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def state_of(module: nn.Module) -> dict[str, Any]:
    """Return everything of a module and of the process that must be as before."""
    return {
        "hooks": [
            len(one._forward_hooks) + len(one._forward_pre_hooks) + len(one._backward_hooks) for one in module.modules()
        ],
        "training": [one.training for one in module.modules()],
        "requires_grad": [one.requires_grad for one in module.parameters()],
        "grad": [None if one.grad is None else one.grad.clone() for one in module.parameters()],
        "buffers": [one.clone() for one in module.buffers()],
        "buffer ids": [id(one) for one in module.buffers()],
        "weights": [one.detach().clone() for one in module.parameters()],
        "versions": [one._version for one in module.parameters()],
        "where": [(one.device, one.dtype) for one in module.parameters()],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(before: Any, after: Any) -> None:
    """Assert that two states of `state_of` are equal to the last bit."""
    assert type(before) is type(after)
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, list):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    elif isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after


@pytest.fixture
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """Return a context that fails if anything of a module has changed by its end, after an exception too."""

    @contextmanager
    def guard(module: nn.Module) -> Iterator[None]:
        before = state_of(module)
        try:
            yield
        finally:
            assert_same(before, state_of(module))

    return guard


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    """Return the list of all bars that count something from now on, whether they are shown or not."""
    created: list[Bar] = []

    class ListedBar(Bar):
        def __init__(self, description: str, unit: str) -> None:
            super().__init__(description, unit)
            created.append(self)

    monkeypatch.setattr(progress, "Bar", ListedBar)
    return created


@pytest.fixture
def shown_bars(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the descriptions of all bars that a person would see from now on."""
    shown: list[str] = []

    def add(bar: Bar, screen: Screen) -> None:
        shown.append(bar.description)

    monkeypatch.setattr(progress, "watched_screen", lambda: progress.notebook_screen)
    monkeypatch.setattr(progress.LIVE, "add", add)
    return shown


@pytest.fixture
def small_net() -> nn.Sequential:
    """Return a network of two convolutions with in-place ReLUs and a batch normalisation, seed 0, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (
            nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1),
                nn.BatchNorm2d(6),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
                nn.Conv2d(6, 8, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(8, 5),
            )
            .double()
            .eval()
        )
