"""The arguments that a callback passes on to its Recorder, which is made when the training begins."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from phosphene.rendering.recipes import Recipe
from phosphene.training.recorder import Recorder


class RecorderOptions(TypedDict, total=False):
    """The options of every callback: those of `Recorder`, which explains them and has their defaults."""

    layers: str
    gradients: str | None
    filters: str | None
    every: int
    data: Any
    loss: Any
    recipe: str | Recipe
    writer: Any
    cap: int


def recorder_arguments(store: str | Path, positional: Sequence[Any], options: RecorderOptions) -> dict[str, Any]:
    """Return what a Recorder takes besides `model` and `epochs`, by name, with its defaults.

    `positional` are the values of `layers`, `gradients`, `filters` and `every`, or of the first of these.
    """
    bound = inspect.signature(Recorder).bind(None, store, *positional, epochs=None, **options)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name not in ("model", "epochs")}
