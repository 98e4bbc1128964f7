"""Kernels: the weights of one convolution, drawn so that they can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phosphene.errors import InvalidRequest, LayerRefused, WeightsRefused, nearest
from phosphene.images import captions, display, encode, grid
from phosphene.network.layers import Layer
from phosphene.network.model import Model
from phosphene.storage.atomic import write_file

PAGE = 2560  # pixels of a page's longest side, about
SMALLEST, LARGEST = 9, 48  # pixels of a kernel's longer side
GAP, GAP_GREY = 1, 195  # pixels between kernels, and their grey
SCALE_IN_RMS = 4  # root mean squares in the scale, at most: one outlier would leave all others without colour
INPUTS = 12  # most input channels of a filter drawn with one pixel per weight
BLUE, ORANGE = (33, 102, 172), (179, 88, 6)  # equally dark; colour-blind eyes tell them apart
# Colour map, and whether 0 is its middle. Colour-blind eyes tell red from blue, but not red from green.
STYLES = {"signed": ("RdBu_r", True), "grey": ("gray", False)}


def kernels(model: Model, address: str | int) -> Kernels:
    """Return the kernels of a two-dimensional convolution.

    Args:
        model: from `load`.
        address: the layer's path, or n for the n-th convolution.

    Raises:
        LayerNotFound: there is no such layer.
        LayerRefused: it holds no such kernels; the message names the nearest that do.
        WeightsRefused: they hold NaN or infinity.

    Example:
        >>> kernels(load("builtin/vgg19"), "block1_conv1").weights.shape
        torch.Size([64, 3, 3, 3])
    """
    layer = model.find(address)
    weights = weights_of(model, layer)
    if weights is None:
        paths = [candidate.path for candidate in model.layers() if weights_of(model, candidate) is not None]
        have = (
            f"the nearest that have: {nearest(layer.path, paths)}" if paths else "and no layer of this network has any"
        )
        raise LayerRefused(f"{layer.path} is a {layer.kind}, which has no kernels (out, in, height, width); {have}")
    if not bool(weights.isfinite().all()):
        raise WeightsRefused(f"the kernels of {layer.path} hold NaN or infinity; load a sound file")
    convolutions = (layer.tensor_address for layer in model.layers() if layer.convolution)
    sees_photo = layer.tensor_address == next(convolutions, None) and weights.shape[1] == model.channels_in == 3
    order = "bgr" if getattr(model.preprocessing, "bgr", False) else "rgb"
    spec = {
        **model.origin,
        "layer": layer.path,
        "kind": layer.kind,
        "shape": list(weights.shape),
        "colours": order if sees_photo else None,
    }
    return Kernels(weights.detach().cpu().clone(), spec)


def weights_of(model: Model, layer: Layer) -> Tensor | None:
    """Return a layer's kernels (out, in, kh, kw), None if it has none."""
    return model.layout.kernel(model.modules[layer.tensor_address.path])


@dataclass(frozen=True, eq=False)
class Kernels:
    """The kernels of one convolution.

    Attributes:
        weights: (out, in, kh, kw), as the network holds them; on the CPU. In a grouped convolution `in` counts the
            channels of one group.
        spec: model, layer and versions, in JSON terms; `colours` is "rgb" or "bgr" in the first convolution of a
            network that sees colour photos, the order of its input channels.
    """

    weights: Tensor
    spec: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.weights.shape))
        return f"Kernels({shape} of {self.spec['layer']} in {self.spec['model']})"

    @property
    def pages(self) -> int:
        """How many pages the grid has."""
        return len(KernelSheet.of(self.weights).pages)

    def grid(self, page: int = 0, style: str = "signed") -> display.Picture:
        """Return one row of kernels per output filter, one column per input channel (R2.2b), on one common scale.

        Style `signed` goes from blue through white, which is 0, to red: as far either way as the largest magnitude,
        but at most four times the root mean square, for one outlier would leave all others without colour. `grey` is
        that of R2.2b: the lowest weight black, the highest white. If filters have few input channels each, the rows
        go on in a further block to the right; filters of one channel (depthwise) fill a near-square grid row by row.
        Kernels are enlarged by a whole factor, and what does not fit a page goes to the next.

        Raises:
            InvalidRequest: there is no such page or style.
        """
        if style not in STYLES:
            raise InvalidRequest(f"there is no style {style!r}; there are: {', '.join(STYLES)}")
        sheet = KernelSheet.of(self.weights)
        if not 0 <= page < len(sheet.pages):
            raise InvalidRequest(f"{self.spec['layer']} has no page {page}: it has {len(sheet.pages)}, counted from 0")
        filters, channels = sheet.pages[page]
        colours, about_zero = STYLES[style]
        low, high = scale(self.weights, about_zero)
        levels = as_levels(self.weights[filters.start : filters.stop, channels.start : channels.stop], low, high)
        tiles = display.apply_colormap(levels, colours)
        blocks = [
            sheet.block(tiles[start : start + sheet.rows], filters.start + start, channels, self.spec["colours"])
            for start in range(0, len(filters), sheet.rows)
        ]
        bar = captions.colour_bar(low, high, colours, min(240, max(100, blocks[0].height)))
        notes = [f"{len(self):,} filters of one channel each"]
        if sheet.columns > 1:
            notes = [f"{len(self):,} filters, one a row", f"{self.weights.shape[1]:,} input channels, one a column"]
        notes += ["×".join(map(str, self.weights.shape[2:]))]
        largest = float(self.weights.abs().max())
        notes += [f"largest ±{largest:.3g}, shown as ±{high:.3g}"] if about_zero and largest > high * 1.001 else []
        notes += [f"page {page + 1} of {len(sheet.pages)}"] if len(sheet.pages) > 1 else []
        return captions.with_caption(captions.stack_images([*blocks, bar]), self.title("kernels"), " · ".join(notes))

    def rgb(self) -> display.Picture:
        """Return one tile in colour per filter, row by row, for a layer whose input is a photo's three channels.

        All share the scale of the signed grid: the level 0 is its lowest weight, 128 (mid-grey) 0, 255 its highest.

        Raises:
            LayerRefused: the filters do not have three input channels.
        """
        if self.weights.shape[1] != 3:
            raise LayerRefused(f"{self.spec['layer']} has {self.weights.shape[1]} input channels; a colour has 3")
        low, high = scale(self.weights, True)
        levels = as_levels(self.weights, low, high)
        levels = levels.flip(1) if self.spec["colours"] == "bgr" else levels
        columns = math.ceil(math.sqrt(len(self)))
        factor = enlargement(self.weights, columns)
        tiles = levels.permute(0, 2, 3, 1).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        sheet = grid.mosaic(tiles, columns, GAP)
        height, width = (side * factor + GAP for side in self.weights.shape[2:])
        labels = captions.index_labels(range(0, len(self), columns), height, 14)
        offsets = captions.index_labels(range(columns), width, 28, "+")
        size = "×".join(map(str, self.weights.shape[2:]))
        note = f"{len(self):,} filters of {size} in colour · grey is 0, full colour ±{high:.3g}"
        labelled = captions.with_axis_labels(sheet, labels, offsets)
        return captions.with_caption(labelled, self.title("filters in colour"), note)

    def pixels(self, filters: Sequence[int]) -> tuple[display.Picture, dict[str, Any]]:
        """Return filters with one pixel per weight and one row per filter, and the legend in JSON terms.

        A column is one of a filter's strongest input channels (by L2 norm, strongest first; of equal ones the lower
        number), at most `INPUTS`. Colours go from blue through white, which is 0, to orange; in a first layer that
        sees colour a filter is one tile in true colour, where mid-grey is 0. Each filter has a scale to itself, as far
        either way as its largest magnitude.

        The legend holds `tile` (width, height), `columns`, `inputs` (a row's input channels, in order), `scale` (a
        row's largest magnitude), `colours` ("signed" or "rgb") and `of`, the number of input channels. In a grouped
        convolution these are counted within the group.
        """
        weights = self.weights[list(filters)]
        largest = weights.flatten(1).abs().amax(1).double()
        norms = torch.linalg.vector_norm(weights.to(torch.promote_types(weights.dtype, torch.float32)), dim=(2, 3))
        inputs = norms.argsort(dim=1, descending=True, stable=True)[:, :INPUTS]
        if self.spec["colours"]:
            inputs = torch.arange(3).expand(len(filters), 3)
        drawn = weights.gather(1, inputs[..., None, None].expand(-1, -1, *weights.shape[2:])).double()
        tiles = self.colourise(drawn / largest.where(largest > 0, 1).view(-1, 1, 1, 1))
        count, columns, height, width = tiles.shape[:4]
        image = tiles.transpose(1, 2).reshape(count * height, columns * width, 3)
        legend = {
            "tile": [width, height],
            "columns": columns,
            "inputs": inputs.tolist(),
            "scale": largest.tolist(),
            "colours": "rgb" if self.spec["colours"] else "signed",
            "of": weights.shape[1],
        }
        return grid.picture(image.permute(2, 0, 1)), legend

    def colourise(self, shares: Tensor) -> Tensor:
        """Return shares (n, m, kh, kw) of each filter's scale, -1 to 1, as tiles (n, columns, kh, kw, 3), uint8."""
        if self.spec["colours"]:
            shares = shares.flip(1) if self.spec["colours"] == "bgr" else shares
            return display.to_bytes((shares + 1) / 2).permute(0, 2, 3, 1)[:, None]
        ends = torch.where(shares[..., None] > 0, torch.tensor(ORANGE), torch.tensor(BLUE))
        return (255 - shares.abs()[..., None] * (255 - ends)).round().to(torch.uint8)

    def title(self, subject: str) -> str:
        """Return the title of a picture; in a recorded training it names the epoch."""
        epoch = self.spec.get("epoch")
        return f"{self.spec['layer']} · {subject}" + ("" if epoch is None else f" after epoch {epoch}")

    def pictures(self, style: str = "signed") -> Iterator[display.Picture]:
        """Yield every page of the grid; in a network's first layer one picture, with tiles in colour beside the grid.

        The tiles in colour are signed, so only the style `signed` has them.
        """
        if self.spec["colours"] and style == "signed":
            yield captions.stack_images([self.rgb(), self.grid()])
            return
        yield from (self.grid(page, style) for page in range(self.pages))

    def save(self, path: str | Path) -> list[Path]:
        """Write `pictures()` as PNG files, the first at `path`, further pages at `…_page2.png`; return the paths.

        Raises:
            OutputRefused: they cannot be written.
        """
        return write_pages(self.pictures(), Path(path), self.spec)

    def _repr_png_(self) -> bytes:
        return encode.png(next(self.pictures()), self.spec)


def write_pages(pages: Iterable[display.Picture], target: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """Write pages as PNG, the first as `target`, further ones as `…_page2.png`, and return the paths."""
    return [
        write_file(
            target.with_name(f"{target.stem}_page{page + 1}{target.suffix}") if page else target,
            encode.png(picture, {**metadata, "page": page}),
        )
        for page, picture in enumerate(pages)
    ]


class KernelSheet(NamedTuple):
    """The layout of kernels: enlarged by `factor`, `rows` filters of `columns` channels a block, and the pages."""

    factor: int
    rows: int
    columns: int
    pages: list[tuple[range, range]]  # the filters and the channels on each

    @classmethod
    def of(cls, weights: Tensor) -> KernelSheet:
        """Return the layout for kernels (out, in, kh, kw)."""
        filters, channels, height, width = weights.shape
        most_down, most_right = (PAGE // (enlargement(weights) * side + GAP) or 1 for side in (height, width))
        if channels == 1:
            side = math.ceil(math.sqrt(filters))
            return cls(enlargement(weights, side), filters, 1, [(range(filters), range(1))])
        across = min(channels, most_right)
        blocks = max(1, min(math.isqrt(filters // channels), most_right // channels))
        rows = min(math.ceil(filters / blocks), most_down)
        pages = [
            (range(top, min(top + rows * blocks, filters)), range(left, min(left + across, channels)))
            for top in range(0, filters, rows * blocks)
            for left in range(0, channels, across)
        ]
        return cls(enlargement(weights, max(rows, across * blocks)), rows, across, pages)

    def block(self, tiles: Tensor, first: int, channels: range, colours: str | None) -> display.Picture:
        """Return one block of kernels (rows, columns, kh, kw, 3) with its filters' and channels' numbers or colours."""
        height, width = (side * self.factor + GAP for side in tiles.shape[2:4])
        big = tiles.flatten(0, 1).repeat_interleave(self.factor, 1).repeat_interleave(self.factor, 2)
        if self.columns == 1:
            side = math.ceil(math.sqrt(len(tiles)))
            rows = captions.index_labels(range(0, len(tiles), side), height, 14)
            offsets = captions.index_labels(range(side), width, 28, "+")
            return captions.with_axis_labels(grid.mosaic(big, side, GAP), rows, offsets)
        rows = captions.index_labels(range(first, first + len(tiles)), height, 14)
        columns = captions.index_labels(channels, width, 28)
        if colours:
            columns = {position: colours.upper()[int(number)] for position, number in columns.items()}
        return captions.with_axis_labels(grid.mosaic(big, len(channels), GAP, GAP_GREY), rows, columns)


def enlargement(weights: Tensor, side: int | None = None) -> int:
    """Return the whole factor by which kernels are enlarged: the least, or the best for `side` of them along a page."""
    longer = max(weights.shape[2:])
    least = math.ceil(SMALLEST / longer)
    return least if side is None else max(least, min(LARGEST // longer, (PAGE // 2 // side - GAP) // longer))


def scale(weights: Tensor, about_zero: bool) -> tuple[float, float]:
    """Return the lowest and highest number of the common scale; of kernels that are all 0, -1 and 1."""
    low, high = float(weights.min()), float(weights.max())
    if about_zero or low == high:
        high = min(max(abs(low), abs(high)), SCALE_IN_RMS * float(weights.double().square().mean().sqrt())) or 1.0
        low = -high
    return low, high


def as_levels(weights: Tensor, low: float, high: float) -> Tensor:
    """Return weights as levels 0..255, uint8, of the scale from `low` to `high`."""
    return display.to_bytes((weights.double() - low) / (high - low))
