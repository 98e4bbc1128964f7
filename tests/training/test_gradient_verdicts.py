"""Gradient verdicts: what is said of gradients whose norms are given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fake_training_record import FINE, SHAPES, gradient, gradients_record, record_of
from phosphene.training.gradient_statistics import Gradient
from phosphene.training.gradient_verdicts import verdicts


def verdicts_on(folder: Path, *epochs: Mapping[str, Gradient], weight_norm: float = 1.0) -> list[str]:
    return verdicts(gradients_record(folder, *epochs, weight_norm=weight_norm))


def rms(size: float, name: str) -> Gradient:
    """Return a gradient of a weight with this root mean square."""
    return gradient(size * math.sqrt(math.prod(SHAPES[name])))


def test_gradients_with_which_nothing_is_wrong(tmp_path: Path) -> None:
    beginning = "nothing is wrong with the gradients of the 4 weights over 2 epochs: none vanishes, explodes"
    (sentence,) = verdicts_on(tmp_path, {}, {"a.bias": gradient(1e-9)})  # a bias before a batch normalisation
    assert sentence.startswith(beginning)


def test_a_first_layer_that_vanishes_is_named_with_the_figures(tmp_path: Path) -> None:
    (sentence,) = verdicts_on(tmp_path / "a", {}, {"a.weight": rms(0.4e-4, "a.weight")})
    assert sentence == (
        "vanishing: the gradient of a.weight is less than 0.001 of the last layer's in epoch 1; in a.weight the root "
        "mean square is 4e-05, and 0.1 in c.weight"
    )
    (sentence,) = verdicts_on(tmp_path / "b", {}, {"a.weight": rms(0.9e-4, "a.weight")})  # its norm is a 478th
    assert sentence.startswith("nothing is wrong")
    (sentence,) = verdicts_on(tmp_path / "c", {"a.weight": rms(1e-9, "a.weight")}, {})  # it recovered
    assert sentence.startswith("nothing is wrong")


def test_a_gradient_that_float32_rounds_off_vanishes(tmp_path: Path) -> None:
    small = {name: gradient(3e-8 if name == "b.weight" else 1e-6) for name in SHAPES}
    (sentence,) = verdicts_on(tmp_path, small)
    assert sentence.startswith("vanishing: the gradient of b.weight is smaller than what float32 rounds off the weight")
    assert "in b.weight the norm is 3e-08 of the weight's" in sentence


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
    (sentence,) = verdicts_on(tmp_path, *epochs, weight_norm=weight_norm)
    assert sentence.startswith("exploding: the gradients of a.weight, b.weight, c.weight; in epoch") == explodes
    if then == 11.0:
        assert (
            "in epoch 1 the norm in a.weight is 11, 110 times the weight's norm, 110 times the first epoch's;"
            in sentence
        )


def test_gradients_of_zero_are_told_from_none_at_all(tmp_path: Path) -> None:
    dead = {"a.weight": gradient(0.0, mean_abs=0.0), "a.bias": gradient(0.0, mean_abs=0.0)}
    (sentence,) = verdicts_on(tmp_path / "dead", {}, dead, dead)
    assert sentence.startswith("zero: the gradients of a.weight, a.bias are exactly 0 in all batches")
    assert sentence.endswith("(since epoch 1)")
    without = {name: fine for name, fine in FINE.items() if name != "b.weight"}
    (sentence,) = verdicts(record_of(tmp_path / "none", {}, gradients=[without], shapes=SHAPES))
    assert sentence == (
        "zero: the gradient of b.weight is not there: these weights play no part in the loss (in epoch 0)"
    )
    record = record_of(tmp_path / "frozen", {}, gradients=[without], shapes=SHAPES, frozen=["b.weight"])
    assert record.weights == list(without)
    assert verdicts(record)[0].startswith("nothing is wrong with the gradients of the 3 weights over 1 epoch")


def test_nan_is_named_with_the_batch_where_it_began(tmp_path: Path) -> None:
    nan = float("nan")
    broken = {
        "a.weight": gradient(nan, mean_abs=nan, nonfinite=2, first=2),
        "b.weight": gradient(nan, mean_abs=nan, nonfinite=3, first=1),
    }
    (sentence,) = verdicts_on(tmp_path, {}, broken)
    assert sentence == (
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
