"""Pairs of a convolution and a batch normalisation: which of them one forward pass shows to be foldable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from convnorm_networks import UNFOLDABLE, Net, Plain, with_statistics
from phosphene.network.batchnorm_pairs import ConvNormPair, FoldingObserver, Operation
from phosphene.network.survey import survey


def pairs(net: nn.Module) -> tuple[ConvNormPair, ...]:
    image = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return survey(net, net, dict(net.named_modules()), image).pairs


def test_a_convolution_whose_normalisation_alone_reads_it_is_a_pair() -> None:
    (pair,) = pairs(with_statistics(Plain()))
    assert pair == ConvNormPair("conv", "norm", frozenset({"conv"}))
    assert pair.paths == {"conv", "norm"}


def test_every_module_that_returns_what_passes_between_the_two_is_named() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 1)), nn.Identity(), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))
    (pair,) = pairs(with_statistics(net))
    assert pair == ConvNormPair("0.0", "2.0", frozenset({"0.0", "0", "1"}))


@pytest.mark.parametrize("kind", UNFOLDABLE)
def test_a_convolution_that_anything_else_depends_on_is_no_pair(kind: type[Net]) -> None:
    assert pairs(with_statistics(kind())) == ()


def test_weights_are_a_module_s_own_only_if_they_are_the_same_objects() -> None:
    convolution = nn.Conv2d(2, 2, 1)
    same: dict[str, Tensor | None] = {"weight": convolution.weight, "bias": convolution.bias}
    assert Operation("convolution", same).uses_weights_of(convolution)
    assert not Operation("convolution", {**same, "weight": convolution.weight.clone()}).uses_weights_of(convolution)
    assert not Operation("convolution", {**same, "bias": None}).uses_weights_of(convolution)
    assert not Operation("convolution").uses_weights_of(convolution)
    norm = nn.BatchNorm2d(2, eps=0.5)
    assert Operation("native_batch_norm", {"eps": 0.5, "training": True}).uses_weights_of(norm)
    assert not Operation("native_batch_norm", {"eps": 0.25, "training": True}).uses_weights_of(norm)


def test_an_observer_notes_who_uses_the_memory_of_a_tensor_through_a_view_too() -> None:
    with FoldingObserver() as observer, torch.no_grad():
        image = torch.ones(1, 1, 4, 4)
        made = nn.functional.conv2d(image, torch.ones(1, 1, 1, 1))
        made.view(16).add_(1)
    (storage,) = observer.results.values()
    assert [user.name for user in storage.users] == ["view", "add_"]
    assert not observer.reads_values
    with observer:
        assert made.sum().item() == 32
    assert observer.reads_values
