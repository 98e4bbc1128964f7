"""Receptive fields, computed exactly from the operations a network performs.

While a forward pass runs, `Tracer` sees every tensor operation and keeps for each tensor which part of the input image
its entries depend on. Along one side, output position i depends on the input pixels from `start + i · stride` to
`start + i · stride + size - 1`; this arithmetic follows Araujo et al., "Computing Receptive Fields of Convolutional
Neural Networks" (Distill 2019). An operation that mixes all positions (global pooling, attention, squeeze-excitation)
makes the field the whole image; one that is not regular over positions leaves it unknown (None).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Side:
    """The receptive field along one side, in input pixels; `whole`: every position sees all of the image."""

    size: int = 1
    stride: Fraction = Fraction(1)
    start: Fraction = Fraction(0)
    whole: bool = False

    def window(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> Side:
        """Return the field after a sliding window."""
        reach = (kernel - 1) * dilation * self.stride
        if reach.denominator != 1 and not self.whole:
            reach = Fraction(-(-reach.numerator // reach.denominator))
        return replace(
            self,
            size=self.size + int(reach),
            stride=self.stride * stride,
            start=self.start - padding * self.stride,
        )


@dataclass(frozen=True)
class Field:
    """The receptive field of a tensor: its two sides, and which dimensions of the tensor they lie along."""

    down: Side
    right: Side
    dims: tuple[int, int] = (2, 3)
    merged: tuple[int, int] | None = None  # (h, w) while a view holds both in the one dimension dims[0]

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.down, self.right


WHOLE = Side(whole=True)


def union(sides: Iterable[Side]) -> Side | None:
    """Return the smallest field that holds all, None where strides differ; `whole` if any is."""
    listed = list(dict.fromkeys(sides))
    if any(side.whole for side in listed):
        return WHOLE
    if len({side.stride for side in listed}) != 1:
        return None
    start = min(side.start for side in listed)
    end = max(side.start + side.size for side in listed)
    return Side(int(end - start), listed[0].stride, start)


def pair(value: Any, default: int = 1) -> tuple[int, int]:
    """Return an option of a window, given as [], [k] or [kh, kw], as two numbers."""
    listed = [value] if isinstance(value, int) else list(value or [default])
    return (listed[0], listed[-1])


def windowed(field: Field, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> Field:
    """Return the field after a two-dimensional sliding window."""
    options = zip(pair(kernel), pair(stride or kernel), pair(padding, 0), pair(dilation), strict=True)
    down, right = (side.window(*option) for side, option in zip(field.sides, options, strict=True))
    return replace(field, down=down, right=right)


def whole(field: Field, output: Tensor) -> Field:
    """Return the field of an output each of whose entries sees all of the image."""
    return Field(WHOLE, WHOLE, field.dims if output.dim() == 4 else (output.dim(), output.dim()))


def option(args: list[Any], index: int, default: Any) -> Any:
    """Return an operation's argument, or its default where the call left it out."""
    return args[index] if len(args) > index else default


def convolution(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    _, weight, _, stride, padding, dilation, transposed = args[:7]
    if weight.dim() != 4:
        return None
    if transposed and (tuple(pair(stride)) != (1, 1) and not (field.down.whole and field.right.whole)):
        return None  # which inputs reach an output depends on its position
    if transposed:  # with stride 1 it is a convolution with the complementary padding
        reach = [(kernel - 1) * spread for kernel, spread in zip(weight.shape[2:], pair(dilation), strict=True)]
        padding = [far - border for far, border in zip(reach, pair(padding, 0), strict=True)]
    return windowed(field, weight.shape[2:], stride, padding, dilation)


def pool(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return windowed(field, args[1], option(args, 2, None), option(args, 3, 0))


def dilated_pool(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return windowed(field, args[1], option(args, 2, None), option(args, 3, 0), option(args, 4, 1))


def adaptive_pool(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    if tuple(output.shape[-2:]) == (1, 1):
        return whole(field, output)
    inputs, outputs = args[0].shape[-2:], output.shape[-2:]
    if any(before % after for before, after in zip(inputs, outputs, strict=True)):
        return None
    steps = [before // after for before, after in zip(inputs, outputs, strict=True)]
    return windowed(field, steps, steps, 0)


def padded(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    amounts = list(args[1]) + [0] * (2 * args[0].dim())
    last = args[0].dim() - 1
    before = [amounts[2 * (last - dim)] for dim in field.dims]
    down, right = (
        replace(side, start=side.start - n * side.stride) for side, n in zip(field.sides, before, strict=True)
    )
    return replace(field, down=down, right=right)


def mean(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    count = args[0].dim()
    gone = {dim % count for dim in args[1]} if len(args) > 1 and args[1] is not None else set(range(count))
    if gone & set(field.dims):
        return whole(field, output)
    if len(args) > 2 and args[2]:
        return field
    return replace(field, dims=tuple(dim - sum(one < dim for one in gone) for dim in field.dims))


def permuted(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    order = [dim % args[0].dim() for dim in args[1]]
    return replace(field, dims=(order.index(field.dims[0]), order.index(field.dims[1])))


def transposed(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    order = list(range(args[0].dim()))
    one, other = (args[1] % len(order), args[2] % len(order)) if len(args) > 2 else (0, 1)
    order[one], order[other] = order[other], order[one]
    return permuted(field, output, [args[0], order])


def viewed(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    """Follow the two sides through a reshape, also while it holds both in one dimension."""
    before, after = list(args[0].shape), list(output.shape)
    first, last = field.dims
    sides = list(field.merged or (before[first], before[last]))
    if not field.merged and last != first + 1:
        return None
    leading = 1
    for one in before[:first]:
        leading *= one
    done = 1
    for dim in range(len(after)):
        if done == leading and after[dim : dim + 2] == sides:
            return replace(field, dims=(dim, dim + 1), merged=None)
        if after[dim] * done == leading * sides[0] * sides[1] and done in (1, leading) and 1 in (leading, done):
            return replace(field, dims=(dim, dim), merged=(sides[0], sides[1]))
        done *= after[dim]
    return None


def sliced(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    dim = (args[1] if len(args) > 1 else 0) % args[0].dim()
    if dim not in field.dims or field.merged:
        return field if dim not in field.dims else None
    begin = args[2] if len(args) > 2 and args[2] is not None else 0
    begin = begin + args[0].shape[dim] if begin < 0 else begin
    step = args[4] if len(args) > 4 else 1

    def cut(side: Side) -> Side:
        return replace(side, start=side.start + begin * side.stride, stride=side.stride * step)

    return replace(field, down=cut(field.down)) if dim == field.dims[0] else replace(field, right=cut(field.right))


def upsampled(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    factors = [Fraction(after, before) for before, after in zip(args[0].shape[-2:], output.shape[-2:], strict=True)]
    return field if factors == [1, 1] or field.down.whole else None


def normalised(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    """Layer normalisation: over the last dimensions, which mixes positions only if they are among those."""
    first = args[0].dim() - len(args[1])
    return whole(field, output) if max(field.dims) >= first else field


def batch_normalised(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    training = any(one is True for one in args[5:6]) or args[3] is None
    return whole(field, output) if training else field


def multiplied(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    """A matrix product with weights: it mixes the last dimension only."""
    return field if max(field.dims) < output.dim() - 1 else whole(field, output)


def flipped(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    """A flip keeps the field unless it turns the map itself round."""
    return None if {dim % output.dim() for dim in args[1]} & set(field.dims) else field


def unchanged(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return field


Rule = Callable[[Field, Tensor, list[Any]], Field | None]
RULES: dict[str, Rule] = {
    "convolution": convolution,
    "max_pool2d_with_indices": dilated_pool,
    "avg_pool2d": pool,
    "_adaptive_avg_pool2d": adaptive_pool,
    "adaptive_max_pool2d": adaptive_pool,
    "constant_pad_nd": padded,
    "reflection_pad2d": padded,
    "replication_pad2d": padded,
    "mean": mean,
    "sum": mean,
    "permute": permuted,
    "transpose": transposed,
    "t": transposed,
    "view": viewed,
    "_unsafe_view": viewed,
    "reshape": viewed,
    "slice": sliced,
    "native_layer_norm": normalised,
    "native_batch_norm": batch_normalised,
    "_native_batch_norm_legit_no_training": batch_normalised,
    "cudnn_batch_norm": batch_normalised,
    "native_group_norm": lambda field, output, args: whole(field, output),
    "addmm": multiplied,
    "mm": multiplied,
    "flip": flipped,
    "clone": unchanged,
    "contiguous": unchanged,
    "_to_copy": unchanged,
    "detach": unchanged,
    "alias": unchanged,
    "relu_": unchanged,
    "split": unchanged,
    "split_with_sizes": unchanged,
    "chunk": unchanged,
    "prelu": unchanged,
}
for _kind in ("nearest1d", "nearest2d", "_nearest_exact2d", "bilinear2d", "bicubic2d"):
    RULES[f"upsample_{_kind}"] = upsampled


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, follows the receptive field of every tensor, and notes which results were overwritten in place."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: dict[int, tuple[Tensor, Field | None]] = {}  # holding the tensor keeps its id from being used again
        self.overwritten: dict[int, str] = {}  # storage address -> name of the first operation that wrote to it again
        self.hold(image, Field(Side(), Side()))

    def hold(self, tensor: Tensor, field: Field | None) -> None:
        self.held[id(tensor)] = (tensor, field)

    def field(self, tensor: Tensor) -> Field | None:
        """Return the tensor's receptive field, None where it is unknown."""
        return self.held.get(id(tensor), (None, None))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.note_overwriting(func, args)
        inputs = [one for one in flat(args) if id(one) in self.held]
        if inputs:
            for tensor in flat([output]):
                self.hold(tensor, self.follow(func, args, inputs, tensor))
        return output

    def note_overwriting(self, func: Any, args: Any) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self.overwritten.setdefault(value.untyped_storage().data_ptr(), func._schema.name.split("::")[-1])

    def follow(self, func: Any, args: Any, inputs: list[Tensor], output: Tensor) -> Field | None:
        fields = [self.field(one) for one in inputs]
        if any(field is None for field in fields):
            return None
        known = [field for field in fields if field is not None]
        name = func._schema.name.split("::")[-1]
        if name in RULES and len(inputs) == 1:
            return RULES[name](known[0], output, list(args))
        if name == "cat":
            dim = (args[1] if len(args) > 1 else 0) % output.dim()
            return None if dim in known[0].dims else merge(known, output)
        if torch.Tag.pointwise in func.tags:
            return merge(known, output)
        return whole(known[0], output) if all(field.down.whole and field.right.whole for field in known) else None


def merge(fields: list[Field], output: Tensor) -> Field | None:
    """Return the field of an output computed position by position from several inputs."""
    full = [field for field in fields if not (field.down.whole and field.right.whole)]
    if len(full) < len(fields):
        return whole(fields[0], output)
    if len({(field.dims, field.merged) for field in full}) != 1:
        return None
    down, right = union(field.down for field in full), union(field.right for field in full)
    return None if down is None or right is None else replace(full[0], down=down, right=right)


def flat(values: Any) -> Iterable[Tensor]:
    """Yield the tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from flat(value)
