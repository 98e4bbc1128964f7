"""What each tensor operation does to the receptive field of its first argument."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from phosphene.network.receptive_field import (
    Factor,
    ReceptiveFieldState,
    broadcast,
    follows_image,
    merged,
    regrouped,
    slide_along_dim,
    slide_window,
    without_dims,
)

# (field of the first argument, output, all arguments) -> field of the output
Rule = Callable[[ReceptiveFieldState, Tensor, list[Any]], ReceptiveFieldState | None]


def option(args: list[Any], index: int, default: Any) -> Any:
    """Return an operation's argument, or its default if the call left it out."""
    return args[index] if len(args) > index and args[index] not in (None, []) else default


def transpose_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    layout = list(field.layout)
    first, second = (args[1], args[2]) if len(args) > 2 else (0, -1)
    layout[first], layout[second] = layout[second], layout[first]
    return replace(field, layout=tuple(layout))


def slice_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    dim, start, step = option(args, 1, 0), option(args, 2, 0), option(args, 4, 1)
    start = max(0, start + args[0].shape[dim]) if start < 0 else start
    return slide_along_dim(field, dim % output.dim(), output.shape[dim], 1, step, -start, 1)


def select_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    dim, index = args[1] % args[0].dim(), args[2] % args[0].shape[args[1]]
    selected = slide_along_dim(field, dim, 1, 1, 1, -index, 1)
    return selected and without_dims(selected.mixed(dim), {dim})


def split_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    """Split, chunk: known only along a dimension that does not run along the image."""
    dim = option(args, 2, 0) % output.dim()
    return None if follows_image(field.layout[dim]) else broadcast(field, output.shape)


def flip_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    flipped: ReceptiveFieldState | None = field
    for dim in args[1]:
        extent = output.shape[dim]
        flipped = flipped and slide_along_dim(flipped, dim % output.dim(), extent, 1, -1, 1 - extent, 1)
    return flipped


def pad_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    padded: ReceptiveFieldState | None = field
    for number, before in enumerate(args[1][::2]):
        dim = output.dim() - 1 - number
        if output.shape[dim] != args[0].shape[dim] or before:
            padded = padded and slide_along_dim(padded, dim, output.shape[dim], 1, 1, before, 1)
    return padded


def convolution_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    _, weight, _, stride, padding, dilation, transposed, _, groups = args
    if groups != 1 and follows_image(field.layout[1]):
        return None
    mixed = field.mixed(1).with_dim(1, [Factor(output.shape[1])])
    if transposed and any(map(follows_image, mixed.layout[2:])):
        if any(step != 1 for step in stride):
            return None  # which inputs reach an output depends on its position
        # at stride 1 it is a convolution with the complementary padding
        axes = range(output.dim() - 2)
        padding = [(weight.shape[2 + axis] - 1) * dilation[axis] - padding[axis] for axis in axes]
    return slide_window(mixed, output.shape, weight.shape[2:], stride, padding, dilation)


def pool_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    return slide_window(field, output.shape, args[1], option(args, 2, args[1]), option(args, 3, [0]), [1])


def max_pool_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    stride, padding, dilation = option(args, 2, args[1]), option(args, 3, [0]), option(args, 4, [1])
    return slide_window(field, output.shape, args[1], stride, padding, dilation)


def adaptive_pool_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    pooled: ReceptiveFieldState | None = field
    for dim in (output.dim() - 2, output.dim() - 1):
        before, after = args[0].shape[dim], output.shape[dim]
        if after == 1:
            pooled = pooled and pooled.mixed(dim).with_dim(dim, ())
        elif before % after == 0:
            pooled = pooled and slide_along_dim(pooled, dim, after, before // after, before // after, 0, 1)
        elif pooled and follows_image(pooled.layout[dim]):
            return None  # its windows are of several sizes
    return pooled


def resize_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    """Upsampling: known only along dimensions that keep their extent or do not run along the image."""
    for dim in range(2, output.dim()):
        if output.shape[dim] != args[0].shape[dim]:
            if any(factor.axis is not None and factor.extent > 1 for factor in field.layout[dim]):
                return None
            field = field.mixed(dim).with_dim(dim, [Factor(output.shape[dim])])
    return field


def reduce_rule(
    field: ReceptiveFieldState, output: Tensor, args: list[Any], dims_at: int = 1
) -> ReceptiveFieldState | None:
    """A sum, mean or maximum over the dimensions that argument `dims_at` names; over all if it names none."""
    count = args[0].dim()
    named = option(args, dims_at, list(range(count)))
    dims = {dim % count for dim in ([named] if isinstance(named, int) else named)}
    field = field.mixed(*dims)
    for dim in dims:
        field = field.with_dim(dim, ())
    return without_dims(field, set() if output.dim() == count else dims)


def layer_norm_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    return field.mixed(*range(output.dim() - len(args[1]), output.dim()))


def batch_norm_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    """With the statistics of the training it acts on each entry alone; with those of the image it mixes all."""
    uses_image = not isinstance(args[3], Tensor) or args[5] is True
    return field.mixed(0, *range(2, output.dim())) if uses_image else field


def space_to_depth_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    *start, height, width = args[0].shape
    block = args[1]
    split = regrouped(field, (*start, height // block, block, width // block, block))
    return split and regrouped(permute_last(split, -3, -1, -4, -2), output.shape)


def depth_to_space_rule(field: ReceptiveFieldState, output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    *start, channels, height, width = args[0].shape
    block = args[1]
    split = regrouped(field, (*start, channels // block**2, block, block, height, width))
    return split and regrouped(permute_last(split, -2, -4, -1, -3), output.shape)


def permute_last(field: ReceptiveFieldState, *dims: int) -> ReceptiveFieldState:
    """Return the field with its last dimensions in another order."""
    return replace(field, layout=(*field.layout[: -len(dims)], *(field.layout[dim] for dim in dims)))


def concatenate(fields: list[ReceptiveFieldState], output: Tensor, args: list[Any]) -> ReceptiveFieldState | None:
    """Concatenation: known only along a dimension that does not run along the image."""
    dim = option(args, 1, 0) % output.dim()
    if any(follows_image(field.layout[dim]) for field in fields):
        return None
    return merged([field.with_dim(dim, [Factor(output.shape[dim])]) for field in fields], output.shape)


def multiply(
    left: ReceptiveFieldState | None, right: ReceptiveFieldState | None, output: Tensor
) -> ReceptiveFieldState | None:
    """A matrix product, which mixes the last dimension of the left factor and the last but one of the right.

    A factor is None if it does not depend on the image.
    """
    fields = []
    if left is not None:
        last = len(left.layout) - 1
        fields.append(left.mixed(last).with_dim(last, [Factor(output.shape[-1])]))
    if right is not None:
        last = len(right.layout) - 2
        fields.append(right.mixed(last).with_dim(last, [Factor(output.shape[-2])]))
    return merged(fields, output.shape)


RULE_TABLE: tuple[tuple[str, Rule], ...] = (
    ("convolution", convolution_rule),
    ("linear", lambda field, output, args: multiply(field, None, output)),
    ("avg_pool2d avg_pool3d", pool_rule),
    ("max_pool2d_with_indices", max_pool_rule),
    ("_adaptive_avg_pool2d adaptive_max_pool2d", adaptive_pool_rule),
    ("constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d", pad_rule),
    ("permute", lambda field, output, args: replace(field, layout=tuple(field.layout[dim] for dim in args[1]))),
    ("transpose t", transpose_rule),
    ("view _unsafe_view reshape squeeze unsqueeze", lambda field, output, args: regrouped(field, output.shape)),
    ("expand", lambda field, output, args: broadcast(field, output.shape)),
    ("slice", slice_rule),
    ("select", select_rule),
    ("split split_with_sizes chunk", split_rule),
    ("flip", flip_rule),
    ("pixel_shuffle", depth_to_space_rule),
    ("pixel_unshuffle", space_to_depth_rule),
    ("mean sum amax amin max min std var prod logsumexp", reduce_rule),
    ("linalg_vector_norm norm", lambda field, output, args: reduce_rule(field, output, args, dims_at=2)),
    ("_softmax _log_softmax", lambda field, output, args: field.mixed(args[1] % output.dim())),
    ("native_layer_norm _fused_rms_norm", layer_norm_rule),
    ("native_group_norm", lambda field, output, args: field.mixed(*range(1, output.dim()))),
    ("native_batch_norm cudnn_batch_norm miopen_batch_norm", batch_norm_rule),
    ("_native_batch_norm_legit _native_batch_norm_legit_no_training", batch_norm_rule),
    ("upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d", resize_rule),
    ("_upsample_nearest_exact2d", resize_rule),
)
RULES = {name: rule for names, rule in RULE_TABLE for name in names.split()}
# operations that act on each entry alone, or on channels alone, though PyTorch does not mark them so
POINTWISE = {"alias", "contiguous", "detach", "lift_fresh", "native_channel_shuffle", "hardswish", "hardswish_"}
POINTWISE |= {"mish_", "threshold_", "log_sigmoid_forward", "_prelu_kernel", "rrelu_with_noise", "rrelu_with_noise_"}
# matrix products, and the positions of the arguments that are their factors
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
# operations that use only the shape of their arguments
SHAPE_ONLY = {f"{start}_like" for start in ("empty", "zeros", "ones", "full", "rand", "randn")}
SHAPE_ONLY |= {f"new_{kind}" for kind in ("empty", "empty_strided", "zeros", "ones", "full")}
