"""The contexts of the index, network and layer templates: plain values; `views.filter` has those of one filter."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from phosphene.atlases.report import facts_of_atlas, facts_of_layer, note_on_layer, notes_on_atlas, verdicts_of
from phosphene.atlases.verdict_text import SIGNS, VerdictShare, figure_meanings, verdict_shares, verdict_words
from phosphene.atlases.verdicts import Verdict
from phosphene.errors import PhospheneError
from phosphene.web.store_reader import AtlasFacts, StoreReader
from phosphene.web.urls import SpriteTile, file_href, filter_href, layer_href, network_href, tile_of

CARD_PICTURES = 10
LABELS = {"retrieval": "rank among pictures", "own": "rank among filters"}


class Thumbnail(NamedTuple):
    """A filter's picture that links to its page."""

    path: str
    channel: int
    href: str
    tile: SpriteTile


class AtlasCard(NamedTuple):
    """An atlas on the index page."""

    href: str
    model: str
    summary: str
    shares: Sequence[VerdictShare]
    thumbnails: Sequence[Thumbnail]


class LayerRow(NamedTuple):
    """A layer on the network page; `filters` counts those with pictures, and `drawn` says so unless all have one."""

    path: str
    href: str
    facts: Mapping[str, str]
    filters: int
    drawn: str
    shares: Sequence[VerdictShare]
    thumbnails: Sequence[Thumbnail]


class FilterCell(NamedTuple):
    """A filter on the layer page; `label` describes it in words."""

    channel: int
    verdict: str
    sign: str
    label: str
    tile: SpriteTile
    excitation: float | None
    stability: float | None
    score: float | None


def layer_thumbnails(atlas_id: str, row: Mapping[str, Any]) -> list[Thumbnail]:
    """Return a layer's strip of pictures; stores written by earlier versions have none."""
    strip, path = row.get("strip"), row["path"]
    if not strip:
        return []
    channels, file = strip["channels"], file_href(atlas_id, path, strip["file"])
    tiles = (tile_of(file, strip["tile"], strip["columns"], len(channels), index) for index in range(len(channels)))
    return [
        Thumbnail(path, channel, filter_href(atlas_id, path, channel), tile)
        for channel, tile in zip(channels, tiles, strict=True)
    ]


def atlas_cards(reader: StoreReader) -> list[AtlasCard]:
    """Return the cards of all atlases; where two would read alike, both give the atlas' id."""
    atlases = reader.atlases()
    cards = [atlas_card(atlas, photos_phrase(reader, atlas.atlas_id)) for atlas in atlases]
    counts = Counter((card.model, card.summary) for card in cards)
    return [
        card if counts[card.model, card.summary] == 1 else card._replace(summary=f"{card.summary}, {atlas.atlas_id}")
        for card, atlas in zip(cards, atlases, strict=True)
    ]


def photos_phrase(reader: StoreReader, atlas_id: str) -> str:
    """Return the number of photos of an atlas in words; if the evidence is damaged, the index is shown all the same."""
    count, _ = photo_count(reader, atlas_id)
    return {"unknown": "with photos", "none": "without photos", "1": "1 photo"}.get(count, f"{count} photos")


def photo_count(reader: StoreReader, atlas_id: str) -> tuple[str, str]:
    """Return how many photos the network of an atlas was shown, and a sentence on damaged evidence or nothing."""
    try:
        photos = reader.photos(atlas_id)
    except PhospheneError as error:
        return "unknown", evidence_error_sentence(error)
    return "none" if photos is None else f"{photos:,}", ""


def evidence_error_sentence(error: PhospheneError) -> str:
    """Return the sentence on evidence that cannot be read."""
    return f"What photos do to this network cannot be shown: {error}."


def quantity(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 layer" or "1,080 filters"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def atlas_card(atlas: AtlasFacts, photos: str) -> AtlasCard:
    """Return the card of an atlas: thumbnails from all its layers, evenly spread."""
    manifest = atlas.manifest
    thumbnails = [thumbnail for row in manifest["layers"] for thumbnail in layer_thumbnails(atlas.atlas_id, row)]
    last = len(thumbnails) - 1
    chosen = sorted({round(index * last / (CARD_PICTURES - 1)) for index in range(CARD_PICTURES)})
    filters, recipe = sum(map(judged_filters, manifest["layers"])), manifest["recipe"]
    contents = f"{quantity(len(manifest['layers']), 'layer')}, {quantity(filters, 'filter')}"
    return AtlasCard(
        network_href(atlas.atlas_id),
        manifest["model"],
        f"{contents}, {recipe['name']}, {manifest['size'] or recipe['sizes'][-1]} px, {photos}",
        verdict_shares(manifest["verdicts"]),
        [thumbnails[index] for index in chosen] if thumbnails else [],
    )


def judged_filters(row: Mapping[str, Any]) -> int:
    """Return how many filters of a layer have verdicts."""
    return sum(row["verdicts"].values())


def drawn_sentence(drawn: int, channels: int) -> str:
    """Return how many filters have pictures; nothing if all have, or if it is not known because none was judged."""
    return f"{drawn:,} of {channels:,} filters drawn" if 0 < drawn < channels else ""


def layer_rows(atlas_id: str, manifest: Mapping[str, Any]) -> list[LayerRow]:
    """Return the layers of an atlas, in the order of the forward pass."""
    return [
        LayerRow(
            row["path"],
            layer_href(atlas_id, row["path"]),
            facts_of_layer(row),
            judged_filters(row),
            drawn_sentence(judged_filters(row), row["channels"]),
            verdict_shares(row["verdicts"]),
            layer_thumbnails(atlas_id, row),
        )
        for row in manifest["layers"]
    ]


def network_view(reader: StoreReader, atlas_id: str) -> dict[str, Any]:
    """Return the context of `network.html`."""
    manifest, rows = reader.atlas(atlas_id), layer_rows(atlas_id, reader.atlas(atlas_id))
    filters = sum(row.filters for row in rows)
    photos, damage = photo_count(reader, atlas_id)
    limits = reader.layer(atlas_id, rows[0].path)["thresholds"] if rows else {}
    return {
        "atlas_id": atlas_id,
        "title": manifest["model"],
        "facts": facts_of_atlas(manifest, filters, photos),
        "notes": [*notes_on_atlas(manifest), *([damage] if damage else [])],
        "shares": verdict_shares(manifest["verdicts"]),
        "drawn": drawn_sentence(filters, sum(row["channels"] for row in manifest["layers"])),
        "meanings": labelled_meanings(limits) if limits else {},
        "rows": rows,
    }


def layer_view(reader: StoreReader, atlas_id: str, path: str) -> dict[str, Any]:
    """Return the context of `layer.html`."""
    manifest = reader.layer(atlas_id, path)
    verdicts = verdicts_of(manifest)
    before, after = neighbours([row["path"] for row in reader.atlas(atlas_id)["layers"]], path)
    return {
        "atlas_id": atlas_id,
        "title": reader.atlas(atlas_id)["model"],
        "path": path,
        "facts": facts_of_layer(manifest["layer"]),
        "note": note_on_layer(manifest),
        "shares": verdict_shares(Counter(verdict.verdict for verdict in verdicts)),
        "drawn": drawn_sentence(len(manifest["pictures"]), manifest["layer"]["channels"]),
        "meanings": labelled_meanings(manifest["thresholds"]),
        "cells": [filter_cell(*pair) for pair in zip(verdicts, sheet_tiles(atlas_id, manifest), strict=True)],
        "judged": bool(manifest["verdicts"]),
        "excitation": any(verdict.excitation is not None for verdict in verdicts),
        "before": before and (before, layer_href(atlas_id, before)),
        "after": after and (after, layer_href(atlas_id, after)),
    }


def labelled_meanings(limits: Mapping[str, float]) -> dict[str, str]:
    """Return how to read each figure, by its label on the page; tables have shorter names."""
    return {
        LABELS.get(name, name): f"{text} (In tables: {name}.)" if name in LABELS else text
        for name, text in figure_meanings(limits).items()
    }


def neighbours(values: Sequence[Any], value: Any) -> tuple[Any, Any]:
    """Return the values before and after one of `values`, None at either end."""
    index = values.index(value)
    return values[index - 1] if index else None, values[index + 1] if index + 1 < len(values) else None


def sheet_tiles(atlas_id: str, manifest: Mapping[str, Any]) -> Iterator[SpriteTile]:
    """Yield the tiles of a layer's pictures, in their order."""
    for sheet in manifest["sheets"]:
        file = file_href(atlas_id, manifest["layer"]["path"], sheet["file"])
        for index in range(len(sheet["channels"])):
            yield tile_of(file, sheet["tile"], sheet["columns"], len(sheet["channels"]), index)


def filter_cell(verdict: Verdict, tile: SpriteTile) -> FilterCell:
    """Return the cell of a filter on the layer page."""
    name, channel = verdict.verdict, verdict.channel
    label = f"filter {channel}, {verdict_words(name) or 'not judged'}"
    if verdict.excitation is not None:
        label += f", excitation {verdict.excitation:.1f}"
    figures = verdict.excitation, verdict.stability, verdict.score
    return FilterCell(channel, name, SIGNS.get(name, ""), label, tile, *figures)
