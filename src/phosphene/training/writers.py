"""Showing a training while it runs: each epoch is written to TensorBoard or Weights & Biases as it is recorded.

Both get the same names: `epoch_metrics/`, `gradient_norm/`, `gradient_mean_abs/`, `gradient_zeros/` (the share of
entries that are 0), `gradient_nonfinite_batches/` where there are any, `gradient_log2/` (a histogram), `kernels/` and
`filters/`.
"""

import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from phosphene.errors import InvalidRequest, require_extra
from phosphene.images.display import Picture
from phosphene.training.epoch_record import EpochRecord
from phosphene.training.gradient_statistics import BIAS, EXPONENTS, Gradient

FAILED: WeakSet[Any] = WeakSet()  # writers that have caused a warning
STEPS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # the last step of each run of Weights & Biases
EPOCH = "phosphene_epoch"  # the horizontal axis of the panels of Weights & Biases
NUMBERS = ("epoch_metrics", "gradient_norm", "gradient_mean_abs", "gradient_zeros", "gradient_nonfinite_batches")
GROUPS = (*NUMBERS, "gradient_log2", "kernels", "filters")

WriteEpoch = Callable[[Any, EpochRecord], None]  # (writer, record)


def publish(writer: Any, record: EpochRecord) -> None:
    """Show an epoch's record.

    Whatever a writer fails with, the training continues: the first failure of each is a warning, later ones are silent.

    Args:
        writer: a `SummaryWriter` of TensorBoard, a run of Weights & Biases, or several in a list.
        record: of one epoch.

    Raises:
        InvalidRequest: the writer is neither.
    """
    for target, write in matched_writers(writer):
        try:
            write(target, record)
        except Exception as error:
            if target not in FAILED:
                FAILED.add(target)
                warnings.warn(
                    f"{type(target).__name__} could not show epoch {record.epoch} ({type(error).__name__}: {error}); "
                    "the training and its record go on, without further warnings about this writer",
                    stacklevel=2,
                )


def matched_writers(writer: Any) -> list[tuple[Any, WriteEpoch]]:
    """Return every writer with the function that writes an epoch to it; used before the training to refuse wrong ones.

    Raises:
        InvalidRequest: one is neither a SummaryWriter nor a run.
        ExtraMissing: it looks like a run of Weights & Biases, which is not installed.
    """
    writers = writer if isinstance(writer, list | tuple) else [] if writer is None else [writer]
    matched: list[tuple[Any, WriteEpoch]] = []
    for candidate in writers:
        is_module = isinstance(candidate, ModuleType)
        target: Any = getattr(candidate, "run", None) if is_module else candidate  # `wandb` itself stands for its run
        if has_methods(target, "add_scalar", "add_image", "add_histogram_raw"):
            matched.append((target, to_tensorboard))
        elif has_methods(target, "log", "define_metric"):
            require_extra("wandb", "wandb")
            matched.append((target, to_wandb))
        else:
            kind = f"a {type(candidate).__name__}"
            raise InvalidRequest(
                "a writer is a SummaryWriter of torch.utils.tensorboard or a run that wandb.init returns, or a list of "
                f"these, not {f'the module {candidate.__name__}, which has no active run' if is_module else kind}"
            )
    return matched


def has_methods(writer: Any, *names: str) -> bool:
    """Return whether an object has all methods of these names."""
    return all(callable(getattr(writer, name, None)) for name in names)


def to_tensorboard(writer: Any, record: EpochRecord) -> None:
    """Write an epoch to TensorBoard's event file, with the epoch as the step."""
    for name, number in scalars(record):
        writer.add_scalar(name, number, record.epoch)
    for name, (counts, edges) in histograms(record):
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
            global_step=record.epoch,
        )
    for name, picture in pictures(record):
        writer.add_image(name, np.array(picture.convert("RGB")), record.epoch, dataformats="HWC")
    if record.notes and has_methods(writer, "add_text"):
        writer.add_text("notes", "\n\n".join(record.notes), record.epoch)
    if has_methods(writer, "flush"):
        writer.flush()


def to_wandb(run: Any, record: EpochRecord) -> None:
    """Log an epoch to a run of Weights & Biases, as one row.

    The run would drop a row that lies before its last step, and logging without a step would make it drop what the user
    logs for the same step later. So the row's step is the epoch, or the run's last step if that is already further on.
    The panels are drawn over the epoch in either case.
    """
    package = require_extra("wandb", "wandb")
    row: dict[str, Any] = {EPOCH: record.epoch, **dict(scalars(record))}
    row |= {name: package.Histogram(np_histogram=bins) for name, bins in histograms(record)}
    row |= {name: package.Image(picture.convert("RGB")) for name, picture in pictures(record)}
    row |= {"notes": "\n".join(record.notes)} if record.notes else {}
    if run not in STEPS:
        run.define_metric(EPOCH, hidden=True)
        for group in GROUPS:
            run.define_metric(f"{group}/*", step_metric=EPOCH)
    step = max(int(getattr(run, "step", 0) or 0), record.epoch)
    step += STEPS.get(run) == step  # of two epochs in one row only the later would remain
    STEPS[run] = step
    run.log(row, step=step)


def scalars(record: EpochRecord) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an epoch by name; not their logarithms, since both tools have a logarithmic axis."""
    for name, number in record.metrics.items():
        yield f"epoch_metrics/{name}", float(number)
    for name, gradient in record.gradients.items():
        yield f"gradient_norm/{name}", gradient.norm
        yield f"gradient_mean_abs/{name}", gradient.mean_abs
        yield f"gradient_zeros/{name}", int(gradient.histogram[0]) / max(1, int(gradient.histogram.sum()))
        if gradient.nonfinite:
            yield f"gradient_nonfinite_batches/{name}", gradient.nonfinite


def histograms(record: EpochRecord) -> Iterator[tuple[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]]:
    """Yield (counts, edges) of log2 |g| for each weight tensor, without the empty bins at both ends.

    The bins have the width 1 in the logarithm, since on a linear axis all of a gradient would be one bar at 0. Zeros
    and entries that are not finite have no logarithm: `scalars` counts them.
    """
    for name, gradient in record.gradients.items():
        bins = log_bins(gradient)
        if bins is not None:
            yield f"gradient_log2/{name}", bins


def log_bins(gradient: Gradient) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Return (n,) counts and (n + 1,) edges of log2 |g|; None if no entry is finite and not 0."""
    counts = gradient.histogram.numpy()[1 : EXPONENTS - 1]
    filled = np.flatnonzero(counts)
    if not len(filled):
        return None
    low, high = int(filled[0]), int(filled[-1])
    edges = np.arange(low, high + 2, dtype=np.float64) + 1 - BIAS  # bin k holds 2^(k-127) <= |g| < 2^(k-126)
    return counts[low : high + 1], edges


def pictures(record: EpochRecord) -> Iterator[tuple[str, Picture]]:
    """Yield the kernel sheet of each layer, only the first page if there are several, and the rendered filters."""
    for layer, kernels in record.kernels.items():
        yield f"kernels/{layer}", kernels.grid()
    if record.filters is not None:
        for name, picture in dict(zip(record.filters.names, record.filters.pictures, strict=True)).items():
            yield f"filters/{name}", picture
