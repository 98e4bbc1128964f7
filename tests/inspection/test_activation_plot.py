"""The summary's pictures: the cells of its table, and the points of its plot over depth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import ImageColor

from phosphene.images import display
from phosphene.inspection.activation_plot import BLUE, GREEN, depth_plot, table_cells


def row(path: str, **values: Any) -> dict[str, Any]:
    """Return a layer's row as `Activations.rows` has it, with some values replaced."""
    usual = {"layer": path, "kind": "ReLU", "map": [8, 8], "channels": 4, "blank": 0.25, "silent": 0.5, "zero": 0.125}
    return {**usual, "minimum": 0.0, "mean": 0.5, "maximum": 2.0, **values}


def spots(picture: display.Picture, colour: str) -> list[tuple[float, float]]:
    """Return the centres (down, across) of a colour's separate spots below the legends, from left to right."""
    coloured = (np.asarray(picture) == ImageColor.getrgb(colour)).all(2)
    coloured[:30] = False
    columns = np.flatnonzero(coloured.any(0))
    parts = np.split(columns, np.flatnonzero(np.diff(columns) > 20) + 1)
    return [(float(np.flatnonzero(coloured[:, part].any(1)).mean()), float(part.mean())) for part in parts]


def test_the_cells_of_a_row_have_about_three_digits() -> None:
    cells = table_cells(row("conv", channels=2048, map=[8, 4], minimum=-0.012345, mean=12345.6, maximum=2.5e7))
    assert cells == ["conv", "ReLU", "8×4", "2,048", "25%", "50%", "12%", "-0.0123", "12,346", "2.5e+07"]


def test_the_cells_of_a_broken_vector_are_empty_or_nan() -> None:
    nothing = dict.fromkeys(("silent", "zero", "minimum", "mean", "maximum"))
    assert table_cells(row("fc", map=None, **nothing)) == ["fc", "ReLU", "", "4", "25%", "", "", "nan", "nan", "nan"]


def test_the_plot_halves_maps_by_equal_steps_and_draws_shares_to_scale() -> None:
    sides, blank = (16, 8, 4), (0.0, 0.5, 1.0)
    rows = [row(f"act{side}", map=[side, side], blank=share) for side, share in zip(sides, blank, strict=True)]
    picture = depth_plot(rows)
    (first, left), (second, middle), (third, right) = spots(picture, BLUE)
    assert second - first == pytest.approx(third - second, abs=1)  # the scale is logarithmic
    assert second - first > 30
    assert middle - left == pytest.approx(right - middle, abs=1)
    marks = np.asarray(picture)[320:, [round(left), round(middle), round(right)]] == ImageColor.getrgb(GREEN)
    low, half, full = (float(np.flatnonzero(column).mean()) for column in marks.all(2).T)
    assert low - half == pytest.approx(half - full, abs=1.5)
    assert low - full > 150
