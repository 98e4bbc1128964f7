"""The report on an atlas: a page and a table of all verdicts, made from its store alone."""

import csv
import io
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from PIL import Image

from phosphene.atlases.report_page import LayerSection, PhotoCrop, page
from phosphene.atlases.verdicts import THRESHOLDS, Verdict
from phosphene.errors import InvalidRequest
from phosphene.evidence.statistics import Evidence, load_evidence
from phosphene.evidence.top_photos import NO_PHOTO
from phosphene.images.display import Picture
from phosphene.images.encode import decode_image, webp
from phosphene.storage.store import Store

MAX_FILTERS = 8000  # on the page; the table has all
QUALITY = 60
COLUMNS = ("layer", *(field.name for field in fields(Verdict)))
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


class Scale(NamedTuple):
    """The scale of a page of up to `filters` filters: pixels of pictures and photos, and photos per filter."""

    filters: int
    picture: int
    photos: int
    photo: int


SCALES = (  # each keeps the page below 25 MB
    Scale(1500, 96, 4, 46),
    Scale(3000, 72, 2, 34),
    Scale(5000, 56, 2, 27),
    Scale(MAX_FILTERS, 44, 2, 21),
)


def report(store: Store, atlas: str | None = None) -> tuple[bytes, bytes]:
    """Return the report on an atlas as an HTML page that needs no other file, and as CSV.

    Args:
        atlas: its digest, or the beginning of it; may be None if the store holds only one.

    Raises:
        InvalidRequest: the store holds no atlas, none of that digest, or several.
        EntryNotFound, StoreRefused: an entry that belongs to it is missing or damaged.
    """
    manifest = store.manifest("atlases", chosen_atlas(store, atlas))
    evidence = load_evidence(store, manifest["evidence"], sheets=False) if manifest["evidence"] else None
    layers = [(row["digest"], store.manifest("layers", row["digest"])) for row in manifest["layers"]]
    counts = filters_per_layer([len(layer["pictures"]) for _, layer in layers])
    scale = next(scale for scale in SCALES if sum(counts) <= scale.filters)
    sections = [
        layer_section(store, digest, layer, evidence, scale, count)
        for (digest, layer), count in zip(layers, counts, strict=True)
    ]
    rows = [(section.path, verdict) for section in sections for verdict in section.verdicts]
    photos = f"{evidence.about['seen']:,}" if evidence else "none"
    facts, notes = facts_of_atlas(manifest, len(rows), photos), notes_on_atlas(manifest)
    limits = layers[0][1]["thresholds"] if layers else asdict(THRESHOLDS)
    html = page(manifest["model"], facts, notes, sections, limits, scale.picture)
    return html.encode(), verdict_csv(rows)


def layer_section(
    store: Store, digest: str, layer: Mapping[str, Any], evidence: Evidence | None, scale: Scale, count: int
) -> LayerSection:
    """Return what the page shows of a layer, from its manifest, with its first `count` pictures."""
    path, verdicts = layer["layer"]["path"], verdicts_of(layer)
    channels = [verdict.channel for verdict in verdicts[:count]]
    return LayerSection(
        path=path,
        facts=facts_of_layer(layer["layer"]),
        note=note_on_layer(layer),
        verdicts=verdicts,
        pictures=[webp_thumbnail(tile, scale.picture) for tile in sheet_tiles(store, digest, layer, count)],
        photos=list(photo_crops(store, evidence, path, channels, scale)) if evidence and path in evidence else [],
    )


def chosen_atlas(store: Store, prefix: str | None) -> str:
    """Return the digest that begins with `prefix`, or without one the only digest of an atlas in the store.

    Raises:
        InvalidRequest: there is no such atlas, or more than one.
    """
    digests = sorted(store.done("atlases"))
    matching = [digest for digest in digests if digest.startswith(prefix or "")]
    if len(matching) == 1:
        return matching[0]
    if not digests:
        raise InvalidRequest(
            f"{store.display_path('')} holds no finished atlas yet; run `phosphene atlas` to its end first"
        )
    listed = ", ".join(
        f"{digest} ({summary(store.manifest('atlases', digest))})" for digest in (matching or digests)[:5]
    )
    if not matching:
        raise InvalidRequest(f"{store.display_path('')} holds no atlas {prefix!r}; it has {listed}")
    raise InvalidRequest(
        f"{store.display_path('')} holds {len(matching)} atlases; name the one that you mean: {listed}"
    )


def summary(manifest: Mapping[str, Any]) -> str:
    """Return a few words that distinguish an atlas from others of its store."""
    evidence = "with photos" if manifest["evidence"] else "without photos"
    return f"{manifest['model']}, {len(manifest['layers'])} layers, recipe {manifest['recipe']['name']}, {evidence}"


def filters_per_layer(counts: Sequence[int], total: int = MAX_FILTERS) -> list[int]:
    """Return how many filters of each layer the page shows: all, or fewer of the largest layers to keep to `total`."""
    limits = range(max(counts, default=0) + 1)
    limit = bisect_right(limits, total, key=lambda limit: sum(min(count, limit) for count in counts)) - 1
    return [min(count, limit) for count in counts]


def verdicts_of(layer: Mapping[str, Any]) -> list[Verdict]:
    """Return the verdicts on a layer's pictures, in the order of its sheets; empty ones if it was not judged."""
    verdicts = [Verdict(**row) for row in layer["verdicts"]]
    return verdicts or [
        Verdict(row["channel"], row["picture"], "", row["score"], None, None, None, None, None)
        for row in layer["pictures"]
    ]


def sheet_tiles(store: Store, digest: str, layer: Mapping[str, Any], count: int) -> Iterator[Picture]:
    """Yield the first `count` pictures of a layer's sheets."""
    for sheet in layer["sheets"]:
        width, height = sheet["tile"]
        tiles = min(count, len(sheet["channels"]))
        count -= tiles
        if tiles:
            image = decode_image(store.get("layers", digest, sheet["file"]))
            for index in range(tiles):
                row, column = divmod(index, sheet["columns"])
                left, top = column * width, row * height
                yield image.crop((left, top, left + width, top + height))


def photo_crops(
    store: Store, evidence: Evidence, path: str, channels: Sequence[int], scale: Scale
) -> Iterator[list[PhotoCrop]]:
    """Yield the strongest photos of each channel of a layer; one sheet of crops is open at a time."""
    about, photos = evidence.about, evidence[path].photos
    tile, names, opened, sheet = about["tile"], about["names"], "", Image.new("RGB", (1, 1))
    for channel in channels:
        number, row = divmod(channel, about["rows"])
        file = about["sheets"][path][number]
        if opened != file:
            opened, sheet = file, decode_image(store.get("evidence", evidence.digest, file))
        yield [
            PhotoCrop(
                webp_thumbnail(sheet.crop((rank * tile, row * tile, (rank + 1) * tile, (row + 1) * tile)), scale.photo),
                names[str(photo)],
            )
            for rank, photo in enumerate(
                photo for photo in photos[channel, : scale.photos].tolist() if photo != NO_PHOTO
            )
        ]


def webp_thumbnail(image: Picture, side: int) -> bytes:
    """Return a picture as WebP bytes, its longer side at most `side` pixels; equal input gives equal bytes."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return webp(small, QUALITY)


def facts_of_layer(layer: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts on a layer that stand beside its path, as text by name."""
    field = layer["receptive_field"]
    sees = {"whole": "the whole image", "unknown": "unknown"}.get(layer["sees"], "")
    return {
        "kind": layer["kind"],
        "channels": f"{layer['channels']:,}",
        "map": size_text(layer["size"]),
        "sees": f"{size_text(field['size'])} px" if field else sees,
    }


def size_text(pair: Sequence[int]) -> str:
    """Return a height and a width as text."""
    return "×".join(map(str, pair))


def note_on_layer(layer: Mapping[str, Any]) -> str:
    """Return the warnings about a layer, or an empty text."""
    lost = len(layer["missing"])
    failed = f"{lost} {'job' if lost == 1 else 'jobs'} of this layer failed; run the atlas again to try once more."
    return " ".join(([f"Not judged: {layer['remark']}."] if layer["remark"] else []) + ([failed] if lost else []))


def facts_of_atlas(manifest: Mapping[str, Any], pictures: int, photos: str) -> dict[str, str]:
    """Return the facts on an atlas of so many pictures, as text by name; `photos` says how many photos were seen."""
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


def notes_on_atlas(manifest: Mapping[str, Any]) -> list[str]:
    """Return the warnings about an atlas, as sentences."""
    notes = [f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in manifest["notes"]]
    if manifest["missing"]:
        notes.append(f"No pictures exist of {', '.join(manifest['missing'])}; run the atlas again to try once more.")
    if manifest["evidence"] is None:
        notes.append(
            "Made without photos, so excitation and own are unknown: the verdicts rest on stability, retrieval and "
            "agreement, measured relative to a grey picture."
        )
    return notes


def verdict_csv(rows: Sequence[tuple[str, Verdict]]) -> bytes:
    """Return verdicts by layer as CSV, escaped as in `escape_formula`."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(COLUMNS)
    writer.writerows([escape_formula(cell) for cell in (path, *asdict(verdict).values())] for path, verdict in rows)
    return buffer.getvalue().encode()


def escape_formula(cell: Any) -> Any:
    """Return a cell, with an apostrophe in front if it is a text that a spreadsheet would take for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell
