"""The page of a report: one HTML file that loads nothing, and that can be read without its script.

The template escapes every text from outside: names of layers, networks, classes and photos. A policy in the page keeps
the browser from loading anything and from running any script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from phosphene.atlases.verdict_text import (
    FIGURES,
    ORDER,
    SIGNS,
    VerdictShare,
    figure_meanings,
    figures_line,
    format_figure,
    verdict_shares,
    verdict_words,
)
from phosphene.atlases.verdicts import VERDICTS, Verdict

if TYPE_CHECKING:
    from jinja2 import Environment

MEDIANS = FIGURES[:2]  # of each layer, in the table of layers
BINS = 24
PLOT_WIDTH, BASELINE, TALLEST = 240, 70.0, 64  # of a histogram, in units of its SVG


@dataclass(frozen=True)
class PhotoCrop:
    """A crop of a photo that excites a channel strongly: its WebP bytes, and the photo's name."""

    crop: bytes
    name: str


@dataclass(frozen=True)
class LayerSection:
    """What the page shows of a layer.

    Attributes:
        facts: text by name, in the order of the page.
        note: a warning to the reader, or an empty text.
        verdicts: of all its filters; empty ones if the layer could not be judged.
        pictures: WebP bytes of the first of them; the page shows no more.
        photos: the strongest photos of each of these, empty without evidence.
    """

    path: str
    facts: Mapping[str, str]
    note: str
    verdicts: Sequence[Verdict]
    pictures: Sequence[bytes]
    photos: Sequence[Sequence[PhotoCrop]]

    @property
    def shares(self) -> list[VerdictShare]:
        """How many of its filters have each verdict."""
        return shares_of([self])

    @property
    def medians(self) -> list[float | None]:
        """The median of each figure of `MEDIANS`, None if no filter has one."""
        columns = ([getattr(verdict, name) for verdict in self.verdicts] for name in MEDIANS)
        figures = ([figure for figure in column if figure is not None] for column in columns)
        return [median(column) if column else None for column in figures]

    @property
    def tiles(self) -> Iterator[tuple[Verdict, bytes, Sequence[PhotoCrop]]]:
        """The verdict, picture and photos of each filter that the page shows."""
        return zip(self.verdicts, self.pictures, self.photos or [()] * len(self.pictures), strict=False)

    def histograms(self, limits: Mapping[str, float]) -> Iterator[Histogram]:
        """Yield the histograms of the figures that any filter has."""
        for axis in AXES:
            if any(getattr(verdict, axis.name) is not None for verdict in self.verdicts):
                yield histogram(axis, self.verdicts, limits[axis.name])


def shares_of(sections: Sequence[LayerSection]) -> list[VerdictShare]:
    """Return how many filters of these layers have each verdict."""
    names = [verdict.verdict for section in sections for verdict in section.verdicts]
    return verdict_shares(Counter(names), len(names))


def page(
    title: str,
    facts: Mapping[str, str],
    notes: Sequence[str],
    sections: Sequence[LayerSection],
    limits: Mapping[str, float],
    side: int,
) -> str:
    """Return the page on the layers of a network.

    Args:
        title: the network's name.
        facts: text on the atlas by name, in the order of the page.
        notes: warnings to the reader, as sentences.
        limits: the thresholds of the verdicts, by name.
        side: of a filter's picture, in pixels.
    """
    script = source("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment()
        .get_template("report.html")
        .render(
            title=title,
            facts=facts,
            notes=notes,
            sections=sections,
            limits=limits,
            meanings=figure_meanings(limits),
            shares=shares_of(sections),
            fact_names=list(dict.fromkeys(name for section in sections for name in section.facts)),
            policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
            style=f":root{{--side:{side}px}}\n{source('shared.css')}{source('report.css')}",
            script=script,
        )
    )


@cache
def template_environment(package: str) -> Environment:
    """Return the environment of a package's templates: text is escaped, and an undefined variable is an error.

    The filter `words` turns a verdict into what a reader sees.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = verdict_words
    return environment


@cache
def environment() -> Environment:
    """Return the environment of the report, with its filters and words."""
    templates = template_environment("phosphene.atlases")
    templates.filters |= {"figure": format_figure, "figures": figures_line, "data_url": data_url}
    templates.globals |= {"ORDER": ORDER, "SIGNS": SIGNS, "FIGURES": FIGURES, "MEDIANS": MEDIANS}
    return templates


def source(name: str) -> str:
    """Return a file that lies beside the template, such as `report.css`."""
    loader = environment().loader
    assert loader
    return loader.get_source(environment(), name)[0]


def data_url(content: bytes) -> str:
    """Return a WebP image as a URL that holds it."""
    return "data:image/webp;base64," + base64.b64encode(content).decode()


class Axis(NamedTuple):
    """The range of a histogram, from `low` to `high`; figures outside of it count in the first or last bin."""

    name: str
    low: float
    high: float
    logarithmic: bool

    def position(self, figure: float) -> float:
        """Return where a figure lies, 0 to 1."""
        clipped = min(max(figure, self.low), self.high)
        if self.logarithmic:
            return math.log(clipped / self.low) / math.log(self.high / self.low)
        return (clipped - self.low) / (self.high - self.low)


AXES = (
    Axis("excitation", 1 / 16, 64, logarithmic=True),
    Axis("stability", 0, 1.2, logarithmic=False),
)


class Block(NamedTuple):
    """The filters of one verdict in one bin, as a rectangle."""

    verdict: str
    x: float
    y: float
    width: float
    height: float


class Histogram(NamedTuple):
    """How many filters have how much of a figure, in the colours of their verdicts.

    Attributes:
        caption: the figure's name and median.
        extremes: the number of filters, and their lowest and highest figure, as text.
        limit: the threshold; `limit_x` is its position.
    """

    axis: Axis
    blocks: list[Block]
    caption: str
    extremes: str
    limit: float
    limit_x: float


def histogram(axis: Axis, verdicts: Sequence[Verdict], limit: float) -> Histogram:
    """Return the histogram of a figure, which at least one of the verdicts has."""
    rows = [(getattr(verdict, axis.name), verdict.verdict) for verdict in verdicts]
    figures = [figure for figure, _ in rows if figure is not None]
    counts = Counter(
        (min(BINS - 1, int(axis.position(figure) * BINS)), verdict) for figure, verdict in rows if figure is not None
    )
    fullest = max(sum(counts[column, verdict] for verdict in VERDICTS) for column in range(BINS))
    blocks, width = [], PLOT_WIDTH / BINS
    for column in range(BINS):
        top = BASELINE
        for verdict in ORDER:
            height = TALLEST * counts[column, verdict] / fullest
            top -= height
            if height:
                blocks.append(Block(verdict, column * width + 0.5, top, width - 1, height))
    caption = f"{axis.name}, median {format_figure(median(figures))}"
    extremes = f"{len(figures)} filters from {format_figure(min(figures))} to {format_figure(max(figures))}"
    return Histogram(axis, blocks, caption, extremes, limit, PLOT_WIDTH * axis.position(limit))
