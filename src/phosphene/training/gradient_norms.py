"""Gradient curves: how large the gradient of every weight was, epoch by epoch, and in words what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.images import captions, display, encode
from phosphene.storage.atomic import write_file
from phosphene.training.history import History

VANISHING = 1e-3  # of the last layer's gradient: less vanishes
STANDSTILL = 2.0**-24  # of the weight's norm: half of what float32 can tell apart
EXPLODING = 1000.0  # times the weight's norm
GROWTH, LARGE = 100.0, 100.0  # times the first epoch's gradient, where that is as many times the weight's norm
NAMED = 4  # weights that a sentence names, where there are more than one beyond these
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
    return GradientNorms.of(history).picture()


def verdicts(history: History) -> list[str]:
    """Return in words what is wrong with the gradients of a training, a sentence each; or that nothing is.

    - NaN or infinity: in which batch first.
    - Exactly 0: in the last epoch, for all batches; or no gradient at all.
    - Vanishing, in the last epoch: the root mean square of a gradient's entries is less than a thousandth of the last
      layer's, and so is its norm over the weight's norm. In nine networks of torchvision's that began to train, from
      AlexNet to DenseNet-121, and in smaller ones that had learned, one of the two was always above a hundredth; in a
      network of five layers with sigmoids, each of which passes on a quarter at most, both fell below a thousandth, and
      the loss stood still. ConvNeXt vanishes so, too, until its layer scale has grown, which starts at a millionth.
      Also: the norm is less than 2^-24 of the weight's, which float32 rounds off, so that plain gradient descent at a
      rate of 1 would leave the weight as it is.
    - Exploding, in any epoch: the norm is a thousand times the weight's, or a hundred times it and a hundred times what
      it was in the first epoch. A ResNet-50 begins at three hundred. Growth alone is no fault: when a deep network
      begins to learn after a while, the gradients of its first layers grow ten thousandfold, to a few times the norm of
      the weight. A loss that is a sum over samples is as many times larger, of which the sentence reminds.

    Biases and scales are left out of the last two: they start at 0 or at 1, and a batch normalisation takes the
    gradient away from the bias before it.

    Raises:
        InvalidRequest: the run holds no finished epoch, or no gradients.
    """
    return GradientNorms.of(history).verdicts()


@dataclass(frozen=True, eq=False)
class GradientNorms:
    """The sizes of a training's gradients.

    Attributes:
        history: the record.
        names: the weights that are trained, in the network's order.
        epochs: those that hold gradients.
        kind: how they were taken, in words.
        counts: (weights,) entries; layered: (weights,) whether it is a matrix or kernel, not a bias or a scale.
        norm, mean_abs, weight_norm: (epochs, weights), float64; NaN where a weight had no gradient.
        batches, nonfinite, first: (epochs, weights), int64: batches with a gradient, of these with NaN or infinity, and
            the first of these, -1 for none.
    """

    history: History
    names: list[str]
    epochs: list[int]
    kind: str
    counts: Tensor
    layered: Tensor
    norm: Tensor
    mean_abs: Tensor
    weight_norm: Tensor
    batches: Tensor
    nonfinite: Tensor
    first: Tensor

    @classmethod
    def of(cls, history: History) -> GradientNorms:
        """Return the sizes that a record holds."""
        history.chosen(None)  # refuses a run without epochs
        entries = {epoch: history.entry(epoch)["gradients"] for epoch in history.epochs}
        held = {epoch: one for epoch, one in entries.items() if one}
        if not held:
            raise InvalidRequest(
                f"{history.folder} holds no gradients; train again with a Recorder of gradients='running' or 'epoch'"
            )
        known = {name for one in held.values() for name in one["weights"]}.union(history.weights)
        shapes = {one["name"]: one["shape"] for one in history.facts["weights"] if one["name"] in known}

        def table(key: str, missing: float, dtype: torch.dtype) -> Tensor:
            rows = [[one["weights"].get(name, {}).get(key) for name in shapes] for one in held.values()]
            return torch.tensor([[missing if one is None else one for one in row] for row in rows], dtype=dtype)

        last = held[max(held)]
        taken = "of the total loss" if last["kind"] == "epoch" else f"mean over each epoch's batches, {last['read']}"
        return cls(
            history,
            list(shapes),
            list(held),
            taken,
            torch.tensor([math.prod(one) for one in shapes.values()]),
            torch.tensor([is_layered(one) for one in shapes.values()]),
            *(table(key, math.nan, torch.float64) for key in ("norm", "mean_abs", "weight_norm")),
            *(
                table(key, none, torch.int64)
                for key, none in (("batches", 0), ("nonfinite", 0), ("first_nonfinite", -1))
            ),
        )

    @cached_property
    def rms(self) -> Tensor:
        """(epochs, weights) root mean square of the entries."""
        return self.norm / self.counts.sqrt()

    @cached_property
    def ratio(self) -> Tensor:
        """(epochs, weights) norm of the gradient over that of the weight."""
        return self.norm / self.weight_norm

    def verdicts(self) -> list[str]:
        """Return in words what is wrong; see `verdicts`."""
        checks: Sequence[Callable[[], Iterator[str]]] = (self.broken, self.zero, self.vanishing, self.exploding)
        found = [sentence for check in checks for sentence in check()]
        over = f"{len(self.names)} weights over {len(self.epochs)} epoch{'s' * (len(self.epochs) > 1)}"
        return found or [
            f"nothing is wrong with the gradients of the {over}: none vanishes, explodes, is exactly 0, or holds NaN "
            "or infinity"
        ]

    def broken(self) -> Iterator[str]:
        """Say which gradients hold NaN or infinity, and where it began."""
        bad = self.nonfinite > 0
        if not bool(bad.any()):
            return
        row = int(bad.any(1).nonzero()[0])
        batch = int(self.first[row][bad[row]].min())
        at_first = bad[row] & (self.first[row] == batch)
        amount = int(self.nonfinite[row].max())
        yield (
            f"NaN or infinity: it began in epoch {self.epochs[row]}, batch {batch} (counted from 0), in the "
            f"{gradients(self.chosen(at_first))}; {amount} of the {int(self.batches[row].max())} batches of that epoch "
            f"have it, and {int(bad.any(0).sum())} of {len(self.names)} weights in all"
        )

    def zero(self) -> Iterator[str]:
        """Say which gradients are exactly 0 in the last epoch, or not there."""
        nothing = self.norm == 0
        for where, what in (
            (nothing, "exactly 0 in all batches: dead units before or after them let nothing through"),
            (self.batches == 0, "not there: these weights play no part in the loss"),
        ):
            if bool(where[-1].any()):
                since = {self.epochs[self.since(where[:, one])] for one in where[-1].nonzero()[:, 0].tolist()}
                from_on = f"since epoch {min(since)}" if len(self.epochs) > 1 else f"in epoch {self.epochs[-1]}"
                yield f"zero: the {gradients(self.chosen(where[-1]))} {is_are(where[-1])} {what} ({from_on})"

    def since(self, where: Tensor) -> int:
        """Return the row from which on something holds to the last."""
        misses = (~where).nonzero()
        return int(misses[-1]) + 1 if len(misses) else 0

    def vanishing(self) -> Iterator[str]:
        """Say which gradients vanish in the last epoch."""
        alive = self.layered & (self.norm[-1] > 0) & self.norm[-1].isfinite()
        places = alive.nonzero()[:, 0].tolist()
        if not places:
            return
        last = places[-1]
        share = self.rms[-1] / self.rms[-1, last]
        small = alive & (share < VANISHING) & (self.ratio[-1] / self.ratio[-1, last] < VANISHING)
        if bool(small.any()):
            worst = int(torch.where(small, share, math.inf).argmin())
            yield (
                f"vanishing: the {gradients(self.chosen(small))} {is_are(small)} less than {VANISHING:g} of the last "
                f"layer's in epoch {self.epochs[-1]}; in {self.names[worst]} the root mean square is "
                f"{float(self.rms[-1, worst]):.2g}, and {float(self.rms[-1, last]):.2g} in {self.names[last]}"
            )
        still = alive & ~small & (self.ratio[-1] < STANDSTILL)
        if bool(still.any()):
            worst = int(torch.where(still, self.ratio[-1], math.inf).argmin())
            yield (
                f"vanishing: the {gradients(self.chosen(still))} {is_are(still)} smaller than what float32 rounds "
                f"off the weight, in epoch {self.epochs[-1]}; in {self.names[worst]} the norm is "
                f"{float(self.ratio[-1, worst]):.2g} of the weight's, which is as it should be only where the loss can "
                "get no lower"
            )

    def exploding(self) -> Iterator[str]:
        """Say which gradients explode, at their worst."""
        grown = self.norm / self.norm[0]
        high = (self.ratio >= EXPLODING) | ((grown >= GROWTH) & (self.ratio >= LARGE))
        high &= self.layered & self.norm.isfinite() & (self.weight_norm > 0)
        if not bool(high.any()):
            return
        row, column = divmod(int(torch.where(high, self.ratio, 0).argmax()), len(self.names))
        rise = (
            f", {float(grown[row, column]):,.0f} times the first epoch's" if 1.5 < grown[row, column] < math.inf else ""
        )
        ratio = f"{float(self.ratio[row, column]):,.0f} times the weight's norm"
        yield (
            f"exploding: the {gradients(self.chosen(high.any(0)))}; in epoch {self.epochs[row]} the norm in "
            f"{self.names[column]} is {float(self.norm[row, column]):.3g}, {ratio}{rise}; a smaller rate or clipping "
            "helps, and a loss that is a mean over the samples, not a sum"
        )

    def chosen(self, where: Tensor) -> list[str]:
        """Return the names of the weights (weights,) for which something holds."""
        return [name for name, one in zip(self.names, where.tolist(), strict=True) if one]

    def rows(self) -> list[dict[str, Any]]:
        """Return in JSON terms a row a weight: what it is like in the last epoch; None for what is not finite."""
        columns = {"norm": self.norm, "mean_abs": self.mean_abs, "weight_norm": self.weight_norm, "ratio": self.ratio}
        return [
            {"weight": name} | {key: finite(float(values[-1, place])) for key, values in columns.items()}
            for place, name in enumerate(self.names)
        ]

    def facts(self) -> dict[str, Any]:
        """Return in JSON terms what the picture shows."""
        return {
            "run": str(self.history.folder),
            "model": self.history.facts["model"],
            "layer": None,
            "gradients": self.kind,
            "epochs": self.epochs,
            "verdicts": self.verdicts(),
            "versions": self.history.facts["versions"],
        }

    def save(self, path: str | Path) -> Path:
        """Write the curves as PNG.

        Raises:
            OutputRefused: it cannot be written.
        """
        return write_file(Path(path), encode.png(self.picture(), self.facts()))

    def picture(self) -> display.Picture:
        """Return the curves; see `curves`."""
        parts = (f"{len(self.names)} weights", self.kind, "triangle: 0", "cross: NaN or infinity")
        said = [captions.wrap_text(sentence.split(), PLOT[0], " ") for sentence in self.verdicts()]
        note = "\n".join([captions.wrap_text(parts, PLOT[0]), *said])
        return captions.with_caption(self.plot(), f"{self.history.facts['model']} · gradients, epoch by epoch", note)

    def plot(self) -> display.Picture:
        """Return the three plots with the legend to their right."""
        from matplotlib import colormaps  # with the next two most of a second
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        canvas = FigureCanvasAgg(Figure((PLOT[0] / 100, PLOT[1] / 100), dpi=100, layout="constrained"))
        panels = canvas.figure.subplots(1, len(PANELS), sharex=True)
        colours = colormaps["viridis"](np.linspace(DARKEST, PALEST, len(self.names)))
        many, lines = len(self.names) > LEGEND, []
        marker = "o" if len(self.epochs) <= 40 else ""
        for place, layered in enumerate(self.layered.tolist()):
            look = {
                "color": colours[place],
                "linestyle": "-" if layered else ":",
                "linewidth": (1.0 if many else 1.6) if layered else 0.9,
                "marker": marker,
                "markersize": 2 if many else 3,
                "zorder": 3 if layered else 2,
            }
            for axes, (_, key) in zip(panels, PANELS, strict=True):
                values = getattr(self, key)[:, place].clone()
                values[(values <= 0) | ~values.isfinite()] = math.nan  # no place on the scale
                lines += axes.plot(self.epochs, values.tolist(), **look)
        margin = 0.05 * (self.epochs[-1] - self.epochs[0]) or 0.5
        for axes, (title, key) in zip(panels, PANELS, strict=True):
            axes.set_yscale("log")
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("epoch", fontsize=9)
            axes.tick_params(which="both", labelsize=8)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlim(self.epochs[0] - margin, self.epochs[-1] + margin)
            axes.grid(axis="y", color="#e5e5e5")
            axes.spines[["top", "right"]].set_visible(False)
            self.mark(axes, getattr(self, key), colours)
        named, remark = list(range(len(self.names))), ""
        if many:
            named = self.layered.nonzero()[:, 0].tolist() or named
            every = math.ceil(len(named) / LEGEND)
            named, remark = named[::every], f", 1 of {every} named" if every > 1 else ", without biases and scales"
        legend = canvas.figure.legend(
            [lines[place * len(PANELS)] for place in named],
            [shortened(self.names[place]) for place in named],
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
        canvas.draw()  # type: ignore[no-untyped-call]
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())  # type: ignore[no-untyped-call]

    def mark(self, axes: Any, values: Tensor, colours: Any) -> None:
        """Mark on a plot what has no place on its scale: 0 at the foot, NaN and infinity at the top."""
        there = self.batches > 0
        for where, sign, height in ((values == 0, "v", 0.0), (there & (self.nonfinite > 0), "x", 1.0)):
            rows, columns = where.nonzero(as_tuple=True)
            if len(rows):
                at = [self.epochs[row] for row in rows.tolist()]
                place = axes.get_xaxis_transform()
                shown = colours[columns.numpy()]
                axes.scatter(at, [height] * len(at), 22, shown, marker=sign, transform=place, clip_on=False)


def is_layered(shape: Sequence[int]) -> bool:
    """Return whether a weight is a matrix or a kernel by its shape, not a bias or a scale such as (c,) or (c, 1, 1)."""
    return len(shape) == 2 or (len(shape) > 2 and math.prod(shape[1:]) > 1)


def gradients(names: Sequence[str]) -> str:
    """Return whose gradients they are, with at most five names."""
    named = names if len(names) <= NAMED + 1 else names[:NAMED]
    more = f" and {len(names) - NAMED} more weights" if len(named) < len(names) else ""
    return f"gradient{'s' * (len(names) > 1)} of {', '.join(named)}{more}"


def is_are(where: Tensor) -> str:
    return "is" if int(where.sum()) == 1 else "are"


def finite(value: float) -> float | None:
    """Return a number as JSON has it: None for NaN and infinity."""
    return value if math.isfinite(value) else None


def shortened(name: str) -> str:
    """Return the end of a long name."""
    return name if len(name) < 31 else f"…{name[-29:]}"
