"""The files of a training run: its pictures and the table of its gradients, made when they are requested."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from phosphene.atlases.report import escape_formula
from phosphene.images import encode
from phosphene.images.display import Picture
from phosphene.training.film_strip import LayerStrip, StripLayout, frame_layout, layer_strip
from phosphene.training.gradient_norms import GradientNorms
from phosphene.training.gradient_plot import curves
from phosphene.training.history import History
from phosphene.training.timeline import KernelTimeline
from phosphene.web.urls import layer_path

PNG, CSV = "image/png", "text/csv; charset=utf-8"
CURVES, TABLE, STRIP, CARD = "gradients.png", "gradients.csv", "strip.png", "card.png"
CARD_TILE, CARD_FILTERS, CARD_COLUMNS = 64, 12, 6  # largest side of a tile, filters and columns of the card's picture
KERNELS = "kernels"
COLUMNS = ("norm", "mean_abs", "weight_norm", "nonfinite")  # of a weight's gradient, as recorded


class TrainingPictures:
    """Draws the files of a run; what a layer's pictures share is kept, so make a new one when the record changes."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.strips: dict[tuple[str, str], LayerStrip] = {}

    def draw(self, name: str, card_layer: str | None) -> tuple[bytes, str]:
        """Return a file of the run, and its media type.

        Args:
            name: such as "conv1/kernels_2.png", the name of a file that the run has.
            card_layer: the layer that the index page shows.
        """
        if name == CURVES:
            return png(curves(self.history), {"model": self.history.facts["model"]}), PNG
        if name == TABLE:
            return gradient_csv(GradientNorms.of(self.history)), CSV
        if name == CARD:
            return png(card_picture(self.strip(str(card_layer))), {"layer": card_layer}), PNG
        slug, file = name.split("/")
        path = layer_path(slug)
        if file == STRIP:
            return png(self.strip(path).strip(), {"layer": path}), PNG
        noun, epoch = file.removesuffix(".png").split("_")
        return png(film_frame(self.strip(path, noun), int(epoch)), {"layer": path, "epoch": int(epoch)}), PNG

    def strip(self, path: str, noun: str = "") -> LayerStrip:
        """Return the film strip of a layer: of its kernels if `noun` says so, else of its filters if it has any."""
        if (path, noun) not in self.strips:
            self.strips[path, noun] = (
                LayerStrip(self.history, path, KernelTimeline(self.history, path, "signed"), "signed")
                if noun == KERNELS
                else layer_strip(self.history, path)
            )
        return self.strips[path, noun]


def card_picture(strip: LayerStrip) -> Picture:
    """Return a few filters of a layer after the last epoch, small."""
    sizes = strip.timeline.sizes()
    size = next((size for size in sizes if max(size) <= CARD_TILE), sizes[-1])
    filters = min(CARD_FILTERS, strip.timeline.shape[0])
    plan = StripLayout(size, filters, 1, min(CARD_COLUMNS, filters), [])
    return strip.mosaic(strip.resized_tiles(strip.timeline.epochs[-1], plan), plan)


def film_frame(strip: LayerStrip, epoch: int) -> Picture:
    """Return the sheet of a layer after an epoch, as a film has it."""
    plan = frame_layout(strip.timeline)
    return strip.frame(epoch, plan, strip.caption_parts(plan, "row" if plan.lines > 1 else "", "column", "frame")[:-1])


def png(picture: Picture, facts: Mapping[str, Any]) -> bytes:
    """Return a picture as PNG, encoded quickly because a visitor is waiting."""
    return encode.png(picture, facts, effort=3)


def gradient_csv(norms: GradientNorms) -> bytes:
    """Return a table with a row per epoch and weight."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("epoch", "weight", *COLUMNS))
    columns = [getattr(norms, name).tolist() for name in COLUMNS]
    for row, epoch in enumerate(norms.epochs):
        for index, weight in enumerate(norms.names):
            table.writerow((epoch, escape_formula(weight), *(column[row][index] for column in columns)))
    return text.getvalue().encode()
