"""Reading what layers computed: the only place with hooks.

A hook that keeps `output` is wrong wherever an in-place operation follows, for that overwrites what was kept; a hook
that keeps a clone has the right value but no gradient. `capture` keeps a copy that nothing else can reach, and hands
the rest of the network a copy OF that one. So values and gradients are both right, even if a module returns its own
input or keeps a reference to its output. `StopForward` ends the forward pass at the last wanted layer.
"""

import copy
import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from phosphene.errors import LayerRefused

Forward = Callable[[Tensor], Any]  # images (b, c, h, w) -> whatever the network returns


@dataclass(frozen=True)
class TensorAddress:
    """Where a tensor appears in a forward pass: which module, which of its calls, which part of what it returns."""

    path: str
    call: int = 0
    part: str = ""


def identity(input: Tensor) -> Tensor:
    """Return the tensor; modules call their argument `input`, so that this can stand in for a `forward`."""
    return input


def weight_of(module: nn.Module) -> Tensor | None:
    """Return a convolution's kernel (out, in, kh, kw), None for anything else."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        return None
    return weight.transpose(0, 1) if getattr(module, "transposed", False) else weight


@dataclass(frozen=True)
class Layout:
    """How a framework lays out what its layers return and hold."""

    read: Callable[[Tensor], Tensor] = identity  # brings a layer's output into the convention of `model`
    write: Callable[[Tensor], Tensor] = identity  # brings it back
    kernel: Callable[[nn.Module], Tensor | None] = weight_of  # a convolution's (out, in, kh, kw), None for other layers


PLAIN = Layout()


class StopForward(BaseException):
    """Ends a forward pass once everything wanted has been read."""


def children(output: Any) -> dict[str, Any]:
    """Return the named entries of a tuple, list, mapping or dataclass; of anything else, nothing."""
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items()}
    if isinstance(output, tuple | list):
        return {str(index): value for index, value in enumerate(output)}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {}


def tensors_in(output: Any) -> dict[str, Tensor]:
    """Return the tensors in a module's output, by name: `""` for a bare tensor, `"0"`, `"logits"`, `"0.1"` …"""
    if isinstance(output, Tensor):
        return {"": output}
    entries = children(output).items()
    return {dotted(name, inner): tensor for name, value in entries for inner, tensor in tensors_in(value).items()}


def dotted(name: str, inner: str) -> str:
    return f"{name}.{inner}" if inner else name


def with_part(output: Any, part: str, tensor: Tensor) -> Any:
    """Return a copy of a module's output with one tensor replaced."""
    if not part:
        return tensor
    name, old, inner = next(  # a key may contain dots, so the part cannot be split at them
        (name, old, inner)
        for name, old in children(output).items()
        for inner in tensors_in(old)
        if dotted(name, inner) == part
    )
    value = with_part(old, inner, tensor)
    if isinstance(output, tuple | list):
        values = [value if str(index) == name else old for index, old in enumerate(output)]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    changed = copy.copy(output)
    if isinstance(output, Mapping):
        changed[next(key for key in output if str(key) == name)] = value
    else:
        object.__setattr__(changed, name, value)  # which a frozen dataclass allows, too
    return changed


class InnerHookPoint(nn.Module):
    """An identity module for a tensor that no module returns, so that it can be hooked like any output.

    The tensor is the input of the activation function that `owner` applies, `ACTIVATION`, or the input of `owner`
    itself, `INPUT`. The module is spliced in only while hooked; `owner` holds no reference to it.
    """

    INPUT, ACTIVATION = "input", "preactivation"
    owner: Any

    def __init__(self, owner: nn.Module, where: str) -> None:
        super().__init__()
        vars(self)["owner"] = owner  # not as a child, whose parameters would be its own
        self.where = where

    def forward(self, value: Any) -> Any:
        return value

    @contextmanager
    def spliced(self) -> Iterator[None]:
        """Have the tensor pass through this module, and on exit leave the owner as it was."""
        owner = self.owner
        if self.where == self.INPUT:
            with owner.register_forward_pre_hook(lambda _owner, inputs: (self(inputs[0]), *inputs[1:])):
                yield
            return
        # in the instance's dictionary it takes precedence over the class's own, and over a module of that name
        before = {name: value for name, value in vars(owner).items() if name == "activation"}
        activation = owner.activation
        vars(owner)["activation"] = lambda value, *rest: activation(self(value), *rest)
        try:
            yield
        finally:
            del vars(owner)["activation"]
            vars(owner).update(before)


@contextmanager
def hooked(modules: Mapping[str, nn.Module], on_output: Callable[[str, Any], Any]) -> Iterator[None]:
    """Call `on_output(path, output)` whenever a module returns; its result, unless None, replaces the output."""
    with ExitStack() as hooks:
        for path, module in modules.items():
            if isinstance(module, InnerHookPoint):
                hooks.enter_context(module.spliced())
            handle = module.register_forward_hook(lambda _module, _inputs, output, path=path: on_output(path, output))
            hooks.callback(handle.remove)
        yield


class Capture:
    """Keeps the tensors at some addresses while a forward pass runs; see `capture` for the arguments."""

    def __init__(
        self, run: Forward, addresses: Mapping[Any, TensorAddress], layout: Layout, roots: Collection[Any]
    ) -> None:
        self.run, self.addresses, self.layout, self.roots = run, addresses, layout, roots
        self.wanted: dict[tuple[str, int], dict[Any, TensorAddress]] = {}  # by path and call
        for key, address in addresses.items():
            self.wanted.setdefault((address.path, address.call), {})[key] = address
        self.calls: Counter[str] = Counter()
        self.captured: dict[Any, Tensor] = {}

    def read(self, image: Tensor) -> dict[Any, Tensor]:
        """Run the network up to the last wanted tensor and return all wanted tensors by key."""
        try:
            if self.addresses:
                self.run(image)
            missing = ", ".join(address.path for key, address in self.addresses.items() if key not in self.captured)
            if missing:
                raise LayerRefused(f"{missing} did not run in this forward pass, so there is nothing to read")
            return {}
        except StopForward:
            return dict(self.captured)
        finally:
            self.calls.clear()
            self.captured.clear()  # otherwise the tensors would live until the next reading

    def on_output(self, path: str, output: Any) -> Any:
        """Keep the wanted tensors of a module's output; return the output that replaces it, or None."""
        wanted = self.wanted.get((path, self.calls[path]))
        self.calls[path] += 1
        if not wanted:
            return None
        tensors = tensors_in(output)
        for key, address in wanted.items():
            if address.part not in tensors:
                names = ", ".join(tensors)
                raise LayerRefused(f"{path} returned no tensor {address.part!r} this time; it has: {names}")
            self.captured[key] = self.layout.read(tensors[address.part])
        if len(self.captured) == len(self.addresses):
            raise StopForward
        for part in {address.part for address in wanted.values()}:
            keys = [key for key, address in wanted.items() if address.part == part]
            copied = self.layout.read(tensors[part]).clone()
            if any(key in self.roots for key in keys):
                copied = copied.detach().requires_grad_()
            self.captured |= dict.fromkeys(keys, copied)
            output = with_part(output, part, self.layout.write(copied).clone())
        return output


@contextmanager
def capture(
    run: Forward,
    modules: Mapping[str, nn.Module],
    addresses: Mapping[Any, TensorAddress],
    layout: Layout = PLAIN,
    roots: Collection[Any] = (),
) -> Iterator[Callable[[Tensor], dict[Any, Tensor]]]:
    """Hook the wanted layers once and yield `read(image)`, which runs up to the last and returns their tensors.

    After a layer the network continues with the very tensor that is returned here, so that later tensors can be
    differentiated with respect to earlier ones.

    Args:
        run: the forward pass.
        modules: every module that `addresses` names, by path.
        addresses: of the wanted tensors, by any key; `read` returns a dict with the same keys.
        layout: how the network lays out what its layers return.
        roots: keys of the tensors where the graph of gradients starts, so that a backward pass ends there.

    Raises:
        LayerRefused: on reading, if a wanted layer did not run, or did not return the wanted tensor.
    """
    reader = Capture(run, addresses, layout, roots)
    with hooked({address.path: modules[address.path] for address in addresses.values()}, reader.on_output):
        yield reader.read


@contextmanager
def borrowed(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode with its weights frozen, and give it back exactly as it was.

    Restored on exit, after an exception too: the training flag of every module, `requires_grad` of every parameter,
    every buffer (those that a forward pass added are taken away), `Module.compile()` (hooks need the plain forward),
    and the global random state of PyTorch, NumPy and Python.
    """
    flags = [(layer, layer.training, layer._compiled_call_impl) for layer in module.modules()]
    buffers = [(layer, dict(layer._buffers), set(layer._non_persistent_buffers_set)) for layer in module.modules()]
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # frameworks without buffers keep the state of their random generators in whole-numbered parameters
    counters = [parameter for parameter in module.parameters() if not parameter.is_floating_point()]
    values = [(tensor, tensor.detach().clone()) for tensor in (*module.buffers(), *counters)]
    devices = sorted({weight.device.index for weight in module.parameters() if weight.device.type == "cuda"})
    random_states = random.getstate(), numpy.random.get_state()
    try:
        for layer, _, compiled in flags:
            layer.training = False
            if compiled is not None:
                layer._compiled_call_impl = None
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for layer, training, compiled in flags:
            layer.training = training
            if compiled is not None:
                layer._compiled_call_impl = compiled
        for parameter in trainable:
            parameter.requires_grad_(True)
        for layer, registered, non_persistent in buffers:
            layer._buffers.clear()
            layer._buffers.update(registered)
            layer._non_persistent_buffers_set = non_persistent
        for tensor, before in values:
            if not torch.equal(tensor, before):
                tensor.copy_(before)
        random.setstate(random_states[0])
        numpy.random.set_state(random_states[1])
