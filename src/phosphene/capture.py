"""Reading what layers computed: the only place with hooks.

A hook that keeps `output` is wrong wherever an in-place operation follows, for that overwrites what was kept; a hook
that keeps a clone has the right value but no gradient. `capture` keeps the ORIGINAL output, which nothing can overwrite
any more, because the rest of the network is handed a CLONE. The forward pass stops at the last layer wanted, by an
exception that only this file knows.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phosphene.errors import LayerRefused


@dataclass(frozen=True)
class Place:
    """Where a tensor appears in a forward pass: which module, which of its calls, which part of what it returns."""

    path: str
    call: int = 0
    part: str = ""


class Stop(BaseException):
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


def parts(output: Any) -> dict[str, Tensor]:
    """Return the tensors in what a module returned, by name: `""` for a bare tensor, `"0"`, `"logits"`, `"0.1"` …"""
    if isinstance(output, Tensor):
        return {"": output}
    found: dict[str, Tensor] = {}
    for name, value in children(output).items():
        found |= {f"{name}.{inner}" if inner else name: tensor for inner, tensor in parts(value).items()}
    return found


def with_part(output: Any, part: str, tensor: Tensor) -> Any:
    """Return a copy of what a module returned with one tensor replaced."""
    if not part:
        return tensor
    name, _, rest = part.partition(".")
    value = with_part(children(output)[name], rest, tensor)
    if isinstance(output, tuple | list):
        values = [value if str(index) == name else old for index, old in enumerate(output)]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    changed = copy.copy(output)
    if isinstance(output, Mapping):
        key = next(key for key in output if str(key) == name)
        changed[key] = value
    else:
        setattr(changed, name, value)
    return changed


@contextmanager
def watch(modules: Mapping[str, nn.Module], see: Callable[[str, Any], Any]) -> Iterator[None]:
    """Call `see(path, output)` whenever a module returns; what it returns, unless None, replaces the output."""
    with ExitStack() as hooks:
        for path, module in modules.items():
            handle = module.register_forward_hook(lambda _module, _inputs, output, path=path: see(path, output))
            hooks.callback(handle.remove)
        yield


@contextmanager
def capture(
    run: Callable[[Tensor], Any], modules: Mapping[str, nn.Module], places: Mapping[Hashable, Place]
) -> Iterator[Callable[[Tensor], dict[Any, Tensor]]]:
    """Hook the wanted layers once and yield `read(image)`, which runs up to the last and returns their tensors.

    Args:
        run: the forward pass, image (b, c, h, w) -> whatever the network returns.
        modules: every module that `places` names, by path.
        places: what is wanted, by any key; `read` returns a dict with the same keys.

    Raises:
        LayerRefused: on reading, where a wanted layer did not run.
    """
    calls: Counter[str] = Counter()
    kept: dict[Any, Tensor] = {}
    wanted: dict[str, list[tuple[Any, Place]]] = {}
    for key, place in places.items():
        wanted.setdefault(place.path, []).append((key, place))

    def see(path: str, output: Any) -> Any:
        here = [(key, place) for key, place in wanted[path] if place.call == calls[path]]
        calls[path] += 1
        for key, place in here:
            kept[key] = parts(output)[place.part]
        if len(kept) == len(places):
            raise Stop
        for part in {place.part for _, place in here}:
            output = with_part(output, part, parts(output)[part].clone())
        return output

    def read(image: Tensor) -> dict[Any, Tensor]:
        calls.clear()
        kept.clear()
        try:
            run(image)
        except Stop:
            return dict(kept)
        if not places:
            return {}
        missing = ", ".join(place.path for key, place in places.items() if key not in kept)
        raise LayerRefused(f"{missing} did not run in this forward pass, so there is nothing to read")

    with watch({path: modules[path] for path in wanted}, see):
        yield read


@contextmanager
def borrowed(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode with its weights frozen, and give it back exactly as it was.

    Restored on the way out, after an exception too: the training flag of every module, `requires_grad` of every
    parameter, every buffer, `Module.compile()` (hooks need the plain forward), and the global random state.
    """
    flags = [(one, one.training, one._compiled_call_impl) for one in module.modules()]
    wishes = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    buffers = [
        (one, name, buffer, buffer.detach().clone())
        for one in module.modules()
        for name, buffer in one._buffers.items()
        if buffer is not None
    ]
    devices = sorted({parameter.device.index for parameter, _ in wishes if parameter.device.type == "cuda"})
    try:
        for one, _, compiled in flags:
            one.training = False
            if compiled is not None:
                one._compiled_call_impl = None
        for parameter, _ in wishes:
            parameter.requires_grad_(False)
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for one, training, compiled in flags:
            one.training = training
            if compiled is not None:
                one._compiled_call_impl = compiled
        for parameter, wish in wishes:
            parameter.requires_grad_(wish)
        for one, name, buffer, before in buffers:
            one._buffers[name] = buffer
            if not torch.equal(buffer, before):
                buffer.copy_(before)
