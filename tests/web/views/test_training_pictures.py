"""The files of a training run: its pictures are those of a film, its table has the numbers of the record."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
from PIL import Image

from page_store import training
from phosphene.images.encode import decode_image, pad_to_same_size
from phosphene.training.film_strip import film
from phosphene.training.film_strip import layer_strip as course_of
from phosphene.web.views.training import TrainingView

__all__ = ["training"]


def pixels(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(decode_image(content).convert("RGB"))


def test_kernels_are_the_frames_of_a_film(training: TrainingView) -> None:
    frames = list(pad_to_same_size(film(training.history, "deep/conv2")))
    for epoch, frame in enumerate(frames):
        content, kind = training.file(f"deep~2Fconv2/kernels_{epoch}.png")
        assert kind == "image/png"
        below = np.asarray(frame)[-100:]  # below the caption, where the sheet is
        assert (pixels(content)[-100:, : below.shape[1]] == below).all()


def test_rendered_filters_and_kernels_of_one_layer_are_apart(training: TrainingView) -> None:
    course = course_of(training.history, "conv1")
    assert course.timeline.noun == "filters"
    kernels, rendered = (training.file(f"conv1/{noun}_1.png")[0] for noun in ("kernels", "filters"))
    assert pixels(kernels).shape != pixels(rendered).shape
    with Image.open(io.BytesIO(training.file("conv1/strip.png")[0])) as image:
        assert (np.asarray(image) == np.asarray(course.strip())).all()
    sides = next(size for size in course.timeline.sizes() if max(size) <= 64)
    stored = training.history.filters(2)["filter_3"].resize(sides[::-1], Image.Resampling.NEAREST)
    assert (pixels(training.file("card.png")[0])[: sides[0], : sides[1]] == np.asarray(stored)).all()


def test_the_table_of_gradients(training: TrainingView) -> None:
    content, kind = training.file("gradients.csv")
    rows = list(csv.reader(io.StringIO(content.decode())))
    assert kind.startswith("text/csv")
    assert rows[0] == ["epoch", "weight", "norm", "mean_abs", "weight_norm", "nonfinite"]
    assert rows[1:3] == [
        ["0", "conv1.weight", "0.5", "0.5", "4.0", "0"],
        ["0", "scores.weight", "2.0", "0.5", "4.0", "0"],
    ]
    assert len(rows) == 7
