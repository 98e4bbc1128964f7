"""Activations: what every layer of a network computes for one photo, read in a single forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from phosphene.errors import ChannelNotFound, InvalidRequest, LayerNotFound, OutOfMemory, nearest
from phosphene.images import captions, display, encode, grid
from phosphene.inspection.activation_plot import depth_plot, summary_table
from phosphene.inspection.channel_statistics import channel_statistics, chunks, layer_summary
from phosphene.network.feature_maps import token_grid
from phosphene.network.layers import Layers, file_prefix
from phosphene.network.memory import is_out_of_memory
from phosphene.network.model import Model
from phosphene.progress import progress_bar
from phosphene.storage.atomic import check_writable, write_file, write_manifest

COLUMNS, GAP = 16, 2  # channels per row (R4.1), and pixels between them
TILE_SIDES, CHANNEL_SIDES = (40, 160), (480, 1600)  # least and most pixels of a map's longer side: in a grid, alone
PAGE_HEIGHT, PAGE_ROWS = 4096, 32  # most pixels and rows of a page
LONG_VECTOR, NUMBER_SIDE = 64, 12  # a longer vector has pages of 64 rows of 64 numbers; pixels of each
TABLE_ROWS = 40  # layers on a page of the summary


def activations(model: Model, photo: Tensor, layers: str | Sequence[str | int] = "*") -> Activations:
    """Return what the layers of a network compute for a photo, from one forward pass.

    Args:
        model: from `load`; it is used as it is and left as it was.
        photo: (1, c, h, w) in [0, 1], as `read` returns it, of any size.
        layers: a glob such as `block*`, or addresses.

    Raises:
        LayerNotFound, LayerRefused, SizeRefused, InvalidRequest, OutOfMemory.

    Example:
        >>> activations(load("builtin/vgg19"), read("cat.jpg"), "block1*")["block1_conv1"].shape
        torch.Size([64, 224, 224])
    """
    model.check_photo(photo)
    selected = model.layers().matching(layers) if isinstance(layers, str) else map(model.find, layers)
    table = Layers(list({layer.path: layer for layer in selected}.values()))
    paths = [layer.path for layer in table]
    image, region = model.fitted(photo)
    try:
        with model.reading(paths) as read, model.refusing_size(model.input_size), torch.no_grad():
            values = {str(path): value.detach().cpu() for path, value in read(image).items()}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"the activations of {len(paths)} layers do not fit in memory; choose fewer") from error
    spec = {
        **model.origin,
        "layers": layers if isinstance(layers, str) else paths,
        "photo": list(photo.shape[-2:]),
        "region": list(region),
        "size": list(model.input_size),
    }
    tensors = {path: values[path][0] if values[path].shape[:1] == (1,) else values[path] for path in paths}
    return Activations(tensors, table, spec)


@dataclass(frozen=True, eq=False)
class Activations(Mapping[str, Tensor]):
    """What layers computed for one photo: a mapping from a layer's path to its values.

    Attributes:
        tensors: maps (c, h, w), vectors (c,), tokens (n, c): as the layer computed them, to the bit; on the CPU.
        layers: the table of these layers, in the order of the forward pass.
        spec: model, layers, photo size and versions that made them, in JSON terms.

    A channel is BLANK if all values of its map are the same (within rounding: highest minus lowest is at most a
    millionth of the larger magnitude). In a vector, whose channels hold one number each, those that are 0 are blank.
    """

    tensors: Mapping[str, Tensor]
    layers: Layers
    spec: Mapping[str, Any]

    def __getitem__(self, path: str) -> Tensor:
        if path not in self.tensors:
            raise LayerNotFound(f"no activations of {path!r} were taken; the nearest are: {nearest(path, self)}")
        return self.tensors[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"Activations({len(self)} layers of {self.spec['model']})"

    def maps(self, path: str) -> Tensor:
        """Return a layer's values as maps (channels, h, w): a vector's of 1×1, tokens in their grid."""
        is_map = any(layer.is_map for layer in self.layers if layer.path == path)
        return as_maps(self[path], is_map, self.spec["size"])

    def pages(self, path: str) -> int:
        """Return how many pages the grid of a layer has."""
        return math.ceil(len(self.maps(path)) / page_layout(self.maps(path))[2])

    def grid(self, path: str, page: int = 0) -> display.Picture:
        """Return all channels of a layer, 16 a row, as in R4.1, in viridis, under the layer's name.

        Each channel has its mean subtracted, is divided by its standard deviation, × 64, + 128, clipped to 0..255; the
        numbers of a vector are standardised together. Blank channels are dark tiles with a ring; a channel with NaN or
        infinity is crossed out. Large maps are shrunk, small ones enlarged; what does not fit a page goes to the next.

        Raises:
            LayerNotFound, InvalidRequest (there is no such page).
        """
        maps = self.maps(path)
        (size, columns, count), pages = page_layout(maps), self.pages(path)
        if not 0 <= page < pages:
            raise InvalidRequest(f"{path} has no page {page}: it has {pages}, counted from 0")
        on_page = slice(page * count, (page + 1) * count)
        statistics = channel_statistics(maps)
        tiles = display.apply_colormap(standardised(maps, on_page, size))
        blank_tile = grid.blank_tile(*size)
        for tile, flags in ((blank_tile, statistics.blank), (grid.cross_out(blank_tile), statistics.broken)):
            tiles[flags[on_page]] = torch.from_numpy(np.array(tile))
        sheet = grid.mosaic(tiles, min(columns, len(maps)), GAP)
        firsts = enumerate(range(on_page.start, on_page.start + len(tiles), columns))
        labels = {row * (size[0] + GAP) + size[0] // 2: str(first) for row, first in firsts}
        height, width = maps.shape[1:]
        blank, broken = int(statistics.blank.sum()), int(statistics.broken.sum())
        note = f"{len(maps):,} channels" + (f" of {height}×{width}" if height * width > 1 else "")
        note += f" · {blank:,} blank ({blank / len(maps):.0%})"
        note += f" · {broken:,} with NaN or infinity" if broken else ""
        note += f" · shown at {size[0]}×{size[1]}" if size[0] < height or size[1] < width else ""
        note += f" · page {page + 1} of {pages}" if pages > 1 else ""
        offsets = captions.index_labels(range(min(columns, len(maps))), size[1] + GAP, 28, "+")
        return captions.with_caption(captions.with_axis_labels(sheet, labels, offsets), path, note)

    def channel(self, path: str, number: int) -> display.Picture:
        """Return one channel, enlarged, in viridis from its lowest value to its highest, with a colour bar.

        Raises:
            LayerNotFound, ChannelNotFound.
        """
        maps = self.maps(path)
        check_channel(path, number, len(maps))
        values = maps[number : number + 1].double()
        statistics, size = channel_statistics(values), tile_size(values, *CHANNEL_SIDES)
        low, high = float(statistics.low), float(statistics.high)
        picture, note = grid.blank_tile(*size), f"{values.shape[1]}×{values.shape[2]}"
        if bool(statistics.broken):
            picture, note = grid.cross_out(picture), f"{note} · with NaN or infinity"
        elif bool(statistics.blank) or low == high:
            note += f" · {high:.3g} throughout"
        else:
            levels = display.resize_maps((values - low) / (high - low) * 255, size).round().to(torch.uint8)
            bar = captions.colour_bar(low, high, "viridis", max(size[0], 80))
            picture = captions.stack_images([Image.fromarray(display.apply_colormap(levels[0]).numpy()), bar])
            note += f" · mean {float(statistics.mean):.3g}"
        return captions.with_caption(picture, f"{path} · channel {number}", note)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per layer, as JSON values: how abstract it is (map size), how sparse (share of blank channels).

        `blank` is the share of blank channels; `silent` that of channels that are nowhere above 0, so that no ReLU
        would let anything of them through; `broken` that of channels with NaN or infinity, which all other numbers
        leave out; `zero` the share of values that are exactly 0. `minimum`, `mean` and `maximum` are of all values.
        """
        return [dict(row) for row in self._rows]

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return [layer_summary(layer, self[layer.path], self.maps(layer.path)) for layer in self.layers]

    @property
    def summary_pages(self) -> int:
        """How many pages the summary has."""
        return math.ceil(len(self) / TABLE_ROWS)

    def summary_picture(self, page: int = 0) -> display.Picture:
        """Return a page of the summary: a row per layer, and on the first page map size and blank channels over depth.

        Raises:
            InvalidRequest: there is no such page.
        """
        if not 0 <= page < self.summary_pages:
            raise InvalidRequest(f"the summary has no page {page}: it has {self.summary_pages}, counted from 0")
        rows = self.rows()
        table = summary_table(rows[page * TABLE_ROWS : (page + 1) * TABLE_ROWS])
        sheet = table if page else captions.stack_images([depth_plot(rows), table], down=True)
        note = f"{len(self):,} layers, one photo · blank: nothing of the photo is left in the channel"
        note += f" · page {page + 1} of {self.summary_pages}" if self.summary_pages > 1 else ""
        return captions.with_caption(sheet, f"{self.spec['model']}, layer by layer", note)

    def save(self, folder: str | Path, channel: int | None = None, progress: bool = True) -> list[Path]:
        """Write the grid of every layer, or one channel of it, the summary, and `manifest.json` last; return the paths.

        A layer's file is `activations_<layer>.png`, further pages `activations_<layer>_page2.png` …
        `progress` shows a bar; see `progress.progress_bar`.

        Raises:
            OutputRefused: the folder cannot be written. ChannelNotFound: a layer does not have the channel.
        """
        target = Path(folder)
        check_writable(target, folder=True)
        if channel is not None:
            for path in self:
                check_channel(path, channel, len(self.maps(path)))
        files: dict[str, list[Path]] = {}
        with progress_bar("activations", "layers", progress) as bar:
            bar.total = len(self)
            for path, name in self.file_names(channel).items():
                files[path] = list(self.write_layer(target, name, path, channel))
                bar.done += 1
        summary = [
            write_file(target / f"{page_name('summary', page)}.png", encode.png(self.summary_picture(page), self.spec))
            for page in range(self.summary_pages)
        ]
        rows = [{**row, "files": [file.name for file in files[row["layer"]]]} for row in self.rows()]
        manifest = {**self.spec, "channel": channel, "activations": rows, "summary": [file.name for file in summary]}
        return [*chain(*files.values()), *summary, write_manifest(target / "manifest.json", manifest)]

    def file_names(self, channel: int | None) -> dict[str, str]:
        """Return for each layer a file name without its suffix; if any two would be the same, all are numbered."""
        ending = "" if channel is None else f"_channel_{channel}"
        names = {path: f"activations{file_prefix([path]).removeprefix('layer')}{ending}" for path in self}
        if len({name.lower() for name in names.values()}) < len(names):
            names = {path: f"{name}_{number}" for number, (path, name) in enumerate(names.items())}
        return names

    def write_layer(self, folder: Path, name: str, path: str, channel: int | None) -> Iterator[Path]:
        """Write the pages of a layer's grid, or one channel, one after the other, and yield their paths."""
        for page in range(1 if channel is not None else self.pages(path)):
            picture = self.grid(path, page) if channel is None else self.channel(path, channel)
            metadata = {**self.spec, "layer": path, "channel": channel, "page": page}
            yield write_file(folder / f"{page_name(name, page)}.png", encode.png(picture, metadata, effort=1))

    def _repr_png_(self) -> bytes:
        return encode.png(self.summary_picture(), self.spec)


def as_maps(value: Tensor, is_map: bool, size: Sequence[int]) -> Tensor:
    """Return what a layer computed as maps (channels, h, w).

    A vector becomes maps of 1×1. Tokens (n, c) are laid out in the grid that fits an input of `size` (h, w), without
    class tokens; if none fits they stay one matrix. The last dimension of (h, w, c) holds the channels.
    """
    if value.dim() < 2:
        return value.reshape(-1, 1, 1)
    if value.dim() == 2:
        sides = (1, 1) if len(value) == 1 else token_grid(len(value), (size[0], size[1]))
        return value[-math.prod(sides) :].T.reshape(-1, *sides) if sides else value[None]
    if value.dim() == 3:
        last = not is_map and value.shape[1] != value.shape[2]  # attention is (heads, tokens, tokens)
        return value.permute(2, 0, 1) if last else value
    return value.reshape(len(value), -1, value.shape[-1])


def standardised(maps: Tensor, selection: slice, size: tuple[int, int]) -> Tensor:
    """Return some maps as levels (n, *size), uint8, standardised as in R4.1; a vector's numbers go together."""
    if maps.shape[1:] == (1, 1):
        vector = display.standardise_map(maps.double().view(1, -1, 1))
        return display.resize_maps(vector.view(-1, 1, 1)[selection], size).to(torch.uint8)
    levels = (display.standardise_map(chunk.double()) for chunk in chunks(maps[selection]))
    return torch.cat([display.resize_maps(chunk, size).to(torch.uint8) for chunk in levels])


def tile_size(maps: Tensor, smallest: int, largest: int) -> tuple[int, int]:
    """Return the size (h, w) at which maps are shown: enlarged by a whole factor, as they are, or shrunk."""
    longer = max(maps.shape[1:])
    factor = math.ceil(smallest / longer) if longer < smallest else min(1, largest / longer)
    height, width = (max(8, round(side * factor)) for side in maps.shape[1:])
    return height, width


def page_layout(maps: Tensor) -> tuple[tuple[int, int], int, int]:
    """Return the size (h, w) of a map on a page, and how many fit in a row and on a page."""
    long = maps.shape[1:] == (1, 1) and len(maps) > LONG_VECTOR
    size = tile_size(maps, NUMBER_SIDE if long else TILE_SIDES[0], TILE_SIDES[1])
    columns, rows = (LONG_VECTOR, LONG_VECTOR) if long else (COLUMNS, PAGE_ROWS)
    return size, columns, columns * min(rows, PAGE_HEIGHT // (size[0] + GAP))


def check_channel(path: str, channel: int, count: int) -> None:
    """Refuse a channel that a layer does not have."""
    if not 0 <= channel < count:
        raise ChannelNotFound(f"{path} has no channel {channel}: it has 0 to {count - 1}")


def page_name(name: str, page: int) -> str:
    return f"{name}_page{page + 1}" if page else name
