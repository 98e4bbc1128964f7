"""Gradient curves: how large the gradient of every weight was, epoch by epoch."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from phosphene.images import captions, display, encode
from phosphene.storage.atomic import write_file
from phosphene.training.gradient_norms import GradientNorms
from phosphene.training.gradient_verdicts import verdicts_of
from phosphene.training.history import History

LEGEND = 32  # weights that the legend names at most
PLOT = (1500, 560)  # pixels
DARKEST, PALEST = 0.0, 0.9  # of viridis; its end is too pale for a line on white paper
PANELS = (
    ("norm of the gradient", "norm"),
    ("mean of its magnitudes", "mean_abs"),
    ("norm of the gradient / norm of the weight", "ratio"),
)


def curves(history: History) -> display.Picture:
    """Return the curves of every weight's gradient over the epochs, on a logarithmic scale, coloured by depth.

    Three plots: the L2 norm of the gradient, the mean of its magnitudes, and its norm over that of the weight. A
    gradient of exactly 0 is a triangle at the foot, one with NaN or infinity a cross at the top.

    Raises:
        InvalidRequest: the run holds no finished epoch, or no gradients.
    """
    return captioned_plot(GradientNorms.of(history))


def save_curves(norms: GradientNorms, path: str | Path) -> Path:
    """Write the curves as PNG."""
    return write_file(Path(path), encode.png(captioned_plot(norms), curve_facts(norms)))


def curve_facts(norms: GradientNorms) -> dict[str, Any]:
    """Return what the picture shows, as JSON values."""
    return {
        "run": str(norms.history.folder),
        "model": norms.history.facts["model"],
        "layer": None,
        "gradients": norms.taken,
        "epochs": norms.epochs,
        "verdicts": verdicts_of(norms),
        "versions": norms.history.facts["versions"],
    }


def captioned_plot(norms: GradientNorms) -> display.Picture:
    """Return the curves with the verdicts below them; see `curves`."""
    parts = (f"{len(norms.names)} weights", norms.taken, "triangle: 0", "cross: NaN or infinity")
    sentences = [captions.wrap_text(sentence.split(), PLOT[0], " ") for sentence in verdicts_of(norms)]
    note = "\n".join([captions.wrap_text(parts, PLOT[0]), *sentences])
    return captions.with_caption(plot(norms), f"{norms.history.facts['model']} · gradients, epoch by epoch", note)


def plot(norms: GradientNorms) -> display.Picture:
    """Return the three plots with the legend to their right."""
    from matplotlib import colormaps  # the three imports take most of a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure((PLOT[0] / 100, PLOT[1] / 100), dpi=100, layout="constrained"))
    panels = canvas.figure.subplots(1, len(PANELS), sharex=True)
    colours = colormaps["viridis"](np.linspace(DARKEST, PALEST, len(norms.names)))
    lines = draw_lines(norms, panels, colours)
    for axes, (title, key) in zip(panels, PANELS, strict=True):
        style_axes(axes, title, norms.epochs)
        mark_special_values(norms, axes, getattr(norms, key), colours)
    add_legend(norms, canvas.figure, lines)
    canvas.draw()  # type: ignore[no-untyped-call]
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())  # type: ignore[no-untyped-call]


def draw_lines(norms: GradientNorms, panels: Sequence[Any], colours: Any) -> list[Any]:
    """Draw a line for each weight on each panel, and return those of the first panel."""
    crowded, lines = len(norms.names) > LEGEND, []
    for index, layered in enumerate(norms.layered.tolist()):
        style = {
            "color": colours[index],
            "linestyle": "-" if layered else ":",
            "linewidth": (1.0 if crowded else 1.6) if layered else 0.9,
            "marker": "o" if len(norms.epochs) <= 40 else "",
            "markersize": 2 if crowded else 3,
            "zorder": 3 if layered else 2,
        }
        for axes, (_, key) in zip(panels, PANELS, strict=True):
            values = getattr(norms, key)[:, index].clone()
            values[(values <= 0) | ~values.isfinite()] = math.nan  # a logarithmic scale has no place for them
            lines += axes.plot(norms.epochs, values.tolist(), **style)
    return lines[:: len(PANELS)]


def style_axes(axes: Any, title: str, epochs: Sequence[int]) -> None:
    """Set the title, the scales and the look of a panel."""
    margin = 0.05 * (epochs[-1] - epochs[0]) or 0.5
    axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("epoch", fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)


def mark_special_values(norms: GradientNorms, axes: Any, values: Tensor, colours: Any) -> None:
    """Mark on a panel what its scale has no place for: 0 at the foot, NaN and infinity at the top."""
    nonfinite = (norms.batches > 0) & (norms.nonfinite > 0)
    for mask, marker, height in ((values == 0, "v", 0.0), (nonfinite, "x", 1.0)):
        rows, columns = mask.nonzero(as_tuple=True)
        if len(rows):
            epochs = [norms.epochs[row] for row in rows.tolist()]
            heights, colour, transform = [height] * len(epochs), colours[columns.numpy()], axes.get_xaxis_transform()
            axes.scatter(epochs, heights, 22, colour, marker=marker, transform=transform, clip_on=False)


def add_legend(norms: GradientNorms, figure: Any, lines: Sequence[Any]) -> None:
    """Name the weights to the right of the panels; of many, only some of the kernels and matrices."""
    named, remark = list(range(len(norms.names))), ""
    if len(norms.names) > LEGEND:
        named = norms.layered.nonzero()[:, 0].tolist() or named
        step = math.ceil(len(named) / LEGEND)
        named, remark = named[::step], f", 1 of {step} named" if step > 1 else ", without biases and scales"
    legend = figure.legend(
        [lines[index] for index in named],
        [shorten(norms.names[index]) for index in named],
        title=f"from the input on{remark}\n– kernel, matrix   ··· bias, scale",
        loc="outside right upper",
        fontsize=8,
        title_fontsize=8,
        frameon=False,
        alignment="left",
        labelspacing=0.25,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def shorten(name: str) -> str:
    """Return the end of a long name."""
    return name if len(name) < 31 else f"…{name[-29:]}"
