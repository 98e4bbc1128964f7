"""Showing photos to a network: one pass over them, lot by lot, which keeps what does not grow with their number.

A lot is a run of neighbouring photos; what is known of it is a `Partial`, and `merge` puts two together. Lots and the
batches in them depend on what is asked alone, so that whoever shows a lot, in whatever process, gets the same numbers.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phosphene.errors import LayerRefused, OutOfMemory, PhotoRefused
from phosphene.evidence.photo_dataset import PhotoDataset
from phosphene.evidence.quantile_sketch import QuantileSketch, empty_sketch, merge_sketches, sketch_of
from phosphene.evidence.top_photos import TopPhotos, add, no_photos, stronger
from phosphene.images.display import to_bytes
from phosphene.images.photo import Fit
from phosphene.network.capture import StopForward, borrowed, hooked, tensors_in
from phosphene.network.layers import Layer
from phosphene.network.memory import channels_last_on_cpu, is_out_of_memory, keep_freed_memory
from phosphene.network.model import Model

LOT, MOST_LOTS = 512, 4096  # photos of a lot at least, and lots at most: as many results there are to merge
AT_ONCE = {"cpu": (2**26, 32), "gpu": (2**30, 128)}  # bytes of a batch's largest map, and photos of a batch
LISTED = 1000  # photos that could not be read and are named; of more only the number is kept
ENGINE = 1  # goes up by one when the same photos would give other numbers than before


class RefusedPhoto(NamedTuple):
    """A photo that could not be read."""

    photo: int
    reason: str


@dataclass(frozen=True, eq=False)
class Partial:
    """What is known of some of the photos, for the channels of all layers one after the other.

    Attributes:
        strongest: the strongest photos of every channel.
        spread: of every channel's mean over the map.
        seen: photos that went through the network.
        lost: photos that could not be read; `refused` are the first of them.
    """

    strongest: TopPhotos
    spread: QuantileSketch
    seen: int = 0
    lost: int = 0
    refused: tuple[RefusedPhoto, ...] = ()


def empty_partial(channels: int, top: int) -> Partial:
    """Return what is known before the first photo."""
    return Partial(no_photos(channels, top), empty_sketch(channels))


def merge(one: Partial, other: Partial) -> Partial:
    """Return what is known of the photos of both, which have to be different ones.

    In whatever order and split results are merged, the strongest photos and all counts are the same; mean and deviation
    are the same within rounding.
    """
    return Partial(
        stronger(one.strongest, other.strongest),
        merge_sketches(one.spread, other.spread),
        one.seen + other.seen,
        one.lost + other.lost,
        tuple(sorted(one.refused + other.refused)[:LISTED]),
    )


class LoadedPhoto(NamedTuple):
    """A photo as the network sees it: its number, the image (1, c, h, w) in [0, 1], and a mark of how it looks."""

    photo: int
    image: Tensor
    mark: int


@dataclass(frozen=True, eq=False)
class PhotoPass:
    """What is asked: which photos to show to which network, at what size, and which of its layers to look at.

    Attributes:
        size: (h, w) of the images.
        top: photos to keep a channel.
    """

    model: Model
    photos: PhotoDataset
    layers: tuple[Layer, ...]
    size: tuple[int, int]
    top: int

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What the numbers follow from, in JSON terms."""
        return {
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "layers": [one.path for one in self.layers],
            "photos": self.photos.spec,
            "fit": [self.fit.resize, self.fit.interpolation, self.fit.squash],
            "size": list(self.size),
            "top": self.top,
            "versions": {"torch": torch.__version__, "evidence": ENGINE},
        }

    @property
    def fit(self) -> Fit:
        """How a photo is brought to the size: as to the network's own, with all lengths scaled."""
        own = self.model.fit
        if own.resize is None or self.size == self.model.input_size:
            return own
        return replace(own, resize=round(own.resize * min(self.size) / min(self.model.input_size)))

    @property
    def channels(self) -> list[int]:
        """How many channels each layer has."""
        return [one.channels or 0 for one in self.layers]

    @property
    def lots(self) -> int:
        return math.ceil(len(self.photos) / self.per_lot)

    @property
    def per_lot(self) -> int:
        """Photos of a lot: a whole number of times `LOT`."""
        return LOT * math.ceil(len(self.photos) / (LOT * MOST_LOTS))

    def lot(self, number: int) -> range:
        """Return the numbers of the photos of a lot."""
        return range(number * self.per_lot, min(len(self.photos), (number + 1) * self.per_lot))

    @cached_property
    def batch(self) -> int:
        """Photos that go through the network at once: a power of two whose largest map fits the caches' memory."""
        bytes_at_most, most = AT_ONCE["cpu" if self.model.like.device.type == "cpu" else "gpu"]
        grown = math.prod(self.size) / math.prod(self.model.input_size)
        maps = [one.channels * math.prod(one.size) for one in self.model.layers() if one.channels and one.size]
        largest = max(maps) * grown * self.model.like.element_size()
        return int(min(most, 2 ** max(0, math.floor(math.log2(bytes_at_most / largest)))))

    def show(self, photo: int) -> LoadedPhoto | RefusedPhoto:
        """Return a photo as the network sees it, or why it cannot be read."""
        try:
            image = self.fit(self.photos[photo], self.size)[0]
        except PhotoRefused as error:
            return RefusedPhoto(photo, str(error))
        look = blake2b(to_bytes(image).numpy().tobytes(), digest_size=8)
        return LoadedPhoto(photo, image, int.from_bytes(look.digest(), "little", signed=True))

    def partials(self, lots: Iterable[int], watch: Callable[[int], None] | None = None) -> Iterator[Partial]:
        """Yield what is known of each lot, one after the other; `watch` is called with the photos done since.

        Raises:
            SizeRefused: the network does not take images of the size.
            LayerRefused, OutOfMemory.
        """
        with warnings.catch_warnings(), photo_runs(self.model, self.layers) as visit:  # reading photos changes filters
            self.check(visit)
            lowest = torch.full((sum(self.channels),), -torch.inf, dtype=torch.float64)
            for number in lots:
                found = self.partial(visit, self.lot(number), lowest, watch)
                # what is not higher than the last of a lot before will not be among the strongest of all
                lowest = torch.maximum(lowest, found.strongest.peaks[:, -1])
                yield found

    def check(self, visit: RunPhotos) -> None:
        """Refuse a size that the network does not take, or that leaves nothing of a layer."""
        with self.model.taking(self.size):
            visit(self.model.grey(self.size), lambda number, act: self.check_map(self.layers[number], act))

    def check_map(self, layer: Layer, act: Tensor) -> None:
        if act.dim() != 4 or act.shape[1] != layer.channels:
            raise LayerRefused(f"{layer.path} returns {tuple(act.shape)} at this size, not a map of its channels")
        if act.numel() == 0:
            raise self.model.size_error(self.size, f"nothing is left of it at {layer.path!r}")

    def partial(
        self, visit: RunPhotos, photos: Iterable[int], lowest: Tensor, watch: Callable[[int], None] | None = None
    ) -> Partial:
        """Return what is known of photos, given by ascending numbers; peaks up to `lowest` (c,) are left out."""
        state = empty_partial(sum(self.channels), self.top)
        coming = self.photos.each(photos, self.show)
        while some := list(islice(coming, self.batch)):
            shown = [one for one in some if isinstance(one, LoadedPhoto)]
            refused = [one for one in some if isinstance(one, RefusedPhoto)]
            spread = self.look(visit, state, shown, lowest) if shown else state.spread
            state = Partial(
                state.strongest,
                spread,
                state.seen + len(shown),
                state.lost + len(refused),
                (*state.refused, *refused)[:LISTED],
            )
            if watch:
                watch(len(some))
        return state

    def look(self, visit: RunPhotos, state: Partial, shown: Sequence[LoadedPhoto], lowest: Tensor) -> QuantileSketch:
        """Show a batch, add its peaks to the state in place, and return the spread with its means added."""
        starts = [0, *accumulate(self.channels)]
        lowest = torch.maximum(lowest, state.strongest.peaks[:, -1])
        # of a batch of different pictures only so many can be among the strongest
        most = self.top if len({one.mark for one in shown}) == len(shown) else len(shown)
        sight = empty_peaks(len(shown), starts[-1])

        def see(number: int, act: Tensor) -> None:
            here = slice(*starts[number : number + 2])
            reduce_maps(act, lowest[here], most, BatchPeaks(*(one[:, here] for one in sight)))

        try:
            visit(torch.cat([one.image for one in shown]).to(self.model.like), see)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            sides = "×".join(map(str, self.size))
            raise OutOfMemory(
                f"{len(shown)} photos of {sides} px do not fit the memory; give a smaller size"
            ) from error
        sound = sight.means.isfinite() & sight.peaks.isfinite()
        numbers, marks = (torch.tensor(one) for one in zip(*((one.photo, one.mark) for one in shown), strict=True))
        add(state.strongest, sight.peaks, numbers, sight.places, marks, sight.entering & sound)
        return sketch_of(state.spread, sight.means, sound)


class BatchPeaks(NamedTuple):
    """What is kept of a batch's maps: means, peaks and whether these enter the strongest, (b, c); places (b, c, 2)."""

    means: Tensor
    peaks: Tensor
    entering: Tensor
    places: Tensor


def empty_peaks(photos: int, channels: int) -> BatchPeaks:
    """Return room for what is kept of a batch, on the CPU."""
    means, peaks = torch.empty(2, photos, channels, dtype=torch.float64)
    entering = torch.empty(photos, channels, dtype=torch.bool)
    return BatchPeaks(means, peaks, entering, torch.empty(photos, channels, 2, dtype=torch.long))


def reduce_maps(act: Tensor, lowest: Tensor, most: int, sight: BatchPeaks) -> None:
    """Put into `sight` what is kept of maps (b, c, h, w).

    The peak's place is found only for those that enter, which are few: higher than `lowest` (c,), and among the `most`
    highest of the batch.
    """
    # the quicker way goes along what lies next to each other in memory
    last = act.stride(1) == 1 and act.shape[1] > 1
    rows, along = (act.permute(0, 2, 3, 1).flatten(1, 2), 1) if last else (act.flatten(2), 2)
    sums = act.dtype if act.dtype == torch.float64 else torch.float32
    means, peaks = rows.mean(along, dtype=sums), rows.amax(along)
    entering = peaks > lowest.to(act.device, act.dtype)
    if most < len(act) and bool(lowest.isinf().any()):  # at first nearly all are higher
        sound = means.isfinite() & peaks.isfinite()
        entering &= peaks >= peaks.where(sound, -torch.inf).topk(most, 0).values[-1]
    for own, value in zip(sight, (means, peaks, entering), strict=False):
        own.copy_(value)
    photo, channel = entering.nonzero(as_tuple=True)
    if len(photo):
        where = act[photo, channel].flatten(1).argmax(1)
        places = torch.stack([where // act.shape[3], where % act.shape[3]], 1)
        sight.places[photo.cpu(), channel.cpu()] = places.cpu()


RunPhotos = Callable[[Tensor, Callable[[int, Tensor], None]], None]


@contextmanager
def photo_runs(model: Model, layers: Sequence[Layer]) -> Iterator[RunPhotos]:
    """Borrow a network and yield `visit(image, see)`, which calls `see(number, act)` as each of the layers returns.

    What is seen may be overwritten once `see` has returned, so that nothing need be copied; only as much of it is in
    memory as the network itself holds. The forward pass stops at the last of the layers.
    """
    keep_freed_memory()
    folding = model.folding([one.path for one in layers])
    wanted: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for number, one in enumerate(layers):
        wanted.setdefault((one.place.path, one.place.call), []).append((number, one.place.part))
    calls: Counter[str] = Counter()
    left: set[int] = set()

    def visit(image: Tensor, see: Callable[[int, Tensor], None]) -> None:
        def at(path: str, output: Any) -> None:
            here = wanted.get((path, calls[path]), [])
            calls[path] += 1
            found = tensors_in(output) if here else {}
            for number, part in here:
                if part not in found:
                    raise LayerRefused(f"{path} returned no tensor {part!r} this time; it has: {', '.join(found)}")
                see(number, model.layout.read(found[part]))
                left.discard(number)
            if not left:
                raise StopForward

        left.update(range(len(layers)))
        calls.clear()
        modules = {path: model.modules[path] for path, _ in wanted}
        try:
            with hooked(modules, at), folding.folded(), torch.no_grad():
                model.forward(channels_last_on_cpu(image))
        except StopForward:
            return
        missing = ", ".join(layers[number].path for number in sorted(left))
        raise LayerRefused(f"{missing} did not run in this forward pass, so there is nothing to see")

    with borrowed(model.module):
        yield visit
