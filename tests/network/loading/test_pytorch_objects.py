"""PyTorch module objects: channels, input size and logits are found, and the module is left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from test_load import UNNORMALISED, load, refused
from torch import nn

from phosphene import errors

Guard = Callable[[nn.Module], AbstractContextManager[None]]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def cifar() -> nn.Module:
    """Return a network with a classifier for 32 × 32 images, partly training, partly frozen, with a batch norm."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(4),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    net[3].eval()
    net[0].requires_grad_(False)
    return net


def mnist() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 5), nn.MaxPool2d(2), nn.Conv2d(2, 3, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 10)
    )


def seven() -> nn.Module:
    return nn.Sequential(nn.Conv2d(7, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))


def cats_and_dogs() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 1, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(74 * 74, 1))


def no_weights() -> nn.Module:
    return nn.Sequential(nn.MaxPool2d(2), nn.ReLU())


SIZES = {cifar: (3, 32), mnist: (1, 28), seven: (7, 224), cats_and_dogs: (3, 150), no_weights: (3, 224)}


@pytest.mark.parametrize("build", SIZES, ids=lambda build: build.__name__)
def test_an_object_s_channels_and_size_are_found_and_it_is_left_as_it_was(
    build: Callable[[], nn.Module], untouched: Guard
) -> None:
    net = seeded(build)
    with untouched(net):
        model = load(net)
        layers = model.layers()
    channels, side = SIZES[build]
    assert model.module is net
    assert (model.channels_in, model.input_size) == (channels, (side, side))
    assert (model.name, model.ref, model.notes) == ("Sequential", None, (UNNORMALISED,))
    assert len(layers) == len(net)  # type: ignore[arg-type]


def test_a_size_that_is_none_of_the_usual_ones_is_asked_for(untouched: Guard) -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(35 * 35, 2))
    with untouched(net):
        message = refused(errors.SizeRefused, net)
    assert "Sequential runs at none of 224, 32, 28" in message
    assert message.endswith("say what it takes (--input-size, --channels-in)")
    assert load(net, input_size=37).layers()[2].channels == 2


def test_a_network_whose_first_convolution_is_not_its_entrance_takes_the_channels_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Conv2d(4, 2, 1)
            self.early = nn.Conv2d(5, 4, 1)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.late(self.early(image))
            return result

    refused(errors.SizeRefused, Odd())
    assert [layer.path for layer in load(Odd(), channels_in=5).layers()] == ["early", "late"]


def test_a_compiled_network_is_read_through_the_one_inside(untouched: Guard) -> None:
    net = seeded(cifar)
    with untouched(net):
        model = load(torch.compile(net))
        with model.reading(["0"]) as read:
            acts = read(torch.full((1, 3, 32, 32), 0.25))
    assert model.module is net
    torch.testing.assert_close(acts["0"], net[0](torch.full((1, 3, 32, 32), 0.25)))  # type: ignore[index]


def test_a_scripted_network_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, but still found in the wild
        traced = torch.jit.trace(nn.Conv2d(3, 1, 1), torch.zeros(1, 3, 4, 4))  # type: ignore[no-untyped-call]
    assert "give the nn.Module it was made from" in refused(errors.ModelRefused, traced)


def test_a_lazy_network_is_refused_and_stays_lazy() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.LazyConv2d(4, 3))
    assert "1.weight has no values yet; run the network once" in refused(errors.ModelRefused, net)
    assert isinstance(net[1], nn.LazyConv2d)
    net(torch.zeros(1, 3, 8, 8))
    assert load(net).find(1).channels == 4


def test_a_network_without_memory_behind_it_is_refused() -> None:
    with torch.device("meta"):
        net = nn.Conv2d(3, 2, 3)
    assert "weight has no values yet" in refused(errors.ModelRefused, net)


def test_an_object_takes_no_weights_file(untouched: Guard) -> None:
    net = seeded(cifar)
    with untouched(net):
        assert "already has its weights" in refused(errors.ModelRefused, net, weights="w.pt")
        assert "already has its weights" in refused(errors.ModelRefused, net, weights="none")


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.Sigmoid(), nn.LogSoftmax(1)])
def test_the_logits_of_a_torch_network_that_ends_in_probabilities(end: nn.Module, untouched: Guard) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 4)
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sigmoid(), nn.Flatten(), linear, nn.Sequential(end, nn.Dropout()))
    model = load(network, input_size=4)
    image = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    with untouched(network):
        assert model.logits == "4.0#input"
        with model.reading(["2", "4.0#input"]) as read:
            acts = read(image)
        assert torch.allclose(acts["4.0#input"], linear(acts["2"]), atol=1e-6)
    assert load(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sigmoid(), nn.Conv2d(3, 2, 1)), input_size=8).logits == ""
