"""The options of the callbacks: those of a Recorder, with its defaults, by name or by position."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from phosphene.training.callbacks.options import RecorderOptions, recorder_arguments
from phosphene.training.recorder import CAP, Recorder


def test_every_option_is_one_of_the_recorder() -> None:
    arguments = set(inspect.signature(Recorder).parameters) - {"model", "store", "epochs"}
    assert set(RecorderOptions.__annotations__) == arguments


def test_defaults_are_those_of_the_recorder() -> None:
    assert recorder_arguments("runs/a", (), {"every": 2}) == {
        "store": "runs/a", "layers": "conv*", "gradients": "running", "filters": None, "every": 2, "data": None,
        "loss": None, "recipe": "fast", "writer": None, "cap": CAP,
    }  # fmt: skip


def test_the_first_four_options_may_be_given_by_position() -> None:
    arguments = recorder_arguments(Path("a"), ("conv1", None, "conv1:0", 3), {"cap": 5})
    chosen = {name: arguments[name] for name in ("layers", "gradients", "filters", "every", "cap")}
    assert chosen == {"layers": "conv1", "gradients": None, "filters": "conv1:0", "every": 3, "cap": 5}


@pytest.mark.parametrize(
    ("positional", "options", "sentence"),
    [
        (("conv1", None, None, 1, "data"), {}, "too many positional arguments"),
        (("conv1",), {"layers": "conv2"}, "multiple values for argument 'layers'"),
        ((), {"colour": 1}, "unexpected keyword argument 'colour'"),
    ],
)
def test_wrong_options_are_refused_at_once(positional: Any, options: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        recorder_arguments("a", positional, options)
