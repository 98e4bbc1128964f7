"""Reading what layers computed: the only place with hooks.

A hook that keeps `output` is wrong wherever an in-place operation follows, for that overwrites what was kept; a hook
that keeps a clone has the right value but no gradient. `capture` keeps a copy that nothing else can reach, and hands
the rest of the network a copy OF that one, so that values and gradients are both right; even where a module returns
what it was given, or keeps hold of its output. The forward pass stops at the last layer wanted, by an exception that
only this file knows.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class TensorAddress:
    """Where a tensor appears in a forward pass: which module, which of its calls, which part of what it returns."""

    path: str
    call: int = 0
    part: str = ""


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def weight_of(module: nn.Module) -> Tensor | None:
    """Return a convolution's kernel (out, in, kh, kw), None for anything else."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        return None
    return weight.transpose(0, 1) if getattr(module, "transposed", False) else weight


@dataclass(frozen=True)
class Layout:
    """How a framework lays out what its layers return and hold.

    `read` brings a layer's output into the one convention, `write` brings it back; `kernel` returns the kernel of a
    convolution (out, in, kh, kw), None for other layers.
    """

    read: Callable[[Tensor], Tensor] = as_it_is
    write: Callable[[Tensor], Tensor] = as_it_is
    kernel: Callable[[nn.Module], Tensor | None] = weight_of


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
    """Return the tensors in what a module returned, by name: `""` for a bare tensor, `"0"`, `"logits"`, `"0.1"` …"""
    if isinstance(output, Tensor):
        return {"": output}
    found: dict[str, Tensor] = {}
    for name, value in children(output).items():
        found |= {dotted(name, inner): tensor for inner, tensor in tensors_in(value).items()}
    return found


def dotted(name: str, inner: str) -> str:
    return f"{name}.{inner}" if inner else name


def with_part(output: Any, part: str, tensor: Tensor) -> Any:
    """Return a copy of what a module returned with one tensor replaced."""
    if not part:
        return tensor
    name, old, inner = next(  # a key may have dots of its own, so that the part cannot be cut at them
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
    """A place inside a layer that no module returns: an identity that can be put there, and hooked like any module.

    Where it goes is either what `owner` gives to its own activation function, `ACTIVATION`, or what it is given,
    `INPUT`. It is there only while watched; the owner does not hold it.
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
        """Have what passes this place pass through this module, and leave the owner as it was."""
        owner = self.owner
        if self.where == self.INPUT:
            handle = owner.register_forward_pre_hook(lambda _owner, inputs: (self(inputs[0]), *inputs[1:]))
            with ExitStack() as stack:
                stack.callback(handle.remove)
                yield
            return
        # in the instance's dictionary it is found before the class's own, and before a module of that name
        before = vars(owner).get("activation", MISSING)
        activation = owner.activation
        vars(owner)["activation"] = lambda value, *more: activation(self(value), *more)
        try:
            yield
        finally:
            del vars(owner)["activation"]
            if before is not MISSING:
                vars(owner)["activation"] = before


MISSING = object()


@contextmanager
def hooked(modules: Mapping[str, nn.Module], see: Callable[[str, Any], Any]) -> Iterator[None]:
    """Call `see(path, output)` whenever a module returns; what it returns, unless None, replaces the output."""
    with ExitStack() as hooks:
        for path, module in modules.items():
            if isinstance(module, InnerHookPoint):
                hooks.enter_context(module.spliced())
            handle = module.register_forward_hook(lambda _module, _inputs, output, path=path: see(path, output))
            hooks.callback(handle.remove)
        yield


@contextmanager
def capture(
    run: Callable[[Tensor], Any],
    modules: Mapping[str, nn.Module],
    places: Mapping[Any, TensorAddress],
    layout: Layout = PLAIN,
    roots: Collection[Any] = (),
) -> Iterator[Callable[[Tensor], dict[Any, Tensor]]]:
    """Hook the wanted layers once and yield `read(image)`, which runs up to the last and returns their tensors.

    A network that goes on from a layer goes on from the very tensor returned here, so that a later one can be
    differentiated with respect to an earlier one.

    Args:
        run: the forward pass, image (b, c, h, w) -> whatever the network returns.
        modules: every module that `places` names, by path.
        places: what is wanted, by any key; `read` returns a dict with the same keys.
        layout: how the network lays out what its layers return.
        roots: keys of the tensors where the graph of gradients starts, so that a backward pass ends there.

    Raises:
        LayerRefused: on reading, where a wanted layer did not run, or returned something else than asked for.
    """
    calls: Counter[str] = Counter()
    kept: dict[Any, Tensor] = {}
    wanted: dict[str, list[tuple[Any, TensorAddress]]] = {}
    for key, place in places.items():
        wanted.setdefault(place.path, []).append((key, place))

    def see(path: str, output: Any) -> Any:
        here = [(key, place) for key, place in wanted[path] if place.call == calls[path]]
        calls[path] += 1
        if not here:
            return None
        found = tensors_in(output)
        for key, place in here:
            if place.part not in found:
                raise LayerRefused(f"{path} returned no tensor {place.part!r} this time; it has: {', '.join(found)}")
            kept[key] = layout.read(found[place.part])
        if len(kept) == len(places):
            raise StopForward
        for part in {place.part for _, place in here}:
            own = layout.read(found[part]).clone()
            if any(key in roots for key, place in here if place.part == part):
                own = own.detach().requires_grad_()
            kept.update({key: own for key, place in here if place.part == part})
            output = with_part(output, part, layout.write(own).clone())
        return output

    def read(image: Tensor) -> dict[Any, Tensor]:
        try:
            if places:
                run(image)
        except StopForward:
            return dict(kept)
        else:
            missing = ", ".join(place.path for key, place in places.items() if key not in kept)
            if missing:
                raise LayerRefused(f"{missing} did not run in this forward pass, so there is nothing to read")
            return {}
        finally:
            calls.clear()
            kept.clear()  # lest the tensors live on until the next reading

    with hooked({path: modules[path] for path in wanted}, see):
        yield read


@contextmanager
def borrowed(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode with its weights frozen, and give it back exactly as it was.

    Restored on the way out, after an exception too: the training flag of every module, `requires_grad` of every
    parameter, every buffer (those that a forward pass added are taken away), `Module.compile()` (hooks need the plain
    forward), and the global random state of PyTorch, NumPy and Python.
    """
    flags = [(one, one.training, one._compiled_call_impl) for one in module.modules()]
    wishes = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    buffers = [(one, dict(one._buffers), set(one._non_persistent_buffers_set)) for one in module.modules()]
    # frameworks without buffers keep the state of their random generators in whole-numbered parameters
    counts = [one for one in module.parameters() if not one.is_floating_point()]
    values = [(one, one.detach().clone()) for one in (*module.buffers(), *counts)]
    devices = sorted({parameter.device.index for parameter, _ in wishes if parameter.device.type == "cuda"})
    draws = random.getstate(), numpy.random.get_state()
    try:
        for one, _, compiled in flags:
            one.training = False
            if compiled is not None:
                one._compiled_call_impl = None
        for parameter, wish in wishes:
            if wish:
                parameter.requires_grad_(False)
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for one, training, compiled in flags:
            one.training = training
            if compiled is not None:
                one._compiled_call_impl = compiled
        for parameter, wish in wishes:
            if wish:
                parameter.requires_grad_(True)
        for one, own, transient in buffers:
            one._buffers.clear()
            one._buffers.update(own)
            one._non_persistent_buffers_set = transient
        for buffer, before in values:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
        random.setstate(draws[0])
        numpy.random.set_state(draws[1])
