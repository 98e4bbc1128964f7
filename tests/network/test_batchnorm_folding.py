"""Folding: that nobody notices it, and that maps stay what they are."""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torchvision import models

from convnorm_networks import UNFOLDABLE, Net, Plain, with_statistics
from phosphene.inspection.explain import explaining
from phosphene.network.batchnorm_folding import BatchNormFolding, fold
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.network.survey import survey
from raw_heatmaps import heatmaps

Untouched = Callable[[nn.Module], AbstractContextManager[None]]


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pairs(net: nn.Module, side: int = 8, channels: int = 2) -> list[tuple[str, str]]:
    """Return the paths that the survey says can be folded."""
    image = noise(1, channels, side, side)
    table = survey(net, net, dict(net.named_modules()), image)
    return [(pair.convolution, pair.norm) for pair in table.pairs]


def folding_of(net: nn.Module) -> BatchNormFolding:
    return Model(net, "net", (8, 8), channels_in=2).folding([""])


def test_a_fold_by_hand() -> None:
    """Gains 6 and -3 over deviations 2 and 3 are factors 3 and -1; shifts (1 - 5)·3 + 7 and -(0 - 2) + 4."""
    conv, norm = nn.Conv2d(1, 2, (1, 2)), nn.BatchNorm2d(2, eps=0.5)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 1, 1, 2))
        conv.bias.copy_(torch.tensor([1.0, 0.0]))  # type: ignore[union-attr]
        norm.weight.copy_(torch.tensor([6.0, -3.0]))
        norm.bias.copy_(torch.tensor([7.0, 4.0]))
    norm.running_mean, norm.running_var = torch.tensor([5.0, 2.0]), torch.tensor([3.5, 8.5])
    new = fold(conv, norm)
    assert new is not None
    assert new.weights["weight"].flatten().tolist() == [3.0, 6.0, -3.0, -4.0]
    assert new.weights["bias"].tolist() == [-5.0, 6.0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_the_folded_network_computes_the_same(bias: bool, affine: bool) -> None:
    """Grouped, strided, dilated and padded convolutions, with and without weights of the normalisation."""
    net = with_statistics(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=bias),
            nn.BatchNorm2d(4, eps=0.1, affine=affine),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 3, 2, dilation=2, padding=2, padding_mode="reflect", bias=bias),
            nn.Identity(),
            nn.BatchNorm2d(3, affine=affine),
        )
    )
    image = noise(2, 2, 8, 8)
    folding, plain = folding_of(net), net(image).detach()
    assert pairs(net) == [("0", "1"), ("3", "5")]
    means = []
    net.get_submodule("1").register_forward_hook(lambda _norm, inputs, output: means.append(inputs[0] is output))
    with folding.folded():
        torch.testing.assert_close(net(image).detach(), plain, rtol=1e-12, atol=1e-12)
    net(image)
    assert means == [True, False]  # it only passed on what it was given, and its hooks ran


class Same(nn.Conv2d):
    """A subclass that leaves out the bias if it has none."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        if self.bias is None:
            return F.conv2d(x, self.weight, stride=self.stride)
        return F.conv2d(x, self.weight, self.bias, self.stride)


@pytest.mark.parametrize("bias", [False, True])
def test_a_subclass_of_the_convolution(bias: bool) -> None:
    net = with_statistics(nn.Sequential(Same(2, 3, 2, bias=bias), nn.BatchNorm2d(3), nn.ReLU(inplace=True)))
    image = noise(2, 2, 8, 8)
    folding, plain = folding_of(net), net(image).detach()
    assert len(folding.pairs) == 1
    with folding.folded():
        torch.testing.assert_close(net(image).detach(), plain, rtol=1e-12, atol=1e-12)


def unfolded(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return what `heatmaps` does, without folding anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("phosphene.inspection.explain"), "LEAST_BATCH", 1000)
        return heatmaps(*arguments)


@pytest.mark.parametrize("kind", UNFOLDABLE)
def test_what_is_not_folded(kind: type[Net]) -> None:
    torch.manual_seed(0)
    net, images = with_statistics(kind()), noise(4, 2, 8, 8)
    model = Model(net, "net", (8, 8), channels_in=2)
    assert folding_of(net).pairs == []
    layer = next(layer.path for layer in model.layers() if layer.tensor_address.path == "norm")
    torch.testing.assert_close(heatmaps(model, images, 1, layer)[0], unfolded(model, images, 1, layer)[0])


def test_a_plain_pair_is_folded_unless_somebody_looks() -> None:
    def pairs_after(change: Callable[[Net], Any]) -> int:
        net = with_statistics(Plain())
        assert isinstance(net, Net)
        model = Model(net, "net", (8, 8), channels_in=2)
        assert len(model.layers().pairs) == 1
        change(net)
        return len(model.folding([""]).pairs)

    def look(*_: Any) -> None:
        pass

    assert pairs_after(lambda net: None) == 1
    assert pairs_after(lambda net: net.register_forward_hook(look)) == 1  # which sees what it always sees
    assert pairs_after(lambda net: net.conv.register_forward_hook(look)) == 0
    assert pairs_after(lambda net: net.norm.register_forward_hook(look)) == 0
    assert pairs_after(lambda net: net.norm.register_forward_pre_hook(look)) == 0
    assert pairs_after(lambda net: net.conv.register_full_backward_hook(look)) == 0
    assert pairs_after(lambda net: setattr(net, "norm", nn.BatchNorm2d(2).double())) == 0
    assert pairs_after(lambda net: setattr(net.norm, "forward", look)) == 0
    assert pairs_after(lambda net: weight_norm(net.conv)) == 0
    assert pairs_after(lambda net: net.bfloat16()) == 0
    assert pairs_after(lambda net: setattr(net.norm, "running_mean", None)) == 0
    handle = torch.nn.modules.module.register_module_forward_hook(look)
    assert pairs_after(lambda net: None) == 0
    handle.remove()
    assert folding_of(with_statistics(nn.Sequential(OrderedDict(inner=Plain())))).pairs != []


def test_hooks_on_what_holds_only_one_of_the_two() -> None:
    """The container of the convolution returns what the convolution returned; that of the norm is given it."""
    for path, count in (("0", 0), ("1", 0), ("1.1", 1)):
        net = nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 1)), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))
        model = Model(with_statistics(net), "net", (8, 8), channels_in=2)
        net.get_submodule(path).register_forward_hook(lambda *_: None)
        assert len(model.folding([""]).pairs) == count, path


def test_what_is_read_is_not_folded() -> None:
    net = with_statistics(nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 1)), nn.BatchNorm2d(2), nn.ReLU()))
    model = Model(net, "net", (8, 8), channels_in=2)
    counts = {layer: len(model.folding([layer, ""]).pairs) for layer in (".0", "0.0", ".1", ".2")}
    assert counts == {".0": 0, "0.0": 0, ".1": 0, ".2": 1}


def test_a_statistic_that_gives_no_number_is_left_alone() -> None:
    net = with_statistics(Plain())
    folding = folding_of(net)
    net.get_buffer("norm.running_var")[0] = -1.0
    with folding.folded():
        assert "forward" not in vars(net.norm)


def test_weights_that_change_are_folded_anew() -> None:
    net, image = with_statistics(Plain()), noise(1, 2, 8, 8)
    folding = folding_of(net)
    with folding.folded():
        before = net(image).detach()
    with torch.no_grad():
        net.get_parameter("conv.weight").mul_(2)
    with folding.folded():
        after = net(image).detach()
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, net(image).detach(), rtol=1e-12, atol=1e-12)


@contextmanager
def as_it_was(net: nn.Module, untouched: Untouched) -> Iterator[None]:
    """Fail where any parameter is not the very same object by the end, or a module holds anything new."""
    parameters = [(path, id(weight)) for path, weight in net.named_parameters(remove_duplicate=False)]
    names, state = [set(vars(module)) for module in net.modules()], copy.deepcopy(net.state_dict())
    with untouched(net):
        yield
    assert parameters == [(path, id(weight)) for path, weight in net.named_parameters(remove_duplicate=False)]
    assert names == [set(vars(module)) for module in net.modules()]
    assert list(state) == list(net.state_dict())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())


def fail_after(_: Any, error: type[BaseException]) -> None:
    raise error


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_everything_is_given_back(untouched: Untouched, error: type[BaseException]) -> None:
    net, images = with_statistics(models.resnet18(num_classes=5)), noise(4, 3, 32, 32)
    model = Model(net, "net", (32, 32))

    def fail(acts: Tensor, grads: Tensor) -> Tensor:
        assert "forward" in vars(net.get_submodule("bn1"))  # folded at this moment
        raise error

    with as_it_was(net, untouched):
        heatmaps(model, images, 1, "layer3")
    with as_it_was(net, untouched), pytest.raises(error):
        heatmaps(model, images, 1, "layer3", fail)
    with as_it_was(net, untouched), pytest.raises(error), explaining(model, "layer3") as explainer:
        fail_after(explainer.maps(images, 1), error)


def test_the_fingerprint_is_that_of_the_network_itself() -> None:
    model = Model(with_statistics(models.resnet18(num_classes=5)), "net", (32, 32))
    with explaining(model) as explainer:
        heat = explainer.explain_batch([noise(1, 3, 32, 32)] * 4)[0]
        assert heat.spec["fingerprint"] == model.fingerprint


class Recomputing(Plain):
    """Computes its convolution again in the backward pass, as a DenseNet that saves memory does."""

    def forward(self, x: Tensor) -> Any:
        x = x * 2
        x = checkpoint(self.conv, x, use_reentrant=False) if x.requires_grad else self.conv(x)
        return self.norm(x).relu().mean((2, 3))


def test_what_runs_again_in_the_backward_pass_finds_the_same_weights() -> None:
    net, image = with_statistics(Recomputing()), noise(1, 2, 8, 8)
    assert len(folding_of(net).pairs) == 1
    leaf = image.clone().requires_grad_()
    gradient = torch.autograd.grad(net(leaf)[0, 1], leaf)[0].sum(1)
    maps, _ = heatmaps(Model(net, "net", (8, 8), channels_in=2), image, 1, method="gradient")
    torch.testing.assert_close(maps, gradient)


LAYERS = {  # network -> side in pixels, layers, pairs that are folded at the first of them
    "resnet18": (48, ("layer4", "layer2.0.relu@0", "layer1.1.conv2"), 20),
    "mobilenet_v3_small": (48, ("features.11", "features.5"), 34),
    "efficientnet_b0": (33, ("features.7", "features.2"), 49),
    "densenet121": (64, ("features.denseblock4",), 59),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(net, marks=[pytest.mark.slow] * (net in ("densenet121", "efficientnet_b0"))) for net in LAYERS],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_maps_are_the_same_within_rounding(name: str, dtype: torch.dtype) -> None:
    """Against the same network in float64 with nothing folded; where maps cancel, float32 is never nearer."""
    side, layers, count = LAYERS[name]
    torch.manual_seed(0)
    exact = Model(with_statistics(models.get_model(name, weights=None)), name, (side, side))
    model = Model(copy.deepcopy(exact.module).to(dtype), name, (side, side))
    images, targets = noise(4, 3, side, side), [1, 20, 300, 999]
    assert len(model.folding([layers[0], ""]).pairs) == count
    for layer in layers:
        maps, logits = heatmaps(model, images.to(dtype), targets, layer)
        wanted, expected = unfolded(exact, images, targets, layer)
        plain, _ = unfolded(model, images.to(dtype), targets, layer)
        most = wanted.abs().amax((1, 2), keepdim=True)
        error, usual = (float(((heat - wanted).abs() / most).max()) for heat in (maps, plain))
        assert error <= max(1e-5 if dtype == torch.float32 else 1e-10, 3 * usual), layer
        torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_builtin_network_is_folded() -> None:
    """Its convolutions are of a class of their own, which pads as TensorFlow does."""
    model = load("builtin/efficientnet-lite0")
    assert len(model.folding([""]).pairs) == 49
    images = noise(4, 3, 224, 224, dtype=torch.float32)
    maps, _ = heatmaps(model, images, 3)
    wanted, _ = unfolded(model, images, 3)
    assert float((maps - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
