"""The report on a store: one page and one table of all verdicts, read from the store alone."""

from __future__ import annotations

import csv
import io
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from PIL import Image

from phosphene.atlases.report_page import Photo, Section, page
from phosphene.atlases.verdicts import THRESHOLDS, Verdict
from phosphene.errors import InvalidRequest
from phosphene.evidence.collect import Evidence, load_evidence
from phosphene.evidence.top_photos import NONE
from phosphene.images.display import Picture
from phosphene.images.encode import decode_image, webp
from phosphene.storage.store import Store

MOST = 8000  # filters that are shown; the table has all
QUALITY = 60
COLUMNS = ("layer", *(field.name for field in fields(Verdict)))
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


class Scale(NamedTuple):
    """How a filter is shown where there are at most so many: its picture, and the strongest photos, sides in pixels."""

    filters: int
    picture: int
    photos: int
    photo: int


SCALES = (Scale(1500, 96, 4, 46), Scale(3000, 72, 2, 34), Scale(5000, 56, 2, 27), Scale(MOST, 44, 2, 21))  # < 25 MB


def report(store: Store, atlas: str | None = None) -> tuple[bytes, bytes]:
    """Return the report on an atlas as an HTML page that needs no other file, and as CSV.

    Args:
        atlas: its digest, or the beginning of it; None where the store holds only one.

    Raises:
        InvalidRequest: the store holds no atlas, or none of that digest, or several.
        EntryNotFound, StoreRefused: an entry that belongs to it is gone, or damaged.
    """
    manifest = store.manifest("atlases", chosen(store, atlas))
    evidence = load_evidence(store, manifest["evidence"], sheets=False) if manifest["evidence"] else None
    layers = [(one["digest"], store.manifest("layers", one["digest"])) for one in manifest["layers"]]
    counts = filters_per_layer([len(layer["pictures"]) for _, layer in layers])
    scale = next(one for one in SCALES if sum(counts) <= one.filters)
    sections = [
        section(store, digest, layer, evidence, scale, count)
        for (digest, layer), count in zip(layers, counts, strict=True)
    ]
    rows = [(one.path, verdict) for one in sections for verdict in one.verdicts]
    seen = f"{evidence.about['seen']:,}" if evidence else "none"
    facts, notes = facts_of(manifest, len(rows), seen), notes_of(manifest)
    limits = layers[0][1]["thresholds"] if layers else asdict(THRESHOLDS)
    html = page(manifest["model"], facts, notes, sections, limits, scale.picture)
    return html.encode(), table(rows)


def section(
    store: Store, digest: str, layer: Mapping[str, Any], evidence: Evidence | None, scale: Scale, count: int
) -> Section:
    """Return what the page shows of a layer, with so many pictures."""
    path, verdicts = layer["layer"]["path"], verdicts_of(layer)
    shown = [one.channel for one in verdicts[:count]]
    return Section(
        path=path,
        facts=facts_of_layer(layer["layer"]),
        note=note_on(layer),
        verdicts=verdicts,
        pictures=[thumbnail(one, scale.picture) for one in tiles(store, digest, layer, count)],
        photos=list(photos(store, evidence, path, shown, scale)) if evidence and path in evidence else [],
    )


def chosen(store: Store, atlas: str | None) -> str:
    """Return the digest of the atlas that is meant.

    Raises:
        InvalidRequest: there is none, or several.
    """
    known = sorted(store.done("atlases"))
    found = [one for one in known if one.startswith(atlas or "")]
    if len(found) == 1:
        return found[0]
    if not known:
        raise InvalidRequest(f"{store.shown('')} holds no finished atlas yet; run `phosphene atlas` to its end first")
    listed = ", ".join(f"{one} ({summary(store.manifest('atlases', one))})" for one in (found or known)[:5])
    if not found:
        raise InvalidRequest(f"{store.shown('')} holds no atlas {atlas!r}; it has {listed}")
    raise InvalidRequest(f"{store.shown('')} holds {len(found)} atlases; name the one that you mean: {listed}")


def summary(manifest: Mapping[str, Any]) -> str:
    """Return what tells one atlas from another, in a few words."""
    evidence = "with photos" if manifest["evidence"] else "without photos"
    return f"{manifest['model']}, {len(manifest['layers'])} layers, recipe {manifest['recipe']['name']}, {evidence}"


def filters_per_layer(counts: Sequence[int], most: int = MOST) -> list[int]:
    """Return how many filters of each layer are shown: all, or where these are too many, of the largest layers less."""
    limits = range(max(counts, default=0) + 1)
    each = bisect_right(limits, most, key=lambda limit: sum(min(count, limit) for count in counts)) - 1
    return [min(count, each) for count in counts]


def verdicts_of(layer: Mapping[str, Any]) -> list[Verdict]:
    """Return the verdicts on a layer's pictures, in the order of its sheets; empty ones where it was not judged."""
    judged = [Verdict(**one) for one in layer["verdicts"]]
    return judged or [
        Verdict(one["channel"], one["picture"], "", one["score"], None, None, None, None, None)
        for one in layer["pictures"]
    ]


def tiles(store: Store, digest: str, layer: Mapping[str, Any], count: int) -> Iterator[Picture]:
    """Yield the first pictures of a layer's sheets."""
    for sheet in layer["sheets"]:
        width, height = sheet["tile"]
        some = min(count, len(sheet["channels"]))
        count -= some
        if some:
            image = decode_image(store.get("layers", digest, sheet["file"]))
            for index in range(some):
                down, right = divmod(index, sheet["columns"])
                left, top = right * width, down * height
                yield image.crop((left, top, left + width, top + height))


def photos(store: Store, evidence: Evidence, path: str, channels: Sequence[int], scale: Scale) -> Iterator[list[Photo]]:
    """Yield the strongest photos of each channel of a layer; one sheet of crops is open at a time."""
    about, numbers = evidence.about, evidence[path].photos
    tile, sheet = about["tile"], ("", Image.new("RGB", (1, 1)))
    for channel in channels:
        number, row = divmod(channel, about["rows"])
        name = about["sheets"][path][number]
        if sheet[0] != name:
            sheet = name, decode_image(store.get("evidence", evidence.digest, name))
        known = [one for one in numbers[channel, : scale.photos].tolist() if one != NONE]
        boxes = [(rank * tile, row * tile, (rank + 1) * tile, (row + 1) * tile) for rank in range(len(known))]
        yield [
            Photo(thumbnail(sheet[1].crop(box), scale.photo), about["names"][str(one)])
            for one, box in zip(known, boxes, strict=True)
        ]


def thumbnail(image: Picture, side: int) -> bytes:
    """Return a picture as WebP bytes, its longer side at most so many pixels; equal input, equal bytes."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return webp(small, QUALITY)


def facts_of_layer(layer: Mapping[str, Any]) -> dict[str, str]:
    """Return what the page tells of a layer beside its path."""
    field = layer["receptive_field"]
    sees = {"whole": "the whole image", "unknown": "unknown"}.get(layer["sees"], "")
    return {
        "kind": layer["kind"],
        "channels": f"{layer['channels']:,}",
        "map": sides(layer["size"]),
        "sees": f"{sides(field['size'])} px" if field else sees,
    }


def sides(pair: Sequence[int]) -> str:
    """Return a height and a width as text."""
    return "×".join(map(str, pair))


def note_on(layer: Mapping[str, Any]) -> str:
    """Return what is to be minded about a layer, empty where nothing is."""
    lost = len(layer["missing"])
    failed = f"{lost} {'job' if lost == 1 else 'jobs'} of this layer failed; run the atlas again to try once more."
    return " ".join(([f"Not judged: {layer['remark']}."] if layer["remark"] else []) + ([failed] if lost else []))


def facts_of(manifest: Mapping[str, Any], pictures: int, photos: str) -> dict[str, str]:
    """Return what the page tells of an atlas with so many pictures; `photos` is how many the network was shown."""
    recipe, seeds = manifest["recipe"], manifest["seeds"]
    drawn = f"{pictures:,}" if pictures == manifest["filters"] else f"{pictures:,} of {manifest['filters']:,}"
    return {
        "filters": f"{drawn}, of {len(manifest['layers']):,} layers",
        "recipe": f"{recipe['name']}, {manifest['precision']}",
        "seeds" if len(seeds) > 1 else "seed": ", ".join(map(str, seeds)),
        "photos": photos,
        "weights": manifest["fingerprint"],
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(manifest["versions"].items())),
    }


def notes_of(manifest: Mapping[str, Any]) -> list[str]:
    """Return what is to be minded about the atlas, as sentences."""
    notes = [f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in manifest["notes"]]
    if manifest["missing"]:
        notes.append(f"Nothing is there of {', '.join(manifest['missing'])}; run the atlas again to try once more.")
    if manifest["evidence"] is None:
        notes.append(
            "Made without photos, so excitation and own are unknown: the verdicts rest on stability, retrieval and "
            "agreement, measured from what a grey picture gives."
        )
    return notes


def table(rows: Sequence[tuple[str, Verdict]]) -> bytes:
    """Return verdicts by layer as CSV; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(COLUMNS)
    writer.writerows([escape_formula(cell) for cell in (path, *asdict(one).values())] for path, one in rows)
    return buffer.getvalue().encode()


def escape_formula(cell: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula; numbers stay numbers, None is empty."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell
