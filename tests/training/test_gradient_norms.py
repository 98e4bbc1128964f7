"""Gradient curves: what is said of gradients whose sizes are given, and where the curves run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from fake_training_record import gradient, record_of
from phosphene import errors
from phosphene.training.gradient_norms import PLOT, GradientNorms, curves, is_layered, verdicts
from phosphene.training.gradient_statistics import Gradient
from phosphene.training.history import History

SHAPES = {"a.weight": (4, 3, 3, 3), "a.bias": (4,), "b.weight": (4, 4, 3, 3), "c.weight": (5, 4)}
FINE = {name: gradient(0.1 * math.sqrt(math.prod(shape))) for name, shape in SHAPES.items()}  # each entry 0.1


def made(folder: Path, *epochs: Mapping[str, Gradient], weight_norm: float = 1.0) -> History:
    """Return a record of these gradients; of a weight that an epoch does not name, each entry is 0.1."""
    return record_of(folder, {}, gradients=[FINE | dict(one) for one in epochs], shapes=SHAPES, weight_norm=weight_norm)


def said(folder: Path, *epochs: Mapping[str, Gradient], weight_norm: float = 1.0) -> list[str]:
    return verdicts(made(folder, *epochs, weight_norm=weight_norm))


def rms(size: float, name: str) -> Gradient:
    """Return a gradient of a weight with this root mean square."""
    return gradient(size * math.sqrt(math.prod(SHAPES[name])))


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_gradients_with_which_nothing_is_wrong(tmp_path: Path) -> None:
    sentence = "nothing is wrong with the gradients of the 4 weights over 2 epochs: none vanishes, explodes"
    (found,) = said(tmp_path, {}, {"a.bias": gradient(1e-9)})  # a bias before a batch normalisation
    assert found.startswith(sentence)


def test_a_first_layer_that_vanishes_is_named_with_the_figures(tmp_path: Path) -> None:
    (found,) = said(tmp_path / "a", {}, {"a.weight": rms(0.4e-4, "a.weight")})
    assert found == (
        "vanishing: the gradient of a.weight is less than 0.001 of the last layer's in epoch 1; in a.weight the root "
        "mean square is 4e-05, and 0.1 in c.weight"
    )
    (found,) = said(tmp_path / "b", {}, {"a.weight": rms(0.9e-4, "a.weight")})  # its norm is a 478th
    assert found.startswith("nothing is wrong")
    (found,) = said(tmp_path / "c", {"a.weight": rms(1e-9, "a.weight")}, {})  # it recovered
    assert found.startswith("nothing is wrong")


def test_a_gradient_that_float32_rounds_off_vanishes(tmp_path: Path) -> None:
    small = {name: gradient(3e-8 if name == "b.weight" else 1e-6) for name in SHAPES}
    (found,) = said(tmp_path, small)
    assert found.startswith("vanishing: the gradient of b.weight is smaller than what float32 rounds off the weight")
    assert "in b.weight the norm is 3e-08 of the weight's" in found


@pytest.mark.parametrize(
    ("first", "then", "weight_norm", "explodes"),
    [
        (1.0, 1.0, 0.0009, True),  # 1,111 times the weight's norm from the start
        (1.0, 1.0, 0.0011, False),
        (0.1, 11.0, 0.1, True),  # 110 times the first epoch's, and the weight's
        (0.1, 9.0, 0.05, False),  # 90 times the first epoch's
        (0.01, 9.0, 0.1, False),  # 900 times the first epoch's, but 90 times the weight's: it begins to learn
    ],
)
def test_exploding(first: float, then: float, weight_norm: float, explodes: bool, tmp_path: Path) -> None:
    epochs = [{name: gradient(size) for name in SHAPES} for size in (first, then)]
    (found,) = said(tmp_path, *epochs, weight_norm=weight_norm)
    assert found.startswith("exploding: the gradients of a.weight, b.weight, c.weight; in epoch") == explodes
    if then == 11.0:
        assert (
            "in epoch 1 the norm in a.weight is 11, 110 times the weight's norm, 110 times the first epoch's;" in found
        )


def test_what_is_a_matrix_or_a_kernel() -> None:
    shapes = ((4, 3, 3, 3), (5, 4), (512, 1), (1, 512), (8, 1, 3, 3), (8,), (8, 1, 1))
    assert [is_layered(one) for one in shapes] == [True, True, True, True, True, False, False]


def test_gradients_of_zero_are_told_from_none_at_all(tmp_path: Path) -> None:
    dead = {"a.weight": gradient(0.0, mean_abs=0.0), "a.bias": gradient(0.0, mean_abs=0.0)}
    (found,) = said(tmp_path / "dead", {}, dead, dead)
    assert found.startswith("zero: the gradients of a.weight, a.bias are exactly 0 in all batches")
    assert found.endswith("(since epoch 1)")
    without = {name: one for name, one in FINE.items() if name != "b.weight"}
    (found,) = verdicts(record_of(tmp_path / "none", {}, gradients=[without], shapes=SHAPES))
    assert found == ("zero: the gradient of b.weight is not there: these weights play no part in the loss (in epoch 0)")
    record = record_of(tmp_path / "frozen", {}, gradients=[without], shapes=SHAPES, frozen=["b.weight"])
    assert record.weights == list(without)
    assert verdicts(record)[0].startswith("nothing is wrong with the gradients of the 3 weights over 1 epoch")


def test_nan_is_named_with_the_batch_where_it_began(tmp_path: Path) -> None:
    nan = float("nan")
    broken = {
        "a.weight": gradient(nan, mean_abs=nan, nonfinite=2, first=2),
        "b.weight": gradient(nan, mean_abs=nan, nonfinite=3, first=1),
    }
    (found,) = said(tmp_path, {}, broken)
    assert found == (
        "NaN or infinity: it began in epoch 1, batch 1 (counted from 0), in the gradient of b.weight; 3 of the 4 "
        "batches of that epoch have it, and 2 of 4 weights in all"
    )


def test_several_faults_are_several_sentences_and_many_names_are_cut(tmp_path: Path) -> None:
    shapes: dict[str, Sequence[int]] = {f"{index}.weight": (3, 3) for index in range(8)}
    sizes = [*(gradient(1e-9) for _ in range(6)), gradient(0.0), gradient(0.1)]
    history = record_of(tmp_path, {}, gradients=[dict(zip(shapes, sizes, strict=True))], shapes=shapes)
    zero, vanishing = verdicts(history)
    assert zero.startswith("zero: the gradient of 6.weight is exactly 0")
    assert "the gradients of 0.weight, 1.weight, 2.weight, 3.weight and 2 more weights are less than" in vanishing


# --- curves -----------------------------------------------------------------------------------------------------------


def drawn(history: History, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return matplotlib's figure of the curves."""
    kept: list[Any] = []
    draw = FigureCanvasAgg.draw

    def keep(canvas: Any) -> None:
        kept.append(canvas.figure)
        draw(canvas)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(FigureCanvasAgg, "draw", keep)
    assert curves(history).width >= PLOT[0]
    return kept[0]


def test_the_curves_run_through_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = float("nan")
    bad = gradient(nan, mean_abs=nan, nonfinite=1, first=0)
    history = made(tmp_path, {"a.weight": gradient(3.0, mean_abs=0.2)}, {"a.weight": bad, "a.bias": gradient(0.0)}, {})
    shown = drawn(history, monkeypatch)
    norm, magnitude, ratio = shown.axes
    assert [axes.get_yscale() for axes in shown.axes] == ["log"] * 3
    assert norm.lines[0].get_ydata()[0] == 3.0
    assert math.isnan(norm.lines[0].get_ydata()[1])
    assert norm.lines[3].get_ydata() == pytest.approx([0.1 * math.sqrt(20)] * 3)
    assert magnitude.lines[0].get_ydata()[0] == 0.2
    assert ratio.lines[0].get_ydata()[0] == 3.0
    assert [list(one.get_xdata()) for one in norm.lines] == [[0, 1, 2]] * 4
    marks = [tuple(one.get_offsets()[0]) for one in norm.collections]
    assert marks == [(1, 0), (1, 1)]  # epoch 1: a 0 at the foot, a NaN at the top
    assert [text.get_text() for text in shown.legends[0].get_texts()] == list(SHAPES)
    from_input = [np.mean(one.get_color()[:3]) for one in norm.lines]
    assert from_input == sorted(from_input), "viridis goes from dark to light"


def test_a_legend_of_160_weights_names_some_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: dict[str, Sequence[int]] = {}
    for index in range(80):
        shapes |= {f"{index}.weight": (3, 3), f"{index}.bias": (3,)}
    history = record_of(tmp_path, {}, gradients=[{name: gradient(0.1) for name in shapes}], shapes=shapes)
    shown = drawn(history, monkeypatch)
    names = [text.get_text() for text in shown.legends[0].get_texts()]
    assert names == [f"{index}.weight" for index in range(0, 80, 3)]
    assert "1 of 3 named" in shown.legends[0].get_title().get_text()


def test_metadata_and_rows_are_sound_json(tmp_path: Path) -> None:
    nan = float("nan")
    history = made(tmp_path / "run", {"a.weight": gradient(nan, mean_abs=nan, nonfinite=1, first=0)}, weight_norm=0.5)
    sizes = GradientNorms.of(history)
    with Image.open(sizes.save(tmp_path / "c.png")) as image:
        told = json.loads(image.text["phosphene"])  # type: ignore[attr-defined]
    assert (told["run"], told["epochs"], told["verdicts"]) == (str(history.folder), [0], verdicts(history))
    rows = {row["weight"]: row for row in sizes.rows()}
    assert rows["a.weight"] == {"weight": "a.weight", "norm": None, "mean_abs": None, "weight_norm": 0.5, "ratio": None}
    assert rows["c.weight"]["ratio"] == pytest.approx(0.1 * math.sqrt(20) / 0.5)


def test_a_record_without_gradients_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidRequest, match="holds no gradients; train again with a Recorder of gradients="):
        curves(record_of(tmp_path / "a", {"conv1": [torch.zeros(1, 1, 3, 3)]}))
    with pytest.raises(errors.InvalidRequest, match="no finished epoch"):
        verdicts(record_of(tmp_path / "b", {"conv1": []}))
