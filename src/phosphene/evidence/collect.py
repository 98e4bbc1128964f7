"""Evidence: what real photos do to every channel of a network, to hold pictures against.

evidence/<digest>/statistics.safetensors     a layer's tensors as `<layer>/mean` and so on; see `Statistics`
evidence/<digest>/evidence.json              what was asked, the names of the strongest photos, what could not be read
evidence/<digest>/crops_<layer>_<page>.webp  the strongest photos, where each channel answers; see `crops`
evidence/<digest>/photos_<page>.webp         the strongest photos whole; older stores have none
evidence/<digest>/partial.safetensors        while under way: what is known of the first lots
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from time import monotonic
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from phosphene.arguments import whole_number
from phosphene.errors import EntryNotFound, InvalidRequest, LayerNotFound, LayerRefused, PhotoRefused, nearest
from phosphene.evidence import crops
from phosphene.evidence.photo_dataset import open_photos
from phosphene.evidence.photo_pass import Partial, PhotoPass, RefusedPhoto, empty_partial, merge
from phosphene.evidence.quantile_sketch import QuantileSketch
from phosphene.evidence.top_photos import NONE, TopPhotos
from phosphene.network.layers import Layer
from phosphene.network.model import Model
from phosphene.storage.store import Store, digest_of

TOP = 9
SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)  # of the photos, of whose means the quantiles are kept
EVERY = 30.0  # seconds
STATISTICS, ABOUT, PARTIAL = "statistics.safetensors", "evidence.json", "partial.safetensors"
PhotoProgress = Callable[[int, int], None]
PhotoRunner = Callable[[PhotoPass, Sequence[int], Callable[[int], None]], Generator[Partial, None, None]]


@dataclass(frozen=True, eq=False)
class PhotoStatistics:
    """What photos do to the channels of one layer.

    A channel's MEAN is over its map: what `channel` scores, one number a photo. Its PEAK is the map's highest value. A
    photo for which the map holds NaN or infinity is left out, and counted as broken.

    Attributes:
        count, broken: (c,) int64, photos counted and left out.
        mean, std, minimum, maximum: (c,) float64, of the means; std over n. NaN where no photo counts.
        quantiles: (c, 7) float64, of the means at `SHARES`, within `spread.RELATIVE` or `spread.ABSOLUTE`.
        peaks: (c, k) float64, of the strongest photos, highest first; -inf where there are fewer than k.
        photos: (c, k) int64, their numbers, -1 where there are fewer; of equal peaks the lower number comes first.
        positions: (c, k, 2) int64, row and column of the peak in the map.
    """

    count: Tensor
    broken: Tensor
    mean: Tensor
    std: Tensor
    minimum: Tensor
    maximum: Tensor
    quantiles: Tensor
    peaks: Tensor
    photos: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Evidence(Mapping[str, PhotoStatistics]):
    """What photos do to the layers of a network: a mapping from a layer's path to its `Statistics`.

    Attributes:
        statistics: by path, in the order asked for.
        about: in JSON terms: `spec`, what was asked; `seen` and `lost`, photos shown and photos that could not be read,
            the first of them in `refused`; `names` of the strongest, by number; `sheets`, the files by path; `tile`,
            the side of a tile in pixels; `rows`, the channels of a sheet; `thumbnails`, see `crops.thumbnails`, which
            older stores lack.
        sheets: the files with the crops and thumbnails; none where they were left out.
    """

    statistics: Mapping[str, PhotoStatistics]
    about: Mapping[str, Any]
    sheets: Mapping[str, bytes]

    def __getitem__(self, path: str) -> PhotoStatistics:
        if path not in self.statistics:
            raise LayerNotFound(f"no photos were looked at in {path!r}; the nearest are: {nearest(path, self)}")
        return self.statistics[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.statistics)

    def __len__(self) -> int:
        return len(self.statistics)

    def __repr__(self) -> str:
        return f"Evidence({self.about['seen']:,} photos, {len(self)} layers of {self.about['spec']['model']})"

    @property
    def digest(self) -> str:
        """What this is called in a store."""
        return digest_of(self.about["spec"])

    def files(self) -> dict[str, bytes]:
        """Return all of it as files, by name."""
        tensors = {
            f"{path}/{one.name}": getattr(self[path], one.name).contiguous()
            for path in self
            for one in fields(PhotoStatistics)
        }
        about = (json.dumps(self.about, indent=1, sort_keys=True) + "\n").encode()
        return {STATISTICS: safetensors.torch.save(tensors), ABOUT: about, **self.sheets}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Evidence:
        """Return what `files` returned; the sheets may be left out."""
        about, tensors = json.loads(files[ABOUT]), safetensors.torch.load(files[STATISTICS])
        found = {
            path: PhotoStatistics(**{one.name: tensors[f"{path}/{one.name}"] for one in fields(PhotoStatistics)})
            for path in about["spec"]["layers"]
        }
        return cls(found, about, {name: files[name] for name in files if name not in (ABOUT, STATISTICS)})


def evidence(
    model: Model,
    photos: Any,
    layers: str | Sequence[str | int],
    *,
    size: int | None = None,
    top: int = TOP,
    store: Store | None = None,
    watch: PhotoProgress | None = None,
    every: float = EVERY,
    show: PhotoRunner | None = None,
) -> Evidence:
    """Return what photos do to every channel of layers, from one pass that ends at the deepest of them.

    The memory that it takes depends on the channels and on `top`, not on how many photos there are. A photo that cannot
    be read is left out and named.

    Args:
        model: from `load`; it is used as it is and left as it was.
        photos: a folder, a Parquet file, `package.module:callable`, or a dataset; see `open_photos`.
        layers: a glob, of whose layers those with maps are meant, or addresses.
        size: side in pixels at which the photos are shown, by default the network's own input size.
        top: the strongest photos to keep a channel.
        store: where the result is kept, and found if it is there already. What is known is written every so often on
            the way, so that a pass that was cut off goes on from there.
        watch: called with (n, total): n photos more of all were looked at.
        every: seconds between two such writings.
        show: who shows the photos, by default this process; see `runners.ray_evidence`.

    Raises:
        LayerNotFound, LayerRefused, SizeRefused, InvalidRequest, OutOfMemory.
        PhotoRefused: the source is none, or not one photo of it can be read.

    Example:
        >>> found = evidence(load("builtin/vgg19"), "holiday", "block3*", size=128)
        >>> found["block3_conv1"].photos[7]     # the nine photos that channel 7 answers to most
    """
    viewing = photo_pass_of(model, photos, layers, size, top)
    digest = digest_of(viewing.spec)
    if store and store.has("evidence", digest):
        return load_evidence(store, digest)
    known = collect_partials(viewing, store, watch, every, show or in_this_process)
    if known.seen == 0:
        raise PhotoRefused(f"of {len(viewing.photos):,} photos none can be read; the first: {known.refused[0].reason}")
    found = assemble(viewing, known)
    if store:
        facts = {name: found.about[name] for name in ("spec", "seen", "lost")}
        store.put("evidence", digest, found.files(), facts)
    return found


def photo_pass_of(
    model: Model, photos: Any, layers: str | Sequence[str | int], size: int | None = None, top: int = TOP
) -> PhotoPass:
    """Return what `evidence` is asked for, checked; the digest of its spec is what the result is called in a store."""
    if whole_number(top, "the number of photos a channel") < 1:
        raise InvalidRequest("at least one photo a channel is kept; give top=9, say")
    if size is not None and whole_number(size, "the size in pixels") < 1:
        raise InvalidRequest(f"a size is a number of pixels from 1, not {size}")
    chosen = {one.path: one for one in chosen_layers(model, layers)}
    sides = model.input_size if size is None else (size, size)
    return PhotoPass(model, open_photos(photos, model.channels_in), tuple(chosen.values()), sides, top)


def chosen_layers(model: Model, layers: str | Sequence[str | int]) -> list[Layer]:
    """Return the layers that are meant.

    Raises:
        LayerRefused: one has no map; or none of a glob has.
    """
    found = list(model.layers().matching(layers)) if isinstance(layers, str) else [model.find(one) for one in layers]
    maps = [one for one in found if one.is_map]
    if not maps or (len(maps) < len(found) and not isinstance(layers, str)):
        named = ", ".join(one.path for one in found if not one.is_map) or "no layer"
        raise LayerRefused(f"photos are looked at where there are maps, and {named} returns none; choose a convolution")
    return maps


def in_this_process(
    viewing: PhotoPass, lots: Sequence[int], watch: Callable[[int], None]
) -> Generator[Partial, None, None]:
    """Yield what is known of each lot, in order."""
    yield from viewing.partials(lots, watch)


def collect_partials(
    viewing: PhotoPass, store: Store | None, watch: PhotoProgress | None, every: float, show: PhotoRunner
) -> Partial:
    """Return what is known of all photos; the lots are merged in their order, so that sums are rounded alike."""
    name = f"evidence/{digest_of(viewing.spec)}/{PARTIAL}"
    done, known = resumed(store, name, viewing)
    total, written = len(viewing.photos), monotonic()

    def tell(more: int) -> None:
        if watch:
            watch(more, total)

    tell(known.seen + known.lost)
    with closing(show(viewing, range(done, viewing.lots), tell)) as partials:
        for partial in partials:
            known, done = merge(known, partial), done + 1
            if store and monotonic() - written >= every:
                store.write(name, packed(known, done))
                written = monotonic()
    return known


def resumed(store: Store | None, name: str, viewing: PhotoPass) -> tuple[int, Partial]:
    """Return how many lots are known already, and what is known of them."""
    if store:
        try:
            return unpacked(store.read(name))
        except (EntryNotFound, SafetensorError, LookupError, ValueError):  # none yet, or of no use
            pass
    return 0, empty_partial(sum(viewing.channels), viewing.top)


def packed(known: Partial, done: int = 0) -> bytes:
    """Return what is known, and how many lots that is, as safetensors."""
    tensors = {name: one.contiguous() for name, one in {**known.strongest._asdict(), **known.spread._asdict()}.items()}
    about = json.dumps([done, known.seen, known.lost, known.refused]).encode()
    return safetensors.torch.save({**tensors, "about": torch.frombuffer(bytearray(about), dtype=torch.uint8)})


def unpacked(content: bytes) -> tuple[int, Partial]:
    """Return what was packed."""
    tensors = safetensors.torch.load(content)
    done, seen, lost, refused = json.loads(tensors["about"].numpy().tobytes())
    strongest = TopPhotos(*(tensors[name] for name in TopPhotos._fields))
    spread = QuantileSketch(*(tensors[name] for name in QuantileSketch._fields))
    return done, Partial(strongest, spread, seen, lost, tuple(RefusedPhoto(*one) for one in refused))


def load_evidence(store: Store, digest: str, sheets: bool = True) -> Evidence:
    """Return what a store has; the sheets are much of it, and may be left out.

    Raises:
        EntryNotFound: it has no such entry. StoreRefused: it is damaged.
    """
    manifest = store.manifest("evidence", digest)
    wanted = [one for one in manifest["files"] if sheets or one in (ABOUT, STATISTICS)]
    return Evidence.from_files({one: store.get("evidence", digest, one, manifest) for one in wanted})


def assemble(viewing: PhotoPass, known: Partial) -> Evidence:
    """Return what is known as the result, with the crops cut out of the strongest photos."""
    statistics = dict(zip((one.path for one in viewing.layers), by_layer(viewing, known), strict=True))
    shown = [crops.TopPositions(one.photos, one.positions) for one in statistics.values()]
    winners = sorted({*torch.cat([one.photos.flatten() for one in shown]).tolist()} - {NONE})
    about = {
        "spec": viewing.spec,
        "seen": known.seen,
        "lost": known.lost,
        "refused": [{"name": viewing.photos.name(one.photo), **one._asdict()} for one in known.refused],
        "names": {str(one): viewing.photos.name(one) for one in winners},
        "sheets": {one.path: crops.names(number, one.channels or 0) for number, one in enumerate(viewing.layers)},
        "tile": crops.TILE,
        "rows": crops.ROWS,
        "thumbnails": crops.thumbnails(viewing, shown),
    }
    return Evidence(statistics, about, dict(crops.sheets(viewing, shown)))


def by_layer(viewing: PhotoPass, known: Partial) -> Iterator[PhotoStatistics]:
    """Yield the statistics of each layer."""
    spread, strongest = known.spread, known.strongest
    none = spread.counted == 0
    columns = (
        spread.counted,
        spread.broken,
        *(one.masked_fill(none, torch.nan) for one in (spread.mean, spread.deviation, spread.lowest, spread.highest)),
        torch.stack([spread.quantile(one) for one in SHARES], 1),
        strongest.peaks,
        strongest.photos,
        strongest.places,
    )
    for pieces in zip(*(torch.split(one, viewing.channels) for one in columns), strict=True):
        yield PhotoStatistics(*(one.clone() for one in pieces))
