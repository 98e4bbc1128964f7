"""Film strips: what a layer looked like over a training, an epoch a row, or an epoch a frame of a film."""

from __future__ import annotations

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
from phosphene.inspection.kernels import BETWEEN, GAP, STYLES, index_labels
from phosphene.storage.atomic import check_writable, write_file
from phosphene.training.history import History
from phosphene.training.timeline import FilterTimeline, KernelTimeline, LayerTimeline

STRIP, FRAME = (1600, 1440), (1200, 840)  # pixels that the tiles of a strip, or of a film's frame, take at most
ROWS, FRAMES = 30, 100  # epochs that are shown at most, evenly spread
READABLE, FEWER, LINES = 12, 24, 8  # side of a kernel, epochs and input channels of a strip where not everything fits
EPOCH_GAP = 8  # pixels between the epochs of a strip
METRICS = 3  # numbers that are written beside an epoch
PACE = (80, 800)  # milliseconds that a frame of a film stays, between which 8 seconds are shared out


def strip(history: History, layer: str | int, style: str = "signed") -> display.Picture:
    """Return a row an epoch of a layer: its rendered filters where the run holds them, else its kernels.

    A column is a filter, and where kernels see several channels, the lines of a row are these. All epochs share one
    scale (see `Kernels.grid`); a first layer's filters are in colour. Of more than fits, evenly spread epochs and the
    first filters are shown, and the caption says so.

    Raises:
        LayerNotFound: the run does not hold the layer. InvalidRequest: it holds no epoch, or there is no such style.
    """
    return layer_strip(history, layer, style).strip()


def film(history: History, layer: str | int, style: str = "signed") -> list[display.Picture]:
    """Return the sheet of a layer after each epoch, all of one size and on one scale; at most 100, evenly spread.

    Raises:
        LayerNotFound, InvalidRequest: as in `strip`.
    """
    return layer_strip(history, layer, style).film()


def save_film(frames: Sequence[display.Picture], path: str | Path) -> Path:
    """Write frames as an animated GIF, or an MP4 where the program `ffmpeg` is installed; both rest on the last one.

    Raises:
        InvalidRequest: there are no frames, or the name has another ending. ExtraMissing: there is no ffmpeg.
        OutputRefused: it cannot be written. Unfinished: ffmpeg failed.
    """
    target = Path(path)
    check_film(target)
    if not frames:
        raise InvalidRequest("a film needs at least one frame")
    shown = list(encode.same_size(frames))
    pace = max(PACE[0], min(PACE[1], 8000 // len(shown)))
    return write_file(target, encode.gif(shown, pace) if target.suffix.lower() == ".gif" else encode.mp4(shown, pace))


def check_film(target: Path) -> None:
    """Find out before the work whether a film can be written.

    Raises:
        InvalidRequest, ExtraMissing, OutputRefused.
    """
    if target.suffix.lower() not in (".gif", ".mp4"):
        raise InvalidRequest(f"{target} does not end in .gif or .mp4; give the film one of these")
    if target.suffix.lower() == ".mp4" and shutil.which("ffmpeg") is None:
        raise ExtraMissing(
            f"{target} needs the program ffmpeg, which is not installed; give a name that ends in .gif, or install it"
        )
    check_writable(target, folder=False)


class StripLayout(NamedTuple):
    """How much is shown, and how large."""

    size: tuple[int, int]  # of a tile
    filters: int
    lines: int
    columns: int  # tiles across
    epochs: list[int]


@dataclass(frozen=True, eq=False)
class LayerStrip:
    """What a layer looked like after each epoch of a training.

    Attributes:
        history: the record.
        layer: the layer's path.
        look: its kernels or rendered filters.
        style: how kernels are coloured.
    """

    history: History
    layer: str
    look: LayerTimeline
    style: str

    def facts(self, plan: StripLayout) -> dict[str, Any]:
        """Return in JSON terms what a strip or film shows."""
        return {
            "run": str(self.history.folder),
            "model": self.history.facts["model"],
            "layer": self.layer,
            "shows": self.look.noun,
            "filters": self.look.names[: plan.filters],
            "input_channels": plan.lines if self.look.shape[1] > 1 else None,
            "epochs": plan.epochs,
            "finished": len(self.look.epochs),
            "style": self.style if self.look.noun == "kernels" else None,
            "scale": list(self.look.scale[:2]) if self.look.scale else None,
            "versions": self.history.facts["versions"],
        }

    def strip(self) -> display.Picture:
        """Return a row an epoch."""
        plan = strip_plan(self.look)
        width, shown = plan.size[1], plan.epochs
        rows = [self.mosaic(self.sized(epoch, plan).transpose(0, 1), plan) for epoch in shown]
        body = captions.stack_images(rows, down=True, gap=EPOCH_GAP)
        step = rows[0].height + EPOCH_GAP
        middles = {index * step + rows[0].height // 2: epoch for index, epoch in enumerate(shown)}
        names = self.named(plan.columns, width + GAP)
        sides = [captions.with_axis_labels(body, {y: f"epoch {epoch}" for y, epoch in middles.items()}, names)]
        metrics = {epoch: self.history.metrics(epoch) for epoch in shown}
        for name in list(metrics[shown[-1]])[:METRICS]:
            cells = {y: number(metrics[epoch].get(name)) for y, epoch in middles.items()}
            sides.append(captions.column(name, cells, body.height))
        said = self.said(plan, "column", "line", "row")
        return self.captioned(sides, f"{self.layer} · {self.look.noun}, epoch by epoch", said)

    def film(self) -> list[display.Picture]:
        """Return a frame an epoch."""
        plan = frame_plan(self.look)
        said = self.said(plan, "row" if plan.lines > 1 else "", "column", "frame")
        return list(encode.same_size([self.frame(epoch, plan, said) for epoch in plan.epochs]))

    def frame(self, epoch: int, plan: StripLayout, said: Sequence[str]) -> display.Picture:
        """Return the sheet of one epoch, a row a filter and a column a channel, or filter by filter."""
        sheet = self.mosaic(self.sized(epoch, plan), plan)
        height, width = (side + GAP for side in plan.size)
        if plan.lines > 1:
            names = index_labels(range(plan.lines), width, 28)
            body = captions.with_axis_labels(sheet, self.named(plan.filters, height, 14), names)
        else:
            firsts = index_labels(range(0, plan.filters, plan.columns), height, 14)
            body = captions.with_axis_labels(sheet, {y: self.look.names[int(one)] for y, one in firsts.items()})
        found = list(self.history.metrics(epoch).items())[:METRICS]
        metrics = " · ".join(f"{name} {number(one)}" for name, one in found) or " "
        return self.captioned([body], f"{self.layer} · epoch {epoch}", said, metrics)

    def sized(self, epoch: int, plan: StripLayout) -> Tensor:
        """Return the tiles of an epoch, (filters, lines, h, w, 3), uint8, as large as the plan has them."""
        tiles, broken = self.look.tiles(epoch, plan.filters, plan.lines)
        flat = tiles.flatten(0, 1).permute(0, 3, 1, 2)
        levels = display.resized(flat.flatten(0, 1).double(), plan.size).round().to(torch.uint8)
        sized = levels.view(*flat.shape[:2], *plan.size).permute(0, 2, 3, 1).view(*tiles.shape[:2], *plan.size, 3)
        sign = grid.cross_out(grid.blank_tile(*plan.size))
        sized[broken] = torch.from_numpy(np.array(sign))
        return sized

    def mosaic(self, tiles: Tensor, plan: StripLayout) -> display.Picture:
        """Return tiles (rows, columns, h, w, 3) with lines between them that are grey where tiles may be white."""
        return grid.mosaic(tiles.flatten(0, 1), plan.columns, GAP, BETWEEN if plan.lines > 1 else 255)

    def named(self, count: int, step: int, room: int = 28) -> dict[int, str]:
        """Return the names of the first filters at the pixels where they belong."""
        return {place: self.look.names[int(one)] for place, one in index_labels(range(count), step, room).items()}

    def captioned(
        self, parts: list[display.Picture], title: str, said: Sequence[str], above: str = ""
    ) -> display.Picture:
        """Return pictures side by side with the colour bar, under what is said about them."""
        bars = [captions.colour_bar(*self.look.scale, min(240, max(100, parts[0].height)))] if self.look.scale else []
        body = captions.stack_images([*parts, *bars])
        note = captions.wrap_text([self.history.facts["model"], *said], max(body.width, 640))
        return captions.with_caption(body, title, f"{above}\n{note}" if above else note)

    def said(self, plan: StripLayout, filter_: str, channel: str, epoch: str) -> list[str]:
        """Return what is shown of how many, one filter a row or the like."""
        count, lines = self.look.shape[:2]
        every, shown = len(self.look.epochs), len(plan.epochs)
        spread = f"{every:,} epochs" if shown == every else f"{shown} of {every:,} epochs, evenly spread"
        return [
            amount(plan.filters, count, "filters") + f", one a {filter_}" * bool(filter_),
            *[f"{amount(plan.lines, lines, 'input channels')}, one a {channel}"] * (lines > 1),
            *self.look.said,
            f"{spread}, one a {epoch}" if every > 1 else "one epoch",
        ]

    def save(self, path: str | Path) -> tuple[Path, dict[str, Any]]:
        """Write the strip as PNG, or the film as GIF or MP4, and return the path and what it shows in JSON terms.

        Raises:
            InvalidRequest, ExtraMissing, OutputRefused, Unfinished: as `save_film`.
        """
        target = Path(path)
        if target.suffix.lower() == ".png":
            facts = self.facts(strip_plan(self.look))
            return write_file(target, encode.png(self.strip(), facts)), facts
        return save_film(self.film(), target), self.facts(frame_plan(self.look))


def layer_strip(history: History, layer: str | int, style: str = "signed") -> LayerStrip:
    """Return what a layer looked like over a training, ready to be drawn.

    Raises:
        LayerNotFound: the run holds neither kernels nor rendered filters of it. InvalidRequest: it holds no finished
            epoch, or there is no such style.
    """
    if style not in STYLES:
        raise InvalidRequest(f"there is no style {style!r}; there are: {', '.join(STYLES)}")
    history.chosen(None)  # refuses a run without epochs
    rendered = (history.facts.get("filters") or {}).get("layer")
    path = rendered if layer == rendered and rendered else found(history, layer)
    epochs = [one for one in history.epochs if history.entry(one)["filters"]] if path == rendered else []
    if epochs:
        return LayerStrip(history, path, FilterTimeline(history, epochs), style)
    return LayerStrip(history, path, KernelTimeline(history, found(history, path), style), style)


def found(history: History, layer: str | int) -> str:
    """Return the path of a layer whose kernels are recorded."""
    try:
        return history.find(layer)
    except LayerNotFound as error:
        rendered = [(history.facts.get("filters") or {}).get("layer")]
        there = [*history.layers, *(one for one in rendered if one and one not in history.layers)]
        near = f"the nearest are: {nearest(str(layer), there)}" if there else "it holds those of no layer"
        raise LayerNotFound(f"{history.folder} holds nothing of a layer {str(layer)!r}; {near}") from error


def strip_plan(look: LayerTimeline) -> StripLayout:
    """Return how a strip is laid out: everything as large as fits, else what is readable and the first of it."""
    filters, lines = look.shape[:2]
    rows = min(len(look.epochs), ROWS)
    across, down = STRIP
    for height, width in look.sizes():
        if filters * (width + GAP) <= across and rows * (lines * (height + GAP) + EPOCH_GAP) <= down:
            return StripLayout((height, width), filters, lines, filters, evenly(look.epochs, rows))
    height, width = readable(look.sizes())
    filters, rows = max(1, min(filters, across // (width + GAP))), min(rows, FEWER)
    lines = max(1, min(lines, LINES, (down // rows - EPOCH_GAP) // (height + GAP)))
    rows = max(1, min(rows, down // (lines * (height + GAP) + EPOCH_GAP)))
    return StripLayout((height, width), filters, lines, filters, evenly(look.epochs, rows))


def frame_plan(look: LayerTimeline) -> StripLayout:
    """Return how a film's frame is laid out: a row a filter and a column a channel, or filters in a near square."""
    filters, lines = look.shape[:2]
    across, down = FRAME
    shown = evenly(look.epochs, FRAMES)
    side = math.ceil(math.sqrt(filters))
    for height, width in look.sizes():
        columns, rows = (lines, filters) if lines > 1 else (side, math.ceil(filters / side))
        if columns * (width + GAP) <= across and rows * (height + GAP) <= down:
            return StripLayout((height, width), filters, lines, columns, shown)
    height, width = readable(look.sizes())
    columns, rows = max(1, across // (width + GAP)), max(1, down // (height + GAP))
    if lines > 1:
        return StripLayout((height, width), min(filters, rows), min(lines, columns), min(lines, columns), shown)
    return StripLayout((height, width), min(filters, rows * columns), 1, min(filters, columns), shown)


def readable(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the smallest size at which a tile can be made out."""
    return next((one for one in reversed(sizes) if max(one) >= READABLE), sizes[0])


def evenly(epochs: Sequence[int], count: int) -> list[int]:
    """Return so many of the epochs, evenly spread from the first to the last; of one, the last."""
    if len(epochs) <= count:
        return list(epochs)
    return (
        [epochs[round(index * (len(epochs) - 1) / (count - 1))] for index in range(count)]
        if count > 1
        else [epochs[-1]]
    )


def amount(shown: int, count: int, noun: str) -> str:
    """Return how many there are, and whether only the first are shown."""
    return f"{count:,} {noun}" if shown == count else f"the first {shown:,} of {count:,} {noun}"


def number(value: float | None) -> str:
    """Return a metric with three digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
