"""What a visitor's photo comes to: its classes, a heat map on it, activations, and the filters that it excites most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from phosphene.atlases.verdicts import DEAD, Verdict, same, span
from phosphene.errors import EntryNotFound, LayerRefused
from phosphene.evidence.collect import Evidence
from phosphene.evidence.photo_pass import photo_runs
from phosphene.images import display, encode, grid
from phosphene.images.photo import Fit, decode
from phosphene.inspection.activations import activations
from phosphene.inspection.attribution_methods import INPUT_METHODS
from phosphene.inspection.explain import explain
from phosphene.network.layers import Layer
from phosphene.network.model import Model
from phosphene.web.live.render_request import data_uri
from phosphene.web.store_reader import StoreReader, layer_slug

BYTES, PIXELS, LONGER = 20_000_000, 40_000_000, 1024  # of an upload, unpacked, and of the longer side that is kept
OF_LAYER, OF_ALL = 8, 24  # filters that are shown
QUALITY, MOST = 80, 700_000  # of what is sent, in bytes: a third is added as it becomes text


def photo_of(content: bytes, model: Model) -> Tensor:
    """Return an upload as a photo (1, c, h, w) for a network, at most `LONGER` px long.

    Raises:
        PhotoRefused: it is none, or too large.
    """
    return decode(content, model.channels_in, PIXELS, LONGER)


def maps_of(model: Model) -> list[dict[str, Any]]:
    """Return the layers that have a map of more than one position, in JSON terms."""
    shown = [one for one in model.layers() if one.channels and one.size and max(one.size) > 1]
    return [{"path": one.path, "kind": one.kind, "channels": one.channels, "size": one.size} for one in shown]


def classifies(model: Model) -> bool:
    """Return whether a network returns class scores."""
    try:
        with model.reading([model.logits]) as read, torch.no_grad():
            return read(model.grey(model.input_size))[model.logits].dim() == 2
    except LayerRefused:
        return False


def explained(model: Model, photo: Tensor, method: str, layer: str | None, target: str | None) -> dict[str, Any]:
    """Return classes and heat map of a photo, in JSON terms; see `explain` for what is asked for.

    A network that is no classifier has no classes, and no heat map: the picture is then the photo itself.
    """
    try:
        heat = explain(model, photo, target, layer=None if method in INPUT_METHODS else layer, method=method)
    except LayerRefused:
        if classifies(model):
            raise
        note = f"{model.name} names no classes, so there is no heat map; its filters and activations are below."
        return {"classes": [], "note": note, "picture": webp_uri(grid.picture(photo[0]))}
    return {
        "classes": [asdict(one) for one in heat.top],
        "target": asdict(heat.target),
        "method": heat.method,
        "layer": heat.layer,
        "map": list(heat.map.shape),
        "strongest": heat.strongest,
        "note": heat.sentence() if heat.silent else "",
        "caution": heat.caution,
        "caption": heat.caption(),
        "picture": webp_uri(heat.overlay(photo, legend=False)),
    }


def activation_sheet(model: Model, photo: Tensor, layer: str) -> bytes:
    """Return all channels of a layer on one sheet, as WebP bytes; of a layer with many the first page."""
    return webp_bytes(activations(model, photo, [layer]).grid(model.find(layer).path))


def webp_bytes(picture: display.Picture) -> bytes:
    """Return a picture as WebP bytes, shrunk until there are few enough."""
    content = encode.webp(picture, QUALITY)
    while len(content) > MOST:
        picture = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4))
        content = encode.webp(picture, QUALITY)
    return content


def webp_uri(picture: display.Picture) -> str:
    """Return a picture as an address that a page may show."""
    return data_uri("image/webp", webp_bytes(picture))


def top_filters(model: Model, photo: Tensor, gallery: StoreReader, d: str) -> dict[str, Any]:
    """Return which filters of an atlas a photo excites most, of each layer and of all, in JSON terms.

    With photos in the store, by the excitation ratio: 1 is the strongest of those photos, 0 their mean. Else 1 is the
    filter's own picture, and 0 a grey one. The network sees the photo at the size that it saw those at. Dead filters
    are left out, and those that it does not excite unless it excites none.
    """
    evidence = gallery.evidence(d)
    paths = [one["path"] for one in gallery.atlas(d)["layers"] if evidence is None or one["path"] in evidence]
    if not paths:
        raise EntryNotFound("this atlas has no filters yet")
    size, fit = size_and_fit(model, gallery, d, paths[0], evidence)
    layers = [model.find(path) for path in paths]
    means = channel_means(model, layers, fit(photo, size)[0])
    grey = means if evidence else channel_means(model, layers, model.grey(size))
    found = []
    for path, mean, none in zip(paths, means, grey, strict=True):
        verdicts = gallery.verdicts(d, path)
        ratios = by_photos(mean, evidence, path) if evidence else by_pictures(mean, none, verdicts)
        found.append({"path": path, "filters": strongest(path, ratios, verdicts)})
    every = excited_ones(sorted((one for of in found for one in of["filters"]), key=lambda one: -one["excitation"]))
    photos = evidence.about["seen"] if evidence else None
    return {"size": list(size), "photos": photos, "layers": found, "strongest": every[:OF_ALL]}


def size_and_fit(
    model: Model, gallery: StoreReader, d: str, path: str, evidence: Evidence | None
) -> tuple[tuple[int, int], Fit]:
    """Return the size (h, w) at which photos, or else pictures, were seen, and how a photo is brought to it."""
    if evidence:
        spec = evidence.about["spec"]
        return (spec["size"][0], spec["size"][1]), Fit(*spec["fit"])
    first = gallery.layer(d, path)["pictures"][0]["channel"]
    height, width = gallery.filter(d, path, first).job["size"]
    own, scale = model.fit, min(height, width) / min(model.input_size)
    return (height, width), own if own.resize is None else replace(own, resize=round(own.resize * scale))


def channel_means(model: Model, layers: Sequence[Layer], image: Tensor) -> list[Tensor]:
    """Return the mean over its map of every channel of each layer, (c,) float64, from one forward pass."""
    found: dict[int, Tensor] = {}

    def see(number: int, act: Tensor) -> None:
        sums = torch.promote_types(act.dtype, torch.float32)
        found[number] = act.mean((-2, -1), dtype=sums)[0].double().cpu()

    with photo_runs(model, layers) as visit, model.taking((image.shape[-2], image.shape[-1])):
        visit(image.to(model.like), see)
    return [found[number] for number in range(len(layers))]


def by_photos(means: Tensor, evidence: Evidence, path: str) -> Tensor:
    """Return (c,) how far above the photos' mean, where the strongest photo is 1; NaN where all are alike."""
    return (means - evidence[path].mean) / span(evidence[path])


def by_pictures(means: Tensor, grey: Tensor, verdicts: Sequence[Verdict]) -> Tensor:
    """Return (c,) how far above what grey gives, where the filter's own picture is 1; NaN where it has none above."""
    scores = torch.full_like(means, torch.nan)
    for one in verdicts:
        scores[one.channel] = one.score
    gain = scores - grey
    return (means - grey) / torch.where(same(scores, grey) | (gain < 0), torch.nan, gain)


def strongest(path: str, ratios: Tensor, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return the filters of a layer that are excited most, strongest first, in JSON terms."""
    slug, numbers = layer_slug(path), ratios.tolist()
    alive = [one for one in verdicts if one.verdict != DEAD and math.isfinite(numbers[one.channel])]
    shown = [
        {
            "layer": path,
            "channel": one.channel,
            "excitation": float(f"{numbers[one.channel]:.4g}"),
            "verdict": one.verdict,
            "page": f"{slug}/{one.channel}.html",
            "picture": f"{slug}/filter_{one.channel}.png",
        }
        for one in sorted(alive, key=lambda one: (-numbers[one.channel], one.channel))[:OF_LAYER]
    ]
    return excited_ones(shown)


def excited_ones(filters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of some filters that are excited at all, or, where none is, all of them."""
    return [one for one in filters if one["excitation"] > 0] or filters
