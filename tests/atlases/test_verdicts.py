"""Verdicts: figures worked out on paper on networks that only average, and against a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene.atlases import verdicts
from phosphene.atlases.verdicts import MOVES, Verdict, judge, moves, verdict_name
from phosphene.errors import ChannelNotFound, InvalidRequest, LayerRefused
from phosphene.network.model import Model
from phosphene.rendering.transforms import resample

Untouched = Callable[[nn.Module], AbstractContextManager[None]]


@dataclass(frozen=True)
class Photos:
    mean: Tensor
    std: Tensor
    maximum: Tensor


def in_bytes(mean: list[float], std: list[float], maximum: list[float]) -> Photos:
    """Return statistics given in bytes, as if the pictures of `plain` were measured in 0..255."""
    return Photos(*(torch.tensor(values, dtype=torch.float64) / 255 for values in (mean, std, maximum)))


def looking(channels: int, after: nn.Module | None = None, bias: float = 0.0) -> Model:
    """Return a network whose layer "0" returns its image, plus a bias: the score of channel c is the image's mean."""
    convolution = nn.Conv2d(channels, channels, 1)
    with torch.no_grad():
        convolution.weight.copy_(torch.eye(channels)[..., None, None])
        convolution.bias.fill_(bias)  # type: ignore[union-attr]
    net = nn.Sequential(convolution, after or nn.Identity()).double().eval()
    return Model(module=net, name="net", input_size=(8, 8), channels_in=channels)


def plain(*rows: list[int]) -> Tensor:
    """Return pictures of one colour each, (n, c, 6, 6): moved or not, they stay the same."""
    return torch.tensor(rows, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 6, 6).contiguous()


def noise(count: int, channels: int = 3, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)


# --- by hand


def test_every_figure_of_three_pictures_on_paper() -> None:
    pictures = plain([200, 10, 10], [220, 100, 10], [30, 40, 50])
    judged = judge(
        looking(3),
        "0",
        pictures,
        [0, 1, 2],
        photos=in_bytes([50, 50, 50], [10, 25, 5], [100, 150, 75]),
        second_seed=plain([125, 0, 0], [0, 150, 0], [0, 0, 60]),
    )
    # retrieval: 220 > 200 in channel 0. own: deviations from the photos are (15, -1.6, -8), (17, 2, -8), (-2, -.4, 0)
    assert judged == (
        Verdict(0, "filter_0", "vivid", 0.78431, 3.0, 1.0, retrieval=2, own=1, agreement=0.5),
        Verdict(1, "filter_1", "weak", 0.39216, 0.5, 1.0, retrieval=1, own=2, agreement=0.5),
        Verdict(2, "filter_2", "weak", 0.19608, 0.0, None, retrieval=1, own=1, agreement=0.0),
    )


def test_channels_may_be_any_and_repeat() -> None:
    judged = judge(
        looking(3), "0", plain([9, 80, 7], [9, 90, 7]), [1, 1], photos=in_bytes([0, 40, 0], [1] * 3, [9, 60, 9])
    )
    assert [verdict.excitation for verdict in judged] == [2.0, 2.5]
    assert [verdict.retrieval for verdict in judged] == [2, 1]
    assert [verdict.own for verdict in judged] == [1, 1]


def test_without_photos_the_base_is_a_grey_picture() -> None:
    judged = judge(looking(1), "0", plain([255], [0]), [0, 0], second_seed=plain([153], [255]))
    # grey is 127.5: the first picture gains 127.5, its second 25.5; the other one only loses
    assert (judged[0].verdict, judged[0].stability, judged[0].agreement) == ("unstable", 1.0, 0.2)
    assert (judged[1].verdict, judged[1].stability, judged[1].agreement) == ("weak", None, 0.0)
    assert {(verdict.excitation, verdict.own) for verdict in judged} == {(None, None)}


def test_a_channel_that_no_photo_tells_from_another_has_no_excitation_and_no_rank_but_a_verdict() -> None:
    photos = in_bytes([50, 50], [10, 0], [100, 50])
    judged = judge(looking(2), "0", plain([70, 200], [60, 80]), [1, 0], photos=photos)
    assert (judged[0].excitation, judged[0].own, judged[0].verdict) == (None, None, "vivid")
    assert (judged[1].excitation, judged[1].own) == (0.2, 1)  # the channel without a deviation outranks nobody


def test_a_channel_that_no_photo_could_be_seen_in_is_judged_as_without_photos() -> None:
    nothing = float("nan")
    (judged,) = judge(looking(2), "0", plain([250, 9]), [0], photos=in_bytes([nothing, 5], [nothing, 1], [nothing, 9]))
    assert judged == Verdict(0, "filter_0", "vivid", 0.98039, None, 1.0, 1, None, None)


def test_dead_and_plain_is_what_the_render_calls_so_and_nothing_else() -> None:
    fires, never = looking(1, nn.ReLU()), looking(1, nn.ReLU(), bias=-10.0)
    grey = judge(never, "1", plain([255]), [0], photos=in_bytes([50], [10], [80]))[0]
    assert (grey.verdict, grey.excitation) == ("weak", -1.6667)
    assert judge(never, "1", plain([255]), [0])[0] == Verdict(0, "filter_0", "weak", 0.0, None, None, 1, None, None)
    assert judge(fires, "1", plain([255]), [0])[0].verdict == "vivid"
    yes = torch.tensor([True])
    assert judge(fires, "1", plain([255]), [0], dead=yes)[0].verdict == "dead"
    assert judge(fires, "1", plain([255]), [0], plain=yes)[0].verdict == "plain"
    assert judge(fires, "1", plain([255]), [0], dead=yes, plain=yes)[0].verdict == "dead"


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ((0.0, 3.0, 0.9, 0.9), "vivid"),
        ((0.4, 3.0, 0.9, None), "vivid"),
        ((0.0, None, 0.9, None), "vivid"),
        ((0.0, 0.1, 0.1, 0.1), "weak"),
        ((0.0, None, None, None), "weak"),
        ((0.6, 3.0, 0.9, 0.9), "weak"),
        ((0.0, 3.0, 0.1, 0.9), "unstable"),
        ((0.0, 3.0, 0.9, 0.1), "unstable"),
        ((0.0, None, 0.1, None), "unstable"),
    ],
)
def test_the_verdict_follows_from_the_figures(
    figures: tuple[float, float | None, float | None, float | None], verdict: str
) -> None:
    assert verdict_name(*figures) == verdict


def test_what_most_other_pictures_do_better_is_weak() -> None:
    judged = judge(looking(1), "0", plain([200], [210], [220], [230]), [0, 0, 0, 0])
    assert [verdict.retrieval for verdict in judged] == [4, 3, 2, 1]
    assert [verdict.verdict for verdict in judged] == ["weak", "vivid", "vivid", "vivid"]  # 3 of 4 do better, 2 of 4, …
    photos = in_bytes([10, 10, 10], [1, 1, 1], [20, 20, 20])
    assert judge(looking(3), "0", plain([30, 40, 50]), [0], photos=photos)[0].verdict == "weak"
    assert judge(looking(3), "0", plain([30, 40, 20]), [0], photos=photos)[0].verdict == "vivid"


# --- moves


def test_what_needs_every_pixel_in_its_place_is_unstable_and_a_broad_pattern_is_not() -> None:
    kernel = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).view(1, 1, 2, 2)
    convolution = nn.Conv2d(1, 1, 2, stride=2, bias=False)
    convolution.weight.data = kernel
    model = Model(module=nn.Sequential(convolution), name="net", input_size=(24, 24), channels_in=1)
    chess = (torch.arange(24)[:, None] + torch.arange(24) + 1) % 2 * 255
    (fragile,) = judge(model, "0", chess.to(torch.uint8)[None, None], [0])
    assert fragile.score == 2.0
    assert fragile.verdict == "unstable"
    assert abs(fragile.stability or 0) < 0.3
    halves = (torch.arange(24) < 12).expand(24, 24) * 55 + 200
    (broad,) = judge(looking(1), "0", halves.to(torch.uint8)[None, None], [0])
    assert 0.9 < (broad.stability or 0) < 1.1


def test_figures_equal_a_plain_loop(small_net: nn.Sequential) -> None:
    model = Model(module=small_net, name="net", input_size=(16, 16))
    pictures, channels = noise(5), [3, 0, 7, 1, 4]
    samples = torch.rand(20, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.6

    front: Any = small_net[:5]

    def score(image: Tensor, channel: int) -> float:
        with torch.no_grad():
            return float(front(image[None])[0, channel].mean())

    table = torch.tensor([[score(image, channel) for channel in range(8)] for image in samples], dtype=torch.float64)
    photos = Photos(table.mean(0), table.std(0), table.amax(0))
    judged = judge(model, "4", pictures, channels, photos=photos)
    for picture, channel, verdict in zip(pictures, channels, judged, strict=True):
        image = picture.double() / 255
        mine, mean = score(image, channel), float(photos.mean[channel])
        moved = [score(move(image[None])[0], channel) for move in moves()]
        z = [(score(image, c) - float(photos.mean[c])) / float(photos.std[c]) for c in range(8)]
        scores = [score(picture.double() / 255, channel) for picture in pictures]
        assert verdict.score == pytest.approx(mine, rel=1e-4)
        assert verdict.excitation == pytest.approx((mine - mean) / (float(photos.maximum[channel]) - mean), rel=1e-4)
        if mine > mean:
            assert verdict.stability == pytest.approx((sum(moved) / MOVES - mean) / (mine - mean), rel=1e-4)
        else:
            assert verdict.stability is None
        assert verdict.retrieval == sorted(scores, reverse=True).index(mine) + 1
        assert verdict.own == sorted(z, reverse=True).index(z[channel]) + 1


def test_moves_are_small_and_always_the_same() -> None:
    picture = noise(1).double()
    first, again = ([move(picture) for move in moves()] for _ in range(2))
    assert len(first) == MOVES
    assert all(torch.equal(moved, repeated) for moved, repeated in zip(first, again, strict=True))
    dot = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    dot[..., 16, 16] = 1
    line = torch.arange(33, dtype=torch.float64) - 16
    for move in moves():
        seen = move(dot)
        down, right = ((seen.sum(axes) * line).sum() / seen.sum() for axes in ((0, 1, 3), (0, 1, 2)))
        assert abs(float(down)) <= 4
        assert abs(float(right)) <= 4
        assert abs(float(down)) + abs(float(right)) > 0.1
    still = torch.zeros(1, dtype=torch.float64)
    assert torch.allclose(resample(picture, still[None].expand(1, 2), still, still + 1), picture)


# --- batches


class Counting(nn.Module):
    """Passes images on and notes how many came at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(len(image))
        return image


def test_batches_change_nothing_and_bound_what_is_held(
    small_net: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting()
    model = Model(module=nn.Sequential(counting, *small_net), name="net", input_size=(16, 16))
    layer = model.find("5").path
    pictures, channels = noise(7), [0, 1, 2, 3, 4, 5, 6]
    whole = judge(model, layer, pictures, channels, second_seed=pictures.flip(0))
    counting.seen.clear()
    monkeypatch.setattr(verdicts, "AT_ONCE", 3)
    assert judge(model, layer, pictures, channels, second_seed=pictures.flip(0)) == whole
    assert max(counting.seen) == 3
    assert sum(counting.seen) == 7 * (1 + MOVES + 1) + 1  # the picture, its moves, the second seed's, and grey


def test_the_network_is_left_as_it_was(small_net: nn.Sequential, untouched: Untouched) -> None:
    small_net.train()
    with untouched(small_net):
        judge(Model(module=small_net, name="net", input_size=(16, 16)), "4", noise(2), [0, 1])


# --- what cannot be judged


def changed(**arguments: Any) -> dict[str, Any]:
    return {"layer": "0", "pictures": plain([1, 2], [3, 4]), "channels": [0, 1], **arguments}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (changed(pictures=torch.rand(2, 2, 6, 6)), InvalidRequest, "as saved, uint8"),
        (changed(pictures=plain([1, 2])[:0], channels=[]), InvalidRequest, "at least 1"),
        (changed(channels=[0]), InvalidRequest, "2 pictures"),
        (changed(dead=torch.tensor([True])), InvalidRequest, "1 values of `dead` and 2 of `plain`"),
        (changed(plain=torch.tensor([True] * 3)), InvalidRequest, "2 values of `dead` and 3 of `plain`"),
        (changed(channels=[0, 2]), ChannelNotFound, "no channel 2 in .0: it has 0 to 1"),
        (changed(channels=[-1, 1]), ChannelNotFound, "no channel -1"),
        (changed(second_seed=plain([1, 2])), InvalidRequest, "from another seed"),
        (changed(photos=in_bytes([1], [1], [1])), InvalidRequest, "same network and layer"),
        (changed(layer="flat"), LayerRefused, "returns no map"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    model = looking(2, nn.Flatten())
    if arguments["layer"] == "flat":
        arguments = {**arguments, "layer": model.find("1").path}
    with pytest.raises(error, match=words) as caught:
        judge(model, **arguments)
    assert "\n" not in str(caught.value)


def test_a_picture_that_overflows_is_named() -> None:
    model = looking(2)
    with torch.no_grad():
        model.module[0].weight.mul_(1e308).mul_(1e3)  # type: ignore[index]
    with pytest.raises(LayerRefused, match="filter 1 makes '0' NaN or infinite"):
        judge(model, "0", plain([0, 9]), [1])
