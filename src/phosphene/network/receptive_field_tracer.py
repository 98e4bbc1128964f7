"""Following receptive fields through the tensor operations of a forward pass."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from phosphene.network.operation_observer import OperationObserver, flat_tensors, operation_name, storage_address
from phosphene.network.receptive_field import ReceptiveFieldState, broadcast, merged, unmoving
from phosphene.network.receptive_field_rules import POINTWISE, PRODUCTS, RULES, SHAPE_ONLY, concatenate, multiply


class ReceptiveFieldTracer(OperationObserver):  # type: ignore[no-untyped-call]
    """While active, follows the receptive field of every tensor, and notes which tensors were overwritten in place.

    With `arithmetic=False`, convolutions and matrix products return zeros of the right shape, which saves nearly all
    of the time of a forward pass; a network whose control flow depends on values may then take another path.
    """

    def __init__(self, image: Tensor, arithmetic: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arithmetic = arithmetic
        # of the tensors that depend on the image
        self.fields: MutableMapping[Tensor, ReceptiveFieldState | None] = WeakTensorKeyDictionary()
        self.fields[image] = ReceptiveFieldState.of_image(image)
        self.partly_written: set[int] = set()  # storages that were partly overwritten: views of them are unknown
        self.watched: dict[int, list[int]] = {}  # storage -> numbers of the watched tensors that lie in it
        self.overwritten: dict[int, str] = {}  # number -> the first operation that wrote to that tensor

    def watch(self, number: int, tensor: Tensor) -> ReceptiveFieldState | None:
        """Return a tensor's field, and from now on note in `overwritten[number]` what overwrites the tensor."""
        self.watched.setdefault(storage_address(tensor), []).append(number)
        return self.field(tensor)

    def field(self, tensor: Tensor) -> ReceptiveFieldState | None:
        """Return a tensor's receptive field; None if it is unknown or the tensor does not depend on the image."""
        return self.fields.get(tensor)

    def depends_on_image(self, tensor: Tensor) -> bool:
        return tensor in self.fields or storage_address(tensor) in self.partly_written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        output = None if self.arithmetic else zero_output(name, args)
        output = func(*args, **kwargs) if output is None else output
        arguments = list(flat_tensors([*args, *kwargs.values()]))
        inputs = [tensor for tensor in arguments if self.depends_on_image(tensor)]
        old_storages = {storage_address(tensor) for tensor in arguments}
        written = self.record_writes(func, args, kwargs)
        for tensor in flat_tensors([output]):
            if storage_address(tensor) not in old_storages:  # new memory, perhaps at an address used before
                self.partly_written.discard(storage_address(tensor))
                self.watched.pop(storage_address(tensor), None)
            if inputs and name not in SHAPE_ONLY:
                field = self.propagate(func, name, list(args), inputs, tensor)
                in_place = any(tensor is argument for argument in written)
                if in_place and (tensor not in self.fields or self.field(tensor) != field):
                    self.forget_storage(tensor)
                self.fields[tensor] = field
        return output

    def record_writes(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Return the tensors that an operation writes to, and note the operation for those that are watched."""
        schema = func._schema.arguments
        values = kwargs | {argument.name: value for argument, value in zip(schema, args, strict=False)}
        names = [argument.name for argument in schema if (alias := argument.alias_info) is not None and alias.is_write]
        written = list(flat_tensors(values[name] for name in names if name in values))
        for tensor in written:
            for number in self.watched.pop(storage_address(tensor), ()):
                self.overwritten[number] = operation_name(func)
        return written

    def forget_storage(self, tensor: Tensor) -> None:
        """Forget the fields of everything else in the memory of a tensor that was written to."""
        self.partly_written.add(storage_address(tensor))
        for candidate in list(self.fields):
            if storage_address(candidate) == storage_address(tensor):
                self.fields[candidate] = None

    def propagate(
        self, func: Any, name: str, args: list[Any], inputs: list[Tensor], output: Tensor
    ) -> ReceptiveFieldState | None:
        """Return the field of one of an operation's results; `inputs` are its arguments that depend on the image."""
        by_input = {id(tensor): field for tensor in inputs if (field := self.field(tensor)) is not None}
        if len(by_input) < len({id(tensor) for tensor in inputs}):
            return None
        first = by_input.get(id(args[0]))
        fields = list(by_input.values())
        field = None
        if name == "cat":
            field = concatenate(fields, output, args)
        elif name in PRODUCTS:
            left, right = (by_input.get(id(args[index])) for index in PRODUCTS[name])
            if len(by_input) == (left is not None) + (right is not None):
                field = multiply(left, right, output)
        elif name == "copy_":
            field = broadcast(by_input.get(id(args[1]), fields[0]), output.shape)
        elif name in RULES and first is not None:
            field = RULES[name](first, output, args)
            rest = [by_input[key] for key in by_input if key != id(args[0])]
            if rest:  # such as weights made from the image itself
                rest_field = unmoving(rest, output.shape)
                field = merged([field, rest_field], output.shape) if field and rest_field else None
        elif torch.Tag.pointwise in func.tags or name in POINTWISE:
            field = merged(fields, output.shape)
        field = field or unmoving(fields, output.shape)
        return field if field and field.has_shape(output.shape) else None


def zero_output(name: str, args: Any) -> Tensor | None:
    """Return zeros of the shape that a convolution or matrix product returns; None if it has to be computed."""
    if len({tensor.dtype for tensor in flat_tensors(args)}) > 1:
        return None
    if name in PRODUCTS:
        left, right = (args[index] for index in PRODUCTS[name])
        fits = left.shape[-1] == right.shape[-2]
        return left.new_zeros((*left.shape[:-1], right.shape[-1])) if fits else None
    if name != "convolution":
        return None
    image, weight, _, stride, padding, dilation, transposed, _, groups = args
    if transposed or image.shape[1] != weight.shape[1] * groups:
        return None
    kernel = weight.shape[2:]
    extents = [
        (extent + 2 * padding[dim] - dilation[dim] * (kernel[dim] - 1) - 1) // stride[dim] + 1
        for dim, extent in enumerate(image.shape[2:])
    ]
    return image.new_zeros((image.shape[0], weight.shape[0], *extents)) if min(extents) > 0 else None
