"""Capture: the right value and the right gradient at every layer, and no further than needed."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from phosphene.errors import LayerRefused
from phosphene.network.capture import TensorAddress, capture, tensors_in, with_part

NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)

NETS = {  # name -> side of the image in pixels; most have operations in place
    "alexnet": 64,
    "vgg11_bn": 64,
    "vgg16": 64,
    "resnet18": 64,
    "resnet50": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 80,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "mnasnet0_5": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
}
UNSTARTED = ("vgg11_bn", "vgg16", "googlenet", "inception_v3")
LARGEST = ("vgg16",)  # 138 million weights, all of its kinds of layers are in vgg11_bn
WITHOUT_IN_PLACE = ("convnext_tiny", "swin_t")


def built(name: str) -> nn.Module:
    """Return a torchvision network with weights from seed 0, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"init_weights": False} if name in UNSTARTED else {}
        net = models.get_model(name, weights=None, **options)
        evaluating: nn.Module = net.eval()
        return evaluating


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def readable(net: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and normalisations of a network by path."""
    return {path: module for path, module in net.named_modules() if isinstance(module, (nn.Conv2d, *NORMS))}


def hooked(net: nn.Module, image: Tensor, keep: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return what plain hooks keep of the outputs in one forward pass."""
    outputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, path=path: outputs.update({path: keep(output)}))
        for path, module in readable(net).items()
    ]
    net(image)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGEST)) for name in NETS])
@torch.no_grad()
def test_every_layer_reads_as_a_clone_taken_in_its_hook(name: str) -> None:
    net, image = built(name), noise(1, 3, NETS[name], NETS[name])
    truth = hooked(net, image, torch.clone)
    modules = {path: net.get_submodule(path) for path in truth}
    with capture(net, modules, {path: TensorAddress(path) for path in truth}) as read:
        acts = read(image)
    assert len(acts) > 4
    for path, expected in truth.items():
        assert torch.equal(acts[path], expected), path
    # that the comparison would find the fault: a hook that keeps the output itself is wrong where it is overwritten
    naive = hooked(net, image, lambda output: output)
    wrong = [path for path, expected in truth.items() if not torch.equal(naive[path], expected)]
    assert bool(wrong) == (name not in WITHOUT_IN_PLACE)


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "mobilenet_v3_small", "squeezenet1_1"])
def test_gradients_at_every_convolution_are_those_of_the_network_without_in_place_operations(name: str) -> None:
    net, side = built(name).double(), 64 if name == "alexnet" else 32
    image = noise(1, 3, side, side, dtype=torch.float64).requires_grad_()
    paths = [path for path, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    addresses = {path: TensorAddress(path) for path in ("", *paths)}
    with capture(net, {"": net} | readable(net), addresses) as read:
        acts = read(image)
        captured = gradients(acts, acts[""], image, paths)
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    plain: dict[str, Tensor] = {}
    for path in paths:  # without a copy: the tensors of the graph itself
        net.get_submodule(path).register_forward_hook(lambda _m, _i, output, path=path: plain.update({path: output}))
    reference = gradients(plain, net(image), image, paths)
    for path in paths:
        for mine, theirs in zip(captured[path], reference[path], strict=True):
            assert theirs.abs().max() > 0
            assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max())), path


def gradients(
    acts: dict[str, Tensor], logits: Tensor, image: Tensor, paths: list[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for each layer d (its squares).sum() / d image and d (logit 7).sum() / d layer."""
    of_logit = torch.autograd.grad(logits[:, 7].sum(), [acts[path] for path in paths], retain_graph=True)
    return {
        path: (torch.autograd.grad(acts[path].square().sum(), image, retain_graph=True)[0], gradient)
        for path, gradient in zip(paths, of_logit, strict=True)
    }


def test_values_and_gradients_by_hand() -> None:
    """x -> 2x -> relu in place -> sum of 3 times it, at x = (-1, 4)."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.double_it = Scale(2.0)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            tripled: Tensor = 3 * self.relu(self.double_it(x))
            return tripled.sum()

    net, x = Tiny(), torch.tensor([-1.0, 4.0], requires_grad=True)
    with capture(
        net, {"double_it": net.double_it, "": net}, {"a": TensorAddress("double_it"), "b": TensorAddress("")}
    ) as read:
        acts = read(x)
    assert acts["a"].tolist() == [-2.0, 8.0]
    assert acts["b"].item() == 24.0
    assert torch.autograd.grad(acts["b"], acts["a"], retain_graph=True)[0].tolist() == [0.0, 3.0]
    assert torch.autograd.grad(acts["a"].sum(), x, retain_graph=True)[0].tolist() == [2.0, 2.0]
    assert torch.autograd.grad(acts["b"], x)[0].tolist() == [0.0, 6.0]


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Aliasing(nn.Module):
    """Returns what it was given, and the caller then writes to that; and remembers an output to write to later."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Scale(2.0)
        self.shortcut = nn.Identity()
        self.last = Scale(10.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        same = self.shortcut(x)
        x.relu_()
        out: Tensor = self.last(x + same)
        return out


def test_a_module_that_returns_what_it_was_given_reads_right() -> None:
    net, x = Aliasing(), torch.tensor([-1.0, 4.0])
    names = ("first", "shortcut", "last")
    with capture(net, dict(net.named_modules()), {name: TensorAddress(name) for name in names}) as read:
        acts = read(x)
    assert acts["first"].tolist() == [-2.0, 8.0]
    assert acts["shortcut"].tolist() == [-2.0, 8.0]
    assert acts["last"].tolist() == [-20.0, 160.0]


class Trace(nn.Module):
    """Remembers that it ran."""

    ran = 0

    def forward(self, x: Tensor) -> Tensor:
        self.ran += 1
        return x + 1


def test_the_forward_pass_stops_at_the_last_layer_needed() -> None:
    steps = [Trace() for _ in range(4)]
    net = nn.Sequential(*steps)
    with capture(net, dict(net.named_modules()), {"x": TensorAddress("1"), "y": TensorAddress("0")}) as read:
        for _ in range(3):
            acts = read(torch.zeros(2))
    assert [step.ran for step in steps] == [3, 3, 0, 0]
    assert acts["x"].tolist() == [2, 2]
    assert acts["y"].tolist() == [1, 1]


def test_a_module_that_runs_several_times_is_read_at_the_call_asked_for() -> None:
    step = Trace()
    net = nn.Sequential(step, step, step)
    addresses = {number: TensorAddress("0", number) for number in (2, 0)}
    with capture(net, {"0": step}, addresses) as read:
        assert {key: act.item() for key, act in read(torch.zeros(1)).items()} == {0: 1.0, 2: 3.0}
        assert {key: act.item() for key, act in read(torch.ones(1)).items()} == {0: 2.0, 2: 4.0}
    with capture(net, {"0": step}, {"x": TensorAddress("0", 1)}) as read:
        assert read(torch.zeros(1))["x"].item() == 2.0
    assert step.ran == 3 + 3 + 2


def test_two_keys_for_one_address_give_one_tensor() -> None:
    net = nn.Sequential(Trace(), nn.ReLU(inplace=True), Trace())
    with capture(
        net, dict(net.named_modules()), {"a": TensorAddress("0"), "b": TensorAddress("0"), "c": TensorAddress("2")}
    ) as read:
        acts = read(torch.tensor([-5.0], requires_grad=True))
    assert acts["a"] is acts["b"]
    assert (acts["a"].item(), acts["c"].item()) == (-4.0, 1.0)
    assert torch.autograd.grad(acts["c"], acts["a"])[0].item() == 0.0


Pair = namedtuple("Pair", ["left", "right"])


class TypedPair(NamedTuple):
    left: Tensor
    right: Tensor | None


@dataclass
class Record:
    left: Tensor
    right: Tensor
    name: str = "record"


@dataclass(frozen=True)
class Frozen:
    left: Tensor
    right: Tensor


class ModelOutput(OrderedDict[str, Any]):
    """As Hugging Face has it: a dataclass that is also an ordered dictionary, with both views kept the same."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                self[field.name] = value

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


@dataclass
class ImageOutput(ModelOutput):
    left: Tensor | None = None
    right: Tensor | None = None
    nothing: Tensor | None = None


SHAPES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str, Callable[[Any], Tensor]]] = {
    "tuple": (lambda a, b: (a, b), "1", lambda out: out[1]),
    "list": (lambda a, b: [a, None, b], "2", lambda out: out[2]),
    "dict": (lambda a, b: {"left": a, "right": b}, "right", lambda out: out["right"]),
    "dict with dots": (lambda a, b: {"f.0": a, "f.0.b": b}, "f.0.b", lambda out: out["f.0.b"]),
    "dict of numbers": (lambda a, b: {0: a, 1: b}, "1", lambda out: out[1]),
    "nested": (lambda a, b: {"x": (a, [b])}, "x.1.0", lambda out: out["x"][1][0]),
    "namedtuple": (Pair, "right", lambda out: out.right),
    "typed namedtuple": (TypedPair, "right", lambda out: out.right),
    "dataclass": (Record, "right", lambda out: out.right),
    "frozen dataclass": (Frozen, "right", lambda out: out.right),
    "model output": (ImageOutput, "right", lambda out: out.right),
    "model output by key": (ImageOutput, "right", lambda out: out["right"]),
    "return type of max": (lambda a, b: torch.stack([a, b]).max(0), "0", lambda out: out[0]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_modules_that_return_several_tensors_are_read_and_go_on(shape: str) -> None:
    make, part, take = SHAPES[shape]

    class Two(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return make(x - 1, 2 * x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()
            self.after = Scale(3.0)

        def forward(self, x: Tensor) -> Tensor:
            out = self.two(x)
            assert type(out) is type(make(x, x))
            after: Tensor = self.after(take(out).relu_())
            return after

    net, x = Net(), torch.tensor([-1.0, 4.0], requires_grad=True)
    part = {"namedtuple": "1", "typed namedtuple": "1"}.get(shape, part)
    expected = [-2.0, 8.0]
    with capture(
        net, dict(net.named_modules()), {"a": TensorAddress("two", 0, part), "b": TensorAddress("after")}
    ) as read:
        acts = read(x)
    assert acts["a"].tolist() == expected
    assert acts["b"].tolist() == [0.0, 24.0]
    assert torch.autograd.grad(acts["b"].sum(), acts["a"], retain_graph=True)[0].tolist() == [0.0, 3.0]
    assert torch.autograd.grad(acts["b"].sum(), x)[0].tolist() == [0.0, 6.0]


def test_replacing_one_tensor_leaves_the_original_and_the_rest_alone() -> None:
    a, b, new = (torch.full((1,), float(value)) for value in (1, 2, 3))
    output = ImageOutput(a, b)
    changed = with_part(output, "right", new)
    assert (changed.right is new, changed["right"] is new, changed.left is a) == (True, True, True)
    assert (output.right is b, output["right"] is b) == (True, True)
    assert list(tensors_in(changed)) == ["left", "right"]
    assert with_part(Record(a, b, "kept"), "left", new) == Record(new, b, "kept")


def test_what_does_not_run_or_is_not_there_is_refused_by_name() -> None:
    net = nn.Sequential(Trace(), Trace())
    with (
        capture(net, {"0": net[0]}, {"x": TensorAddress("0", 1)}) as read,
        pytest.raises(LayerRefused, match="0 did not run"),
    ):
        read(torch.zeros(1))
    with capture(net, {"0": net[0]}, {"x": TensorAddress("0", 0, "logits")}) as read:
        for _ in range(2):
            with pytest.raises(LayerRefused, match="0 returned no tensor 'logits'"):
                read(torch.zeros(1))


def test_nothing_read_lives_on_in_the_capture() -> None:
    net = nn.Sequential(Trace(), Trace(), Trace())
    with capture(net, dict(net.named_modules()), {"x": TensorAddress("0"), "y": TensorAddress("1")}) as read:
        acts = read(torch.zeros(1))
        alive = [weakref.ref(act) for act in acts.values()]
        del acts
        gc.collect()
        assert [reference() for reference in alive] == [None, None]


def test_a_backward_pass_ends_at_a_root() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv2d(2, 1, 1)).double()
    image = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    modules, addresses = dict(net.named_modules()), {"a": TensorAddress("0"), "b": TensorAddress("2")}
    with capture(net, modules, addresses, roots=["a"]) as read:
        acts = read(image)
    assert acts["a"].is_leaf
    (gradient,) = torch.autograd.grad(acts["b"].sum(), acts["a"], retain_graph=True)
    weight = net.get_parameter("2.weight")
    expected = (acts["a"] > 0) * weight[0]
    assert torch.equal(gradient, expected.expand_as(gradient))
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(acts["b"].sum(), image)
