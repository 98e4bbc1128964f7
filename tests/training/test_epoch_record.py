"""What is recorded of an epoch: numbers that are not finite, and a histogram by power of two."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from phosphene.training.epoch_record import bin_name, from_json_number, json_number
from phosphene.training.history import open_history
from phosphene.training.recorder import Recorder
from small_training import network, train


def test_gradients_that_are_not_finite_are_recorded_as_such_and_named(tmp_path: Path) -> None:
    net = network()
    first = next(net.parameters())

    def spoil() -> None:
        assert first.grad is not None
        first.grad[0, 0, 0, 0] = math.nan

    recorder = Recorder(net, tmp_path)
    with pytest.warns(UserWarning, match="NaN or infinite") as caught:
        train(net, recorder, epochs=1, after=spoil)
    sentence = "epoch 0: the gradient of 0.weight was NaN or infinite in 3 of 3 batches, first in batch 0"
    assert str(caught[0].message) == sentence
    entry = open_history(tmp_path).entry()
    recorded = entry["gradients"]["weights"]["0.weight"]
    assert (recorded["nonfinite"], recorded["first_nonfinite"], recorded["batches"]) == (3, 0, 3)
    assert math.isnan(recorded["norm"])
    assert recorded["histogram"]["nonfinite"] >= 3
    assert entry["notes"][0] == sentence
    assert math.isnan(open_history(tmp_path).gradients()["0.weight"][0, 0, 0, 0])


def test_numbers_that_are_not_finite_survive_json() -> None:
    assert [json_number(value) for value in (0.5, math.inf, -math.inf)] == [0.5, "Infinity", "-Infinity"]
    assert json_number(math.nan) == "NaN"
    assert from_json_number({"a": "Infinity", "b": {"c": "-Infinity"}, "d": "text"}) == {
        "a": math.inf,
        "b": {"c": -math.inf},
        "d": "text",
    }


def test_a_bin_is_named_by_its_power_of_two() -> None:
    assert [bin_name(number) for number in (0, 1, 115, 127, 254, 255)] == [
        "zero",
        "-126",
        "-12",
        "0",
        "127",
        "nonfinite",
    ]
