"""The commands `layers` and `kernels` of a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cli_runner import NETS, Run, command_line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs the command line in a folder of its own, where `nets.py` lies."""
    return command_line(monkeypatch, capsys, tmp_path, NETS)


def test_layers_prints_a_row_a_layer(run: Run) -> None:
    ran = run("layers", "nets:colour", "--input-size", 32)
    assert ran.code == 0
    rows = [line.split() for line in ran.out.splitlines()]
    assert rows[1][:4] == [".0", "Conv2d", "6", "32×32"]
    assert rows[4][:4] == [".3", "Conv2d", "70", "16×16"]
    assert "8 / 2 / 3" in ran.out  # 3×3, pooled by 2, 3×3 at stride 2: 3 + 1 + 2·2 pixels


def test_layers_as_json(run: Run) -> None:
    ran = run("layers", "nets:colour", "--input-size", 32, "--json")
    printed = json.loads(ran.out)
    assert printed["model"] == "nets:colour"
    assert json.loads(run("layers", "nets:colour", "--input-size", "32x48", "--json").out)["layers"][0]["size"] == [
        32,
        48,
    ]
    assert printed["layers"][3]["receptive_field"] == {"size": [8, 8], "stride": [2.0, 2.0], "padding": [3.0, 3.0]}


def test_random_weights_are_said_to_be_random(run: Run) -> None:
    assert "random weights" in run("layers", "torchvision/squeezenet1_1", "--weights", "none").err
    assert run("layers", "torchvision/squeezenet1_1", "--weights", "none", "--quiet").err == ""


def test_kernels_writes_one_sheet(run: Run, tmp_path: Path) -> None:
    ran = run("kernels", "nets:colour", 0)
    assert (ran.code, ran.out) == (0, "kernels_.0.png\n")
    assert "convolution 0 is .0" in ran.err
    with Image.open(tmp_path / "kernels_.0.png") as sheet:
        assert json.loads(sheet.text["phosphene"])["model"] == "nets:colour"  # type: ignore[attr-defined]
