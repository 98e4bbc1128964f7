"""Tables of gradient norms: what counts as a kernel, and the rows of the last epoch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fake_training_record import gradient, gradients_record, record_of
from phosphene import errors
from phosphene.training.gradient_norms import GradientNorms, is_layered


def test_what_is_a_matrix_or_a_kernel() -> None:
    shapes = ((4, 3, 3, 3), (5, 4), (512, 1), (1, 512), (8, 1, 3, 3), (8,), (8, 1, 1))
    assert [is_layered(shape) for shape in shapes] == [True, True, True, True, True, False, False]


def test_a_record_without_gradients_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidRequest, match="holds no gradients; train again with a Recorder of gradients="):
        GradientNorms.of(record_of(tmp_path / "a", {"conv1": [torch.zeros(1, 1, 3, 3)]}))
    with pytest.raises(errors.InvalidRequest, match="no finished epoch"):
        GradientNorms.of(record_of(tmp_path / "b", {"conv1": []}))


def test_rows_are_those_of_the_last_epoch(tmp_path: Path) -> None:
    nan = float("nan")
    broken = {"a.weight": gradient(nan, mean_abs=nan, nonfinite=1, first=0)}
    norms = GradientNorms.of(gradients_record(tmp_path / "run", broken, weight_norm=0.5))
    rows = {row["weight"]: row for row in norms.rows()}
    assert rows["a.weight"] == {"weight": "a.weight", "norm": None, "mean_abs": None, "weight_norm": 0.5, "ratio": None}
    assert rows["c.weight"]["ratio"] == pytest.approx(0.1 * math.sqrt(20) / 0.5)
