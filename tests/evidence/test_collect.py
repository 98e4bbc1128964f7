"""Evidence: what one pass keeps of the photos is what a pass that keeps everything finds."""

from __future__ import annotations

import gc
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from phosphene import errors
from phosphene.evidence import crops
from phosphene.evidence import photo_pass as viewing
from phosphene.evidence.collect import (
    SHARES,
    Evidence,
    PhotoStatistics,
    by_layer,
    evidence,
    load_evidence,
    packed,
    photo_pass_of,
    unpacked,
)
from phosphene.evidence.photo_pass import Partial, merge
from phosphene.evidence.quantile_sketch import (
    ABSOLUTE,
    RELATIVE,
    QuantileSketch,
    empty_sketch,
    merge_sketches,
    sketch_of,
)
from phosphene.evidence.top_photos import NONE, TopPhotos, add, no_photos, stronger
from phosphene.images.encode import png
from phosphene.images.photo import Fit
from phosphene.network.layers import ReceptiveField
from phosphene.network.model import Model
from phosphene.storage.store import open_store

Guard = Callable[[nn.Module], AbstractContextManager[None]]
MAPS = ("0", "1", "2", "3", "4", "5", "6")  # of small_net; 7 and 8 are vectors


def handle(module: nn.Module, size: int = 8, **options: Any) -> Model:
    return Model(module=module, name="net", input_size=(size, size), **options)


def noise(count: int, size: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    """Return photos (n, c, h, w), the third like the first, the eleventh without contrast."""
    photos = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
    if count > 10:
        photos[2], photos[10] = photos[0], 0.5
    return photos


class Painted:
    """Photos that are made when they are asked for: noise of a strength that differs; some cannot be read."""

    def __init__(self, count: int, size: int = 8, broken: tuple[int, ...] = ()) -> None:
        self.count, self.size, self.broken = count, size, broken
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(index)
        if index in self.broken:
            raise OSError("torn")
        noise = torch.rand(3, self.size, self.size, generator=torch.Generator().manual_seed(index))
        return noise * (0.2 + 0.8 * (index * 7919 % 1000) / 1000)


@pytest.fixture
def small_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have lots of 8 photos, and batches of 4."""
    monkeypatch.setattr(viewing, "LOT", 8)
    monkeypatch.setitem(viewing.AT_ONCE, "cpu", (2**26, 4))


def kept(model: Model, photos: Tensor, path: str) -> Tensor:
    """Return the activations (n, c, h, w) of all photos, read one at a time."""
    with model.reading([path]) as read, torch.no_grad():
        return torch.cat([read(one[None].to(model.like))[path] for one in photos])


def strongest_by_hand(maps: Tensor, photos: Tensor, channel: int, top: int) -> list[tuple[float, int, int, int]]:
    """Return peak, photo, row and column of the strongest photos of a channel, of equal photos the first alone."""
    found: list[tuple[float, int, int, int]] = []
    for number, one in enumerate(maps[:, channel]):
        first = next(other for other in range(number + 1) if torch.equal(photos[other], photos[number]))
        if first == number:
            best = max(
                (float(one[row, column]), -row, -column) for row in range(len(one)) for column in range(len(one[0]))
            )
            found.append((-best[0], number, -best[1], -best[2]))
    return [(-minus, number, row, column) for minus, number, row, column in sorted(found)[:top]]


def check_by_hand(found: PhotoStatistics, maps: Tensor, photos: Tensor, top: int) -> None:
    """Compare the statistics of a layer with those of all its maps (n, c, h, w), in float64."""
    for channel in range(maps.shape[1]):
        means = [sum(one.flatten().tolist()) / one.numel() for one in maps[:, channel].double()]
        mean = sum(means) / len(means)
        std = (sum((one - mean) ** 2 for one in means) / len(means)) ** 0.5
        numbers = (found.mean, found.std, found.minimum, found.maximum)
        for number, expected in zip(numbers, (mean, std, min(means), max(means)), strict=True):
            assert float(number[channel]) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert (int(found.count[channel]), int(found.broken[channel])) == (len(means), 0)
        for share, quantile in zip(SHARES, found.quantiles[channel].tolist(), strict=True):
            exact = sorted(means)[round(share * (len(means) - 1))]
            assert abs(quantile - exact) <= max(RELATIVE * abs(exact), ABSOLUTE * max(map(abs, means))) + 1e-15
        expected_top = strongest_by_hand(maps, photos, channel, top)
        ranks = zip(found.peaks[channel], found.photos[channel], found.positions[channel], strict=True)
        for (peak, photo, place), expected in zip(ranks, expected_top, strict=True):
            assert float(peak) == pytest.approx(expected[0], rel=1e-12, abs=1e-12)
            assert (int(photo), *place.tolist()) == expected[1:]


@pytest.mark.usefixtures("small_lots")
def test_one_pass_equals_one_that_keeps_all_activations(small_net: nn.Sequential, untouched: Guard) -> None:
    photos = noise(43)
    model = handle(small_net)
    with untouched(small_net):
        found = evidence(model, photos, "*", top=5)
    assert tuple(found) == tuple(one.path for one in model.layers() if one.is_map)
    for path, statistics in found.items():
        check_by_hand(statistics, kept(model, photos, path), photos, 5)


@pytest.mark.usefixtures("small_lots")
def test_float32_with_folding_and_channels_last_is_the_same_within_rounding(small_net: nn.Sequential) -> None:
    photos, single = noise(20), handle(small_net.float())
    found = evidence(single, photos, [".2", 1], top=3)
    assert len(single.folding([".2"]).pairs) == 1
    for path in found:
        maps = kept(handle(small_net.double()), photos, path)
        torch.testing.assert_close(found[path].mean, maps.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        best = maps.double().amax((2, 3)).topk(1, 0)
        torch.testing.assert_close(found[path].peaks[:, 0], best.values[0], rtol=1e-5, atol=1e-6)


def test_the_score_is_that_of_the_channel_objective(small_net: nn.Sequential) -> None:
    from phosphene.rendering.objectives import channel

    photos, model = noise(9), handle(small_net)
    found = evidence(model, photos, [0])[".0"]
    with model.reading([".0"]) as read, torch.no_grad():
        acts = read(photos.double())
        scores = torch.stack([channel(".0", one).score(acts, photos, torch.zeros(9).long()) for one in range(6)])
    torch.testing.assert_close(found.maximum, scores.amax(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.mean, scores.mean(1), rtol=1e-12, atol=1e-15)


def partials(seed: int, photos: int = 60, channels: int = 7, top: int = 4) -> list[Partial]:
    """Return what is known of single photos, with ties, and with pictures that come twice."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 6, (photos, channels), generator=generator).double()  # many ties
    means = torch.randn(photos, channels, generator=generator, dtype=torch.float64) * torch.logspace(-3, 9, channels)
    means[:, 0] = 0
    marks = torch.randint(0, photos // 2, (photos,), generator=generator)
    levels = levels[marks]  # the same picture excites the same
    found = []
    for photo in range(photos):
        state = no_photos(channels, top)
        here = slice(photo, photo + 1)
        places = torch.full((1, channels, 2), photo)
        whole = torch.ones(1, channels, dtype=torch.bool)
        add(state, levels[here], torch.tensor([photo]), places, marks[here], whole)
        found.append(Partial(state, sketch_of(empty_sketch(channels), means[here], whole), 1, 0))
    return found


def assert_same_but_for_rounding(one: Partial, other: Partial) -> None:
    for mine, theirs in zip(one.strongest, other.strongest, strict=True):
        assert torch.equal(mine, theirs)
    for name in QuantileSketch._fields:
        mine, theirs = getattr(one.spread, name), getattr(other.spread, name)
        if name in ("mean", "squares"):
            scale = one.spread.squares.sqrt() if name == "mean" else one.spread.squares
            assert bool(((mine - theirs).abs() <= 1e-12 * scale).all())
        else:
            assert torch.equal(mine, theirs), name
    assert (one.seen, one.lost, one.refused) == (other.seen, other.lost, other.refused)


@pytest.mark.parametrize("seed", range(6))
def test_any_split_and_order_of_merging_gives_the_same(seed: int) -> None:
    singles, order = partials(seed), random.Random(seed)
    whole = reduce(merge, singles)
    for _ in range(5):
        left = list(singles)
        order.shuffle(left)
        while len(left) > 1:  # any two, next to each other or not
            one, other = (left.pop(order.randrange(len(left))) for _ in range(2))
            left.append(merge(one, other))
        assert_same_but_for_rounding(whole, left[0])


def test_what_is_strongest_by_hand() -> None:
    def state(entries: list[tuple[float, int, int]]) -> TopPhotos:
        """Return a state of one channel and three places, of (peak, photo, mark)."""
        empty = no_photos(1, 3)
        peaks, photos, marks = (torch.tensor([one]) for one in zip(*entries, strict=True))
        places = photos[..., None].expand(-1, -1, 2)
        return stronger(empty, TopPhotos(peaks.double(), photos, places, marks))

    # photo 4 is picture 9 again, which 1 showed as strongly; 2 and 7 tie; 3 is picture 8 again, weaker than 7 showed it
    first = state([(5.0, 1, 9), (3.0, 2, 6), (2.5, 3, 8)])
    other = state([(5.0, 4, 9), (3.0, 7, 8), (1.0, 5, 5)])
    for both in (stronger(first, other), stronger(other, first)):
        assert both.photos.tolist() == [[1, 2, 7]]
        assert both.peaks.tolist() == [[5, 3, 3]]
        assert both.places[0, :, 0].tolist() == [1, 2, 7]
    few = stronger(state([(5.0, 1, 9)]), state([(5.0, 4, 9)]))
    assert few.photos.tolist() == [[1, NONE, NONE]]
    assert few.peaks.tolist() == [[5, -torch.inf, -torch.inf]]


def test_quantiles_are_as_near_as_stated_over_twelve_orders_of_magnitude() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3000, 4, generator=generator, dtype=torch.float64) * torch.tensor([1e-6, 1, 1e6, 1e-30])
    values = torch.cat([values, values.abs() ** 3, torch.zeros(3000, 1), values[:, :1] + 40], 1)
    state = empty_sketch(values.shape[1])
    for batch in torch.split(values, 70):
        state = sketch_of(state, batch, torch.ones_like(batch, dtype=torch.bool))
    assert int(state.bins.sum()) == values.numel()
    for share in (0, *SHARES, 1):
        exact = values.sort(0).values[round(share * 2999)]
        allowed = torch.maximum(RELATIVE * exact.abs(), ABSOLUTE * values.abs().amax(0))
        assert bool(((state.quantile(share) - exact).abs() <= allowed + 1e-40).all())
    assert pytest.approx(0.0108, abs=1e-4) == RELATIVE
    assert pytest.approx(0.0039, abs=1e-4) == ABSOLUTE
    merged = merge_sketches(empty_sketch(len(values[0])), state)
    assert torch.equal(merged.bins, state.bins)


@pytest.mark.usefixtures("small_lots")
def test_the_same_picture_under_two_names_stands_once(small_net: nn.Sequential) -> None:
    photos = noise(20)
    photos[17] = photos[5]
    found = evidence(handle(small_net), photos, [0], top=20)[".0"]
    for channel in range(6):
        numbers = found.photos[channel].tolist()
        assert sorted(numbers) == [NONE, NONE, 0, 1, *range(3, 17), 18, 19]  # 2 is 0 again
    assert found.count.tolist() == [20] * 6


@pytest.mark.usefixtures("small_lots")
def test_of_equal_peaks_the_lower_number_comes_first(small_net: nn.Sequential) -> None:
    with torch.no_grad():
        small_net.get_parameter("0.weight")[2] = 0  # a channel that is the same for every photo, everywhere
    found = evidence(handle(small_net), noise(30, seed=3), [0], top=4)[".0"]
    assert found.photos[2].tolist() == [0, 1, 3, 4]
    assert found.positions[2].tolist() == [[0, 0]] * 4
    assert float(found.std[2]) == pytest.approx(0, abs=1e-15)


class Logarithm(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return (image - 0.25).log()


@pytest.mark.usefixtures("small_lots")
def test_maps_with_nan_or_infinity_are_left_out_and_counted() -> None:
    photos = 0.5 + noise(10, 4) / 4
    photos[3, 0, 1, 1] = 0.1  # NaN in channel 0
    photos[6, 1, 2, 2] = 0.25  # -infinity in channel 1
    photos[:, 2] = 0
    found = evidence(handle(nn.Sequential(Logarithm()), 4), photos, "*", top=12)[".0"]
    assert found.count.tolist() == [9, 9, 0]
    assert found.broken.tolist() == [1, 1, 10]
    assert sorted(found.photos[0].tolist())[3:] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    expected = (photos[:, 0].double() - 0.25).log().mean((1, 2))
    assert float(found.mean[0]) == pytest.approx(float(expected[[*range(3), *range(4, 10)]].mean()), rel=1e-6)
    for numbers in (found.mean, found.std, found.maximum, found.quantiles[:, 0]):
        assert numbers.isnan().tolist() == [False, False, True]
    assert found.photos[2].tolist() == [NONE] * 12


@pytest.mark.usefixtures("small_lots")
def test_photos_that_cannot_be_read_are_left_out_and_named(small_net: nn.Sequential) -> None:
    found = evidence(handle(small_net), Painted(20, broken=(1, 9, 10)), [0], top=20)
    assert (found.about["seen"], found.about["lost"]) == (17, 3)
    assert [one["photo"] for one in found.about["refused"]] == [1, 9, 10]
    assert found.about["refused"][0] == {
        "name": "photo 1",
        "photo": 1,
        "reason": "photo 1 of the dataset cannot be read: OSError('torn')",
    }
    assert sorted(found[".0"].photos[0].tolist()) == [NONE] * 3 + [n for n in range(20) if n not in (1, 9, 10)]
    assert found[".0"].count.tolist() == [17] * 6
    with pytest.raises(errors.PhotoRefused, match="of 20 photos none can be read; the first: photo 0 of the dataset"):
        evidence(handle(small_net), Painted(20, broken=tuple(range(20))), [0])


def test_photos_are_fitted_as_the_network_wants_them_at_any_size() -> None:
    model = handle(nn.Sequential(nn.Conv2d(3, 2, 1)), 8, fit=Fit(resize=10, interpolation="bicubic"))
    photo = noise(1, 40)
    asked = photo_pass_of(model, photo, [0], 4)
    # at half the size the short side is 5 px, and the middle 4 px of these are shown
    assert asked.fit == Fit(resize=5, interpolation="bicubic")
    shown = asked.show(0)
    assert isinstance(shown, viewing.LoadedPhoto)
    small = torch.nn.functional.interpolate(photo, (5, 5), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(shown.image, small[..., :4, :4])
    plain = photo_pass_of(model, photo, [0]).show(0)
    assert isinstance(plain, viewing.LoadedPhoto)
    assert torch.equal(plain.image, model.fitted(photo)[0])


@pytest.mark.parametrize("channels", [1, 5])
def test_networks_that_see_other_than_three_channels(channels: int) -> None:
    net = nn.Sequential(nn.Conv2d(channels, 2, 3)).double()
    photos = noise(6, 6, channels)
    model = handle(net, 6, channels_in=channels)
    found = evidence(model, photos, "*", top=2)
    check_by_hand(found[".0"], kept(model, photos, ".0"), photos, 2)
    assert Image.open(io.BytesIO(found.sheets["crops_0_0.webp"])).size == (128, 128)


class Twice(nn.Module):
    """One convolution that runs twice, its first result overwritten in between; the second is laid out otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        first: Tensor = self.convolution(image)
        second: Tensor = self.convolution(first.relu_().contiguous(memory_format=torch.channels_last))
        return second


def test_a_layer_that_runs_twice_and_is_overwritten(untouched: Guard) -> None:
    net, photos = Twice().double(), noise(14)
    model = handle(net)
    with untouched(net):
        found = evidence(model, photos, "*", top=3)
    assert list(found) == ["convolution@0", "convolution@1"]
    for path in found:
        check_by_hand(found[path], kept(model, photos, path), photos, 3)


def test_what_cannot_be_asked_is_refused(small_net: nn.Sequential, untouched: Guard) -> None:
    model, photos = handle(small_net), noise(3)
    requests: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (errors.LayerRefused, "where there are maps, and .8 returns none", lambda: evidence(model, photos, [0, "8"])),
        (errors.LayerRefused, "and .7, .8 returns none", lambda: evidence(model, photos, "[78]")),
        (errors.LayerRefused, "and no layer returns none", lambda: evidence(model, photos, [])),
        (errors.LayerNotFound, "no layer 'x'", lambda: evidence(model, photos, ["x"])),
        (errors.InvalidRequest, "at least one photo a channel", lambda: evidence(model, photos, [0], top=0)),
        (errors.InvalidRequest, "size in pixels is a whole number", lambda: evidence(model, photos, [0], size=-1)),
        (errors.InvalidRequest, "pixels from 1, not 0", lambda: evidence(model, photos, [0], size=0)),
        (errors.SizeRefused, "does not take a picture of 3×1×1", lambda: evidence(model, photos, [".4"], size=1)),
        (errors.PhotoRefused, "there is no nowhere", lambda: evidence(model, "nowhere", [0])),
    ]
    for error, message, request in requests:
        with untouched(small_net), pytest.raises(error, match=message):
            request()
    with pytest.raises(errors.LayerNotFound, match="no photos were looked at in 'y'"):
        evidence(model, photos, [0])["y"]


@pytest.mark.usefixtures("small_lots")
def test_the_network_is_left_as_it_was_when_stopped(small_net: nn.Sequential, untouched: Guard) -> None:
    def stop(more: int, total: int) -> None:
        if more:
            raise KeyboardInterrupt

    small_net.train()
    with untouched(small_net), pytest.raises(KeyboardInterrupt) as caught:
        evidence(handle(small_net), noise(9), [0], watch=stop)
    assert caught.tb  # which holds on to all that was under way


@pytest.mark.usefixtures("small_lots")
def test_the_network_is_left_as_it_was_when_nothing_can_be_written(
    small_net: nn.Sequential, untouched: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, create=True)

    def full(name: str, content: bytes) -> None:
        raise errors.OutputRefused("the disk is full")

    monkeypatch.setattr(type(store), "write", lambda self, name, content: full(name, content))
    with untouched(small_net), pytest.raises(errors.OutputRefused, match="the disk is full") as caught:
        evidence(handle(small_net), noise(30), [0], store=store, every=0)
    assert caught.tb


@pytest.mark.usefixtures("small_lots")
def test_watch_counts_every_photo(small_net: nn.Sequential) -> None:
    seen: list[tuple[int, int]] = []
    evidence(handle(small_net), Painted(21, broken=(4,)), [0], watch=lambda more, total: seen.append((more, total)))
    assert seen == [(0, 21), (4, 21), (4, 21), (4, 21), (4, 21), (4, 21), (1, 21)]


def test_files_hold_all_of_it(small_net: nn.Sequential) -> None:
    found = evidence(handle(small_net), noise(12), "[034]", size=6, top=3)
    again = Evidence.from_files(found.files())
    assert again.files() == found.files()
    assert again.about == found.about
    assert list(again) == [".0", ".3", ".4"]
    assert torch.equal(again[".4"].quantiles, found[".4"].quantiles)
    state = reduce(merge, photo_pass_of(handle(small_net), noise(12), [0]).partials([0]), partial_of_nothing(6))
    done, back = unpacked(packed(state, 5))
    assert done == 5
    assert_same_but_for_rounding(state, back)


def partial_of_nothing(channels: int) -> Partial:
    return viewing.empty_partial(channels, 9)


@pytest.mark.usefixtures("small_lots")
def test_a_pass_that_was_stopped_goes_on_from_the_store(small_net: nn.Sequential, tmp_path: Path) -> None:
    model, photos = handle(small_net), Painted(40, broken=(3, 30))
    plain = evidence(model, photos, [0, 1], top=4).files()
    seen = 0

    def stop(more: int, total: int) -> None:
        nonlocal seen
        seen += more
        if seen > 20:
            raise KeyboardInterrupt

    store = open_store(tmp_path / "store", create=True)
    with pytest.raises(KeyboardInterrupt):
        evidence(model, photos, [0, 1], top=4, store=store, watch=stop, every=0)
    assert store.done("evidence") == set()
    photos.asked.clear()
    steps: list[int] = []
    found = evidence(model, photos, [0, 1], top=4, store=store, watch=lambda more, total: steps.append(more), every=0)
    assert found.files() == plain
    assert steps[0] == 16  # two lots of eight were known, and are not looked at again
    assert photos.asked[3:29] == list(range(16, 40)) + sorted(photos.asked[27:29])  # after three for the spec
    where = tmp_path / "store" / "evidence" / found.digest
    assert {one.name for one in where.iterdir()} == {*plain, "manifest.json"}  # nothing half done is left
    photos.asked.clear()
    assert evidence(model, photos, [0, 1], top=4, store=store).files() == plain
    assert len(photos.asked) <= 3
    assert load_evidence(store, found.digest, sheets=False).sheets == {}


@pytest.mark.usefixtures("small_lots")
def test_a_partial_result_that_is_damaged_is_begun_anew(small_net: nn.Sequential, tmp_path: Path) -> None:
    model, photos = handle(small_net), noise(20)
    store = open_store(tmp_path, create=True)
    plain = evidence(model, photos, [0])
    for content in (b"", b"rubbish", packed(partial_of_nothing(6), 1)[:-40]):
        store.write(f"evidence/{plain.digest}/partial.safetensors", content)
        assert evidence(model, photos, [0], store=store).files() == plain.files()
        for one in (tmp_path / "evidence" / plain.digest).iterdir():
            one.unlink()


def test_other_weights_photos_or_sizes_are_other_evidence(small_net: nn.Sequential) -> None:
    def digest(model: Model, photos: Tensor, size: int | None = None, top: int = 9) -> str:
        return evidence(model, photos, [0], size=size, top=top).digest

    photos = noise(12)
    first = digest(handle(small_net), photos)
    assert digest(handle(small_net), photos.clone()) == first
    others = [digest(handle(small_net), photos, 6), digest(handle(small_net), photos, top=2)]
    others.append(digest(handle(small_net), photos[:-1]))
    with torch.no_grad():
        bias = small_net.get_parameter("4.bias")
        bias[0] = torch.nextafter(bias[0], torch.tensor(9.0, dtype=torch.float64))
    others.append(digest(handle(small_net), photos))
    assert len({first, *others}) == 5


def test_windows_by_hand(small_net: nn.Sequential) -> None:
    # convolution 3×3 with padding 1, pooling by 2, convolution 3×3 with padding 1: 8 px from -3, in steps of 2
    layer = handle(small_net, 32).find(".4")
    assert layer.receptive_field == ReceptiveField((8, 8), (2, 2), (3, 3))
    assert crops.window(layer, (5, 0), (32, 32)) == (7, -3, 8, 8)
    assert crops.window(layer, (1, 1), (8, 8)) == (0, 0, 8, 8)  # the field is the photo's size
    assert crops.window(replace(layer, receptive_field=None), (5, 0), (32, 32)) == (0, 0, 32, 32)


def brightest(found: Evidence, name: str, rank: int, channel: int) -> tuple[int, int]:
    """Return row and column of the brightest pixel of a tile, away from its border."""
    sheet = np.asarray(Image.open(io.BytesIO(found.sheets[name])).convert("L"), dtype=float)
    tile = sheet[channel * 64 : channel * 64 + 64, rank * 64 : rank * 64 + 64]
    row, column = np.unravel_index(tile.argmax(), tile.shape)
    return int(row), int(column)


def test_a_crop_shows_what_the_channel_answered_to() -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1, bias=False), nn.Conv2d(1, 1, 3, padding=1, bias=False))
    with torch.no_grad():
        first, second = net.parameters()
        first.fill_(0)[:, :, 1, 1] = 1
        second.fill_(0)[:, :, 2, 1] = 1  # looks at the pixel below
    photos = torch.full((3, 3, 20, 20), 0.1)
    photos[0, :, 12, 5], photos[1, :, 19, 18] = 1.0, 0.8
    found = evidence(handle(net, 20), photos, [1], top=4)
    assert found[".1"].positions[0, :2].tolist() == [[11, 5], [18, 18]]
    # a field of 5 px around the peak in squares of 12.8 px: the spot is one below the middle one, 38 to 51
    for rank in range(2):
        row, column = brightest(found, "crops_0_0.webp", rank, 0)
        assert 38 <= row <= 51
        assert 25 <= column <= 38
    sheet = Image.open(io.BytesIO(found.sheets["crops_0_0.webp"])).convert("RGB")
    assert sheet.size == (4 * 64, 64)
    grey = np.asarray(sheet)[
        :, 64 + 56 : 128
    ]  # beyond the right border of the second photo, whose column 18 is the middle
    assert abs(grey.astype(float) - 128).max() < 6
    dark = np.asarray(sheet)[:, 3 * 64 + 8 :]  # there is no fourth photo
    assert abs(dark.astype(float) - 38).max() < 6
    assert found.about["names"] == {"0": "photo 0", "1": "photo 1", "2": "photo 2"}
    assert found.about["sheets"] == {".1": ["crops_0_0.webp"]}


def test_many_channels_go_on_several_sheets_and_photos_are_read_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 130, 1))
    photos = Painted(7)
    found = evidence(handle(net), photos, [0], top=2)
    assert found.about["sheets"] == {".0": ["crops_0_0.webp", "crops_0_1.webp"]}
    heights = [Image.open(io.BytesIO(found.sheets[f"crops_0_{page}.webp"])).height for page in range(2)]
    assert heights == [128 * 64, 2 * 64]
    winners = {*found[".0"].photos.flatten().tolist()}
    assert sorted(photos.asked[10:]) == sorted(winners)  # after three for the spec, and all seven


def test_layers_that_do_not_fit_the_memory_together_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    together = evidence(handle(net), noise(5), "*", top=2).sheets
    monkeypatch.setattr(crops, "AT_ONCE", 100_000)
    assert list(crops.layer_groups([4, 4, 4, 20, 1])) == [[0, 1], [2], [3], [4]]
    assert evidence(handle(net), noise(5), "*", top=2).sheets == together


# --- whole photos -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have sheets written so that their pixels can be compared."""
    monkeypatch.setattr(crops, "webp", lambda image, quality, effort: png(image, {}))


def whole_photos(found: Evidence) -> dict[int, np.ndarray[Any, Any]]:
    """Return the tiles of the photos that are shown whole, by number."""
    about = found.about["thumbnails"]
    (width, height), columns, rows = about["tile"], about["columns"], about["rows"]
    tiles = {}
    for place, number in enumerate(about["photos"]):
        page, spot = divmod(place, columns * rows)
        sheet = np.asarray(Image.open(io.BytesIO(found.sheets[about["sheets"][page]])).convert("RGB"))
        assert sheet.shape == (rows * height, columns * width, 3)
        row, column = divmod(spot, columns)
        tiles[number] = sheet[row * height :, column * width :][:height, :width]
    return tiles


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize(("size", "tile"), [((30, 30), (30, 30)), ((150, 200), (112, 84)), ((150, 40), (30, 112))])
def test_the_strongest_photos_are_shown_whole_as_the_network_saw_them(
    size: tuple[int, int], tile: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    model = Model(module=nn.Sequential(nn.Conv2d(3, 7, 3)), name="net", input_size=size)
    photos = torch.nn.functional.interpolate(noise(60, 8), (170, 210), mode="bilinear")
    found = evidence(model, photos, [0], top=6)
    winners = sorted({*found[".0"].photos.flatten().tolist()})
    about = found.about["thumbnails"]
    assert (about["photos"], tuple(about["tile"])) == (winners, tile)
    assert about["sheets"] == [f"photos_{page}.webp" for page in range(-(-len(winners) // 25))]
    for number, shown in whole_photos(found).items():
        seen = model.fitted(photos[number : number + 1])[0][0]
        expected = Image.fromarray((seen * 255).round().byte().permute(1, 2, 0).numpy())
        assert np.array_equal(shown, np.asarray(expected.resize(tile, Image.Resampling.LANCZOS))), number


@pytest.mark.usefixtures("lossless")
def test_many_photos_go_on_several_sheets_each_whole_when_it_is_full() -> None:
    asked = photo_pass_of(handle(nn.Sequential(nn.Conv2d(3, 2, 1))), photos := Painted(100), [0])
    numbers = torch.arange(60).view(2, 30)
    found = crops.TopPositions(numbers, torch.zeros(2, 30, 2, dtype=torch.long))
    photos.asked.clear()
    seen = [(name, len(photos.asked)) for name, _ in crops.sheets(asked, [found])]
    # no more than one sheet of 25 is in memory at a time
    assert seen == [("photos_0.webp", 25), ("photos_1.webp", 50), ("photos_2.webp", 60), ("crops_0_0.webp", 60)]


def test_of_too_many_photos_the_strongest_are_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        crops.TopPositions(torch.tensor([[7, 3, 9], [8, 7, NONE]]), torch.zeros(2, 3, 2)),
        crops.TopPositions(torch.tensor([[5, 1, 2]]), torch.zeros(1, 3, 2)),
    ]
    assert crops.whole(found) == [1, 2, 3, 5, 7, 8, 9]
    for most, expected in ((4, [3, 5, 7, 8]), (2, [7, 8]), (5, [1, 3, 5, 7, 8])):
        monkeypatch.setattr(crops, "MOST", most)
        assert crops.whole(found) == expected
    assert crops.whole([crops.TopPositions(torch.full((2, 3), NONE), torch.zeros(2, 3, 2))]) == []


def test_evidence_of_older_stores_without_whole_photos_is_read_as_it_is(
    small_net: nn.Sequential, tmp_path: Path
) -> None:
    store, model, photos = open_store(tmp_path, create=True), handle(small_net), Painted(30)
    new = evidence(model, photos, [0])
    about = {name: one for name, one in new.about.items() if name != "thumbnails"}
    sheets = {name: one for name, one in new.sheets.items() if name.startswith("crops")}
    old = replace(new, about=about, sheets=sheets)
    assert {*new.files()} - {*old.files()} == {"photos_0.webp"}
    store.put("evidence", old.digest, old.files(), {})
    photos.asked.clear()
    found = evidence(model, photos, [0], store=store)
    assert len(photos.asked) <= 3  # for the spec
    assert found.files() == old.files()
    assert load_evidence(store, old.digest, sheets=False).about == about


def test_batches_and_lots_depend_on_what_is_asked_alone(small_net: nn.Sequential) -> None:
    asked = photo_pass_of(handle(small_net), Painted(1300), [0])
    assert [asked.lot(number) for number in range(asked.lots)] == [
        range(512),
        range(512, 1024),
        range(1024, 1300),
    ]
    assert asked.batch == 32
    # the largest map is 6 channels of 512×512 px in 8 bytes: 12.6 MB, of which four fit 64 MiB
    assert photo_pass_of(handle(small_net), noise(1), [0], 512).batch == 4
    many = photo_pass_of(handle(small_net), Painted(10**9), [0])
    assert many.lots <= viewing.MOST_LOTS
    assert sum(len(many.lot(number)) for number in range(many.lots)) == 10**9


def most_held(count: int) -> int:
    """Return the most bytes of tensors that are held while so many photos are shown."""
    asked = photo_pass_of(handle(nn.Sequential(nn.Conv2d(3, 8, 3))), Painted(count), [0])
    held = []

    def look(more: int) -> None:
        tensors = [one.untyped_storage() for one in gc.get_objects() if type(one) is Tensor]
        held.append(sum({one.data_ptr(): one.nbytes() for one in tensors}.values()))

    reduce(merge, asked.partials(range(asked.lots), look))
    return max(held)


@pytest.mark.usefixtures("small_lots")
def test_what_is_kept_does_not_grow_with_the_photos() -> None:
    assert most_held(24) == most_held(96)


GROWTH = """
import resource, sys, torch
sys.path.insert(0, {tests!r})
from test_collect import Painted, handle
from phosphene.evidence.collect import evidence
torch.set_num_threads(1)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 32, 3))
evidence(handle(net, 16), Painted({count}, 16), "*")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_is_flat_from_1_000_to_20_000_photos() -> None:
    def peak(count: int) -> int:
        """Return the most memory that a process held, in MiB."""
        code = GROWTH.format(tests=str(Path(__file__).parent), count=count)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert abs(peak(20_000) - peak(1_000)) <= 16


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_collect import Painted, handle
from phosphene.evidence import photo_pass as viewing
from phosphene.evidence.collect import evidence
from phosphene.storage.store import open_store
torch.set_num_threads(1)
torch.manual_seed(0)
viewing.LOT = 16
net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3))
store = open_store(sys.argv[1], create=True)
print("here", flush=True)
watch = lambda more, total: print(more, flush=True)
evidence(handle(net, 32), Painted(600, 40), "*", store=store, every=0, watch=watch)
"""


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in sorted(folder.rglob("*")) if one.is_file()}


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent))

    def begin(store: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(store)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with begin(tmp_path / "whole") as process:
        started = process.stdout and process.stdout.readline()
        began = time.monotonic()
        known = [int(line) for line in process.stdout or ()]
    took = time.monotonic() - began
    assert started
    assert sum(known) == 600
    chance, resumed = random.Random(0), []
    for _ in range(6):
        with begin(tmp_path / "killed") as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(chance.uniform(0, took / 6))  # six of which are less than the whole
            os.kill(process.pid, signal.SIGKILL)
            resumed.append(int(process.stdout.readline() or 0))
    with begin(tmp_path / "killed") as process:
        assert process.stdout
        resumed.append(int(process.stdout.readlines()[1]))
    assert resumed[-1] == max(resumed) > 0  # it went on from what was known
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")


@pytest.mark.slow
def test_ray_gives_the_same_bytes(small_net: nn.Sequential, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from phosphene.atlases.runners.ray_photos import RayPhotoRunner

    for number in range(1100):
        torch.manual_seed(number)
        Image.fromarray((torch.rand(9, 9, 3) * 255).byte().numpy()).save(tmp_path / f"{number:04}.png")
    (tmp_path / "0500.png").write_bytes(b"no photo")
    model = handle(small_net.float())
    here = evidence(model, tmp_path, "*", top=3)
    seen: list[int] = []
    there = evidence(
        model, tmp_path, "*", top=3, show=RayPhotoRunner(workers=2), watch=lambda more, total: seen.append(more)
    )
    assert there.files() == here.files()
    assert there.about["lost"] == 1
    assert seen == [0, 512, 512, 76]
    assert not ray.is_initialized()


def test_what_comes_in_any_order_is_merged_in_that_of_the_lots() -> None:
    from phosphene.atlases.runners.ray_photos import in_order

    singles = partials(0, 6)

    def coming() -> Iterator[tuple[int, Partial]]:
        yield from ((number, singles[number]) for number in (4, 2, 3, 5))

    assert [id(one) for one in in_order(coming(), range(2, 6))] == [id(singles[number]) for number in range(2, 6)]


def test_layers_come_apart_again(small_net: nn.Sequential) -> None:
    asked = photo_pass_of(handle(small_net), noise(5), [0, ".4"])
    both = list(by_layer(asked, next(iter(asked.partials([0])))))
    assert [len(one.mean) for one in both] == [6, 8]
    alone = photo_pass_of(handle(small_net), noise(5), [".4"])
    assert torch.equal(both[1].photos, next(by_layer(alone, next(iter(alone.partials([0]))))).photos)
