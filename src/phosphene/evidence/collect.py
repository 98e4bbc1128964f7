"""Collecting evidence: one pass of photos through a network. A pass that was interrupted goes on from the store.

evidence/<digest>/partial.safetensors        during a pass: the result of the first chunks; see also `statistics`
"""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from time import monotonic
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from phosphene.arguments import whole_number
from phosphene.errors import EntryNotFound, LayerRefused, PhotoRefused
from phosphene.evidence import crops
from phosphene.evidence.photo_dataset import open_photos
from phosphene.evidence.photo_pass import Partial, PhotoPass, RefusedPhoto, empty_partial, merge
from phosphene.evidence.quantile_sketch import QuantileSketch
from phosphene.evidence.statistics import Evidence, layer_statistics, load_evidence
from phosphene.evidence.top_photos import NO_PHOTO, TopPhotos
from phosphene.network.layers import Layer
from phosphene.network.model import Model
from phosphene.progress import progress_bar
from phosphene.storage.store import Store, digest_of

TOP = 9
SAVE_INTERVAL = 30.0  # seconds
PARTIAL = "partial.safetensors"
PARTIAL_KEYS = ("peaks", "photos", "places", "marks", *QuantileSketch._fields)  # of the tensors in that file
PhotoProgress = Callable[[int, int], None]
PhotoRunner = Callable[[PhotoPass, Sequence[int], Callable[[int], None]], Generator[Partial, None, None]]


def evidence(
    model: Model,
    photos: Any,
    layers: str | Sequence[str | int],
    *,
    size: int | None = None,
    top: int = TOP,
    store: Store | None = None,
    watch: PhotoProgress | None = None,
    save_interval: float = SAVE_INTERVAL,
    runner: PhotoRunner | None = None,
    progress: bool = True,
) -> Evidence:
    """Return what photos do to every channel of layers, from one pass that ends at the deepest of them.

    Its memory depends on the channels and `top`, not on the number of photos. Unreadable photos are left out and named.

    Args:
        model: from `load`; it is used as it is and left as it was.
        photos: a folder, a Parquet file, `package.module:callable`, or a dataset; see `open_photos`.
        layers: addresses, or a glob, which means those of its layers that have maps.
        size: side in pixels of what the network sees, by default its own input size; `top`: photos kept per channel.
        store: keeps the result, or already has it. During the pass the partial result is saved there now and then, so
            that an interrupted pass goes on from it.
        watch: called with (n, total): n more of all the photos are done.
        save_interval: seconds between two partial results; `progress`: whether to show a bar, see `progress_bar`.
        runner: runs the photos through the network, by default in this process; see `atlases.runners.ray_photos`.

    Raises:
        LayerNotFound, LayerRefused, SizeRefused, InvalidRequest, OutOfMemory.
        PhotoRefused: there is no such source, or none of its photos can be read.

    Example:
        >>> result = evidence(load("builtin/vgg19"), "holiday", "block3*", size=128)
        >>> result["block3_conv1"].photos[7]     # the nine photos that channel 7 answers to most
    """
    photo_pass = plan_photo_pass(model, photos, layers, size, top)
    digest = digest_of(photo_pass.spec)
    if store and store.has("evidence", digest):
        return load_evidence(store, digest)
    partial = collect_partials(photo_pass, store, watch, save_interval, runner or PhotoPass.partials, progress)
    result = assemble(photo_pass, partial, progress)
    if store:
        store.put("evidence", digest, result.files(), {key: result.about[key] for key in ("spec", "seen", "lost")})
    return result


def plan_photo_pass(
    model: Model, photos: Any, layers: str | Sequence[str | int], size: int | None = None, top: int = TOP
) -> PhotoPass:
    """Return the checked request of `evidence`; the digest of its spec names the result in a store."""
    top = whole_number(top, "the number of photos a channel", 1)
    sides = model.input_size if size is None else (whole_number(size, "the size in pixels", 1),) * 2
    chosen = {layer.path: layer for layer in layers_with_maps(model, layers)}
    return PhotoPass(model, open_photos(photos, model.channels_in), tuple(chosen.values()), sides, top)


def layers_with_maps(model: Model, layers: str | Sequence[str | int]) -> list[Layer]:
    """Return the chosen layers; of a glob those that have maps.

    Raises:
        LayerRefused: an address has no map, or no layer of a glob has one.
    """
    if isinstance(layers, str):
        chosen = list(model.layers().matching(layers))
    else:
        chosen = [model.find(address) for address in layers]
    maps = [layer for layer in chosen if layer.is_map]
    if not maps or (len(maps) < len(chosen) and not isinstance(layers, str)):
        names = ", ".join(layer.path for layer in chosen if not layer.is_map) or "no layer"
        raise LayerRefused(f"evidence needs layers that return maps, and got {names}; choose a convolution")
    return maps


def collect_partials(
    photo_pass: PhotoPass,
    store: Store | None,
    watch: PhotoProgress | None,
    save_interval: float,
    runner: PhotoRunner,
    progress: bool,
) -> Partial:
    """Return the result of all photos; chunks are merged in their order, so that sums are rounded alike."""
    name = f"evidence/{digest_of(photo_pass.spec)}/{PARTIAL}"
    done, merged = load_partial(store, name, photo_pass)
    saved = monotonic()

    def report(more: int) -> None:
        bar.done += more
        if watch:
            watch(more, bar.total)

    partials = runner(photo_pass, range(done, photo_pass.chunk_count), report)
    with progress_bar("evidence", "photos", progress) as bar, closing(partials):
        bar.total = len(photo_pass.photos)
        report(merged.seen + merged.lost)
        for partial in partials:
            merged, done = merge(merged, partial), done + 1
            if store and monotonic() - saved >= save_interval:
                store.write(name, pack_partial(merged, done))
                saved = monotonic()
    return merged


def load_partial(store: Store | None, name: str, photo_pass: PhotoPass) -> tuple[int, Partial]:
    """Return how many chunks the store has the result of, and that result."""
    if store:
        try:
            return unpack_partial(store.read(name))
        except (EntryNotFound, SafetensorError, LookupError, ValueError):  # none yet, or unusable
            pass
    return 0, empty_partial(sum(photo_pass.channels), photo_pass.top)


def pack_partial(partial: Partial, done: int = 0) -> bytes:
    """Return a partial result, and how many chunks are done, as safetensors."""
    columns = zip(PARTIAL_KEYS, (*partial.top_photos, *partial.sketch), strict=True)
    about = json.dumps([done, partial.seen, partial.lost, partial.refused]).encode()
    tensors = {key: column.contiguous() for key, column in columns}
    return safetensors.torch.save({**tensors, "about": torch.frombuffer(bytearray(about), dtype=torch.uint8)})


def unpack_partial(content: bytes) -> tuple[int, Partial]:
    """Return how many chunks are done, and their result, from the bytes of `pack_partial`."""
    tensors = safetensors.torch.load(content)
    done, seen, lost, refused = json.loads(tensors["about"].numpy().tobytes())
    columns = [tensors[key] for key in PARTIAL_KEYS]
    top_photos, sketch = TopPhotos(*columns[:4]), QuantileSketch(*columns[4:])
    return done, Partial(top_photos, sketch, seen, lost, tuple(RefusedPhoto(*photo) for photo in refused))


def assemble(photo_pass: PhotoPass, partial: Partial, progress: bool) -> Evidence:
    """Return the result of a pass, with the crops cut out of the strongest photos; `progress` shows a bar.

    Raises:
        PhotoRefused: not one photo could be read.
    """
    layers, photos = photo_pass.layers, photo_pass.photos
    if partial.seen == 0:
        raise PhotoRefused(f"of {len(photos):,} photos none can be read; the first: {partial.refused[0].reason}")
    statistics = dict(zip((layer.path for layer in layers), layer_statistics(photo_pass, partial), strict=True))
    top = [crops.TopPositions(layer.photos, layer.positions) for layer in statistics.values()]
    winners = sorted({*torch.cat([layer.photos.flatten() for layer in top]).tolist()} - {NO_PHOTO})
    about = {
        "spec": photo_pass.spec,
        "seen": partial.seen,
        "lost": partial.lost,
        "refused": [{"name": photos.name(refused.photo), **refused._asdict()} for refused in partial.refused],
        "names": {str(photo): photos.name(photo) for photo in winners},
        "sheets": {layer.path: crops.sheet_names(index, layer.channels or 0) for index, layer in enumerate(layers)},
        "tile": crops.TILE,
        "rows": crops.ROWS,
        "thumbnails": crops.thumbnails(photo_pass, top),
    }
    with progress_bar("crops", "photos", progress) as bar:
        return Evidence(statistics, about, dict(crops.sheets(photo_pass, top, bar)))
