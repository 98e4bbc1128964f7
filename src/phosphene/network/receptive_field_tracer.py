"""Following receptive fields through the tensor operations of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from phosphene.network.receptive_field import (
    Factor,
    ReceptiveFieldState,
    broadcast,
    merged,
    regrouped,
    through_window,
    unmoving,
    windowed,
    without,
)

# What each operation makes of the field of its first argument: (field, output, all its arguments) -> field.
Rule = Callable[[ReceptiveFieldState, Tensor, list[Any]], ReceptiveFieldState | None]


def option(args: list[Any], index: int, default: Any) -> Any:
    """Return an operation's argument, or its default where the call left it out."""
    return args[index] if len(args) > index and args[index] not in (None, []) else default


def reshape_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    return regrouped(field, output.shape)


def expand_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    return broadcast(field, output.shape)


def permute_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    return replace(field, layout=tuple(field.layout[dim] for dim in args[1]))


def transpose_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    layout = list(field.layout)
    one, other = (args[1], args[2]) if len(args) > 2 else (0, -1)
    layout[one], layout[other] = layout[other], layout[one]
    return replace(field, layout=tuple(layout))


def slice_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    dim, begin, by = option(args, 1, 0), option(args, 2, 0), option(args, 4, 1)
    begin = max(0, begin + args[0].shape[dim]) if begin < 0 else begin
    return through_window(field, dim % output.dim(), output.shape[dim], 1, by, -begin, 1)


def select_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    dim, index = args[1] % args[0].dim(), args[2] % args[0].shape[args[1]]
    one = through_window(field, dim, 1, 1, 1, -index, 1)
    return one and without(one.mixed(dim), {dim})


def split_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    """Split, chunk: pieces of a dimension that does not run along the image."""
    dim = option(args, 2, 0) % output.dim()
    return None if any(one.side is not None for one in field.layout[dim]) else broadcast(field, output.shape)


def flip_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    new: ReceptiveFieldState | None = field
    for dim in args[1]:
        new = new and through_window(new, dim % output.dim(), output.shape[dim], 1, -1, 1 - output.shape[dim], 1)
    return new


def pad_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    new: ReceptiveFieldState | None = field
    for number, before in enumerate(args[1][::2]):
        dim = output.dim() - 1 - number
        if output.shape[dim] != args[0].shape[dim] or before:
            new = new and through_window(new, dim, output.shape[dim], 1, 1, before, 1)
    return new


def convolution_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    _, weight, _, stride, padding, dilation, backwards, _, groups = args
    if groups != 1 and any(one.side is not None for one in field.layout[1]):
        return None
    mixed = field.mixed(1).with_dim(1, [Factor(output.shape[1])])
    moves = any(one.side is not None for factors in mixed.layout[2:] for one in factors)
    if backwards and moves:
        if any(one != 1 for one in stride):
            return None  # which inputs reach an output depends on its place
        # at stride 1 it is a convolution with the complementary padding
        each = range(output.dim() - 2)
        padding = [(weight.shape[2 + one] - 1) * dilation[one] - padding[one] for one in each]
    return windowed(mixed, output.shape, weight.shape[2:], stride, padding, dilation)


def pool_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    return windowed(field, output.shape, args[1], option(args, 2, args[1]), option(args, 3, [0]), [1])


def max_pool_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    return windowed(field, output.shape, args[1], option(args, 2, args[1]), option(args, 3, [0]), option(args, 4, [1]))


def adaptive_pool_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    new: ReceptiveFieldState | None = field
    for dim in (output.dim() - 2, output.dim() - 1):
        before, after = args[0].shape[dim], output.shape[dim]
        if after == 1:
            new = new and new.mixed(dim).with_dim(dim, ())
        elif before % after == 0:
            new = new and through_window(new, dim, after, before // after, before // after, 0, 1)
        elif new and any(one.side is not None for one in new.layout[dim]):
            return None  # its windows are of several sizes
    return new


def resize_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    """Upsampling: known only along dimensions that keep their extent or do not run along the image."""
    for dim in range(2, output.dim()):
        if output.shape[dim] != args[0].shape[dim]:
            if any(one.side is not None and one.extent > 1 for one in field.layout[dim]):
                return None
            field = field.mixed(dim).with_dim(dim, [Factor(output.shape[dim])])
    return field


def reduce_rule(
    field: ReceptiveFieldState, output: Tensor, args: list[Any], dims_at: int = 1
) -> ReceptiveFieldState | None:
    """Return the field after a sum, mean or maximum over some dimensions or, where none are named, all."""
    count = args[0].dim()
    named = option(args, dims_at, list(range(count)))
    gone = {dim % count for dim in ([named] if isinstance(named, int) else named)}
    field = field.mixed(*gone)
    kept = () if output.dim() == count else gone
    for dim in gone:
        field = field.with_dim(dim, ())
    return without(field, set(kept))


def vector_norm_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    return reduce_rule(field, output, args, dims_at=2)


def softmax_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    return field.mixed(args[1] % output.dim())


def layer_norm_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    return field.mixed(*range(output.dim() - len(args[1]), output.dim()))


def group_norm_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    return field.mixed(*range(1, output.dim()))


def batch_norm_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    """With the statistics of the training it acts on each entry alone; with the image's own it mixes all."""
    own = not isinstance(args[3], Tensor) or args[5] is True
    return field.mixed(0, *range(2, output.dim())) if own else field


def space_to_depth_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    *start, height, width = args[0].shape
    by = args[1]
    cut = regrouped(field, (*start, height // by, by, width // by, by))
    return cut and regrouped(sort_rule(cut, -3, -1, -4, -2, keep=len(start)), output.shape)


def depth_to_space_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    *start, channels, height, width = args[0].shape
    by = args[1]
    cut = regrouped(field, (*start, channels // by**2, by, by, height, width))
    return cut and regrouped(sort_rule(cut, -2, -4, -1, -3, keep=len(start) + 1), output.shape)


def sort_rule(field: ReceptiveFieldState, *dims: int, keep: int) -> ReceptiveFieldState:
    return replace(field, layout=(*field.layout[:keep], *(field.layout[dim] for dim in dims)))


def concatenate_rule(fields: list[ReceptiveFieldState], output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    """Concatenation, along a dimension that does not run along the image."""
    dim = option(args, 1, 0) % output.dim()
    if any(one.side is not None for field in fields for one in field.layout[dim]):
        return None
    return merged([field.with_dim(dim, [Factor(output.shape[dim])]) for field in fields], output.shape)


def product_rule(
    left: ReceptiveFieldState | None, right: ReceptiveFieldState | None, output: Tensor
) -> ReceptiveFieldState | None:
    """A matrix product, which mixes the last dimension of the left and the one before the last of the right."""
    fields = []
    if left is not None:
        last = len(left.layout) - 1
        fields.append(left.mixed(last).with_dim(last, [Factor(output.shape[-1])]))
    if right is not None:
        last = len(right.layout) - 2
        fields.append(right.mixed(last).with_dim(last, [Factor(output.shape[-2])]))
    return merged(fields, output.shape)


def linear_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    return product_rule(field, None, output)


RULES: dict[str, Rule] = {
    "convolution": convolution_rule,
    "avg_pool2d": pool_rule,
    "avg_pool3d": pool_rule,
    "max_pool2d_with_indices": max_pool_rule,
    "_adaptive_avg_pool2d": adaptive_pool_rule,
    "adaptive_max_pool2d": adaptive_pool_rule,
    "constant_pad_nd": pad_rule,
    "reflection_pad1d": pad_rule,
    "reflection_pad2d": pad_rule,
    "replication_pad1d": pad_rule,
    "replication_pad2d": pad_rule,
    "permute": permute_rule,
    "transpose": transpose_rule,
    "t": transpose_rule,
    "view": reshape_rule,
    "_unsafe_view": reshape_rule,
    "reshape": reshape_rule,
    "squeeze": reshape_rule,
    "unsqueeze": reshape_rule,
    "expand": expand_rule,
    "slice": slice_rule,
    "select": select_rule,
    "pixel_shuffle": depth_to_space_rule,
    "pixel_unshuffle": space_to_depth_rule,
    "split": split_rule,
    "split_with_sizes": split_rule,
    "chunk": split_rule,
    "flip": flip_rule,
    "_softmax": softmax_rule,
    "_log_softmax": softmax_rule,
    "linalg_vector_norm": vector_norm_rule,
    "norm": vector_norm_rule,
    "native_layer_norm": layer_norm_rule,
    "_fused_rms_norm": layer_norm_rule,
    "native_group_norm": group_norm_rule,
    "linear": linear_rule,
    "_upsample_nearest_exact2d": resize_rule,
}
RULES |= dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "std", "var", "prod", "logsumexp"), reduce_rule)
RULES |= {f"upsample_{way}": resize_rule for way in ("nearest1d", "nearest2d", "bilinear2d", "bicubic2d")}
RULES |= {f"{library}_batch_norm": batch_norm_rule for library in ("native", "cudnn", "miopen")}
RULES |= {f"_native_batch_norm_legit{ending}": batch_norm_rule for ending in ("", "_no_training")}
# what acts on every entry alone, or on channels alone, though PyTorch does not mark it so
POINTWISE = {"alias", "contiguous", "detach", "lift_fresh", "native_channel_shuffle", "hardswish", "hardswish_"}
POINTWISE |= {"mish_", "threshold_", "log_sigmoid_forward", "_prelu_kernel", "rrelu_with_noise", "rrelu_with_noise_"}
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
# results that take no more than the shape of their arguments
SHAPED = {f"{one}_like" for one in ("empty", "zeros", "ones", "full", "rand", "randn")}
SHAPED |= {f"new_{one}" for one in ("empty", "empty_strided", "zeros", "ones", "full")}


class ReceptiveFieldTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, follows the receptive field of every tensor, and notes which tensors were overwritten in place.

    With `arithmetic=False`, convolutions and matrix products return zeros of the right shape, which saves nearly all
    of the time of a forward pass; a network whose way depends on its values may go another way then.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Have PyTorch leave `__torch_dispatch__` as it is: its wrapper imports the compiler, which takes seconds."""
        return False

    def __init__(self, image: Tensor, arithmetic: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arithmetic = arithmetic
        # of the tensors that depend on the image
        self.fields: MutableMapping[Tensor, ReceptiveFieldState | None] = WeakTensorKeyDictionary()
        self.fields[image] = ReceptiveFieldState.of_image(image)
        self.spoilt: set[int] = set()  # storages of which parts were written, so that the rest is not known any more
        self.shown: dict[int, list[int]] = {}  # storage -> numbers of the tensors shown that lie in it
        self.overwritten: dict[int, str] = {}  # number -> the first operation that wrote to that tensor

    def show(self, number: int, tensor: Tensor) -> ReceptiveFieldState | None:
        """Return a tensor's field, and from now on note in `overwritten[number]` what overwrites it."""
        self.shown.setdefault(storage_address(tensor), []).append(number)
        return self.field(tensor)

    def field(self, tensor: Tensor) -> ReceptiveFieldState | None:
        """Return a tensor's receptive field; None where it is unknown or the tensor does not depend on the image."""
        return self.fields.get(tensor)

    def depends(self, tensor: Tensor) -> bool:
        return tensor in self.fields or storage_address(tensor) in self.spoilt

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        output = None if self.arithmetic else blank(name, args)
        output = func(*args, **kwargs) if output is None else output
        given = list(flat_tensors([*args, *kwargs.values()]))
        inputs = [one for one in given if self.depends(one)]
        known = {storage_address(one) for one in given}
        written = self.note_writing(func, args, kwargs)
        for tensor in flat_tensors([output]):
            if storage_address(tensor) not in known:  # new memory, at an address that may have been another's
                self.spoilt.discard(storage_address(tensor))
                self.shown.pop(storage_address(tensor), None)
            if inputs and name not in SHAPED:
                field = self.follow(func, name, list(args), inputs, tensor)
                if any(tensor is one for one in written) and (tensor not in self.fields or self.field(tensor) != field):
                    self.spoil(tensor)
                self.fields[tensor] = field
        return output

    def note_writing(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Return the tensors that an operation writes to, and note the writing for those shown."""
        given = kwargs | {one.name: value for one, value in zip(func._schema.arguments, args, strict=False)}
        writes = [one.name for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
        written = list(flat_tensors(given[name] for name in writes if name in given))
        for tensor in written:
            for number in self.shown.pop(storage_address(tensor), ()):
                self.overwritten[number] = func._schema.name.split("::")[-1]
        return written

    def spoil(self, tensor: Tensor) -> None:
        """Forget the fields of everything else in the memory of a tensor that was written to."""
        self.spoilt.add(storage_address(tensor))
        for other in list(self.fields):
            if storage_address(other) == storage_address(tensor):
                self.fields[other] = None

    def follow(
        self, func: Any, name: str, args: list[Any], inputs: list[Tensor], output: Tensor
    ) -> ReceptiveFieldState | None:
        """Return the field of one of an operation's results, `inputs` being its arguments that depend on the image."""
        known = {id(one): field for one in inputs if (field := self.field(one)) is not None}
        if len(known) < len({id(one) for one in inputs}):
            return None
        first = known.get(id(args[0]))
        fields = list(known.values())
        field = None
        if name == "cat":
            field = concatenate_rule(fields, output, args)
        elif name in PRODUCTS:
            left, right = (known.get(id(args[index])) for index in PRODUCTS[name])
            field = (
                product_rule(left, right, output) if len(known) == (left is not None) + (right is not None) else None
            )
        elif name == "copy_":
            field = broadcast(known.get(id(args[1]), fields[0]), output.shape)
        elif name in RULES and first is not None:
            field = RULES[name](first, output, args)
            rest = [one for key, one in known.items() if key != id(args[0])]
            if rest:  # such as weights made from the image itself
                others = unmoving(rest, output.shape)
                field = merged([field, others], output.shape) if field and others else None
        elif torch.Tag.pointwise in func.tags or name in POINTWISE:
            field = merged(fields, output.shape)
        field = field or unmoving(fields, output.shape)
        return field if field and field.fits(output.shape) else None


def blank(name: str, args: Any) -> Tensor | None:
    """Return zeros of the shape that a convolution or matrix product gives; None where it has to be computed."""
    given = list(flat_tensors(args))
    if len({one.dtype for one in given}) > 1:
        return None
    if name in PRODUCTS:
        left, right = (args[index] for index in PRODUCTS[name])
        fits = left.shape[-1] == right.shape[-2]
        return left.new_zeros((*left.shape[:-1], right.shape[-1])) if fits else None
    if name != "convolution":
        return None
    image, weight, _, stride, padding, dilation, backwards, _, groups = args
    if backwards or image.shape[1] != weight.shape[1] * groups:
        return None
    kernel = weight.shape[2:]
    places = [
        (extent + 2 * padding[dim] - dilation[dim] * (kernel[dim] - 1) - 1) // stride[dim] + 1
        for dim, extent in enumerate(image.shape[2:])
    ]
    return image.new_zeros((image.shape[0], weight.shape[0], *places)) if min(places) > 0 else None


def storage_address(tensor: Tensor) -> int:
    """Return where the memory of a tensor starts, which its views share."""
    return tensor.untyped_storage().data_ptr()


def flat_tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    """Yield the tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from flat_tensors(value)
