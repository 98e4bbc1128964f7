"""Following receptive fields through the tensor operations of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from phosphene.network.receptive_field import Factor, Field, merged, regrouped, slid, spread, still, windowed, without

# What each operation makes of the field of its first argument: (field, output, all its arguments) -> field.
Rule = Callable[[Field, Tensor, list[Any]], Field | None]


def option(args: list[Any], index: int, default: Any) -> Any:
    """Return an operation's argument, or its default where the call left it out."""
    return args[index] if len(args) > index and args[index] not in (None, []) else default


def reshaped(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return regrouped(field, output.shape)


def expanded(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return spread(field, output.shape)


def permuted(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return replace(field, layout=tuple(field.layout[dim] for dim in args[1]))


def transposed(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    layout = list(field.layout)
    one, other = (args[1], args[2]) if len(args) > 2 else (0, -1)
    layout[one], layout[other] = layout[other], layout[one]
    return replace(field, layout=tuple(layout))


def sliced(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    dim, begin, by = option(args, 1, 0), option(args, 2, 0), option(args, 4, 1)
    begin = max(0, begin + args[0].shape[dim]) if begin < 0 else begin
    return slid(field, dim % output.dim(), output.shape[dim], 1, by, -begin, 1)


def selected(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    dim, index = args[1] % args[0].dim(), args[2] % args[0].shape[args[1]]
    one = slid(field, dim, 1, 1, 1, -index, 1)
    return one and without(one.mixed(dim), {dim})


def divided(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    """Split, chunk: pieces of a dimension that does not run along the image."""
    dim = option(args, 2, 0) % output.dim()
    return None if any(one.side is not None for one in field.layout[dim]) else spread(field, output.shape)


def flipped(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    new: Field | None = field
    for dim in args[1]:
        new = new and slid(new, dim % output.dim(), output.shape[dim], 1, -1, 1 - output.shape[dim], 1)
    return new


def padded(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    new: Field | None = field
    for number, before in enumerate(args[1][::2]):
        dim = output.dim() - 1 - number
        if output.shape[dim] != args[0].shape[dim] or before:
            new = new and slid(new, dim, output.shape[dim], 1, 1, before, 1)
    return new


def convolved(field: Field, output: Tensor, args: list[Any]) -> Field | None:
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


def pooled(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return windowed(field, output.shape, args[1], option(args, 2, args[1]), option(args, 3, [0]), [1])


def max_pooled(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return windowed(field, output.shape, args[1], option(args, 2, args[1]), option(args, 3, [0]), option(args, 4, [1]))


def adaptively_pooled(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    new: Field | None = field
    for dim in (output.dim() - 2, output.dim() - 1):
        before, after = args[0].shape[dim], output.shape[dim]
        if after == 1:
            new = new and new.mixed(dim).with_dim(dim, ())
        elif before % after == 0:
            new = new and slid(new, dim, after, before // after, before // after, 0, 1)
        elif new and any(one.side is not None for one in new.layout[dim]):
            return None  # its windows are of several sizes
    return new


def resized(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    """Upsampling: known only along dimensions that keep their extent or do not run along the image."""
    for dim in range(2, output.dim()):
        if output.shape[dim] != args[0].shape[dim]:
            if any(one.side is not None and one.extent > 1 for one in field.layout[dim]):
                return None
            field = field.mixed(dim).with_dim(dim, [Factor(output.shape[dim])])
    return field


def reduced(field: Field, output: Tensor, args: list[Any], dims_at: int = 1) -> Field | None:
    """Return the field after a sum, mean or maximum over some dimensions or, where none are named, all."""
    count = args[0].dim()
    named = option(args, dims_at, list(range(count)))
    gone = {dim % count for dim in ([named] if isinstance(named, int) else named)}
    field = field.mixed(*gone)
    kept = () if output.dim() == count else gone
    for dim in gone:
        field = field.with_dim(dim, ())
    return without(field, set(kept))


def normed(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return reduced(field, output, args, dims_at=2)


def softmaxed(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return field.mixed(args[1] % output.dim())


def layer_normalised(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return field.mixed(*range(output.dim() - len(args[1]), output.dim()))


def group_normalised(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return field.mixed(*range(1, output.dim()))


def batch_normalised(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    """With the statistics of the training it acts on each entry alone; with the image's own it mixes all."""
    own = not isinstance(args[3], Tensor) or args[5] is True
    return field.mixed(0, *range(2, output.dim())) if own else field


def space_to_depth(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    *start, height, width = args[0].shape
    by = args[1]
    cut = regrouped(field, (*start, height // by, by, width // by, by))
    return cut and regrouped(ordered(cut, -3, -1, -4, -2, keep=len(start)), output.shape)


def depth_to_space(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    *start, channels, height, width = args[0].shape
    by = args[1]
    cut = regrouped(field, (*start, channels // by**2, by, by, height, width))
    return cut and regrouped(ordered(cut, -2, -4, -1, -3, keep=len(start) + 1), output.shape)


def ordered(field: Field, *dims: int, keep: int) -> Field:
    return replace(field, layout=(*field.layout[:keep], *(field.layout[dim] for dim in dims)))


def glued(fields: list[Field], output: Tensor, args: list[Any]) -> Field | None:
    """Concatenation, along a dimension that does not run along the image."""
    dim = option(args, 1, 0) % output.dim()
    if any(one.side is not None for field in fields for one in field.layout[dim]):
        return None
    return merged([field.with_dim(dim, [Factor(output.shape[dim])]) for field in fields], output.shape)


def multiplied(left: Field | None, right: Field | None, output: Tensor) -> Field | None:
    """A matrix product, which mixes the last dimension of the left and the one before the last of the right."""
    fields = []
    if left is not None:
        last = len(left.layout) - 1
        fields.append(left.mixed(last).with_dim(last, [Factor(output.shape[-1])]))
    if right is not None:
        last = len(right.layout) - 2
        fields.append(right.mixed(last).with_dim(last, [Factor(output.shape[-2])]))
    return merged(fields, output.shape)


def linear(field: Field, output: Tensor, args: list[Any]) -> Field | None:
    return multiplied(field, None, output)


RULES: dict[str, Rule] = {
    "convolution": convolved,
    "avg_pool2d": pooled,
    "avg_pool3d": pooled,
    "max_pool2d_with_indices": max_pooled,
    "_adaptive_avg_pool2d": adaptively_pooled,
    "adaptive_max_pool2d": adaptively_pooled,
    "constant_pad_nd": padded,
    "reflection_pad1d": padded,
    "reflection_pad2d": padded,
    "replication_pad1d": padded,
    "replication_pad2d": padded,
    "permute": permuted,
    "transpose": transposed,
    "t": transposed,
    "view": reshaped,
    "_unsafe_view": reshaped,
    "reshape": reshaped,
    "squeeze": reshaped,
    "unsqueeze": reshaped,
    "expand": expanded,
    "slice": sliced,
    "select": selected,
    "pixel_shuffle": depth_to_space,
    "pixel_unshuffle": space_to_depth,
    "split": divided,
    "split_with_sizes": divided,
    "chunk": divided,
    "flip": flipped,
    "_softmax": softmaxed,
    "_log_softmax": softmaxed,
    "linalg_vector_norm": normed,
    "norm": normed,
    "native_layer_norm": layer_normalised,
    "_fused_rms_norm": layer_normalised,
    "native_group_norm": group_normalised,
    "linear": linear,
    "_upsample_nearest_exact2d": resized,
}
RULES |= dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "std", "var", "prod", "logsumexp"), reduced)
RULES |= {f"upsample_{way}": resized for way in ("nearest1d", "nearest2d", "bilinear2d", "bicubic2d")}
RULES |= {f"{library}_batch_norm": batch_normalised for library in ("native", "cudnn", "miopen")}
RULES |= {f"_native_batch_norm_legit{ending}": batch_normalised for ending in ("", "_no_training")}
# what acts on every entry alone, or on channels alone, though PyTorch does not mark it so
POINTWISE = {"alias", "contiguous", "detach", "lift_fresh", "native_channel_shuffle", "hardswish", "hardswish_"}
POINTWISE |= {"mish_", "threshold_", "log_sigmoid_forward", "_prelu_kernel", "rrelu_with_noise", "rrelu_with_noise_"}
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
# results that take no more than the shape of their arguments
SHAPED = {f"{one}_like" for one in ("empty", "zeros", "ones", "full", "rand", "randn")}
SHAPED |= {f"new_{one}" for one in ("empty", "empty_strided", "zeros", "ones", "full")}


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        self.fields: MutableMapping[Tensor, Field | None] = WeakTensorKeyDictionary()
        self.fields[image] = Field.of_image(image)
        self.spoilt: set[int] = set()  # storages of which parts were written, so that the rest is not known any more
        self.shown: dict[int, list[int]] = {}  # storage -> numbers of the tensors shown that lie in it
        self.overwritten: dict[int, str] = {}  # number -> the first operation that wrote to that tensor

    def show(self, number: int, tensor: Tensor) -> Field | None:
        """Return a tensor's field, and from now on note in `overwritten[number]` what overwrites it."""
        self.shown.setdefault(address(tensor), []).append(number)
        return self.field(tensor)

    def field(self, tensor: Tensor) -> Field | None:
        """Return a tensor's receptive field; None where it is unknown or the tensor does not depend on the image."""
        return self.fields.get(tensor)

    def depends(self, tensor: Tensor) -> bool:
        return tensor in self.fields or address(tensor) in self.spoilt

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        output = None if self.arithmetic else blank(name, args)
        output = func(*args, **kwargs) if output is None else output
        given = list(flat([*args, *kwargs.values()]))
        inputs = [one for one in given if self.depends(one)]
        known = {address(one) for one in given}
        written = self.note_writing(func, args, kwargs)
        for tensor in flat([output]):
            if address(tensor) not in known:  # new memory, at an address that may have been another's
                self.spoilt.discard(address(tensor))
                self.shown.pop(address(tensor), None)
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
        written = list(flat(given[name] for name in writes if name in given))
        for tensor in written:
            for number in self.shown.pop(address(tensor), ()):
                self.overwritten[number] = func._schema.name.split("::")[-1]
        return written

    def spoil(self, tensor: Tensor) -> None:
        """Forget the fields of everything else in the memory of a tensor that was written to."""
        self.spoilt.add(address(tensor))
        for other in list(self.fields):
            if address(other) == address(tensor):
                self.fields[other] = None

    def follow(self, func: Any, name: str, args: list[Any], inputs: list[Tensor], output: Tensor) -> Field | None:
        """Return the field of one of an operation's results, `inputs` being its arguments that depend on the image."""
        known = {id(one): field for one in inputs if (field := self.field(one)) is not None}
        if len(known) < len({id(one) for one in inputs}):
            return None
        first = known.get(id(args[0]))
        fields = list(known.values())
        field = None
        if name == "cat":
            field = glued(fields, output, args)
        elif name in PRODUCTS:
            left, right = (known.get(id(args[index])) for index in PRODUCTS[name])
            field = multiplied(left, right, output) if len(known) == (left is not None) + (right is not None) else None
        elif name == "copy_":
            field = spread(known.get(id(args[1]), fields[0]), output.shape)
        elif name in RULES and first is not None:
            field = RULES[name](first, output, args)
            rest = [one for key, one in known.items() if key != id(args[0])]
            if rest:  # such as weights made from the image itself
                others = still(rest, output.shape)
                field = merged([field, others], output.shape) if field and others else None
        elif torch.Tag.pointwise in func.tags or name in POINTWISE:
            field = merged(fields, output.shape)
        field = field or still(fields, output.shape)
        return field if field and field.fits(output.shape) else None


def blank(name: str, args: Any) -> Tensor | None:
    """Return zeros of the shape that a convolution or matrix product gives; None where it has to be computed."""
    given = list(flat(args))
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


def address(tensor: Tensor) -> int:
    """Return where the memory of a tensor starts, which its views share."""
    return tensor.untyped_storage().data_ptr()


def flat(values: Iterable[Any]) -> Iterable[Tensor]:
    """Yield the tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from flat(value)
