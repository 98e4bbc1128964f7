"""What the view of one filter shows: how its picture came about, what it is worth, and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from phosphene.atlases.report import facts_of_layer, sides
from phosphene.atlases.report_page import FIGURES, SIGNS, explained, shown
from phosphene.atlases.verdicts import Verdict
from phosphene.errors import EntryNotFound, PhospheneError
from phosphene.evidence.collect import Evidence
from phosphene.evidence.crops import window
from phosphene.evidence.top_photos import NONE
from phosphene.network.capture import TensorAddress
from phosphene.network.layers import Layer, ReceptiveField
from phosphene.rendering.recipes import find_recipe
from phosphene.web.shell_commands import filters_command
from phosphene.web.store_reader import Filter, StoreReader
from phosphene.web.urls import SpriteTile, evidence_href, file_href, filter_href, layer_href, tile_of
from phosphene.web.views.atlas import LABELS, labelled, lost_photos, neighbours, told_drawn

REFERENCES = ("builtin/", "torchvision/", "timm/", "keras/")
SAVED = (".keras", ".h5", ".hdf5")


class Figure(NamedTuple):
    """A figure of a verdict, and how it is to be read."""

    name: str
    value: str
    meaning: str


class Moment(NamedTuple):
    """The picture after so many steps."""

    step: int
    tile: SpriteTile


class Kernel(NamedTuple):
    """The kernel of a filter for an input channel, None for colours."""

    channel: int | None
    tile: SpriteTile


class Box(NamedTuple):
    """A part of a tile, in its pixels."""

    x: float
    y: float
    width: float
    height: float


class TopPhoto(NamedTuple):
    """A strong photo: the part that excites the filter, and where in the photo that is; `whole` where it is kept."""

    name: str
    peak: str
    crop: SpriteTile
    whole: SpriteTile | None
    box: Box | None


def filter_view(gallery: StoreReader, d: str, path: str, n: int) -> dict[str, Any]:
    """Return what `filter.html` shows of a filter that has a picture.

    Raises:
        EntryNotFound: it has none.
    """
    atlas, layer, found = gallery.atlas(d), gallery.layer(d, path), gallery.filter(d, path, n)
    before, after = neighbours([one["channel"] for one in layer["pictures"]], n)
    evidence, notes = None, [f"Not judged: {layer['remark']}."] if layer["remark"] else []
    try:
        evidence = gallery.evidence(d)
    except PhospheneError as error:
        notes.append(lost_photos(error))
    return {
        **unrendered_view(gallery, d, path, n),
        "made": True,
        "facts": facts_of_layer(layer["layer"]),
        "notes": notes,
        "picture": file_href(d, path, f"filter_{n}.png"),
        "size": found.job["size"],
        "verdict": found.verdict,
        "sign": SIGNS.get(found.verdict.verdict, ""),
        "figures": figures(found.verdict, layer["thresholds"]),
        "meaning_of_dead": explained(layer["thresholds"])["dead"],
        "film": film(d, path, n, found.job),
        "kernels": kernels(d, layer, n),
        "drawn": told_drawn(len(layer["pictures"]), layer["layer"]["channels"]),
        "seen": seen(evidence, layer["layer"], found.job["size"]) if evidence and path in evidence else "",
        "photos": strongest(evidence, layer["layer"], n) if evidence and path in evidence else [],
        "settings": settings(atlas, found),
        "command": command(atlas, path, n, found),
        "loading_known": "options" in atlas,
        "before": before is not None and (before, filter_href(d, path, before)),
        "after": after is not None and (after, filter_href(d, path, after)),
    }


def unrendered_view(gallery: StoreReader, d: str, path: str, n: int) -> dict[str, Any]:
    """Return what `filter.html` shows of a filter that has no picture yet, which a server can draw.

    Raises:
        EntryNotFound: the layer has no such filter. Of a layer that the atlas has not, that is not known.
    """
    atlas = gallery.atlas(d)
    known, channels = any(row["path"] == path for row in atlas["layers"]), gallery.channels(d, path)
    if channels is not None and n >= channels:
        raise EntryNotFound(f"there is no filter {n} in {path}: it has 0 to {channels - 1}")
    return {
        "d": d,
        "title": atlas["model"],
        "path": path,
        "channel": n,
        "layer": layer_href(d, path) if known else None,
        "recipe": atlas["recipe"],
        "made": False,
        "before": n > 0 and (n - 1, filter_href(d, path, n - 1)),
        "after": (channels is None or n + 1 < channels) and (n + 1, filter_href(d, path, n + 1)),
    }


def figures(one: Verdict, limits: Mapping[str, float]) -> list[Figure]:
    """Return the figures of a verdict that there are."""
    meanings = {"score": "What the filter answers to the picture, as a mean over its map.", **labelled(limits)}
    known = [(LABELS.get(name, name), getattr(one, name)) for name in ("score", *FIGURES)]
    return [Figure(name, shown(value), meanings[name]) for name, value in known if value is not None]


def film(d: str, path: str, n: int, job: Mapping[str, Any]) -> list[Moment]:
    """Return how a filter's picture came about; a store of before does not tell."""
    about = job.get("film")
    if not about:
        return []
    channels = [one["channel"] for one in job["pictures"]]
    file = file_href(d, path, f"film_{channels[0]}.webp")
    many, first = about["columns"] * len(channels), about["columns"] * channels.index(n)
    return [
        Moment(step, tile_of(file, about["tile"], about["columns"], many, first + index))
        for index, step in enumerate(about["steps"])
    ]


def kernels(d: str, layer: Mapping[str, Any], n: int) -> dict[str, Any] | None:
    """Return a filter's kernels: `tiles`, the largest weight as `scale`, and `of` how many there are."""
    about = layer.get("kernels")
    if not about:
        return None
    row = [one["channel"] for one in layer["pictures"]].index(n)
    file, columns = file_href(d, layer["layer"]["path"], about["file"]), about["columns"]
    many, first = columns * len(layer["pictures"]), columns * row
    colours = about["colours"] == "rgb"
    inputs = [None] if colours else about["inputs"][row]
    tiles = [
        Kernel(channel, tile_of(file, about["tile"], columns, many, first + index))
        for index, channel in enumerate(inputs)
    ]
    return {"tiles": tiles, "scale": shown(about["scale"][row]), "of": about["of"], "colours": colours}


def strongest(evidence: Evidence, facts: Mapping[str, Any], n: int) -> list[TopPhoto]:
    """Return the strongest photos of a filter, the strongest first."""
    about, layer, found = evidence.about, layer_of(facts), evidence[facts["path"]]
    page, row = divmod(n, about["rows"])
    top = found.photos.shape[1]
    many = top * min(about["rows"], len(found.photos) - page * about["rows"])
    crop = evidence_href(evidence.digest, about["sheets"][layer.path][page])
    strong = []
    for rank, photo in enumerate(found.photos[n].tolist()):
        if photo == NONE:
            break
        whole = thumbnail(evidence, photo)
        down, right = found.positions[n, rank].tolist()
        strong.append(
            TopPhoto(
                about["names"][str(photo)],
                shown(float(found.peaks[n, rank])),
                tile_of(crop, (about["tile"], about["tile"]), top, many, row * top + rank),
                whole,
                whole and box_of(layer, (down, right), about["spec"]["size"], whole),
            )
        )
    return strong


def seen(evidence: Evidence, facts: Mapping[str, Any], size: Sequence[int]) -> str:
    """Return at which size the network saw the photos, and what the frames in them are, as a sentence.

    Args:
        size: of the filter's picture, height and width.
    """
    shown_at, field = evidence.about["spec"]["size"], layer_of(facts).receptive_field
    same = ", the size of the picture" if list(shown_at) == list(size) else ""
    said = f"The network saw these photos at {sides(shown_at)} px{same}"
    if not evidence.about.get("thumbnails"):
        return f"{said}."
    if field and all(part < whole for part, whole in zip(field.size, shown_at, strict=True)):
        return f"{said}; the frame is the {sides(field.size)} px that the filter sees there."
    return f"{said}; the frame is what of that the filter sees."


def thumbnail(evidence: Evidence, photo: int) -> SpriteTile | None:
    """Return a photo whole; None where it is not kept, as evidence of before keeps none."""
    about = evidence.about.get("thumbnails")
    if not about or photo not in about["photos"]:
        return None
    each = about["columns"] * about["rows"]
    page, index = divmod(about["photos"].index(photo), each)
    return tile_of(evidence_href(evidence.digest, about["sheets"][page]), about["tile"], about["columns"], each, index)


def box_of(layer: Layer, place: tuple[int, int], size: Sequence[int], tile: SpriteTile) -> Box:
    """Return where in a photo's tile a place of a layer's map looks; what lies outside the photo is left away."""
    part = window(layer, place, (size[0], size[1]))
    down, right = tile.height / size[0], tile.width / size[1]
    top, left = max(0, part.top), max(0, part.left)
    bottom, end = min(size[0], part.top + part.height), min(size[1], part.left + part.width)
    return Box(tile.x + left * right, tile.y + top * down, max(0, end - left) * right, max(0, bottom - top) * down)


def layer_of(facts: Mapping[str, Any]) -> Layer:
    """Return a layer of which a store tells."""
    field = facts["receptive_field"]
    known = ReceptiveField(**{name: tuple(pair) for name, pair in field.items()}) if field else None
    size = tuple(facts["size"])
    return Layer(**{**facts, "place": TensorAddress(facts["path"]), "receptive_field": known, "size": size})


def settings(atlas: Mapping[str, Any], found: Filter) -> dict[str, str]:
    """Return a filter's recipe, for people to read."""
    recipe, job = found.job["recipe"], found.job
    told = {
        "recipe": f"{recipe['name']} ({recipe['source']})",
        "size": " → ".join(map(str, (*recipe["sizes"][:-1], sides(job["size"])))) + " px",
        "steps": f"{recipe['steps']} at each size" if len(recipe["sizes"]) > 1 else str(recipe["steps"]),
        "seed": str(recipe["seed"]),
        "precision": job["precision"],
        "parameterization": part(recipe["parameterization"]),
        "step rule": part(recipe["step_rule"]),
        "transforms": "; ".join(map(part, recipe["transforms"])) or "none",
        "display": recipe["display"],
        "blur": f"{recipe['blur']} px" if recipe["blur"] else "",
        "weight decay": f"{recipe['weight_decay']:g}" if recipe["weight_decay"] else "",
        "cooldown": f"over the last {recipe['cooldown']:.0%} of the steps" if recipe["cooldown"] else "",
        "drawn with": f"{len(job['pictures']) - 1} others at once" if len(job["pictures"]) > 1 else "no others",
        "network": f"{job['model']}, weights {job['fingerprint']}",
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(atlas["versions"].items())),
    }
    return {name: text for name, text in told.items() if text}


def part(named: Sequence[Any]) -> str:
    """Return a part of a recipe, such as "fourier (cutoff 0.6, decay 1.3)"."""
    options = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in named[1])
    return f"{named[0]} ({options})" if options else str(named[0])


def command(atlas: Mapping[str, Any], path: str, n: int, found: Filter) -> str | None:
    """Return the command that draws a filter again; None where its network or recipe goes by no name."""
    recipe, model = found.job["recipe"], atlas["model"]
    if not (model.startswith(REFERENCES) or model.lower().endswith(SAVED) or ":" in model):
        return None
    if not goes_by_name(recipe["name"], recipe["steps"], atlas["recipe"]["seed"], atlas["recipe"]["digest"]):
        return None
    options = {
        "channels": n,
        "recipe": recipe["name"],
        "size": atlas["size"],
        "steps": recipe["steps"],
        "seed": recipe["seed"],
        "precision": found.job["precision"],
    }
    return filters_command(model, atlas.get("options", {}), path, options)


def goes_by_name(name: str, steps: int, seed: int, digest: str) -> bool:
    """Return whether a recipe is the one of its name, but for steps and seed."""
    try:
        return find_recipe(name).at(steps=steps, seed=seed).digest == digest
    except PhospheneError:
        return False
