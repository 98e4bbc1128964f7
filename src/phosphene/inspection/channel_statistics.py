"""Statistics of a layer's channels for one photo: lowest, mean and highest value, zeros, blank and broken channels."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from phosphene.network.layers import Layer

CHUNK_VALUES = 2_000_000  # values that are converted to float64 at a time


class ChannelStatistics(NamedTuple):
    """Numbers (c,) in float64, and flags (c,), of a layer's channels; see `Activations` for what is blank."""

    low: Tensor
    high: Tensor
    mean: Tensor
    zero: Tensor  # share of values that are exactly 0
    blank: Tensor
    broken: Tensor  # holds NaN or infinity


def chunks(maps: Tensor) -> tuple[Tensor, ...]:
    """Return maps (c, h, w) in portions that stay small in float64."""
    return torch.split(maps, max(1, CHUNK_VALUES // maps[0].numel()))


def channel_statistics(maps: Tensor) -> ChannelStatistics:
    """Return the statistics of maps (c, h, w)."""
    rows = []
    for chunk in chunks(maps):
        values = chunk.double().flatten(1)
        low, high, mean, zero = values.amin(1), values.amax(1), values.mean(1), (values == 0).double().mean(1)
        flat = high - low <= 1e-6 * torch.maximum(low.abs(), high.abs()) if values.shape[1] > 1 else high == 0
        finite = values.isfinite().all(1)
        rows.append((low, high, mean, zero, flat & finite, ~finite))
    return ChannelStatistics(*(torch.cat(column) for column in zip(*rows, strict=True)))


def layer_summary(layer: Layer, value: Tensor, maps: Tensor) -> dict[str, Any]:
    """Return the row of one layer; see `Activations.rows`."""
    statistics = channel_statistics(maps)
    low, high, mean, zero = (column[~statistics.broken] for column in statistics[:4])
    numbers = {"silent": (high <= 0).double().mean(), "zero": zero.mean(), "mean": mean.mean()}  # NaN: all are broken
    numbers |= {"minimum": low.min(), "maximum": high.max()} if len(low) else {}
    return {
        "layer": layer.path,
        "kind": layer.kind,
        "shape": list(value.shape),
        "channels": len(maps),
        "map": list(maps.shape[1:]) if maps[0].numel() > 1 else None,
        "blank": float(statistics.blank.double().mean()),
        "broken": float(statistics.broken.double().mean()),
        **dict.fromkeys(("minimum", "maximum")),
        **{name: None if bool(number.isnan()) else float(number) for name, number in numbers.items()},
    }
