"""The commands that show a recorded training: what they write and print, and what bad input gets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cli_runner import Run, command_line
from fake_training_record import gradient, record_of
from phosphene.cli import training
from phosphene.training.film_strip import strip
from phosphene.training.history import History, open_history

SHAPES = {"conv1.weight": (4, 3, 3, 3), "conv2.weight": (10, 5, 3, 3)}
NETS = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs the command line in a folder of its own."""
    return command_line(monkeypatch, capsys, tmp_path, NETS, "training_nets")


@pytest.fixture
def history(tmp_path: Path) -> History:
    """Return a record, in `run`, of three epochs: the first layer vanishes in the last, whose kernels hold a NaN."""
    torch.manual_seed(0)
    conv2 = [torch.randn(10, 5, 3, 3) for _ in range(3)]
    conv2[2][0, 0, 0, 0] = float("nan")
    kernels = {"conv1": [torch.randn(4, 3, 3, 3) for _ in range(3)], "conv2": conv2}
    gradients = [{name: gradient(1.0) for name in SHAPES} for _ in range(2)]
    gradients.append({"conv1.weight": gradient(1e-6), "conv2.weight": gradient(1.0)})
    metrics = [{"loss": 1.5 - epoch / 2} for epoch in range(3)]
    return record_of(tmp_path / "run", kernels, metrics, gradients, SHAPES)


def metadata_of(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        metadata: dict[str, Any] = json.loads(image.text["phosphene"])  # type: ignore[attr-defined]
        return metadata


def test_kernels_of_an_epoch_are_that_epoch_s(run: Run, history: History, tmp_path: Path) -> None:
    ran = run("kernels", "run", "conv2", "--epoch", 1, "--style", "grey")
    assert (ran.code, ran.out, ran.err) == (0, "kernels_conv2_epoch_1.png\n", "")
    facts = metadata_of(tmp_path / "kernels_conv2_epoch_1.png")
    assert (facts["run"], facts["layer"], facts["epoch"], facts["style"]) == ("run", "conv2", 1, "grey")
    with Image.open(tmp_path / "kernels_conv2_epoch_1.png") as sheet:
        page = np.asarray(sheet)
    weights = history.kernels("conv2", 1).weights
    stretched = (weights - weights.min()) / (weights.max() - weights.min())  # R2.2b: all together, to 0..1
    top = len(page) - 24 - (10 * 49 - 1)  # two borders of 12 pixels below 10 rows
    left = next(x for x in range(page.shape[1]) if (page[top : top + 48, x] != 255).all(-1).mean() > 0.6)
    for out in range(10):
        for channel in range(5):
            cells = page[
                top + out * 49 + 8 : top + out * 49 + 48 : 16, left + channel * 49 + 8 : left + channel * 49 + 48 : 16
            ]
            wanted = (stretched[out, channel] * 255).round().numpy()
            assert np.abs(cells[..., 0].astype(int) - wanted).max() <= 1  # float32 here, float64 there
            assert (cells[..., 0] == cells[..., 2]).all()


def test_kernels_of_a_run_are_by_default_the_last_epoch_s(run: Run, history: History, tmp_path: Path) -> None:
    ran = run("kernels", "run", 0, "--out", "k.png", "--json")
    assert ran.err == "phosphene: layer 0 of the record is conv1\n"
    assert (json.loads(ran.out)["files"], json.loads(ran.out)["epoch"]) == (["k.png"], 2)


def test_kernels_of_a_model_in_grey(run: Run, tmp_path: Path) -> None:
    options = ("--input-size", 16, "--channels-in", 2, "--quiet")
    assert run("kernels", "training_nets:net", 0, "--style", "grey", *options).out == "kernels_.0.png\n"
    facts = metadata_of(tmp_path / "kernels_.0.png")
    assert (facts["style"], facts["model"]) == ("grey", "training_nets:net")
    with Image.open(tmp_path / "kernels_.0.png") as sheet:
        page = np.asarray(sheet)
    assert (page[-60:-12, 40:60, 0] == page[-60:-12, 40:60, 2]).all()


def test_strip_writes_what_python_draws(run: Run, history: History, tmp_path: Path) -> None:
    ran = run("strip", "run", "conv2")
    assert (ran.code, ran.out, ran.err) == (0, "strip_conv2.png\n", "")
    with Image.open(tmp_path / "strip_conv2.png") as page:
        assert np.array_equal(np.asarray(page), np.asarray(strip(open_history("run"), "conv2")))
    facts = metadata_of(tmp_path / "strip_conv2.png")
    assert (facts["run"], facts["layer"], facts["epochs"]) == ("run", "conv2", [0, 1, 2])


def test_strip_as_a_film(run: Run, history: History, tmp_path: Path) -> None:
    ran = run("strip", "run", 1, "--out", "film.gif", "--json")
    assert "layer 1 of the record is conv2" in ran.err
    assert json.loads(ran.out)["files"] == ["film.gif"]
    with Image.open(tmp_path / "film.gif") as image:
        assert image.n_frames == 3


def test_gradients_writes_the_curves_and_says_what_is_wrong(run: Run, history: History, tmp_path: Path) -> None:
    ran = run("gradients", "run")
    path, sentence = ran.out.splitlines()
    assert (ran.code, path, ran.err) == (0, "gradients.png", "")
    assert sentence.startswith(
        "vanishing: the gradient of conv1.weight is less than 0.001 of the last layer's in epoch 2"
    )
    assert metadata_of(tmp_path / "gradients.png")["verdicts"] == [sentence]
    printed = json.loads(run("gradients", "run", "--json").out)
    assert (printed["files"], printed["verdicts"], printed["epochs"]) == (["gradients.png"], [sentence], [0, 1, 2])
    assert printed["weights"][0]["norm"] == pytest.approx(1e-6)
    assert not math.isnan(printed["weights"][1]["ratio"])


BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "kernels of no run": (("kernels", "none", 0, "--epoch", 1), "--epoch is for the folder of a recorded training"),
    "an epoch of a model": (("kernels", "training_nets:net", 0, "--epoch", 1), "which MODEL is not; leave it out"),
    "kernels of no epoch": (("kernels", "run", "conv1", "--epoch", 7), "run holds no epoch 7; it has 0, 1, 2"),
    "kernels of no layer": (("kernels", "run", "conv3"), "nothing of a layer 'conv3'; the nearest are: conv2, conv1"),
    "kernels in neon": (("kernels", "run", "conv1", "--style", "neon"), "no style 'neon'; choose one of: signed, grey"),
    "kernels with NaN": (("kernels", "run", "conv2"), "after epoch 2 the kernels of conv2 hold NaN or infinity"),
    "kernels as a GIF": (("kernels", "run", "conv1", "--out", "k.gif"), "does not end in .png"),
    "kernels of an empty run": (("kernels", "empty", "conv1"), "empty holds no finished epoch yet"),
    "weights for a run": (("kernels", "run", "conv1", "--weights", "none"), "which --weights is not for"),
    "strip of no run": (("strip", "none", "conv1"), "none holds no record of a training"),
    "strip of an empty run": (("strip", "empty", "conv1"), "empty holds no finished epoch yet"),
    "strip of no layer": (("strip", "run", "conv3"), "the nearest are: conv2, conv1"),
    "strip of layer 9": (("strip", "run", 9), "the nearest are: conv1, conv2"),
    "strip in neon": (("strip", "run", "conv1", "--style", "neon"), "no style 'neon'"),
    "strip as text": (("strip", "run", "conv1", "--out", "s.txt"), "does not end in .png, .gif or .mp4"),
    "strip below a file": (("strip", "run", "conv1", "--out", "file/s.png"), "cannot be written"),
    "film below a file": (("strip", "run", "conv1", "--out", "file/s.gif"), "cannot be written"),
    "gradients of no run": (("gradients", "none"), "none holds no record of a training"),
    "gradients of an empty run": (("gradients", "empty"), "empty holds no finished epoch yet"),
    "gradients of a run without": (("gradients", "bare"), "bare holds no gradients"),
    "gradients as a GIF": (("gradients", "run", "--out", "g.gif"), "does not end in .png"),
    "a damaged run": (("strip", "damaged", "conv1"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_exit_code_2(case: str, run: Run, history: History, tmp_path: Path) -> None:
    arguments, sentence = BAD[case]
    record_of(tmp_path / "empty", {"conv1": []})
    record_of(tmp_path / "bare", {"conv1": [torch.zeros(1, 1, 3, 3)]})
    (tmp_path / "file").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/manifest.json").write_text('{"kind": "training", ')
    before = sorted(tmp_path.rglob("*"))
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.splitlines()) == 1, ran.err
    assert ran.err.startswith("phosphene: ")
    assert sentence in ran.err
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before


def test_the_output_is_checked_before_the_record_is_read(
    run: Run, history: History, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("the record was read although the result cannot be written")

    monkeypatch.setattr(training, "open_history", work)
    (tmp_path / "file").touch()
    assert run("strip", "run", "conv1", "--out", "file/s.png").code == 2
    assert run("kernels", "run", "conv1", "--out", "file/k.png").code == 2
    assert run("gradients", "run", "--out", "file/g.png").code == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    ran = run("strip", "run", "conv1", "--out", "s.mp4")
    assert ran.code == 2
    assert "needs the program ffmpeg" in ran.err
