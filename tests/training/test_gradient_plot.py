"""Gradient curves: they run through the recorded numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from fake_training_record import SHAPES, gradient, gradients_record, record_of
from phosphene.training.gradient_norms import GradientNorms
from phosphene.training.gradient_plot import PLOT, curves, save_curves
from phosphene.training.gradient_verdicts import verdicts
from phosphene.training.history import History


def drawn(history: History, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return matplotlib's figure of the curves."""
    figures: list[Any] = []
    draw = FigureCanvasAgg.draw

    def keep(canvas: Any) -> None:
        figures.append(canvas.figure)
        draw(canvas)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(FigureCanvasAgg, "draw", keep)
    assert curves(history).width >= PLOT[0]
    return figures[0]


def test_the_curves_run_through_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = float("nan")
    bad = gradient(nan, mean_abs=nan, nonfinite=1, first=0)
    history = gradients_record(
        tmp_path, {"a.weight": gradient(3.0, mean_abs=0.2)}, {"a.weight": bad, "a.bias": gradient(0.0)}, {}
    )
    figure = drawn(history, monkeypatch)
    norm, magnitude, ratio = figure.axes
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 3
    assert norm.lines[0].get_ydata()[0] == 3.0
    assert math.isnan(norm.lines[0].get_ydata()[1])
    assert norm.lines[3].get_ydata() == pytest.approx([0.1 * math.sqrt(20)] * 3)
    assert magnitude.lines[0].get_ydata()[0] == 0.2
    assert ratio.lines[0].get_ydata()[0] == 3.0
    assert [list(line.get_xdata()) for line in norm.lines] == [[0, 1, 2]] * 4
    special = [tuple(marks.get_offsets()[0]) for marks in norm.collections]
    assert special == [(1, 0), (1, 1)]  # epoch 1: a 0 at the foot, a NaN at the top
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(SHAPES)
    from_input = [np.mean(line.get_color()[:3]) for line in norm.lines]
    assert from_input == sorted(from_input), "viridis goes from dark to light"


def test_a_legend_of_160_weights_names_some_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: dict[str, Sequence[int]] = {}
    for index in range(80):
        shapes |= {f"{index}.weight": (3, 3), f"{index}.bias": (3,)}
    history = record_of(tmp_path, {}, gradients=[{name: gradient(0.1) for name in shapes}], shapes=shapes)
    figure = drawn(history, monkeypatch)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [f"{index}.weight" for index in range(0, 80, 3)]
    assert "1 of 3 named" in figure.legends[0].get_title().get_text()


def test_metadata_is_sound_json(tmp_path: Path) -> None:
    nan = float("nan")
    history = gradients_record(tmp_path / "run", {"a.weight": gradient(nan, mean_abs=nan, nonfinite=1, first=0)})
    with Image.open(save_curves(GradientNorms.of(history), tmp_path / "c.png")) as image:
        facts = json.loads(image.text["phosphene"])  # type: ignore[attr-defined]
    assert (facts["run"], facts["epochs"], facts["verdicts"]) == (str(history.folder), [0], verdicts(history))
