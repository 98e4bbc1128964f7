"""Training runs on the page: numbers are the record's, pictures those of a film, and all of it has an address."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fake_training_record import gradient, record_of
from phosphene.errors import EntryNotFound, WeightsRefused
from phosphene.images.encode import decode_image, same_size
from phosphene.training.film_strip import LayerStrip, film
from phosphene.training.film_strip import layer_strip as course_of
from phosphene.training.gradient_norms import verdicts
from phosphene.training.history import History
from phosphene.web.templating import render_template
from phosphene.web.urls import layer_path, layer_slug
from phosphene.web.views.training import CHART, TrainingView, belongs, chart, gradient_cells

LAYERS = ("conv1", "deep/conv2")
LOSSES = (2.0, 1.0, 0.5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def three_epochs(folder: Path, norms: Sequence[float] = (0.5, 0.25, 0.125)) -> History:
    """Return a record of two layers, gradients of two weights, and two rendered filters of the first layer."""
    kernels = {path: [random(4, 2, 3, 3, seed=epoch) * (epoch + 1) for epoch in range(3)] for path in LAYERS}
    shapes = {"conv1.weight": (4, 2, 3, 3), "scores.weight": (3, 4)}
    return record_of(
        folder,
        kernels,
        metrics=[{"loss": loss} for loss in LOSSES],
        gradients=[{"conv1.weight": gradient(norm), "scores.weight": gradient(2.0)} for norm in norms],
        shapes=shapes,
        weight_norm=4.0,
        pictures=("conv1", [random(2, 3, 12, 12, seed=epoch).clamp(0, 1) for epoch in range(3)]),
    )


@pytest.fixture
def training(tmp_path: Path) -> TrainingView:
    return TrainingView(three_epochs(tmp_path / "run"), "a~20b")


def pixels(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(decode_image(content).convert("RGB"))


def test_slugs_can_be_read_again() -> None:
    for path in ("conv1", "base/conv1", ".body", "a b", "~2F", "größe", "100%", "a.b-c_d", "..", "x?y#z"):
        assert layer_path(layer_slug(path)) == path
        assert all(one.isascii() and (one.isalnum() or one in "._-~") for one in layer_slug(path))
        assert not layer_slug(path).startswith(".")
    assert layer_slug("größe/1") == "gr~C3~B6~C3~9Fe~2F1"


def test_the_view_holds_the_record_s_numbers(training: TrainingView) -> None:
    view = training.view()
    assert view["epochs"] == [0, 1, 2]
    assert view["weights"] == ["conv1.weight", "scores.weight"]
    # norm, mean magnitude, norm / 4, batches that are broken
    assert view["last_cells"] == [("0.125", "0.5", "0.0312", "0"), ("2", "0.5", "0.5", "0")]
    assert view["verdicts"] == verdicts(training.history)
    told = json.loads(view["figures"])
    assert told["metrics"] == [["2"], ["1"], ["0.5"]]
    assert told["gradients"][0] == "0.5 0.5 0.125 0|2 0.5 0.5 0"
    first, second = view["layers"]
    assert (first["path"], first["filters"], first["weight_rows"]) == ("conv1", [0, 1, 2], [0])
    assert (second["slug"], second["filters"], second["weight_rows"]) == ("deep~2Fconv2", [], [])
    assert dict(view["facts"])["network"] == "net, 84 trained weights"


def test_a_metric_becomes_a_line_that_breaks_where_it_is_no_number() -> None:
    made = chart("loss", [0, 1, 2, 4], [3.0, float("nan"), 1.0, 2.0])
    width, height = CHART
    assert made["marks"] == [[0, 0], None, [width / 2, height], [width, height / 2]]
    assert made["lines"] == ["0.0,0.0", f"{width / 2:.1f},{height:.1f} {width:.1f},{height / 2:.1f}"]
    assert (made["low"], made["high"], made["texts"]) == ("1", "3", ["3", "nan", "1", "2"])


def test_figures_of_a_weight() -> None:
    assert gradient_cells((3.0, 0.25, 0.0, 2)) == ("3", "0.25", "nan", "2")  # a weight of norm 0
    assert gradient_cells(None) == ("–", "–", "–", "–")


def test_a_weight_belongs_to_the_layer_it_is_of() -> None:
    assert belongs("conv1.weight", "conv1")
    assert belongs("base/conv1/kernel", "base/conv1")
    assert not belongs("conv10.weight", "conv1")
    assert not belongs("block.conv1.weight", "block")


def test_kernels_are_the_frames_of_a_film(training: TrainingView) -> None:
    frames = list(same_size(film(training.history, "deep/conv2")))
    for epoch, frame in enumerate(frames):
        content, kind = training.file(f"deep~2Fconv2/kernels_{epoch}.png")
        assert kind == "image/png"
        below = np.asarray(frame)[-100:]  # below the caption, where the sheet is
        assert (pixels(content)[-100:, : below.shape[1]] == below).all()


def test_rendered_filters_and_kernels_of_one_layer_are_apart(training: TrainingView) -> None:
    course = course_of(training.history, "conv1")
    assert course.look.noun == "filters"
    kernels, rendered = (training.file(f"conv1/{noun}_1.png")[0] for noun in ("kernels", "filters"))
    assert pixels(kernels).shape != pixels(rendered).shape
    with Image.open(io.BytesIO(training.file("conv1/strip.png")[0])) as image:
        assert (np.asarray(image) == np.asarray(course.strip())).all()
    sides = next(size for size in course.look.sizes() if max(size) <= 64)
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


def test_every_file_is_there_and_nothing_else(training: TrainingView) -> None:
    names = list(training.files())
    assert len(names) == len(set(names)) == 3 + (3 + 3 + 1) + (3 + 1)
    for name in names:
        assert training.file(name)[0]
    for name in (
        "", "index.html", "conv1", "conv1/", "conv1/kernels_3.png", "conv1/kernels_01.png", "conv1/kernels_-1.png",
        "deep/conv2/kernels_0.png", "deep~2fconv2/kernels_0.png", "deep~2Fconv2/filters_0.png", "conv1/kernels_٣.png",
        "../manifest.json", "conv1/../../manifest.json", "epochs/000000/manifest.json", "\0", "conv1/kernels_0.png/x",
    ):  # fmt: skip
        with pytest.raises(EntryNotFound, match="the run a~20b has no"):
            training.file(name)


def test_pictures_are_made_once_and_few_are_kept(training: TrainingView) -> None:
    first = training.file("conv1/kernels_0.png")
    assert training.file("conv1/kernels_0.png") is first
    training.cache.max_size = len(first[0])
    second = training.file("conv1/kernels_1.png")
    assert [entry.value for entry in training.cache.entries.values()] == [second]
    assert training.file("conv1/kernels_0.png") == first  # made again, the same


def test_a_run_that_goes_on_is_read_anew(tmp_path: Path, training: TrainingView) -> None:
    tag, before = training.tag(), training.file("deep~2Fconv2/kernels_0.png")[0]
    shutil.rmtree(training.history.place(2))  # as if it had not come so far
    assert training.tag() != tag
    assert training.view()["epochs"] == [0, 1]
    assert training.file("deep~2Fconv2/kernels_0.png")[0] != before  # the scale that all share is another
    assert training.card()["metrics"] == [("loss", "1")]


def test_the_card(training: TrainingView) -> None:
    assert training.card() == {
        "name": "a~20b",
        "model": "net",
        "epochs": 3,
        "last": 2,
        "metrics": [("loss", "0.5")],
        "layers": 2,
        "picture": "card.png",
        "size": None,
        "alt": "conv1 after epoch 2",
    }


def test_a_long_run_is_shown_in_part_and_says_so(tmp_path: Path) -> None:
    weights = random(1, 1, 2, 2)
    history = record_of(
        tmp_path / "run", {"conv": [weights] * 130}, metrics=[{"loss": 1 / (one + 1)} for one in range(130)]
    )
    training = TrainingView(history, "long")
    view = training.view()
    assert len(view["epochs"]) == 100
    assert view["epochs"] == [round(index * 129 / 99) for index in range(100)]
    assert dict(view["facts"])["epochs"] == "130 from 0 to 129; 100 are shown, evenly spread"
    assert len(list(training.files())) == 1 + 100 + 1
    assert not view["has_gradients"]
    assert view["verdicts"] == []


def test_a_run_without_epochs(tmp_path: Path) -> None:
    training = TrainingView(record_of(tmp_path / "run", {"conv1": []}), "young")
    assert list(training.files()) == []
    assert training.card()["epochs"] == 0
    assert training.card()["picture"] is None
    text = render_template("run.html", "runs/young/index.html", live=False, **training.view()).decode()
    assert "No epoch is finished yet" in text


def test_a_damaged_epoch_is_left_out_and_named(training: TrainingView) -> None:
    (training.history.place(1) / "manifest.json").write_text("{")
    view = training.view()
    assert "damaged" in view["verdicts"][0]
    assert any(epoch == 1 and "is damaged" in note for epoch, note in view["notes"])
    assert json.loads(view["figures"])["metrics"] == [["2"], [""], ["0.5"]]
    (training.history.place(2) / "kernels.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsRefused, match="is damaged"):
        training.file("deep~2Fconv2/kernels_0.png")


def test_the_page_escapes_names_and_links_relatively(tmp_path: Path) -> None:
    name = '<b>"x"</b>'
    history = record_of(tmp_path / "run", {name: [random(2, 2, 3, 3)]}, metrics=[{"<i>": 1.0}])
    training = TrainingView(history, "odd")
    text = render_template("run.html", "runs/odd/index.html", live=False, **training.view()).decode()
    assert "<b>" not in text.replace('<b class="which">', "").replace('<b data-metric="0">', "")
    assert "<i>" not in text
    assert "style=" not in text
    assert "onclick" not in text
    assert 'src="../../static/run.js" defer' in text
    slug = layer_slug(name).replace("~", "~")
    assert f'src="{slug}/kernels_0.png"' in text
    assert isinstance(training.pictures.strip(name), LayerStrip)
