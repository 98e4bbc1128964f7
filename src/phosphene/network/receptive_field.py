"""Receptive fields: which pixels of the image the entries of a tensor depend on.

Along one side of the image, the entry at index 0 depends on `size` pixels from `start`, and every step along a
dimension of the tensor moves that by so many pixels (Araujo et al., "Computing Receptive Fields of Convolutional Neural
Networks", Distill 2019). A reshape may split a side of the image over several dimensions or put several into one;
mixing all entries of a dimension (global pooling, a linear layer) leaves a field that no longer moves. Where the pixels
do not follow such a rule, the field is None: unknown. One field stands for all channels: it holds what any of them
sees. This file is the arithmetic; which operation does what to a field is in `tracing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

from torch import Tensor

DOWN, RIGHT = 0, 1


class Factor(NamedTuple):
    """Part of a dimension of a tensor: `extent` entries, each `step` pixels further along a side of the image.

    `side` is DOWN or RIGHT; None where the entries are batch items or channels, or all see the same.
    """

    extent: int
    side: int | None = None
    step: int = 0


class Span(NamedTuple):
    """What the entry at index 0 sees along one side of the image: `size` pixels from `start`."""

    start: int
    size: int

    def widened(self, reach: int) -> Span:
        """Return the span together with the one `reach` pixels further, or before it where `reach` is below 0."""
        return Span(self.start + min(0, reach), self.size + abs(reach))

    def joined(self, other: Span) -> Span:
        """Return the smallest span that holds both."""
        start = min(self.start, other.start)
        return Span(start, max(self.start + self.size, other.start + other.size) - start)


Factors = tuple[Factor, ...]


@dataclass(frozen=True)
class ReceptiveFieldState:
    """The receptive field of a tensor.

    Attributes:
        image: (h, w) of the image.
        spans: what index 0 sees, (down, right).
        layout: the factors of each dimension of the tensor, slowest first. A side that has no factor does not move:
            every entry sees the same of it, and its span lies within the image.
    """

    image: tuple[int, int]
    spans: tuple[Span, Span]
    layout: tuple[Factors, ...]

    @classmethod
    def of_image(cls, image: Tensor) -> ReceptiveFieldState:
        """Return the field of an image (b, c, h, w) itself."""
        batch, channels, height, width = image.shape
        layout = tidy([Factor(batch)]), tidy([Factor(channels)]), (Factor(height, DOWN, 1),), (Factor(width, RIGHT, 1),)
        return cls((height, width), (Span(0, 1), Span(0, 1)), layout)

    @property
    def whole(self) -> bool:
        """Whether every entry sees all of the image."""
        moves = any(self.moves(side) for side in (DOWN, RIGHT))
        return not moves and self.spans == tuple(Span(0, extent) for extent in self.image)

    def moves(self, side: int) -> bool:
        return any(one.side == side for factors in self.layout for one in factors)

    def along(self, side: int) -> tuple[int, int, int] | None:
        """Return (size, stride, start) along a side; None where it moves in a way that these do not tell."""
        start, size = self.spans[side]
        held = [factors for factors in self.layout if any(one.side == side for one in factors)]
        moving = [one for factors in held for one in factors if one.side == side]
        if len(moving) > 1 or any(one.side is None for factors in held for one in factors):
            return None
        return size, sum(one.step for one in moving), start

    def with_span(self, side: int, span: Span) -> ReceptiveFieldState:
        return replace(self, spans=(span, self.spans[RIGHT]) if side == DOWN else (self.spans[DOWN], span))

    def with_dim(self, dim: int, factors: Sequence[Factor]) -> ReceptiveFieldState:
        layout = list(self.layout)
        layout[dim] = tidy(factors)
        return replace(self, layout=tuple(layout))

    def mixed(self, *dims: int) -> ReceptiveFieldState:
        """Return the field after all entries along some dimensions were mixed; the tensor keeps its shape."""
        return self.stilled(lambda dim, factor: dim in dims)

    def still(self, side: int) -> ReceptiveFieldState:
        """Return the field of what is made of all entries together along a side."""
        return self.stilled(lambda dim, factor: factor.side == side)

    def stilled(self, chosen: Callable[[int, Factor], bool]) -> ReceptiveFieldState:
        field = self
        for dim, factors in enumerate(self.layout):
            for one in factors:
                if one.side is not None and chosen(dim, one):
                    field = field.with_span(one.side, field.spans[one.side].widened((one.extent - 1) * one.step))
            field = field.with_dim(dim, [Factor(one.extent) if chosen(dim, one) else one for one in factors])
        for side in (DOWN, RIGHT):
            if self.moves(side) and not field.moves(side):
                span = field.spans[side]
                start, end = max(0, span.start), min(self.image[side], span.start + span.size)
                field = field.with_span(side, Span(start, max(0, end - start)))
        return field

    def fits(self, shape: Sequence[int]) -> bool:
        return tuple(extent_of(factors) for factors in self.layout) == tuple(shape)


def extent_of(factors: Sequence[Factor]) -> int:
    return math.prod(one.extent for one in factors)


def tidy(factors: Sequence[Factor]) -> Factors:
    """Return the factors with neighbours that see the same put together, and single entries left out."""
    tidied: list[Factor] = []
    for one in factors:
        if one.side is None and tidied and tidied[-1].side is None:
            tidied[-1] = Factor(tidied[-1].extent * one.extent)
        elif one.side is not None or one.extent != 1:
            tidied.append(one)
    return tuple(tidied)


def regrouped(field: ReceptiveFieldState, shape: Sequence[int]) -> ReceptiveFieldState | None:
    """Return the field of the same entries in another shape; None where a dimension cannot be told apart any more."""
    if field.fits(shape):
        return field
    field = field.mixed(*(dim for dim, factors in enumerate(field.layout) if extent_of(factors) == 1))
    left = list(reversed(tidy([one for factors in field.layout for one in factors])))
    layout: list[Factors] = []
    for extent in shape:
        taken: list[Factor] = []
        while extent > 1 and left:
            one = left.pop()
            if extent % one.extent and one.extent % extent:
                return None
            inner = max(1, one.extent // extent)
            taken.append(one._replace(extent=one.extent // inner, step=one.step * inner))
            if inner > 1:
                left.append(one._replace(extent=inner))
            extent //= one.extent // inner
        layout.append(tidy(taken))
    return replace(field, layout=tuple(layout))


def broadcast(field: ReceptiveFieldState, shape: Sequence[int]) -> ReceptiveFieldState:
    """Return the field of a tensor repeated to a larger shape: single entries then see the same everywhere."""
    missing = len(shape) - len(field.layout)
    field = replace(field, layout=((),) * missing + field.layout)
    for dim, extent in enumerate(shape):
        if extent_of(field.layout[dim]) != extent:
            field = field.mixed(dim).with_dim(dim, [Factor(extent)])
    return field


def merged(fields: Sequence[ReceptiveFieldState], shape: Sequence[int]) -> ReceptiveFieldState | None:
    """Return the field of a tensor of which every entry comes from the entries at the same place in several others."""
    fields = [broadcast(field, shape) for field in fields]
    for side in (DOWN, RIGHT):
        fixed = [field for field in fields if not field.moves(side)]
        if 0 < len(fixed) < len(fields):  # all entries see the same only where that holds whatever the others see
            fields = [field.still(side) for field in fields]
            if joined(fixed, side) != joined(fields, side):
                return None
    if len({field.layout for field in fields}) != 1:
        return None
    return replace(fields[0], spans=(joined(fields, DOWN), joined(fields, RIGHT)))


def joined(fields: Sequence[ReceptiveFieldState], side: int) -> Span:
    return reduce(Span.joined, [field.spans[side] for field in fields])


def through_window(
    field: ReceptiveFieldState, dim: int, extent: int, kernel: int, stride: int, padding: int, dilation: int
) -> ReceptiveFieldState | None:
    """Return the field after a window slid along a dimension, which has `extent` entries then; None if not regular."""
    factors = field.layout[dim]
    if (extent_of(factors), 1, 1, 0) == (extent, kernel, stride, padding):
        return field
    if all(one.side is None for one in factors):
        return field.with_dim(dim, [Factor(extent)])
    if len(factors) > 1:
        return None
    _, side, step = factors[0]
    assert side is not None
    start, size = field.spans[side]
    span = Span(start - padding * step, size).widened((kernel - 1) * dilation * step)
    return field.with_dim(dim, [Factor(extent, side, step * stride)]).with_span(side, span)


def windowed(
    field: ReceptiveFieldState | None, shape: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any
) -> ReceptiveFieldState | None:
    """Return the field after a sliding window over the last dimensions, as many as the kernel has."""
    for number in range(len(kernel)):
        options = (one[number % len(one)] for one in (kernel, stride, padding, dilation))
        dim = len(shape) - len(kernel) + number
        field = field and through_window(field, dim, shape[dim], *options)
    return field


def unmoving(fields: Sequence[ReceptiveFieldState], shape: Sequence[int]) -> ReceptiveFieldState | None:
    """Return the field of a result of which every entry may depend on all of several tensors; None if some move."""
    if any(field.moves(side) for field in fields for side in (DOWN, RIGHT)):
        return None
    layout = tuple(tidy([Factor(extent)]) for extent in shape)
    return merged([replace(field, layout=layout) for field in fields], shape)


def without(field: ReceptiveFieldState, dims: set[int]) -> ReceptiveFieldState:
    """Return the field of a tensor that has lost some dimensions."""
    return replace(field, layout=tuple(factors for dim, factors in enumerate(field.layout) if dim not in dims))
