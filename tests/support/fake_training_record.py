"""Records of trainings that no training made: every number in them is given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phosphene.rendering.result import Rendered
from phosphene.training.epoch_record import EpochRecord, recorded_kernels
from phosphene.training.gradient_statistics import EXPONENTS, Gradient
from phosphene.training.history import History, resume_or_create


def record_of(
    folder: Path,
    kernels: Mapping[str, Sequence[Tensor]],
    metrics: Sequence[Mapping[str, float]] = (),
    gradients: Sequence[Mapping[str, Gradient]] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
    weight_norm: float = 1.0,
    pictures: tuple[str, Sequence[Tensor]] | None = None,
    frozen: Sequence[str] = (),
) -> History:
    """Return a record of these kernels (out, in, kh, kw) for each layer and epoch.

    Args:
        gradients: those of each epoch, by weight; shapes: of the weights; frozen: weights that are not trained.
        pictures: a layer, and its filters (n, 3, h, w) for each epoch.
    """
    facts: dict[str, Any] = {
        "model": "net",
        "weights": [
            {"name": name, "shape": list(shape), "dtype": "float32", "trained": name not in frozen}
            for name, shape in (shapes or {}).items()
        ],
        "layers": [{"path": path, "kind": "Conv2d"} for path in kernels],
        "gradients": "running" if gradients else None,
        "filters": {"layer": pictures[0]} if pictures else None,
        "every": 1,
        "versions": {"phosphene": "0"},
    }
    history = resume_or_create(folder, facts)
    for epoch in range(max([len(gradients), *map(len, kernels.values()), *([len(pictures[1])] if pictures else [])])):
        history.write(
            EpochRecord(
                epoch=epoch,
                metrics=metrics[epoch] if metrics else {},
                kernels={
                    path: recorded_kernels(path, weights[epoch], facts, epoch) for path, weights in kernels.items()
                },
                gradients=gradients[epoch] if gradients else {},
                weight_norms=dict.fromkeys(shapes or {}, weight_norm),
                facts={"kind": "running", "read": "before clipping", "batches": 4} if gradients else {},
                filters=rendered(pictures[0], pictures[1][epoch]) if pictures else None,
            )
        )
    return history


def rendered(layer: str, images: Tensor) -> Rendered:
    """Return pictures (n, 3, h, w) in [0, 1] as filters 3, 4 … of a layer."""
    none = torch.zeros(len(images))
    recipe = {"name": "made", "display": "clip", "seed": 0, "sizes": [16], "steps": 1}
    spec = {"model": "net", "layers": [layer], "sees": ["unknown"], "recipe": recipe}
    names = tuple(f"filter_{3 + index}" for index in range(len(images)))
    return Rendered(images, none, none, none[None], none > 0, none > 0, names, spec)


def gradient(
    norm: float, size: int = 9, mean_abs: float = 0.5, batches: int = 4, nonfinite: int = 0, first: int | None = None
) -> Gradient:
    """Return the statistics of the gradients of a weight with so many entries."""
    counts = torch.zeros(EXPONENTS, dtype=torch.int64)
    return Gradient(torch.zeros(size), mean_abs, norm, counts, batches, nonfinite, first)


SHAPES = {"a.weight": (4, 3, 3, 3), "a.bias": (4,), "b.weight": (4, 4, 3, 3), "c.weight": (5, 4)}
FINE = {name: gradient(0.1 * math.sqrt(math.prod(shape))) for name, shape in SHAPES.items()}  # each entry 0.1


def gradients_record(folder: Path, *epochs: Mapping[str, Gradient], weight_norm: float = 1.0) -> History:
    """Return a record of these gradients; of a weight that an epoch does not name, each entry is 0.1."""
    return record_of(
        folder, {}, gradients=[FINE | dict(epoch) for epoch in epochs], shapes=SHAPES, weight_norm=weight_norm
    )
