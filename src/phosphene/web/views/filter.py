"""The context of the filter template: how the picture came about, its verdict, and how to make it again."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from phosphene.atlases.report import facts_of_layer, size_text
from phosphene.atlases.verdict_text import FIGURES, SIGNS, figure_meanings, format_figure
from phosphene.atlases.verdicts import Verdict
from phosphene.errors import EntryNotFound, PhospheneError
from phosphene.evidence.crops import window
from phosphene.evidence.statistics import Evidence
from phosphene.evidence.top_photos import NO_PHOTO
from phosphene.network.capture import TensorAddress
from phosphene.network.layers import Layer, ReceptiveField
from phosphene.rendering.recipes import find_recipe
from phosphene.web.shell_commands import filters_command
from phosphene.web.store_reader import StoreReader
from phosphene.web.urls import SpriteTile, evidence_href, file_href, filter_href, layer_href, row_of_tiles, tile_of
from phosphene.web.views.atlas import LABELS, drawn_sentence, evidence_error_sentence, labelled_meanings, neighbours

REFERENCES = ("builtin/", "torchvision/", "timm/", "keras/")
SAVED = (".keras", ".h5", ".hdf5")


class Figure(NamedTuple):
    """A figure of a verdict, and how to read it."""

    name: str
    value: str
    meaning: str


class FilmFrame(NamedTuple):
    """The picture after so many steps."""

    step: int
    tile: SpriteTile


class FurtherPicture(NamedTuple):
    """A further facet of a filter, or its opposite; `dead` if it never left its start."""

    file: str
    score: str
    dead: bool


class KernelTile(NamedTuple):
    """The kernel for an input channel; `channel` is None if the tile shows all of them as colours."""

    channel: int | None
    tile: SpriteTile


class Box(NamedTuple):
    """A part of a tile, in pixels of the image file."""

    x: float
    y: float
    width: float
    height: float


class TopPhoto(NamedTuple):
    """A photo that excites the filter most: its crop, and if it is kept whole the photo and a box in it."""

    name: str
    peak: str
    crop: SpriteTile
    thumbnail: SpriteTile | None
    box: Box | None


def filter_view(reader: StoreReader, atlas_id: str, path: str, channel: int) -> dict[str, Any]:
    """Return the context of `filter.html` for a filter that has a picture.

    Raises:
        EntryNotFound: it has none.
    """
    atlas, layer = reader.atlas(atlas_id), reader.layer(atlas_id, path)
    verdict, picture, job = reader.filter(atlas_id, path, channel)
    before, after = neighbours([picture["channel"] for picture in layer["pictures"]], channel)
    evidence, notes = None, [f"Not judged: {layer['remark']}."] if layer["remark"] else []
    try:
        evidence = reader.evidence(atlas_id)
    except PhospheneError as error:
        notes.append(evidence_error_sentence(error))
    photos = evidence if evidence and path in evidence else None
    return {
        **unrendered_view(reader, atlas_id, path, channel),
        "rendered": True,
        "facts": facts_of_layer(layer["layer"]),
        "notes": notes,
        "picture": file_href(atlas_id, path, f"filter_{channel}.png"),
        "size": job["size"],
        "verdict": verdict,
        "sign": SIGNS.get(verdict.verdict, ""),
        "figures": verdict_figures(verdict, layer["thresholds"]),
        "meaning": figure_meanings(layer["thresholds"]).get(verdict.verdict, ""),
        "facets": further_pictures(atlas_id, path, picture.get("facets", ())),
        "opposite": further_pictures(atlas_id, path, [picture["opposite"]] if "opposite" in picture else ()),
        "film": film_frames(atlas_id, path, channel, job),
        "kernels": kernel_tiles(atlas_id, layer, channel),
        "drawn": drawn_sentence(len(layer["pictures"]), layer["layer"]["channels"]),
        "photo_size": photo_size_sentence(photos, layer["layer"], job["size"]) if photos else "",
        "photos": top_photos(photos, layer["layer"], channel) if photos else [],
        "settings": settings(atlas, job),
        "command": command(atlas, path, channel, job),
        "loading_known": "options" in atlas,
        "before": before is not None and (before, filter_href(atlas_id, path, before)),
        "after": after is not None and (after, filter_href(atlas_id, path, after)),
    }


def unrendered_view(reader: StoreReader, atlas_id: str, path: str, channel: int) -> dict[str, Any]:
    """Return the context of `filter.html` for a filter that has no picture yet, which a server can render.

    Raises:
        EntryNotFound: the layer has no such filter. For a layer that is in no atlas, this is not known.
    """
    atlas = reader.atlas(atlas_id)
    in_atlas, channels = any(row["path"] == path for row in atlas["layers"]), reader.channels(atlas_id, path)
    if channels is not None and channel >= channels:
        raise EntryNotFound(f"there is no filter {channel} in {path}: it has 0 to {channels - 1}")
    before, after = channel - 1, channel + 1
    return {
        "atlas_id": atlas_id,
        "title": atlas["model"],
        "path": path,
        "channel": channel,
        "layer": layer_href(atlas_id, path) if in_atlas else None,
        "recipe": atlas["recipe"],
        "rendered": False,
        "before": channel > 0 and (before, filter_href(atlas_id, path, before)),
        "after": (channels is None or after < channels) and (after, filter_href(atlas_id, path, after)),
    }


def verdict_figures(verdict: Verdict, limits: Mapping[str, float]) -> list[Figure]:
    """Return the figures that a verdict has."""
    meanings = {"score": "How the filter responds to the picture: the mean over its map.", **labelled_meanings(limits)}
    values = [(LABELS.get(name, name), getattr(verdict, name)) for name in ("score", *FIGURES)]
    return [Figure(name, format_figure(value), meanings[name]) for name, value in values if value is not None]


def further_pictures(atlas_id: str, path: str, rows: Sequence[Mapping[str, Any]]) -> list[FurtherPicture]:
    """Return the pictures of some rows of a manifest."""
    return [
        FurtherPicture(file_href(atlas_id, path, row["file"]), format_figure(row["score"]), row["dead"]) for row in rows
    ]


def film_frames(atlas_id: str, path: str, channel: int, job: Mapping[str, Any]) -> list[FilmFrame]:
    """Return how a filter's picture came about; stores written by earlier versions have no film."""
    film = job.get("film")
    if not film:
        return []
    channels = [picture["channel"] for picture in job["pictures"]]
    file = file_href(atlas_id, path, f"film_{channels[0]}.webp")
    tiles = row_of_tiles(file, film["tile"], film["columns"], len(channels), channels.index(channel))
    return [FilmFrame(step, tile) for step, tile in zip(film["steps"], tiles, strict=False)]


def kernel_tiles(atlas_id: str, layer: Mapping[str, Any], channel: int) -> dict[str, Any] | None:
    """Return a filter's kernels: `tiles`, the largest weight as `scale`, and the number of kernels as `total`."""
    kernels = layer.get("kernels")
    if not kernels:
        return None
    channels, colours = [picture["channel"] for picture in layer["pictures"]], kernels["colours"] == "rgb"
    row = channels.index(channel)
    sources = [None] if colours else kernels["inputs"][row]
    file = file_href(atlas_id, layer["layer"]["path"], kernels["file"])
    tiles = row_of_tiles(file, kernels["tile"], kernels["columns"], len(channels), row)
    kernel_tiles = [KernelTile(source, tile) for source, tile in zip(sources, tiles, strict=False)]
    return {
        "tiles": kernel_tiles,
        "scale": format_figure(kernels["scale"][row]),
        "total": kernels["of"],
        "colours": colours,
    }


def top_photos(evidence: Evidence, facts: Mapping[str, Any], channel: int) -> list[TopPhoto]:
    """Return the photos that excite a filter most, the strongest first."""
    about, layer, statistics = evidence.about, layer_from_facts(facts), evidence[facts["path"]]
    page, row = divmod(channel, about["rows"])
    rows = min(about["rows"], len(statistics.photos) - page * about["rows"])
    file = evidence_href(evidence.digest, about["sheets"][layer.path][page])
    crops = row_of_tiles(file, (about["tile"], about["tile"]), statistics.photos.shape[1], rows, row)
    photos = []
    for rank, (photo, crop) in enumerate(zip(statistics.photos[channel].tolist(), crops, strict=True)):
        if photo == NO_PHOTO:
            break
        name, peak = about["names"][str(photo)], format_figure(float(statistics.peaks[channel, rank]))
        position, thumbnail = statistics.positions[channel, rank].tolist(), photo_thumbnail(evidence, photo)
        box = thumbnail and field_box(layer, position, about["spec"]["size"], thumbnail)
        photos.append(TopPhoto(name, peak, crop, thumbnail, box))
    return photos


def photo_size_sentence(evidence: Evidence, facts: Mapping[str, Any], size: Sequence[int]) -> str:
    """Return at which size the network saw the photos, and what the frames in them are, as a sentence.

    Args:
        size: of the filter's picture, height and width.
    """
    photo_size, field = evidence.about["spec"]["size"], layer_from_facts(facts).receptive_field
    same = ", the size of the picture" if list(photo_size) == list(size) else ""
    sentence = f"The network saw these photos at {size_text(photo_size)} px{same}"
    if not evidence.about.get("thumbnails"):
        return f"{sentence}."
    if field and all(part < whole for part, whole in zip(field.size, photo_size, strict=True)):
        return f"{sentence}; the frame is the {size_text(field.size)} px that the filter sees there."
    return f"{sentence}; the frame is the part that the filter sees."


def photo_thumbnail(evidence: Evidence, photo: int) -> SpriteTile | None:
    """Return a whole photo, None if the store does not keep it; earlier versions kept none."""
    sheets = evidence.about.get("thumbnails")
    if not sheets or photo not in sheets["photos"]:
        return None
    count = sheets["columns"] * sheets["rows"]
    page, index = divmod(sheets["photos"].index(photo), count)
    file = evidence_href(evidence.digest, sheets["sheets"][page])
    return tile_of(file, sheets["tile"], sheets["columns"], count, index)


def field_box(layer: Layer, position: Sequence[int], size: Sequence[int], tile: SpriteTile) -> Box:
    """Return the receptive field of a position (row, column) of a layer's map, within the photo and in its tile."""
    field = window(layer, (position[0], position[1]), (size[0], size[1]))
    down, right = tile.height / size[0], tile.width / size[1]
    top, left = max(0, field.top), max(0, field.left)
    bottom, end = min(size[0], field.top + field.height), min(size[1], field.left + field.width)
    return Box(tile.x + left * right, tile.y + top * down, max(0, end - left) * right, max(0, bottom - top) * down)


def layer_from_facts(facts: Mapping[str, Any]) -> Layer:
    """Return a layer from its row in a store."""
    pairs = facts["receptive_field"]
    field = ReceptiveField(**{name: tuple(pair) for name, pair in pairs.items()}) if pairs else None
    size = tuple(facts["size"])
    return Layer(**{**facts, "tensor_address": TensorAddress(facts["path"]), "receptive_field": field, "size": size})


def settings(atlas: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of the job that rendered a filter, in words."""
    recipe, others = job["recipe"], len(job["pictures"]) - 1
    texts = {
        "recipe": f"{recipe['name']} ({recipe['source']})",
        "size": " → ".join(map(str, (*recipe["sizes"][:-1], size_text(job["size"])))) + " px",
        "steps": f"{recipe['steps']} at each size" if len(recipe["sizes"]) > 1 else str(recipe["steps"]),
        "seed": str(recipe["seed"]),
        "precision": job["precision"],
        "parameterization": choice_text(recipe["parameterization"]),
        "step rule": choice_text(recipe["step_rule"]),
        "transforms": "; ".join(map(choice_text, recipe["transforms"])) or "none",
        "display": recipe["display"],
        "blur": f"{recipe['blur']} px" if recipe["blur"] else "",
        "weight decay": f"{recipe['weight_decay']:g}" if recipe["weight_decay"] else "",
        "cooldown": f"over the last {recipe['cooldown']:.0%} of the steps" if recipe["cooldown"] else "",
        "facets": f"{job['facets']} pictures of each filter" if "facets" in job else "",
        "drawn with": f"{others} others at once" if others > 0 else "no others",
        "network": f"{job['model']}, weights {job['fingerprint']}",
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(atlas["versions"].items())),
    }
    return {name: text for name, text in texts.items() if text}


def choice_text(choice: Sequence[Any]) -> str:
    """Return a choice of a recipe with its options, such as "fourier (cutoff 0.6, decay 1.3)"."""
    options = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in choice[1])
    return f"{choice[0]} ({options})" if options else str(choice[0])


def command(atlas: Mapping[str, Any], path: str, channel: int, job: Mapping[str, Any]) -> str | None:
    """Return the command that renders a filter again; None if its network or recipe has no name there."""
    recipe, model = job["recipe"], atlas["model"]
    if not (model.startswith(REFERENCES) or model.lower().endswith(SAVED) or ":" in model):
        return None
    if not is_named_recipe(recipe["name"], recipe["steps"], atlas["recipe"]["seed"], atlas["recipe"]["digest"]):
        return None
    options = {"channels": channel, "recipe": recipe["name"], "size": atlas["size"], "steps": recipe["steps"]}
    options |= {"seed": recipe["seed"], "precision": job["precision"], "facets": job.get("facets")}
    return filters_command(model, atlas.get("options", {}), path, options)


def is_named_recipe(name: str, steps: int, seed: int, digest: str) -> bool:
    """Return whether a recipe is the registered one of its name, apart from steps and seed."""
    try:
        return find_recipe(name).with_settings(steps=steps, seed=seed).digest == digest
    except PhospheneError:
        return False
