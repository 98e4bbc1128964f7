"""Channel statistics: numbers, blank and broken channels, and the row of a layer, each by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_activations import activations_of

from phosphene.inspection import channel_statistics as module
from phosphene.inspection.channel_statistics import channel_statistics


def test_measured_by_hand_in_several_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_VALUES", 8)
    maps = torch.tensor([[-1.0, 0, 3, 6], [0, 0, 0, 0], [-5, -5, -5, -5], [7, 7, 7, 7 + 2e-6], [0, 1, math.inf, 2]])
    statistics = channel_statistics(maps.view(5, 2, 2))
    assert statistics.low.tolist()[:3] == [-1, 0, -5]
    assert statistics.high.tolist()[:3] == [6, 0, -5]
    assert statistics.mean.tolist()[:3] == [2, 0, -5]
    assert statistics.zero.tolist() == [0.25, 1, 0, 0, 0.25]
    assert statistics.blank.tolist() == [False, True, True, True, False]
    assert statistics.broken.tolist() == [False, False, False, False, True]
    assert channel_statistics(torch.tensor([0.0, -3.0]).view(2, 1, 1)).blank.tolist() == [True, False]


def test_the_row_of_a_layer_by_hand() -> None:
    value = torch.tensor([[[0.0, 2], [4, 6]], [[0, 0], [0, 0]], [[-1, -2], [-3, -2]], [[math.nan, 1], [1, 1]]])
    row = activations_of(act=value).rows()[0]
    assert row == {
        "layer": "act", "kind": "ReLU", "shape": [4, 2, 2], "channels": 4, "map": [2, 2], "blank": 0.25, "broken": 0.25,
        "silent": pytest.approx(2 / 3), "zero": pytest.approx(5 / 12), "mean": pytest.approx(1 / 3),
        "minimum": -3.0, "maximum": 6.0,
    }  # fmt: skip
    broken = activations_of(act=value[3:]).rows()[0]
    assert {name: broken[name] for name in ("silent", "zero", "mean", "minimum", "maximum")} == dict.fromkeys(
        ("silent", "zero", "mean", "minimum", "maximum")
    )
    json.dumps(broken, allow_nan=False)
