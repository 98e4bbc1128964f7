"""The view of a training run: its numbers are the record's, and each of its files has a path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fake_training_record import record_of
from page_store import random_tensor, training
from phosphene.errors import EntryNotFound, WeightsRefused
from phosphene.training.film_strip import LayerStrip
from phosphene.training.gradient_verdicts import verdicts
from phosphene.web.templating import render_template
from phosphene.web.urls import layer_slug
from phosphene.web.views import training as training_view
from phosphene.web.views.training import CHART, TrainingView, belongs, chart, gradient_cells

__all__ = ["training"]


def test_the_view_holds_the_record_s_numbers(training: TrainingView) -> None:
    view = training.view()
    assert view["epochs"] == [0, 1, 2]
    assert view["weights"] == ["conv1.weight", "scores.weight"]
    # norm, mean magnitude, norm / 4, batches that are broken
    assert view["last_cells"] == [("0.125", "0.5", "0.0312", "0"), ("2", "0.5", "0.5", "0")]
    assert view["verdicts"] == verdicts(training.history)
    figures = json.loads(view["figures"])
    assert figures["metrics"] == [["2"], ["1"], ["0.5"]]
    assert figures["gradients"][0] == "0.5 0.5 0.125 0|2 0.5 0.5 0"
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
    shutil.rmtree(training.history.epoch_folder(2))  # as if it had not come so far
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


def test_a_long_run_is_shown_in_part_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_view.MAX_EPOCHS == 100
    monkeypatch.setattr(training_view, "MAX_EPOCHS", 10)
    kernels, metrics = [random_tensor(1, 1, 2, 2)] * 14, [{"loss": 1 / (epoch + 1)} for epoch in range(14)]
    training = TrainingView(record_of(tmp_path / "run", {"conv": kernels}, metrics=metrics), "long")
    view = training.view()
    assert len(view["epochs"]) == 10
    assert view["epochs"] == [round(index * 13 / 9) for index in range(10)]
    assert dict(view["facts"])["epochs"] == "14 from 0 to 13; 10 are shown, evenly spread"
    assert len(list(training.files())) == 1 + 10 + 1
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
    (training.history.epoch_folder(1) / "manifest.json").write_text("{")
    view = training.view()
    assert "damaged" in view["verdicts"][0]
    assert any(epoch == 1 and "is damaged" in note for epoch, note in view["notes"])
    assert json.loads(view["figures"])["metrics"] == [["2"], [""], ["0.5"]]
    (training.history.epoch_folder(2) / "kernels.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsRefused, match="is damaged"):
        training.file("deep~2Fconv2/kernels_0.png")


def test_the_page_escapes_names_and_links_relatively(tmp_path: Path) -> None:
    name = '<b>"x"</b>'
    history = record_of(tmp_path / "run", {name: [random_tensor(2, 2, 3, 3)]}, metrics=[{"<i>": 1.0}])
    training = TrainingView(history, "odd")
    text = render_template("run.html", "runs/odd/index.html", live=False, **training.view()).decode()
    assert "<b>" not in text.replace('<b class="which">', "").replace('<b data-metric="0">', "")
    assert "<i>" not in text
    assert "style=" not in text
    assert "onclick" not in text
    assert 'src="../../static/run.js" defer' in text
    slug = layer_slug(name)
    assert f'src="{slug}/kernels_0.png"' in text
    assert isinstance(training.pictures.strip(name), LayerStrip)
