"""The handle: reading by address, fingerprint, and refusals of sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import errors
from phosphene.errors import first_line
from phosphene.network.model import Model
from phosphene.network.preprocessing import Preprocessing

Guard = Callable[[nn.Module], AbstractContextManager[None]]


def handle(module: nn.Module, size: int = 8, **options: Any) -> Model:
    return Model(module=module, name="net", input_size=(size, size), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_forward_is_the_module_on_the_preprocessed_image_in_any_type(small_net: nn.Sequential, dtype: Any) -> None:
    net = small_net.to(dtype)
    model = handle(net, preprocessing=Preprocessing((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    assert model.prototype_tensor.dtype == dtype
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    by_hand = torch.stack([(image[:, k] - (0.1, 0.2, 0.3)[k]) / (0.5, 0.6, 0.7)[k] for k in range(3)], 1)
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(model.forward(image), net(by_hand), rtol=tolerance, atol=tolerance)
    assert model.find(0).channels == 6
    assert model.grey((2, 5)).shape == (1, 3, 2, 5)
    assert model.grey((2, 5)).dtype == dtype


# --- reading ----------------------------------------------------------------------------------------------------------


def test_reading_gives_what_the_layers_computed_and_stops_at_the_last(
    small_net: nn.Sequential, untouched: Guard
) -> None:
    model = handle(small_net, preprocessing=Preprocessing((0.5,)))
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        first = small_net[0](image - 0.5)
        second = small_net[4](small_net[3](torch.relu(small_net[1](first))))
    with untouched(small_net), model.reading([1, "0"]) as read:
        acts = read(image)
    torch.testing.assert_close(acts["0"], first, rtol=0, atol=0)
    torch.testing.assert_close(acts[1], second, rtol=0, atol=0)
    assert set(acts) == {"0", 1}
    small_net.state_dict()["8.weight"].fill_(float("nan"))
    ran: list[int] = []
    small_net[8].register_forward_hook(lambda *_: ran.append(1))
    with model.reading([".4"]) as read:
        assert read(image)[".4"].isfinite().all()
    assert ran == []


def test_an_empty_address_reads_the_whole_network(small_net: nn.Sequential) -> None:
    model = handle(small_net)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with model.reading([""]) as read:
        scores = read(image)[""]
    torch.testing.assert_close(scores, small_net(image), rtol=0, atol=0)


class Returning(nn.Module):
    """Returns what it is told to make of its scores (b, 2) and maps (b, 2, h, w)."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 1)
        self.make = make

    def forward(self, image: Tensor) -> Any:
        maps = self.convolution(image)
        return self.make(maps.mean((2, 3)), maps)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda scores, maps: scores, ""),
        (lambda scores, maps: (scores,), "0"),
        (lambda scores, maps: {"out": scores}, "out"),
        (lambda scores, maps: {"hidden": maps, "logits": scores}, "logits"),
    ],
)
def test_the_class_scores_are_found_in_what_the_network_returns(make: Any, part: str) -> None:
    model = handle(Returning(make))
    image = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    assert model.output_part == part
    with model.reading([""]) as read:
        scores = read(image)[""]
    torch.testing.assert_close(scores, model.modules["convolution"](image).mean((2, 3)))


def test_a_network_that_returns_several_tensors_or_none_is_refused_as_a_classifier() -> None:
    with pytest.raises(
        errors.LayerRefused, match=r"net returns several tensors \(0, 1\); name the layer that you mean"
    ):
        _ = handle(Returning(lambda scores, maps: (scores, maps))).output_part
    with pytest.raises(errors.LayerRefused, match="net returns no tensor"):
        _ = handle(Returning(lambda scores, maps: None)).output_part


def test_layers_may_have_addresses_from_another_list_than_named_modules() -> None:
    """As in Keras, whose layers are no children of the network by PyTorch's book."""

    class Unlisted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = [nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(2, 5, 1)]

        def forward(self, image: Tensor) -> Tensor:
            for step in self.steps:
                image = step(image)
            return image

    net = Unlisted()
    model = handle(net, modules={"": net, "base/entry": net.steps[0], "base/exit": net.steps[2]})
    assert [layer.path for layer in model.layers()] == ["base/entry", "base/exit"]
    image = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with model.reading(["base/entry"]) as read:
        acts = read(image)
    torch.testing.assert_close(acts["base/entry"], net.steps[0](image), rtol=0, atol=0)


# --- what the handle is -----------------------------------------------------------------------------------------------


def test_nothing_on_a_handle_can_be_set(small_net: nn.Sequential) -> None:
    model = handle(small_net)
    for name in ("module", "name", "input_size", "labels", "anything", "fingerprint"):
        with pytest.raises(AttributeError):
            setattr(model, name, None)
    with pytest.raises(AttributeError):
        del model.module
    assert dataclasses.replace(model, name="other").modules.keys() == model.modules.keys()


def test_the_fingerprint_follows_the_weights_and_nothing_else(small_net: nn.Sequential) -> None:
    model = handle(small_net)
    before_changes = model.fingerprint
    assert len(before_changes) == 16
    assert int(before_changes, 16) >= 0
    assert handle(small_net, 16, labels=("a",)).fingerprint == before_changes
    small_net.to(memory_format=torch.channels_last)
    small_net.train()
    assert model.fingerprint == before_changes
    weight = small_net.state_dict()["4.weight"]
    before = weight[0, 0, 0, 0].clone()
    weight[0, 0, 0, 0] = torch.nextafter(before, 2 * before)  # one bit
    assert model.fingerprint != before_changes
    weight[0, 0, 0, 0] = before
    assert model.fingerprint == before_changes
    small_net.state_dict()["1.running_mean"].add_(1)
    assert model.fingerprint != before_changes


def test_the_fingerprint_does_not_depend_on_the_order_of_the_layers_names() -> None:
    wide, narrow = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)
    forwards, backwards = nn.ModuleDict({"a": wide, "b": narrow}), nn.ModuleDict({"b": narrow, "a": wide})
    assert handle(forwards).fingerprint == handle(backwards).fingerprint
    assert handle(forwards).fingerprint != handle(nn.ModuleDict({"a": narrow, "b": wide})).fingerprint


def test_the_fingerprint_tells_types_shapes_and_preprocessings_apart() -> None:
    net = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        net.weight.zero_()
    wide = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        wide.weight.zero_()
    models = [handle(net), handle(wide), handle(net, preprocessing=Preprocessing((0.5,)))]
    prints = [model.fingerprint for model in models] + [handle(nn.Linear(2, 1, bias=False).double()).fingerprint]
    assert len(set(prints)) == 4
    assert handle(net, preprocessing=Preprocessing((0.5,))).fingerprint == prints[2]
    assert handle(nn.ReLU()).fingerprint == handle(nn.ReLU()).fingerprint  # there is nothing to hash


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 2), (float("-inf"), 3)])
def test_the_layer_with_values_that_are_not_finite_is_named(small_net: nn.Sequential, value: float, count: int) -> None:
    handle(small_net).check_finite()
    small_net.state_dict()["4.weight"].view(-1)[:count] = value
    with pytest.raises(errors.WeightsRefused, match=rf"net are damaged: 4\.weight holds {count} values? that"):
        handle(small_net).check_finite()


# --- sizes ------------------------------------------------------------------------------------------------------------


def refused(model: Model, layer: str, size: int) -> str:
    with pytest.raises(errors.SizeRefused) as caught, model.reading([layer]) as read:
        model.check_takes(read, (size, size))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def deep(poolings: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2)) for _ in range(poolings)])


def test_a_size_too_small_for_the_layer_is_refused_with_the_usual_one(small_net: nn.Sequential) -> None:
    model = handle(deep(5), 64)  # like VGG19, which halves five times
    message = refused(model, "4.1", 8)
    assert message.startswith("net does not take a picture of 3×8×8 px (")
    assert message.endswith("); its usual size is 64×64, give another with --size")
    with model.reading(["3.0"]) as read:
        model.check_takes(read, (8, 8))  # the layers that 8 px do reach can be read


def test_a_size_of_which_nothing_is_left_is_refused() -> None:
    class Cut(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image[:, :, 6:]

    model = handle(nn.Sequential(Cut()))
    assert "(nothing is left of it at '.0'); its usual size" in refused(model, ".0", 4)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError, IndexError, TypeError])
def test_any_failure_at_the_usual_size_is_a_refusal_with_its_reason(error: type[Exception]) -> None:
    class Choosy(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            raise error("wrong height.\nand much more")

    with pytest.raises(errors.SizeRefused) as caught:
        handle(Choosy()).layers()
    advice = "say what it takes (--input-size, --channels-in)"
    assert str(caught.value) == f"net does not take a picture of 3×8×8 px (wrong height); {advice}"


def test_a_lack_of_memory_is_not_taken_for_a_wrong_size() -> None:
    class Hungry(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        handle(Hungry()).layers()


def test_the_first_line_of_an_error_ends_without_a_full_stop() -> None:
    assert first_line(ValueError("\n one.\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
