"""One pass of photos through a network, chunk by chunk, in memory that does not grow with their number.

A chunk is a run of consecutive photos; its result is a `Partial`, and `merge` combines two. Chunks and the batches in
them depend on the request alone, so that any process that takes a chunk gets the same numbers.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
from phosphene.evidence.quantile_sketch import QuantileSketch, add_values, empty_sketch, merge_sketches
from phosphene.evidence.top_photos import TopPhotos, add_photos, empty_top_photos, merge_top_photos
from phosphene.images.display import to_bytes
from phosphene.images.photo import Fit
from phosphene.network.capture import StopForward, borrowed, hooked, tensors_in
from phosphene.network.layers import Layer
from phosphene.network.memory import channels_last_on_cpu, is_out_of_memory
from phosphene.network.model import Model

CHUNK, MAX_CHUNKS = 512, 4096  # photos of a chunk at least, and chunks at most: each is a result to merge
BATCH_LIMITS = {"cpu": (2**26, 32), "gpu": (2**30, 128)}  # bytes of a batch's largest map, and photos of a batch
MAX_REFUSED = 1000  # photos named because they could not be read; the rest are only counted
EVIDENCE_VERSION = 1  # goes up by one when the same photos would give other numbers than before


class RefusedPhoto(NamedTuple):
    """A photo that could not be read."""

    photo: int
    reason: str


@dataclass(frozen=True, eq=False)
class Partial:
    """The result of some of the photos, for the channels of all layers one after the other.

    Attributes:
        top_photos: the strongest photos of every channel.
        sketch: the distribution of every channel's mean over the map.
        seen: photos that went through the network.
        lost: photos that could not be read; `refused` are the first of them.
    """

    top_photos: TopPhotos
    sketch: QuantileSketch
    seen: int = 0
    lost: int = 0
    refused: tuple[RefusedPhoto, ...] = ()


def empty_partial(channels: int, top: int) -> Partial:
    """Return the result before the first photo."""
    return Partial(empty_top_photos(channels, top), empty_sketch(channels))


def merge(first: Partial, second: Partial) -> Partial:
    """Return the result of the photos of both, which must have none in common.

    In whatever order and split results are merged, the strongest photos and all counts are the same; mean and deviation
    are the same within rounding.
    """
    return Partial(
        merge_top_photos(first.top_photos, second.top_photos),
        merge_sketches(first.sketch, second.sketch),
        first.seen + second.seen,
        first.lost + second.lost,
        tuple(sorted(first.refused + second.refused)[:MAX_REFUSED]),
    )


class LoadedPhoto(NamedTuple):
    """A photo as the network sees it: its number, the image (1, c, h, w) in [0, 1], and a hash of the image's bytes."""

    photo: int
    image: Tensor
    image_hash: int


@dataclass(frozen=True, eq=False)
class PhotoPass:
    """The request: which photos go through which network, at what size, and which of its layers are measured.

    Attributes:
        size: (h, w) of the images.
        top: photos to keep for each channel.
    """

    model: Model
    photos: PhotoDataset
    layers: tuple[Layer, ...]
    size: tuple[int, int]
    top: int

    @cached_property
    def spec(self) -> dict[str, Any]:
        """All that determines the numbers, in JSON terms."""
        return {
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "layers": [layer.path for layer in self.layers],
            "photos": self.photos.spec,
            "fit": [self.fit.resize, self.fit.interpolation, self.fit.squash],
            "size": list(self.size),
            "top": self.top,
            "versions": {"torch": torch.__version__, "evidence": EVIDENCE_VERSION},
        }

    @property
    def fit(self) -> Fit:
        """How a photo is brought to the size: as to the network's input size, with all lengths scaled."""
        fit = self.model.fit
        if fit.resize is None or self.size == self.model.input_size:
            return fit
        return replace(fit, resize=round(fit.resize * min(self.size) / min(self.model.input_size)))

    @property
    def channels(self) -> list[int]:
        """The number of channels of each layer."""
        return [layer.channels or 0 for layer in self.layers]

    @property
    def chunk_count(self) -> int:
        return math.ceil(len(self.photos) / self.chunk_size)

    @property
    def chunk_size(self) -> int:
        """Photos of a chunk: a multiple of `CHUNK`."""
        return CHUNK * math.ceil(len(self.photos) / (CHUNK * MAX_CHUNKS))

    def chunk(self, index: int) -> range:
        """Return the numbers of the photos of a chunk."""
        return range(index * self.chunk_size, min(len(self.photos), (index + 1) * self.chunk_size))

    @cached_property
    def batch_size(self) -> int:
        """Photos that go through the network at once: a power of two whose largest map fits the caches' memory."""
        max_bytes, max_photos = BATCH_LIMITS["cpu" if self.model.prototype_tensor.device.type == "cpu" else "gpu"]
        growth = math.prod(self.size) / math.prod(self.model.input_size)
        maps = [
            layer.channels * math.prod(layer.size) for layer in self.model.layers() if layer.channels and layer.size
        ]
        largest = max(maps) * growth * self.model.prototype_tensor.element_size()
        return int(min(max_photos, 2 ** max(0, math.floor(math.log2(max_bytes / largest)))))

    def load(self, photo: int) -> LoadedPhoto | RefusedPhoto:
        """Return a photo as the network sees it, or why it cannot be read."""
        try:
            image = self.fit(self.photos[photo], self.size)[0]
        except PhotoRefused as error:
            return RefusedPhoto(photo, str(error))
        image_hash = blake2b(to_bytes(image).numpy().tobytes(), digest_size=8)
        return LoadedPhoto(photo, image, int.from_bytes(image_hash.digest(), "little", signed=True))

    def partials(
        self, chunks: Iterable[int], watch: Callable[[int], None] | None = None
    ) -> Generator[Partial, None, None]:
        """Yield the result of each chunk, in order; `watch` is called with the photos done since its last call.

        Raises:
            SizeRefused: the network does not take images of the size.
            LayerRefused, OutOfMemory.
        """
        with warnings.catch_warnings(), photo_runs(self.model, self.layers) as run_photos:  # reading changes filters
            self.check_size(run_photos)
            floor = torch.full((sum(self.channels),), -torch.inf, dtype=torch.float64)
            for index in chunks:
                partial = self.partial(run_photos, self.chunk(index), floor, watch)
                # a peak no higher than the last one kept of an earlier chunk is not among the strongest of all
                floor = torch.maximum(floor, partial.top_photos.peaks[:, -1])
                yield partial

    def check_size(self, run_photos: RunPhotos) -> None:
        """Refuse a size that the network does not take, or that leaves nothing of a layer."""
        with self.model.refusing_size(self.size):
            run_photos(self.model.grey(self.size), lambda index, acts: self.check_map(self.layers[index], acts))

    def check_map(self, layer: Layer, acts: Tensor) -> None:
        if acts.dim() != 4 or acts.shape[1] != layer.channels:
            raise LayerRefused(f"{layer.path} returns {tuple(acts.shape)} at this size, not a map of its channels")
        if acts.numel() == 0:
            raise self.model.size_error(self.size, f"nothing is left of it at {layer.path!r}")

    def partial(
        self, run_photos: RunPhotos, photos: Iterable[int], floor: Tensor, watch: Callable[[int], None] | None = None
    ) -> Partial:
        """Return the result of photos, in ascending order of their numbers; peaks up to `floor` (c,) are left out."""
        partial = empty_partial(sum(self.channels), self.top)
        photos_in_order = self.photos.map_in_order(photos, self.load)
        while batch := list(islice(photos_in_order, self.batch_size)):
            loaded = [photo for photo in batch if isinstance(photo, LoadedPhoto)]
            refused = [photo for photo in batch if isinstance(photo, RefusedPhoto)]
            sketch = self.add_batch(run_photos, partial, loaded, floor) if loaded else partial.sketch
            seen, lost = partial.seen + len(loaded), partial.lost + len(refused)
            partial = Partial(partial.top_photos, sketch, seen, lost, (*partial.refused, *refused)[:MAX_REFUSED])
            if watch:
                watch(len(batch))
        return partial

    def add_batch(
        self, run_photos: RunPhotos, partial: Partial, photos: Sequence[LoadedPhoto], floor: Tensor
    ) -> QuantileSketch:
        """Run a batch, add its peaks to the result in place, and return the sketch with its means added."""
        starts = [0, *accumulate(self.channels)]
        floor = torch.maximum(floor, partial.top_photos.peaks[:, -1])
        # if all images of a batch differ, at most `top` of them are among the strongest
        most = self.top if len({photo.image_hash for photo in photos}) == len(photos) else len(photos)
        batch = empty_peaks(len(photos), starts[-1])

        def on_map(index: int, acts: Tensor) -> None:
            columns = slice(*starts[index : index + 2])
            reduce_maps(acts, floor[columns], most, BatchPeaks(*(field[:, columns] for field in batch)))

        try:
            run_photos(torch.cat([photo.image for photo in photos]).to(self.model.prototype_tensor), on_map)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            size = "×".join(map(str, self.size))
            message = f"{len(photos)} photos of {size} px do not fit the memory; give a smaller size"
            raise OutOfMemory(message) from error
        finite = batch.means.isfinite() & batch.peaks.isfinite()
        numbers = torch.tensor([photo.photo for photo in photos])
        hashes = torch.tensor([photo.image_hash for photo in photos])
        add_photos(partial.top_photos, batch.peaks, numbers, batch.positions, hashes, batch.enters & finite)
        return add_values(partial.sketch, batch.means, finite)


class BatchPeaks(NamedTuple):
    """A batch's means, peaks, and whether these enter the strongest, (b, c); the positions (b, c, 2) of these."""

    means: Tensor
    peaks: Tensor
    enters: Tensor
    positions: Tensor


def empty_peaks(photos: int, channels: int) -> BatchPeaks:
    """Return uninitialised peaks of a batch, on the CPU."""
    means, peaks = torch.empty(2, photos, channels, dtype=torch.float64)
    enters = torch.empty(photos, channels, dtype=torch.bool)
    return BatchPeaks(means, peaks, enters, torch.empty(photos, channels, 2, dtype=torch.long))


def reduce_maps(acts: Tensor, floor: Tensor, most: int, batch: BatchPeaks) -> None:
    """Fill `batch` from the maps (b, c, h, w) of a layer.

    The position is computed only for the few peaks that enter: higher than `floor` (c,), and among the `most` highest
    of the batch.
    """
    # it is quicker to reduce along neighbours in memory
    channels_last = acts.stride(1) == 1 and acts.shape[1] > 1
    flat, axis = (acts.permute(0, 2, 3, 1).flatten(1, 2), 1) if channels_last else (acts.flatten(2), 2)
    accumulator = acts.dtype if acts.dtype == torch.float64 else torch.float32
    means, peaks = flat.mean(axis, dtype=accumulator), flat.amax(axis)
    enters = peaks > floor.to(acts.device, acts.dtype)
    if most < len(acts) and bool(floor.isinf().any()):  # at first nearly all are higher
        finite = means.isfinite() & peaks.isfinite()
        enters &= peaks >= peaks.where(finite, -torch.inf).topk(most, 0).values[-1]
    for target, source in zip(batch, (means, peaks, enters), strict=False):
        target.copy_(source)
    photo, channel = enters.nonzero(as_tuple=True)
    if len(photo):
        flat_index = acts[photo, channel].flatten(1).argmax(1)
        positions = torch.stack([flat_index // acts.shape[3], flat_index % acts.shape[3]], 1)
        batch.positions[photo.cpu(), channel.cpu()] = positions.cpu()


RunPhotos = Callable[[Tensor, Callable[[int, Tensor], None]], None]


@contextmanager
def photo_runs(model: Model, layers: Sequence[Layer]) -> Iterator[RunPhotos]:
    """Borrow a network and yield `run_photos(images, on_map)`: `on_map(index, acts)` is called as each layer returns.

    `acts` may be overwritten once `on_map` has returned, so that nothing is copied and memory holds no more than the
    network itself needs. The forward pass stops at the last of the layers.
    """
    folding = model.folding([layer.path for layer in layers])
    outputs: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for index, layer in enumerate(layers):
        outputs.setdefault((layer.tensor_address.path, layer.tensor_address.call), []).append(
            (index, layer.tensor_address.part)
        )
    calls: Counter[str] = Counter()
    missing: set[int] = set()

    def run_photos(images: Tensor, on_map: Callable[[int, Tensor], None]) -> None:
        def on_output(path: str, output: Any) -> None:
            wanted = outputs.get((path, calls[path]), [])
            calls[path] += 1
            tensors = tensors_in(output) if wanted else {}
            for index, part in wanted:
                if part not in tensors:
                    raise LayerRefused(f"{path} returned no tensor {part!r} this time; it has: {', '.join(tensors)}")
                on_map(index, model.layout.read(tensors[part]))
                missing.discard(index)
            if not missing:
                raise StopForward

        missing.update(range(len(layers)))
        calls.clear()
        modules = {path: model.modules[path] for path, _ in outputs}
        try:
            with hooked(modules, on_output), folding.folded(), torch.no_grad():
                model.forward(channels_last_on_cpu(images))
        except StopForward:
            return
        paths = ", ".join(layers[index].path for index in sorted(missing))
        raise LayerRefused(f"{paths} did not run in this forward pass, so there is nothing to see")

    with borrowed(model.module):
        yield run_photos
