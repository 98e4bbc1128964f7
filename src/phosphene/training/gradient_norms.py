"""The norms of every weight's gradient over a training, as tables of epochs and weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.training.history import History


@dataclass(frozen=True, eq=False)
class GradientNorms:
    """The norms of a training's gradients.

    Attributes:
        history: the record.
        names: the trained weights, in the network's order.
        epochs: those that hold gradients.
        taken: how the gradients were taken, in words.
        counts: (weights,) entries; layered: (weights,) whether it is a matrix or kernel, not a bias or a scale.
        norm, mean_abs, weight_norm: (epochs, weights), float64; NaN where a weight had no gradient.
        batches, nonfinite, first: (epochs, weights), int64: batches with a gradient, of these with NaN or infinity, and
            the first of these, -1 for none.
    """

    history: History
    names: list[str]
    epochs: list[int]
    taken: str
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
        """Return the norms that a record holds."""
        history.resolve_epoch(None)  # refuses a run without epochs
        entries = {epoch: history.entry(epoch)["gradients"] for epoch in history.epochs}
        recorded = {epoch: gradients for epoch, gradients in entries.items() if gradients}
        if not recorded:
            raise InvalidRequest(
                f"{history.folder} holds no gradients; train again with a Recorder of gradients='running' or 'epoch'"
            )
        names = {name for gradients in recorded.values() for name in gradients["weights"]}.union(history.weights)
        shapes = {weight["name"]: weight["shape"] for weight in history.facts["weights"] if weight["name"] in names}

        def table(key: str, missing: float, dtype: torch.dtype = torch.float64) -> Tensor:
            rows = [[epoch["weights"].get(name, {}).get(key) for name in shapes] for epoch in recorded.values()]
            return torch.tensor([[missing if cell is None else cell for cell in row] for row in rows], dtype=dtype)

        last = recorded[max(recorded)]
        return cls(
            history=history,
            names=list(shapes),
            epochs=list(recorded),
            taken="of the total loss" if last["kind"] == "epoch" else f"mean over each epoch's batches, {last['read']}",
            counts=torch.tensor([math.prod(shape) for shape in shapes.values()]),
            layered=torch.tensor([is_layered(shape) for shape in shapes.values()]),
            norm=table("norm", math.nan),
            mean_abs=table("mean_abs", math.nan),
            weight_norm=table("weight_norm", math.nan),
            batches=table("batches", 0, torch.int64),
            nonfinite=table("nonfinite", 0, torch.int64),
            first=table("first_nonfinite", -1, torch.int64),
        )

    @cached_property
    def rms(self) -> Tensor:
        """(epochs, weights) root mean square of the entries."""
        return self.norm / self.counts.sqrt()

    @cached_property
    def ratio(self) -> Tensor:
        """(epochs, weights) norm of the gradient over that of the weight."""
        return self.norm / self.weight_norm

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each weight in the last epoch, as JSON values; None for what is not finite."""
        columns = {"norm": self.norm, "mean_abs": self.mean_abs, "weight_norm": self.weight_norm, "ratio": self.ratio}
        return [
            {"weight": name} | {key: finite(float(values[-1, index])) for key, values in columns.items()}
            for index, name in enumerate(self.names)
        ]


def is_layered(shape: Sequence[int]) -> bool:
    """Return whether a weight is a matrix or a kernel by its shape, not a bias or a scale such as (c,) or (c, 1, 1)."""
    return len(shape) == 2 or (len(shape) > 2 and math.prod(shape[1:]) > 1)


def finite(value: float) -> float | None:
    """Return a number as a JSON value: None for NaN and infinity."""
    return value if math.isfinite(value) else None
