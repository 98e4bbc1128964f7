"""Training runs for the page: what a run's view shows, and its pictures, made when they are asked for."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from threading import RLock
from typing import Any, NamedTuple

from phosphene.atlases.report import escape_formula
from phosphene.errors import EntryNotFound, PhospheneError
from phosphene.images import encode
from phosphene.images.display import Picture
from phosphene.training.film_strip import LayerStrip, StripLayout, evenly, frame_plan, layer_strip, number
from phosphene.training.gradient_norms import GradientNorms, curves, verdicts
from phosphene.training.history import History, listed
from phosphene.training.timeline import KernelTimeline
from phosphene.web.urls import layer_path, layer_slug

EPOCHS = 100  # that a view shows at most, evenly spread
KEPT = 32 * 2**20  # bytes of finished pictures that a run keeps
CHART = (240, 64)  # units of a metric's chart
PNG, CSV = "image/png", "text/csv; charset=utf-8"
CURVES, TABLE, STRIP, CARD = "gradients.png", "gradients.csv", "strip.png", "card.png"
SMALL, FEW, ACROSS = 64, 12, 6  # side of a tile, filters and columns of the index page's picture
KERNELS = "kernels"
COLUMNS = ("norm", "mean_abs", "weight_norm", "nonfinite")  # of a weight's gradient, as they are recorded


class Epoch(NamedTuple):
    """What the view keeps of an epoch's entry."""

    metrics: Mapping[str, float]
    weights: Mapping[str, tuple[float, ...]]  # COLUMNS of each weight that had a gradient
    taken: str  # how the gradients were, in words; nothing where there are none
    filters: bool  # whether filters were rendered
    notes: tuple[str, ...]


class TrainingView:
    """A run under `runs/<name>/` of the site, read anew when the training has gone on.

    Args:
        history: the record.
        name: of the run in the site.
    """

    def __init__(self, history: History, name: str) -> None:
        self.history, self.name = history, name
        self.lock = RLock()  # a picture at a time: matplotlib is not made for several
        self.state = ""  # the tag of what is kept
        self.kept: OrderedDict[str, tuple[bytes, str]] = OrderedDict()
        self.courses: dict[tuple[str, str], LayerStrip] = {}
        self.read: dict[int, Epoch] = {}
        self.said: list[str] | None = None

    def tag(self) -> str:
        """Return what changes when an epoch is added or replaced."""
        places = [self.history.place(epoch) / "manifest.json" for epoch in self.history.epochs]
        times = [(path.parent.name, path.stat().st_mtime_ns) for path in places if path.exists()]
        return hashlib.sha256(repr(times).encode()).hexdigest()[:16]

    def fresh(self) -> None:
        """Forget what was kept of a run that has changed since."""
        now = self.tag()
        if now != self.state:
            self.kept.clear()
            self.courses.clear()
            self.read.clear()
            self.state, self.said = now, None

    @property
    def epochs(self) -> list[int]:
        """The numbers of the epochs that are shown."""
        return evenly(self.history.epochs, EPOCHS)

    @property
    def layers(self) -> list[str]:
        """The layers of which there is anything to see: their kernels, or the rendered filters of one."""
        there = list(dict.fromkeys([*self.history.layers, *([self.rendered] if self.rendered else [])]))
        return [path for path in there if self.pictures_of(path)]

    @property
    def face(self) -> str | None:
        """The layer that the index page shows: the rendered one, else the first."""
        known = self.layers
        return self.rendered if self.rendered in known else next(iter(known), None)

    @property
    def gradients(self) -> bool:
        """Whether any epoch that is shown holds gradients."""
        return any(one.taken for one in self.entries().values())

    @property
    def rendered(self) -> str | None:
        """The layer whose filters are rendered after each epoch."""
        return (self.history.facts.get("filters") or {}).get("layer")

    def entries(self) -> dict[int, Epoch]:
        """Return what is known of the epochs that are shown; one that is damaged is left out."""
        with self.lock:
            self.fresh()
            for epoch in self.epochs:
                if epoch not in self.read:
                    try:
                        self.read[epoch] = epoch_of(self.history.entry(epoch))
                    except PhospheneError as error:
                        self.read[epoch] = Epoch({}, {}, "", False, (str(error),))
            return {epoch: self.read[epoch] for epoch in self.epochs if epoch in self.read}

    def verdicts(self) -> list[str]:
        """Return what is wrong with the gradients, in sentences; none where none are recorded."""
        with self.lock:
            self.fresh()
            if self.said is None:
                try:
                    self.said = verdicts(self.history)
                except PhospheneError as error:
                    self.said = [str(error)] if self.history.facts["gradients"] else []
            return self.said

    def card(self) -> dict[str, Any]:
        """Return what the index shows: the network, the epochs, the last metrics, and the path of a picture or None."""
        known = self.history.epochs
        last = self.entries().get(known[-1]) if known else None
        return {
            "name": self.name,
            "model": self.history.facts["model"],
            "epochs": len(known),
            "last": known[-1] if known else None,
            "metrics": [(name, number(one)) for name, one in last.metrics.items()] if last else [],
            "layers": len(self.layers),
            "picture": CARD if self.face else None,
            "size": None,
            "alt": f"{self.face} after epoch {known[-1]}" if self.face else "",
        }

    def view(self) -> dict[str, Any]:
        """Return what `run.html` shows."""
        entries = self.entries()
        epochs = list(entries)
        weights = [name for name in self.history.weights if any(name in one.weights for one in entries.values())]
        names = list(dict.fromkeys(name for one in entries.values() for name in one.metrics))
        charts = [chart(name, epochs, [one.metrics.get(name) for one in entries.values()]) for name in names]
        cells = {epoch: [figures(one.weights.get(name)) for name in weights] for epoch, one in entries.items()}
        return {
            "name": self.name,
            "facts": self.facts(entries),
            "notes": [(epoch, note) for epoch, one in entries.items() for note in one.notes],
            "epochs": epochs,
            "charts": charts,
            "verdicts": self.verdicts() if epochs else [],
            "layers": [self.layer(path, entries, weights) for path in self.layers],
            "weights": weights,
            "figures_last": cells[epochs[-1]] if epochs else [],
            "has_gradients": bool(weights),
            "figures": json.dumps(
                {
                    "epochs": epochs,
                    "metrics": [[one["texts"][index] for one in charts] for index in range(len(epochs))],
                    "marks": [[one["marks"][index] for one in charts] for index in range(len(epochs))],
                    "gradients": ["|".join(" ".join(row) for row in rows) for rows in cells.values()],
                },
                separators=(",", ":"),
            ),
        }

    def facts(self, entries: Mapping[int, Epoch]) -> list[tuple[str, str]]:
        """Return what is known of the run, in the order in which it is told."""
        facts, known = self.history.facts, self.history.epochs
        sizes = [math.prod(one["shape"]) for one in facts["weights"] if one["trained"]]
        taken = next((one.taken for one in reversed(list(entries.values())) if one.taken), "")
        film = facts.get("filters") or {}
        recipe = film.get("recipe", {}).get("name", "")
        fewer = f"; {len(entries)} are shown, evenly spread" if len(entries) < len(known) else ""
        told = {
            "network": facts["model"] + (f", {sum(sizes):,} trained weights" if sizes else ""),
            "epochs": (listed(known) if known else "none is finished yet") + fewer,
            "kernels": f"{len(facts['layers'])} convolutions" if facts["layers"] else "",
            "gradients": taken or "none are recorded",
            "rendered filters": film.get("layer", "") + (f", recipe {recipe}" if recipe else ""),
        }
        return [(name, text) for name, text in told.items() if text]

    def layer(self, path: str, entries: Mapping[int, Epoch], weights: Sequence[str]) -> dict[str, Any]:
        """Return what the view shows of a layer: where its pictures are, and which of the weights are its own."""
        return {
            "path": path,
            "slug": layer_slug(path),
            "kernels": path in self.history.layers,
            "filters": [epoch for epoch, one in entries.items() if one.filters] if path == self.rendered else [],
            "own": [place for place, name in enumerate(weights) if belongs(name, path)],
        }

    def pictures_of(self, path: str) -> list[str]:
        """Return the paths of a layer's pictures, epoch by epoch, rendered filters after kernels."""
        slug, entries = layer_slug(path), self.entries()
        kernels = [f"{slug}/kernels_{epoch}.png" for epoch in entries] if path in self.history.layers else []
        shown = [epoch for epoch, one in entries.items() if one.filters] if path == self.rendered else []
        return kernels + [f"{slug}/filters_{epoch}.png" for epoch in shown]

    def files(self) -> Iterator[str]:
        """Yield the paths of all files below `runs/<name>/`."""
        if self.face:
            yield CARD
        if self.gradients:
            yield from (CURVES, TABLE)
        for path in self.layers:
            yield from self.pictures_of(path)
            yield f"{layer_slug(path)}/{STRIP}"

    def file(self, rest: str) -> tuple[bytes, str]:
        """Return a file below `runs/<name>/`, and its media type.

        Raises:
            EntryNotFound: there is none of that name. WeightsRefused: the record is damaged there.
        """
        with self.lock:
            self.fresh()
            if rest not in self.kept:
                self.kept[rest] = self.made(rest)
            self.kept.move_to_end(rest)
            found = self.kept[rest]
            while len(self.kept) > 1 and sum(len(content) for content, _ in self.kept.values()) > KEPT:
                self.kept.popitem(last=False)
            return found

    def made(self, rest: str) -> tuple[bytes, str]:
        """Return a file that is not kept."""
        if rest not in self.files():
            raise EntryNotFound(f"the run {self.name} has no {rest}; its view links to all there is")
        if rest == CURVES:
            return packed(curves(self.history), {"model": self.history.facts["model"]}), PNG
        if rest == TABLE:
            return as_csv(GradientNorms.of(self.history)), CSV
        if rest == CARD:
            return packed(sample(self.course(str(self.face))), {"layer": self.face}), PNG
        slug, name = rest.split("/")
        path = layer_path(slug)
        if name == STRIP:
            return packed(self.course(path).strip(), {"layer": path}), PNG
        noun, epoch = name.removesuffix(".png").split("_")
        return packed(frame(self.course(path, noun), int(epoch)), {"layer": path, "epoch": int(epoch)}), PNG

    def course(self, path: str, noun: str = "") -> LayerStrip:
        """Return what a layer looked like over the training: as kernels, or as what there is to see of it first."""
        if (path, noun) not in self.courses:
            drawn = noun == KERNELS
            self.courses[path, noun] = (
                LayerStrip(self.history, path, KernelTimeline(self.history, path, "signed"), "signed")
                if drawn
                else layer_strip(self.history, path)
            )
        return self.courses[path, noun]


def epoch_of(entry: Mapping[str, Any]) -> Epoch:
    """Return what the view keeps of an epoch's entry."""
    gradients = entry["gradients"] or {"weights": {}}
    weights = {name: tuple(one[key] for key in COLUMNS) for name, one in gradients["weights"].items()}
    taken = ""
    if entry["gradients"]:
        whole = gradients["kind"] == "epoch"
        taken = "of the total loss" if whole else f"mean over {gradients['batches']} batches, {gradients['read']}"
    return Epoch(entry["metrics"], weights, taken, bool(entry["filters"]), tuple(entry["notes"]))


def figures(gradient: Sequence[float] | None) -> tuple[str, str, str, str]:
    """Return a weight's gradient in a table: norm, mean magnitude, norm over the weight's, batches that are broken."""
    if gradient is None:
        return "–", "–", "–", "–"
    norm, mean, weight, broken = gradient
    return number(norm), number(mean), number(norm / weight if weight else math.nan), str(int(broken))


def belongs(name: str, path: str) -> bool:
    """Return whether a weight is a layer's own, such as `conv1.weight` or `conv1/kernel`."""
    return name.startswith(path) and re.fullmatch(r"[./][^./]+", name[len(path) :]) is not None


def chart(name: str, epochs: Sequence[int], values: Sequence[float | None]) -> dict[str, Any]:
    """Return a metric as a line over the epochs, interrupted where it is not a number.

    `lines` are the points of its parts, `marks` the place of each epoch or None, in units of CHART from the top left.
    """
    known = [one for one in values if one is not None and math.isfinite(one)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    marks: list[list[float] | None] = []
    lines: list[list[str]] = [[]]
    for epoch, value in zip(epochs, values, strict=True):
        if value is None or not math.isfinite(value):
            marks.append(None)
            lines.append([])
            continue
        x = CHART[0] * share(epoch, epochs[0], epochs[-1])
        y = CHART[1] * (1 - share(value, low, high))
        marks.append([round(x, 1), round(y, 1)])
        lines[-1].append(f"{x:.1f},{y:.1f}")
    return {
        "name": name,
        "low": number(low) if known else "",
        "high": number(high) if known else "",
        "texts": [number(one) for one in values],
        "marks": marks,
        "lines": [" ".join(one) for one in lines if one],
    }


def share(value: float, low: float, high: float) -> float:
    """Return where a value lies between two, 0 to 1; in the middle where these are the same."""
    return (value - low) / (high - low) if high > low else 0.5


def sample(shown: LayerStrip) -> Picture:
    """Return a few filters of a layer after the last epoch, small."""
    sizes = shown.look.sizes()
    size = next((one for one in sizes if max(one) <= SMALL), sizes[-1])
    filters = min(FEW, shown.look.shape[0])
    plan = StripLayout(size, filters, 1, min(ACROSS, filters), [])
    return shown.mosaic(shown.sized(shown.look.epochs[-1], plan), plan)


def frame(shown: LayerStrip, epoch: int) -> Picture:
    """Return the sheet of a layer after an epoch, as a film has it."""
    plan = frame_plan(shown.look)
    return shown.frame(epoch, plan, shown.said(plan, "row" if plan.lines > 1 else "", "column", "frame")[:-1])


def packed(picture: Picture, facts: Mapping[str, Any]) -> bytes:
    """Return a picture as PNG; quickly, since somebody waits for it."""
    return encode.png(picture, facts, effort=3)


def as_csv(sizes: GradientNorms) -> bytes:
    """Return a row an epoch and weight."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("epoch", "weight", *COLUMNS))
    columns = [getattr(sizes, key).tolist() for key in COLUMNS]
    for row, epoch in enumerate(sizes.epochs):
        for place, name in enumerate(sizes.names):
            table.writerow((epoch, escape_formula(name), *(one[row][place] for one in columns)))
    return text.getvalue().encode()
