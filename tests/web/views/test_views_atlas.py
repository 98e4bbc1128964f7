"""The index, network and layer views: the tiles lie where the pictures are, the figures are the store's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from page_store import FIRST, SECOND, OlderReader, atlas_id, cut, filled, filter_picture, nearest_index, reader
from phosphene.atlases.verdict_text import verdict_shares, verdict_words
from phosphene.storage.store import open_store
from phosphene.web.store_reader import StoreReader
from phosphene.web.urls import SpriteTile
from phosphene.web.views.atlas import (
    atlas_card,
    atlas_cards,
    drawn_sentence,
    layer_view,
    neighbours,
    network_view,
)
from phosphene.web.views.filter import filter_view
from tiny_atlas import tiny_atlas, tiny_model

__all__ = ["atlas_id", "cut", "reader"]


def test_parts_stand_side_by_side_on_a_bar_of_100() -> None:
    vivid, unstable, weak, plain, dead = verdict_shares({"vivid": 3, "dead": 1})
    assert (vivid.filters, vivid.left, vivid.share, vivid.percent) == (3, 0, 75, "75 %")
    assert (unstable.filters, weak.filters, plain.filters) == (0, 0, 0)
    assert (dead.filters, dead.left, dead.share, dead.sign) == (1, 75, 25, "✕")
    assert [share.share for share in verdict_shares({})] == [0, 0, 0, 0, 0]


def test_each_cell_of_a_layer_shows_its_own_filter(
    reader: StoreReader, atlas_id: str, cut: Callable[[SpriteTile], np.ndarray]
) -> None:
    for path, count in ((FIRST, 6), (SECOND, 8)):
        cells = layer_view(reader, atlas_id, path)["cells"]
        pictures = [filter_picture(reader, atlas_id, path, n) for n in range(count)]
        assert [cell.channel for cell in cells] == list(range(count))
        assert [nearest_index(cut(cell.tile), pictures) for cell in cells] == list(range(count))


def test_a_cell_has_the_figures_of_its_verdict(reader: StoreReader, atlas_id: str) -> None:
    for cell, verdict in zip(
        layer_view(reader, atlas_id, SECOND)["cells"], reader.verdicts(atlas_id, SECOND), strict=True
    ):
        assert (cell.excitation, cell.stability, cell.score) == (verdict.excitation, verdict.stability, verdict.score)
        assert (
            cell.label
            == f"filter {verdict.channel}, {verdict_words(verdict.verdict)}, excitation {verdict.excitation:.1f}"
        )


def test_strips_show_their_filters(reader: StoreReader, atlas_id: str, cut: Callable[[SpriteTile], np.ndarray]) -> None:
    for row in network_view(reader, atlas_id)["rows"]:
        pictures = [filter_picture(reader, atlas_id, row.path, n) for n in range(6 if row.path == FIRST else 8)]
        assert row.thumbnails
        for face in row.thumbnails:
            assert nearest_index(cut(face.tile), pictures) == face.channel
            assert face.href.endswith(f"/{face.channel}.html")
    faces = atlas_card(reader.atlases()[0], "").thumbnails
    assert [thumbnail.path for thumbnail in faces] == sorted(thumbnail.path for thumbnail in faces)
    assert {thumbnail.path for thumbnail in faces} == {FIRST, SECOND}


def test_the_network_view_tells_what_the_atlas_is(reader: StoreReader, atlas_id: str) -> None:
    view = network_view(reader, atlas_id)
    assert view["facts"]["filters"] == "14, of 2 layers"
    assert view["facts"]["photos"] == "4"
    assert [(row.path, row.filters, row.facts["sees"]) for row in view["rows"]] == [
        (FIRST, 6, "3×3 px"),
        (SECOND, 8, "5×5 px"),
    ]
    assert sum(share.filters for share in view["shares"]) == 14
    assert [card.summary for card in atlas_cards(reader)] == ["2 layers, 14 filters, fourier, 16 px, 4 photos"]
    assert view["drawn"] == ""


def test_atlases_of_one_network_are_told_apart(reader: StoreReader, atlas_id: str, tmp_path: Path) -> None:
    """By their layers, size and photos; those that differ in what the card does not tell by their addresses."""
    store = open_store(shutil.copytree(reader.stores[0].url, tmp_path / "store"))
    manifest = store.manifest("atlases", store.done("atlases").pop())
    store.put("atlases", "1" * 32, {}, {**manifest, "precision": "bf16"})
    store.put("atlases", "2" * 32, {}, {**manifest, "evidence": None, "layers": manifest["layers"][:1], "size": 64})
    store.put("atlases", "3" * 32, {}, {**manifest, "evidence": "0" * 32})
    summaries = {card.href.split("/")[1]: card.summary for card in atlas_cards(StoreReader([store]))}
    assert summaries == {
        atlas_id: f"2 layers, 14 filters, fourier, 16 px, 4 photos, {atlas_id}",
        "1" * 12: f"2 layers, 14 filters, fourier, 16 px, 4 photos, {'1' * 12}",
        "2" * 12: "1 layer, 6 filters, fourier, 64 px, without photos",
        "3" * 12: "2 layers, 14 filters, fourier, 16 px, with photos",
    }


def test_how_many_filters_are_drawn_is_said_where_not_all_are() -> None:
    assert drawn_sentence(24, 1080) == "24 of 1,080 filters drawn"
    assert drawn_sentence(80, 80) == drawn_sentence(0, 80) == ""


def test_neighbours() -> None:
    assert [neighbours([3, 5, 8], value) for value in (3, 5, 8)] == [(None, 5), (3, 8), (5, None)]


def test_a_layer_whose_job_failed_shows_the_rest_and_says_so(tmp_path: Path) -> None:
    failing = tiny_atlas(tiny_model()).jobs[1].digest
    reader = StoreReader([filled(tmp_path, failing, names=())])
    (atlas,) = reader.atlases()
    view = layer_view(reader, atlas.atlas_id, FIRST)
    assert [cell.channel for cell in view["cells"]] == [0, 1, 2, 3]
    assert view["note"] == "1 job of this layer failed; run the atlas again to try once more."
    assert view["drawn"] == filter_view(reader, atlas.atlas_id, FIRST, 3)["drawn"] == "4 of 6 filters drawn"
    network = network_view(reader, atlas.atlas_id)
    assert network["facts"]["filters"] == "12 of 14, of 2 layers"
    assert network["drawn"] == "12 of 14 filters drawn"
    assert [row.drawn for row in network["rows"]] == ["4 of 6 filters drawn", ""]


def test_a_store_of_an_earlier_version_has_no_strips(reader: StoreReader, atlas_id: str) -> None:
    older = OlderReader(reader.stores)
    assert [row.thumbnails for row in network_view(older, atlas_id)["rows"]] == [[], []]
    assert atlas_card(older.atlases()[0], "").thumbnails == []
