"""Statistics: what one pass keeps of the photos is what a pass that keeps everything finds."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from phosphene.evidence.collect import evidence, plan_photo_pass
from phosphene.evidence.statistics import Evidence, layer_statistics, load_evidence
from phosphene.evidence.top_photos import NO_PHOTO
from phosphene.rendering.objectives import channel
from phosphene.storage.store import open_store
from random_photos import (
    GeneratedPhotos,
    activations_one_by_one,
    check_by_hand,
    random_photos,
    small_chunks,
    small_model,
)

Guard = Callable[[nn.Module], AbstractContextManager[None]]


@small_chunks()
def test_one_pass_equals_one_that_keeps_all_activations(small_net: nn.Sequential, untouched: Guard) -> None:
    photos = random_photos(43)
    model = small_model(small_net)
    with untouched(small_net):
        result = evidence(model, photos, "*", top=5)
    assert tuple(result) == tuple(layer.path for layer in model.layers() if layer.is_map)
    for path, statistics in result.items():
        check_by_hand(statistics, activations_one_by_one(model, photos, path), photos, 5)


@small_chunks()
def test_float32_with_folding_and_channels_last_is_the_same_within_rounding(small_net: nn.Sequential) -> None:
    photos, single = random_photos(20), small_model(small_net.float())
    result = evidence(single, photos, [".2", 1], top=3)
    assert len(single.folding([".2"]).pairs) == 1
    for path, statistics in result.items():
        maps = activations_one_by_one(small_model(small_net.double()), photos, path)
        torch.testing.assert_close(statistics.mean, maps.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        best = maps.double().amax((2, 3)).topk(1, 0)
        torch.testing.assert_close(statistics.peaks[:, 0], best.values[0], rtol=1e-5, atol=1e-6)


def test_the_score_is_that_of_the_channel_objective(small_net: nn.Sequential) -> None:
    photos, model = random_photos(9), small_model(small_net)
    statistics = evidence(model, photos, [0])[".0"]
    with model.reading([".0"]) as read, torch.no_grad():
        acts, items = read(photos.double()), torch.zeros(9).long()
        scores = torch.stack([channel(".0", index).score(acts, photos, items) for index in range(6)])
    torch.testing.assert_close(statistics.maximum, scores.amax(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.mean, scores.mean(1), rtol=1e-12, atol=1e-15)


class Logarithm(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return (image - 0.25).log()


@small_chunks()
def test_maps_with_nan_or_infinity_are_left_out_and_counted() -> None:
    photos = 0.5 + random_photos(10, 4) / 4
    photos[3, 0, 1, 1] = 0.1  # NaN in channel 0
    photos[6, 1, 2, 2] = 0.25  # -infinity in channel 1
    photos[:, 2] = 0
    statistics = evidence(small_model(nn.Sequential(Logarithm()), 4), photos, "*", top=12)[".0"]
    assert statistics.count.tolist() == [9, 9, 0]
    assert statistics.broken.tolist() == [1, 1, 10]
    assert sorted(statistics.photos[0].tolist())[3:] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    expected = (photos[:, 0].double() - 0.25).log().mean((1, 2))
    assert float(statistics.mean[0]) == pytest.approx(float(expected[[*range(3), *range(4, 10)]].mean()), rel=1e-6)
    for column in (statistics.mean, statistics.std, statistics.maximum, statistics.quantiles[:, 0]):
        assert column.isnan().tolist() == [False, False, True]
    assert statistics.photos[2].tolist() == [NO_PHOTO] * 12


@pytest.mark.parametrize("channels", [1, 5])
def test_networks_that_see_other_than_three_channels(channels: int) -> None:
    net = nn.Sequential(nn.Conv2d(channels, 2, 3)).double()
    photos = random_photos(6, 6, channels)
    model = small_model(net, 6, channels_in=channels)
    result = evidence(model, photos, "*", top=2)
    check_by_hand(result[".0"], activations_one_by_one(model, photos, ".0"), photos, 2)
    assert Image.open(io.BytesIO(result.sheets["crops_0_0.webp"])).size == (128, 128)


def test_the_layers_of_a_pass_are_separated(small_net: nn.Sequential) -> None:
    two_layers = plan_photo_pass(small_model(small_net), random_photos(5), [0, ".4"])
    both = list(layer_statistics(two_layers, next(two_layers.partials([0]))))
    assert [len(statistics.mean) for statistics in both] == [6, 8]
    one_layer = plan_photo_pass(small_model(small_net), random_photos(5), [".4"])
    alone = next(layer_statistics(one_layer, next(one_layer.partials([0]))))
    assert torch.equal(both[1].photos, alone.photos)


def test_files_hold_the_whole_result(small_net: nn.Sequential) -> None:
    result = evidence(small_model(small_net), random_photos(12), "[034]", size=6, top=3)
    copy = Evidence.from_files(result.files())
    assert copy.files() == result.files()
    assert copy.about == result.about
    assert list(copy) == [".0", ".3", ".4"]
    assert torch.equal(copy[".4"].quantiles, result[".4"].quantiles)


def test_evidence_of_older_stores_without_whole_photos_is_read_as_it_is(
    small_net: nn.Sequential, tmp_path: Path
) -> None:
    store, model, photos = open_store(tmp_path, create=True), small_model(small_net), GeneratedPhotos(30)
    new = evidence(model, photos, [0])
    about = {key: value for key, value in new.about.items() if key != "thumbnails"}
    sheets = {name: content for name, content in new.sheets.items() if name.startswith("crops")}
    old = replace(new, about=about, sheets=sheets)
    assert {*new.files()} - {*old.files()} == {"photos_0.webp"}
    store.put("evidence", old.digest, old.files(), {})
    photos.requested.clear()
    stored = evidence(model, photos, [0], store=store)
    assert len(photos.requested) <= 3  # for the spec
    assert stored.files() == old.files()
    assert load_evidence(store, old.digest, sheets=False).about == about
