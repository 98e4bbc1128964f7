"""Receptive fields: which pixels of the image the entries of a tensor depend on.

Along one axis of the image, the entry at index 0 depends on `size` pixels from `start`, and each step along a dimension
of the tensor moves this window by a fixed number of pixels (Araujo et al., "Computing Receptive Fields of Convolutional
Neural Networks", Distill 2019). A reshape may split an image axis over several dimensions or put several into one.
Mixing all entries of a dimension (global pooling, a linear layer) leaves a field that no longer moves. Where the pixels
follow no such rule, the field is None: unknown. One field stands for all channels: it holds what any of them sees.
This file is the arithmetic; `receptive_field_rules` says what each operation does to a field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

from torch import Tensor

ROWS, COLUMNS = 0, 1


class Factor(NamedTuple):
    """Part of a dimension of a tensor: `extent` entries, each `step` pixels further along an axis of the image."""

    extent: int
    axis: int | None = None  # ROWS or COLUMNS; None if the entries are batch items or channels, or all see the same
    step: int = 0


class Span(NamedTuple):
    """What the entry at index 0 sees along one axis of the image: `size` pixels from `start`."""

    start: int
    size: int

    def widened(self, reach: int) -> Span:
        """Return the span together with the one `reach` pixels further on (if negative, further back)."""
        return Span(self.start + min(0, reach), self.size + abs(reach))

    def union(self, span: Span) -> Span:
        """Return the smallest span that holds both."""
        start = min(self.start, span.start)
        return Span(start, max(self.start + self.size, span.start + span.size) - start)


Factors = tuple[Factor, ...]


@dataclass(frozen=True)
class ReceptiveFieldState:
    """The receptive field of a tensor.

    Attributes:
        image: (h, w) of the image.
        spans: what index 0 sees, (rows, columns).
        layout: the factors of each dimension of the tensor, slowest first. Along an image axis without a factor the
            field does not move: every entry sees the same, and the span lies within the image.
    """

    image: tuple[int, int]
    spans: tuple[Span, Span]
    layout: tuple[Factors, ...]

    @classmethod
    def of_image(cls, image: Tensor) -> ReceptiveFieldState:
        """Return the field of an image (b, c, h, w) itself."""
        batch, channels, height, width = image.shape
        factors = Factor(batch), Factor(channels), Factor(height, ROWS, 1), Factor(width, COLUMNS, 1)
        return cls((height, width), (Span(0, 1), Span(0, 1)), tuple(simplified([factor]) for factor in factors))

    @property
    def is_whole_image(self) -> bool:
        """Whether every entry sees all of the image."""
        moves = any(self.moves(axis) for axis in (ROWS, COLUMNS))
        return not moves and self.spans == tuple(Span(0, extent) for extent in self.image)

    def moves(self, axis: int) -> bool:
        return any(factor.axis == axis for factors in self.layout for factor in factors)

    def along(self, axis: int) -> tuple[int, int, int] | None:
        """Return (size, stride, start) along an axis; None if the field moves in a way that these cannot express."""
        start, size = self.spans[axis]
        dims = [factors for factors in self.layout if any(factor.axis == axis for factor in factors)]
        moving = [factor for factors in dims for factor in factors if factor.axis == axis]
        if len(moving) > 1 or any(factor.axis is None for factors in dims for factor in factors):
            return None
        return size, sum(factor.step for factor in moving), start

    def with_span(self, axis: int, span: Span) -> ReceptiveFieldState:
        return replace(self, spans=(span, self.spans[COLUMNS]) if axis == ROWS else (self.spans[ROWS], span))

    def with_dim(self, dim: int, factors: Sequence[Factor]) -> ReceptiveFieldState:
        layout = list(self.layout)
        layout[dim] = simplified(factors)
        return replace(self, layout=tuple(layout))

    def mixed(self, *dims: int) -> ReceptiveFieldState:
        """Return the field after all entries along some dimensions were mixed; the tensor keeps its shape."""
        return self.mixed_where(lambda dim, axis: dim in dims)

    def mixed_along(self, axis: int) -> ReceptiveFieldState:
        """Return the field after all entries along an axis of the image were mixed."""
        return self.mixed_where(lambda dim, factor_axis: factor_axis == axis)

    def mixed_where(self, mixes: Callable[[int, int | None], bool]) -> ReceptiveFieldState:
        """Return the field after all entries were mixed along those (dimension, axis) for which `mixes` is true."""
        field = self
        for dim, factors in enumerate(self.layout):
            for extent, axis, step in factors:
                if axis is not None and mixes(dim, axis):
                    field = field.with_span(axis, field.spans[axis].widened((extent - 1) * step))
            mixed = [Factor(factor.extent) if mixes(dim, factor.axis) else factor for factor in factors]
            field = field.with_dim(dim, mixed)
        for axis in (ROWS, COLUMNS):
            if self.moves(axis) and not field.moves(axis):
                span = field.spans[axis]
                start, end = max(0, span.start), min(self.image[axis], span.start + span.size)
                field = field.with_span(axis, Span(start, max(0, end - start)))
        return field

    def has_shape(self, shape: Sequence[int]) -> bool:
        return tuple(extent_of(factors) for factors in self.layout) == tuple(shape)


def extent_of(factors: Sequence[Factor]) -> int:
    return math.prod(factor.extent for factor in factors)


def follows_image(factors: Sequence[Factor]) -> bool:
    """Return whether a dimension runs along the image."""
    return any(factor.axis is not None for factor in factors)


def simplified(factors: Sequence[Factor]) -> Factors:
    """Return the factors with neighbours that see the same put together, and single entries left out."""
    kept: list[Factor] = []
    for factor in factors:
        if factor.axis is None and kept and kept[-1].axis is None:
            kept[-1] = Factor(kept[-1].extent * factor.extent)
        elif factor.axis is not None or factor.extent != 1:
            kept.append(factor)
    return tuple(kept)


def regrouped(field: ReceptiveFieldState, shape: Sequence[int]) -> ReceptiveFieldState | None:
    """Return the field of the same entries in another shape; None if the dimensions can no longer be told apart."""
    if field.has_shape(shape):
        return field
    field = field.mixed(*(dim for dim, factors in enumerate(field.layout) if extent_of(factors) == 1))
    remaining = list(reversed(simplified([factor for factors in field.layout for factor in factors])))
    layout: list[Factors] = []
    for extent in shape:
        factors: list[Factor] = []
        while extent > 1 and remaining:
            factor = remaining.pop()
            if extent % factor.extent and factor.extent % extent:
                return None
            inner = max(1, factor.extent // extent)
            factors.append(factor._replace(extent=factor.extent // inner, step=factor.step * inner))
            if inner > 1:
                remaining.append(factor._replace(extent=inner))
            extent //= factor.extent // inner
        layout.append(simplified(factors))
    return replace(field, layout=tuple(layout))


def broadcast(field: ReceptiveFieldState, shape: Sequence[int]) -> ReceptiveFieldState:
    """Return the field of a tensor repeated to a larger shape: repeated entries see the same everywhere."""
    missing = len(shape) - len(field.layout)
    field = replace(field, layout=((),) * missing + field.layout)
    for dim, extent in enumerate(shape):
        if extent_of(field.layout[dim]) != extent:
            field = field.mixed(dim).with_dim(dim, [Factor(extent)])
    return field


def merged(fields: Sequence[ReceptiveFieldState], shape: Sequence[int]) -> ReceptiveFieldState | None:
    """Return the field of a tensor whose entries each come from those at the same position in several tensors."""
    fields = [broadcast(field, shape) for field in fields]
    for axis in (ROWS, COLUMNS):
        fixed = [field for field in fields if not field.moves(axis)]
        if 0 < len(fixed) < len(fields):  # all entries see the same only if the fixed spans hold all of the moving ones
            fields = [field.mixed_along(axis) for field in fields]
            if union_span(fixed, axis) != union_span(fields, axis):
                return None
    if len({field.layout for field in fields}) != 1:
        return None
    return replace(fields[0], spans=(union_span(fields, ROWS), union_span(fields, COLUMNS)))


def union_span(fields: Sequence[ReceptiveFieldState], axis: int) -> Span:
    return reduce(Span.union, [field.spans[axis] for field in fields])


def slide_along_dim(
    field: ReceptiveFieldState, dim: int, extent: int, kernel: int, stride: int, padding: int, dilation: int
) -> ReceptiveFieldState | None:
    """Return the field after a window slid along a dimension, now of `extent` entries; None if it is irregular."""
    factors = field.layout[dim]
    if (extent_of(factors), 1, 1, 0) == (extent, kernel, stride, padding):
        return field
    if not follows_image(factors):
        return field.with_dim(dim, [Factor(extent)])
    if len(factors) > 1:
        return None
    _, axis, step = factors[0]
    assert axis is not None
    start, size = field.spans[axis]
    span = Span(start - padding * step, size).widened((kernel - 1) * dilation * step)
    return field.with_dim(dim, [Factor(extent, axis, step * stride)]).with_span(axis, span)


def slide_window(
    field: ReceptiveFieldState | None, shape: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any
) -> ReceptiveFieldState | None:
    """Return the field after a sliding window over the last dimensions, as many as the kernel has."""
    for number in range(len(kernel)):
        settings = (values[number % len(values)] for values in (kernel, stride, padding, dilation))
        dim = len(shape) - len(kernel) + number
        field = field and slide_along_dim(field, dim, shape[dim], *settings)
    return field


def unmoving(fields: Sequence[ReceptiveFieldState], shape: Sequence[int]) -> ReceptiveFieldState | None:
    """Return the field of a result each entry of which may depend on all entries of the inputs; None if any moves."""
    if any(field.moves(axis) for field in fields for axis in (ROWS, COLUMNS)):
        return None
    layout = tuple(simplified([Factor(extent)]) for extent in shape)
    return merged([replace(field, layout=layout) for field in fields], shape)


def without_dims(field: ReceptiveFieldState, dims: set[int]) -> ReceptiveFieldState:
    """Return the field of a tensor that has lost some dimensions."""
    return replace(field, layout=tuple(factors for dim, factors in enumerate(field.layout) if dim not in dims))
