"""The filter view: its pictures, photos and kernels are the store's, and its command renders the filter again."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli_runner import command_line
from page_store import FIRST, SECOND, OlderReader, atlas_id, cut, filter_picture, nearest_index, reader
from phosphene.atlases.verdicts import THRESHOLDS, Verdict
from phosphene.errors import EntryNotFound
from phosphene.inspection.kernels import BLUE, ORANGE, kernels
from phosphene.network.layers import Layer
from phosphene.rendering.recipes import find_recipe
from phosphene.storage.store import open_store
from phosphene.web.store_reader import StoreReader
from phosphene.web.urls import SpriteTile
from phosphene.web.views.atlas import labelled_meanings
from phosphene.web.views.filter import (
    command,
    field_box,
    filter_view,
    layer_from_facts,
    photo_size_sentence,
    unrendered_view,
    verdict_figures,
)
from tiny_atlas import NETS, tiny_model

__all__ = ["atlas_id", "cut", "reader"]

FACTS: dict[str, Any] = {
    "path": "conv",
    "kind": "Conv2d",
    "convolution": True,
    "channels": 8,
    "size": [24, 24],
    "receptive_field": {"size": [5, 5], "stride": [1, 1], "padding": [2, 2]},
    "sees": "part",
    "in_place": None,
}


def test_a_film_ends_in_the_filter_s_own_picture(
    reader: StoreReader, atlas_id: str, cut: Callable[[SpriteTile], np.ndarray]
) -> None:
    pictures = [filter_picture(reader, atlas_id, SECOND, n) for n in range(8)]
    for n in range(8):
        film = filter_view(reader, atlas_id, SECOND, n)["film"]
        assert (film[0].step, film[-1].step) == (0, 3)
        assert nearest_index(cut(film[-1].tile), pictures) == n
        assert film[0].tile.file.endswith("/film_0.webp" if n < 4 else "/film_4.webp")
        assert np.abs(cut(film[0].tile) - pictures[n]).mean() > np.abs(cut(film[-1].tile) - pictures[n]).mean()


def test_strong_photos_are_framed_where_the_filter_answers(
    reader: StoreReader, atlas_id: str, cut: Callable[[SpriteTile], np.ndarray]
) -> None:
    (folder,) = Path(reader.stores[0].url).parent.glob("photos")
    names = ["a.png", "b.png", "c.png", "d.png"]
    photos = [np.asarray(Image.open(folder / name), dtype=float) for name in names]
    evidence = reader.evidence(atlas_id)
    assert evidence
    for n in range(8):
        strong = filter_view(reader, atlas_id, SECOND, n)["photos"]
        assert len(strong) == 4
        statistics = evidence[SECOND]
        for rank, example in enumerate(strong):
            photo = int(statistics.photos[n, rank])
            row, column = statistics.positions[n, rank].tolist()
            assert example.name == names[photo]
            assert nearest_index(cut(example.thumbnail), photos) == photo  # 16 px are kept as they are
            top, left, bottom, right = max(0, row - 2), max(0, column - 2), min(16, row + 3), min(16, column + 3)
            assert example.box == (example.thumbnail.x + left, example.thumbnail.y + top, right - left, bottom - top)
            if (bottom - top, right - left) == (5, 5):  # the crop is that part, enlarged as squares
                part = Image.fromarray(photos[photo][top:bottom, left:right].astype(np.uint8)).resize((64, 64), 0)
                assert np.abs(cut(example.crop) - np.asarray(part, dtype=float)).mean() < 25


def test_a_frame_is_scaled_with_its_photo_and_held_inside_it() -> None:
    layer, tile = layer_from_facts(FACTS), SpriteTile("f", 12, 0, 12, 12, (24, 12))
    assert field_box(layer, (0, 3), (24, 24), tile) == (12.5, 0, 2.5, 1.5)  # rows -2 to 2, columns 1 to 5
    assert field_box(layer_from_facts({**FACTS, "receptive_field": None}), (0, 3), (24, 24), tile) == (12, 0, 12, 12)


def test_it_is_said_at_which_size_the_network_saw_the_photos(reader: StoreReader, atlas_id: str) -> None:
    """The frame is told where it is a part of the photo."""
    assert filter_view(reader, atlas_id, SECOND, 0)["photo_size"] == (
        "The network saw these photos at 16×16 px, the size of the picture; the frame is the 5×5 px that the filter "
        "sees there."
    )
    evidence = reader.evidence(atlas_id)
    assert evidence
    sentence = "The network saw these photos at 16×16 px"
    wide = {**FACTS, "receptive_field": {**FACTS["receptive_field"], "size": [16, 16]}}
    assert photo_size_sentence(evidence, wide, (24, 24)) == f"{sentence}; the frame is the part that the filter sees."
    older = OlderReader(reader.stores).evidence(atlas_id)
    assert photo_size_sentence(older, FACTS, (24, 24)) == f"{sentence}."


def test_a_layer_is_read_as_it_was_written() -> None:
    layer = layer_from_facts(FACTS)
    assert isinstance(layer, Layer)
    assert layer.receptive_field
    assert (layer.size, layer.receptive_field.size, str(layer.receptive_field)) == ((24, 24), (5, 5), "5 / 1 / 2")


def test_kernels_are_the_weights(reader: StoreReader, atlas_id: str, cut: Callable[[SpriteTile], np.ndarray]) -> None:
    weights = kernels(tiny_model(), SECOND).weights.double().numpy()  # (8, 6, 3, 3)
    for n in (0, 5):
        view = filter_view(reader, atlas_id, SECOND, n)["kernels"]
        scale = np.abs(weights[n]).max()
        norms = np.sqrt((weights[n] ** 2).sum((1, 2)))
        assert [tile.channel for tile in view["tiles"]] == np.argsort(-norms).tolist()
        assert (view["total"], view["colours"], view["scale"]) == (6, False, f"{scale:.3g}")
        for tile in view["tiles"]:
            weight = weights[n, tile.channel][..., None] / scale
            ends = np.where(weight > 0, np.array(ORANGE), np.array(BLUE))
            assert np.abs(cut(tile.tile) - (255 - np.abs(weight) * (255 - ends))).max() <= 0.5 + 1e-6
    first = filter_view(reader, atlas_id, FIRST, 2)["kernels"]
    (only,) = first["tiles"]
    weight = kernels(tiny_model(), FIRST).weights[2].double().permute(1, 2, 0).numpy()
    assert (first["colours"], only.channel) == (True, None)
    assert np.abs(cut(only.tile) - (weight / np.abs(weight).max() + 1) / 2 * 255).max() <= 0.5 + 1e-4


def test_a_filter_leads_to_those_beside_it_and_its_layer(reader: StoreReader, atlas_id: str) -> None:
    first, last = filter_view(reader, atlas_id, FIRST, 0), filter_view(reader, atlas_id, FIRST, 5)
    assert (first["before"], first["after"]) == (False, (1, f"atlas/{atlas_id}/~2E0/1.html"))
    assert (last["before"], last["after"]) == ((4, f"atlas/{atlas_id}/~2E0/4.html"), False)
    assert first["layer"] == f"atlas/{atlas_id}/~2E0/index.html"


def test_what_was_not_drawn_is_known_by_its_layer_alone(reader: StoreReader, atlas_id: str) -> None:
    view = unrendered_view(reader, atlas_id, "elsewhere", 7)
    assert (view["rendered"], view["layer"], view["recipe"]["name"]) == (False, None, "fourier")
    assert view["after"] == (8, f"atlas/{atlas_id}/elsewhere/8.html")
    with pytest.raises(EntryNotFound, match=r"there is no filter 6 in \.0: it has 0 to 5"):
        unrendered_view(reader, atlas_id, FIRST, 6)
    smaller = Fewer(reader.stores)  # of the same weights, and it has the first layer alone
    assert unrendered_view(smaller, "1" * 12, SECOND, 7)["after"] is False
    assert unrendered_view(smaller, "1" * 12, SECOND, 7)["layer"] is None
    with pytest.raises(EntryNotFound, match=r"there is no filter 8 in \.2: it has 0 to 7"):
        unrendered_view(smaller, "1" * 12, SECOND, 8)
    with pytest.raises(EntryNotFound, match=r"no picture of filter 6 of \.0; it has 6"):
        filter_view(reader, atlas_id, FIRST, 6)


def test_figures_that_there_are_not_are_left_out() -> None:
    verdict = Verdict(3, "filter_3", "weak", 12.5, None, 0.25, 2, None, None)
    limits = {"excitation": 0.75, "stability": 0.6, "outdone": 0.5, "agreement": 0.5}
    assert [(name, value) for name, value, _ in verdict_figures(verdict, limits)] == [
        ("score", "12.5"),
        ("stability", "0.25"),
        ("rank among pictures", "2"),
    ]
    assert labelled_meanings(limits)["rank among filters"].endswith("it is weak. (In tables: own.)")
    assert THRESHOLDS.excitation == 0.75


class Fewer(StoreReader):
    """A reader with one more atlas, 111111111111, which has only the first layer of the other."""

    def atlas(self, atlas_id: str) -> Any:
        if atlas_id != "1" * 12:
            return super().atlas(atlas_id)
        whole = super().atlas(next(iter(self.locations())))
        return {**whole, "layers": whole["layers"][:1]}


@pytest.mark.parametrize(
    ("loading", "facets"),
    [
        ("", ""),
        (" --weights none --mean 0.5,0.4,0.3 --std 0.25 --input-size 24x32 --channels-in 3", ""),
        ("", " --facets 2"),
    ],
)
def test_the_command_draws_the_same_picture_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, loading: str, facets: str
) -> None:
    run = command_line(monkeypatch, capsys, tmp_path, NETS, "nets_again")
    options = ("--size", "16", "--steps", "4", "--seed", "3", "--precision", "fp32", "--workers", "0", "--quiet")
    how = (*loading.split(), *facets.split(), *options)
    run("atlas", "nets_again:tiny", "--store", "s", "--layers", ".2", "--recipe", "fast", *how)
    reader = StoreReader([open_store("s")])
    (atlas,) = reader.atlases()
    typed = filter_view(reader, atlas.atlas_id, SECOND, 5)["command"]
    assert typed == (
        f"phosphene filters nets_again:tiny .2{loading} --channels 5 --recipe fast --size 16 --steps 4 --seed 3 "
        f"--precision fp32{facets}"
    )
    assert run(*shlex.split(typed)[1:], "--out", "again", "--quiet").code == 0
    again = np.asarray(Image.open("again/layer_.2_filter_5.png"), dtype=float)
    assert np.abs(again - filter_picture(reader, atlas.atlas_id, SECOND, 5)).max() <= 1


def test_no_command_is_told_that_would_draw_another_picture(reader: StoreReader, atlas_id: str) -> None:
    recipe = find_recipe("fast").with_settings(steps=3)
    facts = {**recipe.as_dict(), "digest": recipe.digest}
    atlas = {"model": "timm/a b", "recipe": facts, "size": None}
    job = {**reader.filter(atlas_id, FIRST, 1).job, "recipe": facts}
    assert command(atlas, "conv 1", 1, job) == (
        "phosphene filters 'timm/a b' 'conv 1' --channels 1 --recipe fast --steps 3 --seed 0 --precision fp32"
    )
    for changes in ({"model": "Sequential"}, {"recipe": {**facts, "digest": "of another"}}):
        assert command({**atlas, **changes}, "conv", 1, job) is None
    unknown = {**facts, "name": "mine"}
    assert command({**atlas, "recipe": unknown}, "conv", 1, {**job, "recipe": unknown}) is None


def test_a_store_of_an_earlier_version_has_no_film_kernels_or_whole_photos(reader: StoreReader, atlas_id: str) -> None:
    view = filter_view(OlderReader(reader.stores), atlas_id, SECOND, 3)
    assert (view["film"], view["kernels"]) == ([], None)
    assert [photo.thumbnail for photo in view["photos"]] == [None] * 4
