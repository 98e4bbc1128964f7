"""What the views show: the tiles lie where the pictures are, the figures are the store's, a filter can be remade."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli_runner import command_line
from page_store import FIRST, SECOND, filled
from phosphene.atlases.verdicts import THRESHOLDS, Verdict
from phosphene.errors import EntryNotFound
from phosphene.images.encode import decode_image
from phosphene.inspection.kernels import BLUE, ORANGE, kernels
from phosphene.network.layers import Layer
from phosphene.rendering.recipes import find_recipe
from phosphene.storage.store import open_store
from phosphene.web.cache import SizedCache
from phosphene.web.store_reader import Filter, StoreReader
from phosphene.web.urls import SpriteTile, tile_of
from phosphene.web.views.atlas import (
    atlas_card,
    atlas_cards,
    drawn_sentence,
    figure_meanings,
    layer_view,
    neighbours,
    network_view,
    verdict_shares,
)
from phosphene.web.views.filter import (
    command,
    field_box,
    filter_view,
    layer_from_facts,
    photo_size_sentence,
    unrendered_view,
    verdict_figures,
)
from tiny_atlas import NETS, tiny_atlas, tiny_model

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


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    return StoreReader([filled(tmp_path_factory.mktemp("views"))])


@pytest.fixture(scope="module")
def atlas_id(reader: StoreReader) -> str:
    return reader.atlases()[0].atlas_id


@pytest.fixture(scope="module")
def cut(reader: StoreReader, atlas_id: str) -> Callable[[SpriteTile], np.ndarray]:
    """Return what gives the pixels of a tile, out of the file that it names."""
    read = SizedCache[Image.Image](1000)

    def content(path: str) -> bytes:
        match path.split("/"):
            case ["atlas", _, slug, name]:
                layer = slug.replace("~2E", ".")
                return (
                    reader.job_file(atlas_id, layer, int(name[5:-5]), "film.webp")
                    if name.startswith("film_")
                    else reader.file(atlas_id, layer, name)
                )
            case [_, digest, name]:
                return reader.evidence_file(digest, name)
        raise AssertionError(path)

    def pixels(tile: SpriteTile) -> np.ndarray:
        image = read.get(tile.file, lambda _: (decode_image(content(tile.file)).convert("RGB"), 1))
        assert image.size == tile.whole
        return np.asarray(image.crop((tile.x, tile.y, tile.x + tile.width, tile.y + tile.height)), dtype=float)

    return pixels


def picture(reader: StoreReader, atlas_id: str, path: str, n: int) -> np.ndarray:
    return np.asarray(decode_image(reader.job_file(atlas_id, path, n, f"filter_{n}.png")).convert("RGB"), dtype=float)


def nearest_of(image: np.ndarray, many: list[np.ndarray]) -> int:
    return int(np.argmin([np.abs(image - one).mean() for one in many]))


def test_a_tile_is_counted_row_by_row() -> None:
    assert tile_of("f", (10, 6), 4, 11, 6) == SpriteTile("f", 20, 6, 10, 6, (40, 18))


def test_parts_stand_side_by_side_on_a_bar_of_100() -> None:
    vivid, unstable, weak, dead = verdict_shares({"vivid": 3, "dead": 1})
    assert (vivid.filters, vivid.left, vivid.share, vivid.percent) == (3, 0, 75, "75 %")
    assert (unstable.filters, weak.filters) == (0, 0)
    assert (dead.filters, dead.left, dead.share, dead.sign) == (1, 75, 25, "✕")
    assert [one.share for one in verdict_shares({})] == [0, 0, 0, 0]


def test_each_cell_of_a_layer_shows_its_own_filter(
    reader: StoreReader, atlas_id: str, cut: Callable[[SpriteTile], np.ndarray]
) -> None:
    for path, count in ((FIRST, 6), (SECOND, 8)):
        cells = layer_view(reader, atlas_id, path)["cells"]
        pictures = [picture(reader, atlas_id, path, n) for n in range(count)]
        assert [one.channel for one in cells] == list(range(count))
        assert [nearest_of(cut(one.tile), pictures) for one in cells] == list(range(count))


def test_a_cell_has_the_figures_of_its_verdict(reader: StoreReader, atlas_id: str) -> None:
    for one, verdict in zip(
        layer_view(reader, atlas_id, SECOND)["cells"], reader.verdicts(atlas_id, SECOND), strict=True
    ):
        assert (one.excitation, one.stability, one.score) == (verdict.excitation, verdict.stability, verdict.score)
        assert one.label == f"filter {verdict.channel}, {verdict.verdict}, excitation {verdict.excitation:.1f}"


def test_strips_show_their_filters(reader: StoreReader, atlas_id: str, cut: Callable[[SpriteTile], np.ndarray]) -> None:
    for row in network_view(reader, atlas_id)["rows"]:
        pictures = [picture(reader, atlas_id, row.path, n) for n in range(6 if row.path == FIRST else 8)]
        assert row.thumbnails
        for face in row.thumbnails:
            assert nearest_of(cut(face.tile), pictures) == face.channel
            assert face.href.endswith(f"/{face.channel}.html")
    faces = atlas_card(reader.atlases()[0], "").thumbnails
    assert [one.path for one in faces] == sorted(one.path for one in faces)
    assert {one.path for one in faces} == {FIRST, SECOND}


def test_the_network_view_tells_what_the_atlas_is(reader: StoreReader, atlas_id: str) -> None:
    view = network_view(reader, atlas_id)
    assert view["facts"]["filters"] == "14, of 2 layers"
    assert view["facts"]["photos"] == "4"
    assert [(one.path, one.filters, one.facts["sees"]) for one in view["rows"]] == [
        (FIRST, 6, "3×3 px"),
        (SECOND, 8, "5×5 px"),
    ]
    assert sum(one.filters for one in view["shares"]) == 14
    assert [one.summary for one in atlas_cards(reader)] == ["2 layers, 14 filters, fourier, 16 px, 4 photos"]
    assert view["drawn"] == ""


def test_atlases_of_one_network_are_told_apart(reader: StoreReader, atlas_id: str, tmp_path: Path) -> None:
    """By their layers, size and photos; those that differ in what the card does not tell by their addresses."""
    store = open_store(shutil.copytree(reader.stores[0].url, tmp_path / "store"))
    manifest = store.manifest("atlases", store.done("atlases").pop())
    store.put("atlases", "1" * 32, {}, {**manifest, "precision": "bf16"})
    store.put("atlases", "2" * 32, {}, {**manifest, "evidence": None, "layers": manifest["layers"][:1], "size": 64})
    store.put("atlases", "3" * 32, {}, {**manifest, "evidence": "0" * 32})
    told = {one.href.split("/")[1]: one.summary for one in atlas_cards(StoreReader([store]))}
    assert told == {
        atlas_id: f"2 layers, 14 filters, fourier, 16 px, 4 photos, {atlas_id}",
        "1" * 12: f"2 layers, 14 filters, fourier, 16 px, 4 photos, {'1' * 12}",
        "2" * 12: "1 layer, 6 filters, fourier, 64 px, without photos",
        "3" * 12: "2 layers, 14 filters, fourier, 16 px, with photos",
    }


def test_how_many_filters_are_drawn_is_said_where_not_all_are() -> None:
    assert drawn_sentence(24, 1080) == "24 of 1,080 filters drawn"
    assert drawn_sentence(80, 80) == drawn_sentence(0, 80) == ""


def test_a_film_ends_in_the_filter_s_own_picture(
    reader: StoreReader, atlas_id: str, cut: Callable[[SpriteTile], np.ndarray]
) -> None:
    pictures = [picture(reader, atlas_id, SECOND, n) for n in range(8)]
    for n in range(8):
        film = filter_view(reader, atlas_id, SECOND, n)["film"]
        assert (film[0].step, film[-1].step) == (0, 3)
        assert nearest_of(cut(film[-1].tile), pictures) == n
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
        found = evidence[SECOND]
        for rank, one in enumerate(strong):
            photo = int(found.photos[n, rank])
            row, column = found.positions[n, rank].tolist()
            assert one.name == names[photo]
            assert nearest_of(cut(one.thumbnail), photos) == photo  # 16 px are kept as they are
            top, left, bottom, right = max(0, row - 2), max(0, column - 2), min(16, row + 3), min(16, column + 3)
            assert one.box == (one.thumbnail.x + left, one.thumbnail.y + top, right - left, bottom - top)
            if (bottom - top, right - left) == (5, 5):  # the crop is that part, enlarged as squares
                part = Image.fromarray(photos[photo][top:bottom, left:right].astype(np.uint8)).resize((64, 64), 0)
                assert np.abs(cut(one.crop) - np.asarray(part, dtype=float)).mean() < 25


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
    said = "The network saw these photos at 16×16 px"
    wide = {**FACTS, "receptive_field": {**FACTS["receptive_field"], "size": [16, 16]}}
    assert photo_size_sentence(evidence, wide, (24, 24)) == f"{said}; the frame is what of that the filter sees."
    older = Older(reader.stores).evidence(atlas_id)
    assert photo_size_sentence(older, FACTS, (24, 24)) == f"{said}."


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
        assert [one.channel for one in view["tiles"]] == np.argsort(-norms).tolist()
        assert (view["total"], view["colours"], view["scale"]) == (6, False, f"{scale:.3g}")
        for one in view["tiles"]:
            weight = weights[n, one.channel][..., None] / scale
            ends = np.where(weight > 0, np.array(ORANGE), np.array(BLUE))
            assert np.abs(cut(one.tile) - (255 - np.abs(weight) * (255 - ends))).max() <= 0.5 + 1e-6
    first = filter_view(reader, atlas_id, FIRST, 2)["kernels"]
    (only,) = first["tiles"]
    own = kernels(tiny_model(), FIRST).weights[2].double().permute(1, 2, 0).numpy()
    assert (first["colours"], only.channel) == (True, None)
    assert np.abs(cut(only.tile) - (own / np.abs(own).max() + 1) / 2 * 255).max() <= 0.5 + 1e-4


def test_neighbours() -> None:
    assert [neighbours([3, 5, 8], one) for one in (3, 5, 8)] == [(None, 5), (3, 8), (5, None)]


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
    one = Verdict(3, "filter_3", "weak", 12.5, None, 0.25, 2, None, None)
    limits = {"excitation": 0.75, "stability": 0.6, "outdone": 0.5, "agreement": 0.5}
    assert [(name, value) for name, value, _ in verdict_figures(one, limits)] == [
        ("score", "12.5"),
        ("stability", "0.25"),
        ("rank among pictures", "2"),
    ]
    assert figure_meanings(limits)["rank among filters"].endswith("it is weak. (In tables: own.)")
    assert THRESHOLDS.excitation == 0.75


def test_a_store_of_before_has_no_film_strip_or_kernels(reader: StoreReader, atlas_id: str) -> None:
    older = Older(reader.stores)
    view = filter_view(older, atlas_id, SECOND, 3)
    assert (view["film"], view["kernels"]) == ([], None)
    assert [one.thumbnail for one in view["photos"]] == [None] * 4
    assert [one.thumbnails for one in network_view(older, atlas_id)["rows"]] == [[], []]
    assert atlas_card(older.atlases()[0], "").thumbnails == []


class Fewer(StoreReader):
    """A reader with one more atlas, 111111111111, which has only the first layer of the other."""

    def atlas(self, atlas_id: str) -> Any:
        if atlas_id != "1" * 12:
            return super().atlas(atlas_id)
        whole = super().atlas(next(iter(self.locations())))
        return {**whole, "layers": whole["layers"][:1]}


class Older(StoreReader):
    """A reader over stores that were written before there were films, strips, kernels and whole photos."""

    def atlas(self, atlas_id: str) -> Any:
        found = super().atlas(atlas_id)
        rows = [{name: one for name, one in row.items() if name != "strip"} for row in found["layers"]]
        return {**found, "layers": rows}

    def layer(self, atlas_id: str, path: str) -> Any:
        return {name: one for name, one in super().layer(atlas_id, path).items() if name != "kernels"}

    def filter(self, atlas_id: str, path: str, n: int) -> Filter:
        found = super().filter(atlas_id, path, n)
        return found._replace(job={name: one for name, one in found.job.items() if name != "film"})

    def evidence(self, atlas_id: str) -> Any:
        found = super().evidence(atlas_id)
        assert found
        return replace(found, about={name: one for name, one in found.about.items() if name != "thumbnails"})


def test_a_layer_whose_job_failed_shows_the_rest_and_says_so(tmp_path: Path) -> None:
    failing = tiny_atlas(tiny_model()).jobs[1].digest
    reader = StoreReader([filled(tmp_path, failing, names=())])
    (atlas,) = reader.atlases()
    view = layer_view(reader, atlas.atlas_id, FIRST)
    assert [one.channel for one in view["cells"]] == [0, 1, 2, 3]
    assert view["note"] == "1 job of this layer failed; run the atlas again to try once more."
    assert view["drawn"] == filter_view(reader, atlas.atlas_id, FIRST, 3)["drawn"] == "4 of 6 filters drawn"
    network = network_view(reader, atlas.atlas_id)
    assert network["facts"]["filters"] == "12 of 14, of 2 layers"
    assert network["drawn"] == "12 of 14 filters drawn"
    assert [row.drawn for row in network["rows"]] == ["4 of 6 filters drawn", ""]


@pytest.mark.parametrize(
    "loading",
    ["", " --weights none --mean 0.5,0.4,0.3 --std 0.25 --input-size 24x32 --channels-in 3"],
)
def test_the_command_draws_the_same_picture_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, loading: str
) -> None:
    run = command_line(monkeypatch, capsys, tmp_path, NETS, "nets_again")
    options = ("--size", "16", "--steps", "4", "--seed", "3", "--precision", "fp32", "--workers", "0", "--quiet")
    how = (*loading.split(), *options)
    run("atlas", "nets_again:tiny", "--store", "s", "--layers", ".2", "--recipe", "fast", *how)
    reader = StoreReader([open_store("s")])
    (atlas,) = reader.atlases()
    typed = filter_view(reader, atlas.atlas_id, SECOND, 5)["command"]
    assert typed == (
        f"phosphene filters nets_again:tiny .2{loading} --channels 5 --recipe fast --size 16 --steps 4 --seed 3 "
        "--precision fp32"
    )
    assert run(*shlex.split(typed)[1:], "--out", "again", "--quiet").code == 0
    again = np.asarray(Image.open("again/layer_.2_filter_5.png"), dtype=float)
    assert np.abs(again - picture(reader, atlas.atlas_id, SECOND, 5)).max() <= 1


def test_no_command_is_told_that_would_draw_another_picture(reader: StoreReader, atlas_id: str) -> None:
    recipe = find_recipe("fast").at(steps=3)
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
