"""Film strips: how a layer looked over a training, as rows of a picture or frames of a film, one for each epoch."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phosphene.errors import ExtraMissing, InvalidRequest, LayerNotFound, nearest
from phosphene.images import captions, display, encode, grid
from phosphene.inspection.kernels import GAP, GAP_GREY, STYLES
from phosphene.storage.atomic import check_writable, write_file
from phosphene.training.history import History
from phosphene.training.timeline import FilterTimeline, KernelTimeline, LayerTimeline

STRIP, FRAME = (1600, 1440), (1200, 840)  # most pixels for the tiles of a strip, or of a film's frame
ROWS, FRAMES = 30, 100  # epochs that are shown at most, evenly spread
READABLE, FEWER, LINES = 12, 24, 8  # side of a kernel, epochs and input channels of a strip if not everything fits
EPOCH_GAP = 8  # pixels between the epochs of a strip
METRICS = 3  # numbers that are written beside an epoch
PACE = (80, 800)  # least and most milliseconds of a frame; a film takes 8 seconds within these limits


def strip(history: History, layer: str | int, style: str = "signed") -> display.Picture:
    """Return a picture with a row for each epoch: a layer's rendered filters if they are recorded, else its kernels.

    A column is a filter; if kernels have several input channels, a row has a line for each. All epochs share one scale
    (see `Kernels.grid`); a first layer's filters are in colour. If not everything fits, evenly spaced epochs and the
    first filters are shown, and the caption says so.

    Raises:
        LayerNotFound: the run does not hold the layer. InvalidRequest: it holds no epoch, or there is no such style.
    """
    return layer_strip(history, layer, style).strip()


def film(history: History, layer: str | int, style: str = "signed") -> list[display.Picture]:
    """Return the sheet of a layer after each epoch, of the same size and scale; at most 100, evenly spaced.

    Raises:
        LayerNotFound, InvalidRequest: as in `strip`.
    """
    return layer_strip(history, layer, style).film()


def save_film(frames: Sequence[display.Picture], path: str | Path) -> Path:
    """Write frames as an animated GIF, or an MP4 if the program `ffmpeg` is installed; both hold the last longer.

    Raises:
        InvalidRequest: there are no frames, or the name has another ending. ExtraMissing: there is no ffmpeg.
        OutputRefused: it cannot be written. Unfinished: ffmpeg failed.
    """
    target = Path(path)
    check_film(target)
    if not frames:
        raise InvalidRequest("a film needs at least one frame")
    sized = list(encode.pad_to_same_size(frames))
    pace = max(PACE[0], min(PACE[1], 8000 // len(sized)))
    return write_file(target, encode.gif(sized, pace) if target.suffix.lower() == ".gif" else encode.mp4(sized, pace))


def check_film(target: Path) -> None:
    """Check before the frames are drawn whether a film can be written."""
    if target.suffix.lower() not in (".gif", ".mp4"):
        raise InvalidRequest(f"{target} does not end in .gif or .mp4; give the film one of these")
    if target.suffix.lower() == ".mp4" and shutil.which("ffmpeg") is None:
        raise ExtraMissing(
            f"{target} needs the program ffmpeg, which is not installed; give a name that ends in .gif, or install it"
        )
    check_writable(target, folder=False)


class StripLayout(NamedTuple):
    """How many tiles are shown, and how large."""

    size: tuple[int, int]  # of a tile
    filters: int
    lines: int
    columns: int  # tiles side by side
    epochs: list[int]


@dataclass(frozen=True, eq=False)
class LayerStrip:
    """How a layer looked after each epoch of a training."""

    history: History
    layer: str  # its path
    timeline: LayerTimeline
    style: str  # of kernels

    def facts(self, layout: StripLayout) -> dict[str, Any]:
        """Return what a strip or film shows, as JSON values."""
        return {
            "run": str(self.history.folder),
            "model": self.history.facts["model"],
            "layer": self.layer,
            "shows": self.timeline.noun,
            "filters": self.timeline.names[: layout.filters],
            "input_channels": layout.lines if self.timeline.shape[1] > 1 else None,
            "epochs": layout.epochs,
            "finished": len(self.timeline.epochs),
            "style": self.style if self.timeline.noun == "kernels" else None,
            "scale": list(self.timeline.scale[:2]) if self.timeline.scale else None,
            "versions": self.history.facts["versions"],
        }

    def strip(self) -> display.Picture:
        """Return a picture with a row for each epoch."""
        layout = strip_layout(self.timeline)
        rows = [self.mosaic(self.resized_tiles(epoch, layout).transpose(0, 1), layout) for epoch in layout.epochs]
        body = captions.stack_images(rows, down=True, gap=EPOCH_GAP)
        step = rows[0].height + EPOCH_GAP
        middles = {index * step + rows[0].height // 2: epoch for index, epoch in enumerate(layout.epochs)}
        names = self.filter_labels(layout.columns, layout.size[1] + GAP)
        columns = [captions.with_axis_labels(body, {y: f"epoch {epoch}" for y, epoch in middles.items()}, names)]
        metrics = {epoch: self.history.metrics(epoch) for epoch in layout.epochs}
        for name in list(metrics[layout.epochs[-1]])[:METRICS]:
            cells = {y: format_metric(metrics[epoch].get(name)) for y, epoch in middles.items()}
            columns.append(captions.text_column(name, cells, body.height))
        caption = self.caption_parts(layout, "column", "line", "row")
        return self.captioned(columns, f"{self.layer} · {self.timeline.noun}, epoch by epoch", caption)

    def film(self) -> list[display.Picture]:
        """Return a frame for each epoch."""
        layout = frame_layout(self.timeline)
        caption = self.caption_parts(layout, "row" if layout.lines > 1 else "", "column", "frame")
        return list(encode.pad_to_same_size([self.frame(epoch, layout, caption) for epoch in layout.epochs]))

    def frame(self, epoch: int, layout: StripLayout, caption: Sequence[str]) -> display.Picture:
        """Return the sheet of an epoch: a row for each filter and a column for each channel, or filters only."""
        sheet = self.mosaic(self.resized_tiles(epoch, layout), layout)
        height, width = (side + GAP for side in layout.size)
        if layout.lines > 1:
            channels = captions.index_labels(range(layout.lines), width, 28)
            body = captions.with_axis_labels(sheet, self.filter_labels(layout.filters, height, 14), channels)
        else:
            firsts = captions.index_labels(range(0, layout.filters, layout.columns), height, 14)
            body = captions.with_axis_labels(sheet, {y: self.timeline.names[int(first)] for y, first in firsts.items()})
        metrics = list(self.history.metrics(epoch).items())[:METRICS]
        line = " · ".join(f"{name} {format_metric(value)}" for name, value in metrics) or " "
        return self.captioned([body], f"{self.layer} · epoch {epoch}", caption, line)

    def resized_tiles(self, epoch: int, layout: StripLayout) -> Tensor:
        """Return the tiles of an epoch at the layout's size, (filters, lines, h, w, 3), uint8."""
        tiles, nonfinite = self.timeline.tiles(epoch, layout.filters, layout.lines)
        flat = tiles.flatten(0, 1).permute(0, 3, 1, 2)
        levels = display.resize_maps(flat.flatten(0, 1).double(), layout.size).round().to(torch.uint8)
        sized = levels.view(*flat.shape[:2], *layout.size).permute(0, 2, 3, 1).view(*tiles.shape[:2], *layout.size, 3)
        cross = grid.cross_out(grid.blank_tile(*layout.size))
        sized[nonfinite] = torch.from_numpy(np.array(cross))
        return sized

    def mosaic(self, tiles: Tensor, layout: StripLayout) -> display.Picture:
        """Return tiles (rows, columns, h, w, 3) side by side; grey lines separate kernels, which may be white."""
        return grid.mosaic(tiles.flatten(0, 1), layout.columns, GAP, GAP_GREY if layout.lines > 1 else 255)

    def filter_labels(self, count: int, step: int, room: int = 28) -> dict[int, str]:
        """Return the names of the first filters by the pixel where each is written."""
        return {
            pixel: self.timeline.names[int(index)]
            for pixel, index in captions.index_labels(range(count), step, room).items()
        }

    def captioned(
        self, parts: list[display.Picture], title: str, caption: Sequence[str], metrics: str = ""
    ) -> display.Picture:
        """Return pictures side by side with the colour bar, below a title and a caption."""
        bars = (
            [captions.colour_bar(*self.timeline.scale, min(240, max(100, parts[0].height)))]
            if self.timeline.scale
            else []
        )
        body = captions.stack_images([*parts, *bars])
        note = captions.wrap_text([self.history.facts["model"], *caption], max(body.width, 640))
        return captions.with_caption(body, title, f"{metrics}\n{note}" if metrics else note)

    def caption_parts(self, layout: StripLayout, filter_: str, channel: str, epoch: str) -> list[str]:
        """Return how much of everything is shown; the words name what stands for a filter, a channel and an epoch."""
        filters, lines = self.timeline.shape[:2]
        total, drawn = len(self.timeline.epochs), len(layout.epochs)
        epochs = f"{total:,} epochs" if drawn == total else f"{drawn} of {total:,} epochs, evenly spread"
        return [
            amount(layout.filters, filters, "filters") + f", one a {filter_}" * bool(filter_),
            *[f"{amount(layout.lines, lines, 'input channels')}, one a {channel}"] * (lines > 1),
            *self.timeline.caption,
            f"{epochs}, one a {epoch}" if total > 1 else "one epoch",
        ]

    def save(self, path: str | Path) -> tuple[Path, dict[str, Any]]:
        """Write the strip as PNG, or the film as GIF or MP4, and return the path and what it shows as JSON values."""
        target = Path(path)
        if target.suffix.lower() == ".png":
            facts = self.facts(strip_layout(self.timeline))
            return write_file(target, encode.png(self.strip(), facts)), facts
        return save_film(self.film(), target), self.facts(frame_layout(self.timeline))


def layer_strip(history: History, layer: str | int, style: str = "signed") -> LayerStrip:
    """Return how a layer looked over a training, ready to be drawn.

    Raises:
        LayerNotFound: the run holds neither kernels nor rendered filters of it. InvalidRequest: it holds no finished
            epoch, or there is no such style.
    """
    if style not in STYLES:
        raise InvalidRequest(f"there is no style {style!r}; there are: {', '.join(STYLES)}")
    history.resolve_epoch(None)  # refuses a run without epochs
    rendered = (history.facts.get("filters") or {}).get("layer")
    path = rendered if layer == rendered and rendered else recorded_layer(history, layer)
    epochs = [epoch for epoch in history.epochs if history.entry(epoch)["filters"]] if path == rendered else []
    if epochs:
        return LayerStrip(history, path, FilterTimeline(history, epochs), style)
    return LayerStrip(history, path, KernelTimeline(history, recorded_layer(history, path), style), style)


def recorded_layer(history: History, layer: str | int) -> str:
    """Return the path of a layer whose kernels are recorded."""
    try:
        return history.find(layer)
    except LayerNotFound as error:
        rendered = (history.facts.get("filters") or {}).get("layer")
        paths = [*history.layers, *([rendered] if rendered and rendered not in history.layers else [])]
        near = f"the nearest are: {nearest(str(layer), paths)}" if paths else "it holds those of no layer"
        raise LayerNotFound(f"{history.folder} holds nothing of a layer {str(layer)!r}; {near}") from error


def strip_layout(timeline: LayerTimeline) -> StripLayout:
    """Return the layout of a strip: everything as large as it fits, else the first of it at a readable size."""
    filters, lines = timeline.shape[:2]
    rows = min(len(timeline.epochs), ROWS)
    across, down = STRIP
    for height, width in timeline.sizes():
        if filters * (width + GAP) <= across and rows * (lines * (height + GAP) + EPOCH_GAP) <= down:
            return StripLayout((height, width), filters, lines, filters, evenly_spaced(timeline.epochs, rows))
    height, width = readable(timeline.sizes())
    filters, rows = max(1, min(filters, across // (width + GAP))), min(rows, FEWER)
    lines = max(1, min(lines, LINES, (down // rows - EPOCH_GAP) // (height + GAP)))
    rows = max(1, min(rows, down // (lines * (height + GAP) + EPOCH_GAP)))
    return StripLayout((height, width), filters, lines, filters, evenly_spaced(timeline.epochs, rows))


def frame_layout(timeline: LayerTimeline) -> StripLayout:
    """Return the layout of a film's frame: a row a filter and a column a channel, or filters in a near square."""
    filters, lines = timeline.shape[:2]
    across, down = FRAME
    epochs = evenly_spaced(timeline.epochs, FRAMES)
    side = math.ceil(math.sqrt(filters))
    for height, width in timeline.sizes():
        columns, rows = (lines, filters) if lines > 1 else (side, math.ceil(filters / side))
        if columns * (width + GAP) <= across and rows * (height + GAP) <= down:
            return StripLayout((height, width), filters, lines, columns, epochs)
    height, width = readable(timeline.sizes())
    columns, rows = max(1, across // (width + GAP)), max(1, down // (height + GAP))
    if lines > 1:
        return StripLayout((height, width), min(filters, rows), min(lines, columns), min(lines, columns), epochs)
    return StripLayout((height, width), min(filters, rows * columns), 1, min(filters, columns), epochs)


def readable(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the smallest size at which a tile can be read."""
    return next((size for size in reversed(sizes) if max(size) >= READABLE), sizes[0])


def evenly_spaced(epochs: Sequence[int], count: int) -> list[int]:
    """Return at most so many of the epochs, evenly spaced from the first to the last; only the last if count is 1."""
    if len(epochs) <= count:
        return list(epochs)
    if count <= 1:
        return [epochs[-1]]
    return [epochs[round(index * (len(epochs) - 1) / (count - 1))] for index in range(count)]


def amount(drawn: int, count: int, noun: str) -> str:
    """Return how many there are, and whether only the first are shown."""
    return f"{count:,} {noun}" if drawn == count else f"the first {drawn:,} of {count:,} {noun}"


def format_metric(value: float | None) -> str:
    """Return a metric with three significant digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
