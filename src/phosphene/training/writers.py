"""Showing a training while it runs: each epoch goes to TensorBoard or Weights & Biases as it is recorded.

Both get the same names: `epoch_metrics/`, `gradient_norm/`, `gradient_mean_abs/`, `gradient_zeros/` (the share of
entries that are 0), `gradient_nonfinite_batches/` where there are any, `gradient_log2/` (a histogram), `kernels/` and
`filters/`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from phosphene.errors import InvalidRequest, require_extra
from phosphene.images.display import Picture
from phosphene.training.gradient_statistics import BIAS, EXPONENTS, Gradient
from phosphene.training.history import EpochRecord

FAILED: WeakSet[Any] = WeakSet()  # writers that the user was warned about
STEPS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # the last step of each run of Weights & Biases
EPOCH = "phosphene_epoch"  # what the panels of Weights & Biases are drawn over
NUMBERS = ("epoch_metrics", "gradient_norm", "gradient_mean_abs", "gradient_zeros", "gradient_nonfinite_batches")
GROUPS = (*NUMBERS, "gradient_log2", "kernels", "filters")

Show = Callable[[Any, EpochRecord], None]  # what one kind of writer does with an epoch


def publish(writer: Any, entry: EpochRecord) -> None:
    """Show what was recorded of an epoch.

    Whatever a writer fails with, the training goes on: the first failure of each is a warning, the others are silent.

    Args:
        writer: a `SummaryWriter` of TensorBoard, a run of Weights & Biases, or several in a list.
        entry: one epoch.

    Raises:
        InvalidRequest: the writer is neither.
    """
    found = matched_writers(writer)
    for one, kind in found:
        try:
            kind(one, entry)
        except Exception as error:
            if one not in FAILED:
                FAILED.add(one)
                warnings.warn(
                    f"{type(one).__name__} could not show epoch {entry.epoch} ({type(error).__name__}: {error}); the "
                    "training and its record go on, and nothing more is said of this writer",
                    stacklevel=2,
                )


def matched_writers(writer: Any) -> list[tuple[Any, Show]]:
    """Return every writer with what shows an epoch on it, so that a wrong one is refused before the training.

    Raises:
        InvalidRequest: one is neither a SummaryWriter nor a run.
        ExtraMissing: it looks like a run of Weights & Biases, which is not installed.
    """
    several = writer if isinstance(writer, list | tuple) else [] if writer is None else [writer]
    found: list[tuple[Any, Show]] = []
    for one in several:
        run: Any = (
            getattr(one, "run", None) if isinstance(one, ModuleType) else one
        )  # `wandb` itself stands for its run
        if has(run, "add_scalar", "add_image", "add_histogram_raw"):
            found.append((run, to_tensorboard))
        elif has(run, "log", "define_metric"):
            require_extra("wandb", "wandb")
            found.append((run, to_wandb))
        else:
            what = f"the module {one.__name__}, in which no run goes on" if isinstance(one, ModuleType) else type(one)
            raise InvalidRequest(
                "a writer is a SummaryWriter of torch.utils.tensorboard or a run that wandb.init returns, or a list of "
                f"such, not {what if isinstance(what, str) else f'a {what.__name__}'}"
            )
    return found


def has(writer: Any, *methods: str) -> bool:
    """Return whether an object can be called by all these names."""
    return all(callable(getattr(writer, one, None)) for one in methods)


def to_tensorboard(writer: Any, entry: EpochRecord) -> None:
    """Write an epoch into TensorBoard's event file, the epoch being the step."""
    for name, number in scalars(entry):
        writer.add_scalar(name, number, entry.epoch)
    for name, (counts, edges) in histograms(entry):
        middles = (edges[:-1] + edges[1:]) / 2
        writer.add_histogram_raw(
            name,
            min=float(edges[0]),  # TensorBoard draws the first and the last bar from here and to here
            max=float(edges[-1]),
            num=int(counts.sum()),
            sum=float(counts @ middles),  # as if each entry lay in the middle of its bin
            sum_squares=float(counts @ middles**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=entry.epoch,
        )
    for name, picture in pictures(entry):
        writer.add_image(name, np.array(picture.convert("RGB")), entry.epoch, dataformats="HWC")
    if entry.notes and has(writer, "add_text"):
        writer.add_text("notes", "\n\n".join(entry.notes), entry.epoch)
    if has(writer, "flush"):
        writer.flush()


def to_wandb(run: Any, entry: EpochRecord) -> None:
    """Log an epoch to a run of Weights & Biases, all in one row.

    A row that lies before the run's last step would be thrown away by it, and logging without a step would push away
    what the user logs for the same step afterwards. So the row's step is the epoch where nobody else has gone further,
    else where the run stands. The panels are drawn over the epoch in either case.
    """
    package = require_extra("wandb", "wandb")
    row: dict[str, Any] = {EPOCH: entry.epoch, **dict(scalars(entry))}
    row |= {name: package.Histogram(np_histogram=bins) for name, bins in histograms(entry)}
    row |= {name: package.Image(picture.convert("RGB")) for name, picture in pictures(entry)}
    row |= {"notes": "\n".join(entry.notes)} if entry.notes else {}
    if run not in STEPS:
        run.define_metric(EPOCH, hidden=True)
        for group in GROUPS:
            run.define_metric(f"{group}/*", step_metric=EPOCH)
    step = max(int(getattr(run, "step", 0) or 0), entry.epoch)
    step += STEPS.get(run) == step  # two epochs in one row would leave the later one only
    STEPS[run] = step
    run.log(row, step=step)


def scalars(entry: EpochRecord) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an epoch by name; none is taken to a logarithm: both tools have a logarithmic axis."""
    for name, number in entry.metrics.items():
        yield f"epoch_metrics/{name}", float(number)
    for name, gradient in entry.gradients.items():
        yield f"gradient_norm/{name}", gradient.norm
        yield f"gradient_mean_abs/{name}", gradient.mean_abs
        yield f"gradient_zeros/{name}", int(gradient.histogram[0]) / max(1, int(gradient.histogram.sum()))
        if gradient.nonfinite:
            yield f"gradient_nonfinite_batches/{name}", gradient.nonfinite


def histograms(entry: EpochRecord) -> Iterator[tuple[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]]:
    """Yield (counts, edges) of log2 |g| for each weight tensor, without the empty bins at both ends.

    The bins are one wide in the logarithm, for on a linear axis all of a gradient would be one stroke at 0. Zeros and
    what is not finite have no logarithm: they are numbers of their own.
    """
    for name, gradient in entry.gradients.items():
        bins = log_bins(gradient)
        if bins is not None:
            yield f"gradient_log2/{name}", bins


def log_bins(gradient: Gradient) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Return (n,) counts and (n + 1,) edges of log2 |g|; None where no entry is finite and other than 0."""
    counts = gradient.histogram.numpy()[1 : EXPONENTS - 1]
    filled = np.flatnonzero(counts)
    if not len(filled):
        return None
    low, high = int(filled[0]), int(filled[-1])
    edges = np.arange(low, high + 2, dtype=np.float64) + 1 - BIAS  # bin k holds 2^(k-127) <= |g| < 2^(k-126)
    return counts[low : high + 1], edges


def pictures(entry: EpochRecord) -> Iterator[tuple[str, Picture]]:
    """Yield the kernel sheet of each layer, its first page where it has several, and the rendered filters."""
    for layer, kernels in entry.kernels.items():
        yield f"kernels/{layer}", kernels.grid()
    if entry.filters is not None:
        shown: Mapping[str, Picture] = dict(zip(entry.filters.names, entry.filters.pictures, strict=True))
        for name, picture in shown.items():
            yield f"filters/{name}", picture
