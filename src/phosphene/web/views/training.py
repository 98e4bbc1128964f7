"""A training run on the page: the contexts of its view and its card, and its files."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from threading import RLock
from typing import Any, NamedTuple

from phosphene.errors import EntryNotFound, PhospheneError
from phosphene.training.film_strip import evenly_spaced, format_metric
from phosphene.training.gradient_verdicts import verdicts
from phosphene.training.history import History, format_epochs
from phosphene.web.cache import SizedCache
from phosphene.web.urls import layer_slug
from phosphene.web.views.training_pictures import CARD, COLUMNS, CURVES, KERNELS, STRIP, TABLE, TrainingPictures

MAX_EPOCHS = 100  # that a view shows, evenly spread
FILE_BYTES = 32 * 2**20  # of cached files of a run
CHART = (240, 64)  # width and height of a metric's chart


class EpochEntry(NamedTuple):
    """What the view keeps of an epoch's entry."""

    metrics: Mapping[str, float]
    weights: Mapping[str, tuple[float, ...]]  # COLUMNS of each weight that had a gradient
    gradients: str  # how they were recorded, in words; empty if there are none
    filters: bool  # whether filters were rendered
    notes: tuple[str, ...]


class TrainingView:
    """A run under `runs/<name>/` of the site, read again when the training has gone on.

    Args:
        history: the record.
        name: of the run in the site.
    """

    def __init__(self, history: History, name: str) -> None:
        self.history, self.name = history, name
        self.lock = RLock()  # one picture at a time: matplotlib is not thread-safe
        self.state = ""  # the tag of the record that the caches below were read from
        self.cache: SizedCache[tuple[bytes, str]] = SizedCache(FILE_BYTES)
        self.pictures = TrainingPictures(history)
        self.epoch_cache: dict[int, EpochEntry] = {}
        self.gradient_verdicts: list[str] | None = None

    def tag(self) -> str:
        """Return a value that changes when an epoch is added or replaced."""
        manifests = [self.history.epoch_folder(epoch) / "manifest.json" for epoch in self.history.epochs]
        times = [(path.parent.name, path.stat().st_mtime_ns) for path in manifests if path.exists()]
        return hashlib.sha256(repr(times).encode()).hexdigest()[:16]

    def refresh(self) -> None:
        """Forget what was read if the record has changed since."""
        tag = self.tag()
        if tag != self.state:
            self.state, self.gradient_verdicts, self.pictures = tag, None, TrainingPictures(self.history)
            self.epoch_cache.clear()

    @property
    def epochs(self) -> list[int]:
        """The numbers of the epochs that are shown."""
        return evenly_spaced(self.history.epochs, MAX_EPOCHS)

    @property
    def layers(self) -> list[str]:
        """The layers that have pictures: those with kernels, and the one whose filters are rendered."""
        paths = dict.fromkeys([*self.history.layers, *([self.rendered_layer] if self.rendered_layer else [])])
        return [path for path in paths if self.layer_pictures(path)]

    @property
    def card_layer(self) -> str | None:
        """The layer that the index page shows: the rendered one, else the first."""
        layers = self.layers
        return self.rendered_layer if self.rendered_layer in layers else next(iter(layers), None)

    @property
    def rendered_layer(self) -> str | None:
        """The layer whose filters are rendered after each epoch."""
        return (self.history.facts.get("filters") or {}).get("layer")

    def entries(self) -> dict[int, EpochEntry]:
        """Return the epochs that are shown; of a damaged one only the error, as a note."""
        with self.lock:
            self.refresh()
            for epoch in self.epochs:
                if epoch not in self.epoch_cache:
                    try:
                        self.epoch_cache[epoch] = epoch_entry(self.history.entry(epoch))
                    except PhospheneError as error:
                        self.epoch_cache[epoch] = EpochEntry({}, {}, "", False, (str(error),))
            return {epoch: self.epoch_cache[epoch] for epoch in self.epochs if epoch in self.epoch_cache}

    def verdicts(self) -> list[str]:
        """Return sentences on what is wrong with the gradients; none if no gradients are recorded."""
        with self.lock:
            self.refresh()
            if self.gradient_verdicts is None:
                try:
                    self.gradient_verdicts = verdicts(self.history)
                except PhospheneError as error:
                    self.gradient_verdicts = [str(error)] if self.history.facts["gradients"] else []
            return self.gradient_verdicts

    def card(self) -> dict[str, Any]:
        """Return what the index shows: the network, the epochs, the last metrics, and a picture's path or None."""
        epochs, layer = self.history.epochs, self.card_layer
        last = self.entries().get(epochs[-1]) if epochs else None
        return {
            "name": self.name,
            "model": self.history.facts["model"],
            "epochs": len(epochs),
            "last": epochs[-1] if epochs else None,
            "metrics": [(name, format_metric(value)) for name, value in last.metrics.items()] if last else [],
            "layers": len(self.layers),
            "picture": CARD if layer else None,
            "size": None,
            "alt": f"{layer} after epoch {epochs[-1]}" if layer else "",
        }

    def view(self) -> dict[str, Any]:
        """Return the context of `run.html`."""
        entries = self.entries()
        epochs = list(entries)
        weights = [name for name in self.history.weights if any(name in entry.weights for entry in entries.values())]
        metrics = dict.fromkeys(name for entry in entries.values() for name in entry.metrics)
        charts = [chart(name, epochs, [entry.metrics.get(name) for entry in entries.values()]) for name in metrics]
        cells = [[gradient_cells(entry.weights.get(name)) for name in weights] for entry in entries.values()]
        return {
            "name": self.name,
            "facts": self.facts(entries),
            "notes": [(epoch, note) for epoch, entry in entries.items() for note in entry.notes],
            "epochs": epochs,
            "charts": charts,
            "verdicts": self.verdicts() if epochs else [],
            "layers": [self.layer(path, entries, weights) for path in self.layers],
            "weights": weights,
            "last_cells": cells[-1] if cells else [],
            "has_gradients": bool(weights),
            "figures": json.dumps(
                {
                    "epochs": epochs,
                    "metrics": [[chart["texts"][index] for chart in charts] for index in range(len(epochs))],
                    "marks": [[chart["marks"][index] for chart in charts] for index in range(len(epochs))],
                    "gradients": ["|".join(" ".join(row) for row in rows) for rows in cells],
                },
                separators=(",", ":"),
            ),
        }

    def facts(self, entries: Mapping[int, EpochEntry]) -> list[tuple[str, str]]:
        """Return the facts on the run, in the order of the page."""
        facts, epochs = self.history.facts, self.history.epochs
        sizes = [math.prod(weight["shape"]) for weight in facts["weights"] if weight["trained"]]
        gradients = next((entry.gradients for entry in reversed(list(entries.values())) if entry.gradients), "")
        film = facts.get("filters") or {}
        recipe = film.get("recipe", {}).get("name", "")
        fewer = f"; {len(entries)} are shown, evenly spread" if len(entries) < len(epochs) else ""
        texts = {
            "network": facts["model"] + (f", {sum(sizes):,} trained weights" if sizes else ""),
            "epochs": (format_epochs(epochs) if epochs else "none is finished yet") + fewer,
            "kernels": f"{len(facts['layers'])} convolutions" if facts["layers"] else "",
            "gradients": gradients or "none are recorded",
            "rendered filters": film.get("layer", "") + (f", recipe {recipe}" if recipe else ""),
        }
        return [(name, text) for name, text in texts.items() if text]

    def layer(self, path: str, entries: Mapping[int, EpochEntry], weights: Sequence[str]) -> dict[str, Any]:
        """Return what the view shows of a layer: the epochs of its pictures, and the rows of its weights."""
        return {
            "path": path,
            "slug": layer_slug(path),
            "kernels": path in self.history.layers,
            "filters": self.filter_epochs(path, entries),
            "weight_rows": [row for row, name in enumerate(weights) if belongs(name, path)],
        }

    def filter_epochs(self, path: str, entries: Mapping[int, EpochEntry]) -> list[int]:
        """Return after which epochs the filters of a layer were rendered."""
        return [epoch for epoch, entry in entries.items() if entry.filters] if path == self.rendered_layer else []

    def layer_pictures(self, path: str) -> list[str]:
        """Return the paths of a layer's pictures, epoch by epoch, rendered filters after kernels."""
        slug, entries = layer_slug(path), self.entries()
        kernels = [f"{slug}/{KERNELS}_{epoch}.png" for epoch in entries] if path in self.history.layers else []
        return kernels + [f"{slug}/filters_{epoch}.png" for epoch in self.filter_epochs(path, entries)]

    def files(self) -> Iterator[str]:
        """Yield the paths of all files below `runs/<name>/`."""
        if self.card_layer:
            yield CARD
        if any(entry.gradients for entry in self.entries().values()):
            yield from (CURVES, TABLE)
        for path in self.layers:
            yield from self.layer_pictures(path)
            yield f"{layer_slug(path)}/{STRIP}"

    def file(self, name: str) -> tuple[bytes, str]:
        """Return a file below `runs/<name>/`, and its media type.

        Raises:
            EntryNotFound: there is no file of that name. WeightsRefused: the record is damaged there.
        """

        def draw(_: object) -> tuple[tuple[bytes, str], int]:
            if name not in self.files():
                raise EntryNotFound(f"the run {self.name} has no {name}; its view links to all there is")
            content, media_type = self.pictures.draw(name, self.card_layer)
            return (content, media_type), len(content)

        with self.lock:
            self.refresh()
            return self.cache.get((self.state, name), draw)


def epoch_entry(entry: Mapping[str, Any]) -> EpochEntry:
    """Return what the view keeps of an epoch's entry."""
    gradients = entry["gradients"] or {"weights": {}}
    weights = {name: tuple(figures[key] for key in COLUMNS) for name, figures in gradients["weights"].items()}
    kind = ""
    if entry["gradients"]:
        whole = gradients["kind"] == "epoch"
        kind = "of the total loss" if whole else f"mean over {gradients['batches']} batches, {gradients['read']}"
    return EpochEntry(entry["metrics"], weights, kind, bool(entry["filters"]), tuple(entry["notes"]))


def gradient_cells(gradient: Sequence[float] | None) -> tuple[str, str, str, str]:
    """Return a weight's gradient as table cells: norm, mean magnitude, norm over the weight's, nonfinite batches."""
    if gradient is None:
        return "–", "–", "–", "–"
    norm, mean, weight_norm, nonfinite = gradient
    return (
        format_metric(norm),
        format_metric(mean),
        format_metric(norm / weight_norm if weight_norm else math.nan),
        str(int(nonfinite)),
    )


def belongs(weight: str, path: str) -> bool:
    """Return whether a weight, such as `conv1.weight` or `conv1/kernel`, is a layer's own and not a child's."""
    return weight.startswith(path) and re.fullmatch(r"[./][^./]+", weight[len(path) :]) is not None


def chart(name: str, epochs: Sequence[int], values: Sequence[float | None]) -> dict[str, Any]:
    """Return a metric as a line over the epochs, interrupted where it is not a number.

    `lines` are the points of its parts, `marks` the position of each epoch or None, in units of CHART, from top left.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    marks: list[list[float] | None] = []
    lines: list[list[str]] = [[]]
    for epoch, value in zip(epochs, values, strict=True):
        if value is None or not math.isfinite(value):
            marks.append(None)
            lines.append([])
            continue
        x = CHART[0] * fraction(epoch, epochs[0], epochs[-1])
        y = CHART[1] * (1 - fraction(value, low, high))
        marks.append([round(x, 1), round(y, 1)])
        lines[-1].append(f"{x:.1f},{y:.1f}")
    return {
        "name": name,
        "low": format_metric(low) if finite else "",
        "high": format_metric(high) if finite else "",
        "texts": [format_metric(value) for value in values],
        "marks": marks,
        "lines": [" ".join(points) for points in lines if points],
    }


def fraction(value: float, low: float, high: float) -> float:
    """Return how far a value lies between two others, 0 to 1; 0.5 if these are the same."""
    return (value - low) / (high - low) if high > low else 0.5
