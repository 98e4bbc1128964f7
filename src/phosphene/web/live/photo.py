"""What the page tells of a visitor's photo: classes, a heat map, activations, and the filters that it excites most."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from phosphene.atlases.verdict_text import verdict_words
from phosphene.atlases.verdicts import DEAD, Verdict, photo_range, within_rounding
from phosphene.errors import EntryNotFound, LayerRefused
from phosphene.evidence.photo_pass import photo_runs
from phosphene.evidence.statistics import Evidence
from phosphene.images import display, encode, grid
from phosphene.images.photo import Fit, decode
from phosphene.inspection.activations import activations
from phosphene.inspection.attribution_methods import INPUT_METHODS
from phosphene.inspection.explain import explain
from phosphene.network.layers import Layer
from phosphene.network.model import Model
from phosphene.web.live.render_request import data_uri
from phosphene.web.store_reader import StoreReader
from phosphene.web.urls import layer_slug

MAX_UPLOAD, MAX_PIXELS, MAX_SIDE = 20_000_000, 40_000_000, 1024  # bytes, decoded pixels, and the longer side kept
FILTERS_PER_LAYER, FILTERS_IN_ALL = 8, 24  # that are listed
QUALITY, MAX_BYTES = 80, 700_000  # of a picture that is sent; base64 adds a third


def read_photo(content: bytes, model: Model) -> Tensor:
    """Return an upload as a photo (1, c, h, w) for a network, at most `MAX_SIDE` px long.

    Raises:
        PhotoRefused: the upload is no photo, or too large.
    """
    return decode(content, model.channels_in, MAX_PIXELS, MAX_SIDE)


def layer_choices(model: Model) -> dict[str, Any]:
    """Return the layers with a map of more than one position, the paths of the others, and the classes, for JSON."""
    layers = model.layers()
    maps = [layer for layer in layers if layer.channels and layer.size and max(layer.size) > 1]
    rows = [{name: getattr(layer, name) for name in ("path", "kind", "channels", "size")} for layer in maps]
    flat = {layer.path for layer in layers} - {layer.path for layer in maps}
    return {"layers": rows, "flat": sorted(flat), "classes": list(model.labels)}


def classifies(model: Model) -> bool:
    """Return whether a network returns class scores."""
    try:
        with model.reading([model.logits]) as read, torch.no_grad():
            return read(model.grey(model.input_size))[model.logits].dim() == 2
    except LayerRefused:
        return False


def explanation(model: Model, photo: Tensor, method: str, layer: str | None, target: str | None) -> dict[str, Any]:
    """Return the classes and the heat map of a photo, in JSON terms; the arguments are those of `explain`.

    A network that is no classifier has no classes and no heat map: the picture is then the photo itself.
    """
    try:
        layer = None if method in INPUT_METHODS else layer
        heat = explain(model, photo, target, layer=layer, method=method, progress=False)
    except LayerRefused:
        if classifies(model):
            raise
        note = f"{model.name} names no classes, so there is no heat map; its filters and activations are below."
        return {"classes": [], "note": note, "picture": data_uri("image/webp", webp_bytes(grid.picture(photo[0])))}
    return {
        "classes": [asdict(score) for score in heat.top],
        "target": asdict(heat.target),
        "method": heat.method,
        "layer": heat.layer,
        "map": list(heat.map.shape),
        "strongest": heat.full_heat,
        "note": heat.empty_message() if heat.is_empty else "",
        "caution": heat.caution,
        "caption": heat.caption(),
        "picture": data_uri("image/webp", webp_bytes(heat.overlay(photo, legend=False))),
    }


def activation_sheet(model: Model, photo: Tensor, layer: str) -> bytes:
    """Return all channels of a layer on a sheet, as WebP bytes; if there are many, only the first page."""
    return webp_bytes(activations(model, photo, [layer]).grid(model.find(layer).path))


def webp_bytes(picture: display.Picture) -> bytes:
    """Return a picture as WebP, shrunk until it has at most `MAX_BYTES`."""
    content = encode.webp(picture, QUALITY)
    while len(content) > MAX_BYTES:
        picture = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4))
        content = encode.webp(picture, QUALITY)
    return content


def top_filters(model: Model, photo: Tensor, reader: StoreReader, atlas_id: str) -> dict[str, Any]:
    """Return which filters of an atlas a photo excites most, of each layer and of all, in JSON terms.

    With photos in the store, by the excitation ratio: 1 is the strongest of those photos, 0 their mean. Else 1 is the
    filter's own picture, and 0 a grey one. The network sees the photo at their size. Dead filters are left out,
    and so are filters that the photo does not excite, unless it excites none.
    """
    evidence, rows = reader.evidence(atlas_id), reader.atlas(atlas_id)["layers"]
    paths = [row["path"] for row in rows if evidence is None or row["path"] in evidence]
    if not paths:
        raise EntryNotFound("this atlas has no filters yet")
    size, fit = size_and_fit(model, reader, atlas_id, paths[0], evidence)
    layers = [model.find(path) for path in paths]
    means = channel_means(model, layers, fit(photo, size)[0])
    grey_means = means if evidence else channel_means(model, layers, model.grey(size))
    tops = []
    for path, mean, grey in zip(paths, means, grey_means, strict=True):
        verdicts = reader.verdicts(atlas_id, path)
        ratios = ratio_to_photos(mean, evidence, path) if evidence else ratio_to_pictures(mean, grey, verdicts)
        tops.append({"path": path, "filters": top_of_layer(path, ratios, verdicts)})
    filters = sorted((row for top in tops for row in top["filters"]), key=lambda row: -row["excitation"])
    photos = evidence.about["seen"] if evidence else None
    strongest = excited_filters(filters)[:FILTERS_IN_ALL]
    return {"size": list(size), "photos": photos, "layers": tops, "strongest": strongest}


def size_and_fit(
    model: Model, reader: StoreReader, atlas_id: str, path: str, evidence: Evidence | None
) -> tuple[tuple[int, int], Fit]:
    """Return the size (h, w) at which the network saw photos, or else pictures, and how a photo is brought to it."""
    if evidence:
        spec = evidence.about["spec"]
        return (spec["size"][0], spec["size"][1]), Fit(*spec["fit"])
    first = reader.layer(atlas_id, path)["pictures"][0]["channel"]
    height, width = reader.filter(atlas_id, path, first).job["size"]
    fit, scale = model.fit, min(height, width) / min(model.input_size)
    return (height, width), fit if fit.resize is None else replace(fit, resize=round(fit.resize * scale))


def channel_means(model: Model, layers: Sequence[Layer], image: Tensor) -> list[Tensor]:
    """Return the mean over its map of every channel of each layer, (c,) float64, from one forward pass."""
    means: dict[int, Tensor] = {}

    def reduce(index: int, act: Tensor) -> None:
        dtype = torch.promote_types(act.dtype, torch.float32)
        means[index] = act.mean((-2, -1), dtype=dtype)[0].double().cpu()

    with photo_runs(model, layers) as run, model.refusing_size((image.shape[-2], image.shape[-1])):
        run(image.to(model.prototype_tensor), reduce)
    return [means[index] for index in range(len(layers))]


def ratio_to_photos(means: Tensor, evidence: Evidence, path: str) -> Tensor:
    """Return (c,) how far above the photos' mean, where the strongest photo is 1; NaN if all photos are alike."""
    return (means - evidence[path].mean) / photo_range(evidence[path])


def ratio_to_pictures(means: Tensor, grey: Tensor, verdicts: Sequence[Verdict]) -> Tensor:
    """Return (c,) how far above the grey image, where the filter's own picture is 1; NaN if that is not above it."""
    scores = torch.full_like(means, torch.nan)
    for verdict in verdicts:
        scores[verdict.channel] = verdict.score
    gain = scores - grey
    return (means - grey) / torch.where(within_rounding(scores, grey) | (gain < 0), torch.nan, gain)


def top_of_layer(path: str, ratios: Tensor, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return the filters of a layer that are excited most, strongest first, in JSON terms."""
    slug, excitations = layer_slug(path), ratios.tolist()
    alive = [verdict for verdict in verdicts if verdict.verdict != DEAD and math.isfinite(excitations[verdict.channel])]
    top = sorted(alive, key=lambda verdict: (-excitations[verdict.channel], verdict.channel))[:FILTERS_PER_LAYER]
    rows = [
        {
            "layer": path,
            "channel": verdict.channel,
            "excitation": float(f"{excitations[verdict.channel]:.4g}"),
            "verdict": verdict.verdict,
            "words": verdict_words(verdict.verdict),
            "page": f"{slug}/{verdict.channel}.html",
            "picture": f"{slug}/filter_{verdict.channel}.png",
        }
        for verdict in top
    ]
    return excited_filters(rows)


def excited_filters(filters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the filters with an excitation above 0, or all of them if there is none."""
    return [row for row in filters if row["excitation"] > 0] or filters
