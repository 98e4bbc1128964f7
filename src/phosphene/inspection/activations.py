"""Activations: what every layer of a network computes for one photo, read in a single forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from phosphene.errors import ChannelNotFound, InvalidRequest, LayerNotFound, OutOfMemory, nearest
from phosphene.images import captions, display, encode, grid
from phosphene.network.feature_maps import token_grid
from phosphene.network.layers import Layer, Layers, file_prefix
from phosphene.network.memory import is_out_of_memory
from phosphene.network.model import Model
from phosphene.storage.atomic import check_writable, write_file, write_manifest

COLUMNS, GAP = 16, 2  # channels a row (R4.1), and pixels between them
SMALLEST, LARGEST, ALONE = 40, 160, (480, 1600)  # pixels of a tile's longer side; of a channel shown alone
TALLEST, MOST_ROWS, LONG = 4096, 32, 64  # pixels and rows of a page; a longer vector has 64 rows of 64
AT_ONCE = 2_000_000  # values that are worked on at a time, in float64
TABLE_ROWS, LABELS = 40, 40  # layers on a page of the summary, and named along its plot
PLOT = (1100, 600)  # pixels
HEADINGS = ("layer", "kind", "map", "channels", "blank", "never > 0", "zero values", "lowest", "mean", "highest")
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"  # told apart by all eyes


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
    chosen = model.layers().matching(layers) if isinstance(layers, str) else [model.find(one) for one in layers]
    table = Layers(list({one.path: one for one in chosen}.values()))
    paths = [one.path for one in table]
    image, region = model.fitted(photo)
    try:
        with model.reading(paths) as read, model.taking(model.input_size), torch.no_grad():
            values = {str(path): value.detach().cpu() for path, value in read(image).items()}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"the activations of {len(paths)} layers do not fit the memory; choose fewer") from error
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

    A channel is BLANK where all values of its map are the same (within rounding: highest minus lowest is at most a
    millionth of the larger magnitude). Of a vector, whose channels hold one number each, those that are 0 are blank.
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
        """Return a layer's values as maps (channels, h, w); a vector's are of 1×1, and tokens lie in their grid."""
        layer = next((one for one in self.layers if one.path == path), None)
        return as_maps(self[path], layer is not None and layer.is_map, self.spec["size"])

    def pages(self, path: str) -> int:
        """Return how many pages the grid of a layer has."""
        return math.ceil(len(self.maps(path)) / sheet_of(self.maps(path))[2])

    def grid(self, path: str, page: int = 0) -> display.Picture:
        """Return all channels of a layer, 16 a row, as R4.1 shows them, in viridis, under the layer's name.

        Each channel has its mean subtracted, is divided by its standard deviation, × 64, + 128, clipped to 0..255; the
        numbers of a vector are standardised together. Blank channels are dark tiles with a ring; one that holds NaN or
        infinity is crossed. Large maps are shrunk, small ones enlarged, and what is more than a page goes to the next.

        Raises:
            LayerNotFound, InvalidRequest (there is no such page).
        """
        maps = self.maps(path)
        (size, columns, count), pages = sheet_of(maps), self.pages(path)
        if not 0 <= page < pages:
            raise InvalidRequest(f"{path} has no page {page}: it has {pages}, counted from 0")
        here = slice(page * count, (page + 1) * count)
        measured = measure(maps)
        tiles = display.apply_colormap(standardised(maps, here, size))
        blank = grid.blank_tile(*size)
        for sign, where in ((blank, measured.blank), (grid.cross_out(blank), measured.broken)):
            tiles[where[here]] = torch.from_numpy(np.array(sign))
        sheet = grid.mosaic(tiles, min(columns, len(maps)), GAP)
        firsts = enumerate(range(here.start, here.start + len(tiles), columns))
        marks = {row * (size[0] + GAP) + size[0] // 2: str(first) for row, first in firsts}
        height, width = maps.shape[1:]
        dull, wrong = int(measured.blank.sum()), int(measured.broken.sum())
        note = f"{len(maps):,} channels" + (f" of {height}×{width}" if height * width > 1 else "")
        note += f" · {dull:,} blank ({dull / len(maps):.0%})" + (f" · {wrong:,} with NaN or infinity" if wrong else "")
        note += f" · shown at {size[0]}×{size[1]}" if size[0] < height or size[1] < width else ""
        note += f" · page {page + 1} of {pages}" if pages > 1 else ""
        return captions.with_caption(captions.with_axis_labels(sheet, marks), path, note)

    def channel(self, path: str, number: int) -> display.Picture:
        """Return one channel, enlarged, in viridis from its lowest value to its highest, with a bar of numbers.

        Raises:
            LayerNotFound, ChannelNotFound.
        """
        maps = self.maps(path)
        check_channel(path, number, len(maps))
        one = maps[number : number + 1].double()
        measured, size = measure(one), tile_size(one, *ALONE)
        low, high = float(measured.low), float(measured.high)
        title, note = f"{path} · channel {number}", f"{one.shape[1]}×{one.shape[2]}"
        if bool(measured.broken):
            return captions.with_caption(
                grid.cross_out(grid.blank_tile(*size)), title, f"{note} · with NaN or infinity"
            )
        if bool(measured.blank) or low == high:
            return captions.with_caption(grid.blank_tile(*size), title, f"{note} · {high:.3g} throughout")
        levels = display.resized((one - low) / (high - low) * 255, size).round().to(torch.uint8)
        shown = Image.fromarray(display.apply_colormap(levels[0]).numpy())
        bar = captions.colour_bar(low, high, "viridis", max(size[0], 80))
        return captions.with_caption(
            captions.stack_images([shown, bar]), title, f"{note} · mean {float(measured.mean):.3g}"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return in JSON terms a row a layer: how abstract it is (map size) and how sparse (share of blank channels).

        `blank` is the share of blank channels, `silent` of channels that are nowhere above 0, so that no ReLU would let
        anything of them through; `zero` the share of values that are exactly 0; `minimum`, `mean` and `maximum` are of
        all values, `broken` the share of channels with NaN or infinity, which the other numbers leave out.
        """
        return [dict(one) for one in self._rows]

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return [layer_summary(one, self[one.path], self.maps(one.path)) for one in self.layers]

    @property
    def summary_pages(self) -> int:
        """How many pages the summary has."""
        return math.ceil(len(self) / TABLE_ROWS)

    def summary_picture(self, page: int = 0) -> display.Picture:
        """Return a page of the summary: a row a layer, and on the first page map size and blank channels over depth.

        Raises:
            InvalidRequest: there is no such page.
        """
        if not 0 <= page < self.summary_pages:
            raise InvalidRequest(f"the summary has no page {page}: it has {self.summary_pages}, counted from 0")
        rows = self.rows()
        shown = [cells(one) for one in rows[page * TABLE_ROWS : (page + 1) * TABLE_ROWS]]
        pictures = [*([] if page else [plot(rows)]), captions.table(HEADINGS, shown, PLOT[0])]
        note = f"{len(self):,} layers, one photo · blank: nothing of the photo is left in the channel"
        note += f" · page {page + 1} of {self.summary_pages}" if self.summary_pages > 1 else ""
        return captions.with_caption(
            captions.stack_images(pictures, down=True), f"{self.spec['model']}, layer by layer", note
        )

    def save(self, folder: str | Path, channel: int | None = None) -> list[Path]:
        """Write the grid of every layer, or one channel of it, the summary, and `manifest.json` last; return the paths.

        A layer's file is `activations_<layer>.png`, further pages `activations_<layer>_page2.png` …

        Raises:
            OutputRefused: the folder cannot be written. ChannelNotFound: a layer does not have the channel.
        """
        where = Path(folder)
        check_writable(where, folder=True)
        if channel is not None:
            for path in self:
                check_channel(path, channel, len(self.maps(path)))
        files = {
            path: list(self.written(where, name, path, channel)) for path, name in self.file_names(channel).items()
        }
        summary = [
            write_file(where / f"{paged('summary', page)}.png", encode.png(self.summary_picture(page), self.spec))
            for page in range(self.summary_pages)
        ]
        listed = [{**row, "files": [one.name for one in files[row["layer"]]]} for row in self.rows()]
        manifest = {**self.spec, "channel": channel, "activations": listed, "summary": [one.name for one in summary]}
        grids = [one for several in files.values() for one in several]
        return [*grids, *summary, write_manifest(where / "manifest.json", manifest)]

    def file_names(self, channel: int | None) -> dict[str, str]:
        """Return for each layer a file name without its ending; where two would be the same, all are numbered."""
        ending = "" if channel is None else f"_channel_{channel}"
        names = {path: f"activations{file_prefix([path]).removeprefix('layer')}{ending}" for path in self}
        if len({one.lower() for one in names.values()}) < len(names):
            names = {path: f"{name}_{number}" for number, (path, name) in enumerate(names.items())}
        return names

    def written(self, folder: Path, name: str, path: str, channel: int | None) -> Iterator[Path]:
        """Write the pages of a layer's grid, or one channel, one after the other, and yield where they are."""
        for page in range(1 if channel is not None else self.pages(path)):
            shown = self.grid(path, page) if channel is None else self.channel(path, channel)
            about = {**self.spec, "layer": path, "channel": channel, "page": page}
            yield write_file(folder / f"{paged(name, page)}.png", encode.png(shown, about, effort=1))

    def _repr_png_(self) -> bytes:
        return encode.png(self.summary_picture(), self.spec)


def as_maps(value: Tensor, is_map: bool, size: Sequence[int]) -> Tensor:
    """Return what a layer computed as maps (channels, h, w).

    A vector becomes maps of 1×1. Tokens (n, c) are laid out in the grid that fits an input of `size` (h, w), without
    class tokens; where none fits they stay one matrix. Of (h, w, c) the last are the channels.
    """
    if value.dim() < 2:
        return value.reshape(-1, 1, 1)
    if value.dim() == 2:
        grid = (1, 1) if len(value) == 1 else token_grid(len(value), (size[0], size[1]))
        return value[-math.prod(grid) :].T.reshape(-1, *grid) if grid else value[None]
    if value.dim() == 3:
        last = not is_map and value.shape[1] != value.shape[2]  # equal ones: attention, (heads, tokens, tokens)
        return value.permute(2, 0, 1) if last else value
    return value.reshape(len(value), -1, value.shape[-1])


class Channels(NamedTuple):
    """What there is to say of each channel of a layer: numbers (c,) in float64, and flags."""

    low: Tensor
    high: Tensor
    mean: Tensor
    zero: Tensor  # share of values that are exactly 0
    blank: Tensor
    broken: Tensor


def chunks(maps: Tensor) -> tuple[Tensor, ...]:
    """Return maps (c, h, w) in portions that are small in float64, too."""
    return torch.split(maps, max(1, AT_ONCE // maps[0].numel()))


def measure(maps: Tensor) -> Channels:
    """Return the figures of maps (c, h, w); see `Activations` for what is blank."""
    found = []
    for part in chunks(maps):
        values = part.double().flatten(1)
        low, high, mean, zero = values.amin(1), values.amax(1), values.mean(1), (values == 0).double().mean(1)
        flat = high - low <= 1e-6 * torch.maximum(low.abs(), high.abs()) if values.shape[1] > 1 else high == 0
        sound = values.isfinite().all(1)
        found.append((low, high, mean, zero, flat & sound, ~sound))
    return Channels(*(torch.cat(column) for column in zip(*found, strict=True)))


def standardised(maps: Tensor, chosen: slice, size: tuple[int, int]) -> Tensor:
    """Return the chosen maps as levels (n, *size), uint8, as R4.1 shows them; a vector's numbers go together."""
    if maps.shape[1:] == (1, 1):
        together = display.standardise_map(maps.double().view(1, -1, 1))
        return display.resized(together.view(-1, 1, 1)[chosen], size).to(torch.uint8)
    levels = (display.standardise_map(part.double()) for part in chunks(maps[chosen]))
    return torch.cat([display.resized(one, size).to(torch.uint8) for one in levels])


def tile_size(maps: Tensor, smallest: int = SMALLEST, largest: int = LARGEST) -> tuple[int, int]:
    """Return the size (h, w) at which maps are shown: enlarged by a whole factor, as they are, or shrunk."""
    longer = max(maps.shape[1:])
    factor = math.ceil(smallest / longer) if longer < smallest else min(1, largest / longer)
    height, width = (max(8, round(side * factor)) for side in maps.shape[1:])
    return height, width


def sheet_of(maps: Tensor) -> tuple[tuple[int, int], int, int]:
    """Return the size at which maps are shown, how many a row and a page; of a long vector more, and smaller ones."""
    long = maps.shape[1:] == (1, 1) and len(maps) > LONG
    size = tile_size(maps, 12 if long else SMALLEST)
    columns, most = (LONG, LONG) if long else (COLUMNS, MOST_ROWS)
    return size, columns, columns * min(most, TALLEST // (size[0] + GAP))


def check_channel(path: str, channel: int, count: int) -> None:
    """Refuse a channel that a layer does not have."""
    if not 0 <= channel < count:
        raise ChannelNotFound(f"{path} has no channel {channel}: it has 0 to {count - 1}")


def paged(name: str, page: int) -> str:
    return f"{name}_page{page + 1}" if page else name


def layer_summary(layer: Layer, value: Tensor, maps: Tensor) -> dict[str, Any]:
    """Return the row of one layer; see `Activations.rows`."""
    measured = measure(maps)
    low, high, mean, zero = (one[~measured.broken] for one in measured[:4])
    numbers = {"silent": (high <= 0).double().mean(), "zero": zero.mean(), "mean": mean.mean()}  # NaN: all are broken
    numbers |= {"minimum": low.min(), "maximum": high.max()} if len(low) else {}
    return {
        "layer": layer.path,
        "kind": layer.kind,
        "shape": list(value.shape),
        "channels": len(maps),
        "map": list(maps.shape[1:]) if maps[0].numel() > 1 else None,
        "blank": float(measured.blank.double().mean()),
        "broken": float(measured.broken.double().mean()),
        **dict.fromkeys(("minimum", "maximum")),
        **{name: None if bool(one.isnan()) else float(one) for name, one in numbers.items()},
    }


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row as text: numbers with about three digits that count."""
    size = "×".join(map(str, row["map"] or ()))
    shares = ["" if row[name] is None else f"{row[name]:.0%}" for name in ("blank", "silent", "zero")]
    numbers = [math.nan if row[name] is None else row[name] for name in ("minimum", "mean", "maximum")]
    short = [f"{one:,.0f}" if 1000 <= abs(one) < 1e7 else f"{one:.3g}" for one in numbers]
    return [row["layer"], row["kind"], size, f"{row['channels']:,}", *shares, *short]


def plot(rows: Sequence[Mapping[str, Any]]) -> display.Picture:
    """Return the plot over depth: above, the side of the maps and the channels; below, what is blank.

    Layers with values below 0 come before an activation, so their channels are hardly ever blank: they are shown faint.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # most of a second
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure((PLOT[0] / 100, PLOT[1] / 100), dpi=100, layout="constrained"))
    above, below = canvas.figure.subplots(2, 1, sharex=True)
    depth = range(len(rows))
    maps = [x for x in depth if rows[x]["map"]]
    above.plot(depth, [row["channels"] for row in rows], "s", color=ORANGE, markersize=4, label="channels")
    above.plot(maps, [max(rows[x]["map"]) for x in maps], "o", color=BLUE, markersize=4, label="side of the map, px")
    above.set_yscale("log", base=2)
    above.yaxis.set_major_formatter("{x:g}")
    signed = [x for x in depth if rows[x]["minimum"] is None or rows[x]["minimum"] < 0]
    lined = sorted({*depth} - {*signed})
    for shown, name, style, colour, label in (
        (signed, "blank", ".", GREY, "blank channels where values have both signs"),
        (lined, "zero", "--", RED, "values that are 0"),
        (lined, "blank", "o-", GREEN, "blank channels"),
    ):
        below.plot(shown, [rows[x][name] for x in shown], style, color=colour, markersize=4, linewidth=1, label=label)
    below.set(ylim=(-0.05, 1.05), xlim=(-1, len(rows)))
    below.yaxis.set_major_formatter("{x:.0%}")
    named = depth[:: math.ceil(len(rows) / LABELS)]
    endings = [one if len(one) < 25 else f"…{one[-23:]}" for one in (rows[x]["layer"] for x in named)]
    below.set_xticks(named, endings, rotation=90, fontsize=8, parse_math=False)
    for axes, title in ((above, "abstraction: smaller maps, more channels"), (below, "sparsity: what is blank")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(axis="y", color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1)
    canvas.draw()  # type: ignore[no-untyped-call]
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())  # type: ignore[no-untyped-call]
