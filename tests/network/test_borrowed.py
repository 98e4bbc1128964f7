"""Borrowing a network: nothing is left behind, however the reading ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from phosphene.network.capture import TensorAddress, borrowed, capture
from phosphene.network.model import Model

Untouched = Callable[[nn.Module], AbstractContextManager[None]]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


class Counting(nn.Module):
    """Counts its forward passes in a buffer in place and in one that it replaces, and adds one on the first."""

    calls: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.tensor([float("nan"), 0.0]))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        if "made" not in self._buffers:
            self.register_buffer("made", torch.ones(1), persistent=False)
        return x


class Dicing(nn.Module):
    """Draws from every global generator, in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 1e-3 * torch.rand(()).item() + 1e-3 * random.random() + 1e-3 * numpy.random.rand())


class Failing(nn.Module):
    """Raises what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return x


class LivedIn(nn.Module):
    """A network in use: mixed flags, some weights frozen, gradients, hooks of the user, state in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.counting = Counting()
        self.dropout = nn.Dropout()
        self.dicing = Dicing()
        self.relu = nn.ReLU(inplace=True)
        self.failing = Failing()
        self.last = nn.Conv2d(4, 2, 1)
        self.head = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


@pytest.fixture
def lived_in() -> LivedIn:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = LivedIn()
        net(torch.rand(1, 3, 8, 8)).sum().backward()
    del net.counting._buffers["made"]
    net.counting._non_persistent_buffers_set.clear()
    net.norm.eval()
    net.last.weight.requires_grad_(False)
    net.conv.register_forward_hook(lambda _module, _inputs, output: output * 2)
    net.conv.register_forward_pre_hook(lambda _module, inputs: inputs)
    net.head.register_full_backward_hook(lambda _module, _before, _after: None)
    return net


def more_of(net: nn.Module) -> dict[str, Any]:
    """Return what the shared guard does not look at."""
    return {
        "buffer names": [name for name, _ in net.named_buffers()],
        "buffer tables": [list(module._buffers) for module in net.modules()],
        "saved": list(net.state_dict()),
        "compiled": [module._compiled_call_impl for module in net.modules()],
        "random": random.getstate(),
        "numpy": [*map(str, numpy.random.get_state())],
        "inference": torch.is_inference_mode_enabled(),
    }


def nan_to_zero(net: LivedIn) -> None:
    """The shared guard compares with torch.equal, which NaN never passes."""
    net.counting.replaced.nan_to_num_()


class Broken(Exception):
    """An error in the network."""


ENDINGS: dict[str, BaseException | None] = {
    "success": None,
    "an error in the network": Broken(),
    "an interruption": KeyboardInterrupt(),
}
OUTSIDE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "with gradients": torch.enable_grad,
    "without gradients": torch.no_grad,
    "in inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("ending", ENDINGS)
def test_reading_leaves_no_trace(ending: str, outside: str, lived_in: LivedIn, untouched: Untouched) -> None:
    nan_to_zero(lived_in)
    lived_in.failing.error = ENDINGS[ending]
    lived_in.norm.compile(backend="eager")
    lived_in.compile(backend="eager")
    compiled = lived_in._compiled_call_impl
    model = Model(lived_in, "lived in", (8, 8), modules=dict(lived_in.named_modules()))
    image = torch.rand(1, 3, 8, 8)
    before = more_of(lived_in)
    addresses = {"conv": TensorAddress("conv"), "last": TensorAddress("last")}
    acts = None
    with OUTSIDE[outside](), untouched(lived_in):
        stopped: AbstractContextManager[None] = (
            nullcontext() if ending == "success" else suppress(Broken, KeyboardInterrupt)
        )
        with stopped, borrowed(lived_in), capture(model.forward, model.modules, addresses) as read:
            assert not any(module.training for module in lived_in.modules())
            assert not any(parameter.requires_grad for parameter in lived_in.parameters())
            image.requires_grad_()
            acts = read(image)
            read(image)
            assert lived_in.counting.calls == 3
            (gradient,) = torch.autograd.grad(acts["last"].sum(), image)
            assert gradient.abs().max() > 0
        assert (acts is None) == (ending != "success")
    assert lived_in._compiled_call_impl is compiled is not None
    assert more_of(lived_in) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_error_of_the_caller_passes_through_a_reading_and_leaves_no_trace(
    error: type[BaseException], lived_in: LivedIn, untouched: Untouched
) -> None:
    nan_to_zero(lived_in)
    model = Model(lived_in, "lived in", (8, 8))
    before = more_of(lived_in)

    def interrupted() -> None:
        with model.reading(["conv", "last", ""]) as read:
            acts = read(torch.rand(2, 3, 8, 8))
            assert [acts[address].shape[1] for address in ("conv", "last", "")] == [4, 2, 2]
            raise error

    with untouched(lived_in), pytest.raises(error):
        interrupted()
    assert more_of(lived_in) == before


def test_the_hooks_of_the_user_still_act_while_reading(lived_in: LivedIn) -> None:
    image = torch.rand(1, 3, 8, 8)
    with borrowed(lived_in), capture(lived_in, {"conv": lived_in.conv}, {"conv": TensorAddress("conv")}) as read:
        act = read(image)["conv"]
    doubled = 2 * nn.functional.conv2d(image, lived_in.conv.weight, lived_in.conv.bias)
    assert torch.equal(act, doubled)


def test_a_buffer_with_nan_comes_back_with_its_nan(lived_in: LivedIn) -> None:
    with borrowed(lived_in):
        lived_in(torch.rand(1, 3, 8, 8))
        assert lived_in.counting.replaced[1] == 2
    assert lived_in.counting.replaced[0].isnan()
    assert lived_in.counting.replaced[1] == 1  # the pass that the fixture made


def test_gradients_can_be_taken_while_everything_outside_forbids_them(small_net: nn.Sequential) -> None:
    image = noise(1, 3, 8, 8, dtype=torch.float64)
    expected = small_net[:5](image.requires_grad_())
    (expected_gradient,) = torch.autograd.grad(expected.sum(), image)
    reading = capture(small_net, {"4": small_net[4]}, {"x": TensorAddress("4")})
    with torch.inference_mode(), borrowed(small_net), reading as read:
        act = read(image)["x"]
        (gradient,) = torch.autograd.grad(act.sum(), image)
    assert torch.equal(act, expected)
    assert torch.equal(gradient, expected_gradient)
