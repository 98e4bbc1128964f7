"""Networks and images whose gradients cannot cancel, and receptive fields held against these gradients."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from phosphene.network.receptive_field import COLUMNS, ROWS, ReceptiveFieldState
from phosphene.network.receptive_field_tracer import ReceptiveFieldTracer

Function = Callable[[Tensor], Tensor]


def positive(module: nn.Module) -> nn.Module:
    """Return a module in float64 and evaluation mode, weights random and positive, so that no gradient cancels."""
    module = module.double().eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in module.parameters():
            scale = 1 / parameter[0].numel() if parameter.dim() > 1 else 0.2  # small, for activations that saturate
            parameter.copy_((torch.rand_like(parameter) + 0.5) * scale)
    return module


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def traced(function: Function, image: Tensor) -> tuple[Tensor, ReceptiveFieldState | None]:
    """Return what a function makes of an image and the field that the tracer says it has."""
    tracer = ReceptiveFieldTracer(image)
    with torch.no_grad(), tracer:
        output = function(image)
    return output, tracer.field(output)


def offsets(field: ReceptiveFieldState, index: tuple[int, ...]) -> tuple[int, int]:
    """Return by how many pixels (down, right) the field of an entry is moved from that of index 0."""
    moved = [0, 0]
    for position, factors in zip(index, field.layout, strict=True):
        for factor in reversed(factors):
            position, steps = divmod(position, factor.extent)
            if factor.axis is not None:
                moved[factor.axis] += steps * factor.step
    return moved[ROWS], moved[COLUMNS]


def ends(mask: Tensor) -> tuple[int, int]:
    """Return the first and the last index where a mask (n,) is true."""
    indices = mask.nonzero().flatten()
    return int(indices[0]), int(indices[-1])


def compare_with_gradient(function: Function, image: Tensor, margin: int = 0) -> None:
    """Assert that an entry's predicted box is the bounding box of its gradient, over all channels together.

    Where the prediction reaches over the border of the image, or into the `margin` that the function cuts off on its
    way, the gradient's box must only lie within it.
    """
    output, field = traced(function, image)
    assert field is not None
    assert field.has_shape(output.shape)
    together: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for index in itertools.product(*map(range, output.shape)):
        together.setdefault(offsets(field, index), []).append(index)
    image = image.clone().requires_grad_()
    weighted = function(image) * (0.5 + torch.rand_like(output))  # unevenly, lest gradients cancel

    def predicted(moved: tuple[int, int]) -> list[tuple[int, int]]:
        starts = [field.spans[axis].start + moved[axis] for axis in (ROWS, COLUMNS)]
        return [(start, start + field.spans[axis].size - 1) for axis, start in enumerate(starts)]

    def lies_inside(moved: tuple[int, int]) -> bool:
        borders = zip(predicted(moved), field.image, strict=True)
        return all(margin <= first and last < extent - margin for (first, last), extent in borders)

    inside = [moved for moved in sorted(together) if lies_inside(moved)]
    others = [moved for moved in sorted(together) if not lies_inside(moved)]
    draw = random.Random(0)
    for moved in draw.sample(inside, min(len(inside), 12)) + draw.sample(others, min(len(others), 12)):
        entries = torch.stack([weighted[index] for index in together[moved]])
        (gradient,) = torch.autograd.grad(entries.sum(), image, retain_graph=True)
        mask = gradient.ne(0).flatten(0, 1).any(0)
        if moved in inside:
            assert [ends(mask.any(1)), ends(mask.any(0))] == predicted(moved), f"{field} moved by {moved}"
        elif mask.any():
            for axis, (first, last) in enumerate(predicted(moved)):
                box = ends(mask.any(1 - axis))
                assert first <= box[0] <= box[1] <= last
    assert inside


def assert_unknown(function: Function) -> None:
    """Assert that the tracer has no field for what a function returns, nor for what is computed from it."""

    def and_more(x: Tensor) -> Tensor:
        y = function(x)
        return y * y.mean()

    for traced_function in (function, and_more):
        output, field = traced(traced_function, noise(1, 2, 12, 14))
        assert output.numel() > 0
        assert field is None


def assert_same_value(function: Function) -> None:
    """Assert that tracing changes nothing of what a function returns."""
    image = noise(1, 2, 12, 14)
    assert torch.equal(traced(function, image)[0], function(image))


def conv(*sizes: Any, **options: Any) -> Function:
    return positive(nn.Conv2d(*sizes, **options))


C3 = conv(2, 2, 3, padding=1)


WIDE = conv(2, 3, (3, 5), stride=(2, 1), padding=(1, 3), dilation=(2, 1))
