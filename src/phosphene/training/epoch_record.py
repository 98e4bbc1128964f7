"""What is recorded of one epoch, and how it is written as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from phosphene.inspection.kernels import Kernels
from phosphene.rendering.result import Rendered
from phosphene.training.gradient_statistics import BIAS, Gradient


@dataclass(frozen=True, eq=False)
class EpochRecord:
    """What is recorded of one epoch.

    Attributes:
        metrics: numbers by name, such as the loss.
        kernels: of each recorded layer, (out, in, kh, kw).
        gradients: of each trainable weight that had one.
        weight_norms: the L2 norm of each trainable weight at the end of the epoch.
        facts: how the gradients were taken: `kind`, `read`, `batches`; empty if none were.
        filters: pictures of the filters after the epoch, None if none were rendered.
        notes: what the user should know, such as gradients that are not finite.
    """

    epoch: int
    metrics: Mapping[str, float]
    kernels: Mapping[str, Kernels]
    gradients: Mapping[str, Gradient]
    weight_norms: Mapping[str, float]
    facts: Mapping[str, Any]
    filters: Rendered | None = None
    notes: tuple[str, ...] = ()

    def manifest(self) -> dict[str, Any]:
        """Return the record without its arrays and pictures, as JSON values."""
        weights = {name: statistics(gradient, self.weight_norms[name]) for name, gradient in self.gradients.items()}
        return {
            "epoch": self.epoch,
            "metrics": {name: json_number(value) for name, value in self.metrics.items()},
            "gradients": {**self.facts, "weights": weights} if self.facts else None,
            "filters": self.filters.spec if self.filters else None,
            "notes": list(self.notes),
        }


def statistics(gradient: Gradient, weight_norm: float) -> dict[str, Any]:
    """Return what is recorded of a gradient besides its array, as JSON values; the histogram by power of two."""
    counts = {bin_name(number): int(count) for number, count in enumerate(gradient.histogram) if count}
    return {
        "mean_abs": json_number(gradient.mean_abs),
        "norm": json_number(gradient.norm),
        "weight_norm": json_number(weight_norm),
        "size": gradient.mean.numel(),
        "batches": gradient.batches,
        "nonfinite": gradient.nonfinite,
        "first_nonfinite": gradient.first_nonfinite,
        "histogram": counts,
    }


def bin_name(number: int) -> str:
    """Return which entries a bin counts: "-12" for 2^-12 <= |g| < 2^-11, "zero" for less than 2^-126 too."""
    return {0: "zero", 255: "nonfinite"}.get(number, str(number - BIAS))


def json_number(number: float) -> float | str:
    """Return a number as JSON can hold it: one that is not finite as "NaN", "Infinity" or "-Infinity"."""
    return number if math.isfinite(number) else json.dumps(number)


def from_json_number(value: Any) -> Any:
    """Return a JSON value, a dictionary's values included, with the texts of `json_number` as numbers again."""
    if isinstance(value, dict):
        return {name: from_json_number(inner) for name, inner in value.items()}
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def recorded_kernels(path: str, weights: Tensor, facts: Mapping[str, Any], epoch: int) -> Kernels:
    """Return the kernels (out, in, kh, kw) of a layer after an epoch; `facts` are those of the whole record."""
    first = facts["layers"][0]["path"] == path
    spec = {
        "model": facts["model"],
        "layer": path,
        "kind": next(layer["kind"] for layer in facts["layers"] if layer["path"] == path),
        "shape": list(weights.shape),
        "colours": "rgb" if first and weights.shape[1] == 3 else None,
        "epoch": epoch,
        "versions": facts["versions"],
    }
    return Kernels(weights, spec)


def nonfinite_notes(epoch: int, gradients: Mapping[str, Gradient]) -> list[str]:
    """Return sentences on which gradients of an epoch were NaN or infinite."""
    nonfinite = [(name, gradient) for name, gradient in gradients.items() if gradient.nonfinite]
    return [
        f"epoch {epoch}: the gradient of {name} was NaN or infinite in {gradient.nonfinite} of {gradient.batches} "
        f"batches, first in batch {gradient.first_nonfinite}"
        for name, gradient in nonfinite[:3]
    ] + [f"epoch {epoch}: so were those of {len(nonfinite) - 3} more weights"] * (len(nonfinite) > 3)
