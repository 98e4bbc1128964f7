"""The rules of the operations: where the gradient is not zero, and numbers worked out by hand."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene.network.receptive_field import COLUMNS, ROWS
from positive_networks import (
    C3,
    WIDE,
    Function,
    assert_same_value,
    assert_unknown,
    compare_with_gradient,
    conv,
    noise,
    positive,
    traced,
)

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
    "a map repeated from one number": lambda x: FULL(x).expand(1, 2, 5, 6),
    "one number upsampled": lambda x: F.interpolate(x.mean((2, 3), keepdim=True), scale_factor=3),
}


CUTTING = {"cropping by negative padding"}


@pytest.mark.parametrize("name", REGULAR)
def test_the_field_is_where_the_gradient_is_not_zero(name: str) -> None:
    compare_with_gradient(REGULAR[name], noise(1, 2, 12, 14), margin=3 if name in CUTTING else 0)


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
}


@pytest.mark.parametrize("name", IRREGULAR)
def test_what_is_not_regular_is_unknown_and_stays_so(name: str) -> None:
    assert_unknown(IRREGULAR[name])


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


def test_tracing_changes_no_value() -> None:
    for function in REGULAR.values():
        assert_same_value(function)
