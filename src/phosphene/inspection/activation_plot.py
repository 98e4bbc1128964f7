"""The summary of activations as pictures: a table of layers, and a plot over the depth of the network."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from phosphene.images import captions, display

HEADINGS = ("layer", "kind", "map", "channels", "blank", "never > 0", "zero values", "lowest", "mean", "highest")
LABELS = 40  # layers that are named along the plot
WIDTH, HEIGHT = 1100, 600  # of the plot, in pixels
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"  # told apart by all eyes


def summary_table(rows: Sequence[Mapping[str, Any]]) -> display.Picture:
    """Return rows of `Activations.rows` as a table."""
    return captions.table(HEADINGS, [table_cells(row) for row in rows], WIDTH)


def table_cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row as text: numbers with about three significant digits."""
    size = "×".join(map(str, row["map"] or ()))
    shares = ["" if row[name] is None else f"{row[name]:.0%}" for name in ("blank", "silent", "zero")]
    values = [math.nan if row[name] is None else row[name] for name in ("minimum", "mean", "maximum")]
    numbers = [f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}" for value in values]
    return [row["layer"], row["kind"], size, f"{row['channels']:,}", *shares, *numbers]


def depth_plot(rows: Sequence[Mapping[str, Any]]) -> display.Picture:
    """Return the plot over depth: above, the side of the maps and the channels; below, the share of blank channels.

    Layers with values below 0 come before an activation, so their channels are hardly ever blank: they are drawn faint.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # most of a second
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure((WIDTH / 100, HEIGHT / 100), dpi=100, layout="constrained"))
    above, below = canvas.figure.subplots(2, 1, sharex=True)
    depths = range(len(rows))
    spatial = [depth for depth in depths if rows[depth]["map"]]
    sides = [max(rows[depth]["map"]) for depth in spatial]
    above.plot(depths, [row["channels"] for row in rows], "s", color=ORANGE, markersize=4, label="channels")
    above.plot(spatial, sides, "o", color=BLUE, markersize=4, label="side of the map, px")
    above.set_yscale("log", base=2)
    above.yaxis.set_major_formatter("{x:g}")
    signed = [depth for depth in depths if rows[depth]["minimum"] is None or rows[depth]["minimum"] < 0]
    positive = sorted({*depths} - {*signed})
    for drawn, name, style, colour, label in (
        (signed, "blank", ".", GREY, "blank channels where values have both signs"),
        (positive, "zero", "--", RED, "values that are 0"),
        (positive, "blank", "o-", GREEN, "blank channels"),
    ):
        shares = [rows[depth][name] for depth in drawn]
        below.plot(drawn, shares, style, color=colour, markersize=4, linewidth=1, label=label)
    below.set(ylim=(-0.05, 1.05), xlim=(-1, len(rows)))
    below.yaxis.set_major_formatter("{x:.0%}")
    labelled = depths[:: math.ceil(len(rows) / LABELS)]
    paths = [rows[depth]["layer"] for depth in labelled]
    endings = [path if len(path) < 25 else f"…{path[-23:]}" for path in paths]
    below.set_xticks(labelled, endings, rotation=90, fontsize=8, parse_math=False)
    for axes, title in ((above, "abstraction: smaller maps, more channels"), (below, "sparsity: what is blank")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(axis="y", color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1)
    canvas.draw()  # type: ignore[no-untyped-call]
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())  # type: ignore[no-untyped-call]
