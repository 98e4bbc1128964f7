"""Filters rendered after each epoch: what `render` gives for the network then, and no danger to the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phosphene import errors
from phosphene.network.loading import load
from phosphene.rendering.objectives import channel
from phosphene.rendering.recipes import find_recipe
from phosphene.rendering.render import render
from phosphene.training.history import open_history
from phosphene.training.recorder import Recorder
from small_training import network, train


def test_filters_are_rendered_after_each_epoch_from_one_seed(tmp_path: Path, shown_bars: list[str]) -> None:
    net = network()
    recipe = find_recipe("fast").with_settings(32, 3)
    with Recorder(net, tmp_path, filters=".4:1,3", recipe=recipe) as recorder:
        train(net, recorder)
        assert shown_bars == []  # the training may have a bar of its own
        expected = render(load(net), channel(".4", [1, 3]), recipe)
    history = open_history(tmp_path)
    pictures = history.filters()
    assert list(pictures) == ["filter_1", "filter_3"]
    for picture, rendered in zip(pictures.values(), expected.pictures, strict=True):
        assert picture.tobytes() == rendered.tobytes()
    assert history.filters(0)["filter_1"].tobytes() != pictures["filter_1"].tobytes()
    assert history.facts["filters"]["channels"] == [1, 3]


def test_filters_that_cannot_be_rendered_do_not_stop_the_training(tmp_path: Path, monkeypatch: Any) -> None:
    net = network()
    recorder = Recorder(net, tmp_path, gradients=None, filters=".4:0", recipe="max-step")
    monkeypatch.setattr("phosphene.training.epoch_filters.render", lambda *_, **__: 1 / 0)
    with pytest.warns(UserWarning, match="filters were not rendered: division by zero"):
        recorder.end_epoch(0)

    def stop(*_: Any, **__: Any) -> None:
        raise errors.Interrupted("stopped")

    monkeypatch.setattr("phosphene.training.epoch_filters.render", stop)
    with pytest.raises(KeyboardInterrupt):
        recorder.end_epoch(1)
    assert open_history(tmp_path).epochs == [0]
    assert open_history(tmp_path).filters() == {}


def test_a_run_with_filters_is_continued_too(tmp_path: Path) -> None:
    net = network()
    for epoch in range(2):
        recorder = Recorder(net, tmp_path, gradients=None, filters="1:0:2", recipe="max-step")
        recorder.filters = None  # the pictures do not matter here
        recorder.end_epoch(np.int64(epoch))  # type: ignore[arg-type]
    assert open_history(tmp_path).epochs == [0, 1]
    assert open_history(tmp_path).facts["filters"]["layer"] == ".4"
    with pytest.raises(errors.InvalidRequest, match="was made with other filters; choose another folder"):
        Recorder(net, tmp_path, gradients=None, filters="1:0:3", recipe="max-step")
