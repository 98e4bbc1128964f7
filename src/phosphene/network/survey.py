"""The survey of a network: one forward pass from which the table of its layers follows."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phosphene.network.batchnorm_pairs import FoldingObserver
from phosphene.network.capture import (
    PLAIN,
    Forward,
    InnerHookPoint,
    Layout,
    TensorAddress,
    borrowed,
    hooked,
    tensors_in,
)
from phosphene.network.layers import Layer, Layers, ReceptiveField, escape_digits
from phosphene.network.receptive_field import COLUMNS, ROWS, ReceptiveFieldState
from phosphene.network.receptive_field_tracer import ReceptiveFieldTracer

# Class names, so that the convolutions of other frameworks count without an import; a subclass counts as its parent.
CONVOLUTIONS = {"Conv2d", "ConvTranspose2d", "Conv2D", "Conv2DTranspose", "DepthwiseConv2D", "SeparableConv2D"}


@dataclass(frozen=True)
class ObservedTensor:
    """One tensor that a module returned during the survey."""

    address: TensorAddress
    module: nn.Module
    shape: tuple[int, ...]
    field: ReceptiveFieldState | None


def survey(
    run: Forward, module: nn.Module, modules: Mapping[str, nn.Module], image: Tensor, layout: Layout = PLAIN
) -> Layers:
    """Run a network once on `image` (1, c, h, w) and return the table of what every module returned.

    A module that runs several times has one row per call, `path@0`, `path@1` …; one that returns several tensors has
    one row per tensor, `path#0`, `path#logits` …; an all-digit path gets a leading dot, for a bare integer means the
    n-th convolution. The module is left as it was.
    """
    with borrowed(module), torch.no_grad():
        try:
            return trace(run, modules, image, ReceptiveFieldTracer(image, arithmetic=False), layout)
        except Exception:  # the network needs real values, or refuses the image: its own error explains that better
            return trace(run, modules, image, ReceptiveFieldTracer(image), layout)


def trace(
    run: Forward, modules: Mapping[str, nn.Module], image: Tensor, tracer: ReceptiveFieldTracer, layout: Layout = PLAIN
) -> Layers:
    """Run a network under a tracer and return its table."""
    calls: Counter[str] = Counter()
    observed: list[ObservedTensor] = []
    folding = FoldingObserver()

    def on_output(path: str, output: Any) -> None:
        for part, returned in tensors_in(output).items():
            folding.record_output(path, modules[path], returned)
            tensor, address = layout.read(returned), TensorAddress(path, calls[path], part)
            field = tracer.watch(len(observed), tensor)
            observed.append(ObservedTensor(address, modules[path], tuple(tensor.shape), field))
        calls[path] += 1

    with hooked(modules, on_output), tracer, folding:
        run(image)
    parts = Counter((tensor.address.path, tensor.address.call) for tensor in observed)
    rows = [
        layer_row(
            tensor,
            tracer.overwritten.get(number),
            calls[tensor.address.path] > 1,
            parts[tensor.address.path, tensor.address.call] > 1,
            fused_activation(modules, tensor.address.path),
        )
        for number, tensor in enumerate(observed)
    ]
    inner = {tensor.address.path for tensor in observed if isinstance(tensor.module, InnerHookPoint)}
    return Layers(
        [row for row in rows if row.tensor_address.path and row.tensor_address.path not in inner],
        [row for row in rows if row.tensor_address.path in inner],
        folding.pairs(),
    )


def fused_activation(modules: Mapping[str, nn.Module], path: str) -> str:
    """Return the name of the activation function that a layer applies itself, "" if it applies none."""
    hook_point = modules.get(f"{path}#{InnerHookPoint.ACTIVATION}")
    if not isinstance(hook_point, InnerHookPoint):
        return ""
    activation = hook_point.owner.activation
    return str(getattr(activation, "__name__", type(activation).__name__))


def layer_row(tensor: ObservedTensor, overwritten: str | None, repeated: bool, several: bool, fused: str) -> Layer:
    """Return a tensor's row; its module may run repeatedly, return several tensors, or have a fused activation."""
    owner, path, suffix = tensor.module, tensor.address.path, ""
    if isinstance(owner, InnerHookPoint):
        owner, path, suffix = owner.owner, path.rpartition("#")[0], f"#{path.rpartition('#')[2]}"
    path = escape_digits(path)
    path += f"@{tensor.address.call}" if repeated else ""
    path += f"#{tensor.address.part}" if several else suffix
    is_map = len(tensor.shape) == 4 and channels_first(tensor.field)
    sees, field = receptive_field(tensor.field)
    return Layer(
        path=path,
        tensor_address=tensor.address,
        kind=type(owner).__name__ + (f" + {fused}" if fused else ""),
        convolution=is_map and any(parent.__name__ in CONVOLUTIONS for parent in type(owner).__mro__),
        channels=tensor.shape[1] if is_map or len(tensor.shape) == 2 else None,
        size=(tensor.shape[2], tensor.shape[3]) if is_map else None,
        receptive_field=field,
        sees=sees,
        in_place=overwritten,
    )


def producing_call(run: Forward, modules: Mapping[str, nn.Module], image: Tensor) -> TensorAddress | None:
    """Return which call of which module made the one tensor that the network returns; None if none did."""
    calls: Counter[str] = Counter()
    outputs: list[tuple[TensorAddress, Any]] = []

    def on_output(path: str, output: Any) -> None:
        outputs.append((TensorAddress(path, calls[path]), output))
        calls[path] += 1

    with hooked({path: module for path, module in modules.items() if path}, on_output):
        result = run(image)
    # the first module that returned it made it: the modules that hold that one return it later
    return next((address for address, output in outputs if output is result), None)


def channels_first(field: ReceptiveFieldState | None) -> bool:
    """Return whether the axes of the image lie along the last two of four dimensions; True if that is unknown."""
    if field is None:
        return True
    axes = [{factor.axis for factor in factors} - {None} for factors in field.layout]
    return not axes[0] | axes[1] and axes[2] <= {ROWS} and axes[3] <= {COLUMNS}


def receptive_field(field: ReceptiveFieldState | None) -> tuple[str, ReceptiveField | None]:
    """Return ("part", its figures), ("whole", None) or ("unknown", None)."""
    if field is not None and field.is_whole_image:
        return "whole", None
    rows, columns = (field and field.along(axis) for axis in (ROWS, COLUMNS))
    if not rows or not columns:
        return "unknown", None
    size, stride, start = zip(rows, columns, strict=True)
    return "part", ReceptiveField(size, stride, (-start[0], -start[1]))
