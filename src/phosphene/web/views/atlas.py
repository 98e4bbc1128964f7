"""What the views of atlases show, as plain values that templates lay out; `portrait` is of one filter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from phosphene.atlases.report import facts_of, facts_of_layer, note_on, notes_of, verdicts_of
from phosphene.atlases.report_page import ORDER, SIGNS, explained, share
from phosphene.atlases.verdicts import Verdict
from phosphene.errors import PhospheneError
from phosphene.web.store_reader import AtlasFacts, StoreReader
from phosphene.web.urls import SpriteTile, file_href, filter_href, layer_href, network_href, tile_of

FACES = 10  # pictures on an atlas' card
LABELS = {"retrieval": "rank among pictures", "own": "rank among filters"}


class VerdictShare(NamedTuple):
    """How many filters of a whole have one verdict: `left` and `share` place it on a bar of 100."""

    verdict: str
    sign: str
    filters: int
    percent: str
    left: float
    share: float


class Thumbnail(NamedTuple):
    """A filter's picture that leads to its view."""

    path: str
    n: int
    href: str
    tile: SpriteTile


class AtlasCard(NamedTuple):
    """What the index shows of an atlas."""

    href: str
    model: str
    told: str
    parts: Sequence[VerdictShare]
    faces: Sequence[Thumbnail]


class LayerRow(NamedTuple):
    """What the network view shows of a layer; `filters` of its filters have pictures, which is `told` if not all."""

    path: str
    href: str
    facts: Mapping[str, str]
    filters: int
    told: str
    parts: Sequence[VerdictShare]
    faces: Sequence[Thumbnail]


class FilterCell(NamedTuple):
    """What the layer view shows of a filter; `said` is all of it in words."""

    n: int
    verdict: str
    sign: str
    said: str
    tile: SpriteTile
    excitation: float | None
    stability: float | None
    score: float | None


def parts_of(counts: Mapping[str, int]) -> list[VerdictShare]:
    """Return how many filters have which verdict, in the order in which they stand on a bar."""
    total, left, parts = sum(counts.get(name, 0) for name in ORDER), 0.0, []
    for name in ORDER:
        count = counts.get(name, 0)
        width = 100 * count / (total or 1)
        parts.append(VerdictShare(name, SIGNS[name], count, share(count, total), left, width))
        left += width
    return parts


def faces_of(d: str, row: Mapping[str, Any]) -> list[Thumbnail]:
    """Return a layer's strip of pictures; a store of before has none."""
    strip, path = row.get("strip"), row["path"]
    if not strip:
        return []
    channels, file = strip["channels"], file_href(d, path, strip["file"])
    return [
        Thumbnail(
            path, n, filter_href(d, path, n), tile_of(file, strip["tile"], strip["columns"], len(channels), index)
        )
        for index, n in enumerate(channels)
    ]


def cards(gallery: StoreReader) -> list[AtlasCard]:
    """Return what the index shows of all atlases; two that are told alike are told with their addresses."""
    atlases = gallery.atlases()
    made = [card(one, photos_of(gallery, one)) for one in atlases]
    alike = Counter((one.model, one.told) for one in made)
    return [
        one if alike[one.model, one.told] == 1 else one._replace(told=f"{one.told}, {atlas.d}")
        for one, atlas in zip(made, atlases, strict=True)
    ]


def photos_of(gallery: StoreReader, atlas: AtlasFacts) -> str:
    """Return with how many photos an atlas was made; the index stands though what tells that is damaged."""
    try:
        photos = gallery.photos(atlas.d)
    except PhospheneError:
        return "with photos"
    return "without photos" if photos is None else counted(photos, "photo")


def seen_photos(gallery: StoreReader, d: str) -> tuple[str, str]:
    """Return how many photos an atlas' network was shown, and what is wrong with what tells that, if anything is."""
    try:
        photos = gallery.photos(d)
    except PhospheneError as error:
        return "unknown", lost_photos(error)
    return "none" if photos is None else f"{photos:,}", ""


def lost_photos(error: PhospheneError) -> str:
    """Return what is wrong with what photos do to a network, as a sentence."""
    return f"What photos do to this network cannot be shown: {error}."


def counted(many: int, name: str) -> str:
    """Return how many there are of something, in words."""
    return f"{many:,} {name}" if many == 1 else f"{many:,} {name}s"


def card(atlas: AtlasFacts, photos: str) -> AtlasCard:
    """Return what the index shows of an atlas: pictures from all its layers, evenly spread."""
    manifest = atlas.manifest
    faces = [face for row in manifest["layers"] for face in faces_of(atlas.d, row)]
    chosen = sorted({round(index * (len(faces) - 1) / (FACES - 1)) for index in range(FACES)}) if faces else []
    filters, recipe = sum(map(drawn, manifest["layers"])), manifest["recipe"]
    told = f"{counted(len(manifest['layers']), 'layer')}, {counted(filters, 'filter')}"
    return AtlasCard(
        network_href(atlas.d),
        manifest["model"],
        f"{told}, {recipe['name']}, {manifest['size'] or recipe['sizes'][-1]} px, {photos}",
        parts_of(manifest["verdicts"]),
        [faces[index] for index in chosen],
    )


def drawn(row: Mapping[str, Any]) -> int:
    """Return how many filters of a layer have verdicts."""
    return sum(row["verdicts"].values())


def told_drawn(some: int, channels: int) -> str:
    """Return how many filters of all have pictures, nothing where all have; of what is not judged that is not known."""
    return f"{some:,} of {channels:,} filters drawn" if 0 < some < channels else ""


def rows(d: str, manifest: Mapping[str, Any]) -> list[LayerRow]:
    """Return what the network view shows of the layers, in the order of the forward pass."""
    return [
        LayerRow(
            row["path"],
            layer_href(d, row["path"]),
            facts_of_layer(row),
            drawn(row),
            told_drawn(drawn(row), row["channels"]),
            parts_of(row["verdicts"]),
            faces_of(d, row),
        )
        for row in manifest["layers"]
    ]


def network_view(gallery: StoreReader, d: str) -> dict[str, Any]:
    """Return what `network.html` shows."""
    manifest, lines = gallery.atlas(d), rows(d, gallery.atlas(d))
    photos, lost = seen_photos(gallery, d)
    limits = gallery.layer(d, lines[0].path)["thresholds"] if lines else {}
    return {
        "d": d,
        "title": manifest["model"],
        "facts": facts_of(manifest, sum(one.filters for one in lines), photos),
        "notes": [*notes_of(manifest), *([lost] if lost else [])],
        "parts": parts_of(manifest["verdicts"]),
        "drawn": told_drawn(sum(one.filters for one in lines), sum(one["channels"] for one in manifest["layers"])),
        "meanings": labelled(limits) if limits else {},
        "rows": lines,
    }


def layer_view(gallery: StoreReader, d: str, path: str) -> dict[str, Any]:
    """Return what `layer.html` shows."""
    manifest = gallery.layer(d, path)
    verdicts = verdicts_of(manifest)
    before, after = neighbours([row["path"] for row in gallery.atlas(d)["layers"]], path)
    return {
        "d": d,
        "title": gallery.atlas(d)["model"],
        "path": path,
        "facts": facts_of_layer(manifest["layer"]),
        "note": note_on(manifest),
        "parts": parts_of(Counter(one.verdict for one in verdicts)),
        "drawn": told_drawn(len(manifest["pictures"]), manifest["layer"]["channels"]),
        "meanings": labelled(manifest["thresholds"]),
        "cells": [cell(*pair) for pair in zip(verdicts, tiles_of(d, manifest), strict=True)],
        "judged": bool(manifest["verdicts"]),
        "excitation": any(one.excitation is not None for one in verdicts),
        "before": before and (before, layer_href(d, before)),
        "after": after and (after, layer_href(d, after)),
    }


def labelled(limits: Mapping[str, float]) -> dict[str, str]:
    """Return how each figure is to be read, by the name that people read; tables have short ones."""
    return {
        LABELS.get(name, name): f"{text} (In tables: {name}.)" if name in LABELS else text
        for name, text in explained(limits).items()
    }


def neighbours(many: Sequence[Any], one: Any) -> tuple[Any, Any]:
    """Return what stands before and after one of many, None where nothing does."""
    at = many.index(one)
    return many[at - 1] if at else None, many[at + 1] if at + 1 < len(many) else None


def tiles_of(d: str, manifest: Mapping[str, Any]) -> Iterator[SpriteTile]:
    """Yield the tiles of a layer's pictures, in their order."""
    for sheet in manifest["sheets"]:
        file = file_href(d, manifest["layer"]["path"], sheet["file"])
        for index in range(len(sheet["channels"])):
            yield tile_of(file, sheet["tile"], sheet["columns"], len(sheet["channels"]), index)


def cell(one: Verdict, tile: SpriteTile) -> FilterCell:
    """Return what the layer view shows of a filter."""
    said = f"filter {one.channel}, {one.verdict or 'not judged'}"
    if one.excitation is not None:
        said += f", excitation {one.excitation:.1f}"
    return FilterCell(
        one.channel, one.verdict, SIGNS.get(one.verdict, ""), said, tile, one.excitation, one.stability, one.score
    )
