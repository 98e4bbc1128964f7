"""Following receptive fields through operations: where the gradient is not zero, and numbers worked out by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from phosphene.network.receptive_field import COLUMNS, ROWS, ReceptiveFieldState
from phosphene.network.receptive_field_tracer import ReceptiveFieldTracer
from positive_networks import noise, positive

Function = Callable[[Tensor], Tensor]


def traced(function: Function, image: Tensor) -> tuple[Tensor, ReceptiveFieldState | None]:
    """Return what a function makes of an image and the field that the tracer says it has."""
    tracer = ReceptiveFieldTracer(image)
    with torch.no_grad(), tracer:
        output = function(image)
    return output, tracer.field(output)


def offsets(field: ReceptiveFieldState, index: tuple[int, ...]) -> tuple[int, int]:
    """Return how many pixels (down, right) the field of an entry lies from that of index 0."""
    moved = [0, 0]
    for place, factors in zip(index, field.layout, strict=True):
        for factor in reversed(factors):
            place, here = divmod(place, factor.extent)
            if factor.axis is not None:
                moved[factor.axis] += here * factor.step
    return moved[ROWS], moved[COLUMNS]


def ends(mask: Tensor) -> tuple[int, int]:
    """Return the first and the last index where a mask (n,) is true."""
    found = mask.nonzero().flatten()
    return int(found[0]), int(found[-1])


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
        starts = [field.spans[side].start + moved[side] for side in (ROWS, COLUMNS)]
        return [(start, start + field.spans[side].size - 1) for side, start in enumerate(starts)]

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
            for side, (first, last) in enumerate(predicted(moved)):
                box = ends(mask.any(1 - side))
                assert first <= box[0] <= box[1] <= last
    assert inside


def conv(*sizes: Any, **options: Any) -> Function:
    return positive(nn.Conv2d(*sizes, **options))


C3 = conv(2, 2, 3, padding=1)
WIDE = conv(2, 3, (3, 5), stride=(2, 1), padding=(1, 3), dilation=(2, 1))
LINEAR = positive(nn.Linear(2, 4))
FULL = conv(2, 2, (12, 14))
GATE = positive(nn.Linear(2, 2))


def shuffled(x: Tensor) -> Tensor:
    x = torch.cat([WIDE(x), WIDE(x)], 1)
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def windows(x: Tensor) -> Tensor:
    """Cut a map of 12×14 into windows of 3×7, as window attention does, and average each."""
    b, c = x.shape[:2]
    return x.view(b, c, 4, 3, 2, 7).permute(0, 2, 4, 3, 5, 1).reshape(b * 8, 21, c).mean(1).view(b, 4, 2, c)


def focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


def copied(x: Tensor) -> Tensor:
    y = torch.zeros_like(C3(x))
    y.copy_(C3(x))
    return y


def overwritten(x: Tensor) -> Tensor:
    y = C3(x)
    y.mul_(2).add_(C3(C3(x)))
    return y


REGULAR: dict[str, Function] = {
    "an uneven convolution": WIDE,
    "a grouped convolution": conv(2, 4, 3, groups=2, stride=2),
    "a 1×1 convolution of stride 2": conv(2, 3, 1, stride=2),
    "two convolutions": lambda x: C3(WIDE(x)[:, :2]),
    "a transposed convolution of stride 1": positive(nn.ConvTranspose2d(2, 3, (3, 4), padding=(1, 2), dilation=2)),
    "an unbatched convolution": lambda x: C3(x[0]),
    "a convolution over the map laid on its side": lambda x: WIDE(x.transpose(2, 3)),
    "a convolution with weights made of the whole image": lambda x: F.conv2d(x, x.mean((2, 3)).view(1, 2, 1, 1)),
    "a three-dimensional convolution": lambda x: positive(nn.Conv3d(2, 2, (1, 3, 2)))(x.unsqueeze(2)),
    "uneven zero padding": lambda x: C3(F.pad(x, (1, 2, 3, 0))),
    "cropping by negative padding": lambda x: WIDE(F.pad(x, (-1, -2, 0, -3))),
    "average pooling": lambda x: F.avg_pool2d(C3(x), (2, 3), ceil_mode=True),
    "average pooling without padding counted": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive pooling to a divisor": lambda x: F.adaptive_avg_pool2d(C3(x), (4, 7)),
    "adaptive pooling of one side": lambda x: F.adaptive_avg_pool2d(C3(x), (1, 7)),
    "global pooling": lambda x: C3(F.adaptive_avg_pool2d(x, 1)),
    "strided slices": lambda x: conv(2, 2, 2)(x[:, :, 1::2, 2:-1:3]),
    "a slice from the end": lambda x: x[:, :, -5:],
    "one row": lambda x: C3(x)[:, :, 4],
    "one column, counted from the end": lambda x: C3(x)[..., -3],
    "one channel": lambda x: C3(x)[:, 1],
    "a flip": lambda x: WIDE(C3(x).flip(3)),
    "branches of several sizes": lambda x: torch.cat([x, C3(x), F.avg_pool2d(C3(x), 3, 1, 1)], 1),
    "a branch that is constant": lambda x: torch.cat([C3(x), x.new_ones(1, 3, 12, 14)], 1),
    "branches off centre": lambda x: torch.cat([F.pad(x, (2, -2)), C3(C3(x))], 1),
    "a residual sum": lambda x: x + C3(C3(x)),
    "a channel shuffle": shuffled,
    "channels in two groups": lambda x: torch.cat(torch.split(WIDE(x), [1, 2], 1)[::-1], 1),
    "a linear layer over channels last": lambda x: LINEAR(C3(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "channels last": lambda x: LINEAR(C3(x).permute(0, 2, 3, 1)),
    "tokens": lambda x: LINEAR(C3(x).flatten(2).transpose(1, 2)),
    "tokens made a map again": lambda x: C3(
        LINEAR(x.flatten(2).transpose(1, 2))[..., :2].transpose(1, 2).view(1, 2, 12, 14)
    ),
    "a 1×1 convolution over tokens": lambda x: positive(nn.Conv1d(2, 2, 1))(C3(x).flatten(2)),
    "mixing of tokens": lambda x: positive(nn.Linear(168, 3))(x.flatten(2)),
    "a linear layer over everything": lambda x: positive(nn.Linear(336, 3))(x.flatten(1)),
    "a linear layer over a part": lambda x: positive(nn.Linear(24, 3))(C3(x)[:, :, 2:5, 4:8].flatten(1)),
    "space to depth": lambda x: conv(8, 2, 3, padding=1)(F.pixel_unshuffle(x, 2)),
    "depth to space, unmixed": lambda x: conv(1, 2, 1)(F.pixel_shuffle(conv(2, 4, 3)(x), 2)),
    "focus": focus,
    "windows": windows,
    "the mean of rows": lambda x: C3(x).mean(3),
    "the mean of rows, kept": lambda x: C3(x.mean(3, keepdim=True)),
    "the sum over channels": lambda x: C3(x).sum(1),
    "the sum over channels, counted from the end": lambda x: C3(x).sum(-3, keepdim=True),
    "the sum of everything": lambda x: C3(x).sum(),
    "the mean of a part": lambda x: x[:, :, 2:9, 3:8].mean((2, 3)),
    "the norm of columns": lambda x: torch.linalg.vector_norm(C3(x), dim=2),
    "the spread of columns": lambda x: C3(x).std(dim=-2),
    "softmax over channels": lambda x: C3(x).softmax(1),
    "softmax over a row": lambda x: C3(x).softmax(3),
    "squeeze and excitation": lambda x: C3(x) * GATE(C3(x).mean((2, 3))).sigmoid()[:, :, None, None],
    "a map plus one number of the whole image": lambda x: C3(x) + FULL(x),
    "group normalisation": positive(nn.GroupNorm(2, 2)),
    "instance normalisation": lambda x: positive(nn.InstanceNorm2d(2, affine=True))(x[:, :, 1:]),
    "layer normalisation of everything": positive(nn.LayerNorm((2, 12, 14))),
    "layer normalisation over channels": lambda x: positive(nn.LayerNorm(2))(C3(x).permute(0, 2, 3, 1)),
    "batch normalisation": lambda x: positive(nn.BatchNorm2d(2))(C3(x)),
    "a copy into other memory": copied,
    "arithmetic in place": overwritten,
    "a map repeated from one number": lambda x: FULL(x).expand(1, 2, 5, 6),
    "one number upsampled": lambda x: F.interpolate(x.mean((2, 3), keepdim=True), scale_factor=3),
}


CUTTING = {"cropping by negative padding"}


@pytest.mark.parametrize("name", REGULAR)
def test_the_field_is_where_the_gradient_is_not_zero(name: str) -> None:
    compare_with_gradient(REGULAR[name], noise(1, 2, 12, 14), margin=3 if name in CUTTING else 0)


def setitem(x: Tensor) -> Tensor:
    """Shift a map down by one row, by writing into a part of fresh memory."""
    y = torch.zeros_like(x)
    y[:, :, 1:] = x[:, :, :-1]
    return y


def stale(x: Tensor) -> Tensor:
    """Return a view of memory that something with a larger field was added to afterwards."""
    y = C3(x)
    view = y.view(1, 2, -1)
    y.add_(C3(C3(x)))
    return view


def into(x: Tensor) -> Tensor:
    y = torch.empty(1, 4, 12, 14, dtype=x.dtype)
    y[:, :2] = x
    y[:, 2:] = C3(x)
    return y


IRREGULAR: dict[str, Function] = {
    "nearest upsampling": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear upsampling": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "upsampling added to a map": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2) + x,
    "a transposed convolution of stride 2": positive(nn.ConvTranspose2d(2, 2, 3, stride=2)),
    "a shift that wraps round": lambda x: x.roll(1, 3),
    "circular padding": lambda x: conv(2, 2, 3, padding=1, padding_mode="circular")(x),
    "attention": lambda x: F.scaled_dot_product_attention(x.flatten(2), x.flatten(2), x.flatten(2)),
    "attention by matrix products": lambda x: (x.flatten(2).mT @ x.flatten(2)).softmax(-1) @ x.flatten(2).mT,
    "running sums": lambda x: x.cumsum(3),
    "sampling at places": lambda x: F.grid_sample(x, torch.rand(1, 3, 3, 2).to(x), align_corners=False),
    "picked rows": lambda x: x[:, :, [0, 5, 1]],
    "adaptive pooling to no divisor": lambda x: F.adaptive_avg_pool2d(x, 5),
    "maps side by side": lambda x: torch.cat([x, C3(x)], 3),
    "maps of different strides": lambda x: x[:, :, :6, :7] + x[:, :, ::2, ::2],
    "a map turned and added": lambda x: x[..., :12] + x[..., :12].transpose(2, 3),
    "a map plus one of its pixels": lambda x: x + x[:, :, :1, :1],
    "pieces of a map": lambda x: torch.split(C3(x), 6, 2)[1],
    "a convolution along tokens": lambda x: positive(nn.Conv1d(2, 2, 3))(x.flatten(2)),
    "a convolution after depth to space": lambda x: conv(1, 1, 3)(F.pixel_shuffle(conv(2, 4, 3)(x), 2)),
    "a shift by writing to a part": setitem,
    "a view of memory written to later": stale,
    "parts written into fresh memory": into,
}


@pytest.mark.parametrize("name", IRREGULAR)
def test_what_is_not_regular_is_unknown_and_stays_so(name: str) -> None:
    def and_on(x: Tensor) -> Tensor:
        y = IRREGULAR[name](x)
        return y * y.mean()

    for function in (IRREGULAR[name], and_on):
        output, field = traced(function, noise(1, 2, 12, 14))
        assert output.numel() > 0
        assert field is None


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.ReLU(), nn.ReLU6(True), nn.ELU(), nn.SELU(True), nn.CELU(), nn.GELU(), nn.SiLU(True), nn.Mish()),
        *(nn.Mish(True), nn.Hardswish(), nn.Hardswish(True), nn.Hardsigmoid(), nn.Hardtanh(), nn.LeakyReLU(0.1, True)),
        *(nn.LogSigmoid(), nn.PReLU(2), nn.RReLU(), nn.RReLU(inplace=True), nn.Sigmoid(), nn.Softplus(), nn.Softsign()),
        *(nn.Tanh(), nn.Tanhshrink(), nn.Threshold(0.1, 0.0, True), nn.Dropout(), nn.Identity(), nn.Softmax2d()),
    ],
    ids=repr,
)
def test_an_activation_function_leaves_the_field_as_it_is(layer: nn.Module) -> None:
    image = noise(1, 2, 12, 14)
    _, before = traced(WIDE, image)
    wide = conv(2, 2, (3, 5), stride=(2, 1), padding=(1, 3), dilation=(2, 1))
    _, after = traced(lambda x: layer.double().eval()(wide(x)), image)
    assert before is not None
    assert after is not None
    assert after.spans == before.spans
    assert after.layout[2:] == before.layout[2:]


def random_net(seed: int) -> nn.Sequential:
    """Return a random stack of windows of every kind, each with its own height and width."""
    draw = random.Random(seed)

    def pair(*choices: int) -> tuple[int, int]:
        return draw.choice(choices), draw.choice(choices)

    layers: list[nn.Module] = []
    for _ in range(draw.randint(2, 5)):
        kind = draw.randrange(5)
        if kind == 0:
            layers.append(nn.Conv2d(2, 2, pair(1, 2, 3, 4), pair(1, 2), pair(0, 1, 2), pair(1, 2)))
        elif kind == 1:
            layers.append(nn.ConvTranspose2d(2, 2, pair(1, 2, 3), 1, pair(0, 1), 0, 1, True, draw.choice((1, 2))))
        elif kind == 2:
            layers.append(nn.AvgPool2d(pair(2, 3), pair(1, 2), draw.choice((0, 1)), ceil_mode=draw.random() < 0.5))
        elif kind == 3:
            layers.append(
                nn.ZeroPad2d((draw.randint(0, 2), draw.randint(0, 2), draw.randint(0, 2), draw.randint(0, 2)))
            )
        else:
            layers += [nn.BatchNorm2d(2), nn.ReLU()]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("seed", range(25))
def test_random_stacks_of_windows_agree_with_the_gradient(seed: int) -> None:
    compare_with_gradient(positive(random_net(seed)), noise(1, 2, 48, 45), margin=6)


def test_maximum_and_average_pooling_have_the_same_field() -> None:
    image = noise(1, 2, 12, 14)
    _, average = traced(lambda x: F.avg_pool2d(C3(x), (3, 2), (2, 1), (1, 0), ceil_mode=True), image)
    _, maximum = traced(lambda x: F.max_pool2d(C3(x), (3, 2), (2, 1), (1, 0), ceil_mode=True), image)
    _, dilated = traced(lambda x: F.max_pool2d(C3(x), (3, 2), (2, 1), (1, 0), dilation=(2, 3)), image)
    assert maximum == average
    assert dilated is not None
    # 3 pixels of the convolution + (3 - 1) · 2 down and (2 - 1) · 3 right
    assert [span.size for span in dilated.spans] == [7, 6]
    assert [span.start for span in dilated.spans] == [-2, -1]


def test_a_field_by_hand() -> None:
    """Convolution 3×5, stride 2×1, padding 1×3, dilation 2×1, then pooling 2×3 of stride 2×3."""
    _, field = traced(lambda x: F.avg_pool2d(WIDE(x), (2, 3)), noise(1, 2, 32, 32))
    assert field is not None
    # down: 1 + 2·2 = 5, then + 1·2 = 7; stride 2·2; first pixel -1. Right: 1 + 4 = 5, then + 2·1 = 7; stride 3
    assert field.along(ROWS) == (7, 4, -1)
    assert field.along(COLUMNS) == (7, 3, -3)


def test_global_pooling_of_a_map_that_misses_the_border_is_not_the_whole_image() -> None:
    """A convolution of stride 3 without padding leaves the last row of 8 unseen."""
    _, field = traced(lambda x: conv(2, 2, 1, stride=3)(x).mean((2, 3)), noise(1, 2, 8, 10))
    assert field is not None
    assert field.along(ROWS) == (7, 0, 0)
    assert field.along(COLUMNS) == (10, 0, 0)
    assert not field.is_whole_image


def test_without_arithmetic_the_fields_and_shapes_are_the_same() -> None:
    net = models.resnet18(weights=None).eval()
    image = torch.rand(1, 3, 64, 80)
    fields = []
    for arithmetic in (True, False):
        tracer = ReceptiveFieldTracer(image, arithmetic)
        with torch.no_grad(), tracer:
            output = net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(image)))))))
        fields.append((tuple(output.shape), tracer.field(output)))
    assert fields[0] == fields[1]
    assert fields[0][1] is not None


def test_tracing_changes_no_value() -> None:
    image = noise(1, 2, 12, 14)
    for function in REGULAR.values():
        assert torch.equal(traced(function, image)[0], function(image))
